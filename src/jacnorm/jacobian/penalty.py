"""Jacobian norms as differentiable penalties for training."""

from __future__ import annotations

import torch
from torch import Tensor

from jacnorm.jacobian.errors import NotDifferentiable, OptionError
from jacnorm.jacobian.lanczos import GolubKahan, start_vectors
from jacnorm.jacobian.linearise import Function, Linearisation, check_input, check_output


def jacobian_penalty(
    f: Function,
    x: Tensor,
    *,
    kind: str = "frobenius",
    probes: int | None = 1,
    pairs: int = 6,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Squared norm of the input-output Jacobian of every sample, (B,), differentiable in the parameters of f.

    kind="frobenius": |J|_F^2. With `probes` an unbiased estimate, m times the mean of |J^T u|^2 over u uniform on the
    sphere in R^m (Hoffman, Roberts, Yaida 2019, Robust learning with Jacobian regularization, eq. 6); with probes=None
    exact from all m rows. kind="spectral": sigma_1^2 by `pairs` Golub-Kahan steps without a graph, then
    (u^T J v)^2 with the singular vectors held fixed, whose gradient is exact at converged vectors (envelope theorem); a
    few steps give a lower bound of sigma_1^2.

    Take the mean over the batch and add it to a loss. `generator` (on the CPU) draws the probes or the start vector;
    without it the same ones are drawn at every call, which biases a stochastic penalty: pass one in training. f runs
    in its present mode and nothing is probed: batch norm in train mode is accepted here, lets samples mix, and moves
    its running statistics once more (twice for "spectral").

    Cost: one forward and `probes` pulls with a graph (for "spectral": 2 * pairs passes without and one pull with one).
    Raises OptionError for an unknown kind or counts below 1; NotDifferentiable, ShapeError, DtypeError and
    NonFiniteValue for such inputs as `spectral_norm` does. A penalty that comes out infinite is returned, not raised:
    looking at it would make a GPU wait in every training step.

    >>> w = torch.tensor([2.0, 1.0], requires_grad=True)
    >>> penalty = jacobian_penalty(lambda x: w * x, torch.ones(1, 2), probes=None)
    >>> penalty.item(), torch.autograd.grad(penalty.sum(), w)[0].tolist()
    (5.0, [4.0, 2.0])
    """
    if kind not in ("frobenius", "spectral"):
        raise OptionError(f"kind must be 'frobenius' or 'spectral', not {kind!r}")
    if probes is not None and probes < 1:
        raise OptionError(f"probes is at least 1, or None for the exact norm, not {probes}")
    if pairs < 1:
        raise OptionError(f"pairs is at least 1, not {pairs}")
    check_input(x)
    generator = generator or torch.Generator().manual_seed(0)
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        y = f(leaf)
        check_output(y, leaf)
        if kind == "spectral":
            left, right = _top_vectors(f, x, pairs, int(torch.randint(2**31, (1,), generator=generator)))
            pulled = _pull(y, leaf, left)
            return (pulled * right).sum(1).square()
        width = y[0].numel()
        if probes is None:
            basis = torch.eye(width, dtype=y.dtype, device=y.device)
            return sum(_pull(y, leaf, u.expand(len(y), -1)).square().sum(1) for u in basis)
        total = torch.zeros(len(y), dtype=leaf.dtype, device=y.device)
        for _ in range(probes):
            u = torch.randn(len(y), width, generator=generator, dtype=torch.float64).to(y.device)
            u = (u / u.norm(dim=1, keepdim=True)).to(y.dtype)
            total = total + _pull(y, leaf, u).square().sum(1)
        return total * (width / probes)


def _pull(y: Tensor, x: Tensor, u: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(y, x, u.reshape(y.shape), create_graph=True, allow_unused=True)
    if g is None:
        raise NotDifferentiable("the output does not depend on the input through differentiable operations")
    return g.flatten(1) if g.ndim > 1 else g[:, None]


def _top_vectors(f: Function, x: Tensor, pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Left (B, m) and right (B, n) singular vectors of the largest Ritz value, without a graph."""
    lin = Linearisation(f, x, expected_pushes=pairs)
    d = min(lin.inputs, lin.outputs)
    start = start_vectors(lin.samples, d, seed, lin.dtype, lin.device)
    at_input = lin.inputs <= lin.outputs
    process = GolubKahan(*((lin.push, lin.pull) if at_input else (lin.pull, lin.push)), start)
    for _ in range(min(pairs, d)):
        process.step()
    _, _, near, far = process.triplets(1)  # on the side of the start vector, and on the other
    return (far[:, 0], near[:, 0]) if at_input else (near[:, 0], far[:, 0])
