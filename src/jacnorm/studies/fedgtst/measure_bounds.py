"""The descent inequalities on a convex problem: softmax regression on digits, two classes per client, in float64.

Letters: S seeds, Q step sizes (the optimal one first), K clients, n samples of each, d features with the constant one,
C classes. The data of a seed are the same for all step sizes, whose weights therefore stand side by side in one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from jacnorm.data.read import Split, read
from jacnorm.studies.fedgtst import bounds as theory
from jacnorm.studies.fedgtst import tables as study_tables
from jacnorm.studies.fedgtst.inputs import STUDY
from jacnorm.studies.fedgtst.settings import BoundsSettings, Device
from jacnorm.studies.fedgtst.splits import clients
from jacnorm.training.job import job
from jacnorm.training.seeds import generator


@dataclass(frozen=True)
class Problem:
    """The clients' samples, x (S, K, n, d) with a constant feature, y (S, K, n, C) one-hot; the start (S, d, C)."""

    x: Tensor
    y: Tensor
    start: Tensor


def bounds(settings: BoundsSettings, tables: Path, data: Path, device: Device = "auto") -> None:
    """Loss of softmax regression before and after every round, beside what the theory promises."""
    with job(STUDY, "measure", "bounds", settings, device) as this:
        found = read(data)
        made = problem(settings, found.train, found.pixel_max, len(found.classes))
        x, y, start = this.put((made.x, made.y, made.start))
        rows = rounds(settings, Problem(x, y, start))
        study_tables.write(tables, "bounds", settings, rows, this.tracker)


def problem(settings: BoundsSettings, train: Split, pixel_max: int, classes: int) -> Problem:
    """Split and start of each seed: pixels in 0 .. 1; weights normal with variance 1 / d."""
    x = torch.cat([train.x.flatten(1).double() / pixel_max, torch.ones(len(train), 1, dtype=torch.float64)], 1)
    y = one_hot(train.y, classes).double()
    held = torch.stack(
        [clients(settings, settings.clients, "balanced", seed, train.y, classes) for seed in settings.seeds]
    )  # (S, K, n)
    shape = (x.shape[1], classes)
    start = [
        torch.randn(shape, generator=generator(STUDY, "bounds", seed, "initialisation"), dtype=torch.float64)
        for seed in settings.seeds
    ]
    return Problem(x[held], y[held], torch.stack(start) / math.sqrt(shape[0]))


def rounds(settings: BoundsSettings, given: Problem) -> Iterator[dict[str, Any]]:
    """Rows of the table: every seed, step size and round."""
    alpha = theory.softmax_smoothness(given.x)[:, None]  # (S, 1)
    fixed = torch.tensor(settings.fixed_rates, dtype=torch.float64, device=alpha.device)
    weights = given.start[:, None].repeat(1, 1 + len(fixed), 1, 1)  # (S, Q, d, C)
    loss, gradients = losses(given, weights)
    for number in range(settings.rounds):
        square, variance = theory.moments(gradients.flatten(3))  # (S, Q)
        best = theory.optimal_rate(square[:, :1], variance[:, :1], alpha)
        rate = torch.cat([best, fixed / alpha], 1)
        weights = weights - rate[..., None, None] * gradients.mean(2)
        after, gradients = losses(given, weights)
        columns = {
            "rate": rate * alpha,
            "smoothness": alpha.expand_as(rate),
            "loss": loss,
            "decrease": loss - after,
            "norm_of_mean": square.sqrt(),
            "variance": variance,
            "lemma": theory.lemma(rate, square, variance, alpha),
            "corrected": theory.corrected(square, variance, alpha),
            "printed": theory.printed(square, variance, alpha),
            "variance_free": theory.variance_free(rate, square, alpha),
        }
        yield from _rows(settings, number, {name: tensor.tolist() for name, tensor in columns.items()})
        loss = after


def _rows(settings: BoundsSettings, number: int, columns: dict[str, list[list[float]]]) -> Iterator[dict[str, Any]]:
    """Rows of one round, from columns of S lists of Q numbers."""
    for run, seed in enumerate(settings.seeds):
        for which, rate in enumerate([None, *settings.fixed_rates]):
            row = {"seed": seed, "round": number, **{name: values[run][which] for name, values in columns.items()}}
            if rate is None:
                yield {**row, "rule": "optimal"}
            else:  # as set, without rounding; Theorem 2 is about the optimal step only
                yield {**row, "rule": "fixed", "rate": rate, "corrected": math.nan, "printed": math.nan}


def losses(given: Problem, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss over clients, (S, Q), and gradient of each client's mean loss, (S, Q, K, d, C), at (S, Q, d, C)."""
    number, samples = given.x.shape[1:3]
    choices, classes = weights.shape[1], weights.shape[3]
    beside = weights.movedim(1, 2).flatten(2)  # (S, d, QC)
    logits = (given.x.flatten(1, 2) @ beside).unflatten(2, (choices, classes))  # (S, Kn, Q, C)
    y = given.y.flatten(1, 2)[:, :, None]  # (S, Kn, 1, C)
    log_share = logits.log_softmax(3)
    # Clients hold as many samples each, so the mean over clients is that over all samples.
    loss = -(log_share * y).sum((1, 3)) / (number * samples)
    residual = ((log_share.exp() - y) / samples).flatten(2).unflatten(1, (number, samples))  # (S, K, n, QC)
    gradients = given.x.mT @ residual  # (S, K, d, QC)
    return loss, gradients.unflatten(3, (choices, classes)).permute(0, 3, 1, 2, 4)
