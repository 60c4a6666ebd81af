"""Tables in which every claim of the study holds, made from settings, without training or measuring anything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from jacnorm.config import load
from jacnorm.studies.worldmodel.arms import Arm, arms
from jacnorm.studies.worldmodel.perturbations import conditions
from jacnorm.studies.worldmodel.settings import (
    DreamerSettings,
    ExpansionSettings,
    PendulumSettings,
    StudySettings,
)
from jacnorm.studies.worldmodel.tables import COLUMNS

ROOT = Path(__file__).parents[3]
RICH: dict[str, Any] = {
    "lambdas": [0.0, 0.003, 0.01, 0.1],
    "f_only_lambdas": [0.01, 0.1],
    "zero_drift": [0.05, 0.3],
    "drift": [0.5],
    "gauss": [0.05, 0.15, 0.35],
    "masks": [0.25, 0.5, 0.75],
    "rotations": [10.0, 20.0, 30.0],
    "gravities": [0.5, 1.5],
}

# Settings that plan everything: all claims can be decided at every scale.
EVERYTHING = StudySettings(
    expansion=ExpansionSettings(seeds=[10, 11]),
    pendulum=PendulumSettings(
        **RICH, seeds=[10, 11, 12, 13, 14], lengths=[32], batches=[8, 32], horizons=[1, 3, 5, 10, 20]
    ),
    dreamer=DreamerSettings(
        **RICH, seeds=[10, 11, 12, 13, 14], tasks=["walker_walk"], lengths=[32], batches=[4, 16, 32]
    ),
)
LARGEST = {"pendulum": 60.0, "walker_walk": 1000.0, "quadruped_walk": 1000.0, "dummy": 60.0}
"""Largest returns."""
RANDOM = 0.5
"""The random policy's return over the largest."""


@cache
def scale_settings(scale: str) -> StudySettings:
    return load(ROOT / "configs", {"scale": scale}).studies["worldmodel"]


def table(name: str, rows) -> pd.DataFrame:
    """Rows as a table with the columns, in the order, that the study declares."""
    frame = pd.DataFrame(list(rows))
    columns = list(COLUMNS[name])
    assert frame.empty or set(frame.columns) == set(columns), set(frame.columns) ^ set(columns)
    return frame.reindex(columns=columns)


def wobble(seed: int, size: float = 0.01) -> float:
    """A little that differs from seed to seed."""
    return size * (seed % 3 - 1)


# --- expansion -------------------------------------------------------------------------------------------------------


def expansion_rows(settings: ExpansionSettings):
    systems = [("random", number, 1.0) for number in range(settings.matrices)]
    systems += [("identity", 0, scale) for scale in settings.scales]
    systems += [("semidefinite", *each) for each in product(range(settings.matrices), settings.scales)]
    for seed, (family, matrix, scale), epsilon in product(settings.seeds, systems, settings.epsilons):
        size = math.exp(scale) * (1 + 0.1 * matrix) * (0.7 if family == "identity" else 1.0)
        even = size * epsilon**2
        odd = size * epsilon * (-1 if (family, matrix) == ("random", 1) else 1)
        yield {
            "seed": seed,
            "matrix": matrix,
            "family": family,
            "scale": scale,
            "epsilon": epsilon,
            "even": even * 1.01,
            "even_error": even * 0.007,
            "even_exact": even,
            "odd": odd * 0.98,
            "odd_error": abs(odd) * 0.015,
            "odd_exact": odd,
            "odd_reversed": -odd * 1.03,
        }


# --- agents ----------------------------------------------------------------------------------------------------------


def agents(settings: PendulumSettings | DreamerSettings) -> Iterator[tuple[dict[str, Any], Arm]]:
    """The first columns of each agent, and its arm."""
    pendulum = isinstance(settings, PendulumSettings)
    for task, arm, seed in product(["pendulum"] if pendulum else settings.tasks, arms(settings), settings.seeds):
        yield {"seed": seed, "agent": "rssm" if pendulum else "dreamerv3", "task": task, **arm.columns}, arm


def strength_of(arm: Arm) -> float:
    """How much the penalty does: 0 without, 1 at the largest weight."""
    return min(1.0, math.log10(1 + 1000 * arm.weight) / 2) if arm.weight else 0.0


def fit_rows(settings):
    for first, arm in agents(settings):
        yield {
            **first,
            "parameters": 40_000,
            "updates": 800,
            "model_loss": 5.0 + wobble(first["seed"]),
            "image_loss": 3.0,
            "reward_loss": 0.05,
            "kl": 1.2,
            "penalty": 10.0 / (1 + strength_of(arm)) if arm.weight else math.nan,
            "penalty_share": 0.2 * strength_of(arm) if arm.weight else math.nan,
            "diverged_at": -1,
        }


def curve_rows(settings):
    for first, arm in agents(settings):
        faster = 1 + 0.5 * strength_of(arm) + wobble(first["seed"])
        for number in range(1, 21):
            reached = 1 - math.exp(-faster * number / 5)
            yield {
                **first,
                "update": 40 * number,
                "frames": 100_000 * number,
                "model_loss": 25.0 - 20 * reached,
                "kl": 3.0 - reached,
                "penalty": 20.0 - 10 * reached if arm.weight else math.nan,
                "return": math.nan if first["agent"] == "rssm" else LARGEST[first["task"]] * 0.9 * reached,
            }


