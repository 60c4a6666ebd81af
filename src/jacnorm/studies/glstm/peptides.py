r"""Peptides of the Long Range Graph Benchmark (Dwivedi et al. 2022, arXiv 2206.08164) as gLSTM takes them in.

PyTorch Geometric fetches and keeps the files; they hold tensors only. A node is an atom with nine features, classes of
Open Graph Benchmark's; bonds count as edges, for gLSTM has no use of their features. A positional encoding is added:

- func: diagonals of the random walk's powers, (D^-1 A)^k_vv for k = 1 to 20 (RWSE);
- struct: entries at the node of eigenvectors of the normalised Laplacian, and their eigenvalues, of the 10 smallest
  (LapPE).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from jacnorm.errors import UserError

Peptides = Literal["func", "struct"]

SPLITS = {"train": "train", "validation": "val", "test": "test"}
"""Our names of splits, and PyTorch Geometric's."""
ATOM_CLASSES = (119, 5, 12, 12, 10, 6, 6, 2, 2)
"""Classes of the nine features: element, chirality, degree, charge, hydrogens, radicals, hybridisation, ring bits."""
TARGETS: dict[Peptides, int] = {"func": 10, "struct": 11}
WALK_STEPS = 20
FREQUENCIES = 10
ENCODING_WIDTH: dict[Peptides, int] = {"func": 28, "struct": 16}
"""Units of a node's vector that the positional encoding gets."""
FARTHEST = 255
"""What `Molecules.distances` holds for this many bonds or more, and for pairs without a path."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Molecules:
    """G molecules of one split."""

    atoms: Sequence[Tensor]
    """Classes of features, (n, 9) int64 each."""
    distances: Sequence[Tensor]
    """Bonds between every two atoms, (n, n) uint8 each; see `FARTHEST`."""
    encodings: Sequence[Tensor]
    """func: (n, 20); struct: (n, 10, 2), eigenvector and eigenvalue, NaN beyond the n-th; float32."""
    targets: Tensor
    """(G, targets), float32."""

    def __len__(self) -> int:
        return len(self.targets)

    def digest(self) -> str:
        """SHA-256 of everything but the encodings, which follow from it."""
        found = hashlib.sha256(self.targets.numpy().tobytes())
        for atoms, distances in zip(self.atoms, self.distances, strict=True):
            found.update(atoms.numpy().tobytes())
            found.update(distances.numpy().tobytes())
        return found.hexdigest()


class Joined(NamedTuple):
    """Some molecules as one graph of V nodes."""

    atoms: Tensor
    """(V, 9)."""
    encodings: Tensor
    """(V, ...)."""
    edges: list[Tensor]
    """For each layer, (2, E): senders and receivers."""
    graph: Tensor
    """The molecule of each node, (V,)."""
    targets: Tensor
    """(G, targets)."""


def load(task: Peptides, folder: Path) -> dict[str, Molecules]:
    """All splits, fetched into `folder` if they are not there.

    Raises UserError if that fails, if a file holds more than tensors, or for other atoms or labels than expected.
    """
    from torch_geometric.datasets import LRGBDataset

    found = {}
    for ours, theirs in SPLITS.items():
        try:
            with _tensors_only():
                data = LRGBDataset(str(folder), name=f"Peptides-{task}", split=theirs)
        except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(
                f"Peptides-{task} cannot be fetched or read ({' '.join(str(error).split())[:200]}): run where PyTorch "
                f"Geometric reaches the network, or put its files into {folder.name}/ beside the weights"
            ) from None
        found[ours] = molecules(task, data)
        _log.info("Peptides-%s, %s: %d molecules", task, ours, len(found[ours]))
    return found


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """PyTorch Geometric would load as a full pickle what PyTorch refuses; this variable forbids it."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def molecules(task: Peptides, data: Iterable[Any]) -> Molecules:
    """Molecules from PyTorch Geometric's `Data` (x, edge_index, y). Raises UserError for unexpected atoms or labels."""
    atoms, distances, encodings, targets = [], [], [], []
    for number, item in enumerate(data):
        _check(task, item, number)
        bonds = torch.zeros(len(item.x), len(item.x))
        bonds[item.edge_index[0], item.edge_index[1]] = 1.0
        atoms.append(item.x.long())
        distances.append(bond_distances(bonds))
        encodings.append(random_walks(bonds) if task == "func" else laplacian(bonds))
        targets.append(item.y.float().view(-1))
    return Molecules(atoms, distances, encodings, torch.stack(targets))


def _check(task: Peptides, item: Any, number: int) -> None:
    x = item.x
    limits = torch.tensor(ATOM_CLASSES)
    if x.ndim != 2 or x.shape[1] != len(limits) or bool(((x < 0) | (x >= limits)).any()):
        raise UserError(
            f"molecule {number} of Peptides-{task} has atoms of other features than the nine known ones; update the "
            "files of the benchmark"
        )
    if item.y.numel() != TARGETS[task]:
        raise UserError(
            f"molecule {number} of Peptides-{task} has {item.y.numel()} labels instead of {TARGETS[task]}; is it the "
            "other task's file?"
        )


def bond_distances(bonds: Tensor) -> Tensor:
    """Number of bonds between every two atoms of (n, n), uint8; `FARTHEST` for more and where there is no path."""
    from scipy.sparse.csgraph import shortest_path

    found = shortest_path(bonds.numpy(), unweighted=True, directed=False)
    return torch.from_numpy(np.minimum(found, FARTHEST).astype(np.uint8))


