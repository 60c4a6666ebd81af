"""Golub-Kahan bidiagonalisation of many Jacobians at once, one push and one pull a step.

Every sample has its own bidiagonal matrix and bases; the passes are shared. Full re-orthogonalisation by two passes of
classical Gram-Schmidt, as batched products (Giraud, Langou, Rozloznik, van den Eshof 2005: twice is enough).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jacnorm.jacobian.bounds import ritz_gram

Apply = Callable[[Tensor], Tensor]

BASIS_BLOCK = 16
"""Bases grow by this many vectors at a time, so memory follows the steps taken, not the limit."""


class GolubKahan:
    """The process A P_k = Q_k B_k, A^T Q_k = P_k B_k^T + beta_k p_{k+1} e_k^T for a batch of maps A.

    A maps (B, d) to (B, e); P and Q are orthonormal bases (B, k, d) and (B, k, e), B_k is upper bidiagonal with
    diagonal alpha and superdiagonal beta (float64). The start vector has d entries: with d the smaller side its
    component along the top singular vector is larger and the bound tighter. Memory: B * k * (d + e) numbers.
    """

    def __init__(self, apply: Apply, adjoint: Apply, start: Tensor) -> None:
        """`start`: (B, d) unit vectors in the dtype of the passes."""
        self.apply, self.adjoint = apply, adjoint
        self.k = 0
        self._p = start.new_zeros(start.shape[0], BASIS_BLOCK, start.shape[1])
        self._p[:, 0] = start
        self._q: Tensor | None = None
        self._alpha: list[Tensor] = []
        self._beta: list[Tensor] = []

    @property
    def alpha(self) -> Tensor:
        """Diagonal of B_k, (B, k) float64."""
        return torch.stack(self._alpha, 1)

    @property
    def beta(self) -> Tensor:
        """Superdiagonal of B_k and beta_k, (B, k) float64."""
        return torch.stack(self._beta, 1)

    @property
    def starts(self) -> Tensor:
        """P_k on the side of the start vector, (B, k, d)."""
        return self._p[:, : self.k]

    def step(self) -> None:
        """One application of A and one of its adjoint."""
        k = self.k
        q = self.apply(self._p[:, k])
        if self._q is None:
            self._q = q.new_zeros(q.shape[0], BASIS_BLOCK, q.shape[1])
        self._q = _with_room(self._q, k)
        self._p = _with_room(self._p, k + 1)
        self._alpha.append(_append(self._q, k, q))
        self._beta.append(_append(self._p, k + 1, self.adjoint(self._q[:, k])))
        self.k = k + 1

    def keep(self, samples: Tensor, apply: Apply, adjoint: Apply) -> None:
        """Go on with some of the samples only, through passes made for those."""
        self.apply, self.adjoint = apply, adjoint
        self._p, self._q = self._p[samples], self._q[samples]
        self._alpha = [a[samples] for a in self._alpha]
        self._beta = [b[samples] for b in self._beta]

    def triplets(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Top Ritz triplets: values (B, c), residuals (B, c), right vectors (B, c, d), left vectors (B, c, e)."""
        bidiagonal = torch.diag_embed(self.alpha) + torch.diag_embed(self.beta[:, :-1], 1)
        s, theta, rt = torch.linalg.svd(bidiagonal)
        c = min(count, self.k)
        residual = self.beta[:, -1:] * s[:, -1, :c].abs()
        right = rt[:, :c].to(self._p.dtype) @ self._p[:, : self.k]
        left = s[:, :, :c].mT.to(self._q.dtype) @ self._q[:, : self.k]
        return theta[:, :c], residual, right, left


def top_ritz(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Best lower bound for sigma_1 and the residual of the top Ritz triplet, both (B,) float64.

    The lower bound is the norm of Q_k^T A, the k x (k+1) matrix [B_k, beta_k e_k]: a compression of A, so never above
    sigma_1. The residual |A^T Q s - theta P r| = beta_k |s_k| belongs to the top triplet (s, theta, r) of B_k.
    """
    scale = torch.maximum(alpha.amax(1), beta.amax(1))
    scale = torch.where(scale > 0, scale, 1.0)[:, None]
    a, b = alpha / scale, beta / scale
    lower = torch.linalg.eigvalsh(ritz_gram(a, b, extended=True))[:, -1].clamp_min(0.0).sqrt()
    _, left = torch.linalg.eigh(ritz_gram(a, b))
    residual = b[:, -1] * left[:, -1, -1].abs()
    return scale[:, 0] * lower, scale[:, 0] * residual


def _with_room(basis: Tensor, index: int) -> Tensor:
    if index < basis.shape[1]:
        return basis
    return torch.cat([basis, basis.new_zeros(basis.shape[0], BASIS_BLOCK, basis.shape[2])], 1)


def _append(basis: Tensor, k: int, w: Tensor) -> Tensor:
    """Write w, made orthogonal to the first k vectors and normalised, as vector k; return its norm in float64.

    The last vector holds all of w that is in the span but for rounding, so it is removed first, then the whole basis
    twice, before and after normalising. What is left may be rounding noise, when the Krylov space is exhausted: noise
    can be parallel to the basis whatever is subtracted, so a random vector takes its place and the process goes on in
    the complement, with the coefficient that was measured.
    """
    before = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64)  # (B,)
    if k > 0:
        w = _orthogonal(_orthogonal(w, basis[:, k - 1 : k]), basis[:, :k])
    # Squares of entries below 1e-19 vanish in float32, so norms are summed in float64.
    norm = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64)
    norm = torch.where(norm < torch.finfo(w.dtype).tiny, 0.0, norm)
    noise = norm <= 10 * torch.finfo(w.dtype).eps * before
    w = w / torch.where(norm > 0, norm, 1.0).to(w.dtype)[:, None]
    if w.device.type != "cpu" or bool(noise.any()):  # elsewhere than on a CPU, asking would hold up the device
        fresh = torch.randn(w.shape[1], generator=torch.Generator().manual_seed(k), dtype=torch.float64).to(w)
        w = torch.where(noise[:, None], fresh / w.shape[1] ** 0.5, w)
    if k > 0:
        w = _orthogonal(w, basis[:, :k])
    basis[:, k] = w / torch.linalg.vector_norm(w, dim=1, keepdim=True)
    return norm


def _orthogonal(w: Tensor, basis: Tensor) -> Tensor:
    """Subtract from w (B, d) its components along the orthonormal vectors of `basis` (B, k, d)."""
    w = w[:, None]  # (B, 1, d): as rows, these products run five times faster than as columns
    return torch.baddbmm(w, w @ basis.mT, basis, alpha=-1)[:, 0]


def start_vectors(samples: int, d: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One vector uniform on the sphere in R^d, the same for each of `samples` samples, (B, d).

    Sharing it makes the value of a sample independent of how a batch is split. The probability statement is about each
    sample's own singular vector, and the union bound over a batch needs no independence.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(d, generator=generator, dtype=torch.float64)
    return (v / v.norm()).to(device=device, dtype=dtype).expand(samples, d)
