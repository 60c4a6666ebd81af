"""Judging step of the `attention` study: one estimand function per claim of ``claims.yaml``, tables in, numbers out.

Margins live in claims.yaml and nowhere else. A sample is a seed: a model trained anew, or other windows of text. Heads
of one model are not independent, so a seed's number is their mean, or their largest where the paper takes that.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from jacnorm.report.claims import Scale
from jacnorm.report.estimands import Measured, complete, paired, select
from jacnorm.report.judging import judge_files
from jacnorm.report.verdicts import NotTested
from jacnorm.step import run
from jacnorm.studies.attention.curves import (
    EXPECTATIONS,
    LEVEL,
    PAPERS_LENGTH,
    SOFTMAX,
    Tables,
    agreement,
    between,
    covers,
    critical,
    log_at,
    logs,
    plateau,
    steepness,
)
from jacnorm.studies.attention.evidence import Evidence, Points, by_row, evidence
from jacnorm.studies.attention.settings import StudySettings

FEW, MANY = 20, 100
"""Numbers N of Figure 2b, at the paper's length, between which the distance is flat."""
KNEE, FAR = 16, 64
"""Numbers N of Figure 3 between which the share is flat."""
SMALL_T, LARGE_T = 0.1, 1.0
"""Temperatures of Figure 4: up to the first, changes differ by perturbation; from the second on, they do not."""
CAP_T, LINE_T = 0.02, 0.05
"""Up to the first, Corollary 3 is read as a cap at the root of 2; from the second on, as 1 / (4 T)."""
SPARSER = ("ssmax", "sparsemax", "entmax15")
"""Normalisers that are meant to keep large weights large."""
NO_SYNTHETIC = "no such synthetic rows were measured"


# --- A1, A2: what holds for every row --------------------------------------------------------------------------------


def bounded_weights(tables: Tables, settings: StudySettings) -> Measured:
    """A1: share of weights within the bounds of Corollary 1, and how far the farthest is beyond them."""
    found: Measured = []
    for each in evidence(tables, settings, "weights", untrained=True):
        rows = each.rows("weights")
        found.append(each.extreme("within", np.min, rows, "within"))
        found.append(each.extreme("excess", np.max, rows, "excess"))
    return complete(found, ["within", "excess"], "no weights of softmax were measured")


def safe_bound(tables: Tables, settings: StudySettings) -> Measured:
    """A2: smallest share of rows within the bounds of Theorem 1(i)."""
    found: Measured = []
    for each in evidence(tables, settings, "distances", untrained=True):
        rows = each.rows("distances", every_space=True)
        if each.settings.distance == "sum_of_norms":
            found.append(each.extreme("tight", np.min, rows, "within_bound"))
            found.append(each.extreme("loose", np.min, rows, "within_loose_bound"))
    reason = "no distances as sums of norms, which the theorem bounds, were measured with softmax"
    return complete(found, ["tight", "loose"], reason)


# --- A3 to A6: distances ---------------------------------------------------------------------------------------------


def linear_growth(tables: Tables, settings: StudySettings) -> Measured:
    """A3: slope of the log distance on the log length."""
    found: Measured = []
    for each in evidence(tables, settings, "distances"):
        points = each.over_lengths("distance")
        if len(points.places) > 1:
            slopes = ("synthetic",) if each.synthetic else ("linear", "steep", "slope")
            found += [points.give(criterion, points.log_slopes()) for criterion in slopes]
            if not each.synthetic:
                steps = logs(points.values).diff(axis="columns").iloc[:, 1:]
                found.append(points.give("grows", by_row(np.min, steps)))
    found = complete(found, ["grows", "linear", "steep", "slope"], "fewer than two lengths were measured")
    return complete(found, ["synthetic"], NO_SYNTHETIC)


def linear_expectation(tables: Tables, settings: StudySettings) -> Measured:
    """A3b: the same slope of expectations over random sets."""
    found: Measured = []
    columns = {"closed-form": "expectation", "sampled": "expectation_sampled", "all": "expectation_all"}
    for each in evidence(tables, settings, "distances"):
        for criterion, column in ({"synthetic": "expectation"} if each.synthetic else columns).items():
            points = each.over_lengths(column)
            if len(points.places) > 1:
                found.append(points.give(criterion, points.log_slopes()))
    found = complete(found, list(columns), "fewer than two lengths were measured")
    return complete(found, ["synthetic"], NO_SYNTHETIC)


