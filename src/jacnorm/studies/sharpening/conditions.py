"""The runs of full-batch descent that claims compare: one data set, network, cost and smoothing, seeds and step sizes.

Each run gives one number, and the runs of a seed their median, so that samples are seeds; checkpoints are no samples.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from jacnorm.report.estimands import Measured, account, quantity, select
from jacnorm.report.verdicts import Accounting, NotTested, Quantity
from jacnorm.studies.sharpening.settings import DescentSettings, StudySettings

Tables = Mapping[str, pd.DataFrame]
Key = tuple[Hashable, ...]
Number = Callable[[pd.DataFrame], float]
Asked = Mapping[str, Callable[[pd.DataFrame], bool]]

STRONG_SMOOTHING = 0.3
"""Label smoothing from which C1, C2 and C5 are asked."""
EVERY_RUN: Asked = {}


@dataclass(frozen=True)
class Experiment:
    """Full-batch descent on digits or on larger images: its tables and settings."""

    settings: DescentSettings
    trajectory: pd.DataFrame
    fits: pd.DataFrame


def experiments(tables: Tables, settings: StudySettings) -> Iterator[Experiment]:
    """The experiments that this scale made."""
    for this, names in (
        (settings.descent, ("trajectory", "descent_fits")),
        (settings.images, ("image_trajectory", "image_fits")),
    ):
        trajectory, fits = map(tables.get, names)
        if trajectory is not None and fits is not None:
            yield Experiment(this, trajectory, fits)


@dataclass(frozen=True)
class Condition:
    """The runs of one data set, network, cost and smoothing: seeds and step sizes."""

    data_set: str
    network: str
    cost: str
    smoothing: float
    rates: tuple[float, ...]
    settings: DescentSettings
    checkpoints: pd.DataFrame
    diverged: set[Key]

    @property
    def label(self) -> str:
        """Which one, for a reader."""
        cost = "square cost" if self.cost == "square" else f"smoothing {self.smoothing:g}"
        return f"{self.data_set}, {self.network}, {cost}, {plural('step size', self.rates)}"

    @property
    def strong(self) -> bool:
        """Whether C1, C2 and C5 are asked of it: square cost or strong smoothing."""
        return self.cost == "square" or self.smoothing >= STRONG_SMOOTHING

    def row(self, asked: str, *, plain: str = "no-smoothing", weak: str = "weak-smoothing") -> str:
        """The criterion it belongs to."""
        return asked if self.strong else weak if self.smoothing > 0 else plain

    def numbers(self, number: Number, asked: Asked) -> tuple[dict[Key, float], Accounting]:
        """(seed, step size) -> number of each finished run that is as `asked`, and where the planned runs went."""
        finished: dict[Key, float] = {}
        excluded: dict[str, set[Key]] = {reason: set() for reason in asked}
        runs = {key: run.sort_values("step") for key, run in self.checkpoints.groupby(["seed", "learning_rate"])}
        for key, run in runs.items():
            if key in self.diverged:
                continue
            reason = next((reason for reason, holds in asked.items() if not holds(run)), None)
            if reason is None:
                finished[key] = number(run)
            else:
                excluded[reason].add(key)
        planned = product(self.settings.seeds, self.rates)
        return finished, account(planned, runs, diverged=self.diverged, excluded=excluded, what="runs")

    def median(
        self, criterion: str, number: Number, asked: Asked = EVERY_RUN, of: Sequence[str] = ("sharpness",)
    ) -> Quantity | NotTested:
        """Median over seeds; a seed's sample is the median over its runs."""
        finished, runs = self.numbers(number, asked)
        if not finished:
            return self.nothing(criterion, asked, runs)
        seeds = sorted({seed for seed, _ in finished})
        samples = pd.Series({seed: np.median([v for key, v in finished.items() if key[0] == seed]) for seed in seeds})
        return quantity(criterion, self.label + unconverged(self.checkpoints, of), samples, runs, "median")

    def extreme(
        self,
        criterion: str,
        number: Number,
        function: Callable,
        asked: Asked = EVERY_RUN,
        of: Sequence[str] = (),
    ) -> Quantity | NotTested:
        """The extreme over all runs, exact."""
        finished, runs = self.numbers(number, asked)
        if not finished:
            return self.nothing(criterion, asked, runs)
        label = self.label + unconverged(self.checkpoints, of)
        return Quantity(criterion, label, [float(function(list(finished.values())))], runs)

    def median_and_extreme(
        self,
        criteria: tuple[str, str],
        number: Number,
        function: Callable,
        asked: Asked = EVERY_RUN,
        of: Sequence[str] = ("sharpness",),
    ) -> Measured:
        """Both, for a statement about every run."""
        median, extreme = criteria
        return [self.median(median, number, asked, of), self.extreme(extreme, number, function, asked, of)]

    def nothing(self, criterion: str, asked: Asked, runs: Accounting) -> NotTested:
        """Why no run gave a number."""
        reasons = [f"{count} {reason}" for reason, count in runs.excluded.items()]
        reasons += [f"{count} {word}" for word, count in (("diverged", runs.diverged), ("lost", runs.lost)) if count]
        return NotTested(f"{self.label}: of {runs.planned} runs {', '.join(reasons) or 'none was made'}", criterion)


