"""What a plan says that the study keeps is what its training steps write."""

from __future__ import annotations

import pytest

from jacnorm.files import load_tensors
from jacnorm.studies.glstm import storage, train_gpp, train_recall, train_ring
from jacnorm.studies.glstm.settings import (
    PropertySettings,
    RecallSettings,
    RegressionSettings,
    RingSettings,
    StudySettings,
)

FEW = {"train_graphs": 20, "validation_graphs": 8, "test_graphs": 8, "steps": 2, "batch": 8, "evaluations": 1}
RECALL = {
    **FEW,
    "seeds": [10, 11],
    "neighbours": [3, 4],
    "memories": [2],
    "one_hop_memories": [3],
    "one_hop_neighbours": [3],
    "further_memories": [],
    "baselines": ["gcn", "gatv2", "gatedgcn"],
    "widths": [4],
}
ALL = StudySettings(
    nar=RecallSettings(**RECALL),
    narr=RegressionSettings(**RECALL),
    gpp=PropertySettings(
        **FEW, seeds=[10, 11], tasks=["sssp", "diameter"], layers=2, width=4, memory=2, baselines=["gcn", "adgn"]
    ),
    ring=RingSettings(seeds=[10, 11], layers=[2], width=4, memory=2, train_graphs=10, test_graphs=5, steps=2),
)
COMMANDS = {
    "nar": train_recall.nar,
    "narr": train_recall.narr,
    "gpp": train_gpp.gpp,
    "ring": train_ring.ring,
}


@pytest.mark.parametrize("experiment", COMMANDS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_storage_is_what_training_keeps(experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")
    COMMANDS[experiment](getattr(ALL, experiment), tmp_path, tmp_path / "weights.safetensors", "cpu")
    tensors, _ = load_tensors(tmp_path / "weights.safetensors")
    kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert storage.kept_bytes(ALL, [experiment]) == kept


def test_an_experiment_without_seeds_keeps_nothing():
    assert storage.kept_bytes(ALL, ["peptides"]) == 0
