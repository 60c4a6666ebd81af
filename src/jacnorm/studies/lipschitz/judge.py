"""Judging step of the `lipschitz` study: one estimand function per claim of ``claims.yaml``, tables in, numbers out.

Margins live in claims.yaml and nowhere else. A slope on depth is that of the networks of one seed, so the interval is
over seeds; depths of one seed are not independent. Effects of the regulariser are differences of the two runs of a
seed, which share initialisation, data and data order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
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
    r_squared,
    select,
    slope,
    whole_seeds,
)
from jacnorm.report.judging import judge_files
from jacnorm.report.verdicts import Accounting, NotTested, Quantity
from jacnorm.step import run
from jacnorm.studies.lipschitz import arms
from jacnorm.studies.lipschitz.settings import RegulariserSettings, StudySettings

Tables = Mapping[str, pd.DataFrame]
Key = tuple[Hashable, ...]

FIRST_DEPTH = 4
"""Slopes start here: shallower networks are mostly read-out."""
FEWEST_DEPTHS = 4
"""Fewer points cannot tell a line in depth from one in log depth."""
NETWORK = ["seed", "activation", "width", "depth"]


# --- L1, L3, L4, L5: fully connected networks ------------------------------------------------------------------------


def fully_connected(tables: Tables, settings: StudySettings) -> Measured:
    """L1: growth of the log-ratio of the leading terms, and the full theorem beside the spectral bound."""
    this = settings.depth
    found: Measured = []
    depths = [depth for depth in sorted(this.depths) if depth >= FIRST_DEPTH]
    for activation, width in product(this.activations, this.widths) if len(depths) > 1 else ():
        rows, runs, label = _trained(tables, settings, activation, width, depths)
        for kind in ("weighted", "unweighted"):
            slopes = _per_seed(rows, slope, "depth", rows[f"log_spectral_{kind}"] - rows[f"log_ours_{kind}"])
            found.append(quantity(kind, label, slopes, runs))
    for activation, width in product(this.activations, this.widths):
        for depth in sorted({min(this.depths), max(this.depths)}):
            found += _full_theorem(tables, settings, activation, width, depth)
    found = complete(found, ["weighted", "unweighted"], f"fewer than two depths of {FIRST_DEPTH} or more were trained")
    return complete(found, ["theorem", "leading-share"], "no such network has a finite bound")


def _full_theorem(tables: Tables, settings: StudySettings, activation: str, width: int, depth: int) -> Measured:
    rows = select(tables["theorem"], activation=activation, width=width, depth=depth)
    infinite = np.isinf(rows.log_bound) | np.isinf(rows.log_spectral)
    keys = {
        "the bound is infinite, as a margin or a smallest pre-activation is 0 or less": _keys(rows[infinite], NETWORK)
    }
    planned = product(settings.depth.seeds, [activation], [width], [depth])
    runs = _network_runs(tables, planned, rows, keys)
    rows = rows[~infinite]
    label = f"{activation}, width {width}, depth {depth}"
    share = rows.assign(share=np.exp(rows.log_h1 - rows.log_bound))
    return [
        quantity("theorem", label, paired(by_seed(rows, "log_bound"), by_seed(rows, "log_spectral")), runs),
        quantity("leading-share", label, by_seed(share, "share"), runs),
    ]


def never_larger(tables: Tables, settings: StudySettings) -> Measured | NotTested:
    """L3: the largest log-ratio over all networks to which the inequality applies."""
    this = settings.depth
    found: Measured = []
    leading = tables["leading"]
    reasons = sorted(set(leading.not_applicable) - {""})
    if len(leading) and (leading.not_applicable != "").all():
        return NotTested(f"Not applicable to any network. {' '.join(reasons)}")
    for stage in ("initial", "trained"):
        rows = select(leading, stage=stage)
        excluded = {
            f"not applicable: {reason.removesuffix('.')}": _keys(select(rows, not_applicable=reason), NETWORK)
            for reason in reasons
        }
        planned = product(this.seeds, this.activations, this.widths, this.depths)
        runs = _network_runs(tables, planned, rows, excluded)
        rows = select(rows, not_applicable="")
        found.append(_extreme("largest", stage, np.max, rows.log_ours_weighted - rows.log_spectral_weighted, runs))
    return complete(found, ["largest"], "no network was measured")


def far_below_product(tables: Tables, settings: StudySettings) -> Measured:
    """L4: product of layer norms against the largest product that the data see."""
    this = settings.depth
    found: Measured = []
    shallow, deep = min(this.depths), max(this.depths)
    for activation, width in product(this.activations, this.widths):
        rows, runs, label = _trained(tables, settings, activation, width, [deep])
        found.append(quantity("deepest", label, _product_gap(rows), runs))
        if deep > shallow:
            rows, runs, label = _trained(tables, settings, activation, width, [shallow, deep])
            ends = [_product_gap(select(rows, depth=depth)) for depth in (deep, shallow)]
            found.append(quantity("widens", label, paired(*ends), runs))
    return complete(found, ["deepest", "widens"], "only one depth was trained")


def _product_gap(rows: pd.DataFrame) -> pd.Series:
    return paired(by_seed(rows, "log_spectral_unweighted"), by_seed(rows, "log_largest_term"))


def polynomial_growth(tables: Tables, settings: StudySettings) -> Measured:
    """L5: which of depth and log depth gives the better line, by seed."""
    this = settings.depth
    found: Measured = []
    depths = sorted(this.depths)
    for activation, width in product(this.activations, this.widths) if len(depths) >= FEWEST_DEPTHS else ():
        rows, runs, label = _trained(tables, settings, activation, width, depths)
        for criterion, term, sign in (("ours", "log_ours_weighted", 1.0), ("spectral", "log_spectral_weighted", -1.0)):
            gains = sign * _per_seed(rows, _log_depth_advantage, "depth", rows[term])
            found.append(quantity(criterion, label, gains, runs))
    return complete(found, ["ours", "spectral"], f"fewer than {FEWEST_DEPTHS} depths were trained")


def _log_depth_advantage(depths: np.ndarray, logs: np.ndarray) -> float:
    return r_squared(np.log(depths), logs) - r_squared(depths, logs)


# --- L2, L6: WideResNets ---------------------------------------------------------------------------------------------


def wide_resnets(tables: Tables, settings: StudySettings) -> Measured:
    """L2: growth of the log-ratio of the leading terms over six layers."""
    this = settings.residual
    found: Measured = []
    depths = sorted(this.depths)
    present = select(tables["residual"], stage="trained")
    rows = whole_seeds(present, "depth", depths)
    fits = select(tables["residual_fits"], part="sweep")
    runs = _seed_runs(product(this.seeds, depths), present, rows, fits, ["seed", "depth"], "networks")
    wrong = int((fits.train_error > 0).sum())
    label = f"{this.data_set}, depths {', '.join(map(str, depths))}"
    label += f"; {wrong} of {len(fits)} networks with training errors" if wrong else ""
    for kind in ("unweighted", "weighted") if len(depths) > 1 else ():
        slopes = _per_seed(rows, slope, "depth", rows[f"log_spectral_{kind}"] - rows[f"log_ours_{kind}"])
        found.append(quantity(kind, label, 6 * slopes, runs))
    return complete(found, ["unweighted", "weighted"], "fewer than two depths were trained")


def tail(tables: Tables, settings: StudySettings) -> Measured:
    """L6: the largest log values of Figure 1, without and with batch norm, by seed."""
    this = settings.residual
    arms_of = ("none", "batch")
    blocks = select(tables["blocks"], depth=this.compared_depth)
    fits = select(tables["residual_fits"], part="figure1")
    key = ["seed", "normalisation"]
    runs = _seed_runs(product(this.seeds, arms_of), blocks, blocks, fits, key, "networks")
    # numpy's statistics let a NaN through, where those of pandas would pass over it.
    values = {name: select(blocks, normalisation=name).groupby("seed").log_value for name in arms_of}
    differences = {
        "largest": paired(*(values[name].agg(lambda v: np.max(v.to_numpy())) for name in arms_of)),
        "median": paired(*(values[name].agg(lambda v: np.median(v.to_numpy())) for name in arms_of)),
    }
    label = f"{this.data_set}, depth {this.compared_depth}, {_left_out(blocks)}"
    found: Measured = [quantity(name, label, samples, runs) for name, samples in differences.items()]
    found += [_extreme("every-seed", f"{name}, {label}", np.min, each, runs) for name, each in differences.items()]
    found.append(quantity("size", label, differences["largest"], runs))
    return complete(found, ["largest", "median", "every-seed", "size"], "no pair of networks was measured")


def _left_out(blocks: pd.DataFrame) -> str:
    """How many training samples have no positive margin, which the values need."""
    counts = blocks.groupby(["normalisation", "seed"]).misclassified.max().groupby("normalisation").max()
    most = {name: int(counts.get(name, 0)) for name in ("batch", "none")}
    if not any(most.values()):
        return "no training sample misclassified"
    return f"left out as misclassified: at most {most['batch']} with batch norm, {most['none']} without"


# --- L7 to L13: the regulariser --------------------------------------------------------------------------------------


def low_learning_rate_gain(tables: Tables, settings: StudySettings) -> Measured:
    """L7: points of test error that the regulariser takes away at the small learning rate."""
    return _gains(tables, settings, "low-learning-rate")


def no_augmentation_gain(tables: Tables, settings: StudySettings) -> Measured:
    """L8: the same without augmentation."""
    return _gains(tables, settings, "no-augmentation")


def layer_norm_gain(tables: Tables, settings: StudySettings) -> Measured:
    """L9: the same with layer norm."""
    return _gains(tables, settings, "layer-norm")


def largest_gain(tables: Tables, settings: StudySettings) -> Measured:
    """L10: the gain without augmentation against each other gain; it has to exceed all of them."""
    found: Measured = []
    for experiment in _experiments(tables, settings):
        part: Measured = []
        gains = experiment.gains
        for other, gain in gains.items():
            if "no-augmentation" in gains and other != "no-augmentation":
                both = experiment.runs(*product(("no-augmentation", other), (False, True)))
                label = f"{experiment.label('no-augmentation')}, against {other}"
                part.append(quantity(experiment.name, label, paired(gains["no-augmentation"], gain), both))
        lacking = "no-augmentation" if "no-augmentation" not in gains else "another setting"
        found += complete(part, [experiment.name], experiment.lacks(lacking))
    return found


def baseline_is_best(tables: Tables, settings: StudySettings) -> Measured:
    """L11: test error of each other cell minus that of the baseline."""
    found: Measured = []
    baseline = (arms.BASELINE, False)
    for experiment in _experiments(tables, settings):
        part: Measured = []
        for setting, regularised in experiment.cells:
            if setting == arms.BASELINE or baseline not in experiment.cells:
                continue
            low = (setting, regularised) == ("low-learning-rate", False)
            excess = paired(
                arms.error(experiment.errors, setting, regularised=regularised),
                arms.error(experiment.errors, arms.BASELINE, regularised=False),
            )
            runs = experiment.runs(baseline, (setting, regularised))
            label = f"{experiment.label(setting if regularised else None)}, {_words(setting, regularised)}"
            part.append(quantity(f"{experiment.name}-{'low-rate' if low else 'others'}", label, excess, runs))
        criteria = [f"{experiment.name}-low-rate", f"{experiment.name}-others"]
        found += complete(part, criteria, experiment.lacks("baseline or another cell"))
    return found


def no_normalisation(tables: Tables, settings: StudySettings) -> Measured:
    """L12: test error without normalisation minus that with layer norm, both without the regulariser."""
    found: Measured = []
    cells = (("no-normalisation", False), ("layer-norm", False))
    for experiment in _experiments(tables, settings):
        part: Measured = []
        if set(cells) <= set(experiment.cells):
            errors = (arms.error(experiment.errors, setting, regularised=False) for setting, _ in cells)
            part.append(quantity(experiment.name, experiment.label(None), paired(*errors), experiment.runs(*cells)))
        found += complete(part, [experiment.name], experiment.lacks("no-normalisation and layer-norm"))
    return found


def mechanism(tables: Tables, settings: StudySettings) -> Measured:
    """L13: squared norms of the margin's gradient and share above the threshold, without and with the regulariser."""
    found: Measured = []
    for experiment in _experiments(tables, settings):
        part: Measured = []
        name, errors = experiment.name, experiment.errors
        for setting in experiment.gains if experiment.norms is not None else ():
            norms = experiment.norms
            both = experiment.runs((setting, False), (setting, True), rows=norms)
            plain = experiment.runs((setting, False), rows=norms)
            label = f"{experiment.label(setting)}, {setting}"
            ratio = arms.norm_ratio(norms, errors, setting)
            part.append(quantity(f"{name}-norm", label, ratio, both, "geometric mean"))
            shares = [
                arms.layer_mean(norms, errors, setting, "penalised_share", regularised=regularised)
                for regularised in (False, True)
            ]
            part.append(quantity(f"{name}-share", label, paired(*shares), both))
            released = arms.layer_mean(norms, errors, setting, "released_share", regularised=False)
            part.append(quantity(f"{name}-released", f"{experiment.label(None)}, {setting}", released, plain))
        criteria = [f"{name}-{each}" for each in ("norm", "share", "released")]
        found += complete(part, criteria, experiment.lacks("a setting with the regulariser"))
    return found


