"""Stacks of wide residual networks: R independent networks of one shape, advanced together by grouped convolutions.

The architecture is that of Wei and Ma (2019, arXiv 1905.03684, section 8), a pre-activation WideResNet (Zagoruyko and
Komodakis 2016): a 3x3 convolution followed by norm and ReLU; three groups of blocks with strides 1, 2, 2; a final norm,
ReLU, average pooling and a linear read-out. A block is norm, ReLU, 3x3 convolution with the group's stride, norm, ReLU,
3x3 convolution, added to its shortcut. The shortcut of the first block of a group is a 1x1 convolution of the block's
first ReLU, whether or not the shape changes; that of any other block is the block's input. Convolutions have no biases
and are zero-padded.

Letters: R runs, B samples, C channels, K classes. Activations have shape (B, R * C, H, W), run by run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

Normalisation = Literal["batch", "layer", "none"]
EPSILON = 1e-5
"""Added to variances, as in PyTorch."""
MOMENTUM = 0.1
"""Weight of a batch in the running statistics, as in PyTorch."""


@dataclass(frozen=True)
class Convolution:
    """A zero-padded convolution without bias: k x k kernels, padding (k - 1) / 2. size: its input's (height, width)."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: tuple[int, int]

    @property
    def weight(self) -> str:
        """Name of its parameter, (R, outputs, inputs, k, k)."""
        return f"{self.name}.weight"

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of its output."""
        height, width = ((length - 1) // self.stride + 1 for length in self.size)
        return height, width


@dataclass(frozen=True)
class Block:
    """norm1, ReLU, first, norm2, ReLU, second, plus shortcut; shortcut: None for the identity."""

    name: str
    first: Convolution
    second: Convolution
    shortcut: Convolution | None

    @property
    def norm1(self) -> str:
        """Name of the norm of the block's input."""
        return f"{self.name}.norm1"

    @property
    def norm2(self) -> str:
        """Name of the norm between the two convolutions."""
        return f"{self.name}.norm2"


@dataclass(frozen=True)
class Layer:
    """What went into a convolution, or into the read-out, and what came out, both part of the graph."""

    name: str
    input: Tensor
    output: Tensor


@dataclass(frozen=True)
class Pass:
    """What one forward pass gives; activations (B, R * C, H, W).

    logits: (R, B, K). normalised: every output of a norm, in order: the stem's, two of each block, the final one.
    groups: the outputs of the three groups. blocks: those of all blocks. layers: input and output of every convolution,
    in the order of `StackedWideResNet.convolutions`, and of the read-out: (R, B, C) and the logits.
    """

    logits: Tensor
    normalised: list[Tensor]
    groups: list[Tensor]
    blocks: list[Tensor]
    layers: Sequence[Layer] = ()


