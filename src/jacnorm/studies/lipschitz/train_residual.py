"""Training of WideResNets of several depths with batch norm, and of those of Figure 1, with batch norm and without.

Seeds of a cell train together where their activations are small, else one after another (`stacks`). Runs of one seed
share their initial draws, as far as their shapes agree, and the order of their samples, so that Figure 1 compares
pairs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.code_version import code_version
from jacnorm.nets.mlp import cross_entropy
from jacnorm.nets.wide_resnet import StackedWideResNet
from jacnorm.studies.lipschitz import tables as study_tables
from jacnorm.studies.lipschitz.inputs import STUDY, Inputs, load
from jacnorm.studies.lipschitz.samples import augment
from jacnorm.studies.lipschitz.schedule import step_factor
from jacnorm.studies.lipschitz.settings import Device, Normalisation, ResidualSettings
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.batches import batch_indices, steps_per_epoch
from jacnorm.training.checkpoint import fingerprint, pack, unpack
from jacnorm.training.job import Job, job
from jacnorm.training.loop import FitReport, RunId, discard, fit
from jacnorm.training.snapshots import Snapshot
from jacnorm.training.stacked import StackedSGD

STACK_NUMBERS = 2**18
"""Largest activations that the runs of a stack hold together; with more, runs are quicker one after another.