# --- L14, L15: the augmented loss ------------------------------------------------------------------------------------


def augmented_loss(tables: Tables, settings: StudySettings) -> Measured:
    """L14: distance of the augmented loss from the loss, at its extremes."""
    this = settings.depth
    found: Measured = []
    for split, rows in tables["augmented"].groupby("split"):
        runs = _network_runs(tables, product(this.seeds, this.activations, this.widths, this.depths), rows)
        found.append(_extreme("dominates", str(split), np.min, rows.smallest_gap, runs))
        if split == "train":
            distance = pd.concat([rows.smallest_gap.abs(), rows.largest_gap.abs()])
            found.append(_extreme("coincides", str(split), np.max, distance, runs))
        if split == "noise":
            found.append(_extreme("differs", str(split), np.max, rows.largest_gap, runs))
    return complete(found, ["dominates", "coincides", "differs"], "no augmented loss was measured")


def slopes(tables: Tables, settings: StudySettings) -> Measured:
    """L15: largest slopes of soft indicator and ramp loss."""
    this, rows = settings.depth, tables["augmented"]
    runs = _network_runs(tables, product(this.seeds, this.activations, this.widths, this.depths), rows)
    per_network = rows.groupby(NETWORK)[["indicator_slope", "ramp_slope"]].agg(lambda v: np.max(v.to_numpy()))
    found = [
        _extreme("indicator", "soft indicator", np.max, per_network.indicator_slope, runs),
        _extreme("ramp", "ramp loss", np.max, per_network.ramp_slope, runs),
        _extreme("attained", "soft indicator", np.min, per_network.indicator_slope, runs),
        _extreme("attained", "ramp loss", np.min, per_network.ramp_slope, runs),
    ]
    return complete(found, ["indicator", "ramp", "attained"], "no slope was measured")


