"""Untrained agents with weights at random, small enough for tests; nothing of the training step is needed."""

from __future__ import annotations

import torch

from jacnorm.studies.worldmodel import actor, rssm
from jacnorm.studies.worldmodel.arms import Agents, arms
from jacnorm.studies.worldmodel.rssm import Sizes
from jacnorm.studies.worldmodel.settings import PendulumSettings

OPTIONS = {
    "seeds": [10, 11],
    "episodes": 2,
    "test_episodes": 3,
    "episode_steps": 12,
    "deter": 6,
    "groups": 2,
    "classes": 3,
    "hidden": 8,
    "length": 4,
    "context": 4,
    "horizons": [1, 3, 8],
    "jacobian_transitions": 10,
    "evaluation_episodes": 4,
    "evaluation_steps": 6,
}


def small(**changes):
    """Settings of a small experiment."""
    return PendulumSettings(**{**OPTIONS, **changes})


def stack(settings, first, *, parts=rssm, dtype=torch.float32):
    """One network of `parts` per seed; no matrix, scale or offset is left at 0 or 1."""
    shapes = parts.initial(Sizes.of(settings), [torch.Generator().manual_seed(0) for _ in settings.seeds])
    found = {}
    for name, like in shapes.items():
        draws = [
            torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(first + seed))
            for seed in settings.seeds
        ]
        scale = 0.3 if like.ndim == 2 else 1.2 / like.shape[1] ** 0.5
        base = like if like.ndim == 2 else 0.0
        found[name] = (base + scale * torch.stack(draws)).to(dtype)
    return found


def agents(settings):
    """Agents of every arm, different ones in each."""
    return [
        Agents(
            arm,
            stack(settings, 100 * i),
            stack(settings, 100 * i + 50, parts=actor),
            -torch.ones(len(settings.seeds), dtype=torch.int64),
        )
        for i, arm in enumerate(arms(settings))
    ]
