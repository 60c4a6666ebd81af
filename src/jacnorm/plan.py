"""What a run would cost: reads the dry run of Snakemake and adds the estimate that `make plan` prints.

    snakemake --dry-run --config scale=paper | python -m jacnorm.plan --scale paper

GPU hours are an upper bound: jobs times the time limit and the GPUs that the configuration gives their step. Storage is
what the training steps keep, the bulk of the results; each study computes it from its settings.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import tyro

from jacnorm.config import Configuration, Jobs, load, read
from jacnorm.step import run

_STATS = re.compile(r"^(?P<rule>[a-z]\w*) +(?P<count>\d+)$")


def job_counts(lines: Iterable[str]) -> Counter[str]:
    """Jobs of each rule, from the last "Job stats" table of a dry run; empty if nothing is to be done."""
    counts: Counter[str] = Counter()
    for line in lines:
        if line.startswith("Job stats"):
            counts.clear()
        elif (found := _STATS.match(line.strip())) and found["rule"] not in ("total", "all"):
            counts[found["rule"]] = int(found["count"])
    return counts


def step_of(rule: str) -> str | None:
    """The step of a rule, which names its resources: `stability_train_drift` trains. None for target rules."""
    words = ["judge" if word == "report" else word for word in rule.split("_")]
    return next((word for word in words if word in Jobs.model_fields), None)


def estimate(configuration: Configuration, counts: Counter[str]) -> Iterator[str]:
    """The lines of the estimate."""
    steps = Counter({step: 0 for step in Jobs.model_fields})
    for rule, count in counts.items():
        step = step_of(rule)
        if step:
            steps[step] += count
    for step, count in steps.items():
        job = getattr(configuration.machine.jobs, step)
        if count:
            yield f"{step:8}{count:5} jobs of at most {job.runtime} min, {job.mem_mb} MB and {job.gpu} GPU each"
    jobs = configuration.machine.jobs
    hours = sum(count * getattr(jobs, step).gpu * getattr(jobs, step).runtime / 60 for step, count in steps.items())
    yield f"at most {hours:.0f} GPU hours; jobs usually end well before their limit"
    for study in configuration.selected:
        kept = importlib.import_module(f"jacnorm.studies.{study}.storage").kept_bytes(configuration.studies[study])
        yield f"{study} keeps about {kept / 1e9:.2f} GB of weights when it is complete"


def plan(
    scale: str = "smoke",
    only: str | None = None,
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> None:
    """Print the dry run that comes on standard input, then what it would cost.

    Args:
        scale: scale of the dry run.
        only: the one study of the dry run; all if absent.
        config: YAML file of the user's own settings, laid over those of the scale.

    """
    overlay = read(config) if config else {}
    configuration = load("configs", {**overlay, "scale": scale} | ({"only": [only]} if only else {}))
    lines = []
    for line in sys.stdin:
        print(line, end="")
        lines.append(line)
    counts = job_counts(lines)
    print("\n".join(estimate(configuration, counts)) if counts else "")


if __name__ == "__main__":
    run({"plan": plan})