def random_walks(bonds: Tensor, steps: int = WALK_STEPS) -> Tensor:
    """Probability that a walk is back after k = 1 to `steps` steps, (n, steps)."""
    step = bonds.double() / bonds.double().sum(1, keepdim=True).clamp(min=1)
    power, found = step, []
    for _ in range(steps):
        found.append(power.diagonal())
        power = power @ step
    return torch.stack(found, 1).float()


def laplacian(bonds: Tensor, frequencies: int = FREQUENCIES) -> Tensor:
    """Eigenvectors of I - D^-1/2 A D^-1/2 of the smallest eigenvalues, each beside its eigenvalue, (n, frequencies, 2).

    Ascending, the first, which is constant up to degrees, included; NaN where a molecule has fewer atoms.
    """
    scale = bonds.double().sum(1).clamp(min=1).rsqrt()
    values, vectors = torch.linalg.eigh(torch.eye(len(bonds)).double() - scale[:, None] * bonds.double() * scale)
    found = torch.full((len(bonds), frequencies, 2), torch.nan)
    count = min(frequencies, len(bonds))
    found[:, :count, 0], found[:, :count, 1] = vectors[:, :count].float(), values[:count].float()
    return found


def join(data: Molecules, rows: Sequence[int], layers: int, *, k_hop: bool, device: torch.device) -> Joined:
    """The molecules `rows` as one graph: layer l reads atoms at distance l, or the neighbours in every layer."""
    sizes = [len(data.atoms[row]) for row in rows]
    first = np.cumsum([0, *sizes[:-1]]).tolist()
    reach = layers if k_hop else 1
    pairs, far = [], []
    for row, start in zip(rows, first, strict=True):
        distances = data.distances[row].to(device)
        at = ((distances >= 1) & (distances <= reach)).nonzero().T  # (2, E)
        pairs.append(at + start)
        far.append(distances[at[0], at[1]].long())
    distance = torch.cat(far)
    order = distance.argsort(stable=True)
    ends = torch.bincount(distance, minlength=reach + 1)[1:].tolist()
    edges = list(torch.cat(pairs, 1)[:, order].split(ends, 1))
    return Joined(
        torch.cat([data.atoms[row] for row in rows]).to(device),
        torch.cat([data.encodings[row] for row in rows]).to(device),
        edges if k_hop else edges * layers,
        torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(sizes)).to(device),
        data.targets[list(rows)].to(device),
    )


class AtomEncoder(nn.Module):
    """[sum of the embeddings of an atom's features; its positional encoding], (V, width)."""

    def __init__(self, task: Peptides, width: int) -> None:
        super().__init__()
        inner = width - ENCODING_WIDTH[task]
        self.features = nn.ModuleList(nn.Embedding(classes, inner) for classes in ATOM_CLASSES)
        for table in self.features:
            nn.init.xavier_uniform_(table.weight)
        self.position = WalkEncoder(ENCODING_WIDTH[task]) if task == "func" else SpectrumEncoder(ENCODING_WIDTH[task])

    def forward(self, atoms: Tensor, encodings: Tensor) -> Tensor:
        """Atoms (V, 9) and encodings to vectors."""
        each = [table(atoms[:, feature]) for feature, table in enumerate(self.features)]
        return torch.cat([torch.stack(each).sum(0), self.position(encodings)], 1)


class WalkEncoder(nn.Module):
    """RWSE (V, 20) through a batch norm and a linear map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.map = nn.BatchNorm1d(WALK_STEPS), nn.Linear(WALK_STEPS, width)

    def forward(self, encodings: Tensor) -> Tensor:
        """(V, width)."""
        return self.map(self.norm(encodings))


class SpectrumEncoder(nn.Module):
    """LapPE (V, 10, 2) through two maps with ReLU for each frequency, and the sum over these (DeepSet)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maps = nn.Sequential(nn.Linear(2, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU())

    def forward(self, encodings: Tensor) -> Tensor:
        """(V, width)."""
        missing = encodings.isnan().any(2, keepdim=True)
        return torch.where(missing, 0.0, self.maps(encodings.nan_to_num(0.0))).sum(1)


def flipped(encodings: Tensor, graph: Tensor, generator: torch.Generator) -> Tensor:
    """LapPE with a random sign for each eigenvector of each molecule, as neither sign is the right one."""
    graphs = int(graph.max()) + 1
    signs = 2.0 * torch.randint(2, (graphs, encodings.shape[1]), generator=generator) - 1
    factor = torch.stack([signs, torch.ones_like(signs)], 2).to(encodings)
    return encodings * factor[graph]


def average_precision(scores: Tensor, targets: Tensor) -> float:
    """Mean over classes of the average precision, of classes that occur but not everywhere; (G, classes) each.

    NaN if there is no such class or a score is NaN.
    """
    from sklearn.metrics import average_precision_score

    if not scores.isfinite().all():
        return float("nan")
    occur = [column for column in range(targets.shape[1]) if 0 < targets[:, column].sum() < len(targets)]
    found = [average_precision_score(targets[:, column].numpy(), scores[:, column].numpy()) for column in occur]
    return sum(found) / len(found) if found else float("nan")
