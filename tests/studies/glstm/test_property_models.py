"""Stacked networks on padded graphs against the modules that pass messages along edges, in float64.

The modules share the initial draws but no line of the forward pass; gLSTM's form the memory's matrices, GCN and A-DGN
are PyTorch Geometric's layers.
"""

from __future__ import annotations

import pytest
import torch

from jacnorm.studies.glstm.layers import GATES, drawn, k_hop_edges, parameter_count
from jacnorm.studies.glstm.pna_graphs import disconnected, distances, generate
from jacnorm.studies.glstm.property_models import Architecture, Batch, network
from jacnorm.training.seeds import numpy_generator
from jacnorm.training.stacked import gradients

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyG

RUNS = 2
GRAPHS = 7
NODES = 9


@pytest.fixture(scope="module")
def graphs():
    """Seven graphs for each of two runs; one of them is not connected."""
    found = [generate(GRAPHS, 6, NODES, numpy_generator("glstm", "test", run, "graphs")) for run in range(RUNS)]
    assert any(disconnected(each, distances(each.adjacency)).any() for each in found)
    return found


def batch(graphs, dtype=torch.float64):
    return Batch(
        torch.stack([each.features for each in graphs]).to(dtype),
        torch.stack([distances(each.adjacency) for each in graphs]),
        torch.stack([each.real for each in graphs]),
    )


def by_edges(module, graphs, architecture, *, k_hop):
    """What the module makes of one run's graphs as one graph without padding, in the shape of the stack's."""
    number = torch.full(graphs.real.shape, -1)
    number[graphs.real] = torch.arange(int(graphs.real.sum()))
    graph, sender, receiver = graphs.adjacency.nonzero().T
    joined = torch.stack([number[graph, sender], number[graph, receiver]])  # (2, E)
    edges = k_hop_edges(joined, int(graphs.real.sum()), architecture.layers)
    if not k_hop:
        edges = [edges[0]] * architecture.layers
    where = graphs.real.nonzero()[:, 0] if architecture.graph_level else None
    found = module(graphs.features.double()[graphs.real], edges, where).squeeze(1)
    if architecture.graph_level:
        return found
    return torch.zeros(graphs.real.shape, dtype=found.dtype).masked_scatter(graphs.real, found)


def counted(values, real, graph_level):
    return values if graph_level else torch.where(real, values, 0.0)


@pytest.mark.parametrize("graph_level", [False, True])
@pytest.mark.parametrize(
    ("model", "ablations", "activation", "heads"),
    [
        ("glstm", ["none", "1-hop"], "relu", 1),
        ("glstm", ["no-gates", "no-input-gate"], "tanh", 3),
        ("glstm", ["no-output-gate", "no-forget-gate"], "identity", 2),
        ("gcn", ["none", "none"], "relu", 1),
        ("adgn", ["none", "none"], "relu", 1),
    ],
)
def test_stacks_compute_what_the_modules_do(graphs, model, ablations, activation, heads, graph_level):
    architecture = Architecture(4, 6, heads, 3, activation, graph_level)
    stack = network(model, architecture, ablations)
    generators = [torch.Generator().manual_seed(run) for run in range(RUNS)]
    parameters = {name: tensor.double() for name, tensor in stack.initial(generators).items()}
    found = stack(parameters, batch(graphs))
    everywhere = batch(graphs).real

    def losses(leaves):
        return counted(stack(leaves, batch(graphs)), everywhere, graph_level).square().flatten(1).sum(1)

    _, slopes = gradients(losses, parameters)
    for run, ablation in enumerate(ablations):
        module = drawn(stack.module, torch.Generator().manual_seed(run)).double()
        if model == "glstm":
            for layer in module.body.layers:
                layer.without = frozenset(GATES[ablation])
        expected = by_edges(module, graphs[run], architecture, k_hop=ablation != "1-hop" and model == "glstm")
        assert torch.allclose(counted(found[run], everywhere[run], graph_level), expected, rtol=0, atol=1e-12)
        expected.square().sum().backward()
        for parameter in module.parameters():
            if parameter.grad is None:  # maps of gates that are taken away
                parameter.grad = torch.zeros_like(parameter)
        wanted = stack.arranged(_with_gradients(module))
        assert set(wanted) == set(slopes)
        for name, gradient in slopes.items():
            assert torch.allclose(gradient[run], wanted[name], rtol=1e-9, atol=1e-10), name


def _with_gradients(module):
    """The module with its gradients in place of its parameters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.grad)
    return module


def test_runs_do_not_see_one_another(graphs):
    """A run alone gives the numbers that it gives in a stack, up to rounding; more padding changes none."""
    architecture = Architecture(3, 6, 2, 4, "relu", False)
    both, alone = (network("glstm", architecture, ablations) for ablations in (["none", "1-hop"], ["1-hop"]))
    generators = [torch.Generator().manual_seed(run) for run in range(RUNS)]
    parameters = both.initial(generators)
    second = alone.initial([torch.Generator().manual_seed(1)])
    assert all(torch.equal(second[name][0], parameters[name][1]) for name in parameters)
    found = both(parameters, batch(graphs, torch.float32))[1]
    wide = [each.padded(NODES + 3) for each in graphs]
    assert torch.allclose(alone(second, batch(graphs[1:], torch.float32))[0], found, atol=1e-5)
    assert torch.allclose(both(parameters, batch(wide, torch.float32))[1, :, :NODES], found, atol=1e-5)


@pytest.mark.parametrize("model", ["glstm", "gcn", "adgn"])
def test_parameters_are_counted_once_each(model):
    architecture = Architecture(3, 6, 2, 4, "relu", True)
    stack = network(model, architecture, ["none"])
    counted_here = stack.parameter_count()
    tensors = stack.initial([torch.Generator().manual_seed(0)])
    assert counted_here == sum(tensor.numel() for tensor in tensors.values())
    assert counted_here == parameter_count(drawn(stack.module, torch.Generator()))
    if (
        model == "glstm"
    ):  # per layer: 4 maps of d + 1 inputs to H M, the query's of 2 d + 1, two of gates, one back, norm
        d, units, heads = 6, 8, 2
        layer = 3 * units * (d + 1) + units * (2 * d + 1) + 2 * heads * (d + 1) + d * (units + 1) + 2 * units
        assert counted_here == 3 * d + 3 * layer + d + 1
