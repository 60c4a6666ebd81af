"""Judging step of the `glstm` study: one estimand function per claim of ``claims.yaml``, tables in, numbers out.

Margins live in claims.yaml and nowhere else. A sample is a seed, with its own graphs and initialisation; test graphs
and leaves of one seed are averaged first. A label that says confounded_by_budget rests on trainings that their budget
ended.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from jacnorm.report.claims import Scale
from jacnorm.report.estimands import (
    Measured,
    account,
    by_seed,
    complete,
    paired,
    quantity,
    select,
    slope,
    whole_seeds,
)
from jacnorm.report.judging import judge_files
from jacnorm.report.verdicts import Accounting, Quantity
from jacnorm.step import run
from jacnorm.studies.glstm.cells import budget_words, histogram, mean_line, rows_of, words
from jacnorm.studies.glstm.networks import Cell, planned
from jacnorm.studies.glstm.settings import PeptidesSettings, PropertySettings, RecallSettings, StudySettings

Tables = Mapping[str, pd.DataFrame]
Spots = list[tuple[Cell, int]]

LEAVES = 128
"""Leaves at which deep and shallow graphs are compared (C1)."""
FIRST_LEAVES = 8
"""Slopes on the number of leaves start here (C1)."""
RECALLED, FALLEN = 0.99, 0.95
"""Accuracies between which a network begins to fail (C7)."""
SEED_LEFT_OUT = "another run of the seed is lost"


# --- C1: untrained networks ------------------------------------------------------------------------------------------


def depth_destroys_sensitivity(tables: Tables, settings: StudySettings) -> Measured:
    """C1: norms on the deep tree against those on the star, means over seeds and leaves."""
    found: Measured = []
    rows, this = tables["trees"], settings.trees
    leaves = sorted(2**exponent for exponent in this.exponents)
    for activation in dict.fromkeys(rows.activation):
        cell = select(rows, activation=activation)
        norms = {shape: _by_leaves(select(cell, shape=shape), leaves) for shape in ("deep", "shallow")}
        shared = norms["deep"].index.intersection(norms["shallow"].index)
        both = pd.concat([norms[shape].loc[shared] for shape in norms], axis=1)  # (seeds, 2 leaf counts)
        runs = _draws(this.seeds, cell, shared)
        if LEAVES in leaves:
            ends = both.iloc[:, [leaves.index(LEAVES), len(leaves) + leaves.index(LEAVES)]]
            label = f"{activation}, {LEAVES} leaves"
            found.append(quantity("ratio", label, ends, runs, ratio_of_means))
        many = [count for count in leaves if count >= FIRST_LEAVES]
        if len(many) > 1:
            logs = np.log(norms["shallow"].loc[shared, many])
            label = f"{activation}, {many[0]} to {many[-1]} leaves"
            found.append(quantity("shallow-slope", label, _slopes(np.log(many), logs), runs))
        if len(leaves) > 1:
            label = f"{activation}, {leaves[0]} to {leaves[-1]} leaves"
            found.append(quantity("decreases", label, both, runs, largest_step))
    return complete(found, ["ratio", "shallow-slope", "decreases"], "too few numbers of leaves were drawn")


def ratio_of_means(norms: np.ndarray) -> float:
    """Mean deep norm over mean shallow norm; norms (seeds, 2)."""
    deep, shallow = norms.mean(axis=0)
    return float(deep / shallow)


def largest_step(norms: np.ndarray) -> float:
    """Largest factor from one number of leaves to the next of deep over shallow mean norm; norms (seeds, 2 counts)."""
    deep, shallow = np.split(norms.mean(axis=0), 2)
    ratios = deep / shallow
    return float(np.max(ratios[1:] / ratios[:-1]))


def _by_leaves(rows: pd.DataFrame, leaves: Sequence[int]) -> pd.DataFrame:
    """Norms of the seeds that have all numbers of leaves, (seeds, leaf counts)."""
    norms = whole_seeds(rows, "leaves", leaves).pivot(index="seed", columns="leaves", values="norm")
    return norms.reindex(columns=leaves)


def _slopes(x: np.ndarray, table: pd.DataFrame) -> pd.Series:
    """Slope of each seed's row on x; table (seeds, len(x))."""
    return pd.Series({seed: slope(x, row.to_numpy()) for seed, row in table.iterrows()}, dtype=float)


