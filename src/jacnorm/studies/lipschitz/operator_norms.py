r"""The spectral term of a WideResNet: operator norms of its convolutions, combined along its graph.

How the paper lets batch norm, shortcuts and convolutions enter the product of layer norms is not known. Here every
factor is an upper bound of a layer's Lipschitz constant at evaluation:

- a zero-padded convolution: its operator norm at the true size of its input, not a norm of its reshaped kernel;
- batch norm with frozen statistics: max_c |gain_c| / sqrt(variance_c + epsilon); a shift alone: 1;
- ReLU: 1; the mean over h x w positions: 1 / sqrt(h w); the read-out: its exact spectral norm;
- a block: the norm of its shortcut (1, or that of its norm and 1x1 convolution) plus the product along its branch.

Everything is in natural logs, for a product over many layers leaves the range of float32. Letters: R runs, M maps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_input

from jacnorm.jacobian import Measurement, spectral_norm
from jacnorm.nets.wide_resnet import EPSILON, Block, Convolution, StackedWideResNet

RTOL = 1e-3
"""Relative width of the interval of an operator norm at which its iteration stops."""
MAX_PAIRS = 120
"""Products with a map and its transpose after which it stops in any case; at 32 x 32 positions some need over 60."""


@dataclass(frozen=True)
class SpectralTerms:
    """Spectral leading terms for inputs of norm 1 and without the factor 1 / margin; log, (R,) float64 each.

    unweighted: product of the norms of stem, blocks and head.
    weighted: (sum_i (after_i a_i before_i)^(2/3))^(3/2) over the convolutions and the read-out, with the bounds that
    the layer norms give for the Jacobian of the output by layer i's output (after_i) and for the norm of its input
    (before_i); a_i: see `log_rows`. Along a chain of layers this is prod_k |W_k| (sum_i (a_i / |W_i|)^(2/3))^(3/2), the
    usual form.
    """

    unweighted: Tensor
    weighted: Tensor


def two_thirds(terms: Tensor) -> Tensor:
    """Log of (sum_i x_i^(2/3))^(3/2) from the logs of x, over the last axis."""
    return 1.5 * (terms * (2 / 3)).logsumexp(-1)


def spectral_terms(
    net: StackedWideResNet, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> SpectralTerms:
    """The spectral terms of R networks at evaluation.

    Raises ValueError for layer norm, whose scale depends on the input and has no bound.
    """
    walk = _Walk(net, log_convolution_norms(net, parameters), log_norm_scales(net, parameters, buffers), parameters)
    stages = walk.stages()
    total = torch.stack([stage.log_norm for stage in stages]).sum(0)  # (R,)
    rows = log_rows(net, parameters)
    terms = [total - stage.log_norm + others + rows[name] for stage in stages for name, others in stage.others.items()]
    return SpectralTerms(total, two_thirds(torch.stack(terms, -1)))


@dataclass(frozen=True)
class _Stage:
    """A part of the network between two points that every path crosses, log, (R,) each.

    others: by layer, the product of the norms of the other layers on the path through it, within the stage.
    """

    log_norm: Tensor
    others: dict[str, Tensor]


@dataclass(frozen=True)
class _Walk:
    net: StackedWideResNet
    convolutions: dict[str, Tensor]
    norms: dict[str, Tensor]
    parameters: Mapping[str, Tensor]

    def stages(self) -> list[_Stage]:
        stem = self.norms["stem.norm"]
        height, width = self.net.blocks[-1].second.output_size
        head = self.norms["norm"] - 0.5 * math.log(height * width)
        linear = torch.linalg.matrix_norm(self.parameters["linear.weight"].double(), 2).log()
        return [
            _Stage(self.convolutions["stem"] + stem, {"stem": stem}),
            *(self.block(block) for block in self.net.blocks),
            _Stage(head + linear, {"linear": head}),
        ]

    def block(self, block: Block) -> _Stage:
        norm1, norm2 = self.norms[block.norm1], self.norms[block.norm2]
        first, second = self.convolutions[block.first.name], self.convolutions[block.second.name]
        others = {block.first.name: norm1 + norm2 + second, block.second.name: norm1 + first + norm2}
        shortcut = torch.zeros_like(norm1)
        if block.shortcut:
            others[block.shortcut.name] = norm1
            shortcut = norm1 + self.convolutions[block.shortcut.name]
        return _Stage(torch.logaddexp(shortcut, norm1 + first + norm2 + second), others)


def log_norm_scales(
    net: StackedWideResNet, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Log operator norm of every norm layer with frozen statistics, (R,) float64, by name.

    Raises ValueError for layer norm.
    """
    if net.normalisation == "layer":
        raise ValueError("layer norm divides by a deviation of its input, so its operator norm has no bound")
    if net.normalisation == "none":
        some = parameters["linear.bias"]
        return {name: torch.zeros(net.runs, dtype=torch.float64, device=some.device) for name in net.norms}
    return {
        name: (
            parameters[f"{name}.gain"].double().abs().log()
            - 0.5 * (buffers[f"{name}.variance"].double() + EPSILON).log()
        ).amax(1)
        for name in net.norms
    }


