"""Jacobians of untrained GCNs on two graphs with n leaves: a complete binary tree, and a star (Fig. 2).

A layer of the GCN is that of Kipf and Welling (2017) with self-loops: x' = P x W^T without bias, where edges point
towards the root and P_ij = 1 / sqrt(deg_i deg_j) if j sends to i or j = i, with deg the in-degree plus one. A message
takes log2(n) layers up the tree, and one to the centre of the star. An activation stands between layers.

Letters: R runs, V nodes, n leaves, D layers, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

Shape = Literal["deep", "shallow"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": functional.gelu,
}


@dataclass(frozen=True)
class Tree:
    """A tree whose edges (2, V - 1) point from child to parent; node 0 is the root, the last `leaves` nodes leaves."""

    edges: Tensor
    leaves: int
    depth: int

    @classmethod
    def of(cls, shape: Shape, exponent: int) -> Self:
        """The binary tree of depth `exponent`, or the star, with 2^exponent leaves."""
        leaves = 2**exponent
        children = torch.arange(1, leaves + 1 if shape == "shallow" else 2 * leaves - 1)
        parents = torch.zeros_like(children) if shape == "shallow" else (children - 1) // 2
        return cls(torch.stack([children, parents]), leaves, 1 if shape == "shallow" else exponent)

    @property
    def nodes(self) -> int:
        """V."""
        return self.edges.shape[1] + 1

    def propagation(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """P, (V, V)."""
        messages = torch.eye(self.nodes, dtype=dtype)
        messages[self.edges[1], self.edges[0]] = 1.0
        scale = messages.sum(1).rsqrt()
        return scale.unsqueeze(1) * messages * scale


def draw_weights(depth: int, width: int, generator: torch.Generator) -> Tensor:
    """Weights of one run, (D, d, d) float64, from the uniform distribution of Glorot and Bengio (2010)."""
    uniform = torch.rand(depth, width, width, generator=generator, dtype=torch.float64)
    return (2 * uniform - 1) * (3 / width) ** 0.5


def leaf_norms(tree: Tree, weights: Tensor, x: Tensor, activation: str) -> Tensor:
    """Entrywise L1 norm of the Jacobian of the root's output by each leaf's input, (R, n).

    weights: (R, D, d, d); x: (R, V, d).
    """
    p = tree.propagation(x.dtype).to(x.device)
    phi = ACTIVATIONS[activation]

    def root(weights: Tensor, x: Tensor) -> Tensor:
        h = x
        for layer, weight in enumerate(weights):
            h = p @ (phi(h) if layer else h) @ weight.T  # (V, d)
        return h[0]

    jacobian = torch.func.vmap(torch.func.jacrev(root, argnums=1))(weights, x)  # (R, d, V, d)
    return jacobian[:, :, -tree.leaves :].abs().sum((1, 3))
