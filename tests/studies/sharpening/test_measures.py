"""Jacobian norms, variation, slopes and fits against differences, singular values, double loops and plain PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from jacnorm.studies.sharpening import measures
from jacnorm.studies.sharpening.inputs import Inputs
from jacnorm.studies.sharpening.measures import (
    Neighbours,
    Pairs,
    fit_columns,
    jacobian_columns,
    jacobians,
    largest_norm,
    norms,
    refresh,
    slopes,
)
from jacnorm.studies.sharpening.networks import Convolutional, _BatchNorm, build
from jacnorm.studies.sharpening.settings import NetworkSettings

torch.set_num_threads(1)

IMAGE = (2, 4, 4)
SETTINGS = NetworkSettings(width=7, channels=3)
SEEDS = st.integers(0, 2**31)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stack(network, runs=3):
    generators = [torch.Generator().manual_seed(100 + run) for run in range(runs)]
    return network.initial(generators), network.buffers(runs)


def normed():
    """A small network with batch norm."""
    layers = [nn.Conv2d(2, 3, 3, padding=1), _BatchNorm(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)]
    return Convolutional(IMAGE, 3, nn.Sequential(*layers))


NETWORKS = {
    "tanh": build(SETTINGS, "mlp", IMAGE, 3, activation="tanh"),
    "relu": build(SETTINGS, "mlp", IMAGE, 3, activation="relu"),
    "gelu, ntk": build(SETTINGS, "mlp", IMAGE, 3, activation="gelu", parametrisation="ntk"),
    "cnn": build(SETTINGS, "cnn", IMAGE, 3),
    "batch norm": normed(),
}


class Linear:
    """z = W x: its Jacobian is W everywhere, and its Lipschitz norm the spectral norm of W."""

    has_batch_norm = False

    def __init__(self, features, classes):
        self.image, self.classes = (1, 1, features), classes

    def __call__(self, parameters, buffers, x, *, training=False):
        return x.flatten(-3) @ parameters["weight"].mT


# --- Jacobians -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_jacobians_are_those_of_differences(name):
    # Central differences in float64 need no derivative of anybody's.
    network = NETWORKS[name]
    parameters, buffers = stack(network)
    x = draw(5, *IMAGE)
    if network.has_batch_norm:
        buffers = refresh(network, parameters, buffers, x)
    found = jacobians(network, parameters, buffers, x)
    assert found.shape == (3, 5, 3, 32)
    parameters, buffers = ({key: each.double() for key, each in group.items()} for group in (parameters, buffers))
    steps = 1e-6 * torch.eye(32, dtype=torch.float64).view(32, 1, *IMAGE)
    above, below = (
        network(parameters, buffers, (x + sign * steps).flatten(0, 1)).unflatten(1, (32, 5)) for sign in (1, -1)
    )  # (R, d, B, K)
    torch.testing.assert_close(found.double(), ((above - below) / 2e-6).permute(0, 2, 3, 1), rtol=1e-4, atol=2e-6)


def test_jacobians_leave_parameters_and_inputs_as_they_were():
    network = NETWORKS["tanh"]
    parameters, buffers = stack(network)
    x = draw(2, *IMAGE)
    jacobians(network, parameters, buffers, x)
    assert not x.requires_grad
    assert all(not each.requires_grad and each.grad is None for each in parameters.values())


@pytest.mark.parametrize("shape", [(4, 3, 10), (2, 3, 5, 2), (1, 6, 6), (3, 1, 4)])
def test_norms_are_the_largest_singular_values(shape):
    matrices = draw(*shape)
    expected = np.linalg.norm(matrices.double().numpy(), 2, axis=(-2, -1))
    assert norms(matrices).numpy() == pytest.approx(expected, rel=1e-12)
    assert norms(torch.zeros(shape)).tolist() == torch.zeros(shape[:-2]).tolist()


def test_norms_of_huge_and_tiny_matrices_neither_overflow_nor_vanish():
    matrices = draw(2, 3, 4)
    for scale in (1e30, 1e-30):
        torch.testing.assert_close(norms(matrices * scale), norms(matrices) * scale, rtol=1e-6, atol=0)


def test_a_matrix_that_is_not_finite_has_no_norm_and_spoils_no_other():
    matrices = draw(2, 3, 4, 6)
    expected = norms(matrices)
    matrices[0, 1, 0, 0], matrices[0, 2, 3, 5] = math.nan, math.inf
    found = norms(matrices)
    assert found.isnan().tolist() == [[False, True, True], [False, False, False]]
    assert torch.equal(found[~found.isnan()], expected[~found.isnan()])
    largest = largest_norm(matrices)
    assert math.isnan(largest[0])
    assert largest[1] == pytest.approx(expected[1].max().item())


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.integers(1, 8), st.floats(0, 3))
def test_the_largest_norm_is_found_without_the_other_ones(seed, runs, samples, outputs, features, spread):
    draws = torch.Generator().manual_seed(seed)
    matrices = torch.randn(runs, samples, outputs, features, generator=draws)
    scales = torch.randn(runs, samples, 1, 1, generator=draws).mul(spread).exp()
    ranks = torch.randint(1, outputs + 1, (runs, samples, 1, 1), generator=draws)
    matrices = matrices * scales * (torch.arange(outputs)[:, None] < ranks)
    assert largest_norm(matrices).tolist() == pytest.approx(norms(matrices).amax(1).tolist(), rel=1e-10)


def test_the_largest_norm_of_equal_and_of_zero_matrices():
    same = torch.eye(4).expand(2, 5, 4, 4)
    assert largest_norm(same).tolist() == pytest.approx([1, 1])
    assert largest_norm(torch.zeros(2, 5, 4, 3)).tolist() == [0, 0]


def test_a_matrix_whose_frobenius_norm_is_largest_need_not_have_the_largest_norm():
    wide = torch.diag(torch.full((4,), 1.0))  # Frobenius norm 2, norm 1
    steep = torch.diag(torch.tensor([1.5, 0, 0, 0]))
    assert largest_norm(torch.stack([wide, steep])[None]).item() == pytest.approx(1.5)


def test_neighbours_are_the_nearest_training_samples(monkeypatch):
    monkeypatch.setattr(measures, "BLOCK", 4)
    train, test = draw(9, *IMAGE), draw(11, *IMAGE, seed=1)
    found = Neighbours.of(train, test)
    distances = np.array([[np.linalg.norm((a - b).numpy()) for b in train.double()] for a in test.double()])
    assert found.nearest.tolist() == distances.argmin(1).tolist()
    assert found.distance.numpy() == pytest.approx(distances.min(1), rel=1e-12)
    assert Neighbours.of(train, train[[3, 0]]).distance.tolist() == [0, 0]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("numbers", "chunk"), [(2**25, 1000), (2000, 4), (1, 3)])
def test_jacobian_columns_are_those_of_all_jacobians_at_once(monkeypatch, name, numbers, chunk):
    network = NETWORKS[name]
    parameters, buffers = stack(network)
    train, test = draw(9, *IMAGE), draw(11, *IMAGE, seed=1)
    neighbours = Neighbours.of(train, test)
    own, other = (jacobians(network, parameters, buffers, x).double() for x in (train, test))
    at, there = torch.linalg.svdvals(own)[..., 0], torch.linalg.svdvals(other)[..., 0]
    change = torch.linalg.svdvals(other - own[:, neighbours.nearest])[..., 0]
    expected = {
        "jacobian_max": at.amax(1),
        "jacobian_mean": at.mean(1),
        "test_jacobian_max": there.amax(1),
        "test_jacobian_mean": there.mean(1),
        "distance": torch.full((3,), np.quantile(neighbours.distance.numpy(), 0.95)),
        "variation": change.amax(1),
    }
    monkeypatch.setattr(measures, "NUMBERS", numbers)
    found = jacobian_columns(network, parameters, buffers, neighbours, chunk=chunk)
    assert found.pop("jacobian_argmax").tolist() == at.argmax(1).tolist()
    assert sorted(found) == sorted(expected)
    for column, values in expected.items():
        torch.testing.assert_close(found[column], values.double(), rtol=2e-5, atol=2e-6)


def test_the_norm_at_a_test_sample_is_at_most_the_nearest_ones_plus_the_variation():
    network = NETWORKS["tanh"]
    parameters, buffers = stack(network)
    parameters = {name: 4 * tensor for name, tensor in parameters.items()}  # far from linear
    found = jacobian_columns(network, parameters, buffers, Neighbours.of(draw(5, *IMAGE), draw(50, *IMAGE, seed=1)))
    assert (found["test_jacobian_max"] > found["jacobian_max"]).any()
    assert (found["test_jacobian_max"] <= found["jacobian_max"] + found["variation"]).all()


def test_a_linear_map_has_one_jacobian_and_no_variation():
    weight = draw(3, 4, 6)
    network = Linear(6, 4)
    found = jacobian_columns(network, {"weight": weight}, {}, Neighbours.of(draw(5, 1, 1, 6), draw(7, 1, 1, 6, seed=1)))
    lipschitz = torch.linalg.matrix_norm(weight.double(), 2)
    for column in ("jacobian_max", "jacobian_mean", "test_jacobian_max", "test_jacobian_mean"):
        torch.testing.assert_close(found[column], lipschitz, rtol=1e-6, atol=0)
    assert found["variation"].tolist() == [0, 0, 0]


# --- slopes ----------------------------------------------------------------------------------------------------------


def slopes_by_loops(logits, labels, square, smoothing, x):
    """Both maxima of Theorem 5.1's static form, pair by pair, in numpy."""
    logits, x = logits.double().numpy(), x.double().flatten(1).numpy()
    found = []
    for run, outputs in enumerate(logits):
        count, classes = outputs.shape
        wanted = np.eye(classes)[labels.numpy()]
        if not square[run]:
            wanted = (1 - smoothing[run].item()) * wanted + smoothing[run].item() / classes
            outputs = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
        residual = np.linalg.norm(outputs - wanted, axis=1)
        bound = slope = -math.inf
        for i in range(count):
            for j in range(count):
                distance = np.linalg.norm(x[i] - x[j])
                if i != j and distance > 0:
                    asked = np.linalg.norm(wanted[i] - wanted[j]) - residual[i] - residual[j]
                    bound = max(bound, asked / distance)
                    slope = max(slope, np.linalg.norm(outputs[i] - outputs[j]) / distance)
        found.append((bound, slope))
    return np.array(found).T


