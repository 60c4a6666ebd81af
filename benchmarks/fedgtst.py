"""Compare rounds of federated training: clients batched together, client after client, torch's modules, and Flower.

A round is the local training of all K clients (digits-sized images, 120 samples in batches of 32), their norms, and the
aggregation. All ways start from the same weights, draw the same batches and must reach the same weights, or the
comparison fails. One thread for each process. Writes JSON with the machine and the versions beside the numbers. The
aim: at K = 50 FedGTST's batched rounds at least 2 times quicker than client after client.

    python -m benchmarks.fedgtst                  some minutes; with Flower's simulation if Ray is installed
    python -m benchmarks.fedgtst --quick          fewer clients and no simulation, about half a minute
    python -m benchmarks.fedgtst --figure FOLDER  also draw cost-fedgtst.svg there
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before torch and numpy are imported

from benchmarks.jacobian import ROOT, machine  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from jacnorm.studies.fedgtst.engine import Data, Engine
    from jacnorm.studies.fedgtst.plan import Plan

AIM = 2.0
"""How much quicker than client after client a batched round should be on the row of the aim."""
CHECKED_ROUNDS = 2
CLOSE = 1e-3
"""Largest difference of a weight after those rounds, in which weights move by some hundredths.

Rounding may decide a near tie in a pool otherwise, which moves a filter by about 1e-4; in float64 the gradients agree
to 1e-12 (the tests).
"""
ENOUGH_SECONDS, MOST_ROUNDS = 3.0, 20
SIMULATED_ROUNDS, SIMULATION_SECONDS = 4, 600
WAYS = {
    "batched": "ours, clients batched",
    "loop": "ours, client after client",
    "modules": "torch's modules and autograd",
    "flower": "Flower, one process",
    "simulation": "Flower's simulation on Ray",
}
SEED, IMAGES = 10, 2000
OFF = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass(frozen=True)
class Row:
    """Method and number of clients of a comparison, and the ways that are left out."""

    method: str
    clients: int
    without: tuple[str, ...] = ()


AIMED = Row("fedgtst", 50)
QUICK = [Row("fedgtst", 10, ("simulation",)), Row("fedgtst", 50, ("flower", "simulation"))]
FULL = [
    Row("fedgtst", 10),
    AIMED,
    *(Row("fedgtst", clients, ("flower", "simulation")) for clients in (100, 200)),
    *(Row("fedavg", clients, ("flower", "simulation")) for clients in (10, 50, 100, 200)),
]


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, to see that all of it runs")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "fedgtst.json", help="the JSON file")
    parser.add_argument("--figure", type=Path, help="folder for the picture of cost against K")
    parser.add_argument("--simulate", help=argparse.SUPPRESS)  # a row, in a process of its own
    options = parser.parse_args()
    if options.simulate:
        simulate(Row(**json.loads(options.simulate)), options.out)
        return
    report = {"machine": machine(), "versions": versions(), "quick": options.quick, "rows": []}
    for row in QUICK if options.quick else FULL:
        report["rows"].append({"method": row.method, "clients": row.clients, "seconds": compare(row)})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(options.out)
    if options.figure:
        draw(report, options.figure)
    print(table(report))
    print(f"\nwritten to {options.out}")


def compare(row: Row) -> dict[str, float | None]:
    """CPU seconds of a round, by way; None: not measured here. Raises RuntimeError if the ways reach other weights."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seconds: dict[str, float | None] = {}
    expected = None
    for way in WAYS:
        if way in row.without:
            continue
        if way in ("flower", "simulation") and not installed("flwr" if way == "flower" else "ray"):
            seconds[way] = None
            continue
        seconds[way], found = measured(row, way)
        expected = found if expected is None else expected
        difference = float((found - expected).abs().max())
        if not difference <= CLOSE:
            raise RuntimeError(
                f"{row.method}, K = {row.clients}: {way} reaches weights that differ by {difference:.2g}"
            )
    return seconds


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def measured(row: Row, way: str) -> tuple[float, Tensor]:
    """CPU seconds of a round, and the weights after the checked rounds, flattened."""
    if way == "simulation":
        return simulated(row)
    if way == "flower":
        return in_flower(row)
    step = by_modules(row) if way == "modules" else by_engine(row, way)
    for index in range(CHECKED_ROUNDS):
        weights = step(index)
    return least(step), weights


def plan_of(row: Row, rounds: int) -> Plan:
    """The run that all ways make."""
    from jacnorm.studies.fedgtst.plan import Plan
    from jacnorm.studies.fedgtst.settings import TrainingSettings

    settings = TrainingSettings(seeds=[SEED], rounds=rounds)
    coefficient = 1e-3 if row.method == "fedgtst" else 0.0
    return Plan(settings, SEED, "benchmark", row.clients, row.method, coefficient, "lenet", (3, 8, 8), 10)


