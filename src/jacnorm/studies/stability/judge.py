"""Judging step of the `stability` study: one estimand function per claim of ``claims.yaml``, tables in, numbers out.

Margins live in claims.yaml and nowhere else. Slopes are least squares of one network's log norm on depth 10 to 50, so
their mean over seeds is the slope of the seed mean; depths of one network are correlated, seeds are not.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import ks_2samp

from jacnorm.report.claims import Scale
from jacnorm.report.judging import judge_files
from jacnorm.report.verdicts import Accounting, NotTested, Quantity
from jacnorm.step import run
from jacnorm.studies.stability.settings import StudySettings
from jacnorm.studies.stability.theory import alpha_mag, log_gamma_m, log_relu_limit, pruned_slope, slope

Tables = Mapping[str, pd.DataFrame]
Measured = list[Quantity | NotTested]

FIRST_DEPTH, LAST_DEPTH = 10, 50
CRITICAL_RELU, CRITICAL_TANH = 2.0, 1.0


# --- C1, C2, C6, C7, C9, C15: log norm against depth ---------------------------------------------------------------


def off_critical(tables: Tables, settings: StudySettings) -> Measured:
    """C1: rate of growth or decay away from the critical variance."""
    found: Measured = []
    for width in _at_least(settings.depth.widths, 64):
        for sigma_w2, sign in ((1.0, "decay"), (4.0, "growth")):
            slopes = _slopes(tables, width=width, sigma_w2=sigma_w2, method="dense")
            label = f"width {width}, weight variance {sigma_w2:g}"
            found.append(_quantity("rate", label, slopes - slope(sigma_w2), settings.depth.seeds))
            found.append(_quantity(sign, label, slopes, settings.depth.seeds, reference=slope(sigma_w2)))
    return _complete(found, ["rate", "decay", "growth"], "no width of 64 or more was measured to depth 50")


def critical(tables: Tables, settings: StudySettings) -> Measured:
    """C2: no exponential trend, and a norm near its infinite-width value at every depth."""
    found: Measured = []
    for width in _at_least(settings.depth.widths, 64):
        cell = {"width": width, "sigma_w2": CRITICAL_RELU, "method": "dense"}
        slopes = _slopes(tables, **cell)
        found.append(_quantity("slope", f"width {width}", slopes, settings.depth.seeds))
        for depth, values in _select(tables["depth"], activation="relu", **cell).groupby("depth"):
            excess = _by_seed(values) - log_relu_limit(int(depth), "none") - math.log(1.5)
            found.append(_quantity("bound", f"width {width}, depth {depth}", excess, settings.depth.seeds))
    return _complete(found, ["slope", "bound"], "no width of 64 or more was measured to depth 50")


def unscaled_pruning(tables: Tables, settings: StudySettings) -> Measured:
    """C6: random masks without a factor."""
    found: Measured = []
    for width in _at_least(settings.depth.widths, 128):
        for sparsity in settings.depth.sparsities:
            slopes = _slopes(tables, width=width, method="random", sparsity=sparsity, scaling="none")
            label, expected = f"width {width}, sparsity {sparsity:g}", pruned_slope("random", sparsity)
            found.append(_quantity("rate", label, slopes - expected, settings.depth.seeds))
            sign = {0.5: "half", 0.9: "nine-tenths"}.get(sparsity)
            if sign:
                found.append(_quantity(sign, label, slopes, settings.depth.seeds, reference=expected))
    return _complete(found, ["rate", "half", "nine-tenths"], "this sparsity was not measured at width 128 or more")


def scaled_pruning(tables: Tables, settings: StudySettings) -> Measured:
    """C7: random masks with the factor (1 - sparsity)^(-1/2)."""
    found: Measured = []
    for width in settings.depth.widths:
        for sparsity in _ledger_sparsities(settings.depth.sparsities):
            cell = {"width": width, "method": "random", "sparsity": sparsity, "scaling": "inverse_sqrt_density"}
            label = f"width {width}, sparsity {sparsity:g}"
            slopes = _slopes(tables, **cell)
            if width >= 128:
                found.append(_quantity("slope", label, slopes, settings.depth.seeds))
                gap = _log_norms(tables, 30, **cell) - _log_norms(tables, 30, width=width, method="dense")
                found.append(_quantity("gap", label, gap, settings.depth.seeds))
            elif width == 64:
                found.append(_quantity("slope-narrow", label, slopes, settings.depth.seeds))
    return _complete(found, ["slope", "slope-narrow", "gap"], "no such width was measured to depth 50")


def magnitude_factor(tables: Tables, settings: StudySettings) -> Measured:
    """C9: magnitude masks with their own factor, and with that of random masks."""
    found: Measured = []
    for width in _at_least(settings.depth.widths, 128):
        for sparsity in _ledger_sparsities(settings.depth.sparsities):
            cell = {"width": width, "method": "magnitude", "sparsity": sparsity}
            label = f"width {width}, sparsity {sparsity:g}"
            own = _slopes(tables, **cell, scaling="alpha_mag")
            found.append(_quantity("own-factor", label, own, settings.depth.seeds))
            expected = pruned_slope("magnitude", sparsity, factor=(1 - sparsity) ** -0.5)
            wrong = _slopes(tables, **cell, scaling="inverse_sqrt_density")
            found.append(_quantity("random-factor", label, wrong - expected, settings.depth.seeds))
    return _complete(found, ["own-factor", "random-factor"], "no width of 128 or more was measured to depth 50")


def tanh(tables: Tables, settings: StudySettings) -> Measured:
    """C15: the same picture with tanh at its critical variance."""
    found: Measured = []
    for width in settings.depth.widths:
        cell = {"activation": "tanh", "sigma_w2": CRITICAL_TANH, "width": width}
        dense = _log_norms(tables, LAST_DEPTH, **cell, method="dense")
        for sparsity in _ledger_sparsities(settings.depth.sparsities):
            pruned = {**cell, "method": "random", "sparsity": sparsity}
            label = f"width {width}, sparsity {sparsity:g}"
            gap = _log_norms(tables, LAST_DEPTH, **pruned, scaling="inverse_sqrt_density") - dense
            found.append(_quantity("rescaled", label, gap, settings.depth.seeds))
            unscaled = _log_norms(tables, LAST_DEPTH, **pruned, scaling="none")
            found.append(_quantity("unscaled", label, unscaled, settings.depth.seeds))
    return _complete(found, ["rescaled", "unscaled"], "tanh networks were not measured at depth 50")


# --- C3, C4, C5: the theorem ---------------------------------------------------------------------------------------


def free_limit(tables: Tables, settings: StudySettings) -> Measured:
    """C3: norm of the masked product over the norm of a product of free semicirculars."""
    table, seeds = _select(tables["limit"], product="both ends"), settings.theorem.seeds
    found: Measured = []
    widths = sorted(settings.theorem.limit_widths)
    for depth, criterion in ((3, "three-factors"), (10, "ten-factors")):
        for width in _at_least(widths, 256):
            ratios = np.exp(_by_seed(_select(table, width=width, depth=depth)) - log_gamma_m(depth))
            label = f"width {width}, {depth} factors"
            found.append(_quantity(criterion, label, ratios, seeds, statistic="geometric mean", reference=1.0))
        if len(widths) > 1 and depth in settings.theorem.limit_depths:
            pair = [
                _by_seed(_select(table, width=w, depth=depth)) - log_gamma_m(depth) for w in (widths[0], widths[-1])
            ]
            label = f"{depth} factors, width {widths[0]} against {widths[-1]}"
            found.append(_quantity("approach", label, pd.concat(pair, axis=1), seeds, statistic=_gain_in_distance))
    return _complete(found, ["three-factors", "ten-factors", "approach"], "no width of 256 or more, or a single width")


def _gain_in_distance(rows: np.ndarray) -> float:
    small, large = rows.mean(axis=0)
    return abs(small) - abs(large)


def surrogate(tables: Tables, settings: StudySettings) -> Measured:
    """C4: law of the log norm with true and with independent diagonals."""
    table = tables["surrogate"]
    found: Measured = []
    planned = 2 * len(settings.theorem.seeds) * settings.theorem.surrogate_draws_per_seed
    for method in ("dense", "random", "magnitude"):
        true, other = (
            _select(table, method=method, diagonal=diagonal).log_norm.to_numpy() for diagonal in ("true", "surrogate")
        )
        runs = Accounting(planned=planned, finished=len(true) + len(other), lost=planned - len(true) - len(other))
        label = f"{method} masks" if method != "dense" else "dense"
        law, mean = [], []
        if min(len(true), len(other)) > 1:
            law = [ks_2samp(true, other).pvalue]
            with np.errstate(invalid="ignore", divide="ignore"):  # a Jacobian of zero leaves the mean undefined: NaN
                error = np.sqrt(true.var(ddof=1) / len(true) + other.var(ddof=1) / len(other))
                mean = [(true.mean() - other.mean()) / error]
        found += [Quantity("law", label, law, runs), Quantity("mean", label, mean, runs)]
    return found


def independence(tables: Tables, settings: StudySettings) -> Measured:
    """C5: share of chi-square tests that reject at the 5 % level."""
    found: Measured = []
    planned = len(settings.theorem.seeds) * settings.theorem.independence_repeats_per_seed
    pairs = {
        "same layer": "rejections",
        "next layer": "rejections",
        "weight magnitude": "rejections",
        "row sum (control)": "control",
    }
    for (width, pair), tests in tables["independence"].groupby(["width", "pair"]):
        if pair in pairs:
            rejected = (tests.p_value < 0.05).to_numpy(float)
            runs = Accounting(planned=planned, finished=len(rejected), lost=planned - len(rejected), what="tests")
            seeds = tests.seed.tolist()
            found.append(Quantity(pairs[pair], f"{pair}, width {width}", rejected, runs, "proportion", 0.05, seeds))
    return _complete(found, ["rejections", "control"], "no test was made")


# --- C8, C13: conditions -------------------------------------------------------------------------------------------


def edge(tables: Tables, settings: StudySettings) -> Measured:
    """C8: half the norm of sparse Gaussian matrices on both sides of degree log n."""
    table, seeds = _select(tables["edge_matrices"], entries="gaussian"), settings.conditions.seeds
    found: Measured = []
    for size in _at_least(settings.conditions.sizes, 1024):
        for ratio, criterion in ((8.0, "dense-side"), (0.5, "sparse-side")):
            cell = _select(table, sweep="degree-over-log", size=size)
            norms = _by_seed(cell[np.isclose(cell.degree_over_log, ratio)], "norm")
            found.append(_quantity(criterion, f"size {size}", norms / 2, seeds, what="matrices"))
    sizes = sorted(settings.conditions.fixed_degree_sizes)
    if len(sizes) > 1 and settings.conditions.fixed_degree == 4:
        small, large = (_by_seed(_select(table, sweep="fixed-degree", size=n), "norm") for n in (sizes[0], sizes[-1]))
        label = f"size {sizes[-1]} against {sizes[0]}"
        found.append(_quantity("growth", label, large - small, seeds, what="pairs of matrices"))
    return _complete(found, ["dense-side", "sparse-side", "growth"], "these sizes and degrees were not measured")


def correlated(tables: Tables, settings: StudySettings) -> Measured:
    """C13: ratios of expected norms over correlation exponents, paired by seed."""
    found: Measured = []
    suffixes = {"equicorrelated": "", "row": "-rows"}
    for width in _at_least(settings.conditions.correlated_widths, 128):
        for correlation, suffix in suffixes.items():
            for diagonal in ("linear", "surrogate"):
                cell = {"width": width, "correlation": correlation, "diagonal": diagonal}
                logs = {a: _by_seed(rows) for a, rows in _select(tables["correlated"], **cell).groupby("exponent")}
                for criterion, exponent, against in (
                    ("fast-decay", 1.5, 2.0),
                    ("fast-decay", 1.5, math.inf),
                    ("slow-decay", 0.5, math.inf),
                ):
                    if exponent in logs and against in logs:
                        pair = pd.concat([logs[exponent], logs[against]], axis=1)
                        other = "no correlation" if against == math.inf else f"{against:g}"
                        label = f"width {width}, {diagonal} diagonals, exponent {exponent:g} against {other}"
                        found.append(
                            _quantity(criterion + suffix, label, pair, settings.conditions.seeds, _log_ratio_of_means)
                        )
    criteria = [criterion + suffix for criterion in ("fast-decay", "slow-decay") for suffix in suffixes.values()]
    return _complete(found, criteria, "exponents 0.5, 1.5 and 2 were not measured at width 128 or more")


def _log_ratio_of_means(rows: np.ndarray) -> float:
    """Log of E exp(first column) / E exp(second column)."""
    first, second = (np.logaddexp.reduce(column) for column in rows.T)
    return float(first - second)


# --- C10, C11: scores ----------------------------------------------------------------------------------------------


def synflow_factor(tables: Tables, settings: StudySettings) -> Measured:
    """C10: SynFlow's Frobenius factor against the magnitude factor, and the norm it restores."""
    found: Measured = []
    for sparsity in settings.scores.sparsities:
        pruned = {"method": "synflow", "sparsity": sparsity, "scaling": "frobenius"}
        for depth in settings.scores.depths:
            label = f"depth {depth}, sparsity {sparsity:g}"
            factor = _by_seed(_select(tables["scores"], depth=depth, **pruned), "factor") / alpha_mag(sparsity)
            found.append(_quantity("factor", label, factor, settings.scores.seeds))
            if depth == 30:
                gap = _scores(tables, 30, **pruned) - _scores(tables, 30, method="dense")
                found.append(_quantity("gap", label, gap, settings.scores.seeds))
    return _complete(found, ["factor", "gap"], "SynFlow was not measured at depth 30")


