"""Which rows of the tables belong together, and what figures and verdicts compute from them alike.

A source is what rows of attention come from: one text seen by one model, or the synthetic rows. A curve is one number
for each seed and place, places being lengths, numbers of selected keys or temperatures. A number of a seed is the mean
over its heads unless said otherwise, and a NaN among them stays one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import pandas as pd

from jacnorm.report.estimands import select, whole_seeds
from jacnorm.studies.attention.tables import synthetic_table

Tables = Mapping[str, pd.DataFrame]

SOFTMAX = "softmax"
SYNTHETIC = "synthetic"
UNTRAINED = "untrained"
PAPERS_LENGTH = 1024
"""L of Figures 2b and 3, in tokens."""
PLATEAU = (16, 128)
"""Numbers N of selected keys over which Figure 3 is flat; those above half the length do not count."""
LEVEL = 0.01
"""Of the two-sample test, in the caption of Figure 2c; Algorithm 3 has 0.05."""


@dataclass(frozen=True)
class Source:
    """One text seen by one model, or the synthetic rows."""

    data_set: str
    model: str

    @property
    def synthetic(self) -> bool:
        """Whether the rows are synthetic."""
        return self.model == SYNTHETIC

    @property
    def untrained(self) -> bool:
        """Whether the model is the one before training."""
        return self.model == UNTRAINED

    @property
    def label(self) -> str:
        """What a reader is told."""
        return "synthetic rows" if self.synthetic else f"{self.data_set}, {self.model}"

    def rows(self, tables: Tables, name: str, normaliser: str = SOFTMAX) -> pd.DataFrame:
        """The source's rows of a table for one normaliser."""
        table = tables[synthetic_table(name) if self.synthetic else name]
        return select(table, data_set=self.data_set, model=self.model, normaliser=normaliser)


def sources(tables: Tables, name: str, *, synthetic: bool = True, untrained: bool = True) -> list[Source]:
    """Every source with rows in a table: models that count first, then untrained ones, then synthetic rows."""
    found: list[Source] = []
    for each in (name, synthetic_table(name)) if synthetic else (name,):
        if (table := tables.get(each)) is not None:
            pairs = table[["data_set", "model"]].drop_duplicates().itertuples(index=False, name=None)
            found += [Source(*pair) for pair in pairs if untrained or pair[1] != UNTRAINED]
    return sorted(found, key=lambda each: (each.synthetic, each.untrained, each.data_set))


def curve(
    rows: pd.DataFrame,
    column: str,
    by: str,
    places: Iterable[float] | None = None,
    over: Literal["mean", "max"] = "mean",
) -> pd.DataFrame:
    """The numbers of a column over the heads of each seed and place: seeds as index, places as columns, ascending.

    Of the seeds that have all `places`, by default all places that any seed has.
    """
    points = rows.groupby(["seed", by])[column].agg(over, skipna=False).reset_index()
    points = whole_seeds(points, by, sorted(set(points[by] if places is None else places)))
    return points.pivot(index="seed", columns=by, values=column).astype(float)


def logs(values: Any) -> Any:
    """The natural log of an array, series or frame: -inf of 0 and NaN of negative numbers, without a warning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(values)


# --- places of a curve -----------------------------------------------------------------------------------------------


def steepness(places: np.ndarray, values: np.ndarray, low: float, high: float) -> float:
    """Change of the log of a curve over that of its places' log from `low` to `high`; see `log_at`."""
    return (log_at(places, values, high) - log_at(places, values, low)) / float(np.log(high / low))


def log_at(places: np.ndarray, values: np.ndarray, at: float) -> float:
    """Log of a curve's value at a place, in a straight line of log over log between its neighbours.

    NaN where a neighbour is. Raises ValueError if the curve does not reach that far.
    """
    if not covers(places, at, at):
        raise ValueError(f"the curve does not reach to {at:g}")
    return float(np.interp(np.log(at), np.log(places), logs(values)))


def covers(places: Iterable[float], low: float, high: float) -> bool:
    """Whether places reach from `low` to `high`, up to rounding."""
    places = list(places)
    return bool(places) and min(places) <= low * (1 + 1e-9) and max(places) >= high * (1 - 1e-9)


def between(places: Iterable[float], low: float, high: float) -> list[float]:
    """The places from `low` to `high`, up to rounding."""
    return [place for place in places if low * (1 - 1e-9) <= place <= high * (1 + 1e-9)]


def plateau(selected: Iterable[int], length: int) -> list[int]:
    """The numbers N that lie where Figure 3 is flat."""
    low, high = PLATEAU
    return [n for n in selected if low <= n <= min(high, length // 2)]


# --- expectations and the two-sample test of Algorithm 3 -------------------------------------------------------------

EXPECTATIONS = ("all", "closed-form", "sampled")
"""Expectations of the distance over random sets: without the factor N / (L - 1), with it, and over sampled sets."""


def expectation(rows: pd.DataFrame, which: str) -> pd.Series:
    """One of EXPECTATIONS, aligned with rows of the table `distances`.

    Sets are sampled in some rows of a head; their mean is carried over to all of its rows by its ratio to the closed
    form, which is known in both.
    """
    if which == "all":
        return rows.expectation_all
    if which == "closed-form":
        return rows.expectation
    return rows.expectation * rows.expectation_sampled / rows.expectation_of_sampled


def agreement(rows: pd.DataFrame, which: str) -> pd.DataFrame:
    """Kolmogorov-Smirnov test of distances against an expectation, heads as samples, for one seed and length.

    Index: N, ascending. Columns: statistic, p; NaN where a head has one. Raises ValueError if a head has two rows.
    """
    if rows.duplicated(["selected", "layer", "head"]).any():
        raise ValueError("several rows of one head and N; the selection leaves a column open")
    columns = rows.assign(expected=expectation(rows, which)).pivot(
        index="selected", columns=["layer", "head"], values=["distance", "expected"]
    )
    pairs = columns.to_numpy().reshape(len(columns), 2, -1)  # (N, 2, heads)
    found = {}
    for n, pair in zip(columns.index, pairs, strict=True):
        if not np.isfinite(pair).all():
            found[n] = (np.nan, np.nan)
            continue
        below = [np.searchsorted(np.sort(each), pair.ravel(), side="right") for each in pair]
        steps, size = int(np.abs(below[0] - below[1]).max()), pair.shape[1]
        found[n] = (steps / size, _p_value(steps, size))
    return pd.DataFrame.from_dict(found, orient="index", columns=["statistic", "p"]).sort_index()


@cache
def _p_value(steps: int, size: int) -> float:
    """P(D >= steps / size) for two samples of one continuous law, of this size each (Gnedenko and Korolyuk 1951).

    In whole numbers up to the last division, so it is exact where floating sums cancel.
    """
    if steps == 0:
        return 1.0
    terms = ((-1) ** (k - 1) * math.comb(2 * size, size - k * steps) for k in range(1, size // steps + 1))
    return 2 * sum(terms) / math.comb(2 * size, size)


def critical(tests: pd.DataFrame, length: int, level: float = LEVEL, *, settled: bool = False) -> float:
    """The first N of `agreement` that is not rejected; settled: the first from which on none is.

    If there is none, `length`: with all keys selected, distance and expectation are both 0. NaN if a test is.
    """
    if tests.p.isna().any():
        return float("nan")
    kept = (tests.p >= level).to_numpy()
    if settled:
        kept = np.logical_and.accumulate(kept[::-1])[::-1]
    return float(tests.index[np.argmax(kept)]) if kept.any() else float(length)
