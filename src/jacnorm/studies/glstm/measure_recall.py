r"""Sensitivity, selectivity and mixing of trained recall networks, on the first graphs of each seed's test split.

With y the centre's output (logits, or the vector of NARR) and x_v the input of neighbour v (the encoder's output, or
the raw input of NARR), for all graphs of all runs of a stack together:

- the norm of J_v = dy / dx_v is sum |J_v| over all entries, without any division; it is taken of the full J_v, of the
  columns of the key and of those of the value, which in NARR hold the part of the query too;
- selectivity is the norm for the neighbour asked for over that of another, for each of the others;
- mixing is H = d^2 y / (dx_v^value dx_query^key) for the neighbour v asked for.

Letters: R runs, B graphs, N neighbours, n = N + 3 nodes, F inputs of a node, m outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from jacnorm.errors import UserError
from jacnorm.studies.glstm import tables as study_tables
from jacnorm.studies.glstm.networks import Cell
from jacnorm.studies.glstm.recall import NEIGHBOURS, QUERY, STUDY, Graphs, RecallTask, split
from jacnorm.studies.glstm.recall_models import Architecture, Stack, inputs, outputs
from jacnorm.studies.glstm.settings import Device, RecallSettings, RegressionSettings
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.job import job
from jacnorm.training.snapshots import Snapshot

ENTRIES = 2**22
"""Numbers that the rows or entries pulled back at once may hold for one input; a constant, so that bits stay."""


def nar(settings: RecallSettings, tables: Path, weights: Path, device: Device = "auto") -> None:
    """Node Jacobians and mixing Hessians of the networks that recall a class."""
    _measure("nar", settings, tables, weights, device)


def narr(settings: RegressionSettings, tables: Path, weights: Path, device: Device = "auto") -> None:
    """Node Jacobians and mixing Hessians of the networks that recall a vector."""
    _measure("narr", settings, tables, weights, device)


def _measure(task: RecallTask, settings: RecallSettings, tables: Path, weights: Path, device: Device) -> None:
    with job(STUDY, "measure", task, settings, device) as this:
        jacobians: list[dict[str, Any]] = []
        hessians: list[dict[str, Any]] = []
        graphs: dict[int, Graphs] = {}
        for snapshot in snapshot_files.load(weights):
            architecture = architecture_of(task, snapshot)
            tensors = {name: tensor.to(this.device) for name, tensor in snapshot.tensors.items()}
            n = architecture.neighbours
            if n not in graphs:
                graphs[n] = split(task, n, settings.test_graphs, settings.seeds, "test").to(this.device)
            few = graphs[n].first(min(settings.measured_graphs, settings.test_graphs))
            jacobians += _jacobian_rows(settings, snapshot, architecture, tensors, few)
            few = graphs[n].first(min(settings.hessian_graphs, settings.test_graphs))
            hessians += _hessian_rows(settings, snapshot, architecture, tensors, few)
        study_tables.write(tables, f"{task}_jacobians", settings, jacobians, this.tracker)
        study_tables.write(tables, f"{task}_hessians", settings, hessians, this.tracker)


def architecture_of(task: RecallTask, snapshot: Snapshot) -> Architecture:
    """The network whose weights a snapshot holds. Raises UserError if it is none of this study."""
    try:
        cell = Cell(**{name: snapshot.cell[name] for name in Cell._fields})
        return Architecture(task, cell.model, cell.size, cell.k_hop, cell.layers, snapshot.cell["neighbours"])
    except KeyError as error:
        raise UserError(
            f"the weights name no {error.args[0]} of their network; delete them and run the training step again"
        ) from None


# --- first derivatives -----------------------------------------------------------------------------------------------


def entry_sums(architecture: Architecture, tensors: Stack, graphs: Graphs) -> Tensor:
    """For each input of each neighbour the sum over outputs of |dy / dx|, (R, B, N, F).

    One vector-Jacobian product per output, many of them at once.
    """
    x = inputs(architecture, tensors, graphs)  # (R, B, n, F)
    y, pull = torch.func.vjp(lambda x: outputs(architecture, tensors, x), x)  # (R, B, m)
    found = torch.zeros_like(x)
    for rows in _units(y).split(max(1, ENTRIES // x.numel())):
        (slopes,) = torch.func.vmap(pull)(rows)  # (rows, R, B, n, F)
        found += slopes.abs().sum(0)
    return found[:, :, NEIGHBOURS:]


def norms(architecture: Architecture, tensors: Stack, graphs: Graphs) -> dict[str, Tensor]:
    """Entrywise L1 norms of each neighbour's Jacobian by part (full, key, value), (R, B, N) each."""
    found = entry_sums(architecture, tensors, graphs).double()
    key, value = found.split([architecture.key_features, architecture.features - architecture.key_features], 3)
    return {"full": found.sum(3), "key": key.sum(3), "value": value.sum(3)}