def data_dependent_scores(tables: Tables, settings: StudySettings) -> Measured:
    """C11: SNIP and GraSP at depth 30 and sparsity 0.9."""
    found: Measured = []
    for method in ("snip", "grasp"):
        cell = {"method": method, "sparsity": 0.9}
        exploded = _scores(tables, 30, **cell, scaling="frobenius")
        restored = _scores(tables, 30, **cell, scaling="activity") - _scores(tables, 30, method="dense")
        found.append(_quantity("explodes", method, exploded, settings.scores.seeds))
        found.append(_quantity("restored", method, restored, settings.scores.seeds))
    return _complete(found, ["explodes", "restored"], "depth 30 with sparsity 0.9 was not measured")


# --- C12, C14: training --------------------------------------------------------------------------------------------


def trainability(tables: Tables, settings: StudySettings) -> Measured:
    """C12: test accuracy at the learning rate with the best mean validation accuracy of each arm.

    Digits and MNIST only: the margins are accuracies that such networks cannot reach on CIFAR-10, pruned or not.
    """
    this = settings.trainability
    found: Measured = []
    table = _select(tables["trainability"], method="random", sparsity=0.9)
    table = table[table.data_set.isin(["digits", "mnist"])]
    for (data_set, depth, scaling), arm in table.groupby(["data_set", "depth", "scaling"]):
        if depth < 10 or depth > 30 or (this.width < 128 and depth > 10) or this.width < 64:
            continue
        # A run without a finite loss has no accuracy to boast of; it counts as it ended, at its frozen weights.
        rate = arm.groupby("learning_rate").validation_accuracy.mean().idxmax()
        best = arm[arm.learning_rate == rate]
        diverged = int((best.diverged_at >= 0).sum())
        deep = "rescaled" if depth <= 20 else "rescaled-deep"
        criterion = deep if scaling == "frobenius" else "unscaled"
        runs = _accounting(len(this.seeds), len(best), diverged, "trainings")
        label = f"{data_set}, width {this.width}, depth {depth}, learning rate {rate:g}"
        found.append(Quantity(criterion, label, best.test_accuracy.to_numpy(), runs, seeds=best.seed.tolist()))
    criteria = ["rescaled", "rescaled-deep", "unscaled"]
    return _complete(found, criteria, "no such depth was trained at a sufficient width")


