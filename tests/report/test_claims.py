"""Declared claims: what is accepted, and the sentence for everything that is not."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jacnorm.errors import UserError
from jacnorm.report.claims import claim_margin, claims_digest, load_claims

GOOD = """
# a comment
study: stability
paper: {title: T, authors: A. B, arxiv: "2506.08764"}
claims:
  - id: C1
    statement: The norm is exponential.
    source: Fig. 1
    evidence: published
    expected_at: [smoke, laptop, paper]
    estimand: slopes
    published: {value: 3, unit: nats, source: Fig. 1}
    criteria:
      - {id: slope, quantity: slope, unit: nats, direction: within, low: -0.04, high: 0.04}
      - {id: zeros, quantity: violations, unit: "", direction: below, margin: 0, interval: exact}
      - {id: rise, quantity: slope, unit: nats, direction: above, margin: 2, min_seeds: 7, at: [paper], decides: false}
    evidence_tables: [depth]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "claims.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_ledger_is_read_with_its_defaults(tmp_path: Path) -> None:
    claim = load_claims(written(tmp_path, GOOD)).claim("C1")
    slope, zeros, rise = claim.criteria
    assert (slope.interval, slope.confidence, slope.min_seeds, slope.at) == ("t", 0.95, 5, ("smoke", "laptop", "paper"))
    assert (zeros.min_seeds, rise.min_seeds, rise.at, rise.decides) == (1, 7, ("paper",), False)
    assert claim.extension is False


def test_bounds_have_infinities_on_the_open_side(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    assert claim_margin(path, "C1", "slope") == (-0.04, 0.04)
    assert claim_margin(path, "C1", "zeros") == (-math.inf, 0.0)
    assert claim_margin(path, "C1", "rise") == (2.0, math.inf)


def test_unknown_names_list_what_exists(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    with pytest.raises(KeyError, match="study stability has no claim 'C9'; it has C1"):
        claim_margin(path, "C9", "slope")
    with pytest.raises(KeyError, match="claim C1 has no criterion 'bend'; it has slope, zeros, rise"):
        claim_margin(path, "C1", "bend")


def test_the_digest_sees_content_and_not_layout(tmp_path: Path) -> None:
    plain = claims_digest(written(tmp_path, GOOD))
    turned = yaml.safe_dump(yaml.safe_load(GOOD), sort_keys=True)
    assert claims_digest(written(tmp_path, "# other words\n" + turned)) == plain
    assert claims_digest(written(tmp_path, GOOD.replace("0.04}", "0.05}"))) != plain
    assert claims_digest(written(tmp_path, GOOD.replace("exponential", "polynomial"))) != plain


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("study: stability", "study: Stability", "study: string should match pattern"),
        ("authors: A. B, ", "", "paper.authors is missing"),
        (
            '"2506.08764"',
            "2506.08764",
            "paper.arxiv: input should be a valid string, but it is 2506.08764; write it in quotes",
        ),
        ("source: Fig. 1\n    evidence", "sauce: Fig. 1\n    evidence", r"claims\[0\] \(C1\).source is missing"),
        (
            "estimand: slopes",
            "estimand: slopes\n    color: red",
            r"claims\[0\] \(C1\).color is not a known key; remove it",
        ),
        (
            "evidence: published",
            "evidence: rumour",
            r"claims\[0\] \(C1\).evidence: input should be 'published', .* but it is 'rumour'",
        ),
        (
            "expected_at: [smoke, laptop, paper]",
            "expected_at: [moon]",
            r"claims\[0\] \(C1\).expected_at\[0\]: input should be",
        ),
        (
            "expected_at: [smoke, laptop, paper]",
            "expected_at: []",
            r"claims\[0\] \(C1\).expected_at: tuple should have at least 1 item",
        ),
        (
            "high: 0.04",
            'high: "0.04"',
            r"claims\[0\] \(C1\).criteria\[0\] \(slope\).high: input should be a valid number, but it is '0.04'",
        ),
        ("high: 0.04", "high: .inf", r"criteria\[0\] \(slope\).high: input should be a finite number, but it is inf"),
        (
            "low: -0.04, high: 0.04",
            "margin: 1",
            "direction 'within' needs low and high and nothing else, but margin is given",
        ),
        ("low: -0.04, high: 0.04", "low: 1, high: 0", r"low \(1\) must not exceed high \(0\)"),
        ("margin: 0, interval", "interval", "direction 'below' needs margin and nothing else, but nothing is given"),
        ("min_seeds: 7", "min_seeds: 1", "min_seeds must be at least 2 for interval 't', not 1"),
        (
            "interval: exact}",
            "interval: exact, min_seeds: 0}",
            "min_seeds must be at least 1 for interval 'exact', not 0",
        ),
        ("high: 0.04}", "high: 0.04, confidence: 1.0}", "confidence: input should be less than 1, but it is 1.0"),
        ("id: zeros", "id: slope", r"claims\[0\] \(C1\): criterion id 'slope' is given more than once"),
        (
            "evidence_tables: [depth]",
            "evidence_tables: [depth, depth]",
            "evidence table 'depth' is given more than once",
        ),
        ("evidence_tables: [depth]", "evidence_tables: []", "evidence_tables: tuple should have at least 1 item"),
        ("id: C1", "id: first", r"claims\[0\] \(first\).id: string should match pattern"),
        ("margin: 2, ", "margin: 2, margin: 3, ", "not valid YAML: key 'margin' is given 2 times"),
        ("claims:\n", "claims: [\n", "is not valid YAML"),
        ("statement: The norm is exponential.", "statement: ' '", "statement: string should match pattern"),
    ],
)
def test_every_mistake_has_its_sentence(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(UserError, match=sentence) as caught:
        load_claims(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_repeated_claims_are_refused(tmp_path: Path) -> None:
    text = GOOD + GOOD.partition("claims:\n")[2]
    with pytest.raises(UserError, match="the file: claim id 'C1' is given more than once"):
        load_claims(written(tmp_path, text))


def test_a_claim_needs_a_deciding_criterion(tmp_path: Path) -> None:
    text = GOOD.replace("high: 0.04}", "high: 0.04, decides: false}").replace(
        "interval: exact}", "interval: exact, decides: false}"
    )
    with pytest.raises(UserError, match="at least one criterion must decide"):
        load_claims(written(tmp_path, text))


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; correct its name or restore it"):
        load_claims(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="the file: input should be a valid dictionary"):
        load_claims(written(tmp_path, ""))


def test_importing_claims_stays_cheap() -> None:
    heavy = ("torch", "pandas", "numpy", "scipy", "pyarrow", "matplotlib")
    code = f"import sys, jacnorm.report.claims; sys.exit(', '.join(m for m in {heavy} if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