On 8 x 8 images, 3 runs took 0.6 of the time that they take singly; on 32 x 32 images, 1.2 to 1.6 times it. A constant,
so that the same job always gives the same bits.
"""
PAD = 4
"""Largest shift of an augmented image, in pixels."""
EVALUATION_BATCH = 1024
"""Samples, over all runs of a stack, that are classified at once."""


@dataclass(frozen=True)
class Cell:
    """Networks that are trained alike. part: "sweep", against depth, or "figure1"."""

    data_set: str
    part: str
    depth: int
    normalisation: Normalisation
    epochs: int
    learning_rate: float

    @property
    def columns(self) -> dict[str, Any]:
        """The cell as table columns."""
        return {
            "data_set": self.data_set,
            "part": self.part,
            "depth": self.depth,
            "normalisation": self.normalisation,
        }

    def run(self, seed: int) -> RunId:
        """The run of one seed."""
        return RunId(STUDY, f"{self.data_set} {self.part} depth={self.depth} {self.normalisation}", seed)

    def __str__(self) -> str:
        return f"{self.data_set}, {self.part}, depth {self.depth}, normalisation {self.normalisation}"


def residual(settings: ResidualSettings, tables: Path, data: Path, weights: Path, device: Device = "auto") -> None:
    """Train WideResNets of every depth and those of Figure 1; keep their weights and running statistics."""
    with job(STUDY, "train", "residual", settings, device) as this:
        inputs = load(data, settings.train_samples, scaling="standard")
        rows: list[dict[str, Any]] = []
        kept: list[Snapshot] = []
        checkpoints: list[Path] = []
        for cell in cells(settings, inputs.name):
            before: list[dict[str, Tensor]] = []
            after: list[dict[str, Tensor]] = []
            for seeds in stacks(settings, inputs.image):
                checkpoints.append(_checkpoint(weights, cell, seeds))
                stack = Stack(settings, cell, seeds, inputs, this.device)
                before.append(stack.tensors())
                report = _fit(settings, cell, stack, inputs, checkpoints[-1], this)
                after.append(stack.tensors())
                rows += _rows(cell, stack, inputs, report)
            if cell.part == "sweep":
                kept.append(_snapshot(cell, "initial", before))
            kept.append(_snapshot(cell, "trained", after))
        study_tables.write(tables, "residual_fits", settings, rows, this.tracker)
        snapshot_files.save(weights, kept)
        for checkpoint in checkpoints:
            discard(checkpoint)


def cells(settings: ResidualSettings, data_set: str) -> Iterator[Cell]:
    """All trainings: the sweep over depths, then Figure 1, whose epochs and step size differ."""
    for depth in settings.depths:
        yield Cell(data_set, "sweep", depth, "batch", settings.epochs, settings.learning_rate)
    normalisations: tuple[Normalisation, ...] = ("batch", "none")
    for normalisation in normalisations:
        yield Cell(
            data_set,
            "figure1",
            settings.compared_depth,
            normalisation,
            settings.compared_epochs,
            settings.compared_learning_rate,
        )


def stacks(settings: ResidualSettings, image: tuple[int, int, int]) -> Iterator[list[int]]:
    """Consecutive seeds whose largest activations fit into STACK_NUMBERS together, at least one."""
    numbers = settings.batch * max(settings.stem, settings.channels) * image[1] * image[2]
    size = max(1, STACK_NUMBERS // numbers)
    for start in range(0, len(settings.seeds), size):
        yield settings.seeds[start : start + size]


def network(
    settings: ResidualSettings, cell: Mapping[str, Any], runs: int, classes: int, image: tuple[int, int, int]
) -> StackedWideResNet:
    """The networks of a cell, given by its table columns."""
    return StackedWideResNet(
        runs, cell["depth"], settings.stem, settings.channels, classes, image, cell["normalisation"]
    )


class Stack:
    """One network per seed, of equal shape: a `jacnorm.training.loop.Trainee`."""

    def __init__(
        self, settings: ResidualSettings, cell: Cell, seeds: Sequence[int], inputs: Inputs, device: torch.device
    ) -> None:
        """Draw the initial weights."""
        self.generators: dict[str, torch.Generator] = {}
        self.seeds = list(seeds)
        self._settings, self._cell, self._device = settings, cell, device
        self._x, self._y = inputs.train_x.to(device), inputs.train_y.to(device)
        self._orders = [RunId(STUDY, f"residual {cell.data_set}", seed) for seed in seeds]
        self.steps_per_epoch = steps_per_epoch(len(self._y), settings.batch)
        self._network = network(settings, cell.columns, len(seeds), inputs.classes, inputs.image)
        draws = [RunId(STUDY, f"residual {cell.data_set} depth={cell.depth}", seed) for seed in seeds]
        initial = self._network.initial([draw.generator("initial") for draw in draws])
        self._parameters = {name: tensor.to(device) for name, tensor in initial.items()}
        self._buffers = {name: tensor.to(device) for name, tensor in self._network.buffers().items()}
        self._optimiser = StackedSGD(
            self._parameters,
            cell.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=True,
        )
        self._factor = 1.0
        self._frozen: Tensor | None = None

    def step(self, index: int) -> dict[str, Tensor]:
        """One update of all runs, with the gradient of each run shortened to the norm `clip` if it is longer."""
        self._set_step_size(index // self.steps_per_epoch)
        x, labels = self._batch(index)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self._parameters.items()}
        with self._statistics_of_frozen_runs_kept():
            with self._precision():
                passed = self._network(leaves, self._buffers, x, training=True)
            losses = cross_entropy(passed.logits.float(), labels)  # (R,)
            gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
        self._optimiser.step(dict(zip(leaves, clipped(gradients, self._settings.clip), strict=True)))
        return {"loss": losses.detach()}

    def _set_step_size(self, epoch: int) -> None:
        factor = step_factor(epoch, self._cell.epochs)
        if factor != self._factor:
            self._factor = factor
            self._optimiser.lr = self._cell.learning_rate * factor

    def _batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Images (R, B, channels, height, width) and labels (R, B) of one step."""
        rows = batch_indices(index, self._orders, len(self._y), self._settings.batch, device=self._device)
        x = self._x[rows]
        if self._settings.augment:
            x = augment(x, PAD, True, [order.generator(f"augmentation/{index}") for order in self._orders])
        return x, self._y[rows]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        wanted = self._settings.precision == "bfloat16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=wanted)

    @contextlib.contextmanager
    def _statistics_of_frozen_runs_kept(self) -> Iterator[None]:
        frozen = self._frozen
        kept = {} if frozen is None else {name: tensor[frozen] for name, tensor in self._buffers.items()}
        yield
        for name, tensor in kept.items():
            self._buffers[name][frozen] = tensor

    @torch.no_grad()
    def error(self, x: Tensor, y: Tensor) -> Tensor:
        """Samples (N, channels, height, width) that each run classifies wrongly, (R,) float64 on the CPU, in percent.

        In float32 and with the running statistics, as the measuring step sees the networks.
        """
        wrong = torch.zeros(len(self.seeds), dtype=torch.float64)
        chunk = max(1, EVALUATION_BATCH // len(self.seeds))
        for part, labels in zip(x.split(chunk), y.split(chunk), strict=True):
            shared = part.to(self._device).expand(len(self.seeds), *part.shape)
            logits = self._network(self._parameters, self._buffers, shared, training=False).logits
            wrong += (logits.argmax(2).cpu() != labels).sum(1)
        return 100 * wrong / len(y)

    def freeze(self, diverged: Tensor) -> None:
        """Stop changing diverged runs."""
        self._optimiser.freeze(diverged)
        self._frozen = diverged.to(self._device)

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {"parameter": self._parameters, "statistic": self._buffers}

    def tensors(self) -> dict[str, Tensor]:
        """Copies of parameters and running statistics on the CPU."""
        return {name: tensor.cpu().clone() for name, tensor in pack(**self._groups()).items()}

    def state(self) -> dict[str, Tensor]:
        """Parameters, running statistics and momentum."""
        return pack(**self._groups(), momentum=self._optimiser.state())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for group, tensors in self._groups().items():
            for name, found in unpack(state, group).items():
                tensors[name].copy_(found)
        self._optimiser.load_state(unpack(state, "momentum"))


def clipped(gradients: Sequence[Tensor], largest: float) -> list[Tensor]:
    """Gradients (R, ...) of the parameters, those of a run scaled together so that their norm is at most `largest`.

    As `torch.nn.utils.clip_grad_norm_`, for each run by itself.
    """
    squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)  # (R,)
    factors = (largest / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    return [gradient * factors.view(-1, *[1] * (gradient.ndim - 1)) for gradient in gradients]


def _fit(
    settings: ResidualSettings, cell: Cell, stack: Stack, inputs: Inputs, checkpoint: Path, this: Job
) -> FitReport:
    return fit(
        stack,
        steps=cell.epochs * stack.steps_per_epoch,
        checkpoint=checkpoint,
        runs=[cell.run(seed) for seed in stack.seeds],
        fingerprint=fingerprint(
            [settings.model_dump(), inputs.digest, this.device.type],
            code_version(f"jacnorm.studies.{STUDY}.train_residual"),
        ),
        on_divergence="record",
        tracker=this.tracker,
        label=str(cell),
    )


def _rows(cell: Cell, stack: Stack, inputs: Inputs, report: FitReport) -> Iterator[dict[str, Any]]:
    """A row of the table for each run; a diverged run has no errors, which is NaN."""
    measured = {
        "train_error": stack.error(inputs.train_x, inputs.train_y),
        "test_error": stack.error(inputs.test_x, inputs.test_y),
        "train_loss": report.history["loss"][-stack.steps_per_epoch :].double().mean(0),
    }
    for position, (seed, diverged) in enumerate(zip(stack.seeds, report.diverged, strict=True)):
        numbers = {
            name: math.nan if diverged is not None else values[position].item() for name, values in measured.items()
        }
        yield {"seed": seed, **cell.columns, **numbers, "diverged_at": -1 if diverged is None else diverged}


def _snapshot(cell: Cell, stage: str, stacked: Sequence[Mapping[str, Tensor]]) -> Snapshot:
    """The networks of one cell, all seeds in order, from those of its stacks."""
    tensors = {name: torch.cat([each[name] for each in stacked]) for name in stacked[0]}
    return Snapshot({**cell.columns, "stage": stage}, tensors)


def _checkpoint(weights: Path, cell: Cell, seeds: Sequence[int]) -> Path:
    name = f"{weights.stem}-{cell.part}-depth{cell.depth}-{cell.normalisation}-s{seeds[0]}"
    return weights.with_name(f"{name}.checkpoint.safetensors")
