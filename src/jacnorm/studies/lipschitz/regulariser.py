r"""The Jacobian regulariser of section 8, and the networks that it is measured on.

The margin of a sample is m = F_y - max_{k != y} F_k. Its gradient J_i = dm / dh_i at the i-th normalisation output h_i
has as many entries as h_i has, and one backward pass gives all of them. The training objective is the mean over samples
of

    cross-entropy + coefficient * sum_i 1(|J_i|^2 >= threshold) |J_i|^2,

where the indicator passes no gradient on.

Letters: R runs, B samples, K classes, L places (normalisation outputs) where the gradient is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from jacnorm.nets.mlp import init_gaussian
from jacnorm.nets.wide_resnet import Pass, StackedWideResNet
from jacnorm.studies.lipschitz.margins import margins
from jacnorm.studies.lipschitz.settings import Normalisation, RegulariserSettings

Variant = Literal["paper", "released"]


class Penalty(NamedTuple):
    """The regulariser of R runs on one batch, without its coefficient; (R,) each."""

    value: Tensor
    share: Tensor
    """Share of samples and places above the threshold."""


def squared_norms(margin: Tensor, places: Sequence[Tensor], *, create_graph: bool = False) -> Tensor:
    """|dm / dh|^2 for the margin of each sample and each place, (L, R, B).

    margin: (R, B); places: L tensors h of shape (B, R * C, ...), each part of the graph of the margins, as in `Pass`.
    One backward pass of the sum of all margins. That is each sample's own gradient where samples do not mix. Under
    batch norm in training it also holds what the sample does to the margins of the others through mean and variance:
    about 4 % of the mean norm in the first layer of an untrained network of width 100, and nothing after the last
    normalisation. With the mean in place of the sum, all norms would shrink by the squared batch size. The graph of the
    margins is kept. create_graph: make the norms differentiable themselves.
    """
    runs = len(margin)
    gradients = torch.autograd.grad(margin.sum(), list(places), create_graph=create_graph, retain_graph=True)
    return torch.stack(
        [_widened(gradient).unflatten(1, (runs, -1)).flatten(2).square().sum(2).T for gradient in gradients]  # (R, B)
    )


def _widened(x: Tensor) -> Tensor:
    """At least float32: bfloat16 has too few digits to add up squares."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def places(passed: Pass, variant: Variant) -> list[Tensor]:
    """Where the gradient is taken.

    paper: at every normalisation output. released: there and at the output of every block, but not at the final
    normalisation; in a network without blocks, where no normalisation follows the last of them, at every one.
    """
    if variant == "released" and passed.blocks:
        return [*passed.normalised[:-1], *passed.blocks]
    return list(passed.normalised)


def penalty(passed: Pass, labels: Tensor, *, threshold: float, variant: Variant, create_graph: bool = True) -> Penalty:
    """The regulariser of each run on the batch that `passed` went through.

    paper: the sum over places of |J|^2 where it is at least `threshold`, mean over all samples.
    released: J is the gradient of the mean of the batch's margins, so that |J|^2 is smaller by 1 / B^2 before it meets
    the threshold, which it has to exceed; at each place the mean goes over the samples that do, and a place without any
    adds nothing.

    The indicator is constant: the derivative is that of the samples and places above the threshold.
    """
    norms = squared_norms(margins(_widened(passed.logits), labels), places(passed, variant), create_graph=create_graph)
    batch = labels.shape[1]
    if variant == "released":
        norms = norms / batch**2
        above = norms.detach() > threshold  # (L, R, B)
        counted = above.sum(2).clamp(min=1)  # (L, R)
    else:
        above = norms.detach() >= threshold
        counted = torch.full_like(above[:, :, 0], batch, dtype=torch.int64)
    value = (torch.where(above, norms, 0.0).sum(2) / counted).sum(0)  # (R,)
    return Penalty(value, above.to(value.dtype).mean((0, 2)))


