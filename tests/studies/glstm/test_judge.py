"""Each claim from invented tables: one set that satisfies all of them, then changed cell by cell."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from tests.studies.glstm.invented import EVERYTHING, PRECISION, holding, invented, scale_settings, tables

from jacnorm.files import write_table
from jacnorm.report import intervals
from jacnorm.report.claims import SCALES, load_claims
from jacnorm.report.manifest import read_manifest
from jacnorm.report.verdicts import judge_claim, judge_study, read_verdicts
from jacnorm.step import run
from jacnorm.studies.glstm import cells, judge
from jacnorm.studies.glstm.networks import Cell, planned
from jacnorm.studies.glstm.settings import RecallSettings, StudySettings
from jacnorm.studies.glstm.tables import COLUMNS

STUDY = Path(judge.__file__).parent
CLAIMS = STUDY / "claims.yaml"
LEDGER = load_claims(CLAIMS)
NAMES = [f"C{number}" for number in range(1, 17)]
INF = math.inf

# The ledger: criterion -> bounds. Set before the judged runs; a change here is a change of what is claimed.
POSITIVE, NEGATIVE = (0.0, INF), (-INF, 0.0)
MARGINS = {
    ("C1", "ratio"): (-INF, 0.02),
    ("C1", "shallow-slope"): (-0.6, -0.4),
    ("C1", "decreases"): (-INF, 1.0),
    ("C2", "accuracy"): (0.99, INF),
    ("C3", "saturates"): (-INF, 0.95),
    ("C3", "gradually"): (3.0, INF),
    ("C3", "decreases"): NEGATIVE,
    ("C3", "every-step"): POSITIVE,
    ("C4", "at-16"): (0.2, INF),
    ("C4", "at-32"): (0.2, INF),
    ("C5", "imperfect"): (-INF, 0.9999),
    ("C5", "line"): (-INF, 0.05),
    ("C5", "glstm"): (0.95, INF),
    ("C5", "parameters"): (1, INF),
    ("C5", "memorised"): (0.99, INF),
    ("C5", "fresh"): (-INF, 0.05),
    ("C6", "norm"): (1.1, INF),
    ("C6", "accuracy"): (-INF, 0.02),
    ("C6", "per-output"): (1.1, INF),
    ("C6", "regression"): (1.1, INF),
    ("C7", "grows"): (1.0, INF),
    ("C7", "reported"): (1.0, INF),
    ("C8", "at-capacity"): (3.0, INF),
    ("C8", "overloaded"): (-INF, 1.5),
    ("C8", "gcn"): (-INF, 1.1),
    ("C9", "collapses"): (-INF, 0.2),
    ("C9", "against-gcn"): (50.0, INF),
    ("C10", "accuracy"): (0.2, INF),
    ("C11", "accuracy"): (-INF, 0.1),
    ("C12", "glstm"): (-INF, 0.3),
    ("C12", "gcn"): (0.9, INF),
    ("C13", "diam"): (-INF, -0.546),
    ("C13", "ecc"): (-INF, 0.286),
    ("C13", "sssp"): (-3.402, -1.132),
    ("C13", "trained-here"): POSITIVE,
    ("C14", "diam"): (0.5, INF),
    ("C14", "ecc"): (3.0, INF),
    ("C14", "sssp"): NEGATIVE,
    ("C14", "toy-fails"): POSITIVE,
    ("C14", "toy-contrast"): POSITIVE,
    ("C14", "toy-laplacian"): NEGATIVE,
    ("C14", "toy-distance"): NEGATIVE,
    ("C15", "func"): (0.7, INF),
    ("C15", "func-gcn"): (0.686, INF),
    ("C15", "struct-gcn"): (0.246, INF),
    ("C16", "gates"): (-0.02, 0.02),
    ("C16", "k-hop"): (0.1, INF),
}
SILENT = {
    ("C3", "every-step"),
    ("C5", "memorised"),
    ("C5", "fresh"),
    ("C6", "per-output"),
    ("C6", "regression"),
    ("C7", "reported"),
    ("C13", "trained-here"),
    ("C14", "toy-laplacian"),
    ("C14", "toy-distance"),
}
PAPER_ONLY = {("C4", "at-32"), ("C7", "grows")} | {
    (claim, label) for claim in ("C13", "C14") for label in ("diam", "ecc", "sssp")
}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Bootstrap intervals of C1 from fewer resamples, to save time."""
    monkeypatch.setattr(intervals, "RESAMPLES", 499)


def judged(name: str, content: dict[str, pd.DataFrame], scale: str = "laptop", settings: StudySettings = EVERYTHING):
    claim = LEDGER.claim(name)
    return judge_claim(claim, getattr(judge, claim.estimand)(content, settings), scale)


def outcomes(verdict, criterion):
    return {quantity.outcome.value for quantity in verdict.quantities if quantity.criterion == criterion}


