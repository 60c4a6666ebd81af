"""Random-matrix measurements: limit, surrogate and independence (E2 to E4), and where the conditions end (E5, E8).

Each function yields the rows of one table of ``tables.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor

from jacnorm.nets.mlp import forward
from jacnorm.studies.stability import theory
from jacnorm.studies.stability.inputs import STUDY
from jacnorm.studies.stability.model import log_norms, log_product_norms
from jacnorm.studies.stability.pruning import prune, rescale
from jacnorm.studies.stability.settings import ConditionsSettings, TheoremSettings
from jacnorm.studies.stability.stacks import Row, by_seed, counts, gaussian_inputs, generators, stacks
from jacnorm.studies.stability.weights import (
    bernoulli_masks,
    correlated_weights,
    degree,
    gaussian_weights,
    sparse_matrix,
    sparse_spectral_norm,
    surrogate_diagonals,
)
from jacnorm.training.job import Job
from jacnorm.training.seeds import generator, numpy_generator

RECTANGLE = (784, 10)
"""Inputs and outputs of the rectangular products: those of a classifier of MNIST."""


def limit_rows(settings: TheoremSettings, this: Job) -> Iterator[Row]:
    """Critical products with independent Bernoulli diagonals between the factors, by their ends and by their shape.

    The square products of one seed share weights and diagonals; the linear one has no diagonals and variance 1/n.
    """
    deepest = max(settings.limit_depths)
    for width in settings.limit_widths:
        cell = f"limit width={width}"
        for seeds in stacks(settings.seeds, width, deepest):
            weights = this.put(gaussian_weights([width] * (deepest + 1), 2.0, generators(cell, seeds, "weights")))
            diagonals = this.put(surrogate_diagonals([width] * (deepest + 1), generators(cell, seeds, "diagonals")))
            for depth in settings.limit_depths:
                between = diagonals[1:depth]
                products = {
                    "both ends": [diagonals[0], *between, diagonals[depth]],
                    "one end": [diagonals[0], *between, None],
                    "no end": [None, *between, None],
                    "linear": [None] * (depth + 1),
                }
                for product, carried in products.items():
                    factors = [w / 2**0.5 for w in weights[:depth]] if product == "linear" else weights[:depth]
                    values = log_product_norms(factors, carried, [depth])[depth]
                    limit = _log_limit(product, width, depth)
                    yield from by_seed(
                        seeds, product=product, width=width, depth=depth, log_norm=values, log_limit=limit
                    )
                if depth > 1:
                    widths = [RECTANGLE[0], *[width] * (depth - 1), RECTANGLE[1]]
                    factors = this.put(gaussian_weights(widths, 2.0, generators(f"{cell} {depth}", seeds, "rectangle")))
                    values = log_product_norms(factors, [None, *between, None], [depth])[depth]
                    limit = theory.log_network_norm(widths)
                    yield from by_seed(
                        seeds, product="rectangular", width=width, depth=depth, log_norm=values, log_limit=limit
                    )


def _log_limit(product: str, width: int, depth: int) -> float:
    if product == "linear":
        return theory.log_gamma_m(depth)
    return theory.log_relu_limit(depth, {"both ends": "both", "one end": "one", "no end": "none"}[product])


def surrogate_rows(settings: TheoremSettings, this: Job) -> Iterator[Row]:
    """True ReLU diagonals against independent Bernoulli ones, separate networks for each."""
    width, depth, sparsity = settings.surrogate_width, settings.surrogate_depth, settings.surrogate_sparsity
    for draw in range(settings.surrogate_draws_per_seed):
        for method in ("dense", "random", "magnitude"):
            for diagonal in ("true", "surrogate"):
                cell = f"surrogate {diagonal} {method} draw={draw}"
                for seeds in stacks(settings.seeds, width, depth):
                    weights = gaussian_weights([width] * (depth + 1), 2.0, generators(cell, seeds, "weights"))
                    if method != "dense":
                        masks = prune(method, weights, sparsity, generators=generators(cell, seeds, "mask"))
                        weights = rescale(weights, masks, "frobenius").weights
                    weights = this.put(weights)
                    if diagonal == "true":
                        x = this.put([gaussian_inputs(cell, seeds, width)])[0]
                        values = log_norms(weights, x, "relu", [depth])[depth].norm[:, 0]
                    else:
                        between = surrogate_diagonals([width] * (depth - 1), generators(cell, seeds, "diagonals"))
                        values = log_product_norms(weights, [None, *this.put(between), None], [depth])[depth]
                    yield from by_seed(seeds, draw=draw, method=method, diagonal=diagonal, log_norm=values)


def independence_rows(settings: TheoremSettings) -> Iterator[Row]:
    """Chi-square tests on layer 3 of resampled dense networks at one fixed input; one pair of units per network.

    Networks are resampled, not inputs: units over the inputs of one fixed network are correlated.
    """
    networks = settings.independence_networks
    for width in settings.independence_widths:
        scale = math.sqrt(2.0 / width)
        median = 0.6744897501960817 * scale  # of |w| for w ~ N(0, 2/width)
        for seed in settings.seeds:
            for repeat in range(settings.independence_repeats_per_seed):
                cell = f"independence width={width} repeat={repeat}"
                x = gaussian_inputs(cell, [seed], width)[0]  # (1, width), the same input for all networks
                rng = generator(STUDY, cell, seed, "weights")
                pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
                for count in counts(networks, width, 3):
                    shape = (count, width, width)
                    w1, w2, w3 = (torch.randn(shape, generator=rng, dtype=torch.float64) * scale for _ in range(3))
                    _, z2, z3 = (z[:, 0] for z in forward([w1, w2, w3], x.expand(count, 1, width), "relu"))
                    active, below = z3 > 0, z2 > 0
                    for pair, variables in {
                        "same layer": (active[:, 0], active[:, 1]),
                        "next layer": (active[:, 0], below[:, 0]),
                        "weight magnitude": (active[:, 0], w3[:, 0, 0].abs() > median),
                        "weight sign": (active[:, 0], w3[:, 0, 0] > 0),
                        "row sum (control)": (active[:, 0], w3[:, 0].sum(1) > 0),
                    }.items():
                        pairs.setdefault(pair, []).append(variables)
                for pair, parts in pairs.items():
                    a, b = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
                    yield {
                        "seed": seed,
                        "repeat": repeat,
                        "width": width,
                        "pair": pair,
                        "networks": networks,
                        "p_value": chi_square_p_value(a, b),
                    }


def chi_square_p_value(a: np.ndarray, b: np.ndarray) -> float:
    """p-value of Pearson's chi-square test, uncorrected, that two binary variables (N,) are independent.

    1.0 where a variable is constant: a table with one row holds no evidence of dependence.
    """
    n = len(a)
    both, rows, columns = np.sum(a & b), np.sum(a), np.sum(b)
    margins = float(rows * (n - rows) * columns * (n - columns))
    if margins == 0:
        return 1.0
    return float(chi2.sf(n * float(n * both - rows * columns) ** 2 / margins, df=1))


def edge_matrix_rows(settings: ConditionsSettings) -> Iterator[Row]:
    """Single sparse matrices: degree proportional to the log of the size, and degree held fixed."""
    cells = [("degree-over-log", n, degree(n, c)) for n in settings.sizes for c in settings.degrees_over_log]
    cells += [("fixed-degree", n, settings.fixed_degree) for n in settings.fixed_degree_sizes]
    for sweep, size, expected in cells:
        for entries in ("gaussian", "rademacher"):
            for seed in settings.seeds:
                rng = numpy_generator(STUDY, f"edge {sweep} {entries} size={size} degree={expected}", seed, "matrix")
                norm = sparse_spectral_norm(sparse_matrix(size, expected, rng, entries))
                yield {
                    "seed": seed,
                    "sweep": sweep,
                    "entries": entries,
                    "size": size,
                    "degree": expected,
                    "degree_over_log": expected / math.log(size),
                    "norm": norm.value,
                    "residual": norm.residual,
                }


def edge_network_rows(settings: ConditionsSettings, this: Job) -> Iterator[Row]:
    """ReLU networks with Bernoulli masks rescaled by one over the root of the density."""
    width, depth = settings.network_width, settings.network_depth
    for expected in settings.network_degrees:
        sparsity = 1 - expected / width
        cell = f"edge network width={width} degree={expected}"
        for seeds in stacks(settings.seeds, width, depth):
            widths = [width] * (depth + 1)
            weights = gaussian_weights(widths, 2.0, generators(cell, seeds, "weights"))
            masks = bernoulli_masks(widths, sparsity, generators(cell, seeds, "mask"))
            pruned = this.put(rescale(weights, masks, "inverse_sqrt_density", sparsity=sparsity).weights)
            x = this.put([gaussian_inputs(cell, seeds, width)])[0]
            values = log_norms(pruned, x, "relu", [depth])[depth].norm[:, 0]
            yield from by_seed(seeds, width=width, depth=depth, degree=expected, log_norm=values)


def correlated_rows(settings: ConditionsSettings, this: Job) -> Iterator[Row]:
    """Correlated weights; the exponents share their Gaussian noise, so that ratios over them are paired by seed."""
    depth = settings.correlated_depth
    for width in settings.correlated_widths:
        for seeds in stacks(settings.seeds, width, depth):
            for correlation in ("equicorrelated", "row"):
                for exponent in [*settings.exponents, math.inf]:
                    for diagonal in ("linear", "surrogate", "true"):
                        cell = f"correlated {correlation} {diagonal} width={width}"
                        weights = this.put(
                            correlated_weights(
                                [width] * (depth + 1),
                                1.0 if diagonal == "linear" else 2.0,
                                generators(cell, seeds, "weights"),
                                correlation=correlation,
                                rho=float(width) ** -exponent,
                            )
                        )
                        if diagonal == "true":
                            x = this.put([gaussian_inputs(cell, seeds, width)])[0]
                            values = log_norms(weights, x, "relu", [depth])[depth].norm[:, 0]
                        else:
                            between: list[Tensor | None] = [None] * (depth - 1)
                            if diagonal == "surrogate":
                                between = this.put(
                                    surrogate_diagonals([width] * (depth - 1), generators(cell, seeds, "diagonals"))
                                )
                            values = log_product_norms(weights, [None, *between, None], [depth])[depth]
                        yield from by_seed(
                            seeds,
                            width=width,
                            depth=depth,
                            correlation=correlation,
                            diagonal=diagonal,
                            exponent=exponent,
                            log_norm=values,
                        )
