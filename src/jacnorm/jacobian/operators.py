"""Loss Hessian and Gauss-Newton matrix of a model in its parameters, and largest eigenvalues of symmetric matrices.

The two matrices come from curvlinops, which is imported when one of them is asked for: it is slow to import, and the
eigenvalues do without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from jacnorm.jacobian.errors import NonFiniteValue, OptionError

if TYPE_CHECKING:
    from curvlinops import GGNLinearOperator, HessianLinearOperator

Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Eigenvalues:
    """Largest eigenvalues of a symmetric matrix, in descending order.

    values: (k,) float64 Ritz values; residuals: (k,) |A v - lambda v| of unit Ritz vectors v, so that an eigenvalue
    of A lies within that distance of each. converged: (k,) bool. vectors: (k, p). products: matrix-vector products
    spent.
    """

    values: Tensor
    residuals: Tensor
    converged: Tensor
    vectors: Tensor
    products: int


@dataclass(frozen=True)
class StackedEigenvalues:
    """Largest eigenvalue of each of R symmetric matrices.

    values: (R,) float64 Ritz values; residuals: (R,) |A v - lambda v| of the unit Ritz vectors v, so that an eigenvalue
    lies within that distance. converged: (R,) bool. vectors: (R, p), which a later call can start from. products: (R,)
    matrix-vector products each run needed. A run whose product held NaN or infinity has NaN for value and residual,
    converged False and its start, scaled to unit length, as vector. Vectors lie on the device of the products, all else
    on the processor.
    """

    values: Tensor
    residuals: Tensor
    converged: Tensor
    vectors: Tensor
    products: Tensor


def loss_hessian(
    model: nn.Module, loss: nn.Module, data: Batches, parameters: Sequence[nn.Parameter] | None = None
) -> HessianLinearOperator:
    """Hessian of the loss over `data` (batches of inputs and targets) in the trainable parameters of the model."""
    with _quiet():
        from curvlinops import HessianLinearOperator

        return HessianLinearOperator(model, loss, _trainable(model, parameters), data)


def gauss_newton(
    model: nn.Module, loss: nn.Module, data: Batches, parameters: Sequence[nn.Parameter] | None = None
) -> GGNLinearOperator:
    """Generalised Gauss-Newton matrix J^T H_loss J over `data` in the trainable parameters of the model."""
    with _quiet():
        from curvlinops import GGNLinearOperator

        return GGNLinearOperator(model, loss, _trainable(model, parameters), data)


def top_eigenvalues(
    operator: Callable[[Tensor], Tensor] | HessianLinearOperator | GGNLinearOperator,
    k: int = 1,
    *,
    size: int | None = None,
    rtol: float = 1e-3,
    max_products: int = 200,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    seed: int = 0,
) -> Eigenvalues:
    r"""Largest k eigenvalues (not magnitudes) of a symmetric matrix by Lanczos with full re-orthogonalisation.

    operator: a curvlinops operator, or a function v -> A v on flat vectors with `size` (and `dtype`, `device`) given.
    An eigenpair has converged when its residual is at most rtol * max |Ritz value|; the process stops when all k
    have, or after `max_products`. One start vector sees one copy of a multiple eigenvalue.

    Cost: one product a step; memory `steps` vectors. Raises OptionError for k or sizes out of range, NonFiniteValue for
    products with NaN or infinity.
    """
    if size is None:
        if callable(operator) and not hasattr(operator, "shape"):
            raise OptionError("a function needs size=, the length of its vectors")
        size, dtype, device = operator.shape[1], operator.dtype, operator.device
    if not 1 <= k <= size:
        raise OptionError(f"k is between 1 and the size of the matrix, {size}, not {k}")
    if max_products < k:
        raise OptionError(f"max_products is at least k={k}, not {max_products}")
    multiply = (lambda v: operator @ v) if hasattr(operator, "shape") else operator
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(size, generator=generator, dtype=torch.float64)
    v = (v / v.norm()).to(dtype=dtype or torch.float32, device=device)
    basis: list[Tensor] = []
    diagonal: list[float] = []
    off: list[float] = []
    for step in range(1, min(max_products, size) + 1):
        basis.append(v)
        w = multiply(v).detach()
        if not bool(torch.isfinite(w).all()):
            raise NonFiniteValue(
                f"product {step} with the matrix holds NaN or infinity; check the loss and its parameters"
            )
        diagonal.append(float(v.double() @ w.double()))
        stacked = torch.stack(basis)  # (steps, p)
        for _ in range(2):
            w = w - stacked.mT @ (stacked @ w)
        off.append(float(torch.linalg.vector_norm(w, dtype=torch.float64)))
        values, rotation, residuals = _ritz(diagonal, off)
        scale = float(values.abs().max())
        count = min(k, step)
        done = residuals[:count] <= rtol * scale
        if (step >= k and bool(done.all())) or off[-1] <= torch.finfo(w.dtype).eps * scale:
            break
        v = w / off[-1]
    vectors = rotation[:, :count].mT.to(stacked) @ stacked
    return Eigenvalues(values[:count], residuals[:count], done, vectors, step)


def stacked_top_eigenvalues(
    multiply: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    rtol: float = 1e-3,
    max_products: int = 200,
    narrow: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None,
) -> StackedEigenvalues:
    r"""Largest eigenvalue (not magnitude) of R independent symmetric matrices, by R Lanczos processes side by side.

    multiply: (R, p) -> (R, p), row r times the matrix of run r. start: (R, p), no row zero: random, or the eigenvectors
    of similar matrices, which saves products (but a start near an eigenvector of a lower eigenvalue may converge to
    that). Vectors have the dtype of `start` and full re-orthogonalisation; the small eigenproblems are in float64.

    A run stops, and keeps what it has, when the residual of its largest Ritz value is at most rtol times that value's
    magnitude (or at rounding of the largest magnitude met). `max_products` without either leaves the best Ritz value
    and converged False. A run's result therefore does not depend on its company, up to rounding in `multiply`, and a
    product that is not finite spoils its own run alone (see `StackedEigenvalues`).

    Runs that stopped are multiplied on, as zeros, until half of the stack has: then `narrow(runs)`, if given, is asked
    for the product (n, p) -> (n, p) of the runs left, an ascending selection from 0, ..., R - 1.

    Cost: as many calls as the slowest run needs, memory R * p numbers for each. Raises OptionError for a start that is
    not a matrix of finite, non-zero rows, for a negative rtol and for max_products below 1.

    >>> diagonals = torch.tensor([[3.0, -9.0], [-1.0, -2.0]])
    >>> stacked_top_eigenvalues(lambda v: diagonals * v, torch.ones(2, 2)).values.round(decimals=4)
    tensor([ 3., -1.], dtype=torch.float64)
    """
    if start.ndim != 2 or not bool((start.isfinite().all(1) & (start != 0).any(1)).all()):
        raise OptionError(f"start is (R, p) with finite, non-zero rows; it has shape {tuple(start.shape)}")
    if rtol < 0 or max_products < 1:
        raise OptionError(f"rtol is at least 0 and max_products at least 1, not {rtol} and {max_products}")
    process = _StackedLanczos(start)
    values, residuals = torch.full((2, len(start)), torch.nan, dtype=torch.float64)
    converged, products = torch.zeros(len(start), dtype=torch.bool), torch.zeros(len(start), dtype=torch.int64)
    vectors = process.v.clone()
    runs = torch.arange(len(start))  # in the stack now
    active = torch.ones(len(start), dtype=torch.bool)  # of those
    last = min(max_products, start.shape[1])
    for step in range(1, last + 1):
        finite = process.extend(multiply)
        products[runs[active]] = step
        active = active & finite
        if not bool(active.any()):
            break
        rows = active.nonzero().squeeze(1)
        ritz, residual, rounding, coefficients = process.top(rows)
        met = residual <= torch.maximum(rtol * ritz.abs(), rounding)
        stop = met | (step == last)
        done = runs[rows[stop]]
        values[done], residuals[done], converged[done] = ritz[stop], residual[stop], met[stop]
        vectors[done] = process.combine(rows[stop], coefficients[stop])
        active[rows[stop]] = False
        if not bool(active.any()):
            break
        process.advance(active)
        if narrow is not None and 2 * int(active.sum()) <= len(runs):
            process.keep(active)
            runs, active = runs[active], active[active]
            multiply = narrow(runs)
    return StackedEigenvalues(values, residuals, converged, vectors, products)


class _StackedLanczos:
    """Lanczos processes side by side: R bases, and R tridiagonal matrices in float64 on the processor.

    v: (R, p) the vectors to be multiplied next; zero for runs that stopped.
    """

    def __init__(self, start: Tensor) -> None:
        start = start / start.abs().amax(1, keepdim=True)  # else the squares of tiny entries underflow
        self.v = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
        self._w = self.v
        self._basis = self.v.new_empty(len(start), min(16, start.shape[1]), start.shape[1])  # (R, room, p)
        self._diagonal = self._off = torch.zeros(len(start), 0, dtype=torch.float64)  # (R, k)

    def extend(self, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """Take the next product; returns which runs' are finite, (R,) bool."""
        k = self._diagonal.shape[1]
        if k == self._basis.shape[1]:
            self._basis = torch.cat([self._basis, torch.empty_like(self._basis)], 1)
        self._basis[:, k] = self.v
        known = self._basis[:, : k + 1]
        w = multiply(self.v).detach()
        finite = w.isfinite().all(1)
        w = torch.where(finite[:, None], w, 0)
        diagonal = (self.v.double() * w.double()).sum(1)
        for _ in range(2):
            w = torch.baddbmm(w.unsqueeze(1), (known @ w.unsqueeze(2)).mT, known, alpha=-1).squeeze(1)
        off = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64)
        self._w = w
        self._diagonal = torch.cat([self._diagonal, diagonal.cpu()[:, None]], 1)
        self._off = torch.cat([self._off, off.cpu()[:, None]], 1)
        return finite.cpu()

    def top(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Largest Ritz values, their residuals, what is rounding, (n,) each, and coefficients (n, k); rows: (n,)."""
        diagonal, off = self._diagonal[rows], self._off[rows]
        t = torch.diag_embed(diagonal) + torch.diag_embed(off[:, :-1], 1) + torch.diag_embed(off[:, :-1], -1)
        values, rotation = torch.linalg.eigh(t)
        coefficients = rotation[:, :, -1]
        rounding = 10 * torch.finfo(self.v.dtype).eps * values.abs().amax(1)
        return values[:, -1], off[:, -1] * coefficients[:, -1].abs(), rounding, coefficients

    def combine(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        """Ritz vectors (n, p) from coefficients (n, k)."""
        basis = self._basis[rows.to(self.v.device), : coefficients.shape[1]]
        return torch.einsum("nk,nkp->np", coefficients.to(basis), basis)

    def advance(self, active: Tensor) -> None:
        """Make the next vectors; those of the other runs are zero."""
        self.v = torch.where(active.to(self.v.device)[:, None], self._w / self._off[:, -1:].to(self._w), 0)

    def keep(self, some: Tensor) -> None:
        """Drop the other runs."""
        self._diagonal, self._off = self._diagonal[some], self._off[some]
        some = some.to(self.v.device)
        self.v, self._basis = self.v[some], self._basis[some]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch, which still calls torch.jit.script where a product with curvlinops first uses forward mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _ritz(diagonal: list[float], off: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values in descending order, their coefficients (columns) and residuals."""
    t = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if len(diagonal) > 1:
        side = torch.tensor(off[:-1], dtype=torch.float64)
        t = t + torch.diag(side, 1) + torch.diag(side, -1)
    values, rotation = torch.linalg.eigh(t)
    values, rotation = values.flip(0), rotation.flip(1)
    return values, rotation, off[-1] * rotation[-1].abs()


def _trainable(model: nn.Module, parameters: Sequence[nn.Parameter] | None) -> list[nn.Parameter]:
    chosen = list(model.parameters()) if parameters is None else list(parameters)
    chosen = [parameter for parameter in chosen if parameter.requires_grad]
    if not chosen:
        raise OptionError("the model has no trainable parameter, so it has no curvature matrix in them")
    return chosen
