"""The Frobenius norm of the input-output Jacobian: exact from all rows, or stochastic with a standard error."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from jacnorm.jacobian.dense import ROWS_NUMBERS, all_entries, resolution, takes_rows
from jacnorm.jacobian.lanczos import GolubKahan, start_vectors
from jacnorm.jacobian.linearise import Function, Linearisation, refuse_non_finite
from jacnorm.jacobian.measure import MEMORY_LIMIT, check_method, check_options, from_rows, in_pieces, spent
from jacnorm.jacobian.results import Outcome, StochasticNorm, warn_if_not_converged


def frobenius_norm(
    f: Function,
    x: Tensor,
    *,
    rtol: float = 0.05,
    method: str = "auto",
    samples: int = 32,
    pairs: int = 8,
    confidence: float = 0.95,
    seed: int = 0,
    memory_limit: int = MEMORY_LIMIT,
    check: bool = True,
) -> StochasticNorm:
    r"""Frobenius norm of the input-output Jacobian, one per sample: (sum_i sigma_i^2)^(1/2).

    method: "rows" is exact to rounding from min(m, n) passes; "hutchinson" is stochastic; "auto" takes rows up to 64
    outputs or inputs. The stochastic estimate splits |J|_F^2 = |J P|_F^2 + |J (1 - P P^T)|_F^2: the first part is
    exact from the coefficients of `pairs` Golub-Kahan steps with basis P (pairs=0: none), the second is the mean over
    `samples` probes uniform on the sphere of the complement, on the smaller side (Hutchinson 1990; deflation as in
    Meyer, Musco, Musco, Woodruff 2021, Hutch++). value^2 is unbiased; `standard_error` is that of value (delta
    method), and lower and upper are a Student interval at `confidence` for each sample by itself. Probes are shared
    by all samples, so a value does not depend on the split of a batch, and the errors of different samples are
    correlated: a mean over samples is not more certain.

    A sample has converged when standard_error <= rtol * value. Cost: min(m, n) passes, or 2 * pairs + samples.
    Raises JacobianError as `spectral_norm` does.

    >>> frobenius_norm(torch.nn.Identity(), torch.ones(2, 9)).value
    tensor([3., 3.], dtype=torch.float64)
    """
    check_options(rtol=rtol, confidence=confidence, samples=samples, max_pairs=pairs + 1)
    check_method(method, "rows", "hutchinson")

    def measure(lin: Linearisation) -> StochasticNorm:
        if takes_rows(method, lin.outputs, lin.inputs):
            return _by_rows(lin, rtol)
        return _by_probes(lin, rtol, samples, pairs, confidence, seed)

    def numbers(m: int, n: int) -> int:
        return ROWS_NUMBERS * m * n if takes_rows(method, m, n) else (pairs + 4) * (m + n)

    result = in_pieces(f, x, measure, numbers, memory_limit, check)
    warn_if_not_converged(result, "frobenius_norm")
    return result


def _by_rows(lin: Linearisation, rtol: float) -> StochasticNorm:
    j, how = all_entries(lin)
    value = torch.linalg.vector_norm(j, dim=(1, 2), dtype=torch.float64)
    exact = from_rows(lin, value, resolution(lin.dtype) * value, how, rtol)
    return StochasticNorm(**vars(exact), standard_error=torch.zeros_like(value))


def _by_probes(
    lin: Linearisation, rtol: float, samples: int, pairs: int, confidence: float, seed: int
) -> StochasticNorm:
    at_input = lin.inputs <= lin.outputs
    d = min(lin.inputs, lin.outputs)
    apply, adjoint = (lin.push, lin.pull) if at_input else (lin.pull, lin.push)
    pairs = min(pairs, d)
    known = torch.zeros(lin.samples, dtype=torch.float64, device=lin.device)
    basis = None
    if pairs:
        process = GolubKahan(apply, adjoint, start_vectors(lin.samples, d, seed, lin.dtype, lin.device))
        for _ in range(pairs):
            process.step()
        known = process.alpha.square().sum(1) + process.beta[:, :-1].square().sum(1)  # |J P|_F^2 = |B|_F^2
        basis = process.starts  # (B, pairs, d)
    generator = torch.Generator().manual_seed(seed + 1)
    squares = []
    for _ in range(samples if d > pairs else 0):
        probe = torch.randn(1, 1, d, generator=generator, dtype=torch.float64).to(lin.device, lin.dtype)
        probe = probe.expand(lin.samples, 1, d)
        if basis is not None:
            probe = torch.baddbmm(probe, probe @ basis.mT, basis, alpha=-1)
        probe = probe[:, 0] / torch.linalg.vector_norm(probe, dim=2)
        squares.append(torch.linalg.vector_norm(apply(probe), dim=1, dtype=torch.float64).square())
    if squares:
        rest = (d - pairs) * torch.stack(squares, 1)  # (B, samples)
        square, error = known + rest.mean(1), rest.std(1) / math.sqrt(samples)
    else:
        square, error = known, torch.zeros_like(known)
    refuse_non_finite(square, "the Jacobian (times a vector)", lin.first_sample)
    value = square.sqrt()
    reach = student_quantile(0.5 + confidence / 2, samples - 1) * error
    slack = resolution(lin.dtype) * value
    standard_error = torch.where(value > 0, error / (2 * value), 0.0)
    converged = standard_error <= rtol * value
    how = "by pushes" if at_input else "by pulls"
    return StochasticNorm(
        value=value,
        lower=torch.maximum(known, square - reach).sqrt() - slack,
        upper=(square + reach).sqrt() + slack,
        residual=standard_error,
        converged=converged,
        outcome=torch.where(converged, int(Outcome.CONVERGED), int(Outcome.SAMPLING)),
        **spent(lin),
        method=f"hutchinson {how}, {pairs} Krylov vectors exact",
        dtype=lin.dtype,
        confidence=confidence,
        standard_error=standard_error,
    )


def student_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t by the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5), within 1 % from 4 up."""
    z = NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
