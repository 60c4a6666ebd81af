"""Distances, separability and gradients of rows with known geometry."""

from __future__ import annotations

from pathlib import Path

import torch

from jacnorm.studies.attention import tables as study_tables
from jacnorm.studies.attention.geometry import Points, Rows
from jacnorm.studies.attention.measure_rows import (
    SOFTMAX,
    Found,
    Heads,
    Row,
    Scene,
    all_selected,
    collapse_rows,
    geometry_rows,
    gradient_rows,
    weight_rows,
)
from jacnorm.studies.attention.settings import Device, SyntheticSettings
from jacnorm.studies.attention.synthetic import SyntheticRows, draw
from jacnorm.training.job import job
from jacnorm.training.progress import Progress
from jacnorm.training.seeds import RunId

STUDY = "attention"
NAME = "synthetic"
"""Text, model and space in the tables."""
CHUNK = 2**23
"""Distances between vectors that are held at once."""


def synthetic(settings: SyntheticSettings, tables: Path, device: Device = "auto") -> None:
    """Rows with unit vectors of a mean cosine and Gaussian logits, without a mask."""
    with job(STUDY, "measure", "synthetic", settings, device) as this:
        rows: dict[str, list[Row]] = {name: [] for name in study_tables.MEASURED}
        with Progress(len(settings.seeds), "synthetic rows", unit="seeds") as progress:
            for done, seed in enumerate(settings.seeds, start=1):
                for table, row in measured(settings, seed, this.device):
                    rows[table].append(row)
                progress.update(done)
        for name, found in rows.items():
            study_tables.write(tables, study_tables.synthetic_table(name), settings, found, this.tracker)


def measured(settings: SyntheticSettings, seed: int, device: torch.device) -> Found:
    """The rows of all tables for one seed."""
    run = RunId(STUDY, f"synthetic d={settings.dimension} c={settings.cosine} sigma={settings.spread}", seed)
    drawn = draw(settings, run)
    drawn = SyntheticRows(drawn.vectors.to(device), drawn.logits.to(device))
    longest = max(settings.lengths)
    for length in settings.lengths:
        heads = _heads(drawn, settings, seed, slice(None), length)
        for normaliser in settings.normalisers:
            yield from weight_rows(heads, normaliser, {length: settings.rows})
            if length == longest:
                yield from gradient_rows(heads, normaliser, settings, run)
    size = max(1, CHUNK // longest**2)
    for first in range(0, settings.heads, size):
        yield from _geometry(drawn, settings, run, slice(first, min(first + size, settings.heads)))


def _geometry(drawn: SyntheticRows, settings: SyntheticSettings, run: RunId, chosen: slice) -> Found:
    """Tables that need the vectors, for some heads; their random subsets are a stream of its own.

    Normalisers other than softmax have all N at the largest length only, and the N of Algorithm 1 at the others.
    """
    points = Points.of(drawn.vectors[chosen], normalised=True)
    own = RunId(run.study, f"{run.cell} heads from {chosen.start + 1}", run.seed)
    for length in settings.lengths:
        heads = _heads(drawn, settings, run.seed, chosen, length)
        own_points, largest = points.first(length), length == max(settings.lengths)
        for normaliser in settings.normalisers:
            rows = Rows(heads.weights(normaliser), heads.visible, heads.visible)
            scene = Scene(heads, normaliser, NAME, rows, own_points)
            softmax = normaliser == SOFTMAX
            selected = all_selected(settings) if softmax or largest else {settings.distance_selected}
            yield from geometry_rows(scene, settings, selected, {length: settings.rows}, own if softmax else None)
            if largest:
                yield from collapse_rows(scene, settings)


def _heads(drawn: SyntheticRows, settings: SyntheticSettings, seed: int, chosen: slice, length: int) -> Heads:
    logits = drawn.logits[chosen, :, :length]
    numbers = range(1, settings.heads + 1)[chosen]
    labels = [{"seed": seed, "data_set": NAME, "model": NAME, "layer": 0, "head": head} for head in numbers]
    visible = torch.full((settings.rows,), length, device=logits.device)
    return Heads(labels, logits, visible, temperature=1.0, reach=logits.abs().amax(-1))
