"""Hessian and Gauss-Newton matrix of the mean cost of stacked runs, and their largest eigenvalues.

Letters: R runs, N samples, B samples of a chunk, K classes, p parameters of one run, in the order of the network's
dictionary. With J_i the Jacobian of the logits at sample i by the parameters and c_i its cost (see `costs`),

    hessian        D^2 (1/N sum_i c_i)
    gauss-newton   1/N sum_i J_i^T (D^2 c_i) J_i
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from jacnorm.jacobian.operators import StackedEigenvalues, stacked_top_eigenvalues
from jacnorm.studies.sharpening.costs import cost_hessian_norms, cost_hessian_product, costs, squares
from jacnorm.studies.sharpening.inputs import STUDY
from jacnorm.studies.sharpening.networks import Network
from jacnorm.training.seeds import generator

Matrix = Literal["hessian", "gauss-newton"]
Pieces = Sequence[Tensor]


class Curvature:
    """Products with the curvature matrices of R runs at given parameters, in evaluation mode.

    network: takes (parameters, buffers, x) to logits (R, B, K). x: (N, *image) shared by the runs, or (R, N, *image).
    y: labels, (N,) or (R, N). cost: name of each run's cost. smoothing: (R,) label smoothing, 0 with the square cost.
    chunk: samples in the network at once. If it holds all of them, one forward pass and one graph of each kind serve
    every product; otherwise a product goes through the chunks and builds their graphs anew.

    Vectors are (R, p). The tensors given are left as they are. Raises ValueError for an unknown cost and for a smoothed
    square cost.
    """

    def __init__(
        self,
        network: Network,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        cost: Sequence[str],
        smoothing: Tensor,
        chunk: int,
    ) -> None:
        self._network, self._buffers, self._cost = network, buffers, list(cost)
        self._leaves = {name: each.detach().requires_grad_() for name, each in parameters.items()}
        self._x, self._y = x, y
        self._shared = x.ndim == 1 + len(network.image)  # by all runs
        self._square = squares(cost, x.device)
        self._smoothing = smoothing.to(x.device)
        self._samples, self._chunk = y.shape[-1], chunk
        self._whole = self._graph(0) if self._samples <= chunk else None

    @property
    def loss(self) -> Tensor:
        """Mean cost of each run, (R,)."""
        return self._first_order[0]

    @property
    def gradient(self) -> Tensor:
        """Gradient of the mean cost, (R, p)."""
        return self._first_order[1]

    def hessian_product(self, v: Tensor) -> Tensor:
        """Hessian times v, both (R, p)."""
        return self._product(v, _Graph.hessian_product)

    def gauss_newton_product(self, v: Tensor) -> Tensor:
        """Gauss-Newton matrix times v, both (R, p)."""
        return self._product(v, _Graph.gauss_newton_product)

    def cost_hessian_norms(self) -> Tensor:
        """Largest eigenvalue of every sample's cost Hessian by its logits, (R, N) float64; 1 for the square cost."""
        return cost_hessian_norms(self._first_order[2], self._square)

    def random_start(self) -> Tensor:
        """Gaussian vectors (R, p), the same for every run and every call."""
        first = next(iter(self._leaves.values()))
        size = sum(each[0].numel() for each in self._leaves.values())
        v = torch.randn(size, generator=generator(STUDY, "curvature", 0, "lanczos"))
        return v.to(first).expand(len(first), -1)

    def narrow(self, runs: Tensor) -> Curvature:
        """The same for some of the runs, given by their numbers."""
        chosen = runs.to(self._x.device)
        return Curvature(
            self._network,
            {name: leaf.detach()[chosen] for name, leaf in self._leaves.items()},
            {name: buffer[chosen] for name, buffer in self._buffers.items()},
            self._x if self._shared else self._x[chosen],
            self._y if self._y.ndim == 1 else self._y[chosen],
            [self._cost[run] for run in runs.tolist()],
            self._smoothing[chosen],
            self._chunk,
        )

    @cached_property
    def _first_order(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (R,), gradient (R, p) and logits (R, N, K), from one pass through the chunks."""
        losses, gradients, logits = [], [], []
        for graph in self._graphs():
            losses.append(graph.loss.detach())
            gradients.append(_flat(graph.gradient).detach())
            logits.append(graph.logits.detach())
        return sum(losses[1:], losses[0]), sum(gradients[1:], gradients[0]), torch.cat(logits, 1)

    def _product(self, v: Tensor, product: Callable[[_Graph, Pieces], Pieces]) -> Tensor:
        leaves = self._leaves.values()
        parts = v.split([leaf[0].numel() for leaf in leaves], 1)
        pieces = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        total = torch.zeros_like(v)
        for graph in self._graphs():
            total += _flat(product(graph, pieces))
        return total

    def _graphs(self) -> Iterator[_Graph]:
        if self._whole is not None:
            yield self._whole
            return
        for first in range(0, self._samples, self._chunk):
            yield self._graph(first)

    def _graph(self, first: int) -> _Graph:
        kept = slice(first, first + self._chunk)
        x = self._x[kept] if self._shared else self._x[:, kept]
        logits = self._network(self._leaves, self._buffers, x)  # (R, B, K)
        found = costs(logits, self._y[..., kept], self._square, self._smoothing)  # (R, B)
        return _Graph(list(self._leaves.values()), logits, found.sum(1) / self._samples, self._square, self._samples)


class _Graph:
    """A chunk's share of the mean cost, and the graphs that products with its matrices are taken through.

    leaves: parameters (R, ...); logits: (R, B, K); loss: (R,), the sum of the chunk's costs over all `samples`.
    """

    def __init__(self, leaves: Pieces, logits: Tensor, loss: Tensor, square: Tensor, samples: int) -> None:
        self.logits, self.loss = logits, loss
        self._leaves, self._square, self._samples = leaves, square, samples

    @cached_property
    def gradient(self) -> Pieces:
        """Gradient of the loss, with its graph."""
        return torch.autograd.grad(self.loss.sum(), self._leaves, create_graph=True)

    @cached_property
    def _pulled(self) -> tuple[Tensor, Pieces]:
        """A direction u of the logits and J^T u with its graph: linear in u, so its derivative along v is J v."""
        u = torch.zeros_like(self.logits, requires_grad=True)
        return u, torch.autograd.grad(self.logits, self._leaves, u, create_graph=True)

    def hessian_product(self, v: Pieces) -> Pieces:
        return torch.autograd.grad(self.gradient, self._leaves, v, retain_graph=True)

    def gauss_newton_product(self, v: Pieces) -> Pieces:
        u, pulled = self._pulled
        (pushed,) = torch.autograd.grad(pulled, u, v, retain_graph=True)  # (R, B, K)
        turned = cost_hessian_product(self.logits.detach(), pushed, self._square) / self._samples
        return torch.autograd.grad(self.logits, self._leaves, turned, retain_graph=True)


def top(
    curvature: Curvature,
    which: Matrix,
    start: Tensor | None = None,
    *,
    rtol: float = 1e-3,
    max_products: int = 200,
) -> StackedEigenvalues:
    """Largest (algebraic) eigenvalue of each run's Hessian ("hessian") or Gauss-Newton matrix ("gauss-newton").

    start: (R, p), for instance the eigenvectors of the checkpoint before or of the other matrix; None: random. Add to
    those about a third of a random unit vector: it costs few products, and a start from the eigenvector alone was seen
    to miss another that had overtaken it, by 6 % of the value. rtol and max_products as in `stacked_top_eigenvalues`,
    whose errors it raises; with an rtol of 1e-2 nearly equal eigenvalues are confused.

    Raises ValueError for an unknown matrix.
    """
    if which not in get_args(Matrix):
        raise ValueError(f"which is {which!r}; it must be one of {', '.join(get_args(Matrix))}")

    def product(of: Curvature) -> Callable[[Tensor], Tensor]:
        return of.hessian_product if which == "hessian" else of.gauss_newton_product

    return stacked_top_eigenvalues(
        product(curvature),
        curvature.random_start() if start is None else start,
        rtol=rtol,
        max_products=max_products,
        narrow=lambda runs: product(curvature.narrow(runs)),
    )


def _flat(pieces: Pieces) -> Tensor:
    return torch.cat([piece.flatten(1) for piece in pieces], 1)  # (R, p)
