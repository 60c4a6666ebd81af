"""Full-batch gradient descent with both costs, several label smoothings and step sizes (E1-E3, E9).

A seed has one initialisation for every cost and step size of a network, so that differences between them are taken
within seeds. Runs of one network and data set advance in one stack, `runs_together` at most, whatever their cost.

Kept are the parameters before the first update, after every `measure_every` updates and after a run's last one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.code_version import code_version
from jacnorm.errors import UserError
from jacnorm.studies.sharpening import tables as study_tables
from jacnorm.studies.sharpening.costs import costs, squares, targets
from jacnorm.studies.sharpening.inputs import STUDY, Inputs, load_all
from jacnorm.studies.sharpening.networks import Network, build
from jacnorm.studies.sharpening.settings import DescentSettings, Device, ImageSettings
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.checkpoint import fingerprint, pack, unpack
from jacnorm.training.job import Job, job
from jacnorm.training.loop import FitReport, RunId, discard, fit
from jacnorm.training.snapshots import Snapshot
from jacnorm.training.stacked import StackedSGD

LIMIT = 1e3
"""A run whose cost exceeds this many times its first cost has diverged.

At the edge of stability the cost rises by small factors and comes down again. Beyond the limit only the number of steps
to an overflow is left to learn, and what is measured on the way says nothing about the method.
"""


@dataclass(frozen=True)
class Arm:
    """What is minimised and how; smoothing is 0 for the square cost."""

    cost: str
    smoothing: float
    learning_rate: float


@dataclass(frozen=True)
class Run:
    """One network: where it learns, how, and its seed."""

    data_set: str
    network: str
    arm: Arm
    seed: int

    @property
    def columns(self) -> dict[str, Any]:
        """The run as columns of the tables."""
        return {
            "seed": self.seed,
            "data_set": self.data_set,
            "network": self.network,
            "cost": self.arm.cost,
            "smoothing": self.arm.smoothing,
            "learning_rate": self.arm.learning_rate,
        }

    @property
    def id(self) -> RunId:
        """Its name for the training loop."""
        arm = f"{self.arm.cost} smoothing={self.arm.smoothing} learning_rate={self.arm.learning_rate}"
        return RunId(STUDY, f"{self.data_set} {self.network} {arm}", self.seed)

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> Run:
        """The run of a row, or of an entry of a snapshot's cell."""
        arm = Arm(columns["cost"], columns["smoothing"], columns["learning_rate"])
        return cls(columns["data_set"], columns["network"], arm, columns["seed"])


