"""Compare the spectral norm of jacnorm with other libraries: same models, inputs and accuracy, in one run, one thread.

Each measurement runs in a process of its own. Writes JSON with the machine and the versions beside the numbers.

    python -m benchmarks.jacobian                 about ten minutes
    python -m benchmarks.jacobian --quick         small models, about a minute
    python -m benchmarks.jacobian --write-docs    and redraw the tables of docs/performance.md
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.methods import DENSE, METHODS
from benchmarks.rows import FULL, QUICK, Row
from benchmarks.table import terminal, write_docs

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT = 240
"""Seconds after which a method is said not to finish."""


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models and batches, to see that all of it runs")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in FULL], help="only these rows")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "jacobian.json", help="the JSON file")
    parser.add_argument("--write-docs", action="store_true", help="redraw the tables of docs/performance.md")
    options = parser.parse_args()
    rows = [row for row in (QUICK if options.quick else FULL) if not options.rows or row.name in options.rows]
    report = {"machine": machine(), "versions": versions(), "quick": options.quick, "rows": []}
    for row in rows:
        report["rows"].append(measure(row, options.quick))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(options.out)
    print(terminal(report))
    print(f"\nwritten to {options.out}")
    if options.write_docs:
        write_docs(report, ROOT / "docs" / "performance.md")


def measure(row: Row, quick: bool) -> dict:
    """All methods on one row, with errors against the float64 reference and the floor of our passes."""
    reference = child(row, "reference", quick)
    result = {"name": row.name, "words": row.words, "passes": child(row, "passes", quick), "methods": {}}
    for name in METHODS:
        if name in DENSE and not row.dense:
            result["methods"][name] = {"failure": "not run: each Jacobian alone has over a billion entries"}
            continue
        answer = child(row, name, quick)
        if "failure" not in answer and "failure" not in reference:
            pairs = zip(
                answer["values"], reference["values"], strict=False
            )  # both may be of the first few samples only
            answer["largest_error"] = max(abs(value / exact - 1) for value, exact in pairs)
        answer.pop("values", None)
        result["methods"][name] = answer
    seconds = result["passes"]
    for ours in (result["methods"]["jacnorm"], result["methods"]["jacnorm, each sample"]):
        if "failure" in ours or "failure" in seconds:
            continue
        push = min(seconds["push by double backward"], seconds["push by linearize"])
        ours["floor_seconds"] = seconds["forward"] + ours["pulls"] * seconds["pull"] + ours["pushes"] * push
    if row.name in ("tanh", "mlp"):
        result["pairs"] = child(row, "pairs", quick)
    return result


def child(row: Row, task: str, quick: bool) -> dict:
    """Run one task in its own process; a method that fails or runs out of time says so."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.child", row.name, task, *(["--quick"] if quick else [])]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"failure": f"did not finish in {TIME_LIMIT} s"}
    print(f"{row.name:9} {task:30} {time.perf_counter() - start:6.1f} s", file=sys.stderr, flush=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"failure": f"failed: {lines[-1] if lines else f'signal {-done.returncode} (out of memory?)'}"}
    return json.loads(done.stdout)


def machine() -> dict:
    """Describe the processor and the memory, nothing that names a person or a host."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": platform.system(),
        "threads": 1,
    }


def versions() -> dict:
    """Versions of Python and of the libraries compared."""
    names = ("torch", "scipy", "numpy", "curvlinops-for-pytorch")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    main()
