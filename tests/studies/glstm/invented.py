"""Tables in which every claim of the study holds, made from settings, without training or measuring anything."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from pathlib import Path

import pandas as pd

from jacnorm.config import load
from jacnorm.studies.glstm.networks import planned
from jacnorm.studies.glstm.settings import (
    PeptidesSettings,
    PropertySettings,
    RecallSettings,
    RegressionSettings,
    RingSettings,
    StudySettings,
    TreesSettings,
)
from jacnorm.studies.glstm.tables import COLUMNS

ROOT = Path(__file__).parents[3]

ABLATIONS = ["no-output-gate", "no-input-gate", "no-forget-gate", "no-gates", "1-hop"]
SIZES = {
    "neighbours": [8, 16, 32, 64],
    "memories": [8, 16, 32],
    "widths": [32, 64],
    "further_memories": [],
    "further_neighbours": [],
    "measured_graphs": 2,
    "hessian_graphs": 2,
}

# Settings that plan everything: all claims can be decided at every scale.
EVERYTHING = StudySettings(
    trees=TreesSettings(seeds=list(range(10, 18))),
    nar=RecallSettings(
        seeds=[10, 11, 12],
        **SIZES,
        one_hop_memories=[8, 16],
        one_hop_neighbours=[8, 16],
        baselines=["gcn", "gatedgcn"],
        baselines_k_hop=True,
        depths=[3, 4, 5],
        depth_neighbours=[16],
        fresh_controls=[16],
    ),
    narr=RegressionSettings(**SIZES, seeds=[10, 11, 12], one_hop_memories=[], one_hop_neighbours=[]),
    gpp=PropertySettings(
        tasks=["diameter", "eccentricity", "sssp", "laplacian"], ablations=ABLATIONS, baselines=["gcn", "adgn"]
    ),
    ring=RingSettings(seeds=[10, 11, 12]),
    peptides=PeptidesSettings(seeds=[10, 11, 12], ablations=ABLATIONS),
)

ARCHIVE = {"diameter": "diameter", "eccentricity": "sssp", "sssp": "laplacian"}
"""What the archive's columns turn out to be in these tables, by what its users call them."""
ERRORS = {
    "diameter": (-0.7, 0.1),
    "eccentricity": (-4.0, 0.6),
    "sssp": (-2.8, -3.3),
    "toy diameter": (-1.0, 0.2),
    "toy eccentricity": (-1.5, 0.2),
    "toy sssp": (-2.0, -2.1),
    "toy laplacian": (-2.5, -2.6),
}
"""Test errors with and without K-hop."""
PRECISION = {"none": 0.725, "1-hop": 0.603}


@cache
def scale_settings(scale: str) -> StudySettings:
    return load(ROOT / "configs", {"scale": scale}).studies["glstm"]


def table(name: str, rows) -> pd.DataFrame:
    """Rows as a table with the columns, in the order, that the study declares."""
    frame = pd.DataFrame(list(rows), columns=None)
    columns = list(COLUMNS[name])
    assert frame.empty or set(frame.columns) == set(columns), set(frame.columns) ^ set(columns)
    return frame.reindex(columns=columns)


def trainings(settings: RecallSettings):
    for cell, neighbours in planned(settings).items():
        for n, seed in product(neighbours, settings.seeds):
            yield {"seed": seed, **cell._asdict(), "neighbours": n}


def load_of(run) -> float:
    """Neighbours over memory dimension; of other networks, over 4."""
    return run["neighbours"] / (run["size"] if run["model"] == "glstm" and run["k_hop"] else 4)


def line(n: int) -> float:
    """Below the histogram line, and above it by less than its margin (the line itself is tested elsewhere)."""
    return 1.6 * n**-0.77


def accuracy(run) -> float:
    if run["model"] == "glstm":
        return 1.0 if load_of(run) <= 1 else min(0.9, 1.2 / load_of(run)) - 0.01 * (run["seed"] % 3)
    return line(run["neighbours"]) - 0.005 * (run["seed"] % 3)