def data_of(row: Row) -> Data:
    """Random images whose class shows in their mean, and 120 of them for each client."""
    import torch

    from jacnorm.studies.fedgtst.engine import Data

    stream = torch.Generator().manual_seed(0)
    y = torch.randint(10, (IMAGES,), generator=stream)
    x = torch.randn(IMAGES, 3, 8, 8, generator=stream) + 0.2 * (y.float() - 4.5)[:, None, None, None]
    index = torch.stack([torch.randperm(IMAGES, generator=stream)[:120] for _ in range(row.clients)])
    return Data(x, y, index[None])


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """A server's weights as one vector."""
    import torch

    from jacnorm.studies.fedgtst.strategies import part

    return torch.cat([each.flatten() for each in part("weights", tensors).values()])


def by_engine(row: Row, way: str) -> Callable[[int], Tensor]:
    """Rounds by one of our engines."""
    from jacnorm.studies.fedgtst.engine import BatchedEngine
    from jacnorm.studies.fedgtst.loop import LoopEngine
    from jacnorm.studies.fedgtst.strategies import part

    kind: type[Engine] = BatchedEngine if way == "batched" else LoopEngine
    plan = plan_of(row, 1)
    engine = kind([plan.strategy], [SEED], plan.cell, data_of(row))
    state = engine.start([part("weights", plan.start())])

    def step(index: int) -> Tensor:
        nonlocal state
        *state, _ = engine.round(*state, index)
        return flat(state[0])

    return step