# --- shared: networks ------------------------------------------------------------------------------------------------


def _trained(
    tables: Tables, settings: StudySettings, activation: str, width: int, depths: list[int]
) -> tuple[pd.DataFrame, Accounting, str]:
    """Trained networks of one cell at all of `depths`, where the planned ones went, and the label.

    Networks that stopped short of the target margin are kept: the log-ratios do not contain the margin.
    """
    cell = {"activation": activation, "width": width}
    present = select(tables["leading"], stage="trained", **cell)
    fits = select(tables["fits"], **cell)
    fits = fits[fits.depth.isin(depths)]
    rows = whole_seeds(present, "depth", depths)
    runs = _seed_runs(product(settings.depth.seeds, depths), present, rows, fits, ["seed", "depth"], "networks")
    short = int((~fits.reached.astype(bool)).sum())
    label = f"{activation}, width {width}, depth{'s' * (len(depths) > 1)} {', '.join(map(str, depths))}"
    return rows, runs, label + (f"; {short} of {len(fits)} short of the target margin" if short else "")


def _per_seed(
    rows: pd.DataFrame, function: Callable[[np.ndarray, np.ndarray], float], x: str, y: pd.Series
) -> pd.Series:
    """function(x, y) of each seed's rows; y is aligned with the rows."""
    if rows.empty:
        return pd.Series(dtype=float)
    by = rows.assign(_y=y).sort_values(x).groupby("seed")
    return pd.Series({seed: function(one[x].to_numpy(float), one["_y"].to_numpy()) for seed, one in by})


