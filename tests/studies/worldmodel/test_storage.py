"""What a plan says that the study keeps is what its training steps write."""

from __future__ import annotations

from jacnorm.files import load_tensors
from jacnorm.studies.worldmodel import storage, train_pendulum
from jacnorm.studies.worldmodel.settings import DreamerSettings, PendulumSettings, StudySettings

TINY = StudySettings(
    pendulum=PendulumSettings(
        seeds=[10, 11], lambdas=[0.0, 0.01], f_only_lambdas=[0.1], zero_drift=[0.3], episodes=4, test_episodes=1,
        episode_steps=12, deter=4, groups=2, classes=3, hidden=4, batch=2, length=4, updates=2, actor_updates=1,
        imagination=2, context=2, horizons=[1],
    )
)  # fmt: skip


def test_storage_is_what_training_keeps(tmp_path, monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")
    train_pendulum.pendulum(TINY.pendulum, tmp_path, tmp_path / "weights.safetensors", "cpu")
    tensors, _ = load_tensors(tmp_path / "weights.safetensors")
    kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert storage.kept_bytes(TINY, ["pendulum"]) == kept


def test_an_experiment_without_seeds_keeps_nothing():
    assert storage.kept_bytes(TINY, ["dreamer"]) == 0


def test_larger_agents_of_dreamer_keep_more():
    small, large = (
        storage.kept_bytes(StudySettings(dreamer=DreamerSettings(seeds=[10, 11], size=size)), ["dreamer"])
        for size in ("debug", "large")
    )
    assert 0 < small < large
