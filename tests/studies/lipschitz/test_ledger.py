"""What is declared about the study agrees: claims, captions, tables, departures and settings."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter
from tests.studies.lipschitz.invented import EVERYTHING, ROOT, holding
from tests.studies.watched import Watched

from jacnorm.config import load
from jacnorm.report import plotting
from jacnorm.report.claims import SCALES, load_claims
from jacnorm.report.drawing import read_captions_file
from jacnorm.report.manifest import Departure
from jacnorm.studies.lipschitz import figures, judge
from jacnorm.studies.lipschitz.settings import StudySettings
from jacnorm.studies.lipschitz.tables import COLUMNS

STUDY = Path(judge.__file__).parent
LEDGER = load_claims(STUDY / "claims.yaml")
CAPTIONS = read_captions_file(STUDY / "captions.yaml")
DEPARTURES = TypeAdapter(list[Departure]).validate_python(yaml.safe_load((STUDY / "departures.yaml").read_text()))
OPTIONAL = {"table_errors", "table_norms"}
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


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_figure_reads_the_tables_that_its_caption_names(name):
    tables = Watched(holding())
    with plotting.style():
        figures.FIGURES[name](tables)
    # Errors and norms of the regulariser are looked up together.
    spare = OPTIONAL | {"paired_norms"} if name == "errors" else set()
    assert set(CAPTIONS[name].tables) <= tables.read <= set(CAPTIONS[name].tables) | spare


@pytest.mark.parametrize("claim", LEDGER.claims, ids=lambda claim: claim.id)
def test_an_estimand_reads_its_evidence_and_nothing_else(claim):
    tables = Watched(holding())
    getattr(judge, claim.estimand)(tables, EVERYTHING)
    norms = {"paired_norms", "table_norms"} if "paired_errors" in claim.evidence_tables else set()
    named = {*claim.evidence_tables, *claim.optional_tables}
    assert named <= tables.read <= named | norms  # looked up beside the errors, and used by L13 alone


def test_departures_are_complete_sentences_and_distinct():
    assert len({departure.paper for departure in DEPARTURES}) == len(DEPARTURES) >= 20
    for departure in DEPARTURES:
        for sentence in (departure.paper, departure.ours, departure.why):
            assert sentence.endswith(".")


@pytest.mark.parametrize("scale", SCALES)
def test_judged_seeds_are_not_those_of_pilots_and_suffice_for_the_criteria(scale):
    settings = load(ROOT / "configs", {"scale": scale}).studies["lipschitz"]
    assert isinstance(settings, StudySettings)
    least = {"depth": 5, "residual": 3, "paired": 5, "table": 3}
    assert set(least) == set(StudySettings.model_fields)
    for name, needed in least.items():
        seeds = getattr(settings, name).seeds
        assert len(seeds) >= needed or (name, seeds) == ("table", [])
        assert min(seeds, default=10) >= 10
    assert settings.table.seeds or scale == "smoke"
