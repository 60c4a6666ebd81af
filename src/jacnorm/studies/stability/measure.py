"""Measuring step of the `stability` study: one subcommand per experiment.

``python -m jacnorm.studies.stability.measure depth --help`` documents the options. Networks are drawn on the CPU from
generators of their own and measured in float64, stacked over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.step import run
from jacnorm.studies.stability import tables as study_tables
from jacnorm.studies.stability.ensembles import (
    correlated_rows,
    edge_matrix_rows,
    edge_network_rows,
    independence_rows,
    limit_rows,
    surrogate_rows,
)
from jacnorm.studies.stability.inputs import STUDY, batches_of, load
from jacnorm.studies.stability.model import log_norms, mean_correlations
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
from jacnorm.studies.stability.stacks import Row, by_seed, gaussian_inputs, generators, stacks
from jacnorm.studies.stability.weights import gaussian_weights
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.job import Job, job


def depth(settings: DepthSettings, tables: Path, device: Device = "auto") -> None:
    """Log Jacobian norm of square networks at every recorded depth (E1, E2, E4, E10)."""
    with job(STUDY, "measure", "depth", settings, device) as this:
        rows = [row for width in settings.widths for row in _depth_rows(settings, width, this)]
        study_tables.write(tables, "depth", settings, rows, this.tracker)


def theorem(settings: TheoremSettings, tables: Path, device: Device = "auto") -> None:
    """Limit of the main theorem, surrogate diagonals, independence tests (E2, E3, E4)."""
    with job(STUDY, "measure", "theorem", settings, device) as this:
        study_tables.write(tables, "limit", settings, limit_rows(settings, this), this.tracker)
        study_tables.write(tables, "surrogate", settings, surrogate_rows(settings, this), this.tracker)
        study_tables.write(tables, "independence", settings, independence_rows(settings), this.tracker)


def conditions(settings: ConditionsSettings, tables: Path, device: Device = "auto") -> None:
    """Sparse matrices and networks near the edge, and correlated weights (E5, E8)."""
    with job(STUDY, "measure", "conditions", settings, device) as this:
        study_tables.write(tables, "edge_matrices", settings, edge_matrix_rows(settings), this.tracker)
        study_tables.write(tables, "edge_networks", settings, edge_network_rows(settings, this), this.tracker)
        study_tables.write(tables, "correlated", settings, correlated_rows(settings, this), this.tracker)


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
            for seeds in stacks(settings.seeds, width, settings.depth):
                cell = f"depth {activation} width={width} sigma_w2={sigma_w2}"
                dense = this.put(
                    gaussian_weights([width] * (settings.depth + 1), sigma_w2, generators(cell, seeds, "weights"))
                )
                x = this.put([gaussian_inputs(cell, seeds, width)])[0]

                def measured(weights: list[Tensor], **cell: Any) -> Iterator[Row]:
                    for depth, (norm, gain) in log_norms(weights, x, activation, depths).items():  # noqa: B023
                        yield from by_seed(seeds, depth=depth, log_norm=norm[:, 0], log_gain=gain[:, 0], **cell)  # noqa: B023

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
            streams = generators(cell, seeds, f"mask sparsity={sparsity}")
            masks = prune(method, dense, sparsity, generators=streams)
            for scaling in scalings[method]:
                yield method, sparsity, scaling, rescale(dense, masks, scaling, sparsity=sparsity).weights


# --- E6: scores ----------------------------------------------------------------------------------------------------


def _score_rows(settings: ScoresSettings, data: Path, this: Job) -> Iterator[Row]:
    """One-shot local masks from every score on one labelled batch per network, under every scaling, beside dense."""
    inputs = load(data)
    for depth in settings.depths:
        widths = [inputs.features, *[settings.width] * (depth - 1), inputs.classes]
        for seeds in stacks(settings.seeds, settings.width, depth * settings.inputs):
            cell = f"scores width={settings.width} depth={depth}"
            dense = this.put(gaussian_weights(widths, settings.sigma_w2, generators(cell, seeds, "weights")))
            batch, labels = this.put([*batches_of(inputs, seeds, settings.batch, "scoring")])
            x = batch[:, : settings.inputs]

            def measured(weights: list[Tensor], factors: Tensor, **cell: Any) -> Iterator[Row]:
                values = log_norms(weights, x, "relu", [depth])[depth].norm  # noqa: B023
                yield from by_seed(
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
                    streams = generators(cell, seeds, f"mask sparsity={sparsity}")
                    masks = prune(method, dense, sparsity, generators=streams, x=batch, labels=labels)
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
        columns: dict[str, Any] = dict(snapshot.cell)
        finite = torch.stack([weight.isfinite().all((1, 2)) for weight in stack]).all(0)  # (R,)
        stack = [torch.where(finite[:, None, None], weight, 0.0) for weight in stack]
        columns["log_norm"] = log_norms(stack, x, "relu", [depth])[depth].norm.mean(1)
        if "hidden_norm" in wanted:
            hidden = [weight.double() for weight in stack[1:-1]]
            norms = torch.stack([torch.linalg.matrix_norm(weight, 2) for weight in hidden])
            rows, columnwise = (torch.stack(each) for each in zip(*map(mean_correlations, hidden), strict=True))
            columns["hidden_norm"] = norms.mean(0) / settings.sigma_w2**0.5
            columns |= {"row_correlation": rows.mean(0), "column_correlation": columnwise.mean(0)}
        columns = {
            # A diverged network has no Jacobian: NaN, which no verdict passes over.
            name: torch.where(finite, value, math.nan) if isinstance(value, Tensor) else value
            for name, value in columns.items()
            if name in wanted
        }
        yield from by_seed(settings.seeds, width=settings.width, **columns)


if __name__ == "__main__":
    commands = (depth, theorem, conditions, scores, trainability, drift)
    run({command.__name__: command for command in commands})
