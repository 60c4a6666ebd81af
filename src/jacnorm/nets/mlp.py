"""Stacks of multilayer perceptrons: R independent networks of equal shape, advanced together.

A stack is a list of L weight tensors, the l-th of shape (R, n_l, n_{l-1}). Run r of the stack is the network

    z_l = W_l h_{l-1} (+ b_l),   h_l = phi(z_l),   h_0 = x,   output z_L (linear read-out),

without biases unless they are given. Letters: R runs, B samples, n_l the width of layer l, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Activation = Literal["relu", "tanh", "elu", "softplus", "linear"]


def _relu_derivative(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


def _tanh_derivative(z: Tensor) -> Tensor:
    # 1/cosh^2, written so that it neither overflows nor rounds to 1 - 1 = 0 at |z| > 19.
    decay = torch.exp(-2 * z.abs())
    return 4 * decay / (1 + decay).square()


def _elu_derivative(z: Tensor) -> Tensor:
    return torch.exp(z.clamp(max=0.0))


_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (torch.relu, _relu_derivative),
    "tanh": (torch.tanh, _tanh_derivative),
    "elu": (torch.nn.functional.elu, _elu_derivative),
    "softplus": (torch.nn.functional.softplus, torch.sigmoid),
    "linear": (lambda z: z, torch.ones_like),
}
_CURVATURES = {"tanh": 4 / 27**0.5, "elu": 1.0, "softplus": 0.25, "linear": 0.0}


def _functions(activation: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    if activation not in _FUNCTIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(get_args(Activation))}")
    return _FUNCTIONS[activation]


def activate(z: Tensor, activation: Activation) -> Tensor:
    """phi(z), entry by entry. Raises ValueError for an unknown activation."""
    return _functions(activation)[0](z)


def derivative(z: Tensor, activation: Activation) -> Tensor:
    """phi'(z), entry by entry; relu'(0) is 0, as in torch's backward. Raises ValueError for an unknown activation."""
    return _functions(activation)[1](z)


def curvature(activation: Activation) -> float:
    """Sup |phi''|, the Lipschitz constant of the derivative: 4/sqrt(27) for tanh, 1 for elu, 1/4 for softplus.

    Raises ValueError for relu, whose derivative jumps, and for an unknown activation.
    """
    if activation not in _CURVATURES:
        _functions(activation)
        raise ValueError(f"the derivative of {activation} is not continuous, so it has no Lipschitz constant")
    return _CURVATURES[activation]


def check_widths(widths: Sequence[int]) -> None:
    """Raise ValueError unless `widths` = (n_0, ..., n_L) has two or more positive entries."""
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths are {list(widths)}; give two or more, from input to output, each at least 1")


def draw_stack(
    widths: Sequence[int],
    generators: Sequence[torch.Generator],
    draw: Callable[[int, int, torch.Generator], Tensor],
) -> list[Tensor]:
    """Stack the matrices `draw(n_l, n_{l-1}, generator)` of every layer and run.

    Each run draws its layers in the order 1, ..., L from its own generator, so its matrices are the same bits whether
    it is alone or in any stack. Returns L tensors of shape (R, n_l, n_{l-1}). Raises ValueError for impossible widths
    or no generator.
    """
    check_widths(widths)
    if not generators:
        raise ValueError("no generators were given; give one torch.Generator per run")
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    runs = [[draw(rows, columns, generator) for rows, columns in shapes] for generator in generators]
    return [torch.stack(layer) for layer in zip(*runs, strict=True)]


def init_gaussian(
    widths: Sequence[int],
    sigma_w2: float,
    generators: Sequence[torch.Generator],
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Independent centred Gaussian weights of variance sigma_w2 / n_{l-1} (critical: 2 for ReLU, 1 for tanh).

    widths: (n_0, ..., n_L). generators: one per run; a run's weights depend on its own generator only.
    Returns L tensors of shape (R, n_l, n_{l-1}). Raises ValueError if sigma_w2 is not positive.

    >>> [tuple(w.shape) for w in init_gaussian((3, 4, 2), 2.0, [torch.Generator().manual_seed(0)])]
    [(1, 4, 3), (1, 2, 4)]
    """
    if not sigma_w2 > 0:
        raise ValueError(f"sigma_w2 is {sigma_w2}; the weight variance must be positive")

    def draw(rows: int, columns: int, generator: torch.Generator) -> Tensor:
        entries = torch.randn(rows, columns, generator=generator, dtype=dtype, device=generator.device)
        return entries * (sigma_w2 / columns) ** 0.5

    return draw_stack(widths, generators, draw)


def stacked_input(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """`x` as (R, B, n_0): a batch of shape (B, n_0) is shared by all runs. Raises ValueError if the shapes disagree."""
    runs, _, inputs = weights[0].shape
    if x.ndim == 2:
        x = x.unsqueeze(0).expand(runs, -1, -1)
    if x.ndim != 3 or x.shape[0] != runs or x.shape[2] != inputs:
        raise ValueError(f"x has shape {tuple(x.shape)}; this stack expects (B, {inputs}) or ({runs}, B, {inputs})")
    return x


def _layers(
    weights: Sequence[Tensor], x: Tensor, activation: Activation, biases: Sequence[Tensor] | None
) -> Iterator[Tensor]:
    hidden = stacked_input(weights, x)  # (R, B, n_0)
    for layer, weight in enumerate(weights):
        z = torch.bmm(hidden, weight.transpose(1, 2))  # (R, B, n_l)
        if biases is not None:
            z = z + biases[layer].unsqueeze(1)
        yield z
        hidden = activate(z, activation)


def forward(
    weights: Sequence[Tensor], x: Tensor, activation: Activation, biases: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """All pre-activations z_1, ..., z_L of every run; the last one is the network's output.

    weights: L tensors (R, n_l, n_{l-1}); x: (R, B, n_0), or (B, n_0) shared by the runs; biases: L tensors (R, n_l) or
    None. Returns L tensors (R, B, n_l). Raises ValueError for wrong shapes or an unknown activation.
    """
    return list(_layers(weights, x, activation, biases))


def logits(
    weights: Sequence[Tensor], x: Tensor, activation: Activation, biases: Sequence[Tensor] | None = None
) -> Tensor:
    """The output z_L alone, (R, B, n_L); without autograd it holds two layers in memory. Arguments as in `forward`."""
    output = x
    for output in _layers(weights, x, activation, biases):  # noqa: B007
        pass
    return output


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each run, in nats.

    outputs: logits (R, B, C); labels: integers, (R, B), or (B,) shared by the runs. Returns (R,).
    Raises ValueError if the shapes disagree.
    """
    labels = _stacked_labels(outputs, labels)
    losses = torch.nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.unflatten(0, outputs.shape[:2]).mean(1)


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Fraction of samples whose largest logit is the label, (R,) in [0, 1]. Arguments as in `cross_entropy`."""
    return (outputs.argmax(2) == _stacked_labels(outputs, labels)).to(outputs.dtype).mean(1)


def _stacked_labels(outputs: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 1:
        labels = labels.unsqueeze(0).expand(outputs.shape[0], -1)
    if outputs.ndim != 3 or labels.shape != outputs.shape[:2]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and logits {tuple(outputs.shape)}; "
            "they must be (B,) or (R, B), and (R, B, C)"
        )
    return labels
