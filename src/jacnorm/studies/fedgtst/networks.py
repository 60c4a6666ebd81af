"""The networks that are federated, as pure functions of their weights that `torch.func` can map and differentiate.

Letters: B samples, C classes, d features, D weights. Images have shape (B, 3, h, w). A network is a feature extractor
followed by a linear read-out; the target keeps the first and learns the second anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from jacnorm.errors import UserError

Name = Literal["lenet", "resnet18"]
Weights = Mapping[str, Tensor]
"""Parameters of one network by name."""
Trunk = Callable[[Weights, Tensor], Tensor]
"""Images to what comes before the read-out."""

STAGES = (64, 128, 256, 512)
"""Channels of the four stages of ResNet18, each of two blocks; all but the first halve the image."""
GROUPS = 32
"""Groups of its group norms."""
READ_OUT = "read_out"


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution with bias, or a norm's gain and shift (scale: None)."""

    weight: tuple[int, ...]
    bias: int | None
    fan_in: int | None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of "weight" and, if there is one, "bias"."""
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": (self.bias,)})

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """PyTorch's usual start: uniform in +-1/sqrt(fan-in); norms start as the identity."""
        if self.fan_in is None:
            return {"weight": torch.ones(self.weight), "bias": torch.zeros(self.weight)}
        bound = 1 / math.sqrt(self.fan_in)
        return {
            name: torch.rand(shape, generator=generator) * (2 * bound) - bound for name, shape in self.shapes.items()
        }


def _linear(inputs: int, outputs: int) -> Layer:
    return Layer((outputs, inputs), outputs, inputs)


def _convolution(inputs: int, outputs: int, kernel: int, *, bias: bool = True) -> Layer:
    return Layer((outputs, inputs, kernel, kernel), outputs if bias else None, inputs * kernel * kernel)


def _norm(channels: int) -> Layer:
    return Layer((channels,), channels, None)


