r"""The networks of graph property prediction for R runs at once, on padded graphs: those of `layers`, quicker.

Small graphs are small matrices, so all graphs of a batch and all runs of a stack go through one batched product per
operation instead of one message per edge. Parameters are drawn as the modules of `layers` draw them, and lie together:
one tensor for all layers, and for all maps of a layer that read the same input.

Letters: R runs, B graphs, n nodes with padding, d width, L layers, H heads, M memory dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from jacnorm.studies.glstm.layers import ADGN, GATES, GLSTM, Convolutions, Network, adgn_head, drawn
from jacnorm.studies.glstm.settings import Ablation

FEATURES = 2
"""Numbers that a node has at the input: whether it is the source, and its value."""
EPSILON, GAMMA = 0.1, 0.1
"""Step and damping of A-DGN, the defaults of its authors' code."""
_ACTIVATIONS = {"identity": lambda x: x, "relu": torch.relu, "tanh": torch.tanh}

_LAYER = [f"{part}/{kind}" for part in ("read", "query", "down", "norm") for kind in ("weight", "bias")]

Parameters = Mapping[str, Tensor]


class Architecture(NamedTuple):
    """Sizes of a network. graph_level: one number per graph instead of one per node."""

    layers: int
    width: int
    heads: int
    memory: int
    activation: str
    graph_level: bool


class Batch(NamedTuple):
    """B graphs of each run."""

    features: Tensor
    """(R, B, n, 2)."""
    distances: Tensor
    """As `pna_graphs.distances`, (R, B, n, n)."""
    real: Tensor
    """Which nodes are no padding, (R, B, n)."""


