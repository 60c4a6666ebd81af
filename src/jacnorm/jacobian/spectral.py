"""The largest singular value of the input-output Jacobian, with an interval."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from jacnorm.jacobian.bounds import log_start_threshold, upper_bound
from jacnorm.jacobian.dense import ROWS_NUMBERS, all_entries, resolution, singular_values_of, takes_rows
from jacnorm.jacobian.lanczos import GolubKahan, start_vectors, top_ritz
from jacnorm.jacobian.linearise import Function, Linearisation, check_input, refuse_non_finite
from jacnorm.jacobian.measure import MEMORY_LIMIT, check_method, check_options, from_rows, in_pieces
from jacnorm.jacobian.results import Measurement, Outcome, warn_if_not_converged

FIRST_TEST = 4
"""The stop test first runs after this many pairs ..."""

TEST_EVERY = 2
"""... and then after every so many: fixed steps, so that results do not depend on the rest of the batch."""


def spectral_norm(
    f: Function,
    x: Tensor,
    *,
    rtol: float = 1e-3,
    method: str = "auto",
    max_pairs: int = 60,
    confidence: float = 0.95,
    family: int | None = None,
    seed: int = 0,
    memory_limit: int = MEMORY_LIMIT,
    check: bool = True,
) -> Measurement:
    r"""Largest singular value of the input-output Jacobian, one per sample.

    sigma_1(x_b) = max_{|v|=1} |J(x_b) v|_2 with J(x_b) = d f(x)_b / d x_b of shape (m, n), in output units per input
    unit. Not the product of layer norms, which can be larger by orders of magnitude.

    x: (B, *input); f maps it to (B, *output), sample by sample.
    method: "rows" takes all rows (or columns) and is exact to rounding; "krylov" is Golub-Kahan-Lanczos; "auto" takes
    rows up to 64 outputs or inputs, else krylov.

    Krylov: `lower` always holds (up to rounding); `upper` holds with probability `confidence` over the random start,
    jointly for `family` samples (default: this batch), see `jacnorm.jacobian.bounds`. A sample stops when upper -
    lower <= rtol * upper; its value is the lower bound, which is typically far closer than the interval is wide.
    Samples that have not stopped after `max_pairs` keep their best value and bound, with a `NotConvergedWarning`.

    Cost: min(m, n) passes, or at most `max_pairs` pull-push pairs (a random wide network takes about 15 for rtol 1e-2
    and 20 for 1e-3). Memory: B * pairs * (m + n) numbers besides the graph of f; pieces of the batch are measured one
    after another when this exceeds `memory_limit` bytes. Values do not depend on the split.
    check: probe determinism and the adjoint identity on two samples, and independence on the whole batch, first.
    Half-precision inputs are measured in float32, with the parameters of a module cast.

    Raises JacobianError (its subclasses name the reason) for functions without a Jacobian per sample and for options
    out of range.

    >>> spectral_norm(torch.nn.Linear(3, 2, bias=False), torch.ones(1, 3)).value.shape
    torch.Size([1])
    """
    check_options(rtol=rtol, confidence=confidence, max_pairs=max_pairs, family=family)
    check_method(method, "rows", "krylov")
    check_input(x)
    krylov = partial(
        spectral_by_krylov,
        rtol=rtol,
        max_pairs=max_pairs,
        confidence=confidence,
        family=family or len(x),
        seed=seed,
    )

    def measure(lin: Linearisation) -> Measurement:
        return spectral_by_rows(lin, rtol) if takes_rows(method, lin.outputs, lin.inputs) else krylov(lin)

    def numbers(m: int, n: int) -> int:
        return ROWS_NUMBERS * m * n if takes_rows(method, m, n) else min(max_pairs, 24) * (m + n)

    result = in_pieces(f, x, measure, numbers, memory_limit, check)
    warn_if_not_converged(result, "spectral_norm")
    return result


def spectral_by_rows(lin: Linearisation, rtol: float) -> Measurement:
    """Exact to rounding, from all rows or columns."""
    j, how = all_entries(lin)
    value = singular_values_of(j)[:, 0]
    slack = resolution(lin.dtype) * value
    return from_rows(lin, value, slack, how, rtol)


def spectral_by_krylov(
    lin: Linearisation, *, rtol: float, max_pairs: int, confidence: float, family: int, seed: int
) -> Measurement:
    """Golub-Kahan-Lanczos with the bound of `jacnorm.jacobian.bounds` as stopping rule of each sample."""
    start_at_input = lin.inputs <= lin.outputs  # the smaller side: a tighter bound
    d = min(lin.inputs, lin.outputs)
    log_delta = log_start_threshold(d, (1 - confidence) / family)
    process = GolubKahan(*_maps(lin, start_at_input), start_vectors(lin.samples, d, seed, lin.dtype, lin.device))
    slack = resolution(lin.dtype)
    running = torch.arange(lin.samples, device=lin.device)  # which samples of the batch the process still advances
    value, upper, residual = (torch.zeros(lin.samples, dtype=torch.float64, device=lin.device) for _ in range(3))
    passes = torch.zeros(lin.samples, dtype=torch.int64, device=lin.device)
    outcome = torch.full_like(passes, int(Outcome.PAIR_LIMIT))
    open_ = torch.ones_like(running, dtype=torch.bool)  # of the running samples, those without a verdict
    max_pairs = min(max_pairs, d)
    current = lin
    while process.k < max_pairs:
        process.step()
        if process.k < max_pairs and (process.k < FIRST_TEST or (process.k - FIRST_TEST) % TEST_EVERY):
            continue
        alpha, beta = process.alpha[open_], process.beta[open_]
        refuse_non_finite(alpha + beta, "the Jacobian (times a vector)", lin.first_sample, running[open_])
        ritz, bound = upper_bound(alpha, beta, log_delta)
        narrow = bound * (1 + slack) - ritz * (1 - slack) <= rtol * bound
        stuck = bound - ritz <= slack * bound
        full = torch.full_like(narrow, process.k >= max_pairs)
        stop = narrow | stuck | full
        if not bool(stop.any()):
            continue
        which = running[open_][stop]
        alpha, beta = alpha[stop], beta[stop]
        value[which], residual[which] = top_ritz(alpha, beta)
        upper[which] = bound[stop]
        passes[which] = process.k
        outcome[which] = torch.where(narrow[stop], int(Outcome.CONVERGED), int(Outcome.PAIR_LIMIT))
        outcome[which[stuck[stop] & ~narrow[stop]]] = int(Outcome.RESOLUTION)
        open_[open_.nonzero().flatten()[stop]] = False
        left = int(open_.sum())
        if left == 0:
            break
        if 2 * left <= len(running) and current.push_method != "linearize":
            current = current.only(open_)
            process.keep(open_, *_maps(current, start_at_input))
            running, open_ = running[open_], open_[open_]
    upper = torch.maximum(value, upper)  # the lower bound is certain: where the start was unlucky, it shows here
    return Measurement(
        value=value,
        lower=value * (1 - slack),
        upper=upper * (1 + slack),
        residual=residual + slack * value,
        converged=outcome == int(Outcome.CONVERGED),
        outcome=outcome,
        pulls=passes,
        pushes=passes.clone(),
        method=f"krylov, pushes by {lin.push_method}",
        dtype=lin.dtype,
        confidence=confidence,
    )


def _maps(lin: Linearisation, start_at_input: bool) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return (lin.push, lin.pull) if start_at_input else (lin.pull, lin.push)
