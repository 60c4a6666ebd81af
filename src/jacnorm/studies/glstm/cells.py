"""The networks of the recall tasks in tables and words, lines to hold them against, and what a budget left open.

Shared by judge and figures; free of torch.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd

from jacnorm.report.estimands import select
from jacnorm.studies.glstm.networks import LAYERS, Cell

FITTED = 0.99
"""Accuracy on training graphs from which on a run has nothing more to learn from them."""
NAMES = {"glstm": "gLSTM", "gcn": "GCN", "gatv2": "GATv2", "gatedgcn": "GatedGCN", "adgn": "A-DGN"}


def words(cell: Cell) -> str:
    """A network in words."""
    size = f"{'M' if cell.model == 'glstm' else 'd'} = {cell.size}"
    depth = "" if cell.layers == LAYERS else f", {cell.layers} layers"
    # What is usual goes without saying: gLSTM with K-hop, the others without.
    usual = cell.k_hop == (cell.model == "glstm")
    hop = "" if usual else f", {'K-hop' if cell.k_hop else '1-hop'}"
    return f"{NAMES[cell.model]} {size}{depth}{hop}{', fresh graphs' * (cell.data == 'fresh')}"


def cells_of(table: pd.DataFrame) -> list[Cell]:
    """The networks in a table, gLSTM first, then by size and depth."""
    rows = table[list(Cell._fields)].drop_duplicates().itertuples(index=False, name=None)
    cells = [Cell(str(model), int(size), bool(hop), int(layers), str(data)) for model, size, hop, layers, data in rows]
    return sorted(cells, key=lambda cell: (list(NAMES).index(cell.model), not cell.k_hop, cell[1:]))


def rows_of(table: pd.DataFrame, cell: Cell, neighbours: int | None = None, **more: object) -> pd.DataFrame:
    """Rows of one network, at one number of neighbours unless None."""
    at = {} if neighbours is None else {"neighbours": neighbours}
    return select(table, **cell._asdict(), **at, **more)


def open_runs(fits: pd.DataFrame, steps: int, *, score: str | None) -> pd.Series:
    """Mask of the trainings that their budget ended, of those that did not diverge.

    A training is closed if it ended before its last planned update (patience, or a validation loss of almost nothing),
    or if `score` names a column of training accuracies and it reached 0.99 there.
    """
    left = (fits.diverged_at < 0) & (fits["steps" if "steps" in fits else "epochs"] >= steps)
    return left if score is None else left & ~(fits[score] >= FITTED)


def budget_words(fits: pd.DataFrame, steps: int, unit: str = "updates", *, score: str | None = None) -> str:
    """For a label: how many of the trainings that a number rests on were ended by the budget; '' if none was."""
    count = int(open_runs(fits, steps, score=score).sum())
    if not count:
        return ""
    return f"; confounded_by_budget: {count} of {len(fits)} trainings not converged in {steps} {unit}"


@cache
def histogram(neighbours: int) -> float:
    """Best accuracy of a network that keeps only how often each value occurs: E[largest count] / N.

    N values are drawn uniformly from N. With P(largest count <= k) = N! / N^N [x^N] (sum_(j <= k) x^j / j!)^N, the
    expectation is the sum over k of 1 - P.
    """
    n = neighbours
    factorials = np.cumprod(np.concatenate([[1.0], np.arange(1, n + 1)]))
    total = np.exp(n * np.log(n) - np.log(np.arange(1, n + 1)).sum())
    below = 0.0
    for most in range(1, n):
        below += _power_coefficient(np.where(np.arange(n + 1) <= most, 1 / factorials, 0.0), n) / total
    return float(n - below) / n


def _power_coefficient(series: np.ndarray, power: int) -> float:
    """Coefficient of x^n of series^power, (n + 1,) coefficients, by repeated squaring."""
    n = len(series) - 1
    result = np.zeros(n + 1)
    result[0] = 1.0
    while power:
        if power & 1:
            result = np.convolve(result, series)[: n + 1]
        series, power = np.convolve(series, series)[: n + 1], power >> 1
    return float(result[n])


def mean_line(neighbours: int) -> float:
    """Mean squared error of the mean of all values in the regression task: 1 - 1/N."""
    return 1.0 - 1.0 / neighbours


def memory_line(neighbours: int, memory: int) -> float:
    """Least mean squared error of a linear memory with M-dimensional keys in the regression task: 1 - M/N, or 0."""
    return max(0.0, 1.0 - memory / neighbours)
