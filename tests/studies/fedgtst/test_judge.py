"""Each claim from invented tables: one set that satisfies all of them, then changed cell by cell."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from tests.studies.fedgtst.invented import EVERYTHING, holding, invented, scale_settings, tables

from jacnorm.files import write_table
from jacnorm.report import intervals
from jacnorm.report.claims import load_claims
from jacnorm.report.manifest import read_manifest
from jacnorm.report.verdicts import judge_claim, judge_study, read_verdicts
from jacnorm.step import run
from jacnorm.studies.fedgtst import judge, selection
from jacnorm.studies.fedgtst.settings import StudySettings
from jacnorm.studies.fedgtst.tables import COLUMNS

STUDY = Path(judge.__file__).parent
CLAIMS = STUDY / "claims.yaml"
LEDGER = load_claims(CLAIMS)
NAMES = [f"G{number}" for number in range(1, 18)]
INF = math.inf

# The ledger: criterion -> bounds. Set before the judged runs; a change here is a change of what is claimed.
MORE, LESS, NONE = (0.0, INF), (-INF, 0.0), (-INF, 0.0)
ABOVE_ONE, BELOW_ONE, SCALAR = (1.0, INF), (-INF, 1.0), (8.0, 8.0)
MARGINS = {
    ("G1", "violations"): NONE,
    ("G2", "violations"): NONE,
    ("G3", "printed"): NONE,
    ("G3", "corrected"): NONE,
    ("G4", "violations"): NONE,
    ("G5", "chosen"): ABOVE_ONE,
    ("G5", "sweep"): ABOVE_ONE,
    ("G5", "mean-guide"): ABOVE_ONE,
    ("G6", "chosen"): BELOW_ONE,
    ("G6", "sweep"): BELOW_ONE,
    ("G6", "mean-guide"): BELOW_ONE,
    ("G7", "together"): MORE,
    ("G7", "norms"): BELOW_ONE,
    ("G7", "directions"): BELOW_ONE,
    ("G7", "norm-share"): (-INF, 0.05),
    ("G8", "fedavg"): MORE,
    ("G8", "fedsr"): MORE,
    ("G8", "fediir"): MORE,
    ("G8", "mean-guide"): MORE,
    ("G9", "fediir"): (4.6, 10.6),
    ("G9", "fedsr"): (6.8, 12.8),
    ("G10", "accuracy"): LESS,
    ("G10", "gain"): MORE,
    ("G10", "gain-fedavg"): MORE,
    ("G11", "difference"): MORE,
    ("G12", "helps"): MORE,
    ("G12", "close"): (-2.0, 2.0),
    ("G12", "trend"): MORE,
    ("G12", "fedavg"): MORE,
    ("G13", "fedavg"): MORE,
    ("G13", "fedgtst"): MORE,
    ("G14", "scaffold"): MORE,
    ("G14", "dirichlet"): MORE,
    ("G14", "domains"): MORE,
    ("G15", "down"): SCALAR,
    ("G15", "up"): SCALAR,
    ("G15", "flower"): SCALAR,
    ("G15", "share"): (-INF, 0.001),
    ("G16", "fedavg"): MORE,
    ("G16", "others"): MORE,
    ("G17", "weights"): (-INF, 1e-5),
    ("G17", "guide"): (-INF, 1e-5),
}
SILENT = {
    ("G3", "corrected"),
    ("G5", "sweep"),
    ("G5", "mean-guide"),
    ("G6", "sweep"),
    ("G6", "mean-guide"),
    ("G7", "norms"),
    ("G7", "directions"),
    ("G7", "norm-share"),
    ("G8", "mean-guide"),
    ("G10", "gain-fedavg"),
    ("G12", "trend"),
    ("G12", "fedavg"),
    ("G16", "others"),
}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Bootstrap intervals of G7 from fewer resamples, to save time."""
    monkeypatch.setattr(intervals, "RESAMPLES", 499)


