"""Judging step of the `worldmodel` study: one estimand function per claim of ``claims.yaml``, tables in, numbers out.

Margins live in claims.yaml and nowhere else. Agents of a seed share data, start, batches and noise, so arms are
compared within a seed; the small RSSM and DreamerV3 pass through the same functions. Criteria about DreamerV3 are
called dreamer-..., all others of W4 to W14 are about the pendulum.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from jacnorm.report.claims import Scale
from jacnorm.report.estimands import Measured, account, complete, paired, quantity, select, slope
from jacnorm.report.judging import judge_files
from jacnorm.report.verdicts import Accounting, Quantity
from jacnorm.step import run
from jacnorm.studies.worldmodel.evidence import (
    NOISES,
    WEIGHT,
    Cell,
    Experiment,
    Tables,
    experiments,
    first_crossing,
)
from jacnorm.studies.worldmodel.settings import StudySettings

SURE = 2.0
"""Standard errors of the simulation by which a number is taken at its worst (W1, W2)."""
EARLY = 5
"""Longest rollout in which the Jacobian is visible; later changes of category dominate (W5)."""
LONG = 5
"""Shortest rollout that counts as a long horizon (W12)."""
FEWEST_STRENGTHS = 2
"""Strengths beside none that a slope takes (W7)."""
HALF = 0.5
"""Share of the largest return whose crossing is timed (W11)."""
WINDOW = 5
"""Rows of a learning curve in a running mean (W11)."""
NEAR_END = 0.1
"""What may be left of the fall of the unpenalised model's loss when it is timed (W11)."""
NOT_PLANNED = f"agents with weight {WEIGHT:g} and without penalty were not both trained"


# --- W1 to W3: expansion of the loss ---------------------------------------------------------------------------------


def zero_drift_term(tables: Tables, settings: StudySettings) -> Measured:
    """W1: the even part of the change of the loss against its formula, its sign and its order."""
    expansion = _Expansion(tables["expansion"], settings)
    rows = expansion.rows
    smallest = (rows.even - SURE * rows.even_error) / rows.epsilon**2
    found = [
        expansion.furthest("formula", "even", growing=False),
        expansion.extreme("positive", smallest, np.min),
        expansion.slope("slope", "even", 2.0),
        expansion.furthest("growing", "even", growing=True),
    ]
    return _expanded(found)


def drift_bias(tables: Tables, settings: StudySettings) -> Measured:
    """W2: the odd part against its formula, its sign with the drift reversed, and its order."""
    expansion = _Expansion(tables["expansion"], settings)
    rows = expansion.rows
    found = [
        expansion.furthest("formula", "odd", growing=False),
        expansion.extreme("reversed", rows.odd_reversed / rows.odd, np.max),
        expansion.slope("slope", "odd", 1.0),
        expansion.furthest("growing", "odd", growing=True),
    ]
    return _expanded(found)


def grows_with_jacobian(tables: Tables, settings: StudySettings) -> Measured:
    """W3: smallest rank correlation of both parts with the factor of A, over matrices and sizes of the error."""
    expansion = _Expansion(tables["expansion"], settings)
    found = [
        expansion.correlation(part, part, family) for part in ("even", "odd") for family in ("identity", "semidefinite")
    ]
    return complete(found, ["even", "odd"], "no matrix was scaled")


def _expanded(found: Measured) -> Measured:
    return complete(found, [item.criterion or "" for item in found], "no such matrix was drawn")


