"""The networks of neighbour associative recall as stacks: R runs of one shape, on the one topology of `recall`.

They compute what the networks of `layers` compute on these graphs, with parameters of the same names (but that the five
maps of h in a gLSTM layer stand in one, "joint": key, value, forget, input and output), and leave out
what the centre's output does not depend on. gLSTM never forms its matrices: C_u q is the sum over all that was written
of i_v v_v (k_v . q), times the forget gates since, that is, unnormalised linear attention; with K-hop only the rows of
centre and query are read in layer 1. Only the rows that a later layer reads are computed.

`inputs` gives what Jacobians are taken by, `outputs` the rest of the network as a function without side effects, which
`torch.func` can transform; `logits` is both in one, for training.
Letters: R runs, B graphs, N neighbours, n nodes, d width, M keys, M' values of a memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from jacnorm.studies.glstm.recall import (
    CENTRE,
    MIDDLE,
    NEIGHBOURS,
    QUERY,
    VALUE_SIZE,
    Graphs,
    RecallTask,
    check_vocabulary,
)

Model = Literal["glstm", "gcn", "gatv2", "gatedgcn"]
Stack = Mapping[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """What the networks of a stack have in common.

    size: memory dimension M of gLSTM, whose width is 2 M, or width d of the others. neighbours: the number N of keys.
    """

    task: RecallTask
    model: Model
    size: int
    k_hop: bool
    layers: int
    neighbours: int

    @property
    def width(self) -> int:
        """The width d."""
        return 2 * self.size if self.model == "glstm" else self.size

    @property
    def value_memory(self) -> int:
        """Length M' of the values of a memory."""
        return VALUE_SIZE if self.task == "narr" else self.size

    @property
    def features(self) -> int:
        """Numbers per node of `inputs`: d, or those of NARR: key one-hot, value, query one-hot."""
        return self.width if self.task == "nar" else 2 * self.neighbours + VALUE_SIZE

    @property
    def key_features(self) -> int:
        """How many of them, from the first, are the key: floor(d / 2), or N. The others count as value."""
        return self.width // 2 if self.task == "nar" else self.neighbours

    @property
    def outputs(self) -> int:
        """Numbers per graph of `outputs`: N logits, or the 16-vector."""
        return self.neighbours if self.task == "nar" else VALUE_SIZE

    @property
    def parameters(self) -> int:
        """Trainable parameters of one run, the embeddings of "none" included, which stay zero."""
        return sum(torch.Size(rule.shape).numel() for rule in _rules(self).values())

    def as_modules(self, tensors: Stack, run: int) -> dict[str, Tensor]:
        """One run's tensors under the names of the networks of `layers`, where a layer's joint map is five maps."""
        values = self.value_memory
        sizes = {"key": self.size, "value": values, "forget": 1, "input": 1, "output": values}
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            before, joint, after = name.partition(".joint.")
            if joint:
                parts = tensor[run].split(list(sizes.values()))
                found |= {f"{before}.{part}.{after}": rows for part, rows in zip(sizes, parts, strict=True)}
            else:
                found[name] = tensor[run]
        return found


