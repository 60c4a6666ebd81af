"""The study in seconds: settings as small as they can be, and steps called through their real command lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from jacnorm.files import read_table
from jacnorm.settings import SeededSettings, flags
from jacnorm.step import run
from jacnorm.studies.stability import measure, train
from jacnorm.studies.stability.settings import (
    ConditionsSettings,
    DepthSettings,
    DriftSettings,
    ScoresSettings,
    StudySettings,
    TheoremSettings,
    TrainabilitySettings,
)

SEEDS = [10, 11]
DEPTH = DepthSettings(
    seeds=SEEDS, widths=[6], depth=4, record_every=2, relu_sigma_w2=[2.0, 4.0], tanh_sigma_w2=[1.0], sparsities=[0.5]
)
THEOREM = TheoremSettings(
    seeds=SEEDS,
    limit_widths=[6, 8],
    limit_depths=[1, 3],
    surrogate_width=12,
    surrogate_depth=3,
    surrogate_sparsity=0.5,
    surrogate_draws_per_seed=2,
    independence_widths=[6],
    independence_networks=30,
    independence_repeats_per_seed=2,
)
CONDITIONS = ConditionsSettings(
    seeds=SEEDS,
    sizes=[32],
    degrees_over_log=[1.0],
    fixed_degree_sizes=[16, 80],
    network_width=16,
    network_depth=3,
    network_degrees=[4.0, 8.0],
    correlated_widths=[6],
    correlated_depth=3,
    exponents=[0.5, 1.5],
)
SCORES = ScoresSettings(seeds=SEEDS, width=12, depths=[3], sparsities=[0.5], batch=16, inputs=2)
TRAINABILITY = TrainabilitySettings(
    seeds=SEEDS,
    train_samples=300,
    width=16,
    depths=[3],
    epochs=4,
    sparsities=[0.5],
    learning_rates=[0.02, 0.05],
)
DRIFT = DriftSettings(
    seeds=SEEDS, train_samples=300, width=16, depths=[3, 4], epochs=2, measured_epochs=[0, 2], learning_rate=0.05
)
ALL = StudySettings(
    depth=DEPTH, theorem=THEOREM, conditions=CONDITIONS, scores=SCORES, trainability=TRAINABILITY, drift=DRIFT
)

COMMANDS = {
    "train": {command.__name__: command for command in (train.trainability, train.drift)},
    "measure": {
        command.__name__: command
        for command in (
            measure.depth,
            measure.theorem,
            measure.conditions,
            measure.scores,
            measure.trainability,
            measure.drift,
        )
    },
}


def call(step: str, command: str, settings: SeededSettings, tables: Path, *others: str) -> dict[str, pd.DataFrame]:
    """Call a step with the options that a rule would give; the tables that it wrote, by logical name."""
    before = torch.get_deterministic_debug_mode()
    words = [command, "--device", "cpu", "--tables", str(tables), *flags(settings).split(), *map(str, others)]
    try:
        run(COMMANDS[step], words)
    finally:
        torch.set_deterministic_debug_mode(before)  # a job switches it on for its process, and this one goes on
    return read(tables, settings.seeds)


def read(tables: Path, seeds: Sequence[int]) -> dict[str, pd.DataFrame]:
    ending = f"-s{min(seeds)}-{max(seeds)}"
    return {path.stem.removesuffix(ending): read_table(path) for path in sorted(tables.glob(f"*{ending}.parquet"))}


def everything(settings: StudySettings, folder: Path, digits: Path) -> Path:
    """Train and measure all experiments; the folder of tables."""
    tables = folder / "tables"
    for name in ("depth", "theorem", "conditions"):
        call("measure", name, getattr(settings, name), tables)
    call("measure", "scores", settings.scores, tables, "--data", digits)
    for name in ("trainability", "drift"):
        files = ("--data", digits, "--weights", folder / f"{name}.safetensors")
        call("train", name, getattr(settings, name), tables, *files)
        call("measure", name, getattr(settings, name), tables, *files)
    return tables
