"""What tests of several packages share."""

from __future__ import annotations

import pytest

from jacnorm.data.prepare import prepare


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The prepared digits."""
    path = tmp_path_factory.mktemp("data") / "digits.safetensors"
    prepare("digits", path)
    return path