def after_training(tables: Tables, settings: StudySettings) -> Measured:
    """C14: log norm after training, deep against shallow and over all runs."""
    this = settings.drift
    reason = "depths 5 and 20 were not trained at width 128 or more"
    if this.width < 128 or not {5, 20} <= set(this.depths) or this.epochs not in this.measured_epochs:
        return [NotTested(reason, "depth-gap"), NotTested(reason, "every-run")]
    found: Measured = []
    diverged = tables["curves"].groupby(["data_set", "depth", "seed"]).diverged_at.max() >= 0
    for data_set, last in _select(tables["drift"], epoch=this.epochs).groupby("data_set"):
        gap = _by_seed(_select(last, depth=20)) - _by_seed(_select(last, depth=5))
        lost = int(diverged[data_set].sum())
        runs = _accounting(len(this.seeds) * len(this.depths), len(last), lost, "trainings")
        found.append(
            Quantity("depth-gap", f"{data_set}, width {this.width}", gap.to_numpy(), runs, seeds=gap.index.tolist())
        )
        label = f"{data_set}, depths {', '.join(map(str, this.depths))}"
        found.append(Quantity("every-run", label, [last.log_norm.to_numpy().max()], runs))  # NaN where one diverged
    return _complete(found, ["depth-gap", "every-run"], "no trained network was measured")


