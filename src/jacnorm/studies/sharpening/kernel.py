r"""Empirical tangent kernel D F D F^T of stacked fully connected networks, layer by layer in closed form.

Layer l is z_l = c_l W_l h_{l-1} + b_l with h_l = phi(z_l); c_l is the factor of the parametrisation. With
B_l(x) = d logits / d z_l, the K x K block of samples i and j of layer l's part of the kernel is

    K_l[i, j] = (c_l^2 <h_{l-1}(x_i), h_{l-1}(x_j)> + 1) B_l(x_i) B_l(x_j)^T,     D F D F^T = sum_l K_l,
    B_L = I,  B_l = c_{l+1} B_{l+1} W_{l+1} diag phi'(z_l),

the term 1 for the bias. The first layer's Jacobian, d z_1 / d x = c_1 W_1, is in none of them.

Letters: R runs, m samples, K classes, n_l units of layer l, L weight layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from jacnorm.jacobian.operators import stacked_top_eigenvalues
from jacnorm.studies.sharpening.inputs import STUDY
from jacnorm.studies.sharpening.networks import Mlp
from jacnorm.training.seeds import generator


@dataclass(frozen=True)
class LayerBlocks:
    """Factors of one layer's part of the kernel: K_l[i, j] = inner[i, j] backward[i] backward[j]^T.

    inner: (R, m, m); backward: B_l, (R, m, K, n_l), or None for the last layer, where it is the identity.
    """

    inner: Tensor
    backward: Tensor | None

    def product(self, u: Tensor) -> Tensor:
        """K_l times each of S vectors of every run, (R, S, m, K), without forming K_l."""
        if self.backward is not None:
            u = torch.einsum("rsmk,rmkn->rsmn", u, self.backward)
        u = torch.einsum("rij,rsjn->rsin", self.inner, u)
        return u if self.backward is None else torch.einsum("rsmn,rmkn->rsmk", u, self.backward)


def layer_blocks(network: Mlp, parameters: Mapping[str, Tensor], x: Tensor) -> list[LayerBlocks]:
    """Factors of K_1, ..., K_L at the samples x, (m, *image) shared by the runs or (R, m, *image)."""
    with torch.no_grad():
        z = network.preactivations(parameters, x)  # L of (R, m, n_l)
        hidden = [x.flatten(-3), *(network.activate(each) for each in z[:-1])]
        blocks: list[LayerBlocks] = []
        backward: Tensor | None = None
        for layer in range(network.layers, 0, -1):
            h = hidden[layer - 1]
            inner = network.factor(layer) ** 2 * (h @ h.mT) + 1  # (R, m, m), or (m, m) for shared samples
            blocks.append(LayerBlocks(inner.expand(len(z[0]), -1, -1), backward))
            if layer > 1:
                weight = network.factor(layer) * parameters[f"weight{layer}"]  # (R, n_l, n_{l-1})
                if backward is None:
                    chained = weight.unsqueeze(1)  # (R, 1, K, n_{l-1})
                else:
                    chained = torch.bmm(backward.flatten(1, 2), weight).unflatten(1, backward.shape[1:3])
                backward = chained * network.derivative(z[layer - 2]).unsqueeze(2)  # (R, m, K, n_{l-1})
    return blocks[::-1]


def kernel_tops(
    network: Mlp, parameters: Mapping[str, Tensor], x: Tensor, *, rtol: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues of (1/m) D F D F^T, (R,), and of each (1/m) K_l, (R, L), float64.

    network, parameters, x: see `layer_blocks`. Lanczos without forming a matrix, to residuals of rtol times the value
    or until the space of m K dimensions is exhausted. NaN for a run whose kernel is not finite.
    """
    blocks = layer_blocks(network, parameters, x)
    runs, samples = blocks[0].inner.shape[:2]
    shape = (runs, network.layers + 1, samples, network.classes)

    def multiply(v: Tensor) -> Tensor:
        u = v.reshape(shape)  # of every run one vector for each layer and one for the sum, which comes last
        found = torch.empty_like(u)
        found[:, -1] = 0
        for layer, block in enumerate(blocks):
            one, whole = block.product(u[:, [layer, -1]]).unbind(1)
            found[:, layer] = one
            found[:, -1] += whole
        return (found / samples).reshape(v.shape)

    size = samples * network.classes
    start = torch.randn(size, generator=generator(STUDY, "kernel", 0, "lanczos")).to(blocks[0].inner)
    start = start.expand(runs * (network.layers + 1), -1)
    values = stacked_top_eigenvalues(multiply, start, rtol=rtol, max_products=size).values.unflatten(0, shape[:2])
    return values[:, -1], values[:, :-1]