def log_rows(net: StackedWideResNet, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Log of the sum of the row norms of every convolution's unrolled matrix and of the read-out, (R,), by name.

    A row is an output unit: H W sum_c |kernel_c|_2 over output channels c and H x W output positions, each counted as
    an interior one (kernels at the border are cut off, which makes the exact sum smaller).
    """
    found = {
        each.name: parameters[each.weight].double().flatten(2).norm(dim=2).sum(1).log()
        + math.log(math.prod(each.output_size))
        for each in net.convolutions
    }
    return {**found, "linear": parameters["linear.weight"].double().norm(dim=2).sum(1).log()}


def log_convolution_norms(net: StackedWideResNet, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Log operator norm of every convolution, (R,) float64, by name; those of one shape are measured together."""
    found: dict[str, Tensor] = {}
    for alike in _alike(net.convolutions):
        weights = torch.cat([parameters[each.weight] for each in alike])  # (M, outputs, inputs, k, k)
        norms = convolution_norms(weights, alike[0].stride, alike[0].size).value.log().split(net.runs)
        found |= {each.name: norm for each, norm in zip(alike, norms, strict=True)}
    return found


def _alike(convolutions: Sequence[Convolution]) -> Iterator[list[Convolution]]:
    """Convolutions whose maps have equal shapes."""
    shapes: dict[object, list[Convolution]] = {}
    for each in convolutions:
        shapes.setdefault((each.inputs, each.outputs, each.kernel, each.stride, each.size), []).append(each)
    yield from shapes.values()


def convolution_norms(weights: Tensor, stride: int, size: tuple[int, int]) -> Measurement:
    r"""Operator norms of M zero-padded convolutions on inputs of `size` (height, width), matrix-free, with intervals.

    max |y| / |x| over x of shape (inputs, height, width), y = the convolution of x with padding (k - 1) / 2; exact to
    rounding for a small side (up to 64 entries), else Golub-Kahan-Lanczos with an interval of relative width 1e-3. Not
    the norm of the kernel reshaped to a matrix, and at most that of the circular convolution on a torus that is larger
    by (k - 1) / 2, of which it is a part.

    weights: (M, outputs, inputs, k, k).
    """
    inputs = weights.shape[2]
    at = torch.zeros(len(weights), inputs, *size, dtype=weights.dtype, device=weights.device)
    return spectral_norm(_Maps(weights, stride), at, rtol=RTOL, max_pairs=MAX_PAIRS, check=False)


@dataclass(frozen=True)
class _Maps:
    """M convolutions, each applied to its own sample."""

    weights: Tensor
    stride: int

    def __call__(self, x: Tensor) -> Tensor:
        """(M, inputs, height, width) to (M, outputs, height / stride, width / stride)."""
        return _Forward.apply(x, self.weights, self.stride)

    def take(self, samples: Tensor | slice) -> _Maps:
        """Some of the maps."""
        return _Maps(self.weights[samples], self.stride)


class _Forward(torch.autograd.Function):
    """The maps as a linear operation: its derivative is `_Adjoint` and nothing else.

    PyTorch's own convolution would be traced for its derivatives, which costs more than all products together.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, stride: int) -> Tensor:
        ctx.arguments = weights, stride, x.shape[2:]
        maps, _, _, kernel, _ = weights.shape
        x = x.flatten(0, 1)[None]  # (1, M * inputs, height, width)
        y = functional.conv2d(x, weights.flatten(0, 1), stride=stride, padding=kernel // 2, groups=maps)
        return y[0].unflatten(0, (maps, -1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Adjoint.apply(gradient, *ctx.arguments), None, None


class _Adjoint(torch.autograd.Function):
    """The transposed maps."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, stride: int, size: Sequence[int]) -> Tensor:
        ctx.arguments = weights, stride
        maps, _, inputs, kernel, _ = weights.shape
        y, shape = y.flatten(0, 1)[None], (1, maps * inputs, *size)
        x = conv2d_input(shape, weights.flatten(0, 1), y, stride=stride, padding=kernel // 2, groups=maps)
        return x[0].unflatten(0, (maps, -1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Forward.apply(gradient, *ctx.arguments), None, None, None
