"""What a plan says that the study keeps is what its training steps write."""

from __future__ import annotations

import pytest

from jacnorm.files import load_tensors
from jacnorm.studies.lipschitz import storage, train_depth, train_regulariser, train_residual
from jacnorm.studies.lipschitz.settings import (
    DepthSettings,
    PairedSettings,
    ResidualSettings,
    StudySettings,
    TableSettings,
)

SEEDS = {"seeds": [10, 11], "train_samples": 60}
ALL = StudySettings(
    depth=DepthSettings(**SEEDS, widths=[4, 5], depths=[2, 3], activations=["relu", "elu"], biases=True, max_epochs=1),
    residual=ResidualSettings(
        **SEEDS, stem=2, channels=2, depths=[10, 16], epochs=1, compared_epochs=1, batch=30, momentum=0.5
    ),
    paired=PairedSettings(**SEEDS, width=6, epochs=1, batch=30, test_samples=20),
    table=TableSettings(**SEEDS, depth=10, stem=2, channels=2, epochs=1, batch=30, test_samples=20),
)
COMMANDS = {
    "depth": train_depth.depth,
    "residual": train_residual.residual,
    "paired": train_regulariser.paired,
    "table": train_regulariser.table,
}


@pytest.mark.parametrize("experiment", COMMANDS)
def test_storage_is_what_training_keeps(experiment, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")
    COMMANDS[experiment](getattr(ALL, experiment), tmp_path, digits, tmp_path / "weights.safetensors", "cpu")
    tensors, _ = load_tensors(tmp_path / "weights.safetensors")
    kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert storage.kept_bytes(ALL, [experiment]) == kept
