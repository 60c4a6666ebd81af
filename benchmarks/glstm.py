"""Compare training steps of gLSTM on associative recall: our stacks, and its layers with a matrix memory on every node.

A step is a batch, the loss, gradients, clipping and AdamW; both ways start from the same weights, see the same graphs
and must report the same losses, or the comparison fails. One thread. Writes JSON with the machine and the versions
beside the numbers. The aim: at batch 64, N = 32 and M = 16 at least 5 times quicker than the matrix memory.

    python -m benchmarks.glstm                under a minute
    python -m benchmarks.glstm --quick        fewer sizes, about ten seconds
    python -m benchmarks.glstm --figure FOLDER    also draw cost-glstm.svg there
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before torch and numpy are imported

from benchmarks.jacobian import ROOT, machine  # noqa: E402

if TYPE_CHECKING:
    from jacnorm.studies.glstm.train_recall import Stack

AIM = 5.0
"""How much quicker than the matrix memory a step should be on the row of the aim."""
CHECKED_STEPS = 5
ENOUGH_SECONDS, MOST_STEPS = 1.5, 200
WAYS = {
    "matrix": "matrix memory on every node, message passing",
    "attention": "linear attention on every node, message passing",
    "stack of 1": "ours, one run",
    "stack of 3": "ours, three runs together, each",
}


@dataclass(frozen=True)
class Row:
    """Sizes of a comparison: graphs in a batch, neighbours N and memory dimension M, of gLSTM with K-hop."""

    graphs: int
    neighbours: int
    memory: int = 16


AIMED = Row(64, 32)
SLOW = 64 * 32
"""Graphs times neighbours above which the ways with message passing are left out."""
QUICK = [Row(64, 8, 8), AIMED]
FULL = [
    *(Row(64, neighbours) for neighbours in (4, 8, 16, 32, 64, 96)),
    *(Row(graphs, 32) for graphs in (16, 128, 256, 512)),
]


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, to see that all of it runs")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "glstm.json", help="the JSON file")
    parser.add_argument("--figure", type=Path, help="folder for the picture of cost against N and graphs")
    options = parser.parse_args()
    report = {"machine": machine(), "versions": versions(), "quick": options.quick, "rows": []}
    for row in QUICK if options.quick else FULL:
        report["rows"].append({"sizes": vars(row), "seconds": compare(row)})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(options.out)
    if options.figure:
        draw(report, options.figure)
    print(table(report))
    print(f"\nwritten to {options.out}")


def compare(row: Row) -> dict[str, float]:
    """CPU seconds of a step and run, by way; raises RuntimeError if the ways do not agree on the losses."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seconds = {}
    one = stack_of(row, 1)
    expected = [float(one.step(index)["loss"]) for index in range(CHECKED_STEPS)]
    ways = list(WAYS) if row.graphs * row.neighbours <= SLOW else list(WAYS)[2:]
    for way in ways:
        step = {"stack of 1": one.step, "stack of 3": stack_of(row, 3).step}.get(way)
        if step is None:
            step = message_passing(row, way)
            found = [step(index) for index in range(CHECKED_STEPS)]
            if any(abs(ours - theirs) > 1e-3 * ours for ours, theirs in zip(expected, found, strict=True)):
                raise RuntimeError(f"{way} has the losses {found} where ours are {expected}")
        seconds[way] = least(step) / (3 if way == "stack of 3" else 1)
    return seconds


def stack_of(row: Row, runs: int) -> Stack:
    """A stack of our training step."""
    import torch

    from jacnorm.studies.glstm.networks import Cell
    from jacnorm.studies.glstm.settings import RecallSettings
    from jacnorm.studies.glstm.train_recall import Stack

    sizes = {"train_graphs": 4 * row.graphs, "validation_graphs": 1, "test_graphs": 1, "batch": row.graphs}
    settings = RecallSettings(seeds=list(range(runs)), steps=10_000, evaluations=1, **sizes)
    return Stack("nar", settings, Cell("glstm", row.memory, True), [row.neighbours], torch.device("cpu"))


