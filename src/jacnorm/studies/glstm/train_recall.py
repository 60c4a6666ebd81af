"""Training of the recall tasks NAR and NARR: seeds of one network train as one stack, some with all their sizes.

All networks of a seed learn from the same graphs in the same order, and are selected and tested on the same. AdamW has
no decay; the gradient of each run is shortened to the norm `clip` if it is longer. Of the updates at which validation
is looked at, the last of those with the best score gives the weights that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.code_version import code_version
from jacnorm.nets.mlp import accuracy, cross_entropy
from jacnorm.studies.glstm import tables as study_tables
from jacnorm.studies.glstm.networks import Cell, planned
from jacnorm.studies.glstm.recall import STUDY, Graphs, RecallTask, data_run, draw, padded, split, stacked
from jacnorm.studies.glstm.recall_models import (
    Architecture,
    draw_parameters,
    initial_statistics,
    logits,
    takes_padded,
    with_fewer_keys,
    with_more_keys,
)
from jacnorm.studies.glstm.settings import Device, RecallSettings, RegressionSettings
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.batches import batch_indices, steps_per_epoch
from jacnorm.training.checkpoint import fingerprint, pack, unpack
from jacnorm.training.job import Job, job
from jacnorm.training.loop import FitReport, RunId, discard, fit
from jacnorm.training.snapshots import Snapshot
from jacnorm.training.stacked import StackedAdamW

CURVE_GRAPHS = 1000
"""Training graphs, at most, on which the score is looked at."""
EVALUATION_BATCH = 250
LEARNT_LOSS = 1e-3
"""Validation loss below which a run ends, where runs may end early at all."""


def nar(settings: RecallSettings, tables: Path, weights: Path, device: Device = "auto") -> None:
    """Train all networks to recall a class; keep the selected weights."""
    _train("nar", settings, tables, weights, device)


def narr(settings: RegressionSettings, tables: Path, weights: Path, device: Device = "auto") -> None:
    """Train all networks to recall a vector; keep the selected weights."""
    _train("narr", settings, tables, weights, device)


def _train(task: RecallTask, settings: RecallSettings, tables: Path, weights: Path, device: Device) -> None:
    with job(STUDY, "train", task, settings, device) as this:
        fits: list[dict[str, Any]] = []
        curves: list[dict[str, Any]] = []
        kept: list[Snapshot] = []
        checkpoints: list[Path] = []
        for cell, all_sizes in planned(settings).items():
            for sizes in together(task, cell, all_sizes):
                stack = Stack(task, settings, cell, sizes, this.device)
                checkpoints.append(_checkpoint(weights, stack))
                report = _fit(task, settings, stack, checkpoints[-1], this)
                fits += _fit_rows(settings, stack, report)
                curves += _curve_rows(settings, stack, report)
                kept += stack.snapshots()
        study_tables.write(tables, f"{task}_fits", settings, fits, this.tracker)
        study_tables.write(tables, f"{task}_curves", settings, curves, this.tracker)
        snapshot_files.save(weights, kept)
        for checkpoint in checkpoints:
            discard(checkpoint)


def architecture(task: RecallTask, cell: Cell, neighbours: int) -> Architecture:
    """The networks of a cell at one number of neighbours."""
    return Architecture(task, cell.model, cell.size, cell.k_hop, cell.layers, neighbours)


def together(task: RecallTask, cell: Cell, sizes: Sequence[int]) -> list[list[int]]:
    """Numbers of neighbours whose networks train as one stack: all, or one by one where padding is not for them."""
    return [list(sizes)] if takes_padded(architecture(task, cell, max(sizes))) else [[n] for n in sizes]


class Stack:
    """One network per number of neighbours and seed, of equal shape: a `jacnorm.training.loop.Trainee`.

    Runs are in the order of `members`. Those of fewer neighbours are padded to the size of the others.
    """

    def __init__(
        self, task: RecallTask, settings: RecallSettings, cell: Cell, sizes: Sequence[int], device: torch.device
    ) -> None:
        """Draw graphs and initial weights."""
        self.generators: dict[str, torch.Generator] = {}
        self.cell, self.sizes, self.members = cell, list(sizes), [(n, seed) for n in sizes for seed in settings.seeds]
        self.architecture = architecture(task, cell, max(sizes))
        self.runs = [RunId(STUDY, f"{task} {' '.join(map(str, cell))} N={n}", seed) for n, seed in self.members]
        self._settings, self._fresh, self._device = settings, cell.data == "fresh", device
        self.orders = [data_run(task, n, seed) for n, seed in self.members]
        """Runs that decide the order of the graphs, the same for all networks."""
        splits = {
            "train": settings.train_graphs,
            "validation": settings.validation_graphs,
            "test": settings.test_graphs,
        }
        self.graphs = {
            name: padded([split(task, n, graphs, settings.seeds, name) for n in sizes]).to(device)
            for name, graphs in splits.items()
        }
        drawn = [self._drawn(n) for n in sizes]
        initial = {name: torch.cat([each[name] for each in drawn]) for name in drawn[0]}
        self._shapes = {name: tensor.shape[1:] for name, tensor in initial.items()}
        flat = torch.cat([tensor.flatten(1) for tensor in initial.values()], 1).to(device)  # (R, P)
        runs = len(self.members)
        self._statistics = {n: t.to(device) for n, t in initial_statistics(self.architecture, runs).items()}
        self._optimiser = StackedAdamW({"flat": flat}, settings.learning_rate, weight_decay=0.0)
        self._flat = self._optimiser.stack["flat"]
        self._selected = {name: tensor.clone() for name, tensor in self._everything().items()}
        worst = -math.inf if task == "nar" else math.inf
        self.best = torch.full((runs,), worst, dtype=torch.float64)
        """Validation score of the weights selected so far."""
        self.selected_step = torch.zeros(runs, dtype=torch.int64)
        """Updates after which they were selected."""
        self.ended = torch.zeros(runs, dtype=torch.int64)
        """Updates after which a run ended early; 0: it did not."""
        self._looks_since_better = torch.zeros(runs, dtype=torch.int64)
        self._diverged = torch.zeros(runs, dtype=torch.bool)
        self._looks = set(looks(settings.steps, settings.evaluations))

    def _drawn(self, neighbours: int) -> dict[str, Tensor]:
        """Initial weights of all seeds, the same whether graphs are fixed or fresh."""
        own = architecture(self.architecture.task, self.cell, neighbours)
        cell = f"{own.task} {self.cell._replace(data='')} N={neighbours}"
        generators = [RunId(STUDY, cell, seed).generator("weights") for seed in self._settings.seeds]
        drawn, more = draw_parameters(own, generators), self.architecture.neighbours - neighbours
        return with_more_keys(drawn, more) if more else drawn

    def step(self, index: int) -> dict[str, Tensor]:
        """One update of all runs that go on; scores on some training graphs and validation where they are due."""
        self._optimiser.lr = self._settings.learning_rate * self._cosine(index)
        graphs = self._batch(index)
        flat = self._flat.detach().requires_grad_()
        moments: dict[str, Tensor] | None = {} if self._statistics else None
        losses = self._losses(logits(self.architecture, self._named(flat), graphs, moments), graphs)
        (gradient,) = torch.autograd.grad(losses.sum(), flat)
        self._optimiser.step({"flat": clipped(gradient, self._settings.clip)})
        self._update_statistics(moments or {})
        metrics = {"loss": losses.detach()}
        return metrics | self._look(index + 1) if index + 1 in self._looks else metrics

    def _cosine(self, index: int) -> float:
        """The step size as a share of the first."""
        at, of = index, self._settings.steps
        if self._settings.schedule == "epoch":
            epoch = steps_per_epoch(self._settings.train_graphs, self._settings.batch)
            at, of = index // epoch, -(-of // epoch)
        return (1 + math.cos(math.pi * at / of)) / 2

    def _batch(self, index: int) -> Graphs:
        settings, task = self._settings, self.architecture.task
        if self._fresh:
            drawn = {n: [] for n in self.sizes}
            for (n, _), run in zip(self.members, self.orders, strict=True):
                drawn[n].append(draw(task, n, settings.batch, run.generator(f"fresh/{index}")))
            return padded([stacked(parts) for parts in drawn.values()]).to(self._device)
        rows = batch_indices(index, self.orders, settings.train_graphs, settings.batch, device=self._device)
        return self.graphs["train"].take(rows)

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters by name, and running statistics, from their numbers (R, P)."""
        parts = flat.split([shape.numel() for shape in self._shapes.values()], 1)
        named = {
            name: part.unflatten(1, shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }
        return named | self._statistics

    def _losses(self, outputs: Tensor, graphs: Graphs) -> Tensor:
        """The loss of each run, (R,)."""
        if self.architecture.task == "nar":
            return cross_entropy(outputs, graphs.targets)
        return (outputs - graphs.targets).square().mean((1, 2))

    def _update_statistics(self, moments: Mapping[str, Tensor]) -> None:
        going = (self.ended == 0) & ~self._diverged
        for name, moment in moments.items():
            self._statistics[name][going] = torch.lerp(self._statistics[name], moment, 0.1)[going]  # PyTorch's momentum

    def _look(self, step: int) -> dict[str, Tensor]:
        """Scores after `step` updates; select, and end runs that are done."""
        tensors = self._named(self._flat)
        train, _ = self.evaluate(tensors, self.graphs["train"].first(min(CURVE_GRAPHS, self._settings.train_graphs)))
        score, loss = self.evaluate(tensors, self.graphs["validation"])
        self._select(step, score, loss)
        return {"train_score": train, "validation_score": score}

    def _select(self, step: int, score: Tensor, loss: Tensor) -> None:
        higher = self.architecture.task == "nar"
        going = (self.ended == 0) & ~self._diverged
        better = going & (score > self.best if higher else score < self.best)
        chosen = better | (going & (score == self.best))
        for name, tensor in self._everything().items():
            self._selected[name][chosen] = tensor[chosen]
        self.best[chosen], self.selected_step[chosen] = score[chosen], step
        self._looks_since_better = torch.where(better, 0, self._looks_since_better + 1)
        patience = self._settings.patience
        if patience:
            self.ended[going & ((self._looks_since_better >= patience) | (loss < LEARNT_LOSS))] = step
            self._freeze()

    @torch.no_grad()
    def evaluate(self, tensors: Mapping[str, Tensor], graphs: Graphs) -> tuple[Tensor, Tensor]:
        """Score (accuracy, or mean squared error) and loss of each run, (R,) float64 on the CPU."""
        score, loss = torch.zeros(2, len(self.runs), dtype=torch.float64)
        count = graphs.asked.shape[1]
        for start in range(0, count, EVALUATION_BATCH):
            part = graphs.part(start, min(EVALUATION_BATCH, count - start))
            outputs = logits(self.architecture, tensors, part)
            losses = self._losses(outputs, part)
            scores = accuracy(outputs, part.targets) if self.architecture.task == "nar" else losses
            score += scores.double().cpu() * part.asked.shape[1]
            loss += losses.double().cpu() * part.asked.shape[1]
        return score / count, loss / count

    @property
    def selected(self) -> dict[str, Tensor]:
        """Parameters and running statistics of the selected updates, by name, (R, ...)."""
        return self._named(self._selected["flat"]) | {n: t for n, t in self._selected.items() if n != "flat"}

    def snapshots(self) -> Iterator[Snapshot]:
        """Copies of the selected weights, for each number of neighbours those of all seeds."""
        seeds = len(self._settings.seeds)
        for position, neighbours in enumerate(self.sizes):
            own = {name: t[position * seeds : (position + 1) * seeds].cpu() for name, t in self.selected.items()}
            if neighbours < self.architecture.neighbours:
                own = with_fewer_keys(own, neighbours)
            tensors = {name: tensor.clone() for name, tensor in own.items()}
            yield Snapshot({**self.cell._asdict(), "neighbours": neighbours}, tensors)

    def finished(self) -> bool:
        """Whether every run has ended or diverged."""
        return bool(((self.ended > 0) | self._diverged).all())

    def freeze(self, diverged: Tensor) -> None:
        """Stop changing diverged runs."""
        self._diverged = diverged.clone()
        self._freeze()

    def _freeze(self) -> None:
        self._optimiser.freeze((self.ended > 0) | self._diverged)

    def _everything(self) -> dict[str, Tensor]:
        """What selection copies."""
        return {"flat": self._flat, **self._statistics}

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        looked = {
            "best": self.best,
            "step": self.selected_step,
            "ended": self.ended,
            "looks": self._looks_since_better,
        }
        return {"now": self._everything(), "selected": self._selected, "looked": looked}

    def state(self) -> dict[str, Tensor]:
        """Weights, those selected, moments, and what validation decided."""
        return pack(**self._groups(), moments=self._optimiser.state())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for group, tensors in self._groups().items():
            for name, found in unpack(state, group).items():
                tensors[name].copy_(found)
        self._optimiser.load_state(unpack(state, "moments"))
        self._freeze()


def clipped(gradient: Tensor, largest: float) -> Tensor:
    """Gradients (R, P) of each run, shortened to the norm `largest` if longer, as `torch.nn.utils.clip_grad_norm_`."""
    norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)  # (R, 1)
    return gradient * (largest / (norms + 1e-6)).clamp(max=1.0)


