"""What a measurement returns: values with intervals, how they were found, and why one did not converge."""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R", bound="Measurement")


class Outcome(enum.IntEnum):
    """How the measurement of one sample ended; `MESSAGES` says what each means and what to change."""

    CONVERGED = 0
    PAIR_LIMIT = 1
    RESOLUTION = 2
    CENSORED = 3
    SAMPLING = 4
    DISAGREEMENT = 5


MESSAGES: dict[Outcome, str] = {
    Outcome.CONVERGED: "The interval is as narrow as asked.",
    Outcome.PAIR_LIMIT: (
        "The limit on pull-push pairs came before the interval was as narrow as asked; value is the best lower "
        "bound so far and upper still holds. Likely a cluster of singular values at the top. Raise max_pairs, "
        "loosen rtol, or use method='rows'."
    ),
    Outcome.RESOLUTION: (
        "The interval is as narrow as the dtype of the passes can show, which is wider than asked. Loosen rtol "
        "or pass a float64 model and input."
    ),
    Outcome.CENSORED: (
        "The smallest singular value is below the floor that the dtype can resolve, so a log-volume is only "
        "bounded from above and a condition number from below. Pass a float64 model and input, or report the "
        "value as censored."
    ),
    Outcome.SAMPLING: (
        "The stochastic estimate has a standard error wider than asked. Raise samples, loosen rtol, or use "
        "method='rows'."
    ),
    Outcome.DISAGREEMENT: (
        "Two methods or two dtypes disagree by more than their intervals allow, so the interval was widened to "
        "cover both. Rounding in the model's own arithmetic is the usual cause; measure in float64."
    ),
}


class NotConvergedWarning(UserWarning):
    """Some samples did not reach the accuracy asked for; their intervals still hold."""


@dataclass(frozen=True)
class Measurement:
    """One number per sample with an interval.

    value, lower, upper, residual: (B,) float64, or (B, k) for k singular values; lower <= value <= upper.
    `residual` is |J^T u - value v|_2 for a Krylov triplet (u, value, v), the rounding resolution for values computed
    from all rows, and the standard error for stochastic estimates: always in the unit of `value`.
    converged: (B,) bool, the interval is as narrow as asked. outcome: (B,) int64 codes of `Outcome`.
    pulls, pushes: (B,) int64, backward and forward derivative passes in which the sample took part (a vmapped pull of q
    rows counts q). method: how it was done. dtype: of the passes. confidence: probability with which all intervals of
    the batch hold jointly (1.0: always, up to rounding).
    """

    value: Tensor
    lower: Tensor
    upper: Tensor
    residual: Tensor
    converged: Tensor
    outcome: Tensor
    pulls: Tensor
    pushes: Tensor
    method: str
    dtype: torch.dtype
    confidence: float

    @property
    def log_value(self) -> Tensor:
        """Natural logarithm of `value`, float64; -inf for an exact zero."""
        return self.value.log()

    def reasons(self) -> list[str]:
        """One sentence per sample: how its measurement ended (from `MESSAGES`)."""
        return [MESSAGES[Outcome(code)] for code in self.outcome.tolist()]


@dataclass(frozen=True)
class StochasticNorm(Measurement):
    """A norm with its standard error, (B,) float64: 0 where the norm is exact, else from the sample of probes."""

    standard_error: Tensor


@dataclass(frozen=True)
class CensoredMeasurement(Measurement):
    """A quantity of the smallest singular value: `floor` (B,) is what the dtype resolves, `censored` (B,) where it bit.

    Where `censored`, singular values below `floor` were counted as `floor`: the log-volume is an upper bound (lower is
    -inf) and the condition number a lower bound (upper is inf).
    """

    floor: Tensor
    censored: Tensor


def join(parts: list[R]) -> R:
    """Concatenate the measurements of consecutive pieces of one batch."""
    first = parts[0]
    if len(parts) == 1:
        return first
    merged = {}
    for field in fields(first):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], Tensor):
            merged[field.name] = torch.cat(values)
        elif field.name == "method":
            merged[field.name] = " / ".join(dict.fromkeys(values))
        else:
            merged[field.name] = values[0]
    return type(first)(**merged)


def warn_if_not_converged(result: Measurement, name: str) -> None:
    """Warn once per call, with the count and the first reason, if any sample missed the accuracy asked for."""
    if bool(result.converged.all()):
        return
    missed = (~result.converged).nonzero().flatten().tolist()
    reason = MESSAGES[Outcome(int(result.outcome[missed[0]]))]
    warnings.warn(
        f"{name}: {len(missed)} of {len(result.converged)} samples (first: {missed[0]}) did not reach the "
        "accuracy asked "
        f"for. {reason}",
        NotConvergedWarning,
        stacklevel=3,
    )
