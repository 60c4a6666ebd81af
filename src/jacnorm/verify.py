"""Are results repeatable? ``python -m jacnorm.verify`` runs a scale twice and compares every table and verdict.

The two runs start from nothing, write to folders of their own and use different numbers of cores, because neither these
nor the order of jobs may change a single bit.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

COMPARED = ("*/*/tables/*.parquet", "*/*/verdicts.json")
"""What must be the same, below a results folder (``<scale>/<study>/...``)."""


def compare(first: Path, second: Path) -> tuple[int, list[str]]:
    """Compare two results folders; return how many files were compared and one sentence per difference."""
    names = sorted({str(path.relative_to(folder)) for folder in (first, second) for path in _results(folder)})
    differences = []
    for name in names:
        a, b = first / name, second / name
        if not (a.exists() and b.exists()):
            differences.append(f"{name}: only the {'first' if a.exists() else 'second'} run made it")
        elif a.read_bytes() != b.read_bytes():
            differences.append(f"{name}: {_first_difference(a, b)}")
    return len(names), differences


def _results(folder: Path) -> Iterator[Path]:
    for pattern in COMPARED:
        yield from folder.glob(pattern)


def _first_difference(a: Path, b: Path) -> str:
    """Where two files with different bytes first differ, in words."""
    if a.suffix != ".parquet":
        lines = [file.read_text(encoding="utf-8").splitlines() for file in (a, b)]
        for number, (x, y) in enumerate(zip(*lines, strict=False), 1):
            if x != y:
                return f"line {number} is {x.strip()} and {y.strip()}"
        return "one is longer than the other"
    import pyarrow.parquet as pq

    # Plain Parquet, not pandas: int against float, or null against NaN, is a difference too.
    x, y = pq.read_table(a), pq.read_table(b)
    if x.column_names != y.column_names:
        return f"columns are {x.column_names} and {y.column_names}"
    if x.num_rows != y.num_rows:
        return f"{x.num_rows} rows and {y.num_rows} rows"
    for column in x.column_names:
        if x[column].type != y[column].type:
            return f"column {column} has type {x[column].type} and {y[column].type}"
        for row, (u, v) in enumerate(zip(x[column].to_pylist(), y[column].to_pylist(), strict=True)):
            if repr(u) != repr(v):  # tells -0.0 from 0.0 and finds NaN equal to NaN
                return f"column {column}, row {row} is {u!r} and {v!r}"
    return "the same values, but other metadata or encoding"


def run(folder: Path, scale: str, cores: str) -> None:
    """Run every study at `scale` from nothing into `folder`. Raises CalledProcessError if a job fails."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "snakemake", "--cores", cores, "--rerun-incomplete"]
    command += ["--config", f"scale={scale}", f"results={folder}", "--", "all"]
    print("+", " ".join(command[2:]), flush=True)
    subprocess.run(command, check=True)


def main(arguments: list[str] | None = None) -> None:
    """Run twice, compare, print the differences; exit with status 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m jacnorm.verify", description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="smoke", help="scale to run (default: smoke)")
    parser.add_argument("--cores", default="all", help="cores of the first run (default: all); the second takes one")
    parser.add_argument("--folder", type=Path, default="build/verify", help="where the runs go (default: build/verify)")
    options = parser.parse_args(arguments)

    first, second = options.folder / "first", options.folder / "second"
    try:
        run(first, options.scale, options.cores)
        run(second, options.scale, "1")
    except subprocess.CalledProcessError as error:
        print(f"ERROR: a run failed (exit status {error.returncode}), so there is nothing to compare", file=sys.stderr)
        sys.exit(1)
    count, differences = compare(first, second)
    if not count:
        print(f"ERROR: the runs made no tables below {first}", file=sys.stderr)
        sys.exit(1)
    for difference in differences:
        print(difference)
    if differences:
        print(f"NOT repeatable: {len(differences)} of {count} files differ between {first} and {second}.")
        sys.exit(1)
    print(f"Repeatable: all {count} tables and verdicts of both runs are the same, bit for bit.")


if __name__ == "__main__":
    main()