# --- shared --------------------------------------------------------------------------------------------------------


def _select(table: pd.DataFrame, **cell: Any) -> pd.DataFrame:
    """Rows whose columns have the given values."""
    keep = np.ones(len(table), dtype=bool)
    for column, value in cell.items():
        keep &= (table[column] == value).to_numpy()
    return table[keep]


def _by_seed(rows: pd.DataFrame, column: str = "log_norm") -> pd.Series:
    """One number per seed. Raises ValueError if a seed has several rows: the cell is then not fully specified."""
    if rows.seed.duplicated().any():
        raise ValueError(f"several rows of one seed for {column}; the selection leaves a column open")
    return rows.set_index("seed")[column].sort_index()


def _depth_cell(tables: Tables, cell: Mapping[str, Any]) -> pd.DataFrame:
    """Rows of the depth table; ReLU at its critical variance unless `cell` says otherwise."""
    return _select(tables["depth"], **{"activation": "relu", "sigma_w2": CRITICAL_RELU, **cell})


def _slopes(tables: Tables, **cell: Any) -> pd.Series:
    """Least-squares slope of the log norm on depth 10 to 50 for each seed; empty if depth 50 was not reached.

    -inf for a network whose Jacobian is zero from some depth on: it has vanished, whatever it did before.
    """
    rows = _depth_cell(tables, cell)
    rows = rows[rows.depth.between(FIRST_DEPTH, LAST_DEPTH)]
    if rows.empty or rows.depth.max() < LAST_DEPTH:
        return pd.Series(dtype=float)
    return rows.groupby("seed")[["depth", "log_norm"]].apply(_slope_of_one)


