"""Weight ensembles for stacks of networks, surrogate diagonals, and single sparse matrices with their norms.

Ensembles return what `jacnorm.nets.mlp` takes: L tensors (R, n_l, n_{l-1}), each run from its own generator only.
All of them have centred entries of variance sigma_w2 / n_{l-1}; they differ in the law and in the correlation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from jacnorm.nets.mlp import check_widths, draw_stack, init_gaussian
from jacnorm.studies.stability.theory import check_sparsity

Entries = Literal["gaussian", "rademacher"]
Correlation = Literal["equicorrelated", "row"]

gaussian_weights = init_gaussian


def _check_variance(sigma_w2: float) -> None:
    if not sigma_w2 > 0:
        raise ValueError(f"sigma_w2 is {sigma_w2}; the weight variance must be positive")


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=dtype, device=generator.device)


def rademacher_weights(
    widths: Sequence[int],
    sigma_w2: float,
    generators: Sequence[torch.Generator],
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Independent signs times sqrt(sigma_w2 / n_{l-1}). Raises ValueError for impossible widths or variance."""
    _check_variance(sigma_w2)

    def draw(rows: int, columns: int, generator: torch.Generator) -> Tensor:
        signs = torch.randint(2, (rows, columns), generator=generator, device=generator.device) * 2 - 1
        return signs.to(dtype) * (sigma_w2 / columns) ** 0.5

    return draw_stack(widths, generators, draw)


def correlated_weights(
    widths: Sequence[int],
    sigma_w2: float,
    generators: Sequence[torch.Generator],
    dtype: torch.dtype = torch.float64,
    *,
    correlation: Correlation,
    rho: float | None = None,
    exponent: float | None = None,
) -> list[Tensor]:
    """Gaussian weights whose entries share a component: W = sqrt(sigma_w2/n) (sqrt(1-rho) G + sqrt(rho) S).

    correlation "equicorrelated": S = g 1 1^T with one scalar g ~ N(0, 1) per layer, so any two entries of a layer have
    correlation rho. "row": S = g 1^T with g ~ N(0, I), so only entries of one row do. Give either `rho`, or `exponent`
    a for rho = n^-a with n = n_{l-1} the fan-in; the shared part has norm about sigma_w sqrt(rho n), so a > 1 is
    stable, a = 1 critical, a < 1 unstable. A reconstruction: the paper's own model is unknown.

    Raises ValueError unless exactly one of rho (in [0, 1]) and exponent (>= 0) is given.
    """
    _check_variance(sigma_w2)
    if correlation not in ("equicorrelated", "row"):
        raise ValueError(f'correlation is {correlation!r}; it must be "equicorrelated" or "row"')
    if (rho is None) == (exponent is None):
        raise ValueError("give exactly one of rho and exponent")
    if rho is not None and not 0 <= rho <= 1:
        raise ValueError(f"rho is {rho}; a shared correlation must lie in [0, 1]")
    if exponent is not None and not exponent >= 0:
        raise ValueError(f"exponent is {exponent}; rho = n^-exponent needs an exponent of at least 0")

    def draw(rows: int, columns: int, generator: torch.Generator) -> Tensor:
        layer_rho = rho if rho is not None else columns**-exponent
        # The shared part is drawn after G, so that G is the same for every rho.
        independent = _normal(generator, dtype, rows, columns)
        shared = _normal(generator, dtype, rows if correlation == "row" else 1, 1)
        return (sigma_w2 / columns) ** 0.5 * ((1 - layer_rho) ** 0.5 * independent + layer_rho**0.5 * shared)

    return draw_stack(widths, generators, draw)


