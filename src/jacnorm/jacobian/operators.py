"""Loss Hessian and Gauss-Newton matrix of a model in its parameters, and their largest eigenvalues.

The matrices come from curvlinops; this module is not imported by the package, because importing curvlinops takes
seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jacnorm.jacobian.errors import NonFiniteValue, OptionError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # a dependency of curvlinops still calls torch.jit.script
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


def loss_hessian(
    model: nn.Module, loss: nn.Module, data: Batches, parameters: Sequence[nn.Parameter] | None = None
) -> HessianLinearOperator:
    """Hessian of the loss over `data` (batches of inputs and targets) in the trainable parameters of the model."""
    return HessianLinearOperator(model, loss, _trainable(model, parameters), data)


def gauss_newton(
    model: nn.Module, loss: nn.Module, data: Batches, parameters: Sequence[nn.Parameter] | None = None
) -> GGNLinearOperator:
    """Generalised Gauss-Newton matrix J^T H_loss J over `data` in the trainable parameters of the model."""
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