def judged(name: str, content: dict[str, pd.DataFrame], scale: str = "paper", settings: StudySettings = EVERYTHING):
    claim = LEDGER.claim(name)
    return judge_claim(claim, getattr(judge, claim.estimand)(content, settings), scale)


def of(verdict, criterion, words=""):
    return [q for q in verdict.quantities if q.criterion == criterion and words in q.label]


def one(verdict, criterion, words=""):
    (found,) = of(verdict, criterion, words)
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
    exact = {
        claim for claim, _ in criteria if all(c.interval == "exact" for key, c in criteria.items() if key[0] == claim)
    }
    assert exact == {"G1", "G2", "G3", "G4", "G15", "G17"}
    assert {key for key, c in criteria.items() if c.interval == "bootstrap"} == {("G7", "together")}
    assert {c.min_seeds for c in criteria.values() if c.interval != "exact"} == {3}
    assert {key for key, c in criteria.items() if c.at == ("paper",)} == {("G14", "domains")}
    assert {c.id for c in LEDGER.claims if c.expected_at == ("paper",)} == {"G9", "G11"}
    assert {c.id for c in LEDGER.claims if "smoke" not in c.expected_at} == {"G8", "G9", *NAMES[9:14]}


# --- every scale -----------------------------------------------------------------------------------------------------


def test_every_claim_can_hold_where_everything_is_measured():
    found = judge_study(CLAIMS, judge, holding(), EVERYTHING, "paper")
    assert {claim.claim.id: claim.verdict.value for claim in found.claims} == dict.fromkeys(NAMES, "reproduced")
    for claim in found.claims:
        assert {q.criterion for q in claim.quantities} == {c.id for c in claim.claim.criteria}
        assert {q.outcome.value for q in claim.quantities} == {"holds"}
        assert all(runs.complete for runs in claim.runs)


@pytest.mark.parametrize("scale", ["smoke", "laptop"])
def test_what_a_scale_plans_can_hold_and_what_it_does_not_is_not_tested_with_a_reason(scale):
    settings = scale_settings(scale)
    found = judge_study(CLAIMS, judge, invented(settings), settings, scale)
    decided = {c.claim.id for c in found.claims if c.verdict.value == "reproduced"}
    assert {c.id for c in LEDGER.claims if "smoke" in c.expected_at} <= decided
    for claim in found.claims:
        assert {q.outcome.value for q in claim.quantities} <= {"holds", "not tested"}
        assert all(q.outcome.value == "holds" or q.reason for q in claim.quantities)


@pytest.mark.parametrize("name", NAMES)
def test_without_rows_a_claim_is_not_tested(name):
    empty = {table: rows.iloc[:0] for table, rows in holding().items()}
    verdict = judged(name, empty)
    assert verdict.verdict.value == "not tested"
    assert all(quantity.reason for quantity in verdict.quantities)


def test_without_its_table_a_claim_is_not_tested():
    content = {name: rows for name, rows in holding().items() if name.startswith(("bounds", "engines"))}
    found = judge_study(CLAIMS, judge, content, EVERYTHING, "laptop")
    for verdict in found.claims:
        missing = [table for table in verdict.claim.evidence_tables if table not in content]
        assert bool(missing) == (verdict.verdict.value == "not tested")
        if missing:
            assert verdict.reasons == [f"Table '{missing[0]}' was not made at scale laptop."]


# --- one cell after the other ----------------------------------------------------------------------------------------
# (claim, criterion, table, cell, column, change, by): added to the numbers of all seeds (or to their logs) it makes the
# criterion fail, and with signs that differ between seeds it makes the interval straddle the margin.

FIXED, OPTIMAL = {"rule": "fixed", "rate": 1.0, "round": 3}, {"rule": "optimal", "round": 3}
STATS, MOVED, FITS, SEEN = "federated_statistics", "federated_transfer", "federated_runs", "target_accuracy"
SMALL = {"network": "lenet", "clients": 10}
CHOSEN = {"method": "fedgtst", "coefficient": 1e-3}
FLOWER, LOOP = {"method": "fedgtst", "engine": "flower"}, {"method": "fedgtst", "engine": "loop"}


