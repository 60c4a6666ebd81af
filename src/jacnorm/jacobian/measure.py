"""What all measurements share: checks at the door, pieces that fit the memory, the passes spent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jacnorm.jacobian.check import check_company, check_instrument, probe
from jacnorm.jacobian.errors import OptionError
from jacnorm.jacobian.linearise import (
    Function,
    Linearisation,
    check_input,
    in_dtype,
    left_as_found,
    refuse_non_finite,
    take,
)
from jacnorm.jacobian.results import Measurement, Outcome, R, join

MEMORY_LIMIT = 2 * 1024**3
"""Default limit in bytes for graphs, bases and rows; larger batches are measured in pieces."""

Numbers = Callable[[int, int], int]


def in_pieces(
    f: Function,
    x: Tensor,
    measure: Callable[[Linearisation], R],
    numbers: Numbers,
    memory_limit: int = MEMORY_LIMIT,
    check: bool = True,
    expected_pushes: int = 20,
) -> R:
    """Check the instrument, split the batch to fit `memory_limit`, measure each piece and join the results.

    numbers(m, n): how many numbers a sample with m outputs and n inputs needs besides the graph of f.
    """
    if memory_limit <= 0:
        raise OptionError(f"memory_limit is a number of bytes above 0, not {memory_limit}")
    check_input(x)
    with left_as_found(f):
        f, x = full_precision(f, x)
        first_two = probe(f, x)
        if check:
            check_instrument(first_two)
        # The pull has a graph of its own, as large as that of f.
        each = 2 * first_two.graph_bytes + numbers(first_two.outputs, first_two.inputs) * x.element_size()
        size = max(1, min(len(x), memory_limit // each))
        parts = []
        for first in range(0, len(x), size):
            piece = slice(first, first + size)
            lin = Linearisation(take(f, piece), x[piece], expected_pushes, first)
            if check:
                check_company(take(f, piece), x[piece], lin.primal)
            parts.append(measure(lin))
            del lin  # frees the graph before the next piece makes its own
    return join(parts)


def full_precision(f: Function, x: Tensor) -> tuple[Function, Tensor]:
    """Measure half-precision functions in float32: their own arithmetic has no digits to spare for an interval."""
    if x.dtype in (torch.float32, torch.float64):
        return f, x
    return in_dtype(f, x, torch.float32)


def spent(lin: Linearisation) -> dict[str, Tensor]:
    """Return the passes of a linearisation as (B,) fields of a result."""
    return {
        "pulls": torch.full((lin.samples,), lin.pulls, device=lin.device),
        "pushes": torch.full((lin.samples,), lin.pushes, device=lin.device),
    }


def from_rows(lin: Linearisation, value: Tensor, slack: Tensor, how: str, rtol: float) -> Measurement:
    """Return a value from all rows, (B,) or (B, k), with the interval that rounding leaves: value +- slack."""
    refuse_non_finite(value, "the Jacobian", lin.first_sample)
    slack = slack.expand_as(value)
    narrow = 2 * slack <= rtol * (value + slack)
    converged = narrow if narrow.ndim == 1 else narrow.all(1)
    return Measurement(
        value=value,
        lower=(value - slack).clamp_min(0.0),
        upper=value + slack,
        residual=slack,
        converged=converged,
        outcome=torch.where(converged, int(Outcome.CONVERGED), int(Outcome.RESOLUTION)),
        **spent(lin),
        method=how,
        dtype=lin.dtype,
        confidence=1.0,
    )


def check_method(method: str, *known: str) -> None:
    """Raise OptionError unless `method` is "auto" or one of `known`."""
    if method not in ("auto", *known):
        raise OptionError(f"method must be one of {', '.join(repr(name) for name in ('auto', *known))}, not {method!r}")


def check_options(
    rtol: float = 0.5, confidence: float = 0.5, max_pairs: int = 1, family: int | None = None, samples: int = 2
) -> None:
    """Raise OptionError for options out of range."""
    if not 0 < rtol < 1:
        raise OptionError(f"rtol is a relative width between 0 and 1, not {rtol}")
    if not 0 < confidence < 1:
        raise OptionError(f"confidence is a probability between 0 and 1, not {confidence}")
    if max_pairs < 1:
        raise OptionError(f"max_pairs is at least 1, not {max_pairs}")
    if family is not None and family < 1:
        raise OptionError(f"family counts the samples for which the bounds hold jointly, at least 1, not {family}")
    if samples < 2:
        raise OptionError(f"samples is at least 2, so that a standard error exists, not {samples}")
