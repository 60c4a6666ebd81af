"""Interlayer norms against Jacobians that autograd takes of the parts of a network, one pair and sample at a time.

That oracle shares nothing with the sweep: it differentiates functions, where the sweep multiplies explicit matrices.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jacnorm.jacobian import ScaledProduct, partial_jacobians
from jacnorm.nets.mlp import forward, init_gaussian
from jacnorm.studies.lipschitz.interlayer import LogNorms, Sweep, largest_norms, output_norms

torch.set_num_threads(1)

FUNCTIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "elu": nn.functional.elu,
    "softplus": nn.functional.softplus,
    "linear": lambda z: z,
}


def network(widths, runs=2, samples=5, seed=0, gain=2.0):
    generators = [torch.Generator().manual_seed(100 * seed + run) for run in range(runs)]
    weights = init_gaussian(widths, gain, generators)
    x = torch.randn(runs, samples, widths[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    biases = [0.3 * torch.randn(runs, n, generator=generators[0], dtype=torch.float64) for n in widths[1:]]
    return weights, biases, x


def layer_functions(weights, activation, biases, run):
    """F_j for j = 1, ..., 2r - 1 of one network."""
    functions = []
    for i, weight in enumerate(weights):
        bias = 0.0 if biases is None else biases[i][run]
        functions += [lambda h, w=weight[run], b=bias: w @ h + b, FUNCTIONS[activation]]
    return functions[:-1]


def norms_by_autograd(weights, x, activation, biases=None):
    """{(j', j): (R, B) norms} of the Jacobians from the input of layer j to the output of layer j'."""
    runs, samples, _ = x.shape
    layers = 2 * len(weights) - 1
    found = {}
    for run in range(runs):
        functions = layer_functions(weights, activation, biases, run)
        for sample in range(samples):
            h = x[run, sample]
            for earlier in range(1, layers + 1):
                for later in range(earlier, layers + 1):

                    def part(h, chain=functions[earlier - 1 : later]):
                        for function in chain:
                            h = function(h)
                        return h

                    value = torch.linalg.matrix_norm(torch.func.jacrev(part)(h), 2)
                    found.setdefault((later, earlier), torch.empty(runs, samples).double())[run, sample] = value
                h = functions[earlier - 1](h)
    return found


@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_all_pairs_are_those_of_autograd(activation, with_biases):
    weights, biases, x = network((9, 4, 6, 3))  # wide input, a layer that widens, few classes
    biases = biases if with_biases else None
    sigma = largest_norms(Sweep(weights, x, activation, biases))
    oracle = norms_by_autograd(weights, x, activation, biases)
    assert len(oracle) == 5 * 3
    for (later, earlier), norms in oracle.items():
        torch.testing.assert_close(sigma[:, later, earlier - 1].exp(), norms.amax(1))
    assert (sigma.diagonal(dim1=1, dim2=2) == 0).all()
    assert sigma.triu(1).masked_select(torch.ones_like(sigma[0]).triu(1).bool()).isneginf().all()


def test_pairs_are_those_that_the_core_measures_on_a_module():
    weights, _, x = network((6, 5, 5, 4), runs=1, seed=1)
    modules = []
    for weight in weights:
        linear = nn.Linear(weight.shape[2], weight.shape[1], bias=False).double()
        linear.weight = nn.Parameter(weight[0].clone())
        modules += [linear, nn.Tanh()]
    model = nn.Sequential(*modules[:-1])
    sigma = largest_norms(Sweep(weights, x, "tanh"))
    names = [None, *(str(layer) for layer in range(4)), None]  # places 0 to 5
    pairs = {(names[b], names[a]): (a, b) for b in range(5) for a in range(max(b + 1, 1), 6)}
    for ends, (later, earlier) in pairs.items():
        measured = partial_jacobians(model, x[0], [ends])[ends]
        assert sigma[0, later, earlier].exp().item() == pytest.approx(measured.value.max().item())


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_end_to_end_norms_start_at_the_pre_activations(activation):
    weights, biases, x = network((9, 7, 6, 8, 3), samples=11, seed=2)
    *hidden, _ = forward(weights, x, activation, biases)
    found = output_norms(weights, hidden, activation)
    sigma = largest_norms(Sweep(weights, x, activation, biases))
    assert found.shape == (2, 4)
    for i in range(1, 5):  # sigma_{2r-1 <- 2i}, from the place after matrix i
        torch.testing.assert_close(found[:, i - 1], sigma[:, 7, 2 * i - 1])
    oracle = norms_by_autograd(weights, x, activation, biases)
    for i in range(1, 4):
        torch.testing.assert_close(found[:, i - 1].exp(), oracle[7, 2 * i].amax(1))
    assert (found[:, -1] == 0).all()


@pytest.mark.parametrize("r", [2, 3, 6])
def test_passes_are_counted_as_they_are_made(r, monkeypatch):
    calls = []
    for name in ("left_multiply", "scale_rows"):
        original = getattr(ScaledProduct, name)
        monkeypatch.setattr(ScaledProduct, name, lambda self, a, f=original: (calls.append(self), f(self, a))[1])
    weights, _, x = network((4, *[5] * (r - 1), 3), seed=3)
    sweep = Sweep(weights, x, "tanh")
    pairs = [(later, earlier) for later, earlier, _ in sweep]
    layers = 2 * r - 1
    assert sorted(pairs) == [(a, b) for a in range(1, 2 * r) for b in range(a)]  # each once
    assert sweep.passes.made == len(pairs) == (2 * r - 1) * r
    assert len(calls) == len(pairs) - layers  # a layer alone is not multiplied, and two are put together at once
    assert sweep.passes.separate == sum(later - earlier for later, earlier in pairs)


def test_deep_networks_keep_their_norms_in_range():
    weights = [1e-9 * torch.eye(3, dtype=torch.float64).expand(1, 3, 3) for _ in range(40)]
    sigma = largest_norms(Sweep(weights, torch.ones(1, 2, 3), "linear"))
    assert sigma[0, 79, 0].item() == pytest.approx(40 * math.log(1e-9))
    assert sigma[0, 79, 21].item() == pytest.approx(29 * math.log(1e-9))
    *hidden, _ = forward(weights, torch.ones(1, 2, 3).double(), "linear")
    assert output_norms(weights, hidden, "linear")[0, 0].item() == pytest.approx(39 * math.log(1e-9))


def test_a_dead_network_has_norms_of_zero():
    weights, _, _ = network((4, 5, 5, 3))
    weights[0] = -weights[0].abs()
    sigma = largest_norms(Sweep(weights, torch.ones(2, 3, 4), "relu"))
    assert sigma[:, 2:, 0].isneginf().all()
    assert sigma[:, 1, 0].isfinite().all()
    *hidden, _ = forward(weights, torch.ones(2, 3, 4).double(), "relu")
    assert output_norms(weights, hidden, "relu")[:, 0].isneginf().all()


def test_networks_of_a_stack_are_those_alone():
    weights, biases, x = network((6, 5, 5, 4), runs=3, samples=8, seed=4)
    together = largest_norms(Sweep(weights, x, "elu", biases))
    for run in range(3):
        own = slice(run, run + 1)
        alone = largest_norms(Sweep([w[own] for w in weights], x[own], "elu", [b[own] for b in biases]))
        torch.testing.assert_close(together[own].nan_to_num(), alone.nan_to_num(), rtol=1e-12, atol=1e-12)


def lognorms(matrices):
    product = ScaledProduct()
    product.left_multiply(matrices.flatten(0, 1))
    return LogNorms.of(product, runs=len(matrices)), product.log_spectral_norm().unflatten(0, matrices.shape[:2])


MATRICES = st.tuples(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.floats(0, 8), st.integers(0, 2**31)
)


@settings(max_examples=150, deadline=None)
@given(MATRICES)
def test_screened_maxima_are_the_exact_ones(case):
    runs, samples, rows, columns, decay, seed = case
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(runs, samples, rows, columns, generator=generator, dtype=torch.float64)
    matrices = matrices * torch.exp(-decay * torch.arange(columns))  # from flat spectra to a single singular value
    matrices[torch.rand(runs, samples, generator=generator) < 0.2] = 0
    matrices[:, -1] = matrices[:, 0]  # a tie
    norms, exact = lognorms(matrices)
    torch.testing.assert_close(norms.largest(), exact.amax(1), rtol=0, atol=1e-12)
    everywhere = torch.ones_like(exact, dtype=torch.bool)
    tightened = norms.tightened(everywhere).view_as(exact)
    assert (norms.upper >= tightened).all()
    assert (tightened >= exact).all()
    assert torch.equal(norms.exact(everywhere).view_as(exact), exact)


def test_near_ties_are_resolved():
    base = torch.diag(torch.tensor([1.0, 0.999, 0.9], dtype=torch.float64))
    factors = 1 + 1e-13 * torch.tensor([0.0, 3.0, 7.0, 5.0], dtype=torch.float64)
    norms, exact = lognorms((factors[:, None, None] * base)[None])
    assert norms.largest().item() == exact.max().item()


def test_few_eigenvalues_are_computed(monkeypatch):
    counted = []
    original = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: (counted.append(len(gram)), original(gram))[1])
    weights, _, x = network((20, 20, 20, 20, 10), samples=40, seed=5)
    largest_norms(Sweep(weights, x, "relu"))
    assert sum(counted) < 0.25 * 2 * 40 * (7 * 4 - 7)
