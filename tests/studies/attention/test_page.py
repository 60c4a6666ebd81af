"""The page of the study says what its ledger, captions and departures say."""

from __future__ import annotations

import re
from pathlib import Path

from jacnorm.files import read_yaml
from jacnorm.report.claims import load_claims
from jacnorm.studies import attention

STUDY = Path(attention.__file__).parent
PAGE = (Path(__file__).parents[3] / "docs" / "studies" / "attention.md").read_text()
LEDGER = load_claims(STUDY / "claims.yaml")


def test_the_page_has_every_departure_and_figure():
    for departure in read_yaml(STUDY / "departures.yaml"):
        row = f"| {departure['paper']} | {departure['ours']} | {departure['why']} |"
        assert row in PAGE
    for figure in read_yaml(STUDY / "captions.yaml"):
        assert f"`{figure}`" in PAGE


def test_the_page_names_every_claim_and_its_kind_of_evidence():
    table = re.search(r"\| evidence \| claims \|(.*?)\n\n", PAGE, re.DOTALL)[1]
    for claim in LEDGER.claims:
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {claim.evidence}")]
        assert re.search(rf"\b{claim.id}\b", row), claim.id


def test_the_page_has_a_row_of_results_for_every_claim_at_smoke():
    results = re.search(r"<!-- verdicts:smoke -->(.*)<!-- /verdicts:smoke -->", PAGE, re.DOTALL)[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:] if row[0]] == [claim.id for claim in LEDGER.claims]
    deciding = {c.id for claim in LEDGER.claims for c in claim.criteria if "smoke" in c.at and c.decides}
    assert deciding <= {row[2] for row in rows[2:]}
