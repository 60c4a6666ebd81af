"""The ways to the largest singular values that are compared: ours and what other libraries offer, each at its best.

Every method maps (model, inputs) to (values, pulls, pushes); pulls and pushes are passes over the batch, or None
where the library does not say.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn

from jacnorm.jacobian import spectral_norm

Answer = tuple[Tensor, int | None, int | None]

ACCURACY = 1e-3
"""Relative accuracy asked of every iterative method; dense ones reach about 1e-6."""


def ours(model: nn.Module, x: Tensor) -> Answer:
    """`jacnorm.jacobian.spectral_norm`: a 95 % interval of relative width 1e-3 for the whole batch jointly."""
    result = spectral_norm(model, x, rtol=ACCURACY)
    return result.value, int(result.pulls.max()), int(result.pushes.max())


def ours_each(model: nn.Module, x: Tensor) -> Answer:
    """The same with an interval that holds at 95 % for each sample by itself."""
    result = spectral_norm(model, x, rtol=ACCURACY, family=1)
    return result.value, int(result.pulls.max()), int(result.pushes.max())


def jacrev(model: nn.Module, x: Tensor) -> Answer:
    """`torch.func.jacrev` of the sum over the batch (samples do not mix), then `torch.linalg.svdvals`."""
    j = torch.func.jacrev(lambda z: model(z).flatten(1).sum(0))(x)  # (m, B, *input)
    return torch.linalg.svdvals(j.detach().flatten(2).transpose(0, 1))[:, 0], None, None


def functional(model: nn.Module, x: Tensor) -> Answer:
    """`torch.autograd.functional.jacobian` of the sum over the batch, vectorised, then `torch.linalg.svdvals`."""
    j = torch.autograd.functional.jacobian(lambda z: model(z).flatten(1).sum(0), x, vectorize=True)
    return torch.linalg.svdvals(j.flatten(2).transpose(0, 1))[:, 0], None, None


def scipy_svds(model: nn.Module, x: Tensor) -> Answer:
    """SciPy's `svds` sample by sample on `torch.func.jvp` and one retained `torch.func.vjp`."""
    return torch.stack([_svds(_jvp_operator(model, sample[None])) for sample in x]), None, None


def curvlinops_svds(model: nn.Module, x: Tensor) -> Answer:
    """SciPy's `svds` sample by sample on curvlinops' Jacobian operator, the input taking the place of a parameter."""
    return torch.stack([_svds(_curvlinops_operator(model, sample[None])) for sample in x]), None, None


METHODS: dict[str, Callable[[nn.Module, Tensor], Answer]] = {
    "jacnorm": ours,
    "jacnorm, each sample": ours_each,
    "jacrev + svdvals": jacrev,
    "functional.jacobian + svdvals": functional,
    "SciPy svds": scipy_svds,
    "curvlinops + svds": curvlinops_svds,
}
DENSE = {"jacrev + svdvals", "functional.jacobian + svdvals"}
BY_SAMPLE = {"SciPy svds", "curvlinops + svds"}


def reference(model: nn.Module, x: Tensor, dense: bool) -> Tensor:
    """Largest singular values in float64: from all rows, or by `svds` to 1e-9 where the rows do not fit."""
    model, x = model.double(), x.double()
    if dense:
        return jacrev(model, x)[0]
    return torch.stack([_svds(_jvp_operator(model, sample[None]), 1e-9) for sample in x])


def _svds(operator: LinearOperator, tol: float = ACCURACY) -> Tensor:
    start = np.random.default_rng(0).standard_normal(min(operator.shape)).astype(operator.dtype)
    return torch.tensor(float(svds(operator, 1, tol=tol, v0=start, return_singular_vectors=False)[0]))


def _jvp_operator(model: nn.Module, x: Tensor) -> LinearOperator:
    y, pull = torch.func.vjp(model, x)

    def matvec(v: np.ndarray) -> np.ndarray:
        v = torch.as_tensor(v).to(x).reshape(x.shape)
        return torch.func.jvp(model, (x,), (v,))[1].detach().flatten().numpy()

    def rmatvec(u: np.ndarray) -> np.ndarray:
        return pull(torch.as_tensor(u).to(y).reshape(y.shape))[0].detach().flatten().numpy()

    return LinearOperator((y.numel(), x.numel()), matvec, rmatvec, dtype=str(x.dtype).removeprefix("torch."))


class _AtInput(nn.Module):
    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)
        self.model = [model]  # in a list, so that its parameters stay out of this module's

    def forward(self, _nothing: Tensor) -> Tensor:
        return self.model[0](self.x).flatten(1)


def _curvlinops_operator(model: nn.Module, x: Tensor) -> LinearOperator:
    from curvlinops import JacobianLinearOperator

    at_input = _AtInput(model, x)
    data = [(torch.zeros(1, 1), torch.zeros(1, 1))]
    return JacobianLinearOperator(at_input, [at_input.x], data, check_deterministic=False, num_data=1).to_scipy()
