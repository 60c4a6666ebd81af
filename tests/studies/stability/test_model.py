"""Log norms against autograd Jacobians, explicit products and exact integer arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn

from jacnorm.nets.mlp import init_gaussian
from jacnorm.studies.stability.model import log_norms, log_product_norms, mean_correlations

torch.set_num_threads(1)

WIDTHS = (5, 9, 7, 6, 4)
MODULES = {"relu": nn.ReLU, "tanh": nn.Tanh, "linear": nn.Identity}


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + run) for run in range(count)]


def stack(widths=WIDTHS, runs=3, sigma_w2=2.0, first=0):
    return init_gaussian(widths, sigma_w2, generators(runs, first))


def inputs(runs=3, count=4, width=WIDTHS[0], seed=99):
    return torch.randn(runs, count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ordinary_network(weights, run, activation):
    """The run as an nn.Sequential, linear read-out: shares no code with the stacks."""
    layers = []
    for weight in weights:
        linear = nn.Linear(weight.shape[2], weight.shape[1], bias=False, dtype=torch.float64)
        linear.weight = nn.Parameter(weight[run].clone())
        layers += [linear, MODULES[activation]()]
    return nn.Sequential(*layers[:-1])


def autograd_jacobian(weights, run, activation, x):
    return torch.autograd.functional.jacobian(ordinary_network(weights, run, activation), x)


@pytest.mark.parametrize("activation", MODULES)
def test_log_norms_are_those_of_autograd_jacobians_at_every_depth(activation):
    weights, x = stack(), inputs()
    found = log_norms(weights, x, activation, range(1, 5))
    direction = torch.full((WIDTHS[0],), WIDTHS[0] ** -0.5, dtype=torch.float64)
    assert set(found) == {1, 2, 3, 4}
    for depth, norms in found.items():
        for run in range(3):
            for sample in range(4):
                jacobian = autograd_jacobian(weights[:depth], run, activation, x[run, sample])
                assert jacobian.shape == (WIDTHS[depth], WIDTHS[0])
                largest = torch.linalg.svdvals(jacobian)[0]
                assert norms.norm[run, sample].exp() == pytest.approx(largest.item(), rel=1e-10)
                assert norms.gain[run, sample].exp() == pytest.approx((jacobian @ direction).norm().item(), rel=1e-10)


def test_only_the_asked_depths_are_given():
    assert list(log_norms(stack(), inputs(), "relu", [3])) == [3]


def test_relu_does_not_see_the_scale_of_the_input_and_tanh_does():
    weights, x = stack(), inputs()
    for scale in (1e-200, 1e150):
        same = log_norms(weights, scale * x, "relu", [4])[4].norm
        torch.testing.assert_close(same, log_norms(weights, x, "relu", [4])[4].norm, rtol=0, atol=1e-12)
    shrunk = log_norms(weights, 0.1 * x, "tanh", [4])[4].norm
    assert (shrunk - log_norms(weights, x, "tanh", [4])[4].norm).abs().min() > 1e-3


@pytest.mark.parametrize("activation", MODULES)
def test_a_run_measured_alone_is_the_run_in_its_stack(activation):
    weights, x = stack(), inputs()
    together = log_norms(weights, x, activation, [4])[4]
    for run in range(3):
        alone = log_norms([weight[run : run + 1] for weight in weights], x[run : run + 1], activation, [4])[4]
        torch.testing.assert_close(alone.norm[0], together.norm[run], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.gain[0], together.gain[run], rtol=0, atol=1e-12)


def test_a_dead_network_is_minus_infinity_from_the_layer_it_dies_in_and_its_neighbours_live():
    weights, x = stack(), inputs().abs()
    weights[1][1] = -weights[1][1].abs()  # after a ReLU layer, negative weights switch every unit of layer 2 off
    found = log_norms(weights, x, "relu", [1, 2, 3, 4])
    assert found[1].norm[1].isfinite().all()
    assert found[2].norm[1].isfinite().all()  # W_2 D_1 W_1: the derivatives of layer 2 enter one layer later
    for depth in (3, 4):
        assert (found[depth].norm[1] == -math.inf).all()
        assert (found[depth].gain[1] == -math.inf).all()
        assert found[depth].norm[[0, 2]].isfinite().all()


def test_product_norms_are_those_of_the_explicit_product():
    weights = stack()
    bits = torch.Generator().manual_seed(5)
    diagonals = [torch.randint(2, (3, width), generator=bits).double() for width in WIDTHS]
    diagonals[0][:, 0] = diagonals[-1][:, 0] = 1.0
    choices = [diagonals, [None, *diagonals[1:-1], None], [diagonals[0], None, None, None, None], [None] * 5]
    for chosen in choices:
        found = log_product_norms(weights, chosen, [1, 3, 4])
        for run in range(3):
            product = np.eye(WIDTHS[0]) if chosen[0] is None else np.diag(chosen[0][run].numpy())
            for layer in range(1, 5):
                product = weights[layer - 1][run].numpy() @ product
                if chosen[layer] is not None:
                    product = np.diag(chosen[layer][run].numpy()) @ product
                if layer in found:
                    largest = np.linalg.norm(product, 2)
                    assert found[layer][run].exp().item() == pytest.approx(largest, rel=1e-10, abs=1e-300)
    assert set(found) == {1, 3, 4}


BITS = 80


def exact_log_norm(weights, x, relu):
    """Log of the largest singular value of a product of hundreds of factors, in integers times 2^-BITS a layer."""
    integer = np.vectorize(lambda value: int(Fraction(value) * 2**BITS), otypes=[object])
    hidden = integer(x.numpy())
    product = integer(np.eye(len(x)))
    for layer, weight in enumerate(weights, start=1):
        w = integer(weight[0].numpy())
        product, z = w.dot(product), w.dot(hidden)
        if relu and layer < len(weights):
            active = z > 0
            product[~active] = 0
            z[~active] = 0
        hidden = z
    shift = max(abs(entry).bit_length() for entry in product.flat) - 1000
    small = np.array([float(entry >> shift if shift > 0 else entry << -shift) for entry in product.flat])
    largest = np.linalg.norm(small.reshape(product.shape) / 2.0**990, 2)
    return math.log(largest) + (shift + 990 - BITS * (len(weights) + 1)) * math.log(2)


@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize("log_gain", [-5.0, 5.0])
def test_three_hundred_layers_neither_overflow_nor_underflow(activation, log_gain):
    shift = 0.8 if activation == "relu" else 0.0  # mostly positive weights keep a net of six units alive
    weights = [
        (weight + shift) * math.exp(log_gain)
        for weight in init_gaussian([6] * 301, 6.0 if shift else 1.0, generators(1))
    ]
    x = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = exact_log_norm(weights, x, activation == "relu")
    assert abs(expected) > 800  # beyond the range of float64, whose logs end at about -745 and 709
    found = log_norms(weights, x.reshape(1, 1, 6), activation, [300])[300].norm.item()
    assert found == pytest.approx(expected, abs=1e-8)
    if activation == "linear":
        products = log_product_norms(weights, [None] * 301, [300])[300].item()
        assert products == pytest.approx(expected, abs=1e-8)


def test_mean_correlations_against_a_loop_over_pairs():
    weight = stack((6, 6), runs=2)[0] + torch.tensor([0.0, 0.2]).reshape(2, 1, 1)
    rows, columns = mean_correlations(weight)
    for run in range(2):
        w = weight[run].numpy()
        variance = (w**2).mean()
        for found, lines in ((rows[run], w), (columns[run], w.T)):
            pairs = [a * b for line in lines for a, b in permutations(line, 2)]
            assert found.item() == pytest.approx(6 * np.mean(pairs) / variance, rel=1e-10)
    assert mean_correlations(torch.ones(1, 6, 6))[0].item() == pytest.approx(6.0)
