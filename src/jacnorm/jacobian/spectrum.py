"""Singular values beyond the first: top-k or all, log-volume and condition number."""

from __future__ import annotations

import torch
from torch import Tensor

from jacnorm.jacobian.deflation import top_by_krylov
from jacnorm.jacobian.dense import ROWS_NUMBERS, SMALL_SIDE, all_entries, resolution, singular_values_of
from jacnorm.jacobian.errors import OptionError
from jacnorm.jacobian.linearise import Function, Linearisation, check_input
from jacnorm.jacobian.measure import MEMORY_LIMIT, check_method, check_options, from_rows, in_pieces
from jacnorm.jacobian.results import CensoredMeasurement, Measurement, Outcome, warn_if_not_converged


def jacobian(f: Function, x: Tensor, *, memory_limit: int = MEMORY_LIMIT, check: bool = True) -> Tensor:
    r"""Return the input-output Jacobian of every sample, (B, m, n): d f(x)_b / d x_b with inputs and outputs flattened.

    Exact to rounding, in the dtype of the passes (float32 for half-precision inputs). Cost: m pulls, or n pushes where
    n is less than half of m. `memory_limit` bounds the graphs and work space of a piece of the batch, not the result.
    Raises JacobianError as `spectral_norm` does.

    >>> jacobian(lambda x: x**2, torch.tensor([[1.0, 2.0]]))
    tensor([[[2., 0.],
             [0., 4.]]])
    """
    parts: list[Tensor] = []

    def measure(lin: Linearisation) -> Measurement:
        j, how = all_entries(lin)
        parts.append(j)
        zeros = torch.zeros(lin.samples, dtype=torch.float64, device=lin.device)
        return from_rows(lin, torch.linalg.vector_norm(j, dim=(1, 2), dtype=torch.float64), zeros, how, 0.5)

    in_pieces(f, x, measure, lambda m, n: 2 * m * n, memory_limit, check)
    return torch.cat(parts)


def singular_values(
    f: Function,
    x: Tensor,
    k: int | None = None,
    *,
    rtol: float = 1e-3,
    method: str = "auto",
    max_pairs: int = 100,
    confidence: float = 0.95,
    family: int | None = None,
    seed: int = 0,
    memory_limit: int = MEMORY_LIMIT,
    check: bool = True,
) -> Measurement:
    r"""Largest k singular values of the input-output Jacobian in descending order, (B, k); all min(m, n) without k.

    method: "rows" is exact to rounding (an absolute error of about 1e-6 of sigma_1 in float32: small values have no
    relative accuracy); "krylov" needs k; "auto" takes rows for all values, for up to 64 outputs or inputs, and for k
    above an eighth of them. Krylov: `lower` always holds; `upper` is certified by a second process from a fresh
    random start in the complement of the vectors found, which also finds copies of multiple singular values that one
    start vector cannot see; it holds with probability `confidence` jointly for the batch. The interval of value i is
    as narrow as asked when upper_i - lower_i <= rtol * sigma_1.

    Cost: min(m, n) passes, or at most 2 * max_pairs pairs for each of up to four rounds (one, unless values are
    multiple). Raises OptionError for k outside 1..min(m, n), otherwise as `spectral_norm`.

    >>> singular_values(lambda x: x * torch.tensor([3.0, 2.0]), torch.ones(1, 2), k=1).value.round(decimals=4)
    tensor([[3.]], dtype=torch.float64)
    """
    check_options(rtol=rtol, confidence=confidence, max_pairs=max_pairs, family=family)
    check_method(method, "rows", "krylov")
    check_input(x)
    if method == "krylov" and k is None:
        raise OptionError("method='krylov' finds the largest k singular values: give k, or use method='rows' for all")
    if k is not None and k < 1:
        raise OptionError(f"k is the number of singular values asked for, at least 1, not {k}")

    def rows(m: int, n: int) -> bool:
        q = min(m, n)
        return method == "rows" or k is None or (method == "auto" and (q <= SMALL_SIDE or 8 * k > q))

    def measure(lin: Linearisation) -> Measurement:
        q = min(lin.outputs, lin.inputs)
        if k is not None and k > q:
            raise OptionError(
                f"k={k} singular values were asked for, but a Jacobian of {lin.outputs} x {lin.inputs} has {q}"
            )
        if not rows(lin.outputs, lin.inputs):
            return top_by_krylov(
                lin, k, rtol=rtol, max_pairs=max_pairs, confidence=confidence, family=family or len(x), seed=seed
            )
        j, how = all_entries(lin)
        values = singular_values_of(j)
        slack = resolution(lin.dtype) * values[:, :1]
        return _relative_to_first(from_rows(lin, values[:, :k], slack, how, 0.5), rtol)

    def numbers(m: int, n: int) -> int:
        return ROWS_NUMBERS * m * n if rows(m, n) else 2 * min(max_pairs, 40) * (m + n)

    result = in_pieces(f, x, measure, numbers, memory_limit, check)
    warn_if_not_converged(result, "singular_values")
    return result