def one(verdict, criterion, words=""):
    (found,) = [q for q in verdict.quantities if q.criterion == criterion and words in q.label]
    return found


def rows_at(content, name, cell):
    """Mask of the rows of a table that lie in a cell."""
    here = np.logical_and.reduce([(content[name][key] == value).to_numpy() for key, value in cell.items()])
    assert here.any()
    return here


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_margins_are_those_of_the_ledger():
    found = {(c.id, criterion.id): criterion.bounds for c in LEDGER.claims for criterion in c.criteria}
    assert found == MARGINS


def test_what_decides_how_sure_and_where():
    criteria = {(claim.id, c.id): c for claim in LEDGER.claims for c in claim.criteria}
    assert [claim.id for claim in LEDGER.claims] == NAMES
    assert {key for key, criterion in criteria.items() if not criterion.decides} == SILENT
    assert {criterion.confidence for criterion in criteria.values()} == {0.95}
    assert {key: criterion.interval for key, criterion in criteria.items() if criterion.interval != "t"} == {
        ("C1", "ratio"): "bootstrap",
        ("C1", "decreases"): "bootstrap",
        ("C5", "parameters"): "exact",
    }
    assert {key for key, c in criteria.items() if c.at == ("paper",)} == PAPER_ONLY
    least = {key: c.min_seeds for key, c in criteria.items() if c.interval != "exact"}
    assert least == {key: 5 if key[0] == "C1" else 3 for key in least}
    only_paper = {claim.id for claim in LEDGER.claims if claim.expected_at == ("paper",)}
    assert only_paper == {"C7", "C13", "C15", "C16"}
    assert {claim.id for claim in LEDGER.claims if "smoke" not in claim.expected_at} - only_paper == {"C11", "C12"}


def test_published_numbers_are_differences_of_those_in_the_tables_of_the_figures():
    from jacnorm.studies.glstm.figures import TABLE_GPP, TABLE_LRGB

    full, one_hop = TABLE_GPP["glstm", "none"], TABLE_GPP["glstm", "1-hop"]
    assert LEDGER.claim("C13").published.value == full["eccentricity"][0]
    expected = one_hop["eccentricity"][0] - full["eccentricity"][0]
    assert LEDGER.claim("C14").published.value == pytest.approx(expected)
    assert LEDGER.claim("C15").published.value == TABLE_LRGB["none"]["func"][0]
    gap = TABLE_LRGB["none"]["func"][0] - TABLE_LRGB["1-hop"]["func"][0]
    assert LEDGER.claim("C16").published.value == pytest.approx(gap)
    # A-DGN is the best of the others on the diameter and the first on SSSP.
    assert LEDGER.claim("C13").criterion("diam").margin == TABLE_GPP["adgn", "none"]["diameter"][0]
    assert LEDGER.claim("C13").criterion("sssp").low == TABLE_GPP["adgn", "none"]["sssp"][0]


# --- lines and cells -------------------------------------------------------------------------------------------------


def test_the_histogram_line_is_that_of_all_assignments_of_values():
    # Independent: the definition, by enumeration of all N^N assignments.
    for n in (1, 2, 3, 4, 5):
        assignments = itertools.product(range(n), repeat=n)
        best = [max(values.count(value) for value in values) for values in assignments]
        assert cells.histogram(n) == pytest.approx(np.mean(best) / n, rel=1e-12)
    assert cells.histogram(4) == pytest.approx(17 / 32, rel=1e-12)


@pytest.mark.parametrize(("n", "expected"), [(8, 0.324), (16, 0.192), (32, 0.110), (64, 0.062), (96, 0.044)])
def test_the_histogram_line_at_larger_numbers(n, expected):
    assert cells.histogram(n) == pytest.approx(expected, abs=1e-3)
    rng = np.random.default_rng(n)  # independent: draws
    counts = rng.multinomial(n, np.full(n, 1 / n), size=20_000).max(axis=1) / n
    assert cells.histogram(n) == pytest.approx(counts.mean(), abs=5 * counts.std() / math.sqrt(20_000))


def test_lines_of_the_regression_task():
    assert cells.mean_line(4) == 0.75
    assert cells.memory_line(32, 8) == 0.75
    assert cells.memory_line(8, 8) == cells.memory_line(4, 8) == 0.0


def test_planned_cells_of_the_settings():
    settings = RecallSettings(
        neighbours=[8, 4],
        memories=[8],
        further_memories=[8, 16],
        further_neighbours=[16],
        one_hop_memories=[8],
        one_hop_neighbours=[8],
        baselines=["gatv2"],
        widths=[32, 64],
        baselines_k_hop=True,
        depths=[3],
        depth_neighbours=[16],
        fresh_controls=[8],
    )
    glstm = {Cell("glstm", 8, True): [4, 8, 16], Cell("glstm", 16, True): [16], Cell("glstm", 8, False): [8]}
    others = {Cell("gatv2", d, hop): [4, 8] for d in (32, 64) for hop in (False, True)}
    controls = {Cell("gcn", 32, False, 3): [16], Cell("gcn", 64, False, 2, "fresh"): [8]}
    assert planned(settings) == glstm | others | controls
    fresh = settings.model_copy(update={"data": "fresh", "one_hop_neighbours": []})
    assert {cell.data for cell in planned(fresh)} == {"fresh"}
    assert Cell("glstm", 8, False, 2, "fresh") not in planned(fresh)


