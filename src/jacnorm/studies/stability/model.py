"""Log Jacobian norms of stacked networks, layer by layer.

Letters: R runs, B inputs per run, n_l the width of layer l. The Jacobian is W_L D_{L-1} ... D_1 W_1 (plain input,
linear read-out) unless diagonals at the ends are given.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jacnorm.jacobian import ScaledProduct
from jacnorm.nets.mlp import Activation, activate, derivative


class Norms(NamedTuple):
    """Of the Jacobian at R runs and B inputs: (R, B) float64 in nats, -inf where it is exactly zero."""

    norm: Tensor
    """Log of the spectral norm."""
    gain: Tensor
    """Log of |J u| for the fixed unit vector u = (1, ..., 1) / sqrt(n_0)."""


@torch.no_grad()
def log_norms(
    weights: Sequence[Tensor], x: Tensor, activation: Activation, depths: Collection[int]
) -> dict[int, Norms]:
    """Log norms of the Jacobian at each of `depths`.

    weights: L tensors (R, n_l, n_{l-1}); x: (R, B, n_0). One pass gives every depth, so the depths of one network are
    correlated: take standard errors over seeds. Cost: one n x n product per layer and a symmetric eigenvalue problem
    per recorded depth.
    """
    runs, inputs, _ = x.shape
    hidden = x.double().reshape(runs * inputs, -1, 1)
    product = ScaledProduct()
    found: dict[int, Norms] = {}
    for layer, weight in enumerate(weights, start=1):
        w = weight.double().repeat_interleave(inputs, dim=0)  # (R B, n_l, n_{l-1})
        product.left_multiply(w)
        if layer in depths:
            along = product.matrix.mean(2) * product.matrix.shape[2] ** 0.5  # J u, up to the product's scale
            gain = product.log_scale + torch.linalg.vector_norm(along, dim=1).log()
            found[layer] = Norms(product.log_spectral_norm().reshape(runs, inputs), gain.reshape(runs, inputs))
        if layer < len(weights):
            z = w @ hidden
            product.scale_rows(derivative(z, activation).squeeze(2))
            hidden = activate(z, activation)
            if activation == "relu":
                # The derivative does not see the scale of h, and unscaled pruned nets would underflow.
                hidden = torch.nn.functional.normalize(hidden, dim=1)
    return found


@torch.no_grad()
def log_product_norms(
    weights: Sequence[Tensor], diagonals: Sequence[Tensor | None], depths: Collection[int]
) -> dict[int, Tensor]:
    """Log spectral norm of B_m W_m ... B_1 W_1 B_0 at each m of `depths`, (R,) float64 in nats.

    diagonals: m + 1 entries B_0, ..., B_m of shape (R, n_l), drawn independently of the weights; None is the identity.
    """
    product = ScaledProduct()
    found: dict[int, Tensor] = {}
    if diagonals[0] is not None:
        product.scale_rows(diagonals[0].double())
    for layer, weight in enumerate(weights, start=1):
        product.left_multiply(weight.double())
        if diagonals[layer] is not None:
            product.scale_rows(diagonals[layer].double())
        if layer in depths:
            found[layer] = product.log_spectral_norm()
    return found


def mean_correlations(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Width times the mean correlation of two distinct entries of a row, and of a column, (R,) each.

    weight: (R, n, n). For a row with entries w_j of variance v, the mean over pairs of E[w_i w_j] / v is estimated by
    ((sum_j w_j)^2 - sum_j w_j^2) / (n (n - 1) v), averaged over rows, with v the mean square of the matrix.
    """
    n = weight.shape[2]
    variance = weight.square().mean((1, 2))

    def along(axis: int) -> Tensor:
        pairs = weight.sum(axis).square().sum(1) - weight.square().sum((1, 2))
        return n * pairs / (n * n * (n - 1) * variance)

    return along(2), along(1)
