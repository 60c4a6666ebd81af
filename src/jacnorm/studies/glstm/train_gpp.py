"""Training on graph property prediction (GPP): gLSTM, what it loses without its parts, and other networks.

A seed has one set of graphs (those of the archive, if one is given), one order of them and one initialisation per task
and model, whatever is taken away from gLSTM; so differences between ablations are taken within seeds. Runs of one task
and model train together. Labels are not normalised; the error is the mean squared one over all nodes (or graphs) of a
batch or split, and its log10 in the table.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.code_version import code_version
from jacnorm.studies.glstm import archive as archive_file
from jacnorm.studies.glstm import tables as study_tables
from jacnorm.studies.glstm.pna_graphs import Graphs, disconnected, distances, generate, labels
from jacnorm.studies.glstm.property_models import Architecture, Batch, PropertyNetwork, network
from jacnorm.studies.glstm.recall import STUDY
from jacnorm.studies.glstm.settings import Device, PropertySettings, Task
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.batches import batch_indices
from jacnorm.training.checkpoint import fingerprint, pack, unpack
from jacnorm.training.job import Job, job
from jacnorm.training.loop import FitReport, RunId, discard, fit
from jacnorm.training.seeds import numpy_generator
from jacnorm.training.snapshots import Snapshot
from jacnorm.training.stacked import StackedAdamW, gradients

SPLITS = ("train", "validation", "test")
PUBLISHED: dict[Task, Architecture] = {
    "diameter": Architecture(layers=20, width=10, heads=1, memory=16, activation="relu", graph_level=True),
    "eccentricity": Architecture(layers=10, width=20, heads=4, memory=8, activation="relu", graph_level=False),
    "sssp": Architecture(layers=10, width=10, heads=1, memory=16, activation="tanh", graph_level=False),
    "laplacian": Architecture(layers=10, width=10, heads=1, memory=16, activation="tanh", graph_level=False),
}
"""The paper's sizes; those of its "SSSP" for the Laplacian, which may be what the archive calls so."""
STACK_RUNS = 12
"""Most runs that train together; a constant, so that the same job always gives the same bits."""
EVALUATION_GRAPHS = 512
"""Graphs, over all runs of a stack, that are predicted at once."""


@dataclass(frozen=True)
class Run:
    """One network: model, what was taken away ("none"), seed."""

    model: str
    ablation: str
    seed: int


@dataclass(frozen=True)
class Data:
    """The graphs of one seed, all splits one after another."""

    source: str
    """generated, or archive."""
    graphs: Graphs
    distances: Tensor
    """(G, n, n), int16; see `pna_graphs.distances`."""
    parts: Mapping[str, slice]
    """Where each split lies."""
    columns: Mapping[Task, str]
    """For each task, what the archive's users call the column that holds its label."""
    digest: str

    def targets(self, task: Task) -> tuple[Tensor, Tensor]:
        """Labels and where they count: (G,) each at graph level, else (G, n)."""
        found = labels(task, self.graphs, self.distances)
        return found, self.graphs.real if found.ndim == 2 else torch.ones_like(found, dtype=torch.bool)


def gpp(settings: PropertySettings, tables: Path, weights: Path, device: Device = "auto") -> None:
    """Train on every task with every network; the table of errors, one of the graphs, and the selected weights."""
    with job(STUDY, "train", "gpp", settings, device) as this:
        data = load(settings)
        rows: list[dict[str, Any]] = []
        kept: list[Snapshot] = []
        checkpoints: list[Path] = []
        for task in settings.tasks:
            for number, runs in enumerate(stacks(settings)):
                model = runs[0].model
                checkpoints.append(weights.with_name(f"{weights.stem}-{task}-{model}-{number}.checkpoint.safetensors"))
                stack = Stack(settings, task, runs, data, this.device)
                report = _fit(settings, stack, checkpoints[-1], this)
                rows += stack.rows(report)
                kept += stack.snapshots()
        study_tables.write(tables, "gpp_fits", settings, rows, this.tracker)
        study_tables.write(tables, "gpp_graphs", settings, _graph_rows(settings, data), this.tracker)
        snapshot_files.save(weights, kept)
        for checkpoint in checkpoints:
            discard(checkpoint)


