"""Norms of the Jacobians between all layers of stacked multilayer perceptrons, maximised over samples.

Places and layers are those of `bounds`: 0 is the input, odd layer 2i - 1 multiplies by W_i, even layer 2i applies
phi, n = 2r - 1. Letters: R networks, B samples, d_p the width of place p, C classes. All norms are float64 logs in
nats, -inf for a Jacobian that is exactly zero. Biases change where derivatives are taken, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jacnorm.jacobian import ScaledProduct
from jacnorm.nets.mlp import Activation, derivative, forward, stacked_input

_SLACK = 1e-10  # relative; upper bounds are raised by it, since rounding may take 1e-13 off them
_SQUARINGS = 2  # of tightened bounds; a further one costs more than the eigenvalues that it saves


@dataclass(frozen=True)
class Passes:
    """Layer steps applied to the products of one sample: those made, and those that separate runs would take.

    One sweep extends the product of each start layer to every end layer, (2r - 1) r steps in all; the pair from layer j
    to j' by itself takes j' - j + 1.
    """

    made: int
    separate: int


class LogNorms:
    """Log spectral norms of R x B matrices, bounded from above at once and computed where they are asked for.

    upper: (R, B), never below the norm; (R, 1) where all samples share the matrix. With the Gram matrix G,
    |G^k|_F^(1/2k) is such a bound, and falls to the norm as k doubles.
    """

    def __init__(self, upper: Tensor, gram: Tensor | None = None, log_scale: Tensor | None = None) -> None:
        """`upper` alone is exact already; otherwise gram (R, B, k, k) belongs to the matrices over exp(log_scale)."""
        self.upper = upper
        self._gram, self._log_scale = gram, log_scale

    @classmethod
    def of(cls, product: ScaledProduct, runs: int) -> LogNorms:
        """Norms of a running product whose batch is R x B."""
        matrix = product.matrix.unflatten(0, (runs, -1))
        gram = matrix @ matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT @ matrix
        log_scale = product.log_scale.unflatten(0, (runs, -1))
        return cls(log_scale + _log_root_of_largest(gram), gram, log_scale)

    def tightened(self, where: Tensor) -> Tensor:
        """A smaller upper bound, (K,), for the matrices where the mask (R, B) is true."""
        if self._gram is None:
            return self.upper[where]
        gram = self._gram[where]
        for _ in range(_SQUARINGS):
            gram = gram @ gram
        return torch.minimum(self.upper[where], self._log_scale[where] + _log_root_of_largest(gram) / 2**_SQUARINGS)

    def exact(self, where: Tensor) -> Tensor:
        """The norms, (K,), where the mask (R, B) is true."""
        if self._gram is None:
            return self.upper[where]
        largest = torch.linalg.eigvalsh(self._gram[where])[:, -1]
        log_scale = self._log_scale[where]
        return torch.where(log_scale.isneginf(), -math.inf, log_scale + 0.5 * largest.log())

    def largest(self) -> Tensor:
        """The largest norm over each network's samples, (R,): exact, although few eigenvalues are computed.

        The sample with the largest upper bound gives a value that others have to beat; only those whose bound exceeds
        it, and still does when tightened, are computed.
        """
        samples = torch.arange(self.upper.shape[1], device=self.upper.device)
        first = samples == self.upper.argmax(1, keepdim=True)  # (R, B)
        found = self.exact(first)  # (R,): one per network, in order
        rivals = (self.upper > found[:, None]) & ~first
        rivals[rivals.clone()] = self.tightened(rivals) > found[:, None].expand_as(rivals)[rivals]
        if rivals.any():
            values = torch.full_like(self.upper, -math.inf)
            values[rivals] = self.exact(rivals)
            found = torch.maximum(found, values.amax(1))
        return found


def _log_root_of_largest(gram: Tensor) -> Tensor:
    """Half the log of an upper bound of the largest eigenvalue of positive semidefinite matrices (..., k, k)."""
    return 0.5 * torch.linalg.matrix_norm(gram).log() + _SLACK


class Sweep:
    """One pass over all start layers: for each, one running product that every later layer extends.

    Iterating yields (later place, earlier place, norms of the Jacobian between them). weights: r matrices
    (R, d_i, d_{i-1}); x: (R, B, d_0), or (B, d_0) shared by the networks. inputs: x as (R, B, d_0); preactivations: of
    matrices 1 to r - 1, (R, B, d_i); outputs: (R, B, C). `steps` counts the layer steps applied so far to the products
    of one sample.
    """

    @torch.no_grad()
    def __init__(
        self, weights: Sequence[Tensor], x: Tensor, activation: Activation, biases: Sequence[Tensor] | None = None
    ) -> None:
        """Evaluate the network once, in float64."""
        self.weights = [weight.double() for weight in weights]
        self.activation = activation
        self.inputs = stacked_input(self.weights, x.double())
        biases = None if biases is None else [bias.double() for bias in biases]
        *self.preactivations, self.outputs = forward(self.weights, self.inputs, activation, biases)
        self._slopes = [derivative(z, activation) for z in self.preactivations]  # (R, B, d_i)
        self.runs, self.samples = self.outputs.shape[:2]
        self.steps = 0

    @property
    def layers(self) -> int:
        """How many there are, n = 2r - 1."""
        return 2 * len(self.weights) - 1

    @property
    def passes(self) -> Passes:
        """The steps made so far, and what the pairs would take one by one."""
        n = self.layers
        return Passes(self.steps, n * (n + 1) * (n + 2) // 6)

    def __iter__(self) -> Iterator[tuple[int, int, LogNorms]]:
        for place in range(self.layers):
            yield from self._from(place)

    def _from(self, place: int) -> Iterator[tuple[int, int, LogNorms]]:
        """Jacobians from one place to every later one."""
        product: ScaledProduct | None = None
        for layer in range(place + 1, self.layers + 1):
            self.steps += 1
            if layer == place + 1:  # a layer by itself: a matrix that all samples share, or a diagonal
                yield layer, place, self._single(layer)
                continue
            if product is None:
                product = ScaledProduct()
                product.left_multiply(self._first_two(place))
            elif layer % 2:
                product.left_multiply(self._expanded(self.weights[layer // 2]).flatten(0, 1))
            else:
                product.scale_rows(self._slopes[layer // 2 - 1].flatten(0, 1))
            yield layer, place, LogNorms.of(product, self.runs)

    def _single(self, layer: int) -> LogNorms:
        if layer % 2:
            return LogNorms(torch.linalg.matrix_norm(self.weights[layer // 2], 2).log()[:, None])
        return LogNorms(self._slopes[layer // 2 - 1].abs().amax(2).log())

    def _first_two(self, place: int) -> Tensor:
        """The product of the two layers after `place`, (R B, d, d'): diagonal by matrix, or matrix by diagonal."""
        if place % 2 == 0:
            weight = _without_kernel(self.weights[place // 2])
            return (self._slopes[place // 2].unsqueeze(-1) * weight.unsqueeze(1)).flatten(0, 1)
        return (self.weights[place // 2 + 1].unsqueeze(1) * self._slopes[place // 2].unsqueeze(-2)).flatten(0, 1)

    def _expanded(self, weight: Tensor) -> Tensor:
        return weight.unsqueeze(1).expand(-1, self.samples, -1, -1)


def _without_kernel(weight: Tensor) -> Tensor:
    """W Q of shape (R, d, min(d, d')) for an orthonormal basis Q of a space that holds the rows of W.

    |A W| = |A W Q| for every A, which saves work where the input is wider than what it feeds.
    """
    if weight.shape[1] >= weight.shape[2]:
        return weight
    return torch.linalg.qr(weight.mT, mode="r").R.mT


@torch.no_grad()
def largest_norms(sweep: Sweep) -> Tensor:
    """Largest Jacobian norms between all places over the samples of a sweep, log, (R, n + 1, n + 1).

    Row: the later place; column: the earlier one. Zero on the diagonal, -inf above it.
    """
    n = sweep.layers
    sigma = torch.full((sweep.runs, n + 1, n + 1), -math.inf, dtype=torch.float64, device=sweep.outputs.device)
    sigma.diagonal(dim1=1, dim2=2).zero_()
    for later, earlier, norms in sweep:
        sigma[:, later, earlier] = norms.largest()
    return sigma


@torch.no_grad()
def output_norms(weights: Sequence[Tensor], preactivations: Sequence[Tensor], activation: Activation) -> Tensor:
    """Largest norm of the Jacobian of the output by each matrix's pre-activations, log sigma_{2r-1 <- 2i}, (R, r).

    weights: r matrices (R, d_i, d_{i-1}). preactivations: of matrices 1 to r - 1, (R, B, d_i), float64. The last column
    is 0, the Jacobian of the output by itself. One product per sample, from the output towards the input, of C columns.
    """
    found = [torch.zeros(len(weights[0]), dtype=torch.float64, device=weights[0].device)]
    products = [ScaledProduct() for _ in weights[0]]  # one per network: then its samples share a matrix without copies
    for weight, z in zip(reversed(weights[1:]), reversed(preactivations), strict=True):
        transposed, slopes = weight.double().mT, derivative(z, activation)  # (R, d_{i-1}, d_i), (R, B, d_{i-1})
        for run, product in enumerate(products):
            if len(found) == 1:
                product.left_multiply(slopes[run].unsqueeze(-1) * transposed[run])  # (B, d_{i-1}, C)
            else:
                product.left_multiply(transposed[run])
                product.scale_rows(slopes[run])
        found.append(torch.cat([LogNorms.of(product, runs=1).largest() for product in products]))
    return torch.stack(found[::-1], 1)