def diminishing_returns(tables: Tables, settings: StudySettings) -> Measured:
    """A4: slope of the log distance on log N, late minus half of early."""
    found: Measured = []
    for each in evidence(tables, settings, "distances"):
        points = each.over_selected("distances", "distance")
        few, many = (count * each.length / PAPERS_LENGTH for count in (FEW, MANY))
        if few > 1 and covers(points.places, 1, many):
            early, late = (points.by_seed(partial(steepness, low=a, high=b)) for a, b in ((1, few), (few, many)))
            words = f"N from 1 to {few:g} and on to {many:g}"
            found.append(points.give("synthetic" if each.synthetic else "late", late - early / 2, words))
    reason = f"the numbers N do not reach over {FEW} to {MANY} of {PAPERS_LENGTH} keys, scaled to this length"
    return complete(complete(found, ["late"], reason), ["synthetic"], NO_SYNTHETIC)


def collapse(tables: Tables, settings: StudySettings) -> Measured:
    """A5: distance with half and with nearly all keys selected, over the largest."""
    found: Measured = []
    for each in evidence(tables, settings, "collapse"):
        points = each.points("collapse", "distance", "fraction", each.settings.fractions)
        largest = by_row(np.max, points.values)
        for criterion, fraction in (("half", 0.5), ("end", 0.98)):
            if fraction in points.places:
                share = points.values[fraction] / largest
                found.append(points.give(criterion, share, f"{fraction:.0%} selected"))
    return complete(found, ["half", "end"], "the settings do not ask for this share of the keys")


def tightening(tables: Tables, settings: StudySettings) -> Measured:
    """A6: change of the bound over the distance from one N to the next."""
    found: Measured = []
    for each in evidence(tables, settings, "distances"):
        points = each.over_selected("distances", "distance")
        if len(points.places) < 2:
            continue
        loose, tight = (
            logs(each.over_selected("distances", bound).values / points.values) for bound in ("loose_bound", "bound")
        )
        changes = by_row(np.max, loose.diff(axis="columns").iloc[:, 1:])
        found.append(points.give("synthetic" if each.synthetic else "loose", changes))
        if not each.synthetic:
            found.append(points.give("tight", tight.iloc[:, -1] - tight.iloc[:, 0]))
    found = complete(found, ["loose", "tight"], "fewer than two numbers N were measured")
    return complete(found, ["synthetic"], NO_SYNTHETIC)


# --- A7: critical N --------------------------------------------------------------------------------------------------


def critical_share(tables: Tables, settings: StudySettings) -> Measured:
    """A7: smallest N at which the test over heads does not tell the distance from its expectation."""
    found: Measured = []
    for each in evidence(tables, settings, "distances", synthetic=False):
        length = each.length
        points, rows = each.over_selected("distances", "distance"), each.window("distances", length)
        if len(points.places) < 2:
            continue
        tests = {which: _tests(rows, which) for which in EXPECTATIONS}
        shares = {
            "here": _criticals(tests["all"], length),
            "settled": _criticals(tests["all"], length, settled=True),
            "level-5": _criticals(tests["all"], length, level=0.05),
            "closed-form": _criticals(tests["closed-form"], length),
        }
        if rows.expectation_sampled.notna().any():
            shares["sampled"] = _criticals(tests["sampled"], length)
        words = f"{len(rows[['layer', 'head']].drop_duplicates())} heads"
        found += [points.give(criterion, ns / length, words) for criterion, ns in shares.items()]
        other = each.other_than_gpt2("distances") or each.other_than_papers_length()
        found.append(NotTested(other, "share") if other else points.give("share", shares["here"] / length, words))
        found += _trend(each)
    reason = "fewer than two numbers N were measured"
    return complete(found, ["share", "here", "settled", "level-5", "closed-form", "sampled", "trend"], reason)


