"""Training of fully connected networks of several depths until every training sample has the wanted margin.

Networks of one activation, width and depth train as one stack, one network per seed. Each stops by itself, at the end
of the first epoch after which all its training margins exceed the target, and keeps its weights from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.code_version import code_version
from jacnorm.nets.mlp import accuracy, cross_entropy, init_gaussian, logits
from jacnorm.studies.lipschitz import tables as study_tables
from jacnorm.studies.lipschitz.inputs import STUDY, Inputs, load
from jacnorm.studies.lipschitz.margins import margins
from jacnorm.studies.lipschitz.settings import Activation, DepthSettings, Device
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.batches import batch_indices, steps_per_epoch
from jacnorm.training.checkpoint import fingerprint
from jacnorm.training.job import Job, job
from jacnorm.training.loop import FitReport, RunId, discard, fit
from jacnorm.training.snapshots import Snapshot
from jacnorm.training.stacked import StackedAdam

VARIANCES: dict[Activation, float] = {"relu": 2.0, "tanh": 1.0, "elu": 2.0, "softplus": 2.0}
"""Variance of the initial weights times fan-in: 1 for tanh, 2 for the activations that are linear for large inputs."""
EVALUATION_BATCH = 2048
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """What the networks of a stack have in common; `depth` is the number r of weight matrices."""

    data_set: str
    activation: Activation
    width: int
    depth: int

    @property
    def columns(self) -> dict[str, Any]:
        """The cell as table columns."""
        return {
            "data_set": self.data_set,
            "activation": self.activation,
            "width": self.width,
            "depth": self.depth,
        }

    def run(self, seed: int) -> RunId:
        """The run of one seed."""
        return RunId(STUDY, f"{self.data_set} {self.activation} width={self.width} depth={self.depth}", seed)

    def __str__(self) -> str:
        return f"{self.data_set}, {self.activation}, width {self.width}, depth {self.depth}"


def depth(settings: DepthSettings, tables: Path, data: Path, weights: Path, device: Device = "auto") -> None:
    """Train networks of every activation, width and depth; keep their first and last weights."""
    with job(STUDY, "train", "depth", settings, device) as this:
        inputs = load(data, settings.train_samples)
        rows: list[dict[str, Any]] = []
        kept: list[Snapshot] = []
        checkpoints: list[Path] = []
        for cell in cells(settings, inputs.name):
            stack = Stack(settings, cell, inputs, this.device)
            kept.append(stack.snapshot("initial"))
            checkpoints.append(_checkpoint(weights, cell))
            report = _train(settings, cell, stack, inputs, checkpoints[-1], this)
            kept.append(stack.snapshot("trained"))
            rows += _rows(settings, cell, stack, inputs, report)
        study_tables.write(tables, "fits", settings, rows, this.tracker)
        snapshot_files.save(weights, kept)
        for checkpoint in checkpoints:
            discard(checkpoint)


def cells(settings: DepthSettings, data_set: str) -> Iterator[Cell]:
    """All stacks of the experiment."""
    for activation in settings.activations:
        for width in settings.widths:
            for count in settings.depths:
                yield Cell(data_set, activation, width, count)


class Stack:
    """One network per seed, of equal shape: a `jacnorm.training.loop.Trainee`."""

    def __init__(self, settings: DepthSettings, cell: Cell, inputs: Inputs, device: torch.device) -> None:
        """Draw the initial weights; biases, if trained, start at zero."""
        self.generators: dict[str, torch.Generator] = {}
        self._cell, self._batch, self._target, self._device = cell, settings.batch, settings.margin, device
        self._runs = [cell.run(seed) for seed in settings.seeds]
        self._x, self._y = inputs.train_x.flatten(1).to(device), inputs.train_y.to(device)
        self.steps_per_epoch = steps_per_epoch(len(self._y), settings.batch)
        widths = [inputs.features, *[cell.width] * (cell.depth - 1), inputs.classes]
        drawn = init_gaussian(widths, VARIANCES[cell.activation], [run.generator("weights") for run in self._runs])
        self._parameters = {f"weight/{i}": weight.float().to(device) for i, weight in enumerate(drawn)}
        if settings.biases:
            zeros = [torch.zeros(len(self._runs), rows, device=device) for rows in widths[1:]]
            self._parameters |= {f"bias/{i}": bias for i, bias in enumerate(zeros)}
        self._optimiser = StackedAdam(self._parameters, settings.learning_rate)
        self.epochs = torch.zeros(len(self._runs), dtype=torch.int64)
        """Epochs after which each run reached the target; 0: not yet."""
        self._diverged = torch.zeros(len(self._runs), dtype=torch.bool)

    def step(self, index: int) -> dict[str, Tensor]:
        """One update of all runs that have not stopped."""
        rows = batch_indices(index, self._runs, len(self._y), self._batch, device=self._device)
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in self._parameters.items()}
        losses = cross_entropy(self._logits(self._x[rows], leaves), self._y[rows])
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
        self._optimiser.step(dict(zip(leaves, gradients, strict=True)))
        if (index + 1) % self.steps_per_epoch == 0:
            self._stop_those_that_reached(epoch=(index + 1) // self.steps_per_epoch)
        return {"loss": losses.detach()}

    def _logits(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        weights, biases = parts(parameters)
        return logits(weights, x, self._cell.activation, biases)

    def _stop_those_that_reached(self, epoch: int) -> None:
        reached = self._all_margins_above() & (self.epochs == 0)
        if reached.any():
            self.epochs[reached] = epoch
            self._freeze()

    @torch.no_grad()
    def _all_margins_above(self) -> Tensor:
        """Whether every training margin of a run exceeds the target, (R,) on the CPU."""
        above = torch.ones(len(self._runs), dtype=torch.bool, device=self._device)
        for start in range(0, len(self._y), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            above &= (margins(self._logits(self._x[part], self._parameters), self._y[part]) > self._target).all(1)
            if not above.any():
                break
        return above.cpu()

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> Tensor:
        """Share of the samples (N, n_0) classified correctly by each run, (R,) float64 on the CPU."""
        right = torch.zeros(len(self._runs), dtype=torch.float64)
        for start in range(0, len(y), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            outputs = self._logits(x[part].to(self._device), self._parameters)
            right += accuracy(outputs, y[part].to(self._device)).double().cpu() * len(y[part])
        return right / len(y)

    @property
    def reached(self) -> Tensor:
        """Runs whose training margins all exceeded the target, (R,)."""
        return self.epochs > 0

    def finished(self) -> bool:
        """Whether every run has reached the target or diverged."""
        return bool((self.reached | self._diverged).all())

    def freeze(self, diverged: Tensor) -> None:
        """Stop changing diverged runs."""
        self._diverged = diverged.clone()
        self._freeze()

    def _freeze(self) -> None:
        self._optimiser.freeze(self.reached | self._diverged)

    def snapshot(self, stage: str) -> Snapshot:
        """Copies of the parameters."""
        tensors = {name: parameter.cpu().clone() for name, parameter in self._parameters.items()}
        return Snapshot({**self._cell.columns, "stage": stage}, tensors)

    def state(self) -> dict[str, Tensor]:
        """Parameters, moments, and when runs reached the target."""
        moments = {f"optimiser/{name}": tensor for name, tensor in self._optimiser.state().items()}
        return {**self._parameters, **moments, "epochs": self.epochs}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for name, parameter in self._parameters.items():
            parameter.copy_(state[name])
        self._optimiser.load_state({name: state[f"optimiser/{name}"] for name in self._optimiser.state()})
        self.epochs.copy_(state["epochs"])
        self._freeze()


def parts(parameters: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Weights and biases (None if there are none) of the parameters of a stack or of its snapshot."""
    weights = [tensor for name, tensor in parameters.items() if name.startswith("weight/")]
    biases = [tensor for name, tensor in parameters.items() if name.startswith("bias/")]
    return weights, biases or None


