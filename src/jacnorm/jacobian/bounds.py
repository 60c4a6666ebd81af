r"""A probabilistic upper bound for the largest singular value, from Golub-Kahan coefficients alone.

Let x_1 be the right singular vector of sigma_1 and let the Golub-Kahan process start from v_1, uniform on the sphere
in R^d. After k full steps the next basis vector is v_{k+1} = p_k(J^T J) v_1 with

    p_k(t) = prod_j (t - theta_j^2) / prod_j (alpha_j beta_j),

theta_j the singular values of the k x k bidiagonal matrix. As |v_{k+1}| = 1, the component along x_1 obeys
|<v_1, x_1>| |p_k(sigma_1^2)| <= 1. Unless |<v_1, x_1>| < delta, therefore, sigma_1^2 is at most the largest root of
p_k(t) = 1/delta, because p_k grows without bound beyond its largest zero. <v_1, x_1>^2 has the law Beta(1/2, (d-1)/2),
so delta^2 = its eps quantile makes the bound fail with probability eps at most, at *every* step k at once: the event is
about the start vector only, so stopping by the bound and taking the smallest bound so far cost nothing.

Source: M. E. Hochstenbach, Probabilistic upper bounds for the matrix two-norm, J. Sci. Comput. 57 (2013) 464-476,
doi 10.1007/s10915-013-9716-x.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from jacnorm.jacobian.errors import OptionError


@lru_cache(maxsize=1024)
def log_start_threshold(d: int, eps: float) -> float:
    """Log of delta with P(|<v, x>| < delta) = eps for v uniform on the sphere in R^d and any fixed unit x.

    delta^2 is the eps quantile of Beta(1/2, (d-1)/2), by bisection on log delta; the distribution function is
    integrated by Gauss-Legendre quadrature to about 1e-12. For d = 1 the component is always +-1, so the log is 0.

    Raises OptionError unless d >= 1 and 0 < eps < 1.
    """
    if d < 1 or not 0 < eps < 1:
        raise OptionError(f"the start vector needs d >= 1 entries and 0 < eps < 1, not d={d}, eps={eps}")
    if d == 1:
        return 0.0
    low, high = math.log(eps) - math.log(d) - 10.0, 0.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        if _start_probability(d, math.exp(middle)) < eps:
            low = middle
        else:
            high = middle
        if high - low < 1e-14 * max(1.0, abs(low)):
            break
    return low  # the smaller end: a smaller delta only makes the bound safer


def _start_probability(d: int, delta: float) -> float:
    """P(|<v, x>| < delta) = 2 Gamma(d/2) / (sqrt(pi) Gamma((d-1)/2)) * integral_0^asin(delta) cos(a)^(d-2) da."""
    if delta >= 1:
        return 1.0
    log_constant = math.log(2) + math.lgamma(d / 2) - 0.5 * math.log(math.pi) - math.lgamma((d - 1) / 2)
    nodes, weights = _gauss_legendre(64)
    # cos(a)^(d-2) is negligible beyond a = 9 / sqrt(d-2); within it, 64 nodes integrate the bell to rounding.
    reach = min(math.asin(delta), 9.0 / math.sqrt(d - 2)) if d > 2 else math.asin(delta)
    total = sum(w * math.cos(0.5 * reach * (t + 1)) ** (d - 2) for t, w in zip(nodes, weights, strict=True))
    return min(1.0, math.exp(log_constant) * 0.5 * reach * total)


@lru_cache(maxsize=4)
def _gauss_legendre(count: int) -> tuple[list[float], list[float]]:
    """Nodes and weights on [-1, 1] from the Jacobi matrix of the Legendre polynomials (Golub and Welsch 1969)."""
    k = torch.arange(1, count, dtype=torch.float64)
    off = k / (4 * k**2 - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return values.tolist(), (2 * vectors[0] ** 2).tolist()


def upper_bound(alpha: Tensor, beta: Tensor, log_delta: float) -> tuple[Tensor, Tensor]:
    """Largest singular value of the bidiagonal matrix and the upper bound for sigma_1, both (B,) float64.

    alpha, beta: (B, k) float64, diagonal and superdiagonal of B_k, beta[:, k-1] the norm that ends step k. A zero among
    them means that the Krylov space is exhausted: then the bound equals the largest Ritz value.
    """
    scale = torch.maximum(alpha.amax(1), beta.amax(1))
    scale = torch.where(scale > 0, scale, 1.0)
    a, b = alpha / scale[:, None], beta / scale[:, None]
    roots = torch.linalg.eigvalsh(ritz_gram(a, b)).clamp_min(0.0)  # (B, k) ascending, theta^2
    top = roots[:, -1:]
    gaps = (top - roots[:, :-1]).clamp_min(0.0)  # (B, k-1)
    target = (a.log() + b.log()).sum(1, keepdim=True) - log_delta  # log p_k + sum log(alpha beta) = target
    # In w = log(t - theta_1^2) the equation w + sum_j log(e^w + gap_j) = target has a left side that is convex with
    # slope in [1, k], so Newton's method started at the right of the root stays there: every iterate is a valid bound.
    start = torch.minimum(target - gaps.log().sum(1, keepdim=True), target / alpha.shape[1])
    exhausted = ~torch.isfinite(target)
    w = torch.where(exhausted, 0.0, start).clamp_min(-600.0)
    target = torch.where(exhausted, 0.0, target)
    for _ in range(16):
        shifted = w.exp() + gaps
        excess = w + shifted.log().sum(1, keepdim=True) - target
        slope = 1 + (w.exp() / shifted).sum(1, keepdim=True)
        w = (w - excess / slope).clamp_min(-600.0)  # below that, exp leaves the range and the bound is the Ritz value
    above = torch.where(exhausted, 0.0, w.exp())
    return scale * top[:, 0].sqrt(), scale * (top + above)[:, 0].sqrt()


def ritz_gram(alpha: Tensor, beta: Tensor, extended: bool = False) -> Tensor:
    """B B^T of the upper bidiagonal B = (alpha on the diagonal, beta above it), (B, k, k).

    With `extended` the last beta belongs to B too (a k x (k+1) matrix); without it, B is square.
    """
    inner = beta if extended else torch.cat([beta[:, :-1], torch.zeros_like(beta[:, :1])], 1)
    gram = torch.diag_embed(alpha**2 + inner**2)
    off = alpha[:, 1:] * beta[:, :-1]
    return gram + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
