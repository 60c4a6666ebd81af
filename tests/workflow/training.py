"""The study's real training step, in a process that a test may kill."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from jacnorm.studies.stability import train as step
from jacnorm.studies.stability.settings import DriftSettings

SETTINGS = DriftSettings(
    seeds=[10, 11], width=32, depths=[3, 6], epochs=40, train_samples=1000, measured_epochs=[0, 20, 40]
)


def drift(folder: Path, data: Path, checkpoint_seconds: float) -> None:
    """Train; a checkpoint every so many seconds instead of every minute."""
    os.environ["JACNORM_WANDB_MODE"] = "disabled"
    step.fit = functools.partial(step.fit, checkpoint_seconds=checkpoint_seconds)
    step.drift(SETTINGS, folder / "tables", [data], folder / "train" / "drift-s10-11.safetensors", "cpu")
