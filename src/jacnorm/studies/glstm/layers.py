"""The networks of the study: gLSTM, GCN, GATv2, GatedGCN and A-DGN, and the edge sets that their layers read.

Every network is an encoder, a body of layers and a head on what is read out (`Network`). A body gets the nodes of all
graphs of a batch as one matrix h (V, d) and one edge set for each of its layers; edge sets follow PyTorch Geometric,
(2, E) int64 with senders in row 0 and receivers in row 1. PyTorch Geometric itself is imported only when one of its
layers is built: gLSTM does not need it.

Letters: V nodes, E edges, G rows that are read, d width, H heads, M the memory dimension of keys and queries, M' that
of values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, Self, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from jacnorm.errors import UserError

Gate = Literal["output", "input", "forget"]
Activation = Literal["identity", "relu", "tanh"]
Evaluation = Literal["matrix", "attention"]
Readout = Literal["nodes", "rows", "mean", "pools"]
_Module = TypeVar("_Module", bound=nn.Module)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
}
GATES: dict[str, tuple[Gate, ...]] = {
    "none": (),
    "1-hop": (),
    "no-output-gate": ("output",),
    "no-input-gate": ("input",),
    "no-forget-gate": ("forget",),
    "no-gates": ("output", "input", "forget"),
}
"""The gates of gLSTM that an ablation of the settings takes away."""


def drawn(build: Callable[[], _Module], generator: torch.Generator) -> _Module:
    """The module that `build` makes, its parameters drawn by their own default rules from a CPU `generator`.

    PyTorch's layers draw from the global generator; it is put back as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        module = build()
        generator.set_state(torch.get_rng_state())
    return module


