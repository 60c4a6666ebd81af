"""One rule from quantities to verdicts: by hand on small cases, by properties on drawn ones."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.report.sample_study import CLAIMS, estimands, write_study

from jacnorm.errors import UserError
from jacnorm.report.claims import Claim, Criterion
from jacnorm.report.verdicts import (
    Accounting,
    NotTested,
    Outcome,
    Quantity,
    Verdict,
    judge_claim,
    judge_quantity,
    judge_study,
    read_verdicts,
    write_verdicts,
)

RUNS = Accounting.all_finished(6)
SAMPLES = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]  # mean 3.5, t interval [1.537, 5.463]


def criterion(**changes: object) -> Criterion:
    given = {"id": "c", "quantity": "a number", "unit": "", "direction": "above", "margin": 0.0} | changes
    return Criterion.model_validate({key: value for key, value in given.items() if value is not None})


def outcome(samples: list[float], **changes: object) -> Outcome:
    statistic = changes.pop("statistic", "mean")
    return judge_quantity(criterion(**changes), Quantity("c", "", samples, RUNS, statistic)).outcome


def claim(*criteria: Criterion, **changes: object) -> Claim:
    given = {
        "id": "C1",
        "statement": "It holds.",
        "source": "Fig. 1",
        "evidence": "published",
        "expected_at": ["smoke", "paper"],
        "estimand": "measure",
        "published": None,
        "criteria": [c.model_dump() for c in criteria or (criterion(),)],
        "evidence_tables": ["depth"],
    }
    return Claim.model_validate(given | changes)


def within(low: float, high: float) -> dict[str, object]:
    return {"direction": "within", "margin": None, "low": low, "high": high}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"margin": 1.5}, Outcome.holds),
        ({"margin": 1.6}, Outcome.straddles),
        ({"margin": 5.4}, Outcome.straddles),
        ({"margin": 5.5}, Outcome.fails),
        ({"direction": "below", "margin": 5.5}, Outcome.holds),
        ({"direction": "below", "margin": 3.5}, Outcome.straddles),
        ({"direction": "below", "margin": 1.5}, Outcome.fails),
        (within(1.5, 5.5), Outcome.holds),
        (within(1.6, 5.5), Outcome.straddles),
        (within(5.5, 9.0), Outcome.fails),
        (within(-9.0, 1.5), Outcome.fails),
        (within(3.4, 3.6), Outcome.straddles),
        ({"margin": 1.6, "confidence": 0.9}, Outcome.holds),
        ({"margin": 0.0, "min_seeds": 7}, Outcome.undecided),
    ],
)
def test_the_whole_interval_decides(asked: dict, expected: Outcome) -> None:
    assert outcome(SAMPLES, **asked) is expected


def test_margins_belong_to_the_asked_side() -> None:
    for direction in ("below", "above"):
        assert outcome([0.0], direction=direction, margin=0.0, interval="exact") is Outcome.holds
    assert outcome([1.0], direction="below", margin=0.0, interval="exact") is Outcome.fails


@settings(max_examples=60, deadline=None)
@given(
    samples=st.lists(st.floats(-100, 100), min_size=5, max_size=12),
    margins=st.lists(st.floats(-150, 150), min_size=2, max_size=6, unique=True),
)
def test_a_stricter_margin_never_helps(samples: list[float], margins: list[float]) -> None:
    worse = [Outcome.holds, Outcome.straddles, Outcome.fails]
    for direction, order in (("above", sorted(margins)), ("below", sorted(margins, reverse=True))):
        ranks = [worse.index(outcome(samples, direction=direction, margin=margin)) for margin in order]
        assert ranks == sorted(ranks)


@settings(max_examples=60, deadline=None)
@given(samples=st.lists(st.floats(-10, 10), min_size=5, max_size=12), margin=st.floats(-15, 15))
def test_above_and_below_are_mirror_images(samples: list[float], margin: float) -> None:
    mirrored = [-sample for sample in samples]
    assert outcome(samples, margin=margin) is outcome(mirrored, direction="below", margin=-margin)


def test_effects_count_from_the_nearest_margin() -> None:
    found = judge_quantity(criterion(**within(0.0, 4.0)), Quantity("c", "", SAMPLES, RUNS))
    sd = math.sqrt(3.5)
    assert found.effect == pytest.approx(0.5)
    assert found.effect_in_spreads == pytest.approx(0.5 / sd)
    assert found.effect_in_standard_errors == pytest.approx(0.5 * math.sqrt(6) / sd)
    assert judge_quantity(criterion(margin=4.0), Quantity("c", "", SAMPLES, RUNS)).effect == pytest.approx(-0.5)


def test_distances_of_a_geometric_mean_are_logarithmic() -> None:
    logs = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    plain = judge_quantity(criterion(margin=2.0), Quantity("c", "", logs, RUNS))
    quantity = Quantity("c", "", np.exp(logs), RUNS, "geometric mean")
    found = judge_quantity(criterion(margin=math.exp(2.0)), quantity)
    assert found.effect_in_standard_errors == pytest.approx(plain.effect_in_standard_errors)
    assert judge_quantity(criterion(margin=0.0), quantity).effect_in_standard_errors == math.inf
    assert judge_quantity(criterion(direction="below", margin=-1.0), quantity).effect_in_standard_errors == -math.inf


def test_nan_is_counted_and_never_dropped() -> None:
    found = judge_quantity(criterion(margin=-100.0), Quantity("c", "", [*SAMPLES, math.nan], RUNS))
    assert (found.outcome, found.not_a_number, found.estimate, found.low) == (Outcome.undecided, 1, None, None)
    assert found.reason == "1 of 7 samples is NaN, and none is dropped"
    rows = judge_quantity(
        criterion(interval="bootstrap"), Quantity("c", "", [[1, math.nan], [math.nan, 2]], RUNS, np.mean)
    )
    assert rows.reason == "2 of 2 samples are NaN, and none is dropped"


def test_few_samples_show_their_number_without_deciding() -> None:
    found = judge_quantity(criterion(margin=0.0), Quantity("c", "", [3.0, 4.0], RUNS))
    assert (found.outcome, found.estimate) == (Outcome.undecided, 3.5)
    assert found.reason == "2 samples are too few (at least 5 are asked for)"
    assert judge_quantity(criterion(), Quantity("c", "", [], RUNS)).reason == "there is no sample"
    one = judge_quantity(criterion(), Quantity("c", "", [3.0], RUNS))
    assert (
        one.reason
        == "1 samples are too few (at least 5 are asked for); one sample has no spread, so it gives no interval"
    )


@pytest.mark.parametrize(
    ("samples", "asked", "expected"),
    [
        # Most are far below and two died: both the infinite mean and the median are below.
        ([-math.inf, -math.inf, *range(-40, -32)], {"direction": "below", "margin": -10.0}, Outcome.holds),
        # One death among healthy networks: the mean is below, the median is not.
        ([-math.inf, *range(9)], {"direction": "below", "margin": -10.0}, Outcome.straddles),
        ([-math.inf, *range(9)], {"margin": -10.0}, Outcome.straddles),
        ([-math.inf, *range(-40, -31)], {"margin": -10.0}, Outcome.fails),
        ([-math.inf] * 6, {"direction": "below", "margin": -10.0}, Outcome.holds),
        ([-math.inf] * 6, within(-1.0, 1.0), Outcome.fails),
        ([-math.inf, math.inf, 1.0, 2.0, 3.0, 4.0], {"margin": -10.0}, Outcome.undecided),
        ([-math.inf, 1.0, 2.0, 3.0, 4.0], {"direction": "below", "margin": 9.0}, Outcome.undecided),
    ],
)
def test_infinite_samples_need_mean_and_median_to_agree(samples: list[float], asked: dict, expected: Outcome) -> None:
    assert outcome(samples, **asked) is expected


def test_shapes_and_seeds_are_checked() -> None:
    with pytest.raises(ValueError, match=r"'wide' has samples of shape \(1, 1, 1\); expected \(n,\) or \(n, k\)"):
        judge_quantity(criterion(), Quantity("c", "wide", np.zeros((1, 1, 1)), RUNS))
    with pytest.raises(ValueError, match="'x' names 2 seeds for 6 samples"):
        judge_quantity(criterion(), Quantity("c", "x", SAMPLES, RUNS, seeds=[1, 2]))
    found = judge_quantity(
        criterion(), Quantity("c", "", SAMPLES[::-1], RUNS, seeds=[15, 14, 13, 12, 11, 10], reference=3)
    )
    assert (found.samples, found.seeds[0], found.reference) == (SAMPLES[::-1], 15, 3.0)


def test_every_planned_run_is_accounted_for() -> None:
    runs = Accounting(planned=9, finished=5, diverged=1, lost=1, excluded={"width below 64": 2}, what="networks")
    assert runs.sentence == "5 of 9 networks finished, 1 diverged, 1 lost, 2 excluded (width below 64)"
    assert not runs.complete
    assert Accounting.all_finished(3).sentence == "3 of 3 runs finished"
    with pytest.raises(
        ValidationError, match=r"planned \(9\) is not finished \(5\) \+ diverged \(1\) \+ lost \(0\) \+ excluded \(0\)"
    ):
        Accounting(planned=9, finished=5, diverged=1)
    with pytest.raises(ValidationError, match="excluded counts must not be negative"):
        Accounting(planned=4, finished=5, excluded={"why": -1})


GOOD, BAD = SAMPLES, [-s for s in SAMPLES]
OPEN = [-3.0, -2.0, -1.0, 1.0, 2.0, 3.5]


@pytest.mark.parametrize("samples", [*itertools.product((GOOD, BAD, OPEN), repeat=2)])
def test_a_claim_needs_all_and_falls_by_one(samples: tuple[list[float], list[float]]) -> None:
    found = judge_claim(claim(), [Quantity("c", str(i), s, RUNS) for i, s in enumerate(samples)])
    wanted = (
        Verdict.reproduced
        if samples == (GOOD, GOOD)
        else Verdict.contradicted
        if BAD in samples
        else Verdict.inconclusive
    )
    assert found.verdict is wanted


def test_reported_criteria_do_not_decide() -> None:
    two = claim(criterion(), criterion(id="aside", decides=False))
    found = judge_claim(two, [Quantity("aside", "", BAD, RUNS), Quantity("c", "", GOOD, RUNS)])
    assert found.verdict is Verdict.reproduced
    assert [q.criterion for q in found.quantities] == ["c", "aside"]
    assert found.reasons == ["The deciding quantity holds."]


def test_criteria_are_asked_at_their_scales() -> None:
    two = claim(criterion(), criterion(id="big", at=["paper"]))
    assert judge_claim(two, [Quantity("c", "", GOOD, RUNS)], "smoke").verdict is Verdict.reproduced
    with pytest.raises(
        ValueError, match="measure gives nothing for criterion 'big' of C1; return a NotTested that says why"
    ):
        judge_claim(two, [Quantity("c", "", GOOD, RUNS)], "paper")
    passed_over = judge_claim(two, [Quantity("c", "", GOOD, RUNS), Quantity("big", "", BAD, RUNS)], "smoke")
    assert [row.criterion for row in passed_over.quantities] == ["c"]
    with pytest.raises(ValueError, match="measure gives criterion 'huge', but C1 has c, big"):
        judge_claim(two, [Quantity("huge", "", GOOD, RUNS)], "smoke")
    only = claim(criterion(at=["paper"]))
    found = judge_claim(only, [], "smoke")
    assert (found.verdict, found.reasons) == (Verdict.not_tested, ["No deciding criterion is asked at this scale."])


def test_an_unexpected_scale_draws_no_verdict_either_way() -> None:
    for samples, word in ((GOOD, "reproduced"), (BAD, "contradicted")):
        found = judge_claim(claim(), [Quantity("c", "", samples, RUNS)], "laptop")
        assert (found.verdict, found.expected) == (Verdict.inconclusive, False)
        assert found.reasons[0] == (
            "Not expected to be decidable at scale laptop (declared: smoke, paper); "
            f"the numbers by themselves would say {word}."
        )


def test_missing_evidence_says_why() -> None:
    assert judge_claim(claim(), NotTested("No GPU.")).model_dump(include={"verdict", "reasons"}) == {
        "verdict": Verdict.not_tested,
        "reasons": ["No GPU."],
    }
    two = claim(criterion(), criterion(id="d"))
    part = judge_claim(two, [Quantity("c", "", GOOD, RUNS), NotTested("width 1024 was not run", "d")])
    assert part.verdict is Verdict.inconclusive
    assert part.reasons == [
        "Of 2 deciding quantities, 1 holds, 1 is not tested.",
        "d: width 1024 was not run.",
    ]
    assert judge_claim(two, [NotTested("a", "c"), NotTested("b", "d")]).verdict is Verdict.not_tested
    assert judge_claim(two, [Quantity("c", "", BAD, RUNS), NotTested("b", "d")]).verdict is Verdict.contradicted


def test_lost_runs_are_said_once() -> None:
    runs = Accounting(planned=8, finished=6, lost=2)
    found = judge_claim(claim(), [Quantity("c", "a", GOOD, runs), Quantity("c", "b", GOOD, runs)])
    assert found.reasons == ["All 2 deciding quantities hold.", "6 of 8 runs finished, 2 lost."]
    assert found.runs == [runs]


def test_the_headline_is_the_weakest_quantity() -> None:
    near = [s - 1.5 for s in SAMPLES]
    quantities = [Quantity("c", "far", [s + 50 for s in SAMPLES], RUNS), Quantity("c", "near", near, RUNS)]
    assert judge_claim(claim(), quantities).headline.label == "near"
    assert judge_claim(claim(), [*quantities, Quantity("c", "bad", BAD, RUNS)]).headline.label == "bad"
    assert judge_claim(claim(), NotTested("why")).headline is None


def test_a_study_is_judged_from_its_ledger(tmp_path: Path) -> None:
    found = read_verdicts(write_study(tmp_path) / "verdicts.json")
    verdicts = {v.claim.id: v.verdict.value for v in found.claims}
    assert verdicts == {
        "C1": "reproduced",
        "C2": "contradicted",
        "C3": "inconclusive",
        "C4": "inconclusive",
        "C5": "not tested",
        "C6": "inconclusive",
    }
    assert {v.value: n for v, n in found.counts.items()} == {
        "reproduced": 1,
        "contradicted": 1,
        "inconclusive": 2,
        "not tested": 1,
    }
    assert found.claims[4].reasons == ["Table 'drift' was not made at scale smoke."]
    at_laptop = read_verdicts(write_study(tmp_path / "laptop", "laptop") / "verdicts.json")
    assert at_laptop.claims[5].verdict is Verdict.reproduced


def test_a_missing_estimand_is_named(tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(CLAIMS, encoding="utf-8")
    functions = estimands()
    del functions["vanish"]
    with pytest.raises(UserError, match=r"claim C4: judge\.py has no function 'vanish'; add it or correct"):
        judge_study(path, functions, {"depth": None, "limit": None}, None, "smoke")

    class Judge:
        """A module is an object with functions as attributes."""

    for name, function in estimands().items():
        setattr(Judge, name, staticmethod(function))
    assert judge_study(path, Judge, {"depth": None, "limit": None}, None, "smoke").study == "sample"


def test_verdicts_survive_the_file_and_repeat_byte_for_byte(tmp_path: Path) -> None:
    one, two = (write_study(tmp_path / name) / "verdicts.json" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    verdicts = read_verdicts(one)
    write_verdicts(tmp_path / "again.json", verdicts)
    assert (tmp_path / "again.json").read_bytes() == one.read_bytes()
    vanishing = json.loads(one.read_text())["claims"][3]["quantities"][0]
    assert vanishing["samples"][:2] == ["-inf", "-inf"]
    assert verdicts.claims[3].quantities[0].samples[:2] == [-math.inf, -math.inf]


def test_a_foreign_verdicts_file_is_refused(tmp_path: Path) -> None:
    path = write_study(tmp_path) / "verdicts.json"
    path.write_text(path.read_text().replace('"reproduced"', '"true"'))
    with pytest.raises(UserError, match=r"claims\[0\].verdict: input should be 'reproduced', .* run again"):
        read_verdicts(path)
    with pytest.raises(UserError, match="does not exist; run the step that makes it"):
        read_verdicts(tmp_path / "none.json")