def message_passing(row: Row, evaluation: str) -> Callable[[int], float]:
    """The same training by the networks of `layers`, a batch as one graph, from the same weights."""
    import torch
    from torch import nn

    from jacnorm.studies.glstm import layers
    from jacnorm.training.batches import batch_indices

    source, n = stack_of(row, 1), row.neighbours
    width, nodes = 2 * row.memory, n + 3
    body = layers.GLSTM(width, 2, row.memory, evaluation=evaluation)
    network = layers.Network(layers.PairEmbedding(n, width), body, "rows", nn.Linear(width, n))
    network.load_state_dict(source.architecture.as_modules(source.selected, 0))
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.0)
    ends = [(0, 1), (1, 2), *((0, 3 + i) for i in range(n))]
    edges = torch.tensor([*ends, *((b, a) for a, b in ends)]).T
    sets = [
        torch.cat([each + graph * nodes for graph in range(row.graphs)], 1)
        for each in layers.k_hop_edges(edges, nodes, 2)
    ]
    centres = torch.arange(row.graphs) * nodes
    ids = torch.full((row.graphs, nodes, 2), n)
    ids[:, 3:, 0] = torch.arange(n)

    def step(index: int) -> float:
        graphs = source.graphs["train"].take(batch_indices(index, source.orders, 4 * row.graphs, row.graphs))
        ids[:, 3:, 1], ids[:, 2, 0] = graphs.values[0], graphs.asked[0]
        loss = nn.functional.cross_entropy(network(ids.view(-1, 2), sets, centres), graphs.targets[0])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        return loss.item()

    return step


def least(step: Callable[[int], object]) -> float:
    """Least CPU seconds of a step, after a few that warm up."""
    best, spent, index = float("inf"), 0.0, CHECKED_STEPS
    while spent < ENOUGH_SECONDS and index < MOST_STEPS:
        start = time.process_time()
        step(index)
        seconds = time.process_time() - start
        best, spent, index = min(best, seconds), spent + seconds, index + 1
    return best


def table(report: dict[str, Any]) -> str:
    """The report in Markdown, with machine and versions above it."""
    info, found = report["machine"], report["versions"]
    lines = [
        f"{info['processor']}, {info['threads']} thread, {info['memory_bytes'] / 2**30:.0f} GiB; "
        + ", ".join(f"{name} {version}" for name, version in found.items())
        + (" (quick sizes)." if report["quick"] else "."),
        "",
        f"CPU milliseconds per step and run. Aim: at batch 64, N = 32, M = 16 at least {AIM:g} times quicker than the "
        "matrix memory.",
        "",
        f"| batch | N | M | {' | '.join(WAYS.values())} | quicker than the matrix memory |",
        "|---" * (len(WAYS) + 4) + "|",
    ]
    for row in report["rows"]:
        sizes, seconds = row["sizes"], row["seconds"]
        cells = [f"{1e3 * seconds[way]:.3g}" if way in seconds else "not run" for way in WAYS]
        ratios = (
            [seconds["matrix"] / seconds[way] for way in ("stack of 1", "stack of 3")] if "matrix" in seconds else []
        )
        gain = ", ".join(f"{ratio:.1f}x" for ratio in ratios)
        lines.append(f"| {' | '.join(str(size) for size in sizes.values())} | {' | '.join(cells)} | {gain} |")
    return "\n".join(lines)


def draw(report: dict[str, Any], folder: Path) -> None:
    """Write cost-glstm.svg and .png: CPU time of a step against N at the aim's batch, and against batch at its N."""
    from jacnorm.report.plotting import legend_below, logarithmic, panels, save, style

    with style():
        figure, axes = panels(2)
        parts = (("neighbours", "neighbours N", "graphs"), ("graphs", "graphs in a batch", "neighbours"))
        for ax, (varied, label, fixed) in zip(axes, parts, strict=True):
            held = getattr(AIMED, fixed)
            rows = sorted((r for r in report["rows"] if r["sizes"][fixed] == held), key=lambda r: r["sizes"][varied])
            for way, name in WAYS.items():
                points = [(r["sizes"][varied], 1e3 * r["seconds"][way]) for r in rows if way in r["seconds"]]
                ax.plot(*zip(*points, strict=True), marker="o", label=name)
            ax.set(xlabel=label, ylabel="CPU time of a step and run [ms]")
            logarithmic(ax, "xy")
            ax.set_title(f"{held} {'graphs in a batch' if fixed == 'graphs' else 'neighbours'}, M = {AIMED.memory}")
        legend_below(figure, axes[0], 2)
        save(figure, folder, "cost-glstm")


def versions() -> dict[str, str]:
    """Versions of Python and of the library that computes."""
    return {"python": platform.python_version(), "torch": importlib.metadata.version("torch")}


if __name__ == "__main__":
    main()