def by(method, **more):
    return {"network": "lenet", "method": method, "features": "trained", **more}


CHANGES = [
    ("G1", "violations", "bounds", FIXED, "decrease", -1.0, ""),
    ("G2", "violations", "bounds", OPTIMAL, "decrease", -1.0, ""),
    ("G3", "printed", "bounds", OPTIMAL, "printed", 1.0, ""),
    ("G3", "corrected", "bounds", OPTIMAL, "corrected", 1.0, ""),
    ("G4", "violations", "bounds", FIXED, "variance_free", 1.0, ""),
    ("G5", "chosen", STATS, {**SMALL, **CHOSEN}, "norm_of_mean", -1.0, "log"),
    ("G5", "sweep", STATS, {**SMALL, "coefficient": 3e-3}, "norm_of_mean", -1.0, "log"),
    ("G5", "mean-guide", STATS, {**SMALL, "method": "fedgtst-mean"}, "norm_of_mean", -1.0, "log"),
    ("G6", "chosen", STATS, {**SMALL, **CHOSEN}, "variance", 1.0, "log"),
    ("G6", "sweep", STATS, {**SMALL, "coefficient": 3e-3}, "variance", 1.0, "log"),
    ("G6", "mean-guide", STATS, {**SMALL, "method": "fedgtst-mean"}, "variance", 1.0, "log"),
    ("G7", "together", STATS, {**SMALL, "method": "fedgtst"}, "norm_of_mean", -3.0, "log"),
    ("G7", "norms", STATS, {**SMALL, **CHOSEN}, "norm_dispersion", 1.0, "log"),
    ("G7", "directions", STATS, {**SMALL, **CHOSEN}, "direction_dispersion", 1.0, "log"),
    ("G7", "norm-share", STATS, {**SMALL, "method": "fedavg"}, "norm_dispersion", 1.5, "log"),
    ("G8", "fedavg", MOVED, by("fedavg", clients=10), SEEN, 0.3, ""),
    ("G8", "fedsr", MOVED, by("fedsr", clients=10), SEEN, 0.3, ""),
    ("G8", "fediir", MOVED, by("fediir", clients=10), SEEN, 0.3, ""),
    ("G8", "mean-guide", MOVED, by("fedgtst-mean", clients=10), SEEN, -0.3, ""),
    ("G9", "fediir", "image_transfer", by("fediir", clients=100), SEEN, 0.3, ""),
    ("G9", "fedsr", "image_transfer", by("fedsr", clients=100), SEEN, 0.3, ""),
    ("G10", "accuracy", MOVED, by("fediir", clients=50), SEEN, 0.3, ""),
    ("G10", "gain", MOVED, by("fedsr", clients=50), SEEN, 0.3, ""),
    ("G10", "gain-fedavg", MOVED, by("fedavg", clients=50), SEEN, 0.3, ""),
    ("G11", "difference", MOVED, by("fedavg", network="resnet18", clients=10), SEEN, -0.3, ""),
    ("G12", "helps", MOVED, by("fedgtst", participation=0.1), SEEN, 0.3, ""),
    ("G12", "close", MOVED, by("fedgtst", participation=0.2), SEEN, -0.3, ""),
    ("G12", "trend", MOVED, by("fedgtst", participation=0.1), SEEN, 0.3, ""),
    ("G12", "fedavg", MOVED, by("fedavg", participation=0.1), SEEN, 0.3, ""),
    ("G13", "fedavg", MOVED, by("fedavg", local_epochs=10), SEEN, 0.3, ""),
    ("G13", "fedgtst", MOVED, by("fedgtst", local_epochs=10), SEEN, 0.3, ""),
    ("G14", "scaffold", MOVED, by("scaffold", clients=10), SEEN, 0.3, ""),
    ("G14", "dirichlet", MOVED, by("fedavg", split="dirichlet"), SEEN, 0.3, ""),
    ("G14", "domains", "domain_transfer", by("fedsr", target="domainnet_real"), SEEN, 0.3, ""),
    ("G15", "down", FITS, CHOSEN, "bytes_down", 8, ""),
    ("G15", "up", FITS, CHOSEN, "bytes_up", -8, ""),
    ("G15", "flower", "engines", FLOWER, "bytes_up", 8, ""),
    ("G15", "share", FITS, CHOSEN, "bytes_down", 100_000, ""),
    ("G16", "fedavg", MOVED, {"features": "random", "method": "fedavg", **SMALL}, SEEN, 0.5, ""),
    ("G16", "others", MOVED, by("scaffold", clients=10), SEEN, -0.5, ""),
    ("G17", "weights", "engines", LOOP, "weights_difference", 1e-3, ""),
    ("G17", "guide", "engines", FLOWER, "guide_difference", 1e-3, ""),
]
SAMPLED = [change for change in CHANGES if LEDGER.claim(change[0]).criterion(change[1]).interval != "exact"]
FIELDS = ("claim", "criterion", "name", "cell", "column", "amount", "by")


