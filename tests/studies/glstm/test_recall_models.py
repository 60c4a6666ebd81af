"""Stacks against the networks of `layers`, which know nothing of this topology, of stacks or of embeddings' tables."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.studies.glstm.recall_peers import centres, edge_sets, filled, module, raw
from torch import nn
from torch.nn import functional

from jacnorm.errors import UserError
from jacnorm.studies.glstm import layers
from jacnorm.studies.glstm.recall import Graphs, data_run, split
from jacnorm.studies.glstm.recall_models import (
    Architecture,
    draw_parameters,
    initial_statistics,
    inputs,
    logits,
    outputs,
    with_fewer_keys,
    with_more_keys,
)

torch.set_num_threads(1)

# PyTorch Geometric compiles a function of its own when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

SEEDS = [0, 1]
GRAPHS, N = 3, 5
EXACT = {"rtol": 1e-11, "atol": 1e-12}
CASES = [
    Architecture(task, model, size, k_hop, 2, N)
    for task in ("nar", "narr")
    for model, size in (("glstm", 3), ("gcn", 7), ("gatv2", 6), ("gatedgcn", 6))
    for k_hop in (True, False)
]
DEEP = [Architecture("nar", model, 6, False, depth, N) for model, depth in (("gcn", 3), ("gcn", 5), ("gatedgcn", 3))]


def named(architecture):
    return f"{architecture.task}-{architecture.model}-{'k' if architecture.k_hop else '1'}-{architecture.layers}"


def tensors_of(architecture, seeds=SEEDS):
    """Parameters and running statistics in float64, moved away from where they start."""
    generator = torch.Generator().manual_seed(3)
    runs = [data_run(architecture.task, N, seed).generator("weights") for seed in seeds]
    drawn = draw_parameters(architecture, runs)
    start = drawn | initial_statistics(architecture, len(seeds))
    moved = {name: t.double() + 0.3 * torch.rand(t.shape, generator=generator).double() for name, t in start.items()}
    for name in moved:
        if name.startswith("encoder") and architecture.task == "nar":
            moved[name][:, -1] = 0.0
    return moved


def graphs_of(architecture, neighbours=N, seeds=SEEDS):
    graphs = split(architecture.task, neighbours, GRAPHS, seeds, "test")
    return graphs if architecture.task == "nar" else Graphs(graphs.values.double(), graphs.asked)


@pytest.mark.parametrize("architecture", CASES + DEEP, ids=named)
def test_stacks_compute_what_the_networks_of_layers_compute(architecture):
    tensors, graphs = tensors_of(architecture), graphs_of(architecture)
    found = logits(architecture, tensors, graphs)
    x = inputs(architecture, tensors, graphs)
    assert x.shape == (len(SEEDS), GRAPHS, N + 3, architecture.features)
    torch.testing.assert_close(outputs(architecture, tensors, x), found, **EXACT)
    for run in range(len(SEEDS)):
        network = filled(architecture, tensors, run).eval()
        expected = network(raw(architecture, graphs, run), edge_sets(architecture, graphs), centres(graphs))
        torch.testing.assert_close(found[run], expected.detach(), **EXACT)


@pytest.mark.parametrize("architecture", [case for case in CASES if case.task == "nar"], ids=named)
def test_gradients_are_those_of_the_networks_of_layers(architecture):
    """Of the training path by the weights, and of `outputs` by its input, which Jacobians are taken by."""
    tensors, graphs = tensors_of(architecture), graphs_of(architecture)
    sides = torch.randn(len(SEEDS), GRAPHS, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = {name: t.clone().requires_grad_() for name, t in tensors.items() if "running" not in name}
    statistics = {name: t for name, t in tensors.items() if "running" in name}
    loss = (sides * logits(architecture, weights | statistics, graphs)).sum()
    slopes = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    by_name = {n: torch.zeros_like(tensors[n]) if g is None else g for n, g in zip(weights, slopes, strict=True)}
    x = inputs(architecture, tensors, graphs).requires_grad_()
    (by_input,) = torch.autograd.grad((sides * outputs(architecture, tensors, x)).sum(), x)
    for run in range(len(SEEDS)):
        network = filled(architecture, tensors, run).eval()
        parameters = dict(network.named_parameters())
        h = network.encoder(raw(architecture, graphs, run))
        network.encoder = nn.Identity()
        value = (sides[run] * network(h, edge_sets(architecture, graphs), centres(graphs))).sum()
        found = torch.autograd.grad(value, [h, *parameters.values()], allow_unused=True)
        torch.testing.assert_close(by_input[run].flatten(0, 1), found[0], **EXACT)
        expected = dict(zip(parameters, found[1:], strict=True))
        for name, slope in architecture.as_modules(by_name, run).items():
            reference = expected[name]
            torch.testing.assert_close(slope, torch.zeros_like(slope) if reference is None else reference, **EXACT)


@pytest.mark.parametrize("k_hop", [True, False])
def test_batch_norms_of_a_batch(k_hop):
    architecture = Architecture("nar", "gatedgcn", 6, k_hop, 2, N)
    tensors, graphs = tensors_of(architecture), graphs_of(architecture)
    moments: dict[str, torch.Tensor] = {}
    found = logits(architecture, tensors, graphs, moments)
    for run in range(len(SEEDS)):
        network = filled(architecture, tensors, run).train()
        expected = network(raw(architecture, graphs, run), edge_sets(architecture, graphs), centres(graphs))
        torch.testing.assert_close(found[run], expected.detach(), **EXACT)
        state = network.state_dict()
        for name, moment in moments.items():
            running = 0.9 * tensors[name][run] + 0.1 * moment[run]
            torch.testing.assert_close(running, state[name], **EXACT)
    of_edges = {name for name in moments if "edge_norm" in name}
    assert len(of_edges) == (0 if k_hop else 2)  # those of the last layer, and of edges read once, change nothing


@pytest.mark.parametrize("architecture", CASES, ids=named)
def test_a_run_does_not_depend_on_its_neighbours(architecture):
    tensors, graphs = tensors_of(architecture), graphs_of(architecture)
    alone = {name: tensor[1:] for name, tensor in tensors.items()}
    found = logits(architecture, alone, Graphs(graphs.values[1:], graphs.asked[1:]))
    torch.testing.assert_close(found[0], logits(architecture, tensors, graphs)[1], **EXACT)
    drawn = draw_parameters(architecture, [data_run("nar", N, seed).generator("weights") for seed in SEEDS])
    again = draw_parameters(architecture, [data_run("nar", N, SEEDS[1]).generator("weights")])
    assert all(torch.equal(drawn[name][1], again[name][0]) for name in drawn)


@pytest.mark.parametrize("model", ["glstm", "gcn"])
@pytest.mark.parametrize("task", ["nar", "narr"])
def test_networks_may_know_more_keys_than_graphs_have_neighbours_but_not_fewer(task, model):
    architecture = Architecture(task, model, 4, True, 2, N)
    tensors = tensors_of(architecture)
    few = graphs_of(architecture, 3)
    found = logits(architecture, tensors, few)
    network = filled(architecture, tensors, 0).eval()
    expected = network(raw(architecture, few, 0), edge_sets(architecture, few), centres(few))
    torch.testing.assert_close(found[0], expected.detach(), **EXACT)
    for call in (logits, inputs):
        with pytest.raises(UserError, match="the graphs have 6 neighbours with a key each"):
            call(architecture, tensors, graphs_of(architecture, 6))


@pytest.mark.parametrize("architecture", CASES + DEEP, ids=named)
def test_parameters_are_counted_and_start_as_those_of_the_modules(architecture):
    network = module(architecture)
    assert architecture.parameters == layers.parameter_count(network)
    generators = [data_run("nar", N, seed).generator("weights") for seed in range(40)]
    drawn = draw_parameters(architecture, generators)
    drawn |= initial_statistics(architecture, len(generators))
    for name, theirs in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        ours = torch.stack([architecture.as_modules(drawn, run)[name] for run in range(len(generators))])
        assert ours.shape[1:] == theirs.shape
        if name.startswith("encoder") and architecture.task == "nar":
            assert not ours[:, -1].any()
            ours, theirs = ours[:, :-1], theirs[:-1]
        if theirs.numel() > 1 and theirs.std() == 0:
            assert (ours == theirs.flatten()[0]).all()
        elif name == "body.edge.weight" or (name.startswith("encoder") and architecture.task == "nar"):
            assert ours.std() == pytest.approx(1.0, abs=5 / math.sqrt(2 * ours.numel()))
        else:  # uniform: the largest of our many is near the bound, which theirs do not exceed
            assert ours.abs().max() >= 0.93 * theirs.abs().max()
            assert ours.std() == pytest.approx(ours.abs().max() / 3**0.5, rel=0.25)


@pytest.mark.parametrize(
    ("model", "size", "count"),
    [
        ("glstm", 8, 3_860),
        ("glstm", 16, 10_724),
        ("glstm", 32, 33_668),
        ("gcn", 64, 16_640),
        ("gcn", 128, 49_600),
        ("gcn", 256, 164_672),
    ],
)
def test_parameter_counts_of_the_paper_at_64_neighbours(model, size, count):
    assert Architecture("nar", model, size, True, 2, 64).parameters == count


def test_the_uniform_bounds_of_a_gcn_and_of_attention():
    """Glorot: sqrt(6 / (inputs + outputs)), for the attention vector of one head with 1 and d."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(30)]
    drawn = draw_parameters(Architecture("nar", "gatv2", 10, False, 2, N), generators)
    for name, bound in (("lin_l.weight", math.sqrt(6 / 20)), ("att", math.sqrt(6 / 11)), ("lin_r.bias", 10**-0.5)):
        largest = drawn[f"body.layers.1.{name}"].abs().max().item()
        assert 0.95 * bound < largest <= bound


