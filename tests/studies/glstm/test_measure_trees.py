"""The step that measures trees: its table, whose draws are whose, and the closed form of the mean."""

from __future__ import annotations

import math

import pytest
import torch

from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.glstm.measure_trees import trees
from jacnorm.studies.glstm.settings import TreesSettings
from jacnorm.studies.glstm.tables import COLUMNS

torch.set_num_threads(1)

KEYS = ["activation", "shape", "leaves"]


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


def measured(folder, settings):
    """Call the step as a rule does; its table."""
    before = torch.get_deterministic_debug_mode()
    try:
        run({"trees": trees}, ["--tables", str(folder), "--device", "cpu", *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)
    return read_table(folder / f"trees-s{min(settings.seeds)}-{max(settings.seeds)}.parquet")


def test_one_row_for_every_seed_activation_shape_and_size(tmp_path):
    settings = TreesSettings(seeds=[10, 11, 12], exponents=[1, 4])
    table = measured(tmp_path, settings)
    assert list(table.columns) == list(COLUMNS["trees"])
    assert len(table) == 3 * 4 * 2 * 2
    assert not table.duplicated(["seed", *KEYS]).any()
    assert set(table.leaves) == {2, 16}
    assert set(table.activation) == {"identity", "tanh", "relu", "gelu"}
    # Leaves of a star have equal norms, and so have those of a tree without an activation.
    equal = (table["shape"] == "shallow") | (table.activation == "identity") | (table.leaves == 2)
    spread = table.norm_square - table.norm**2
    assert (spread[equal].abs() < 1e-12 * table.norm_square[equal]).all()
    assert (spread[~equal] > 1e-9 * table.norm_square[~equal]).all()
    assert table.groupby(KEYS).norm.nunique().eq(3).all()  # every seed draws anew


def test_a_seed_measures_the_same_alone(tmp_path):
    together = measured(tmp_path / "together", TreesSettings(seeds=[10, 11], exponents=[3]))
    alone = measured(tmp_path / "alone", TreesSettings(seeds=[11], exponents=[3]))
    both = together[together.seed == 11].merge(alone, on=["seed", *KEYS], suffixes=("", "_alone"))
    assert len(both) == 8
    assert both.norm.tolist() == pytest.approx(both.norm_alone.tolist(), rel=1e-12)


def test_the_mean_over_seeds_of_a_star_is_that_of_its_closed_form(tmp_path):
    table = measured(tmp_path, TreesSettings(seeds=list(range(500, 700)), exponents=[1, 6], width=4))
    for leaves in (2, 64):
        norms = table[(table["shape"] == "shallow") & (table.leaves == leaves) & (table.activation == "tanh")].norm
        expected = 4**2 / 2 * math.sqrt(3 / 4) / math.sqrt(leaves + 1)
        assert norms.mean() == pytest.approx(expected, abs=4 * norms.std() / math.sqrt(len(norms)))
