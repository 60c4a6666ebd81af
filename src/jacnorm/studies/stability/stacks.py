"""Stacks of networks: which seeds are measured together, their generators and inputs, and the rows they give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from jacnorm.studies.stability.inputs import STUDY
from jacnorm.training.seeds import generator

Row = dict[str, Any]
STACK_BYTES = 2**29
"""Weights held at once; larger blocks of seeds are measured in several stacks, which changes rounding at most.

A constant, not a setting, so that the same job always gives the same bits.
"""


def stacks(seeds: Sequence[int], width: int, layers: int) -> Iterator[list[int]]:
    """Consecutive seeds whose weights fit into STACK_BYTES together, at least one."""
    rest = list(seeds)
    for count in counts(len(seeds), width, layers):
        yield rest[:count]
        rest = rest[count:]


def counts(networks: int, width: int, layers: int) -> Iterator[int]:
    """Sizes of stacks that together hold `networks` networks and each fit into STACK_BYTES."""
    size = max(1, STACK_BYTES // (8 * layers * width**2))
    for start in range(0, networks, size):
        yield min(size, networks - start)


def generators(cell: str, seeds: Sequence[int], purpose: str) -> list[torch.Generator]:
    """One generator per seed; weights, masks and diagonals of a cell differ in `purpose`."""
    return [generator(STUDY, cell, seed, purpose) for seed in seeds]


def gaussian_inputs(cell: str, seeds: Sequence[int], width: int) -> Tensor:
    """One standard Gaussian input per seed, (R, 1, width)."""
    draws = [torch.randn(1, width, generator=g, dtype=torch.float64) for g in generators(cell, seeds, "input")]
    return torch.stack(draws)


def by_seed(seeds: Sequence[int], **columns: Any) -> Iterator[Row]:
    """One row per seed; tensors of shape (R,) are taken apart, other values repeated."""
    columns = {name: value.cpu().tolist() if isinstance(value, Tensor) else value for name, value in columns.items()}
    for index, seed in enumerate(seeds):
        yield {
            "seed": seed,
            **{name: value[index] if isinstance(value, list) else value for name, value in columns.items()},
        }