class _Expansion:
    """Rows of the expansion, each matrix and factor with all sizes of the error."""

    def __init__(self, rows: pd.DataFrame, settings: StudySettings) -> None:
        self.rows = rows
        self.settings = settings.expansion

    def extreme(self, criterion: str, values: pd.Series, of: Callable[[np.ndarray], float]) -> Quantity:
        """The smallest or largest of the values; they are indexed like rows."""
        rows = self.rows.loc[values.index]
        systems = rows[["seed", "family", "matrix", "scale"]].drop_duplicates()
        families = ", ".join(dict.fromkeys(systems.family))
        label = f"{len(systems)} systems ({families}), {rows.epsilon.nunique()} sizes of the error"
        samples = [float(of(values.to_numpy(float)))] if len(values) else []
        return Quantity(criterion, label, samples, self._runs(rows))

    def furthest(self, criterion: str, part: str, *, growing: bool) -> Quantity:
        """Largest distance of a part from its formula, with the simulation's error, over the exact part."""
        rows = self.rows[(self.rows.family != "random") == growing]
        exact = rows[f"{part}_exact"]
        distance = (rows[part] - exact).abs() + SURE * rows[f"{part}_error"]
        return self.extreme(criterion, distance / exact.abs(), np.max)

    def slope(self, criterion: str, part: str, expected: float) -> Quantity:
        """Of all systems, the slope of the log of a part on the log of epsilon that is furthest from `expected`."""
        key = ["seed", "family", "matrix", "scale"]
        with np.errstate(divide="ignore"):  # a part of 0 has no slope, and NaN says so
            logs = self.rows.assign(x=np.log(self.rows.epsilon), y=np.log(self.rows[part].abs()))
        slopes = [slope(one.x.to_numpy(), one.y.to_numpy()) for _, one in logs.groupby(key)]
        label = f"{len(slopes)} systems"
        samples = [slopes[int(np.argmax(np.abs(np.array(slopes) - expected)))]] if slopes else []
        return Quantity(criterion, label, samples, self._runs(self.rows))

    def correlation(self, criterion: str, part: str, family: str) -> Quantity:
        """Smallest rank correlation of the size of a part with the factor of A."""
        rows = select(self.rows, family=family)
        groups = rows.groupby(["seed", "matrix", "epsilon"])
        found = [_rank_correlation(one.scale, one[part].abs()) for _, one in groups]
        label = f"{family}, {rows.groupby(['seed', 'matrix']).ngroups} matrices, {rows.scale.nunique()} factors"
        return Quantity(criterion, label, [float(np.min(found))] if found else [], self._runs(rows))

    def _runs(self, rows: pd.DataFrame) -> Accounting:
        return account(self.settings.seeds, rows.seed, what="seeds")


def _rank_correlation(x: pd.Series, y: pd.Series) -> float:
    """Spearman's; NaN if one does not vary or is not defined."""
    if x.isna().any() or y.isna().any() or x.nunique() < 2 or y.nunique() < 2:
        return float("nan")
    return float(np.corrcoef(x.rank(), y.rank())[0, 1])


# --- W4, W5, W12: Jacobians, rollouts, predictions -------------------------------------------------------------------


def penalty_lowers_jacobian(tables: Tables, settings: StudySettings) -> Measured:
    """W4: norms of Jacobians with the penalty over those without."""
    found: Measured = []
    for each in experiments(tables, settings, "fits", "jacobians"):
        norm = each.ratio(each.name("norm"), "jacobians", "f_h", each.pair)
        found += [norm, _largest(norm, each.name("every-seed"))]
        weights = [0.0, *each.positive]
        for lower, higher in pairwise(weights) if 0.0 in each.settings.lambdas and len(weights) > 2 else ():
            cells = each.cell(higher), each.cell(lower)
            found.append(each.ratio(each.name("monotone"), "jacobians", "f_h", cells))
        if each.prefix == "dreamer":
            found.append(each.ratio("dreamer-short", "jacobians", "f_h", each.pair))
            continue
        for column in ("composed", "relative"):
            found.append(each.ratio(column, "jacobians", column, each.pair))
        for weight in each.f_only:
            alone = each.cell(weight, include_prior=False), each.cell(0.0)
            for criterion, column in (("f-only", "f_h"), ("f-only-prior", "p_h"), ("f-only-composed", "composed")):
                found.append(each.ratio(criterion, "jacobians", column, alone))
    found = complete(found, ["norm", "every-seed", "composed", "relative"], NOT_PLANNED)
    found = complete(found, ["f-only", "f-only-prior", "f-only-composed"], "no agent had f alone penalised")
    found = complete(found, ["monotone", "dreamer-monotone"], "fewer than two positive weights were trained")
    return complete(found, ["dreamer-norm", "dreamer-every-seed", "dreamer-short"], _dreamer())