def error(run) -> float:
    if run["model"] == "glstm":
        return 0.2 if load_of(run) <= 1 else 1 - 0.8 / load_of(run)
    return (0.97 + 0.01 * (run["seed"] % 3)) * (1 - 1 / run["neighbours"])


def fit_rows(task: str, settings: RecallSettings):
    for run in trainings(settings):
        score = accuracy(run) if task == "nar" else error(run)
        yield {
            **run,
            "parameters": run["size"] ** 2 * (12 if run["model"] == "glstm" else 4) + 10 * run["neighbours"],
            "steps": settings.steps - 10,
            "selected_step": settings.steps - 20,
            "train_loss": 0.1,
            "train_score": 1.0 if task == "nar" else score,
            "validation_score": score,
            "test_score": score,
            "diverged_at": -1,
        }


def curve_rows(task: str, settings: RecallSettings):
    for run, share in product(trainings(settings), (0.5, 1.0)):
        score = accuracy(run) if task == "nar" else error(run)
        yield {
            **run,
            "step": int(settings.steps * share),
            "train_loss": 1.0 / share,
            "train_score": score * share,
            "validation_score": score * share * 0.9,
        }


def jacobian_rows(settings: RecallSettings):
    for run, graph, part in product(trainings(settings), range(settings.measured_graphs), ("full", "key", "value")):
        n, glstm = run["neighbours"], run["model"] == "glstm"
        mean = (0.02 if glstm else 0.04) * n**1.5 * (1 + 0.05 * (run["seed"] % 3)) * (1 + 0.1 * graph)
        log_ratio = math.log(5.0 / load_of(run) ** 1.1) if glstm else math.log(1.02)
        log_ratio += 0.01 * (run["seed"] % 3) + 0.02 * (graph % 2)
        yield {
            **run,
            "graph": graph,
            "part": part,
            "selected": mean * math.exp(log_ratio),
            "background": mean,
            "mean": mean * (1 if part == "full" else 0.5),
            "variance": 0.1 * mean**2,
            "log_ratio": log_ratio,
            "ratio": 1.1 * math.exp(log_ratio),
        }


def hessian_rows(settings: RecallSettings):
    for run, graph in product(trainings(settings), range(settings.hessian_graphs)):
        largest = (1.0 / max(1.0, load_of(run) ** 2) if run["model"] == "glstm" else 2e-3) * (1 + 0.1 * graph)
        yield {
            **run,
            "graph": graph,
            "largest": 0.9 * largest,
            "largest_absolute": largest * (1 + 0.02 * (run["seed"] % 3)),
            "mean": 0.01 * largest,
            "frobenius": 4 * largest,
        }


def tree_rows(settings: TreesSettings):
    cells = product(settings.seeds, ("identity", "tanh", "relu", "gelu"), ("deep", "shallow"), settings.exponents)
    for seed, activation, shape, exponent in cells:
        shrinking = 3.0 ** -(exponent - 1) if shape == "deep" else 1.0
        norm = 7 * shrinking * (2**exponent + 1) ** -0.5 * (1 + 0.02 * (seed % 4))
        yield {
            "seed": seed,
            "activation": activation,
            "shape": shape,
            "leaves": 2**exponent,
            "norm": norm,
            "norm_square": 1.2 * norm**2,
        }


def property_networks(settings: PropertySettings):
    for ablation in ("none", *settings.ablations):
        yield "glstm", ablation
    for model in settings.baselines:
        yield model, "none"


def labels(settings: PropertySettings, archive: bool):
    """(source, task, column, key of ERRORS)."""
    if archive:
        yield from (("archive", task, column, column) for column, task in ARCHIVE.items())
    yield from (("generated", task, task, f"toy {task}") for task in settings.tasks)


