"""`make verify` finds any difference between two runs, and says where it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from jacnorm import verify
from jacnorm.files import Column, write_json, write_table

COLUMNS = {"seed": Column("seed"), "norm": Column("norm", "1")}
ROWS = {"seed": [10, 11, 12], "norm": [1.0, float("nan"), 0.0]}


def run_of(folder: Path, rows=None, verdict="reproduced", columns=COLUMNS) -> Path:
    write_table(folder / "smoke/one/tables/depth.parquet", pd.DataFrame(rows or ROWS), columns)
    write_json(folder / "smoke/one/verdicts.json", {"C1": {"verdict": verdict, "seeds": 3}})
    return folder


def test_equal_runs_are_equal(tmp_path):
    assert verify.compare(run_of(tmp_path / "a"), run_of(tmp_path / "b")) == (2, [])


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        (ROWS | {"norm": [1.0, float("nan"), 1e-300]}, COLUMNS, "column norm, row 2 is 0.0 and 1e-300"),
        (ROWS | {"norm": [1.0, float("nan"), -0.0]}, COLUMNS, "column norm, row 2 is 0.0 and -0.0"),
        (ROWS | {"norm": [1.0, 2.0, 0.0]}, COLUMNS, "column norm, row 1 is None and 2.0"),
        (ROWS | {"seed": [10.0, 11.0, 12.0]}, COLUMNS, "column seed has type int64 and double"),
        ({"seed": [10], "norm": [1.0]}, COLUMNS, "3 rows and 1 rows"),
        (ROWS | {"more": [0, 0, 0]}, COLUMNS | {"more": Column("more")}, "columns are ['seed', 'norm'] and"),
        (ROWS, COLUMNS | {"norm": Column("norm", "dB")}, "the same values, but other metadata or encoding"),
    ],
)
def test_the_first_difference_of_a_table_is_named(tmp_path, rows, columns, said):
    count, (difference,) = verify.compare(run_of(tmp_path / "a"), run_of(tmp_path / "b", rows, columns=columns))
    assert count == 2
    assert difference.startswith("smoke/one/tables/depth.parquet: ")
    assert said in difference


def test_another_verdict_is_named(tmp_path):
    _, (difference,) = verify.compare(run_of(tmp_path / "a"), run_of(tmp_path / "b", verdict="contradicted"))
    assert difference.startswith("smoke/one/verdicts.json: line ")
    assert '"verdict": "reproduced"' in difference


def test_a_longer_file_of_verdicts_is_named(tmp_path):
    a, b = run_of(tmp_path / "a"), run_of(tmp_path / "b")
    with (b / "smoke/one/verdicts.json").open("a") as file:
        file.write("\n")
    _, (difference,) = verify.compare(a, b)
    assert difference == "smoke/one/verdicts.json: one is longer than the other"


def test_a_file_that_only_one_run_made_is_named(tmp_path):
    a, b = run_of(tmp_path / "a"), run_of(tmp_path / "b")
    (a / "smoke/one/verdicts.json").unlink()
    (b / "smoke/one/tables/depth.parquet").unlink()
    assert verify.compare(a, b) == (
        2,
        [
            "smoke/one/tables/depth.parquet: only the first run made it",
            "smoke/one/verdicts.json: only the second run made it",
        ],
    )


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Replace Snakemake by a function (folder, command) -> None."""
    commands = []

    def pretend(make):
        def run(command, check):
            commands.append(command)
            folder = Path(next(word for word in command if word.startswith("results=")).removeprefix("results="))
            assert not folder.exists(), "a run must start from nothing"
            make(folder, command)

        monkeypatch.setattr(verify.subprocess, "run", run)
        return commands

    return pretend


def test_two_runs_from_nothing_with_different_cores(tmp_path, runs, capsys):
    run_of(tmp_path / "first")  # left by an earlier call
    commands = runs(lambda folder, command: run_of(folder))
    verify.main(["--folder", str(tmp_path), "--cores", "7"])
    assert "all 2 tables and verdicts of both runs are the same" in capsys.readouterr().out
    for command, folder, cores in zip(commands, ("first", "second"), ("7", "1"), strict=True):
        assert command[:3] == [sys.executable, "-m", "snakemake"]
        assert command[command.index("--cores") + 1] == cores
        assert command[-4:] == ["scale=smoke", f"results={tmp_path / folder}", "--", "all"]


def test_runs_that_depend_on_the_cores_are_caught(tmp_path, runs, capsys):
    runs(lambda folder, command: run_of(folder, verdict=command[command.index("--cores") + 1]))
    with pytest.raises(SystemExit) as stopped:
        verify.main(["--folder", str(tmp_path)])
    assert stopped.value.code == 1
    assert "NOT repeatable: 1 of 2 files differ" in capsys.readouterr().out


def test_a_run_that_fails_or_makes_nothing_is_no_success(tmp_path, runs, capsys):
    runs(lambda folder, command: None)
    with pytest.raises(SystemExit) as stopped:
        verify.main(["--folder", str(tmp_path)])
    assert stopped.value.code == 1
    assert "made no tables" in capsys.readouterr().err

    def fail(folder, command):
        raise subprocess.CalledProcessError(3, command)

    runs(fail)
    with pytest.raises(SystemExit) as stopped:
        verify.main(["--folder", str(tmp_path)])
    assert stopped.value.code == 1
    assert "a run failed (exit status 3)" in capsys.readouterr().err


def test_verdicts_are_read_as_they_are_written(tmp_path):
    """The comparison of lines rests on one value per line."""
    run_of(tmp_path)
    lines = (tmp_path / "smoke/one/verdicts.json").read_text().splitlines()
    assert len(lines) > 4
    assert json.loads("\n".join(lines))["C1"]["seeds"] == 3
