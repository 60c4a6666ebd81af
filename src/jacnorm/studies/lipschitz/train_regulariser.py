"""Training with and without the Jacobian regulariser, in the settings of Table 1, on seeds that are paired.

A seed has one training subset, one initialisation, one order of its samples and one stream of augmentation, in every
setting, with and without the regulariser, so that differences between cells are taken within seeds.

Runs that differ in seed, learning rate, coefficient or augmentation train together (`stacks`). Gradients are clipped
for networks without normalisation only, which are not part of any pair (`CLIP`). The test error is looked at after the
last epoch and, for the best one, after some on the way (`evaluation_interval`).
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
from jacnorm.studies.lipschitz import tables as study_tables
from jacnorm.studies.lipschitz.inputs import STUDY, load
from jacnorm.studies.lipschitz.regulariser import fixed_parameters, network, numbers_per_run, penalty
from jacnorm.studies.lipschitz.samples import Samples, augment, draw
from jacnorm.studies.lipschitz.schedule import step_factor
from jacnorm.studies.lipschitz.settings import (
    Device,
    Normalisation,
    PairedSettings,
    RegulariserSettings,
    TableSettings,
)
from jacnorm.studies.lipschitz.train_residual import clipped
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.batches import batch_indices, steps_per_epoch
from jacnorm.training.checkpoint import fingerprint, pack, unpack
from jacnorm.training.job import Job, job
from jacnorm.training.loop import FitReport, RunId, discard, fit
from jacnorm.training.snapshots import Snapshot
from jacnorm.training.stacked import StackedSGD

CLIP = 5.0
"""Largest norm of a run's gradient, of networks without normalisation; the others need none.

Without clipping, one of four narrow WideResNets fell back to chance at step size 0.1 after it had begun to learn; with
it, none of ten.
"""
STACK_NUMBERS = 2**19
"""Parameters and activations that the runs of a stack hold together; more runs train in several stacks.

