"""Groups of C neighbouring logits on the last axis, each a categorical variable: (..., K C) holds K of them.

PyTorch's softmax over an axis of eight takes 250 ns a group on one CPU thread, and five of them a third of an update.
Here sums over a group, and their way back to its members, are products with matrices of zeros and ones: a fifth of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function


def gumbel(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise on the CPU."""
    return torch.empty(*shape).exponential_(generator=generator).log_().neg_()


def probabilities(logits: Tensor, classes: int) -> Tensor:
    """Softmax in each group, (..., K C), as often differentiable as one likes."""
    return _softmax(logits, classes)[0]


def divergence(posterior: Tensor, prior: Tensor, classes: int) -> Tensor:
    """Kullback-Leibler divergence of the posterior from the prior, summed over groups: logits (..., K C) to (...)."""
    q, of_posterior = _softmax(posterior, classes)
    _, of_prior = _softmax(prior, classes)
    return (q * (posterior - prior)).sum(-1) - (of_posterior - of_prior).sum(-1)


def sampled(logits: Tensor, noise: Tensor, classes: int) -> Tensor:
    """One-hot vector of the largest logit plus Gumbel noise in each group, with the gradient of the probabilities.

    logits, noise, result: (..., K C). The straight-through gradient of Bengio, Leonard and Courville (2013).
    """
    groups = (logits.detach() + noise).unflatten(-1, (-1, classes))  # (..., K, C)
    largest = groups.argmax(-1, keepdim=True)
    hard = torch.zeros_like(groups).scatter_(-1, largest, 1.0).flatten(-2)
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return hard
    found: Tensor = _StraightThrough.apply(probabilities(logits, classes), hard)  # type: ignore[no-untyped-call]
    return found


class _StraightThrough(Function):
    """The second argument's value with the first one's gradient."""

    @staticmethod
    def forward(ctx: object, soft: Tensor, hard: Tensor) -> Tensor:
        return hard.view_as(hard)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def _softmax(logits: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Probabilities (..., K C) and the logarithm of each group's sum of exponentials (..., K)."""
    members = _members(logits.shape[-1], classes, logits.dtype, logits.device)  # (K, K C)
    with torch.no_grad():  # a shift changes neither result nor gradient
        largest = logits.unflatten(-1, (-1, classes)).amax(-1)  # (..., K)
        shift = largest @ members
    exponentials = (logits - shift).exp()
    sums = exponentials @ members.T  # (..., K)
    return exponentials / (sums @ members), sums.log() + largest


@functools.cache
def _members(size: int, classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which of `size` entries belong to which group, (K, K C)."""
    return torch.eye(size // classes, dtype=dtype, device=device).repeat_interleave(classes, 1)