def _extreme(criterion: str, label: str, function: Callable, values: pd.Series, runs: Accounting) -> Quantity:
    """One exact number: the extreme of all values, NaN if one of them is."""
    return Quantity(criterion, label, [float(function(values.to_numpy()))] if len(values) else [], runs)


def _keys(rows: pd.DataFrame, columns: list[str]) -> set[Key]:
    return set(rows[columns].itertuples(index=False, name=None))


def _network_runs(
    tables: Tables, planned: Iterator[Key], rows: pd.DataFrame, excluded: Mapping[str, set[Key]] | None = None
) -> Accounting:
    fits = tables["fits"]
    diverged = _keys(fits[fits.diverged_at >= 0], NETWORK)
    return account(planned, _keys(rows, NETWORK), diverged=diverged, excluded=excluded, what="networks")


def _seed_runs(
    planned: Iterator[Key], present: pd.DataFrame, used: pd.DataFrame, fits: pd.DataFrame, key: list[str], what: str
) -> Accounting:
    """Accounting where a seed with a lost run is left out as a whole."""
    there = _keys(present, key)
    excluded = {"another run of the seed is lost": there - _keys(used, key)}
    return account(planned, there, diverged=_keys(fits[fits.diverged_at >= 0], key), excluded=excluded, what=what)


