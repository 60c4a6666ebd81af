"""Jacobians at more and more samples, and what training does to sharpness at several widths (E8, E10).

On the cube the test samples are a dense grid over the whole support, so that the largest Jacobian norm over them stands
for the Lipschitz norm of Theorem 4.3, and the largest distance to a training sample for its delta.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.errors import UserError
from jacnorm.studies.sharpening import cube
from jacnorm.studies.sharpening import tables as study_tables
from jacnorm.studies.sharpening.curvature import Curvature, top
from jacnorm.studies.sharpening.identities import identity_errors
from jacnorm.studies.sharpening.inputs import STUDY, Inputs
from jacnorm.studies.sharpening.kernel import kernel_tops
from jacnorm.studies.sharpening.measures import Neighbours, jacobian_columns, jacobians, norms
from jacnorm.studies.sharpening.networks import Network
from jacnorm.studies.sharpening.settings import Device, ScalingSettings
from jacnorm.studies.sharpening.train_scaling import Cell, Problem, cells, load_sizes, network_of, problem
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.job import job
from jacnorm.training.snapshots import Snapshot

Row = dict[str, Any]
SIZE_COLUMNS = ("jacobian_max", "test_jacobian_max", "distance", "variation")
KERNEL_SAMPLES = 100
"""Training samples, the first ones, of the tangent kernel."""
IDENTITY_SAMPLES = 5
"""Training samples, the first ones, of the identities, for which the kernel is formed."""


@dataclass(frozen=True)
class Networks:
    """The networks of a snapshot, one per seed, on the job's device, and what they learnt."""

    cell: Cell
    seeds: list[int]
    network: Network
    parameters: dict[str, Tensor]
    problem: Problem

    @torch.no_grad()
    def losses(self, chunk: int) -> list[float]:
        """Mean cost over the training samples of each run."""
        parts = self.problem.mean_costs(self.network, self.parameters, chunk)
        return torch.stack(list(parts)).double().sum(0).tolist()

    def one(self, position: int) -> dict[str, Tensor]:
        """Parameters of one run, (1, ...)."""
        return {name: tensor[position : position + 1] for name, tensor in self.parameters.items()}


def scaling(settings: ScalingSettings, tables: Path, data: Path, weights: Path, device: Device = "auto") -> None:
    """Jacobian norms of the trained networks by sample size; sharpness and kernels before and after by width."""
    with job(STUDY, "measure", "scaling", settings, device) as this:
        inputs = load_sizes(settings, data)
        snapshots = snapshot_files.load(weights)
        _check(weights, snapshots, settings, list(cells(settings, inputs)))
        rows: dict[str, list[Row]] = {"sizes": [], "widths": [], "identities": []}
        initial = snapshots[0]
        for snapshot in snapshots:
            if snapshot.cell["stage"] == "initial":
                initial = snapshot  # of the trained networks that follow, if any of them has not diverged
                continue
            networks = _networks(settings, snapshot, inputs, this.device)
            if networks.cell.part == "widths":
                rows["widths"] += _width_rows(settings, networks, _parameters(initial, networks.seeds, this.device))
                rows["identities"] += _identity_rows(networks)
            elif networks.cell.part == "sizes":
                rows["sizes"] += _size_rows(settings, networks, inputs[networks.cell.samples])
            else:
                rows["sizes"] += _cube_rows(settings, networks)
        for name, found in rows.items():
            study_tables.write(tables, name, settings, found, this.tracker)


def _check(path: Path, snapshots: Sequence[Snapshot], settings: ScalingSettings, asked: list[Cell]) -> None:
    """Raise UserError if the weights belong to other settings."""
    for snapshot in snapshots:
        cell, seeds = _cell(snapshot), set(snapshot.cell["seeds"])
        if cell not in asked or not seeds <= set(settings.seeds):
            raise UserError(
                f"{path} holds networks ({cell}, seeds {sorted(seeds)}) that the settings do not name; train again "
                "with these settings"
            )


def _cell(snapshot: Snapshot) -> Cell:
    return Cell(**{field.name: snapshot.cell[field.name] for field in fields(Cell)})


def _networks(
    settings: ScalingSettings, snapshot: Snapshot, inputs: Mapping[int | None, Inputs], device: torch.device
) -> Networks:
    cell, seeds = _cell(snapshot), snapshot.cell["seeds"]
    learnt = problem(settings, cell, seeds, inputs).to(device)
    network = network_of(settings, cell, learnt.image, learnt.outputs)
    return Networks(cell, seeds, network, _parameters(snapshot, seeds, device), learnt)


