"""Tests of the study are not tracked."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")
