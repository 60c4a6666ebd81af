"""What estimand functions share: from tidy tables to one number per seed, and to quantities with their accounting.

A study's ``judge.py`` selects rows of one cell, reduces them to one number per seed and says where the runs went.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jacnorm.report.verdicts import Accounting, NotTested, Quantity

if TYPE_CHECKING:
    import pandas as pd

    from jacnorm.report.intervals import Statistic

    Tables = Mapping[str, pd.DataFrame]

Measured = list[Quantity | NotTested]


def select(table: pd.DataFrame, **cell: Any) -> pd.DataFrame:
    """Rows whose columns have the given values."""
    keep = np.ones(len(table), dtype=bool)
    for column, value in cell.items():
        keep &= (table[column] == value).to_numpy()
    return table[keep]


def by_seed(rows: pd.DataFrame, column: str) -> pd.Series:
    """One number per seed, seeds ascending. Raises ValueError if a seed has several rows: the cell is not complete."""
    if rows.seed.duplicated().any():
        raise ValueError(f"several rows of one seed for {column}; the selection leaves a column open")
    return rows.set_index("seed")[column].sort_index()


def paired(first: pd.Series, second: pd.Series) -> pd.Series:
    """`first` minus `second` for the seeds that both have; the accounting counts the others."""
    shared = first.index.intersection(second.index)
    return first[shared] - second[shared]


def whole_seeds(rows: pd.DataFrame, column: str, values: Sequence[Any]) -> pd.DataFrame:
    """Rows of the seeds that have all of `values` in `column`, in these rows only.

    A seed without one of its points would bend a slope; it is left out, and the accounting counts what is lost. Raises
    ValueError if a seed has a point twice.
    """
    rows = rows[rows[column].isin(values)]
    if rows.duplicated(["seed", column]).any():
        raise ValueError(f"several rows of one seed and {column}; the selection leaves a column open")
    counts = rows.groupby("seed")[column].nunique()
    return rows[rows.seed.isin(counts.index[counts == len(set(values))])]


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Slope of the least-squares line of y on x, both (n,). Raises ValueError unless x takes two values."""
    x = np.asarray(x, dtype=float)
    x = x - x.mean()
    if not x.any():
        raise ValueError("a slope needs two different values of x")
    return float(x @ np.asarray(y, dtype=float) / (x @ x))


def r_squared(x: np.ndarray, y: np.ndarray) -> float:
    """Share of the variance of y, (n,), that its least-squares line on x explains; NaN if y does not vary."""
    y = np.asarray(y, dtype=float) - np.mean(y)
    x = np.asarray(x, dtype=float) - np.mean(x)
    rest = y - slope(x, y) * x
    total = float(y @ y)
    return 1.0 - float(rest @ rest) / total if total > 0 else float("nan")


def account(
    planned: Iterable[Hashable],
    present: Iterable[Hashable],
    *,
    diverged: Iterable[Hashable] = (),
    excluded: Mapping[str, Iterable[Hashable]] | None = None,
    what: str = "",
) -> Accounting:
    """Where the planned runs went, each named by a key such as (seed, depth).

    A run counts once: as diverged, else as excluded for the first reason that names it, else as lost where it is not
    present. Keys that were not planned do not count.
    """
    left = set(planned)
    total = len(left)
    bad = left & set(diverged)
    left -= bad
    reasons = {}
    for reason, keys in (excluded or {}).items():
        out = left & set(keys)
        left -= out
        if out:
            reasons[reason] = len(out)
    lost = len(left - set(present))
    finished = len(left) - lost
    return Accounting(planned=total, finished=finished, diverged=len(bad), lost=lost, excluded=reasons, what=what)


def quantity(
    criterion: str,
    label: str,
    values: pd.Series | pd.DataFrame,
    runs: Accounting,
    statistic: Statistic = "mean",
    reference: float | None = None,
) -> Quantity:
    """A quantity whose samples are indexed by seed."""
    return Quantity(criterion, label, values.to_numpy(), runs, statistic, reference, values.index.tolist())


def complete(found: Measured, criteria: Sequence[str], reason: str) -> Measured:
    """Drop quantities without a sample (cells that were not planned) and say why a criterion has none left."""
    kept = [item for item in found if not isinstance(item, Quantity) or len(item.samples)]
    missing = [criterion for criterion in criteria if criterion not in {item.criterion for item in kept}]
    return [*kept, *(NotTested(reason, criterion) for criterion in missing)]
