r"""Closed forms of the theory: by how much one round is promised to lower the source loss.

Each client makes one step of gradient descent of the same size lambda from the same weights, and the server averages
(assumptions 4.1-4.3): w' = w - lambda * mean_k J_k. L is the unweighted mean of the clients' losses, each convex and
alpha-smooth; J_k is the gradient of client k's loss by all weights, |J|^2 = |mean_k J_k|^2, sigma^2 = mean_k |J_k|^2 -
|J|^2 (Def. 4). All functions broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-300


def softmax_smoothness(x: Tensor) -> Tensor:
    """Alpha of softmax regression, the largest over clients: half the top eigenvalue of X^T X / n, (...).

    x: (..., K, n, d), a constant feature included. By the weights the Hessian is the mean of (diag(p) - p p^T) times x
    x^T (Kronecker product), and the eigenvalues of diag(p) - p p^T are at most 1/2.
    """
    gram = x.mT @ x / x.shape[-2]  # (..., K, d, d)
    return torch.linalg.eigvalsh(gram)[..., -1].amax(-1) / 2


def moments(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """|J|^2 and sigma^2 of gradients (..., K, D), (...) each; the variance from deviations, so never negative."""
    mean = gradients.mean(-2, keepdim=True)
    return mean.square().sum((-2, -1)), (gradients - mean).square().sum(-1).mean(-1)


def optimal_rate(square: Tensor, variance: Tensor, smoothness: Tensor) -> Tensor:
    """Lambda of assumption 4.3, |J|^2 / (alpha (|J|^2 + sigma^2)), which makes Lemma B.3's promise largest.

    0 where all gradients vanish.
    """
    return square / (smoothness * (square + variance).clamp(min=_TINY))


def lemma(rate: Tensor, square: Tensor, variance: Tensor, smoothness: Tensor) -> Tensor:
    """Decrease of Lemma B.3: beta_1 |J|^2 - beta_2 sigma^2, beta_2 = alpha lambda^2 / 2, beta_1 = lambda - beta_2."""
    return variance_free(rate, square, smoothness) - smoothness * rate.square() / 2 * variance


def variance_free(rate: Tensor, square: Tensor, smoothness: Tensor) -> Tensor:
    """Decrease by the descent lemma for L itself, beta_1 |J|^2: with one step each, sigma^2 does not enter."""
    return (rate - smoothness * rate.square() / 2) * square


def corrected(square: Tensor, variance: Tensor, smoothness: Tensor) -> Tensor:
    """Decrease of one round in Appendix E: |J|^2 / (2 alpha (1 + sigma^2 / |J|^2)), Lemma B.3 at the optimal rate."""
    return square * optimal_rate(square, variance, smoothness) / 2


def printed(square: Tensor, variance: Tensor, smoothness: Tensor) -> Tensor:
    """Decrease of one round in Theorem 2 as printed, with 2 / alpha: four times what Appendix E derives."""
    return 4 * corrected(square, variance, smoothness)