@pytest.mark.parametrize("block", [1, 3, 64])
def test_slopes_are_those_of_all_pairs(monkeypatch, block):
    monkeypatch.setattr(measures, "BLOCK", block)
    x = draw(8, *IMAGE)
    x[5] = x[2]  # a duplicate, with another label and other outputs
    logits, labels = draw(4, 8, 3, seed=1) * 2, torch.tensor([0, 1, 2, 0, 1, 0, 2, 2])
    square, smoothing = torch.tensor([True, False, False, True]), torch.tensor([0, 0, 0.3, 0])
    bound, slope = slopes(logits, labels, square, smoothing, Pairs.of(x))
    expected = slopes_by_loops(logits, labels, square, smoothing, x)
    assert bound.numpy() == pytest.approx(expected[0], rel=1e-9)
    assert slope.numpy() == pytest.approx(expected[1], rel=1e-6)
    assert (bound < 0).any()  # outputs far from the targets ask for nothing


def test_the_bound_of_a_perfect_fit_is_the_targets_own_slope():
    labels = torch.tensor([0, 1, 1])
    x = torch.tensor([0.0, 2, 5]).view(3, 1, 1, 1)
    logits = functional.one_hot(labels, 2).double()[None]
    bound, slope = slopes(logits, labels, torch.tensor([True]), torch.zeros(1), Pairs.of(x))
    assert bound.item() == pytest.approx(math.sqrt(2) / 2)
    assert slope.item() == pytest.approx(math.sqrt(2) / 2)