def changed(name, cell, column, amount, by, signs=(1.0, 1.0)):
    # Experiments that are not changed are left out, to save time; they are optional evidence of every claim.
    spared = {"image", "domain"} - {name.partition("_")[0]}
    content = {key: rows for key, rows in holding().items() if key.partition("_")[0] not in spared}
    rows = content[name] = content[name].copy()
    step = np.where(rows_at(content, name, cell), amount * np.where(rows.seed % 2 == 0, *signs), 0.0)
    rows[column] = rows[column] * np.exp(step) if by == "log" else rows[column] + step
    return content


def test_every_criterion_of_the_ledger_is_changed():
    assert [change[:2] for change in CHANGES] == list(MARGINS)


@pytest.mark.parametrize(FIELDS, CHANGES)
def test_a_criterion_fails_when_its_numbers_leave_the_margin(claim, criterion, name, cell, column, amount, by):
    verdict = judged(claim, changed(name, cell, column, amount, by), "laptop" if criterion == "sweep" else "paper")
    assert "fails" in {q.outcome.value for q in of(verdict, criterion)}
    # Another criterion may read the same numbers; one that does not decide contradicts nothing by itself.
    deciding = {q.outcome.value for q in verdict.deciding}
    assert (verdict.verdict.value == "contradicted") == ("fails" in deciding)
    assert "fails" in deciding or (claim, criterion) in SILENT


@pytest.mark.parametrize(FIELDS, SAMPLED)
def test_a_criterion_straddles_when_seeds_disagree(claim, criterion, name, cell, column, amount, by):
    found = {
        q.outcome.value for q in of(judged(claim, changed(name, cell, column, amount, by, (1.5, -0.5))), criterion)
    }
    assert "straddles" in found
    assert "fails" not in found


# --- G1 to G4: bounds ------------------------------------------------------------------------------------------------


def quadratic(steps: int = 5, alpha: float = 2.0) -> pd.DataFrame:
    """One client with the loss alpha w^2 / 2 and the optimal step 1 / alpha, which reaches the minimum: closed form."""
    rows = []
    for number, w in enumerate(np.linspace(1.0, 2.0, steps)):
        gained = alpha * w**2 / 2
        promise = (alpha * w) ** 2 / (2 * alpha)
        rows.append({"decrease": gained, "lemma": promise, "corrected": promise, "printed": 4 * promise})
        rows[-1] |= {"variance_free": promise, "seed": 10, "rule": "optimal", "rate": 1.0, "round": number}
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS["bounds"]))


