"""What is declared about the study agrees: claims, captions, tables, departures, settings and the page for readers."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from jacnorm.config import load
from jacnorm.report.claims import SCALES, load_claims
from jacnorm.report.drawing import read_captions_file
from jacnorm.report.manifest import Departure
from jacnorm.studies.stability import figures, judge
from jacnorm.studies.stability.settings import StudySettings
from jacnorm.studies.stability.tables import COLUMNS

ROOT = Path(__file__).parents[3]
STUDY = Path(judge.__file__).parent
LEDGER = load_claims(STUDY / "claims.yaml")
CAPTIONS = read_captions_file(STUDY / "captions.yaml")
DEPARTURES = TypeAdapter(list[Departure]).validate_python(yaml.safe_load((STUDY / "departures.yaml").read_text()))
PAGE = (ROOT / "docs/studies/stability.md").read_text()


def test_estimands_exist_and_take_tables_and_settings():
    for claim in LEDGER.claims:
        assert list(inspect.signature(getattr(judge, claim.estimand)).parameters) == ["tables", "settings"]
    assert len({claim.estimand for claim in LEDGER.claims}) == len(LEDGER.claims)


def test_evidence_and_captions_name_tables_and_claims_that_exist():
    claims = {claim.id for claim in LEDGER.claims}
    for claim in LEDGER.claims:
        assert claim.evidence_tables
        assert set(claim.evidence_tables) <= set(COLUMNS)
    for caption in CAPTIONS.values():
        assert caption.claims
        assert set(caption.claims) <= claims
        assert caption.tables
        assert set(caption.tables) <= set(COLUMNS)
    assert {claim for caption in CAPTIONS.values() for claim in caption.claims} == claims  # each claim has a figure
    drawn = {table for caption in CAPTIONS.values() for table in caption.tables}
    assert drawn == set(COLUMNS)  # nothing is measured that nobody sees


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_figure_reads_the_tables_that_its_caption_names(name):
    named = set(re.findall(r'tables\["(\w+)"\]', inspect.getsource(figures.FIGURES[name])))
    assert named == set(CAPTIONS[name].tables)


def test_an_estimand_reads_its_evidence_and_little_else():
    for claim in LEDGER.claims:
        named = set(re.findall(r'tables\["(\w+)"\]', inspect.getsource(getattr(judge, claim.estimand))))
        assert named <= {*claim.evidence_tables, "curves"}  # the curves say which trainings diverged


def test_experiments_of_captions_are_those_of_the_page():
    experiments = {re.match(r"E\d+", caption.title)[0] for caption in CAPTIONS.values()}
    assert experiments == {f"E{number}" for number in range(1, 11)}
    assert experiments == set(re.findall(r"^\| (E\d+) \|", PAGE, re.MULTILINE))


def test_the_page_has_every_departure_claim_and_figure():
    assert DEPARTURES
    for departure in DEPARTURES:
        assert departure.ours in PAGE
    for claim in LEDGER.claims:
        assert re.search(rf"\b{claim.id}\b", PAGE)
    for figure in CAPTIONS:
        assert f"`{figure}`" in PAGE


def test_the_page_has_a_row_of_results_for_every_claim_and_criterion_at_smoke():
    results = re.search(r"<!-- verdicts:smoke -->(.*)<!-- /verdicts:smoke -->", PAGE, re.DOTALL)[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:] if row[0]] == [claim.id for claim in LEDGER.claims]
    asked = [c.id for claim in LEDGER.claims for c in claim.criteria if "smoke" in c.at]
    assert [row[2] for row in rows[2:]] == asked


@pytest.mark.parametrize("scale", SCALES)
def test_judged_seeds_are_not_those_of_pilots(scale):
    settings = load(ROOT / "configs", {"scale": scale}).studies["stability"]
    assert isinstance(settings, StudySettings)
    for name in StudySettings.model_fields:
        assert min(getattr(settings, name).seeds) >= 10
        assert len(getattr(settings, name).seeds) >= 5
