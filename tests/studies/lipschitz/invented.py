"""Tables in which every claim of the study holds, made from settings, without training or measuring anything."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from pathlib import Path

import pandas as pd

from jacnorm.config import load
from jacnorm.studies.lipschitz.settings import (
    DepthSettings,
    PairedSettings,
    ResidualSettings,
    StudySettings,
    TableSettings,
)
from jacnorm.studies.lipschitz.tables import COLUMNS

ROOT = Path(__file__).parents[3]

# Settings that plan everything: all claims can be decided at every scale.
EVERYTHING = StudySettings(
    depth=DepthSettings(activations=["relu", "tanh"], widths=[32], depths=[2, 4, 6, 8, 10]),
    residual=ResidualSettings(seeds=[10, 11, 12], depths=[10, 16, 22], compared_depth=10, top=20),
    paired=PairedSettings(
        seeds=list(range(10, 18)),
        settings=["low-learning-rate", "no-augmentation", "layer-norm", "no-normalisation"],
        shift=1,
        validation_samples=100,
        coefficients=[0.1, 0.05],
    ),
    table=TableSettings(
        seeds=[10, 11, 12, 13, 14],
        depth=10,
        settings=["low-learning-rate", "no-augmentation", "layer-norm", "no-normalisation"],
        flip=True,
        validation_samples=100,
        coefficients=[0.1, 0.05],
    ),
)

ERRORS = {
    "baseline": 5.0,
    "low-learning-rate": 7.0,
    "no-augmentation": 11.0,
    "layer-norm": 7.5,
    "no-normalisation": 8.5,
}
GAINS = {"baseline": 0.3, "low-learning-rate": 0.5, "no-augmentation": 2.0, "layer-norm": 0.7}


@cache
def scale_settings(scale: str) -> StudySettings:
    return load(ROOT / "configs", {"scale": scale}).studies["lipschitz"]


def table(name: str, rows) -> pd.DataFrame:
    """Rows as a table with the columns, in the order, that the study declares."""
    frame = pd.DataFrame(list(rows), columns=None)
    columns = list(COLUMNS[name])
    assert frame.empty or set(frame.columns) == set(columns), set(frame.columns) ^ set(columns)
    return frame.reindex(columns=columns)


def networks(settings: DepthSettings):
    for seed, activation, width, depth in product(
        settings.seeds, settings.activations, settings.widths, settings.depths
    ):
        yield {"seed": seed, "data_set": settings.data_set, "activation": activation, "width": width, "depth": depth}


def spectral(network) -> float:
    rate = 1.2 if network["activation"] == "relu" else 1.0
    return 1.0 + (rate + 0.01 * (network["seed"] % 3)) * network["depth"]


def ours(network) -> float:
    power = 2.5 if network["activation"] == "relu" else 1.9
    return 0.5 + power * math.log(network["depth"]) + 0.02 * (network["seed"] % 4)


MARGINS = {"margin": 1.1, "margin_p01": 1.5, "margin_p10": 3.0, "margin_p50": 6.0}


def leading_rows(settings: DepthSettings):
    for network, (stage, shift) in product(networks(settings), (("initial", -0.5), ("trained", 0.0))):
        yield {
            **network,
            "stage": stage,
            **MARGINS,
            "log_ours_weighted": ours(network) + shift,
            "log_spectral_weighted": spectral(network) + shift,
            "log_ours_unweighted": ours(network) - 2 + shift,
            "log_spectral_unweighted": spectral(network) - 2 + shift,
            "log_largest_term": ours(network) - 2.5 + shift,
            "not_applicable": "",
        }


def layer_rows(settings: DepthSettings):
    for network, stage in product(networks(settings), ("initial", "trained")):
        for layer in range(1, network["depth"] + 1):
            yield {
                **network,
                "stage": stage,
                "layer": layer,
                "log_jacobian": 0.2 * (network["depth"] - layer) + 0.3 * (stage == "trained"),
                "log_hidden": 1.5 + 0.1 * layer,
                "log_spectral_norm": 0.6,
                "log_rows": 3.0,
                "log_entries": 5.0,
            }


def theorem_rows(settings: DepthSettings):
    for network in networks(settings):
        depth, bound = network["depth"], spectral(network) - 1.0
        yield {
            **network,
            "samples": settings.theorem_samples,
            "pairs": depth * (2 * depth - 1),
            "passes": depth * (2 * depth - 1),
            "separate_passes": sum(n * (2 * depth - n) for n in range(1, 2 * depth)),
            "log_h1": bound - 0.2,
            "log_h2": bound - 3.0,
            "log_h3": bound - 2.0,
            "log_jac": bound - 2.5,
            "log_bound": bound,
            "log_simplified": bound + 4.0,
            "log_spectral": spectral(network),
        }


def augmented_rows(settings: DepthSettings):
    gaps = {"train": (0.0, 0.0), "test": (0.0, 0.2), "noise": (0.0, 0.9)}
    for network, (split, (smallest, largest)) in product(networks(settings), gaps.items()):
        yield {
            **network,
            "split": split,
            "smallest_gap": smallest,
            "largest_gap": largest,
            "indicator_slope": 1.0 - 1e-4 * (network["seed"] % 3),
            "ramp_slope": 1.0 - 1e-5 * (network["seed"] % 3),
        }


def residual_rows(settings: ResidualSettings):
    for seed, depth, (stage, shift) in product(settings.seeds, settings.depths, (("initial", -1.0), ("trained", 0.0))):
        own = 4.0 + 0.06 * depth + 0.03 * (seed % 3)
        product_of_norms = 5.0 + (0.8 + 0.01 * (seed % 3)) * depth + shift
        yield {
            "seed": seed,
            "data_set": settings.data_set,
            "depth": depth,
            "stage": stage,
            **MARGINS,
            "log_ours_unweighted": own,
            "log_spectral_unweighted": product_of_norms,
            "log_ours_weighted": own + 5.0,
            "log_spectral_weighted": product_of_norms + 6.0,
        }


def residual_fit_rows(settings: ResidualSettings):
    parts = [("sweep", depth, "batch") for depth in settings.depths]
    parts += [("figure1", settings.compared_depth, normalisation) for normalisation in ("batch", "none")]
    for seed, (part, depth, normalisation) in product(settings.seeds, parts):
        yield {
            "seed": seed,
            "data_set": settings.data_set,
            "depth": depth,
            "normalisation": normalisation,
            "part": part,
            "train_error": 0.0,
            "test_error": 4.0 + 0.1 * (seed % 3),
            "train_loss": 0.01,
            "diverged_at": -1,
        }


def block_rows(settings: ResidualSettings):
    tops = {"batch": 3.4, "none": 7.9}
    for seed, (normalisation, top), rank in product(settings.seeds, tops.items(), range(1, settings.top + 1)):
        yield {
            "seed": seed,
            "data_set": settings.data_set,
            "depth": settings.compared_depth,
            "normalisation": normalisation,
            "rank": rank,
            "log_value": top + 0.1 * (seed % 3) - (1.5 if normalisation == "none" else 0.6) * math.log10(rank),
            "misclassified": 0,
        }


def cells(settings):
    """Cells of an experiment with the regulariser: (setting, regularised, coefficient); the last one is best."""
    for setting in ("baseline", *settings.settings):
        yield setting, False, 0.0
        if setting in settings.settings and setting != "no-normalisation":
            for coefficient in settings.coefficients:
                yield setting, True, coefficient


def error_rows(settings):
    for seed, (setting, regularised, coefficient) in product(settings.seeds, cells(settings)):
        best = coefficient == settings.coefficients[-1]
        gain = GAINS.get(setting, 0.0) * (1 + 0.05 * (seed % 4)) * (1.0 if best else 0.2) if regularised else 0.0
        error = ERRORS[setting] + 0.3 * math.sin(seed) - gain
        yield {
            "seed": seed,
            "data_set": settings.data_set,
            "network": settings.network,
            "setting": setting,
            "regularised": regularised,
            "coefficient": coefficient,
            "variant": settings.variant,
            "learning_rate": settings.low_learning_rate if setting == "low-learning-rate" else settings.learning_rate,
            "test_error": error,
            "best_test_error": error - 0.2 + 0.01 * (seed % 2),
            "validation_error": error + 0.5 if settings.validation_samples else math.nan,
            "train_error": 0.0,
            "train_loss": 0.01,
            "penalised_share": 0.1 if regularised else 0.3,
            "diverged_at": -1,
        }


def norm_rows(settings):
    layers = 2 if settings.network == "mlp" else settings.depth - 2
    for seed, (setting, regularised, coefficient) in product(settings.seeds, cells(settings)):
        for layer in range(1, layers + 1):
            yield {
                "seed": seed,
                "data_set": settings.data_set,
                "network": settings.network,
                "setting": setting,
                "regularised": regularised,
                "coefficient": coefficient,
                "layer": layer,
                "squared_norm": (0.4 if regularised else 1.0 + 0.02 * (seed % 3)) * layer,
                "penalised_share": (0.2 if regularised else 0.7) + 0.001 * (seed % 3),
                "released_share": 0.0,
            }


def invented(settings: StudySettings) -> dict[str, pd.DataFrame]:
    """Tables in which every claim holds, with the seeds, sizes and cells that `settings` plan.

    The table of WideResNets is there if its seeds are.
    """
    made = {
        "fits": (
            {
                **network,
                "epochs": 20 + 2 * network["depth"],
                "reached": True,
                "train_loss": 0.01,
                "test_accuracy": 0.95,
                "diverged_at": -1,
            }
            for network in networks(settings.depth)
        ),
        "leading": leading_rows(settings.depth),
        "layers": layer_rows(settings.depth),
        "theorem": theorem_rows(settings.depth),
        "augmented": augmented_rows(settings.depth),
        "residual_fits": residual_fit_rows(settings.residual),
        "residual": residual_rows(settings.residual),
        "blocks": block_rows(settings.residual),
        "paired_errors": error_rows(settings.paired),
        "paired_norms": norm_rows(settings.paired),
    }
    if settings.table.seeds:
        made |= {"table_errors": error_rows(settings.table), "table_norms": norm_rows(settings.table)}
    return {name: table(name, rows) for name, rows in made.items()}


@cache
def holding() -> dict[str, pd.DataFrame]:
    return invented(EVERYTHING)


def tables() -> dict[str, pd.DataFrame]:
    return {name: rows.copy() for name, rows in holding().items()}
