"""The order in which runs see their data: a pure function of the step, so that resuming needs no iterator's state."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from jacnorm.errors import UserError
from jacnorm.training.seeds import RunId, generator


def epoch_order(study: str, cell: str, seed: int, epoch: int, n: int) -> torch.Tensor:
    """A random order of 0..n-1, shape (n,), int64: the order of one run's samples in one epoch (counted from 0)."""
    return torch.randperm(n, generator=generator(study, cell, seed, f"order/{epoch}"))


def steps_per_epoch(n: int, batch: int, *, drop_last: bool = False) -> int:
    """Number of batches of size `batch` in an epoch of `n` samples; the last may be shorter unless it is dropped.

    Raises UserError if there would be no batch at all.
    """
    if n < 1 or batch < 1 or (drop_last and batch > n):
        raise UserError(f"{n} samples cannot be split into whole batches of {batch}: take a batch size of 1 to {n}")
    return n // batch if drop_last else -(-n // batch)


def batch_indices(
    step: int,
    runs: Sequence[RunId],
    n: int,
    batch: int,
    *,
    drop_last: bool = False,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The samples of one step for each of R stacked runs: shape (R, batch), int64, values in 0..n-1.

    Each epoch visits every sample once (or all but the dropped rest), in an order of its own for each run; runs with
    equal `RunId` share it. The last batch of an epoch has n mod batch samples unless `drop_last`.
    """
    epoch, position = divmod(step, steps_per_epoch(n, batch, drop_last=drop_last))
    orders = _orders(tuple(runs), epoch, n)  # (R, n)
    return orders[:, position * batch : (position + 1) * batch].clone().to(device)  # (R, batch)


@functools.lru_cache(maxsize=2)
def _orders(runs: tuple[RunId, ...], epoch: int, n: int) -> torch.Tensor:
    return torch.stack([epoch_order(run.study, run.cell, run.seed, epoch, n) for run in runs])
