"""Curvature, Jacobians, kernels and slopes along full-batch gradient descent (E1-E3, E9).

The seeds of one cost and step size are measured together, checkpoint by checkpoint: Lanczos takes as many steps as the
slowest of its runs, and runs of one cost and step size are alike. On the digits this halved the time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.errors import UserError
from jacnorm.studies.sharpening import tables as study_tables
from jacnorm.studies.sharpening.costs import squares
from jacnorm.studies.sharpening.curvature import Curvature, top
from jacnorm.studies.sharpening.inputs import STUDY, Inputs, load_all
from jacnorm.studies.sharpening.kernel import kernel_tops
from jacnorm.studies.sharpening.measures import Neighbours, Pairs, fit_columns, jacobian_columns, refresh, slopes
from jacnorm.studies.sharpening.networks import Mlp, Network, build
from jacnorm.studies.sharpening.settings import DescentSettings, Device, ImageSettings
from jacnorm.studies.sharpening.train_descent import Run
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.job import job
from jacnorm.training.progress import Progress
from jacnorm.training.snapshots import Snapshot

Row = dict[str, Any]
TOLERANCE = 2e-3
"""Residual, over its value, at which an eigenvalue has converged.

The error of the value is of the order of the residual squared: in pilots at most 3e-4 of it, at six sevenths of the
products that 1e-3 takes; at 1e-2 nearly equal eigenvalues were confused, with errors up to 4e-2.
"""
NOISE = 0.1
"""Length of what is added to a unit start: an eigenvector alone would never see another one that overtook it."""
PRODUCT = 2.0
"""Gradients that a product with the Hessian or the Gauss-Newton matrix is counted as."""
JACOBIAN_ROW = 0.5
"""Gradients that one row of a sample's Jacobian is counted as, per sample."""


