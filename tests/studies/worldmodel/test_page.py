"""The page of the study says what its ledger, captions and departures say."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from jacnorm.files import read_yaml
from jacnorm.report.claims import load_claims
from jacnorm.report.words import asked
from jacnorm.studies import worldmodel
from jacnorm.studies.worldmodel.episodes import Episodes

STUDY = Path(worldmodel.__file__).parent
PAGE = (Path(__file__).parents[3] / "docs" / "studies" / "worldmodel.md").read_text()
LEDGER = load_claims(STUDY / "claims.yaml")


def test_the_page_has_every_departure_and_figure():
    for departure in read_yaml(STUDY / "departures.yaml"):
        assert f"| {departure['paper']} | {departure['ours']} | {departure['why']} |" in PAGE
    for figure, caption in read_yaml(STUDY / "captions.yaml").items():
        assert f"- `{figure}`: {caption['title']}." in PAGE


def test_the_page_has_every_claim_with_its_margins():
    for claim in LEDGER.claims:
        (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {claim.id} | {claim.statement} |")]
        for criterion in claim.criteria:
            beside = "" if criterion.decides else " (shown, does not decide)"
            assert f"`{criterion.id}` {asked(criterion, plain=True)}{beside}" in row
        assert row.endswith(f"| {', '.join(claim.expected_at)} |")


@pytest.mark.parametrize("scale", ["smoke", "laptop"])
def test_results_are_missing_or_have_a_row_for_every_claim(scale):
    results = re.search(rf"<!-- verdicts:{scale} -->(.*)<!-- /verdicts:{scale} -->", PAGE, re.DOTALL)[1]
    if results.strip() == "Not measured yet.":
        return
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:] if row[0]] == [claim.id for claim in LEDGER.claims]
    deciding = {c.id for claim in LEDGER.claims for c in claim.criteria if scale in c.at and c.decides}
    assert deciding <= {row[2] for row in rows[2:]}


def test_the_page_says_what_cannot_fail():
    assert "they are shown as a check of the simulation and decide nothing" in PAGE
    for claim, criterion in (("W1", "slope"), ("W2", "slope")):
        assert not LEDGER.claim(claim).criterion(criterion).decides


def test_the_page_describes_the_file_of_episodes():
    section = PAGE.split("### Episodes of your own")[1].split("### ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [field.name for field in fields(Episodes)]