def test_cells_in_words():
    assert cells.words(Cell("glstm", 8, True)) == "gLSTM M = 8"
    assert cells.words(Cell("glstm", 8, False)) == "gLSTM M = 8, 1-hop"
    assert cells.words(Cell("gcn", 64, True, 3)) == "GCN d = 64, 3 layers, K-hop"
    assert cells.words(Cell("gatedgcn", 64, False, 2, "fresh")) == "GatedGCN d = 64, fresh graphs"


def test_budget_words_count_runs_that_ended_by_the_budget():
    fits = pd.DataFrame({"steps": [100, 100, 90, 100], "train_score": [0.5, 0.995, 0.3, math.nan]})
    fits["diverged_at"] = [-1, -1, -1, 40]
    words = "; confounded_by_budget: {} of 4 trainings not converged in 100 updates"
    assert cells.budget_words(fits, 100, score="train_score") == words.format(1)
    assert cells.budget_words(fits, 100) == words.format(2)
    assert cells.budget_words(fits, 101) == ""
    epochs = fits.rename(columns={"steps": "epochs"})
    assert cells.budget_words(epochs, 100, "epochs").endswith("2 of 4 trainings not converged in 100 epochs")


# --- every scale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_every_claim_can_hold_where_everything_is_measured(scale):
    found = judge_study(CLAIMS, judge, holding(), EVERYTHING, scale)
    expected = {c.id: "reproduced" if scale in c.expected_at else "inconclusive" for c in LEDGER.claims}
    if scale != "paper":  # their deciding criteria are asked at the paper's scale only
        expected |= dict.fromkeys(["C7", "C13"], "not tested")
    assert {claim.claim.id: claim.verdict.value for claim in found.claims} == expected
    for claim in found.claims:
        assert {q.criterion for q in claim.quantities} == {c.id for c in claim.claim.criteria if scale in c.at}
        assert {q.outcome.value for q in claim.quantities} == {"holds"}
        assert all(runs.complete for runs in claim.runs)
        assert not any("confounded" in q.label for q in claim.quantities)


@pytest.mark.parametrize("scale", SCALES)
def test_what_a_scale_plans_can_hold_and_what_it_does_not_is_not_tested_with_a_reason(scale):
    settings = scale_settings(scale)
    found = judge_study(CLAIMS, judge, invented(settings), settings, scale)
    decided = {c.claim.id for c in found.claims if c.verdict.value == "reproduced"}
    archive = {"C13", "C14"} if scale == "paper" else set()  # no archive is given
    assert decided == {c.id for c in LEDGER.claims if scale in c.expected_at} - archive
    for claim in found.claims:
        assert {q.outcome.value for q in claim.quantities} <= {"holds", "not tested"}
        assert all(q.outcome.value == "holds" or q.reason for q in claim.quantities)


@pytest.mark.parametrize("name", NAMES)
def test_without_rows_a_claim_is_not_tested(name):
    empty = {table: rows.iloc[:0] for table, rows in tables().items()}
    verdict = judged(name, empty, "paper")
    assert verdict.verdict.value == "not tested"
    assert all(quantity.reason for quantity in verdict.quantities)


def test_without_its_table_a_claim_is_not_tested():
    missing = {"C12": "narr_fits", "C15": "peptides_fits", "C16": "peptides_fits"}
    content = {key: rows for key, rows in tables().items() if key not in missing.values()}
    content["trees"] = content["trees"].iloc[:0]  # spares its bootstrap
    found = judge_study(CLAIMS, judge, content, EVERYTHING, "laptop")
    for verdict in found.claims:
        if verdict.claim.id in missing:
            table = missing[verdict.claim.id]
            assert verdict.verdict.value == "not tested"
            assert verdict.reasons == [f"Table '{table}' was not made at scale laptop."]


def test_without_the_regression_task_c6_says_so_and_still_decides():
    content = {name: rows for name, rows in tables().items() if not name.startswith("narr")}
    verdict = judged("C6", content)
    assert verdict.verdict.value == "reproduced"
    assert one(verdict, "regression").reason == "no GCN was trained in the regression task at N = 16 and 32"