def statistics(norm: Tensor, asked: Tensor) -> dict[str, Tensor]:
    """What the table keeps of the norms (R, B, N) of a graph's neighbours, (R, B) each; asked: (R, B).

    A norm of 0 makes ratios infinite or NaN, as division does.
    """
    chosen = functional.one_hot(asked, norm.shape[2]).bool()  # (R, B, N)
    selected, others = norm[chosen].view(asked.shape), norm[~chosen].view(*asked.shape, -1)
    ratios = selected.unsqueeze(2) / others  # (R, B, N - 1)
    return {
        "selected": selected,
        "background": others.mean(2),
        "mean": norm.mean(2),
        "variance": norm.var(2, correction=0),
        "log_ratio": ratios.log().mean(2),
        "ratio": ratios.mean(2),
    }


def _jacobian_rows(
    settings: RecallSettings, snapshot: Snapshot, architecture: Architecture, tensors: Stack, graphs: Graphs
) -> Iterator[dict[str, Any]]:
    for part, norm in norms(architecture, tensors, graphs).items():
        yield from _rows(settings, snapshot, {"part": part}, statistics(norm, graphs.asked))


# --- second derivatives ----------------------------------------------------------------------------------------------


def mixing(architecture: Architecture, tensors: Stack, graphs: Graphs) -> Tensor:
    """The mixing Hessian of the neighbour asked for, (R, B, m, its values, keys of the query).

    Reverse over reverse: one second product for each output and value, many at once. At a kink of the network, which
    floats are unlikely to hit, it is that of one side.
    """
    x = inputs(architecture, tensors, graphs)  # (R, B, n, F)
    keys = architecture.key_features
    values = architecture.features - keys
    at_value = functional.one_hot(graphs.asked + NEIGHBOURS, x.shape[2]).to(x).unsqueeze(3)  # (R, B, n, 1)
    at_query = torch.zeros_like(at_value)
    at_query[:, :, QUERY] = 1.0
    no_key, no_value = x.new_zeros(*x.shape[:2], keys), x.new_zeros(*x.shape[:2], values)

    def moved(key: Tensor, value: Tensor) -> Tensor:
        """Outputs with the query's keys moved by (R, B, keys) and the asked neighbour's values by (R, B, values)."""
        by_key, by_value = functional.pad(key, (0, values)), functional.pad(value, (keys, 0))
        return outputs(architecture, tensors, x + at_query * by_key.unsqueeze(2) + at_value * by_value.unsqueeze(2))

    def of_output(unit: Tensor) -> Tensor:
        """For one output, `unit` (R, B, m): (values, R, B, keys)."""

        def slopes(key: Tensor) -> Tensor:
            _, pull = torch.func.vjp(lambda value: moved(key, value), no_value)
            return pull(unit)[0]  # (R, B, values)

        _, pull = torch.func.vjp(slopes, no_key)
        return torch.func.vmap(pull)(_units(no_value))[0]

    chunk = max(1, ENTRIES // (values * x.numel()))
    found = torch.func.vmap(of_output, chunk_size=chunk)(_units(moved(no_key, no_value)))  # (m, values, R, B, keys)
    return found.movedim((0, 1), (2, 3))


def _units(like: Tensor) -> Tensor:
    """Unit vectors of the last axis, the same for every run and graph: (R, B, m) to (m, R, B, m)."""
    size = like.shape[2]
    return torch.eye(size, dtype=like.dtype, device=like.device)[:, None, None].expand(-1, *like.shape)


def _hessian_rows(
    settings: RecallSettings, snapshot: Snapshot, architecture: Architecture, tensors: Stack, graphs: Graphs
) -> Iterator[dict[str, Any]]:
    entries = mixing(architecture, tensors, graphs).double().flatten(2)
    columns = {
        "largest": entries.amax(2),
        "largest_absolute": entries.abs().amax(2),
        "mean": entries.mean(2),
        "frobenius": torch.linalg.vector_norm(entries, dim=2),
    }
    yield from _rows(settings, snapshot, {}, columns)


def _rows(
    settings: RecallSettings, snapshot: Snapshot, more: dict[str, Any], columns: dict[str, Tensor]
) -> Iterator[dict[str, Any]]:
    """A row for each seed and graph from columns (R, B)."""
    numbers = {name: values.tolist() for name, values in columns.items()}
    for position, seed in enumerate(settings.seeds):
        for graph in range(len(numbers[next(iter(numbers))][position])):
            at = {name: values[position][graph] for name, values in numbers.items()}
            yield {"seed": seed, **snapshot.cell, "graph": graph, **more, **at}
