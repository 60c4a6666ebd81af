"""One list of functions and inputs, of which each test asks one property; and matrices of chosen spectrum.

The oracle for all of them is the float64 singular value decomposition of a Jacobian that
`torch.func.jacrev` materialises per sample on a float64 copy: neither the batching nor the algorithms under test.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from benchmarks.models import TransformerBlock, mlp
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], tuple[nn.Module, Tensor]]

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            model, x = self.make()
        return model.to(dtype), x.to(dtype)


class FusedAttention(nn.Module):
    """Attention by the fused kernel, which has neither a double backward nor a forward derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, 2 * x, x.sin())


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 3, 3, padding=1), nn.Tanh()
    ).eval()


CASES = [
    Case("wide tanh", lambda: (mlp([90, 120, 80], nn.Tanh, 1.2), torch.randn(5, 90))),
    Case("tall relu", lambda: (mlp([70, 100, 150], nn.ReLU, math.sqrt(2)), torch.randn(3, 70))),
    Case("few outputs", lambda: (mlp([50, 64, 7], nn.Tanh, 1.0), torch.randn(4, 50))),
    Case("few inputs", lambda: (mlp([3, 64, 40], nn.Tanh, 1.0), torch.randn(4, 3))),
    Case("convnet", lambda: (convnet(), torch.randn(3, 2, 6, 6))),
    Case("attention", lambda: (TransformerBlock(16, heads=2).eval(), torch.randn(2, 6, 16))),
    Case("fused attention", lambda: (FusedAttention(), torch.randn(2, 2, 8, 8))),
    Case("scalar output", lambda: (nn.Sequential(nn.Linear(9, 1), nn.Flatten(0)), torch.randn(4, 9))),
]
IDS = [case.name for case in CASES]


def oracle(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Jacobians (B, m, n) in float64, sample by sample."""
    if isinstance(model, nn.Module):
        model = copy.deepcopy(model).double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobians = [torch.func.jacrev(lambda z: model(z[None])[0])(sample).detach() for sample in x.double()]
    return torch.stack([j.reshape(-1, x[0].numel()) for j in jacobians])


def with_spectrum(values: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """A float64 matrix (m, n) with the given non-zero singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64))[0] for size in (m, n)
    )
    return left * values.double() @ right.mT


def linear_map(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ matrix.mT


SPECTRA = {
    "isolated": torch.cat([torch.tensor([1.1]), torch.linspace(1.0, 0.1, 149)]),
    "clustered": torch.cat([1 - 1e-4 * torch.arange(5), torch.linspace(0.9, 0.1, 145)]),
    "triple": torch.cat([torch.ones(3), torch.linspace(0.9, 0.1, 147)]),
    "rank two": torch.tensor([2.0, 1.0]),
    "isometry": torch.ones(150),
    "geometric": 10 ** torch.linspace(0, -8, 150),
}