class Network(Protocol):
    """R networks of one shape; parameters by name, (R, ...) each, and running statistics in `buffers`."""

    def initial(self, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Parameters at the start, one generator per run."""

    def buffers(self) -> dict[str, Tensor]:
        """Running statistics at the start."""

    def __call__(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor, *, training: bool
    ) -> Pass:
        """Logits and normalisation outputs for x (R, B, channels, height, width)."""


def network(
    settings: RegulariserSettings, runs: int, classes: int, image: tuple[int, int, int], normalisation: Normalisation
) -> Network:
    """The network that `settings.network` names."""
    if settings.network == "wrn":
        return StackedWideResNet(
            runs, settings.depth, settings.stem, settings.channels, classes, image=image, normalisation=normalisation
        )
    return StackedMLP(runs, math.prod(image), settings.width, classes, normalisation)


def numbers_per_run(settings: RegulariserSettings, image: tuple[int, int, int], classes: int) -> int:
    """Parameters of one network plus the entries of its largest activation on a batch: how much a stack may hold."""
    parameters = network(settings, 1, classes, image, "layer").initial([torch.Generator()])
    _, height, width = image
    units = max(settings.stem, settings.channels) * height * width if settings.network == "wrn" else settings.width
    return sum(tensor.numel() for tensor in parameters.values()) + settings.batch * units


def fixed_parameters(parameters: Mapping[str, Tensor], normalisation: Normalisation, variant: Variant) -> set[str]:
    """Names of the parameters that stay as they are.

    The released code makes its layer norms after its optimiser, which therefore never sees their gains and biases: with
    and without the regulariser they stay at 1 and 0. Everything else is trained, with weight decay.
    """
    if variant == "released" and normalisation == "layer":
        return {name for name in parameters if name.endswith((".gain", ".shift"))}
    return set()


class StackedMLP:
    """R multilayer perceptrons of three matrices: x -> W1 -> norm -> ReLU -> W2 -> norm -> ReLU -> W3.

    No biases, and no gains or shifts in the normalisation: batch norm over the samples of the batch, layer norm over
    the units of a layer, or none. Without normalisation the places of `Pass.normalised` are the pre-activations.
    Follows the protocol of `StackedWideResNet`: x of shape (R, B, ...), normalised outputs (B, R * width).
    """

    momentum = 0.1
    epsilon = 1e-5

    def __init__(self, runs: int, inputs: int, width: int, classes: int, normalisation: Normalisation) -> None:
        if normalisation not in ("batch", "layer", "none"):
            raise ValueError(f"normalisation is {normalisation!r}; it must be batch, layer or none")
        self.runs, self.widths, self.normalisation = runs, (inputs, width, width, classes), normalisation

    def initial(self, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Gaussian weights of variance 2 / fan-in, (R, n_l, n_{l-1}); a run's depend on its own generator only."""
        matrices = init_gaussian(self.widths, 2.0, generators)
        return {f"matrix{number}": matrix.float() for number, matrix in enumerate(matrices, start=1)}

    def buffers(self) -> dict[str, Tensor]:
        """Running mean 0 and variance 1 of each hidden unit, (R, width); none unless under batch norm."""
        if self.normalisation != "batch":
            return {}
        shape = self.runs, self.widths[1]
        return {
            f"{name}{layer}": value.expand(shape).clone()
            for layer in (1, 2)
            for name, value in (("mean", torch.tensor(0.0)), ("variance", torch.tensor(1.0)))
        }

    def __call__(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor, *, training: bool
    ) -> Pass:
        """Logits (R, B, K) and the two normalisation outputs.

        training: batch norm uses the statistics of the batch and moves its running averages (momentum 0.1, unbiased
        variance) in place; else it uses those.
        """
        x = x.flatten(2)
        batch = x.shape[1]
        hidden, normalised = x, []
        for layer in (1, 2):
            z = torch.bmm(hidden, parameters[f"matrix{layer}"].transpose(1, 2))  # (R, B, width)
            z = z.to(x.dtype).transpose(0, 1).reshape(batch, -1)  # (B, R width); statistics in the precision of x
            normalised.append(self._normalise(z, buffers, layer, training))
            hidden = torch.relu(normalised[-1]).view(batch, self.runs, -1).transpose(0, 1)  # (R, B, width)
        logits = torch.bmm(hidden, parameters["matrix3"].transpose(1, 2))
        return Pass(logits=logits, normalised=normalised, groups=[], blocks=[])

    def _normalise(self, z: Tensor, buffers: Mapping[str, Tensor], layer: int, training: bool) -> Tensor:
        if self.normalisation == "none":
            return z
        if self.normalisation == "layer":
            each = z.view(len(z), self.runs, -1)
            return functional.layer_norm(each, each.shape[2:], eps=self.epsilon).view(z.shape)
        mean, variance = (buffers[f"{name}{layer}"].view(-1) for name in ("mean", "variance"))  # (R width,)
        return functional.batch_norm(z, mean, variance, training=training, momentum=self.momentum, eps=self.epsilon)