def jacobian_rows(settings):
    for first, arm in agents(settings):
        falls = (1 - 0.5 * strength_of(arm)) * (1 + wobble(first["seed"]) * (1 + strength_of(arm)))
        prior = falls if arm.include_prior else 1 + strength_of(arm)
        yield {
            **first,
            "transitions": settings.jacobian_transitions,
            "f_h": 5.0 * falls,
            "f_h_spectral": 1.2 * falls,
            "f_z": 1.6 * falls,
            "p_h": 3.7 * prior,
            "composed": 6.0 * (falls + prior) / 2,
            "composed_prior": 3.0 * prior,
            "h_norm": 2.8 * falls,
            "relative": 5.0 * falls**0.5,
        }


def divergence_rows(settings):
    for (first, arm), horizon in product(agents(settings), settings.horizons):
        falls = 1 - 0.4 * strength_of(arm) + wobble(first["seed"]) * (1 + strength_of(arm))
        yield {**first, "horizon": horizon, "divergence": 0.7 * horizon**0.2 * falls}


def prediction_rows(settings):
    for (first, arm), horizon in product(agents(settings), settings.horizons):
        falls = 1 - 0.1 * strength_of(arm) + wobble(first["seed"]) * (1 + 0.2 * strength_of(arm))
        yield {**first, "horizon": horizon, "image_error": 2 * horizon**0.5 * falls, "reward_error": 0.05 * falls}


SEVERITY = {"clean": 0.0, "gauss": 0.2, "mask": 0.1, "rotation": 0.004, "gravity": 0.04}


def share_of(settings, arm: Arm, kind: str, strength: float) -> float:
    """Return over the largest: lost by perturbations and strong errors, gained by the penalty and middle batches."""
    strength = abs(strength - 1) if kind == "gravity" else strength
    lost = SEVERITY[kind] * strength * (1 - 0.6 * strength_of(arm))
    lost += {"none": 0.0, "zero-drift": -0.01 + 0.2 * max(0.0, arm.error_size - 0.05), "drift": 0.1}[arm.error] * (
        1 - {"zero-drift": 0.3, "drift": 0.9}.get(arm.error, 0.0) * strength_of(arm)
    )
    sizes = sorted({settings.batch, *settings.batches})
    lost += 0.03 * (arm.batch in (sizes[0], sizes[-1]) and len(sizes) > 2)
    return 0.8 - lost + 0.02 * strength_of(arm)


def return_rows(settings):
    for (first, arm), condition in product(agents(settings), conditions(settings)):
        share = share_of(settings, arm, condition.perturbation, condition.strength)
        share += wobble(first["seed"], 0.004) * (1 + 0.1 * strength_of(arm))
        yield {
            **first,
            "perturbation": condition.perturbation,
            "strength": condition.strength,
            "episodes": settings.evaluation_episodes,
            "return": LARGEST[first["task"]] * share,
            "random_return": LARGEST[first["task"]] * RANDOM,
        }


def frame_rows(settings: PendulumSettings):
    for first, arm in agents(settings):
        if first["seed"] != settings.seeds[0]:
            continue
        for kind, step in product(("true", "clean", "perturbed"), (0, *settings.horizons)):
            blur = {"true": 0.2, "clean": 0.4, "perturbed": 0.8 - 0.3 * strength_of(arm)}[kind]
            for row, column in product(range(16), range(16)):
                angle = 0.3 * step
                x, y = (column - 7.5) / 7.5, (7.5 - row) / 7.5
                along = min(0.8, max(0.0, x * math.sin(angle) + y * math.cos(angle)))
                distance = math.hypot(x - along * math.sin(angle), y - along * math.cos(angle))
                intensity = min(1.0, max(0.0, 1.2 - distance / blur))
                yield {**first, "kind": kind, "step": step, "row": row, "column": column, "intensity": intensity}


MADE = {
    "fits": fit_rows,
    "curves": curve_rows,
    "jacobians": jacobian_rows,
    "divergence": divergence_rows,
    "prediction": prediction_rows,
    "returns": return_rows,
}


def invented(settings: StudySettings) -> dict[str, pd.DataFrame]:
    """Tables in which every claim holds, with the seeds and arms that `settings` plan.

    Tables of DreamerV3 are missing where it has no seeds, as at a scale that leaves it out.
    """
    made = {"expansion": expansion_rows(settings.expansion)}
    for prefix, this in (("pendulum", settings.pendulum), ("dreamer", settings.dreamer)):
        if this.seeds:
            made |= {f"{prefix}_{name}": rows(this) for name, rows in MADE.items()}
    made["pendulum_frames"] = frame_rows(settings.pendulum)
    return {name: table(name, rows) for name, rows in made.items()}


@cache
def holding() -> dict[str, pd.DataFrame]:
    return invented(EVERYTHING)


def tables() -> dict[str, pd.DataFrame]:
    return {name: rows.copy() for name, rows in holding().items()}
