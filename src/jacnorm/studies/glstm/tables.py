"""The tables of the study: what their columns mean, and how a job's block of seeds becomes a file.

Norms of Jacobians are entrywise L1 norms. Accuracies and errors are those of the selected update: the last one among
those with the best validation accuracy (or error).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jacnorm.files import Column
from jacnorm.settings import SeededSettings
from jacnorm.training.results import write_rows
from jacnorm.training.tracking import Tracker

_SEED = Column("random seed of the run")
_DIVERGED = Column("step whose loss was not finite; -1: none", "steps")
_PARAMETERS = Column("trainable parameters", "parameters")
_RUN = {
    "seed": _SEED,
    "model": Column("glstm, gcn, gatv2 or gatedgcn"),
    "size": Column("memory dimension M of gLSTM, width d of others"),
    "k_hop": Column("whether layer l reads the nodes at distance l, instead of the neighbours"),
    "layers": Column("layers"),
    "data": Column("fixed training graphs, or fresh ones in every step"),
    "neighbours": Column("number N of neighbours, each with a key of its own"),
}
_GRAPH = {**_RUN, "graph": Column("test graph, counted from 0")}
_RECALL: dict[str, dict[str, Column]] = {
    "fits": {
        **_RUN,
        "parameters": _PARAMETERS,
        "steps": Column("updates made", "steps"),
        "selected_step": Column("update selected by validation", "steps"),
        "train_loss": Column("mean loss over the last tenth of the updates; NaN after divergence"),
        "train_score": Column("accuracy (NAR) or mean squared error (NARR) on training graphs"),
        "validation_score": Column("the same on validation graphs"),
        "test_score": Column("the same on test graphs"),
        "diverged_at": _DIVERGED,
    },
    "curves": {
        **_RUN,
        "step": Column("updates made", "steps"),
        "train_loss": Column("mean loss of the updates since the last row"),
        "train_score": Column("accuracy (NAR) or mean squared error (NARR) on training graphs, at most 1000"),
        "validation_score": Column("the same on validation graphs"),
    },
    "jacobians": {
        **_GRAPH,
        "part": Column("full, key or value: the inputs of a neighbour that are differentiated"),
        "selected": Column("norm for the neighbour asked for"),
        "background": Column("mean norm over the others"),
        "mean": Column("mean norm over all neighbours"),
        "variance": Column("variance of the norm over all neighbours"),
        "log_ratio": Column("mean over the others of the log of selected norm over theirs", "nat"),
        "ratio": Column("mean over the others of selected norm over theirs"),
    },
    "hessians": {
        **_GRAPH,
        "largest": Column("largest entry of the mixing Hessian of the neighbour asked for, with its sign"),
        "largest_absolute": Column("largest absolute entry"),
        "mean": Column("mean entry"),
        "frobenius": Column("Frobenius norm"),
    },
}

COLUMNS: dict[str, dict[str, Column]] = {
    "trees": {
        "seed": _SEED,
        "activation": Column("between layers"),
        "shape": Column("deep: complete binary tree; shallow: star"),
        "leaves": Column("number of leaves"),
        "norm": Column("mean over leaves of the norm of the root's Jacobian"),
        "norm_square": Column("mean over leaves of its square"),
    },
    **{f"{task}_{name}": columns for task in ("nar", "narr") for name, columns in _RECALL.items()},
    "gpp_fits": {
        "seed": _SEED,
        "source": Column("generated, or archive"),
        "task": Column("what the label is, as found in the data"),
        "column": Column("name that the archive's users give it; as task for generated graphs"),
        "model": Column("glstm, gcn or adgn"),
        "ablation": Column("what was taken away; none"),
        "parameters": _PARAMETERS,
        "steps": Column("updates made", "steps"),
        "selected_step": Column("update selected by validation", "steps"),
        "train_error": Column("log10 of the mean squared error on training graphs; NaN after divergence"),
        "validation_error": Column("the same on validation graphs"),
        "test_error": Column("the same on test graphs"),
        "constant_error": Column("the same for the mean training label, on test graphs"),
        "diverged_at": _DIVERGED,
    },
    "gpp_graphs": {
        "seed": _SEED,
        "source": Column("generated, or archive"),
        "task": Column("what the label is"),
        "graphs": Column("graphs of all splits", "graphs"),
        "nodes": Column("mean number of nodes", "nodes"),
        "disconnected": Column("share of graphs with nodes that cannot be reached"),
        "variance": Column("variance of the label"),
    },
    "ring_fits": {
        "seed": _SEED,
        "model": Column("glstm or gcn"),
        "layers": Column("layers, and half the nodes of the ring"),
        "parameters": _PARAMETERS,
        "train_loss": Column("mean loss over the last tenth of the updates; NaN after divergence", "nat"),
        "test_score": Column("accuracy on test graphs"),
        "diverged_at": _DIVERGED,
    },
    "peptides_fits": {
        "seed": _SEED,
        "task": Column("func or struct"),
        "model": Column("glstm"),
        "ablation": Column("what was taken away; none"),
        "width": Column("width d", "units"),
        "parameters": _PARAMETERS,
        "epochs": Column("epochs made", "epochs"),
        "validation_score": Column("average precision (func) or mean absolute error (struct)"),
        "test_score": Column("the same on test graphs"),
        "diverged_at": _DIVERGED,
    },
}


def write(
    folder: Path, name: str, settings: SeededSettings, rows: Iterable[Mapping[str, Any]], tracker: Tracker
) -> None:
    """Write `rows` as table `name` for the settings' block of seeds; see `jacnorm.training.results.write_rows`."""
    write_rows(folder, name, COLUMNS[name], settings, rows, tracker)
