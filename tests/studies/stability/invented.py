"""Tables in which every claim of the study holds, made from the settings of a scale, without measuring anything."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from pathlib import Path

import pandas as pd

from jacnorm.config import load
from jacnorm.studies.stability.settings import StudySettings
from jacnorm.studies.stability.tables import COLUMNS

ROOT = Path(__file__).parents[3]
INF = math.inf

# Exponents and factors written out from their formulas, not taken from the code under test.
ALPHA_MAG = {0.3: 1.0078, 0.5: 1.0377, 0.8: 1.2405, 0.9: 1.5088, 0.95: 1.8929, 0.99: 3.4403}
GAMMA = {m: math.sqrt((m + 1) ** (m + 1) / m**m) for m in (1, 3, 10)}


@cache
def scale_settings(scale: str) -> StudySettings:
    return load(ROOT / "configs", {"scale": scale}).studies["stability"]


def depth_slope(activation, sigma_w2, method, sparsity, scaling) -> float:
    if method == "dense":
        return 0.5 * math.log(sigma_w2 / 2) if activation == "relu" else 0.0
    lost = 0.5 * math.log(1 - sparsity) if method == "random" else -math.log(ALPHA_MAG[sparsity])
    won = {
        "none": 0.0,
        "inverse_sqrt_density": -0.5 * math.log(1 - sparsity),
        "alpha_mag": math.log(ALPHA_MAG[sparsity]),
    }
    return lost + won[scaling]


def depth_rows(settings):
    depths = sorted({1, settings.depth, *range(settings.record_every, settings.depth + 1, settings.record_every)})
    cells = [("relu", v, "dense", 0.0, "none") for v in settings.relu_sigma_w2]
    cells += [("tanh", v, "dense", 0.0, "none") for v in settings.tanh_sigma_w2]
    for sparsity in settings.sparsities:
        for method, scaling in (
            *(("random", s) for s in ("none", "inverse_sqrt_density")),
            *(("magnitude", s) for s in ("none", "inverse_sqrt_density", "alpha_mag")),
        ):
            cells.append(("relu", 2.0, method, sparsity, scaling))
        cells += [("tanh", 1.0, "random", sparsity, s) for s in ("none", "inverse_sqrt_density")]
    for width, (activation, sigma_w2, *rest), seed in product(settings.widths, cells, settings.seeds):
        rate = depth_slope(activation, sigma_w2, *rest)
        for depth in depths:
            log_norm = 0.3 + 0.01 * (seed % 7) + rate * depth
            yield [seed, activation, width, sigma_w2, *rest, depth, log_norm, log_norm - 1]


def limit_rows(settings):
    for width, depth, seed in product(settings.limit_widths, settings.limit_depths, settings.seeds):
        log_limit = math.log(GAMMA[depth])
        log_norm = log_limit - (1.0 + 0.05 * (seed % 5)) * depth / width
        yield [seed, "both ends", width, depth, log_norm, log_limit]
        yield [
            seed,
            "no end",
            width,
            depth,
            log_norm + 5,
            log_limit + 5,
        ]  # must not be mistaken for the claim's product


def table(name, rows, columns=None):
    return pd.DataFrame(list(rows), columns=columns or list(COLUMNS[name]))


def invented(settings: StudySettings) -> dict[str, pd.DataFrame]:
    """Tables in which every claim holds, with the seeds, sizes and cells that `settings` plan."""
    theorem, conditions, scores = settings.theorem, settings.conditions, settings.scores
    trainability, drift = settings.trainability, settings.drift
    depth_columns = ["seed", "activation", "width", "sigma_w2", "method", "sparsity", "scaling", "depth", "log_norm"]
    methods, diagonals = ("dense", "random", "magnitude"), ("true", "surrogate")
    draws = range(theorem.surrogate_draws_per_seed)
    repeats = range(theorem.independence_repeats_per_seed)
    pairs = {
        "same layer": 0.5,
        "next layer": 0.4,
        "weight magnitude": 0.3,
        "weight sign": 0.01,
        "row sum (control)": 1e-9,
    }
    sizes = [
        ("degree-over-log", n, c, c * math.log(n)) for n, c in product(conditions.sizes, conditions.degrees_over_log)
    ]
    sizes += [("fixed-degree", n, 4 / math.log(n), 4.0) for n in conditions.fixed_degree_sizes]

    def norm(sweep, n, c):
        return 2.0 + 0.02 / c if c > 4 else 2.7 + 0.01 * math.log(n)

    score_cells = [("dense", 0.0, "none"), *product(scores.methods, scores.sparsities, scores.scalings)]
    score_logs = {"dense": 0.5, "none": -8.0, "inverse_sqrt_density": 20.0, "frobenius": 0.7, "activity": 0.2}

    def score(method, scaling):
        follows = method in ("snip", "grasp") and scaling == "frobenius"
        return 22.0 if follows else score_logs["dense" if method == "dense" else scaling]

    arms = list(
        product(
            trainability.data_sets,
            trainability.depths,
            trainability.methods,
            trainability.sparsities,
            ("none", "frobenius"),
            trainability.learning_rates,
        )
    )
    best = trainability.learning_rates[-1]

    def accuracy(data_set, scaling, rate):
        return (0.3 if data_set == "cifar10" else 0.9 if rate == best else 0.5) if scaling == "frobenius" else 0.1

    logs = {0.5: 9.0, 0.75: 4.0, 1.0: 2.4, 1.25: 2.35, 1.5: 2.32, 2.0: 2.31, INF: 2.3}
    return {
        "depth": table("depth", depth_rows(settings.depth), [*depth_columns, "log_gain"]),
        "limit": table("limit", limit_rows(theorem), ["seed", "product", "width", "depth", "log_norm", "log_limit"]),
        "surrogate": table(
            "surrogate",
            (
                [seed, draw, method, diagonal, math.sin(seed + 10 * draw) + 1e-3 * (diagonal == "true")]
                for seed, draw, method, diagonal in product(theorem.seeds, draws, methods, diagonals)
            ),
        ),
        "independence": table(
            "independence",
            (
                [seed, repeat, width, pair, theorem.independence_networks, p]
                for seed, repeat, width, (pair, p) in product(
                    theorem.seeds, repeats, theorem.independence_widths, pairs.items()
                )
            ),
        ),
        "edge_matrices": table(
            "edge_matrices",
            (
                # signs would fail every margin: only Gaussian entries are judged
                [seed, sweep, law, n, d, c, norm(sweep, n, c) + 0.001 * (seed % 3) if law == "gaussian" else 9.0, 1e-9]
                for seed, (sweep, n, c, d), law in product(conditions.seeds, sizes, ("gaussian", "rademacher"))
            ),
        ),
        "correlated": table(
            "correlated",
            (
                [seed, width, 20, kind, diagonal, a, logs[a] + 0.01 * (seed % 4) if diagonal != "true" else -INF]
                for seed, width, kind, diagonal, a in product(
                    conditions.seeds,
                    conditions.correlated_widths,
                    ("equicorrelated", "row"),
                    ("linear", "surrogate", "true"),
                    [*conditions.exponents, INF],
                )
            ),
        ),
        "scores": table(
            "scores",
            (
                [
                    seed,
                    depth,
                    *cell,
                    score(cell[0], cell[2]) + 0.01 * (seed % 4),
                    0.0,
                    ALPHA_MAG.get(cell[1], 1.0) * (1 + 0.001 * (seed % 4)),
                ]
                for seed, depth, cell in product(scores.seeds, scores.depths, score_cells)
            ),
        ),
        "trainability": table(
            "trainability",
            (
                {
                    "seed": seed,
                    "data_set": data_set,
                    "width": trainability.width,
                    "depth": depth,
                    "method": method,
                    "sparsity": sparsity,
                    "scaling": scaling,
                    "learning_rate": rate,
                    "train_loss": 1.0,
                    "validation_accuracy": accuracy(data_set, scaling, rate),
                    "test_accuracy": accuracy(data_set, scaling, rate) + 0.005 * (seed % 3),
                    "diverged_at": -1,
                }
                for seed, (data_set, depth, method, sparsity, scaling, rate) in product(trainability.seeds, arms)
            ),
        ),
        "curves": table(
            "curves",
            (
                {"seed": s, "data_set": d, "width": drift.width, "depth": depth, "epoch": e + 1, "diverged_at": -1}
                for s, d, depth, e in product(drift.seeds, drift.data_sets, drift.depths, range(drift.epochs))
            ),
        ),
        "drift": table(
            "drift",
            (
                {
                    "seed": s,
                    "data_set": d,
                    "width": drift.width,
                    "depth": depth,
                    "epoch": e,
                    "log_norm": 1.9 + 0.01 * depth + 0.02 * (s % 3),
                }
                for s, d, depth, e in product(drift.seeds, drift.data_sets, drift.depths, drift.measured_epochs)
            ),
        ),
    }


@cache
def holding(scale: str) -> dict[str, pd.DataFrame]:
    return invented(scale_settings(scale))


def tables(scale: str = "smoke") -> dict[str, pd.DataFrame]:
    return {name: rows.copy() for name, rows in holding(scale).items()}