def test_smoke_as_it_is_planned():
    settings = scale_settings("smoke")
    content = invented(settings)
    reasons = {
        ("C5", "fresh"): None,  # not asked at smoke
        ("C13", "trained-here"): "no other network was trained on graph properties",
        ("C11", "accuracy"): "no GCNs with different numbers of layers were trained at N = 16",
    }
    for (name, criterion), reason in reasons.items():
        found = [q for q in judged(name, content, "smoke", settings).quantities if q.criterion == criterion]
        assert [q.reason for q in found] == ([] if reason is None else [reason])


# --- one cell after the other ----------------------------------------------------------------------------------------
# (claim, criterion, table, cell, column, change, by): added to the numbers of all seeds (or to their logs) it makes the
# criterion fail, and with signs that differ between seeds it makes the interval straddle the margin.

DEEP, STAR = {"activation": "relu", "shape": "deep"}, {"activation": "relu", "shape": "shallow"}
G8, G16 = ({"model": "glstm", "size": size, "k_hop": True} for size in (8, 16))
GCN = {"model": "gcn", "size": 64, "k_hop": False, "layers": 2, "data": "fixed"}
FULL, VALUE = {"part": "full"}, {"part": "value"}
NO_HOP, WHOLE = {"model": "glstm", "ablation": "1-hop"}, {"model": "glstm", "ablation": "none"}


def at(cell, n, **more):
    return {**cell, "neighbours": n, **more}


def archive(column, which):
    return {"source": "archive", "column": column, **which}


def toy(task, which):
    return {"source": "generated", "task": task, **which}


CHANGES = [
    ("C1", "ratio", "trees", {**DEEP, "leaves": 128}, "norm", 5.0, "log"),
    ("C1", "shallow-slope", "trees", {**STAR, "leaves": 128}, "norm", 2.0, "log"),
    ("C1", "decreases", "trees", {**DEEP, "leaves": 32}, "norm", 2.5, "log"),
    ("C2", "accuracy", "nar_fits", at(G8, 8), "test_score", -0.1, ""),
    ("C3", "saturates", "nar_fits", at(G8, 16), "test_score", 0.4, ""),
    ("C3", "gradually", "nar_fits", at(G16, 32), "test_score", -0.4, ""),
    ("C3", "decreases", "nar_fits", at(G16, 64), "test_score", 1.5, ""),
    ("C3", "every-step", "nar_fits", at(G16, 64), "test_score", 0.5, ""),
    ("C4", "at-16", "nar_fits", at(G8, 16), "test_score", 0.3, ""),
    ("C4", "at-32", "nar_fits", at(G16, 32), "test_score", 0.3, ""),
    ("C5", "imperfect", "nar_fits", at(GCN, 8), "test_score", 0.75, ""),
    ("C5", "line", "nar_fits", at(GCN, 16), "test_score", 0.15, ""),
    ("C5", "glstm", "nar_fits", at(G16, 16), "test_score", -0.1, ""),
    ("C5", "parameters", "nar_fits", at(GCN, 16), "parameters", -20_000, ""),
    ("C5", "memorised", "nar_fits", at(GCN, 16), "train_score", -0.1, ""),
    ("C5", "fresh", "nar_fits", at({**GCN, "data": "fresh"}, 16), "test_score", 0.15, ""),
    ("C6", "norm", "nar_jacobians", at(GCN, 32, **FULL), "mean", -2.0, "log"),
    ("C6", "accuracy", "nar_fits", at(GCN, 32), "test_score", 0.2, ""),
    ("C6", "per-output", "nar_jacobians", at(GCN, 16, **FULL), "mean", 0.5, "log"),
    ("C6", "regression", "narr_jacobians", at(GCN, 32, **FULL), "mean", -2.0, "log"),
    ("C7", "grows", "nar_jacobians", at(G8, 16, **FULL), "mean", -2.0, "log"),
    ("C7", "reported", "nar_jacobians", at(G8, 16, **FULL), "mean", -2.0, "log"),
    ("C8", "at-capacity", "nar_jacobians", at(G8, 8, **VALUE), "log_ratio", -1.0, ""),
    ("C8", "overloaded", "nar_jacobians", at(G8, 32, **VALUE), "log_ratio", 1.0, ""),
    ("C8", "gcn", "nar_jacobians", at(GCN, 64, **VALUE), "log_ratio", 0.3, ""),
    ("C9", "collapses", "nar_hessians", at(G8, 32), "largest_absolute", 3.0, "log"),
    ("C9", "against-gcn", "nar_hessians", at(GCN, 8), "largest_absolute", 4.0, "log"),
    ("C10", "accuracy", "nar_fits", at({**G8, "k_hop": False}, 8), "test_score", 0.4, ""),
    ("C11", "accuracy", "nar_fits", {"layers": 4}, "test_score", 0.3, ""),
    ("C12", "glstm", "narr_fits", at(G16, 16), "test_score", 0.3, ""),
    ("C12", "gcn", "narr_fits", at(GCN, 32), "test_score", -0.3, ""),
    ("C13", "diam", "gpp_fits", archive("diameter", WHOLE), "test_error", 0.5, ""),
    ("C13", "ecc", "gpp_fits", archive("eccentricity", WHOLE), "test_error", 5.0, ""),
    ("C13", "sssp", "gpp_fits", archive("sssp", WHOLE), "test_error", 2.0, ""),
    ("C13", "trained-here", "gpp_fits", toy("eccentricity", {"model": "adgn"}), "test_error", -1.0, ""),
    ("C14", "diam", "gpp_fits", archive("diameter", NO_HOP), "test_error", -0.5, ""),
    ("C14", "ecc", "gpp_fits", archive("eccentricity", NO_HOP), "test_error", -3.0, ""),
    ("C14", "sssp", "gpp_fits", archive("sssp", NO_HOP), "test_error", 1.5, ""),
    ("C14", "toy-fails", "gpp_fits", toy("diameter", NO_HOP), "test_error", -2.0, ""),
    ("C14", "toy-contrast", "gpp_fits", toy("laplacian", NO_HOP), "test_error", 3.0, ""),
    ("C14", "toy-laplacian", "gpp_fits", toy("laplacian", NO_HOP), "test_error", 0.5, ""),
    ("C14", "toy-distance", "gpp_fits", toy("sssp", NO_HOP), "test_error", 0.5, ""),
    ("C15", "func", "peptides_fits", {"task": "func", "ablation": "none"}, "test_score", -0.03, ""),
    ("C15", "func-gcn", "peptides_fits", {"task": "func", "ablation": "none"}, "test_score", -0.05, ""),
    ("C15", "struct-gcn", "peptides_fits", {"task": "struct", "ablation": "none"}, "test_score", -0.01, ""),
    ("C16", "gates", "peptides_fits", {"task": "func", "ablation": "no-input-gate"}, "test_score", -0.05, ""),
    ("C16", "k-hop", "peptides_fits", {"task": "func", "ablation": "1-hop"}, "test_score", 0.05, ""),
]


