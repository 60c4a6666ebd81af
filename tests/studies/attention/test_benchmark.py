"""The benchmark's own parts: rows that are what they say, tasks that run, a table that divides by the plain pass."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from benchmarks import attention
from benchmarks.attention import AIM, FULL, QUICK, TASKS, Row

TINY = Row("tiny", "GPT-2, tiny", 2, 2, 8, 12, 30, 0, {**attention._SOME, "selected": [1, 3], "fractions": [0.5]})


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("row", [TINY, dataclasses.replace(TINY, key_heads=1)], ids=["GPT-2", "Llama"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_on_every_kind_of_model(row, task, one_thread):
    with torch.random.fork_rng():
        model, token_ids = attention.build(row)
    attention.runner(row, task, model, token_ids)()


def test_what_is_timed_is_the_quickest_window(monkeypatch, one_thread):
    monkeypatch.setattr(attention, "ENOUGH_SECONDS", 0.05)
    with torch.random.fork_rng():
        found = attention.measure(TINY, "capture")
    assert 0 < found["cpu_seconds"] < 0.05
    assert 1 <= found["runs"] <= attention.MOST_RUNS
    assert found["peak_bytes"] >= 0


def test_a_row_builds_the_same_model_twice(one_thread):
    with torch.random.fork_rng():
        (first, x), (second, z) = attention.build(TINY), attention.build(TINY)
    assert torch.equal(x, z)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_plain_pass_without_attention_is_no_comparison(one_thread):
    with torch.random.fork_rng():
        model, token_ids = attention.build(TINY)
    with pytest.raises(RuntimeError, match="did not return the attention of all layers"):
        attention.runner(dataclasses.replace(TINY, layers=3), "plain", model, token_ids)()


def test_the_largest_row_is_gpt2():
    row = next(row for row in FULL if row.name == "gpt2")
    assert (row.layers, row.heads, row.width, row.length, row.vocabulary) == (12, 12, 768, 1024, 50257)
    for rows in (FULL, QUICK):
        assert len({row.name for row in rows}) == len(rows)


def answers(**changes):
    times = {"plain": 2.0, "plain without logits": 1.0, "capture": 2.5, "metrics": 20.0}
    found = {task: {"cpu_seconds": seconds, "runs": 3, "peak_bytes": 2**21} for task, seconds in times.items()}
    tasks = {**found, **changes}
    machine = {"processor": "P", "threads": 1, "memory_bytes": 2**34}
    row = {"name": "r", "words": "a model", "length": 100, "tasks": tasks}
    return {"machine": machine, "versions": {"torch": "2"}, "quick": True, "rows": [row]}


def test_the_table_divides_by_the_plain_pass():
    text = attention.table(answers())
    assert f"| a model | {TASKS['capture']} | 2.5 | 40 | 1.25x | 2 |" in text
    assert f"at most {AIM:g} times" in text
    assert text.startswith("P, 1 thread, 16 GiB; torch 2 (quick sizes).")


def test_the_table_says_what_failed():
    text = attention.table(answers(plain={"failure": "did not finish in 240 s"}))
    assert f"| a model | {TASKS['plain']} | did not finish in 240 s | | | |" in text
    assert f"| a model | {TASKS['capture']} | 2.5 | 40 |  | 2 |" in text


def test_a_task_that_fails_or_runs_out_of_time_says_so(monkeypatch):
    monkeypatch.setattr(attention, "TIME_LIMIT", 0.01)
    assert attention.child(QUICK[0], "plain", quick=True) == {"failure": "did not finish in 0.01 s"}
    monkeypatch.setattr(attention, "TIME_LIMIT", 60)
    assert attention.child(TINY, "plain", quick=True)["failure"].startswith("failed: ")


def test_the_report_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(attention, "child", lambda row, task, quick: answers()["rows"][0]["tasks"][task])
    monkeypatch.setattr("sys.argv", ["benchmarks.attention", "--quick", "--out", str(tmp_path / "bench" / "a.json")])
    attention.main()
    report = json.loads((tmp_path / "bench" / "a.json").read_text())
    assert [row["name"] for row in report["rows"]] == [row.name for row in QUICK]
    assert report["quick"]
    assert "1.25x" in capsys.readouterr().out
