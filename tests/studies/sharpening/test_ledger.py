"""What is declared about the study agrees: claims, captions, tables, departures and settings."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter
from tests.studies.sharpening.invented import EVERYTHING, holding, scale_settings
from tests.studies.watched import Watched

from jacnorm.report import plotting
from jacnorm.report.claims import SCALES, load_claims
from jacnorm.report.drawing import read_captions_file
from jacnorm.report.manifest import Departure
from jacnorm.studies.sharpening import figures, judge
from jacnorm.studies.sharpening.settings import StudySettings
from jacnorm.studies.sharpening.tables import COLUMNS

STUDY = Path(judge.__file__).parent
LEDGER = load_claims(STUDY / "claims.yaml")
CAPTIONS = read_captions_file(STUDY / "captions.yaml")
DEPARTURES = TypeAdapter(list[Departure]).validate_python(yaml.safe_load((STUDY / "departures.yaml").read_text()))
OPTIONAL = {name for name in COLUMNS if name.startswith("image_")}
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
        assert caption.tables
        assert set(caption.tables) <= set(COLUMNS)
    assert {claim for caption in CAPTIONS.values() for claim in caption.claims} == claims  # each claim has a figure
    drawn = {table for caption in CAPTIONS.values() for table in caption.tables}
    assert drawn == set(COLUMNS)  # nothing is measured that nobody sees


def test_every_experiment_has_a_figure():
    words = " ".join(caption.caption for caption in CAPTIONS.values())
    for number in range(1, 11):
        assert f"(E{number})" in words or f"E{number})" in words or f"(E{number}," in words


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


def test_correlations_are_said_to_be_consistent_and_not_to_cause():
    for claim in LEDGER.claims:
        assert "cause" not in claim.statement
    assert LEDGER.claim("C1").statement.startswith("Consistent with the ansatz")


def test_departures_are_complete_sentences_and_distinct():
    assert len({departure.paper for departure in DEPARTURES}) == len(DEPARTURES) >= 15
    for departure in DEPARTURES:
        for sentence in (departure.paper, departure.ours, departure.why):
            assert sentence.endswith(".")


@pytest.mark.parametrize("scale", SCALES)
def test_judged_seeds_are_not_those_of_pilots_and_suffice_for_the_criteria(scale):
    settings = scale_settings(scale)
    assert isinstance(settings, StudySettings)
    for name in StudySettings.model_fields:
        seeds = getattr(settings, name).seeds
        assert len(seeds) >= 3 or (name, seeds) == ("images", [])
        assert min(seeds, default=10) >= 10
