"""The mirror that the environment names serves only the tests that ask for it, a text of the user's none."""

import os
from pathlib import Path

import pytest

_MIRROR = os.environ.get("JACNORM_MIRROR")


@pytest.fixture(autouse=True)
def _no_mirror(monkeypatch):
    monkeypatch.delenv("JACNORM_MIRROR", raising=False)
    monkeypatch.delenv("JACNORM_TEXT", raising=False)
    monkeypatch.delenv("JACNORM_PHOTOS", raising=False)


@pytest.fixture(scope="session")
def real_mirror() -> Path:
    if not _MIRROR:
        pytest.skip("JACNORM_MIRROR names no folder with real data sets in the hub's layout")
    return Path(_MIRROR)
