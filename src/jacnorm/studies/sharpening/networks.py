"""The networks of the study, as functions of stacked parameters: R independent runs of one shape advance together.

A stack of parameters is a dictionary of tensors (R, *shape of one run's parameter). The fully connected network is
written by hand over the stack; convolutional ones are modules of one run, mapped over the stack by `torch.func`.

Letters: R runs, B samples, K classes, n_l units of layer l, L weight layers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from jacnorm.errors import UserError
from jacnorm.nets.mlp import derivative
from jacnorm.studies.sharpening.settings import Activation, NetworkSettings

Parametrisation = Literal["standard", "ntk"]
Stack = dict[str, Tensor]
MOMENTUM = 0.1
"""Weight of a batch in batch norm's running statistics, as in PyTorch."""
_EPSILON = 1e-5
_WIDE = 512
"""Inputs from which one large product beats R small ones in spite of its layout: a gradient of 10 mlps on 1000 samples
of 3072 pixels took 4/5 of the time, one of 21 mlps on 300 samples of 64 pixels 1.1 times."""
_VGG11 = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")
_RESNET18 = ((64, 1), (128, 2), (256, 2), (512, 2))


def _gelu_derivative(z: Tensor) -> Tensor:
    return torch.special.ndtr(z) + z * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


_FUNCTIONS: dict[Activation, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tanh": (torch.tanh, lambda z: derivative(z, "tanh")),
    "relu": (torch.relu, lambda z: derivative(z, "relu")),
    "gelu": (functional.gelu, _gelu_derivative),
}


class Network(ABC):
    """An architecture without numbers: parameters and running statistics of R runs are handed in.

    image: (channels, height, width) of a sample. classes: K. shapes: of each parameter of one run.
    """

    has_batch_norm = False

    def __init__(self, image: tuple[int, int, int], classes: int, shapes: Mapping[str, torch.Size]) -> None:
        self.image, self.classes, self.shapes = image, classes, dict(shapes)

    @property
    def size(self) -> int:
        """Number of parameters p of one run."""
        return sum(shape.numel() for shape in self.shapes.values())

    def initial(self, generators: Sequence[torch.Generator]) -> Stack:
        """Initial parameters (R, ...), float32 on the CPU; a run's depend on its own generator only.

        Raises ValueError without any generator.
        """
        if not generators:
            raise ValueError("no generators were given; give one torch.Generator per run")
        runs = [
            {name: self._draw(name, shape, generator) for name, shape in self.shapes.items()}
            for generator in generators
        ]
        return {name: torch.stack([run[name] for run in runs]) for name in self.shapes}

    def buffers(self, runs: int) -> Stack:
        """Running statistics of batch norm at the start, (R, ...): mean 0 and variance 1. Empty without batch norm."""
        return {}

    @abstractmethod
    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x: Tensor,
        *,
        training: bool = False,
        momentum: float = MOMENTUM,
    ) -> Tensor:
        """Logits (R, B, K) of x: (R, B, *image), or (B, *image) shared by all runs.

        training: batch norm takes the statistics of the batch and moves the running ones, in place, by `momentum` (the
        variance with divisor B * height * width - 1, as in PyTorch); otherwise it takes the running ones. Networks
        without batch norm ignore both. Raises ValueError for inputs of another shape.
        """

    def _draw(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Uniform on +-1/sqrt(fan-in), weights and biases: PyTorch's default for linear layers and convolutions."""
        fan_in = self.shapes[name.replace("bias", "weight")][1:].numel()
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in)

    def _check(self, parameters: Mapping[str, Tensor], x: Tensor) -> None:
        runs = len(next(iter(parameters.values())))
        if tuple(x.shape[-3:]) != self.image or x.ndim not in (4, 5) or (x.ndim == 5 and len(x) != runs):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this stack expects (B, *{self.image}) or ({runs}, B, *{self.image})"
            )


