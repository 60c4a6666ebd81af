"""The penalty on the Jacobians of the sequence model f and the prior p (eq. 20, in the form that this project chose).

For transition i of the N that do not cross the start of an episode, with inputs detached from the rollout they come
from,

    omega_i = ||d f(h, z, a) / d(h, z)||_F^2 + ||d p(h) / d h||_F^2,    Omega = mean_i omega_i,

or mean_i sqrt(omega_i + epsilon) for power 1. p are the class probabilities (softmax of the prior's logits). A squared
norm is estimated without bias from v uniform on the unit sphere of the C_o outputs (Hoffman, Roberts and Yaida 2019,
arXiv 1908.02729):  ||J||_F^2 = C_o E ||v^T J||^2,  one vector-Jacobian product per projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from jacnorm.studies.worldmodel import rssm
from jacnorm.studies.worldmodel.settings import Input

ROOT_EPSILON = 1e-8
"""Added below the root for power 1, whose slope at 0 is infinite."""


@dataclass(frozen=True)
class Projections:
    """Unit vectors, one per projection and sample, of each function's outputs."""

    f: Tensor
    """(P, R, N, D)."""
    prior: Tensor
    """(P, R, N, K C)."""


def directions(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Vectors on the last axis, uniform on the unit sphere; on the CPU."""
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def squared_norm(function: Callable[..., Tensor], inputs: Sequence[Tensor], projections: Tensor) -> Tensor:
    """Estimate of the squared Frobenius norm of d function / d inputs of each sample, (R, N), differentiable.

    function: inputs (R, N, n) each to outputs (R, N, C_o); samples do not mix. inputs: taken without their history.
    projections: (P, R, N, C_o), unit vectors; the mean over the P of them.
    """
    leaves = [each.detach().requires_grad_() for each in inputs]
    outputs = function(*leaves)  # (R, N, C_o)
    total = outputs.new_zeros(())
    for v in projections:
        products = torch.autograd.grad(outputs, leaves, v, create_graph=True)  # v^T J, (R, N, n) each
        total = total + sum(product.square().sum(-1) for product in products)
    return total * (outputs.shape[-1] / len(projections))


def penalty(
    f: Callable[[Tensor, Tensor, Tensor], Tensor],
    prior: Callable[[Tensor], Tensor],
    h: Tensor,
    z: Tensor,
    a: Tensor,
    mask: Tensor,
    projections: Projections,
    *,
    wrt: Sequence[Input] = ("h", "z"),
    include_prior: bool = True,
    power: Literal[1, 2] = 2,
) -> Tensor:
    """Omega of each run, (R,), differentiable with respect to the parameters inside `f` and `prior`.

    f: (h, z, a) to h'. prior: h to class probabilities (not called without `include_prior`). h (R, N, D), z (R, N, K C)
    and a (R, N, A): inputs of the transitions, taken without their history. mask (R, N), bool: transitions that count,
    at least one per run. wrt: inputs of f whose Jacobian counts.
    """

    def with_respect_to(*inputs: Tensor) -> Tensor:
        given = dict(zip(wrt, inputs, strict=True))
        return f(given.get("h", h.detach()), given.get("z", z.detach()), a.detach())

    squares = squared_norm(with_respect_to, [{"h": h, "z": z}[name] for name in wrt], projections.f)  # (R, N)
    if include_prior:
        squares = squares + squared_norm(prior, [h], projections.prior)
    each = squares if power == 2 else (squares + ROOT_EPSILON).sqrt()
    counted = mask.to(each.dtype)
    return (each * counted).sum(1) / counted.sum(1)


def cell_penalty(kernel: Tensor, scale: Tensor, offset: Tensor, h: Tensor, x: Tensor, projections: Tensor) -> Tensor:
    """Mean over samples of the estimated squared Jacobian norm of one GRU with respect to h and x; a scalar.

    Plain weights, as any other implementation can hand them over: kernel (D + W, 3 D), columns reset, candidate,
    update; scale and offset (3 D,) of its LayerNorm; h (N, D); x (N, W); projections (P, N, D), unit vectors.
    """
    weights = [each.unsqueeze(0) for each in (kernel, scale, offset)]
    squares = squared_norm(
        lambda h, x: rssm.cell(h, x, *weights, twice=True), [h[None], x[None]], projections.unsqueeze(1)
    )
    return squares.mean()
