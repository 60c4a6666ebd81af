"""gLSTM against its equations node by node, the other networks against their formulas, edge sets against SciPy.

The oracle of gLSTM loops over nodes and neighbours, keeps C and n apart, and knows neither of the module's two ways to
evaluate the memory, nor its edge lists; so a mistake in gathering, in the extra entry of values or in the gates'
stabilisers would have to be made twice.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import shortest_path
from torch import nn
from torch.nn import functional

from jacnorm.errors import UserError
from jacnorm.studies.glstm import layers as networks
from jacnorm.studies.glstm.layers import (
    ADGN,
    GATES,
    GLSTM,
    GatedGCN,
    GLSTMLayer,
    Network,
    PairEmbedding,
    check_graph,
    drawn,
    gatv2,
    gcn,
    hop_distances,
    k_hop_edges,
    parameter_count,
)

torch.set_num_threads(1)

# PyTorch Geometric compiles a function of its own when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def random_graph(nodes, edges, seed, *, directed=False):
    """Distinct edges without loops; nodes may be left alone."""
    ends = torch.randint(nodes, (2, edges), generator=stream(seed))
    ends = ends[:, ends[0] != ends[1]]
    return (ends if directed else torch.cat([ends, ends.flip(0)], 1)).unique(dim=1)


def senders(edges, node):
    return [int(s) for s, r in edges.T.tolist() if r == node]


# --- edge sets -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 14), st.integers(0, 10**6), st.booleans())
def test_distances_and_k_hop_sets_agree_with_scipy_on_any_graph(nodes, edges, seed, directed):
    graph = random_graph(nodes, edges, seed, directed=directed)
    weights = csr_array(([1.0] * graph.shape[1], (graph[0].numpy(), graph[1].numpy())), shape=(nodes, nodes))
    expected = torch.from_numpy(shortest_path(weights, unweighted=True))
    found = hop_distances(graph, nodes)
    assert torch.equal(found.double(), expected.masked_fill(expected.isinf(), 0.0))

    sets = k_hop_edges(graph, nodes, 4)
    assert len(sets) == 4
    pairs = [(layer, s, r) for layer, each in enumerate(sets, start=1) for s, r in each.T.tolist()]
    assert len({pair[1:] for pair in pairs}) == len(pairs)  # no pair twice, in one set or in two
    reachable = expected.isfinite() & (expected > 0) & (expected <= 4)
    assert sorted(pairs) == sorted((int(expected[s, r]), s, r) for s, r in reachable.nonzero().tolist())


def test_loops_are_in_no_set():
    assert [each.tolist() for each in k_hop_edges(torch.tensor([[0, 0], [0, 1]]), 2, 2)] == [[[0], [1]], [[], []]]


def test_an_edge_to_a_node_that_does_not_exist_is_one_sentence():
    with pytest.raises(UserError, match=r"an edge names node 3, but the graph has nodes 0 to 2$"):
        hop_distances(torch.tensor([[0, 3], [1, 0]]), 3)


def test_a_node_alone_is_one_sentence_even_with_a_loop():
    with pytest.raises(UserError, match=r"graph 7 has a node without neighbours \(node 2 of 3\).*leave the graph out$"):
        check_graph(torch.tensor([[0, 1, 2], [1, 0, 2]]), 3, connected=False, name="graph 7")


def test_a_pair_without_a_path_is_one_sentence_where_the_task_wants_paths():
    two_pairs = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
    check_graph(two_pairs, 4, connected=False)
    with pytest.raises(UserError, match=r"^the graph has no path from node 0 to node 2, .* leave the graph out$"):
        check_graph(two_pairs, 4, connected=True)
    check_graph(torch.cat([two_pairs, torch.tensor([[1, 2], [2, 1]])], 1), 4, connected=True)


# --- gLSTM -----------------------------------------------------------------------------------------------------------


def oracle(body, h, edge_sets):
    """Section 2 of the paper as written, one node and one head at a time; float64."""
    heads, nodes = body.layers[0].heads, len(h)
    m_keys, m_values = body.layers[0].keys, body.layers[0].values
    memory = {(u, a): torch.zeros(m_values, m_keys).double() for u in range(nodes) for a in range(heads)}
    normaliser = {key: torch.ones(m_keys).double() for key in memory}
    m = dict.fromkeys(memory, torch.zeros(()).double())
    for layer, edges in zip(body.layers, edge_sets, strict=True):
        inner = [layer.norm_in(row) if layer.norm_in else row for row in h]

        def head(linear, u, a, size, inputs=inner):
            return linear(inputs[u])[a * size : (a + 1) * size]

        m_old, written, new = dict(m), {}, []
        for u in range(nodes):
            for a in range(heads):
                around = [layer.input(inner[v])[a] for v in [*senders(edges, u), u]]
                m[u, a] = max(layer.forget(inner[u])[a] + m_old[u, a], *around)
        for u in range(nodes):
            for a in range(heads):
                gate = torch.exp(layer.input(inner[u])[a] - m[u, a])  # its own stabiliser
                gate = torch.ones(()).double() if "input" in layer.without else gate
                key = head(layer.key, u, a, m_keys) / m_keys**0.5
                written[u, a] = gate * torch.outer(head(layer.value, u, a, m_values), key), gate * key
        for u in range(nodes):
            near = senders(edges, u)
            pooled = sum((inner[v] for v in near), torch.zeros_like(inner[u]))
            query, retrieved = layer.query(torch.cat([inner[u], pooled])), []
            for a in range(heads):
                kept = torch.exp(layer.forget(inner[u])[a] + m_old[u, a] - m[u, a])
                kept = 1.0 if "forget" in layer.without else kept
                memory[u, a] = kept * memory[u, a] + sum(written[v, a][0] for v in [*near, u])
                normaliser[u, a] = kept * normaliser[u, a] + sum(written[v, a][1] for v in [*near, u])
                q = query[a * m_keys : (a + 1) * m_keys]
                retrieved.append(memory[u, a] @ q / max(abs(normaliser[u, a] @ q), 1.0))
            gate = 1.0 if "output" in layer.without else torch.sigmoid(layer.output(inner[u]))
            normed = layer.norm((gate * torch.cat(retrieved))[None])[0]
            new.append(h[u] + layer.activation(layer.down(normed)))
        h = torch.stack(new)
    return h


SHAPES = [  # width, layers, memory, options, K-hop
    (6, 3, 4, {}, True),
    (5, 3, 3, {"heads": 3, "value_memory": 2, "activation": "tanh"}, True),
    (6, 2, 4, {"heads": 2, "activation": "relu"}, False),
    (4, 3, 2, {"heads": 2, "value_memory": 3, "norm_in": True, "dropout": 0.5}, False),
]


def randomised(body, seed):
    """With parameters larger than default ones, so that gates and norms are far from trivial."""
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.7 * torch.randn(parameter.shape, generator=stream(seed), dtype=parameter.dtype)
    return body.double().eval()


def case(shape, without=(), seed=0):
    width, depth, memory, options, k_hop = shape
    body = randomised(drawn(lambda: GLSTM(width, depth, memory, without=without, **options), stream(seed)), seed)
    graph = random_graph(7, 8, seed, directed=True)
    edges = k_hop_edges(graph, 7, depth) if k_hop else [graph] * depth
    return body, torch.randn(7, width, generator=stream(seed + 1), dtype=torch.float64), edges


@pytest.mark.parametrize("ablation", GATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_evaluations_are_the_equations_node_by_node(shape, ablation):
    body, x, edges = case(shape, GATES[ablation])
    expected = oracle(body, x, edges)
    assert (expected - x).abs().max() > 0.1
    for evaluation in ("matrix", "attention"):
        body.evaluation = evaluation
        torch.testing.assert_close(body(x, edges), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_the_two_evaluations_have_the_same_gradients(seed):
    body, x, edges = case(SHAPES[1], seed=seed)
    found = []
    for evaluation in ("matrix", "attention"):
        body.evaluation = evaluation
        found.append(torch.autograd.grad(body(x, edges).square().sum(), list(body.parameters())))
    assert all(gradient.abs().sum() > 0 for gradient in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("evaluation", ["matrix", "attention"])
def test_gradients_agree_with_finite_differences_off_the_kinks(evaluation):
    body, x, edges = case(SHAPES[1])
    body.evaluation = evaluation
    # The largest of gates and the 1 under the fraction have kinks; no node of this case lies within 1e-6 of one.
    assert torch.autograd.gradcheck(lambda x: body(x, edges), x.requires_grad_(), eps=1e-6, atol=1e-6, rtol=1e-5)


def test_a_gate_that_is_taken_away_changes_the_output():
    found = {}
    for ablation, without in GATES.items():
        body, x, edges = case(SHAPES[0], without)
        found[ablation] = body(x, edges)
    assert torch.equal(found["none"], found["1-hop"])  # which edges are read is no matter of gates
    distinct = [found[name] for name in GATES if name != "1-hop"]
    for number, one in enumerate(distinct):
        assert all((one - other).abs().max() > 1e-3 for other in distinct[:number])


def test_an_unknown_gate_is_refused():
    with pytest.raises(ValueError, match=r"gate 'memory' is unknown; there are output, input, forget"):
        GLSTMLayer(4, 2, without=["memory"])


@pytest.mark.parametrize("kind", networks.MEMORIES.values())
def test_the_memory_starts_with_a_normaliser_of_ones_and_forgets_it(kind):
    x, none = torch.zeros(2, 1), torch.zeros(2, 0, dtype=torch.int64)
    queries = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])  # (V, H, M)
    memory = kind.empty(x, 1, 2, 1)
    assert memory.read(queries).tolist() == [[[0.0, 3.0]], [[0.0, 7.0]]]
    keys, values = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[10.0, 1.0]], [[20.0, 1.0]]])
    memory = memory.update(torch.full((2, 1), 0.5), keys, values, torch.tensor([[1], [0]]))
    # Node 0 has written 10 under its first key and read 20 under the second from node 1.
    assert memory.read(queries).tolist() == [[[10 + 2 * 20.0, 1.5 + 3]], [[4 * 20.0, 3.5 + 4]]]
    memory = memory.update(torch.full((2, 1), 0.5), keys, values, none)
    assert memory.read(queries).tolist() == [[[25 + 10.0, 2.25 + 1]], [[40 + 80.0, 3.75 + 4]]]


def test_without_a_sender_only_the_node_itself_is_read():
    body, x, _ = case(SHAPES[0])
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    together = body(x, [nothing] * 3)
    assert torch.allclose(together[2:3], body(x[2:3], [nothing] * 3), rtol=1e-12)


@pytest.mark.parametrize(("without", "hops"), [((), 2), (("input",), 1)])
def test_through_the_stabiliser_of_a_sender_a_layer_also_reads_the_neighbours_of_its_neighbours(without, hops):
    body = randomised(drawn(lambda: GLSTM(4, 1, 3, without=without), stream()), 0)
    path = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    x = torch.randn(4, 4, generator=stream(1), dtype=torch.float64)
    x[2] += 50 * body.layers[0].input.weight[0].detach()  # the largest gate of all stands at node 2
    jacobian = torch.autograd.functional.jacobian(lambda x: body(x, [path])[0], x)  # (d, V, d)
    assert [bool(jacobian[:, node].abs().max() > 0) for node in range(4)] == [node <= hops for node in range(4)]


def test_every_layer_needs_an_edge_set():
    for body in (GLSTM(4, 2, 2), GatedGCN(4, 2), networks.Convolutions([nn.Identity()] * 2, torch.tanh)):
        with pytest.raises(ValueError, match="there are 1 edge sets for 2 layers; give one for each"):
            body(torch.zeros(2, 4), [torch.zeros(2, 0, dtype=torch.int64)])


def test_dropout_is_drawn_from_the_given_generator_while_training_only():
    body, x, edges = case(SHAPES[3])
    quiet = body(x, edges)
    assert torch.equal(quiet, body(x, edges, stream(1)))
    body.train()
    one, same, other = (body(x, edges, stream(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert (one - other).abs().max() > 1e-3
    assert (one - quiet).abs().max() > 1e-3
    with pytest.raises(ValueError, match="dropout needs a generator while training"):
        body(x, edges)


def test_dropout_keeps_the_mean():
    layer = GLSTMLayer(4, 2, dropout=0.25)
    dropped = layer._dropped(torch.ones(100, 100), stream())
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1.0, abs=4 * (1 / 3) ** 0.5 / 100)  # four standard errors


# --- sizes and initial values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "count"), [(8, 3_860), (16, 10_724), (32, 33_668)])
def test_gated_memories_have_the_published_numbers_of_parameters(memory, count):
    network = Network(PairEmbedding(64, 2 * memory), GLSTM(2 * memory, 2, memory), "rows", nn.Linear(2 * memory, 64))
    assert parameter_count(network) == count
    assert count == 2 * (12 * memory**2 + 12 * memory + 2) + 2 * 65 * memory + 2 * memory * 64 + 64


@pytest.mark.parametrize(("width", "count"), [(64, 16_640), (128, 49_600), (256, 164_672)])
def test_convolutional_networks_have_the_published_numbers_of_parameters(width, count):
    assert parameter_count(Network(PairEmbedding(64, width), gcn(width, 2), "rows", nn.Linear(width, 64))) == count


def test_gates_that_are_taken_away_keep_their_parameters():
    assert len({parameter_count(GLSTM(6, 2, 4, without=without)) for without in GATES.values()}) == 1


def test_parameters_come_from_the_generator_alone():
    torch.manual_seed(5)
    expected = nn.Linear(3, 2)
    before = torch.get_rng_state()
    generator = stream(5)
    found = drawn(lambda: nn.Linear(3, 2), generator)
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(drawn(lambda: nn.Linear(3, 2), generator).weight, expected.weight)  # it has moved on


def test_the_encoder_of_pairs_puts_keys_first_and_never_learns_the_empty_id():
    encoder = PairEmbedding(4, 5)
    assert (encoder.key.embedding_dim, encoder.value.embedding_dim) == (2, 3)
    ids = torch.tensor([[1, 4], [4, 0], [4, 4]])
    x = encoder(ids)
    assert torch.equal(x[0], torch.cat([encoder.key.weight[1], torch.zeros(3)]))
    assert torch.equal(x[1], torch.cat([torch.zeros(2), encoder.value.weight[0]]))
    assert torch.equal(x[2], torch.zeros(5))
    (x + 1).square().sum().backward()
    assert torch.equal(encoder.key.weight.grad[4], torch.zeros(2))
    assert encoder.key.weight.grad[1].abs().sum() > 0


# --- other bodies ----------------------------------------------------------------------------------------------------


def operator(edges, nodes):
    """D^(-1/2) (A + I) D^(-1/2) with in-degrees, receivers in rows."""
    messages = torch.eye(nodes, dtype=torch.float64)
    messages[edges[1], edges[0]] = 1.0
    degree = messages.sum(1)
    return messages / (degree.unsqueeze(1) * degree).sqrt()


GRAPH = random_graph(6, 7, 3)
SETS = k_hop_edges(GRAPH, 6, 2)


def features(seed=1):
    return torch.randn(6, 4, generator=stream(seed), dtype=torch.float64)


@pytest.mark.parametrize("edges", [[GRAPH, GRAPH], SETS])
def test_gcn_is_two_products_and_gelu(edges):
    body = randomised(gcn(4, 2), 0)
    expected = features()
    for layer, each in zip(body.layers, edges, strict=True):
        expected = functional.gelu(operator(each, 6) @ expected @ layer.lin.weight.T + layer.bias)
    torch.testing.assert_close(body(features(), edges), expected)


def test_gatv2_is_its_formula():
    body = randomised(gatv2(4, 1), 0)
    (layer,), x = body.layers, features()
    expected = []
    for u in range(6):
        near = [*senders(GRAPH, u), u]
        scores = torch.stack(
            [functional.leaky_relu(layer.lin_l(x[v]) + layer.lin_r(x[u]), 0.2) @ layer.att[0, 0] for v in near]
        )
        shares = scores.softmax(0)
        expected.append(sum(share * layer.lin_l(x[v]) for share, v in zip(shares, near, strict=True)) + layer.bias)
    torch.testing.assert_close(body(x, [GRAPH]), functional.gelu(torch.stack(expected)))


def norm_in_words(norm, x):
    """BatchNorm while training: biased variance."""
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("k_hop", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_gated_gcn_is_its_formula(k_hop, training):
    edge_sets = SETS if k_hop else [GRAPH, GRAPH]
    body = randomised(GatedGCN(4, 2, k_hop=k_hop), 0).train(training)
    for layer in body.layers:
        for norm in (layer.node_norm, layer.edge_norm):
            norm.running_mean.uniform_(-1, 1, generator=stream(8))
            norm.running_var.uniform_(0.5, 2, generator=stream(9))
    kept = [{name: each.clone() for name, each in layer.named_buffers()} for layer in body.layers]
    found = body(features(), edge_sets)

    x, e = features(), None
    for layer, edges, buffers in zip(body.layers, edge_sets, kept, strict=True):

        def normed(name, each, layer=layer, buffers=buffers):
            norm = getattr(layer, name)
            if training:
                return norm_in_words(norm, each)
            scale = (buffers[f"{name}.running_var"] + 1e-5).rsqrt()
            return (each - buffers[f"{name}.running_mean"]) * scale * norm.weight + norm.bias

        if e is None or k_hop:
            e = body.edge.weight.expand(edges.shape[1], -1)
        raw = torch.stack(
            [layer.receiver(x[r]) + layer.sender(x[s]) + layer.edge(e[i]) for i, (s, r) in enumerate(edges.T.tolist())]
        )
        rows = []
        for u in range(6):
            open_ = [torch.sigmoid(raw[i]) for i, (_, r) in enumerate(edges.T.tolist()) if r == u]
            sent = [layer.sent(x[v]) for v in senders(edges, u)]
            above = sum((a * b for a, b in zip(open_, sent, strict=True)), torch.zeros(4).double())
            rows.append(layer.own(x[u]) + above / (sum(open_, torch.zeros(4).double()) + 1e-6))
        x, e = torch.relu(normed("node_norm", torch.stack(rows))), e + torch.relu(normed("edge_norm", raw))
    torch.testing.assert_close(found, x)


def test_adgn_is_its_formula():
    body = randomised(ADGN(4, 3, epsilon=0.2, gamma=0.3), 0)
    layer, h = body.iterations, features()
    matrix = layer.W - layer.W.T - 0.3 * torch.eye(4, dtype=torch.float64)
    for _ in range(3):
        h = h + 0.2 * torch.tanh(h @ matrix.T + operator(GRAPH, 6) @ h @ layer.phi.lin.weight.T + layer.bias)
    torch.testing.assert_close(body(features(), [GRAPH]), h)


# --- read-outs -------------------------------------------------------------------------------------------------------


class Still(nn.Module):
    def forward(self, h, edges, generator=None):
        return h


@pytest.mark.parametrize(
    ("readout", "where", "expected"),
    [
        ("nodes", None, [[1.0, -1.0], [2.0, -5.0], [4.0, -3.0]]),
        ("rows", [2, 0], [[4.0, -3.0], [1.0, -1.0]]),
        ("mean", [0, 1, 1], [[1.0, -1.0], [3.0, -4.0]]),
        ("pools", [0, 1, 1], [[1.0, -1.0, 1.0, -1.0, 1.0, -1.0], [6.0, -8.0, 4.0, -3.0, 3.0, -4.0]]),
    ],
)
def test_read_outs_by_hand(readout, where, expected):
    network = Network(nn.Identity(), Still(), readout, nn.Identity())
    x = torch.tensor([[1.0, -1.0], [2.0, -5.0], [4.0, -3.0]])
    assert network(x, [], None if where is None else torch.tensor(where)).tolist() == expected


def test_a_read_out_must_exist_and_know_where():
    with pytest.raises(ValueError, match=r"readout 'max' is unknown; there are nodes, rows, mean, pools"):
        Network(nn.Identity(), Still(), "max", nn.Identity())
    with pytest.raises(ValueError, match=r"readout 'rows' needs to know where"):
        Network(nn.Identity(), Still(), "rows", nn.Identity())(torch.zeros(1, 1), [])


@pytest.mark.parametrize(("pooled", "sizes"), [(False, [(5, 2), (2, 1)]), (True, [(15, 7), (7, 1)])])
def test_the_head_of_adgn_halves_its_input_and_ends_in_a_rectifier(pooled, sizes):
    head = networks.adgn_head(5, 1, pooled=pooled)
    assert [(each.in_features, each.out_features) for each in head if isinstance(each, nn.Linear)] == sizes
    assert [type(each) for each in head] == [nn.Linear, nn.LeakyReLU] * 2
