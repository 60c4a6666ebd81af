"""The benchmark's own parts: ways that agree, a comparison that fails when they do not, a table that divides."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from benchmarks import worldmodel
from benchmarks.worldmodel import FULL, QUICK, WAYS, Row

TINY = Row(6, 8, 2, 3, 2)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(worldmodel, "ENOUGH_SECONDS", 0.01)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_ways_are_timed_once_they_agree():
    seconds = worldmodel.compare(TINY)
    assert list(seconds) == list(WAYS)
    assert all(0 < each < 10 for each in seconds.values())


def test_only_the_ways_with_a_penalty_have_one():
    shares = {way: worldmodel.stack_of(TINY, way, [0], "cpu").step(0).get("penalty_share") for way in WAYS}
    assert shares["none"] is None
    assert 0 < shares["f"] < shares["f and prior"]


@pytest.mark.parametrize(
    ("ways", "runs", "message"),
    [(set(WAYS), 1, "none: the last run, together and alone, step 3"), ({"f"}, 2, "f and no penalty, at the start")],
)
def test_losses_that_disagree_are_no_comparison(ways, runs, message, monkeypatch):
    """Changed are the runs that train alone, or one way from the start, alone and together."""
    original = worldmodel.stack_of

    def wrong(row, way, seeds, device):
        stack = original(row, way, seeds, device)
        step = stack.step

        def changed(index):
            found = step(index)
            factor = 1.001 if way in ways and (len(seeds) == 1 and index == 3 if runs == 1 else index == 0) else 1.0
            return {name: value * factor for name, value in found.items()}

        stack.step = changed
        return stack

    monkeypatch.setattr(worldmodel, "stack_of", wrong)
    with pytest.raises(RuntimeError, match=message):
        worldmodel.compare(TINY)


def test_each_size_has_runs_alone_to_compare_with():
    for rows in (QUICK, FULL):
        sizes = {(row.deter, row.hidden, row.batch, row.length) for row in rows}
        assert {(row.deter, row.hidden, row.batch, row.length) for row in rows if row.runs == 1} == sizes


def test_the_report_is_written_and_divides(tmp_path, monkeypatch, capsys):
    answers = iter(
        [
            {"none": 0.010, "f": 0.011, "f and prior": 0.012},
            {"none": 0.015, "f": 0.018, "f and prior": 0.018},
        ]
    )
    monkeypatch.setattr(worldmodel, "compare", lambda row, device: next(answers))
    monkeypatch.setattr(sys, "argv", ["worldmodel", "--quick", "--out", str(tmp_path / "bench" / "worldmodel.json")])
    worldmodel.main()
    report = json.loads((tmp_path / "bench" / "worldmodel.json").read_text())
    assert [row["sizes"] for row in report["rows"]] == [vars(row) for row in QUICK]
    assert report["versions"]["torch"] == torch.__version__
    assert report["device"] == "cpu"
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "CPU milliseconds per step and run. Aims: at most +15 % on f and +25 % on f and prior." in lines
    assert "| 32 | 32 | 16 | 16 | 1 | 10 | 11 (+10 %) | 12 (+20 %) | 1.0x |" in lines
    assert "| 32 | 32 | 16 | 16 | 3 | 5 | 6 (+20 %) | 6 (+20 %) | 2.0x |" in lines
    on_gpu = worldmodel.table({**report, "device": "a GPU"})
    assert "Wall milliseconds per step and run on a GPU." in on_gpu