def _slope_of_one(network: pd.DataFrame) -> float:
    depths, logs = network.depth.to_numpy(float), network.log_norm.to_numpy()
    if np.isneginf(logs).any():
        return -math.inf
    depths = depths - depths.mean()
    return float(depths @ logs / (depths @ depths))


def _log_norms(tables: Tables, depth: int, **cell: Any) -> pd.Series:
    return _by_seed(_depth_cell(tables, {**cell, "depth": depth}))


def _scores(tables: Tables, depth: int, **cell: Any) -> pd.Series:
    return _by_seed(_select(tables["scores"], depth=depth, **cell))


def _quantity(
    criterion: str,
    label: str,
    values: pd.Series | pd.DataFrame,
    seeds: Sequence[int],
    statistic: str | Callable[[np.ndarray], float] = "mean",
    reference: float | None = None,
    what: str = "networks",
) -> Quantity:
    runs = _accounting(len(seeds), len(values), 0, what)
    return Quantity(criterion, label, values.to_numpy(), runs, statistic, reference, values.index.tolist())


def _accounting(planned: int, present: int, diverged: int, what: str) -> Accounting:
    return Accounting(
        planned=planned, finished=present - diverged, diverged=diverged, lost=planned - present, what=what
    )


def _complete(found: Measured, criteria: Sequence[str], reason: str) -> Measured:
    """Drop quantities of cells that this scale did not plan, and say why a criterion has none left."""
    kept = [item for item in found if not isinstance(item, Quantity) or len(item.samples)]
    missing = [criterion for criterion in criteria if criterion not in {item.criterion for item in kept}]
    return [*kept, *(NotTested(reason, criterion) for criterion in missing)]


def _at_least(values: Sequence[int], low: int) -> list[int]:
    return [value for value in sorted(values) if value >= low]


def _ledger_sparsities(sparsities: Sequence[float]) -> list[float]:
    """The sparsities that the ledger's margins are for."""
    return [sparsity for sparsity in sparsities if sparsity in (0.5, 0.9)]


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
    validated = StudySettings.validate(json.loads(settings), "studies.stability")
    judge_files(sys.modules[__name__], Path(__file__).parent, validated, scale, tables, data, verdicts, manifest)


if __name__ == "__main__":
    run({"judge": judge})