class PropertyNetwork(Protocol):
    """R networks of one shape."""

    def initial(self, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Parameters at the start, (R, ...) each, one generator per run."""

    def parameter_count(self) -> int:
        """Trainable parameters of one network, those of gates that are taken away included."""

    def __call__(self, parameters: Parameters, batch: Batch) -> Tensor:
        """Predictions: (R, B) at graph level, else (R, B, n), of which padding means nothing."""


def network(model: str, architecture: Architecture, ablations: Sequence[Ablation | str]) -> PropertyNetwork:
    """The networks of runs that differ in their seed and in what was taken away (gLSTM only), one entry per run."""
    if model == "glstm":
        return StackedGLSTM(architecture, ablations)
    return StackedGCN(architecture) if model == "gcn" else StackedADGN(architecture)


class _Stacked:
    """What the networks share. Subclasses say which module of `layers` they compute, and how its parameters lie."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    def module(self) -> Network:
        """One network as a module of `layers`."""
        raise NotImplementedError

    def arranged(self, module: Network) -> dict[str, Tensor]:
        """The module's parameters as this network keeps them."""
        raise NotImplementedError

    def initial(self, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """See `PropertyNetwork`."""
        runs = [self.arranged(drawn(self.module, generator)) for generator in generators]
        return {name: torch.stack([run[name].detach() for run in runs]) for name in runs[0]}

    def parameter_count(self) -> int:
        """See `PropertyNetwork`."""
        return sum(parameter.numel() for parameter in drawn(self.module, torch.Generator()).parameters())

    def _pooled_head(self, parameters: Parameters, h: Tensor, batch: Batch) -> Tensor:
        """A-DGN's head on nodes, or on sum, largest and mean over the nodes of a graph; h: (R, B n, d)."""
        if self.architecture.graph_level:
            h, real = h.unflatten(1, batch.real.shape[1:]), batch.real.unsqueeze(3)
            total = torch.where(real, h, 0.0).sum(2)  # (R, B, d)
            largest = torch.where(real, h, -torch.inf).amax(2)
            h = torch.cat([total, largest, total / real.sum(2)], 2)
        for layer in ("first", "second"):
            h = functional.leaky_relu(_affine(h, parameters, f"head/{layer}"))
        return h.view(batch.real.shape[:2] if self.architecture.graph_level else batch.real.shape)


class _State(NamedTuple):
    """What a layer of gLSTM hands to the next besides h, as unnormalised linear attention (`layers.AttentionMemory`).

    With small graphs this is cheaper than the matrices C: all layers' senders are columns of one product. Letters: l
    the layers so far.
    """

    keys: Tensor
    """(R B, H, l n, M)."""
    values: Tensor
    """With the normaliser's entry, 1, and times the input gate: (R B, H, l n, M + 1)."""
    kept: Tensor
    """What later forget gates left of each of them in each receiver, (R B, H, n, l n); 0 for those it did not read."""
    start: Tensor
    """What is left of n = 1, (R B, H, n)."""
    stabiliser: Tensor
    """(R B, H, n)."""

    @classmethod
    def empty(cls, like: Tensor, graphs: int, n: int, architecture: Architecture) -> _State:
        """C = 0, n = 1, m = 0."""
        heads, memory = architecture.heads, architecture.memory
        return cls(
            like.new_empty(graphs, heads, 0, memory),
            like.new_empty(graphs, heads, 0, memory + 1),
            like.new_empty(graphs, heads, n, 0),
            like.new_ones(graphs, heads, n),
            like.new_zeros(graphs, heads, n),
        )

    def after(self, forget: Tensor, keys: Tensor, values: Tensor, senders: Tensor, stabiliser: Tensor) -> _State:
        """The state after one layer; senders: (R B, n, n)."""
        new = senders.to(keys.dtype).unsqueeze(1).expand(-1, keys.shape[1], -1, -1)
        return _State(
            torch.cat([self.keys, keys], 2),
            torch.cat([self.values, values], 2),
            torch.cat([self.kept * forget.unsqueeze(3), new], 3),
            self.start * forget,
            stabiliser,
        )

    def read(self, queries: Tensor) -> Tensor:
        """[C; n] times queries (R B, H, n, M): (R B, H, n, M + 1)."""
        found = (queries @ self.keys.mT * self.kept) @ self.values
        return found + functional.pad((self.start * queries.sum(3)).unsqueeze(3), (self.values.shape[3] - 1, 0))


class StackedGLSTM(_Stacked):
    """gLSTM (`layers.GLSTMLayer`), each run with its own ablation; no norm at the input, a linear encoder and head.

    The head reads every node, or the mean over the nodes of a graph. Runs with "1-hop" read the nodes at distance 1 in
    every layer, the others those at distance l in layer l.
    """

    def __init__(self, architecture: Architecture, ablations: Sequence[Ablation | str]) -> None:
        super().__init__(architecture)
        self._k_hop = torch.tensor([ablation != "1-hop" for ablation in ablations])
        self._without = {
            gate: torch.tensor([gate in GATES[ablation] for ablation in ablations])
            for gate in ("output", "input", "forget")
        }

    def module(self) -> Network:
        """One network with all gates."""
        a = self.architecture
        body = GLSTM(a.width, a.layers, a.memory, heads=a.heads, activation=a.activation)
        readout = "mean" if a.graph_level else "nodes"
        return Network(nn.Linear(FEATURES, a.width), body, readout, nn.Linear(a.width, 1))

    def arranged(self, module: Network) -> dict[str, Tensor]:
        """Layers one after another; key, value, output gate, forget gate and input gate in one map, `read`."""
        layers = module.body.layers

        def maps(name: str, *parts: str) -> dict[str, Tensor]:
            weights = [torch.cat([getattr(layer, part).weight for part in parts]).T for layer in layers]
            biases = [torch.cat([getattr(layer, part).bias for part in parts]) for layer in layers]
            return {f"{name}/weight": torch.stack(weights), f"{name}/bias": torch.stack(biases)}

        return {
            **_linear("encoder", module.encoder),
            **maps("read", "key", "value", "output", "forget", "input"),
            **maps("query", "query"),
            **maps("down", "down"),
            "norm/weight": torch.stack([layer.norm.weight for layer in layers]),
            "norm/bias": torch.stack([layer.norm.bias for layer in layers]),
            **_linear("head", module.head),
        }

    def __call__(self, parameters: Parameters, batch: Batch) -> Tensor:
        """See `PropertyNetwork`."""
        a, (runs, graphs, n) = self.architecture, batch.real.shape
        h = _affine(batch.features.flatten(1, 2), parameters, "encoder")  # (R, B n, d)
        state = _State.empty(h, runs * graphs, n, a)
        own = torch.eye(n, dtype=torch.bool, device=h.device)
        for number, weights in enumerate(zip(*(parameters[name].unbind(1) for name in _LAYER), strict=True), start=1):
            hops = torch.where(self._k_hop, number, 1).to(h.device, batch.distances.dtype)
            senders = (batch.distances == hops.view(-1, 1, 1, 1)).flatten(0, 1)  # (R B, n, n)
            h, state = self._layer(dict(zip(_LAYER, weights, strict=True)), h, state, senders, senders | own)
        if a.graph_level:
            h = torch.where(batch.real.unsqueeze(3), h.unflatten(1, (graphs, n)), 0.0).sum(2)  # (R, B, d)
            h = h / batch.real.sum(2, keepdim=True)
        return _affine(h, parameters, "head").view(batch.real.shape[:2] if a.graph_level else batch.real.shape)

    def _layer(
        self, weights: Parameters, h: Tensor, state: _State, senders: Tensor, with_self: Tensor
    ) -> tuple[Tensor, _State]:
        """New h (R, B n, d) and state. senders: the neighbours of each node, (R B, n, n); with_self: and itself."""
        a, (graphs, n, _) = self.architecture, senders.shape
        units = a.heads * a.memory
        read = torch.baddbmm(weights["read/bias"].unsqueeze(1), h, weights["read/weight"])  # (R, B n, 3 H M + 2 H)
        keys, values, outputs, gates = read.split([units, units, units, 2 * a.heads], 2)
        forget, arriving = gates.view(graphs, n, 2 * a.heads).transpose(1, 2).chunk(2, 1)  # (R B, H, n)
        forget = forget + state.stabiliser
        largest = torch.where(with_self.unsqueeze(1), arriving.unsqueeze(2), -torch.inf).amax(3)
        stabiliser = torch.maximum(forget, largest)
        kept = self._gate("forget", (forget - stabiliser).exp())
        written = self._gate("input", (arriving - stabiliser).exp()).unsqueeze(3)
        values = functional.pad(self._by_head(values, n), (0, 1), value=1.0)  # (R B, H, n, M + 1)
        state = state.after(kept, self._by_head(keys / a.memory**0.5, n), written * values, with_self, stabiliser)

        sums = torch.bmm(senders.to(h.dtype), h.view(graphs, n, -1)).view(h.shape)
        queries = torch.baddbmm(weights["query/bias"].unsqueeze(1), torch.cat([h, sums], 2), weights["query/weight"])
        found = state.read(self._by_head(queries, n))  # (R B, H, n, M + 1)
        retrieved = found[..., :-1] / found[..., -1:].abs().clamp(min=1.0)
        gated = self._gate("output", torch.sigmoid(outputs)) * retrieved.transpose(1, 2).reshape(outputs.shape)
        grouped = gated.unflatten(2, (a.heads, a.memory))  # one group per head
        normed = functional.layer_norm(grouped, (a.memory,), eps=1e-5).flatten(2)
        normed = torch.addcmul(weights["norm/bias"].unsqueeze(1), normed, weights["norm/weight"].unsqueeze(1))
        update = torch.baddbmm(weights["down/bias"].unsqueeze(1), normed, weights["down/weight"])
        return h + _ACTIVATIONS[a.activation](update), state

    def _by_head(self, x: Tensor, n: int) -> Tensor:
        """(R, B n, H M) to (R B, H, n, M)."""
        return x.reshape(-1, n, self.architecture.heads, self.architecture.memory).transpose(1, 2)

    def _gate(self, name: str, value: Tensor) -> Tensor:
        """The gate, (R, ...) or (R B, ...), 1 for runs without it."""
        without = self._without[name].to(value.device)
        if not without.any():
            return value
        without = without.repeat_interleave(len(value) // len(without))
        return value.masked_fill(without.view(-1, *[1] * (value.ndim - 1)), 1.0)


class StackedGCN(_Stacked):
    """The GCN that A-DGN's authors compare with: GCN layers, each followed by tanh, between their encoder and head."""

    def module(self) -> Network:
        """One network."""
        from torch_geometric.nn import GCNConv

        a = self.architecture
        body = Convolutions([GCNConv(a.width, a.width) for _ in range(a.layers)], torch.tanh)
        head = adgn_head(a.width, 1, pooled=a.graph_level)
        return Network(nn.Linear(FEATURES, a.width), body, "pools" if a.graph_level else "nodes", head)

    def arranged(self, module: Network) -> dict[str, Tensor]:
        """Layers one after another."""
        layers = module.body.layers
        return {
            **_linear("encoder", module.encoder),
            "convolution/weight": torch.stack([layer.lin.weight.T for layer in layers]),
            "convolution/bias": torch.stack([layer.bias for layer in layers]),
            **_linear("head/first", module.head[0]),
            **_linear("head/second", module.head[2]),
        }

    def __call__(self, parameters: Parameters, batch: Batch) -> Tensor:
        """See `PropertyNetwork`."""
        h = _affine(batch.features.flatten(1, 2), parameters, "encoder")
        operator = _gcn_operator(batch.distances, h.dtype)
        layers = zip(parameters["convolution/weight"].unbind(1), parameters["convolution/bias"].unbind(1), strict=True)
        for weight, bias in layers:
            h = torch.tanh(_propagated(operator, torch.bmm(h, weight)) + bias.unsqueeze(1))
        return self._pooled_head(parameters, h, batch)


class StackedADGN(_Stacked):
    """A-DGN (`layers.ADGN`) between the encoder and the head of its authors."""

    def module(self) -> Network:
        """One network."""
        a = self.architecture
        head = adgn_head(a.width, 1, pooled=a.graph_level)
        body = ADGN(a.width, a.layers, epsilon=EPSILON, gamma=GAMMA)
        return Network(nn.Linear(FEATURES, a.width), body, "pools" if a.graph_level else "nodes", head)

    def arranged(self, module: Network) -> dict[str, Tensor]:
        """One layer, which is iterated."""
        layer = module.body.iterations
        return {
            **_linear("encoder", module.encoder),
            "own/weight": layer.W,
            "own/bias": layer.bias,
            "neighbours/weight": layer.phi.lin.weight.T,
            **_linear("head/first", module.head[0]),
            **_linear("head/second", module.head[2]),
        }

    def __call__(self, parameters: Parameters, batch: Batch) -> Tensor:
        """See `PropertyNetwork`."""
        h = _affine(batch.features.flatten(1, 2), parameters, "encoder")
        operator = _gcn_operator(batch.distances, h.dtype)
        own = parameters["own/weight"]
        antisymmetric = own.transpose(1, 2) - own - GAMMA * torch.eye(own.shape[1], device=own.device, dtype=own.dtype)
        both = torch.cat([antisymmetric, parameters["neighbours/weight"]], 2)  # (R, d, 2 d)
        bias = parameters["own/bias"].unsqueeze(1)
        for _ in range(self.architecture.layers):
            kept, sent = torch.bmm(h, both).chunk(2, 2)
            h = h + EPSILON * torch.tanh(kept + _propagated(operator, sent) + bias)
        return self._pooled_head(parameters, h, batch)


def _linear(name: str, layer: nn.Linear) -> dict[str, Tensor]:
    return {f"{name}/weight": layer.weight.T, f"{name}/bias": layer.bias}


def _affine(x: Tensor, parameters: Parameters, name: str) -> Tensor:
    """X W + b of each run; x: (R, N, inputs)."""
    return torch.baddbmm(parameters[f"{name}/bias"].unsqueeze(1), x, parameters[f"{name}/weight"])


def _gcn_operator(distances: Tensor, dtype: torch.dtype) -> Tensor:
    """D^(-1/2) (A + I) D^(-1/2), (R, B, n, n), with D the degrees including the loops; padding keeps to itself."""
    near = ((distances == 0) | (distances == 1)).to(dtype)
    scale = near.sum(3).rsqrt()
    return scale.unsqueeze(3) * near * scale.unsqueeze(2)


def _propagated(operator: Tensor, h: Tensor) -> Tensor:
    """The operator (R, B, n, n) applied to h (R, B n, d)."""
    n = operator.shape[3]
    return torch.bmm(operator.flatten(0, 1), h.reshape(-1, n, h.shape[2])).view(h.shape)
