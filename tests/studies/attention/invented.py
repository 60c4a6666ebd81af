"""Tables in which every claim of the study holds, made from settings, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from jacnorm.config import load
from jacnorm.studies.attention.settings import ProbingSettings, StudySettings, SyntheticSettings
from jacnorm.studies.attention.tables import COLUMNS, MEASURED, synthetic_table

ROOT = Path(__file__).parents[3]

SHAPE = (4, 4)
"""Layers, and heads of each, of the model that stands for GPT-2: fewer than its 12 and 12, to be quick."""

# GPT-2 at the paper's length: all claims can be decided.
EVERYTHING = StudySettings(
    probing=ProbingSettings(
        seeds=[10, 11, 12, 13],
        model="openai-community/gpt2",
        lengths=[64, 256, 1024],
        selected=[1, 2, 4, 8, 16, 32, 64, 128],
        spaces=["embedding", "value"],
        normalisers=["softmax", "sparsemax", "sigmoid"],
    ),
    synthetic=SyntheticSettings(lengths=[64, 256, 1024], normalisers=["softmax", "sparsemax"], heads=3),
)
# Small models that are trained, with those before training, on two texts.
SMALL = StudySettings(
    probing=ProbingSettings(
        seeds=[10, 11, 12],
        data_sets=["python_docs", "text"],
        spaces=["embedding", "value"],
        normalisers=["softmax", "ssmax", "sa-softmax"],
        layers=2,
        heads=2,
        width=8,
    ),
    synthetic=SyntheticSettings(lengths=[64, 256, 1024], normalisers=["softmax"], heads=3),
)

Settings = ProbingSettings | SyntheticSettings


@cache
def scale_settings(scale: str) -> StudySettings:
    """Those of a scale, with fewer repetitions."""
    settings = load(ROOT / "configs", {"scale": scale}).studies["attention"]
    return settings.model_copy(update={name: fewer(getattr(settings, name)) for name in ("probing", "synthetic")})


def fewer(settings: Settings) -> Settings:
    """Two lengths and normalisers, one space and text, at most three seeds and synthetic heads."""
    least = {
        "seeds": settings.seeds[:3],
        "lengths": sorted({min(settings.lengths), max(settings.lengths)}),
        "normalisers": settings.normalisers[:2],
    }
    if isinstance(settings, SyntheticSettings):
        return settings.model_copy(update={**least, "heads": min(settings.heads, 3)})
    return settings.model_copy(update={**least, "spaces": settings.spaces[:1], "data_sets": settings.data_sets[:1]})


def cells(settings: Settings, normalisers: Sequence[str] | None = None) -> pd.DataFrame:
    """Every head of each model, seed and normaliser, with `v` from -1 to 1 over heads, `s` from 0 to 1 over seeds."""
    names = settings.normalisers if normalisers is None else normalisers
    if isinstance(settings, SyntheticSettings):
        sources, layers, heads = [("synthetic", "synthetic")], [0], settings.heads
    else:
        given = settings.model is not None
        models = [settings.model] if given else ["trained", "untrained"][: 1 + settings.control]
        sources = list(product(settings.data_sets, models))
        count, heads = SHAPE if given else (settings.layers, settings.heads)
        layers = list(range(1, count + 1))
    rows = [
        (seed, data_set, model, layer, head, name)
        for seed, (data_set, model), name, layer, head in product(
            settings.seeds, sources, names, layers, range(1, heads + 1)
        )
    ]
    frame = pd.DataFrame(rows, columns=["seed", "data_set", "model", "layer", "head", "normaliser"])
    number = (frame.layer.clip(lower=1) - 1) * heads + frame["head"] - 1
    frame["v"] = 2 * number / max(int(number.max()), 1) - 1 if len(frame) else 0.0
    frame["s"] = frame.seed % 3 / 2
    return frame


def crossed(frame: pd.DataFrame, **columns: Sequence[float | str]) -> pd.DataFrame:
    """Each row with every combination of some columns."""
    for name, values in columns.items():
        frame = frame.merge(pd.DataFrame({name: list(values)}), how="cross")
    return frame


def spaces(settings: Settings) -> list[str]:
    return ["synthetic"] if isinstance(settings, SyntheticSettings) else list(settings.spaces)


def in_spaces(settings: Settings) -> pd.DataFrame:
    """Every length and smaller N; normalisers but softmax have the first space and, below the last length, one N."""
    first, *others = spaces(settings)
    frame = crossed(cells(settings), space=[first])
    if others:
        frame = pd.concat([frame, crossed(cells(settings, ["softmax"]), space=others)], ignore_index=True)
    selected = sorted({settings.distance_selected, *settings.selected})
    frame = crossed(frame, length=settings.lengths, selected=selected)
    least = (frame.selected == settings.distance_selected) | (frame.length == max(settings.lengths))
    here = (frame.selected < frame.length) & (least | (frame.normaliser == "softmax"))
    return frame[here].reset_index(drop=True)


def weights(settings: Settings) -> pd.DataFrame:
    frame = crossed(cells(settings), length=settings.lengths)
    power = frame.normaliser.map({"softmax": -0.8, "sigmoid": -0.75, "sa-softmax": -0.7}).fillna(-0.3)
    others = frame.normaliser != "softmax"
    return frame.assign(
        rows=frame.length,
        within=np.where(others, 0.9 + 0.01 * frame.s, 1.0),
        excess=np.where(others, 1.0, -0.5),
        largest_weight=(1 + 0.1 * frame.v) * frame.length ** (power + 0.01 * frame.s),
        zeros=np.where(frame.normaliser.isin(["sparsemax", "entmax15"]), 0.5, 0.0),
    )


def distances(settings: Settings) -> pd.DataFrame:
    frame = in_spaces(settings)
    scaled = frame.selected * 1024 / max(settings.lengths)
    over_n = np.minimum(scaled, 20) ** 0.3 * np.maximum(scaled / 20, 1) ** 0.05
    distance = 0.1 * (1 + 0.1 * frame.v) * frame.length ** (0.95 + 0.01 * frame.s) * over_n
    expected = distance * np.where(frame.selected < 0.05 * frame.length, 2.0, 1.0)
    return frame.assign(
        rows=frame.length - frame.selected,
        skipped_rows=frame.selected,
        selected_mass=1 - 0.9 / frame.selected,
        distance=distance,
        bound=distance * (1.2 + 1 / frame.selected),
        loose_bound=distance * (1.3 + (5 + 0.1 * frame.s) / frame.selected),
        within_bound=1.0,
        within_loose_bound=1.0,
        expectation=expected,
        expectation_all=expected,
        expectation_sampled=expected * 1.1,
        expectation_of_sampled=expected * 1.1,
        sampling_error=0.01,
    )


def collapse(settings: Settings) -> pd.DataFrame:
    frame = crossed(cells(settings, ["softmax"]), fraction=settings.fractions)
    share = 4 * frame.fraction * (1 - frame.fraction) if len(frame) else 0.0
    shape = np.where(frame.fraction <= 0.3, 1.0, (1 - frame.fraction) / 0.7)
    return frame.assign(rows=32, distance=(5 + frame.v + frame.s) * np.minimum(shape, 0.2 + share))


def separability(settings: Settings) -> pd.DataFrame:
    frame = in_spaces(settings)
    doublings = np.log2(frame.selected)
    fall = 0.05 * np.minimum(doublings, 4) + 0.003 * np.maximum(doublings - 4, 0)
    fall *= (1 + 0.05 * frame.v + 0.01 * frame.s) * np.where(frame.normaliser == "softmax", 1.0, 0.8)
    return frame.assign(
        rows=frame.length - frame.selected,
        skipped_rows=frame.selected,
        ratio=1 - fall,
        radius=0.2,
        lower=np.maximum(1 - 0.3 * doublings, 0.0),
        upper=1 - 0.8 * fall,
        above_lower=1.0,
    )


def sensitivity(settings: Settings) -> pd.DataFrame:
    frame = crossed(cells(settings), temperature=settings.temperatures, perturbation=settings.perturbations)
    low = np.where(
        frame.perturbation >= max(settings.perturbations), 3.0, 1.0 + 0.02 * np.log10(1e-3 + frame.perturbation)
    )
    damped = np.where(frame.temperature <= 0.1, low, 1 + 0.05 * (low - 1))
    change = 0.005 * (1 + 0.2 * frame.v + 0.02 * frame.s) * frame.temperature**-0.8 / damped
    return frame.assign(rows=128, change=change * np.where(frame.normaliser == "softmax", 1.0, 0.5))


def jacobians(settings: Settings) -> pd.DataFrame:
    frame = crossed(cells(settings), temperature=settings.temperatures)
    product_ = 0.2 + 0.02 * frame.v + 0.01 * frame.s
    norm = product_ / frame.temperature
    return frame.assign(
        rows=128,
        frobenius=norm * 1.2,
        frobenius_per_root=norm * 0.1,
        spectral=norm * 0.7,
        spectral_max=norm,
        spectral_largest_product=product_,
        above_quarter=0.0,
        above_half=0.0,
    )


def language_fits(settings: ProbingSettings) -> pd.DataFrame:
    given = settings.model is not None
    rows = [
        {
            "seed": seed,
            "data_set": data_set,
            "model": settings.model if given else "trained",
            "steps": 0 if given else settings.steps,
            "training_tokens": 0 if given else 100_000,
            "train_loss": np.nan if given else 3.4 + 0.01 * (seed % 3),
            "validation_loss": 3.6 + 0.01 * (seed % 3),
            "diverged_at": -1,
        }
        for seed, data_set in product(settings.seeds, settings.data_sets)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS["language_fits"]))


MAKERS = {
    "weights": weights,
    "distances": distances,
    "collapse": collapse,
    "separability": separability,
    "sensitivity": sensitivity,
    "jacobians": jacobians,
}
assert set(MAKERS) == set(MEASURED)


def invented(settings: StudySettings) -> dict[str, pd.DataFrame]:
    """Tables in which every claim holds, with the seeds, sizes and cells that `settings` plan.

    Those of an experiment are there if its seeds are.
    """
    made = {}
    if settings.probing.seeds:
        made = {"language_fits": language_fits(settings.probing)}
        made |= {name: maker(settings.probing) for name, maker in MAKERS.items()}
    if settings.synthetic.seeds:
        made |= {synthetic_table(name): maker(settings.synthetic) for name, maker in MAKERS.items()}
    return {name: rows.drop(columns=["v", "s"], errors="ignore")[list(COLUMNS[name])] for name, rows in made.items()}


@cache
def holding() -> dict[str, pd.DataFrame]:
    return invented(EVERYTHING)


@cache
def smoke() -> dict[str, pd.DataFrame]:
    return invented(StudySettings())


@cache
def small() -> dict[str, pd.DataFrame]:
    return invented(SMALL)


def tables(of: dict[str, pd.DataFrame] | None = None) -> dict[str, pd.DataFrame]:
    """A copy to change; pandas copies a column when it is written to."""
    return {name: rows.copy(deep=False) for name, rows in (of or holding()).items()}
