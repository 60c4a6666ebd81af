"""A second opinion: the same quantity by another method and in float64, with the disagreement put into the interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jacnorm.jacobian.errors import DtypeError, JacobianError, OptionError
from jacnorm.jacobian.linearise import Function, check_input, in_dtype, left_as_found, take
from jacnorm.jacobian.results import Measurement, Outcome
from jacnorm.jacobian.spectral import spectral_norm


@dataclass(frozen=True)
class CrossCheck:
    """A measurement and how far other ways of measuring a subset of its samples are from it.

    measurement: all samples, intervals widened by `disagreement` (outcome DISAGREEMENT where that was needed).
    samples: (S,) indices measured again. by_other_method, in_float64: those measurements, or None where the reason in
    `skipped` says that there is none. disagreement: largest relative distance between the intervals of the first
    measurement and the others' intervals; 0 when all overlap.
    """

    measurement: Measurement
    samples: Tensor
    by_other_method: Measurement | None
    in_float64: Measurement | None
    skipped: tuple[str, ...]
    disagreement: float


def cross_check(
    f: Function,
    x: Tensor,
    *,
    measure: Callable[..., Measurement] = spectral_norm,
    samples: int = 4,
    seed: int = 0,
    rows_up_to: int = 2048,
    **options,
) -> CrossCheck:
    r"""Measure all of `x`, then a random subset by the other method and in float64, and widen the intervals by the gap.

    Where two intervals [l, u] and [l', u'] have no point in common, their gap is max(u' - u, l - l'), what the first
    lacks to cover the second, relative to the larger upper end; the largest gap over the subset and both checks
    widens every sample's interval by that fraction of its upper end. The other method of rows is krylov (hutchinson
    for `frobenius_norm`) and the other way round; rows are taken up to min(m, n) = `rows_up_to`. float64 needs a
    torch.nn.Module, or a function that accepts float64 inputs.

    Cost: the measurement and, for `samples` samples, both others. Raises OptionError for samples < 1, otherwise as
    `measure`.
    """
    if samples < 1:
        raise OptionError(f"samples is the number of samples measured again, at least 1, not {samples}")
    first = measure(f, x, **options)
    check_input(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    chosen = order[:samples].sort().values.to(x.device)
    sub_f, sub_x = take(f, chosen), x[chosen]
    skipped: list[str] = []
    other = _by_other_method(sub_f, sub_x, first.method, measure, rows_up_to, options, skipped)
    double = None
    if first.dtype == torch.float64:
        skipped.append("float64: the measurement is in float64 already")
    else:
        try:
            with left_as_found(f):
                double = measure(*in_dtype(sub_f, sub_x, torch.float64), **options)
        except DtypeError as error:
            skipped.append(f"float64: {error}")
    gap = max((_gap(first, chosen, again) for again in (other, double) if again is not None), default=0.0)
    if gap > 0:
        reach = gap * first.upper.abs()
        first = replace(
            first,
            lower=first.lower - reach,
            upper=first.upper + reach,
            outcome=torch.full_like(first.outcome, int(Outcome.DISAGREEMENT)),
            converged=torch.zeros_like(first.converged),
        )
    return CrossCheck(first, chosen, other, double, tuple(skipped), gap)


def _by_other_method(
    f: Function,
    x: Tensor,
    method: str,
    measure: Callable[..., Measurement],
    rows_up_to: int,
    options: dict,
    skipped: list[str],
) -> Measurement | None:
    by_rows = method.startswith(("rows", "columns"))
    if not by_rows and min(take(f, slice(0, 1))(x[:1]).numel(), x[0].numel()) > rows_up_to:
        skipped.append(f"other method: all rows of a Jacobian with min(m, n) above rows_up_to={rows_up_to}")
        return None
    wanted = ("krylov", "hutchinson") if by_rows else ("rows",)
    for name in wanted:
        try:
            return measure(f, x, **(options | {"method": name}))
        except (OptionError, TypeError):  # this quantity has no such method
            continue
    skipped.append("other method: this quantity has one method only")
    return None


def _gap(first: Measurement, chosen: Tensor, again: Measurement) -> float:
    lower, upper = first.lower[chosen], first.upper[chosen]
    apart = (again.lower > upper) | (lower > again.upper)
    reach = torch.where(apart, torch.maximum(again.upper - upper, lower - again.lower), 0.0)
    if not bool(torch.isfinite(reach).all()):
        raise JacobianError(
            f"a cross-check needs finite intervals, but one way found an infinite value where another did not "
            f"({first.method} in {first.dtype}, {again.method} in {again.dtype})"
        )
    scale = torch.maximum(upper.abs(), again.upper.abs())
    return float(torch.where(apart, reach / scale, 0.0).max())