def by_modules(row: Row) -> Callable[[int], Tensor]:
    """The same rounds with modules, optimisers and autograd, as they are usually written."""
    import torch
    from torch import nn

    from jacnorm.studies.fedgtst.strategies import part

    plan, data = plan_of(row, 1), data_of(row)
    convolutions = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    convolutions += [nn.Conv2d(6, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    network = nn.Sequential(*convolutions, nn.Linear(64, 84), nn.ReLU(), nn.Linear(84, 10))
    parameters = list(network.parameters())
    state = torch.cat([each.flatten() for each in part("weights", plan.start()).values()])
    xi, guide = plan.coefficient, 0.0

    def load(vector: Tensor) -> None:
        nn.utils.vector_to_parameters(vector.clone(), parameters)

    def norm(x: Tensor, y: Tensor, *, keep: bool = False) -> tuple[Tensor, Tensor]:
        loss = nn.functional.cross_entropy(network(x), y)
        gradient = torch.autograd.grad(loss, parameters, create_graph=keep)
        return loss, torch.stack([g.square().sum() for g in gradient]).sum().sqrt()

    def train(x: Tensor, y: Tensor, order: Tensor, *, penalty: bool) -> None:
        load(state)
        optimiser = torch.optim.SGD(parameters, lr=plan.settings.learning_rate)
        for samples in order.flatten().split(plan.settings.batch):
            if penalty:
                loss, length = norm(x[samples], y[samples], keep=True)
                loss = loss + xi * (length - guide) ** 2
            else:
                loss = nn.functional.cross_entropy(network(x[samples]), y[samples])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    if xi:
        load(state)
        guide = max(norm(*data.of(0, client))[1].item() for client in range(row.clients))

    def step(index: int) -> Tensor:
        nonlocal state, guide
        total, norms = torch.zeros_like(state), []
        for client in range(row.clients):
            x, y = data.of(0, client)
            drawn, extra = plan.draws(index, client)
            train(x, y, drawn["order"], penalty=xi > 0)
            total += nn.utils.parameters_to_vector(parameters).detach()
            if xi:
                norms.append(norm(x, y)[1].item())
                if extra:
                    train(x, y, drawn["order_extra"], penalty=False)
                    norms.append(norm(x, y)[1].item())
        state, guide = total / row.clients, max(norms, default=0.0)
        return state

    return step


class Samples:
    """A client's samples, for Flower; a class, so that Ray can send it."""

    def __init__(self, row: Row) -> None:
        self._data = data_of(row)

    def __call__(self, plan: Plan, client: int, node: object) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        return self._data.of(0, client)


def in_flower(row: Row) -> tuple[float, Tensor]:
    """Rounds by Flower with all clients in this process."""
    from jacnorm.studies.fedgtst.in_process import run_in_process

    times, weights = [], []

    def seen(number: int, server: dict[str, Tensor]) -> None:
        times.append(time.process_time())
        weights.append(flat(server))

    with tempfile.TemporaryDirectory() as folder:
        plan = plan_of(row, max(CHECKED_ROUNDS, SIMULATED_ROUNDS))
        run_in_process(plan, Samples(row), Path(folder), on_round=seen)
    return min(after - before for before, after in pairwise(times)), weights[CHECKED_ROUNDS - 1]


def simulated(row: Row) -> tuple[float, Tensor]:
    """Rounds by Flower's simulation in a process of its own: CPU seconds of all its processes after the first round.

    Raises RuntimeError with the end of what it printed if it fails.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "simulation.json"
        command = [sys.executable, "-m", "benchmarks.fedgtst", "--out", str(out), "--simulate", json.dumps(asdict(row))]
        ended = subprocess.run(
            command, timeout=SIMULATION_SECONDS, capture_output=True, text=True, cwd=ROOT, env=os.environ | OFF
        )
        if ended.returncode:
            raise RuntimeError(f"Flower's simulation ended with code {ended.returncode}: {ended.stderr[-1000:]}")
        found = json.loads(out.read_text(encoding="utf-8"))
    return found["seconds"], torch.tensor(found["weights"])


def simulate(row: Row, out: Path) -> None:
    """What that process does: all rounds, the CPU time of this process and its children when each ends."""
    from jacnorm.studies.fedgtst import in_process

    times, weights = [], []

    class Timed(in_process.JacnormStrategy):
        def aggregate_train(self, *arguments: Any) -> Any:
            found = super().aggregate_train(*arguments)
            times.append(tree_seconds())
            weights.append(flat(self._state.server))
            return found

    in_process.JacnormStrategy = Timed  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        in_process.run_simulation(plan_of(row, SIMULATED_ROUNDS), Samples(row), Path(folder))
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    content = {"seconds": seconds, "weights": weights[CHECKED_ROUNDS - 1].tolist()}
    out.write_text(json.dumps(content), encoding="utf-8")


def tree_seconds() -> float:
    """CPU seconds so far of this process and all that it started and that still run."""
    import psutil

    total = time.process_time()
    for process in psutil.Process().children(recursive=True):
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system
    return total


def least(step: Callable[[int], object]) -> float:
    """Least CPU seconds of a round, after those that were checked."""
    best, spent, index = float("inf"), 0.0, CHECKED_ROUNDS
    while spent < ENOUGH_SECONDS and index < MOST_ROUNDS:
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
        f"CPU milliseconds per round. Aim: FedGTST at K = {AIMED.clients} at least {AIM:g} times quicker than client "
        "after client. Flower's simulation: all its processes, without the start.",
        "",
        f"| method | K | {' | '.join(WAYS.values())} | batched is quicker by |",
        "|---" * (len(WAYS) + 3) + "|",
    ]
    for row in report["rows"]:
        seconds = row["seconds"]
        cells = [_cell(seconds, way) for way in WAYS]
        gains = [f"{seconds[way] / seconds['batched']:.1f}x" for way in list(WAYS)[1:] if seconds.get(way) is not None]
        lines.append(f"| {row['method']} | {row['clients']} | {' | '.join(cells)} | {', '.join(gains)} |")
    return "\n".join(lines)


def _cell(seconds: dict[str, float | None], way: str) -> str:
    if way not in seconds:
        return "not run"
    value = seconds[way]
    return "not measured: not installed" if value is None else f"{1e3 * value:.3g}"


def draw(report: dict[str, Any], folder: Path) -> None:
    """Write cost-fedgtst.svg and .png: CPU time of a round against K, a panel for each method."""
    from jacnorm.report.plotting import legend_below, logarithmic, panels, save, style

    methods = list(dict.fromkeys(row["method"] for row in report["rows"]))
    with style():
        figure, axes = panels(len(methods))
        for ax, method in zip(axes, methods, strict=True):
            rows = sorted((row for row in report["rows"] if row["method"] == method), key=lambda row: row["clients"])
            for way, words in WAYS.items():
                points = [
                    (row["clients"], 1e3 * row["seconds"][way]) for row in rows if row["seconds"].get(way) is not None
                ]
                ax.plot([k for k, _ in points], [cost for _, cost in points], marker="o", label=words)
            ax.set(xlabel="clients K", ylabel="CPU time of a round [ms]", title=method)
            logarithmic(ax, "xy")
        legend_below(figure, axes[0], 2)
        save(figure, folder, "cost-fedgtst")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute."""
    packages = [
        name for name, package in {"torch": "torch", "flwr": "flwr", "ray": "ray"}.items() if installed(package)
    ]
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


if __name__ == "__main__":
    main()
