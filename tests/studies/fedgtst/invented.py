"""Tables in which every claim of the study holds, made from settings, without training or measuring anything."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from jacnorm.config import load
from jacnorm.studies.fedgtst.cells import Run, grid
from jacnorm.studies.fedgtst.settings import (
    DOMAINS,
    TARGETS,
    BoundsSettings,
    DomainSettings,
    EnginesSettings,
    FederatedSettings,
    ImageSettings,
    StudySettings,
)
from jacnorm.studies.fedgtst.tables import COLUMNS

ROOT = Path(__file__).parents[3]
METHODS = ["fedavg", "fedsr", "fediir", "scaffold", "fedgtst", "fedgtst-mean"]
Row = dict[str, Any]

# Settings that plan everything: all claims can be decided at every scale.
EVERYTHING = StudySettings(
    bounds=BoundsSettings(seeds=[10, 11, 12], rounds=20),
    engines=EnginesSettings(methods=METHODS),
    federated=FederatedSettings(
        networks=["lenet", "resnet18"],
        clients=[10, 50],
        methods=METHODS,
        coefficients=[1e-4, 1e-3, 3e-3],
        participations=[0.1, 0.2],
        epochs=[10],
        splits=["dirichlet"],
        extra_shares=[0.0],
        rounds=12,
        fine_tuning_epochs=4,
    ),
    images=ImageSettings(seeds=[10, 11, 12], clients=[10, 100], methods=METHODS, rounds=8, fine_tuning_epochs=3),
    domains=DomainSettings(
        seeds=[10, 11, 12], methods=["fedavg", "fedsr", "fedgtst"], rounds=4, fine_tuning_epochs=2, ablation_clients=5
    ),
)

GAINS = {"fedavg": 0.0, "fedsr": -0.018, "fediir": 0.004, "scaffold": 0.01, "fedgtst": 0.08, "fedgtst-mean": 0.03}
"""Target accuracy over FedAVG's at K = 10."""
GROWTH = 0.0002
"""Of FedGTST's gain, per client."""
BEST = {"fedgtst": 1e-3}
"""The coefficient that validation prefers, where there are several."""
SCALAR = 8
EXTRA = {"fedsr": (0, 0), "fediir": (6800, 3400), "scaffold": (29432, 29432)}
"""Bytes beside the weights, down and up."""


@cache
def scale_settings(scale: str) -> StudySettings:
    return load(ROOT / "configs", {"scale": scale}).studies["fedgtst"]


def table(name: str, rows: Iterator[Row]) -> pd.DataFrame:
    """Rows as a table with the columns, in the order, that the study declares."""
    frame = pd.DataFrame(list(rows))
    columns = list(COLUMNS[name])
    assert frame.empty or set(frame.columns) == set(columns), set(frame.columns) ^ set(columns)
    return frame.reindex(columns=columns)


def wobble(run: Run) -> float:
    """A small number that differs between seeds and methods."""
    return ((7 * run.seed + 3 * METHODS.index(run.method)) % 5 - 2) / 1000


def off(run: Run) -> float:
    """How far a coefficient is from the best one, in decades of a kind."""
    best = BEST.get(run.method)
    return 0.0 if best is None or run.coefficient == best else 1.0 if run.coefficient > best else 0.5


def accuracy(run: Run) -> float:
    at = run.condition
    gain = GAINS[run.method] + GROWTH * (at.clients - 10) * (run.method == "fedgtst")
    share = 0.01 * (at.participation - 1)
    # More clients cost every method more than FedGTST gains by them.
    fall = 0.0008 * (at.clients - 10)
    network = 0.06 * (at.network == "resnet18")
    epochs = -0.05 * (at.local_epochs > 1)
    return 0.5 + gain + share - fall + network + epochs - 0.02 * off(run) + wobble(run)


