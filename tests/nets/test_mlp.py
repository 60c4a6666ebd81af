"""Stacked networks against plain per-network loops and against torch's own autograd."""

from __future__ import annotations

import math

import pytest
import torch

from jacnorm.nets import mlp

WIDTHS = (5, 8, 7, 3)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def batch(*shape: int, seed: int = 99) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_has_the_same_bits_alone_and_in_any_stack(dtype):
    together = mlp.init_gaussian(WIDTHS, 2.0, generators(4, 7, 1), dtype)
    for row, seed in enumerate((4, 7, 1)):
        alone = mlp.init_gaussian(WIDTHS, 2.0, generators(seed), dtype)
        for layer, of_stack in zip(alone, together, strict=True):
            assert layer.dtype == dtype
            assert torch.equal(layer[0], of_stack[row])


def test_runs_and_layers_are_different_draws():
    weights = mlp.init_gaussian((6, 6, 6), 1.0, generators(0, 1))
    assert not torch.equal(weights[0][0], weights[0][1])
    assert not torch.equal(weights[0][0], weights[1][0])


def test_variance_is_sigma_w2_over_fan_in():
    (weight,) = mlp.init_gaussian((400, 500), 3.0, generators(0, 1))
    entries = weight.flatten() * math.sqrt(400 / 3.0)
    # 400,000 entries: standard errors 1/sqrt(N) of the mean, sqrt(2/N) of the variance, sqrt(96/N) of the 4th moment.
    count = entries.numel()
    assert abs(entries.mean()) < 4 / math.sqrt(count)
    assert abs(entries.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs(entries.pow(4).mean() - 3) < 4 * math.sqrt(96 / count)


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", "softplus", "linear"])
@pytest.mark.parametrize("with_biases", [False, True])
def test_forward_equals_a_loop_over_networks(activation, with_biases):
    weights = mlp.init_gaussian(WIDTHS, 2.0, generators(0, 1, 2))
    biases = [batch(3, width, seed=width) for width in WIDTHS[1:]] if with_biases else None
    phi = {
        "relu": lambda z: z.clamp(min=0),
        "tanh": torch.tanh,
        "elu": lambda z: torch.where(z > 0, z, z.exp() - 1),
        "softplus": lambda z: (1 + z.exp()).log(),
        "linear": lambda z: z,
    }[activation]
    x = batch(3, 4, 5)
    stacked = mlp.forward(weights, x, activation, biases)
    for run in range(3):
        hidden = x[run]
        for layer, weight in enumerate(weights):
            bias = biases[layer][run] if biases else None
            z = torch.nn.functional.linear(hidden, weight[run], bias)
            torch.testing.assert_close(stacked[layer][run], z, rtol=1e-12, atol=1e-14)
            hidden = phi(z)
    assert torch.equal(mlp.logits(weights, x, activation, biases), stacked[-1])


def test_a_batch_of_two_dimensions_is_shared_by_the_runs():
    weights = mlp.init_gaussian(WIDTHS, 2.0, generators(0, 1))
    x = batch(4, 5)
    torch.testing.assert_close(
        mlp.logits(weights, x, "relu"), mlp.logits(weights, torch.stack([x, x]), "relu"), rtol=1e-12, atol=1e-14
    )


def test_a_run_computes_the_same_alone_and_stacked():
    weights = mlp.init_gaussian((20, 64, 64, 10), 2.0, generators(0, 1, 2))
    x = batch(16, 20)
    together = mlp.logits(weights, x, "relu")
    alone = mlp.logits([weight[1:2] for weight in weights], x, "relu")
    torch.testing.assert_close(together[1:2], alone, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", "softplus", "linear"])
def test_derivative_is_that_of_autograd(activation):
    z = torch.cat([batch(200) * 3, torch.tensor([0.0, -0.0, 1e-300, 400.0, -400.0], dtype=torch.float64)])
    z.requires_grad_()
    (expected,) = torch.autograd.grad(mlp.activate(z, activation).sum(), z)
    torch.testing.assert_close(mlp.derivative(z.detach(), activation), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("activation", ["tanh", "elu", "softplus", "linear"])
def test_curvature_is_the_largest_slope_of_the_derivative(activation):
    z = torch.linspace(-6, 6, 120001, dtype=torch.float64)
    slopes = (mlp.derivative(z, activation).diff() / z.diff()).abs()
    assert slopes.max() == pytest.approx(mlp.curvature(activation), rel=1e-4, abs=1e-12)


def test_relu_has_no_curvature():
    with pytest.raises(ValueError, match="the derivative of relu is not continuous"):
        mlp.curvature("relu")
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        mlp.curvature("gelu")


def test_relu_derivative_at_zero_is_zero():
    assert mlp.derivative(torch.tensor([0.0, -0.0]), "relu").tolist() == [0.0, 0.0]


def test_tanh_derivative_keeps_its_digits_far_out():
    # 1 - tanh(20)^2 rounds to zero; the true value is 4 exp(-40) to 17 digits.
    value = mlp.derivative(torch.tensor([20.0, -20.0], dtype=torch.float64), "tanh")
    assert value.tolist() == pytest.approx([4 * math.exp(-40)] * 2, rel=1e-14)


def test_cross_entropy_and_accuracy_per_run():
    outputs = batch(2, 6, 4)
    labels = torch.tensor([0, 1, 2, 3, 1, 0])
    losses = mlp.cross_entropy(outputs, labels)
    for run in range(2):
        by_hand = -sum(math.log(outputs[run, b].softmax(0)[labels[b]]) for b in range(6)) / 6
        assert losses[run].item() == pytest.approx(by_hand, rel=1e-12)
        right = sum(int(outputs[run, b].argmax() == labels[b]) for b in range(6)) / 6
        assert mlp.accuracy(outputs, labels)[run].item() == pytest.approx(right)
    separate = torch.stack([labels, labels.flip(0)])
    assert mlp.cross_entropy(outputs, separate)[0] == losses[0]
    assert mlp.cross_entropy(outputs, separate)[1] == mlp.cross_entropy(outputs[1:], labels.flip(0))[0]


def test_gradients_of_the_summed_loss_are_each_runs_own():
    weights = [w.requires_grad_() for w in mlp.init_gaussian(WIDTHS, 2.0, generators(0, 1))]
    x, labels = batch(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    together = torch.autograd.grad(mlp.cross_entropy(mlp.logits(weights, x, "tanh"), labels).sum(), weights)
    alone = [w[1:].detach().requires_grad_() for w in weights]
    own = torch.autograd.grad(mlp.cross_entropy(mlp.logits(alone, x, "tanh"), labels).sum(), alone)
    for a, b in zip(together, own, strict=True):
        torch.testing.assert_close(a[1:], b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("widths", [(5,), (), (5, 0, 2), (-1, 3)])
def test_impossible_widths_are_refused(widths):
    with pytest.raises(ValueError, match="widths are"):
        mlp.init_gaussian(widths, 2.0, generators(0))


@pytest.mark.parametrize("sigma_w2", [0.0, -1.0, math.nan])
def test_impossible_variances_are_refused(sigma_w2):
    with pytest.raises(ValueError, match="variance must be positive"):
        mlp.init_gaussian(WIDTHS, sigma_w2, generators(0))


def test_a_stack_needs_generators():
    with pytest.raises(ValueError, match="no generators"):
        mlp.init_gaussian(WIDTHS, 2.0, [])


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 5), (5,), (2, 4, 6)])
def test_inputs_of_a_wrong_shape_are_refused(shape):
    weights = mlp.init_gaussian(WIDTHS, 2.0, generators(0, 1))
    with pytest.raises(ValueError, match="expects"):
        mlp.logits(weights, batch(*shape), "relu")


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="'gelu'; it must be one of relu, tanh, elu, softplus, linear"):
        mlp.derivative(torch.zeros(1), "gelu")


@pytest.mark.parametrize("shape", [(5,), (3, 6), (1, 6)])
def test_labels_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match="labels have shape"):
        mlp.cross_entropy(batch(2, 6, 4), torch.zeros(shape, dtype=torch.long))