def conditions(tables: Tables, settings: StudySettings) -> Iterator[Condition]:
    """All planned ones of the experiments that this scale made."""
    for experiment in experiments(tables, settings):
        this = experiment.settings
        rates: dict[tuple[str, float], list[float]] = {}
        for cost, smoothing, rate in planned_descents(this):
            rates.setdefault((cost, smoothing), []).append(rate)
        for data_set, network in product(this.data_sets, this.networks):
            for (cost, smoothing), steps in rates.items():
                cell = {"data_set": data_set, "network": network, "cost": cost, "smoothing": smoothing}
                fits = select(experiment.fits, **cell)
                diverged = keys_of(fits[fits.diverged_at >= 0], ["seed", "learning_rate"])
                checkpoints = select(experiment.trajectory, **cell)
                yield Condition(data_set, network, cost, smoothing, tuple(steps), this, checkpoints, diverged)


def planned_descents(settings: DescentSettings) -> list[tuple[str, float, float]]:
    """(cost, smoothing, step size) of every run of a seed."""
    found = [("square", 0.0, rate) for rate in settings.square_learning_rates]
    found += [("cross-entropy", s, rate) for s, rate in product(settings.smoothings, settings.entropy_learning_rates)]
    found += [("cross-entropy", settings.edge_smoothing, rate) for rate in settings.edge_learning_rates]
    return list(dict.fromkeys(found))


def unconverged(rows: pd.DataFrame, of: Sequence[str]) -> str:
    """How many of the eigenvalues that were read are Ritz values short of the tolerance, in words; empty if none."""
    flags = np.concatenate([rows[f"{name}_converged"].to_numpy(bool) for name in of]) if of else np.ones(0, bool)
    missed = int((~flags).sum())
    return f"; {missed} of {len(flags)} eigenvalues did not converge" if missed else ""


def keys_of(rows: pd.DataFrame, columns: list[str]) -> set[Key]:
    """The different values of some columns, as tuples."""
    return set(rows[columns].itertuples(index=False, name=None))


def with_keys(rows: pd.DataFrame, columns: list[str], keys: set[Key], *, out: bool = False) -> pd.DataFrame:
    """Rows whose values of some columns are among `keys`; with `out`, the others."""
    found = [(key in keys) != out for key in rows[columns].itertuples(index=False, name=None)]
    return rows[np.array(found, dtype=bool)]


def plural(word: str, values: Sequence[float]) -> str:
    """The word with its values, in the plural if there are several."""
    return f"{word}{'s' * (len(values) > 1)} {', '.join(f'{value:g}' for value in values)}"
