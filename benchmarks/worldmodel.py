"""Compare training steps of the small world model: without a penalty, with it, and runs together or one by one.

A step is a batch with its noise, filtering, the loss, the penalty, gradients and Adam. All ways start from the same
weights and see the same batches and noise; without the penalty's weight they must report the same losses at first, and
runs must report the same losses together as one by one, or the comparison fails. One thread. Writes JSON with the
machine and the versions beside the numbers. The aims: one projection on f costs at most 15 % more than no penalty, and
with the prior's at most 25 %.

    python -m benchmarks.worldmodel                 about a minute
    python -m benchmarks.worldmodel --quick         small sizes only, some seconds
    python -m benchmarks.worldmodel --device cuda   wall time on a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before torch and numpy are imported

from benchmarks.glstm import versions  # noqa: E402
from benchmarks.jacobian import ROOT, machine  # noqa: E402

if TYPE_CHECKING:
    from jacnorm.studies.worldmodel.train_pendulum import ModelStack

AIMS = {"f": 0.15, "f and prior": 0.25}
"""Most that a penalty may add to a step, as a share of it."""
CHECKED_STEPS = 5
CLOSE = 1e-4
"""Largest relative difference of a loss; what rounding makes of itself over these steps is about 1e-6."""
ENOUGH_SECONDS, MOST_STEPS = 2.0, 60
"""Per way."""
WAYS = {"none": "no penalty", "f": "on f", "f and prior": "on f and prior"}


@dataclass(frozen=True)
class Row:
    """Sizes of a comparison: h of D, hidden layers, sequences, their steps, and how many runs train together."""

    deter: int
    hidden: int
    batch: int
    length: int
    runs: int


SMOKE, LAPTOP = (32, 32, 16, 16), (64, 64, 16, 32)
QUICK = [Row(*SMOKE, runs) for runs in (1, 3)]
FULL = [Row(*sizes, runs) for sizes in (SMOKE, LAPTOP) for runs in (1, 3, 12)]


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, to see that all of it runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results" / "bench" / "worldmodel.json", help="the JSON file"
    )
    options = parser.parse_args()
    report = {
        "machine": machine(),
        "versions": versions(),
        "device": device_name(options.device),
        "quick": options.quick,
        "rows": [],
    }
    for row in QUICK if options.quick else FULL:
        report["rows"].append({"sizes": asdict(row), "seconds": compare(row, options.device)})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(options.out)
    print(table(report))
    print(f"\nwritten to {options.out}")


def compare(row: Row, device: str = "cpu") -> dict[str, float]:
    """Seconds of a step of all runs, by way; raises RuntimeError if ways or runs do not agree on the losses."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    stacks = {way: stack_of(row, way, range(row.runs), device) for way in WAYS}
    firsts = {}
    for way, stack in stacks.items():
        losses = [stack.step(index) for index in range(CHECKED_STEPS)]
        firsts[way] = losses[0]["model_loss"]
        last = row.runs - 1
        alone = stack_of(row, way, [last], device)
        for index, found in enumerate(losses):
            agree(
                found["loss"][last:],
                alone.step(index)["loss"],
                f"{way}: the last run, together and alone, step {index}",
            )
    for way in AIMS:
        agree(firsts[way], firsts["none"], f"{way} and no penalty, at the start and without the penalty")
    return least({way: stack.step for way, stack in stacks.items()}, device)


def agree(found: Any, expected: Any, what: str) -> None:
    """Raise RuntimeError if losses differ by more than rounding."""
    if not bool(((found - expected).abs() <= CLOSE * expected.abs()).all()):
        raise RuntimeError(f"{what}: the losses are {found.tolist()} and {expected.tolist()}")


def stack_of(row: Row, way: str, seeds: range | list[int], device: str) -> ModelStack:
    """World models of one arm that train together, one per seed."""
    import torch

    from jacnorm.studies.worldmodel.arms import Arm
    from jacnorm.studies.worldmodel.episodes import training_episodes
    from jacnorm.studies.worldmodel.settings import PendulumSettings
    from jacnorm.studies.worldmodel.train_pendulum import ModelStack, Run

    settings = PendulumSettings(
        seeds=list(seeds), deter=row.deter, hidden=row.hidden, batch=row.batch, length=row.length, episodes=20
    )
    weight = 0.0 if way == "none" else 0.01
    arm = Arm(weight, "hz", way == "f and prior", 2, "none", 0.0, row.batch, row.length)
    episodes = {seed: training_episodes(settings, seed) for seed in seeds}
    return ModelStack(settings, [Run(arm, seed) for seed in seeds], episodes, torch.device(device))


def least(steps: Mapping[str, Callable[[int], object]], device: str = "cpu") -> dict[str, float]:
    """Least seconds of a step of each way: CPU time, or wall time on a GPU. Ways take turns."""
    import torch

    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    best, spent, index = dict.fromkeys(steps, float("inf")), 0.0, CHECKED_STEPS
    while spent < ENOUGH_SECONDS * len(steps) and index < CHECKED_STEPS + MOST_STEPS:
        for way, step in steps.items():
            start = now()
            step(index)
            seconds = now() - start
            best[way], spent = min(best[way], seconds), spent + seconds
        index += 1
    return best


def device_name(device: str) -> str:
    """The GPU's name, or cpu."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


def table(report: dict[str, Any]) -> str:
    """The report in Markdown, with machine and versions above it."""
    info, rows = report["machine"], report["rows"]
    aims = " and ".join(f"+{100 * aim:g} % {WAYS[way]}" for way, aim in AIMS.items())
    lines = [
        f"{info['processor']}, {info['threads']} thread, {info['memory_bytes'] / 2**30:.0f} GiB; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + (" (quick sizes)." if report["quick"] else "."),
        "",
        f"{'CPU' if report['device'] == 'cpu' else 'Wall'} milliseconds per step and run"
        f"{'' if report['device'] == 'cpu' else ' on ' + report['device']}. Aims: at most {aims}.",
        "",
        f"| D | hidden | batch | T | runs together | {' | '.join(WAYS.values())} | on both, quicker than one by one |",
        "|---" * (6 + len(WAYS)) + "|",
    ]
    alone = {_size(row): row["seconds"] for row in rows if row["sizes"]["runs"] == 1}
    for row in rows:
        runs, seconds = row["sizes"]["runs"], row["seconds"]
        cells = [f"{1e3 * seconds['none'] / runs:.3g}"]
        for way in AIMS:
            more = seconds[way] / seconds["none"] - 1
            cells.append(f"{1e3 * seconds[way] / runs:.3g} ({100 * more:+.0f} %)")
        gain = runs * alone[_size(row)]["f and prior"] / seconds["f and prior"]
        lines.append(
            f"| {' | '.join(str(size) for size in row['sizes'].values())} | {' | '.join(cells)} | {gain:.1f}x |"
        )
    return "\n".join(lines)


def _size(row: Mapping[str, Any]) -> tuple[int, ...]:
    """All sizes but the number of runs."""
    return tuple(row["sizes"].values())[:-1]


if __name__ == "__main__":
    main()
