"""Where the numbers of a claim come from: curves at planned places for each seed, with their accounting.

What is planned stands in the settings; a seed that lacks one of the places is left out of a curve and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from jacnorm.report.estimands import Measured, account, quantity, select, slope
from jacnorm.report.intervals import Statistic
from jacnorm.report.verdicts import Accounting, Quantity
from jacnorm.studies.attention.curves import (
    PAPERS_LENGTH,
    SOFTMAX,
    Source,
    Tables,
    curve,
    logs,
    plateau,
    sources,
)
from jacnorm.studies.attention.settings import ProbingSettings, StudySettings, SyntheticSettings

Over = Literal["mean", "max"]
GPT2 = (12, 12)
"""Layers, and heads of each, of the model that the paper's levels are about."""


def by_row(function: Callable[[np.ndarray], float], values: pd.DataFrame) -> pd.Series:
    """A function of the numbers of each seed; numpy's, which let a NaN through."""
    return pd.Series([float(function(row)) for row in values.to_numpy()], index=values.index, dtype=float)


@dataclass(frozen=True)
class Points:
    """A curve of each seed of a source, and where the runs went; words: which one, after the source."""

    evidence: Evidence
    values: pd.DataFrame
    runs: Accounting
    words: str

    @property
    def places(self) -> list[float]:
        """Ascending."""
        return list(self.values.columns)

    def by_seed(self, function: Callable[[np.ndarray, np.ndarray], float]) -> pd.Series:
        """function(places, values) of each seed."""
        places = np.array(self.places, dtype=float)
        return by_row(lambda row: function(places, row), self.values)

    def log_slopes(self, places: list[float] | None = None) -> pd.Series:
        """Slope of the log of each seed's curve on the log of its places."""
        values = self.values if places is None else self.values[places]
        x = np.log(np.array(values.columns, dtype=float))
        return by_row(lambda row: slope(x, logs(row)), values)

    def give(self, criterion: str, samples: pd.Series, words: str = "", statistic: Statistic = "mean") -> Quantity:
        """A quantity of these runs; words: which one, after the source."""
        return quantity(criterion, self.evidence.label(self.words, words), samples, self.runs, statistic)


