"""The step size of all convolutional and regularised trainings of the study."""

from __future__ import annotations

MILESTONES = (30, 60, 75)
"""Percentages of the epochs after which the step size is multiplied by DECAY; the paper: after 60, 120, 150 of 200."""
DECAY = 0.2


def step_factor(epoch: int, epochs: int) -> float:
    """What the first step size is multiplied by in epoch `epoch` (from 0) of `epochs`."""
    return DECAY ** sum(100 * epoch >= percent * epochs for percent in MILESTONES)