def scale_of(claim, criterion):
    return "paper" if (claim, criterion) in PAPER_ONLY or claim in ("C15", "C16") else "laptop"


def changed(name, cell, column, amount, by, signs=(1.0, 1.0)):
    content = tables()
    rows = content[name]
    here = rows_at(content, name, cell)
    step = np.where(here, amount * np.where(rows.seed % 2 == 0, *signs), 0.0)
    rows[column] = rows[column] * np.exp(step) if by == "log" else rows[column] + step
    return content


@pytest.mark.parametrize(("claim", "criterion", "name", "cell", "column", "amount", "by"), CHANGES)
def test_a_criterion_fails_when_its_numbers_leave_the_margin(claim, criterion, name, cell, column, amount, by):
    scale = scale_of(claim, criterion)
    verdict = judged(claim, changed(name, cell, column, amount, by), scale)
    assert "fails" in outcomes(verdict, criterion)
    declared = LEDGER.claim(claim)
    if declared.criterion(criterion).decides:
        assert verdict.verdict.value == "contradicted"
    elif scale in declared.expected_at:
        # Another criterion may read the same numbers; this one alone contradicts nothing.
        deciding = {q.outcome.value for q in verdict.deciding}
        assert (verdict.verdict.value == "contradicted") == ("fails" in deciding)
    else:
        assert verdict.verdict.value == "not tested"


# Unequal signs of even and odd seeds, so that neither an even nor an odd number of them has its mean where it was.
# Means of C1 are of norms, not of their logs.
SIGNS = {"C1": (0.7, -0.5)}


@pytest.mark.parametrize(
    ("claim", "criterion", "name", "cell", "column", "amount", "by"),
    [change for change in CHANGES if change[:2] != ("C5", "parameters")],
)
def test_a_criterion_straddles_when_seeds_disagree(claim, criterion, name, cell, column, amount, by):
    content = changed(name, cell, column, amount, by, SIGNS.get(claim, (1.5, -0.5)))
    verdict = judged(claim, content, scale_of(claim, criterion))
    assert "straddles" in outcomes(verdict, criterion)
    assert "fails" not in outcomes(verdict, criterion)


def test_every_criterion_of_the_ledger_is_changed_above():
    assert [change[:2] for change in CHANGES] == list(MARGINS)


