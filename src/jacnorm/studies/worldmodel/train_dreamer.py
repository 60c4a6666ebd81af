"""Training DreamerV3 on tasks of the DeepMind Control Suite: one process per task and arm, its seeds one after another.

Arms of a seed share the start, the random decisions at the beginning, and the streams of random numbers; what they see
then depends on what they do. The worker keeps DreamerV3's own checkpoints beside the weights until the job is done, so
that a killed job goes on; they are made for one set of settings and one version of the code.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jacnorm import environments
from jacnorm.code_version import code_version
from jacnorm.environments import Environment
from jacnorm.errors import UserError
from jacnorm.studies.worldmodel import dreamer_client as client
from jacnorm.studies.worldmodel import dreamer_train_worker
from jacnorm.studies.worldmodel import tables as study_tables
from jacnorm.studies.worldmodel.arms import Arm, arms
from jacnorm.studies.worldmodel.dreamer_worker import Plan
from jacnorm.studies.worldmodel.settings import Device, DreamerSettings
from jacnorm.training import snapshots
from jacnorm.training.checkpoint import fingerprint
from jacnorm.training.job import Job, job
from jacnorm.training.progress import Progress
from jacnorm.training.snapshots import Snapshot

STREAMS = ("agent", "environment", "replay", "random")
"""Of random numbers in training: weights and sampling, starts of episodes, batches, decisions at the beginning."""


@dataclass(frozen=True)
class Trained:
    """The agents of one task and arm."""

    task: str
    arm: Arm
    runs: list[dict[str, Any]]
    """What `dreamer_training` says of each seed."""
    weights: dict[str, Tensor]
    """By name, (S, ...), in the order of the runs."""


def dreamer(settings: DreamerSettings, tables: Path, environment: Path, weights: Path, device: Device = "auto") -> None:
    """Train DreamerV3 in every arm; the table of fits, the learning curves, and the weights.

    Args:
        settings: what is trained.
        tables: folder of the tables.
        environment: file that names DreamerV3's environment, as `jacnorm.environments` writes it.
        weights: safetensors file to write.
        device: auto, cpu or cuda.

    """
    with job(client.STUDY, "train", "dreamer", settings, device) as this:
        there = environments.read(environment)
        check(settings)
        place = weights.with_name(f"{weights.stem}-dreamer")
        platform = client.platform(there, this, device)
        gl = client.renderer(there, settings, place / "renderer")
        trained = [
            _train(settings, task, arm, there, place, platform, gl, this)
            for task in settings.tasks
            for arm in arms(settings)
        ]
        fits = [_fit_row(each, run) for each in trained for run in each.runs]
        study_tables.write(tables, "dreamer_fits", settings, fits, this.tracker)
        study_tables.write(tables, "dreamer_curves", settings, _curve_rows(trained), this.tracker)
        snapshots.save(weights, [snapshot(each) for each in trained])
        shutil.rmtree(place)


def check(settings: DreamerSettings) -> None:
    """UserError if an arm would make no update."""
    for task in settings.tasks:
        for arm in arms(settings):
            plan = Plan.of(client.kind(settings, task, arm, "cpu"))
            if not plan.updates:
                raise UserError(
                    f'setting "frames" is {settings.frames}, which leaves no update of {task} with batch {arm.batch} '
                    f"and length {arm.length}: the first {plan.prefill} of {plan.decisions} decisions only fill the "
                    "memory; enlarge frames or train_ratio"
                )


def _train(
    settings: DreamerSettings,
    task: str,
    arm: Arm,
    environment: Environment,
    place: Path,
    platform: str,
    gl: str,
    this: Job,
) -> Trained:
    """Train all seeds of a task and arm, going on from what a killed job left."""
    question: client.Task = {
        **client.kind(settings, task, arm, platform),
        "checkpoint_seconds": client.CHECKPOINT_SECONDS,
        "runs": [{"seed": seed, "numbers": client.numbers(task, seed, STREAMS)} for seed in settings.seeds],
    }
    versions = {"packages": environment.packages, "code": code_version("jacnorm.studies.worldmodel.train_dreamer")}
    folder = place / fingerprint(question, str(versions))
    planned = Plan.of(question).updates
    with Progress(planned * len(settings.seeds), f"DreamerV3, {task}, {arm}", unit="updates") as progress:

        def tell(line: dict[str, Any]) -> None:
            progress.update(line["number"] * planned + line["update"], f"loss {line['model_loss']}")
            metrics = {name: line[name] for name in ("model_loss", "kl", "penalty", "return") if line[name] is not None}
            prefix = f"{task}/{arm}/seed {line['seed']}"
            this.tracker.log({f"{prefix}/{name}": value for name, value in metrics.items()}, line["update"])

        answer = client.ask(environment, dreamer_train_worker, {**question, "folder": str(folder)}, folder, gl, tell)
        progress.update(planned * len(settings.seeds))
    return Trained(
        task, arm, answer["runs"], stacked([folder / f"seed-{seed}" / "weights.npz" for seed in settings.seeds])
    )


def stacked(files: list[Path]) -> dict[str, Tensor]:
    """Arrays of equal names and shapes from several .npz files, by name, (files, ...)."""
    found: dict[str, list[Tensor]] = {}
    for file in files:
        with np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                found.setdefault(name, []).append(torch.from_numpy(arrays[name]))
    return {name: torch.stack(tensors) for name, tensors in found.items()}


def number(value: float | None) -> float:
    """NaN for what JSON has no word for."""
    return math.nan if value is None else value


def _fit_row(trained: Trained, run: dict[str, Any]) -> dict[str, Any]:
    losses = {name: number(run[name]) for name in ("model_loss", "image_loss", "reward_loss", "kl", "penalty")}
    return {
        **client.columns(trained.task, trained.arm, run["seed"]),
        "parameters": run["parameters"],
        "updates": run["updates"],
        **losses,
        "penalty_share": trained.arm.weight * losses["penalty"] / losses["model_loss"] if trained.arm.weight else 0.0,
        "diverged_at": run["diverged_at"],
    }


def _curve_rows(trained: list[Trained]) -> Iterator[dict[str, Any]]:
    for each in trained:
        for run in each.runs:
            for row in run["curve"]:
                measured = {name: number(row[name]) for name in ("model_loss", "kl", "penalty", "return")}
                counts = {name: row[name] for name in ("update", "frames")}
                yield {**client.columns(each.task, each.arm, run["seed"]), **counts, **measured}


def snapshot(trained: Trained) -> Snapshot:
    """The agents of a task and arm, and when they diverged (-1: never)."""
    ends = torch.tensor([run["diverged_at"] for run in trained.runs])
    cell = {"task": trained.task, "seeds": [run["seed"] for run in trained.runs], **trained.arm.columns}
    return Snapshot(cell, {**trained.weights, "diverged_at": ends})