# --- shared: the regulariser -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Experiment:
    """One of the two experiments with the regulariser: its tables, if this scale made them, and its settings."""

    name: str
    words: str
    errors: pd.DataFrame | None
    norms: pd.DataFrame | None
    settings: RegulariserSettings

    @property
    def cells(self) -> list[tuple[str, bool]]:
        """Cells that were trained: (setting, regularised)."""
        return [] if self.errors is None else arms.trained(self.errors)

    @property
    def gains(self) -> dict[str, pd.Series]:
        """Gain by seed of every degraded setting that was trained without and with the regulariser."""
        both = [s for s in arms.DEGRADATIONS if {(s, False), (s, True)} <= set(self.cells)]
        return {setting: arms.gain(self.errors, setting) for setting in both}

    def label(self, setting: str | None) -> str:
        """Data and size; with `setting`, also the coefficient that stands for it and how it was chosen."""
        size = "all" if self.settings.train_samples is None else self.settings.train_samples
        label = f"{self.settings.data_set}, {size} training samples"
        if setting is None:
            return label
        chosen = f"coefficient {arms.chosen_coefficient(self.errors, setting):g}"
        return f"{label}, {chosen}{' by validation error' * (len(self.settings.coefficients) > 1)}"

    def runs(self, *cells: tuple[str, bool], rows: pd.DataFrame | None = None) -> Accounting:
        """Trainings of `cells`, present where `rows` (by default the errors) has them."""
        present, diverged = set(), set()
        for setting, regularised in cells:
            at = [setting], [regularised]
            errors = arms.arm(self.errors, self.errors, setting, regularised=regularised)
            there = errors if rows is None else arms.arm(rows, self.errors, setting, regularised=regularised)
            present |= set(product(there.seed, *at))
            diverged |= set(product(errors[errors.diverged_at >= 0].seed, *at))
        planned = {(seed, *cell) for seed in self.settings.seeds for cell in cells}
        return account(planned, present, diverged=diverged, what="trainings")

    def lacks(self, setting: str) -> str:
        """Why there is no number."""
        if self.errors is None or self.errors.empty:
            return f"no {self.words} were trained with the regulariser at this scale"
        augmented = self.settings.shift or self.settings.flip
        if setting == "no-augmentation" and not augmented:
            return f"{self.words} are trained without augmentation at this scale, so none can be taken away"
        return f"{self.words} were not trained in the cells that this compares ({setting})"


def _experiments(tables: Tables, settings: StudySettings) -> Iterator[_Experiment]:
    """MLPs from the many paired seeds, WideResNets from the table; rows of the other network are passed by."""
    for name, words, prefix, this in (
        ("mlp", "MLPs", "paired", settings.paired),
        ("wrn", "WideResNets", "table", settings.table),
    ):
        errors, norms = tables.get(f"{prefix}_errors"), tables.get(f"{prefix}_norms")
        if errors is not None:
            errors = select(errors, network=name)
        yield _Experiment(name, words, errors, norms, this)


def _gains(tables: Tables, settings: StudySettings, setting: str) -> Measured:
    """Gain in one setting, after the last epoch and at the best one."""
    found: Measured = []
    for experiment in _experiments(tables, settings):
        part: Measured = []
        columns = {experiment.name: "test_error", f"{experiment.name}-best": "best_test_error"}
        for criterion, column in columns.items() if setting in experiment.gains else ():
            runs = experiment.runs((setting, False), (setting, True))
            gain = arms.gain(experiment.errors, setting, column)
            part.append(quantity(criterion, experiment.label(setting), gain, runs))
        found += complete(part, list(columns), experiment.lacks(setting))
    return found


def _words(setting: str, regularised: bool) -> str:
    return f"{setting} {'with' if regularised else 'without'} regulariser"


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
    validated = StudySettings.validate(json.loads(settings), "studies.lipschitz")
    judge_files(sys.modules[__name__], Path(__file__).parent, validated, scale, tables, data, verdicts, manifest)


if __name__ == "__main__":
    run({"judge": judge})
