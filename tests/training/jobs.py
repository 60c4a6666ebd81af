"""A small training job for the tests: three stacked MLPs on synthetic data, with everything that has state."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pandas as pd
import torch
from torch import nn

from jacnorm import files
from jacnorm.files import Column, save_tensors, write_table
from jacnorm.training.batches import batch_indices
from jacnorm.training.checkpoint import fingerprint
from jacnorm.training.devices import one_thread
from jacnorm.training.loop import FitReport, RunId, discard, fit
from jacnorm.training.stacked import StackedSGD, forward, losses_and_gradients, stack_parameters

RUNS = tuple(RunId("test", f"lr={lr}", seed) for lr in (0.05, 0.1) for seed in (10, 11))
SAMPLES, FEATURES, BATCH = 60, 8, 16


class Flag(Protocol):
    """An event that another process waits for."""

    def set(self) -> None:
        """Raise the flag."""


class StackedMLP:
    """R small MLPs with momentum, weight noise from a generator, shuffled batches and an epoch-wise metric."""

    def __init__(self, runs: Sequence[RunId] = RUNS, device: str = "cpu", begun: Flag | None = None) -> None:
        self.runs, self.device, self.begun = tuple(runs), device, begun
        modules = [self._module(run) for run in self.runs]
        self.stack = {name: tensor.to(device) for name, tensor in stack_parameters(modules).items()}
        lrs = [float(run.cell.removeprefix("lr=")) for run in self.runs]
        self.optimiser = StackedSGD(self.stack, lrs, momentum=0.9, weight_decay=1e-3)
        self.generators = {"noise": self.runs[0].generator("noise", device)}
        self.average = {name: torch.zeros_like(tensor) for name, tensor in self.stack.items()}
        data = RunId("test", "data", 0).generator("data")
        self.x = torch.randn(SAMPLES, FEATURES, generator=data).to(device)
        self.y = (self.x[:, 0] * self.x[:, 1]).sign().long().clamp(min=0)
        self.net = forward(modules[0])

    @staticmethod
    def _module(run: RunId) -> nn.Module:
        module = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
        generator = run.generator("init")
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        return module

    def _loss(self, parameters: Mapping[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(parameters, x), y)

    def step(self, index: int) -> dict[str, torch.Tensor]:
        chosen = batch_indices(index, self.runs, SAMPLES, BATCH, device=self.device)
        noise = torch.randn(chosen.shape[1], FEATURES, generator=self.generators["noise"], device=self.device)
        losses, gradients = losses_and_gradients(self._loss, self.stack, self.x[chosen] + 0.1 * noise, self.y[chosen])
        self.optimiser.step(gradients)
        for name, tensor in self.stack.items():
            self.average[name].mul_(0.99).add_(tensor, alpha=0.01)
        metrics = {"loss": losses}
        if index % 4 == 3:
            metrics["norm"] = torch.stack([tensor.flatten(1).norm(dim=1) for tensor in self.stack.values()], dim=1)
        if self.begun is not None:
            self.begun.set()
        return metrics

    def state(self) -> dict[str, torch.Tensor]:
        groups = {"stack": self.stack, "momentum": self.optimiser.state(), "average": self.average}
        return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def train(folder: Path, steps: int, checkpoint_seconds: float, begun: Flag | None = None) -> FitReport:
    """A whole training step, as a study would write it: weights and a table of the learning curves."""
    one_thread()
    trainee = StackedMLP(begun=begun)
    checkpoint = folder / "checkpoint.safetensors"
    report = fit(
        trainee,
        steps=steps,
        checkpoint=checkpoint,
        runs=RUNS,
        fingerprint=fingerprint({"steps": steps}, "code"),
        checkpoint_seconds=checkpoint_seconds,
    )
    save_tensors(folder / "weights.safetensors", trainee.state())
    loss = report.history["loss"]
    rows = [
        {"cell": run.cell, "seed": run.seed, "step": step, "loss": loss[step, number].item()}
        for number, run in enumerate(RUNS)
        for step in range(steps)
    ]
    columns = {"cell": Column("grid point"), "seed": Column("seed"), "step": Column("update"), "loss": Column("loss")}
    write_table(folder / "curves.parquet", pd.DataFrame(rows), columns)
    save_tensors(folder / "history.safetensors", report.history)
    with (folder / "resumed").open("a") as file:
        file.write(f"{report.resumed_from}\n")
    discard(checkpoint)
    return report


def train_and_die_writing(folder: Path, steps: int, moment: str) -> None:
    """Train, with a checkpoint after every step, and die by SIGKILL at a moment of the fifth write."""
    flush, replace, left = files._flush, Path.replace, {"writes": 5}

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(action: Callable[..., object], fatal: Callable[..., None]) -> Callable[..., object]:
        def wrapped(path: Path, *rest: Path) -> object:
            if path.suffix == ".safetensors":  # a folder is flushed as well
                left["writes"] -= 1
                if left["writes"] == 0:
                    fatal(path, *rest)
            return action(path, *rest)

        return wrapped

    def die_with_half_a_file(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)
        die()

    def die_after_renaming(path: Path, target: Path) -> None:
        replace(path, target)
        die()

    if moment == "half written":
        files._flush = counted(flush, die_with_half_a_file)
    elif moment == "before renaming":
        Path.replace = counted(replace, lambda *_: die())
    elif moment == "after renaming":
        Path.replace = counted(replace, die_after_renaming)
    train(folder, steps, 0.0)