def test_without_two_different_inputs_there_is_no_slope():
    x = torch.ones(4, 1, 1, 2)
    bound, slope = slopes(draw(2, 4, 3), torch.arange(4) % 3, torch.tensor([True, False]), torch.zeros(2), Pairs.of(x))
    assert bound.tolist() == slope.tolist() == [-math.inf, -math.inf]


def test_duplicates_among_many_samples_have_no_slope():
    x = draw(60, *IMAGE).repeat(2, 1, 1, 1)[
        :100
    ]  # enough of them for distances by matrix products, if these were taken
    pairs = Pairs.of(x)
    distances = torch.cat([block.flatten() for block in pairs.blocks])
    assert distances.isfinite().sum() == 100 * 99 / 2 - 40
    assert distances.min() > 1


def test_inputs_that_nearly_coincide_are_not_taken_for_duplicates():
    x = 100 + torch.tensor([0, 1e-5, 1], dtype=torch.float64).view(3, 1, 1, 1)
    logits = torch.tensor([[[0.0, 0], [1, 0], [0, 0]]])
    _, slope = slopes(logits, torch.tensor([0, 1, 1]), torch.tensor([True]), torch.zeros(1), Pairs.of(x))
    assert slope.item() == pytest.approx(1e5, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(2, 12), st.integers(1, 5), st.floats(0, 0.9), st.floats(-3, 3))
