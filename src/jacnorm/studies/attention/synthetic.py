r"""Rows of attention with known geometry: unit vectors with a mean cosine, Gaussian logits, no mask.

x_i is the direction of sqrt(1 - c) zeta_i / sqrt(d) + sqrt(c) mu, with zeta_i a standard normal vector and mu a random
unit vector of the head, so two vectors have cosine c on average, up to terms that vanish as d grows. The logits of head
h are sigma_h times standard normal numbers, sigma_h = sigma U with U uniform on [0.5, 1.5). Without training they reach
the paper's lengths, and show which of its observations need no language.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from jacnorm.studies.attention.settings import SyntheticSettings
from jacnorm.training.seeds import RunId


@dataclass(frozen=True)
class SyntheticRows:
    """Rows of H heads; those with fewer keys are the first keys of these."""

    vectors: Tensor
    """x, (H, n, d) float64, of length 1."""
    logits: Tensor
    """(H, m, n) float64."""


def draw(settings: SyntheticSettings, run: RunId) -> SyntheticRows:
    """The rows of one run, for the largest of the settings' lengths; drawn on the CPU."""
    heads, keys, d = settings.heads, max(settings.lengths), settings.dimension
    vectors, centres, logits, spreads = (run.generator(each) for each in ("vectors", "centres", "logits", "spreads"))
    zeta = torch.randn(heads, keys, d, generator=vectors, dtype=torch.float64)
    mu = torch.randn(heads, 1, d, generator=centres, dtype=torch.float64)
    mu /= torch.linalg.vector_norm(mu, dim=-1, keepdim=True)
    x = math.sqrt((1 - settings.cosine) / d) * zeta + math.sqrt(settings.cosine) * mu
    x /= torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    sigma = settings.spread * (0.5 + torch.rand(heads, 1, 1, generator=spreads, dtype=torch.float64))
    drawn = torch.randn(heads, settings.rows, keys, generator=logits, dtype=torch.float64)
    return SyntheticRows(x, sigma * drawn)