A constant, not a setting, so that the same job always gives the same bits.
"""
EVALUATION_COST = 0.1
"""How much of the training passes the test errors along the way may cost; see `evaluation_interval`."""
EVALUATION_BATCH = 1024
"""Samples, over all runs of a stack, that are classified at once."""


@dataclass(frozen=True)
class Arm:
    """One cell of Table 1: how its runs train, one per seed. coefficient: weight of the penalty, 0 without it."""

    setting: str
    normalisation: Normalisation
    learning_rate: float
    augmented: bool
    coefficient: float

    @property
    def regularised(self) -> bool:
        """Whether the penalty is part of the objective."""
        return self.coefficient > 0

    @property
    def columns(self) -> dict[str, Any]:
        """The arm as columns of the tables."""
        return {"setting": self.setting, "regularised": self.regularised, "coefficient": self.coefficient}


@dataclass(frozen=True)
class Run:
    """One network: an arm and a seed."""

    arm: Arm
    seed: int


def paired(settings: PairedSettings, tables: Path, data: Path, weights: Path, device: Device = "auto") -> None:
    """Train small networks with and without the Jacobian regulariser on many paired seeds (Table 1)."""
    _train(settings, "paired", tables, data, weights, device)


def table(settings: TableSettings, tables: Path, data: Path, weights: Path, device: Device = "auto") -> None:
    """Train WideResNets with and without the Jacobian regulariser (Table 1)."""
    _train(settings, "table", tables, data, weights, device)


def _train(
    settings: RegulariserSettings, command: str, tables: Path, data: Path, weights: Path, device: Device
) -> None:
    with job(STUDY, "train", command, settings, device) as this:
        samples = draw(settings, load(data, scaling="standard"))
        rows: dict[Run, dict[str, Any]] = {}
        trained: dict[Run, dict[str, Tensor]] = {}
        checkpoints: list[Path] = []
        for number, runs in enumerate(stacks(settings, samples), start=1):
            checkpoints.append(weights.with_name(f"{weights.stem}-stack{number}.checkpoint.safetensors"))
            stack = Stack(settings, runs, samples, this.device)
            report = _fit(settings, stack, f"stack {number}", checkpoints[-1], this)
            rows |= zip(runs, _rows(settings, stack, report), strict=True)
            trained |= zip(runs, stack.unstacked(), strict=True)
        wanted = [[Run(arm, seed) for seed in settings.seeds] for arm in arms(settings)]
        study_tables.write(
            tables, f"{command}_errors", settings, [rows[run] for runs in wanted for run in runs], this.tracker
        )
        snapshot_files.save(weights, [_snapshot([trained[run] for run in runs], runs[0].arm) for runs in wanted])
        for checkpoint in checkpoints:
            discard(checkpoint)


def arms(settings: RegulariserSettings) -> list[Arm]:
    """The cells of Table 1, in its order: the baseline, then what `settings.settings` takes away, one at a time.

    Baseline and no-normalisation are trained without the regulariser only, as in the paper, the others also with every
    coefficient.
    """
    augmented = bool(settings.shift or settings.flip)
    found = [Arm("baseline", "batch", settings.learning_rate, augmented, 0.0)]
    for setting in settings.settings:
        normalisation: Normalisation = {"layer-norm": "layer", "no-normalisation": "none"}.get(setting, "batch")
        rate = settings.low_learning_rate if setting == "low-learning-rate" else settings.learning_rate
        coefficients = [] if setting == "no-normalisation" else settings.coefficients
        for coefficient in (0.0, *coefficients):
            kept = augmented and setting != "no-augmentation"
            found.append(Arm(setting, normalisation, rate, kept, coefficient))
    return found


def stacks(settings: RegulariserSettings, samples: Samples) -> Iterator[list[Run]]:
    """The runs that train together: those of one normalisation, either all with the penalty or all without.

    Runs without it are spared its second derivatives. Learning rates, coefficients, augmentation and seeds may differ
    within a stack.
    """
    kinds: dict[tuple[Normalisation, bool], list[Run]] = {}
    for arm in arms(settings):
        kind = kinds.setdefault((arm.normalisation, arm.regularised), [])
        kind += [Run(arm, seed) for seed in settings.seeds]
    size = max(1, STACK_NUMBERS // numbers_per_run(settings, samples.image, samples.classes))
    for runs in kinds.values():
        for start in range(0, len(runs), size):
            yield runs[start : start + size]


def evaluation_interval(train_samples: int, test_samples: int) -> int:
    """Epochs between two looks at the test error, so that they cost at most a tenth of training, but for the last.

    A training sample counts as three passes, forward and twice back.
    """
    return max(1, math.ceil(test_samples / (3 * EVALUATION_COST * train_samples)))


class Stack:
    """R networks of equal shape that train together: a `jacnorm.training.loop.Trainee`.

    All runs of a stack have the penalty, or none has.
    """

    def __init__(
        self, settings: RegulariserSettings, runs: Sequence[Run], samples: Samples, device: torch.device
    ) -> None:
        self.generators: dict[str, torch.Generator] = {}
        self.runs = list(runs)
        arms = [run.arm for run in runs]
        seeds = sorted({run.seed for run in runs})
        self.samples = samples.of(seeds, device)
        self._settings, self._device, self._cell = settings, device, f"regulariser {samples.name}"
        self._seed_of = torch.tensor([seeds.index(run.seed) for run in runs], device=device)  # (R,)
        self._augmented = torch.tensor([arm.augmented for arm in arms], device=device)
        self._coefficients = torch.tensor([arm.coefficient for arm in arms], device=device)
        self._regularised = arms[0].regularised
        self._rates = torch.tensor([arm.learning_rate for arm in arms], dtype=torch.float64)
        self._orders = [RunId(STUDY, f"{self._cell} order", seed) for seed in seeds]
        n = self.samples.train.shape[1]
        self.steps_per_epoch = steps_per_epoch(n, settings.batch)
        self._every = evaluation_interval(n, self.samples.test.shape[1])
        normalisation = arms[0].normalisation
        self._normalised = normalisation != "none"
        self._network = network(settings, len(runs), samples.classes, samples.image, normalisation)
        initial = self._network.initial([self._stream(run.seed, "initial") for run in runs])
        self._parameters = {name: tensor.to(device) for name, tensor in initial.items()}
        self._buffers = {name: tensor.to(device) for name, tensor in self._network.buffers().items()}
        fixed = fixed_parameters(self._parameters, normalisation, settings.variant)
        self._optimiser = StackedSGD(
            {name: tensor for name, tensor in self._parameters.items() if name not in fixed},
            self._rates,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=True,
        )
        self._factor = 1.0

    def _stream(self, seed: int, purpose: str) -> torch.Generator:
        return RunId(STUDY, self._cell, seed).generator(purpose)

    def step(self, index: int) -> dict[str, Tensor]:
        """One update of all runs.

        Metrics: loss, the objective; cross_entropy; penalised_share, of the regularised in every step and of the others
        in the last epoch; test_error [%] after some epochs and after the last.
        """
        epoch = index // self.steps_per_epoch
        self._set_step_size(epoch)
        x, labels = self._batch(index)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self._optimiser.stack.items()}
        with self._precision():
            passed = self._network({**self._parameters, **leaves}, self._buffers, x, training=True)
        losses = cross_entropy(passed.logits.float(), labels)  # (R,)
        metrics = {"cross_entropy": losses.detach()}
        if self._regularised or epoch == self._settings.epochs - 1:
            found = penalty(
                passed,
                labels,
                threshold=self._settings.threshold,
                variant=self._settings.variant,
                create_graph=self._regularised,
            )
            metrics["penalised_share"] = found.share
            if self._regularised:
                losses = losses + self._coefficients * found.value
        gradients: Sequence[Tensor] = torch.autograd.grad(losses.sum(), list(leaves.values()))
        if not self._normalised:
            gradients = clipped(gradients, CLIP)
        self._optimiser.step(dict(zip(leaves, gradients, strict=True)))
        metrics["loss"] = losses.detach()
        if (index + 1) % self.steps_per_epoch == 0 and self._is_evaluated(epoch + 1):
            metrics["test_error"] = self.error(self.samples.test)
        return metrics

    def _is_evaluated(self, epochs: int) -> bool:
        return epochs % self._every == 0 or epochs == self._settings.epochs

    def _set_step_size(self, epoch: int) -> None:
        factor = step_factor(epoch, self._settings.epochs)
        if factor != self._factor:
            self._factor = factor
            self._optimiser.lr = self._rates * factor

    def _batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Images (R, B, channels, height, width) and labels (R, B) of one step; the same for all runs of a seed."""
        n, settings = self.samples.train.shape[1], self._settings
        order = batch_indices(index, self._orders, n, settings.batch, device=self._device)  # (S, B)
        rows = self.samples.train.gather(1, order)
        x, labels = self.samples.x[rows], self.samples.y[rows]  # (S, B, ...), (S, B)
        source = self._seed_of
        if self._augmented.any():
            streams = [self._stream(seed, f"augmentation/{index}") for seed in self.samples.seeds]
            x = torch.cat([x, augment(x, settings.shift, settings.flip, streams)])
            source = source + self._augmented * len(self.samples.seeds)
        return x[source], labels[self._seed_of]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        wanted = self._settings.precision == "bfloat16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=wanted)

    @torch.no_grad()
    def error(self, rows: Tensor) -> Tensor:
        """Samples that each run classifies wrongly, (R,) float64 on the CPU, in percent; NaN without samples.

        rows: (S, n). In float32 and with the running statistics, as the measuring step sees the networks.
        """
        if rows.shape[1] == 0:
            return torch.full((len(self.runs),), math.nan, dtype=torch.float64)
        chunk = max(1, EVALUATION_BATCH // len(self.runs))
        wrong = torch.zeros(len(self.runs), dtype=torch.float64, device=self._device)
        for part in rows.split(chunk, dim=1):
            chosen = part[self._seed_of]  # (R, n)
            passed = self._network(self._parameters, self._buffers, self.samples.x[chosen], training=False)
            wrong += (passed.logits.argmax(2) != self.samples.y[chosen]).sum(1)
        return (100 * wrong / rows.shape[1]).cpu()

    def freeze(self, diverged: Tensor) -> None:
        """Stop changing diverged runs; their parameters become NaN, so that nothing is measured on them later."""
        self._optimiser.freeze(diverged)
        for tensor in self._parameters.values():
            tensor[diverged.to(self._device)] = math.nan

    def unstacked(self) -> Iterator[dict[str, Tensor]]:
        """Parameters and running statistics of each run."""
        whole = {name: tensor.cpu() for name, tensor in pack(**self._groups()).items()}
        for position in range(len(self.runs)):
            yield {name: tensor[position] for name, tensor in whole.items()}

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        return {"parameter": self._parameters, "statistic": self._buffers}

    def state(self) -> dict[str, Tensor]:
        """Parameters, running statistics and momentum."""
        return pack(**self._groups(), momentum=self._optimiser.state())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for group, tensors in self._groups().items():
            for name, found in unpack(state, group).items():
                tensors[name].copy_(found)
        self._optimiser.load_state(unpack(state, "momentum"))


def _fit(settings: RegulariserSettings, stack: Stack, name: str, checkpoint: Path, this: Job) -> FitReport:
    arm = stack.runs[0].arm
    return fit(
        stack,
        steps=settings.epochs * stack.steps_per_epoch,
        checkpoint=checkpoint,
        runs=[RunId(STUDY, _name(run.arm), run.seed) for run in stack.runs],
        fingerprint=fingerprint(
            [settings.model_dump(), stack.samples.digest, this.device.type],
            code_version(f"jacnorm.studies.{STUDY}.train_regulariser"),
        ),
        on_divergence="record",
        tracker=this.tracker,
        label=f"{name}, normalisation {arm.normalisation}, {'with' if arm.regularised else 'without'} regulariser",
    )


def _name(arm: Arm) -> str:
    return f"{arm.setting} coefficient={arm.coefficient}"


def _rows(settings: RegulariserSettings, stack: Stack, report: FitReport) -> Iterator[dict[str, Any]]:
    """A row of the table of errors for each run; a diverged run has no errors, which is NaN."""
    last = {name: values[-stack.steps_per_epoch :].double().mean(0) for name, values in report.history.items()}
    test = report.history["test_error"]  # (steps, R)
    measured = {
        "test_error": test[-1],
        "best_test_error": torch.where(test.isnan(), math.inf, test).amin(0),
        "validation_error": stack.error(stack.samples.validation),
        "train_error": stack.error(stack.samples.train),
        "train_loss": last["cross_entropy"],
        "penalised_share": last["penalised_share"],
    }
    for position, (run, diverged) in enumerate(zip(stack.runs, report.diverged, strict=True)):
        numbers = {
            name: math.nan if diverged is not None else values[position].item() for name, values in measured.items()
        }
        yield {
            "seed": run.seed,
            "data_set": stack.samples.name,
            "network": settings.network,
            **run.arm.columns,
            "variant": settings.variant,
            "learning_rate": run.arm.learning_rate,
            **numbers,
            "diverged_at": -1 if diverged is None else diverged,
        }


def _snapshot(runs: Sequence[Mapping[str, Tensor]], arm: Arm) -> Snapshot:
    """The trained networks of one arm, by seed."""
    tensors = {name: torch.stack([run[name] for run in runs]) for name in runs[0]}
    return Snapshot({**arm.columns, "normalisation": arm.normalisation}, tensors)