def parameter_count(module: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


# --- edge sets -------------------------------------------------------------------------------------------------------


def hop_distances(edge_index: Tensor, nodes: int) -> Tensor:
    """Number of edges of the shortest directed path from each node to each other, (nodes, nodes) int64.

    0 on the diagonal and where no path leads. Raises UserError if an edge names a node that does not exist.
    """
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < nodes:
        raise UserError(f"an edge names node {int(edge_index.max())}, but the graph has nodes 0 to {nodes - 1}")
    steps = torch.zeros(nodes, nodes, dtype=torch.float32, device=edge_index.device)
    steps[edge_index[0], edge_index[1]] = 1.0
    distances = torch.zeros(nodes, nodes, dtype=torch.int64, device=edge_index.device)
    unseen = ~torch.eye(nodes, dtype=torch.bool, device=edge_index.device)
    reached = torch.eye(nodes, device=edge_index.device)
    for distance in range(1, nodes):
        new = (reached @ steps > 0) & unseen
        if not new.any():
            break
        distances[new] = distance
        unseen &= ~new
        reached = new.float()
    return distances


def k_hop_edges(edge_index: Tensor, nodes: int, layers: int) -> list[Tensor]:
    """Edge sets of K-hop layers: the l-th (2, E_l) holds all ordered pairs of nodes at distance l, l = 1 to `layers`.

    The sets are disjoint; pairs that no path joins are in none. Raises UserError as `hop_distances`.
    """
    distances = hop_distances(edge_index, nodes)
    return [(distances == distance).nonzero().T for distance in range(1, layers + 1)]


def check_graph(edge_index: Tensor, nodes: int, *, connected: bool, name: str = "the graph") -> None:
    """Raise UserError if a node has no neighbour or, if the task wants it `connected`, a pair no path."""
    apart = edge_index[:, edge_index[0] != edge_index[1]]  # a node is no neighbour of its own
    alone = torch.ones(nodes, dtype=torch.bool, device=edge_index.device)
    alone[apart.flatten()] = False
    if alone.any():
        raise UserError(
            f"{name} has a node without neighbours (node {int(alone.int().argmax())} of {nodes}), which no message "
            "reaches: join it to another, or leave the graph out"
        )
    if connected:
        missing = (hop_distances(edge_index, nodes) == 0) & ~torch.eye(nodes, dtype=torch.bool, device=alone.device)
        if missing.any():
            sender, receiver = missing.nonzero()[0].tolist()
            raise UserError(
                f"{name} has no path from node {sender} to node {receiver}, so the task cannot be solved on it: join "
                "them, or leave the graph out"
            )


def _sum_of_neighbours(x: Tensor, edges: Tensor) -> Tensor:
    """For each node the sum of x (V, ...) over its senders; 0 without any."""
    return torch.zeros_like(x).index_add(0, edges[1], x.index_select(0, edges[0]))


def _largest_of_neighbours(x: Tensor, edges: Tensor) -> Tensor:
    """For each node the largest x (V, H) over its senders and itself."""
    receivers = edges[1].unsqueeze(1).expand(-1, x.shape[1])
    return x.scatter_reduce(0, receivers, x.index_select(0, edges[0]), "amax", include_self=True)


# --- gLSTM -----------------------------------------------------------------------------------------------------------
#
# Values carry one more entry, 1: then the memory C and its normaliser n obey one equation, and n is the last row of C.


class Memory(Protocol):
    """What the nodes of a graph remember from layer to layer."""

    def update(self, forget: Tensor, keys: Tensor, values: Tensor, edges: Tensor) -> Self:
        """The memory after a layer: the old one times `forget` (V, H), plus the outer products of all senders.

        keys: (V, H, M); values: (V, H, M' + 1), input gate included; a node is a sender of its own too.
        """

    def read(self, queries: Tensor) -> Tensor:
        """Memory times queries (V, H, M): (V, H, M' + 1), whose last entry is that of the normaliser."""


@dataclass(frozen=True)
class MatrixMemory:
    """The memory as matrices [C; n] of shape (V, H, M' + 1, M)."""

    content: Tensor

    @classmethod
    def empty(cls, like: Tensor, heads: int, keys: int, values: int) -> Self:
        """C = 0 and n = 1 for each row of `like`."""
        content = like.new_zeros(len(like), heads, values + 1, keys)
        content[:, :, -1] = 1.0
        return cls(content)

    def update(self, forget: Tensor, keys: Tensor, values: Tensor, edges: Tensor) -> Self:
        """See `Memory`. Costs M M' numbers per node and edge."""
        written = values.unsqueeze(3) * keys.unsqueeze(2)  # (V, H, M' + 1, M)
        kept = forget.unsqueeze(2).unsqueeze(3) * self.content
        # The sender's own stabiliser scales its gate, so all receivers get one and the same matrix.
        return type(self)(kept + written + _sum_of_neighbours(written, edges))

    def read(self, queries: Tensor) -> Tensor:
        """See `Memory`."""
        return (self.content @ queries.unsqueeze(3)).squeeze(3)


class _Write(NamedTuple):
    """What one layer wrote, and the share (V, H) of it that later layers left in each receiver."""

    kept: Tensor
    keys: Tensor
    values: Tensor
    edges: Tensor


@dataclass(frozen=True)
class AttentionMemory:
    """The same memory without its matrices, as unnormalised linear attention over all that was written.

    C_u q = sum over layers of (product of the later forget gates of u) times sum over senders v of i_v v_v (k_v . q).
    Costs M numbers per edge for every layer that reads: cheaper where few rows are read, or in few layers.
    """

    start: Tensor
    """The share (V, H) that is left of the first n = 1."""
    width: int
    writes: tuple[_Write, ...] = ()

    @classmethod
    def empty(cls, like: Tensor, heads: int, keys: int, values: int) -> Self:
        """C = 0 and n = 1 for each row of `like`."""
        return cls(like.new_ones(len(like), heads), values + 1)

    def update(self, forget: Tensor, keys: Tensor, values: Tensor, edges: Tensor) -> Self:
        """See `Memory`."""
        older = tuple(write._replace(kept=forget * write.kept) for write in self.writes)
        own = torch.arange(len(keys), device=edges.device).expand(2, -1)
        new = _Write(torch.ones_like(forget), keys, values, torch.cat([own, edges], 1))
        return type(self)(forget * self.start, self.width, (*older, new))

    def read(self, queries: Tensor) -> Tensor:
        """See `Memory`."""
        found = functional.pad((self.start * queries.sum(2)).unsqueeze(2), (self.width - 1, 0))  # (V, H, M' + 1)
        for write in self.writes:
            sender, receiver = write.edges
            scores = write.kept[receiver] * (write.keys[sender] * queries[receiver]).sum(2)  # (E, H)
            found = found.index_add(0, receiver, scores.unsqueeze(2) * write.values[sender])
        return found


MEMORIES: dict[str, type[MatrixMemory] | type[AttentionMemory]] = {"matrix": MatrixMemory, "attention": AttentionMemory}


class State(NamedTuple):
    """What a layer hands to the next besides h: the memory, and the stabiliser m (V, H) of its gates."""

    memory: Memory
    stabiliser: Tensor


class GLSTMLayer(nn.Module):
    r"""One layer of gLSTM (Blayney et al. 2025, arXiv 2510.08450), per head and for node u with senders N(u):

        k = W_k h' / sqrt(M),  v = W_v h',  f~ = W_f h',  i~ = W_i h',  o = sigma(W_o h'),  q = W_q [h'; sum of h' over N(u)]
        m_u = max(f~_u + m_u', max of i~ over N(u) and u),   f_u = exp(f~_u + m_u' - m_u),   i_v = exp(i~_v - m_v)
        C_u = f_u C_u' + sum over N(u) and u of i_v v_v k_v^T,   n_u = f_u n_u' + sum over N(u) and u of i_v k_v
        h_u = h_u + phi(W_down GroupNorm(o_u * C_u q_u / max(|n_u . q_u|, 1)) + b)

    with C', n', m' those of the layer before, and h' = h, or its LayerNorm with dropout. The input gate of a sender is
    scaled by the sender's own stabiliser, so that m does not cancel as it does in a sequence model. The heads of W_q
    and of W_k, W_v, W_o stand one after another.

    without: gates that are 1 instead; their maps stay, and still have a part in m. value_memory: M' if other than M.
    """  # noqa: E501

    def __init__(
        self,
        width: int,
        memory: int,
        *,
        heads: int = 1,
        value_memory: int | None = None,
        activation: Activation = "identity",
        without: Collection[Gate] = (),
        norm_in: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for gate in without:
            if gate not in get_args(Gate):
                raise ValueError(f"gate {gate!r} is unknown; there are {', '.join(get_args(Gate))}")
        self.heads, self.keys, self.values = heads, memory, value_memory or memory
        self.without, self.dropout, self.activation = frozenset(without), dropout, _ACTIVATIONS[activation]
        self.norm_in = nn.LayerNorm(width) if norm_in else None
        self.key = nn.Linear(width, heads * self.keys)
        self.value = nn.Linear(width, heads * self.values)
        self.forget = nn.Linear(width, heads)
        self.input = nn.Linear(width, heads)
        self.output = nn.Linear(width, heads * self.values)
        self.query = nn.Linear(2 * width, heads * self.keys)
        self.norm = nn.GroupNorm(heads, heads * self.values)
        self.down = nn.Linear(heads * self.values, width)

    def forward(
        self, h: Tensor, edges: Tensor, state: State, generator: torch.Generator | None = None
    ) -> tuple[Tensor, State]:
        """New h (V, d) and state. edges: (2, E). generator: for dropout, while training.

        Raises ValueError if dropout has no generator to draw from.
        """
        inner = self._dropped(h if self.norm_in is None else self.norm_in(h), generator)  # (V, d)
        forget, arriving = self.forget(inner) + state.stabiliser, self.input(inner)  # (V, H)
        stabiliser = torch.maximum(forget, _largest_of_neighbours(arriving, edges))
        values = functional.pad(self.value(inner).unflatten(1, (self.heads, -1)), (0, 1), value=1.0)  # (V, H, M' + 1)
        if "input" not in self.without:
            values = (arriving - stabiliser).exp().unsqueeze(2) * values
        kept = torch.ones_like(forget) if "forget" in self.without else (forget - stabiliser).exp()
        keys = (self.key(inner) / self.keys**0.5).unflatten(1, (self.heads, -1))  # (V, H, M)
        memory = state.memory.update(kept, keys, values, edges)
        queries = self.query(torch.cat([inner, _sum_of_neighbours(inner, edges)], 1)).unflatten(1, (self.heads, -1))
        read = memory.read(queries)  # (V, H, M' + 1)
        retrieved = (read[..., :-1] / read[..., -1:].abs().clamp(min=1.0)).flatten(1)  # (V, H M')
        if "output" not in self.without:
            retrieved = torch.sigmoid(self.output(inner)) * retrieved
        update = self.down(self._dropped(self.norm(retrieved), generator))  # (V, d)
        return h + self.activation(update), State(memory, stabiliser)

    def _dropped(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.training or self.dropout == 0:
            return x
        if generator is None:
            raise ValueError("dropout needs a generator while training")
        kept = torch.rand(x.shape, generator=generator, device=generator.device) >= self.dropout
        return x * kept.to(x) / (1 - self.dropout)


class GLSTM(nn.Module):
    """Layers of gLSTM that share one memory. Options of the layers as in `GLSTMLayer`.

    evaluation: by the memory's matrices, or as linear attention, which gives the same numbers and never forms them.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        memory: int,
        *,
        heads: int = 1,
        value_memory: int | None = None,
        activation: Activation = "identity",
        without: Collection[Gate] = (),
        norm_in: bool = False,
        dropout: float = 0.0,
        evaluation: Evaluation = "matrix",
    ) -> None:
        super().__init__()
        self.evaluation = evaluation
        self.layers = nn.ModuleList(
            GLSTMLayer(
                width,
                memory,
                heads=heads,
                value_memory=value_memory,
                activation=activation,
                without=without,
                norm_in=norm_in,
                dropout=dropout,
            )
            for _ in range(layers)
        )

    def forward(self, h: Tensor, edges: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """The nodes h (V, d) after all layers; the l-th reads edges[l]. Raises ValueError unless each has one."""
        first = self.layers[0]
        empty = MEMORIES[self.evaluation].empty(h, first.heads, first.keys, first.values)
        state = State(empty, h.new_zeros(len(h), first.heads))
        for layer, layer_edges in zip(self.layers, _one_each(edges, len(self.layers)), strict=True):
            h, state = layer(h, layer_edges, state, generator)
        return h


# --- other bodies ----------------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """Graph convolutions, each followed by the same activation: no residual, no norm, no dropout."""

    def __init__(self, convolutions: Sequence[nn.Module], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(convolutions)
        self.activation = activation

    def forward(self, h: Tensor, edges: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """The nodes h (V, d) after all layers; the l-th reads edges[l]. Raises ValueError unless each has one."""
        for layer, layer_edges in zip(self.layers, _one_each(edges, len(self.layers)), strict=True):
            h = self.activation(layer(h, layer_edges))
        return h


def gcn(width: int, layers: int) -> Convolutions:
    """GCN (Kipf and Welling 2017): PyTorch Geometric's layers, self-loops and symmetric normalisation, then GELU."""
    from torch_geometric.nn import GCNConv

    return Convolutions([GCNConv(width, width) for _ in range(layers)], functional.gelu)


def gatv2(width: int, layers: int) -> Convolutions:
    """GATv2 (Brody et al. 2022): PyTorch Geometric's layers of one head, then GELU."""
    from torch_geometric.nn import GATv2Conv

    return Convolutions([GATv2Conv(width, width) for _ in range(layers)], functional.gelu)


class GatedGCNLayer(nn.Module):
    r"""One layer of GatedGCN (Bresson and Laurent 2017), as in the Long Range Graph Benchmark:

        e_ij' = D x_i + E x_j + C e_ij,   x_i' = A x_i + sum_j sigma(e_ij') * B x_j / (sum_j sigma(e_ij') + 1e-6)

    for edges j -> i, each then through BatchNorm and ReLU; edges are added to what they were, nodes are not.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own = nn.Linear(width, width)  # A
        self.sent = nn.Linear(width, width)  # B
        self.edge = nn.Linear(width, width)  # C
        self.receiver = nn.Linear(width, width)  # D
        self.sender = nn.Linear(width, width)  # E
        self.node_norm, self.edge_norm = nn.BatchNorm1d(width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """New x (V, d) and features of the edges (E, d)."""
        sender, receiver = edges
        gates = self.receiver(x)[receiver] + self.sender(x)[sender] + self.edge(features)  # (E, d)
        open_ = torch.sigmoid(gates)
        both = torch.cat([open_ * self.sent(x)[sender], open_], 1)  # (E, 2 d)
        above, below = x.new_zeros(len(x), both.shape[1]).index_add(0, receiver, both).chunk(2, 1)
        x = torch.relu(self.node_norm(self.own(x) + above / (below + 1e-6)))
        return x, features + torch.relu(self.edge_norm(gates))


class GatedGCN(nn.Module):
    """Layers of `GatedGCNLayer`; all edges start from one learnt vector, for they carry no features.

    k_hop: whether each layer reads edges of its own, which then start from that vector too.
    """

    def __init__(self, width: int, layers: int, *, k_hop: bool = False) -> None:
        super().__init__()
        self.k_hop = k_hop
        self.edge = nn.Embedding(1, width)
        self.layers = nn.ModuleList(GatedGCNLayer(width) for _ in range(layers))

    def forward(self, h: Tensor, edges: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """The nodes h (V, d) after all layers; the l-th reads edges[l]. Raises ValueError unless each has one."""
        features: Tensor | None = None
        for layer, layer_edges in zip(self.layers, _one_each(edges, len(self.layers)), strict=True):
            if features is None or self.k_hop:
                features = self.edge.weight.expand(layer_edges.shape[1], -1)
            h, features = layer(h, layer_edges, features)
        return h


class ADGN(nn.Module):
    """A-DGN (Gravina et al. 2023, arXiv 2210.09789): `layers` iterations of one antisymmetric layer with a GCN inside.

    h = h + epsilon tanh((W - W^T - gamma I) h + GCN(h) + b), PyTorch Geometric's layer; it reads the first edge set.
    """

    def __init__(self, width: int, layers: int, *, epsilon: float = 0.1, gamma: float = 0.1) -> None:
        super().__init__()
        from torch_geometric.nn import AntiSymmetricConv

        self.iterations = AntiSymmetricConv(width, num_iters=layers, epsilon=epsilon, gamma=gamma)

    def forward(self, h: Tensor, edges: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """The nodes h (V, d) after all iterations."""
        return self.iterations(h, edges[0])


def _one_each(edges: Sequence[Tensor], layers: int) -> Sequence[Tensor]:
    if len(edges) != layers:
        raise ValueError(f"there are {len(edges)} edge sets for {layers} layers; give one for each")
    return edges


# --- whole networks --------------------------------------------------------------------------------------------------


class PairEmbedding(nn.Module):
    """The encoder of associative recall: [embedding of the key; embedding of the value], ids from 0 to `keys`.

    Half of the width each (keys get the smaller half), drawn from N(0, 1). The last id, `keys`, means none: its vector
    is zero and stays so.
    """

    def __init__(self, keys: int, width: int) -> None:
        super().__init__()
        self.key = nn.Embedding(keys + 1, width // 2, padding_idx=keys)
        self.value = nn.Embedding(keys + 1, width - width // 2, padding_idx=keys)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (V, 2) of keys and values to vectors (V, width)."""
        return torch.cat([self.key(ids[:, 0]), self.value(ids[:, 1])], 1)


class Network(nn.Module):
    """Encoder, body and head; the head sees, according to `readout`:

    - nodes: every node;
    - rows: some nodes, one of each graph say;
    - mean: the mean over the nodes of each graph;
    - pools: sum, largest and mean over them, one after another (A-DGN's).
    """

    def __init__(self, encoder: nn.Module, body: nn.Module, readout: Readout, head: nn.Module) -> None:
        super().__init__()
        if readout not in get_args(Readout):
            raise ValueError(f"readout {readout!r} is unknown; there are {', '.join(get_args(Readout))}")
        self.encoder, self.body, self.readout, self.head = encoder, body, readout, head

    def forward(
        self,
        x: Tensor,
        edges: Sequence[Tensor],
        where: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What the head makes of x (V, inputs).

        where: the rows to be read (G,), or the graph of each node (V,), counted from 0, for mean and pools. generator:
        for dropout. Raises ValueError if where is needed and not given.
        """
        h = self.body(self.encoder(x), edges, generator)
        return self.head(h if self.readout == "nodes" else self._read(h, where))

    def _read(self, h: Tensor, where: Tensor | None) -> Tensor:
        if where is None:
            raise ValueError(f"readout {self.readout!r} needs to know where")
        if self.readout == "rows":
            return h.index_select(0, where)
        graphs = int(where.max()) + 1
        total = h.new_zeros(graphs, h.shape[1]).index_add(0, where, h)
        mean = total / torch.bincount(where, minlength=graphs).to(h).unsqueeze(1)
        if self.readout == "mean":
            return mean
        index = where.unsqueeze(1).expand_as(h)
        largest = h.new_full(total.shape, -torch.inf).scatter_reduce(0, index, h, "amax")
        return torch.cat([total, largest, mean], 1)


def adgn_head(width: int, outputs: int, *, pooled: bool) -> nn.Sequential:
    """A-DGN's head: two linear maps, each followed by LeakyReLU; pooled: on three pools of a graph (readout pools)."""
    inputs = 3 * width if pooled else width
    inner = max(inputs // 2, 1)
    return nn.Sequential(nn.Linear(inputs, inner), nn.LeakyReLU(), nn.Linear(inner, outputs), nn.LeakyReLU())
