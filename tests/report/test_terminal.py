"""The verdict table: a grid on a terminal, one plain line per claim elsewhere."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tests.report.sample_study import HOSTILE, write_study

from jacnorm.errors import UserError
from jacnorm.report.terminal import main, print_verdicts


def shown(path: Path, **options: object) -> str:
    console = Console(file=io.StringIO(), **options)
    print_verdicts([path], "results/smoke/report/index.html", console)
    return console.file.getvalue()


@pytest.fixture
def verdicts(tmp_path: Path) -> Path:
    return write_study(tmp_path) / "verdicts.json"


def test_logs_get_one_plain_line_per_claim(verdicts: Path) -> None:
    lines = shown(verdicts, width=40).splitlines()
    assert lines == [
        "sample.C1         reproduced    0.011 [-0.001, 0.023] (+2 more); asked within [-0.04, 0.04] nats per layer; "
        "paper: 0.347 nats per layer",
        "sample.C2         contradicted  0.0281 [0.0197, 0.0366]; asked at most 0.01 nats per layer; paper: no number",
        "sample.C3         inconclusive  0.868 [0.840, 0.895]; asked within [0.85, 1.08]; paper: no number",
        "sample.C4         inconclusive  189 [37.7, 947] (+2 more); asked at least 100; paper: no number",
        "sample.C5         not tested    -; asked -; paper: no number",
        "sample.C6 (ext.)  inconclusive  21.4 [19.9, 22.9]; asked at least 10 nats; paper: no number",
        "sample at scale smoke: 1 reproduced, 1 contradicted, 2 inconclusive, 1 not tested; "
        "1 stress test beyond the paper",
        "Report: results/smoke/report/index.html",
    ]


@pytest.mark.parametrize("width", [50, 80, 160])
def test_a_terminal_of_any_width_gets_a_table(verdicts: Path, width: int) -> None:
    text = shown(verdicts, width=width, force_terminal=True, color_system=None)
    table = [line for line in text.splitlines() if line[:1] in "│┃"]
    assert max(map(len, table)) <= width
    for word in ("C1", "reproduced", "C2", "contradicted", "C5", "not tested", "C6"):
        assert word in text
    assert ("Statement" in text) == (width == 160)
    assert ("Estimate [interval]" in text) or width < 160


def test_markup_in_a_statement_is_only_text(verdicts: Path) -> None:
    text = verdicts.read_text().replace(HOSTILE.replace('"', '\\"'), "[bold]not markup[/bold]")
    verdicts.write_text(text)
    assert "[bold]" in shown(verdicts, width=400, force_terminal=True, color_system=None)


def test_the_command_prints_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path)
    main(tmp_path)
    assert "Report:" not in capsys.readouterr().out
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").touch()
    main(tmp_path, ["sample"])
    assert f"Report: {tmp_path}/report/index.html" in capsys.readouterr().out


def test_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no verdicts; run make reproduce first"):
        main(tmp_path)
    command = [sys.executable, "-m", "jacnorm.report.terminal", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"ERROR: {tmp_path} holds no verdicts; run make reproduce first\n"
