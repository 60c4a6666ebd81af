"""The augmented loss against its printed formula, with Jacobians taken by autograd, and the properties of Claim H.1."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.studies.lipschitz.test_interlayer import layer_functions, network, norms_by_autograd

from jacnorm.studies.lipschitz.augmented import (
    Thresholds,
    augment,
    indicators,
    largest_slope,
    node_norms,
    ramp_loss,
    random_pairs,
    soft_indicator,
)
from jacnorm.studies.lipschitz.interlayer import Sweep, largest_norms

torch.set_num_threads(1)

UNIT = st.floats(0, 1)
POSITIVE = st.floats(1e-3, 1e3)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def test_the_soft_indicator_and_the_ramp_at_their_bends():
    s = number([0.0, 2.0, 3.0, 4.0, 9.0])
    assert soft_indicator(s, 2.0).tolist() == [1, 1, 0.5, 0, 0]
    margins = number([-1.0, 0.0, 0.5, 2.0, 3.0])
    assert ramp_loss(margins, 2.0).tolist() == [1, 1, 0.75, 0, 0]


@settings(max_examples=200, deadline=None)
@given(POSITIVE, st.floats(0, 5), st.floats(1e-4, 5))
def test_both_change_no_faster_than_one_over_their_scale(scale, first, distance):
    points = scale * number([[first, first + distance]])
    limit = 1 + 1e-9
    assert largest_slope(points, soft_indicator(points, scale), scale) <= limit
    assert largest_slope(points - 2 * scale, ramp_loss(points - 2 * scale, scale), scale) <= limit


def test_slopes_between_random_pairs_find_the_steepest_part_and_a_function_that_is_too_steep():
    generator = torch.Generator().manual_seed(0)
    points = random_pairs(400, 0.0, 3.0, generator)
    assert points.min() >= 0
    assert points.max() <= 3
    assert points.diff(dim=1).min() >= 3e-4 * (1 - 1e-9)
    assert largest_slope(points, soft_indicator(points, 1.0), 1.0) == pytest.approx(1)
    assert largest_slope(points, (2 - 1.1 * points).clamp(0, 1), 1.0) == pytest.approx(1.1)
    scales = torch.tensor([1.0, 10.0]).double().repeat(200)[:, None]
    assert largest_slope(points * scales, soft_indicator(points * scales, scales), scales) == pytest.approx(1)


@given(UNIT, UNIT)
def test_claim_h_1(loss, kept):
    found = augment(number(loss), number(kept)).item()
    assert loss <= found <= 1
    assert found == pytest.approx((loss - 1) * kept + 1, abs=1e-15)
    assert augment(number(loss), number(1.0)).item() == loss
    assert augment(number(loss), number(0.0)).item() == 1


def thresholds_of(weights, x, activation):
    sweep = Sweep(weights, x, activation)
    return Thresholds(node_norms(sweep).amax(1), largest_norms(sweep))


def printed_indicators(weights, x, activation, thresholds):
    """The product of Theorem 6.3, factor by factor."""
    product = torch.ones(x.shape[:2], dtype=torch.float64)
    for run in range(x.shape[0]):
        for sample in range(x.shape[1]):
            h = x[run, sample]
            for layer, function in enumerate(layer_functions(weights, activation, None, run)):
                h = function(h)
                product[run, sample] *= soft_indicator(h.norm(), thresholds.node[run, layer].exp())
    for (later, earlier), norms in norms_by_autograd(weights, x, activation).items():
        product *= soft_indicator(norms, thresholds.jacobian[:, later, earlier - 1].exp()[:, None])
    return product


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu"])
def test_the_product_is_that_of_theorem_6_3(activation):
    weights, _, x = network((7, 5, 6, 3), samples=12)
    train, others = x[:, :6], 1.1 * x[:, 6:]
    thresholds = thresholds_of(weights, train, activation)
    found = indicators(Sweep(weights, others, activation), thresholds)
    torch.testing.assert_close(found, printed_indicators(weights, others, activation, thresholds))
    assert ((found > 0.01) & (found < 0.99)).any()  # some of them are inside


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", "softplus"])
def test_on_the_samples_that_set_the_thresholds_every_indicator_is_one(activation):
    weights, _, x = network((7, 5, 6, 5, 3), samples=30, seed=1)
    thresholds = thresholds_of(weights, x, activation)
    assert torch.equal(indicators(Sweep(weights, x, activation), thresholds), torch.ones(2, 30, dtype=torch.float64))


@pytest.mark.parametrize("which", ["node", "jacobian"])
def test_thresholds_that_are_too_low_show_on_the_training_samples(which):
    weights, _, x = network((7, 5, 6, 3), samples=10, seed=2)
    right = thresholds_of(weights, x, "tanh")
    low = {"node": right.node.clone(), "jacobian": right.jacobian.clone()}
    low[which] -= 0.2
    found = indicators(Sweep(weights, x, "tanh"), Thresholds(**low))
    assert (found.amin(1) < 0.9).all()
    assert (found >= 0).all()


def test_a_shared_matrix_beyond_its_threshold_counts_for_every_sample():
    weights, _, x = network((7, 5, 3), samples=4)
    right = thresholds_of(weights, x, "tanh")
    jacobian = right.jacobian.clone()
    jacobian[:, 1, 0] -= math.log(1.25)
    found = indicators(Sweep(weights, x, "tanh"), Thresholds(right.node, jacobian))
    torch.testing.assert_close(found, torch.full_like(found, 0.75))


def test_far_from_the_data_nothing_is_kept():
    weights, _, x = network((7, 5, 6, 3), samples=10, seed=3)
    for activation in ("relu", "tanh"):
        thresholds = thresholds_of(weights, x, activation)
        assert (indicators(Sweep(weights, 100 * x, activation), thresholds) == 0).all()


def test_a_network_that_is_dead_on_the_data_gives_numbers():
    weights, _, x = network((4, 5, 5, 3))
    weights[0] = -weights[0].abs()
    thresholds = thresholds_of(weights, x.abs(), "relu")
    assert torch.equal(indicators(Sweep(weights, x.abs(), "relu"), thresholds), torch.ones(2, 5, dtype=torch.float64))
    assert (indicators(Sweep(weights, -x.abs(), "relu"), thresholds) == 0).all()
