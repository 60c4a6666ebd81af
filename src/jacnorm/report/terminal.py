"""The verdict table in the terminal.

python -m jacnorm.report.terminal results/smoke
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from jacnorm.errors import UserError
from jacnorm.report.records import ClaimVerdict, StudyVerdicts, Verdict, read_verdicts
from jacnorm.report.words import asked, estimate, published
from jacnorm.step import run

STYLES = {
    Verdict.reproduced: "green",
    Verdict.contradicted: "bold red",
    Verdict.inconclusive: "yellow",
    Verdict.not_tested: "dim",
}
NARROW = 100


def print_verdicts(
    paths: Sequence[Path | str], report: Path | str | None = None, console: Console | None = None
) -> None:
    """Print the verdicts of some `verdicts.json` files and the path of the report.

    On a terminal a table per study (fewer columns where it is narrow); elsewhere one plain line per claim, so that
    logs stay readable and `grep` works.
    """
    console = console or Console()
    for path in paths:
        study = read_verdicts(path)
        if console.is_terminal:
            console.print(_table(study, narrow=console.width < NARROW))
        else:
            for line in _lines(study):
                console.print(line, soft_wrap=True, markup=False, highlight=False)
        console.print(_tally(study), soft_wrap=True, markup=False, highlight=False)
    if report is not None:
        console.print(f"Report: {report}", soft_wrap=True, markup=False, highlight=False)


def _numbers(verdict: ClaimVerdict) -> tuple[str, str]:
    """The estimate of the quantity that matters most, and what is asked of it."""
    first = verdict.headline
    if first is None:
        return "-", "-"
    more = len(verdict.deciding) - 1
    return estimate(first, plain=True) + (f" (+{more} more)" if more else ""), asked(
        verdict.claim.criterion(first.criterion), plain=True
    )


def _table(study: StudyVerdicts, narrow: bool) -> Table:
    table = Table(
        title=Text(f"{study.study} at scale {study.scale}: {study.paper.title}"), title_justify="left", expand=True
    )
    table.add_column("Claim", no_wrap=True)
    table.add_column("Verdict", no_wrap=True)
    table.add_column(Text("Estimate [interval]"), ratio=3)
    table.add_column("Asked", ratio=3)
    if not narrow:
        table.add_column("Paper", ratio=1)
        table.add_column("Statement", ratio=5)
    for verdict in study.claims:
        claim = verdict.claim
        cells = [_name(verdict), Text(verdict.verdict, STYLES[verdict.verdict]), *map(Text, _numbers(verdict))]
        if not narrow:
            cells += [Text(published(claim, plain=True)), Text(claim.statement)]
        table.add_row(*cells)
    return table


def _name(verdict: ClaimVerdict) -> str:
    return f"{verdict.claim.id} (ext.)" if verdict.claim.extension else verdict.claim.id


def _lines(study: StudyVerdicts) -> list[str]:
    width = max(len(_name(verdict)) for verdict in study.claims)
    lines = []
    for verdict in study.claims:
        numbers, wanted = _numbers(verdict)
        start = f"{study.study}.{_name(verdict):<{width}}  {verdict.verdict:<12}"
        lines.append(f"{start}  {numbers}; asked {wanted}; paper: {published(verdict.claim, plain=True)}")
    return lines


def _tally(study: StudyVerdicts) -> str:
    counts = ", ".join(f"{count} {verdict}" for verdict, count in study.counts.items() if count)
    extensions = sum(verdict.claim.extension for verdict in study.claims)
    beyond = f"; {extensions} stress test{'' if extensions == 1 else 's'} beyond the paper" if extensions else ""
    return f"{study.study} at scale {study.scale}: {counts or 'no claims of the paper'}{beyond}"


def main(folder: Positional[Path], studies: Sequence[str] = ()) -> None:
    """Print the verdicts in one results folder.

    Args:
        folder: Results of one scale, for instance results/smoke.
        studies: Which studies; all that have verdicts by default.

    """
    names = list(studies) or sorted(path.parent.name for path in folder.glob("*/verdicts.json"))
    if not names:
        raise UserError(f"{folder} holds no verdicts; run make reproduce first")
    report = folder / "report" / "index.html"
    print_verdicts([folder / name / "verdicts.json" for name in names], report if report.is_file() else None)


if __name__ == "__main__":
    run({"verdicts": main})
