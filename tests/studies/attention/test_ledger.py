"""What is declared about the study agrees: claims, captions, tables, departures and settings."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter
from tests.studies.attention.invented import EVERYTHING, ROOT, holding, small
from tests.studies.watched import Watched

from jacnorm.config import load
from jacnorm.report import plotting
from jacnorm.report.claims import SCALES, load_claims
from jacnorm.report.drawing import read_captions_file
from jacnorm.report.manifest import Departure
from jacnorm.studies.attention import figures, judge
from jacnorm.studies.attention.settings import Normaliser, Space, StudySettings
from jacnorm.studies.attention.tables import COLUMNS

STUDY = Path(judge.__file__).parent
LEDGER = load_claims(STUDY / "claims.yaml")
CAPTIONS = read_captions_file(STUDY / "captions.yaml")
DEPARTURES = TypeAdapter(list[Departure]).validate_python(yaml.safe_load((STUDY / "departures.yaml").read_text()))
OPTIONAL = {name for name in COLUMNS if name.startswith("synthetic_")}
"""Tables of the experiment that stands beside the models."""


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
    tables = Watched(small())
    with plotting.style():
        figures.FIGURES[name](tables)
    assert tables.read == set(CAPTIONS[name].tables)


@pytest.mark.parametrize("claim", LEDGER.claims, ids=lambda claim: claim.id)
def test_an_estimand_reads_its_evidence_and_nothing_else(claim):
    tables = Watched(holding())
    getattr(judge, claim.estimand)(tables, EVERYTHING)
    assert tables.read == {*claim.evidence_tables, *claim.optional_tables}


def test_every_normaliser_and_space_of_the_settings_has_a_look():
    assert set(figures.NORMALISERS) == set(Normaliser.__args__)
    assert set(figures.SPACES) == set(Space.__args__)
    looks = [colour for colour, _ in figures.NORMALISERS.values()]
    assert len(set(looks)) == len(looks)
    assert set(judge.SPARSER) < set(Normaliser.__args__)


def test_departures_are_complete_sentences_and_distinct():
    assert len({departure.paper for departure in DEPARTURES}) == len(DEPARTURES) >= 20
    for departure in DEPARTURES:
        for sentence in (departure.paper, departure.ours, departure.why):
            assert sentence.endswith(".")


@pytest.mark.parametrize("scale", SCALES)
def test_judged_seeds_are_not_those_of_pilots_and_settings_hold_what_claims_name(scale):
    settings = load(ROOT / "configs", {"scale": scale}).studies["attention"]
    assert isinstance(settings, StudySettings)
    for this in (settings.probing, settings.synthetic):
        assert len(this.seeds) >= 3
        assert min(this.seeds) >= 10
        assert {0.5, 0.98} <= set(this.fractions)
        assert {1, judge.KNEE, judge.FAR} <= set(this.selected)
        assert min(this.temperatures) <= 0.01
        assert max(this.temperatures) >= 10
        assert len(this.lengths) > 1
        assert "softmax" in this.normalisers
    assert settings.probing.model is None or scale == "paper"
