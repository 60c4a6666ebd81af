r"""The published graphs of the property benchmark, from a file of the user's, and what its label columns really are.

The file (``pna_dataset_25-35.pkl`` of A-DGN's repository, Gravina et al. 2023, arXiv 2210.09789) was written by
``torch.save``: adjacency matrices, node features, node labels and graph labels, each a mapping from split to a list of
tensors, one for every number of nodes. It is a pickle; only tensors and plain containers are let in.

Its users read node labels as [eccentricity, Laplacian, SSSP]. The generator of Corso et al. 2020 puts SSSP first. So no
column is believed: each is held against every label computed anew from the graphs, and named after what it is.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.errors import UserError
from jacnorm.studies.glstm.pna_graphs import Graphs, distances, labels, refuse_isolated
from jacnorm.studies.glstm.settings import Task

SPLITS = {"train": "train", "val": "validation", "test": "test"}
"""The file's names of splits, and ours."""
USERS_NODE_NAMES = ("eccentricity", "laplacian", "sssp")
USERS_GRAPH_NAMES = ("connected", "diameter", "spectral-radius")
"""What the archive's users call the columns, in their order."""
NODE_TASKS: tuple[Task, ...] = ("sssp", "eccentricity", "laplacian")
TOLERANCE = 1e-3
"""Largest difference of a column from what it is taken for: labels are float32 numbers up to about 50."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """The file's graphs by split, and for each task what the users call the column that holds it."""

    graphs: Mapping[str, Graphs]
    columns: Mapping[Task, str]
    digest: str
    """SHA-256 of the file."""


def read(path: Path | str) -> Archive:
    """Read the archive at `path`; says in the log which column is what.

    The labels to be learnt are those of `pna_graphs.labels`, which the columns were found to equal. Raises UserError if
    the file is missing, no archive of `torch.save`, holds anything but tensors and containers, or has other parts,
    shapes or content than the published one; if a node has no edge; or if a column is none of the known labels.
    """
    path = Path(path)
    parts = _parts(_load(path), path.name)
    found = {ours: _split(parts, theirs, path.name) for theirs, ours in SPLITS.items()}
    most = max(graphs.values.shape[1] for graphs, _, _ in found.values())
    for name, (graphs, _, _) in found.items():
        refuse_isolated(graphs, f"split {name} of {path.name}")
    columns = identified(list(found.values()), path.name)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Archive({name: graphs.padded(most) for name, (graphs, _, _) in found.items()}, columns, digest)


def identified(splits: Sequence[tuple[Graphs, Tensor, Tensor]], name: str) -> dict[Task, str]:
    """For each task, what the users call the column that holds its label.

    splits: graphs with node labels (G, n, 3) and graph labels (G, 3). Raises UserError if a node column equals none of
    the known labels or two columns the same one, or if the diameter is not where it is expected.
    """
    hops = [distances(graphs.adjacency) for graphs, _, _ in splits]

    def difference(task: Task, column: int) -> float:
        worst = 0.0
        for (graphs, nodes, whole), hop in zip(splits, hops, strict=True):
            wanted = labels(task, graphs, hop)
            given = (whole if task == "diameter" else nodes)[..., column]
            worst = max(worst, (wanted - given).abs().nan_to_num(torch.inf).max().item())
        return worst

    columns: dict[Task, str] = {}
    for column, users_name in enumerate(USERS_NODE_NAMES):
        off = {task: difference(task, column) for task in NODE_TASKS}
        nearest = min(off, key=lambda task: off[task])
        if off[nearest] > TOLERANCE or nearest in columns:
            each = ", ".join(f"{task} by {value:.3g}" for task, value in off.items())
            raise UserError(
                f"{name}: column {column} of the node labels (there called {users_name}) is no label of its own: it "
                f"differs from {each}; use the published file, or leave `archive` out to generate graphs"
            )
        columns[nearest] = users_name
        as_called = "as its users call it" if nearest == users_name else f"which its users call {users_name}"
        _log.info("%s: column %d of the node labels is %s, %s", name, column, nearest, as_called)
    at = USERS_GRAPH_NAMES.index("diameter")
    if (off_by := difference("diameter", at)) > TOLERANCE:
        raise UserError(
            f"{name}: column {at} of the graph labels, the diameter, differs from the graphs' diameters by "
            f"{off_by:.3g}; use the published file, or leave `archive` out to generate graphs"
        )
    return {**columns, "diameter": "diameter"}


