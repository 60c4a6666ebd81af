"""The networks of the recall tasks, and which of them the settings train; free of torch."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from jacnorm.studies.glstm.settings import RecallSettings

LAYERS = 2
"""Layers of all networks but the deeper GCNs."""


class Cell(NamedTuple):
    """One network of the recall tasks; with a number of neighbours and a seed, one training."""

    model: str
    size: int
    k_hop: bool
    layers: int = LAYERS
    data: str = "fixed"


def planned(settings: RecallSettings) -> dict[Cell, list[int]]:
    """The networks that the settings train, and at which numbers of neighbours, ascending."""
    found: dict[Cell, set[int]] = {}

    def add(cell: Cell, neighbours: list[int]) -> None:
        if neighbours:
            found.setdefault(cell, set()).update(neighbours)

    data = settings.data
    for size in settings.memories:
        add(Cell("glstm", size, True, data=data), settings.neighbours)
    for size in settings.further_memories:
        add(Cell("glstm", size, True, data=data), settings.further_neighbours)
    for size in settings.one_hop_memories:
        add(Cell("glstm", size, False, data=data), settings.one_hop_neighbours)
    hops = [False, True] if settings.baselines_k_hop else [False]
    for model, size, k_hop in product(settings.baselines, settings.widths, hops):
        add(Cell(model, size, k_hop, data=data), settings.neighbours)
    if settings.widths:
        for layers in settings.depths:
            add(Cell("gcn", settings.widths[0], False, layers, data), settings.depth_neighbours)
        add(Cell("gcn", max(settings.widths), False, data="fresh"), settings.fresh_controls)
    return {cell: sorted(neighbours) for cell, neighbours in found.items()}
