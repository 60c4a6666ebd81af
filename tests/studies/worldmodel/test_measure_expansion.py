"""The step that measures the expansion: its table, whose draws are whose, and what the formulas promise of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.worldmodel.measure_expansion import expansion
from jacnorm.studies.worldmodel.settings import ExpansionSettings
from jacnorm.studies.worldmodel.tables import COLUMNS

torch.set_num_threads(1)

KEYS = ["matrix", "family", "scale", "epsilon"]
SMALL = {"paths": 4000, "matrices": 2, "steps": 50, "epsilons": [0.1, 0.2], "scales": [0.5, 1.0]}


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


def measured(folder, settings):
    """Call the step as a rule does; its table."""
    before = torch.get_deterministic_debug_mode()
    try:
        run({"expansion": expansion}, ["--tables", str(folder), "--device", "cpu", *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)
    return read_table(folder / f"expansion-s{min(settings.seeds)}-{max(settings.seeds)}.parquet")


def test_one_row_for_every_matrix_factor_and_size(tmp_path):
    table = measured(tmp_path, ExpansionSettings(seeds=[10, 11], **SMALL))
    assert list(table.columns) == list(COLUMNS["expansion"])
    assert len(table) == 2 * (2 + 2 + 2 * 2) * 2
    assert not table.duplicated(["seed", *KEYS]).any()
    assert set(table.family) == {"random", "identity", "semidefinite"}
    assert np.isfinite(table.select_dtypes("float")).all().all()


def test_a_seed_measures_the_same_alone(tmp_path):
    together = measured(tmp_path / "together", ExpansionSettings(seeds=[10, 11], **SMALL))
    alone = measured(tmp_path / "alone", ExpansionSettings(seeds=[11], **SMALL))
    mine = together[together.seed == 11].reset_index(drop=True)
    assert mine.equals(alone)
    assert not together[together.seed == 10].even.reset_index(drop=True).equals(mine.even)


def test_simulation_and_formula_tell_of_the_same_matrices(tmp_path):
    # Standard errors of 2000 draws, plus what 50 steps leave out: about |A| / 50, and more as |A| grows.
    table = measured(tmp_path, ExpansionSettings(seeds=[10], **SMALL))
    for part in ("even", "odd"):
        off = (table[part] - table[f"{part}_exact"]).abs()
        assert (off < 4 * table[f"{part}_error"] + 0.04 * table[f"{part}_exact"].abs()).all()
    off = (table.odd_reversed + table.odd_exact).abs()
    assert (off < 4 * table.odd_error + 0.04 * table.odd_exact.abs()).all()
    assert (table.even > 0).all()
    wide = table.pivot(index=["matrix", "family", "scale"], columns="epsilon", values=["even", "odd"])
    assert (wide["even", 0.2] / wide["even", 0.1]).tolist() == pytest.approx([4] * len(wide), rel=1e-9)
    assert (wide["odd", 0.2] / wide["odd", 0.1]).tolist() == pytest.approx([2] * len(wide), rel=1e-9)
