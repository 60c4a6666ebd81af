"""What a plan says that the study keeps is what its training steps write."""

from __future__ import annotations

import pytest

from jacnorm.files import load_tensors
from jacnorm.studies.sharpening import storage, train_descent, train_regularisers, train_scaling
from jacnorm.studies.sharpening.settings import DescentSettings, RegulariserSettings, ScalingSettings, StudySettings

SEEDS = {"seeds": [10, 11], "width": 6, "channels": 2}
ALL = StudySettings(
    descent=DescentSettings(
        **SEEDS, train_samples=40, networks=["mlp", "cnn"], steps=5, measure_every=2, square_learning_rates=[0.1]
    ),
    regularisers=RegulariserSettings(
        **SEEDS, train_samples=40, updates=4, look_every=1, matched_loss=100.0, batch=20, other_batches=[10, 40]
    ),
    scaling=ScalingSettings(**SEEDS, sizes=[20, 40], train_samples=40, widths=[4, 5], steps=2, cube_sizes=[10]),
)
COMMANDS = {
    "descent": lambda settings, data, *rest: train_descent.descent(settings, rest[0], [data], *rest[1:]),
    "regularisers": lambda settings, data, *rest: train_regularisers.regularisers(settings, rest[0], [data], *rest[1:]),
    "scaling": lambda settings, data, *rest: train_scaling.scaling(settings, rest[0], data, *rest[1:]),
}


@pytest.mark.parametrize("experiment", COMMANDS)
def test_storage_is_what_training_keeps(experiment, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")
    weights = tmp_path / "weights.safetensors"
    COMMANDS[experiment](getattr(ALL, experiment), digits, tmp_path, weights, "cpu")
    tensors, _ = load_tensors(weights)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert storage.kept_bytes(ALL, [experiment]) == kept


def test_an_experiment_without_seeds_keeps_nothing():
    assert storage.kept_bytes(ALL, ["images"]) == 0
