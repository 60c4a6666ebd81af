"""How much the study keeps on disk."""

from __future__ import annotations

import math
from collections.abc import Collection

from jacnorm.data.catalogue import Dataset, find
from jacnorm.studies.stability.settings import StudySettings, TrainingSettings


def kept_bytes(settings: StudySettings, experiments: Collection[str] = ("trainability", "drift")) -> int:
    """Bytes of the weights that training keeps: E7 its initial ones in float64, E9 those of the measured epochs."""
    this, other = settings.trainability, settings.drift
    arms = 2 * len(this.methods) * len(this.sparsities)
    kept = {
        "trainability": 8 * arms * len(this.seeds) * _parameters(this),
        "drift": 4 * len(other.measured_epochs) * len(other.seeds) * _parameters(other),
    }
    return sum(kept[experiment] for experiment in experiments)


def _parameters(settings: TrainingSettings) -> int:
    """Weights of one network of each data set and depth."""
    return sum(_weights(settings, find(name), depth) for name in settings.data_sets for depth in settings.depths)


def _weights(settings: TrainingSettings, data: Dataset, depth: int) -> int:
    return settings.width * (math.prod(data.shape) + (depth - 2) * settings.width + len(data.classes))