def ratio(run: Run, more: float) -> float:
    """A statistic over FedAVG's."""
    return 1.0 if not run.method.startswith("fedgtst") else more ** (1 - 0.4 * off(run)) * (1 + wobble(run))


def tasks(settings: FederatedSettings) -> list[tuple[str, str]]:
    if settings.pair == "domainnet":
        return [("domainnet", f"domainnet_{domain}") for domain in DOMAINS]
    return [(settings.pair, TARGETS[settings.pair])]


def runs(settings: FederatedSettings) -> Iterator[Run]:
    for source, target in tasks(settings):
        for stack in grid(settings, source, target):
            yield from stack


def fit_rows(settings: FederatedSettings) -> Iterator[Row]:
    for run in runs(settings):
        down, up = (SCALAR, SCALAR) if run.method.startswith("fedgtst") else EXTRA.get(run.method, (0, 0))
        weights = 4 * (7358 if run.condition.network == "lenet" else 11_000_000)
        yield {
            **run.columns,
            "parameters": weights // 4,
            "rounds": settings.rounds,
            "outcome": "finished",
            "ended_at": -1,
            "dropped": 0,
            "bytes_down": weights + down,
            "bytes_up": weights + up,
            "weight_bytes": weights,
        }


def round_rows(settings: FederatedSettings) -> Iterator[Row]:
    for run, number in product(runs(settings), range(1, settings.rounds + 1)):
        sent = run.method.startswith("fedgtst")
        norm = 3.0 * (1 + 0.05 * number + wobble(run))
        yield {
            **run.columns,
            "round": number,
            "participants": max(1, round(run.condition.participation * run.condition.clients)),
            "loss": 2.3 * 0.9**number + 0.1 + wobble(run),
            "guide": norm * (1.3 + 0.2 * off(run)) if sent else float("nan"),
            "norm_mean": 0.7 * norm,
            "norm_sd": 0.2 * norm,
            "norm_max": norm,
        }


def client_rows(settings: FederatedSettings) -> Iterator[Row]:
    splits = ["domains"] if settings.pair == "domainnet" else [settings.split, *settings.splits]
    sources = [settings.pair] if settings.pair != "domainnet" else [f"domainnet without {each}" for each in DOMAINS]
    for seed, source, clients, split in product(settings.seeds, sources, settings.clients, splits):
        for client, label in product(range(clients), range(10)):
            two = settings.client_samples // 2 if label in (client % 10, (client + 1) % 10) else 0
            even = (label + client) % 5 * settings.client_samples // 20
            yield {
                "seed": seed,
                "source": source,
                "clients": clients,
                "split": split,
                "client": client,
                "label": label,
                "samples": two if split == "balanced" else even,
            }


def statistic_rows(settings: FederatedSettings) -> Iterator[Row]:
    numbers = range(0, settings.rounds + 1, settings.measure_every)
    for run, number in product(runs(settings), numbers):
        norm = (1 + 0.02 * number) * (ratio(run, 1.3) if number else 1.0)
        variance = (14 + 0.1 * number + wobble(run)) * (ratio(run, 0.7) if number else 1.0)
        yield {
            **run.columns,
            "round": number,
            "norm_of_mean": norm,
            "variance": variance,
            "norm_dispersion": 0.03 * variance,
            "direction_dispersion": 0.97 * variance,
            "norm_mean": 3.0,
            "norm_max": 5.0,
            "source_loss": 2.3 * 0.9**number,
            "source_accuracy": min(0.9, 0.1 + 0.05 * number),
        }


def random_runs(settings: FederatedSettings) -> Iterator[Run]:
    """The first run of each seed, target, network and kind of network, which stands for all."""
    seen = set()
    for run in runs(settings):
        start = (run.condition.target, run.condition.network, run.method == "fedsr", run.seed)
        if start not in seen:
            seen.add(start)
            yield run


