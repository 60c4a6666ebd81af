"""What is declared about the study agrees: claims, captions, tables, departures and settings."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter
from tests.studies.fedgtst.invented import EVERYTHING, holding, scale_settings
from tests.studies.watched import Watched

from jacnorm.report.claims import SCALES, load_claims
from jacnorm.report.drawing import read_captions_file
from jacnorm.report.manifest import Departure
from jacnorm.studies.fedgtst import judge
from jacnorm.studies.fedgtst.settings import StudySettings
from jacnorm.studies.fedgtst.tables import COLUMNS

STUDY = Path(judge.__file__).parent
LEDGER = load_claims(STUDY / "claims.yaml")
CAPTIONS = read_captions_file(STUDY / "captions.yaml")
DEPARTURES = TypeAdapter(list[Departure]).validate_python(yaml.safe_load((STUDY / "departures.yaml").read_text()))
OPTIONAL = {name for name in COLUMNS if name.startswith(("image_", "domain_"))}
"""Tables of the experiments that a scale may leave out."""


def test_estimands_exist_and_take_tables_and_settings():
    for claim in LEDGER.claims:
        assert list(inspect.signature(getattr(judge, claim.estimand)).parameters) == ["tables", "settings"]
    assert len({claim.estimand for claim in LEDGER.claims}) == len(LEDGER.claims)


def test_evidence_and_captions_name_tables_and_claims_that_exist():
    claims = {claim.id for claim in LEDGER.claims}
    for claim in LEDGER.claims:
        # A claim whose evidence is absent is not tested, so it is expected only where an experiment is always made.
        everywhere = set(COLUMNS) - (OPTIONAL if claim.expected_at != ("paper",) else set())
        assert set(claim.evidence_tables) <= everywhere
        assert set(claim.optional_tables) <= OPTIONAL
    for caption in CAPTIONS.values():
        assert set(caption.claims) <= claims
        assert set(caption.tables) <= set(COLUMNS)
        assert set(caption.tables) - OPTIONAL  # no figure is left without rows at any scale
    assert {claim for caption in CAPTIONS.values() for claim in caption.claims} == claims  # each claim has a figure
    drawn = {table for caption in CAPTIONS.values() for table in caption.tables}
    assert drawn == set(COLUMNS)  # nothing is measured that nobody sees


@pytest.mark.parametrize("claim", LEDGER.claims, ids=lambda claim: claim.id)
def test_an_estimand_reads_its_evidence_and_nothing_else(claim):
    tables = Watched(holding())
    getattr(judge, claim.estimand)(tables, EVERYTHING)
    assert tables.read == {*claim.evidence_tables, *claim.optional_tables}


def test_the_gradient_is_never_called_an_input_output_jacobian():
    for claim in LEDGER.claims:
        words = " ".join([claim.statement, *(criterion.quantity for criterion in claim.criteria)])
        assert "jacobian" not in words.lower()
    for name, caption in CAPTIONS.items():
        assert "jacobian" not in f"{caption.title} {caption.caption}".lower(), name


def test_what_goes_beyond_the_paper_is_called_an_extension():
    beyond = {claim.id for claim in LEDGER.claims if claim.extension}
    assert beyond == {claim.id for claim in LEDGER.claims if claim.evidence == "reconstructed"} == {"G4", "G16", "G17"}


def test_departures_are_complete_sentences_and_distinct():
    assert len({departure.paper for departure in DEPARTURES}) == len(DEPARTURES) >= 20
    for departure in DEPARTURES:
        for sentence in (departure.paper, departure.ours, departure.why):
            assert sentence.endswith(".")


@pytest.mark.parametrize("scale", SCALES)
def test_judged_seeds_are_not_those_of_pilots_and_suffice_for_the_criteria(scale):
    settings = scale_settings(scale)
    assert isinstance(settings, StudySettings)
    for name in StudySettings.model_fields:
        seeds = getattr(settings, name).seeds
        least = 1 if name == "engines" else 3
        assert len(seeds) >= least or (name in ("images", "domains") and not seeds)
        assert min(seeds, default=10) >= 10
