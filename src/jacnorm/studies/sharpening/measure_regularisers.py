"""Curvature, Jacobians and fit of the networks that the arms of the regularisers' experiments kept (E4-E7).

Every network is measured on the plain training samples with plain cross-entropy, whatever it was trained on, and in
evaluation mode, with batch norm's statistics taken anew from all training samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.errors import UserError
from jacnorm.studies.sharpening import tables as study_tables
from jacnorm.studies.sharpening.curvature import Curvature, top
from jacnorm.studies.sharpening.inputs import STUDY, Inputs, load_all
from jacnorm.studies.sharpening.measures import Neighbours, fit_columns, jacobian_columns, refresh
from jacnorm.studies.sharpening.networks import Network, build
from jacnorm.studies.sharpening.settings import Device, RegulariserSettings
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.checkpoint import unpack
from jacnorm.training.job import job
from jacnorm.training.progress import Progress
from jacnorm.training.snapshots import Snapshot

MEASURED_TOGETHER = 16
"""Most networks that are measured in one stack."""
START_NOISE = 0.3
"""Length of the random part of Lanczos' start with the Gauss-Newton matrix, over that of the Hessian's eigenvector.

The two top eigenvectors are nearly the same, which saves products; the random part is there to be drawn to any larger
eigenvalue elsewhere.
"""


@dataclass(frozen=True)
class Kept:
    """One kept network: the columns of its run, the rules that kept it, after how many updates, and its tensors."""

    columns: dict[str, Any]
    rules: list[str]
    step: int
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, snapshot: Snapshot) -> Iterator[Kept]:
        """The networks of a snapshot, run by run."""
        for position, entry in enumerate(snapshot.cell["runs"]):
            tensors = {name: tensor[position] for name, tensor in snapshot.tensors.items()}
            yield cls(entry["columns"], entry["rules"], entry["step"], tensors)


def regularisers(
    settings: RegulariserSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto"
) -> None:
    """Measure the networks that training with one regulariser at a time kept."""
    with job(STUDY, "measure", "regularisers", settings, device) as this:
        rows: list[dict[str, Any]] = []
        cells = _cells(snapshot_files.load(weights))
        for (data_set, network, seed), kept in cells.items():
            if data_set not in settings.data_sets or network not in settings.networks or seed not in settings.seeds:
                raise UserError(
                    f"{weights} holds {network} on {data_set} of seed {seed}, which the settings do not name; train "
                    "again with these settings"
                )
            inputs = {each.name: each for each in load_all(data, settings, seed)}
            instrument = Instrument(settings, inputs[data_set], network, this.device)
            size = min(MEASURED_TOGETHER, settings.runs_together)
            with Progress(len(kept), f"{data_set}, {network}, seed {seed}", unit="networks") as progress:
                for start in range(0, len(kept), size):
                    rows += instrument.measure(kept[start : start + size])
                    progress.update(min(start + size, len(kept)))
        study_tables.write(tables, "endpoints", settings, rows, this.tracker)


def _cells(snapshots: Sequence[Snapshot]) -> dict[tuple[str, str, int], list[Kept]]:
    """The kept networks of each data set, architecture and seed."""
    found: dict[tuple[str, str, int], list[Kept]] = {}
    for snapshot in snapshots:
        for kept in Kept.of(snapshot):
            cell = (snapshot.cell["data_set"], snapshot.cell["network"], kept.columns["seed"])
            found.setdefault(cell, []).append(kept)
    return found


class Instrument:
    """Measures networks of one architecture on one data set."""

    def __init__(self, settings: RegulariserSettings, inputs: Inputs, network: str, device: torch.device) -> None:
        self._settings, self._inputs, self._device = settings, inputs, device
        self._network: Network = build(settings, network, inputs.image, inputs.classes)
        self._x, self._y = inputs.train_x.to(device), inputs.train_y.to(device)
        count = settings.jacobian_samples
        self._neighbours = Neighbours.of(self._x[:count], inputs.test_x[:count].to(device))

    def measure(self, kept: Sequence[Kept]) -> Iterator[dict[str, Any]]:
        """Rows of the table of end points: for each network, one for each of its rules."""
        tensors = {name: torch.stack([each.tensors[name] for each in kept]) for name in kept[0].tensors}
        tensors = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        parameters = unpack(tensors, "parameter")
        chunk = self._settings.chunk
        buffers = refresh(self._network, parameters, unpack(tensors, "statistic"), self._x, chunk)
        square = torch.zeros(len(kept), dtype=torch.bool, device=self._device)
        smoothing = torch.zeros(len(kept), device=self._device)
        columns = {
            **fit_columns(self._network, parameters, buffers, self._inputs, square, smoothing, chunk=chunk),
            **self._curvature(parameters, buffers, smoothing),
            **jacobian_columns(self._network, parameters, buffers, self._neighbours, chunk=chunk),
        }
        values = {name: column.tolist() for name, column in columns.items()}
        for position, each in enumerate(kept):
            own = {name: column[position] for name, column in values.items()}
            for rule in each.rules:
                yield {**each.columns, "rule": rule, "step": each.step, **own}

    def _curvature(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], smoothing: Tensor
    ) -> dict[str, Tensor]:
        """Largest eigenvalues of the Hessian and of the Gauss-Newton matrix, and the cost's curvature."""
        count = self._settings.curvature_samples
        curvature = Curvature(
            self._network,
            parameters,
            buffers,
            self._x[:count],
            self._y[:count],
            ["cross-entropy"] * len(smoothing),
            smoothing,
            self._settings.chunk,
        )
        hessian = top(curvature, "hessian")
        gauss_newton = top(curvature, "gauss-newton", near(curvature, hessian.vectors))
        norms = curvature.cost_hessian_norms()  # (R, N)
        columns = {"cost_hessian_max": norms.amax(1), "cost_hessian_mean": norms.mean(1)}
        for name, found in (("sharpness", hessian), ("gauss_newton", gauss_newton)):
            columns |= {
                name: found.values,
                f"{name}_residual": found.residuals / found.values.abs(),
                f"{name}_converged": found.converged,
            }
        return columns


def near(curvature: Curvature, vectors: Tensor) -> Tensor:
    """Unit vectors (R, p) with a random part of length START_NOISE added."""
    noise = torch.nn.functional.normalize(curvature.random_start(), dim=1)
    return vectors + START_NOISE * noise