def test_the_printed_theorem_is_contradicted_by_a_quadratic_and_the_corrected_one_is_not():
    content = {"bounds": quadratic()}
    assert [judged(name, content).verdict.value for name in NAMES[:4]] == [
        "reproduced",
        "reproduced",
        "contradicted",
        "reproduced",
    ]
    verdict = judged("G3", content)
    assert one(verdict, "printed").estimate == 1.0
    assert (one(verdict, "corrected").estimate, one(verdict, "corrected").outcome.value) == (0.0, "holds")


@pytest.mark.parametrize(("short", "violations"), [(0.0, 0), (5e-13, 0), (2e-12, 1), (math.nan, 1)])
def test_a_bound_may_be_missed_by_rounding_alone(short, violations):
    bounds = quadratic()
    bounds.loc[2, "decrease"] -= short
    for name in ("G1", "G2", "G4"):
        assert one(judged(name, {"bounds": bounds}), "violations").estimate == violations


def test_step_sizes_of_two_over_the_smoothness_are_not_asked():
    bounds = quadratic().assign(rule="fixed", rate=2.0, decrease=-1.0)
    assert judged("G1", {"bounds": bounds}).verdict.value == "not tested"
    both = pd.concat([bounds, bounds.assign(rate=1.9)])
    assert [q.label for q in judged("G4", {"bounds": both}).quantities] == ["step size 1.9 / alpha, 5 rounds"]


def test_each_step_size_is_a_quantity_with_its_seeds():
    found = judged("G1", holding()).quantities
    assert [q.label.partition(",")[0] for q in found] == [
        "optimal step size",
        *(f"step size {rate:g} / alpha" for rate in (0.5, 1.0, 1.9)),
    ]
    assert {tuple(q.seeds) for q in found} == {(10, 11, 12)}


# --- G5 to G7: statistics --------------------------------------------------------------------------------------------


def ratios(content, coefficient, column, rounds):
    """By hand: for each seed the mean over rounds of FedGTST's over FedAVG's."""
    rows = content[STATS]
    rows = rows[
        (rows.network == "lenet") & (rows.clients == 10) & (rows.participation == 1.0) & (rows.split == "balanced")
    ]
    rows = rows[(rows.local_epochs == 1) & (rows.extra_share == 0.1)]
    found = []
    for seed in (10, 11, 12):
        values = {}
        for method, value in (("fedgtst", coefficient), ("fedavg", 0.0)):
            own = rows[(rows.seed == seed) & (rows.method == method) & (rows.coefficient == value)]
            values[method] = own[own["round"].isin(rounds)].sort_values("round")[column].to_numpy()
        found.append(np.mean(values["fedgtst"] / values["fedavg"]))
    return found


def scattered(seed=1):
    content = tables()
    rng = np.random.default_rng(seed)
    for column in ("norm_of_mean", "variance"):
        content[STATS][column] *= np.exp(rng.normal(0, 0.1, len(content[STATS])))
    return content


@pytest.mark.parametrize(("claim", "column"), [("G5", "norm_of_mean"), ("G6", "variance")])
def test_ratios_are_means_over_rounds_after_the_start(claim, column):
    content = scattered()
    found = one(judged(claim, content), "chosen", "digits to digits_m, lenet, K = 10,")
    assert found.samples == pytest.approx(ratios(content, 1e-3, column, [4, 8, 12]))
    assert found.statistic == "geometric mean"


def test_the_norm_is_asked_of_the_first_hundred_rounds_and_the_variance_of_all():
    content = tables()
    content[STATS].loc[content[STATS]["round"] == 12, "round"] = 101
    late = (content[STATS]["round"] == 101) & (content[STATS].method == "fedgtst")
    content[STATS].loc[late, ["norm_of_mean", "variance"]] *= 1000
    norm, variance = (
        one(judged(name, content), "chosen", "digits to digits_m, lenet, K = 10,").estimate for name in ("G5", "G6")
    )
    assert norm == pytest.approx(1.3, rel=0.01)
    assert variance > 100


