"""The benchmark's own parts: ways that agree, a comparison that fails when they do not, a table that divides."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from benchmarks import fedgtst
from benchmarks.fedgtst import AIMED, FULL, QUICK, WAYS, Row

HERE = ("flower", "simulation")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(fedgtst, "ENOUGH_SECONDS", 0.01)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["fedavg", "fedgtst"])
def test_our_engines_and_modules_are_timed_once_they_agree(method):
    seconds = fedgtst.compare(Row(method, 2, HERE))
    assert list(seconds) == ["batched", "loop", "modules"]
    assert all(0 < each < 10 for each in seconds.values())


def test_flower_in_one_process_is_timed_too():
    pytest.importorskip("flwr")
    assert list(fedgtst.compare(Row("fedgtst", 2, ("modules", "simulation")))) == ["batched", "loop", "flower"]


def test_ways_that_disagree_are_no_comparison(monkeypatch):
    def wrong(row, _original=fedgtst.by_modules):
        step = _original(row)
        return lambda index: step(index) + 5e-3

    monkeypatch.setattr(fedgtst, "by_modules", wrong)
    with pytest.raises(RuntimeError, match=r"fedavg, K = 2: modules reaches weights that differ by 0\.00"):
        fedgtst.compare(Row("fedavg", 2, HERE))


def test_what_is_not_installed_is_not_measured(monkeypatch):
    monkeypatch.setattr(fedgtst, "installed", lambda package: False)
    monkeypatch.setattr(fedgtst, "measured", lambda row, way: (1.0, torch.zeros(3)))
    assert fedgtst.compare(Row("fedgtst", 2)) == dict.fromkeys(WAYS, 1.0) | {"flower": None, "simulation": None}


def test_a_simulation_that_fails_says_why(monkeypatch):
    ended = subprocess.CompletedProcess([], 3, "", "no memory left")
    monkeypatch.setattr(fedgtst.subprocess, "run", lambda *arguments, **options: ended)
    with pytest.raises(RuntimeError, match="ended with code 3: no memory left"):
        fedgtst.simulated(Row("fedgtst", 2))


def test_cpu_time_of_children_counts():
    before = fedgtst.tree_seconds()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        while fedgtst.tree_seconds() < before + 0.1:
            assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_both_lists_hold_the_row_of_the_aim():
    assert AIMED in FULL
    assert (AIMED.method, AIMED.clients) in {(row.method, row.clients) for row in QUICK}
    assert {row.clients for row in FULL if row.method == "fedgtst"} == {10, 50, 100, 200}
    assert "loop" not in AIMED.without


def test_the_report_is_written_drawn_and_divides_by_ours(tmp_path, monkeypatch, capsys):
    seconds = dict.fromkeys(WAYS, 1.0) | {"batched": 0.25, "simulation": None}
    answers = iter([seconds, {"batched": 0.5, "loop": 1.5, "modules": 1.0}])
    monkeypatch.setattr(fedgtst, "compare", lambda row: next(answers))
    out, pictures = tmp_path / "bench" / "fedgtst.json", tmp_path / "figures"
    monkeypatch.setattr(sys, "argv", ["fedgtst", "--quick", "--out", str(out), "--figure", str(pictures)])
    fedgtst.main()
    report = json.loads(out.read_text())
    assert [(row["method"], row["clients"]) for row in report["rows"]] == [(row.method, row.clients) for row in QUICK]
    assert report["versions"]["torch"] == torch.__version__
    lines = capsys.readouterr().out.splitlines()
    measured = "| fedgtst | 10 | 250 | 1e+03 | 1e+03 | 1e+03 | not measured: not installed | 4.0x, 4.0x, 4.0x |"
    assert measured in lines
    assert "| fedgtst | 50 | 500 | 1.5e+03 | 1e+03 | not run | not run | 3.0x, 2.0x |" in lines
    assert (pictures / "cost-fedgtst.svg").read_text().count("<svg") == 1
