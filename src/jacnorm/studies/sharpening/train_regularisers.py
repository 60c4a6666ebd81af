"""Stochastic gradient descent with one regulariser at a time, kept by a fixed budget and at a matched loss (E4-E7).

A seed has one training set, one initialisation, one order of its samples and one stream of each kind of random numbers
for every arm, so that differences between arms are taken within seeds. Runs of one batch size and one kind of update
advance in one stack, `runs_together` at most.

A network is kept after the updates of its budgets, and the first time that the plain cross-entropy over all training
samples, without smoothing, mixing, augmentation or penalty, is low enough (`Stack`). Only training samples decide that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.code_version import code_version
from jacnorm.errors import UserError
from jacnorm.studies.sharpening import tables as study_tables
from jacnorm.studies.sharpening.arms import Rule, Step, Training, trainings
from jacnorm.studies.sharpening.costs import costs
from jacnorm.studies.sharpening.inputs import STUDY, Inputs, load_all
from jacnorm.studies.sharpening.minibatches import Batches
from jacnorm.studies.sharpening.networks import Network, build
from jacnorm.studies.sharpening.regularisers import ascended, squared_jacobian
from jacnorm.studies.sharpening.settings import Device, RegulariserSettings
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.checkpoint import fingerprint, pack, unpack
from jacnorm.training.job import Job, job
from jacnorm.training.loop import FitReport, RunId, discard, fit
from jacnorm.training.snapshots import Snapshot
from jacnorm.training.stacked import StackedSGD

DECAY = 0.2
"""What multiplies the step size after each of the `decays`."""
Moment = int | str
"""When a network is kept: after a number of updates, or "matched"."""


@dataclass(frozen=True)
class Run:
    """One network: where it learns, how, and its seed."""

    data_set: str
    network: str
    training: Training
    seed: int

    @property
    def columns(self) -> dict[str, Any]:
        """The run as columns of the tables, all but the rule."""
        return {
            "seed": self.seed,
            "data_set": self.data_set,
            "network": self.network,
            **self.training.arm.columns,
        }

    @property
    def id(self) -> RunId:
        """Its name for the training loop."""
        about = f"{self.training.arm} updates={self.training.updates}"
        return RunId(STUDY, f"{self._shared} {about}", self.seed)

    @property
    def draws(self) -> RunId:
        """What its random numbers belong to; the same for all arms of a seed."""
        return RunId(STUDY, self._shared, self.seed)

    @property
    def _shared(self) -> str:
        return f"regularisers {self.data_set} {self.network}"


def regularisers(
    settings: RegulariserSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto"
) -> None:
    """Train by stochastic gradient descent with one regulariser at a time; keep networks by both stopping rules."""
    with job(STUDY, "train", "regularisers", settings, device) as this:
        rows: list[dict[str, Any]] = []
        kept: list[Snapshot] = []
        checkpoints: list[Path] = []
        for inputs, runs in stacks(settings, {seed: load_all(data, settings, seed) for seed in settings.seeds}):
            label = f"{runs[0].data_set}, {runs[0].network}, stack {len(checkpoints) + 1}"
            checkpoints.append(weights.with_name(f"{weights.stem}-stack{len(checkpoints) + 1}.checkpoint.safetensors"))
            stack = Stack(settings, runs, inputs, this.device)
            report = _fit(settings, stack, label, checkpoints[-1], this)
            diverged = stack.diverged(report.diverged)
            rows += stack.rows(diverged)
            kept += stack.snapshots(diverged)
        study_tables.write(tables, "sgd_fits", settings, rows, this.tracker)
        snapshot_files.save(weights, kept)
        for checkpoint in checkpoints:
            discard(checkpoint)


def stacks(
    settings: RegulariserSettings, inputs: Mapping[int, Sequence[Inputs]]
) -> Iterator[tuple[dict[int, Inputs], list[Run]]]:
    """The runs that advance together, and what those of each seed learn from; `inputs` are the data sets by seed.

    They share the batch size, the number of updates and how an update is made; plain runs are spared the second
    gradient or the second derivatives of others.
    """
    for each, network in itertools.product(zip(*inputs.values(), strict=True), settings.networks):
        kinds: dict[tuple[int, int, Step], list[Run]] = {}
        for training in trainings(settings, len(each[0].train_y)):
            kind = kinds.setdefault((training.arm.batch, training.updates, training.arm.step), [])
            kind += [Run(each[0].name, network, training, seed) for seed in inputs]
        for runs in kinds.values():
            for start in range(0, len(runs), settings.runs_together):
                yield dict(zip(inputs, each, strict=True)), runs[start : start + settings.runs_together]


class Stack:
    """R networks of equal shape that advance together: a `jacnorm.training.loop.Trainee`.

    inputs: what the runs of each seed learn from. Every `look_every` updates the plain training loss is looked at, in
    evaluation mode, with batch norm's running statistics as they are at that moment.
    """

    def __init__(
        self, settings: RegulariserSettings, runs: Sequence[Run], inputs: Mapping[int, Inputs], device: torch.device
    ) -> None:
        """Draw the initial parameters. Raises UserError if batch norm would see a batch of one sample."""
        self.generators: dict[str, torch.Generator] = {}
        self.runs = list(runs)
        self._settings, self._device = settings, device
        seeds = list(dict.fromkeys(run.seed for run in runs))
        self._x = torch.stack([inputs[seed].train_x for seed in seeds]).to(device)  # (S, N, c, h, w)
        self._y = torch.stack([inputs[seed].train_y for seed in seeds]).to(device)  # (S, N)
        self._seed_of = torch.tensor([seeds.index(run.seed) for run in runs], device=device)
        samples, about = self._y.shape[1], inputs[seeds[0]]
        self.digest = about.digest
        training = runs[0].training
        batch, self._step, self.updates = training.arm.batch, training.arm.step, training.updates
        self._network: Network = build(settings, runs[0].network, about.image, about.classes)
        if self._network.has_batch_norm and 1 in (batch, samples % batch):
            raise UserError(
                f"batch size {batch} leaves a single one of {samples} training samples for a step, and "
                f"the batch norm of {runs[0].network} needs two; change batch, other_batches or train_samples"
            )
        arms = [run.training.arm for run in runs]
        self._batches = Batches(arms, [run.draws for run in runs], self._x, self._y, about.classes)
        self._strengths = torch.tensor([arm.strength for arm in arms], device=device)
        self._square = torch.zeros(len(runs), dtype=torch.bool)
        initial = self._network.initial([run.draws.generator("initial") for run in runs])
        self._parameters = {name: tensor.to(device) for name, tensor in initial.items()}
        self._buffers = {name: tensor.to(device) for name, tensor in self._network.buffers(len(runs)).items()}
        self._rates = torch.tensor([arm.learning_rate for arm in arms], dtype=torch.float64)
        decay = [arm.strength_of("weight decay") for arm in arms]
        self._optimiser = StackedSGD(self._parameters, self._rates, weight_decay=decay)
        self._decays = sorted(round(share * self.updates) for share in training.decays)
        self._passed = 0
        self._frozen = torch.zeros(len(runs), dtype=torch.bool)
        self._kept_at: dict[Moment, Tensor] = {}
        self._kept: dict[Moment, dict[str, Tensor]] = {}
        for moment in dict.fromkeys(self._moment(run, rule) for run in runs for rule in run.training.rules):
            self._kept_at[moment] = torch.full((len(runs),), -1)
            self._kept[moment] = {name: torch.zeros_like(tensor) for name, tensor in pack(**self._groups()).items()}

    @staticmethod
    def _moment(run: Run, rule: Rule) -> Moment:
        return "matched" if rule == "matched" else run.training.budgets[rule]

    def step(self, index: int) -> dict[str, Tensor]:
        """One update of all runs; the metric "loss" is the objective before it."""
        self._set_step_size(index)
        losses, gradients = self._gradients(index)
        self._optimiser.step(gradients)
        self._look(index + 1)
        return {"loss": losses}

    def _set_step_size(self, index: int) -> None:
        passed = sum(decay <= index for decay in self._decays)
        if passed != self._passed:
            self._passed = passed
            self._optimiser.lr = self._rates * DECAY**passed

    def _gradients(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective (R,) and the gradient that the update takes."""
        x, wanted = self._batches.batch(index)
        if self._step == "jacobian penalty":
            return self._penalised(x, wanted, self._batches.probes(index, x.shape[1]))
        losses, gradients = self._gradients_at(self._parameters, self._buffers, x, wanted)
        if self._step == "sam":
            moved = ascended(self._parameters, gradients, self._strengths)
            unused = {name: tensor.clone() for name, tensor in self._buffers.items()}  # statistics are those at theta
            _, gradients = self._gradients_at(moved, unused, x, wanted)
        return losses, gradients

    def _gradients_at(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor, wanted: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
        logits = self._network(leaves, buffers, x, training=True)  # (R, B, K)
        losses = costs(logits, wanted, self._square).mean(1)  # (R,)
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
        return losses.detach(), dict(zip(leaves, gradients, strict=True))

    def _penalised(self, x: Tensor, wanted: Tensor, probes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective and gradient with the Jacobian penalty, mu/2 times the estimated mean squared Frobenius norm."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self._parameters.items()}
        x = x.detach().requires_grad_()
        logits = self._network(leaves, self._buffers, x, training=True)  # (R, B, K)
        penalties = squared_jacobian(logits, x, probes)  # (R,)
        losses = costs(logits, wanted, self._square).mean(1) + self._strengths / 2 * penalties
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
        return losses.detach(), dict(zip(leaves, gradients, strict=True))

    def _look(self, done: int) -> None:
        """Keep the networks whose moment has come, after `done` updates."""
        if done in self._kept:
            self._keep(done, torch.ones(len(self.runs), dtype=torch.bool), done)
        if "matched" in self._kept and done % self._settings.look_every == 0:
            waiting = ((self._kept_at["matched"] < 0) & ~self._frozen).nonzero().flatten()
            if len(waiting):
                low = torch.zeros(len(self.runs), dtype=torch.bool)
                low[waiting] = self._plain_loss(self._groups(), waiting) <= self._settings.matched_loss
                self._keep("matched", low, done)

    def _keep(self, moment: Moment, chosen: Tensor, done: int) -> None:
        self._kept_at[moment][chosen] = done
        rows = chosen.nonzero().flatten().to(self._device)
        for name, tensor in pack(**self._groups()).items():
            self._kept[moment][name][rows] = tensor[rows]

    @torch.no_grad()
    def _plain_loss(self, groups: Mapping[str, Mapping[str, Tensor]], rows: Tensor) -> Tensor:
        """Cross-entropy over all training samples in evaluation mode of the runs `rows`, (R',) float64 on the CPU."""
        rows = rows.to(self._device)
        parameters, buffers = ({name: tensor[rows] for name, tensor in group.items()} for group in groups.values())
        total = torch.zeros(len(rows), dtype=torch.float64, device=self._device)
        own, samples = self._seed_of[rows], self._y.shape[1]
        for start in range(0, samples, self._settings.chunk):
            x, y = (each[own, start : start + self._settings.chunk] for each in (self._x, self._y))
            total += costs(self._network(parameters, buffers, x), y, self._square[: len(rows)]).double().sum(1)
        return (total / samples).cpu()

    def diverged(self, found: Sequence[int | None]) -> list[int | None]:
        """First step without a finite loss of each run: as the loop `found` it, or as a kept network shows it.

        The loop sees the losses before each update, of a batch; a network kept after the last update may be worse.
        """
        first = list(found)
        for moment, steps in self._kept_at.items():
            groups = {group: unpack(self._kept[moment], group) for group in self._groups()}
            bad = ~self._plain_loss(groups, torch.arange(len(self.runs))).isfinite() & (steps >= 0)
            for run in bad.nonzero().flatten().tolist():
                step = int(steps[run])
                first[run] = step if first[run] is None else min(step, first[run])
        return first

    def rows(self, diverged: Sequence[int | None]) -> Iterator[dict[str, Any]]:
        """Rows of the table of fits, one for each run and rule.

        A network that a rule kept before its run diverged is as good as any, and has no divergence in its row.
        """
        for position, (run, bad) in enumerate(zip(self.runs, diverged, strict=True)):
            for rule in run.training.rules:
                kept = self._step_of(position, rule, bad)
                made = self.updates if bad is None else bad
                yield {
                    **run.columns,
                    "rule": rule,
                    "step": made if kept is None else kept,
                    "reached": rule != "matched" or kept is not None,
                    "diverged_at": -1 if bad is None or kept is not None else bad,
                }

    def _step_of(self, position: int, rule: Rule, diverged: int | None) -> int | None:
        """Updates after which a run's network was kept; None if it was not, or had diverged by then."""
        step = int(self._kept_at[self._moment(self.runs[position], rule)][position])
        return step if step >= 0 and (diverged is None or step < diverged) else None

    def snapshots(self, diverged: Sequence[int | None]) -> Iterator[Snapshot]:
        """What was kept of runs that had not diverged, one snapshot for each moment.

        The cell names the data set, the network and, for each of the runs, its columns, the step and the rules.
        """
        for moment, tensors in self._kept.items():
            entries: dict[int, dict[str, Any]] = {}
            for position, run in enumerate(self.runs):
                rules = [rule for rule in run.training.rules if self._moment(run, rule) == moment]
                step = self._step_of(position, rules[0], diverged[position]) if rules else None
                if step is not None:
                    entries[position] = {"columns": run.columns, "rules": rules, "step": step}
            if entries:
                chosen = torch.tensor(list(entries))
                cell = {
                    "data_set": self.runs[0].data_set,
                    "network": self.runs[0].network,
                    "runs": list(entries.values()),
                }
                yield Snapshot(cell, {name: tensor.cpu()[chosen] for name, tensor in tensors.items()})

    def freeze(self, diverged: Tensor) -> None:
        """Stop changing diverged runs."""
        self._frozen = diverged.clone()
        self._optimiser.freeze(diverged)

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        return {"parameter": self._parameters, "statistic": self._buffers}

    def _everything(self) -> dict[str, dict[str, Tensor]]:
        kept = {f"kept {moment}": tensors for moment, tensors in self._kept.items()}
        return {**self._groups(), "kept at": {str(moment): t for moment, t in self._kept_at.items()}, **kept}

    def state(self) -> dict[str, Tensor]:
        """Parameters, running statistics and what was kept."""
        return pack(**self._everything())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for group, tensors in self._everything().items():
            for name, found in unpack(state, group).items():
                tensors[name].copy_(found)


def _fit(settings: RegulariserSettings, stack: Stack, label: str, checkpoint: Path, this: Job) -> FitReport:
    return fit(
        stack,
        steps=stack.updates,
        checkpoint=checkpoint,
        runs=[run.id for run in stack.runs],
        fingerprint=fingerprint(
            [settings.model_dump(), stack.digest, this.device.type],
            code_version(f"jacnorm.studies.{STUDY}.train_regularisers"),
        ),
        on_divergence="record",
        tracker=this.tracker,
        label=label,
    )
