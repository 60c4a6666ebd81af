"""The table of the engines' differences."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from jacnorm.files import read_table
from jacnorm.studies.fedgtst.loop import LoopEngine
from jacnorm.studies.fedgtst.measure_engines import engines, guide_difference, weights_difference
from jacnorm.studies.fedgtst.settings import EnginesSettings
from jacnorm.studies.fedgtst.tables import COLUMNS

METHODS = ["fedavg", "fediir", "fedgtst"]


@pytest.fixture(scope="module")
def table(digits, tmp_path_factory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        settings = EnginesSettings(methods=METHODS, client_samples=40, rounds=3)
        engines(settings, folder, [digits], "cpu")
    return read_table(folder / "engines-s10-10.parquet")


def test_there_is_a_row_for_each_method_engine_and_round(table):
    assert list(table.columns) == list(COLUMNS["engines"])
    found = set(zip(table.method, table.engine, table["round"], strict=True))
    assert found == {(m, e, r) for m in METHODS for e in ("loop", "flower") for r in (1, 2, 3)}
    assert len(table) == len(found)


def test_the_engines_agree(table):
    assert table.weights_difference.max() <= 1e-5
    assert table.guide_difference.max() <= 1e-5


def test_a_difference_would_be_seen(digits, tmp_path, monkeypatch):
    """A loop whose clients answer a thousandth too much is told apart, in weights and guide."""
    train = LoopEngine._train

    def other(self, messages, memories, jobs):
        replies, memories = train(self, messages, memories, jobs)
        return {name: tensor * 1.001 for name, tensor in replies.items()}, memories

    monkeypatch.setattr(LoopEngine, "_train", other)
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")
    engines(EnginesSettings(methods=["fedgtst"], client_samples=40, rounds=1), tmp_path, [digits], "cpu")
    rows = read_table(tmp_path / "engines-s10-10.parquet").set_index("engine")
    assert rows.weights_difference["loop"] > 1e-5 >= rows.weights_difference["flower"]
    assert rows.guide_difference["loop"] == pytest.approx(1e-3, rel=0.01)
    assert rows.guide_difference["flower"] <= 1e-5


def test_fedgtst_sends_one_number_more_each_way(table):
    """Eight bytes beside four for each of the 7,358 weights (claim 15)."""
    rows = table[table.method == "fedgtst"]
    assert set(rows.weight_bytes) == {4 * 7358}
    assert set(rows.bytes_down - rows.weight_bytes) == set(rows.bytes_up - rows.weight_bytes) == {8}
    plain = table[table.method == "fedavg"]
    assert set(plain.bytes_down) == set(plain.bytes_up) == {4 * 7358}


def test_fediir_asks_for_gradients_of_the_read_out(table):
    """Weights twice and m down; weights and the read-out's gradient (10 x 84 + 10) up."""
    rows = table[table.method == "fediir"]
    assert set(rows.bytes_down) == {4 * (2 * 7358 + 850)}
    assert set(rows.bytes_up) == {4 * (7358 + 850)}


def test_differences_by_hand():
    first = {"weights.a": torch.tensor([1.0, 2.0]), "weights.b": torch.zeros(1), "guide": torch.tensor(1.0)}
    second = {"weights.a": torch.tensor([1.0, 1.5]), "weights.b": torch.ones(1) * 0.25, "guide": torch.tensor(2.0)}
    assert weights_difference(first, second) == 0.5
    assert guide_difference(first, second) == 0.5
    assert guide_difference({"weights.a": torch.zeros(1)}, {"weights.a": torch.ones(1)}) == 0.0
