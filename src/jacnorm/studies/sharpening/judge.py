"""Judging step of the `sharpening` study: one estimand function per claim of ``claims.yaml``, tables in, numbers out.

Margins live in claims.yaml and nowhere else. Each run gives one number, and the runs of a seed that share a cost and a
smoothing but not the step size give their median, so that samples are seeds. Checkpoints of one run are no samples.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from jacnorm.report.claims import Scale
from jacnorm.report.estimands import Measured, account, by_seed, complete, paired, quantity, select, whole_seeds
from jacnorm.report.judging import judge_files
from jacnorm.report.verdicts import Accounting, Quantity
from jacnorm.step import run
from jacnorm.studies.sharpening.conditions import (
    Asked,
    Condition,
    Tables,
    conditions,
    experiments,
    keys_of,
    with_keys,
)
from jacnorm.studies.sharpening.settings import StudySettings
from jacnorm.studies.sharpening.sweeps import BASE, FEWEST_ARMS, JACOBIAN, SHARPNESS, accuracy_gap, gap_of, sweeps
from jacnorm.studies.sharpening.trends import (
    before_threshold,
    last_half,
    last_third,
    log_correlation,
    rank_correlation,
    reaches_threshold,
)

FEWEST_BELOW = 8
"""Checkpoints below the threshold that a rank correlation takes (C1)."""
FEWEST_LATE = 5
"""Checkpoints in the last half of a run that a rank correlation takes (C5)."""
FEWEST_STRENGTHS = 3
"""Strengths, none included, that a rank correlation with the strength takes (C7, C12)."""
BELOW: Asked = {"reaches the threshold": lambda run: not reaches_threshold(run)}


# --- C1 to C6, C14: full-batch descent -------------------------------------------------------------------------------


def rise_together(tables: Tables, settings: StudySettings) -> Measured:
    """C1: rank correlation of sharpness and Jacobian norm before the threshold is first reached."""
    asked = {
        f"fewer than {FEWEST_BELOW} checkpoints below the threshold": lambda run: (
            len(before_threshold(run)) >= FEWEST_BELOW
        )
    }

    def number(run: pd.DataFrame) -> float:
        return _rise(before_threshold(run))

    found = [
        condition.median(condition.row("below-threshold"), number, asked) for condition in conditions(tables, settings)
    ]
    return _all_rows(found, ["below-threshold", "weak-smoothing", "no-smoothing"])


def sharpness_rises(tables: Tables, settings: StudySettings) -> Measured:
    """C2: sharpness at the end over that before training, runs that stay below the threshold."""

    def number(run: pd.DataFrame) -> float:
        return float(run[SHARPNESS].iloc[-1] / run[SHARPNESS].iloc[0])

    found: Measured = []
    for condition in _strong(conditions(tables, settings)):
        found += condition.median_and_extreme(("median", "every-run"), number, np.min, BELOW)
    return _all_rows(found, ["median", "every-run"])


def edge_of_stability(tables: Tables, settings: StudySettings) -> Measured:
    """C3: sharpness over the threshold in the last third of the runs that reach it."""
    asked = {"stays below the threshold": reaches_threshold}

    def number(run: pd.DataFrame) -> float:
        late = last_third(run)
        return float(np.median(late[SHARPNESS] / late.threshold))

    found = [condition.median("tail", number, asked) for condition in conditions(tables, settings)]
    reached = [item for item in found if isinstance(item, Quantity)]
    return complete(reached, ["tail"], "no run reaches 2 over the step size")


def gauss_newton(tables: Tables, settings: StudySettings) -> Measured:
    """C4: largest Gauss-Newton eigenvalue over sharpness, after step 0."""

    def number(run: pd.DataFrame) -> float:
        later = run[run.step > 0]
        return float(np.median(later.gauss_newton / later[SHARPNESS]))

    found: Measured = []
    for condition in conditions(tables, settings):
        found += condition.median_and_extreme(("median", "every-run"), number, np.min, of=(SHARPNESS, "gauss_newton"))
    return _all_rows(found, ["median", "every-run"])


def cost_curvature(tables: Tables, settings: StudySettings) -> Measured:
    """C5: correlations of sharpness, kernel and Jacobian norm with and without label smoothing."""
    late = {
        f"fewer than {FEWEST_LATE} checkpoints in its last half": lambda run: len(last_half(run)) >= FEWEST_LATE,
    }

    def number(run: pd.DataFrame) -> float:
        return _rise(last_half(run))

    def kernel(run: pd.DataFrame) -> float:
        return log_correlation(run.kernel_top, run[JACOBIAN])

    found: Measured = []
    for condition in conditions(tables, settings):
        if condition.cost == "square":
            continue
        row = condition.row("smoothed", plain="parts")
        found.append(condition.median(row, number, {**BELOW, **late} if row != "parts" else late))
        if row == "parts" and condition.settings.kernel_samples and condition.network == "mlp":
            found.append(condition.median("kernel", kernel))
    found = _all_rows(found, ["parts", "smoothed", "weak-smoothing"])
    return complete(found, ["kernel"], "no tangent kernel was measured in a run without label smoothing")


def smoothing_lowers_jacobian(tables: Tables, settings: StudySettings) -> Measured:
    """C6: smallest fall of the log Jacobian norm from one label smoothing to the next."""
    found: Measured = []
    for experiment in experiments(tables, settings):
        this = experiment.settings
        smoothings = sorted(this.smoothings)
        cells = product(this.data_sets, this.networks, this.entropy_learning_rates)
        for data_set, network, rate in cells if len(smoothings) > 1 else ():
            cell = {"data_set": data_set, "network": network, "cost": "cross-entropy", "learning_rate": rate}
            rows, fits = select(experiment.trajectory, **cell), select(experiment.fits, **cell)
            diverged = keys_of(fits[fits.diverged_at >= 0], ["seed", "smoothing"])
            present = rows[rows.smoothing.isin(smoothings)]
            rows = with_keys(present, ["seed", "smoothing"], diverged, out=True)
            whole = _whole_seeds(rows, smoothings)
            ends, late = _falls(rows[rows.seed.isin(whole)], smoothings)
            there = keys_of(present, ["seed", "smoothing"])
            excluded = {"another run of the seed is lost": {key for key in there if key[0] not in whole}}
            planned = product(this.seeds, smoothings)
            runs = account(planned, there, diverged=diverged, excluded=excluded, what="runs")
            label = f"{data_set}, {network}, step size {rate:g}, smoothing {', '.join(f'{s:g}' for s in smoothings)}"
            found += [
                quantity("median", label, ends, runs, "median"),
                Quantity("every-seed", label, [float(np.min(ends.to_numpy()))] if len(ends) else [], runs),
                quantity("second-half", label, late, runs, "median"),
            ]
    criteria = ["median", "every-seed", "second-half"]
    return complete(found, criteria, "no two label smoothings were trained at one step size")


def _falls(rows: pd.DataFrame, smoothings: Sequence[float]) -> tuple[pd.Series, pd.Series]:
    """Smallest fall between neighbouring smoothings by seed: at the last common step, and over its last half."""
    ends, late = {}, {}
    for seed, one in rows.groupby("seed"):
        logs = np.log(one.pivot(index="step", columns="smoothing", values=JACOBIAN)[list(smoothings)])
        # A step that one run lacks, as it ended before, cannot be compared; a NaN that was measured stays.
        counts = one.groupby("step").smoothing.nunique()
        common = logs.loc[counts.index[counts == len(smoothings)]].sort_index()
        falls = pd.Series(np.min(-np.diff(common.to_numpy(), axis=1), axis=1), index=common.index)
        ends[seed] = float(falls.iloc[-1])
        late[seed] = float(np.min(falls[falls.index >= common.index[-1] / 2].to_numpy()))
    return pd.Series(ends, dtype=float), pd.Series(late, dtype=float)


def lower_bound(tables: Tables, settings: StudySettings) -> Measured:
    """C14: the lower bound against the largest slope, the Jacobian norm and the training loss."""
    found: Measured = []
    for condition in conditions(tables, settings):
        square = condition.cost == "square"
        found.append(
            condition.extreme(
                "slope" if square else "slope-probabilities",
                lambda run: float(np.max((run.lower_bound - run.slope).to_numpy())),
                np.max,
            )
        )
        if square:
            found += [
                condition.extreme(
                    "jacobian", lambda run: float(np.max((run.lower_bound / run[JACOBIAN]).to_numpy())), np.max
                ),
                condition.median("falls", lambda run: rank_correlation(run.train_loss, run.lower_bound)),
            ]
    return _all_rows(found, ["slope", "jacobian", "falls", "slope-probabilities"])


def _rise(rows: pd.DataFrame) -> float:
    return rank_correlation(rows[SHARPNESS], rows[JACOBIAN])


def _strong(conditions: Iterable[Condition]) -> Iterator[Condition]:
    return (condition for condition in conditions if condition.strong)


def _all_rows(found: Measured, criteria: Sequence[str]) -> Measured:
    return complete(found, criteria, "no such run was planned")


# --- C7 to C12: regularisers -----------------------------------------------------------------------------------------


def weight_decay(tables: Tables, settings: StudySettings) -> Measured:
    """C7: rank correlation of weight decay with Jacobian norm and with sharpness, step size by step size."""
    found: Measured = []
    for sweep in sweeps(tables, settings):
        for rate in sweep.settings.learning_rates:
            decays = sweep.planned("weight decay", learning_rate=rate)
            for suffix, rule in RULES.items() if len(decays) >= FEWEST_STRENGTHS else ():
                for name, column in (("jacobian", JACOBIAN), ("sharpness", SHARPNESS)):
                    found.append(
                        sweep.correlation(
                            name + suffix, rule, decays, lambda ends: ends.strength, column, FEWEST_STRENGTHS
                        )
                    )
    criteria = [name + suffix for suffix in RULES for name in ("jacobian", "sharpness")]
    return complete(found, criteria, f"fewer than {FEWEST_STRENGTHS} weight decays, none included, came to their end")


def predicts_gap(tables: Tables, settings: StudySettings) -> Measured:
    """C8: rank correlations of gap with Jacobian norm and sharpness over regularisers."""
    found: Measured = []
    for sweep in sweeps(tables, settings):
        for rate in sweep.settings.learning_rates:
            every = sweep.planned(learning_rate=rate)
            without = [arm for arm in every if arm.regulariser != "jacobian penalty"]
            for suffix, rule, these in (
                ("", "updates", every),
                ("-without-penalty", "updates", without),
                ("-matched", "matched", every),
            ):
                found += [
                    sweep.correlation(f"jacobian{suffix}", rule, these, gap_of, JACOBIAN, FEWEST_ARMS),
                    sweep.advantage(f"advantage{suffix}", rule, these),
                ]
            found.append(sweep.correlation("jacobian-accuracy", "updates", every, accuracy_gap, JACOBIAN, FEWEST_ARMS))
    criteria = [f"{name}{suffix}" for name in ("jacobian", "advantage") for suffix in ("", "-without-penalty")]
    criteria += ["jacobian-accuracy", "jacobian-matched", "advantage-matched"]
    return complete(found, criteria, f"no seed has {FEWEST_ARMS} regularisers and strengths at their end")


def only_sam(tables: Tables, settings: StudySettings) -> Measured:
    """C9: sharpness of each regulariser at its middle strength over that without."""
    rows = {
        "sam": ["sam"],
        "others": ["weight decay", "label smoothing", "mixup"],
        "further": ["shifts", "crops", "jacobian penalty"],
    }
    found: Measured = []
    for sweep in sweeps(tables, settings):
        for rate, (criterion, regularisers) in product(sweep.settings.learning_rates, rows.items()):
            for regulariser in regularisers:
                arm = sweep.middle(regulariser, rate)
                if arm is None:
                    continue
                base = sweep.base(rate)
                found.append(sweep.ratio(criterion, "updates", arm, base, SHARPNESS))
                if criterion != "further":
                    found.append(sweep.ratio(f"{criterion}-matched", "matched", arm, base, SHARPNESS))
    criteria = ["sam", "others", "sam-matched", "others-matched", "further"]
    return complete(found, criteria, "no such regulariser was tried, or none came to its end")


def effective_regularisers(tables: Tables, settings: StudySettings) -> Measured:
    """C10: share of the effective regularisers with a smaller Jacobian norm; SAM and the penalty also by themselves."""
    found: Measured = []
    for sweep in sweeps(tables, settings):
        for rate in sweep.settings.learning_rates:
            base = sweep.base(rate)
            every = [arm for arm in sweep.planned(learning_rate=rate) if arm.regulariser not in (BASE, "sam")]
            without = [arm for arm in every if arm.regulariser != "jacobian penalty"]
            found += [
                sweep.effective_share("share", "updates", every, base),
                sweep.effective_share("share-without-penalty", "updates", without, base),
                sweep.effective_share("share-matched", "matched", every, base),
            ]
            for arm in sweep.planned("sam", learning_rate=rate)[1:]:
                found += [
                    sweep.ratio("sam", "updates", arm, base, JACOBIAN),
                    sweep.difference("sam-gap", arm, base),
                ]
            for arm in sweep.planned("jacobian penalty", learning_rate=rate)[1:]:
                found.append(sweep.difference("intervention", arm, base))
    shares = ["share", "share-without-penalty", "share-matched"]
    found = complete(found, shares, "no regulariser narrows the gap by more than its standard deviation over seeds")
    return complete(found, ["sam", "sam-gap", "intervention"], "it was not tried, or did not come to its end")


def step_size(tables: Tables, settings: StudySettings) -> Measured:
    """C11: largest over smallest step size, and smallest over largest batch, without regulariser."""
    found: Measured = []
    for sweep in sweeps(tables, settings):
        plain = [arm for arm in sweep.arms if arm.regulariser == BASE]
        rates = sorted((a for a in plain if a.batch == sweep.settings.batch), key=lambda a: a.learning_rate)
        for name, column in (("sharpness", SHARPNESS), ("jacobian", JACOBIAN)) if len(rates) > 1 else ():
            found += [
                sweep.ratio(name, "matched", rates[-1], rates[0], column),
                sweep.ratio(f"{name}-updates", "updates", rates[-1], rates[0], column),
            ]
        for rate in sweep.settings.learning_rates:
            batches = sorted((arm for arm in plain if arm.learning_rate == rate), key=lambda arm: arm.batch)
            for name, column in (("sharpness", SHARPNESS), ("jacobian", JACOBIAN)) if len(batches) > 1 else ():
                found.append(sweep.ratio(f"{name}-batch", "matched", batches[0], batches[-1], column))
    criteria = [f"{name}{suffix}" for name in ("sharpness", "jacobian") for suffix in ("", "-updates", "-batch")]
    return complete(found, criteria, "fewer than two step sizes, or batch sizes, came to this end in one seed")


def batch_exception(tables: Tables, settings: StudySettings) -> Measured:
    """C12: rank correlation of gap and Jacobian norm over batch sizes at the highest step size that has several."""
    found: Measured = []
    for sweep in sweeps(tables, settings):
        rate = max(sweep.settings.learning_rates)
        batches = [arm for arm in sweep.arms if arm.regulariser == BASE and arm.learning_rate == rate]
        for criterion, rule in (("sign", "epochs"), ("recorded", "epochs"), ("recorded", "updates")):
            if len(batches) >= FEWEST_STRENGTHS:
                found.append(sweep.correlation(criterion, rule, batches, gap_of, JACOBIAN, FEWEST_STRENGTHS))
    return complete(found, ["sign", "recorded"], f"fewer than {FEWEST_STRENGTHS} batch sizes came to their end")


RULES = {"": "updates", "-matched": "matched"}
"""Suffix of a criterion, and its stopping rule."""
# --- C13, C15: sample size, identities -------------------------------------------------------------------------------


def approximates_lipschitz(tables: Tables, settings: StudySettings) -> Measured:
    """C13: Jacobian norm over test samples against that over training samples, by sample size."""
    this = settings.scaling
    found: Measured = []
    for part, data_set, sizes, prefix in (
        ("sizes", this.data_set, sorted(this.sizes), ""),
        ("cube", "cube", sorted(this.cube_sizes), "cube-"),
    ):
        present = select(tables["sizes"], data_set=data_set)
        fits = select(tables["scaling_fits"], part=part)
        diverged = keys_of(fits[fits.diverged_at >= 0], ["seed", "samples"])
        rows = with_keys(present, ["seed", "samples"], diverged, out=True)
        rows = rows.assign(ratio=rows.test_jacobian_max / rows.jacobian_max)

        def runs(these: Sequence[int], kept: pd.DataFrame, present=present, diverged=diverged) -> Accounting:
            there = keys_of(present, ["seed", "samples"])
            excluded = {"another run of the seed is lost": there - keys_of(kept, ["seed", "samples"])}
            planned = product(this.seeds, these)
            return account(planned, there, diverged=diverged, excluded=excluded, what="runs")

        largest = select(rows, samples=sizes[-1])
        label = f"{data_set}, {sizes[-1]} samples"
        ratio = by_seed(largest, "ratio")
        found.append(quantity(f"{prefix}ratio", label, ratio, runs(sizes[-1:], largest), "median"))
        if len(sizes) > 1:
            ends = whole_seeds(rows, "samples", [sizes[0], sizes[-1]])
            change = paired(*(by_seed(select(ends, samples=size), "ratio") for size in (sizes[-1], sizes[0])))
            label = f"{data_set}, {sizes[-1]} against {sizes[0]} samples"
            found.append(quantity(f"{prefix}closer", label, change, runs([sizes[0], sizes[-1]], ends), "median"))
        bound = (rows.test_jacobian_max / (rows.jacobian_max + rows.variation)).to_numpy()
        found.append(Quantity("bound", data_set, [float(np.max(bound))] if len(bound) else [], runs(sizes, rows)))
    return complete(
        found, ["ratio", "closer", "cube-ratio", "cube-closer", "bound"], "no two sample sizes came to an end"
    )


def first_layer_absent(tables: Tables, settings: StudySettings) -> Measured:
    """C15: the identities about the first layer, as largest errors over networks."""
    rows = tables["identities"]
    this = settings.scaling
    key = ["seed", "width", "parametrisation"]
    planned = product(this.seeds, this.widths, this.parametrisations)
    runs = account(planned, keys_of(rows, key), what="networks")
    errors = {
        "kernel": ["kernel_error"],
        "unchanged": ["logits_error", "later_layers_error"],
        "multiplied": ["jacobian_error"],
    }
    found: Measured = []
    for criterion, columns in errors.items():
        for column in columns:
            for parametrisation, some in rows.groupby("parametrisation"):
                label = f"{parametrisation} parametrisation, {column.removesuffix('_error').replace('_', ' ')}"
                found.append(Quantity(criterion, label, [float(np.max(some[column].to_numpy()))], runs))
    return complete(found, list(errors), "no network was checked")


# --- shared ----------------------------------------------------------------------------------------------------------


def _whole_seeds(rows: pd.DataFrame, smoothings: Sequence[float]) -> set[Hashable]:
    """Seeds that have a run of each smoothing."""
    counts = rows.groupby("seed").smoothing.nunique()
    return set(counts.index[counts == len(smoothings)])


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
    validated = StudySettings.validate(json.loads(settings), "studies.sharpening")
    judge_files(sys.modules[__name__], Path(__file__).parent, validated, scale, tables, data, verdicts, manifest)


if __name__ == "__main__":
    run({"judge": judge})