def load(settings: PropertySettings) -> dict[int, Data]:
    """The graphs of each seed: generated, or the archive's, which are the same for all. UserError as `archive.read`."""
    if settings.archive is not None:
        found = archive_file.read(settings.archive)
        whole = _together("archive", found.graphs, found.columns, found.digest)
        return dict.fromkeys(settings.seeds, whole)
    columns: dict[Task, str] = {task: task for task in settings.tasks}
    counts = (settings.train_graphs, settings.validation_graphs, settings.test_graphs)
    cell = f"gpp nodes={settings.smallest}-{settings.largest}"

    def graphs(seed: int, split: str, count: int) -> Graphs:
        return generate(count, settings.smallest, settings.largest, numpy_generator(STUDY, cell, seed, split))

    drawn = {
        seed: {split: graphs(seed, split, count) for split, count in zip(SPLITS, counts, strict=True)}
        for seed in settings.seeds
    }
    return {seed: _together("generated", parts, columns, "") for seed, parts in drawn.items()}


def _together(source: str, parts: Mapping[str, Graphs], columns: Mapping[Task, str], digest: str) -> Data:
    """Splits of equal padding as one set of graphs; without a digest of a file, that of the graphs."""
    fields = ("adjacency", "values", "sources", "nodes")
    graphs = Graphs(*(torch.cat([getattr(parts[split], field) for split in SPLITS]) for field in fields))
    ends = torch.tensor([len(parts[split]) for split in SPLITS]).cumsum(0).tolist()
    slices = {split: slice(end - len(parts[split]), end) for split, end in zip(SPLITS, ends, strict=True)}
    if not digest:
        content = hashlib.sha256()
        for field in fields:
            content.update(getattr(graphs, field).numpy().tobytes())
        digest = content.hexdigest()
    return Data(source, graphs, distances(graphs.adjacency), slices, columns, digest)


def runs_of(settings: PropertySettings) -> Iterator[Run]:
    """The runs of each task, in the order of the table."""
    for ablation in ("none", *settings.ablations):
        yield from (Run("glstm", ablation, seed) for seed in settings.seeds)
    for model in settings.baselines:
        yield from (Run(model, "none", seed) for seed in settings.seeds)


def stacks(settings: PropertySettings) -> Iterator[list[Run]]:
    """The runs that train together: those of one model, at most `STACK_RUNS`."""
    models: dict[str, list[Run]] = {}
    for run in runs_of(settings):
        models.setdefault(run.model, []).append(run)
    for runs in models.values():
        for start in range(0, len(runs), STACK_RUNS):
            yield runs[start : start + STACK_RUNS]


def architecture(settings: PropertySettings, task: Task) -> Architecture:
    """The sizes of a task's networks."""
    if settings.published:
        return PUBLISHED[task]
    return Architecture(
        settings.layers, settings.width, settings.heads, settings.memory, settings.activation, task == "diameter"
    )


