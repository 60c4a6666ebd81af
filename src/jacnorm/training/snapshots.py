"""Weights that a training step keeps for the measuring step: one safetensors file per block of seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from jacnorm.errors import UserError
from jacnorm.files import load_tensors, save_tensors


@dataclass(frozen=True)
class Snapshot:
    """The networks of one cell at one moment.

    cell: what distinguishes them besides the seed, as table columns (data set, depth, epoch, ...), values that JSON can
    hold. tensors: by name, each (R, ...), runs in the order of the job's seeds.
    """

    cell: dict[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of_layers(cls, cell: dict[str, Any], weights: Sequence[Tensor]) -> Self:
        """A snapshot of L weight matrices (R, n_l, n_{l-1})."""
        return cls(cell, {str(layer): weight for layer, weight in enumerate(weights)})

    @property
    def weights(self) -> list[Tensor]:
        """The tensors in their order."""
        return list(self.tensors.values())


def save(path: Path, snapshots: Sequence[Snapshot]) -> None:
    """Write snapshots in the given order."""
    tensors = {
        f"{i}/{name}": tensor for i, snapshot in enumerate(snapshots) for name, tensor in snapshot.tensors.items()
    }
    index = [{"cell": snapshot.cell, "tensors": list(snapshot.tensors)} for snapshot in snapshots]
    save_tensors(path, tensors, {"index": json.dumps(index, sort_keys=True)})


def load(path: Path) -> list[Snapshot]:
    """Read snapshots back. Raises UserError if the file is missing, damaged or holds something else."""
    tensors, metadata = load_tensors(path)
    try:
        return [
            Snapshot(entry["cell"], {name: tensors[f"{i}/{name}"] for name in entry["tensors"]})
            for i, entry in enumerate(json.loads(metadata["index"]))
        ]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} does not hold the weights of a training step; delete it and run that step again"
        ) from None