def looks(steps: int, evaluations: int) -> list[int]:
    """Numbers of updates after which validation is looked at: evenly spaced, the last after all; at most `steps`."""
    count = min(evaluations, steps)
    return [steps * look // count for look in range(1, count + 1)]


def _fit(task: RecallTask, settings: RecallSettings, stack: Stack, checkpoint: Path, this: Job) -> FitReport:
    words = ", ".join(f"{name} {value}" for name, value in stack.cell._asdict().items())
    return fit(
        stack,
        steps=settings.steps,
        checkpoint=checkpoint,
        runs=stack.runs,
        fingerprint=fingerprint(
            [task, settings.model_dump(), stack.cell, stack.sizes, this.device.type],
            code_version(f"jacnorm.studies.{STUDY}.train_recall"),
        ),
        on_divergence="record",
        tracker=this.tracker,
        label=f"{task}, {words}, neighbours {', '.join(map(str, stack.sizes))}",
    )


def _made(stack: Stack, report: FitReport, run: int) -> int:
    """Updates of a run, those that changed nothing any more left out."""
    return int(stack.ended[run]) or report.steps


def _fit_rows(settings: RecallSettings, stack: Stack, report: FitReport) -> Iterator[dict[str, Any]]:
    """A row for each run; a diverged run has no scores, which is NaN."""
    scores = {}
    for name in ("train", "validation", "test"):
        graphs = stack.graphs[name]
        if name == "train":
            graphs = graphs.first(min(CURVE_GRAPHS, settings.train_graphs))
        scores[f"{name}_score"] = stack.evaluate(stack.selected, graphs)[0]
    for run, ((neighbours, seed), diverged) in enumerate(zip(stack.members, report.diverged, strict=True)):
        made = _made(stack, report, run)
        last = report.history["loss"][made - max(1, made // 10) : made, run].double().mean()
        numbers = {"train_loss": last, **{name: score[run] for name, score in scores.items()}}
        yield {
            "seed": seed,
            **stack.cell._asdict(),
            "neighbours": neighbours,
            "parameters": architecture(stack.architecture.task, stack.cell, neighbours).parameters,
            "steps": made,
            "selected_step": int(stack.selected_step[run]),
            **{name: math.nan if diverged is not None else value.item() for name, value in numbers.items()},
            "diverged_at": -1 if diverged is None else diverged,
        }


def _curve_rows(settings: RecallSettings, stack: Stack, report: FitReport) -> Iterator[dict[str, Any]]:
    """A row for each run and look at the validation set, until the run ended or diverged."""
    history = report.history
    for run, ((neighbours, seed), diverged) in enumerate(zip(stack.members, report.diverged, strict=True)):
        until = _made(stack, report, run) if diverged is None else diverged
        for before, step in pairwise([0, *looks(settings.steps, settings.evaluations)]):
            if step > until:
                break
            yield {
                "seed": seed,
                **stack.cell._asdict(),
                "neighbours": neighbours,
                "step": step,
                "train_loss": history["loss"][before:step, run].double().mean().item(),
                **{name: history[name][step - 1, run].item() for name in ("train_score", "validation_score")},
            }


def _checkpoint(weights: Path, stack: Stack) -> Path:
    name = "-".join([weights.stem, *map(str, [*stack.cell, *stack.sizes])])
    return weights.with_name(f"{name}.checkpoint.safetensors")
