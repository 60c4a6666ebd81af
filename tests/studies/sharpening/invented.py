"""Tables in which every claim of the study holds, made from settings, without training or measuring anything."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from pathlib import Path

import pandas as pd

from jacnorm.config import load
from jacnorm.studies.sharpening.arms import Arm, trainings
from jacnorm.studies.sharpening.conditions import planned_descents
from jacnorm.studies.sharpening.settings import (
    DescentSettings,
    ImageSettings,
    RegulariserSettings,
    ScalingSettings,
    StudySettings,
)
from jacnorm.studies.sharpening.tables import COLUMNS

ROOT = Path(__file__).parents[3]

# Settings that plan everything: all claims can be decided at every scale.
EVERYTHING = StudySettings(
    descent=DescentSettings(seeds=[10, 11, 12, 13], square_learning_rates=[0.1, 0.4], measure_every=40),
    images=ImageSettings(seeds=[10, 11, 12], networks=["cnn"], smoothings=[0.0, 0.5], edge_learning_rates=[]),
    regularisers=RegulariserSettings(
        seeds=[10, 11, 12, 13, 14], learning_rates=[0.1, 0.3], shifts=[0.5], other_batches=[8, 200]
    ),
    scaling=ScalingSettings(seeds=[10, 11, 12, 13]),
)


@cache
def scale_settings(scale: str) -> StudySettings:
    return load(ROOT / "configs", {"scale": scale}).studies["sharpening"]


def table(name: str, rows) -> pd.DataFrame:
    """Rows as a table with the columns, in the order, that the study declares."""
    frame = pd.DataFrame(list(rows), columns=None)
    columns = list(COLUMNS[name])
    assert frame.empty or set(frame.columns) == set(columns), set(frame.columns) ^ set(columns)
    return frame.reindex(columns=columns)


# --- descent ---------------------------------------------------------------------------------------------------------


def descents(settings: DescentSettings):
    cells = product(settings.seeds, settings.data_sets, settings.networks, planned_descents(settings))
    for seed, data_set, network, (cost, smoothing, rate) in cells:
        yield {
            "seed": seed,
            "data_set": data_set,
            "network": network,
            "cost": cost,
            "smoothing": smoothing,
            "learning_rate": rate,
        }


def steps_of(settings: DescentSettings) -> list[int]:
    return sorted({*range(0, settings.steps + 1, settings.measure_every), settings.steps})


def to_edge(run, settings: DescentSettings) -> bool:
    """Whether a run reaches 2 over its step size: the square cost beyond its smallest step size, and the edge runs."""
    rate = run["learning_rate"]
    if run["cost"] == "square":
        return rate > min(settings.square_learning_rates)
    return run["smoothing"] == settings.edge_smoothing and rate in settings.edge_learning_rates


def jacobian_of(run, t: float) -> float:
    top = 0.6 if run["cost"] == "square" else 6 * (1.05 - run["smoothing"])
    return (0.3 + top * t) * (1 + 0.01 * (run["seed"] % 3))


def sharpness_of(run, t: float, settings: DescentSettings) -> float:
    threshold = 2 / run["learning_rate"]
    if to_edge(run, settings):
        return min(threshold * (0.4 + 2.4 * t), threshold * (1.02 + 0.01 * (run["seed"] % 3)))
    if run["cost"] == "cross-entropy" and run["smoothing"] == 0 and t > 0.25:
        return threshold * (0.25 - 0.2 * t) * 0.5
    return threshold * (0.1 + 0.4 * t) * (1 + 0.01 * (run["seed"] % 2))


def checkpoint_rows(settings: DescentSettings):
    for run, step in product(descents(settings), steps_of(settings)):
        t = step / settings.steps
        sharpness, jacobian = sharpness_of(run, t, settings), jacobian_of(run, t)
        smoothed = run["smoothing"] > 0 or run["cost"] == "square"
        yield {
            **run,
            "step": step,
            "train_loss": 0.46 * (1 - 0.9 * t),
            "train_accuracy": 0.1 + 0.9 * min(1.0, 2 * t),
            "test_loss": 0.48 * (1 - 0.8 * t),
            "test_accuracy": 0.1 + 0.85 * min(1.0, 2 * t),
            "sharpness": sharpness,
            "sharpness_residual": 5e-4,
            "sharpness_converged": True,
            "gauss_newton": sharpness * (0.97 if step else 0.4),
            "gauss_newton_residual": 5e-4,
            "gauss_newton_converged": True,
            "cost_hessian_max": 1.0 if run["cost"] == "square" else 0.5,
            "cost_hessian_mean": 1.0 if run["cost"] == "square" else 0.3 if smoothed else 0.3 * math.exp(-3 * t),
            "jacobian_max": jacobian,
            "jacobian_mean": 0.7 * jacobian,
            "jacobian_argmax": 7,
            "test_jacobian_max": 1.05 * jacobian,
            "test_jacobian_mean": 0.72 * jacobian,
            "distance": 0.4,
            "variation": 0.3 * jacobian,
            "threshold": 2 / run["learning_rate"],
            "kernel_top": 2 * jacobian**2 if run["network"] == "mlp" else math.nan,
            "lower_bound": 0.2 * t - 0.02,
            "slope": 0.2 * t + 0.05,
            "products": 24,
        }


def descent_tables(settings: DescentSettings, prefix: str):
    last = max(steps_of(settings))
    yield (
        "image_fits" if prefix else "descent_fits",
        ({**run, "steps": last, "train_loss": 0.046, "diverged_at": -1} for run in descents(settings)),
    )
    yield f"{prefix}trajectory", checkpoint_rows(settings)
    layers = settings.hidden_layers + 1
    yield (
        f"{prefix}layer_kernels",
        (
            {
                **run,
                "step": step,
                "layer": layer,
                "kernel_top": jacobian_of(run, step / settings.steps) ** 2 * (0.3 + 0.3 * layer),
            }
            for run, step, layer in product(descents(settings), steps_of(settings), range(1, layers + 1))
            if run["network"] == "mlp"
        ),
    )
    yield (
        f"{prefix}measuring_cost",
        (
            {**run, "training": float(last), "curvature": 0.6 * last, "jacobians": 0.2 * last}
            for run in descents(settings)
        ),
    )


# --- regularisers ----------------------------------------------------------------------------------------------------


def end_of(arm: Arm, seed: int, settings: RegulariserSettings, rule: str) -> dict[str, float]:
    """Jacobian norm, sharpness and gap of an arm: the gap follows the Jacobian norm, except over batch sizes."""
    strengths = {
        "weight decay": settings.weight_decays,
        "label smoothing": settings.smoothings,
        "mixup": settings.mixups,
        "sam": settings.sam_radii,
        "jacobian penalty": settings.jacobian_penalties,
        "shifts": settings.shifts,
        "crops": settings.crops,
    }
    place = 0 if arm.regulariser == "none" else 1 + sorted(strengths[arm.regulariser]).index(arm.strength)
    jacobian, sharpness = {
        "none": (7.0, 0.2),
        "weight decay": (7.0 - 1.0 * place, 0.2 + 0.2 * place),
        "label smoothing": (3.0 - 0.2 * place, 1.0 + 0.3 * place),
        "mixup": (4.0 - 0.15 * place, 0.7 + 0.4 * place),
        "sam": (6.8 - 0.1 * place, 0.12 / place if place else 0.0),
        "jacobian penalty": (3.3 - 0.3 * place, 0.6 + 0.2 * place),
        "shifts": (5.0 - 0.2 * place, 0.5 + 0.1 * place),
        "crops": (5.1 - 0.2 * place, 0.5 + 0.1 * place),
    }[arm.regulariser]
    wobble = 1 + 0.004 * (seed % 3)
    batches, rates = arm.batch / settings.batch, arm.learning_rate / settings.learning_rates[0]
    if rule == "matched":
        jacobian, sharpness = 0.8 * jacobian, 2 * sharpness
    return {
        "jacobian_max": jacobian * rates**-0.1 * batches**0.1 * wobble,
        "sharpness": sharpness * rates**-0.4 * batches**0.3 * wobble,
        "gap": 0.1 + 0.02 * jacobian - 0.01 * math.log(batches) + 0.002 * math.log(rates) + 0.001 * (seed % 3),
    }


def kept(settings: RegulariserSettings):
    """(columns of the arm, arm, rule, step, seed) of every network that is kept."""
    cells = product(settings.seeds, settings.data_sets, settings.networks)
    for seed, data_set, network in cells:
        for training in trainings(settings, settings.train_samples or 1000):
            for rule in training.rules:
                step = training.budgets.get(rule, settings.look_every * 20)
                cell = {"seed": seed, "data_set": data_set, "network": network, **training.arm.columns, "rule": rule}
                yield cell, training.arm, rule, step, seed


def endpoint_rows(settings: RegulariserSettings):
    for cell, arm, rule, step, seed in kept(settings):
        end = end_of(arm, seed, settings, rule)
        train_loss = settings.matched_loss * 0.9 if rule == "matched" else 0.002
        jacobian = end["jacobian_max"]
        yield {
            **cell,
            "step": step,
            "train_loss": train_loss,
            "train_accuracy": 1.0,
            "test_loss": train_loss + end["gap"],
            "test_accuracy": 1.0 - 0.2 * end["gap"],
            "sharpness": end["sharpness"],
            "sharpness_residual": 5e-4,
            "sharpness_converged": True,
            "gauss_newton": 0.95 * end["sharpness"],
            "gauss_newton_residual": 5e-4,
            "gauss_newton_converged": True,
            "cost_hessian_max": 0.3,
            "cost_hessian_mean": 0.01,
            "jacobian_max": jacobian,
            "jacobian_mean": 0.6 * jacobian,
            "jacobian_argmax": 3,
            "test_jacobian_max": 1.1 * jacobian,
            "test_jacobian_mean": 0.65 * jacobian,
            "distance": 0.5,
            "variation": 0.5 * jacobian,
        }


# --- sample size, width ----------------------------------------------------------------------------------------------


def size_rows(settings: ScalingSettings):
    for data_set, sizes in ((settings.data_set, settings.sizes), ("cube", settings.cube_sizes)):
        for seed, samples in product(settings.seeds, sizes):
            excess = 0.1 * (min(sizes) / samples) ** 0.5
            jacobian = 3.0 + 0.1 * (seed % 3)
            yield {
                "seed": seed,
                "data_set": data_set,
                "samples": samples,
                "train_loss": 0.05,
                "jacobian_max": jacobian,
                "test_jacobian_max": jacobian * (1.01 + excess + 0.002 * (seed % 3)),
                "distance": samples ** (-1 / settings.dimension),
                "variation": 0.4 + 4 * excess,
            }


def width_rows(settings: ScalingSettings):
    for seed, width, parametrisation in product(settings.seeds, settings.widths, settings.parametrisations):
        yield {
            "seed": seed,
            "width": width,
            "parametrisation": parametrisation,
            "sharpness_start": 2.0,
            "sharpness_end": 2.0 * (1 + (1.5 if parametrisation == "standard" else 8 / width) + 0.02 * (seed % 3)),
            "sharpness_converged": True,
            "jacobian_start": 0.3,
            "jacobian_end": 0.6 + 0.01 * (seed % 3),
            "first_layer_share": 0.2,
        }


def identity_rows(settings: ScalingSettings):
    for seed, width, parametrisation in product(settings.seeds, settings.widths, settings.parametrisations):
        errors = ("kernel_error", "logits_error", "later_layers_error", "jacobian_error")
        yield {
            "seed": seed,
            "width": width,
            "parametrisation": parametrisation,
            **{name: 1e-16 * (1 + place + seed % 3) for place, name in enumerate(errors)},
        }


def scaling_fit_rows(settings: ScalingSettings):
    pool = settings.train_samples or 1000
    cells = [("sizes", samples, settings.width, "standard") for samples in settings.sizes]
    cells += [("widths", pool, width, each) for width, each in product(settings.widths, settings.parametrisations)]
    cells += [("cube", samples, settings.width, "standard") for samples in settings.cube_sizes]
    for seed, (part, samples, width, parametrisation) in product(settings.seeds, cells):
        yield {
            "seed": seed,
            "part": part,
            "samples": samples,
            "width": width,
            "parametrisation": parametrisation,
            "train_loss": 0.05 + 0.001 * (seed % 3),
            "diverged_at": -1,
        }


def invented(settings: StudySettings) -> dict[str, pd.DataFrame]:
    """Tables in which every claim holds, with the seeds, sizes and arms that `settings` plan.

    The tables of larger images are there if their seeds are.
    """
    made = dict(descent_tables(settings.descent, ""))
    if settings.images.seeds:
        made |= dict(descent_tables(settings.images, "image_"))
    made |= {
        "sgd_fits": (
            {**cell, "step": step, "reached": True, "diverged_at": -1}
            for cell, _, _, step, _ in kept(settings.regularisers)
        ),
        "endpoints": endpoint_rows(settings.regularisers),
        "scaling_fits": scaling_fit_rows(settings.scaling),
        "sizes": size_rows(settings.scaling),
        "widths": width_rows(settings.scaling),
        "identities": identity_rows(settings.scaling),
    }
    return {name: table(name, rows) for name, rows in made.items()}


@cache
def holding() -> dict[str, pd.DataFrame]:
    return invented(EVERYTHING)


def tables() -> dict[str, pd.DataFrame]:
    return {name: rows.copy() for name, rows in holding().items()}