def features_of(settings: FederatedSettings) -> Iterator[tuple[Run, str, float]]:
    yield from ((run, "trained", accuracy(run)) for run in runs(settings))
    yield from ((run, "random", 0.25 + 0.01 * (run.seed % 3)) for run in random_runs(settings))


def transfer_rows(settings: FederatedSettings) -> Iterator[Row]:
    for run, features, value in features_of(settings):
        yield {
            **run.columns,
            "features": features,
            "train_accuracy": value + 0.1,
            "validation_accuracy": value + 0.01,
            "target_accuracy": value,
            "target_loss": 2 * (1 - value),
        }


def curve_rows(settings: FederatedSettings) -> Iterator[Row]:
    for (run, features, value), epoch in product(features_of(settings), range(settings.fine_tuning_epochs + 1)):
        reached = 0.1 + (value - 0.1) * (1 - 0.4**epoch)
        yield {
            **run.columns,
            "features": features,
            "epoch": epoch,
            "train_accuracy": reached + 0.05,
            "target_accuracy": reached,
        }


def bound_rows(settings: BoundsSettings) -> Iterator[Row]:
    rates = [("optimal", 0.1), *(("fixed", rate) for rate in settings.fixed_rates)]
    for seed, (rule, rate), number in product(settings.seeds, rates, range(settings.rounds)):
        corrected = 0.01 / (1 + number) * (1 + 0.01 * (seed % 3))
        optimal = rule == "optimal"
        yield {
            "seed": seed,
            "rule": rule,
            "rate": rate * (1 - 0.01 * number) if optimal else rate,
            "round": number,
            "smoothness": 5.0,
            "loss": 2.3 - 0.01 * number,
            "decrease": 5 * corrected,
            "norm_of_mean": 0.5,
            "variance": 2.0,
            "lemma": corrected if optimal else -3 * corrected,
            "corrected": corrected if optimal else float("nan"),
            "printed": 4 * corrected if optimal else float("nan"),
            "variance_free": 2 * corrected,
        }


def engine_rows(settings: EnginesSettings) -> Iterator[Row]:
    cells = product(settings.seeds, settings.methods, ("loop", "flower"), range(1, settings.rounds + 1))
    for seed, method, engine, number in cells:
        down, up = (SCALAR, SCALAR) if method.startswith("fedgtst") else EXTRA.get(method, (0, 0))
        yield {
            "seed": seed,
            "method": method,
            "engine": engine,
            "round": number,
            "weights_difference": 0.0 if (method, number) == ("fedavg", 1) else 1e-7 * number,
            "guide_difference": 1e-8 * number if method.startswith("fedgtst") else 0.0,
            "bytes_down": 29432 + down,
            "bytes_up": 29432 + up,
            "weight_bytes": 29432,
        }


def federated_tables(prefix: str, settings: FederatedSettings) -> dict[str, Iterator[Row]]:
    return {
        f"{prefix}_runs": fit_rows(settings),
        f"{prefix}_rounds": round_rows(settings),
        f"{prefix}_clients": client_rows(settings),
        f"{prefix}_statistics": statistic_rows(settings),
        f"{prefix}_transfer": transfer_rows(settings),
        f"{prefix}_fine_tuning": curve_rows(settings),
    }


def invented(settings: StudySettings) -> dict[str, pd.DataFrame]:
    """Tables in which every claim holds, with the seeds and cells that `settings` plan.

    Tables of experiments without seeds are missing, as at a scale that leaves them out.
    """
    made = {"bounds": bound_rows(settings.bounds), "engines": engine_rows(settings.engines)}
    for prefix, this in (("federated", settings.federated), ("image", settings.images), ("domain", settings.domains)):
        if this.seeds:
            made |= federated_tables(prefix, this)
    return {name: table(name, rows) for name, rows in made.items()}


@cache
def holding() -> dict[str, pd.DataFrame]:
    return invented(EVERYTHING)


def tables() -> dict[str, pd.DataFrame]:
    return {name: rows.copy() for name, rows in holding().items()}
