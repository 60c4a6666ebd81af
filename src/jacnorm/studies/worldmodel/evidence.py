"""Agents in tables and words, and paired comparisons between them; shared by judge and figures, free of torch.

Agents of one seed share data, start, batches and noise, so arms are compared within a seed. An agent that diverged is
left out of means and counted in the accounting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from jacnorm.report.estimands import account, by_seed, paired, quantity, select, whole_seeds
from jacnorm.report.verdicts import Accounting, Quantity
from jacnorm.studies.worldmodel.settings import AgentSettings, DreamerSettings, PendulumSettings, StudySettings

Tables = Mapping[str, pd.DataFrame]
Cell = dict[str, Any]
Prefix = Literal["pendulum", "dreamer"]
WEIGHT = 0.01
"""The weight of the penalty that claims are about; what other weights do is shown beside it."""
NOISES = {"gauss": "gauss", "mask": "masks", "rotation": "rotations"}
"""Perturbations of what is seen -> field of the settings."""
TASKS = {
    "pendulum": "pendulum",
    "dummy": "DreamerV3, dummy",
    "walker_walk": "DreamerV3, walker walk",
    "quadruped_walk": "DreamerV3, quadruped walk",
}
CONTROL_SUITE = 1000.0
"""Largest return of an episode in the DeepMind Control Suite."""
DUMMY = 60.0
"""Largest return of an episode of the dummy task."""
GATE = 0.1
"""Share of the largest return by which a clean return has to exceed the random policy's, for retention."""
ABOUT_AS_GOOD_AS_RANDOM = f"clean return within {GATE:.0%} of the largest return from the random policy's"