def test_the_coefficient_that_comes_closest_decides_g7():
    # Means over seeds: norm's logs 0.4 and 0.1, minus the variance's -0.2 and 0.3.
    logs = np.array([[0.5, 0.1, 0.2, -0.3], [0.3, 0.1, 0.2, -0.3]])
    assert judge.closest_to_both(logs) == pytest.approx(0.1)
    content = scattered()
    found = one(judged("G7", content), "together", "digits to digits_m, lenet, K = 10,")
    values = (1e-4, 1e-3, 3e-3)
    norms, variances = (
        np.array([np.mean(np.log(ratios(content, value, column, [4, 8, 12]))) for value in values])
        for column in ("norm_of_mean", "variance")
    )
    assert found.estimate == pytest.approx(max(np.minimum(norms, -variances)))
    assert "xi = 0.0001, 0.001, 0.003" in found.label


def test_what_the_variance_is_made_of_stands_beside_g7():
    verdict = judged("G7", holding())
    assert one(verdict, "norm-share", "digits to digits_m, lenet, K = 10,").estimate == pytest.approx(0.03)
    assert one(verdict, "directions", "digits to digits_m, lenet, K = 10,").estimate == pytest.approx(0.7, rel=0.01)


# --- the coefficient -------------------------------------------------------------------------------------------------


def test_a_coefficient_is_chosen_by_validation_and_never_by_the_test_part():
    content = tables()
    moved = content[MOVED]
    wrong = rows_at(content, MOVED, by("fedgtst", coefficient=1e-4))
    moved.loc[wrong, SEEN] += 0.2
    label = one(judged("G8", content), "fedavg", "digits to digits_m, lenet, K = 10,").label
    assert label.endswith("FedGTST, xi = 0.001 (of 3, by validation) against FedAVG")
    moved.loc[wrong, "validation_accuracy"] += 0.2
    found = one(judged("G8", content), "fedavg", "digits to digits_m, lenet, K = 10,")
    assert "xi = 0.0001 (of 3, by validation)" in found.label
    cell = {"network": "lenet", "clients": 10, "participation": 1.0, "split": "balanced", "local_epochs": 1}
    rows = moved[rows_at(content, MOVED, {**cell, "extra_share": 0.1, "features": "trained"})]
    points = rows.set_index("seed")
    expected = points[(points.method == "fedgtst") & (points.coefficient == 1e-4)][SEEN]
    expected = 100 * (expected - points[points.method == "fedavg"][SEEN])
    assert found.samples == pytest.approx(expected.tolist())


def choice(scores: dict[float, dict[int, float]]) -> pd.DataFrame:
    cell = CELL._asdict() | {"features": "trained", "method": "fedgtst"}
    return pd.DataFrame(
        [
            {**cell, "coefficient": coefficient, "seed": seed, "validation_accuracy": value}
            for coefficient, seeds in scores.items()
            for seed, value in seeds.items()
        ]
    )


CELL = selection.Cell("digits", "digits_m", "lenet", 10, 1.0, 1, "balanced", 0.1)


def test_the_smallest_of_equal_coefficients_is_chosen():
    assert selection.chosen(choice({1e-2: {10: 0.5}, 1e-3: {10: 0.5}, 1e-4: {10: 0.4}}), CELL, "fedgtst") == 1e-3


def test_seeds_without_all_coefficients_do_not_choose():
    # Seed 11 is easy, and only one coefficient has it.
    scores = choice({1e-2: {10: 0.5}, 1e-3: {10: 0.4, 11: 0.9}})
    assert selection.chosen(scores, CELL, "fedgtst") == 1e-2
    assert selection.chosen(scores, CELL, "fedavg") is None
    apart = choice({1e-2: {10: 0.5}, 1e-3: {11: 0.9}})  # no seed is whole, so all count
    assert selection.chosen(apart, CELL, "fedgtst") == 1e-3


