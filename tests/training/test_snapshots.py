"""Weights travel from training to measuring bit by bit."""

from __future__ import annotations

import pytest
import torch

from jacnorm.errors import UserError
from jacnorm.files import save_tensors
from jacnorm.training.snapshots import Snapshot, load, save


def test_snapshots_come_back_in_order(tmp_path):
    layers = [torch.randn(2, 3, 4), torch.randn(2, 1, 3)]
    named = {"z/mean": torch.arange(3), "a": torch.tensor([[0.1]], dtype=torch.float64)}
    many = {str(index): torch.full((1,), float(index)) for index in range(12)}
    snapshots = [
        Snapshot.of_layers({"depth": 3, "epoch": 0}, layers),
        Snapshot({"kind": "batch norm"}, named),
        Snapshot({"kind": "deep"}, many),
    ]
    save(tmp_path / "w.safetensors", snapshots)
    first, second, third = load(tmp_path / "w.safetensors")
    assert first.cell == {"depth": 3, "epoch": 0}
    assert all(torch.equal(one, two) for one, two in zip(first.weights, layers, strict=True))
    assert second.cell == {"kind": "batch norm"}
    assert list(second.tensors) == ["z/mean", "a"]
    assert all(torch.equal(second.tensors[name], tensor) for name, tensor in named.items())
    assert [weight.item() for weight in third.weights] == list(range(12))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"a": torch.ones(1)}, {"about": "something else"})
    with pytest.raises(UserError, match="does not hold the weights of a training step; delete it"):
        load(path)
