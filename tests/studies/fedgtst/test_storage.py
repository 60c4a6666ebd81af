"""What a plan says that the study keeps is what its training steps write."""

from __future__ import annotations

import pytest
from tests.studies.fedgtst.federated_peers import TINY, coloured

from jacnorm.files import load_tensors
from jacnorm.studies.fedgtst import storage, train_federated
from jacnorm.studies.fedgtst.settings import StudySettings


def test_storage_is_what_training_keeps(tmp_path, monkeypatch, digits):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")
    train_federated.federated(TINY, tmp_path, coloured(digits, tmp_path), tmp_path / "weights.safetensors", "cpu")
    tensors, _ = load_tensors(tmp_path / "weights.safetensors")
    kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert storage.kept_bytes(StudySettings(federated=TINY), ["federated"]) == kept


@pytest.mark.parametrize("experiment", ["images", "domains"])
def test_an_experiment_without_seeds_keeps_nothing(experiment):
    assert storage.kept_bytes(StudySettings(), [experiment]) == 0
