"""Margins of classified samples. Letters: R networks, B samples, K classes."""

from __future__ import annotations

import torch
from torch import Tensor

QUANTILES = {"margin_p01": 0.01, "margin_p10": 0.1, "margin_p50": 0.5}


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """True logit minus the largest other one, (R, B); not positive for samples that are classified wrongly.

    logits: (R, B, K) with K >= 2; labels: (R, B), or (B,) shared by the networks. Where two wrong classes tie, the
    derivative is that of one of them. Can be differentiated twice: the indices of the two classes are constants, and no
    logit is masked by an infinity.
    """
    labels = labels.expand(logits.shape[:2])
    first, second = logits.detach().topk(2, dim=2).indices.unbind(2)  # (R, B)
    wrong = torch.where(first == labels, second, first)
    true, best = logits.gather(2, torch.stack([labels, wrong], dim=2)).unbind(2)
    return true - best


def summary(values: Tensor) -> dict[str, Tensor]:
    """The smallest of margins (R, B) and their quantiles, (R,) float64 each, by the name of their table column.

    Quantiles interpolate linearly between order statistics.
    """
    values = values.double().sort(1).values
    found = {"margin": values[:, 0]}
    for name, share in QUANTILES.items():
        position = share * (values.shape[1] - 1)
        below = int(position)
        above = min(below + 1, values.shape[1] - 1)
        found[name] = values[:, below].lerp(values[:, above], position - below)
    return found
