"""Neighbour associative recall: its graphs.

A graph with N neighbours has N + 3 nodes: 0 the centre, 1 a middle node, 2 the query, 3 to N + 2 the neighbours.
Undirected edges join the centre with each neighbour, the centre with the middle node, and that with the query.
Neighbour i carries key i and a value; the query carries the key of one neighbour, whose value the centre has to give
after two layers. NAR: values are classes 0..N-1, drawn with replacement. NARR: values are vectors of 16 independent
N(0, 1), and networks give a vector.
Letters: R runs, B graphs, N neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from jacnorm.errors import UserError
from jacnorm.training.seeds import RunId

STUDY = "glstm"
VALUE_SIZE = 16
"""Length of the vectors of NARR."""
CENTRE, MIDDLE, QUERY, NEIGHBOURS = 0, 1, 2, 3
"""Numbers of the nodes; NEIGHBOURS is that of the first one."""

RecallTask = Literal["nar", "narr"]


@dataclass(frozen=True)
class Graphs:
    """Graphs of one size, for one run or R stacked ones.

    values: (..., B, N) int64 (NAR) or (..., B, N, 16) float32 (NARR). asked: the neighbour asked for, (..., B) int64.
    present: where runs with fewer neighbours are padded to N, which are there, (R, N) bool; None: all.
    """

    values: Tensor
    asked: Tensor
    present: Tensor | None = None

    @property
    def neighbours(self) -> int:
        """The number N."""
        return self.values.shape[self.asked.ndim]

    @property
    def targets(self) -> Tensor:
        """Values of the neighbours asked for: (..., B) or (..., B, 16)."""
        axis = self.asked.ndim
        index = self.asked.unsqueeze(axis)
        if self.values.ndim > index.ndim:
            index = index.unsqueeze(axis + 1).expand(*self.asked.shape, 1, VALUE_SIZE)
        return self.values.gather(axis, index).squeeze(axis)

    def first(self, graphs: int) -> Graphs:
        """The first `graphs` graphs of each run."""
        return self.part(0, graphs)

    def part(self, start: int, graphs: int) -> Graphs:
        """Some consecutive graphs of each run."""
        axis = self.asked.ndim - 1
        return Graphs(self.values.narrow(axis, start, graphs), self.asked.narrow(axis, start, graphs), self.present)

    def take(self, rows: Tensor) -> Graphs:
        """Of R stacked runs, the graphs `rows` (R, B) of each."""
        runs = torch.arange(len(rows), device=rows.device).unsqueeze(1)  # (R, 1)
        return Graphs(self.values[runs, rows], self.asked[runs, rows], self.present)

    def to(self, device: torch.device) -> Graphs:
        """The graphs on `device`."""
        present = None if self.present is None else self.present.to(device)
        return Graphs(self.values.to(device), self.asked.to(device), present)


def draw(task: RecallTask, neighbours: int, graphs: int, generator: torch.Generator) -> Graphs:
    """Independent graphs of one run: values (B, N) or (B, N, 16), the neighbour asked for (B,), uniform."""
    if task == "nar":
        values = torch.randint(neighbours, (graphs, neighbours), generator=generator)
    else:
        values = torch.randn(graphs, neighbours, VALUE_SIZE, generator=generator)
    return Graphs(values, torch.randint(neighbours, (graphs,), generator=generator))


def stacked(parts: list[Graphs]) -> Graphs:
    """Graphs of R runs, (R, B, ...), from those of each."""
    return Graphs(torch.stack([part.values for part in parts]), torch.stack([part.asked for part in parts]))


def padded(parts: list[Graphs]) -> Graphs:
    """Stacks of NAR graphs of several sizes as one, whose runs follow one another; padded values have id N: none."""
    if len(parts) == 1:
        return parts[0]
    largest = max(part.neighbours for part in parts)
    values = [functional.pad(part.values, (0, largest - part.neighbours), value=largest) for part in parts]
    sizes = torch.tensor([part.neighbours for part in parts for _ in part.asked])  # (R,)
    present = torch.arange(largest) < sizes.unsqueeze(1)  # (R, N)
    return Graphs(torch.cat(values), torch.cat([part.asked for part in parts]), present)


def split(task: RecallTask, neighbours: int, graphs: int, seeds: list[int], purpose: str) -> Graphs:
    """One split of the data of R seeds, (R, B, ...); `purpose` is "train", "validation" or "test".

    A seed's graphs do not depend on the network, so all networks of a seed learn and are tested on the same.
    """
    runs = [data_run(task, neighbours, seed) for seed in seeds]
    return stacked([draw(task, neighbours, graphs, run.generator(purpose)) for run in runs])


def data_run(task: RecallTask, neighbours: int, seed: int) -> RunId:
    """The run that data and their order are drawn for: the same for every network."""
    return RunId(STUDY, f"{task} N={neighbours}", seed)


def check_vocabulary(neighbours: int, vocabulary: int) -> None:
    """Raise UserError if graphs have more neighbours than a network has keys."""
    if neighbours > vocabulary:
        raise UserError(
            f"the graphs have {neighbours} neighbours with a key each, but the network's vocabulary has only "
            f"{vocabulary} keys: train one with neighbours {neighbours}, or take graphs of at most {vocabulary}"
        )