def perturbations_grow_less(tables: Tables, settings: StudySettings) -> Measured:
    """W5: distance of a disturbed rollout from the undisturbed one, with the penalty over without."""
    found: Measured = []
    for each in experiments(tables, settings, "fits", "divergence"):
        for horizon in sorted(each.settings.horizons):
            criterion = "early" if horizon <= EARLY else "late"
            found.append(each.ratio(each.name(criterion), "divergence", "divergence", each.pair, horizon=horizon))
            for weight in each.positive if horizon <= EARLY and each.pair else ():
                if weight != WEIGHT:
                    cells = each.cell(weight), each.cell(0.0)
                    found.append(
                        each.ratio(each.name("other-weights"), "divergence", "divergence", cells, horizon=horizon)
                    )
    found = complete(found, ["early", "late"], f"no rollout of such a length was measured, or {NOT_PLANNED}")
    found = complete(found, ["dreamer-early", "dreamer-late"], _dreamer())
    return complete(found, ["other-weights", "dreamer-other-weights"], "no other weight was trained")


def long_horizon_prediction(tables: Tables, settings: StudySettings) -> Measured:
    """W12: open-loop errors of observation and reward, with the penalty over without, at each long horizon."""
    found: Measured = []
    for each in experiments(tables, settings, "fits", "prediction"):
        for horizon in sorted(each.settings.horizons):
            for name in ("image", "reward") if horizon >= LONG else ():
                found.append(each.ratio(each.name(name), "prediction", f"{name}_error", each.pair, horizon=horizon))
    found = complete(found, ["image", "reward"], f"no horizon of {LONG} steps or more was measured, or {NOT_PLANNED}")
    return complete(found, ["dreamer-image", "dreamer-reward"], _dreamer())


def _largest(ratios: Quantity, criterion: str) -> Quantity:
    """The largest of the samples, exact."""
    values = np.asarray(ratios.samples, dtype=float)
    samples = [float(np.max(values))] if len(values) else []
    return Quantity(criterion, f"{ratios.label}, {len(values)} seeds", samples, ratios.runs)


def _dreamer() -> str:
    return f"DreamerV3 was not run at this scale, or {NOT_PLANNED}"


# --- W6 to W10, W14: returns -----------------------------------------------------------------------------------------


def robust_to_noise(tables: Tables, settings: StudySettings) -> Measured:
    """W6: return and retention under each perturbation of what is seen, with the penalty minus without."""
    found: Measured = []
    for each in experiments(tables, settings, "fits", "returns"):
        found.append(each.difference(each.name("clean"), each.pair, each.returned, "clean"))
        for kind, strength in each.noises:
            found += _noise_quantities(each, kind, strength)
    found = complete(found, ["clean", "return"], NOT_PLANNED)
    found = complete(found, ["dreamer-clean", "dreamer-return"], _dreamer())
    failed = f"no seed has two agents whose clean return is well above the random policy's, or {NOT_PLANNED}"
    return complete(found, ["retention", "dreamer-retention"], failed)


def _noise_quantities(each: Experiment, kind: str, strength: float) -> Iterator[Quantity]:
    words = f"{kind} {strength:g}"
    yield each.difference(each.name("return"), each.pair, lambda cell: each.returned(cell, kind, strength), words)
    if each.pair is not None:
        values = paired(*(each.retention(cell, kind, strength) for cell in each.pair))
        runs = each.runs("returns", each.pair, each.gated(each.pair))
        yield quantity(each.name("retention"), f"{each.label(each.pair)}, {words}", values, runs)