class StackedWideResNet:
    """R WideResNets of one shape; parameters and running statistics are handed in, so that any optimiser can hold them.

    depth: 6 n + 4, for n blocks in each group. stem: channels of the first convolution. channels: of the first group;
    the second and third have two and four times as many. image: (channels, height, width).

    normalisation, at each of the 6 n + 2 places of a norm:
    "batch": batch norm with gain and shift per channel.
    "layer": layer norm over channels and positions of a sample, gain and shift per channel.
    "none": a shift per channel and nothing else. So that such networks can be trained at all, the first convolution of
    each block starts scaled by (number of blocks)^(-1/2) and the second at zero, as in Fixup (Zhang, Dauphin and Ma
    2019, arXiv 1901.09321, for branches of two layers); its multipliers and its zero read-out are left out.

    Raises ValueError for an impossible shape.
    """

    def __init__(
        self,
        runs: int,
        depth: int,
        stem: int,
        channels: int,
        classes: int,
        image: tuple[int, int, int],
        normalisation: Normalisation = "batch",
    ) -> None:
        if normalisation not in get_args(Normalisation):
            raise ValueError(f"normalisation is {normalisation!r}; it must be one of batch, layer, none")
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth is {depth}; a WideResNet has 10, 16, 22, 28, ... (6 n + 4) layers")
        if min(runs, stem, channels, classes, *image) < 1:
            raise ValueError(
                f"runs={runs}, stem={stem}, channels={channels}, classes={classes} and image={image} must be at least 1"
            )
        self.runs, self.classes, self.image, self.normalisation = runs, classes, image, normalisation
        self.stem = Convolution("stem", image[0], stem, 3, 1, (image[1], image[2]))
        self.groups = _groups(self.stem, channels, (depth - 4) // 6)
        self.features = 4 * channels

    @property
    def blocks(self) -> list[Block]:
        """All blocks, from the input."""
        return [block for group in self.groups for block in group]

    @property
    def convolutions(self) -> list[Convolution]:
        """All convolutions: the stem, then of each block the shortcut if it has one, the first and the second."""
        inner = [each for block in self.blocks for each in (block.shortcut, block.first, block.second) if each]
        return [self.stem, *inner]

    @property
    def norms(self) -> dict[str, int]:
        """Channels of every norm by name, in order."""
        inner = {
            name: width
            for block in self.blocks
            for name, width in ((block.norm1, block.first.inputs), (block.norm2, block.first.outputs))
        }
        return {"stem.norm": self.stem.outputs, **inner, "norm": self.features}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of one run."""
        found: dict[str, tuple[int, ...]] = {
            each.weight: (each.outputs, each.inputs, each.kernel, each.kernel) for each in self.convolutions
        }
        for name, width in self.norms.items():
            if self.normalisation != "none":
                found[f"{name}.gain"] = (width,)
            found[f"{name}.shift"] = (width,)
        return {**found, "linear.weight": (self.classes, self.features), "linear.bias": (self.classes,)}

    def initial(self, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Parameters by name, (R, ...) float32; a run's depend on its own generator only.

        Convolutions N(0, 2 / (k^2 outputs)), read-out uniform on +-1 / sqrt(features) (PyTorch's default), gains 1,
        shifts and biases 0; without norms see the class. Raises ValueError unless there is a generator for each run.
        """
        if len(generators) != self.runs:
            raise ValueError(f"there are {len(generators)} generators for {self.runs} runs; give one for each")
        return {
            name: torch.stack([self._draw(name, shape, generator) for generator in generators])
            for name, shape in self.shapes().items()
        }

    def _draw(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if name == "linear.weight":
            return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(self.features)
        if len(shape) == 1:
            return torch.ones(shape) if name.endswith(".gain") else torch.zeros(shape)
        weights = torch.randn(shape, generator=generator) * math.sqrt(2 / (shape[0] * shape[2] * shape[3]))
        if self.normalisation != "none":
            return weights
        if name.endswith(".second.weight"):
            return torch.zeros(shape)
        return weights / math.sqrt(len(self.blocks)) if name.endswith(".first.weight") else weights

    def buffers(self) -> dict[str, Tensor]:
        """Running statistics at the start, (R, C) each: mean 0 and variance 1; none unless under batch norm."""
        found: dict[str, Tensor] = {}
        for name, width in self.norms.items() if self.normalisation == "batch" else ():
            found[f"{name}.mean"] = torch.zeros(self.runs, width)
            found[f"{name}.variance"] = torch.ones(self.runs, width)
        return found

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x: Tensor,
        *,
        training: bool,
        momentum: float = MOMENTUM,
    ) -> Pass:
        """Pass x (R, B, channels, height, width) through the networks.

        training: batch norm uses the statistics of the batch and moves the running ones in place by `momentum` (with
        the unbiased variance, as PyTorch does); otherwise it uses the running ones. Raises ValueError for inputs of
        another shape.
        """
        if x.ndim != 5 or x.shape[0] != self.runs or tuple(x.shape[2:]) != self.image:
            raise ValueError(f"x has shape {tuple(x.shape)}; this stack expects ({self.runs}, B, *{self.image})")
        return _Forward(self, parameters, buffers, training, momentum).run(x)


def _groups(stem: Convolution, channels: int, count: int) -> list[list[Block]]:
    """Three groups of `count` blocks."""
    found: list[list[Block]] = []
    inputs, size = stem.outputs, stem.size
    for group, (outputs, group_stride) in enumerate(((channels, 1), (2 * channels, 2), (4 * channels, 2)), start=1):
        found.append([])
        for number in range(1, count + 1):
            name = f"group{group}.block{number}"
            stride = group_stride if number == 1 else 1
            first = Convolution(f"{name}.first", inputs, outputs, 3, stride, size)
            shortcut = Convolution(f"{name}.shortcut", inputs, outputs, 1, stride, size) if number == 1 else None
            inputs, size = outputs, first.output_size
            found[-1].append(Block(name, first, Convolution(f"{name}.second", outputs, outputs, 3, 1, size), shortcut))
    return found


@dataclass(frozen=True)
class _Forward:
    """One forward pass and what is kept of it."""

    net: StackedWideResNet
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    training: bool
    momentum: float
    normalised: list[Tensor] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)

    def run(self, x: Tensor) -> Pass:
        net = self.net
        # A single run is quicker with channels last; grouped convolutions are not.
        memory = torch.channels_last if net.runs == 1 else torch.contiguous_format
        h = x.transpose(0, 1).flatten(1, 2).contiguous(memory_format=memory)  # (B, R * channels, height, width)
        h = self.rectify(self.convolve(net.stem, h), "stem.norm")
        blocks, groups = [], []
        for group in net.groups:
            for block in group:
                h = self.block(block, h)
                blocks.append(h)
            groups.append(h)
        pooled = self.rectify(h, "norm").mean((2, 3)).unflatten(1, (net.runs, -1)).transpose(0, 1)  # (R, B, features)
        weight, bias = self.parameters["linear.weight"], self.parameters["linear.bias"]
        logits = torch.bmm(pooled, weight.transpose(1, 2)) + bias.unsqueeze(1)  # (R, B, K)
        self.layers.append(Layer("linear", pooled, logits))
        return Pass(logits, self.normalised, groups, blocks, self.layers)

    def block(self, block: Block, x: Tensor) -> Tensor:
        h = self.rectify(x, block.norm1)
        shortcut = self.convolve(block.shortcut, h) if block.shortcut else x
        h = self.rectify(self.convolve(block.first, h), block.norm2)
        return shortcut + self.convolve(block.second, h)

    def convolve(self, convolution: Convolution, x: Tensor) -> Tensor:
        weight = self.parameters[convolution.weight].flatten(0, 1)  # (R * outputs, inputs, k, k)
        padding = convolution.kernel // 2
        y = functional.conv2d(x, weight, stride=convolution.stride, padding=padding, groups=self.net.runs)
        self.layers.append(Layer(convolution.name, x, y))
        return y

    def rectify(self, x: Tensor, name: str) -> Tensor:
        """Norm and ReLU; the ReLU is not in place, which second derivatives would not survive."""
        self.normalised.append(self.normalise(x, name))
        return torch.relu(self.normalised[-1])

    def normalise(self, x: Tensor, name: str) -> Tensor:
        shift = self.parameters[f"{name}.shift"].flatten()  # (R * C,)
        if self.net.normalisation == "none":
            return x + shift.to(x.dtype)[:, None, None]
        gain = self.parameters[f"{name}.gain"].flatten()
        if self.net.normalisation == "layer":
            return functional.group_norm(x, self.net.runs, gain, shift, EPSILON)
        mean, variance = (self.buffers[f"{name}.{each}"].view(-1) for each in ("mean", "variance"))
        return functional.batch_norm(
            x, mean, variance, gain, shift, training=self.training, momentum=self.momentum, eps=EPSILON
        )


def per_run(activation: Tensor, runs: int) -> Tensor:
    """An activation (B, R * C, H, W) as (R, B, C, H, W)."""
    return activation.unflatten(1, (runs, -1)).transpose(0, 1)
