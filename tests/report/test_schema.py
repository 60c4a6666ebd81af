"""The checked-in schemas are the generated ones, and real files satisfy them."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml
from tests.report.sample_study import CLAIMS, write_study

from jacnorm.files import read_json
from jacnorm.report.schema import FOLDER, schemas


@pytest.mark.parametrize("name", ["claims.schema.json", "verdicts.schema.json"])
def test_checked_in_schemas_are_current(name: str) -> None:
    assert read_json(FOLDER / name) == schemas()[name], "run: python -m jacnorm.report.schema"


def test_written_verdicts_satisfy_the_schema(tmp_path: Path) -> None:
    content = read_json(write_study(tmp_path) / "verdicts.json")
    checker = jsonschema.Draft202012Validator(schemas()["verdicts.schema.json"])
    checker.validate(content)
    content["claims"][3]["quantities"][0]["samples"][0] = "Infinity"
    assert not checker.is_valid(content)


def test_a_ledger_satisfies_the_schema() -> None:
    jsonschema.Draft202012Validator(schemas()["claims.schema.json"]).validate(yaml.safe_load(CLAIMS))
