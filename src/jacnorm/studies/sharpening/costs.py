"""Square cost and cross-entropy of stacked runs, sample by sample, each run with its own.

Letters: R runs, B samples, K classes. With e_y the one-hot vector of label y, p = softmax(z) and label smoothing s,

    square          c = 1/2 |z - e_y|^2, summed over classes;                       D^2 c = I
    cross-entropy   c = - sum_k t_k log p_k,  t = (1 - s) e_y + s/K (nat);          D^2 c = diag(p) - p p^T
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COSTS = ("square", "cross-entropy")


def squares(cost: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
    """Which runs have the square cost, (R,) bool, from the names of their costs. Raises ValueError for another name."""
    unknown = sorted(set(cost) - set(COSTS))
    if unknown:
        raise ValueError(f"cost is {unknown[0]!r}; it must be one of {', '.join(COSTS)}")
    return torch.tensor([name == "square" for name in cost], device=device)


def targets(
    labels: Tensor, classes: int, smoothing: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Targets (1 - s) e_y + s/K, (R, B, K); PyTorch's convention of label smoothing.

    labels: integers, (R, B), or (B,) shared by the runs. smoothing: (R,); None is 0 for every run (then labels of shape
    (B,) give one run, (1, B, K), which broadcasts).
    """
    one_hot = torch.nn.functional.one_hot(labels, classes).to(dtype)
    if one_hot.ndim == 2:
        one_hot = one_hot.unsqueeze(0)  # (1, B, K)
    if smoothing is None:
        return one_hot
    s = smoothing.to(one_hot)[:, None, None]
    return one_hot + s * (1 / classes - one_hot)


def costs(logits: Tensor, answers: Tensor, square: Tensor, smoothing: Tensor | None = None) -> Tensor:
    """Cost of every sample, (R, B), differentiable in the logits.

    logits: (R, B, K). answers: labels (integers, (B,) or (R, B)), or targets (floating, (R, B, K) or (1, B, K)), which
    are taken as they are, as mixup needs them. square: (R,) bool, which runs have the square cost; the others have
    cross-entropy. smoothing: (R,), of the labels of cross-entropy runs; the square cost never smooths its targets.
    Raises ValueError for smoothing beside targets, which hold it already, and for a smoothed square cost.
    """
    if answers.is_floating_point():
        if smoothing is not None:
            raise ValueError("targets are taken as they are; smooth labels by targets(), or give labels to costs()")
        wanted = answers
    else:
        if smoothing is not None and bool((smoothing[square] != 0).any()):
            raise ValueError("label smoothing belongs to cross-entropy; runs with the square cost have smoothing 0")
        wanted = targets(answers, logits.shape[-1], smoothing, logits.dtype)
    every, some = bool(square.all()), bool(square.any())
    squared = (logits - wanted).square().sum(-1) / 2 if some else logits.new_zeros(())
    if every:
        return squared
    entropy = -(wanted * torch.log_softmax(logits, -1)).sum(-1)
    return torch.where(square[:, None], squared, entropy) if some else entropy


def cost_hessian_product(logits: Tensor, direction: Tensor, square: Tensor) -> Tensor:
    """Product of every sample's cost Hessian by its logits, D^2 c, with `direction`, both (R, B, K); see `costs`."""
    p = torch.softmax(logits, -1)
    product = p * (direction - (p * direction).sum(-1, keepdim=True))
    return torch.where(square[:, None, None], direction, product)


def cost_hessian_norms(logits: Tensor, square: Tensor) -> Tensor:
    r"""Largest eigenvalue of every sample's cost Hessian by its logits, (R, B) float64; 1 for the square cost.

    That of diag(p) - p p^T is the root of sum_k p_k / (p_k - x) between the two largest p_k, and at most
    2 p_1 (1 - p_1), its largest Gershgorin bound. The sum rises there from minus to plus infinity, so bisection in
    float64 finds the root to full relative precision, however small it is where the network is confident.
    """
    p = torch.softmax(logits.double(), -1)
    order = p.sort(-1, descending=True).values  # (R, B, K)
    first, others = order[..., 0], order[..., 1:].sum(-1)
    low = order[..., 1]
    high = torch.minimum(first, 2 * first * others).clamp(min=low)
    for _ in range(50):
        middle = (low + high) / 2
        below = (p / (p - middle.unsqueeze(-1))).sum(-1) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(square[:, None], torch.ones_like(high), high)
