"""RingTransfer: on a ring of 2 L nodes, the label of one node is asked for at the opposite one, L edges away.

The task of Bodnar et al. (2021, arXiv 2106.12575) as Di Giovanni et al. (2023, arXiv 2302.02941) use it: features have
one entry per class; the source holds the label, one-hot, the node that is read zeros, all others ones. One node alone
has something to tell, so the task loads no memory: it asks only whether a message survives L layers.

Rings of one length differ in the label alone, so `rings` holds one of each, and a batch is the number of times that
each label occurs in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from jacnorm.studies.glstm.layers import GLSTM, Network, gcn, k_hop_edges

Model = Literal["glstm", "gcn"]


@dataclass(frozen=True)
class Rings:
    """One ring for each of C labels, 2 L nodes each, one after another.

    x: (C 2 L, C); edges: one set for each of the L layers, between neighbours or, with K-hop, at distance l;
    asked: the row (C,) that is read in each ring.
    """

    x: Tensor
    edges: list[Tensor]
    asked: Tensor

    def to(self, device: torch.device) -> Rings:
        """The same on another device."""
        return Rings(self.x.to(device), [edges.to(device) for edges in self.edges], self.asked.to(device))


def rings(layers: int, classes: int, *, k_hop: bool) -> Rings:
    """The rings of 2 `layers` nodes: node 0 is asked, node `layers` holds the label."""
    nodes = 2 * layers
    here = torch.arange(nodes)
    there = (here + 1) % nodes
    ring = torch.stack([torch.cat([here, there]), torch.cat([there, here])]).unique(dim=1)  # of 2 nodes: one edge
    offsets = nodes * torch.arange(classes)
    x = torch.ones(classes, nodes, classes)
    x[:, 0] = 0.0
    x[:, layers] = torch.eye(classes)
    sets = k_hop_edges(ring, nodes, layers) if k_hop else [ring] * layers
    edges = [(each.unsqueeze(1) + offsets.view(1, -1, 1)).flatten(1) for each in sets]  # (2, C E)
    return Rings(x.flatten(0, 1), edges, offsets)


def network(model: Model, layers: int, classes: int, width: int, memory: int) -> Network:
    """A network for rings of 2 `layers` nodes; its gLSTM reads K-hop sets, its GCN neighbours."""
    body = GLSTM(width, layers, memory) if model == "glstm" else gcn(width, layers)
    return Network(nn.Linear(classes, width), body, "rows", nn.Linear(width, classes))
