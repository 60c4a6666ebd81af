r"""The first layer's Jacobian is absent from the Gauss-Newton matrix: two identities, checked in float64 (C15).

The closed-form kernels of the layers (see `kernel`) add up to D F D F^T, and none contains d z_1 / d x. So inputs
divided by a number a and first weights multiplied by it change neither logits nor the kernels of the layers above the
first, while the Jacobian of the logits by the input becomes a times as large.

Letters: R runs, m samples, K classes, p parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from jacnorm.studies.sharpening.kernel import layer_blocks
from jacnorm.studies.sharpening.measures import jacobians, norms
from jacnorm.studies.sharpening.networks import Mlp, Stack

FACTOR = 3.0
"""The number a; no power of two, by which a product of floats would be exact."""


def identity_errors(network: Mlp, parameters: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Relative errors of the identities, (R,) float64 each, under the columns of table `identities`.

    x: (m, *image), few samples, since the kernel is formed: R matrices of m K rows, and derivatives of m K x p. An
    error is the largest deviation of an entry over the largest entry.
    """
    stack = {name: tensor.double() for name, tensor in parameters.items()}
    x = x.double()
    moved = {**stack, "weight1": FACTOR * stack["weight1"]}
    kernels, after = layer_kernels(network, stack, x), layer_kernels(network, moved, x / FACTOR)
    before, later = ((norms(jacobians(network, each, {}, at))) for each, at in ((stack, x), (moved, x / FACTOR)))
    layers = [_error(new, old) for new, old in zip(after[1:], kernels[1:], strict=True)]
    return {
        "kernel_error": _error(torch.stack(kernels).sum(0), autograd_kernel(network, stack, x)),
        "logits_error": _error(network(moved, {}, x / FACTOR), network(stack, {}, x)),
        "later_layers_error": torch.stack(layers).amax(0),
        "jacobian_error": _error(later, FACTOR * before),
    }


def layer_kernels(network: Mlp, parameters: Stack, x: Tensor) -> list[Tensor]:
    """K_1, ..., K_L, (R, m K, m K) each, in closed form."""
    samples = len(x)
    size = samples * network.classes
    runs = len(parameters["weight1"])
    units = torch.eye(size, dtype=x.dtype, device=x.device).reshape(1, size, samples, network.classes)
    blocks = layer_blocks(network, parameters, x)
    return [block.product(units.expand(runs, -1, -1, -1)).reshape(runs, size, size) for block in blocks]


def autograd_kernel(network: Mlp, parameters: Stack, x: Tensor) -> Tensor:
    """D F D F^T, (R, m K, m K), from the derivatives of the logits by all parameters."""
    found = []
    for run in range(len(parameters["weight1"])):
        one = {name: tensor[run : run + 1] for name, tensor in parameters.items()}
        derivatives = torch.func.jacrev(lambda stack: network(stack, {}, x).flatten())(one)  # (m K, 1, *shape) each
        rows = torch.cat([each.flatten(1) for each in derivatives.values()], dim=1)  # (m K, p)
        found.append(rows @ rows.T)
    return torch.stack(found)


def _error(found: Tensor, expected: Tensor) -> Tensor:
    """Largest absolute difference of each run over the largest absolute entry of `expected`."""
    return ((found - expected).flatten(1).abs().amax(1) / expected.flatten(1).abs().amax(1)).detach()
