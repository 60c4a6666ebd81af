"""How much the study keeps on disk: the weights of every agent, in float32."""

from __future__ import annotations

import math
from collections.abc import Collection

from jacnorm.studies.worldmodel.settings import PendulumSettings, StudySettings

EXPERIMENTS = ("pendulum", "dreamer")
DREAMER_BYTES = {"debug": 0.2e6, "small": 75e6, "medium": 200e6, "large": 700e6}
"""Bytes of one DreamerV3 agent, roughly: its shapes are known to its own environment only."""


def kept_bytes(settings: StudySettings, experiments: Collection[str] = EXPERIMENTS) -> int:
    """Bytes of the agents that training keeps; those of DreamerV3 are estimates."""
    from jacnorm.studies.worldmodel.arms import arms

    found = 0
    if "pendulum" in experiments:
        found += len(settings.pendulum.seeds) * len(arms(settings.pendulum)) * _pendulum(settings.pendulum)
    if "dreamer" in experiments:
        agents = len(settings.dreamer.seeds) * len(settings.dreamer.tasks) * len(arms(settings.dreamer))
        found += agents * int(DREAMER_BYTES[settings.dreamer.size])
    return found


def _pendulum(settings: PendulumSettings) -> int:
    """Bytes of one agent: model, actor, critic, and the update at which it diverged."""
    from jacnorm.studies.worldmodel import actor, rssm

    sizes = rssm.Sizes.of(settings)
    numbers = sum(math.prod(shape) for part in (rssm, actor) for shape in part.shapes(sizes).values())
    return 4 * numbers + 8
