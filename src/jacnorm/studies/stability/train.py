"""Training step of the `stability` study: stacks of ReLU networks, stochastic gradient descent, cross-entropy.

``python -m jacnorm.studies.stability.train trainability --help`` documents the options. Masks are frozen; rescaling is
applied once, to the initial weights (a multiplier in the forward pass would change the step size as well).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.code_version import code_version
from jacnorm.data.read import split
from jacnorm.nets.mlp import accuracy, cross_entropy, init_gaussian, logits
from jacnorm.step import run
from jacnorm.studies.stability import tables as study_tables
from jacnorm.studies.stability.inputs import STUDY, Inputs, load
from jacnorm.studies.stability.pruning import prune, rescale
from jacnorm.studies.stability.settings import Device, DriftSettings, TrainabilitySettings, TrainingSettings
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.batches import batch_indices, steps_per_epoch
from jacnorm.training.checkpoint import fingerprint
from jacnorm.training.job import Job, job
from jacnorm.training.loop import FitReport, RunId, discard, fit
from jacnorm.training.seeds import generator
from jacnorm.training.snapshots import Snapshot
from jacnorm.training.stacked import StackedSGD

EVALUATION_BATCH = 2048


@dataclass(frozen=True)
class Arm:
    """Networks that are trained alike, one per seed. cell: the table columns that name them; masks: None if dense."""

    cell: dict[str, Any]
    weights: list[Tensor]
    masks: list[Tensor] | None
    learning_rate: float


def trainability(
    settings: TrainabilitySettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto"
) -> None:
    """Train pruned networks with and without rescaling over a grid of learning rates (E7)."""
    with job(STUDY, "train", "trainability", settings, device) as this:
        rows: list[dict[str, Any]] = []
        kept: list[Snapshot] = []
        checkpoints: list[Path] = []
        for inputs, depth in _stacks(settings, data):
            arms = list(_pruned_arms(settings, inputs, depth))
            first = [arm for arm in arms if arm.learning_rate == settings.learning_rates[0]]
            kept += [Snapshot.of_layers({**arm.cell, "epoch": 0}, arm.weights) for arm in first]
            fitted, held = split(
                len(inputs.train_y), settings.validation_fraction, generator(STUDY, inputs.name, 0, "validation")
            )
            checkpoints.append(_checkpoint(weights, inputs, depth))
            report, stack = _train(settings, arms, inputs, fitted, checkpoints[-1], this)
            validation = stack.accuracy(inputs.train_x[held], inputs.train_y[held])
            test = stack.accuracy(inputs.test_x, inputs.test_y)
            last_epoch = report.history["loss"][-stack.steps_per_epoch :].double().mean(0)
            for position, (arm, seed) in enumerate((arm, seed) for arm in arms for seed in settings.seeds):
                rows.append(
                    {
                        "seed": seed,
                        "width": settings.width,
                        **arm.cell,
                        "learning_rate": arm.learning_rate,
                        "train_loss": last_epoch[position].item(),
                        "validation_accuracy": validation[position].item(),
                        "test_accuracy": test[position].item(),
                        "diverged_at": _step(report.diverged[position]),
                    }
                )
        study_tables.write(tables, "trainability", settings, rows, this.tracker)
        snapshot_files.save(weights, kept)
        for checkpoint in checkpoints:
            discard(checkpoint)


def drift(settings: DriftSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto") -> None:
    """Train dense networks and keep their weights at the measured epochs (E9)."""
    with job(STUDY, "train", "drift", settings, device) as this:
        rows: list[dict[str, Any]] = []
        kept: list[Snapshot] = []
        checkpoints: list[Path] = []
        for inputs, depth in _stacks(settings, data):
            cell = {"data_set": inputs.name, "depth": depth}
            arm = Arm(cell, _initial(settings, inputs, depth), None, settings.learning_rate)
            checkpoints.append(_checkpoint(weights, inputs, depth))
            report, stack = _train(settings, [arm], inputs, torch.arange(len(inputs.train_y)), checkpoints[-1], this)
            kept += [Snapshot.of_layers({**cell, "epoch": epoch}, each) for epoch, each in sorted(stack.kept.items())]
            by_epoch = {
                name: values.double().unflatten(0, (settings.epochs, stack.steps_per_epoch))
                for name, values in report.history.items()
            }
            for epoch in range(settings.epochs):
                for position, seed in enumerate(settings.seeds):
                    rows.append(
                        {
                            "seed": seed,
                            "width": settings.width,
                            **cell,
                            "epoch": epoch + 1,
                            "train_loss": by_epoch["loss"][epoch, :, position].mean().item(),
                            "test_accuracy": by_epoch["test_accuracy"][epoch, -1, position].item(),
                            "diverged_at": _step(report.diverged[position]),
                        }
                    )
        study_tables.write(tables, "curves", settings, rows, this.tracker)
        snapshot_files.save(weights, kept)
        for checkpoint in checkpoints:
            discard(checkpoint)


class Stack:
    """R networks of equal shape that train together: a `jacnorm.training.loop.Trainee`.

    Runs are ordered arm by arm, seeds within an arm. Runs of one seed see their samples in the same order, whatever the
    arm, so that arms are compared on paired seeds.
    """

    def __init__(
        self, settings: TrainingSettings, arms: Sequence[Arm], inputs: Inputs, rows: Tensor, device: torch.device
    ) -> None:
        self.generators: dict[str, torch.Generator] = {}
        self._settings, self._inputs, self._device = settings, inputs, device
        self._x, self._y = inputs.train_x[rows].to(device), inputs.train_y[rows].to(device)
        cell = f"order {inputs.name} depth={arms[0].cell['depth']}"
        self._orders = [RunId(STUDY, cell, seed) for _ in arms for seed in settings.seeds]
        self.steps_per_epoch = steps_per_epoch(len(rows), settings.batch)
        names = [str(layer) for layer in range(len(arms[0].weights))]
        self._parameters = {
            name: torch.cat([arm.weights[layer] for arm in arms]).float().to(device) for layer, name in enumerate(names)
        }
        masks = None
        if arms[0].masks is not None:
            masks = {name: torch.cat([arm.masks[layer] for arm in arms]).to(device) for layer, name in enumerate(names)}
        rates = torch.tensor([arm.learning_rate for arm in arms], dtype=torch.float64).repeat_interleave(
            len(settings.seeds)
        )
        self._optimiser = StackedSGD(self._parameters, rates, momentum=settings.momentum, masks=masks)
        self._epochs = getattr(settings, "measured_epochs", [])
        self.kept: dict[int, list[Tensor]] = {}
        self._keep(0)

    def step(self, index: int) -> dict[str, Tensor]:
        """One update of all runs; test accuracy and kept weights at the end of an epoch."""
        rows = batch_indices(index, self._orders, len(self._y), self._settings.batch, device=self._device)
        leaves = {name: weight.detach().requires_grad_() for name, weight in self._parameters.items()}
        losses = cross_entropy(logits(list(leaves.values()), self._x[rows], "relu"), self._y[rows])
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
        self._optimiser.step(dict(zip(leaves, gradients, strict=True)))
        metrics = {"loss": losses.detach()}
        if (index + 1) % self.steps_per_epoch == 0:
            self._keep((index + 1) // self.steps_per_epoch)
            if self._epochs:
                metrics["test_accuracy"] = self.accuracy(self._inputs.test_x, self._inputs.test_y)
        return metrics

    def _keep(self, epoch: int) -> None:
        if epoch in self._epochs:
            self.kept[epoch] = [weight.detach().cpu().clone() for weight in self._parameters.values()]

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> Tensor:
        """Share of the samples (N, n_0) classified correctly by each run, (R,) float64 on the CPU."""
        right = torch.zeros(len(self._orders), dtype=torch.float64)
        for start in range(0, len(y), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            outputs = logits(list(self._parameters.values()), x[part].to(self._device), "relu")
            right += accuracy(outputs, y[part].to(self._device)).double().cpu() * len(y[part])
        return right / len(y)

    def freeze(self, diverged: Tensor) -> None:
        """Stop changing diverged runs."""
        self._optimiser.freeze(diverged)

    def state(self) -> dict[str, Tensor]:
        """Weights, momentum and kept weights."""
        kept = {f"kept/{epoch}/{layer}": w for epoch, layers in self.kept.items() for layer, w in enumerate(layers)}
        momentum = {f"momentum/{name}": buffer for name, buffer in self._optimiser.state().items()}
        return {f"weight/{name}": weight for name, weight in self._parameters.items()} | momentum | kept

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for name, weight in self._parameters.items():
            weight.copy_(state[f"weight/{name}"])
        self._optimiser.load_state({name: state[f"momentum/{name}"] for name in self._optimiser.state()})
        epochs = {int(key.split("/")[1]) for key in state if key.startswith("kept/")}
        self.kept = {
            epoch: [state[f"kept/{epoch}/{layer}"] for layer in range(len(self._parameters))] for epoch in epochs
        }


def _stacks(settings: TrainingSettings, data: Sequence[Path]) -> Iterator[tuple[Inputs, int]]:
    """What trains in one stack: networks of one data set and one depth, whose weights have equal shapes."""
    for path in data:
        inputs = load(path, settings.train_samples)
        for depth in settings.depths:
            yield inputs, depth


def _train(
    settings: TrainingSettings, arms: Sequence[Arm], inputs: Inputs, rows: Tensor, checkpoint: Path, this: Job
) -> tuple[FitReport, Stack]:
    stack = Stack(settings, arms, inputs, rows, this.device)
    report = fit(
        stack,
        steps=settings.epochs * stack.steps_per_epoch,
        checkpoint=checkpoint,
        runs=[RunId(STUDY, _name(arm), seed) for arm in arms for seed in settings.seeds],
        fingerprint=fingerprint(
            [settings.model_dump(), inputs.digest, this.device.type], code_version(f"jacnorm.studies.{STUDY}.train")
        ),
        on_divergence="record",
        tracker=this.tracker,
        label=f"{inputs.name}, depth {arms[0].cell['depth']}",
    )
    return report, stack


def _initial(settings: TrainingSettings, inputs: Inputs, depth: int) -> list[Tensor]:
    widths = [inputs.features, *[settings.width] * (depth - 1), inputs.classes]
    cell = f"train {inputs.name} width={settings.width} depth={depth}"
    return init_gaussian(
        widths, settings.sigma_w2, [generator(STUDY, cell, seed, "weights") for seed in settings.seeds]
    )


def _pruned_arms(settings: TrainabilitySettings, inputs: Inputs, depth: int) -> Iterator[Arm]:
    """Scaled and unscaled networks of one depth from the same weights and masks."""
    dense = _initial(settings, inputs, depth)
    for method in settings.methods:
        for sparsity in settings.sparsities:
            cell = f"train {inputs.name} width={settings.width} depth={depth} sparsity={sparsity}"
            masks = prune(
                method, dense, sparsity, generators=[generator(STUDY, cell, s, "mask") for s in settings.seeds]
            )
            for scaling in ("none", "frobenius"):
                weights = rescale(dense, masks, scaling).weights
                columns = {
                    "data_set": inputs.name,
                    "depth": depth,
                    "method": method,
                    "sparsity": sparsity,
                    "scaling": scaling,
                }
                for learning_rate in settings.learning_rates:
                    yield Arm(columns, weights, masks, learning_rate)


def _name(arm: Arm) -> str:
    return ", ".join(f"{key} {value}" for key, value in {**arm.cell, "learning rate": arm.learning_rate}.items())


def _checkpoint(weights: Path, inputs: Inputs, depth: int) -> Path:
    return weights.with_name(f"{weights.stem}-{inputs.name}-depth{depth}.checkpoint.safetensors")


def _step(diverged: int | None) -> int:
    return -1 if diverged is None else diverged


if __name__ == "__main__":
    run({command.__name__: command for command in (trainability, drift)})