def test_key_features_come_first():
    for task, model, key, every in (("nar", "glstm", 3, 6), ("narr", "gcn", N, 2 * N + 16), ("nar", "gcn", 3, 7)):
        size = 3 if model == "glstm" else 7
        architecture = Architecture(task, model, size, True, 2, N)
        assert (architecture.key_features, architecture.features) == (key, every)


def test_jacobians_through_torch_func():
    architecture = replace(CASES[0])
    tensors, graphs = tensors_of(architecture), graphs_of(architecture)
    x = inputs(architecture, tensors, graphs)
    one = {name: tensor[:1] for name, tensor in tensors.items()}

    def single(h):
        return outputs(architecture, one, h[None, None])[0, 0]

    jacobians = torch.func.vmap(torch.func.jacrev(single))(x[0])  # (B, outputs, N + 3, d)
    step = 1e-6 * torch.randn(x[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ahead, behind = (torch.func.vmap(single)(x[0] + sign * step) for sign in (1, -1))
    by_hand = (jacobians * step.unsqueeze(1)).sum((2, 3))
    torch.testing.assert_close(by_hand, (ahead - behind) / 2, rtol=1e-5, atol=1e-11)


@pytest.mark.parametrize("architecture", [CASES[1], CASES[2], CASES[8]], ids=named)
def test_other_networks_than_gated_ones_with_k_hop_take_no_padded_graphs(architecture):
    tensors, graphs = tensors_of(architecture), graphs_of(architecture)
    with pytest.raises(ValueError, match="does not take padded graphs"):
        logits(architecture, tensors, replace(graphs, present=torch.ones(2, N, dtype=torch.bool)))


def test_room_for_more_keys_changes_nothing_and_goes_away_again():
    architecture = CASES[0]
    tensors, graphs = tensors_of(architecture), graphs_of(architecture)
    wider = with_more_keys(tensors, 3)
    larger = replace(architecture, neighbours=N + 3)
    values = functional.pad(graphs.values, (0, 3), value=N + 3)
    present = (torch.arange(N + 3) < N).expand(2, -1)
    found = logits(larger, wider, Graphs(values, graphs.asked, present))
    torch.testing.assert_close(found[:, :, :N], logits(architecture, tensors, graphs), **EXACT)
    assert (found[:, :, N:] == -torch.inf).all()
    torch.testing.assert_close(with_fewer_keys(wider, N), tensors, rtol=0, atol=0)


@pytest.mark.parametrize(("model", "k_hop"), [("glstm", True), ("glstm", False), ("gatv2", False)])
def test_other_depths_than_two_are_refused(model, k_hop):
    shallow = Architecture("nar", model, 4, k_hop, 2, N)
    tensors, graphs = tensors_of(shallow), graphs_of(shallow)
    with pytest.raises(ValueError, match=f"a stack of {model} has 2 layers here, not 3"):
        logits(replace(shallow, layers=3), tensors, graphs)


@pytest.mark.parametrize("model", ["gcn", "gatedgcn"])
def test_k_hop_of_other_depths_than_two_is_refused(model):
    shallow = Architecture("nar", model, 4, True, 2, N)
    tensors, graphs = tensors_of(shallow), graphs_of(shallow)
    with pytest.raises(ValueError, match=f"a stack of {model} has 2 layers here, not 3"):
        logits(replace(shallow, layers=3), tensors, graphs)


@pytest.mark.parametrize("task", ["nar", "narr"])
def test_a_gcn_of_one_layer_is_refused(task):
    architecture = Architecture(task, "gcn", 4, False, 2, N)
    tensors, graphs = tensors_of(architecture), graphs_of(architecture)
    with pytest.raises(ValueError, match="a stack of GCNs needs two layers or more"):
        logits(replace(architecture, layers=1), tensors, graphs)