# --- which rows a claim reads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "name", "cell", "columns"),
    [
        ("C2", "nar_fits", at(G8, 16), ["test_score"]),
        ("C2", "nar_fits", {"model": "glstm", "k_hop": False}, ["test_score"]),
        ("C3", "nar_fits", {"model": "gcn"}, ["test_score"]),
        ("C5", "nar_fits", {"model": "gcn", "size": 32}, ["test_score", "parameters"]),
        ("C5", "nar_fits", {"model": "gatedgcn"}, ["test_score", "parameters"]),
        ("C5", "nar_fits", {"model": "gcn", "k_hop": True}, ["test_score"]),
        ("C6", "nar_jacobians", {"part": "value"}, ["mean"]),
        ("C6", "nar_jacobians", {"model": "gcn", "k_hop": True}, ["mean"]),
        ("C6", "nar_jacobians", {"model": "gcn", "data": "fresh"}, ["mean"]),
        ("C6", "nar_jacobians", {"model": "gcn", "layers": 4}, ["mean"]),
        ("C8", "nar_jacobians", {"model": "gcn", "k_hop": True}, ["log_ratio"]),
        ("C8", "nar_jacobians", {"part": "full"}, ["log_ratio"]),
        ("C8", "nar_jacobians", {"part": "value"}, ["ratio"]),
        ("C9", "nar_hessians", {"model": "glstm"}, ["largest", "mean", "frobenius"]),
        ("C10", "nar_fits", at({"model": "glstm", "size": 8, "k_hop": False}, 16), ["test_score"]),
        ("C11", "nar_fits", {"model": "gcn", "size": 64}, ["test_score"]),
        ("C12", "narr_fits", at(G8, 16), ["test_score"]),
        ("C13", "gpp_fits", {"source": "generated", "model": "glstm", "ablation": "no-gates"}, ["test_error"]),
        ("C14", "gpp_fits", {"model": "gcn"}, ["test_error"]),
        ("C16", "peptides_fits", {"task": "struct"}, ["test_score"]),
        ("C16", "peptides_fits", {"ablation": "no-gates"}, ["test_score"]),
    ],
)
def test_rows_of_other_cells_do_not_enter(claim, name, cell, columns):
    content = tables()
    content[name].loc[rows_at(content, name, cell), columns] = 1000
    assert judged(claim, content) == judged(claim, tables())


def test_norms_of_c1_are_compared_by_their_means():
    content = tables()
    rows = content["trees"]
    rng = np.random.default_rng(1)
    rows["norm"] *= np.exp(rng.normal(0, 0.2, len(rows)))
    rows.loc[(rows["shape"] == "shallow") & (rows.leaves < 8), "norm"] *= 7.0  # outside the slope's range
    verdict = judged("C1", content)
    means = rows.groupby(["activation", "shape", "leaves"]).norm.mean()
    found = one(verdict, "ratio", "gelu")
    assert found.label == "gelu, 128 leaves"
    assert found.estimate == pytest.approx(means["gelu", "deep", 128] / means["gelu", "shallow", 128])
    ratios = (means["tanh", "deep"] / means["tanh", "shallow"]).to_numpy()
    assert one(verdict, "decreases", "tanh").estimate == pytest.approx(max(ratios[1:] / ratios[:-1]))
    many = rows[(rows.activation == "relu") & (rows["shape"] == "shallow") & (rows.leaves >= 8)]
    expected = [np.polyfit(np.log(each.leaves), np.log(each.norm), 1)[0] for _, each in many.groupby("seed")]
    assert one(verdict, "shallow-slope", "relu").samples == pytest.approx(expected, abs=1e-12)


def test_c3_falls_by_doublings_of_n():
    verdict = judged("C3", tables())
    found = one(verdict, "decreases", "M = 16")
    assert found.label == "gLSTM M = 16, N = 16, 32, 64"
    rows = tables()["nar_fits"]
    rows = rows[(rows.model == "glstm") & rows.k_hop & (rows["size"] == 16) & (rows.neighbours >= 16)]
    expected = [np.polyfit(np.log2(each.neighbours), each.test_score, 1)[0] for _, each in rows.groupby("seed")]
    assert found.samples == pytest.approx(expected, abs=1e-12)
    falls = [-np.diff(each.sort_values("neighbours").test_score).max() for _, each in rows.groupby("seed")]
    assert one(verdict, "every-step", "M = 16").samples == pytest.approx(falls)


def test_c5_compares_numbers_of_parameters():
    found = one(judged("C5", tables()), "parameters")
    assert found.label == "GCN d = 64 with 16544, gLSTM M = 16 with 3232, N = 16"
    assert found.samples == [16544 - 3232]


def test_c6_divides_by_the_number_of_outputs():
    verdict = judged("C6", tables())
    norm, per_output = (one(verdict, criterion, "d = 64").estimate for criterion in ("norm", "per-output"))
    assert norm == pytest.approx(2**1.5)
    assert per_output == pytest.approx(norm / 2)
    assert one(verdict, "norm", "d = 64").statistic == "geometric mean"


def test_c7_takes_the_last_n_that_is_recalled_and_the_first_that_is_not():
    assert {q.label for q in judged("C7", tables(), "paper").quantities} == {
        f"gLSTM M = {size}, N = {2 * size} against gLSTM M = {size}, N = {size}" for size in (8, 16, 32)
    }
    content = tables()
    content["nar_fits"].loc[rows_at(content, "nar_fits", at(G8, 16)), "test_score"] = 0.97  # neither nor
    assert "gLSTM M = 8, N = 32 against gLSTM M = 8, N = 8" in {
        q.label for q in judged("C7", content, "paper").quantities
    }
    content["nar_fits"]["test_score"] = 1.0
    reason = "no gLSTM has an N with accuracy of 0.99 or more and a larger one with less than 0.95"
    assert one(judged("C7", content, "paper"), "grows").reason == reason