class Mlp(Network):
    r"""Fully connected network: z_l = factor_l W_l h_{l-1} + b_l, h_l = phi(z_l), h_0 the flattened image, logits z_L.

    Parameters "weight1" (R, n_1, n_0), "bias1" (R, n_1), ..., "weightL", "biasL". Parametrisations:
    "standard": factor 1; weights and biases uniform on +-1/sqrt(n_{l-1}).
    "ntk": factor 1/sqrt(n_{l-1}); weights N(0, 1), biases 0 (Jacot et al. 2018, arXiv 1806.07572, whose bias factor is
    1 here).
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        classes: int,
        *,
        width: int,
        hidden_layers: int,
        activation: Activation = "tanh",
        parametrisation: Parametrisation = "standard",
    ) -> None:
        self.widths = [math.prod(image), *[width] * hidden_layers, classes]
        shapes: dict[str, torch.Size] = {}
        for layer, (inputs, outputs) in enumerate(zip(self.widths, self.widths[1:], strict=False), start=1):
            shapes[f"weight{layer}"] = torch.Size((outputs, inputs))
            shapes[f"bias{layer}"] = torch.Size((outputs,))
        super().__init__(image, classes, shapes)
        self.layers = len(self.widths) - 1
        self.parametrisation = parametrisation
        self.activate, self.derivative = _FUNCTIONS[activation]

    def factor(self, layer: int) -> float:
        """What multiplies W_l, l from 1."""
        return 1.0 if self.parametrisation == "standard" else 1 / math.sqrt(self.widths[layer - 1])

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x: Tensor,
        *,
        training: bool = False,
        momentum: float = MOMENTUM,
    ) -> Tensor:
        """Logits (R, B, K); see `Network.__call__`."""
        return self.preactivations(parameters, x)[-1]

    def preactivations(self, parameters: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
        """z_1, ..., z_L of every run, (R, B, n_l) each, with their graph; x as for a call."""
        self._check(parameters, x)
        found = [self._first(parameters, x.flatten(-3))]
        for layer in range(2, self.layers + 1):
            found.append(self._layer(layer, parameters, self.activate(found[-1])))
        return found

    def _first(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """z_1; one product serves all runs if they share wide samples."""
        weight, bias = parameters["weight1"], parameters["bias1"]
        if x.ndim == 2 and self.widths[0] >= _WIDE:
            z = torch.addmm(bias.flatten(), x, weight.flatten(0, 1).T, alpha=self.factor(1))  # (B, R * n_1)
            return z.unflatten(1, bias.shape).transpose(0, 1)  # (R, B, n_1)
        return self._layer(1, parameters, x.expand(len(weight), -1, -1))

    def _layer(self, layer: int, parameters: Mapping[str, Tensor], h: Tensor) -> Tensor:
        weight, bias = parameters[f"weight{layer}"], parameters[f"bias{layer}"]
        return torch.baddbmm(bias.unsqueeze(1), h, weight.transpose(1, 2), alpha=self.factor(layer))

    def _draw(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        if self.parametrisation == "standard":
            return super()._draw(name, shape, generator)
        return torch.randn(shape, generator=generator) if len(shape) == 2 else torch.zeros(shape)


class Convolutional(Network):
    """A module of one run, mapped over the stack; its own numbers are never used, so it may lie on the meta device.

    Parameters and running statistics have the module's names. Convolutions and linear layers start as in PyTorch;
    `normal_convolutions`: convolutions N(0, 2 / (9 outputs)) with zero biases instead. Gains 1, shifts 0.
    """

    def __init__(
        self, image: tuple[int, int, int], classes: int, module: nn.Module, *, normal_convolutions: bool = False
    ) -> None:
        super().__init__(image, classes, {name: each.shape for name, each in module.named_parameters()})
        self._module = module
        self._normal = normal_convolutions
        self._norms = [each for each in module.modules() if isinstance(each, _BatchNorm)]
        self.has_batch_norm = bool(self._norms)

    def buffers(self, runs: int) -> Stack:
        """See `Network.buffers`."""
        return {
            name: torch.full((runs, *each.shape), float(name.endswith("variance")))
            for name, each in self._module.named_buffers()
        }

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x: Tensor,
        *,
        training: bool = False,
        momentum: float = MOMENTUM,
    ) -> Tensor:
        """Logits (R, B, K); see `Network.__call__`."""
        self._check(parameters, x)
        for norm in self._norms:
            norm.training, norm.momentum = training, momentum
        runs = len(next(iter(parameters.values())))
        if runs == 1:
            one = {name: each.squeeze(0) for name, each in {**parameters, **buffers}.items()}
            return self._apply(one, x.squeeze(0) if x.ndim == 5 else x).unsqueeze(0)
        mapped = torch.func.vmap(self._apply, in_dims=(0, 0 if x.ndim == 5 else None))
        return mapped({**parameters, **buffers}, x)

    def _apply(self, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(self._module, tensors, (x,), strict=True)

    def _draw(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        weight = self.shapes[name.replace("bias", "weight")]
        if len(weight) == 1:
            return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        if len(weight) == 4 and self._normal:
            deviation = math.sqrt(2 / (9 * weight[0]))
            return torch.randn(shape, generator=generator) * deviation if len(shape) == 4 else torch.zeros(shape)
        return super()._draw(name, shape, generator)


class _BatchNorm(nn.Module):
    """Batch norm with gain and shift; PyTorch's own also counts batches, which a stack cannot."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.momentum = MOMENTUM

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(
            x, self.mean, self.variance, self.weight, self.bias, self.training, self.momentum, _EPSILON
        )


