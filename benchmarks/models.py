"""The models of the benchmark, randomly initialised: an MLP, VGG11, ResNet18 and one transformer block."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn


def mlp(widths: list[int], activation: type[nn.Module], gain: float) -> nn.Sequential:
    """Bias-free dense layers with weights N(0, gain^2 / fan_in) and `activation` between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        linear = nn.Linear(fan_in, fan_out, bias=False)
        nn.init.normal_(linear.weight, std=gain / math.sqrt(fan_in))
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def vgg11(classes: int = 10) -> nn.Sequential:
    """VGG11 with batch norm for 3x32x32 images (Simonyan and Zisserman 2015, configuration A, one linear head)."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, classes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5 left)."""

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        """Widen from `fan_in` to `width` channels, with a 1x1 convolution on the shortcut where shapes change."""
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(fan_in, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = stride == 1 and fan_in == width
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(fan_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual(x) + shortcut(x))."""
        return torch.relu(self.residual(x) + self.shortcut(x))


def resnet18(classes: int = 10) -> nn.Sequential:
    """ResNet18 for 3x32x32 images: 3x3 stem, no first pooling, widths 64-128-256-512."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    channels = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(channels, width, stride), BasicBlock(width, width, 1)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class TransformerBlock(nn.Module):
    """One pre-norm encoder block: multi-head attention and a GELU MLP, each on a residual branch."""

    def __init__(self, width: int = 256, heads: int = 8) -> None:
        """Use `heads` heads of width // heads channels and an MLP four times as wide."""
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states (B, T, width) to hidden states of the same shape."""
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        scores = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)  # (B, heads, T, T)
        x = x + self.out((scores @ v).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm_mlp(x))