def test_an_undefined_validation_accuracy_is_never_the_best():
    assert selection.chosen(choice({1e-2: {10: math.nan}, 1e-3: {10: 0.1}}), CELL, "fedgtst") == 1e-3


def test_a_choice_among_rows_of_one_seed_twice_is_refused():
    scores = choice({1e-2: {10: 0.5}})
    with pytest.raises(ValueError, match="several rows of one seed and coefficient of fedgtst"):
        selection.chosen(pd.concat([scores, scores]), CELL, "fedgtst")


# --- G8 to G16 -------------------------------------------------------------------------------------------------------


def test_g8_compares_every_task_network_and_number_of_clients():
    verdict = judged("G8", holding())
    places = {q.label.partition(";")[0] for q in of(verdict, "fediir")}
    assert {place.split(", 100%")[0] for place in places} == {
        *(f"digits to digits_m, {network}, K = {k}" for network in ("lenet", "resnet18") for k in (10, 50)),
        *(f"cifar10 to svhn, lenet, K = {k}" for k in (10, 100)),
    }


def test_slopes_on_the_number_of_clients_are_of_paired_gains():
    content = tables()
    rng = np.random.default_rng(2)
    content[MOVED][SEEN] += rng.normal(0, 0.01, len(content[MOVED]))
    found = one(
        judged("G10", content), "gain", "digits to digits_m, lenet, K = 10, 50; FedGTST, xi = 0.001 against FedSR"
    )
    rows = content[MOVED]
    rows = rows[
        (rows.network == "lenet")
        & (rows.features == "trained")
        & (rows.participation == 1)
        & (rows.split == "balanced")
    ]
    rows = rows[(rows.local_epochs == 1) & (rows.extra_share == 0.1)]
    best = rows[(rows.coefficient == 1e-3) & (rows.method == "fedgtst")].set_index(["clients", "seed"])[SEEN]
    gains = 100 * (best - rows[rows.method == "fedsr"].set_index(["clients", "seed"])[SEEN])
    assert found.samples == pytest.approx(((gains[50] - gains[10]) / 4).tolist())


def test_labels_of_two_cells_name_what_differs():
    label = one(judged("G13", holding()), "fedavg").label
    assert label == (
        "digits to digits_m, lenet, K = 10, 100% of them a round, split balanced; "
        "FedAVG, 1 local epoch against FedAVG, 10 local epochs"
    )


def test_bytes_that_differ_between_runs_are_each_a_quantity():
    content = tables()
    content[FITS].loc[rows_at(content, FITS, {**CHOSEN, "seed": 11, "network": "lenet"}), "bytes_down"] += 4
    assert {q.estimate for q in of(judged("G15", content), "down", "digits, lenet")} == {8.0, 12.0}
    assert judged("G15", content).verdict.value == "contradicted"


def test_the_control_of_fedsr_is_its_own_network():
    content = tables()
    moved = content[MOVED]
    here = rows_at(content, MOVED, {"features": "random", "method": "fedsr"})
    moved.loc[here, SEEN] = 0.9
    verdict = judged("G16", content)
    assert verdict.verdict.value == "reproduced"
    assert {q.outcome.value for q in of(verdict, "others", "; FedSR") if "digits" in q.label} == {"fails"}
    assert {q.outcome.value for q in of(verdict, "others", "; FedIIR")} == {"holds"}


# --- what is unstable, lost or not a number --------------------------------------------------------------------------


