"""How the loss of a linear stochastic system changes with an error, simulated and by the exact formula."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from jacnorm.studies.worldmodel import tables as study_tables
from jacnorm.studies.worldmodel.expansion import cases, exact, simulate, system
from jacnorm.studies.worldmodel.settings import STUDY, Device, ExpansionSettings
from jacnorm.training.job import Job, job
from jacnorm.training.seeds import generator


def expansion(settings: ExpansionSettings, tables: Path, device: Device = "auto") -> None:
    """Even and odd part of the change for every matrix and every size of the error."""
    with job(STUDY, "measure", "expansion", settings, device) as this:
        rows = (row for seed in settings.seeds for row in _rows(settings, seed, this))
        study_tables.write(tables, "expansion", settings, rows, this.tracker)


def _rows(settings: ExpansionSettings, seed: int, this: Job) -> Iterator[dict[str, Any]]:
    found = cases(settings, seed)
    a, epsilons = this.put(
        [torch.stack([case.a for case in found]), torch.tensor(settings.epsilons, dtype=torch.float64)]
    )
    linear = system(settings, a)
    source = generator(STUDY, f"expansion d={settings.dimension} steps={settings.steps}", seed, "paths")
    even, odd = exact(linear, epsilons)
    simulated = simulate(linear, epsilons, settings.paths // 2, settings.steps, source)
    columns = {**asdict(simulated), "even_exact": even, "odd_exact": odd}
    values = {name: column.tolist() for name, column in columns.items()}
    for row, case in enumerate(found):
        for column, epsilon in enumerate(settings.epsilons):
            yield {
                "seed": seed,
                "matrix": case.matrix,
                "family": case.family,
                "scale": case.scale,
                "epsilon": epsilon,
                **{name: each[row][column] for name, each in values.items()},
            }
