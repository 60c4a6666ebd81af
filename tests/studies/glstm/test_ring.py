"""Rings: where the label is, who hears of it after how many layers."""

from __future__ import annotations

import pytest
import torch

from jacnorm.studies.glstm.layers import check_graph, drawn
from jacnorm.studies.glstm.ring import network, rings

torch.set_num_threads(1)

# PyTorch Geometric compiles a function of its own when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def test_three_rings_of_four_nodes_by_hand():
    found = rings(2, 3, k_hop=False)
    x = found.x.view(3, 4, 3)
    for label in range(3):
        assert x[label, 0].tolist() == [0.0, 0.0, 0.0]
        assert x[label, 2].tolist() == [float(label == each) for each in range(3)]
        assert x[label, [1, 3]].eq(1).all()
    assert found.asked.tolist() == [0, 4, 8]
    ring = {(0, 1), (1, 2), (2, 3), (3, 0)}
    expected = {(a + 4 * k, b + 4 * k) for s, r in ring for a, b in ((s, r), (r, s)) for k in range(3)}
    assert len(found.edges) == 2
    for edges in found.edges:
        assert edges.shape[1] == len(expected)
        assert set(map(tuple, edges.T.tolist())) == expected


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_every_node_has_two_neighbours_and_one_opposite(layers):
    found = rings(layers, 2, k_hop=True)
    counts = [torch.bincount(edges[1], minlength=4 * layers).unique().tolist() for edges in found.edges]
    assert counts == [[2]] * (layers - 1) + [[1]]
    check_graph(rings(layers, 1, k_hop=False).edges[0], 2 * layers, connected=True)


def test_with_k_hop_the_asked_node_hears_of_the_label_in_the_last_layer():
    found = rings(3, 2, k_hop=True)
    assert [[0, 3] in edges.T.tolist() for edges in found.edges] == [False, False, True]


# One layer of gLSTM tells of two edges: of the senders, and through their stabilisers of the senders' neighbours.
@pytest.mark.parametrize(("model", "too_few"), [("glstm", 1), ("gcn", 2)])
def test_the_answer_depends_on_the_label_and_too_few_layers_would_not_do(model, too_few):
    layers, classes = 3, 4
    found = rings(layers, classes, k_hop=model == "glstm")
    whole = drawn(lambda: network(model, layers, classes, 6, 3), torch.Generator().manual_seed(0)).double()
    logits = whole(found.x.double(), found.edges, found.asked)
    assert (logits - logits[0]).abs()[1:].amax(1).min() > 1e-8
    whole.body.layers = whole.body.layers[:too_few]
    logits = whole(found.x.double(), found.edges[:too_few], found.asked)
    assert torch.allclose(logits, logits[0].expand_as(logits), rtol=0, atol=1e-12)


def test_a_ring_is_answered_as_if_it_were_alone():
    found, alone = rings(2, 3, k_hop=True), rings(2, 3, k_hop=True)
    whole = drawn(lambda: network("glstm", 2, 3, 4, 2), torch.Generator().manual_seed(1)).double()
    together = whole(found.x.double(), found.edges, found.asked)
    edges = [each[:, (each < 4).all(0)] for each in alone.edges]
    for label in range(3):
        one = whole(found.x.double()[4 * label : 4 * label + 4], edges, torch.tensor([0]))
        torch.testing.assert_close(one, together[label : label + 1])