def _draws(seeds: Iterable[int], present: pd.DataFrame, used: pd.Index) -> Accounting:
    broken = {SEED_LEFT_OUT: set(present.seed) - set(used)}
    return account(seeds, present.seed, excluded=broken, what="random draws")


# --- C2 to C5, C10, C11: accuracy ------------------------------------------------------------------------------------


def perfect_recall(tables: Tables, settings: StudySettings) -> Measured:
    """C2: test accuracy of gLSTM at N up to M."""
    recall = _Recall("nar", tables, settings.nar)
    found = [
        recall.number("accuracy", (cell, n), "test_score")
        for cell, neighbours in recall.glstm()
        for n in neighbours
        if n <= cell.size
    ]
    return complete(found, ["accuracy"], "no gLSTM was trained at N up to its M")


def graceful_saturation(tables: Tables, settings: StudySettings) -> Measured:
    """C3: test accuracy at N = 2 M, and how it falls from N = M on."""
    recall = _Recall("nar", tables, settings.nar)
    found: Measured = []
    for cell, neighbours in recall.glstm():
        if 2 * cell.size in neighbours:
            spot = (cell, 2 * cell.size)
            found.append(recall.number("saturates", spot, "test_score"))
            if cell.size == 16:
                found.append(recall.number("gradually", spot, "test_score", over=histogram(spot[1])))
        beyond = [n for n in neighbours if n >= cell.size]
        if len(beyond) > 1:
            accuracies, runs, label = recall.path(cell, beyond)
            falls = pd.Series(np.min(-np.diff(accuracies, axis=1), axis=1), accuracies.index)
            found.append(quantity("decreases", label, _slopes(np.log2(beyond), accuracies), runs))
            found.append(quantity("every-step", label, falls, runs))
    found = complete(found, ["gradually"], "no gLSTM with M = 16 was trained at N = 32")
    found = complete(found, ["saturates"], "no gLSTM was trained at N = 2 M")
    return complete(found, ["decreases", "every-step"], "no gLSTM was trained at several N from its M on")