def gap_widens(tables: Tables, settings: StudySettings) -> Measured:
    """W7: slope of the difference in return on the strength of a perturbation, none included."""
    found: Measured = []
    for each in experiments(tables, settings, "fits", "returns"):
        for kind, field in NOISES.items():
            strengths = sorted(getattr(each.settings, field))
            if each.pair is None or len(strengths) < FEWEST_STRENGTHS:
                continue
            gains = each.gains(each.pair, kind, strengths)
            places = gains.columns.to_numpy(float)
            slopes = pd.Series({seed: slope(places, row.to_numpy()) for seed, row in gains.iterrows()}, dtype=float)
            label = f"{each.label(each.pair)}, {kind} 0, {', '.join(f'{strength:g}' for strength in strengths)}"
            found.append(quantity(each.name(kind), label, slopes, each.runs("returns", each.pair)))
    names = [*NOISES, *(f"dreamer-{kind}" for kind in NOISES)]
    return complete(found, names, f"it had fewer than {FEWEST_STRENGTHS} strengths, or {NOT_PLANNED}")


def zero_drift_training(tables: Tables, settings: StudySettings) -> Measured:
    """W8: return of agents trained with zero-drift errors, with the penalty minus without."""
    found: Measured = []
    for each in experiments(tables, settings, "fits", "returns"):
        found += list(_with_errors(each, "return", "zero-drift", each.settings.zero_drift))
    return complete(found, ["return", "dreamer-return"], _no_errors("zero-drift"))


def drift_training(tables: Tables, settings: StudySettings) -> Measured:
    """W9: the same with errors that have a drift, and how much larger the gain is than without drift."""
    found: Measured = []
    for each in experiments(tables, settings, "fits", "returns"):
        this = each.settings
        found += list(_with_errors(each, "return", "drift", this.drift))
        if each.pair is None or not this.drift or not this.zero_drift:
            continue
        gains, cells = [], []
        for error, sizes in (("drift", this.drift), ("zero-drift", this.zero_drift)):
            pairs = [_altered(each.pair, error, size) for size in sizes]
            own = [paired(*(each.returned(cell) for cell in pair)) for pair in pairs]
            gains.append(pd.concat(own, axis=1, join="inner").agg(lambda row: np.mean(row.to_numpy()), axis=1))
            cells += [cell for pair in pairs for cell in pair]
        label = f"{each.label(each.pair)}, gain with drift against gain without, mean over sizes, clean"
        found.append(quantity(each.name("larger"), label, paired(*gains), each.runs("returns", cells)))
    found = complete(found, ["return", "dreamer-return"], _no_errors("drift"))
    reason = f"no agents were trained with errors of both kinds, or {NOT_PLANNED}"
    return complete(found, ["larger", "dreamer-larger"], reason)


def modest_error_is_harmless(tables: Tables, settings: StudySettings) -> Measured:
    """W10: return of unpenalised agents trained with the smallest zero-drift error minus those without error."""
    found: Measured = []
    for each in experiments(tables, settings, "fits", "returns"):
        sizes = sorted(each.settings.zero_drift)
        if not sizes or 0.0 not in each.settings.lambdas:
            continue
        plain = each.cell(0.0)
        modest, strong = (plain | {"error": "zero-drift", "error_size": size} for size in (sizes[0], sizes[-1]))
        for words, places in (("clean", [("clean", 0.0)]), ("mean over perturbations", each.noises)):
            if places:
                found += list(_harmless(each, (modest, plain), sizes[0], words, places))
        if len(sizes) > 1:
            pair = strong, modest
            found.append(_share(each, "strong", pair, [("clean", 0.0)], f"error {sizes[-1]:g} against {sizes[0]:g}"))
    names = ["harmless", "helps"]
    found = complete(found, [*names, *(f"dreamer-{name}" for name in names)], _no_errors("zero-drift"))
    return complete(found, ["strong", "dreamer-strong"], "fewer than two sizes of the error were trained")