def descent(settings: DescentSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto") -> None:
    """Train by full-batch gradient descent and keep the parameters along the way."""
    _train(settings, "descent", tables, data, weights, device)


def images(settings: ImageSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto") -> None:
    """Train by full-batch gradient descent on larger images and keep the parameters along the way."""
    _train(settings, "images", tables, data, weights, device)


def _train(
    settings: DescentSettings, command: str, tables: Path, data: Sequence[Path], weights: Path, device: Device
) -> None:
    with job(STUDY, "train", command, settings, device) as this:
        rows: list[dict[str, Any]] = []
        kept: list[Snapshot] = []
        checkpoints: list[Path] = []
        for inputs, runs in stacks(settings, load_all(data, settings)):
            label = f"{inputs.name}, {runs[0].network}, stack {len(checkpoints) + 1}"
            checkpoints.append(weights.with_name(f"{weights.stem}-stack{len(checkpoints) + 1}.checkpoint.safetensors"))
            stack = Stack(settings, runs, inputs, this.device)
            report = _fit(settings, stack, inputs, label, checkpoints[-1], this)
            rows += _rows(stack, report)
            kept += stack.snapshots(len(checkpoints), report.diverged)
        name = "image_fits" if command == "images" else "descent_fits"
        study_tables.write(tables, name, settings, rows, this.tracker)
        snapshot_files.save(weights, kept)
        for checkpoint in checkpoints:
            discard(checkpoint)


def arms(settings: DescentSettings) -> list[Arm]:
    """All costs and step sizes, each once. Raises UserError if there are none."""
    square = [Arm("square", 0.0, rate) for rate in settings.square_learning_rates]
    smoothed = [
        *itertools.product(settings.smoothings, settings.entropy_learning_rates),
        *((settings.edge_smoothing, rate) for rate in settings.edge_learning_rates),
    ]
    found = [*square, *(Arm("cross-entropy", smoothing, rate) for smoothing, rate in smoothed)]
    if not found:
        raise UserError(
            "there is no step size: give square_learning_rates, edge_learning_rates, or entropy_learning_rates with "
            "smoothings"
        )
    return list(dict.fromkeys(found))


def stacks(settings: DescentSettings, inputs: Sequence[Inputs]) -> Iterator[tuple[Inputs, list[Run]]]:
    """The runs that advance together, and what they learn from."""
    for each, network in itertools.product(inputs, settings.networks):
        runs = [Run(each.name, network, arm, seed) for arm in arms(settings) for seed in settings.seeds]
        for start in range(0, len(runs), settings.runs_together):
            yield each, runs[start : start + settings.runs_together]


class Stack:
    """R networks of equal shape: a `jacnorm.training.loop.Trainee`."""

    def __init__(self, settings: DescentSettings, runs: Sequence[Run], inputs: Inputs, device: torch.device) -> None:
        """Draw the initial parameters, for each run from the generator of its data set, network and seed."""
        self.generators: dict[str, torch.Generator] = {}
        self.runs = list(runs)
        self._settings, self._device = settings, device
        self._x, self._y = inputs.train_x.to(device), inputs.train_y.to(device)
        self._square = squares([run.arm.cost for run in runs], device)
        smoothing = torch.tensor([run.arm.smoothing for run in runs], device=device)
        self._targets = targets(self._y, inputs.classes, smoothing)  # (R, N, K)
        self._network: Network = build(settings, runs[0].network, inputs.image, inputs.classes)
        streams = [RunId(STUDY, f"{run.data_set} {run.network}", run.seed).generator("initial") for run in runs]
        self._parameters = {name: tensor.to(device) for name, tensor in self._network.initial(streams).items()}
        self._buffers = {name: tensor.to(device) for name, tensor in self._network.buffers(len(runs)).items()}
        self._optimiser = StackedSGD(self._parameters, [run.arm.learning_rate for run in runs])
        self._first = torch.full((len(runs),), math.nan)
        self.ended = torch.full((len(runs),), -1)
        """Updates after which each run reached `stop_accuracy`, (R,); -1: not yet."""
        self._diverged = torch.zeros(len(runs), dtype=torch.bool)
        self._kept: dict[int, dict[str, Tensor]] = {}

    def step(self, index: int) -> dict[str, Tensor]:
        """One update of all runs that go on; the metric "loss" is the cost before it, infinite above the limit."""
        losses, right, gradients = self._gradients()
        if index == 0:
            self._first.copy_(losses)
        self._look(index, right)
        self._optimiser.step(gradients)
        if index + 1 == self._settings.steps:
            self._keep(index + 1, self.going_on)
        return {"loss": torch.where(losses > LIMIT * self._first.to(losses), math.inf, losses)}

    def _gradients(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Cost (R,), samples classified correctly (R,) and gradient, over all samples, chunk by chunk."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self._parameters.items()}
        losses = torch.zeros(len(self.runs), device=self._device)
        right = torch.zeros(len(self.runs), dtype=torch.int64, device=self._device)
        found: list[Tensor] | None = None
        for start in range(0, len(self._y), self._settings.chunk):
            part = slice(start, start + self._settings.chunk)
            logits = self._network(leaves, self._buffers, self._x[part], training=True)  # (R, B, K)
            parts = costs(logits, self._targets[:, part], self._square).sum(1) / len(self._y)  # (R,)
            gradients = torch.autograd.grad(parts.sum(), list(leaves.values()))
            found = list(gradients) if found is None else [a.add_(b) for a, b in zip(found, gradients, strict=True)]
            losses += parts.detach()
            if self._settings.stop_accuracy is not None:
                right += (logits.detach().argmax(2) == self._y[part]).sum(1)
        return losses, right, dict(zip(leaves, found or [], strict=True))

    @property
    def going_on(self) -> Tensor:
        """Runs that have neither diverged nor reached `stop_accuracy`, (R,) bool."""
        return (self.ended < 0) & ~self._diverged

    def _look(self, index: int, right: Tensor) -> None:
        """Keep the parameters if it is time to, and end the runs that classify enough samples correctly."""
        going_on = self.going_on
        ending = torch.zeros_like(going_on)
        if self._settings.stop_accuracy is not None:
            ending = going_on & (right.cpu() >= self._settings.stop_accuracy * len(self._y))
        self._keep(index, going_on if index % self._settings.measure_every == 0 else ending)
        if ending.any():
            self.ended[ending] = index
            self._freeze()

    def _keep(self, step: int, chosen: Tensor) -> None:
        if chosen.any():
            rows = chosen.nonzero().flatten()
            kept = {name: tensor[rows.to(self._device)].cpu() for name, tensor in self._parameters.items()}
            self._kept[step] = {**kept, _ROWS: rows}

    def finished(self) -> bool:
        """Whether no run goes on."""
        return not self.going_on.any()

    def freeze(self, diverged: Tensor) -> None:
        """Stop changing diverged runs."""
        self._diverged = diverged.clone()
        self._freeze()

    def _freeze(self) -> None:
        self._optimiser.freeze(~self.going_on)

    def snapshots(self, number: int, diverged: Sequence[int | None]) -> Iterator[Snapshot]:
        """What was kept, in the order of steps, of each run only what came before its divergence.

        The cell names the data set, the network, the `number` of the stack, the step, and the runs whose parameters
        these are, as columns of the tables.
        """
        before = torch.tensor([math.inf if step is None else step for step in diverged])
        about = {"data_set": self.runs[0].data_set, "network": self.runs[0].network, "stack": number}
        for step, tensors in sorted(self._kept.items()):
            good = before[tensors[_ROWS]] > step
            if good.any():
                columns = [self.runs[row].columns for row in tensors[_ROWS][good].tolist()]
                parameters = {name: tensors[name][good] for name in self._parameters}
                yield Snapshot({**about, "step": step, "runs": columns}, parameters)

    def state(self) -> dict[str, Tensor]:
        """Parameters, running statistics, first costs, when runs ended, and what was kept."""
        kept = {f"kept {step}": tensors for step, tensors in self._kept.items()}
        own = {"first": self._first, "ended": self.ended}
        return pack(parameter=self._parameters, statistic=self._buffers, own=own, **kept)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        own = {"first": self._first, "ended": self.ended}
        for group, tensors in {"parameter": self._parameters, "statistic": self._buffers, "own": own}.items():
            for name, found in unpack(state, group).items():
                tensors[name].copy_(found)
        groups = {name.partition("/")[0] for name in state}
        steps = [int(group.removeprefix("kept ")) for group in groups if group.startswith("kept ")]
        # Copies: the checkpoint's file is mapped into memory, and will be replaced.
        self._kept = {
            step: {name: tensor.clone() for name, tensor in unpack(state, f"kept {step}").items()} for step in steps
        }
        self._freeze()


_ROWS = "(rows)"
"""Beside the kept parameters: the positions in the stack of the runs that they belong to."""


def _fit(settings: DescentSettings, stack: Stack, inputs: Inputs, label: str, checkpoint: Path, this: Job) -> FitReport:
    return fit(
        stack,
        steps=settings.steps,
        checkpoint=checkpoint,
        runs=[run.id for run in stack.runs],
        fingerprint=fingerprint(
            [settings.model_dump(), inputs.digest, this.device.type],
            code_version(f"jacnorm.studies.{STUDY}.train_descent"),
        ),
        on_divergence="record",
        tracker=this.tracker,
        label=label,
    )


def _rows(stack: Stack, report: FitReport) -> Iterator[dict[str, Any]]:
    """A row of the table of fits for each run."""
    losses = report.history["loss"].double()  # (steps, R), before each update
    for position, run in enumerate(stack.runs):
        diverged, ended = report.diverged[position], int(stack.ended[position])
        steps = report.steps if ended < 0 else ended
        steps = steps if diverged is None else diverged
        yield {
            **run.columns,
            "steps": steps,
            "train_loss": math.nan if diverged is not None else losses[min(steps, len(losses) - 1), position].item(),
            "diverged_at": -1 if diverged is None else diverged,
        }