def test_ratios_of_c8_are_geometric_means_over_graphs():
    content = tables()
    rows = content["nar_jacobians"]
    here = rows_at(content, "nar_jacobians", at(G8, 8, **VALUE))
    found = one(judged("C8", content), "at-capacity", "M = 8")
    assert found.samples == pytest.approx(np.exp(rows[here].groupby("seed").log_ratio.mean()))
    assert found.statistic == "geometric mean"


def test_a_toy_is_called_one_and_the_archive_by_its_names_and_what_they_hide():
    verdict = judged("C14", tables(), "paper")
    label = one(verdict, "sssp").label
    assert label == "the benchmark's archive, its sssp, found to be laplacian; a constant: 1.10"
    label = one(judged("C14", tables()), "toy-contrast").label
    assert label == "toy, generated graphs of 8 to 12 nodes, eccentricity, laplacian; a constant: 1.10"
    content = tables()
    content["gpp_fits"] = content["gpp_fits"][content["gpp_fits"].source == "generated"]
    verdict = judged("C14", content, "paper")
    assert verdict.verdict.value == "not tested"
    assert {q.reason for q in verdict.quantities} == {judge.NO_ARCHIVE}


def test_the_toy_contrast_is_a_difference_of_differences():
    rows = tables()["gpp_fits"]
    rows = rows[(rows.source == "generated") & (rows.model == "glstm")]
    errors = rows.pivot(index="seed", columns=["task", "ablation"], values="test_error")
    gaps = {task: errors[task, "1-hop"] - errors[task, "none"] for task in ("eccentricity", "laplacian")}
    found = one(judged("C14", tables()), "toy-contrast")
    assert found.samples == pytest.approx((gaps["eccentricity"] - gaps["laplacian"]).tolist())
    assert (found.runs.planned, found.runs.finished) == (12, 12)


def test_labels_of_peptides_name_parameters_and_ablations():
    found = one(judged("C16", tables(), "paper"), "k-hop")
    assert found.label == "Peptides-func, full gLSTM against 1-hop, 499000 parameters"
    assert found.estimate == pytest.approx(PRECISION["none"] - PRECISION["1-hop"], abs=1e-3)


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_what_rests_on_runs_that_the_budget_ended_says_so():
    content = tables()
    fits = content["nar_fits"]
    here = rows_at(content, "nar_fits", at(GCN, 16))
    fits.loc[here, ["steps", "train_score"]] = [EVERYTHING.nar.steps, 0.3]
    words = "confounded_by_budget: 3 of {} trainings not converged in 1200 updates"
    verdict = judged("C5", content)
    assert verdict.verdict.value == "reproduced"
    assert one(verdict, "line").label == f"GCN d = 64, N = 16; {words.format(3)}"
    assert "confounded" not in one(verdict, "glstm").label
    assert one(judged("C6", content), "norm", "d = 64").label.endswith(words.format(6))
    assert one(judged("C8", content), "gcn", "d = 64, N = 16").label.endswith(words.format(3))
    fits.loc[here, "train_score"] = 0.99  # nothing more to learn from these graphs
    assert "confounded" not in one(judged("C5", content), "line").label


def test_errors_have_no_accuracy_to_converge_by():
    content = tables()
    content["narr_fits"][["steps", "train_score"]] = [EVERYTHING.narr.steps, 1.0]
    content["gpp_fits"]["steps"] = EVERYTHING.gpp.steps
    content["peptides_fits"]["epochs"] = EVERYTHING.peptides.epochs
    assert one(judged("C12", content), "glstm").label.endswith("3 of 3 trainings not converged in 1200 updates")
    assert one(judged("C14", content), "toy-contrast").label.endswith("12 of 12 trainings not converged in 240 updates")
    label = one(judged("C15", content, "paper"), "func").label
    assert label.endswith("confounded_by_budget: 3 of 3 trainings not converged in 1500 epochs")


# --- what is lost, diverged or not a number --------------------------------------------------------------------------


def test_a_lost_run_takes_its_seed_out_of_a_slope_and_is_counted():
    content = tables()
    content["nar_fits"] = content["nar_fits"][~rows_at(content, "nar_fits", at(G16, 32, seed=11))]
    verdict = judged("C3", content)
    found = one(verdict, "decreases", "M = 16")
    assert found.seeds == [10, 12]
    assert (found.runs.planned, found.runs.finished, found.runs.lost) == (9, 6, 1)
    assert found.runs.excluded == {"another run of the seed is lost": 2}
    assert found.outcome.value == "undecided"  # two seeds are too few
    assert one(verdict, "decreases", "M = 8").runs.complete