def log_volume(f: Function, x: Tensor, *, memory_limit: int = MEMORY_LIMIT, check: bool = True) -> CensoredMeasurement:
    r"""Sum of the logarithms of all min(m, n) singular values of the input-output Jacobian, in nats, (B,).

    For a square Jacobian this is log |det J|. Values below `floor` (the resolution of the dtype times sigma_1) are
    counted as the floor and flagged `censored`: the log-volume is then an upper bound, with lower = -inf. Cost: all
    rows. Raises JacobianError as `spectral_norm` does.

    >>> log_volume(lambda x: 2 * x, torch.ones(1, 3)).value
    tensor([2.0794], dtype=torch.float64)
    """

    def measure(lin: Linearisation) -> CensoredMeasurement:
        values, floor, base = _all_values(lin)
        return _censored(
            base,
            value=torch.maximum(values, floor).log().sum(1),
            lower=(values - floor).clamp_min(0.0).log().sum(1),
            upper=(torch.maximum(values, floor) + floor).log().sum(1),
            floor=floor,
            values=values,
        )

    result = in_pieces(f, x, measure, lambda m, n: ROWS_NUMBERS * m * n, memory_limit, check)
    warn_if_not_converged(result, "log_volume")
    return result


def condition_number(
    f: Function, x: Tensor, *, memory_limit: int = MEMORY_LIMIT, check: bool = True
) -> CensoredMeasurement:
    r"""Ratio of the largest to the smallest of the min(m, n) singular values of the input-output Jacobian, (B,).

    A smallest value below `floor` (the resolution of the dtype times sigma_1) is counted as the floor and flagged
    `censored`: the ratio is then a lower bound, with upper = inf. A zero Jacobian has the condition number inf.
    Cost: all rows. Raises JacobianError as `spectral_norm` does.

    >>> condition_number(lambda x: x * torch.tensor([4.0, 2.0]), torch.ones(1, 2)).value
    tensor([2.], dtype=torch.float64)
    """

    def measure(lin: Linearisation) -> CensoredMeasurement:
        values, floor, base = _all_values(lin)
        top, bottom, edge = values[:, 0], values[:, -1], floor[:, 0]
        zero = top == 0
        infinite = torch.full_like(top, torch.inf)
        return _censored(
            base,
            value=torch.where(zero, infinite, top / torch.maximum(bottom, edge)),
            lower=torch.where(zero, infinite, ((top - edge) / (torch.maximum(bottom, edge) + edge)).clamp_min(1.0)),
            upper=torch.where(bottom > edge, (top + edge) / (bottom - edge), infinite),
            floor=floor,
            values=values,
        )

    result = in_pieces(f, x, measure, lambda m, n: ROWS_NUMBERS * m * n, memory_limit, check)
    warn_if_not_converged(result, "condition_number")
    return result


def _all_values(lin: Linearisation) -> tuple[Tensor, Tensor, Measurement]:
    j, how = all_entries(lin)
    values = singular_values_of(j)  # (B, q)
    floor = resolution(lin.dtype) * values[:, :1]  # (B, 1)
    return values, floor, from_rows(lin, values[:, 0], floor[:, 0], how, 0.5)


def _censored(
    base: Measurement, value: Tensor, lower: Tensor, upper: Tensor, floor: Tensor, values: Tensor
) -> CensoredMeasurement:
    censored = (values <= floor).any(1)
    shared = vars(base) | {"value": value, "lower": torch.minimum(lower, value), "upper": torch.maximum(upper, value)}
    shared["residual"] = torch.where(value == upper, 0.0, upper - value)
    shared["converged"] = ~censored
    shared["outcome"] = torch.where(censored, int(Outcome.CENSORED), int(Outcome.CONVERGED))
    return CensoredMeasurement(**shared, floor=floor[:, 0], censored=censored)


def _relative_to_first(result: Measurement, rtol: float) -> Measurement:
    """Apply the stopping rule of several singular values: interval widths against the largest value."""
    converged = (result.upper - result.lower <= rtol * result.upper[:, :1]).all(1)
    outcome = torch.where(converged, int(Outcome.CONVERGED), int(Outcome.RESOLUTION))
    return Measurement(**(vars(result) | {"converged": converged, "outcome": outcome}))
