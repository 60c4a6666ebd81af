"""How much the study keeps on disk."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from jacnorm.data.catalogue import find
from jacnorm.settings import SeededSettings
from jacnorm.studies.sharpening.settings import (
    DescentSettings,
    NetworkSettings,
    RegulariserSettings,
    ScalingSettings,
    StudySettings,
)

if TYPE_CHECKING:
    from jacnorm.studies.sharpening.networks import Network

EXPERIMENTS = ("descent", "images", "regularisers", "scaling")


def kept_bytes(settings: StudySettings, experiments: Collection[str] = EXPERIMENTS) -> int:
    """Bytes of the networks that training keeps, if none ends early or diverges and all reach the matched loss."""
    numbers = {
        "descent": lambda: _descent(settings.descent),
        "images": lambda: _descent(settings.images),
        "regularisers": lambda: _regularisers(settings.regularisers),
        "scaling": lambda: _scaling(settings.scaling),
    }
    seeds: dict[str, SeededSettings] = {name: getattr(settings, name) for name in experiments}
    return 4 * sum(numbers[name]() * len(each.seeds) for name, each in seeds.items() if each.seeds)


def _descent(settings: DescentSettings) -> int:
    """Numbers of one seed: every run at the start, every `measure_every` updates, and at the end."""
    from jacnorm.studies.sharpening.train_descent import arms

    kept = 1 + math.ceil(settings.steps / settings.measure_every)
    networks = [
        _network(settings, data_set, network) for data_set in settings.data_sets for network in settings.networks
    ]
    return kept * len(arms(settings)) * sum(network.size for network in networks)


def _regularisers(settings: RegulariserSettings) -> int:
    """Numbers of one seed: every run after each of its budgets, and at the matched loss."""
    from jacnorm.studies.sharpening.arms import trainings

    found = 0
    for data_set in settings.data_sets:
        samples = settings.train_samples or settings.pool or find(data_set).sizes["train"]
        moments = sum(len(set(each.budgets.values())) + each.matched for each in trainings(settings, samples))
        for name in settings.networks:
            network = _network(settings, data_set, name)
            found += moments * (network.size + sum(each.numel() for each in network.buffers(1).values()))
    return found


def _scaling(settings: ScalingSettings) -> int:
    """Numbers of one seed: sizes and cube after training, widths before it too."""
    from jacnorm.studies.sharpening.cube import OUTPUTS
    from jacnorm.studies.sharpening.networks import build

    widths = sum(_network(settings, settings.data_set, "mlp", width=width).size for width in settings.widths)
    sizes = len(settings.sizes) * _network(settings, settings.data_set, "mlp").size
    cube = len(settings.cube_sizes) * build(settings, "mlp", (1, 1, settings.dimension), OUTPUTS).size
    return 2 * len(settings.parametrisations) * widths + sizes + cube


def _network(settings: NetworkSettings, data_set: str, name: str, **overrides: Any) -> Network:
    from jacnorm.studies.sharpening.networks import build

    found = find(data_set)
    return build(settings, name, tuple(found.shape), len(found.classes), **overrides)
