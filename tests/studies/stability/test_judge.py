"""Each claim from invented tables: one that satisfies all of them at every scale, then changed cell by cell."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from tests.studies.stability import tiny
from tests.studies.stability.invented import holding, scale_settings, tables

from jacnorm.report import intervals
from jacnorm.report.claims import SCALES, load_claims
from jacnorm.report.manifest import read_manifest
from jacnorm.report.verdicts import judge_claim, judge_study, read_verdicts
from jacnorm.step import run
from jacnorm.studies.stability import judge
from jacnorm.studies.stability.settings import StudySettings

STUDY = Path(judge.__file__).parent
CLAIMS = STUDY / "claims.yaml"

# The ledger: criterion -> bounds. Set before the judged runs; a change here is a change of what is claimed.
LOG_100, LOG_1_3 = 4.60517, 0.262364
INF = math.inf
MARGINS = {
    ("C1", "rate"): (-0.04, 0.04),
    ("C1", "decay"): (-INF, 0.0),
    ("C1", "growth"): (0.0, INF),
    ("C2", "slope"): (-0.03, 0.03),
    ("C2", "bound"): (-INF, 0.0),
    ("C3", "three-factors"): (0.85, 1.08),
    ("C3", "ten-factors"): (0.70, 1.05),
    ("C3", "approach"): (0.0, INF),
    ("C4", "law"): (0.01, INF),
    ("C4", "mean"): (-3.0, 3.0),
    ("C5", "rejections"): (-INF, 0.15),
    ("C5", "control"): (0.95, INF),
    ("C6", "rate"): (-0.05, 0.05),
    ("C6", "half"): (-INF, -0.29),
    ("C6", "nine-tenths"): (-INF, -1.0),
    ("C7", "slope"): (-0.04, 0.04),
    ("C7", "slope-narrow"): (-0.08, 0.08),
    ("C7", "gap"): (-1.0, 1.0),
    ("C8", "dense-side"): (-INF, 1.06),
    ("C8", "sparse-side"): (1.25, INF),
    ("C8", "growth"): (0.0, INF),
    ("C9", "own-factor"): (-0.04, 0.04),
    ("C9", "random-factor"): (-0.05, 0.05),
    ("C10", "factor"): (0.95, 1.05),
    ("C10", "gap"): (-1.5, 1.5),
    ("C11", "explodes"): (10.0, INF),
    ("C11", "restored"): (-2.5, 2.5),
    ("C12", "rescaled"): (0.80, INF),
    ("C12", "rescaled-deep"): (0.65, INF),
    ("C12", "unscaled"): (-INF, 0.25),
    ("C13", "fast-decay"): (-LOG_1_3, LOG_1_3),
    ("C13", "slow-decay"): (LOG_100, INF),
    ("C13", "fast-decay-rows"): (-LOG_1_3, LOG_1_3),
    ("C13", "slow-decay-rows"): (LOG_100, INF),
    ("C14", "depth-gap"): (-1.0, 1.0),
    ("C14", "every-run"): (-INF, 3.0),
    ("C15", "rescaled"): (-1.0, 1.0),
    ("C15", "unscaled"): (-INF, -10.0),
}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 99)


def judged(name: str, content: dict[str, pd.DataFrame], scale: str = "smoke", settings: StudySettings | None = None):
    claim = load_claims(CLAIMS).claim(name)
    measured = getattr(judge, claim.estimand)(content, settings or scale_settings(scale))
    return judge_claim(claim, measured, scale)


def outcomes(verdict, criterion):
    return {quantity.outcome.value for quantity in verdict.quantities if quantity.criterion == criterion}


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_margins_are_those_of_the_ledger():
    found = {(c.id, criterion.id): criterion.bounds for c in load_claims(CLAIMS).claims for criterion in c.criteria}
    assert found == MARGINS
    assert math.log(100) == pytest.approx(LOG_100, abs=1e-5)
    assert math.log(1.3) == pytest.approx(LOG_1_3, abs=1e-5)


def test_only_the_stress_test_is_an_extension_and_only_row_correlations_do_not_decide():
    claims = load_claims(CLAIMS).claims
    assert [claim.id for claim in claims] == [f"C{number}" for number in range(1, 16)]
    assert [claim.id for claim in claims if claim.extension] == ["C11"]
    silent = [(claim.id, c.id) for claim in claims for c in claim.criteria if not c.decides]
    assert silent == [("C13", "fast-decay-rows"), ("C13", "slow-decay-rows")]


# --- every scale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_every_claim_can_hold_at_every_scale(scale):
    found = judge_study(CLAIMS, judge, holding(scale), scale_settings(scale), scale)
    # The paper's scale trains widths of 256, the others 128: all of them allow every claim to be decided.
    assert {claim.claim.id: claim.verdict.value for claim in found.claims} == {
        f"C{number}": "reproduced" for number in range(1, 16)
    }
    for claim in found.claims:
        asked = {criterion.id for criterion in claim.claim.criteria if scale in criterion.at}
        assert {quantity.criterion for quantity in claim.quantities} == asked
        assert all(runs.complete for runs in claim.runs)


@pytest.mark.parametrize("name", [f"C{number}" for number in range(1, 16)])
def test_without_rows_a_claim_is_not_tested_or_undecided_but_never_decided(name):
    empty = {table: rows.iloc[:0] for table, rows in tables().items()}
    verdict = judged(name, empty)
    assert {q.outcome.value for q in verdict.quantities} <= {"not tested", "undecided"}
    assert verdict.verdict.value in ("not tested", "inconclusive")
    assert all(quantity.reason for quantity in verdict.quantities)


@pytest.mark.parametrize("name", ["C1", "C6", "C7", "C9", "C15"])
def test_networks_that_are_too_shallow_leave_slopes_untested(name):
    content = tables()
    content["depth"] = content["depth"][content["depth"].depth < 25]
    assert judged(name, content).verdict.value == "not tested"


# --- one cell after the other ----------------------------------------------------------------------------------------
# (claim, criterion, table, rows, column, change): added to the numbers of all seeds it makes the criterion fail, and
# with signs that differ between seeds it makes the interval straddle the margin.

CHANGES = [
    ("C1", "rate", "depth", {"sigma_w2": 1.0}, "per layer", 0.06),
    ("C1", "decay", "depth", {"sigma_w2": 1.0}, "per layer", 0.6),
    ("C1", "growth", "depth", {"sigma_w2": 4.0}, "per layer", -0.6),
    ("C2", "slope", "depth", {"sigma_w2": 2.0, "method": "dense"}, "per layer", 0.05),
    ("C2", "bound", "depth", {"sigma_w2": 2.0, "method": "dense"}, "log_norm", 4.0),
    ("C3", "three-factors", "limit", {"product": "both ends", "depth": 3, "width": 256}, "log_norm", 0.2),
    ("C3", "ten-factors", "limit", {"product": "both ends", "depth": 10, "width": 256}, "log_norm", -0.5),
    ("C3", "approach", "limit", {"product": "both ends", "depth": 3, "width": 256}, "log_norm", 0.2),
    ("C4", "law", "surrogate", {"method": "magnitude", "diagonal": "true"}, "log_norm", 0.8),
    ("C4", "mean", "surrogate", {"method": "random", "diagonal": "true"}, "log_norm", -0.8),
    ("C5", "rejections", "independence", {"pair": "next layer"}, "p_value", -0.39),
    ("C5", "control", "independence", {"pair": "row sum (control)"}, "p_value", 0.5),
    ("C6", "rate", "depth", {"method": "random", "scaling": "none", "sparsity": 0.9}, "per layer", -0.08),
    ("C6", "half", "depth", {"method": "random", "scaling": "none", "sparsity": 0.5}, "per layer", 0.08),
    ("C6", "nine-tenths", "depth", {"method": "random", "scaling": "none", "sparsity": 0.9}, "per layer", 0.2),
    (
        "C7",
        "slope",
        "depth",
        {"method": "random", "scaling": "inverse_sqrt_density", "sparsity": 0.9},
        "per layer",
        -0.06,
    ),
    ("C7", "gap", "depth", {"method": "random", "scaling": "inverse_sqrt_density", "sparsity": 0.5}, "log_norm", 2.0),
    ("C8", "dense-side", "edge_matrices", {"sweep": "degree-over-log", "degree_over_log": 8.0}, "norm", 0.5),
    ("C8", "sparse-side", "edge_matrices", {"sweep": "degree-over-log", "degree_over_log": 0.5}, "norm", -0.5),
    ("C8", "growth", "edge_matrices", {"sweep": "fixed-degree", "size": 2048}, "norm", -0.3),
    ("C9", "own-factor", "depth", {"method": "magnitude", "scaling": "alpha_mag"}, "per layer", 0.06),
    ("C9", "random-factor", "depth", {"method": "magnitude", "scaling": "inverse_sqrt_density"}, "per layer", 0.1),
    ("C10", "factor", "scores", {"method": "synflow", "scaling": "frobenius"}, "factor", 0.4),
    ("C10", "gap", "scores", {"method": "synflow", "scaling": "frobenius"}, "log_norm", 4.0),
    ("C11", "explodes", "scores", {"method": "grasp", "scaling": "frobenius"}, "log_norm", -15.0),
    ("C11", "restored", "scores", {"method": "snip", "scaling": "activity"}, "log_norm", -5.0),
    ("C12", "rescaled", "trainability", {"scaling": "frobenius"}, "test_accuracy", -0.4),
    ("C12", "unscaled", "trainability", {"scaling": "none"}, "test_accuracy", 0.4),
    ("C13", "fast-decay", "correlated", {"correlation": "equicorrelated", "exponent": 1.5}, "log_norm", 1.0),
    ("C13", "slow-decay", "correlated", {"correlation": "equicorrelated", "exponent": 0.5}, "log_norm", -5.0),
    ("C13", "fast-decay-rows", "correlated", {"correlation": "row", "exponent": 1.5}, "log_norm", 1.0),
    ("C13", "slow-decay-rows", "correlated", {"correlation": "row", "exponent": 0.5}, "log_norm", -5.0),
    ("C14", "depth-gap", "drift", {"depth": 20, "epoch": 10}, "log_norm", -2.0),
    ("C14", "every-run", "drift", {"depth": 20, "epoch": 10}, "log_norm", 2.0),
    ("C15", "rescaled", "depth", {"activation": "tanh", "scaling": "inverse_sqrt_density"}, "log_norm", -2.0),
    ("C15", "unscaled", "depth", {"activation": "tanh", "method": "random", "scaling": "none"}, "log_norm", 60.0),
]
DECIDED_ONCE = {"law", "mean", "every-run"}  # exact numbers, without an interval that could straddle


def changed(name, cell, column, amount, spread=False):
    content = tables()
    rows = content[name]
    here = np.logical_and.reduce(
        [np.isclose(rows[k], v) if isinstance(v, float) else rows[k] == v for k, v in cell.items()]
    )
    if name == "depth" and "activation" not in cell:
        here &= rows.activation == "relu"
    assert here.any()
    by_depth = rows.depth if column == "per layer" else 1
    # Alternating within a table's seeds; unequal, so that an even number of them still has a mean beside zero.
    signs = np.where(rows.seed % 2 == 0, 3.0, -1.0) if spread else 1.0
    column = "log_norm" if column == "per layer" else column
    rows[column] = rows[column] + np.where(here, amount * by_depth * signs, 0.0)
    return content


@pytest.mark.parametrize(("claim", "criterion", "name", "cell", "column", "amount"), CHANGES)
def test_a_criterion_fails_when_its_numbers_leave_the_margin(claim, criterion, name, cell, column, amount):
    verdict = judged(claim, changed(name, cell, column, amount))
    assert "fails" in outcomes(verdict, criterion)
    expected = "contradicted" if load_claims(CLAIMS).claim(claim).criterion(criterion).decides else "reproduced"
    assert verdict.verdict.value == expected


@pytest.mark.parametrize(
    ("claim", "criterion", "name", "cell", "column", "amount"), [c for c in CHANGES if c[1] not in DECIDED_ONCE]
)
def test_a_criterion_straddles_when_seeds_disagree(claim, criterion, name, cell, column, amount):
    if column == "p_value":
        # A share of rejections near its margin: some tests on each side.
        content = tables()
        rows = content[name]
        here = (rows["pair"] == cell["pair"]).to_numpy()
        share = 0.13 if criterion == "rejections" else 0.96
        rows.loc[here, "p_value"] = np.where(np.arange(here.sum()) < share * here.sum(), 0.001, 0.9)
    elif claim == "C13":
        # An expected norm that one network dominates.
        content = changed(name, cell, column, -5.0 if amount < 0 else 0.0)
        rows = content[name]
        here = (rows.correlation == cell["correlation"]) & (rows.exponent == cell["exponent"]) & (rows.seed == 20)
        rows.loc[here, column] += 6.0 if amount < 0 else 2.0
    else:
        content = changed(name, cell, column, 0.05 if criterion == "approach" else amount, spread=True)
    verdict = judged(claim, content)
    assert "straddles" in outcomes(verdict, criterion)
    assert "fails" not in outcomes(verdict, criterion)


def test_every_criterion_of_the_ledger_is_changed_above():
    changed_here = {(claim, criterion) for claim, criterion, *_ in CHANGES}
    assert set(MARGINS) - changed_here == {("C7", "slope-narrow"), ("C12", "rescaled-deep")}  # not asked at smoke


@pytest.mark.parametrize(
    ("claim", "criterion", "name", "column", "amount", "here"),
    [
        ("C7", "slope-narrow", "depth", "log_norm", -0.1, {"width": 64, "scaling": "inverse_sqrt_density"}),
        ("C12", "rescaled-deep", "trainability", "test_accuracy", -0.3, {"depth": 30, "scaling": "frobenius"}),
    ],
)
def test_criteria_of_the_larger_scales_fail_too(claim, criterion, name, column, amount, here):
    content = tables("laptop")
    rows = content[name]
    mask = np.logical_and.reduce([rows[key] == value for key, value in here.items()])
    rows[column] += np.where(mask, amount * (rows.depth if name == "depth" else 1), 0.0)
    assert outcomes(judged(claim, content, "laptop"), criterion) == {"fails"}


# --- which rows a claim reads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "name", "rows", "column"),
    [
        ("C3", "limit", {"product": "no end"}, "log_norm"),
        ("C5", "independence", {"pair": "weight sign"}, "p_value"),
        ("C8", "edge_matrices", {"entries": "rademacher"}, "norm"),
        ("C13", "correlated", {"diagonal": "true"}, "log_norm"),
        ("C14", "drift", {"epoch": 0}, "log_norm"),
    ],
)
def test_rows_of_other_cells_do_not_enter(claim, name, rows, column):
    content = tables()
    mask = np.logical_and.reduce([content[name][key] == value for key, value in rows.items()])
    assert mask.any()
    content[name].loc[mask, column] = 1e3
    assert judged(claim, content) == judged(claim, tables())


def test_the_learning_rate_is_chosen_by_validation_and_not_by_test_accuracy():
    content = tables()
    rows = content["trainability"]
    lucky = (rows.scaling == "frobenius") & (rows.learning_rate == 0.01)
    rows.loc[lucky, "test_accuracy"] = 1.0  # with the worse validation accuracy
    (quantity,) = [q for q in judged("C12", content).quantities if q.criterion == "rescaled"]
    assert quantity.estimate == pytest.approx(0.905, abs=0.01)
    assert "learning rate 0.03" in quantity.label


def test_slopes_are_least_squares_on_depths_ten_to_fifty():
    content = tables()
    rows = content["depth"]
    dense = (rows.activation == "relu") & (rows.sigma_w2 == 2.0) & (rows.method == "dense")
    rng = np.random.default_rng(1)
    rows.loc[dense, "log_norm"] += rng.normal(0, 0.05, dense.sum())
    rows.loc[dense & (rows.depth < 10), "log_norm"] = 77.0  # outside the range: must not count
    (slope,) = [q for q in judged("C2", content).quantities if q.criterion == "slope"]
    inside = rows[dense & rows.depth.between(10, 50)]
    expected = [np.polyfit(one.depth, one.log_norm, 1)[0] for _, one in inside.groupby("seed")]
    assert slope.samples == pytest.approx(expected, abs=1e-12)


# --- what is lost, diverged or dead ----------------------------------------------------------------------------------


def test_a_lost_seed_is_counted():
    content = tables()
    content["depth"] = content["depth"][content["depth"].seed != 12]
    verdict = judged("C1", content)
    assert all((q.runs.planned, q.runs.finished, q.runs.lost) == (10, 9, 1) for q in verdict.quantities)
    assert all(12 not in q.seeds for q in verdict.quantities)
    assert any("1 lost" in reason for reason in verdict.reasons)


def test_too_few_seeds_decide_nothing():
    content = tables()
    content["depth"] = content["depth"][content["depth"].seed < 14]
    verdict = judged("C1", content)
    assert verdict.verdict.value == "inconclusive"
    assert outcomes(verdict, "rate") == {"undecided"}


def test_diverged_trainings_are_counted_and_stay_in_the_mean():
    content = tables()
    rows = content["trainability"]
    bad = (rows.scaling == "frobenius") & (rows.learning_rate == 0.03) & rows.seed.isin([10, 11, 12])
    rows.loc[bad, ["diverged_at", "test_accuracy"]] = [40, 0.1]
    (quantity,) = [q for q in judged("C12", content).quantities if q.criterion == "rescaled"]
    assert (quantity.runs.planned, quantity.runs.finished, quantity.runs.diverged) == (10, 7, 3)
    assert len(quantity.samples) == 10
    assert quantity.outcome.value == "fails" or quantity.outcome.value == "straddles"


def test_a_diverged_drift_run_decides_nothing_about_training():
    content = tables()
    content["drift"].loc[(content["drift"].seed == 11) & (content["drift"].epoch == 10), "log_norm"] = math.nan
    content["curves"].loc[(content["curves"].seed == 11) & (content["curves"].depth == 20), "diverged_at"] = 3
    verdict = judged("C14", content)
    assert verdict.verdict.value == "inconclusive"
    assert {q.outcome.value for q in verdict.quantities} == {"undecided"}  # NaN is never passed over
    assert all(q.runs.diverged == 1 for q in verdict.quantities)


@pytest.mark.parametrize("death", [12, 20, 30, 35, 50])
def test_a_network_that_dies_has_slope_minus_infinity_wherever_it_dies(death):
    content = tables()
    rows = content["depth"]
    dead = (
        (rows.seed == 13) & (rows.depth >= death) & (rows.method == "random") & (rows.scaling == "inverse_sqrt_density")
    )
    rows.loc[dead & (rows.sparsity == 0.9) & (rows.activation == "relu"), "log_norm"] = -INF
    (slope,) = [q for q in judged("C7", content).quantities if q.criterion == "slope" and "0.9" in q.label]
    assert slope.samples[slope.seeds.index(13)] == -INF
    assert len(slope.samples) == 10
    assert slope.outcome.value != "holds"  # nine good networks do not outvote a dead one
    assert slope.not_a_number == 0


@pytest.mark.parametrize(
    ("claim", "name", "column", "rows"),
    [
        ("C2", "depth", "log_norm", {"method": "dense", "depth": 50}),
        ("C3", "limit", "log_norm", {"product": "both ends", "width": 256}),
        ("C4", "surrogate", "log_norm", {"method": "random"}),
        ("C10", "scores", "log_norm", {"method": "synflow"}),
        ("C11", "scores", "log_norm", {"method": "snip"}),
        ("C13", "correlated", "log_norm", {"diagonal": "surrogate", "exponent": 1.5}),
        ("C14", "drift", "log_norm", {"epoch": 10}),
        ("C15", "depth", "log_norm", {"activation": "tanh", "scaling": "inverse_sqrt_density"}),
    ],
)
def test_minus_infinity_is_never_dropped(claim, name, column, rows):
    content = tables()
    mask = np.logical_and.reduce([content[name][key] == value for key, value in rows.items()])
    mask &= content[name].seed == 14
    assert mask.any()
    content[name].loc[mask, column] = -INF
    verdict, before = judged(claim, content), judged(claim, tables())
    assert verdict.verdict.value != "reproduced"
    assert [len(q.samples) for q in verdict.quantities] == [len(q.samples) for q in before.quantities]


# --- the step --------------------------------------------------------------------------------------------------------


def test_the_step_judges_a_tiny_run(tmp_path, digits):
    made = tiny.everything(tiny.ALL, tmp_path, digits)
    words = ["--scale", "smoke", "--settings", json.dumps(tiny.ALL.model_dump()), "--tables", *made.glob("*.parquet")]
    words += ["--data", digits, "--verdicts", tmp_path / "verdicts.json", "--manifest", tmp_path / "manifest.json"]
    run({"judge": judge.judge}, list(map(str, words)))
    found = read_verdicts(tmp_path / "verdicts.json")
    assert [claim.claim.id for claim in found.claims] == [f"C{number}" for number in range(1, 16)]
    # Nothing of this size is what a claim is about, apart from the laws that hold at every width.
    assert {c.claim.id for c in found.claims if c.verdict.value != "not tested"} <= {"C3", "C4", "C5", "C8", "C10"}
    manifest = read_manifest(tmp_path / "manifest.json")
    assert [used.label for used in manifest.data] == ["scikit-learn digits"]
    assert len(manifest.departures) == len(yaml.safe_load((STUDY / "departures.yaml").read_text()))
