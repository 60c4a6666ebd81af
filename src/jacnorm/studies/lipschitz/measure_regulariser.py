"""What the regulariser acts on: margin gradients at the normalisation outputs of the networks that Table 1 trained.

Measured in evaluation mode, where samples do not mix, on each seed's own training samples without augmentation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.studies.lipschitz import tables as study_tables
from jacnorm.studies.lipschitz.inputs import STUDY, load
from jacnorm.studies.lipschitz.margins import margins
from jacnorm.studies.lipschitz.regulariser import network, squared_norms
from jacnorm.studies.lipschitz.samples import Samples, draw
from jacnorm.studies.lipschitz.settings import Device, PairedSettings, RegulariserSettings, TableSettings
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.checkpoint import unpack
from jacnorm.training.job import job
from jacnorm.training.snapshots import Snapshot


def paired(settings: PairedSettings, tables: Path, data: Path, weights: Path, device: Device = "auto") -> None:
    """Norms of the margin's gradient in the small networks of the paired seeds."""
    _measure(settings, "paired", tables, data, weights, device)


def table(settings: TableSettings, tables: Path, data: Path, weights: Path, device: Device = "auto") -> None:
    """Norms of the margin's gradient in the WideResNets."""
    _measure(settings, "table", tables, data, weights, device)


def _measure(
    settings: RegulariserSettings, command: str, tables: Path, data: Path, weights: Path, device: Device
) -> None:
    with job(STUDY, "measure", command, settings, device) as this:
        samples = draw(settings, load(data, scaling="standard")).of(settings.seeds, this.device)
        snapshots = snapshot_files.load(weights)
        rows = [row for snapshot in snapshots for row in _rows(settings, samples, snapshot)]
        study_tables.write(tables, f"{command}_norms", settings, rows, this.tracker)


def _rows(settings: RegulariserSettings, samples: Samples, snapshot: Snapshot) -> Iterator[dict[str, Any]]:
    """A row for each layer and seed of one arm; a diverged network has no norms, which is NaN."""
    norms = training_norms(settings, samples, snapshot)  # (L, S, n)
    finite = norms.isfinite().all(2)
    columns = {
        "squared_norm": norms.double().mean(2),
        "penalised_share": (norms >= settings.threshold).double().mean(2),
        "released_share": (norms / settings.batch**2 > settings.threshold).double().mean(2),
    }
    columns = {name: torch.where(finite, values, math.nan).cpu() for name, values in columns.items()}  # (L, S)
    arm = {name: snapshot.cell[name] for name in ("setting", "regularised", "coefficient")}
    for layer in range(len(norms)):
        for position, seed in enumerate(samples.seeds):
            yield {
                "seed": seed,
                "data_set": samples.name,
                "network": settings.network,
                **arm,
                "layer": layer + 1,
                **{name: values[layer, position].item() for name, values in columns.items()},
            }


def training_norms(settings: RegulariserSettings, samples: Samples, snapshot: Snapshot) -> Tensor:
    """|dm / dh|^2 at each of L normalisation outputs, for S seeds and their n training samples, (L, S, n).

    NaN where the margin is not finite: a ReLU lets the gradient pass at a NaN, so that it could still be a number.
    """
    device = samples.x.device
    groups = ({name: tensor.to(device) for name, tensor in unpack(snapshot.tensors, g).items()} for g in _GROUPS)
    parameters, buffers = groups
    seeds = len(samples.seeds)
    stack = network(settings, seeds, samples.classes, samples.image, snapshot.cell["normalisation"])
    found = []
    for rows in samples.train.split(settings.batch, dim=1):
        x = samples.x[rows].requires_grad_()  # so that there is a graph, though no weight is to be trained
        passed = stack(parameters, buffers, x, training=False)
        margin = margins(passed.logits, samples.y[rows])  # (S, B)
        norms = squared_norms(margin, passed.normalised)
        found.append(torch.where(margin.isfinite(), norms, math.nan))
    return torch.cat(found, dim=2)


_GROUPS = ("parameter", "statistic")
