"""Weights that a training step keeps for the measuring step: one safetensors file per block of seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from jacnorm.files import load_tensors, save_tensors


@dataclass(frozen=True)
class Snapshot:
    """The networks of one cell after an epoch.

    cell: what distinguishes them besides the seed, as table columns (data set, depth; method, ... where pruned).
    weights: L tensors (R, n_l, n_{l-1}), runs in the order of the job's seeds.
    """

    cell: dict[str, Any]
    epoch: int
    weights: Sequence[Tensor]


def save(path: Path, snapshots: Sequence[Snapshot]) -> None:
    """Write snapshots in the given order."""
    tensors = {f"{i}/{layer}": w for i, snapshot in enumerate(snapshots) for layer, w in enumerate(snapshot.weights)}
    index = [{"cell": s.cell, "epoch": s.epoch, "layers": len(s.weights)} for s in snapshots]
    save_tensors(path, tensors, {"index": json.dumps(index, sort_keys=True)})


def load(path: Path) -> list[Snapshot]:
    """Read snapshots back. Raises UserError if the file is missing or damaged."""
    tensors, metadata = load_tensors(path)
    return [
        Snapshot(entry["cell"], entry["epoch"], [tensors[f"{i}/{layer}"] for layer in range(entry["layers"])])
        for i, entry in enumerate(json.loads(metadata["index"]))
    ]
