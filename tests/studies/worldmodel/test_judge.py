"""Each claim from invented tables: one set that satisfies all of them, then changed cell by cell."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.studies.worldmodel.invented import EVERYTHING, holding, invented, tables

from jacnorm.files import write_table
from jacnorm.report.claims import SCALES, load_claims
from jacnorm.report.verdicts import judge_claim, judge_study, read_verdicts
from jacnorm.step import run
from jacnorm.studies.worldmodel import evidence, judge
from jacnorm.studies.worldmodel.settings import DreamerSettings, PendulumSettings, StudySettings
from jacnorm.studies.worldmodel.tables import COLUMNS

STUDY = Path(judge.__file__).parent
CLAIMS = STUDY / "claims.yaml"
LEDGER = load_claims(CLAIMS)
NAMES = [f"W{number}" for number in range(1, 15)]
INF = math.inf
BASE = "error == 'none' and batch == {batch} and length == 16"

# The ledger: criterion -> bounds, of the pendulum and of DreamerV3 alike. Set before the judged runs.
MARGINS = {
    "W1": {"formula": (-INF, 0.05), "positive": (0.0, INF), "slope": (1.95, 2.05), "growing": (-INF, 0.05)},
    "W2": {"formula": (-INF, 0.1), "reversed": (-INF, 0.0), "slope": (0.95, 1.05), "growing": (-INF, 0.1)},
    "W3": dict.fromkeys(("even", "odd"), (0.9, INF)),
    "W4": dict.fromkeys(
        (
            "norm",
            "every-seed",
            "monotone",
            "short",
            "composed",
            "relative",
            "f-only",
            "f-only-prior",
            "f-only-composed",
        ),
        (-INF, 1.0),
    ),
    "W5": dict.fromkeys(("early", "late", "other-weights"), (-INF, 1.0)),
    "W6": dict.fromkeys(("return", "retention", "clean"), (0.0, INF)),
    "W7": dict.fromkeys(("gauss", "mask", "rotation"), (0.0, INF)),
    "W8": {"return": (0.0, INF)},
    "W9": {"return": (0.0, INF), "larger": (0.0, INF)},
    "W10": {"harmless": (-0.02, INF), "helps": (0.0, INF), "strong": (-INF, 0.0)},
    "W11": {"updates": (-INF, 0.0), "frames": (-INF, 0.0)},
    "W12": dict.fromkeys(("image", "reward"), (-INF, 1.0)),
    "W13": dict.fromkeys(("rotation", "mask"), (0.0, INF)),
    "W14": {"return": (0.0, INF)},
}
DECIDING = {
    "W1": {"formula", "positive"},
    "W2": {"formula", "reversed"},
    "W3": {"even", "odd"},
    "W4": {"norm", "every-seed", "monotone"},
    "W5": {"early"},
    "W6": {"return", "retention"},
    "W7": {"gauss", "mask", "rotation"},
    "W8": {"return"},
    "W9": {"return", "larger"},
    "W10": {"harmless"},
    "W11": {"frames"},
    "W12": {"image", "reward"},
    "W13": {"rotation", "mask"},
    "W14": {"return"},
}


def judged(name: str, content: dict[str, pd.DataFrame], scale: str = "laptop", settings: StudySettings = EVERYTHING):
    claim = LEDGER.claim(name)
    return judge_claim(claim, getattr(judge, claim.estimand)(content, settings), scale)


def outcomes(verdict, criterion):
    return {quantity.outcome.value for quantity in verdict.quantities if quantity.criterion == criterion}


def one(verdict, criterion, words=""):
    (found,) = [q for q in verdict.quantities if q.criterion == criterion and words in q.label]
    return found


def change(content, name, query, column, function):
    """Change a column in the rows of a table that satisfy a query."""
    here = content[name].eval(query).to_numpy(bool)
    assert here.any()
    content[name][column] = content[name][column].where(~here, function(content[name][column]))


def penalised(batch=16):
    """Rows of the agents that claims are about."""
    return f"`lambda` == 0.01 and include_prior and {BASE.format(batch=batch)}"


# --- the ledger ------------------------------------------------------------------------------------------------------


def bare(criterion: str) -> str:
    return criterion.removeprefix("dreamer-")


def test_margins_are_those_of_the_ledger():
    assert [claim.id for claim in LEDGER.claims] == NAMES
    for claim in LEDGER.claims:
        assert {bare(c.id) for c in claim.criteria} == set(MARGINS[claim.id])
        assert all(c.bounds == MARGINS[claim.id][bare(c.id)] for c in claim.criteria), claim.id
        assert {bare(c.id) for c in claim.criteria if c.decides} == DECIDING[claim.id]


def test_claims_are_expected_where_they_can_be_decided():
    late = {claim.id: claim.expected_at for claim in LEDGER.claims if claim.expected_at != SCALES}
    assert late == dict.fromkeys(("W5", "W12"), ("laptop", "paper")) | dict.fromkeys(
        ("W6", "W7", "W8", "W9", "W10", "W11", "W13", "W14"), ("paper",)
    )


def test_intervals_are_those_of_seeds():
    for claim in LEDGER.claims:
        for c in claim.criteria:
            exact = claim.id in ("W1", "W2", "W3") or bare(c.id) == "every-seed"
            assert c.interval == ("exact" if exact else "bootstrap" if claim.id == "W13" else "t")
            assert c.min_seeds >= (1 if exact else 2 if bare(c.id) == "short" else 3)


# --- every scale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_every_claim_can_hold_where_everything_is_measured(scale):
    found = judge_study(CLAIMS, judge, holding(), EVERYTHING, scale)
    for verdict in found.claims:
        if verdict.expected:
            assert verdict.verdict.value == "reproduced", (verdict.claim.id, verdict.reasons)
        for quantity in verdict.quantities:
            if not quantity.criterion.startswith("f-only-"):  # the finding: f alone is evaded
                assert quantity.outcome.value == "holds", (verdict.claim.id, quantity.criterion, quantity.reason)
            assert quantity.runs is not None
            assert quantity.runs.complete


def test_smoke_has_numbers_or_reasons_for_every_claim():
    settings = StudySettings()
    found = {
        verdict.claim.id: verdict
        for verdict in judge_study(CLAIMS, judge, invented(settings), settings, "smoke").claims
    }
    assert {name for name, verdict in found.items() if verdict.verdict.value == "reproduced"} == {
        "W1",
        "W2",
        "W3",
        "W4",
    }
    for name, criterion in (("W7", "gauss"), ("W8", "return"), ("W9", "larger"), ("W13", "mask"), ("W14", "return")):
        (quantity,) = [q for q in found[name].quantities if q.criterion == criterion]
        assert quantity.outcome.value == "not tested"
        assert quantity.reason
    assert {q.runs.planned for q in found["W6"].quantities if q.criterion == "return"} == {6}


def test_claims_without_the_agents_that_they_are_about_are_not_tested():
    pendulum = EVERYTHING.pendulum.model_copy(update={"lambdas": [0.1, 0.5]})
    settings = EVERYTHING.model_copy(update={"pendulum": pendulum, "dreamer": DreamerSettings()})
    content = invented(settings)
    for name in NAMES[3:]:
        verdict = judged(name, content, "laptop", settings)
        deciding = [q for q in verdict.quantities if LEDGER.claim(name).criterion(q.criterion).decides]
        asked = [q for q in deciding if q.criterion != "monotone"]  # of any two weights
        assert {q.outcome.value for q in asked} <= {"not tested"}, name
        assert all("not both trained" in q.reason or "without penalty" in q.reason for q in asked)


def test_a_short_run_of_dreamerv3_is_shown_at_laptop_and_decides_nothing():
    settings = EVERYTHING.model_copy(update={"dreamer": DreamerSettings(seeds=[10, 11], lambdas=[0.0, 0.01])})
    content = invented(settings)
    change(content, "dreamer_jacobians", "`lambda` == 0.01", "f_h", lambda values: values * 10)
    verdict = judged("W4", content, "laptop", settings)
    assert verdict.verdict.value == "reproduced"
    assert one(verdict, "dreamer-short").estimate > 5
    assert one(verdict, "dreamer-short").label == "DreamerV3, walker walk, lambda 0.01 against 0"


@pytest.mark.parametrize(
    ("name", "table", "column", "factor"),
    [
        ("W4", "jacobians", "f_h", 2.0),
        ("W5", "divergence", "divergence", 2.0),
        ("W6", "returns", "return", 0.8),
        ("W12", "prediction", "reward_error", 1.5),
        ("W14", "returns", "return", 0.8),
    ],
)
def test_at_scale_paper_dreamerv3_alone_contradicts(name, table, column, factor):
    content = tables()
    change(content, f"pendulum_{table}", penalised(), column, lambda values: values * factor)
    assert judged(name, content, "paper").verdict.value == "reproduced"
    change(content, f"dreamer_{table}", penalised(8), column, lambda values: values * factor)
    assert judged(name, content, "paper").verdict.value == "contradicted"


# --- W1 to W3 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part", "factor", "criterion"),
    [
        ("W1", "even", 1.06, "formula"),
        ("W1", "even", -1.0, "positive"),
        ("W2", "odd", 1.2, "formula"),
        ("W2", "odd_reversed", -1.0, "reversed"),
    ],
)
def test_one_random_matrix_off_the_formula_contradicts(name, part, factor, criterion):
    content = tables()
    change(content, "expansion", "family == 'random' and matrix == 2 and seed == 11", part, lambda v: v * factor)
    verdict = judged(name, content)
    assert verdict.verdict.value == "contradicted"
    assert outcomes(verdict, criterion) == {"fails"}


def test_growing_matrices_off_the_formula_are_shown_and_decide_nothing():
    content = tables()
    change(content, "expansion", "family == 'semidefinite' and scale == 2.5", "even", lambda v: v * 0.93)
    verdict = judged("W1", content)
    assert outcomes(verdict, "growing") == {"fails"}
    assert verdict.verdict.value == "reproduced"


def test_distances_include_two_standard_errors():
    content = tables()
    row = content["expansion"].query("family == 'random'").iloc[0]
    expected = abs(row.even - row.even_exact) / row.even_exact + 2 * row.even_error / row.even_exact
    assert one(judged("W1", content), "formula").estimate == pytest.approx(expected)
    content["expansion"]["even_error"] *= 5
    assert judged("W1", content).verdict.value == "contradicted"


def test_another_power_of_the_error_shows_in_the_slope():
    content = tables()
    content["expansion"]["odd"] *= content["expansion"].epsilon ** 0.2
    assert one(judged("W2", content), "slope").estimate == pytest.approx(1.2)


@pytest.mark.parametrize("part", ["even", "odd"])
def test_a_part_that_does_not_grow_contradicts(part):
    content = tables()
    change(
        content, "expansion", "family == 'identity' and seed == 10", part, lambda values: values.iloc[::-1].to_numpy()
    )
    change(content, "expansion", "family == 'semidefinite' and matrix == 1 and scale == 2.5", part, lambda v: v * 0.01)
    verdict = judged("W3", content)
    assert verdict.verdict.value == "contradicted"
    assert one(verdict, part, "semidefinite").estimate < 0.9
    undefined = tables()
    change(undefined, "expansion", "family == 'identity' and scale == 1.0", part, lambda values: values * math.nan)
    assert one(judged("W3", undefined), part, "identity").outcome.value == "undecided"


# --- W4, W5, W12 -----------------------------------------------------------------------------------------------------


def test_one_seed_whose_norm_rises_contradicts():
    content = tables()
    change(content, "pendulum_jacobians", f"{penalised()} and seed == 12", "f_h", lambda values: values * 1.5)
    verdict = judged("W4", content)
    assert outcomes(verdict, "every-seed") == {"fails"}
    assert one(verdict, "every-seed").label.endswith("5 seeds")
    assert verdict.verdict.value == "contradicted"


def test_a_weight_out_of_order_contradicts_at_laptop():
    content = tables()
    change(content, "pendulum_jacobians", penalised().replace("0.01", "0.1"), "f_h", lambda values: values * 2)
    assert judged("W4", content, "smoke").verdict.value == "reproduced"
    verdict = judged("W4", content)
    assert verdict.verdict.value == "contradicted"
    labels = [q.label for q in verdict.quantities if q.criterion == "monotone" and q.outcome.value == "fails"]
    assert labels == ["pendulum, lambda 0.1 against 0.01"]


def test_f_alone_is_compared_with_no_penalty_and_decides_nothing():
    verdict = judged("W4", holding())
    rows = holding()["pendulum_jacobians"].query(BASE.format(batch=16))
    own, plain = rows.query("`lambda` == 0.1 and not include_prior"), rows.query("`lambda` == 0")
    expected = np.exp(np.mean(np.log(own.p_h.to_numpy() / plain.p_h.to_numpy())))
    found = one(verdict, "f-only-prior", "0.1 against 0, f alone penalised")
    assert found.estimate == pytest.approx(expected)
    assert found.outcome.value == "fails"
    assert verdict.verdict.value == "reproduced"


def test_late_divergence_and_other_weights_decide_nothing():
    content = tables()
    change(content, "pendulum_divergence", f"{penalised()} and horizon > 5", "divergence", lambda values: values * 9)
    other = penalised().replace("0.01", "0.1")
    change(content, "pendulum_divergence", f"{other} and horizon == 1", "divergence", lambda values: values * 9)
    verdict = judged("W5", content)
    assert outcomes(verdict, "late") == {"fails"}
    assert "fails" in outcomes(verdict, "other-weights")
    assert verdict.verdict.value == "reproduced"
    change(content, "pendulum_divergence", f"{penalised()} and horizon == 3", "divergence", lambda values: values * 9)
    assert judged("W5", content).verdict.value == "contradicted"


def test_each_long_horizon_is_asked_and_short_ones_are_not():
    content = tables()
    change(content, "pendulum_prediction", f"{penalised()} and horizon == 3", "image_error", lambda values: values * 2)
    verdict = judged("W12", content)
    assert verdict.verdict.value == "reproduced"
    assert [q.label.split()[-1] for q in verdict.quantities if q.criterion == "image"] == ["5", "10", "20"]
    change(content, "pendulum_prediction", f"{penalised()} and horizon == 20", "image_error", lambda values: values * 2)
    assert judged("W12", content).verdict.value == "contradicted"


# --- W6 to W10, W14 --------------------------------------------------------------------------------------------------


def test_differences_are_paired_by_seed():
    rows = holding()["pendulum_returns"].query(f"include_prior and {BASE.format(batch=16)}")
    rows = rows[(rows.perturbation == "mask") & (rows.strength == 0.5)]
    wide = rows.pivot(index="seed", columns="lambda", values="return")
    found = one(judged("W6", holding()), "return", "mask 0.5")
    np.testing.assert_allclose(sorted(found.samples), sorted(wide[0.01] - wide[0.0]))
    assert found.seeds == [10, 11, 12, 13, 14]
    assert found.runs.planned == 10


def test_retention_is_of_the_return_above_the_random_policys():
    rows = holding()["pendulum_returns"].query(f"include_prior and {BASE.format(batch=16)} and seed == 10")

    def retention(weight):
        own = rows[rows["lambda"] == weight].set_index(["perturbation", "strength"])["return"] - 30.0
        return own["rotation", 20.0] / own["clean", 0.0]

    found = one(judged("W6", holding()), "retention", "rotation 20")
    assert found.samples[found.seeds.index(10)] == pytest.approx(retention(0.01) - retention(0.0))


def test_agents_about_as_good_as_random_have_no_retention():
    content = tables()
    bad = f"`lambda` == 0 and {BASE.format(batch=16)} and seed in [10, 11] and perturbation == 'clean'"
    change(content, "pendulum_returns", bad, "return", lambda values: values * 0 + 30.0 + 60 * evidence.GATE)
    found = one(judged("W6", content), "retention", "gauss 0.15")
    assert found.seeds == [12, 13, 14]
    assert found.runs.finished == 6
    assert found.runs.excluded == {
        evidence.ABOUT_AS_GOOD_AS_RANDOM: 2,
        "the other agent of the seed is left out": 2,
    }
    everywhere = f"{BASE.format(batch=16)} and perturbation == 'clean'"
    change(content, "pendulum_returns", everywhere, "return", lambda values: values * 0 + 20.0)
    verdict = judged("W6", content)
    assert one(verdict, "retention").outcome.value == "not tested"
    assert "well above the random policy's" in one(verdict, "retention").reason


def test_an_advantage_that_shrinks_has_a_negative_slope():
    content = tables()
    change(
        content, "pendulum_returns", f"{penalised()} and perturbation == 'gauss'", "return", lambda values: values - 5
    )
    verdict = judged("W7", content)
    assert outcomes(verdict, "gauss") == {"fails"}
    assert outcomes(verdict, "mask") == {"holds"}
    assert one(verdict, "gauss").label.endswith("gauss 0, 0.05, 0.15, 0.35")


def test_slopes_are_of_the_gain_on_the_strength_and_start_clean():
    content = tables()
    rows = content["pendulum_returns"].query(f"include_prior and {BASE.format(batch=16)} and seed == 13")
    rows = rows[rows.perturbation.isin(["clean", "rotation"])]
    wide = rows.pivot(index="strength", columns="lambda", values="return")
    expected = np.polyfit(wide.index, wide[0.01] - wide[0.0], 1)[0]
    found = one(judged("W7", content), "rotation")
    assert found.samples[found.seeds.index(13)] == pytest.approx(expected)


@pytest.mark.parametrize(("name", "error"), [("W8", "zero-drift"), ("W9", "drift")])
def test_agents_trained_with_errors_are_compared_at_the_same_error(name, error):
    content = tables()
    here = f"`lambda` == 0.01 and error == '{error}'"
    verdict = judged(name, content)
    assert all(f"{error} error" in q.label for q in verdict.quantities if q.criterion == "return")
    change(content, "pendulum_returns", here, "return", lambda values: values - 20)
    assert outcomes(judged(name, content), "return") == {"fails"}


def test_the_gain_with_drift_is_held_against_the_one_without():
    content = tables()
    change(
        content, "pendulum_returns", "`lambda` == 0.01 and error == 'zero-drift'", "return", lambda values: values + 9
    )
    verdict = judged("W9", content)
    assert outcomes(verdict, "larger") == {"fails"}
    assert outcomes(verdict, "return") == {"holds"}
    assert one(verdict, "larger").runs.planned == 30


def test_modest_is_the_smallest_error_and_harm_is_a_share_of_the_largest_return():
    content = tables()
    rows = content["pendulum_returns"].query(
        "`lambda` == 0 and batch == 16 and length == 16 and perturbation == 'clean'"
    )
    means = rows.groupby("error_size")["return"].mean()
    found = one(judged("W10", content), "harmless", "clean")
    assert found.estimate == pytest.approx((means[0.05] - means[0.0]) / 60)
    assert "error 0.05 against none" in found.label
    change(
        content, "pendulum_returns", "error == 'zero-drift' and error_size == 0.05", "return", lambda values: values - 1
    )
    verdict = judged("W10", content)
    assert outcomes(verdict, "harmless") == {"holds"}  # within the 2 %
    assert outcomes(verdict, "helps") == {"fails"}
    change(
        content, "pendulum_returns", "error == 'zero-drift' and error_size == 0.05", "return", lambda values: values - 3
    )
    assert outcomes(judged("W10", content), "harmless") == {"fails"}


def test_gravity_is_asked_factor_by_factor():
    found = [q.label for q in judged("W14", holding()).quantities if q.criterion == "return"]
    assert [label.split(", ")[-1] for label in found] == ["gravity times 0.5", "gravity times 1.5"]


# --- W11, W13 --------------------------------------------------------------------------------------------------------


def test_first_crossing_is_the_first_place_at_or_beyond_the_level():
    places, values = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 5.0, 4.0, 9.0])
    assert evidence.first_crossing(places, values, 4.5, rising=True) == 2.0
    assert evidence.first_crossing(places, values, 5.0, rising=True) == 2.0
    assert evidence.first_crossing(places, values, -1.0, rising=False) is None
    assert evidence.first_crossing(places, values * math.nan, 1.0, rising=True) is None


def long_returns(content, weight, values):
    here = content["dreamer_curves"].eval(f"`lambda` == {weight} and length == 32").to_numpy(bool)
    content["dreamer_curves"].loc[here, "return"] = np.tile(values, here.sum() // len(values))


def test_frames_until_half_of_the_largest_return():
    content = tables()
    late, early = np.where(np.arange(20) >= 10, 900.0, 0.0), np.where(np.arange(20) >= 4, 900.0, 0.0)
    long_returns(content, 0.0, late)
    long_returns(content, 0.01, early)
    # the running mean of 5 rows passes 500 with the third row of 900
    assert one(judged("W11", content, "paper"), "dreamer-frames").samples == [-600_000.0] * 5
    long_returns(content, 0.01, np.zeros(20))
    found = one(judged("W11", content, "paper"), "dreamer-frames")
    assert found.samples == [2_000_000.0 - 1_300_000.0] * 5
    assert found.label.endswith("; 5 of them never, counted at their end")
    assert found.outcome.value == "fails"


def test_seeds_of_which_no_agent_gets_there_are_left_out():
    content = tables()
    for weight in (0.0, 0.01):
        long_returns(content, weight, np.zeros(20))
    verdict = judged("W11", content, "paper")
    assert "no agent got there" in one(verdict, "dreamer-frames").reason
    assert verdict.verdict.value == "not tested"
    long_returns(content, 0.01, np.full(20, 900.0))
    here = content["dreamer_curves"].eval("`lambda` == 0.01 and length == 32 and seed in [10, 11]").to_numpy(bool)
    content["dreamer_curves"].loc[here, "return"] = 0.0
    found = one(judged("W11", content, "paper"), "dreamer-frames")
    assert found.seeds == [12, 13, 14]
    assert found.runs.excluded == {"neither agent of the seed gets there": 4}


def test_on_the_pendulum_the_loss_stands_in_and_decides_nothing():
    content = tables()
    change(content, "pendulum_curves", "`lambda` == 0.01 and length == 32", "model_loss", lambda values: values + 50)
    verdict = judged("W11", content)
    assert outcomes(verdict, "updates") == {"fails"}
    assert verdict.verdict.value == "not tested"


def test_the_best_size_in_between_is_held_against_both_ends():
    returns = np.array([[1.0, 4.0, 3.0, 2.0], [3.0, 4.0, 1.0, 2.0]])
    assert judge.best_between_over_ends(returns) == 2.0
    content = tables()
    change(content, "pendulum_returns", "`lambda` == 0 and batch == 32", "return", lambda values: values + 10)
    assert outcomes(judged("W13", content), "rotation") == {"fails"}
    assert one(judged("W13", content), "mask").label == (
        "pendulum, lambda 0, batch 8, 16, 32, mask, mean over strengths"
    )


# --- what became of the runs -----------------------------------------------------------------------------------------


def test_diverged_agents_leave_their_seed_out_and_are_counted():
    content = tables()
    change(content, "pendulum_fits", f"{penalised()} and seed == 11", "diverged_at", lambda values: values * 0 + 40)
    change(content, "pendulum_jacobians", f"{penalised()} and seed == 11", "f_h", lambda values: values * math.nan)
    verdict = judged("W4", content)
    found = one(verdict, "norm")
    assert found.seeds == [10, 12, 13, 14]
    assert (found.runs.planned, found.runs.finished, found.runs.diverged) == (10, 9, 1)
    assert verdict.verdict.value == "reproduced"
    assert any("diverged" in reason for reason in verdict.reasons)


def test_a_number_that_is_not_defined_is_not_dropped():
    content = tables()
    change(content, "pendulum_jacobians", f"{penalised()} and seed == 11", "f_h", lambda values: values * math.nan)
    assert one(judged("W4", content), "norm").outcome.value == "undecided"


def test_lost_agents_are_counted():
    content = tables()
    lost = content["pendulum_returns"].eval(f"{penalised()} and seed == 14")
    content["pendulum_returns"] = content["pendulum_returns"][~lost]
    found = one(judged("W6", content), "return", "gauss 0.05")
    assert found.seeds == [10, 11, 12, 13]
    assert (found.runs.finished, found.runs.lost) == (9, 1)


def test_two_seeds_are_too_few():
    few = EVERYTHING.pendulum.model_copy(update={"seeds": [10, 11]})
    settings = EVERYTHING.model_copy(update={"pendulum": few})
    verdict = judged("W5", invented(settings), "laptop", settings)
    assert outcomes(verdict, "early") == {"undecided"}
    assert verdict.verdict.value == "inconclusive"


def test_a_claim_without_its_tables_is_not_tested():
    content = {name: rows for name, rows in holding().items() if name != "pendulum_prediction"}
    (verdict,) = [v for v in judge_study(CLAIMS, judge, content, EVERYTHING, "laptop").claims if v.claim.id == "W12"]
    assert verdict.verdict.value == "not tested"


def test_the_step_writes_verdicts_and_manifest(tmp_path):
    settings, files = StudySettings(pendulum=PendulumSettings(episodes_path="/home/me/swings.safetensors")), []
    for name, rows in invented(settings).items():
        files.append(tmp_path / f"{name}-s10-12.parquet")
        write_table(files[-1], rows, COLUMNS[name])
    out = [str(tmp_path / name) for name in ("verdicts.json", "manifest.json")]
    arguments = ["--settings", json.dumps(settings.model_dump(mode="json")), "--scale", "smoke", "--tables"]
    run({"judge": judge.judge}, [*arguments, *map(str, files), "--data", "--verdicts", out[0], "--manifest", out[1]])
    found = read_verdicts(Path(out[0]))
    assert [verdict.claim.id for verdict in found.claims] == NAMES
    manifest = json.loads(Path(out[1]).read_text())
    assert len(manifest["departures"]) >= 20
    assert "/home/me" not in Path(out[1]).read_text()