@dataclass(frozen=True)
class Experiment:
    """The agents of one task: their settings and tables, by the ends of the tables' names."""

    prefix: Prefix
    task: str
    settings: PendulumSettings | DreamerSettings
    tables: Tables
    _found: dict[tuple[Any, ...], pd.DataFrame] = field(default_factory=dict, compare=False, repr=False)

    @property
    def words(self) -> str:
        """Task and agent."""
        return TASKS[self.task]

    @property
    def largest_return(self) -> float:
        """What no episode's return exceeds: rewards of a step are at most 1."""
        if isinstance(self.settings, PendulumSettings):
            return float(self.settings.evaluation_steps)
        return DUMMY if self.task == "dummy" else CONTROL_SUITE

    def name(self, criterion: str) -> str:
        """A criterion by its name for these agents."""
        return criterion if self.prefix == "pendulum" else f"dreamer-{criterion}"

    def cell(self, weight: float, **changes: Any) -> Cell:
        """Columns of the agents of the sweep over lambda, but for `changes`."""
        this = self.settings
        common = {
            "lambda": weight,
            "wrt": "".join(sorted(this.wrt)),
            "include_prior": this.include_prior,
            "power": this.power,
            "error": "none",
            "error_size": 0.0,
            "batch": this.batch,
            "length": this.length,
        }
        return common | changes

    @property
    def pair(self) -> tuple[Cell, Cell] | None:
        """The penalised agents that claims are about, and those without penalty; None if either is not planned."""
        return (self.cell(WEIGHT), self.cell(0.0)) if {WEIGHT, 0.0} <= set(self.settings.lambdas) else None

    def altered(self, **changes: Any) -> tuple[Cell, Cell] | None:
        """`pair`, both with the same changes."""
        return None if self.pair is None else (self.pair[0] | changes, self.pair[1] | changes)

    @property
    def positive(self) -> list[float]:
        """Weights of the sweep above 0, ascending."""
        return sorted(weight for weight in self.settings.lambdas if weight)

    @property
    def f_only(self) -> list[float]:
        """Weights of the agents in which f alone is penalised; none if that is what the sweep does."""
        return sorted(self.settings.f_only_lambdas) if self.settings.include_prior else []

    @property
    def noises(self) -> list[tuple[str, float]]:
        """Perturbations of what is seen with their strengths."""
        return [
            (kind, strength) for kind, field in NOISES.items() for strength in sorted(getattr(self.settings, field))
        ]

    def diverged(self, cell: Cell) -> set[int]:
        """Seeds whose agent diverged."""
        fits = self._of("fits", cell)
        return set(fits.seed[fits.diverged_at >= 0])

    def rows(self, table: str, cell: Cell, **place: Any) -> pd.DataFrame:
        """Rows of the agents that did not diverge."""
        rows = select(self._of(table, cell), **place)
        return rows[~rows.seed.isin(self.diverged(cell))]

    def _of(self, table: str, cell: Cell) -> pd.DataFrame:
        """Rows of the agents of a cell, sought once."""
        key = (table, *cell.values())
        if key not in self._found:
            self._found[key] = select(self.tables[table], **cell)
        return self._found[key]

    def values(self, table: str, column: str, cell: Cell, **place: Any) -> pd.Series:
        """One number per seed."""
        return by_seed(self.rows(table, cell, **place), column).astype(float)

    def runs(
        self, table: str, cells: Sequence[Cell], excluded: Mapping[str, Iterable[tuple[int, int]]] | None = None
    ) -> Accounting:
        """Where the agents of these cells went, each named by (number of the cell, seed)."""
        keys = range(len(cells))
        present = {(key, seed) for key in keys for seed in self._of(table, cells[key]).seed}
        diverged = {(key, seed) for key in keys for seed in self.diverged(cells[key])}
        wanted = [(key, seed) for key in keys for seed in self.settings.seeds]
        return account(wanted, present, diverged=diverged, excluded=excluded, what="agents")

    def ratio(self, criterion: str, table: str, column: str, cells: tuple[Cell, Cell] | None, **place: Any) -> Quantity:
        """Geometric mean over seeds of the first agent's number over the second's; no sample where one is missing."""
        if cells is None:
            return nothing(criterion)
        first, second = (self.values(table, column, cell, **place) for cell in cells)
        shared = first.index.intersection(second.index)
        ratios = first[shared] / second[shared]
        label = self.label(cells, place)
        return quantity(criterion, label, ratios, self.runs(table, cells), "geometric mean")

    def difference(
        self,
        criterion: str,
        cells: tuple[Cell, Cell] | None,
        number: Callable[[Cell], pd.Series],
        words: str,
        table: str = "returns",
    ) -> Quantity:
        """A number of the first agent minus that of the second, paired by seed; no sample where one is missing."""
        if cells is None:
            return nothing(criterion)
        values = paired(*(number(cell) for cell in cells))
        return quantity(criterion, f"{self.label(cells)}, {words}", values, self.runs(table, cells))

    def returned(self, cell: Cell, kind: str = "clean", strength: float = 0.0) -> pd.Series:
        """Mean return by seed under one perturbation."""
        return self.values("returns", "return", cell, perturbation=kind, strength=strength)

    def mean_return(self, cell: Cell, places: Sequence[tuple[str, float]]) -> pd.Series:
        """Return by seed, mean over perturbations; of the seeds that have all of them."""
        table = pd.concat([self.returned(cell, *place) for place in places], axis=1, join="inner")
        return pd.Series(table.to_numpy().mean(axis=1), table.index, dtype=float)

    def gains(self, cells: tuple[Cell, Cell], kind: str, strengths: Sequence[float]) -> pd.DataFrame:
        """Return of the first agent minus the second's, (seeds, strengths), the clean return at strength 0."""
        parts = []
        for place in (0.0, *strengths):
            at = (kind, place) if place else ("clean", 0.0)
            gain = paired(*(self.returned(cell, *at) for cell in cells))
            parts.append(pd.DataFrame({"seed": gain.index, "strength": place, "gain": gain.to_numpy()}))
        rows = whole_seeds(pd.concat(parts), "strength", (0.0, *strengths))
        return rows.pivot(index="seed", columns="strength", values="gain")

    def retention(self, cell: Cell, kind: str, strength: float) -> pd.Series:
        """Return above the random policy's, perturbed over clean; of the seeds that pass the gate."""
        clean, good = self._clean(cell)
        there = above_random(self.rows("returns", cell, perturbation=kind, strength=strength))
        kept = clean.index[good].intersection(there.index)
        return there[kept] / clean[kept]

    def gated(self, cells: Sequence[Cell]) -> dict[str, set[tuple[int, int]]]:
        """Agents that a comparison of retentions leaves out, by reason."""
        failed = []
        for cell in cells:
            clean, good = self._clean(cell)
            failed.append(set(clean.index[~good]))
        numbers = range(len(cells))
        own = {(number, seed) for number in numbers for seed in failed[number]}
        others = {(number, seed) for number in numbers for seed in set().union(*failed)}
        return {ABOUT_AS_GOOD_AS_RANDOM: own, "the other agent of the seed is left out": others}

    def _clean(self, cell: Cell) -> tuple[pd.Series, np.ndarray]:
        """Clean return above the random policy's by seed, and which pass the gate."""
        clean = above_random(self.rows("returns", cell, perturbation="clean", strength=0.0))
        return clean, passes_gate(clean, self.largest_return)

    def label(self, cells: tuple[Cell, Cell], place: Mapping[str, Any] | None = None) -> str:
        """Task, what differs between the two cells, what both have besides the sweep's values, and the place."""
        first, second = cells
        base = self.cell(0.0)
        shared = {name: first[name] for name in first if first[name] == second[name] != base[name]}
        shared.pop("lambda", None)
        if first["lambda"] == second["lambda"]:
            weight = f"lambda {first['lambda']:g}"
        else:
            weight = f"lambda {first['lambda']:g} against {second['lambda']:g}"
        if first["include_prior"] != second["include_prior"]:
            weight += ", f alone penalised"
        words = [self.words, weight, *_shared_words(shared)]
        words += [f"{'k' if name == 'horizon' else name} = {value:g}" for name, value in (place or {}).items()]
        return ", ".join(words)