def property_rows(settings: PropertySettings, archive: bool):
    cells = product(settings.seeds, labels(settings, archive), property_networks(settings))
    for seed, (source, task, column, key), (model, ablation) in cells:
        full, one_hop = ERRORS[key]
        value = one_hop if ablation == "1-hop" else full + 0.05 * (ablation != "none")
        value += {"glstm": 0.0, "adgn": 0.4, "gcn": 1.5}[model] + 0.01 * (seed % 3) * (1 if ablation == "none" else 2)
        yield {
            "seed": seed,
            "source": source,
            "task": task,
            "column": column,
            "model": model,
            "ablation": ablation,
            "parameters": 4000 if model == "glstm" else 3000,
            "steps": settings.steps - 1,
            "selected_step": settings.steps - 1,
            "train_error": value - 0.1,
            "validation_error": value,
            "test_error": value,
            "constant_error": 1.1,
            "diverged_at": -1,
        }


def graph_rows(settings: PropertySettings, archive: bool):
    for seed, (source, task, _, _) in product(settings.seeds, labels(settings, archive)):
        yield {
            "seed": seed,
            "source": source,
            "task": task,
            "graphs": 1400,
            "nodes": 10.0,
            "disconnected": 0.1,
            "variance": 12.0 + seed % 2,
        }


def ring_rows(settings: RingSettings):
    for seed, model, layers in product(settings.seeds, settings.models, settings.layers):
        yield {
            "seed": seed,
            "model": model,
            "layers": layers,
            "parameters": 3000 * layers,
            "train_loss": 0.5,
            "test_score": 1.0 if model == "glstm" else max(0.2, 1.0 - 0.1 * layers),
            "diverged_at": -1,
        }


def peptide_rows(settings: PeptidesSettings):
    for seed, task, ablation in product(settings.seeds, settings.tasks, ("none", *settings.ablations)):
        value = PRECISION.get(ablation, 0.718) if task == "func" else 0.253 + 0.01 * (ablation == "1-hop")
        yield {
            "seed": seed,
            "task": task,
            "model": "glstm",
            "ablation": ablation,
            "width": 64,
            "parameters": 499_000,
            "epochs": settings.epochs - 100,
            "validation_score": value,
            "test_score": value + 1e-4 * (seed % 3) * (1 if ablation == "none" else 2),
            "diverged_at": -1,
        }


def recall_tables(task: str, settings: RecallSettings):
    return {
        f"{task}_fits": fit_rows(task, settings),
        f"{task}_curves": curve_rows(task, settings),
        f"{task}_jacobians": jacobian_rows(settings),
        f"{task}_hessians": hessian_rows(settings),
    }


def invented(settings: StudySettings, archive: bool = False) -> dict[str, pd.DataFrame]:
    """Tables in which every claim holds, with the seeds, sizes and cells that `settings` plan.

    Tables of experiments without seeds are missing, as at a scale that leaves them out. With `archive` there are rows
    of the benchmark's archive beside those of generated graphs, which no real run has together.
    """
    made = {
        "trees": tree_rows(settings.trees),
        **recall_tables("nar", settings.nar),
        "gpp_fits": property_rows(settings.gpp, archive),
        "gpp_graphs": graph_rows(settings.gpp, archive),
    }
    if settings.narr.seeds:
        made |= recall_tables("narr", settings.narr)
    if settings.ring.seeds:
        made["ring_fits"] = ring_rows(settings.ring)
    if settings.peptides.seeds:
        made["peptides_fits"] = peptide_rows(settings.peptides)
    return {name: table(name, rows) for name, rows in made.items()}


@cache
def holding() -> dict[str, pd.DataFrame]:
    return invented(EVERYTHING, archive=True)


def tables() -> dict[str, pd.DataFrame]:
    return {name: rows.copy() for name, rows in holding().items()}


class Watched(dict[str, pd.DataFrame]):
    """Tables that remember which of them were read."""

    def __init__(self, content: dict[str, pd.DataFrame]) -> None:
        super().__init__(content)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> pd.DataFrame:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: object = None) -> object:  # type: ignore[override]
        self.read.add(name)
        return super().get(name, default)