@dataclass(frozen=True)
class Network:
    """A network of one shape; made by `build`. It holds no weights: they are handed to each function.

    probabilistic: the extractor gives mean and standard deviation of its features, as FedSR wants (Nguyen, Torr and
    Lim 2022); its features are then the means, which is what a target is fine-tuned on.
    """

    name: Name
    shape: tuple[int, int, int]
    classes: int
    probabilistic: bool
    feature_width: int
    layers: Mapping[str, Layer] = field(repr=False)
    trunk: Trunk = field(repr=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters by name, in the order of the layers."""
        return {f"{name}.{part}": shape for name, layer in self.layers.items() for part, shape in layer.shapes.items()}

    @property
    def size(self) -> int:
        """Number of weights D."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def head_names(self) -> tuple[str, str]:
        """Names of the read-out's parameters: weight (C, d) and bias (C,)."""
        return f"{READ_OUT}.weight", f"{READ_OUT}.bias"

    def parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Initial weights of one network, float32, in the order of the layers."""
        drawn = {name: layer.draw(generator) for name, layer in self.layers.items()}
        return {f"{name}.{part}": tensor for name, parts in drawn.items() for part, tensor in parts.items()}

    def distribution(self, parameters: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the features of a probabilistic network, each (B, d)."""
        mean, raw = self.trunk(parameters, x).chunk(2, -1)
        return mean, functional.softplus(raw)

    def features(self, parameters: Weights, x: Tensor) -> Tensor:
        """The features of (B, 3, h, w) images, (B, d); their means if the network is probabilistic."""
        return self.distribution(parameters, x)[0] if self.probabilistic else self.trunk(parameters, x)

    def read_out(self, parameters: Weights, z: Tensor) -> Tensor:
        """Logits of features, (B, C)."""
        return _dense(parameters, READ_OUT, z)

    def logits(self, parameters: Weights, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits of images, (B, C). noise: (B, d) standard normals; a probabilistic network then samples features."""
        if noise is None:
            return self.read_out(parameters, self.features(parameters, x))
        mean, deviation = self.distribution(parameters, x)
        return self.read_out(parameters, mean + deviation * noise)


def build(name: str, shape: tuple[int, int, int], classes: int, *, probabilistic: bool = False) -> Network:
    """The network `name` for images of `shape` (3, h, w) and a number of classes.

    lenet: for 8x8 images two 3x3 convolutions with 6 and 16 channels and 84 features (D = 7,358 for 10 classes);
    for 28x28, 32x32 and 64x64 ones LeNet-5 (LeCun et al. 1998) with ReLU, max-pooling and a linear read-out
    (D = 62,006 at 32x32; 28x28 images are padded to that size). resnet18: He et al. (2016) with a 3x3 stem without
    pooling, for small images, and group norm for batch norm, whose running statistics belong to no client.
    A probabilistic network gives two numbers for each feature; that of resnet18 by one more linear layer.

    Raises UserError for an unknown name, another number of channels, or a size that the network does not take.
    """
    if name not in get_args(Name):
        raise UserError(f'network "{name}" is unknown: choose one of {", ".join(get_args(Name))}')
    channels, height, width = shape
    if channels != 3 or height != width:
        raise UserError(f"network {name} takes square images of 3 channels, not of shape {tuple(shape)}")
    makers = {"lenet": _lenet, "resnet18": _resnet18}
    layers, trunk, features = makers[name](height, 2 if probabilistic else 1)
    layers = {**layers, READ_OUT: _linear(features, classes)}
    return Network(name, tuple(shape), classes, probabilistic, features, layers, trunk)  # type: ignore[arg-type]


def _lenet(side: int, numbers: int) -> tuple[dict[str, Layer], Trunk, int]:
    """Layers, trunk and feature width; numbers: what it gives per feature."""
    if side not in (8, 28, 32, 64):
        raise UserError(f"network lenet takes images of 8, 28, 32 or 64 pixels a side, not {side}: resize them")
    if side == 8:
        layers = {"convolution1": _convolution(3, 6, 3), "convolution2": _convolution(6, 16, 3)}
        layers["dense1"] = _linear(64, 84 * numbers)
        return layers, _small_trunk(numbers), 84
    padding = 2 if side == 28 else 0
    after = ((side + 2 * padding - 4) // 2 - 4) // 2
    layers = {"convolution1": _convolution(3, 6, 5), "convolution2": _convolution(6, 16, 5)}
    layers |= {"dense1": _linear(16 * after**2, 120), "dense2": _linear(120, 84 * numbers)}

    def trunk(p: Weights, x: Tensor) -> Tensor:
        for name, pad in (("convolution1", padding), ("convolution2", 0)):
            x = functional.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=pad)
            x = torch.relu(functional.max_pool2d(x, 2))  # in this order a quarter of the ReLUs gives the same
        z = torch.relu(_dense(p, "dense1", x.flatten(1)))
        return _last(_dense(p, "dense2", z), numbers)

    return layers, trunk, 84


def _dense(p: Weights, name: str, z: Tensor) -> Tensor:
    return functional.linear(z, p[f"{name}.weight"], p[f"{name}.bias"])


def _last(z: Tensor, numbers: int) -> Tensor:
    """Features; mean and deviation of random ones are not cut off at zero."""
    return torch.relu(z) if numbers == 1 else z


def _small_trunk(numbers: int) -> Trunk:
    """Convolution, pooling, ReLU, twice, and a dense layer, for 8x8 images, with convolutions as matrix products.

    Mapped over 30 clients with batches of 32, a penalised gradient took 0.6 of the time of `conv2d`'s grouped
    convolutions (one CPU thread): the first multiplies patches, the second is one 96 x 256 matrix.
    """
    taps = _taps(4)  # (9, 256)

    def trunk(p: Weights, x: Tensor) -> Tensor:
        samples = len(x)
        patches = functional.unfold(x, 3, padding=1).transpose(0, 1).reshape(27, -1)  # (27, B 64)
        z = (p["convolution1.weight"].reshape(6, 27) @ patches).reshape(6, samples, 8, 8)
        # A bias added after pooling gives the same as before it.
        z = torch.relu(functional.max_pool2d(z, 2) + p["convolution1.bias"][:, None, None, None])
        z = z.transpose(0, 1).reshape(samples, 96)
        matrix = (p["convolution2.weight"].reshape(96, 9) @ taps.to(x)).reshape(16, 6, 16, 16)
        matrix = matrix.permute(0, 3, 1, 2).reshape(256, 96)  # (outputs, inputs): channel and pixel of each
        z = functional.linear(z, matrix).reshape(samples, 16, 4, 4)
        z = torch.relu(functional.max_pool2d(z, 2) + p["convolution2.bias"][:, None, None])
        return _last(_dense(p, "dense1", z.flatten(1)), numbers)

    return trunk


def _taps(side: int) -> Tensor:
    """T[t, (i, o)] = 1 where output pixel o of a zero-padded 3x3 convolution sees input pixel i through its weight t.

    Shape (9, side^4).
    """
    pixels = torch.eye(side * side).view(-1, 1, side, side)
    seen = functional.unfold(pixels, 3, padding=1)  # (inputs, 9, outputs)
    return seen.transpose(0, 1).reshape(9, -1)


def _resnet18(side: int, numbers: int) -> tuple[dict[str, Layer], Trunk, int]:
    """Layers, trunk and feature width; numbers: what it gives per feature."""
    if side < 8:
        raise UserError(f"network resnet18 takes images of at least 8 pixels a side, not {side}: resize them")
    layers = {"stem": _convolution(3, STAGES[0], 3, bias=False), "stem_norm": _norm(STAGES[0])}
    blocks: list[tuple[str, int]] = []
    inputs = STAGES[0]
    for stage, channels in enumerate(STAGES):
        for number in range(2):
            name, stride = f"block{stage + 1}{'ab'[number]}", 2 if stage and not number else 1
            blocks.append((name, stride))
            layers[f"{name}.first"] = _convolution(inputs, channels, 3, bias=False)
            layers[f"{name}.first_norm"] = _norm(channels)
            layers[f"{name}.second"] = _convolution(channels, channels, 3, bias=False)
            layers[f"{name}.second_norm"] = _norm(channels)
            if stride == 2:
                layers[f"{name}.shortcut"] = _convolution(inputs, channels, 1, bias=False)
                layers[f"{name}.shortcut_norm"] = _norm(channels)
            inputs = channels
    if numbers == 2:
        layers["random_features"] = _linear(inputs, numbers * inputs)

    def convolved(p: Weights, name: str, x: Tensor, stride: int, padding: int) -> Tensor:
        x = functional.conv2d(x, p[f"{name}.weight"], stride=stride, padding=padding)
        return functional.group_norm(x, GROUPS, p[f"{name}_norm.weight"], p[f"{name}_norm.bias"])

    def trunk(p: Weights, x: Tensor) -> Tensor:
        x = torch.relu(convolved(p, "stem", x, 1, 1))
        for name, stride in blocks:
            z = torch.relu(convolved(p, f"{name}.first", x, stride, 1))
            z = convolved(p, f"{name}.second", z, 1, 1)
            shortcut = convolved(p, f"{name}.shortcut", x, 2, 0) if stride == 2 else x
            x = torch.relu(z + shortcut)
        z = x.mean((-2, -1))  # (B, 512)
        if numbers == 2:
            z = _dense(p, "random_features", z)
        return z

    return layers, trunk, inputs