def test_the_bound_is_at_most_the_slope_and_the_slope_at_most_the_lipschitz_norm(seed, count, features, s, scale):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 1, features, generator=draws)
    labels = torch.randint(3, (count,), generator=draws)
    weight = torch.randn(2, 3, features, generator=draws) * math.exp(scale)
    network, square = Linear(features, 3), torch.tensor([True, False])
    logits = network({"weight": weight.double()}, {}, x.double())
    bound, slope = slopes(logits, labels, square, torch.tensor([0, s]), Pairs.of(x))
    lipschitz = torch.linalg.matrix_norm(weight.double(), 2)  # softmax contracts
    assert (bound <= slope + 1e-5).all()
    assert (slope <= lipschitz * (1 + 1e-6)).all()


def test_a_run_with_nan_has_no_slope_and_spoils_no_other():
    logits, labels, x = draw(2, 5, 3), torch.arange(5) % 3, draw(5, *IMAGE, seed=1)
    logits[0, 2, 1] = math.nan
    pairs, square = Pairs.of(x), torch.tensor([True, True])
    bound, slope = slopes(logits, labels, square, torch.zeros(2), pairs)
    alone = slopes(logits[1:], labels, square[1:], torch.zeros(1), pairs)
    assert math.isnan(bound[0])
    assert math.isnan(slope[0])
    assert (bound[1], slope[1]) == (alone[0][0], alone[1][0])


# --- fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1000, 4])
def test_fits_are_those_of_pytorch(chunk):
    network = NETWORKS["tanh"]
    parameters, buffers = stack(network)
    x, y = draw(20, *IMAGE), torch.arange(20) % 3
    inputs = Inputs("invented", "", x[:13], y[:13], x[13:], y[13:], 3)
    square, smoothing = torch.tensor([True, False, False]), torch.tensor([0, 0, 0.2])
    found = fit_columns(network, parameters, buffers, inputs, square, smoothing, chunk=chunk)
    for split, part in (("train", slice(13)), ("test", slice(13, None))):
        logits = network(parameters, buffers, x[part])
        one_hot = functional.one_hot(y[part], 3)
        expected = [
            functional.mse_loss(logits[0], one_hot.float(), reduction="sum") / 2 / len(one_hot),
            functional.cross_entropy(logits[1], y[part]),
            functional.cross_entropy(logits[2], y[part], label_smoothing=0.2),
        ]
        torch.testing.assert_close(found[f"{split}_loss"], torch.stack(expected).double(), rtol=1e-5, atol=1e-6)
        right = (logits.argmax(2) == y[part]).double().mean(1)
        torch.testing.assert_close(found[f"{split}_accuracy"], right)


def test_a_refresh_takes_the_statistics_of_all_samples():
    network = normed()
    parameters, buffers = stack(network)
    x = draw(10, *IMAGE)
    before = {name: tensor.clone() for name, tensor in buffers.items()}
    conv = [functional.conv2d(x, parameters["0.weight"][run], parameters["0.bias"][run], padding=1) for run in range(3)]
    conv = torch.stack(conv)  # (R, N, c, h, w)
    found = refresh(network, parameters, buffers, x)
    torch.testing.assert_close(found["1.mean"], conv.mean((1, 3, 4)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["1.variance"], conv.transpose(1, 2).flatten(2).var(2), rtol=1e-4, atol=1e-6)
    found = refresh(network, parameters, buffers, x, chunk=4)  # 4, 4 and 2 samples: a mean weighted by size
    variances = torch.stack([part.transpose(1, 2).flatten(2).var(2) for part in conv.split(4, dim=1)])
    weights = torch.tensor([0.4, 0.4, 0.2])[:, None, None]
    torch.testing.assert_close(found["1.mean"], conv.mean((1, 3, 4)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["1.variance"], (weights * variances).sum(0), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(buffers[name], tensor) for name, tensor in before.items())


def test_there_is_nothing_to_refresh_without_batch_norm():
    network = NETWORKS["cnn"]
    parameters, buffers = stack(network)
    assert refresh(network, parameters, buffers, draw(4, *IMAGE)) == {}
