"""The benchmark's own parts: ways that agree, a comparison that fails when they do not, a table that divides."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from benchmarks import glstm
from benchmarks.glstm import AIMED, FULL, QUICK, SLOW, WAYS, Row

TINY = Row(6, 4, 3)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(glstm, "ENOUGH_SECONDS", 0.01)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_ways_are_timed_once_they_agree():
    seconds = glstm.compare(TINY)
    assert list(seconds) == list(WAYS)
    assert all(0 < each < 1 for each in seconds.values())


def test_message_passing_is_left_out_where_it_takes_long(monkeypatch):
    monkeypatch.setattr(glstm, "SLOW", 10)
    assert list(glstm.compare(TINY)) == ["stack of 1", "stack of 3"]


def test_ways_that_disagree_are_no_comparison(monkeypatch):
    def wrong(row, way, _original=glstm.message_passing):
        step = _original(row, way)
        return lambda index: step(index) * (1.01 if index == 3 else 1)

    monkeypatch.setattr(glstm, "message_passing", wrong)
    with pytest.raises(RuntimeError, match="matrix has the losses"):
        glstm.compare(TINY)


def test_both_lists_hold_the_row_of_the_aim():
    assert AIMED in QUICK
    assert AIMED in FULL
    assert AIMED.graphs * AIMED.neighbours <= SLOW


def test_the_report_is_written_and_divides_by_ours(tmp_path, monkeypatch, capsys):
    seconds = dict.fromkeys(WAYS, 1.0) | {"matrix": 3.0, "stack of 3": 0.5}
    answers = iter([seconds, {way: 0.002 for way in list(WAYS)[2:]}])
    monkeypatch.setattr(glstm, "compare", lambda row: next(answers))
    files = ["--out", str(tmp_path / "bench" / "glstm.json"), "--figure", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["glstm", "--quick", *files])
    glstm.main()
    report = json.loads((tmp_path / "bench" / "glstm.json").read_text())
    assert [row["sizes"] for row in report["rows"]] == [vars(row) for row in QUICK]
    assert report["versions"]["torch"] == torch.__version__
    assert (tmp_path / "cost-glstm.svg").read_text().startswith("<?xml")
    lines = capsys.readouterr().out.splitlines()
    assert "| 64 | 8 | 8 | 3e+03 | 1e+03 | 1e+03 | 500 | 3.0x, 6.0x |" in lines
    assert "| 64 | 32 | 16 | not run | not run | 2 | 2 |  |" in lines
