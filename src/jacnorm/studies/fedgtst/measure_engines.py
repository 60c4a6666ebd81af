"""The same rounds by three engines: batched, client after client, and Flower's apps in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.studies.fedgtst import tables as study_tables
from jacnorm.studies.fedgtst.algorithm import Tensors
from jacnorm.studies.fedgtst.engine import BatchedEngine, Data, Engine
from jacnorm.studies.fedgtst.inputs import STUDY, Inputs, load
from jacnorm.studies.fedgtst.loop import LoopEngine
from jacnorm.studies.fedgtst.plan import Plan
from jacnorm.studies.fedgtst.settings import Device, EnginesSettings
from jacnorm.studies.fedgtst.splits import clients
from jacnorm.studies.fedgtst.strategies import part
from jacnorm.training.job import Job, job

WITHOUT_COEFFICIENT = {"fedavg": 0.0, "scaffold": 0.0, "fedsr": 1.0}
"""Coefficients of methods to which the settings give none; FedSR's is a factor of the published weights."""
NETWORK = "lenet"


def engines(settings: EnginesSettings, tables: Path, data: list[Path], device: Device = "auto") -> None:
    """Differences of weights and guide between the engines after each round, and bytes of the messages."""
    with job(STUDY, "measure", "engines", settings, device) as this:
        (source,) = load(settings, data)
        rows = [
            row
            for seed in settings.seeds
            for method in settings.methods
            for row in _rows(settings, source, method, seed, this)
        ]
        study_tables.write(tables, "engines", settings, rows, this.tracker)


def _rows(settings: EnginesSettings, source: Inputs, method: str, seed: int, this: Job) -> Iterator[dict[str, Any]]:
    plan = Plan(
        settings,
        seed,
        source.source,
        settings.clients,
        method,
        WITHOUT_COEFFICIENT.get(method, settings.coefficient),
        NETWORK,
        source.shape,
        source.classes,
    )
    samples = source.source_train
    index = clients(settings, settings.clients, settings.split, seed, samples.y, source.classes)  # (K, n)
    held = samples.take(index), samples.y[index]
    batched = list(_rounds(BatchedEngine, plan, *this.put(held)))
    others = {"loop": list(_rounds(LoopEngine, plan, *this.put(held))), "flower": flower_rounds(plan, *held)}
    for engine, rounds in others.items():
        for number, (own, reference) in enumerate(zip(rounds, batched, strict=True), 1):
            yield {
                "seed": seed,
                "method": method,
                "engine": engine,
                "round": number,
                "weights_difference": weights_difference(own[0], reference[0]),
                "guide_difference": guide_difference(own[0], reference[0]),
                **own[1],
            }


Round = tuple[Tensors, dict[str, int]]
"""The server's state after a round, and the bytes of one client's messages in it."""


def _rounds(kind: type[Engine], plan: Plan, x: Tensor, y: Tensor) -> Iterator[Round]:
    """Rounds of one run by an engine; x: (K, n, 3, h, w), y: (K, n)."""
    index = torch.arange(y.numel(), device=y.device).view(1, *y.shape)  # (1, K, n)
    data = Data(x.flatten(0, 1), y.flatten(), index)
    engine = kind([plan.strategy], [plan.seed], plan.cell, data)
    servers, memories = engine.start([part("weights", plan.start())])
    for number in range(plan.settings.rounds):
        servers, memories, report = engine.round(servers, memories, number)
        yield (
            {name: tensor[0].cpu() for name, tensor in servers.items()},
            {name: getattr(report, name) for name in ("bytes_down", "bytes_up", "weight_bytes")},
        )


def flower_rounds(plan: Plan, x: Tensor, y: Tensor) -> list[Round]:
    """The same by Flower in this process; bytes as counted in its messages."""
    from jacnorm.studies.fedgtst.in_process import run_in_process

    servers: list[Tensors] = []
    with tempfile.TemporaryDirectory() as folder:
        end = run_in_process(
            plan,
            lambda _, client, node: (x[client], y[client]),
            Path(folder),
            on_round=lambda number, server: servers.append(server),
        )
    return [
        (server, {name: row[name] for name in ("bytes_down", "bytes_up", "weight_bytes")})
        for server, row in zip(servers, end.history, strict=True)
    ]


def weights_difference(first: Tensors, second: Tensors) -> float:
    """Largest absolute difference of a weight between two servers."""
    own = part("weights", first)
    return max(float((tensor - second[f"weights.{name}"]).abs().max()) for name, tensor in own.items())


def guide_difference(first: Tensors, second: Tensors) -> float:
    """Relative difference of their guides; 0 for methods without one."""
    if "guide" not in first:
        return 0.0
    return float((first["guide"] - second["guide"]).abs() / second["guide"].abs())
