"""Uniform inputs on a cube with a smooth target: the support is known, and every assumption of Theorem 4.3 holds.

Letters: R runs, N samples, d dimensions, K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from jacnorm.studies.sharpening.inputs import STUDY
from jacnorm.training.seeds import generator

OUTPUTS = 2
WAVES = 4
GRID_POINTS = 10_000
"""Most points of the grid on which suprema over the cube are taken."""
NAME = "cube"


def samples(seeds: Sequence[int], count: int, dimension: int) -> Tensor:
    """Independent uniform inputs on [0, 1]^d, each seed's own, (R, N, 1, 1, d) float32; smaller samples are nested."""
    drawn = [torch.rand(count, dimension, generator=generator(STUDY, _name(dimension), s, "samples")) for s in seeds]
    return torch.stack(drawn)[:, :, None, None]


def target(x: Tensor) -> Tensor:
    r"""Smooth function (..., 1, 1, d) -> (..., K), the same for every seed, of the dtype of x.

    y_k(x) = sum_w a_kw sin(pi <v_w, x> + b_w) with Gaussian v_w and a_kw of variance 1 / WAVES, and uniform b_w.
    """
    dimension = x.shape[-1]
    draw = generator(STUDY, _name(dimension), 0, "target")
    frequencies = torch.randn(dimension, WAVES, generator=draw, dtype=torch.float64).to(x)
    phases = (2 * math.pi * torch.rand(WAVES, generator=draw, dtype=torch.float64)).to(x)
    amplitudes = torch.randn(WAVES, OUTPUTS, generator=draw, dtype=torch.float64).to(x) / math.sqrt(WAVES)
    return torch.sin(math.pi * x.flatten(-3) @ frequencies + phases) @ amplitudes


def grid(dimension: int) -> Tensor:
    """All points of a regular grid on [0, 1]^d with its faces, (G, 1, 1, d) float32: at most GRID_POINTS of them."""
    axis = torch.linspace(0, 1, int(GRID_POINTS ** (1 / dimension) + 1e-9))
    return torch.cartesian_prod(*[axis] * dimension).reshape(-1, 1, 1, dimension)


def _name(dimension: int) -> str:
    return f"{NAME} dimension={dimension}"