def _shared_words(shared: Mapping[str, Any]) -> Iterator[str]:
    if "error" in shared:
        yield f"{shared['error']} error {shared['error_size']:g} in training"
    yield from (f"{name} {shared[name]}" for name in ("batch", "length") if name in shared)


def above_random(rows: pd.DataFrame) -> pd.Series:
    """Return above that of the random policy in the same episodes, by seed; rows: of one agent and perturbation."""
    return (by_seed(rows, "return") - by_seed(rows, "random_return")).astype(float)


def passes_gate(clean: pd.Series, largest_return: float) -> np.ndarray:
    """Whether clean returns above the random policy's, one per seed, are large enough to divide by."""
    return (clean > GATE * largest_return).to_numpy()


def nothing(criterion: str) -> Quantity:
    """A quantity without a sample, of agents that were not planned."""
    return Quantity(criterion, "", [], Accounting.all_finished(0))


def experiments(tables: Tables, settings: StudySettings, *names: str) -> list[Experiment]:
    """The pendulum, then each task of DreamerV3 that was run; `names` are the ends of the tables' names."""
    found = []
    pairs: tuple[tuple[Prefix, AgentSettings], ...] = (("pendulum", settings.pendulum), ("dreamer", settings.dreamer))
    for prefix, this in pairs:
        own = {name: tables.get(f"{prefix}_{name}") for name in names}
        if any(table is None for table in own.values()):
            continue
        tasks = this.tasks if isinstance(this, DreamerSettings) else ["pendulum"]
        for task in tasks:
            rows = {name: select(table, task=task) for name, table in own.items() if table is not None}
            assert isinstance(this, PendulumSettings | DreamerSettings)
            found.append(Experiment(prefix, task, this, rows))
    return found


def first_crossing(places: np.ndarray, values: np.ndarray, level: float, *, rising: bool) -> float | None:
    """The first of ascending places, (n,), at which values are at or beyond `level`; None if they never are."""
    there = values >= level if rising else values <= level
    return float(places[np.argmax(there)]) if there.any() else None