class _Activation(nn.Module):
    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self._function = _FUNCTIONS[activation][0]

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the input (He et al. 2016, arXiv 1512.03385, basic block)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = _BatchNorm(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = _BatchNorm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), _BatchNorm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.first(x)))
        return torch.relu(self.norm2(self.second(h)) + self.shortcut(x))


class _Mean(nn.Module):
    """Average over positions: (B, C, H, W) to (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def _cnn(image: tuple[int, int, int], classes: int, channels: int, activation: Activation) -> Convolutional:
    """Cohen et al. (2021): two 3x3 convolutions, each with activation and 2x2 pooling, and a linear read-out."""
    _need(image, 2, "cnn")
    features = channels * (image[1] // 4) * (image[2] // 4)
    layers = [
        *(nn.Conv2d(image[0], channels, 3, padding=1), _Activation(activation), nn.AvgPool2d(2)),
        *(nn.Conv2d(channels, channels, 3, padding=1), _Activation(activation), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(features, classes)),
    ]
    return Convolutional(image, classes, nn.Sequential(*layers))


def _vgg11(image: tuple[int, int, int], classes: int, *, batch_norm: bool) -> Convolutional:
    """Configuration A (Simonyan and Zisserman 2015), as in Cohen et al. (2021): classifier 512-512-512-K, no dropout.

    Images beyond 32x32 enlarge the input of the classifier.
    """
    _need(image, 5, "vgg11-bn" if batch_norm else "vgg11")
    layers: list[nn.Module] = []
    inputs = image[0]
    for outputs in _VGG11:
        if isinstance(outputs, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
        layers.extend([_BatchNorm(outputs), nn.ReLU()] if batch_norm else [nn.ReLU()])
        inputs = outputs
    features = 512 * (image[1] // 32) * (image[2] // 32)
    classifier = [nn.Linear(features, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, classes)]
    return Convolutional(image, classes, nn.Sequential(*layers, nn.Flatten(), *classifier), normal_convolutions=True)


def _resnet18(image: tuple[int, int, int], classes: int) -> Convolutional:
    """He et al. (2016) for small images: a 3x3 convolution as stem, no pooling after it, batch norm."""
    layers: list[nn.Module] = [nn.Conv2d(image[0], 64, 3, padding=1, bias=False), _BatchNorm(64), nn.ReLU()]
    inputs = 64
    for outputs, stride in _RESNET18:
        layers += [_Block(inputs, outputs, stride), _Block(outputs, outputs, 1)]
        inputs = outputs
    return Convolutional(image, classes, nn.Sequential(*layers, _Mean(), nn.Linear(inputs, classes)))


def _need(image: tuple[int, int, int], halvings: int, name: str) -> None:
    if min(image[1:]) < 2**halvings:
        raise UserError(
            f"networks names {name}, which halves its images {halvings} times, but they have {image[1]}x{image[2]} "
            f"pixels; take images of {2**halvings} pixels or more, or another network"
        )


def build(
    settings: NetworkSettings, network: str, image: tuple[int, int, int], classes: int, **overrides: Any
) -> Network:
    """The network of that name: mlp, cnn, vgg11, vgg11-bn or resnet18.

    overrides: of width, hidden_layers, activation, parametrisation (mlp), channels, activation (cnn). Activations of
    the others are ReLU. Raises UserError if the images are too small, ValueError for an unknown name.
    """
    if network == "mlp":
        chosen = {key: getattr(settings, key) for key in ("width", "hidden_layers", "activation")}
        return Mlp(image, classes, **{**chosen, **overrides})
    with torch.device("meta"):
        if network == "cnn":
            chosen = {key: getattr(settings, key) for key in ("channels", "activation")}
            return _cnn(image, classes, **{**chosen, **overrides})
        if network in ("vgg11", "vgg11-bn"):
            return _vgg11(image, classes, batch_norm=network == "vgg11-bn", **overrides)
        if network == "resnet18":
            return _resnet18(image, classes, **overrides)
    raise ValueError(f"network is {network!r}; it must be one of mlp, cnn, vgg11, vgg11-bn, resnet18")
