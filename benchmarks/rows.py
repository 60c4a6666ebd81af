"""What is measured: models with inputs, by name, at full or quick size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.models import TransformerBlock, mlp, resnet18, vgg11


@dataclass(frozen=True)
class Row:
    """One model with its batch. `dense`: whether all Jacobians fit in memory, so that dense peers can run."""

    name: str
    words: str
    make: Callable[[], tuple[nn.Module, Tensor]]
    dense: bool = True

    def build(self) -> tuple[nn.Module, Tensor]:
        """Make the model and its inputs; the same ones at every call."""
        torch.manual_seed(0)
        return self.make()


FULL = [
    Row(
        "mlp",
        "ReLU MLP 784-512x20-512, batch 64",
        lambda: (mlp([784, *[512] * 20, 512], nn.ReLU, math.sqrt(2)), torch.randn(64, 784)),
    ),
    Row(
        "tanh",
        "tanh MLP 784-1000x5-784, batch 64",
        lambda: (mlp([784, *[1000] * 5, 784], nn.Tanh, 1.0), torch.randn(64, 784)),
    ),
    Row("vgg11", "VGG11, 3x32x32 to 10 logits, batch 64", lambda: (vgg11().eval(), torch.randn(64, 3, 32, 32))),
    Row(
        "resnet18", "ResNet18, 3x32x32 to 10 logits, batch 64", lambda: (resnet18().eval(), torch.randn(64, 3, 32, 32))
    ),
    Row(
        "block",
        "transformer block, T=128, d=256, hidden to hidden, batch 8",
        lambda: (TransformerBlock().eval(), torch.randn(8, 128, 256)),
        dense=False,
    ),
]

QUICK = [
    Row(
        "mlp",
        "ReLU MLP 256-256x6-256, batch 16",
        lambda: (mlp([256] * 8, nn.ReLU, math.sqrt(2)), torch.randn(16, 256)),
    ),
    Row("vgg11", "VGG11, 3x32x32 to 10 logits, batch 4", lambda: (vgg11().eval(), torch.randn(4, 3, 32, 32))),
    Row(
        "block",
        "transformer block, T=16, d=64, hidden to hidden, batch 4",
        lambda: (TransformerBlock(64).eval(), torch.randn(4, 16, 64)),
    ),
]