def test_a_pair_of_which_one_run_is_lost_is_dropped_and_counted():
    content = tables()
    content["nar_fits"] = content["nar_fits"][~rows_at(content, "nar_fits", at(G8, 16, seed=12))]
    found = one(judged("C4", content), "at-16")
    assert found.seeds == [10, 11]
    assert (found.runs.planned, found.runs.finished, found.runs.lost) == (6, 5, 1)


def test_a_network_that_was_trained_and_not_measured_is_lost_to_its_jacobians():
    content = tables()
    gone = rows_at(content, "nar_jacobians", at(GCN, 32, seed=12))
    content["nar_jacobians"] = content["nar_jacobians"][~gone]
    found = one(judged("C6", content), "norm", "d = 64")
    assert found.seeds == [10, 11]
    assert (found.runs.planned, found.runs.finished, found.runs.lost) == (6, 5, 1)


def test_a_lost_draw_of_c1_is_counted():
    content = tables()
    lost = rows_at(content, "trees", {"seed": 12, "activation": "relu", "shape": "deep", "leaves": 16})
    content["trees"] = content["trees"][~lost]
    found = one(judged("C1", content), "shallow-slope", "relu")
    assert 12 not in found.seeds
    assert (found.runs.planned, found.runs.finished) == (8, 7)
    assert found.runs.excluded == {"another run of the seed is lost": 1}


@pytest.mark.parametrize(
    ("claim", "criterion", "words", "name", "cell", "column"),
    [
        ("C5", "line", "", "nar_fits", at(GCN, 16, seed=11), "test_score"),
        ("C12", "glstm", "", "narr_fits", at(G16, 16, seed=11), "test_score"),
        ("C14", "toy-fails", "eccentricity", "gpp_fits", {**toy("eccentricity", NO_HOP), "seed": 11}, "test_error"),
        ("C16", "k-hop", "", "peptides_fits", {"task": "func", "ablation": "1-hop", "seed": 11}, "test_score"),
    ],
)
def test_a_training_that_diverged_is_counted_and_leaves_its_claim_open(claim, criterion, words, name, cell, column):
    content = tables()
    content[name].loc[rows_at(content, name, cell), ["diverged_at", column]] = [40, math.nan]
    verdict = judged(claim, content, "paper" if claim == "C16" else "laptop")
    found = one(verdict, criterion, words)
    assert found.runs.diverged == 1
    assert found.runs.planned == found.runs.finished + 1
    assert (found.outcome.value, found.not_a_number) == ("undecided", 1)
    assert verdict.verdict.value == "inconclusive"


@pytest.mark.parametrize(
    ("claim", "name", "column"),
    [
        ("C1", "trees", "norm"),
        ("C2", "nar_fits", "test_score"),
        ("C3", "nar_fits", "test_score"),
        ("C6", "nar_jacobians", "mean"),
        ("C8", "nar_jacobians", "log_ratio"),
        ("C9", "nar_hessians", "largest_absolute"),
        ("C10", "nar_fits", "test_score"),
        ("C11", "nar_fits", "test_score"),
        ("C12", "narr_fits", "test_score"),
        ("C14", "gpp_fits", "test_error"),
        ("C16", "peptides_fits", "test_score"),
    ],
)
def test_a_nan_is_never_dropped(claim, name, column):
    content = tables()
    rows = content[name]
    graphs = rows.graph == 1 if "graph" in rows else True  # one graph of several
    rows.loc[(rows.seed == 11) & graphs, column] = math.nan
    verdict, before = judged(claim, content), judged(claim, tables())
    assert verdict.verdict.value == "inconclusive"
    assert [len(q.samples) for q in verdict.quantities] == [len(q.samples) for q in before.quantities]
    assert any(q.not_a_number for q in verdict.quantities)


# --- the step --------------------------------------------------------------------------------------------------------


def test_the_step_judges_tables_from_files(tmp_path):
    for name, rows in holding().items():
        write_table(tmp_path / "tables" / f"{name}-s10-17.parquet", rows, COLUMNS[name])
    words = ["--scale", "laptop", "--settings", json.dumps(EVERYTHING.model_dump())]
    words += ["--tables", *sorted((tmp_path / "tables").glob("*.parquet")), "--data"]
    words += ["--verdicts", tmp_path / "verdicts.json", "--manifest", tmp_path / "manifest.json"]
    run({"judge": judge.judge}, list(map(str, words)))
    found = read_verdicts(tmp_path / "verdicts.json")
    assert found == judge_study(CLAIMS, judge, holding(), EVERYTHING, "laptop")
    manifest = read_manifest(tmp_path / "manifest.json")
    assert manifest.data == []
    assert len(manifest.departures) == len(yaml.safe_load((STUDY / "departures.yaml").read_text()))