def _tests(rows: pd.DataFrame, which: str) -> dict[int, pd.DataFrame]:
    """The test at every N against one of the expectations, by seed."""
    return {seed: agreement(one, which) for seed, one in rows.groupby("seed")}


def _criticals(
    tests: Mapping[int, pd.DataFrame], length: int, level: float = LEVEL, *, settled: bool = False
) -> pd.Series:
    """The critical N of each seed."""
    return pd.Series(
        {seed: critical(each, length, level, settled=settled) for seed, each in tests.items()}, dtype=float
    )


def _trend(each: Evidence) -> Measured:
    """Slope of the log of the critical N on the log of the length."""
    ns = {}
    for length in sorted(each.settings.lengths):
        rows = each.window("distances", length)
        if rows.selected.nunique() > 1:
            ns[length] = _criticals(_tests(rows, "all"), length)
    if len(ns) < 2:
        return []
    values = pd.DataFrame(ns)
    lost = values.index[[any(seed not in one.index for one in ns.values()) for seed in values.index]]
    values = values.drop(index=lost)
    words = f"L from {min(ns)} to {max(ns)}"
    points = Points(each, values, each.account(each.rows("distances"), values.index), words)
    return [points.give("trend", points.log_slopes())]


# --- A8 to A10, A15: separability ------------------------------------------------------------------------------------


def saturation(tables: Tables, settings: StudySettings) -> Measured:
    """A8: the share of separable keys against N."""
    found: Measured = []
    for each in evidence(tables, settings, "separability"):
        points = each.over_selected("separability", "ratio")
        ratios = points.values
        if {1, KNEE, FAR} <= set(points.places):
            late = ratios[KNEE] - ratios[FAR] - (ratios[1] - ratios[KNEE]) / 3
            found.append(points.give("synthetic" if each.synthetic else "saturates", late))
        if each.synthetic:
            continue
        if 1 in points.places:
            away = select(each.rows("separability"), selected=1).assign(away=lambda rows: (rows.ratio - 1).abs())
            found.append(each.extreme("one", np.max, away, "away"))
        start = between(points.places, 1, KNEE)
        if len(start) > 1:
            falls = -ratios[start].diff(axis="columns").iloc[:, 1:]
            found.append(points.give("falls", by_row(np.min, falls)))
        found += each.level("below-one")
    reason = f"the numbers N do not hold 1, {KNEE} and {FAR}"
    found = complete(found, ["one", "falls", "saturates", "below-one"], reason)
    return complete(found, ["synthetic"], NO_SYNTHETIC)


def level(tables: Tables, settings: StudySettings) -> Measured:
    """A9: the share of separable keys where it is flat."""
    found: Measured = []
    for each in evidence(tables, settings, "separability"):
        found += each.level("synthetic" if each.synthetic else "here")
        if each.synthetic:
            continue
        if other := each.other_than_gpt2("separability"):
            found.append(NotTested(other, "level"))
            continue
        points = each.over_selected("separability", "ratio")
        found += [points.give("level", points.values[n], f"N = {n}") for n in plateau(points.places, each.length)]
    found = complete(found, ["level", "here"], "no N from 16 to half the length was measured")
    return complete(found, ["synthetic"], NO_SYNTHETIC)


def bracketed(tables: Tables, settings: StudySettings) -> Measured:
    """A10: the bounds of Theorem 2 around the share of separable keys."""
    found: Measured = []
    for each in evidence(tables, settings, "separability", untrained=True):
        rows = each.rows("separability", every_space=True)
        found.append(each.extreme("lower", np.min, rows, "above_lower"))
        points = each.over_selected("separability", "ratio")
        several = [n for n in points.places if n > 1]
        if each.untrained or not several:
            continue
        uppers = each.over_selected("separability", "upper").values
        above = by_row(np.max, (points.values - uppers)[several])
        found.append(points.give("synthetic" if each.synthetic else "upper", above))
        if not each.synthetic:
            largest = each.over_selected("separability", "ratio", "max").values
            found.append(points.give("upper-tight", by_row(np.mean, (uppers - largest)[several])))
    found = complete(found, ["lower", "upper", "upper-tight"], "no N above 1 was measured")
    return complete(found, ["synthetic"], NO_SYNTHETIC)