def _load(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickles of other protocols, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"archive {path} does not exist; correct its name, or leave `archive` out") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"archive {path} holds something besides tensors and plain containers, which could run code, or is no file "
            "of torch.save; unpack data.tar.gz of A-DGN's repository and name pna_dataset_25-35.pkl in it"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"archive {path} cannot be read ({reason}); fetch it anew") from None


def _parts(content: Any, name: str) -> list[Mapping[str, Sequence[Tensor]]]:
    """The four parts, each with a list of tensors for every split."""
    if not isinstance(content, tuple | list) or len(content) != 4:
        raise UserError(f"{name} holds {_words(content)}, not the four parts of the published archive; fetch it anew")
    for part, what in zip(content, ("adjacency", "features", "node labels", "graph labels"), strict=True):
        if not isinstance(part, Mapping) or not set(SPLITS) <= set(part):
            raise UserError(f"{name}: its {what} lack a split of {', '.join(SPLITS)}; fetch it anew")
        for split in SPLITS:
            blocks = part[split]
            if not isinstance(blocks, list) or not blocks or not all(isinstance(block, Tensor) for block in blocks):
                raise UserError(f"{name}: its {what} of split {split} are no list of tensors; fetch it anew")
    return list(content)


def _words(content: Any) -> str:
    size = f" of {len(content)}" if isinstance(content, tuple | list | Mapping) else ""
    return f"a {type(content).__name__}{size}"


def _split(parts: list[Mapping[str, Sequence[Tensor]]], split: str, name: str) -> tuple[Graphs, Tensor, Tensor]:
    """Graphs, node labels (G, n, 3) and graph labels (G, 3) of one split, padded alike."""
    blocks = list(zip(*(part[split] for part in parts), strict=False))
    if len({len(part[split]) for part in parts}) > 1:
        raise UserError(f"{name}: the parts of split {split} differ in their number of tensors; fetch it anew")
    for number, block in enumerate(blocks):
        _check_block(block, f"{name}: block {number} of split {split}")
    most = max(adjacency.shape[1] for adjacency, *_ in blocks)
    found = [_block(*block, most) for block in blocks]
    graphs = Graphs(
        *(
            torch.cat([getattr(each, part) for each, _, _ in found])
            for part in ("adjacency", "values", "sources", "nodes")
        )
    )
    return graphs, torch.cat([nodes for _, nodes, _ in found]), torch.cat([whole for _, _, whole in found])


def _check_block(block: Sequence[Tensor], where: str) -> None:
    adjacency, features = block[:2]
    count, n = (adjacency.shape[0], adjacency.shape[-1]) if adjacency.ndim == 3 else (0, 0)
    expected = [(count, n, n), (count, n, 2), (count, n, len(USERS_NODE_NAMES)), (count, len(USERS_GRAPH_NAMES))]
    shapes = [tuple(tensor.shape) for tensor in block]
    if not count or shapes != expected:
        raise UserError(
            f"{where} has tensors of shapes {shapes}; expected are (G, n, n) adjacency, (G, n, 2) features, (G, n, 3) "
            "node labels and (G, 3) graph labels; fetch it anew"
        )
    if not (((adjacency == 0) | (adjacency == 1)).all() and (adjacency == adjacency.mT).all()):
        raise UserError(f"{where} has adjacency matrices that are not symmetric with entries 0 and 1; fetch it anew")
    if adjacency.diagonal(dim1=1, dim2=2).any():
        raise UserError(f"{where} has nodes with an edge to themselves; fetch it anew")
    sources = features[..., 0]
    if not (((sources == 0) | (sources == 1)).all() and (sources.sum(1) == 1).all()):
        raise UserError(f"{where}: the first feature does not mark exactly one source in each graph; fetch it anew")


def _block(
    adjacency: Tensor, features: Tensor, nodes: Tensor, whole: Tensor, most: int
) -> tuple[Graphs, Tensor, Tensor]:
    count, n = adjacency.shape[:2]
    graphs = Graphs(adjacency.bool(), features[..., 1].float(), features[..., 0].argmax(1), torch.full((count,), n))
    return graphs.padded(most), torch.nn.functional.pad(nodes.float(), (0, 0, 0, most - n)), whole.float()