@dataclass(frozen=True)
class Evidence:
    """A source with all tables, and the settings that its rows were made with."""

    tables: Tables
    study: StudySettings
    source: Source
    _found: dict[tuple[str, str], pd.DataFrame] = field(default_factory=dict, compare=False, repr=False)
    """Rows that were selected before, by table and normaliser."""

    @property
    def settings(self) -> ProbingSettings | SyntheticSettings:
        """Those of the source's experiment."""
        return self.study.synthetic if self.synthetic else self.study.probing

    @property
    def synthetic(self) -> bool:
        """Whether the rows are synthetic."""
        return self.source.synthetic

    @property
    def untrained(self) -> bool:
        """Whether the model is the one before training."""
        return self.source.untrained

    @property
    def length(self) -> int:
        """The longest window, in which N varies."""
        return max(self.settings.lengths)

    def label(self, *words: str) -> str:
        """The source, and which of its numbers."""
        return ", ".join(each for each in (self.source.label, *words) if each)

    def rows(self, name: str, *, normaliser: str = SOFTMAX, every_space: bool = False) -> pd.DataFrame:
        """Rows of a table, by default of the first space of the settings; synthetic rows have one."""
        if (name, normaliser) not in self._found:
            self._found[name, normaliser] = self.source.rows(self.tables, name, normaliser)
        found = self._found[name, normaliser]
        if every_space or self.synthetic or "space" not in found:
            return found
        return select(found, space=self.study.probing.spaces[0])

    def window(self, name: str, length: int, normaliser: str = SOFTMAX) -> pd.DataFrame:
        """Rows of the sweep over N in windows of one length, of the seeds that have all of it."""
        planned = [n for n in self.settings.selected if n < length]
        rows = select(self.rows(name, normaliser=normaliser), length=length)
        rows = rows[rows.selected.isin(planned)]
        has = rows.groupby("seed").selected.nunique()
        return rows[rows.seed.isin(has.index[has == len(planned)])]

    def points(
        self,
        name: str,
        column: str,
        by: str,
        places: list[float] | list[int],
        over: Over = "mean",
        *,
        normaliser: str = SOFTMAX,
        words: str = "",
        **cell: float,
    ) -> Points:
        """A column over heads, at planned places of one cell; words: which cell."""
        rows = self.rows(name, normaliser=normaliser)[list(dict.fromkeys(["seed", by, column, *cell]))]
        rows = select(rows, **cell)
        values = curve(rows, column, by, places, over)
        return Points(self, values.reindex(columns=sorted(places)), self.account(rows, values.index), words)

    def over_lengths(self, column: str) -> Points:
        """A column of the distances at few selected keys (Algorithm 1)."""
        n = self.settings.distance_selected
        lengths = [length for length in self.settings.lengths if length > n]
        words = f"N = {n}, L from {min(lengths)} to {max(lengths)}" if lengths else ""
        return self.points("distances", column, "length", lengths, words=words, selected=n)

    def over_selected(self, name: str, column: str, over: Over = "mean", *, normaliser: str = SOFTMAX) -> Points:
        """A column in the longest window (Algorithms 2 and 4)."""
        planned = [n for n in self.settings.selected if n < self.length]
        cell = {"words": f"L = {self.length}", "length": self.length}
        return self.points(name, column, "selected", planned, over, normaliser=normaliser, **cell)

    def over_temperatures(self, perturbation: float, *, normaliser: str = SOFTMAX) -> Points:
        """The change of the weights, largest head (Algorithm 5)."""
        cell = {"normaliser": normaliser, "perturbation": perturbation}
        return self.points("sensitivity", "change", "temperature", self.settings.temperatures, "max", **cell)

    def level(self, criterion: str, change: Callable[[pd.Series], pd.Series] = lambda p: p) -> Measured:
        """A function of the mean share of separable keys where it is flat."""
        points = self.over_selected("separability", "ratio")
        flat = plateau(points.places, self.length)
        if not flat:
            return []
        mean = by_row(np.mean, points.values[flat])
        return [points.give(criterion, change(mean), f"N from {min(flat)} to {max(flat)}")]

    def extreme(
        self, criterion: str, function: Callable[[np.ndarray], float], rows: pd.DataFrame, column: str, words: str = ""
    ) -> Quantity:
        """One exact number: the extreme of a column, NaN if one of its numbers is."""
        values = rows[column].to_numpy()
        samples = [float(function(values))] if len(values) else []
        return Quantity(criterion, self.label(words), samples, self.account(rows, rows.seed))

    def account(self, rows: pd.DataFrame, used: pd.Series | pd.Index) -> Accounting:
        """Where the seeds went: a training may have diverged, and a seed may lack some of its numbers."""
        diverged: set[int] = set()
        if not self.synthetic:
            fits = select(self.tables["language_fits"], data_set=self.source.data_set)
            diverged = set(fits[fits.diverged_at >= 0].seed)
        partly = set(rows.seed) - set(used)
        return account(
            self.settings.seeds,
            set(rows.seed),
            diverged=set() if self.untrained else diverged,
            excluded={"another number of the seed is lost": partly},
            what="sets of rows" if self.synthetic else "sets of windows" if self.study.probing.model else "models",
        )

    def other_than_gpt2(self, name: str) -> str:
        """Why the paper's levels are not asked of the model in table `name`; "" for GPT-2."""
        if self.study.probing.model is None:
            return "the paper's number is that of GPT-2, and the models here are small ones trained from scratch"
        rows, model = self.rows(name), self.source.model
        shape = (rows.layer.nunique(), rows["head"].nunique())
        if "gpt2" not in model.lower().replace("-", "").replace("_", "") or shape != GPT2:
            return (
                f"the paper's number is that of GPT-2 with {GPT2[0]} layers of {GPT2[1]} heads, and the model here is "
                f"{model} with {shape[0]} layers of {shape[1]}"
            )
        return ""

    def other_than_papers_length(self) -> str:
        """Why a share of the length is not asked of these windows; "" for the paper's."""
        if self.length == PAPERS_LENGTH:
            return ""
        return (
            f"the paper's number is that of windows of {PAPERS_LENGTH} tokens, and the longest here have {self.length}"
        )


def evidence(
    tables: Tables, settings: StudySettings, name: str, *, synthetic: bool = True, untrained: bool = False
) -> list[Evidence]:
    """Every source with rows in a table; of untrained models only if asked for."""
    found = sources(tables, name, synthetic=synthetic, untrained=untrained)
    return [Evidence(tables, settings, source) for source in found]