def robust_to_gravity(tables: Tables, settings: StudySettings) -> Measured:
    """W14: return under another gravity, with the penalty minus without."""
    found: Measured = []
    for each in experiments(tables, settings, "fits", "returns"):
        for factor in sorted(each.settings.gravities):
            found.append(
                each.difference(
                    each.name("return"),
                    each.pair,
                    lambda cell, each=each, factor=factor: each.returned(cell, "gravity", factor),
                    f"gravity times {factor:g}",
                )
            )
    return complete(found, ["return", "dreamer-return"], f"no other gravity was tried, or {NOT_PLANNED}")


def _with_errors(each: Experiment, criterion: str, error: str, sizes: list[float]) -> Iterator[Quantity]:
    """Difference in clean return of agents that were trained with errors of one kind, size by size."""
    for size in sorted(sizes):
        pair = None if each.pair is None else _altered(each.pair, error, size)
        yield each.difference(each.name(criterion), pair, each.returned, "clean")


def _altered(pair: tuple[Cell, Cell], error: str, size: float) -> tuple[Cell, Cell]:
    first, second = (cell | {"error": error, "error_size": size} for cell in pair)
    return first, second


def _harmless(
    each: Experiment, cells: tuple[Cell, Cell], size: float, words: str, places: list[tuple[str, float]]
) -> Iterator[Quantity]:
    for criterion in ("harmless", "helps"):
        yield _share(each, criterion, cells, places, f"error {size:g} against none, {words}")


def _share(
    each: Experiment, criterion: str, cells: tuple[Cell, Cell], places: list[tuple[str, float]], words: str
) -> Quantity:
    """Difference in return as a share of the largest return."""
    values = paired(*(each.mean_return(cell, places) for cell in cells)) / each.largest_return
    label = f"{each.words}, lambda 0, zero-drift {words}"
    return quantity(each.name(criterion), label, values, each.runs("returns", cells))


def _no_errors(error: str) -> str:
    return f"no agents were trained with {error} errors, or {NOT_PLANNED}"


# --- W11, W13: length of sequences, size of batches ------------------------------------------------------------------


def sooner_with_long_sequences(tables: Tables, settings: StudySettings) -> Measured:
    """W11: when the longest sequences bring the return, or on the pendulum the model's loss, to a level."""
    found: Measured = []
    for each in experiments(tables, settings, "fits", "curves"):
        lengths = [length for length in each.settings.lengths if length > each.settings.length]
        pair = each.altered(length=max(lengths)) if lengths else None
        if pair is None:
            continue
        time, crossing = ("frames", _return_crossings) if each.prefix == "dreamer" else ("update", _loss_crossings)
        times, late = crossing(each, pair, time)
        never = {"neither agent of the seed gets there": {(number, seed) for number in (0, 1) for seed in late.neither}}
        runs = each.runs("curves", pair, never)
        label = each.label(pair) + (f"; {late.counted} of them never, counted at their end" if late.counted else "")
        criterion = "frames" if each.prefix == "dreamer" else "updates"
        found.append(quantity(each.name(criterion), label, times, runs))
    return complete(
        found, ["updates", "dreamer-frames"], f"no longer sequences were tried, no agent got there, or {NOT_PLANNED}"
    )


class _Late:
    """Agents that never reach the level: how many are counted at their end, and seeds that are left out."""

    def __init__(self) -> None:
        self.counted = 0
        self.neither: set[int] = set()