def _parameters(snapshot: Snapshot, seeds: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Parameters of some of a snapshot's seeds."""
    rows = torch.tensor([snapshot.cell["seeds"].index(seed) for seed in seeds])
    return {name: tensor[rows].to(device) for name, tensor in snapshot.tensors.items()}


# --- sample sizes ----------------------------------------------------------------------------------------------------


def _size_rows(settings: ScalingSettings, networks: Networks, inputs: Inputs) -> Iterator[Row]:
    """Jacobian norms over training and test samples of the data set."""
    x = networks.problem.x
    test = inputs.test_x[: settings.jacobian_samples].to(x)
    neighbours = Neighbours.of(x[: settings.jacobian_samples], test)
    found = jacobian_columns(networks.network, networks.parameters, {}, neighbours, chunk=settings.chunk)
    columns = {name: values.tolist() for name, values in found.items() if name in SIZE_COLUMNS}
    for position, (seed, loss) in enumerate(zip(networks.seeds, networks.losses(settings.chunk), strict=True)):
        own = {name: values[position] for name, values in columns.items()}
        yield {"seed": seed, "data_set": inputs.name, "samples": networks.cell.samples, "train_loss": loss, **own}


def _cube_rows(settings: ScalingSettings, networks: Networks) -> Iterator[Row]:
    """The same on the cube, where every seed has samples of its own, and all of them count."""
    grid = cube.grid(settings.dimension).to(networks.problem.x)
    for position, (seed, loss) in enumerate(zip(networks.seeds, networks.losses(settings.chunk), strict=True)):
        neighbours = Neighbours.of(networks.problem.x[position], grid)
        found = jacobian_columns(networks.network, networks.one(position), {}, neighbours, chunk=settings.chunk)
        own = {name: values.item() for name, values in found.items() if name in SIZE_COLUMNS}
        own["distance"] = neighbours.distance.max().item()
        yield {"seed": seed, "data_set": cube.NAME, "samples": networks.cell.samples, "train_loss": loss, **own}


# --- widths ----------------------------------------------------------------------------------------------------------


def _width_rows(settings: ScalingSettings, networks: Networks, initial: dict[str, Tensor]) -> Iterator[Row]:
    """Sharpness and Jacobian norms before and after training, and the first layer's share of the kernel after it."""
    columns: dict[str, Tensor] = {}
    converged = torch.ones(len(networks.seeds), dtype=torch.bool)
    for moment, parameters in (("start", initial), ("end", networks.parameters)):
        sharpness = top(_curvature(settings, networks, parameters), "hessian")
        converged &= sharpness.converged
        columns[f"sharpness_{moment}"] = sharpness.values
        columns[f"jacobian_{moment}"] = _largest_jacobian(settings, networks, parameters)
    whole, layers = kernel_tops(networks.network, networks.parameters, networks.problem.x[:KERNEL_SAMPLES])
    columns |= {"sharpness_converged": converged, "first_layer_share": layers[:, 0] / whole}
    values = {name: tensor.tolist() for name, tensor in columns.items()}
    for position, seed in enumerate(networks.seeds):
        cell = {"width": networks.cell.width, "parametrisation": networks.cell.parametrisation}
        yield {"seed": seed, **cell, **{name: each[position] for name, each in values.items()}}


def _curvature(settings: ScalingSettings, networks: Networks, parameters: dict[str, Tensor]) -> Curvature:
    count, runs = settings.curvature_samples, len(networks.seeds)
    x, y = networks.problem.x[:count], networks.problem.answers[:count]
    return Curvature(networks.network, parameters, {}, x, y, ["square"] * runs, torch.zeros(runs), settings.chunk)


def _largest_jacobian(settings: ScalingSettings, networks: Networks, parameters: dict[str, Tensor]) -> Tensor:
    """Largest Jacobian norm over the training samples, (R,) float64."""
    parts = networks.problem.x[: settings.jacobian_samples].split(settings.chunk)
    found = [norms(jacobians(networks.network, parameters, {}, part)).amax(1) for part in parts]
    return torch.stack(found).amax(0)


def _identity_rows(networks: Networks) -> Iterator[Row]:
    """Errors of the identities about the first layer after training, in float64."""
    errors = identity_errors(networks.network, networks.parameters, networks.problem.x[:IDENTITY_SAMPLES])
    values = {name: each.tolist() for name, each in errors.items()}
    for position, seed in enumerate(networks.seeds):
        cell = {"width": networks.cell.width, "parametrisation": networks.cell.parametrisation}
        yield {"seed": seed, **cell, **{name: each[position] for name, each in values.items()}}
