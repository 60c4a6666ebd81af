"""The networks of `layers` as peers of stacks: the same weights, and the graphs written down node by node."""

from __future__ import annotations

import torch
from torch import nn

from jacnorm.studies.glstm import layers


def module(architecture):
    """The same network from `layers`, float64."""
    width, count = architecture.width, architecture.layers
    if architecture.task == "nar":
        encoder = layers.PairEmbedding(architecture.neighbours, width)
    else:
        encoder = nn.Linear(2 * architecture.neighbours + 16, width)
    body = {
        "glstm": lambda: layers.GLSTM(width, count, architecture.size, value_memory=architecture.value_memory),
        "gcn": lambda: layers.gcn(width, count),
        "gatv2": lambda: layers.gatv2(width, count),
        "gatedgcn": lambda: layers.GatedGCN(width, count, k_hop=architecture.k_hop),
    }[architecture.model]()
    return layers.Network(encoder, body, "rows", nn.Linear(width, architecture.outputs)).double()


def filled(architecture, tensors, run):
    network = module(architecture)
    missing = network.load_state_dict(architecture.as_modules(tensors, run), strict=False)
    assert not missing.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    return network


def edge_sets(architecture, graphs):
    """For each layer the edges of all graphs, written down here once more."""
    ends = [(0, 1), (1, 2), *((0, 3 + i) for i in range(graphs.neighbours))]
    one = torch.tensor([*ends, *((b, a) for a, b in ends)]).T
    nodes = graphs.neighbours + 3
    sets = layers.k_hop_edges(one, nodes, architecture.layers) if architecture.k_hop else [one] * architecture.layers
    return [torch.cat([edges + graph * nodes for graph in range(graphs.asked.shape[1])], 1) for edges in sets]


def raw(architecture, graphs, run):
    """What a node carries, by the task's own words: ids of key and value, or one-hot vectors."""
    n, rows = graphs.neighbours, []
    for graph in range(graphs.asked.shape[1]):
        asked = int(graphs.asked[run, graph])
        if architecture.task == "nar":
            none = architecture.neighbours
            ids = [[none, none], [none, none], [asked, none]]
            rows += ids + [[i, int(graphs.values[run, graph, i])] for i in range(n)]
        else:
            zeros = [0.0] * (2 * architecture.neighbours + 16)
            rows += [list(zeros), list(zeros), list(zeros)]
            rows[-1][architecture.neighbours + 16 + asked] = 1.0
            for i in range(n):
                row = list(zeros)
                row[i] = 1.0
                row[architecture.neighbours : architecture.neighbours + 16] = graphs.values[run, graph, i].tolist()
                rows.append(row)
    return torch.tensor(rows, dtype=torch.int64 if architecture.task == "nar" else torch.float64)


def centres(graphs):
    """Where the centres are among the nodes of all graphs of one run."""
    return torch.arange(graphs.asked.shape[1]) * (graphs.neighbours + 3)
