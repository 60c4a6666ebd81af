"""One measurement in a process of its own, so that its peak memory is its own: prints one line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before torch and numpy are imported

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.methods import BY_SAMPLE, METHODS, reference  # noqa: E402
from benchmarks.rows import FULL, QUICK  # noqa: E402
from jacnorm.jacobian import spectral_norm  # noqa: E402

T = TypeVar("T")
REPEATS, ENOUGH_SECONDS = 5, 8.0
SAMPLES_OF_SLOW_METHODS = 4
SAMPLES_OF_REFERENCE = 8


def main() -> None:
    """Run one task on one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row")
    parser.add_argument("task", help='a method, or "reference", "passes" or "pairs"')
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row = {row.name: row for row in (QUICK if options.quick else FULL)}[options.row]
    model, x = row.build()
    if options.task == "reference":
        answer = {"values": reference(model, x[:SAMPLES_OF_REFERENCE], row.dense).tolist()}
    elif options.task == "passes":
        answer = passes(model, x)
    elif options.task == "pairs":
        answer = pairs(model, x)
    else:
        answer = method(options.task, model, x)
    json.dump(answer, sys.stdout)


def method(name: str, model: nn.Module, x: Tensor) -> dict:
    """Time and peak memory of one method; per-sample methods run on the first few samples and are scaled up."""
    share = 1
    if name in BY_SAMPLE and len(x) > SAMPLES_OF_SLOW_METHODS:
        share = len(x) // SAMPLES_OF_SLOW_METHODS
        x = x[:SAMPLES_OF_SLOW_METHODS]
    with torch.no_grad():
        model(x)  # the memory of a forward pass belongs to the model
    before = peak_bytes()
    (values, pulls, pushes), first = timed(lambda: METHODS[name](model, x))
    memory = peak_bytes() - before
    times = [first]
    while len(times) <= REPEATS and sum(cpu for cpu, _ in times) < ENOUGH_SECONDS:
        times.append(timed(lambda: METHODS[name](model, x))[1])
    cpu, wall = (min(pair[i] for pair in times) for i in (0, 1))  # the quickest run is the least disturbed
    return {
        "cpu_seconds": cpu * share,
        "wall_seconds": wall * share,
        "first_cpu_seconds": first[0] * share,
        "runs": len(times),
        "scaled_up_by": share,
        "peak_bytes": memory,
        "pulls": pulls,
        "pushes": pushes,
        "values": values.tolist(),
    }


def passes(model: nn.Module, x: Tensor) -> dict:
    """CPU seconds of one pass over the batch by each way, and of setting the tangent program up."""
    leaf = x.clone().requires_grad_()
    seconds = {}
    with torch.no_grad():
        seconds["forward"] = quickest(lambda: model(x))
    y = model(leaf)
    u, v = torch.randn_like(y).requires_grad_(), torch.randn_like(x)
    seconds["pull"] = quickest(lambda: torch.autograd.grad(y, leaf, u.detach(), retain_graph=True))
    (g,) = torch.autograd.grad(y, leaf, u, create_graph=True)
    seconds["push by double backward"] = quickest(lambda: torch.autograd.grad(g, u, v, retain_graph=True))
    # g stays alive: its graph is what a push runs through
    seconds["push by jvp"] = quickest(lambda: torch.func.jvp(model, (x,), (v,)))
    torch.func.linearize(model, x)
    start = time.process_time()
    push = torch.func.linearize(model, x)[1]
    seconds["set-up of linearize"] = time.process_time() - start
    seconds["push by linearize"] = quickest(lambda: push(v))
    return seconds


def pairs(model: nn.Module, x: Tensor) -> dict:
    """Pull-push pairs that a 95 % interval takes, for each sample by itself and jointly for the batch."""
    counts = {}
    for rtol in (1e-2, 1e-3):
        for words, family in (("each sample", 1), ("whole batch", None)):
            result = spectral_norm(model, x, rtol=rtol, family=family, method="krylov")
            counts[f"{rtol:g}, {words}"] = {
                "median": result.pulls.double().quantile(0.5).item(),
                "largest": int(result.pulls.max()),
                "converged": int(result.converged.sum()),
                "samples": len(x),
            }
    return counts


def timed(run: Callable[[], T]) -> tuple[T, tuple[float, float]]:
    """The result of `run` with its CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = run()
    return result, (time.process_time() - cpu, time.perf_counter() - wall)


def quickest(run: Callable[[], object], repeats: int = 5) -> float:
    """Least CPU seconds of a few runs, after one that warms up."""
    run()
    return min(timed(run)[1][0] for _ in range(repeats))


def peak_bytes() -> int:
    """Largest resident memory of this process so far; the kernel counts kilobytes, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main()