def bernoulli_masks(widths: Sequence[int], sparsity: float, generators: Sequence[torch.Generator]) -> list[Tensor]:
    """Masks whose entries are kept independently with probability 1 - sparsity (the count fluctuates).

    Use generators seeded differently from the weights' own (see `pruning.random_scores`). Returns L boolean tensors
    (R, n_l, n_{l-1}). Raises ValueError for sparsity outside [0, 1). For masks of an exact count see
    `pruning.masks_from_scores`.
    """
    check_sparsity(sparsity)

    def draw(rows: int, columns: int, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(rows, columns, generator=generator, dtype=torch.float64, device=generator.device)
        return uniform >= sparsity

    return draw_stack(widths, generators, draw)


def surrogate_diagonals(
    widths: Sequence[int],
    generators: Sequence[torch.Generator],
    dtype: torch.dtype = torch.float64,
    probability: float = 0.5,
) -> list[Tensor]:
    """Diagonals B_l of zeros and ones, independent of any weights, each entry one with `probability`.

    widths: of the layers that carry a diagonal, in order; use generators seeded differently from the weights' own.
    Returns one tensor (R, n_l) per width. With probability 1/2 the singular values of the surrogate Jacobian have
    exactly the law of a ReLU network's at one fixed input, if flipping the sign of any row or column leaves the law of
    the weights unchanged (Hanin and Nica 2020): dense symmetric weights, random and magnitude masks, but not SNIP or
    GraSP masks, correlated or trained weights. Raises ValueError for an impossible width or probability, or no
    generator.
    """
    if not generators or not widths or min(widths) < 1:
        raise ValueError(f"widths are {list(widths)} for {len(generators)} generators; give one or more of each")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability is {probability}; it must lie in [0, 1]")
    runs = [
        [
            torch.rand(width, generator=generator, dtype=torch.float64, device=generator.device) < probability
            for width in widths
        ]
        for generator in generators
    ]
    return [torch.stack(layer).to(dtype) for layer in zip(*runs, strict=True)]


# --- single sparse matrices ----------------------------------------------------------------------------------------


def degree(width: int, c: float) -> float:
    """Expected number of entries per row at c = d / log n. Raises ValueError unless 0 < c log n <= n."""
    d = c * math.log(width)
    if not 0 < d <= width:
        raise ValueError(f"c = {c} at width {width} means {d:.3g} entries per row; that must lie in (0, {width}]")
    return d


def sparse_matrix(
    width: int, expected_degree: float, rng: np.random.Generator, entries: Entries = "gaussian"
) -> scipy.sparse.csr_array:
    """Square Bernoulli-masked matrix, rescaled: (W o delta) / sqrt(d/n), with W of variance 1/n.

    Each of the n^2 entries is kept independently with probability d/n, d = `expected_degree`, and the kept ones are
    standard normal (or signs) over sqrt(d), so that the second moment is that of the dense matrix, whose norm is 2.
    Memory and time O(n d), never n^2. Raises ValueError unless 0 < d <= n and `entries` is known.
    """
    check_widths((width, width))
    if not 0 < expected_degree <= width:
        raise ValueError(f"expected_degree is {expected_degree}; it must lie in (0, {width}], the width")
    if entries not in ("gaussian", "rademacher"):
        raise ValueError(f'entries is {entries!r}; it must be "gaussian" or "rademacher"')
    positions = _bernoulli_positions(width * width, expected_degree / width, rng)
    if entries == "gaussian":
        values = rng.standard_normal(positions.size)
    else:
        values = 2.0 * rng.integers(2, size=positions.size) - 1
    starts = np.searchsorted(positions, np.arange(width + 1, dtype=np.int64) * width)
    values /= math.sqrt(expected_degree)
    return scipy.sparse.csr_array((values, positions % width, starts), shape=(width, width))


def _bernoulli_positions(total: int, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Sorted positions of the successes among `total` independent trials, through their geometric gaps."""
    expected = total * probability
    batch = math.ceil(expected + 6 * math.sqrt(expected)) + 16
    pieces = []
    last = -1
    while last < total:
        positions = last + np.cumsum(rng.geometric(probability, size=batch))
        pieces.append(positions)
        last = int(positions[-1])
    positions = np.concatenate(pieces)
    return positions[positions < total]


@dataclass(frozen=True)
class SparseNorm:
    """Largest singular value of one matrix, with what it cost.

    value: |A v| for the unit vector v found, so never above the true norm beyond rounding.
    residual: |A^T A v - value^2 v| / value^2, which bounds the relative distance from value^2 to the nearest squared
    singular value (twice the relative distance to the nearest singular value). Zero for the zero matrix.
    products: applications of A or A^T. method: "lanczos", "dense" (full SVD) or "zero".
    """

    value: float
    residual: float
    products: int
    method: str


def sparse_spectral_norm(
    matrix: scipy.sparse.csr_array, *, tolerance: float = 1e-8, max_restarts: int = 1000, seed: int = 0
) -> SparseNorm:
    """Spectral norm by restarted Lanczos (ARPACK) on the smaller of A^T A and A A^T.

    tolerance: ARPACK's bound on the residual of the squared value, relative. The start vector is Gaussian from `seed`,
    so the result is repeatable. Matrices of at most 64 rows or columns are decomposed in full. Raises RuntimeError if
    `max_restarts` restarts do not reach the tolerance.
    """
    rows, columns = matrix.shape
    if not matrix.data.any():
        return SparseNorm(0.0, 0.0, 0, "zero")
    if min(rows, columns) <= 64:
        _, _, right = np.linalg.svd(matrix.toarray(), full_matrices=False)
        return _norm_of(matrix, right[0], products=0, method="dense")
    if rows < columns:
        matrix = matrix.T.tocsr()
    adjoint = matrix.T.tocsr()
    products = 0

    def normal_product(vector: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 2
        return adjoint @ (matrix @ vector)

    size = matrix.shape[1]
    try:
        _, vectors = scipy.sparse.linalg.eigsh(
            scipy.sparse.linalg.LinearOperator((size, size), matvec=normal_product, dtype=np.float64),
            k=1,
            which="LA",
            v0=np.random.default_rng(seed).standard_normal(size),
            ncv=min(40, size),
            tol=tolerance,
            maxiter=max_restarts,
        )
    except scipy.sparse.linalg.ArpackNoConvergence:
        raise RuntimeError(
            f"the norm of a {rows} x {columns} sparse matrix did not reach a relative residual of {tolerance} in "
            f"{max_restarts} restarts; raise max_restarts or tolerance"
        ) from None
    return _norm_of(matrix, vectors[:, 0], products, "lanczos")


def _norm_of(matrix: scipy.sparse.csr_array, vector: np.ndarray, products: int, method: str) -> SparseNorm:
    vector = vector / np.linalg.norm(vector)
    image = matrix @ vector
    value = float(np.linalg.norm(image))
    residual = float(np.linalg.norm(matrix.T @ image - value**2 * vector)) / value**2
    return SparseNorm(value, residual, products + 2, method)