def three_heads(tables: Tables, settings: StudySettings) -> Measured:
    """A15: what three independent heads would cover at the measured level."""
    found: Measured = []
    for each in evidence(tables, settings, "separability", synthetic=False):
        found += each.level("coverage", lambda p: 1 - (1 - p) ** 3)
    return complete(found, ["coverage"], "no N from 16 to half the length was measured")


# --- A11 to A14: gradients -------------------------------------------------------------------------------------------


def inverse_temperature(tables: Tables, settings: StudySettings) -> Measured:
    """A11: slope of the log change on log T."""
    found: Measured = []
    ranges = {"middle": (0.1, 1.0), "high": (1.0, 10.0), "low": (0.01, 0.1), "low-here": (0.01, 0.1)}
    for each in evidence(tables, settings, "sensitivity"):
        smallest = min(each.settings.perturbations)
        points = each.over_temperatures(smallest)
        for criterion, ends in ({"synthetic": ranges["middle"]} if each.synthetic else ranges).items():
            inside = between(points.places, *ends)
            if covers(points.places, *ends) and len(inside) > 1:
                found.append(points.give(criterion, points.log_slopes(inside), f"perturbation {smallest:g}"))
    found = complete(found, list(ranges), "the temperatures do not reach over this range")
    return complete(found, ["synthetic"], NO_SYNTHETIC)


def perturbation_order(tables: Tables, settings: StudySettings) -> Measured:
    """A12: changes at different perturbations against one another."""
    found: Measured = []
    for each in evidence(tables, settings, "sensitivity"):
        sizes = sorted(each.settings.perturbations)
        curves = {size: each.over_temperatures(size) for size in sizes}
        first = curves[sizes[0]]
        cold, hot = between(first.places, 0, SMALL_T), between(first.places, LARGE_T, np.inf)
        for small, large in pairwise(sizes) if cold and not each.synthetic else ():
            ratios = (curves[small].values / curves[large].values)[cold]
            criterion = "large" if (small, large) == tuple(sizes[-2:]) and len(sizes) > 2 else "small"
            found.append(first.give(criterion, by_row(np.min, ratios), f"{small:g} over {large:g}"))
        if hot and len(sizes) > 1:
            changes = [logs(curves[size].values[hot]) for size in sizes]
            spans = [by_row(np.max, (a - b).abs()) for a in changes for b in changes]
            spread = np.exp(by_row(np.max, pd.concat(spans, axis=1)))
            words = f"perturbations from {sizes[0]:g} to {sizes[-1]:g}"
            found.append(first.give("synthetic" if each.synthetic else "merged", spread, words))
    reason = f"there are too few perturbations, or no temperatures up to {SMALL_T:g} or from {LARGE_T:g} on"
    return complete(complete(found, ["small", "large", "merged"], reason), ["synthetic"], NO_SYNTHETIC)


def drop(tables: Tables, settings: StudySettings) -> Measured:
    """A13: the change at a small temperature over that at a large one."""
    found: Measured = []
    ends = {"drop": 1.0, "to-ten": 10.0}
    for each in evidence(tables, settings, "sensitivity"):
        smallest = min(each.settings.perturbations)
        points = each.over_temperatures(smallest)
        for criterion, end in ({"synthetic": 1.0} if each.synthetic else ends).items():
            if covers(points.places, 0.01, end):
                low, high = (points.by_seed(partial(log_at, at=at)) for at in (0.01, end))
                ratio, words = np.exp(low - high), f"perturbation {smallest:g}"
                found.append(points.give(criterion, ratio, words, "geometric mean"))
    found = complete(found, list(ends), "the temperatures do not reach from 0.01 to this one")
    return complete(found, ["synthetic"], NO_SYNTHETIC)