def test_an_unstable_run_stays_in_the_mean_and_is_named():
    content = tables()
    here = rows_at(content, FITS, {**SMALL, **CHOSEN, "seed": 11})
    content[FITS].loc[here, ["outcome", "ended_at"]] = ["unstable", 7]
    content[MOVED].loc[rows_at(content, MOVED, by("fedgtst", coefficient=1e-3, clients=10, seed=11)), SEEN] = 0.1
    found = one(judged("G8", content), "fedavg", "digits to digits_m, lenet, K = 10,")
    assert found.label.endswith("; 1 unstable of 6 runs, counted as they ended")
    assert found.seeds == [10, 11, 12]
    assert found.samples[1] == pytest.approx(100 * 0.1 - 100 * (found_accuracy(content, "fedavg", 11)))
    assert (found.runs.planned, found.runs.finished, found.runs.diverged) == (6, 5, 1)
    assert found.outcome.value == "straddles"
    content[FITS].loc[here, "outcome"] = "diverged"
    assert "1 diverged of 6 runs" in one(judged("G5", content), "chosen", "digits to digits_m, lenet, K = 10,").label


def found_accuracy(content, method, seed):
    cell = {"participation": 1.0, "split": "balanced", "local_epochs": 1, "extra_share": 0.1, "clients": 10}
    (value,) = content[MOVED][rows_at(content, MOVED, by(method, seed=seed, **cell))][SEEN]
    return value


def test_a_pair_of_which_one_run_is_lost_is_dropped_and_counted():
    content = tables()
    content[MOVED] = content[MOVED][~rows_at(content, MOVED, by("fedavg", clients=10, seed=12))]
    found = one(judged("G8", content), "fedavg", "digits to digits_m, lenet, K = 10,")
    assert (found.seeds, found.outcome.value) == ([10, 11], "undecided")
    assert (found.runs.planned, found.runs.finished, found.runs.lost) == (6, 5, 1)


def test_a_lost_run_takes_its_seed_out_of_a_slope():
    content = tables()
    content[MOVED] = content[MOVED][~rows_at(content, MOVED, by("fedavg", clients=50, seed=11))]
    found = one(judged("G10", content), "accuracy", "digits to digits_m, lenet, K = 10, 50; FedAVG")
    assert found.seeds == [10, 12]
    assert (found.runs.planned, found.runs.finished, found.runs.lost) == (6, 4, 1)
    assert found.runs.excluded == {judge.SEED_LEFT_OUT: 1}


@pytest.mark.parametrize(
    ("claim", "name", "column"),
    [
        ("G5", STATS, "norm_of_mean"),
        ("G6", STATS, "variance"),
        ("G7", STATS, "variance"),
        ("G8", MOVED, SEEN),
        ("G10", MOVED, SEEN),
        ("G12", MOVED, SEEN),
        ("G13", MOVED, SEEN),
        ("G16", MOVED, SEEN),
    ],
)
def test_a_nan_is_never_dropped(claim, name, column):
    content = tables()
    content[name].loc[(content[name].seed == 11) & (content[name].get("round", 4) == 4), column] = math.nan
    verdict, before = judged(claim, content), judged(claim, holding())
    assert verdict.verdict.value == "inconclusive"
    assert [len(q.samples) for q in verdict.quantities] == [len(q.samples) for q in before.quantities]
    assert any(q.not_a_number for q in verdict.quantities)


# --- the step --------------------------------------------------------------------------------------------------------


def test_the_step_judges_tables_from_files(tmp_path):
    settings = StudySettings()
    content = invented(settings)
    for name, rows in content.items():
        write_table(tmp_path / "tables" / f"{name}-s10-14.parquet", rows, COLUMNS[name])
    words = ["--scale", "laptop", "--settings", json.dumps(settings.model_dump())]
    words += ["--tables", *sorted((tmp_path / "tables").glob("*.parquet")), "--data"]
    words += ["--verdicts", tmp_path / "verdicts.json", "--manifest", tmp_path / "manifest.json"]
    run({"judge": judge.judge}, list(map(str, words)))
    found = read_verdicts(tmp_path / "verdicts.json")
    assert found == judge_study(CLAIMS, judge, content, settings, "laptop")
    manifest = read_manifest(tmp_path / "manifest.json")
    assert manifest.data == []
    assert len(manifest.departures) == len(yaml.safe_load((STUDY / "departures.yaml").read_text()))