def _return_crossings(each: Experiment, pair: tuple[Cell, Cell], time: str) -> tuple[pd.Series, _Late]:
    """First time at which the running mean return is half of the largest, penalised minus not."""

    def crossing(rows: pd.DataFrame, _: pd.DataFrame) -> float | None:
        rows = rows[rows["return"].notna()]
        smooth = rows["return"].rolling(WINDOW, min_periods=1).mean().to_numpy()
        return first_crossing(rows[time].to_numpy(float), smooth, HALF * each.largest_return, rising=True)

    return _crossings(each, pair, time, crossing)


def _loss_crossings(each: Experiment, pair: tuple[Cell, Cell], time: str) -> tuple[pd.Series, _Late]:
    """First time at which the model's loss is near the unpenalised agent's last, penalised minus not."""

    def crossing(rows: pd.DataFrame, plain: pd.DataFrame) -> float | None:
        first, last = plain.model_loss.iloc[0], plain.model_loss.iloc[-1]
        level = last + NEAR_END * (first - last)
        return first_crossing(rows[time].to_numpy(float), rows.model_loss.to_numpy(float), level, rising=False)

    return _crossings(each, pair, time, crossing)


def _crossings(
    each: Experiment,
    pair: tuple[Cell, Cell],
    time: str,
    crossing: Callable[[pd.DataFrame, pd.DataFrame], float | None],
) -> tuple[pd.Series, _Late]:
    late, found = _Late(), {}
    curves = [dict(list(each.rows("curves", cell).sort_values(time).groupby("seed"))) for cell in pair]
    for seed in sorted(set(curves[0]) & set(curves[1])):
        own = [curve[seed] for curve in curves]
        times = [crossing(rows, own[1]) for rows in own]
        if times[0] is None and times[1] is None:
            late.neither.add(seed)
            continue
        late.counted += times.count(None)
        ends = [float(rows[time].max()) if at is None else at for at, rows in zip(times, own, strict=True)]
        found[seed] = ends[0] - ends[1]
    return pd.Series(found, dtype=float), late


def intermediate_batch(tables: Tables, settings: StudySettings) -> Measured:
    """W13: perturbed return of unpenalised agents, the best batch size in between minus the better of the ends."""
    found: Measured = []
    for each in experiments(tables, settings, "fits", "returns"):
        sizes = sorted({each.settings.batch, *each.settings.batches})
        cells = [each.cell(0.0, batch=size) for size in sizes]
        for kind in ("rotation", "mask") if 0.0 in each.settings.lambdas and len(sizes) > 2 else ():
            places = [place for place in each.noises if place[0] == kind]
            if not places:
                continue
            returns = pd.concat([each.mean_return(cell, places) for cell in cells], axis=1, join="inner")
            label = f"{each.words}, lambda 0, batch {', '.join(map(str, sizes))}, {kind}, mean over strengths"
            runs = each.runs("returns", cells)
            found.append(quantity(each.name(kind), label, returns, runs, best_between_over_ends))
    names = ["rotation", "mask"]
    reason = "fewer than three batch sizes were trained without penalty, or nothing was perturbed so"
    return complete(found, [*names, *(f"dreamer-{name}" for name in names)], reason)


def best_between_over_ends(returns: np.ndarray) -> float:
    """Largest mean over seeds of the columns in between minus the larger of the outer ones; returns: (seeds, sizes)."""
    means = returns.mean(axis=0)
    return float(means[1:-1].max() - max(means[0], means[-1]))


def judge(settings: str, scale: Scale, tables: list[Path], data: list[Path], verdicts: Path, manifest: Path) -> None:
    """Judge every claim of claims.yaml.

    Args:
        settings: all settings of the study as JSON.
        scale: the scale that the tables were made at.
        tables: Parquet files of the measuring and training steps.
        data: prepared data sets that these steps read; this study has none.
        verdicts: verdicts.json to write.
        manifest: manifest.json to write.

    """
    validated = StudySettings.validate(json.loads(settings), "studies.worldmodel")
    judge_files(sys.modules[__name__], Path(__file__).parent, validated, scale, tables, data, verdicts, manifest)


if __name__ == "__main__":
    run({"judge": judge})
