"""The step for rows with known geometry: every table, one row by hand, and what is known about such rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tests.studies.attention import brute

from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.attention import measure_synthetic
from jacnorm.studies.attention.measure_synthetic import measured, synthetic
from jacnorm.studies.attention.settings import SyntheticSettings
from jacnorm.studies.attention.synthetic import draw
from jacnorm.studies.attention.tables import COLUMNS, MEASURED
from jacnorm.training.seeds import RunId

torch.set_num_threads(1)
SETTINGS = SyntheticSettings(
    seeds=[10, 11],
    selected=[1, 4, 8],
    fractions=[0.5, 0.98],
    lengths=[8, 20, 60],
    dimension=6,
    heads=3,
    rows=2,
    subsets=4,
    subset_rows=2,
    temperatures=[0.1, 1.0],
    perturbations=[1e-3],
    normalisers=["softmax", "sparsemax"],
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


def call(settings, folder: Path) -> dict[str, pd.DataFrame]:
    before = torch.get_deterministic_debug_mode()
    try:
        run({"synthetic": synthetic}, ["--device", "cpu", "--tables", str(folder), *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)  # a job switches it on for its process, and this one goes on
    return {path.stem.rpartition("-s")[0]: read_table(path) for path in folder.glob("*.parquet")}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        return call(SETTINGS, tmp_path_factory.mktemp("synthetic"))


def test_every_table_is_written_and_whole(tables):
    assert set(tables) == {f"synthetic_{name}" for name in MEASURED}
    for name, table in tables.items():
        assert list(table) == list(COLUMNS[name])
        assert set(table.seed) == {10, 11}
        assert set(table["head"]) == {1, 2, 3}
        assert set(table.normaliser) == {"softmax", "sparsemax"}
        assert (table.data_set == "synthetic").all()
        assert table.drop(columns=[c for c in table if "sampl" in c]).notna().all(axis=None)
    distances = tables["synthetic_distances"]
    cells = {name: set(zip(t.length, t.selected, strict=True)) for name, t in distances.groupby("normaliser")}
    every = {(8, 1), (8, 4), (8, 5)} | {(length, n) for length in (20, 60) for n in (1, 4, 5, 8)}
    assert cells == {"softmax": every, "sparsemax": {(8, 5), (20, 5)} | {(60, n) for n in (1, 4, 5, 8)}}
    softmax = distances.normaliser == "softmax"
    assert distances.expectation_sampled.notna().equals(softmax)
    assert (distances.rows == 2).all()
    assert (distances.skipped_rows == 0).all()


def test_rows_with_fewer_keys_are_the_first_keys_of_the_others(tables):
    drawn = draw(SETTINGS, RunId("attention", "synthetic d=6 c=0.3 sigma=3.0", 11))
    for length, n in ((8, 5), (60, 4)):
        logits, x = drawn.logits[2, :, :length].numpy(), drawn.vectors[2, :length].numpy()
        weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        expected = pd.DataFrame([brute.row(row, x, length, n) for row in weights]).mean()
        for table, names in (
            ("distances", ["distance", "bound", "expectation"]),
            ("separability", ["ratio", "lower", "upper"]),
        ):
            rows = tables[f"synthetic_{table}"].query(
                f"seed == 11 and head == 3 and normaliser == 'softmax' and length == {length} and selected == {n}"
            )
            assert rows[names].to_numpy().tolist() == [pytest.approx(expected[names].tolist(), rel=1e-6)]


def test_a_seed_alone_gives_the_same_rows(tables, tmp_path):
    alone = call(SETTINGS.model_copy(update={"seeds": [11]}), tmp_path)
    for name, table in tables.items():
        pd.testing.assert_frame_equal(alone[name], table[table.seed == 11].reset_index(drop=True))


def test_rows_do_not_depend_on_how_many_heads_are_measured_at_once(tables, monkeypatch):
    monkeypatch.setattr(measure_synthetic, "CHUNK", 1)
    alone = pd.DataFrame([row for name, row in measured(SETTINGS, 10, CPU) if name == "separability"])
    key = ["head", "normaliser", "length", "selected"]
    whole = tables["synthetic_separability"]
    pd.testing.assert_frame_equal(
        alone.sort_values(key).reset_index(drop=True)[list(whole)],
        whole[whole.seed == 10].sort_values(key).reset_index(drop=True),
    )


def test_distances_grow_and_collapse_as_is_known_for_such_rows():
    """Means over 48 heads of rows made by other code: 17.6, 35.1, 66.1 for L = 32, 64, 128 at N = 5 (0.05 each way)."""
    settings = SyntheticSettings(
        selected=[5], lengths=[32, 64, 128], heads=48, rows=8, normalisers=["softmax"], temperatures=[1.0], subsets=2
    )
    found = pd.DataFrame([row for name, row in measured(settings, 0, CPU) if name == "distances"])
    means = found.groupby("length").distance.mean()
    assert means.tolist() == pytest.approx([17.6, 35.1, 66.1], rel=0.05)