def capacity_grows(tables: Tables, settings: StudySettings) -> Measured:
    """C4: test accuracy of twice the memory dimension minus that of the single one, at N = twice."""
    recall = _Recall("nar", tables, settings.nar)
    found: Measured = []
    for n in (16, 32):
        spots = [(recall.cell("glstm", size, k_hop=True), n) for size in (n, n // 2)]
        found.append(recall.difference(f"at-{n}", spots, "test_score"))
        found = complete(found, [f"at-{n}"], f"gLSTM was not trained at N = {n} with M = {n // 2} and {n}")
    return found


def gcn_saturates(tables: Tables, settings: StudySettings) -> Measured:
    """C5: the widest GCN against the histogram line and against gLSTM with M = 16."""
    recall = _Recall("nar", tables, settings.nar)
    found: Measured = []
    glstm = recall.cell("glstm", 16, k_hop=True)
    found.append(recall.number("glstm", (glstm, 16), "test_score"))
    width = max(settings.nar.widths, default=0)
    gcn, fresh = (recall.cell("gcn", width, data=data) for data in (None, "fresh"))
    for n in recall.neighbours(gcn):
        if n >= 8:
            found.append(recall.number("imperfect", (gcn, n), "test_score"))
    found.append(recall.number("line", (gcn, 16), "test_score", minus=histogram(16)))
    found.append(recall.number("memorised", (gcn, 16), "train_score"))
    found.append(_parameters(recall, gcn, glstm, 16))
    for n in recall.neighbours(fresh) if fresh != gcn else ():
        found.append(recall.number("fresh", (fresh, n), "test_score", minus=histogram(n)))
    found = complete(found, ["imperfect"], "no GCN was trained at N of 8 or more")
    found = complete(found, ["line", "memorised"], "no GCN was trained at N = 16")
    found = complete(found, ["glstm"], "no gLSTM with M = 16 was trained at N = 16")
    found = complete(found, ["parameters"], "gLSTM with M = 16 and GCN were not both trained at N = 16")
    return complete(found, ["fresh"], "no GCN was trained on new graphs in every step beside one on fixed ones")


def _parameters(recall: _Recall, large: Cell, small: Cell, n: int) -> Quantity:
    """Parameters of the first minus those of the second, the same for every seed."""
    counts = [rows_of(recall.fits, cell, n).parameters for cell in (large, small)]
    there = all(len(each) for each in counts)
    label = f"{words(large)} with {counts[0].min()}, {words(small)} with {counts[1].max()}, N = {n}" if there else ""
    values = [float(counts[0].min() - counts[1].max())] if there else []
    return Quantity("parameters", label, values, recall.runs([(large, n), (small, n)], recall.fits))


def k_hop_is_needed(tables: Tables, settings: StudySettings) -> Measured:
    """C10: test accuracy of gLSTM with K-hop minus that without, at N = M."""
    recall = _Recall("nar", tables, settings.nar)
    found: Measured = []
    for cell, neighbours in recall.glstm():
        if cell.size in neighbours:
            spots = [(cell, cell.size), (cell._replace(k_hop=False), cell.size)]
            found.append(recall.difference("accuracy", spots, "test_score"))
    return complete(found, ["accuracy"], "gLSTM was not trained with and without K-hop at N = M")


def depth_does_not_help(tables: Tables, settings: StudySettings) -> Measured:
    """C11: the best of the GCNs with different numbers of layers, at N = 16."""
    recall = _Recall("nar", tables, settings.nar)
    found: Measured = []
    width = settings.nar.widths[0] if settings.nar.widths else 0
    cells = [recall.cell("gcn", width)]
    cells += [recall.cell("gcn", width, layers=layers) for layers in sorted(settings.nar.depths)]
    cells = [cell for cell in cells if 16 in recall.neighbours(cell)]
    if len(cells) > 1:
        spots = [(cell, 16) for cell in cells]
        rows = pd.concat([rows_of(recall.fits, *spot) for spot in spots])
        layers = [cell.layers for cell in cells]
        used = whole_seeds(rows, "layers", layers)
        best = used.groupby("seed").test_score.agg(lambda v: np.max(v.to_numpy())) - histogram(16)
        label = f"GCN d = {width}, {', '.join(map(str, layers))} layers, N = 16{recall.budget(spots)}"
        runs = recall.runs(spots, recall.fits, used=set(used.seed))
        found.append(quantity("accuracy", label, best.astype(float), runs))
    return complete(found, ["accuracy"], "no GCNs with different numbers of layers were trained at N = 16")


# --- C6 to C9: Jacobians and Hessians of trained networks ------------------------------------------------------------


def sensitivity_does_not_fail(tables: Tables, settings: StudySettings) -> Measured:
    """C6: full norm and accuracy of GCN at N = 32 against N = 16."""
    found: Measured = []
    recall = _Recall("nar", tables, settings.nar)
    for cell in recall.gcns():
        spots = [(cell, 32), (cell, 16)]
        found.append(recall.norm_ratio("norm", spots))
        found.append(recall.norm_ratio("per-output", spots, scale=16 / 32))
        found.append(recall.difference("accuracy", spots, "test_score"))
    if {"narr_jacobians", "narr_fits"} <= set(tables):
        regression = _Recall("narr", tables, settings.narr)
        for cell in regression.gcns():
            found.append(regression.norm_ratio("regression", [(cell, 32), (cell, 16)]))
    found = complete(found, ["norm", "per-output", "accuracy"], "no GCN was trained at N = 16 and 32")
    return complete(found, ["regression"], "no GCN was trained in the regression task at N = 16 and 32")


def norm_grows_past_capacity(tables: Tables, settings: StudySettings) -> Measured:
    """C7: full norm of gLSTM at the first N with mean accuracy below 0.95 over that at the last N with 0.99 or more."""
    recall = _Recall("nar", tables, settings.nar)
    found: Measured = []
    for cell, neighbours in recall.glstm():
        means = {n: recall.scores((cell, n), "test_score").mean() for n in neighbours}
        good = [n for n in neighbours if means[n] >= RECALLED]
        fallen = [n for n in neighbours if means[n] < FALLEN and n > max(good, default=n)]
        if fallen:
            for criterion in ("grows", "reported"):
                found.append(recall.norm_ratio(criterion, [(cell, min(fallen)), (cell, max(good))]))
    reason = f"no gLSTM has an N with accuracy of {RECALLED} or more and a larger one with less than {FALLEN}"
    return complete(found, ["grows", "reported"], reason)


def selectivity_follows_capacity(tables: Tables, settings: StudySettings) -> Measured:
    """C8: geometric mean of the norm for the neighbour asked for over that of the others, part by the value."""
    recall = _Recall("nar", tables, settings.nar)
    found: Measured = []
    for cell, neighbours in recall.glstm():
        for criterion, n in (("at-capacity", cell.size), ("overloaded", 4 * cell.size)):
            if n in neighbours and n >= 8:
                found.append(recall.selectivity(criterion, (cell, n)))
    for cell in recall.gcns():
        found += [recall.selectivity("gcn", (cell, n)) for n in recall.neighbours(cell) if n >= 16]
    found = complete(found, ["at-capacity"], "no gLSTM was measured at N = M")
    found = complete(found, ["overloaded"], "no gLSTM was measured at N = 4 M")
    return complete(found, ["gcn"], "no GCN was measured at N of 16 or more")


def mixing_follows_capacity(tables: Tables, settings: StudySettings) -> Measured:
    """C9: largest absolute entry of the mixing Hessian, mean over graphs."""
    recall = _Recall("nar", tables, settings.nar)
    found: Measured = []
    for cell, neighbours in recall.glstm():
        if {cell.size, 4 * cell.size} <= set(neighbours):
            found.append(recall.hessian_ratio("collapses", [(cell, 4 * cell.size), (cell, cell.size)]))
        for gcn in recall.gcns() if 8 in neighbours else ():
            found.append(recall.hessian_ratio("against-gcn", [(cell, 8), (gcn, 8)]))
    found = complete(found, ["collapses"], "no gLSTM was measured at N = M and 4 M")
    return complete(found, ["against-gcn"], "gLSTM and GCN were not both measured at N = 8")


# --- C12: regression -------------------------------------------------------------------------------------------------


def regression_agrees(tables: Tables, settings: StudySettings) -> Measured:
    """C12: mean squared errors, gLSTM at N = M = 16 and GCN against the mean of the values."""
    recall = _Recall("narr", tables, settings.narr)
    found: Measured = [recall.number("glstm", (recall.cell("glstm", 16, k_hop=True), 16), "test_score")]
    for cell in recall.gcns():
        for n in recall.neighbours(cell):
            found.append(recall.number("gcn", (cell, n), "test_score", over=mean_line(n)))
    found = complete(found, ["glstm"], "no gLSTM with M = 16 was trained at N = 16")
    return complete(found, ["gcn"], "no GCN was trained in the regression task")


# --- C13, C14: graph properties --------------------------------------------------------------------------------------

ARCHIVE = {"diam": "diameter", "ecc": "eccentricity", "sssp": "sssp"}
"""Criteria about the archive and what its users call the column."""
NO_ARCHIVE = "the benchmark's archive was not given, so no network was trained on its labels"


def best_on_properties(tables: Tables, settings: StudySettings) -> Measured:
    """C13: test errors on the archive's labels, and those of the other networks trained here."""
    properties = _Properties(tables["gpp_fits"], settings.gpp)
    found: Measured = [
        properties.number(criterion, {"source": "archive", "column": column}) for criterion, column in ARCHIVE.items()
    ]
    for source, column in properties.labels:
        for model in settings.gpp.baselines:
            pair = [{"model": model, "ablation": "none"}, {"model": "glstm", "ablation": "none"}]
            found.append(properties.difference("trained-here", {"source": source, "column": column}, pair))
    found = complete(found, list(ARCHIVE), NO_ARCHIVE)
    return complete(found, ["trained-here"], "no other network was trained on graph properties")


def k_hop_on_properties(tables: Tables, settings: StudySettings) -> Measured:
    """C14: test error of gLSTM without K-hop minus that with it."""
    properties = _Properties(tables["gpp_fits"], settings.gpp)
    pair = [{"model": "glstm", "ablation": ablation} for ablation in ("1-hop", "none")]
    found: Measured = [
        properties.difference(criterion, {"source": "archive", "column": column}, pair)
        for criterion, column in ARCHIVE.items()
    ]
    toy = {task: {"source": "generated", "task": task} for task in settings.gpp.tasks}
    rows = {
        "toy-fails": ("eccentricity", "diameter"),
        "toy-laplacian": ("laplacian",),
        "toy-distance": ("sssp",),
    }
    for criterion, tasks in rows.items():
        found += [properties.difference(criterion, toy[task], pair) for task in tasks if task in toy]
    if {"eccentricity", "laplacian"} <= set(toy):
        found.append(properties.contrast("toy-contrast", [toy["eccentricity"], toy["laplacian"]], pair))
    found = complete(found, list(ARCHIVE), NO_ARCHIVE)
    reason = "gLSTM was not trained with and without K-hop on generated graphs with these labels"
    return complete(found, [*rows, "toy-contrast"], reason)


# --- C15, C16: peptides ----------------------------------------------------------------------------------------------


def peptides(tables: Tables, settings: StudySettings) -> Measured:
    """C15: average precision and absolute error on the two tasks."""
    runs = _Peptides(tables["peptides_fits"], settings.peptides)
    found: Measured = [
        runs.number("func", "func"),
        runs.number("func-gcn", "func"),
        runs.number("struct-gcn", "struct"),
    ]
    return complete(found, ["func", "func-gcn", "struct-gcn"], "gLSTM was not trained on this task of Peptides")


def gates_matter_little(tables: Tables, settings: StudySettings) -> Measured:
    """C16: average precision of the full gLSTM minus that of each ablation."""
    runs = _Peptides(tables["peptides_fits"], settings.peptides)
    found: Measured = [
        runs.loss("gates", ablation) for ablation in ("no-output-gate", "no-input-gate", "no-forget-gate")
    ]
    found.append(runs.loss("k-hop", "1-hop"))
    return complete(found, ["gates", "k-hop"], "these ablations were not trained on Peptides-func")


# --- shared: recall --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recall:
    """One of the two recall tasks: its tables, and the trainings that its settings plan."""

    task: str
    tables: Tables
    settings: RecallSettings

    @property
    def fits(self) -> pd.DataFrame:
        return self.tables[f"{self.task}_fits"]

    def cell(self, model: str, size: int, *, k_hop: bool = False, layers: int = 2, data: str | None = None) -> Cell:
        return Cell(model, size, k_hop, layers, data or self.settings.data)

    def neighbours(self, cell: Cell) -> list[int]:
        """Numbers of neighbours at which a network is trained, ascending."""
        return planned(self.settings).get(cell, [])

    def glstm(self) -> list[tuple[Cell, list[int]]]:
        """The gLSTMs with K-hop and their N, by memory dimension."""
        return [(cell, n) for cell, n in planned(self.settings).items() if cell.model == "glstm" and cell.k_hop]

    def gcns(self) -> list[Cell]:
        """Two-layer GCNs without K-hop, on the settings' kind of training graphs."""
        cells = [self.cell("gcn", width) for width in self.settings.widths]
        return [cell for cell in cells if self.neighbours(cell)]

    def scores(self, spot: tuple[Cell, int], column: str) -> pd.Series:
        """A column of the fits by seed."""
        return by_seed(rows_of(self.fits, *spot), column).astype(float)

    def number(
        self,
        criterion: str,
        spot: tuple[Cell, int],
        column: str,
        *,
        minus: float = 0.0,
        over: float = 1.0,
    ) -> Quantity:
        """A column of the fits at one spot, less a reference or divided by one."""
        values = (self.scores(spot, column) - minus) / over
        return quantity(criterion, self.label([spot]), values, self.runs([spot], self.fits))

    def difference(self, criterion: str, spots: Spots, column: str) -> Quantity:
        """A column of the fits at the first spot minus that at the second, paired by seed."""
        values = paired(*(self.scores(spot, column) for spot in spots))
        return quantity(criterion, self.label(spots), values, self.runs(spots, self.fits))

    def path(self, cell: Cell, neighbours: list[int]) -> tuple[pd.DataFrame, Accounting, str]:
        """Test accuracies of one network by seed at several N, (seeds, N), with accounting and label."""
        spots = [(cell, n) for n in neighbours]
        used = whole_seeds(rows_of(self.fits, cell), "neighbours", neighbours)
        runs = self.runs(spots, self.fits, used=set(used.seed))
        label = f"{words(cell)}, N = {', '.join(map(str, neighbours))}{self.budget(spots)}"
        scores = used.pivot(index="seed", columns="neighbours", values="test_score")
        return scores.reindex(columns=neighbours).astype(float), runs, label

    def norm_ratio(self, criterion: str, spots: Spots, scale: float = 1.0) -> Quantity:
        """Mean full norm at the first spot over that at the second, times `scale`, paired by seed."""
        table = select(self.tables[f"{self.task}_jacobians"], part="full")
        return self._ratio(criterion, spots, table, "mean", scale)

    def hessian_ratio(self, criterion: str, spots: Spots) -> Quantity:
        """Largest absolute entry at the first spot over that at the second, paired by seed."""
        return self._ratio(criterion, spots, self.tables[f"{self.task}_hessians"], "largest_absolute", 1.0)

    def _ratio(self, criterion: str, spots: Spots, table: pd.DataFrame, column: str, scale: float) -> Quantity:
        first, second = (_over_graphs(rows_of(table, *spot), column) for spot in spots)
        shared = first.index.intersection(second.index)
        values = scale * first[shared] / second[shared]
        return quantity(criterion, self.label(spots), values, self.runs(spots, table), "geometric mean")

    def selectivity(self, criterion: str, spot: tuple[Cell, int]) -> Quantity:
        """Geometric mean over graphs and other neighbours of selected over their norm, part by the value."""
        table = select(self.tables[f"{self.task}_jacobians"], part="value")
        values = np.exp(_over_graphs(rows_of(table, *spot), "log_ratio"))
        return quantity(criterion, self.label([spot]), values, self.runs([spot], table), "geometric mean")

    def label(self, spots: Spots) -> str:
        """Networks and N, and what the budget left open."""
        return " against ".join(f"{words(cell)}, N = {n}" for cell, n in spots) + self.budget(spots)

    def budget(self, spots: Spots) -> str:
        """What the budget left open among the trainings at these spots."""
        rows = pd.concat([rows_of(self.fits, *spot) for spot in spots])
        return budget_words(rows, self.settings.steps, score="train_score" if self.task == "nar" else None)

    def runs(self, spots: Spots, table: pd.DataFrame, used: set[int] | None = None) -> Accounting:
        """Where the trainings at these spots went; `table` is what was measured of them.

        With `used`, a seed that is not among them was left out as a whole because one of its runs is lost.
        """
        there, diverged = set(), set()
        for place, spot in enumerate(spots):
            fits = rows_of(self.fits, *spot)
            there |= {(place, seed) for seed in rows_of(table, *spot).seed.unique()}
            diverged |= {(place, seed) for seed in fits[fits.diverged_at >= 0].seed}
        out = set() if used is None else {key for key in there if key[1] not in used}
        wanted = product(range(len(spots)), self.settings.seeds)
        return account(wanted, there, diverged=diverged, excluded={SEED_LEFT_OUT: out}, what="trainings")


def _over_graphs(rows: pd.DataFrame, column: str) -> pd.Series:
    """Mean over the test graphs of each seed; numpy's mean lets a NaN through."""
    return rows.groupby("seed")[column].agg(lambda v: np.mean(v.to_numpy())).astype(float)


# --- shared: graph properties and peptides ---------------------------------------------------------------------------

Where = Mapping[str, Hashable]


@dataclass(frozen=True)
class _Properties:
    """Trainings on graph properties: fits, and the settings that planned them."""

    fits: pd.DataFrame
    settings: PropertySettings

    @property
    def labels(self) -> list[tuple[str, str]]:
        """(source, column) of the labels that were trained on."""
        return list(dict.fromkeys(self.fits[["source", "column"]].itertuples(index=False, name=None)))

    def number(self, criterion: str, where: Where) -> Quantity:
        """Test error of gLSTM."""
        cell = {**where, "model": "glstm", "ablation": "none"}
        return quantity(criterion, self.label([cell]), self.errors(cell), self.runs([cell]))

    def difference(self, criterion: str, where: Where, pair: Sequence[Where]) -> Quantity:
        """Test error of the first network minus that of the second, on one label, paired by seed."""
        cells = [{**where, **each} for each in pair]
        return quantity(criterion, self.label(cells), paired(*map(self.errors, cells)), self.runs(cells))

    def contrast(self, criterion: str, wheres: Sequence[Where], pair: Sequence[Where]) -> Quantity:
        """The difference on the first label minus that on the second."""
        cells = [[{**where, **each} for each in pair] for where in wheres]
        values = paired(*(paired(*map(self.errors, each)) for each in cells))
        flat = [cell for each in cells for cell in each]
        return quantity(criterion, self.label(flat), values, self.runs(flat))

    def errors(self, cell: Where) -> pd.Series:
        """Test error by seed."""
        return by_seed(select(self.fits, **cell), "test_error").astype(float)

    def label(self, cells: Sequence[Where]) -> str:
        """Graphs, labels, networks, how far a constant gets, and what the budget left open."""
        rows = pd.concat([select(self.fits, **cell) for cell in cells])
        if rows.empty:
            return ""
        toy = rows.source.iloc[0] == "generated"
        size = f"{self.settings.smallest} to {self.settings.largest} nodes"
        graphs = f"toy, generated graphs of {size}" if toy else "the benchmark's archive"
        named = rows[["column", "task"]].drop_duplicates().itertuples(index=False)
        names = ", ".join(each.task if toy else f"its {each.column}, found to be {each.task}" for each in named)
        constant = rows.constant_error.mean()
        return f"{graphs}, {names}; a constant: {constant:.2f}" + budget_words(rows, self.settings.steps)

    def runs(self, cells: Sequence[Where]) -> Accounting:
        """Where the trainings of these cells went."""
        there, diverged = set(), set()
        for place, cell in enumerate(cells):
            rows = select(self.fits, **cell)
            there |= {(place, seed) for seed in rows.seed}
            diverged |= {(place, seed) for seed in rows[rows.diverged_at >= 0].seed}
        wanted = product(range(len(cells)), self.settings.seeds)
        return account(wanted, there, diverged=diverged, what="trainings")


@dataclass(frozen=True)
class _Peptides:
    """Trainings on Peptides."""

    fits: pd.DataFrame
    settings: PeptidesSettings

    def number(self, criterion: str, task: str) -> Quantity:
        """Test score of the full gLSTM."""
        return self._quantity(criterion, task, ["none"], lambda values: values)

    def loss(self, criterion: str, ablation: str) -> Quantity:
        """Average precision of the full gLSTM minus that of an ablation, paired by seed."""
        return self._quantity(criterion, "func", ["none", ablation], paired)

    def _quantity(self, criterion: str, task: str, ablations: list[str], reduce: Callable[..., pd.Series]) -> Quantity:
        parts = [select(self.fits, task=task, ablation=ablation) for ablation in ablations]
        rows = pd.concat(parts)
        key = ["ablation", "seed"]
        present, diverged = (
            set(each[key].itertuples(index=False, name=None)) for each in (rows, rows[rows.diverged_at >= 0])
        )
        runs = account(product(ablations, self.settings.seeds), present, diverged=diverged, what="trainings")
        counts = ", ".join(f"{count} parameters" for count in dict.fromkeys(rows.parameters))
        label = f"Peptides-{task}, {' against '.join(ablations)}, {counts}"
        label = label.replace("none", "full gLSTM") + budget_words(rows, self.settings.epochs, "epochs")
        return quantity(criterion, label, reduce(*(by_seed(part, "test_score").astype(float) for part in parts)), runs)


def judge(settings: str, scale: Scale, tables: list[Path], data: list[Path], verdicts: Path, manifest: Path) -> None:
    """Judge every claim of claims.yaml.

    Args:
        settings: all settings of the study as JSON.
        scale: the scale that the tables were made at.
        tables: Parquet files of the measuring and training steps.
        data: prepared data sets that these steps read.
        verdicts: verdicts.json to write.
        manifest: manifest.json to write.

    """
    validated = StudySettings.validate(json.loads(settings), "studies.glstm")
    judge_files(sys.modules[__name__], Path(__file__).parent, validated, scale, tables, data, verdicts, manifest)


if __name__ == "__main__":
    run({"judge": judge})
