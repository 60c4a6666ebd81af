"""What is declared about the study agrees: claims, captions, tables, departures and settings."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter
from tests.studies.watched import Watched
from tests.studies.worldmodel.invented import EVERYTHING, holding, scale_settings

from jacnorm.report import plotting
from jacnorm.report.claims import SCALES, load_claims
from jacnorm.report.drawing import read_captions_file
from jacnorm.report.manifest import Departure
from jacnorm.studies.worldmodel import figures, judge
from jacnorm.studies.worldmodel.settings import StudySettings
from jacnorm.studies.worldmodel.tables import COLUMNS

STUDY = Path(judge.__file__).parent
LEDGER = load_claims(STUDY / "claims.yaml")
CAPTIONS = read_captions_file(STUDY / "captions.yaml")
DEPARTURES = TypeAdapter(list[Departure]).validate_python(yaml.safe_load((STUDY / "departures.yaml").read_text()))
OPTIONAL = {name for name in COLUMNS if name.startswith("dreamer_")}
"""Tables of the experiment that a scale may leave out."""


def test_estimands_exist_and_take_tables_and_settings():
    for claim in LEDGER.claims:
        assert list(inspect.signature(getattr(judge, claim.estimand)).parameters) == ["tables", "settings"]
    assert len({claim.estimand for claim in LEDGER.claims}) == len(LEDGER.claims)


def test_evidence_and_captions_name_tables_and_claims_that_exist():
    claims = {claim.id for claim in LEDGER.claims}
    for claim in LEDGER.claims:
        assert set(claim.evidence_tables) <= set(COLUMNS) - OPTIONAL  # a claim whose evidence is absent is not tested
        assert set(claim.optional_tables) <= OPTIONAL
    for caption in CAPTIONS.values():
        assert set(caption.claims) <= claims
        assert set(caption.tables) <= set(COLUMNS)
        assert set(caption.tables) - OPTIONAL  # no figure is left without rows at any scale
    assert {claim for caption in CAPTIONS.values() for claim in caption.claims} == claims  # each claim has a figure
    drawn = {table for caption in CAPTIONS.values() for table in caption.tables}
    assert drawn == set(COLUMNS)  # nothing is measured that nobody sees


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_figure_reads_the_tables_that_its_caption_names(name):
    tables = Watched(holding())
    with plotting.style():
        figures.FIGURES[name](tables)
    assert tables.read == set(CAPTIONS[name].tables)


@pytest.mark.parametrize("claim", LEDGER.claims, ids=lambda claim: claim.id)
def test_an_estimand_reads_its_evidence_and_nothing_else(claim):
    tables = Watched(holding())
    getattr(judge, claim.estimand)(tables, EVERYTHING)
    assert tables.read == {*claim.evidence_tables, *claim.optional_tables}


def test_no_number_of_the_paper_is_claimed():
    assert all(claim.published is not None and claim.published.value is None for claim in LEDGER.claims)


def test_at_scale_paper_dreamerv3_decides_and_below_it_the_pendulum():
    for claim in LEDGER.claims[3:]:
        for criterion in claim.criteria:
            dreamer = criterion.id.startswith("dreamer")
            assert criterion.quantity.startswith("DreamerV3" if dreamer else "pendulum")
            if criterion.decides:
                assert ("paper" in criterion.at) == dreamer


def test_departures_are_complete_sentences_and_distinct():
    assert len({departure.paper for departure in DEPARTURES}) == len(DEPARTURES) >= 20
    for departure in DEPARTURES:
        for sentence in (departure.paper, departure.ours, departure.why):
            assert sentence.endswith(".")


@pytest.mark.parametrize("scale", SCALES)
def test_judged_seeds_are_not_those_of_pilots_and_suffice_for_the_criteria(scale):
    settings = scale_settings(scale)
    assert isinstance(settings, StudySettings)
    least = {"expansion": 1, "pendulum": 3, "dreamer": 5 if scale == "paper" else 0}
    assert set(least) == set(StudySettings.model_fields)
    for name, needed in least.items():
        seeds = getattr(settings, name).seeds
        assert len(seeds) >= needed
        assert min(seeds, default=10) >= 10


@pytest.mark.parametrize("scale", SCALES)
def test_what_a_claim_is_expected_to_need_is_planned(scale):
    """A claim that is expected to be decided has the arms, conditions and horizons that decide it."""
    settings = scale_settings(scale)
    agent = settings.dreamer if scale == "paper" else settings.pendulum
    assert {0.0, judge.WEIGHT} <= set(agent.lambdas)
    assert any(horizon <= judge.EARLY for horizon in agent.horizons)
    assert any(horizon >= judge.LONG for horizon in agent.horizons)
    if scale != "smoke":
        assert len([weight for weight in agent.lambdas if weight]) > 1  # W4: monotone
    if scale == "paper":
        assert agent.zero_drift
        assert agent.drift
        assert agent.gravities
        assert max(agent.lengths) > agent.length
        assert len({agent.batch, *agent.batches}) > 2
        for strengths in (agent.gauss, agent.masks, agent.rotations):
            assert len(strengths) >= judge.FEWEST_STRENGTHS