def descent(settings: DescentSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto") -> None:
    """Measure the networks that full-batch gradient descent went through."""
    _measure(settings, "descent", tables, data, weights, device)


def images(settings: ImageSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto") -> None:
    """Measure the networks that full-batch gradient descent went through on larger images."""
    _measure(settings, "images", tables, data, weights, device)


def _measure(
    settings: DescentSettings, command: str, tables: Path, data: Sequence[Path], weights: Path, device: Device
) -> None:
    with job(STUDY, "measure", command, settings, device) as this:
        samples = {each.name: Samples.of(each, settings, this.device) for each in load_all(data, settings)}
        rows: dict[str, list[Row]] = {name: [] for name in ("trajectory", "layer_kernels", "measuring_cost")}
        for _, group in itertools.groupby(snapshot_files.load(weights), key=lambda each: each.cell["stack"]):
            snapshots = list(group)
            cell = snapshots[0].cell
            stack = Stack(settings, samples, snapshots[0], weights, this.device)
            label = f"{cell['data_set']}, {cell['network']}, stack {cell['stack']}"
            with Progress(len(snapshots), label, unit="checkpoints") as progress:
                for done, snapshot in enumerate(snapshots, start=1):
                    stack.measure(snapshot, rows)
                    progress.update(done)
            rows["measuring_cost"] += stack.spent()
        for name, table in rows.items():
            whole_name = f"image_{name}" if command == "images" else name
            study_tables.write(tables, whole_name, settings, table, this.tracker)


@dataclass(frozen=True)
class Samples:
    """What is measured on: all training samples x, y on the job's device, and what depends on samples alone.

    curved: number of samples over which curvature is measured.
    """

    inputs: Inputs
    x: Tensor
    y: Tensor
    curved: int
    pairs: Pairs
    neighbours: Neighbours

    @classmethod
    def of(cls, inputs: Inputs, settings: DescentSettings, device: torch.device) -> Samples:
        """Take distances between samples, once for all checkpoints."""
        x, y = inputs.train_x.to(device), inputs.train_y.to(device)
        test = inputs.test_x[: settings.jacobian_samples].to(device)
        neighbours = Neighbours.of(x[: settings.jacobian_samples], test)
        return cls(inputs, x, y, min(settings.curvature_samples, len(y)), Pairs.of(x), neighbours)


@dataclass
class Spent:
    """What one run has cost so far, in gradients of the whole training set."""

    training: int = 0
    curvature: float = 0.0
    jacobians: float = 0.0
    vector: Tensor | None = field(default=None, repr=False)
    """The Hessian's top eigenvector at the run's last checkpoint, (p,), with which the next one starts."""


@dataclass(frozen=True)
class Networks:
    """Runs of one cost and step size at one checkpoint, on the job's device. square: (R,) bool; smoothing: (R,)."""

    runs: list[Run]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    square: Tensor
    smoothing: Tensor

    def rows(self, **columns: Tensor | float) -> Iterator[Row]:
        """One row per network; tensors are (R,)."""
        values = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in columns.items()}
        for position, run in enumerate(self.runs):
            own = {name: value[position] if isinstance(value, list) else value for name, value in values.items()}
            yield {**run.columns, **own}


class Stack:
    """Measures the checkpoints of one stack, in the order of steps."""

    def __init__(
        self,
        settings: DescentSettings,
        samples: Mapping[str, Samples],
        first: Snapshot,
        weights: Path,
        device: torch.device,
    ) -> None:
        """Check that the first snapshot is of networks that the settings name.

        Raises UserError if its data set, network or shapes are others.
        """
        data_set, name = first.cell["data_set"], first.cell["network"]
        self._settings, self._device = settings, device
        self._spent: dict[Run, Spent] = {}
        if data_set in samples and name in settings.networks:
            self._samples = samples[data_set]
            inputs = self._samples.inputs
            self._network: Network = build(settings, name, inputs.image, inputs.classes)
            shapes = {each: tensor.shape[1:] for each, tensor in first.tensors.items()}
            if shapes == self._network.shapes:
                return
        raise UserError(
            f"{weights} holds networks ({name} on {data_set}) of other settings; run the training step again with these"
        )

    def measure(self, snapshot: Snapshot, rows: dict[str, list[Row]]) -> None:
        """Add the rows of one checkpoint, a run each, to the tables `trajectory` and `layer_kernels`."""
        step = snapshot.cell["step"]
        for networks in self._networks(snapshot):
            for run in networks.runs:
                self._spent.setdefault(run, Spent()).training = step
            kernel, layers = self._kernels(networks)
            for layer, tops in enumerate(layers.unbind(1), start=1):
                rows["layer_kernels"] += networks.rows(step=step, layer=layer, kernel_top=tops)
            rows["trajectory"] += networks.rows(
                step=step,
                **self._fit(networks),
                **self._curvature(networks),
                **self._jacobians(networks),
                **self._slopes(networks),
                threshold=2 / networks.runs[0].arm.learning_rate,
                kernel_top=kernel,
            )

    def _networks(self, snapshot: Snapshot) -> Iterator[Networks]:
        """The runs of a checkpoint, those of one cost and step size together.

        The statistics of batch norm, if any, are taken from all training samples.
        """
        runs = [Run.of(columns) for columns in snapshot.cell["runs"]]
        start = 0
        for arm, group in itertools.groupby(runs, key=lambda run: run.arm):
            members = list(group)
            part = slice(start, start + len(members))
            start += len(members)
            parameters = {name: tensor[part].to(self._device) for name, tensor in snapshot.tensors.items()}
            buffers = {name: tensor.to(self._device) for name, tensor in self._network.buffers(len(members)).items()}
            if self._network.has_batch_norm:
                buffers = refresh(self._network, parameters, buffers, self._samples.x, self._settings.chunk)
            smoothing = torch.full((len(members),), arm.smoothing, device=self._device)
            yield Networks(members, parameters, buffers, squares([arm.cost] * len(members), self._device), smoothing)

    def _fit(self, networks: Networks) -> dict[str, Tensor]:
        """Costs and accuracies over all training and test samples."""
        return fit_columns(
            self._network,
            networks.parameters,
            networks.buffers,
            self._samples.inputs,
            networks.square,
            networks.smoothing,
            chunk=self._settings.chunk,
        )

    def _curvature(self, networks: Networks) -> dict[str, Tensor]:
        """Largest eigenvalues of the Hessian and of the Gauss-Newton matrix, and norms of the cost's Hessians."""
        count = self._samples.curved
        curvature = Curvature(
            self._network,
            networks.parameters,
            networks.buffers,
            self._samples.x[:count],
            self._samples.y[:count],
            [run.arm.cost for run in networks.runs],
            networks.smoothing,
            self._settings.chunk,
        )
        start, spent_on_it = self._start(curvature, networks.runs)
        hessian = top(curvature, "hessian", start, rtol=TOLERANCE)
        near = hessian.vectors + NOISE * _unit(curvature.random_start())
        gauss_newton = top(curvature, "gauss-newton", near, rtol=TOLERANCE)
        products = spent_on_it + hessian.products + gauss_newton.products
        for run, vector, spent in zip(networks.runs, hessian.vectors, products.tolist(), strict=True):
            self._spent[run].vector = vector
            # The graph that all products share is that of one gradient.
            self._spent[run].curvature += (1 + PRODUCT * spent) * count / len(self._samples.y)
        norms = curvature.cost_hessian_norms()  # (R, N)
        return {
            "sharpness": hessian.values,
            "sharpness_residual": hessian.residuals / hessian.values.abs(),
            "sharpness_converged": hessian.converged,
            "gauss_newton": gauss_newton.values,
            "gauss_newton_residual": gauss_newton.residuals / gauss_newton.values.abs(),
            "gauss_newton_converged": gauss_newton.converged,
            "cost_hessian_max": norms.amax(1),
            "cost_hessian_mean": norms.mean(1),
            "products": products,
        }

    def _start(self, curvature: Curvature, runs: Sequence[Run]) -> tuple[Tensor | None, int]:
        """Near the runs' last eigenvectors, (R, p), and the products spent on it; None at their first checkpoint.

        Added is the Hessian times a random vector: with p dimensions, hardly any of a random vector lies along the
        large eigenvalues, so that by itself it would let Lanczos stop before another top eigenvector shows.
        """
        found = [vector for vector in (self._spent[run].vector for run in runs) if vector is not None]
        if len(found) < len(runs):
            return None, 0
        return torch.stack(found) + NOISE * _unit(curvature.hessian_product(curvature.random_start())), 1

    def _jacobians(self, networks: Networks) -> dict[str, Tensor]:
        """Norms of the input-output Jacobian and its variation."""
        neighbours = self._samples.neighbours
        rows = self._network.classes * (len(neighbours.train) + len(neighbours.test))
        for run in networks.runs:
            self._spent[run].jacobians += JACOBIAN_ROW * rows / len(self._samples.y)
        chunk = self._settings.chunk
        return jacobian_columns(self._network, networks.parameters, networks.buffers, neighbours, chunk=chunk)

    @torch.no_grad()
    def _slopes(self, networks: Networks) -> dict[str, Tensor]:
        """Both sides of the static form of Theorem 5.1, over all training samples."""
        chunks = self._samples.x.split(self._settings.chunk)
        logits = torch.cat([self._network(networks.parameters, networks.buffers, x) for x in chunks], 1)  # (R, N, K)
        bound, slope = slopes(logits, self._samples.y, networks.square, networks.smoothing, self._samples.pairs)
        return {"lower_bound": bound, "slope": slope}

    def _kernels(self, networks: Networks) -> tuple[Tensor, Tensor]:
        """Largest eigenvalues of the tangent kernel, (R,), and of its layers' parts, (R, L); NaN and L = 0 for none."""
        count = self._settings.kernel_samples
        if isinstance(self._network, Mlp) and count:
            return kernel_tops(self._network, networks.parameters, self._samples.x[:count], rtol=TOLERANCE)
        return torch.full((len(networks.runs),), math.nan), torch.empty(len(networks.runs), 0)

    def spent(self) -> Iterator[Row]:
        """A row of the table `measuring_cost` for each run."""
        for run, spent in self._spent.items():
            costs = {"training": spent.training, "curvature": spent.curvature, "jacobians": spent.jacobians}
            yield {**run.columns, **costs}


def _unit(vectors: Tensor) -> Tensor:
    """Rows (R, p) of length 1."""
    return torch.nn.functional.normalize(vectors, dim=1)
