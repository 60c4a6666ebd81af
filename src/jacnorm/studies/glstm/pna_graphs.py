r"""Random graphs with labels about distances: the recipe of the benchmark of Corso et al. 2020 (arXiv 2004.05718).

A graph has undirected edges, no loops and no isolated node; each node carries a value from U(0, 1), and one node is
the source. Labels, with d(u, v) the distance in edges:

- sssp, of a node: d(source, v), and 0 where the source cannot be reached;
- eccentricity, of a node: max_u d(u, v) over the nodes that can be reached;
- laplacian, of a node: degree * value - sum of the neighbours' values, which needs one hop only;
- diameter, of a graph: the largest eccentricity.

Graphs of different sizes lie side by side, padded to n nodes. Letters: G graphs, n nodes with padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from jacnorm.errors import UserError
from jacnorm.studies.glstm.settings import Task

UNREACHABLE = -1
"""What `distances` holds for pairs without a path, and for padding."""
KEEP = 0.9
"""An edge stays if a number between 0 and 1 lies below it; see `toggled`."""

Edges = list[tuple[int, int]]
Rng = np.random.Generator


@dataclass(frozen=True)
class Graphs:
    """G graphs padded to n nodes; the nodes of a graph come first, padding has no edges and the value 0."""

    adjacency: Tensor
    """(G, n, n), bool, symmetric."""
    values: Tensor
    """(G, n), float32."""
    sources: Tensor
    """(G,), int64."""
    nodes: Tensor
    """Number of nodes of each graph, (G,), int64."""

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def real(self) -> Tensor:
        """Which nodes are no padding, (G, n), bool."""
        return torch.arange(self.values.shape[1]) < self.nodes[:, None]

    @property
    def features(self) -> Tensor:
        """Inputs of the networks: whether a node is the source, and its value; (G, n, 2), float32."""
        source = torch.nn.functional.one_hot(self.sources, self.values.shape[1])
        return torch.stack([source.to(self.values.dtype), self.values], dim=2)

    def padded(self, nodes: int) -> Graphs:
        """The same graphs with padding up to `nodes` nodes, at least as many as now."""
        more = nodes - self.values.shape[1]
        pad = torch.nn.functional.pad
        return Graphs(pad(self.adjacency, (0, more, 0, more)), pad(self.values, (0, more)), self.sources, self.nodes)


def generate(count: int, smallest: int, largest: int, rng: Rng) -> Graphs:
    """`count` graphs of the recipe; graph g has smallest + (g mod (largest - smallest + 1)) nodes."""
    sizes = [smallest + number % (largest - smallest + 1) for number in range(count)]
    adjacency = torch.zeros(count, largest, largest, dtype=torch.bool)
    values, sources = torch.zeros(count, largest), torch.zeros(count, dtype=torch.int64)
    for number, size in enumerate(sizes):
        adjacency[number, :size, :size] = torch.from_numpy(draw(size, rng))
        values[number, :size] = torch.from_numpy(rng.uniform(size=size))
        sources[number] = int(rng.integers(size))
    return Graphs(adjacency, values, sources, torch.tensor(sizes))


def draw(nodes: int, rng: Rng) -> np.ndarray:
    """Adjacency matrix (nodes, nodes), bool, of one graph: a type of the mixture, its nodes shuffled, edges toggled.

    Drawn again, of the same type, until no node is isolated.
    """
    names = list(MIXTURE)
    kind = names[rng.choice(len(names), p=[MIXTURE[name][0] for name in names])]
    while True:
        found = toggled(shuffled(adjacency(nodes, MIXTURE[kind][1](nodes, rng)), rng), rng)
        if found.any(axis=0).all():
            return found


def adjacency(nodes: int, edges: Sequence[tuple[int, int]]) -> np.ndarray:
    """The symmetric matrix (nodes, nodes), bool, of undirected edges."""
    matrix = np.zeros((nodes, nodes), dtype=bool)
    if edges:
        rows, columns = np.asarray(edges).T
        matrix[rows, columns] = matrix[columns, rows] = True
    return matrix


def shuffled(matrix: np.ndarray, rng: Rng) -> np.ndarray:
    """The same graph with its nodes in a random order."""
    order = rng.permutation(len(matrix))
    return matrix[order][:, order]


def toggled(matrix: np.ndarray, rng: Rng) -> np.ndarray:
    """Remove some edges and add others.

    With e edges and r pairs without one, an edge is kept if a test variable t < 0.9, and a new one appears where
    t < 0.1 e / r; for e > r the other way round, so that the new edges have t < 0.1 and the kept ones
    t < 0.9 + 0.1 (e - r) / e. The recipe means t to be uniform, but its code, followed here, adds two draws from
    U(0, 1/2): edges are kept with probability 1 - 2 * 0.1^2 = 0.98, new ones appear with 2 (0.1 e / r)^2.
    """
    nodes = len(matrix)
    edges = matrix.sum() / 2
    missing = nodes * (nodes - 1) / 2 - edges
    if edges <= missing:
        keep, appear = KEEP, (1 - KEEP) * edges / missing
    else:
        keep, appear = KEEP + (1 - KEEP) * (edges - missing) / edges, 1 - KEEP
    halves = rng.uniform(high=0.5, size=(nodes, nodes))
    test = halves + halves.T
    return np.where(matrix, test < keep, (test < appear) & ~np.eye(nodes, dtype=bool))


# --- the types of the mixture ----------------------------------------------------------------------------------------


def erdos_renyi(nodes: int, rng: Rng) -> Edges:
    """Each pair with probability p, p itself from U(0, 1)."""
    rows, columns = np.triu_indices(nodes, 1)
    chosen = rng.uniform(size=len(rows)) < rng.uniform()
    return list(zip(rows[chosen].tolist(), columns[chosen].tolist(), strict=True))


def barabasi_albert(nodes: int, rng: Rng) -> Edges:
    """Preferential attachment: a star of m + 1 nodes, then nodes with m edges each; m uniform in 1..nodes - 1."""
    m = int(rng.integers(1, nodes))
    edges = [(0, node) for node in range(1, m + 1)]
    ends = [end for edge in edges for end in edge]  # a node is as often in it as it has edges
    for node in range(m + 1, nodes):
        targets: set[int] = set()
        while len(targets) < m:
            targets.add(ends[rng.integers(len(ends))])
        new = [(target, node) for target in sorted(targets)]
        edges += new
        ends += [end for edge in new for end in edge]
    return edges


def power_law_tree(nodes: int, rng: Rng) -> Edges:
    """A tree whose degrees follow a power law of exponent 3.

    Degrees are rounded draws from a Pareto law of index 2, and one at random is drawn anew until they sum to
    2 (nodes - 1). Nodes of degree above 1 form a path in ascending order of degree, their other edges end in leaves.
    """

    def degrees(count: int) -> list[int]:
        return np.minimum(nodes, np.rint(1 + rng.pareto(2, count))).astype(int).tolist()

    sequence = degrees(nodes)
    while sum(sequence) != 2 * (nodes - 1):
        sequence[rng.integers(nodes)] = degrees(1)[0]
    inner = sorted(degree for degree in sequence if degree > 1)
    path = len(inner) + 2  # with a leaf at each end
    edges = _path(path)
    leaf = path
    for node, degree in enumerate(inner, start=1):
        edges += [(node, leaf + number) for number in range(degree - 2)]
        leaf += degree - 2
    return edges


def caterpillar(nodes: int, rng: Rng) -> Edges:
    """A path of b nodes, b uniform in 1..nodes - 1, and leaves on random nodes of it."""
    backbone = int(rng.integers(1, nodes))
    return _path(backbone) + [(int(rng.integers(backbone)), leaf) for leaf in range(backbone, nodes)]


def lobster(nodes: int, rng: Rng) -> Edges:
    """A path, nodes on random nodes of it, and leaves on random ones of these; sizes uniform, one after the other."""
    backbone = int(rng.integers(1, nodes))
    first = int(rng.integers(backbone + 1, nodes + 1))
    return [
        *_path(backbone),
        *[(int(rng.integers(backbone)), node) for node in range(backbone, first)],
        *[(int(rng.integers(backbone, first)), leaf) for leaf in range(first, nodes)],
    ]


def grid(nodes: int, rng: Rng) -> Edges:
    """A grid, as near to a square as the divisors of `nodes` allow."""
    rows = _divisor(nodes)
    columns = nodes // rows
    across = [(node, node + 1) for node in range(nodes) if (node + 1) % columns]
    return across + [(node, node + columns) for node in range(nodes - columns)]


def caveman(nodes: int, rng: Rng) -> Edges:
    """Cliques that are not connected, as many as a grid would have rows."""
    size = nodes // _divisor(nodes)
    return [(i, j) for j in range(nodes) for i in range(j - j % size, j)]


def ladder(nodes: int, rng: Rng) -> Edges:
    """Two paths with a rung at every node; an odd last node hangs on the first."""
    half = nodes // 2
    sides = [(start + node, start + node + 1) for start in (0, half) for node in range(half - 1)]
    return sides + [(node, node + half) for node in range(half)] + [(0, nodes - 1)] * (nodes % 2)


def line(nodes: int, rng: Rng) -> Edges:
    """A path."""
    return _path(nodes)


def star(nodes: int, rng: Rng) -> Edges:
    """All edges end at one node."""
    return [(0, node) for node in range(1, nodes)]


def _path(nodes: int) -> Edges:
    return [(node - 1, node) for node in range(1, nodes)]


def _divisor(nodes: int) -> int:
    """The largest divisor up to the square root."""
    return max(number for number in range(1, math.isqrt(nodes) + 1) if nodes % number == 0)


MIXTURE: dict[str, tuple[float, Callable[[int, Rng], Edges]]] = {
    "erdos-renyi": (0.2, erdos_renyi),
    "barabasi-albert": (0.2, barabasi_albert),
    "power-law tree": (0.15, power_law_tree),
    "caterpillar": (0.1, caterpillar),
    "lobster": (0.1, lobster),
    "grid": (0.05, grid),
    "caveman": (0.05, caveman),
    "ladder": (0.05, ladder),
    "line": (0.05, line),
    "star": (0.05, star),
}
"""Share of each type of graph, and its edges for a number of nodes."""


# --- labels ----------------------------------------------------------------------------------------------------------


def distances(adjacency: Tensor) -> Tensor:
    """Number of edges between every two nodes of G graphs (G, n, n): int16, `UNREACHABLE` where there is no path.

    Padding cannot be told from isolated nodes here: both are at distance 0 from themselves and unreachable otherwise.
    """
    nodes = adjacency.shape[1]
    found = torch.full(adjacency.shape, UNREACHABLE, dtype=torch.int16)
    found.diagonal(dim1=1, dim2=2).zero_()
    steps, frontier = adjacency.float(), torch.eye(nodes).expand(len(adjacency), -1, -1)
    for distance in range(1, nodes):
        reached = (frontier @ steps > 0) & (found == UNREACHABLE)
        if not reached.any():
            break
        found[reached] = distance
        frontier = reached.float()
    return found


def disconnected(graphs: Graphs, hops: Tensor) -> Tensor:
    """Which graphs have a pair of nodes without a path, (G,), bool; hops: their `distances`."""
    real = graphs.real
    return ((hops == UNREACHABLE) & real[:, :, None] & real[:, None, :]).any(2).any(1)


def labels(task: Task, graphs: Graphs, hops: Tensor) -> Tensor:
    """The labels of a task, float32: (G,) for the diameter, else (G, n) with 0 for padding; hops: their `distances`."""
    if task == "laplacian":
        degrees = graphs.adjacency.sum(2)
        return degrees * graphs.values - (graphs.adjacency.float() @ graphs.values[:, :, None]).squeeze(2)
    if task == "sssp":
        at_source = graphs.sources[:, None, None].expand(-1, 1, hops.shape[2])
        return hops.gather(1, at_source).squeeze(1).clamp(min=0).float()
    if task == "eccentricity":
        return hops.amax(2).float()
    if task == "diameter":
        return hops.amax((1, 2)).float()
    raise UserError(f'task "{task}" is unknown: choose {", ".join(get_args(Task))}')


def refuse_isolated(graphs: Graphs, what: str) -> None:
    """UserError if a node has no edge, which would leave it out of every message."""
    lonely = (~graphs.adjacency.any(2) & graphs.real).any(1)
    if lonely.any():
        number = int(lonely.int().argmax())
        raise UserError(
            f"graph {number} of {what} has a node without an edge; leave such graphs out, for nothing can reach it"
        )
