"""Running products of many matrices whose norm may leave the range of floating point."""

from __future__ import annotations

import torch
from torch import Tensor

from jacnorm.jacobian.errors import DtypeError, JacobianError, NonFiniteValue, ShapeError


class ScaledProduct:
    r"""A batch of running left-products J <- A J with the scale carried as a logarithm.

    The true product of sample b is ``exp(log_scale[b]) * matrix[b]`` with a `matrix` of Frobenius norm one (or exactly
    zero), so that 500 layers neither overflow nor underflow. One object gives every depth of a sweep: record
    `log_spectral_norm` after each factor.

    Letters: B samples, m rows of the product so far, n its columns (fixed by the first factor). `dtype` is the dtype
    of `matrix` (float64 unless said otherwise; float32 halves the cost of the products and costs about
    1e-7 * sqrt(depth) of relative accuracy); logarithms are float64, in nats.

    Raises ShapeError for factors that do not fit, DtypeError for integer factors, NonFiniteValue for factors with NaN
    or infinity, JacobianError when asked for a norm before the first factor.

    >>> product = ScaledProduct()
    >>> for _ in range(500):
    ...     product.left_multiply(1e-9 * torch.eye(3).expand(2, 3, 3))
    >>> [round(value, 3) for value in product.log_spectral_norm().tolist()]
    [-10361.633, -10361.633]
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        """Start an empty product (the identity of a size that the first factor fixes)."""
        if dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"a product is kept in torch.float32 or torch.float64, not {dtype}")
        self.dtype = dtype
        self._matrix: Tensor | None = None
        self._log_scale: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """The product divided by its Frobenius norm, (B, m, n); zero where the product is exactly zero."""
        return self._started()[0]

    @property
    def log_scale(self) -> Tensor:
        """Log of the Frobenius norm in nats, (B,) float64; -inf where the product is exactly zero."""
        return self._started()[1]

    def left_multiply(self, a: Tensor) -> None:
        """J <- a J for `a` of shape (B, k, m), or (k, m) for one factor shared by all samples."""
        if a.ndim not in (2, 3):
            raise ShapeError(f"a factor has shape (B, k, m) or (k, m), but this one has shape {tuple(a.shape)}")
        a = self._checked(a)
        if self._matrix is None:
            a = a if a.ndim == 3 else a[None]
            self._renormalise(a, torch.zeros(a.shape[0], dtype=torch.float64, device=a.device))
            return
        batch, rows, _ = self._matrix.shape
        if a.shape[-1] != rows or (a.ndim == 3 and 1 not in (batch, a.shape[0]) and a.shape[0] != batch):
            raise ShapeError(
                f"a factor of shape {tuple(a.shape)} cannot multiply a product of shape {tuple(self._matrix.shape)} "
                "from the left: its last size must be the product's rows, and the batch sizes must agree"
            )
        self._renormalise(a @ self._matrix, self._log_scale)

    def scale_rows(self, d: Tensor) -> None:
        """J <- diag(d) J for `d` of shape (B, m), or (m,) for one diagonal shared by all samples."""
        if d.ndim not in (1, 2):
            raise ShapeError(f"a diagonal has shape (B, m) or (m,), but this one has shape {tuple(d.shape)}")
        d = self._checked(d)
        if self._matrix is None:
            self.left_multiply(torch.diag_embed(d))
            return
        batch, rows, _ = self._matrix.shape
        if d.shape[-1] != rows or (d.ndim == 2 and 1 not in (batch, d.shape[0]) and d.shape[0] != batch):
            raise ShapeError(
                f"a diagonal of shape {tuple(d.shape)} cannot scale the rows of a product of shape "
                f"{tuple(self._matrix.shape)}"
            )
        self._renormalise(d[..., None] * self._matrix, self._log_scale)

    def log_frobenius_norm(self) -> Tensor:
        """Log of the Frobenius norm, (B,) float64 nats; -inf for an exactly zero product."""
        return self.log_scale.clone()

    def log_spectral_norm(self) -> Tensor:
        """Log of the largest singular value, (B,) float64 nats; -inf for an exactly zero product.

        Exact to rounding (about 1e-14 relative): the largest eigenvalue of the float64 Gram matrix of the smaller
        side. Squaring loses small singular values, never the largest one.
        """
        matrix, log_scale = self._started()
        matrix = matrix.double()
        gram = matrix @ matrix.mT if matrix.shape[1] <= matrix.shape[2] else matrix.mT @ matrix
        largest = torch.linalg.eigvalsh(gram)[:, -1]
        return torch.where(torch.isinf(log_scale), log_scale, log_scale + 0.5 * largest.log())

    def log_singular_values(self) -> Tensor:
        """Log of all singular values in descending order, (B, min(m, n)) float64 nats.

        From the singular value decomposition, so values are resolved down to about 1e-16 of the largest (1e-7 for a
        float32 product); below that they are rounding noise, and -inf where they come out as exact zeros.
        """
        matrix, log_scale = self._started()
        log_values = torch.linalg.svdvals(matrix.double()).log()
        return torch.where(torch.isinf(log_scale)[:, None], log_scale[:, None], log_scale[:, None] + log_values)

    def clone(self) -> ScaledProduct:
        """Return an independent copy, to branch a sweep."""
        copy = ScaledProduct(self.dtype)
        # Products are replaced, never written in place, so both objects may hold the same tensors.
        copy._matrix, copy._log_scale = self._matrix, self._log_scale
        return copy

    def _started(self) -> tuple[Tensor, Tensor]:
        if self._matrix is None or self._log_scale is None:
            raise JacobianError("the product has no factor yet; call left_multiply or scale_rows first")
        return self._matrix, self._log_scale

    def _checked(self, factor: Tensor) -> Tensor:
        if not factor.is_floating_point():
            raise DtypeError(f"a factor must have a real floating dtype, not {factor.dtype}")
        return factor.detach().to(self.dtype)

    def _renormalise(self, matrix: Tensor, log_scale: Tensor) -> None:
        norm = torch.linalg.matrix_norm(matrix)  # (B,)
        tiny = torch.finfo(self.dtype).tiny ** 0.5 * 1e4
        if bool(((norm < tiny) | (norm > 1 / tiny)).any()) or not bool(torch.isfinite(norm).all()):
            # The squares inside the norm may have left the range although the entries have not: rescale first.
            largest = matrix.abs().amax((-2, -1))
            if not bool(torch.isfinite(largest).all()):
                bad = int((~torch.isfinite(largest)).nonzero()[0])
                raise NonFiniteValue(f"the product of sample {bad} is not finite: a factor holds NaN or infinity")
            largest = torch.where(largest > 0, largest, 1.0)
            matrix = matrix / largest[:, None, None]
            log_scale = log_scale + largest.double().log()
            norm = torch.linalg.matrix_norm(matrix)
        self._matrix = matrix / torch.where(norm > 0, norm, 1.0)[:, None, None]
        self._log_scale = log_scale + norm.double().log()  # log 0 = -inf marks an exactly zero product for good
