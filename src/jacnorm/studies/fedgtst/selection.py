"""Runs in tables and words, and the coefficient at which a method is compared.

Shared by judge and figures; free of torch. A coefficient is chosen by the accuracy on the target's validation part,
never on its test part, and by the same rule for every method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from jacnorm.report.estimands import select
from jacnorm.studies.fedgtst.settings import FederatedSettings, StudySettings

Tables = Mapping[str, pd.DataFrame]

NAMES = {
    "fedavg": "FedAVG",
    "fedsr": "FedSR",
    "fediir": "FedIIR",
    "scaffold": "Scaffold",
    "fedgtst": "FedGTST",
    "fedgtst-mean": "FedGTST, mean guide",
}
SYMBOLS = {"fedsr": "factor", "fediir": "rho", "fedgtst": "xi", "fedgtst-mean": "xi"}
PREFIXES = {"federated": "federated", "image": "images", "domain": "domains"}
"""Beginning of the tables' names -> field of the study's settings."""


class Cell(NamedTuple):
    """What runs have in common that differ in seed, method and coefficient alone; fields are columns of the tables."""

    source: str
    target: str
    network: str
    clients: int
    participation: float
    local_epochs: int
    split: str
    extra_share: float

    @property
    def task(self) -> str:
        """Source and target."""
        return f"{self.source} to {self.target}"


CONDITION = ("participation", "local_epochs", "split", "extra_share")
"""Columns whose alternatives come one at a time."""


@dataclass(frozen=True)
class Experiment:
    """One of the federated experiments: its settings and its tables, by the ends of their names."""

    settings: FederatedSettings
    tables: Mapping[str, pd.DataFrame]

    @property
    def condition(self) -> dict[str, Any]:
        """Values of the columns that alternatives change, one at a time."""
        this = self.settings
        split = "domains" if this.pair == "domainnet" else this.split
        values = (this.participation, this.local_epochs, split, this.extra_share)
        return dict(zip(CONDITION, values, strict=True))

    def cells(self, **changes: Any) -> list[Cell]:
        """The cells with the common condition, but for `changes`; a changed None admits every value."""
        asked = {column: value for column, value in (self.condition | changes).items() if value is not None}
        return cells_of(select(trained(self.tables["transfer"]), **asked))


def experiments(tables: Tables, settings: StudySettings, names: list[str], *prefixes: str) -> Iterator[Experiment]:
    """The experiments called `prefixes` whose tables of these names this scale made."""
    for prefix in prefixes:
        found = {name: tables.get(f"{prefix}_{name}") for name in names}
        made = {name: table for name, table in found.items() if table is not None}
        if len(made) == len(names):
            yield Experiment(getattr(settings, PREFIXES[prefix]), made)


def trained(transfer: pd.DataFrame) -> pd.DataFrame:
    """Rows of features that were trained on the source."""
    return select(transfer, features="trained")


def cells_of(table: pd.DataFrame) -> list[Cell]:
    """The cells of a table, by task, network and number of clients."""
    rows = table[list(Cell._fields)].drop_duplicates().itertuples(index=False, name=None)
    return sorted(Cell(*row) for row in rows)


def rows_of(table: pd.DataFrame, cell: Cell, **more: Any) -> pd.DataFrame:
    """Rows of one cell."""
    return select(table, **cell._asdict(), **more)


def coefficients(transfer: pd.DataFrame, cell: Cell, method: str) -> list[float]:
    """The coefficients at which a method was trained, ascending."""
    return sorted(rows_of(trained(transfer), cell, method=method).coefficient.unique())


def validation(transfer: pd.DataFrame, cell: Cell, method: str) -> pd.Series:
    """Mean validation accuracy over seeds of each coefficient.

    A seed that lacks one of the coefficients would favour some of them, so only whole seeds count where there are any.
    Features without a finite accuracy are the worst.
    """
    rows = rows_of(trained(transfer), cell, method=method)
    if rows.duplicated(["seed", "coefficient"]).any():
        raise ValueError(f"several rows of one seed and coefficient of {method}; the selection leaves a column open")
    counts = rows.groupby("seed").coefficient.nunique()
    whole = rows[rows.seed.isin(counts.index[counts == rows.coefficient.nunique()])]
    scores = (rows if whole.empty else whole).fillna({"validation_accuracy": -math.inf})
    return scores.groupby("coefficient").validation_accuracy.mean()


def chosen(transfer: pd.DataFrame, cell: Cell, method: str) -> float | None:
    """The coefficient of the best mean validation accuracy, the smallest of equals; None if there is no run."""
    means = validation(transfer, cell, method)
    return None if means.empty else float(means.idxmax())


class Arm(NamedTuple):
    """One method at one coefficient in one cell; it differs between runs in the seed alone."""

    cell: Cell
    method: str
    coefficient: float

    def rows(self, table: pd.DataFrame, **more: Any) -> pd.DataFrame:
        """Its rows of a table."""
        return rows_of(table, self.cell, method=self.method, coefficient=self.coefficient, **more)

    @property
    def words(self) -> str:
        """Method and coefficient."""
        symbol = SYMBOLS.get(self.method)
        return NAMES[self.method] + (f", {symbol} = {self.coefficient:g}" if symbol else "")


def arm_of(transfer: pd.DataFrame, cell: Cell, method: str) -> Arm | None:
    """A method at its chosen coefficient."""
    best = chosen(transfer, cell, method)
    return None if best is None else Arm(cell, method, best)


def random_rows(table: pd.DataFrame, cell: Cell, method: str) -> pd.DataFrame:
    """Rows of read-outs on the initial weights of the cell's network, one per seed (and epoch).

    They are measured once for each target and network, under the name of one of its runs: all methods start from the
    same weights, but FedSR, whose network is another.
    """
    rows = select(table, features="random", target=cell.target, network=cell.network)
    return rows[(rows.method == "fedsr") == (method == "fedsr")]
