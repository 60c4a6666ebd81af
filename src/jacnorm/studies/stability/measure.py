"""Measuring step of the `stability` study: one subcommand per experiment.

``python -m jacnorm.studies.stability.measure depth --help`` documents the options. Networks are drawn on the CPU from
generators of their own and measured in float64, stacked over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor

from jacnorm.nets.mlp import forward
from jacnorm.step import run
from jacnorm.studies.stability import snapshots as snapshot_files
from jacnorm.studies.stability import tables as study_tables
from jacnorm.studies.stability import theory
from jacnorm.studies.stability.inputs import STUDY, batches_of, load
from jacnorm.studies.stability.model import log_norms, log_product_norms, mean_correlations
from jacnorm.studies.stability.pruning import prune, rescale
from jacnorm.studies.stability.settings import (
    ConditionsSettings,
    DepthSettings,
    Device,
    DriftSettings,
    ScoresSettings,
    TheoremSettings,
    TrainabilitySettings,
)
from jacnorm.studies.stability.weights import (
    bernoulli_masks,
    correlated_weights,
    degree,
    gaussian_weights,
    sparse_matrix,
    sparse_spectral_norm,
    surrogate_diagonals,
)
from jacnorm.training.job import Job, job
from jacnorm.training.seeds import generator, numpy_generator

Row = dict[str, Any]
STACK_BYTES = 2**29
"""Weights held at once; larger blocks of seeds are measured in several stacks, which changes no result."""


def depth(settings: DepthSettings, tables: Path, device: Device = "auto") -> None:
    """Log Jacobian norm of square networks at every recorded depth (E1, E2, E4, E10)."""
    with job(STUDY, "measure", "depth", settings, device) as this:
        rows = [row for width in settings.widths for row in _depth_rows(settings, width, this)]
        study_tables.write(tables, "depth", settings, rows, this.tracker)


def theorem(settings: TheoremSettings, tables: Path, device: Device = "auto") -> None:
    """Limit of the main theorem, surrogate diagonals, independence tests (E2, E3, E4)."""
    with job(STUDY, "measure", "theorem", settings, device) as this:
        study_tables.write(tables, "limit", settings, _limit_rows(settings, this), this.tracker)
        study_tables.write(tables, "surrogate", settings, _surrogate_rows(settings, this), this.tracker)
        study_tables.write(tables, "independence", settings, _independence_rows(settings), this.tracker)


def conditions(settings: ConditionsSettings, tables: Path, device: Device = "auto") -> None:
    """Sparse matrices and networks near the edge, and correlated weights (E5, E8)."""
    with job(STUDY, "measure", "conditions", settings, device) as this:
        study_tables.write(tables, "edge_matrices", settings, _edge_matrix_rows(settings), this.tracker)
        study_tables.write(tables, "edge_networks", settings, _edge_network_rows(settings, this), this.tracker)
        study_tables.write(tables, "correlated", settings, _correlated_rows(settings, this), this.tracker)


def scores(settings: ScoresSettings, tables: Path, data: Path, device: Device = "auto") -> None:
    """Input-output Jacobian after pruning by each score under each scaling (E6)."""
    with job(STUDY, "measure", "scores", settings, device) as this:
        study_tables.write(tables, "scores", settings, _score_rows(settings, data, this), this.tracker)


def trainability(
    settings: TrainabilitySettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto"
) -> None:
    """Jacobian norm at the start of each training run of E7."""
    with job(STUDY, "measure", "trainability", settings, device) as this:
        rows = _snapshot_rows(settings, data, weights, this, wanted=study_tables.COLUMNS["start"])
        study_tables.write(tables, "start", settings, rows, this.tracker)


def drift(settings: DriftSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto") -> None:
    """Jacobian norm, layer norms and weight correlations while dense networks train (E9)."""
    with job(STUDY, "measure", "drift", settings, device) as this:
        rows = _snapshot_rows(settings, data, weights, this, wanted=study_tables.COLUMNS["drift"])
        study_tables.write(tables, "drift", settings, rows, this.tracker)


# --- E1, E2, E4, E10: depth ----------------------------------------------------------------------------------------

CRITICAL = {"relu": 2.0, "tanh": 1.0}


def _depth_rows(settings: DepthSettings, width: int, this: Job) -> Iterator[Row]:
    """Dense networks over the weight variances; pruned ones at the critical variance share their weights."""
    depths = sorted({1, settings.depth, *range(settings.record_every, settings.depth + 1, settings.record_every)})
    for activation, variances in (("relu", settings.relu_sigma_w2), ("tanh", settings.tanh_sigma_w2)):
        for sigma_w2 in sorted({*variances, CRITICAL[activation]}):
            for seeds in _stacks(settings.seeds, width, settings.depth):
                cell = f"depth {activation} width={width} sigma_w2={sigma_w2}"
                generators = _generators(cell, seeds, "weights")
                dense = this.put(gaussian_weights([width] * (settings.depth + 1), sigma_w2, generators))
                x = this.put([_gaussian_inputs(cell, seeds, width)])[0]

                def measured(weights: list[Tensor], **cell: Any) -> Iterator[Row]:
                    for depth, (norm, gain) in log_norms(weights, x, activation, depths).items():  # noqa: B023
                        yield from _by_seed(seeds, depth=depth, log_norm=norm[:, 0], log_gain=gain[:, 0], **cell)  # noqa: B023

                common = {"activation": activation, "width": width, "sigma_w2": sigma_w2}
                yield from measured(dense, **common, method="dense", sparsity=0.0, scaling="none")
                if sigma_w2 == CRITICAL[activation]:
                    for method, sparsity, scaling, pruned in _pruned(
                        dense, settings.sparsities, activation, cell, seeds
                    ):
                        yield from measured(pruned, **common, method=method, sparsity=sparsity, scaling=scaling)


def _pruned(
    dense: list[Tensor], sparsities: list[float], activation: str, cell: str, seeds: Sequence[int]
) -> Iterator[tuple[str, float, str, list[Tensor]]]:
    """Random and, for ReLU, magnitude masks, each without scaling and with the factors that the theory names."""
    scalings = {"random": ["none", "inverse_sqrt_density"], "magnitude": ["none", "inverse_sqrt_density", "alpha_mag"]}
    for method in ["random", "magnitude"] if activation == "relu" else ["random"]:
        for sparsity in sparsities:
            generators = _generators(cell, seeds, f"mask sparsity={sparsity}")
            masks = prune(method, dense, sparsity, generators=generators)
            for scaling in scalings[method]:
                yield method, sparsity, scaling, rescale(dense, masks, scaling, sparsity=sparsity).weights


# --- E2, E3, E4: the theorem ---------------------------------------------------------------------------------------


RECTANGLE = (784, 10)
"""Inputs and outputs of the rectangular products: those of a classifier of MNIST."""


def _limit_rows(settings: TheoremSettings, this: Job) -> Iterator[Row]:
    """Critical products with independent Bernoulli diagonals between the factors, by their ends and by their shape.

    The square products of one seed share weights and diagonals; the linear one has no diagonals and variance 1/n.
    """
    deepest = max(settings.limit_depths)
    for width in settings.limit_widths:
        cell = f"limit width={width}"
        for seeds in _stacks(settings.seeds, width, deepest):
            weights = this.put(gaussian_weights([width] * (deepest + 1), 2.0, _generators(cell, seeds, "weights")))
            diagonals = this.put(surrogate_diagonals([width] * (deepest + 1), _generators(cell, seeds, "diagonals")))
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
                    yield from _by_seed(
                        seeds, product=product, width=width, depth=depth, log_norm=values, log_limit=limit
                    )
                if depth > 1:
                    widths = [RECTANGLE[0], *[width] * (depth - 1), RECTANGLE[1]]
                    factors = this.put(
                        gaussian_weights(widths, 2.0, _generators(f"{cell} {depth}", seeds, "rectangle"))
                    )
                    values = log_product_norms(factors, [None, *between, None], [depth])[depth]
                    limit = theory.log_network_norm(widths)
                    yield from _by_seed(
                        seeds, product="rectangular", width=width, depth=depth, log_norm=values, log_limit=limit
                    )


def _log_limit(product: str, width: int, depth: int) -> float:
    if product == "linear":
        return theory.log_gamma_m(depth)
    return theory.log_relu_limit(depth, {"both ends": "both", "one end": "one", "no end": "none"}[product])


def _surrogate_rows(settings: TheoremSettings, this: Job) -> Iterator[Row]:
    """True ReLU diagonals against independent Bernoulli ones, separate networks for each."""
    width, depth, sparsity = settings.surrogate_width, settings.surrogate_depth, settings.surrogate_sparsity
    for draw in range(settings.surrogate_draws_per_seed):
        for method in ("dense", "random", "magnitude"):
            for diagonal in ("true", "surrogate"):
                cell = f"surrogate {diagonal} {method} draw={draw}"
                for seeds in _stacks(settings.seeds, width, depth):
                    weights = gaussian_weights([width] * (depth + 1), 2.0, _generators(cell, seeds, "weights"))
                    if method != "dense":
                        masks = prune(method, weights, sparsity, generators=_generators(cell, seeds, "mask"))
                        weights = rescale(weights, masks, "frobenius").weights
                    weights = this.put(weights)
                    if diagonal == "true":
                        x = this.put([_gaussian_inputs(cell, seeds, width)])[0]
                        values = log_norms(weights, x, "relu", [depth])[depth].norm[:, 0]
                    else:
                        between = surrogate_diagonals([width] * (depth - 1), _generators(cell, seeds, "diagonals"))
                        values = log_product_norms(weights, [None, *this.put(between), None], [depth])[depth]
                    yield from _by_seed(seeds, draw=draw, method=method, diagonal=diagonal, log_norm=values)


def _independence_rows(settings: TheoremSettings) -> Iterator[Row]:
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
                x = _gaussian_inputs(cell, [seed], width)[0]  # (1, width), the same input for all networks
                rng = generator(STUDY, cell, seed, "weights")
                pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
                for count in _counts(networks, width, 3):
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


# --- E5, E8: conditions --------------------------------------------------------------------------------------------


def _edge_matrix_rows(settings: ConditionsSettings) -> Iterator[Row]:
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


def _edge_network_rows(settings: ConditionsSettings, this: Job) -> Iterator[Row]:
    """ReLU networks with Bernoulli masks rescaled by one over the root of the density."""
    width, depth = settings.network_width, settings.network_depth
    for expected in settings.network_degrees:
        sparsity = 1 - expected / width
        cell = f"edge network width={width} degree={expected}"
        for seeds in _stacks(settings.seeds, width, depth):
            widths = [width] * (depth + 1)
            weights = gaussian_weights(widths, 2.0, _generators(cell, seeds, "weights"))
            masks = bernoulli_masks(widths, sparsity, _generators(cell, seeds, "mask"))
            pruned = this.put(rescale(weights, masks, "inverse_sqrt_density", sparsity=sparsity).weights)
            x = this.put([_gaussian_inputs(cell, seeds, width)])[0]
            values = log_norms(pruned, x, "relu", [depth])[depth].norm[:, 0]
            yield from _by_seed(seeds, width=width, depth=depth, degree=expected, log_norm=values)


def _correlated_rows(settings: ConditionsSettings, this: Job) -> Iterator[Row]:
    """Correlated weights; the exponents share their Gaussian noise, so that ratios over them are paired by seed."""
    depth = settings.correlated_depth
    for width in settings.correlated_widths:
        for seeds in _stacks(settings.seeds, width, depth):
            for correlation in ("equicorrelated", "row"):
                for exponent in [*settings.exponents, math.inf]:
                    for diagonal in ("linear", "surrogate", "true"):
                        cell = f"correlated {correlation} {diagonal} width={width}"
                        weights = this.put(
                            correlated_weights(
                                [width] * (depth + 1),
                                1.0 if diagonal == "linear" else 2.0,
                                _generators(cell, seeds, "weights"),
                                correlation=correlation,
                                rho=float(width) ** -exponent,
                            )
                        )
                        if diagonal == "true":
                            x = this.put([_gaussian_inputs(cell, seeds, width)])[0]
                            values = log_norms(weights, x, "relu", [depth])[depth].norm[:, 0]
                        else:
                            between: list[Tensor | None] = [None] * (depth - 1)
                            if diagonal == "surrogate":
                                between = this.put(
                                    surrogate_diagonals([width] * (depth - 1), _generators(cell, seeds, "diagonals"))
                                )
                            values = log_product_norms(weights, [None, *between, None], [depth])[depth]
                        yield from _by_seed(
                            seeds,
                            width=width,
                            depth=depth,
                            correlation=correlation,
                            diagonal=diagonal,
                            exponent=exponent,
                            log_norm=values,
                        )


# --- E6: scores ----------------------------------------------------------------------------------------------------


def _score_rows(settings: ScoresSettings, data: Path, this: Job) -> Iterator[Row]:
    """One-shot local masks from every score on one labelled batch per network, under every scaling, beside dense."""
    inputs = load(data)
    for depth in settings.depths:
        widths = [inputs.features, *[settings.width] * (depth - 1), inputs.classes]
        for seeds in _stacks(settings.seeds, settings.width, depth * settings.inputs):
            cell = f"scores width={settings.width} depth={depth}"
            dense = this.put(gaussian_weights(widths, settings.sigma_w2, _generators(cell, seeds, "weights")))
            batch, labels = this.put([*batches_of(inputs, seeds, settings.batch, "scoring")])
            x = batch[:, : settings.inputs]

            def measured(weights: list[Tensor], factors: Tensor, **cell: Any) -> Iterator[Row]:
                values = log_norms(weights, x, "relu", [depth])[depth].norm  # noqa: B023
                yield from _by_seed(
                    seeds,  # noqa: B023
                    depth=depth,  # noqa: B023
                    log_norm=values.mean(1),
                    dead=values.isneginf().double().mean(1),
                    factor=factors[:, 1:-1].mean(1),
                    **cell,
                )

            ones = torch.ones(len(seeds), depth, dtype=torch.float64)
            yield from measured(dense, ones, method="dense", sparsity=0.0, scaling="none")
            for sparsity in settings.sparsities:
                for method in settings.methods:
                    generators = _generators(cell, seeds, f"mask sparsity={sparsity}")
                    masks = prune(method, dense, sparsity, generators=generators, x=batch, labels=labels)
                    for scaling in settings.scalings:
                        pruned = rescale(dense, masks, scaling, sparsity=sparsity, x=batch)
                        yield from measured(*pruned, method=method, sparsity=sparsity, scaling=scaling)


# --- E7, E9: trained networks --------------------------------------------------------------------------------------

MEASURED_INPUTS = 8


def _snapshot_rows(
    settings: TrainabilitySettings | DriftSettings,
    data: Sequence[Path],
    weights: Path,
    this: Job,
    wanted: Collection[str],
) -> Iterator[Row]:
    """Measure every stack of weights that the training step kept; `wanted` are the columns of the table to fill."""
    inputs = {}
    for path in data:
        loaded = load(path, settings.train_samples)
        inputs[loaded.name] = this.put([batches_of(loaded, settings.seeds, MEASURED_INPUTS, "measured")[0]])[0]
    for snapshot in snapshot_files.load(weights):
        stack = this.put(snapshot.weights)
        x = inputs[snapshot.cell["data_set"]]
        depth = len(stack)
        columns: dict[str, Any] = {**snapshot.cell, "epoch": snapshot.epoch}
        columns["log_norm"] = log_norms(stack, x, "relu", [depth])[depth].norm.mean(1)
        if "hidden_norm" in wanted:
            hidden = [weight.double() for weight in stack[1:-1]]
            norms = torch.stack([torch.linalg.matrix_norm(weight, 2) for weight in hidden])
            rows, columnwise = (torch.stack(each) for each in zip(*map(mean_correlations, hidden), strict=True))
            columns["hidden_norm"] = norms.mean(0) / settings.sigma_w2**0.5
            columns |= {"row_correlation": rows.mean(0), "column_correlation": columnwise.mean(0)}
        columns = {name: value for name, value in columns.items() if name in wanted}
        yield from _by_seed(settings.seeds, width=settings.width, **columns)


# --- shared --------------------------------------------------------------------------------------------------------


def _stacks(seeds: Sequence[int], width: int, layers: int) -> Iterator[list[int]]:
    """Consecutive seeds whose weights fit into STACK_BYTES together, at least one."""
    rest = list(seeds)
    for count in _counts(len(seeds), width, layers):
        yield rest[:count]
        rest = rest[count:]


def _counts(networks: int, width: int, layers: int) -> Iterator[int]:
    """Sizes of stacks that together hold `networks` networks and each fit into STACK_BYTES."""
    size = max(1, STACK_BYTES // (8 * layers * width**2))
    for start in range(0, networks, size):
        yield min(size, networks - start)


def _generators(cell: str, seeds: Sequence[int], purpose: str) -> list[torch.Generator]:
    return [generator(STUDY, cell, seed, purpose) for seed in seeds]


def _gaussian_inputs(cell: str, seeds: Sequence[int], width: int) -> Tensor:
    """One standard Gaussian input per seed, (R, 1, width)."""
    draws = [torch.randn(1, width, generator=g, dtype=torch.float64) for g in _generators(cell, seeds, "input")]
    return torch.stack(draws)


def _by_seed(seeds: Sequence[int], **columns: Any) -> Iterator[Row]:
    """One row per seed; tensors of shape (R,) are taken apart, other values repeated."""
    columns = {name: value.cpu().tolist() if isinstance(value, Tensor) else value for name, value in columns.items()}
    for index, seed in enumerate(seeds):
        yield {
            "seed": seed,
            **{name: value[index] if isinstance(value, list) else value for name, value in columns.items()},
        }


if __name__ == "__main__":
    commands = (depth, theorem, conditions, scores, trainability, drift)
    run({command.__name__: command for command in commands})
