"""The tables of a benchmark report: on the terminal, and in docs/performance.md between its markers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

BEGIN, END = "<!-- benchmark tables: begin -->", "<!-- benchmark tables: end -->"


def terminal(report: dict) -> str:
    """All tables as plain text."""
    return markdown(report)


def markdown(report: dict) -> str:
    """All tables in Markdown, with machine and versions above them."""
    machine, versions = report["machine"], report["versions"]
    parts = [
        f"{machine['processor']}, {machine['threads']} thread, {machine['memory_bytes'] / 2**30:.0f} GiB; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + (" (quick sizes)." if report["quick"] else "."),
        "### Spectral norm\n\n" + _methods(report),
        "### One pass over the batch, in CPU milliseconds\n\n" + _passes(report),
    ]
    if any("pairs" in row for row in report["rows"]):
        parts.append("### Pull-push pairs for a 95 % interval\n\n" + _pairs(report))
    return "\n\n".join(parts)


def write_docs(report: dict, path: Path) -> None:
    """Replace what stands between the markers. Raises ValueError if the page has none."""
    page = path.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{path} needs the lines {BEGIN} and {END} exactly once each")
    head, rest = page.split(BEGIN)
    tail = rest.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n\n{markdown(report)}\n\n{END}{tail}", encoding="utf-8")


def _methods(report: dict) -> str:
    lines = [
        "| model | method | CPU s | jacnorm = 1 | floor = 1 | peak MiB | pulls + pushes | largest error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        ours = row["methods"]["jacnorm"]
        for name, answer in row["methods"].items():
            if "failure" in answer:
                lines.append(f"| {row['words']} | {name} | {answer['failure']} | | | | | |")
                continue
            scaled = f" (from 1/{answer['scaled_up_by']} of the batch)" if answer["scaled_up_by"] > 1 else ""
            passes = "" if answer["pulls"] is None else f"{answer['pulls']} + {answer['pushes']}"
            ratio = "" if "failure" in ours else f"{answer['cpu_seconds'] / ours['cpu_seconds']:.1f}x"
            floor = f"{answer['cpu_seconds'] / answer['floor_seconds']:.2f}x" if "floor_seconds" in answer else ""
            error = f"{answer['largest_error']:.0e}" if "largest_error" in answer else ""
            lines.append(
                f"| {row['words']} | {name} | {answer['cpu_seconds']:.3g}{scaled} | {ratio} | {floor} | "
                f"{answer['peak_bytes'] / 2**20:.0f} | {passes} | {error} |"
            )
    return "\n".join(lines)


def _passes(report: dict) -> str:
    names = list(next(row["passes"] for row in report["rows"] if "failure" not in row["passes"]))
    lines = ["| model | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in report["rows"]:
        cells = [f"{1e3 * row['passes'][name]:.3g}" if name in row["passes"] else "" for name in names]
        lines.append(f"| {row['words']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pairs(report: dict) -> str:
    lines = ["| model | relative width, holding for | median | largest | converged |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        for words, count in row.get("pairs", {}).items():
            converged = f"{count['converged']} of {count['samples']}"
            lines.append(f"| {row['words']} | {words} | {count['median']:g} | {count['largest']} | {converged} |")
    return "\n".join(lines)


def main() -> None:
    """Redraw the page from a stored report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="JSON file written by python -m benchmarks.jacobian")
    parser.add_argument("page", type=Path, help="the page, docs/performance.md")
    options = parser.parse_args()
    write_docs(json.loads(options.report.read_text(encoding="utf-8")), options.page)


if __name__ == "__main__":
    main()
