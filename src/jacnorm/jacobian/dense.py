"""Singular values from all rows (or columns) of the Jacobian: exact to rounding, for a small side."""

from __future__ import annotations

import torch
from torch import Tensor

from jacnorm.jacobian.linearise import Linearisation, refuse_non_finite

SMALL_SIDE = 64
"""Up to this many outputs (or inputs), all rows (or columns) cost less than a Krylov interval of 1e-3."""


ROWS_NUMBERS = 4
"""Copies of J in the dtype of the passes that the dense methods hold at once (rows, and a float64 copy)."""


def takes_rows(method: str, m: int, n: int) -> bool:
    """Apply the cost model of `auto`: all rows or columns for a small side, else random vectors."""
    return method == "rows" or (method == "auto" and min(m, n) <= SMALL_SIDE)


def all_entries(lin: Linearisation) -> tuple[Tensor, str]:
    """J of every sample, (B, m, n), by rows or by columns, whichever are fewer; and the method's name.

    Raises NonFiniteValue naming the first bad sample.
    """
    # A column costs a push and the building of one, about twice a row.
    j, how = lin.rows() if lin.outputs <= 2 * lin.inputs else lin.columns()
    refuse_non_finite(j, "the Jacobian", lin.first_sample)
    return j, how


def singular_values_of(j: Tensor) -> Tensor:
    """All singular values of a batch of matrices in descending order, float64, (B, min(m, n)).

    Entries computed in float32 are known to 1e-7 of sigma_1, and the Gram matrix in float64 resolves 1e-8 of sigma_1,
    so nothing is lost by it; for float64 entries the singular value decomposition keeps what a Gram matrix would lose.
    """
    if j.dtype == torch.float64:
        return torch.linalg.svdvals(j)
    return torch.linalg.eigvalsh(small_gram(j)).clamp_min(0.0).sqrt().flip(-1)


def small_gram(j: Tensor) -> Tensor:
    """Return the q x q Gram matrix of the smaller side in float64, (B, q, q)."""
    j = j.double()
    return j @ j.mT if j.shape[1] <= j.shape[2] else j.mT @ j


def resolution(dtype: torch.dtype) -> float:
    """Relative rounding error to expect in a singular value measured by passes in `dtype`, as a fraction of sigma_1.

    Sixteen units of rounding: 1.9e-6 in float32, 3.6e-15 in float64. Observed on the networks of the benchmark: below
    four. Networks that amplify their own rounding (chaotic, hundreds of layers) can exceed it; `cross_check` measures
    that.
    """
    return 16 * torch.finfo(dtype).eps
