"""Training on RingTransfer: one stack of seeds for each model and number of layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from jacnorm.code_version import code_version
from jacnorm.studies.glstm import tables as study_tables
from jacnorm.studies.glstm.layers import drawn, parameter_count
from jacnorm.studies.glstm.recall import STUDY
from jacnorm.studies.glstm.ring import Model, network, rings
from jacnorm.studies.glstm.settings import Device, RingSettings
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.batches import batch_indices
from jacnorm.training.checkpoint import fingerprint
from jacnorm.training.job import Job, job
from jacnorm.training.loop import FitReport, RunId, discard, fit
from jacnorm.training.snapshots import Snapshot
from jacnorm.training.stacked import StackedAdam, losses_and_gradients, stack_parameters


def ring(settings: RingSettings, tables: Path, weights: Path, device: Device = "auto") -> None:
    """Train every model at every depth; keep the weights and what each run reached."""
    with job(STUDY, "train", "ring", settings, device) as this:
        rows: list[dict[str, Any]] = []
        kept: list[Snapshot] = []
        checkpoints: list[Path] = []
        for cell in _cells(settings):
            stack = Stack(settings, cell, this.device)
            name = f"{weights.stem}-{cell.model}-{cell.layers}.checkpoint.safetensors"
            checkpoints.append(weights.with_name(name))
            report = _train(settings, cell, stack, checkpoints[-1], this)
            rows += _rows(settings, cell, stack, report)
            kept.append(stack.snapshot())
        study_tables.write(tables, "ring_fits", settings, rows, this.tracker)
        snapshot_files.save(weights, kept)
        for checkpoint in checkpoints:
            discard(checkpoint)


@dataclass(frozen=True)
class Cell:
    """What the runs of a stack have in common."""

    model: Model
    layers: int

    def run(self, seed: int) -> RunId:
        """The run of one seed."""
        return RunId(STUDY, f"ring {self.model} layers={self.layers}", seed)

    def __str__(self) -> str:
        return f"ring, {self.model}, {self.layers} layers"


def _cells(settings: RingSettings) -> Iterator[Cell]:
    for layers in settings.layers:
        for model in settings.models:
            yield Cell(model, layers)


class Stack:
    """One network per seed: a `jacnorm.training.loop.Trainee`. Letters: R runs, C classes, S samples."""

    def __init__(self, settings: RingSettings, cell: Cell, device: torch.device) -> None:
        self.generators: dict[str, torch.Generator] = {}
        self._settings, self._cell, self._device = settings, cell, device
        self._runs = [cell.run(seed) for seed in settings.seeds]
        self._rings = rings(cell.layers, settings.classes, k_hop=cell.model == "glstm").to(device)

        def build() -> torch.nn.Module:
            return network(cell.model, cell.layers, settings.classes, settings.width, settings.memory)

        modules = [drawn(build, run.generator("weights")) for run in self._runs]
        self.parameters_each = parameter_count(modules[0])
        self._parameters = {name: each.to(device) for name, each in stack_parameters(modules).items()}
        self._module = modules[0].to("meta")  # the parameters are those of the stack
        # AdamW without weight decay is Adam.
        self._optimiser = StackedAdam(self._parameters, settings.learning_rate)
        self._labels = self._draw("training labels", settings.train_graphs)  # (R, S)
        self._test_labels = self._draw("test labels", settings.test_graphs)

    def _draw(self, purpose: str, samples: int) -> Tensor:
        """Labels of each run, the same for every model of a seed."""
        cell, classes = f"ring classes={self._settings.classes}", self._settings.classes
        streams = [RunId(STUDY, cell, seed).generator(purpose) for seed in self._settings.seeds]
        return torch.stack([torch.randint(classes, (samples,), generator=stream) for stream in streams])

    def step(self, index: int) -> dict[str, Tensor]:
        """One update of all runs, at the step size that the cosine has come to."""
        rows = batch_indices(index, self._runs, self._settings.train_graphs, self._settings.batch)
        shares = self._shares(self._labels.gather(1, rows))
        self._optimiser.lr = self._settings.learning_rate * (1 + math.cos(math.pi * index / self._settings.steps)) / 2
        losses, gradients = losses_and_gradients(self._loss, self._parameters, shares)
        self._optimiser.step(gradients)
        return {"loss": losses}

    def _shares(self, labels: Tensor) -> Tensor:
        """Share of each label among labels (R, B): (R, C)."""
        return functional.one_hot(labels, self._settings.classes).float().mean(1).to(self._device)

    def _logits(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What a network says of the ring of each label, (C, C)."""
        inputs = (self._rings.x, self._rings.edges, self._rings.asked)
        return torch.func.functional_call(self._module, dict(parameters), inputs)

    def _loss(self, parameters: Mapping[str, Tensor], shares: Tensor) -> Tensor:
        return -(shares * self._logits(parameters).log_softmax(1).diagonal()).sum()

    @torch.no_grad()
    def accuracy(self) -> Tensor:
        """Share of each run's test graphs that are answered correctly, (R,)."""
        answers = torch.func.vmap(self._logits)(self._parameters).argmax(2)  # (R, C)
        right = answers == torch.arange(self._settings.classes, device=self._device)
        return (right * self._shares(self._test_labels)).sum(1).double().cpu()

    def freeze(self, diverged: Tensor) -> None:
        """Stop changing diverged runs."""
        self._optimiser.freeze(diverged)

    def snapshot(self) -> Snapshot:
        """Copies of the parameters."""
        cell = {"model": self._cell.model, "layers": self._cell.layers}
        return Snapshot(cell, {name: parameter.cpu().clone() for name, parameter in self._parameters.items()})

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments."""
        return {**self._parameters, **{f"optimiser/{name}": each for name, each in self._optimiser.state().items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for name, parameter in self._parameters.items():
            parameter.copy_(state[name])
        self._optimiser.load_state({name: state[f"optimiser/{name}"] for name in self._optimiser.state()})


def _train(settings: RingSettings, cell: Cell, stack: Stack, checkpoint: Path, this: Job) -> FitReport:
    return fit(
        stack,
        steps=settings.steps,
        checkpoint=checkpoint,
        runs=[cell.run(seed) for seed in settings.seeds],
        fingerprint=fingerprint(
            [settings.model_dump(), this.device.type], code_version(f"jacnorm.studies.{STUDY}.train_ring")
        ),
        on_divergence="record",
        tracker=this.tracker,
        label=str(cell),
    )


def _rows(settings: RingSettings, cell: Cell, stack: Stack, report: FitReport) -> Iterator[dict[str, Any]]:
    last = max(settings.steps // 10, 1)
    losses = report.history["loss"].double()[-last:].mean(0).tolist()
    accuracies = stack.accuracy().tolist()
    for seed, loss, accuracy, diverged in zip(settings.seeds, losses, accuracies, report.diverged, strict=True):
        lost = diverged is not None
        yield {
            "seed": seed,
            "model": cell.model,
            "layers": cell.layers,
            "parameters": stack.parameters_each,
            "train_loss": math.nan if lost else loss,
            "test_score": math.nan if lost else accuracy,
            "diverged_at": diverged if lost else -1,
        }
