r"""Top-k singular values by Golub-Kahan, certified from a second random start in the complement.

One start vector sees one copy of a multiple singular value, so the Ritz values of one process bound sigma_1 ... sigma_k
from below but not from above. Let R (d x k) hold the right Ritz vectors found, A R = S Theta with S orthonormal, and
E = S^T A (1 - R R^T), whose rows are the residuals. Then A = [[Theta, E], [0, A'']] in the bases (S, S'), (R, R'), with
|A''| <= |A (1 - R R^T)|, so that for i <= k, by Weyl's inequality,

    theta_i <= sigma_i <= max(theta_i, |A (1 - R R^T)|) + |E|_F.

The norm of the deflated map comes from a fresh process with the probabilistic bound of `jacnorm.jacobian.bounds`. If
that process finds a value above theta_k, a copy was missed: its vectors join, and another round certifies the new
set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jacnorm.jacobian.bounds import log_start_threshold, upper_bound
from jacnorm.jacobian.dense import resolution
from jacnorm.jacobian.lanczos import Apply, GolubKahan, start_vectors
from jacnorm.jacobian.linearise import Linearisation, refuse_non_finite
from jacnorm.jacobian.measure import spent
from jacnorm.jacobian.results import Measurement, Outcome

ROUNDS = 4
"""Certifying rounds at most: each can bring up to k missed copies to light."""


def top_by_krylov(
    lin: Linearisation, k: int, *, rtol: float, max_pairs: int, confidence: float, family: int, seed: int
) -> Measurement:
    """Values, lower and upper bounds (B, k) of the k largest singular values."""
    at_input = lin.inputs <= lin.outputs
    d = min(lin.inputs, lin.outputs)
    apply, adjoint = (lin.push, lin.pull) if at_input else (lin.pull, lin.push)
    start = start_vectors(lin.samples, d, seed, lin.dtype, lin.device)
    process = GolubKahan(apply, adjoint, start)
    while process.k < min(max_pairs, d):
        process.step()
        if process.k >= k and (process.k - k) % 4 == 0 and _settled(process, k, rtol):
            break
    refuse_non_finite(process.alpha + process.beta, "the Jacobian (times a vector)", lin.first_sample)
    theta, residual, right, _ = process.triplets(k)  # (B, c), (B, c), (B, c, d) with c <= k
    del process
    if right.shape[1] < k:  # max_pairs is below k
        right, theta, residual = _merged(apply, adjoint, _completed(right, k), k)
    for round_ in range(ROUNDS):
        log_delta = log_start_threshold(d - k, (1 - confidence) / (family * ROUNDS)) if d > k else 0.0
        rest = _Rest(apply, adjoint, right)
        bound, found, vectors = rest.norm(
            start_vectors(lin.samples, d, seed + 1 + round_, lin.dtype, lin.device),
            theta[:, -1],
            rtol * theta[:, 0],
            log_delta,
            min(max_pairs, d - k),
        )
        missed = found > theta[:, -1:] + rtol * theta[:, :1]
        if not bool(missed.any()) or round_ == ROUNDS - 1:
            break  # the bound belongs to these vectors; new ones would need another round
        right, theta, residual = _merged(apply, adjoint, torch.cat([right, vectors], 1), k)
    slack = resolution(lin.dtype) * theta[:, :1]
    error = torch.linalg.vector_norm(residual, dim=1)[:, None]
    upper = torch.maximum(theta, bound[:, None]) + error + slack
    lower = (theta - slack).clamp_min(0.0)
    converged = (upper - lower <= rtol * upper[:, :1]).all(1)
    return Measurement(
        value=theta,
        lower=lower,
        upper=upper,
        residual=residual + slack,
        converged=converged,
        outcome=torch.where(converged, int(Outcome.CONVERGED), int(Outcome.PAIR_LIMIT)),
        **spent(lin),
        method=f"krylov with deflation, pushes by {lin.push_method}",
        dtype=lin.dtype,
        confidence=confidence,
    )


def _settled(process: GolubKahan, k: int, rtol: float) -> bool:
    theta, residual, _, _ = process.triplets(k)
    return bool((torch.linalg.vector_norm(residual, dim=1) <= 0.2 * rtol * theta[:, 0]).all())


class _Rest:
    """The map A (1 - R R^T) for orthonormal rows `right` (B, k, d) of R^T."""

    def __init__(self, apply: Apply, adjoint: Apply, right: Tensor) -> None:
        self.right = right
        self._apply, self._adjoint = apply, adjoint

    def project(self, p: Tensor) -> Tensor:
        p = p[:, None]
        for _ in range(2):
            p = torch.baddbmm(p, p @ self.right.mT, self.right, alpha=-1)
        return p[:, 0]

    def norm(
        self, start: Tensor, threshold: Tensor, tolerance: Tensor, log_delta: float, max_pairs: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Upper bound (B,), Ritz values (B, c) and their vectors (B, c, d) of the deflated map, as far as needed.

        Stops when every sample is decided: the bound is at most threshold + tolerance, or the map has a larger value
        whose vector has settled.
        """
        start = self.project(start)
        length = torch.linalg.vector_norm(start, dim=1, keepdim=True)
        if max_pairs < 1:
            zero = threshold.new_zeros(len(start))
            return zero, zero[:, None], start[:, None]
        process = GolubKahan(
            lambda p: self._apply(self.project(p)), lambda q: self.project(self._adjoint(q)), start / length
        )
        while process.k < max_pairs:
            process.step()
            if process.k % 4 and process.k < max_pairs:
                continue
            _, bound = upper_bound(process.alpha, process.beta, log_delta)
            count = min(self.right.shape[1], process.k)
            theta, residual, vectors, _ = process.triplets(count)
            above = theta[:, 0] > threshold + tolerance
            settled = (residual <= 0.2 * tolerance[:, None]) | (theta <= (threshold + tolerance)[:, None])
            if bool(torch.where(above, settled.all(1), bound <= threshold + 0.5 * tolerance).all()):
                break
        return bound, theta, vectors


def _merged(apply: Apply, adjoint: Apply, right: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz on more than k right vectors: the best k, their values and residuals."""
    right = torch.linalg.qr(right.mT)[0].mT  # (B, c, d)
    images = torch.stack([apply(right[:, i]) for i in range(right.shape[1])], 1).double()  # (B, c, e)
    squares, rotation = torch.linalg.eigh(images @ images.mT)
    theta = squares.flip(-1)[:, :k].clamp_min(0.0).sqrt()
    rotation = rotation.flip(-1)[:, :, :k].mT  # (B, k, c)
    left = (rotation @ images) / torch.where(theta > 0, theta, 1.0)[:, :, None]
    right = rotation.to(right.dtype) @ right
    back = torch.stack([adjoint(left[:, i].to(right.dtype)) for i in range(k)], 1)  # (B, k, d)
    residual = torch.linalg.vector_norm(back - theta[:, :, None].to(back.dtype) * right, dim=2).double()
    return right, theta, residual


def _completed(right: Tensor, k: int) -> Tensor:
    """Stack the rows of `right` (B, c, d) and k random ones, to be made orthonormal."""
    generator = torch.Generator().manual_seed(0)
    extra = torch.randn(k, right.shape[2], generator=generator, dtype=torch.float64).to(right)
    return torch.cat([right, extra.expand(len(right), -1, -1)], 1)[:, : right.shape[2]]
