"""JSON Schemas of the files that other programs may read or write: claims.yaml and verdicts.json.

python -m jacnorm.report.schema     rewrites both files beside this module; a test holds them up to date
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jacnorm.files import write_json
from jacnorm.report.claims import Ledger
from jacnorm.report.verdicts import StudyVerdicts

FOLDER = Path(__file__).parent


def schemas() -> dict[str, dict[str, Any]]:
    """File name -> schema, generated from the typed models."""
    return {
        "claims.schema.json": Ledger.model_json_schema(),
        "verdicts.schema.json": StudyVerdicts.model_json_schema(mode="serialization"),
    }


if __name__ == "__main__":
    for name, schema in schemas().items():
        write_json(FOLDER / name, schema)