def _train(settings: DepthSettings, cell: Cell, stack: Stack, inputs: Inputs, checkpoint: Path, this: Job) -> FitReport:
    report = fit(
        stack,
        steps=settings.max_epochs * stack.steps_per_epoch,
        checkpoint=checkpoint,
        runs=[cell.run(seed) for seed in settings.seeds],
        fingerprint=fingerprint(
            [settings.model_dump(), inputs.digest, this.device.type],
            code_version(f"jacnorm.studies.{STUDY}.train_depth"),
        ),
        on_divergence="record",
        check_every=stack.steps_per_epoch,  # a run stops at the end of an epoch, and the loop with the last run
        tracker=this.tracker,
        label=str(cell),
    )
    ends = zip(settings.seeds, stack.reached.tolist(), report.diverged, strict=True)
    late = [str(seed) for seed, reached, diverged in ends if not reached and diverged is None]
    if late:
        _log.info(
            "%s: after %d epochs the training margins of seed %s do not all exceed %g; raise max_epochs, or take fewer "
            "training samples",
            cell, report.steps // stack.steps_per_epoch, ", ".join(late), settings.margin,
        )  # fmt: skip
    return report


def _rows(
    settings: DepthSettings, cell: Cell, stack: Stack, inputs: Inputs, report: FitReport
) -> Iterator[dict[str, Any]]:
    test = stack.accuracy(inputs.test_x.flatten(1), inputs.test_y).tolist()
    losses = report.history["loss"].double().unflatten(0, (-1, stack.steps_per_epoch)).mean(1)  # (epochs, R)
    for run, seed in enumerate(settings.seeds):
        epochs = int(stack.epochs[run]) or len(losses)
        diverged = report.diverged[run]
        yield {
            "seed": seed,
            **cell.columns,
            "epochs": epochs,
            "reached": bool(stack.reached[run]),
            "train_loss": losses[epochs - 1, run].item(),
            "test_accuracy": test[run],
            "diverged_at": -1 if diverged is None else diverged,
        }


def _checkpoint(weights: Path, cell: Cell) -> Path:
    name = f"{weights.stem}-{cell.data_set}-{cell.activation}-width{cell.width}-depth{cell.depth}"
    return weights.with_name(f"{name}.checkpoint.safetensors")