def looks(settings: PropertySettings) -> list[int]:
    """Numbers of updates after which validation is looked at: evenly spaced, the last one at the end."""
    count = min(settings.evaluations, settings.steps)
    return [-(-settings.steps * number // count) for number in range(1, count + 1)]


class Selection:
    """The best parameters of R runs so far by their validation error: the last among equals.

    A run has ended when `patience` looks have passed since it was first as good as now; 0: never.
    """

    def __init__(self, stack: Mapping[str, Tensor], patience: int) -> None:
        runs = len(next(iter(stack.values())))
        self._patience = patience
        self.parameters = {name: tensor.clone() for name, tensor in stack.items()}
        self.error = torch.full((runs,), math.inf, dtype=torch.float64)
        self.step = torch.full((runs,), -1, dtype=torch.int64)
        """Updates before the selected look; -1 before the first."""
        self.ended = torch.zeros(runs, dtype=torch.int64)
        """Updates of runs that have ended; 0: not yet."""
        self._waited = torch.zeros(runs, dtype=torch.int64)

    def look(self, errors: Tensor, step: int, stack: Mapping[str, Tensor]) -> None:
        """Take the validation errors (R,) after `step` updates; NaN is never selected."""
        open_ = self.ended == 0
        chosen = (errors <= self.error) & open_
        self._waited = torch.where(errors < self.error, 0, self._waited + 1)
        self.error = torch.where(chosen, errors, self.error)
        self.step[chosen] = step
        for name, tensor in self.parameters.items():
            tensor[chosen.to(tensor.device)] = stack[name][chosen.to(tensor.device)]
        if self._patience:
            self.ended[open_ & (self._waited >= self._patience)] = step

    def state(self) -> dict[str, Tensor]:
        """Everything that `look` changes."""
        own = {"error": self.error, "step": self.step, "ended": self.ended, "waited": self._waited}
        return {**own, **pack(parameters=self.parameters)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


class Stack:
    """R networks of one task and model that train together: a `jacnorm.training.loop.Trainee`."""

    def __init__(
        self,
        settings: PropertySettings,
        task: Task,
        runs: Sequence[Run],
        data: Mapping[int, Data],
        device: torch.device,
    ) -> None:
        self.generators: dict[str, torch.Generator] = {}
        self.settings, self.task, self.runs = settings, task, list(runs)
        self.data = [data[run.seed] for run in runs]
        self._device = device
        model = runs[0].model
        self._network: PropertyNetwork = network(model, architecture(settings, task), [run.ablation for run in runs])
        self._parameters = {
            name: tensor.to(device)
            for name, tensor in self._network.initial(
                [RunId(STUDY, f"gpp {task} {model}", run.seed).generator("initial") for run in runs]
            ).items()
        }
        self._optimiser = StackedAdamW(self._parameters, settings.learning_rate, weight_decay=settings.weight_decay)
        self.selection = Selection(self._parameters, settings.patience)
        self._diverged = torch.zeros(len(runs), dtype=torch.bool)
        self._looks = set(looks(settings))
        self._orders = [RunId(STUDY, "gpp order", run.seed) for run in runs]
        distinct = list({id(each): each for each in self.data}.values())  # runs of a seed share their graphs
        self._of = torch.tensor([[id(other) for other in distinct].index(id(each)) for each in self.data])
        targets = [each.targets(task) for each in distinct]
        stacked = {
            "features": [each.graphs.features for each in distinct],
            "distances": [each.distances for each in distinct],
            "real": [each.graphs.real for each in distinct],
            "targets": [found for found, _ in targets],
            "counted": [counted for _, counted in targets],
        }
        self._graphs = {name: torch.stack(parts).to(device) for name, parts in stacked.items()}  # (S, G, ...)

    @property
    def run_ids(self) -> list[RunId]:
        """The runs by name."""
        return [RunId(STUDY, f"gpp {self.task} {run.model} {run.ablation}", run.seed) for run in self.runs]

    def _errors(self, parameters: Mapping[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of squared errors of each run on the graphs `rows` (R, B) of its data, and how many numbers it is of."""
        batch = {name: tensor[self._of[:, None], rows] for name, tensor in self._graphs.items()}  # (R, B, ...)
        counted = batch["counted"]
        found = self._network(parameters, Batch(batch["features"], batch["distances"], batch["real"]))
        squares = torch.where(counted, found - batch["targets"], 0.0).square()
        return squares.flatten(1).sum(1), counted.flatten(1).sum(1)

    def step(self, index: int) -> dict[str, Tensor]:
        """One update of all runs. Metrics: loss; validation_error (log10) after some steps."""
        settings = self.settings
        if settings.cosine:
            self._optimiser.lr = settings.learning_rate * (1 + math.cos(math.pi * index / settings.steps)) / 2
        train = self.data[0].parts["train"]
        rows = train.start + batch_indices(index, self._orders, train.stop - train.start, settings.batch)

        def losses(parameters: Mapping[str, Tensor]) -> Tensor:
            total, count = self._errors(parameters, rows)
            return total / count

        found, changes = gradients(losses, self._parameters)
        self._optimiser.step(changes)
        metrics = {"loss": found}
        if index + 1 in self._looks:
            errors = self.errors(self._parameters, "validation")
            self.selection.look(errors, index + 1, self._parameters)
            self._freeze()
            metrics["validation_error"] = errors.log10()
        return metrics

    @torch.no_grad()
    def errors(self, parameters: Mapping[str, Tensor], split: str) -> Tensor:
        """Mean squared error of each run on a split, (R,) float64 on the CPU."""
        part = self.data[0].parts[split]
        total = torch.zeros(len(self.runs), dtype=torch.float64)
        count = torch.zeros_like(total)
        for rows in torch.arange(part.start, part.stop).split(max(1, EVALUATION_GRAPHS // len(self.runs))):
            squares, numbers = self._errors(parameters, rows.expand(len(self.runs), -1))
            total += squares.double().cpu()
            count += numbers.cpu()
        return total / count

    def finished(self) -> bool:
        """Whether every run has ended by its patience, or diverged."""
        return bool(((self.selection.ended > 0) | self._diverged).all())

    def freeze(self, diverged: Tensor) -> None:
        """Stop changing diverged runs."""
        self._diverged = diverged.clone()
        self._freeze()

    def _freeze(self) -> None:
        self._optimiser.freeze((self.selection.ended > 0) | self._diverged)

    def rows(self, report: FitReport) -> Iterator[dict[str, Any]]:
        """Rows of the table of fits; errors are those of the selected parameters, NaN for runs that diverged."""
        errors = {split: self.errors(self.selection.parameters, split) for split in SPLITS}
        for position, run in enumerate(self.runs):
            data, bad = self.data[position], report.diverged[position]
            found = {
                f"{split}_error": math.nan if bad is not None else error[position].log10().item()
                for split, error in errors.items()
            }
            yield {
                "seed": run.seed,
                "source": data.source,
                "task": self.task,
                "column": data.columns[self.task],
                "model": run.model,
                "ablation": run.ablation,
                "parameters": self._network.parameter_count(),
                "steps": int(self.selection.ended[position]) or report.steps,
                "selected_step": int(self.selection.step[position]),
                **found,
                "constant_error": constant_error(data, self.task),
                "diverged_at": -1 if bad is None else bad,
            }

    def snapshots(self) -> list[Snapshot]:
        """The selected parameters of each ablation, by seed."""
        found: list[Snapshot] = []
        for ablation in dict.fromkeys(run.ablation for run in self.runs):
            chosen = torch.tensor([run.ablation == ablation for run in self.runs])
            seeds = [run.seed for run in self.runs if run.ablation == ablation]
            cell = {"task": self.task, "model": self.runs[0].model, "ablation": ablation, "seeds": seeds}
            tensors = {name: tensor.cpu()[chosen] for name, tensor in self.selection.parameters.items()}
            found.append(Snapshot(cell, tensors))
        return found

    def state(self) -> dict[str, Tensor]:
        """Parameters, moments and selection."""
        return pack(parameter=self._parameters, optimiser=self._optimiser.state(), selection=self.selection.state())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for name, tensor in unpack(state, "parameter").items():
            self._parameters[name].copy_(tensor)
        self._optimiser.load_state(unpack(state, "optimiser"))
        self.selection.load_state(unpack(state, "selection"))
        self._freeze()


def constant_error(data: Data, task: Task) -> float:
    """log10 of the mean squared error on test graphs of the mean training label, whatever the graph."""
    found, counted = data.targets(task)
    train, test = (found[data.parts[split]][counted[data.parts[split]]].double() for split in ("train", "test"))
    return (test - train.mean()).square().mean().log10().item()


def _graph_rows(settings: PropertySettings, data: Mapping[int, Data]) -> Iterator[dict[str, Any]]:
    for seed in settings.seeds:
        graphs = data[seed].graphs
        apart = disconnected(graphs, data[seed].distances).double().mean().item()
        for task in settings.tasks:
            found, counted = data[seed].targets(task)
            yield {
                "seed": seed,
                "source": data[seed].source,
                "task": task,
                "graphs": len(graphs),
                "nodes": graphs.nodes.double().mean().item(),
                "disconnected": apart,
                "variance": found[counted].double().var(correction=0).item(),
            }


def _fit(settings: PropertySettings, stack: Stack, checkpoint: Path, this: Job) -> FitReport:
    return fit(
        stack,
        steps=settings.steps,
        checkpoint=checkpoint,
        runs=stack.run_ids,
        fingerprint=fingerprint(
            [settings.public(), [data.digest for data in stack.data], this.device.type],
            code_version(f"jacnorm.studies.{STUDY}.train_gpp"),
        ),
        on_divergence="record",
        tracker=this.tracker,
        label=f"{stack.task}, {stack.runs[0].model}",
    )