def draw_parameters(architecture: Architecture, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
    """Initial parameters (R, ...) float32, each by the default rule of its layer; one generator per run."""
    rules = _rules(architecture)
    runs = [{name: rule.draw(generator) for name, rule in rules.items()} for generator in generators]
    return {name: torch.stack([run[name] for run in runs]) for name in rules}


def initial_statistics(architecture: Architecture, runs: int) -> dict[str, Tensor]:
    """Running means and variances of the batch norms (R, ...); none but for GatedGCN."""
    if architecture.model != "gatedgcn":
        return {}
    shape = (runs, architecture.width)
    return {
        f"body.layers.{layer}.{norm}.running_{moment}": torch.zeros(shape) if moment == "mean" else torch.ones(shape)
        for layer in range(architecture.layers)
        for norm in ("node_norm", "edge_norm")
        for moment in ("mean", "var")
    }


def inputs(architecture: Architecture, tensors: Stack, graphs: Graphs) -> Tensor:
    """What Jacobians are taken by, (R, B, N + 3, features): the encoder's output (NAR), or the raw features (NARR).

    tensors: parameters, (R, ...). graphs: of R runs; they may have fewer neighbours than the network has keys.
    Raises UserError if they have more.
    """
    n = graphs.neighbours
    check_vocabulary(n, architecture.neighbours)
    runs, count = graphs.asked.shape
    if architecture.task == "nar":
        keys = tensors["encoder.key.weight"][:, :n]  # (R, N, d / 2)
        values = _look_up(tensors["encoder.value.weight"], graphs.values)  # (R, B, N, d - d / 2)
        asked = _look_up(keys, graphs.asked).unsqueeze(2)  # (R, B, 1, d / 2)
        neighbours = torch.cat([keys.unsqueeze(1).expand(-1, count, -1, -1), values], 3)
        query = functional.pad(asked, (0, values.shape[3]))
    else:
        vocabulary, values = architecture.neighbours, graphs.values
        keys = torch.eye(n, vocabulary).to(values).expand(runs, count, n, vocabulary)
        neighbours = torch.cat([keys, values, torch.zeros_like(keys)], 3)
        one_hot = functional.one_hot(graphs.asked, vocabulary).to(values)
        query = functional.pad(one_hot, (vocabulary + VALUE_SIZE, 0)).unsqueeze(2)
    empty = query.new_zeros(runs, count, QUERY, query.shape[3])  # centre and middle
    return torch.cat([empty, query, neighbours], 2)


def outputs(architecture: Architecture, tensors: Stack, x: Tensor, moments: dict[str, Tensor] | None = None) -> Tensor:
    """Logits (R, B, N) or vectors (R, B, 16) at the centre from `inputs` x (R, B, N + 3, features).

    tensors: parameters, and for GatedGCN running statistics, (R, ...). moments: a dictionary if batch norms are to use
    the batch's own statistics (training), which are put in there under the names of the running ones.
    """
    if architecture.task == "narr":
        x = _affine(x, tensors["encoder.weight"], tensors["encoder.bias"])
    return _head(tensors, _body(architecture, tensors, x, moments))


def logits(
    architecture: Architecture, tensors: Stack, graphs: Graphs, moments: dict[str, Tensor] | None = None
) -> Tensor:
    """`outputs` of `inputs`, (R, B, outputs).

    For NAR, a GCN or a gLSTM with K-hop applies its first maps to the embeddings, of which there are 2 N, instead of to
    the B N neighbours. Only such a gLSTM takes padded graphs, where classes that a run has not are at -inf; other
    networks raise ValueError.
    """
    if takes_padded(architecture):
        found = _head(tensors, _glstm_k_hop(architecture, tensors, *_embedded(architecture, tensors, graphs)))
        return found if graphs.present is None else found.masked_fill(~graphs.present.unsqueeze(1), -torch.inf)
    if graphs.present is not None:
        raise ValueError(f"{architecture} does not take padded graphs")
    if architecture.task == "nar" and architecture.model == "gcn":
        return _head(tensors, _gcn_embedded(architecture, tensors, graphs))
    return outputs(architecture, tensors, inputs(architecture, tensors, graphs), moments)


def takes_padded(architecture: Architecture) -> bool:
    """Whether runs of fewer neighbours can be padded to the size of others, to be trained with them."""
    return architecture.task == "nar" and architecture.model == "glstm" and architecture.k_hop


def with_more_keys(tensors: Stack, more: int) -> dict[str, Tensor]:
    """Tensors of networks of NAR with room for `more` keys and classes, all zero, that nothing reads."""
    found = dict(tensors)
    for name in ("encoder.key.weight", "encoder.value.weight", "head.weight"):
        found[name] = functional.pad(tensors[name], (0, 0, 0, more))  # the embedding of "none" is zero as well
    found["head.bias"] = functional.pad(tensors["head.bias"], (0, more))
    return found


def with_fewer_keys(tensors: Stack, keys: int) -> dict[str, Tensor]:
    """The inverse: back to so many keys and classes."""
    found = dict(tensors)
    for name in ("encoder.key.weight", "encoder.value.weight"):
        found[name] = functional.pad(tensors[name][:, :keys], (0, 0, 0, 1))
    for name in ("head.weight", "head.bias"):
        found[name] = tensors[name][:, :keys]
    return found


def _body(architecture: Architecture, tensors: Stack, x: Tensor, moments: dict[str, Tensor] | None) -> Tensor:
    """The centre after all layers, (R, B, 1, d), from x (R, B, N + 3, d)."""
    if architecture.model == "gatedgcn":
        return _gatedgcn(architecture, tensors, x, moments)
    if architecture.model == "gatv2":
        return _gatv2(architecture, tensors, x)
    special, neighbours = x[:, :, :NEIGHBOURS], x[:, :, NEIGHBOURS:]
    if architecture.model == "gcn":
        return _gcn(architecture, tensors, special, neighbours)
    if architecture.k_hop:
        first = _cells(architecture, tensors)[0]
        return _glstm_k_hop(architecture, tensors, special, _DenseLeaves(neighbours, first.mapped(neighbours)))
    return _glstm_one_hop(architecture, tensors, x)


def _head(tensors: Stack, centre: Tensor) -> Tensor:
    return _affine(centre, tensors["head.weight"], tensors["head.bias"]).squeeze(2)


# --- parts -----------------------------------------------------------------------------------------------------------


def _look_up(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of each run's table (R, K, d) at its ids (R, ...): (R, ..., d)."""
    runs, size, _ = table.shape
    first = torch.arange(0, runs * size, size, device=ids.device).view(-1, *[1] * (ids.ndim - 1))
    return functional.embedding(ids + first, table.flatten(0, 1))


def _embeddings(architecture: Architecture, tensors: Stack, graphs: Graphs) -> tuple[Tensor, Tensor]:
    """For graphs of NAR: embeddings of keys (R, N, floor(d / 2)), and of all values and "none", (R, N + 1, ...)."""
    check_vocabulary(graphs.neighbours, architecture.neighbours)
    return tensors["encoder.key.weight"][:, : graphs.neighbours], tensors["encoder.value.weight"]


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W x + b of each run: x (R, B, n, inputs), W (R, outputs, inputs), b (R, outputs)."""
    return torch.baddbmm(bias.unsqueeze(1), x.flatten(1, 2), weight.mT).unflatten(1, x.shape[1:3])


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """The same without b."""
    return torch.bmm(x.flatten(1, 2), weight.mT).unflatten(1, x.shape[1:3])


def _adjacency(neighbours: int, like: Tensor) -> Tensor:
    """Which nodes are joined, (N + 3, N + 3), 1 or 0."""
    joined = like.new_zeros(neighbours + NEIGHBOURS, neighbours + NEIGHBOURS)
    joined[CENTRE, MIDDLE] = joined[MIDDLE, QUERY] = 1.0
    joined[CENTRE, NEIGHBOURS:] = 1.0
    return joined + joined.T


# --- gLSTM -----------------------------------------------------------------------------------------------------------


class _Leaves(Protocol):
    """The neighbours of the centre, as far as the maps of one layer of gLSTM see them."""

    @property
    def total(self) -> Tensor:
        """Sum over neighbours of h, (R, B, 1, d)."""

    def gates(self) -> tuple[Tensor, Tensor]:
        """Forget and input gates before their exponentials, (R, B, N) each."""

    def products(self, q: Tensor) -> Tensor:
        """k_i . q, keys not yet scaled, for the centre's query (R, B, 1, M): (R, B, N)."""

    def weighted(self, s: Tensor) -> Tensor:
        """Sum over i of s_i v_i for weights (R, B, N): (R, B, 1, M')."""


class _DenseLeaves(NamedTuple):
    """Neighbours given one by one: h (R, B, N, d), and what the joint map makes of it."""

    h: Tensor
    mapped: _Mapped

    @property
    def total(self) -> Tensor:
        """See `_Leaves`."""
        return self.h.sum(2, keepdim=True)

    def gates(self) -> tuple[Tensor, Tensor]:
        """See `_Leaves`."""
        return self.mapped.forget, self.mapped.arriving

    def products(self, q: Tensor) -> Tensor:
        """See `_Leaves`."""
        return torch.matmul(q, self.mapped.keys.mT).squeeze(2)

    def weighted(self, s: Tensor) -> Tensor:
        """See `_Leaves`."""
        return torch.matmul(s.unsqueeze(2), self.mapped.values)


class _EmbeddedLeaves(NamedTuple):
    """Neighbours [key i; value], whose maps act on the embeddings.

    rows: embeddings with zeros in place of the other half, first those of N keys, then of all values, (R, N + K, d).
    ids: the values (R, B, N). mapped: what the joint map makes of the rows, (R, 1, N + K, ...), the bias with the keys.
    present: which neighbours there are, (R, N) bool, or None; the others' input gates are 0.
    """

    rows: Tensor
    ids: Tensor
    mapped: _Mapped
    present: Tensor | None

    @property
    def total(self) -> Tensor:
        """See `_Leaves`."""
        weights = torch.ones(self.ids.shape) if self.present is None else self.present.unsqueeze(1).expand_as(self.ids)
        return torch.bmm(self._by_row(weights.to(self.rows)), self.rows).unsqueeze(2)

    def gates(self) -> tuple[Tensor, Tensor]:
        """See `_Leaves`."""
        arriving = self._by_leaf(self.mapped.arriving)
        if self.present is not None:
            arriving = arriving.masked_fill(~self.present.unsqueeze(1), -torch.inf)
        return self._by_leaf(self.mapped.forget), arriving

    def products(self, q: Tensor) -> Tensor:
        """See `_Leaves`."""
        return self._by_leaf(torch.bmm(q.squeeze(2), self.mapped.keys.squeeze(1).mT))

    def weighted(self, s: Tensor) -> Tensor:
        """See `_Leaves`."""
        return torch.bmm(self._by_row(s), self.mapped.values.squeeze(1)).unsqueeze(2)

    def _by_leaf(self, of_rows: Tensor) -> Tensor:
        """Numbers (R, B or 1, N + K) of the rows to (R, B, N): each neighbour's key plus its value."""
        _, graphs, leaves = self.ids.shape
        by_key, by_value = of_rows.split([leaves, of_rows.shape[2] - leaves], 2)
        return by_key + by_value.expand(-1, graphs, -1).gather(2, self.ids)

    def _by_row(self, of_leaves: Tensor) -> Tensor:
        """The transpose: (R, B, N) to (R, B, N + K)."""
        zeros = of_leaves.new_zeros(*of_leaves.shape[:2], self.rows.shape[1] - of_leaves.shape[2])
        return torch.cat([of_leaves, zeros.scatter_add(2, self.ids, of_leaves)], 2)


class _Mapped(NamedTuple):
    """Keys, not yet scaled, (R, B, n, M), values and output gate (R, B, n, M'), gates (R, B, n); gates still linear."""

    keys: Tensor
    values: Tensor
    forget: Tensor
    arriving: Tensor
    output: Tensor


class _Layer(NamedTuple):
    """The maps of one layer."""

    tensors: Stack
    name: str

    def __call__(self, part: str) -> Tensor:
        return self.tensors[f"{self.name}.{part}"]

    def affine(self, x: Tensor, part: str) -> Tensor:
        return _affine(x, self(f"{part}.weight"), self(f"{part}.bias"))

    def times(self, x: Tensor) -> Tensor:
        """A GCN's matrix."""
        return _times(x, self("lin.weight"))


class _Cell(NamedTuple):
    """One layer of gLSTM of M keys and M' values."""

    of: _Layer
    keys: int
    values: int

    def mapped(self, x: Tensor) -> _Mapped:
        """The joint map of x (R, B, n, d)."""
        return self.parts(self.of.affine(x, "joint"))

    def parts(self, joint: Tensor) -> _Mapped:
        """The outputs of the joint map (R, B, n, M + 2 M' + 2) by name."""
        k, v, forget, arriving, output = joint.split([self.keys, self.values, 1, 1, self.values], 3)
        return _Mapped(k, v, forget.squeeze(3), arriving.squeeze(3), output)

    def query(self, own: Tensor, around: Tensor) -> Tensor:
        """Queries (R, B, r, M) of rows h (R, B, r, d), and the sum of h over their neighbours."""
        return self.of.affine(torch.cat([own, around], 3), "query")

    def finish(self, own: Tensor, output: Tensor, read: Tensor, normaliser: Tensor) -> Tensor:
        """New h of rows: `own` (R, B, r, d), output gate and C q (R, B, r, M'), n . q (R, B, r)."""
        opened = output.sigmoid() * read / normaliser.abs().clamp(min=1.0).unsqueeze(3)
        scale, shift = (self.of(f"norm.{part}")[:, None, None] for part in ("weight", "bias"))
        # Group norm of one group.
        normed = torch.addcmul(shift, functional.layer_norm(opened, opened.shape[3:]), scale)
        return own + self.of.affine(normed, "down")


def _cells(architecture: Architecture, tensors: Stack) -> list[_Cell]:
    _check_two_layers(architecture)
    sizes = architecture.size, architecture.value_memory
    return [_Cell(_Layer(tensors, f"body.layers.{layer}"), *sizes) for layer in range(2)]


def _check_two_layers(architecture: Architecture) -> None:
    if architecture.layers != 2:
        raise ValueError(f"a stack of {architecture.model} has 2 layers here, not {architecture.layers}")


def _read_few(weights: Tensor, q: Tensor, mapped: _Mapped) -> tuple[Tensor, Tensor]:
    """C q (R, B, r, M') and n . q (R, B, r) of what a few nodes wrote: weights (R, B, r, n), queries (R, B, r, M)."""
    # Products by hand: a batched matrix product of such sizes takes longer.
    scores = weights * (q.unsqueeze(3) * mapped.keys.unsqueeze(2)).sum(4)
    return (scores.unsqueeze(4) * mapped.values.unsqueeze(2)).sum(3), scores.sum(3)


def _read_many(weights: Tensor, q: Tensor, mapped: _Mapped) -> tuple[Tensor, Tensor]:
    """The same for many nodes."""
    scores = weights * torch.matmul(q, mapped.keys.mT)
    return torch.matmul(scores, mapped.values), scores.sum(3)


def _largest(forget: Tensor, arriving: Tensor, who: Tensor) -> Tensor:
    """The stabiliser of n nodes: the larger of `forget` (R, B, n) and those of `arriving` (R, B, a) that reach it.

    who: (n, a), 0 where it does and -inf elsewhere.
    """
    own = torch.full((len(who), len(who)), -torch.inf).fill_diagonal_(0.0).to(who)
    candidates = torch.cat([forget, arriving], 2).unsqueeze(2) + torch.cat([own, who], 1)  # (R, B, n, n + a)
    return candidates.amax(3)  # whose slope is shared by ties: centre and middle carry the same


def _barrier(reached: Tensor) -> Tensor:
    """0 where `reached` is not 0, and -inf elsewhere."""
    return torch.zeros_like(reached).masked_fill(reached == 0, -torch.inf)


def _with_itself(joined: Tensor) -> Tensor:
    return joined + torch.eye(len(joined)).to(joined)


def _glstm_k_hop(architecture: Architecture, tensors: Stack, special: Tensor, leaves: _Leaves) -> Tensor:
    """The centre after both layers, (R, B, 1, d): layer 1 reads neighbours, layer 2 the nodes at distance 2.

    At distance 2 of the centre there is the query alone, and of the query the centre; so these two rows suffice.
    special: centre, middle and query, (R, B, 3, d).
    """
    first, second = _cells(architecture, tensors)
    scale = architecture.size**-0.5  # of keys, applied to gates
    senders = _with_itself(_adjacency(0, special))  # (3, 3)

    here = first.mapped(special)
    leaf_forget, leaf_arriving = leaves.gates()  # (R, B, N)
    everyone = torch.cat([here.arriving, leaf_arriving.max(2, keepdim=True).values], 2)  # (R, B, 4)
    from_leaves = special.new_tensor([[1.0], [0.0], [0.0]])
    largest = _largest(here.forget, everyone, _barrier(torch.cat([senders, from_leaves], 1)))  # (R, B, 3)
    leaf_largest = torch.maximum(torch.maximum(leaf_forget, leaf_arriving), here.arriving[:, :, :1])
    kept = _pair(here.forget - largest).exp()  # (R, B, 2)
    middle = special[:, :, MIDDLE : MIDDLE + 1]
    own = _pair(special)  # (R, B, 2, d)
    q = first.query(own, torch.cat([middle + leaves.total, middle], 2))  # (R, B, 2, M)
    gates = (here.arriving - largest).exp().unsqueeze(2) * (scale * senders[:: QUERY - CENTRE])  # (R, B, 2, 3)
    leaf_gates = (leaf_arriving - leaf_largest).exp() * scale  # (R, B, N)
    read, normaliser = _read_few(gates, q, here)
    leaf_scores = leaf_gates * leaves.products(q[:, :, :1])
    read = read + _at_centre(leaves.weighted(leaf_scores), 2)
    normaliser = normaliser + kept * q.sum(3) + functional.pad(leaf_scores.sum(2, keepdim=True), (0, 1))
    pair = first.finish(own, _pair(here.output), read, normaliser)

    now = second.mapped(pair)
    forget = now.forget + _pair(largest)
    largest = _largest(forget, now.arriving, torch.zeros(2, 2).to(special))
    left = (forget - largest)[:, :, :1].exp()  # (R, B, 1)
    own, other = pair.split(1, 2)
    q = second.query(own, other)  # (R, B, 1, M)
    read, normaliser = _read_few((now.arriving - largest).exp().unsqueeze(2) * scale, q, now)
    old_read, old_normaliser = _read_few(gates[:, :, :1] * left.unsqueeze(3), q, here)
    leaf_scores = leaf_gates * left * leaves.products(q)
    start = left * kept[:, :, :1] * q.sum(3)
    normaliser = normaliser + old_normaliser + start + leaf_scores.sum(2, keepdim=True)
    return second.finish(own, now.output[:, :, :1], read + old_read + leaves.weighted(leaf_scores), normaliser)


def _embedded(architecture: Architecture, tensors: Stack, graphs: Graphs) -> tuple[Tensor, _Leaves]:
    """Special nodes (R, B, 3, d) and neighbours of graphs of NAR, for `_glstm_k_hop`."""
    keys, values = _embeddings(architecture, tensors, graphs)
    first = _cells(architecture, tensors)[0]
    half = [keys.shape[2], values.shape[2]]
    asked = _look_up(keys, graphs.asked).unsqueeze(2)  # (R, B, 1, floor(d / 2))
    special = functional.pad(asked, (0, half[1], QUERY, 0))  # centre and middle carry zeros
    rows = torch.cat([functional.pad(keys, (0, half[1])), functional.pad(values, (half[0], 0))], 1)  # (R, N + K, d)
    weight, bias = first.of("joint.weight"), first.of("joint.bias").unsqueeze(1)
    by_key = torch.baddbmm(bias, keys, weight[:, :, : half[0]].mT)
    by_value = torch.bmm(values, weight[:, :, half[0] :].mT)
    joint = torch.cat([by_key, by_value], 1).unsqueeze(1)  # (R, 1, N + K, ...)
    return special, _EmbeddedLeaves(rows, graphs.values, first.parts(joint), graphs.present)


def _glstm_one_hop(architecture: Architecture, tensors: Stack, x: Tensor) -> Tensor:
    """The centre after two layers that both read neighbours, (R, B, 1, d), from x (R, B, N + 3, d)."""
    first, second = _cells(architecture, tensors)
    joined = _adjacency(x.shape[2] - NEIGHBOURS, x)
    senders = _with_itself(joined) * architecture.size**-0.5  # the keys' scale is applied to gates

    here = first.mapped(x)
    stabiliser = _stabiliser_in_star(here.forget, here.arriving)  # (R, B, n)
    kept = (here.forget - stabiliser).exp()
    q = first.query(x, _around(x))  # (R, B, n, M)
    gates = (here.arriving - stabiliser).exp().unsqueeze(2) * senders  # (R, B, n, n)
    read, normaliser = _read_many(gates, q, here)
    x = first.finish(x, here.output, read, normaliser + kept * q.sum(3))

    now = second.mapped(x)
    forget = now.forget + stabiliser
    largest = _stabiliser_in_star(forget, now.arriving)
    left = (forget - largest)[:, :, :1].exp()  # (R, B, 1)
    own = x[:, :, :1]
    q = second.query(own, _around(x)[:, :, :1])  # (R, B, 1, M)
    read, normaliser = _read_many((now.arriving - largest).exp().unsqueeze(2) * senders[:1], q, now)
    old_read, old_normaliser = _read_many(gates[:, :, :1] * left.unsqueeze(3), q, here)
    normaliser = normaliser + old_normaliser + left * kept[:, :, :1] * q.sum(3)
    return second.finish(own, now.output[:, :, :1], read + old_read, normaliser)


def _stabiliser_in_star(forget: Tensor, arriving: Tensor) -> Tensor:
    """The larger of `forget` and the largest of `arriving` over neighbours and itself, (R, B, N + 3)."""
    special, others = arriving[:, :, :NEIGHBOURS], arriving[:, :, NEIGHBOURS:]
    reached = _barrier(torch.cat([_with_itself(_adjacency(0, special)), special.new_tensor([[1.0], [0.0], [0.0]])], 1))
    everyone = torch.cat([special, others.max(2, keepdim=True).values], 2)
    of_special = _largest(forget[:, :, :NEIGHBOURS], everyone, reached)
    of_others = torch.maximum(torch.maximum(forget[:, :, NEIGHBOURS:], others), special[:, :, :1])
    return torch.cat([of_special, of_others], 2)


def _around(x: Tensor) -> Tensor:
    """Sum of x (R, B, N + 3, d) over the neighbours of each node."""
    centre, middle, query, others = x.split([1, 1, 1, x.shape[2] - NEIGHBOURS], 2)
    return torch.cat([middle + others.sum(2, keepdim=True), centre + query, middle, centre.expand_as(others)], 2)


def _pair(special: Tensor) -> Tensor:
    """Centre and query of (R, B, 3, ...)."""
    return special[:, :, :: QUERY - CENTRE]


def _at_centre(x: Tensor, rows: int) -> Tensor:
    """(R, B, 1, d) as the first of `rows` rows, the others zero."""
    return functional.pad(x, (0, 0, 0, rows - 1))


# --- GCN -------------------------------------------------------------------------------------------------------------


def _gcn(architecture: Architecture, tensors: Stack, special: Tensor, neighbours: Tensor) -> Tensor:
    """The centre after all layers, (R, B, 1, d), from special nodes (R, B, 3, d) and neighbours (R, B, N, d)."""
    of = _Layer(tensors, "body.layers.0")
    special, neighbours = _times(special, of("lin.weight")), _times(neighbours, of("lin.weight"))
    own, path, spoke = _gcn_weights(neighbours.shape[2], special)
    bias = of("bias")[:, None, None]
    active = functional.gelu(own * neighbours + (spoke * special[:, :, :1] + bias))
    arriving = torch.matmul(path, special) + _at_centre(spoke * neighbours.sum(2, keepdim=True), NEIGHBOURS)
    return _later_gcn(architecture, tensors, functional.gelu(arriving + bias), active)


def _gcn_embedded(architecture: Architecture, tensors: Stack, graphs: Graphs) -> Tensor:
    """The same for graphs of NAR, the first matrix applied to embeddings.

    The centre starts from zero, so neighbours receive nothing from it in layer 1.
    """
    keys, values = _embeddings(architecture, tensors, graphs)
    of = _Layer(tensors, "body.layers.0")
    own, path, spoke = _gcn_weights(graphs.neighbours, keys)
    bias = of("bias").unsqueeze(1)  # (R, 1, d)
    by_key, by_value = of("lin.weight").split([keys.shape[2], values.shape[2]], 2)
    keys, values = torch.bmm(keys, by_key.mT), torch.bmm(values, by_value.mT)  # (R, N or K, d)
    neighbours = _look_up(own * values, graphs.values) + (own * keys + bias).unsqueeze(1)  # (R, B, N, d)
    counts = torch.zeros(*graphs.asked.shape, values.shape[1]).to(values)
    counts = counts.scatter_add(2, graphs.values, torch.ones(graphs.values.shape).to(values))  # (R, B, K)
    total = keys.sum(1, keepdim=True) + torch.bmm(counts, values)  # (R, B, d)
    asked = _look_up(keys, graphs.asked)  # (R, B, d)
    arriving = [spoke * total, path[MIDDLE, QUERY] * asked, path[QUERY, QUERY] * asked]
    special = functional.gelu(torch.stack(arriving, 2) + bias.unsqueeze(1))  # (R, B, 3, d)
    return _later_gcn(architecture, tensors, special, functional.gelu(neighbours))


def _later_gcn(architecture: Architecture, tensors: Stack, special: Tensor, neighbours: Tensor) -> Tensor:
    """The centre after all layers from the nodes after the first."""
    for layer in range(1, architecture.layers):
        of = _Layer(tensors, f"body.layers.{layer}")
        bias = of("bias")[:, None, None]
        if architecture.k_hop:  # the centre reads the query and itself; the second layer is the last
            _check_two_layers(architecture)
            return functional.gelu(of.times(_pair(special).mean(2, keepdim=True)) + bias)
        own, path, spoke = _gcn_weights(neighbours.shape[2], special)
        total = spoke * neighbours.sum(2, keepdim=True)  # (R, B, 1, d)
        if layer == architecture.layers - 1:
            read = path[CENTRE, CENTRE] * special[:, :, :1] + path[CENTRE, MIDDLE] * special[:, :, MIDDLE:QUERY]
            return functional.gelu(of.times(read + total) + bias)
        mixed = torch.matmul(path, special) + _at_centre(total, NEIGHBOURS)
        neighbours = functional.gelu(of.times(own * neighbours + spoke * special[:, :, :1]) + bias)
        special = functional.gelu(of.times(mixed) + bias)
    raise ValueError("a stack of GCNs needs two layers or more")


def _gcn_weights(neighbours: int, like: Tensor) -> tuple[float, Tensor, float]:
    """1 / sqrt(degree of i, degree of j), self-loops counted: neighbour to itself, special nodes (3, 3), spokes."""
    degrees = like.new_tensor([neighbours + 2, 3.0, 2.0])
    joined = (_adjacency(0, like) + torch.eye(NEIGHBOURS).to(like)) / (degrees * degrees.unsqueeze(1)).sqrt()
    return 0.5, joined, (2 * (neighbours + 2)) ** -0.5


# --- GATv2 -----------------------------------------------------------------------------------------------------------


def _gatv2(architecture: Architecture, tensors: Stack, x: Tensor) -> Tensor:
    """The centre after two layers, (R, B, 1, d), from x (R, B, N + 3, d)."""
    _check_two_layers(architecture)
    joined = _adjacency(x.shape[2] - NEIGHBOURS, x) + torch.eye(x.shape[2]).to(x)
    first, second = (_Attention(tensors, f"body.layers.{layer}") for layer in (0, 1))
    sent, asked = first.sent(x), first.asked(x)
    special = first.attend(asked[:, :, :NEIGHBOURS], sent.unsqueeze(2), joined[:NEIGHBOURS] > 0)  # (R, B, 3, d)
    if architecture.k_hop:
        pair = special[:, :, CENTRE : QUERY + 1 : QUERY - CENTRE]
        everyone = torch.ones(1, 2, dtype=torch.bool, device=x.device)
        return second.attend(second.asked(pair[:, :, :1]), second.sent(pair).unsqueeze(2), everyone)
    leaves = sent[:, :, NEIGHBOURS:]
    both = torch.stack([leaves, sent[:, :, :1].expand_as(leaves)], 3)  # (R, B, N, 2, d): itself and the centre
    all_of_them = torch.ones(leaves.shape[2], 2, dtype=torch.bool, device=x.device)
    x = torch.cat([special, first.attend(asked[:, :, NEIGHBOURS:], both, all_of_them)], 2)
    return second.attend(second.asked(x[:, :, :1]), second.sent(x).unsqueeze(2), joined[:1] > 0)


class _Attention(NamedTuple):
    """One layer of GATv2: sum_j softmax_j(a . LeakyReLU(L x_j + R x_i)) L x_j + b, then GELU."""

    tensors: Stack
    name: str

    def sent(self, x: Tensor) -> Tensor:
        """L x."""
        return _affine(x, self.tensors[f"{self.name}.lin_l.weight"], self.tensors[f"{self.name}.lin_l.bias"])

    def asked(self, x: Tensor) -> Tensor:
        """R x."""
        return _affine(x, self.tensors[f"{self.name}.lin_r.weight"], self.tensors[f"{self.name}.lin_r.bias"])

    def attend(self, asked: Tensor, sent: Tensor, allowed: Tensor) -> Tensor:
        """Receivers (R, B, r, d) from senders (R, B, r or 1, s, d), those that are `allowed` (r, s)."""
        attention = self.tensors[f"{self.name}.att"][:, :, 0, :, None].unsqueeze(1)  # (R, 1, 1, d, 1)
        hidden = functional.leaky_relu(sent + asked.unsqueeze(3), 0.2)  # (R, B, r, s, d)
        scores = torch.matmul(hidden, attention).squeeze(4).masked_fill(~allowed, -torch.inf)
        found = torch.matmul(scores.softmax(3).unsqueeze(3), sent).squeeze(3)  # (R, B, r, d)
        return functional.gelu(found + self.tensors[f"{self.name}.bias"][:, None, None])


# --- GatedGCN --------------------------------------------------------------------------------------------------------


def _gatedgcn(architecture: Architecture, tensors: Stack, x: Tensor, moments: dict[str, Tensor] | None) -> Tensor:
    """The centre after all layers, (R, B, 1, d), from x (R, B, N + 3, d); every row, for batch norms see them all."""
    sets = _edge_sets(architecture, x)
    same = not architecture.k_hop
    features = tensors["body.edge.weight"].unsqueeze(1)  # (R, 1, 1, d)
    for layer, (sender, receiver) in enumerate(sets):
        of = _Layer(tensors, f"body.layers.{layer}")
        if not same:
            features = tensors["body.edge.weight"].unsqueeze(1)
        own, sent, at_receiver, at_sender = (of.affine(x, part) for part in ("own", "sent", "receiver", "sender"))
        gates = at_receiver.index_select(2, receiver) + at_sender.index_select(2, sender) + of.affine(features, "edge")
        opened = gates.sigmoid()  # (R, B, E, d)
        above = torch.zeros_like(own).index_add(2, receiver, opened * sent.index_select(2, sender))
        below = torch.zeros_like(own).index_add(2, receiver, opened)
        x = torch.relu(_batch_norm(own + above / (below + 1e-6), of, "node_norm", moments))
        if same and layer < architecture.layers - 1:  # no later layer reads the edges of others
            features = features + torch.relu(_batch_norm(gates, of, "edge_norm", moments))
    return x[:, :, :1]


def _edge_sets(architecture: Architecture, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Senders and receivers (E,) for each layer."""
    joined = _adjacency(x.shape[2] - NEIGHBOURS, x)
    near = joined.nonzero().unbind(1)
    if not architecture.k_hop:
        return [near] * architecture.layers
    _check_two_layers(architecture)
    apart = (joined @ joined > 0) & (joined == 0) & ~torch.eye(len(joined), dtype=torch.bool, device=x.device)
    return [near, apart.nonzero().unbind(1)]


def _batch_norm(x: Tensor, of: _Layer, norm: str, moments: dict[str, Tensor] | None) -> Tensor:
    """Of each run, over graphs and nodes or edges; by running statistics unless `moments` asks for those of x."""
    names = [f"{of.name}.{norm}.running_{moment}" for moment in ("mean", "var")]
    if moments is None:
        mean, variance = (of.tensors[name][:, None, None] for name in names)
    else:
        variance, mean = torch.var_mean(x, (1, 2), correction=0, keepdim=True)
        count = x.shape[1] * x.shape[2]
        unbiased = variance.detach() * (count / (count - 1))
        moments |= {names[0]: mean.detach()[:, 0, 0], names[1]: unbiased[:, 0, 0]}
    scale, shift = (of(f"{norm}.{part}")[:, None, None] for part in ("weight", "bias"))
    return (x - mean) * (variance + 1e-5).rsqrt() * scale + shift


# --- initial values --------------------------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """A parameter: its shape, and its start: uniform in +-`start`, normal, "padded" (last row 0), or constant."""

    shape: tuple[int, ...]
    start: float | Literal["normal", "padded"]
    constant: bool = False

    def draw(self, generator: torch.Generator) -> Tensor:
        if self.constant:
            return torch.full(self.shape, float(self.start))
        if isinstance(self.start, str):
            drawn = torch.randn(self.shape, generator=generator)
            if self.start == "padded":
                drawn[-1] = 0.0
            return drawn
        return (2 * torch.rand(self.shape, generator=generator) - 1) * self.start


def _linear(name: str, inputs: int, outputs: int) -> dict[str, _Rule]:
    """PyTorch's default: weight and bias uniform in +-1/sqrt(inputs)."""
    bound = inputs**-0.5
    return {f"{name}.weight": _Rule((outputs, inputs), bound), f"{name}.bias": _Rule((outputs,), bound)}


def _norm(name: str, size: int) -> dict[str, _Rule]:
    return {f"{name}.weight": _Rule((size,), 1.0, True), f"{name}.bias": _Rule((size,), 0.0, True)}


def _rules(architecture: Architecture) -> dict[str, _Rule]:
    """All parameters of one run."""
    d, rules = architecture.width, _encoder_rules(architecture)
    if architecture.model == "gatedgcn":
        rules["body.edge.weight"] = _Rule((1, d), "normal")
    for layer in range(architecture.layers):
        rules |= {f"body.layers.{layer}.{name}": rule for name, rule in _layer_rules(architecture).items()}
    return rules | _linear("head", d, architecture.outputs)


def _encoder_rules(architecture: Architecture) -> dict[str, _Rule]:
    d, keys = architecture.width, architecture.neighbours
    if architecture.task == "narr":
        return _linear("encoder", architecture.features, d)
    return {
        "encoder.key.weight": _Rule((keys + 1, d // 2), "padded"),
        "encoder.value.weight": _Rule((keys + 1, d - d // 2), "padded"),
    }


def _layer_rules(architecture: Architecture) -> dict[str, _Rule]:
    d = architecture.width
    glorot = _Rule((d, d), (6 / (2 * d)) ** 0.5)  # as in PyTorch Geometric
    if architecture.model == "gcn":
        return {"bias": _Rule((d,), 0.0, True), "lin.weight": glorot}
    if architecture.model == "gatv2":
        biases = {f"lin_{side}.bias": _Rule((d,), d**-0.5) for side in "lr"}
        weights = {f"lin_{side}.weight": glorot for side in "lr"}
        return {"att": _Rule((1, 1, d), (6 / (1 + d)) ** 0.5), "bias": _Rule((d,), 0.0, True), **weights, **biases}
    rules: dict[str, _Rule] = {}
    if architecture.model == "gatedgcn":
        for name in ("own", "sent", "edge", "receiver", "sender"):
            rules |= _linear(name, d, d)
        return rules | _norm("node_norm", d) | _norm("edge_norm", d)
    keys, values = architecture.size, architecture.value_memory
    joint = keys + 2 * values + 2  # rows of key, value, forget, input and output, whose inputs are the same
    maps = _linear("joint", d, joint) | _linear("query", 2 * d, keys) | _linear("down", values, d)
    return maps | _norm("norm", values)
