"""Full-batch gradient descent of fully connected networks at several sample sizes and widths, and on a cube (E8, E10).

Three parts: `sizes` has cross-entropy and subsets of one pool of a data set; `widths` has the square cost and two
parametrisations; `cube` has the square cost and uniform inputs, whose support is known. Networks of one cell advance
in one stack, one network per seed; a seed has one initialisation for all sample sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jacnorm.code_version import code_version
from jacnorm.errors import UserError
from jacnorm.studies.sharpening import cube
from jacnorm.studies.sharpening import tables as study_tables
from jacnorm.studies.sharpening.costs import costs
from jacnorm.studies.sharpening.inputs import STUDY, Inputs, load
from jacnorm.studies.sharpening.networks import Network, Parametrisation, build
from jacnorm.studies.sharpening.settings import Device, ScalingSettings
from jacnorm.studies.sharpening.train_descent import LIMIT
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.checkpoint import fingerprint
from jacnorm.training.job import Job, job
from jacnorm.training.loop import FitReport, RunId, discard, fit
from jacnorm.training.snapshots import Snapshot
from jacnorm.training.stacked import StackedSGD

Part = Literal["sizes", "widths", "cube"]


@dataclass(frozen=True)
class Cell:
    """What the networks of a stack have in common, besides the settings."""

    part: Part
    samples: int
    width: int
    parametrisation: Parametrisation

    def run(self, seed: int) -> RunId:
        """The run of one seed."""
        return RunId(STUDY, f"{self._shape} samples={self.samples}", seed)

    def generator(self, seed: int) -> torch.Generator:
        """Initial parameters of one seed, whatever the number of samples."""
        return RunId(STUDY, self._shape, seed).generator("initial")

    @property
    def _shape(self) -> str:
        return f"scaling {self.part} width={self.width} parametrisation={self.parametrisation}"

    def __str__(self) -> str:
        return f"{self.part}, {self.samples} samples, width {self.width}, {self.parametrisation}"


@dataclass(frozen=True)
class Problem:
    """What is learnt, and by what step size.

    x: (N, c, h, w), shared by the runs, or (R, N, c, h, w). answers: labels (N,), or targets (R, N, K). smoothing: of
    the labels of cross-entropy. digest: of the data, "" for the cube.
    """

    x: Tensor
    answers: Tensor
    outputs: int
    square: bool
    smoothing: float
    learning_rate: float
    digest: str

    @property
    def image(self) -> tuple[int, int, int]:
        """(channels, height, width) of a sample."""
        channels, height, width = self.x.shape[-3:]
        return channels, height, width

    def to(self, device: torch.device) -> Problem:
        """The same on a device."""
        return replace(self, x=self.x.to(device), answers=self.answers.to(device))

    def mean_costs(self, network: Network, parameters: Mapping[str, Tensor], chunk: int) -> Iterator[Tensor]:
        """Each chunk's part of every run's mean cost over all samples, (R,) with its graph."""
        runs, device = len(next(iter(parameters.values()))), self.x.device
        square = torch.full((runs,), self.square, device=device)
        smoothing = None if self.answers.is_floating_point() else torch.full((runs,), self.smoothing, device=device)
        count = self.x.shape[-4]
        answers = self.answers.split(chunk, dim=1 if self.answers.ndim == 3 else 0)
        for x, wanted in zip(self.x.split(chunk, dim=-4), answers, strict=True):
            yield costs(network(parameters, {}, x), wanted, square, smoothing).sum(1) / count


def scaling(settings: ScalingSettings, tables: Path, data: Path, weights: Path, device: Device = "auto") -> None:
    """Train at every sample size and width and on the cube; keep the parameters before (widths) and after."""
    with job(STUDY, "train", "scaling", settings, device) as this:
        rows: list[dict[str, Any]] = []
        kept: list[Snapshot] = []
        checkpoints: list[Path] = []
        inputs = load_sizes(settings, data)
        for cell in cells(settings, inputs):
            for start in range(0, len(settings.seeds), settings.runs_together):
                seeds = settings.seeds[start : start + settings.runs_together]
                stack = Stack(settings, cell, seeds, problem(settings, cell, seeds, inputs), this.device)
                if cell.part == "widths":
                    kept.append(stack.snapshot("initial", seeds))
                checkpoints.append(
                    weights.with_name(f"{weights.stem}-stack{len(checkpoints) + 1}.checkpoint.safetensors")
                )
                report = _fit(settings, stack, checkpoints[-1], this)
                rows += _rows(stack, report)
                finished = [seed for seed, bad in zip(seeds, report.diverged, strict=True) if bad is None]
                if finished:
                    kept.append(stack.snapshot("trained", finished))
        study_tables.write(tables, "scaling_fits", settings, rows, this.tracker)
        snapshot_files.save(weights, kept)
        for checkpoint in checkpoints:
            discard(checkpoint)


def load_sizes(settings: ScalingSettings, data: Path) -> dict[int | None, Inputs]:
    """The data set by the number of training samples asked for; the test samples are the same for all of them.

    Raises UserError if the file holds another data set, or as `inputs.load` does.
    """
    found = {
        size: load(data, train_samples=size, pool=settings.pool, scaling=settings.scaling)
        for size in (*settings.sizes, settings.train_samples)
    }
    name = next(iter(found.values())).name
    if name != settings.data_set:
        raise UserError(
            f"data_set is {settings.data_set}, but {data} holds {name}; give the file of {settings.data_set}"
        )
    return found


def cells(settings: ScalingSettings, inputs: Mapping[int | None, Inputs]) -> Iterator[Cell]:
    """All cells, part by part."""
    for size in settings.sizes:
        yield Cell("sizes", size, settings.width, "standard")
    for width in settings.widths:
        for parametrisation in settings.parametrisations:
            yield Cell("widths", len(inputs[settings.train_samples].train_y), width, parametrisation)
    for size in settings.cube_sizes:
        yield Cell("cube", size, settings.width, "standard")


def problem(
    settings: ScalingSettings, cell: Cell, seeds: Sequence[int], inputs: Mapping[int | None, Inputs]
) -> Problem:
    """What the networks of a cell learn."""
    if cell.part == "cube":
        x = cube.samples(seeds, cell.samples, settings.dimension)
        return Problem(x, cube.target(x), cube.OUTPUTS, True, 0.0, settings.cube_learning_rate, "")
    own = inputs[cell.samples if cell.part == "sizes" else settings.train_samples]
    square = cell.part == "widths"
    smoothing, rate = (0.0, settings.width_learning_rate) if square else (settings.smoothing, settings.learning_rate)
    return Problem(own.train_x, own.train_y, own.classes, square, smoothing, rate, own.digest)


def network_of(settings: ScalingSettings, cell: Cell, image: tuple[int, int, int], outputs: int) -> Network:
    """The architecture of a cell."""
    return build(settings, "mlp", image, outputs, width=cell.width, parametrisation=cell.parametrisation)


class Stack:
    """One network per seed, of equal shape: a `jacnorm.training.loop.Trainee`."""

    def __init__(
        self, settings: ScalingSettings, cell: Cell, seeds: Sequence[int], problem: Problem, device: torch.device
    ) -> None:
        """Draw the initial parameters, for each seed from a generator of its own."""
        self.generators: dict[str, torch.Generator] = {}
        self.cell, self.seeds, self.digest = cell, list(seeds), problem.digest
        self._problem = problem.to(device)
        self._chunk = settings.chunk
        self._network = network_of(settings, cell, problem.image, problem.outputs)
        drawn = self._network.initial([cell.generator(seed) for seed in seeds])
        self._parameters = {name: tensor.to(device) for name, tensor in drawn.items()}
        self._optimiser = StackedSGD(self._parameters, problem.learning_rate)
        self._first = torch.full((len(self.seeds),), math.nan, device=device)

    def step(self, index: int) -> dict[str, Tensor]:
        """One update; the metric "loss" is the cost before it, infinite if it exceeds LIMIT times the first one."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self._parameters.items()}
        losses, gradients = torch.zeros_like(self._first), [torch.zeros_like(leaf) for leaf in leaves.values()]
        for part in self._problem.mean_costs(self._network, leaves, self._chunk):
            found = torch.autograd.grad(part.sum(), list(leaves.values()))
            torch._foreach_add_(gradients, found)
            losses += part.detach()
        if index == 0:
            self._first.copy_(losses)
        self._optimiser.step(dict(zip(leaves, gradients, strict=True)))
        return {"loss": torch.where(losses > LIMIT * self._first, math.inf, losses)}

    def freeze(self, diverged: Tensor) -> None:
        """Stop changing diverged runs."""
        self._optimiser.freeze(diverged)

    def snapshot(self, stage: str, seeds: Sequence[int]) -> Snapshot:
        """Copies of the parameters of some of the seeds, which the cell names."""
        rows = torch.tensor([self.seeds.index(seed) for seed in seeds])
        tensors = {name: tensor.cpu()[rows] for name, tensor in self._parameters.items()}
        return Snapshot({**asdict(self.cell), "stage": stage, "seeds": list(seeds)}, tensors)

    def state(self) -> dict[str, Tensor]:
        """Parameters and first costs."""
        return {**self._parameters, "first cost": self._first}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def _fit(settings: ScalingSettings, stack: Stack, checkpoint: Path, this: Job) -> FitReport:
    return fit(
        stack,
        steps=settings.steps,
        checkpoint=checkpoint,
        runs=[stack.cell.run(seed) for seed in stack.seeds],
        fingerprint=fingerprint(
            [settings.model_dump(), stack.digest, this.device.type],
            code_version(f"jacnorm.studies.{STUDY}.train_scaling"),
        ),
        on_divergence="record",
        tracker=this.tracker,
        label=str(stack.cell),
    )


def _rows(stack: Stack, report: FitReport) -> Iterator[dict[str, Any]]:
    """A row of the table of fits for each run."""
    last = report.history["loss"][-1].tolist()  # (R,)
    for seed, loss, diverged in zip(stack.seeds, last, report.diverged, strict=True):
        yield {
            "seed": seed,
            **asdict(stack.cell),
            "train_loss": loss if diverged is None else math.nan,
            "diverged_at": -1 if diverged is None else diverged,
        }