def spectral_bound(tables: Tables, settings: StudySettings) -> Measured:
    """A14: changes of the weights and exact norms against 1 / (4 T), the root of 2 and 1 / (2 T)."""
    found: Measured = []
    for each in evidence(tables, settings, "sensitivity", synthetic=False):
        curves = [each.over_temperatures(size) for size in each.settings.perturbations]
        places = curves[0].places
        hot, cold = between(places, LINE_T, np.inf), between(places, 0, CAP_T)
        for criterion, at, scale in (("changes", hot, 4 * np.array(hot)), ("cap", cold, np.ones(len(cold)))):
            if at:
                largest = [by_row(np.max, points.values[at] * scale) for points in curves]
                found.append(curves[0].give(criterion, by_row(np.max, pd.concat(largest, axis=1))))
    for each in evidence(tables, settings, "jacobians", untrained=True):
        points = each.points("jacobians", "above_quarter", "temperature", each.settings.temperatures)
        found.append(points.give("quarter", by_row(np.mean, points.values), _worst(points.values)))
        rows = each.rows("jacobians")
        found += [each.extreme(name, np.max, rows, "spectral_largest_product") for name in ("largest", "half")]
    reason = "no temperatures in this range were measured"
    return complete(found, ["changes", "cap", "quarter", "largest", "half"], reason)


def _worst(shares: pd.DataFrame) -> str:
    """At which temperature the largest share of rows is above the bound."""
    means = shares.mean()
    return f"most at T = {means.idxmax():g}, {means.max():.0%}" if means.max() > 0 else ""


# --- A16: other normalisers ------------------------------------------------------------------------------------------


def alternatives(tables: Tables, settings: StudySettings) -> Measured:
    """A16: the normalisers that the paper names, beside softmax on the same logits."""
    found: Measured = []
    for each in evidence(tables, settings, "weights", synthetic=False):
        for name in (name for name in each.settings.normalisers if name != SOFTMAX):
            found += _beside_softmax(each, name)
    reason = "no such normaliser was measured"
    return complete(found, ["length", "length-others", "outside", "separable", "change", "half"], reason)


def _beside_softmax(each: Evidence, name: str) -> Measured:
    """One normaliser against softmax."""
    found: Measured = []
    lengths = each.points("weights", "largest_weight", "length", each.settings.lengths, normaliser=name)
    if len(lengths.places) > 1:
        softmax = each.points("weights", "largest_weight", "length", each.settings.lengths)
        difference = paired(lengths.log_slopes(), softmax.log_slopes())
        found.append(lengths.give("length" if name in SPARSER else "length-others", difference, name))
    within = each.points("weights", "within", "length", [each.length], normaliser=name, words=f"L = {each.length}")
    found.append(within.give("outside", 1 - within.values[each.length], name))
    ratios = [each.over_selected("separability", "ratio", normaliser=which) for which in (name, SOFTMAX)]
    if flat := plateau(ratios[0].places, each.length):
        levels = [by_row(np.mean, points.values[flat]) for points in ratios]
        found.append(ratios[0].give("separable", paired(*levels), name))
    smallest = min(each.settings.perturbations)
    changes = [each.over_temperatures(smallest, normaliser=which) for which in (name, SOFTMAX)]
    if LARGE_T in changes[0].places:
        ratio = np.exp(paired(*(logs(points.values[LARGE_T]) for points in changes)))
        found.append(changes[0].give("change", ratio, name, statistic="geometric mean"))
    norms = each.rows("jacobians", normaliser=name)
    found.append(each.extreme("half", np.max, norms, "spectral_largest_product", name))
    return found


def judge(settings: str, scale: Scale, tables: list[Path], data: list[Path], verdicts: Path, manifest: Path) -> None:
    """Judge every claim of claims.yaml.

    Args:
        settings: all settings of the study as JSON.
        scale: the scale that the tables were made at.
        tables: Parquet files of the measuring and training steps.
        data: prepared texts that these steps read.
        verdicts: verdicts.json to write.
        manifest: manifest.json to write.

    """
    validated = StudySettings.validate(json.loads(settings), "studies.attention")
    judge_files(sys.modules[__name__], Path(__file__).parent, validated, scale, tables, data, verdicts, manifest)


if __name__ == "__main__":
    run({"judge": judge})
