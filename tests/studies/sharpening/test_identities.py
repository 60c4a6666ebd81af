"""The identities of the first layer hold to rounding, and mistakes in either side show.

Independent of the closed form: derivatives by automatic differentiation of the forward pass alone.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from jacnorm.studies.sharpening import identities
from jacnorm.studies.sharpening.identities import autograd_kernel, identity_errors, layer_kernels
from jacnorm.studies.sharpening.networks import Mlp
from jacnorm.studies.sharpening.tables import COLUMNS


def network(parametrisation="standard", activation="tanh") -> Mlp:
    return Mlp((1, 3, 3), 4, width=7, hidden_layers=2, activation=activation, parametrisation=parametrisation)


def problem(net, runs=2, samples=3):
    stack = net.initial([torch.Generator().manual_seed(seed) for seed in range(runs)])
    return stack, torch.randn(samples, 1, 3, 3, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("parametrisation", ["standard", "ntk"])
@pytest.mark.parametrize("activation", ["tanh", "gelu", "relu"])
def test_identities_hold_to_rounding_in_float64(parametrisation, activation):
    net = network(parametrisation, activation)
    errors = identity_errors(net, *problem(net))
    assert set(errors) == set(COLUMNS["identities"]) - {"seed", "width", "parametrisation"}
    for error in errors.values():
        assert error.shape == (2,)
        assert error.dtype == torch.float64
        assert error.max() < 1e-13


def test_errors_do_not_depend_on_the_company_of_a_run():
    net = network()
    stack, x = problem(net)
    second = {name: tensor[1:] for name, tensor in stack.items()}
    for name, error in identity_errors(net, second, x).items():
        assert error.item() == pytest.approx(identity_errors(net, stack, x)[name][1].item(), abs=1e-14)


def test_the_kernel_is_that_of_differences():
    net = network()
    stack, x = problem(net, runs=1, samples=2)
    stack, x = {name: tensor.double() for name, tensor in stack.items()}, x.double()
    flat = torch.cat([tensor.flatten() for tensor in stack.values()])
    sizes = [tensor.numel() for tensor in stack.values()]

    def logits(vector):
        parts = [p.reshape(t.shape) for p, t in zip(vector.split(sizes), stack.values(), strict=True)]
        return net(dict(zip(stack, parts, strict=True)), {}, x).flatten()

    step = 1e-6
    units = torch.eye(len(flat), dtype=torch.float64)
    derivative = torch.stack([(logits(flat + step * e) - logits(flat - step * e)) / (2 * step) for e in units], dim=1)
    kernel = derivative @ derivative.T
    torch.testing.assert_close(autograd_kernel(net, stack, x)[0], kernel, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(sum(layer_kernels(net, stack, x))[0], kernel, rtol=1e-7, atol=1e-8)


def test_a_layer_that_is_left_out_shows(monkeypatch):
    net = network()
    right = identities.layer_blocks
    monkeypatch.setattr(
        identities,
        "layer_blocks",
        lambda *inputs: [dataclasses.replace(b, inner=0.99 * b.inner) for b in right(*inputs)],
    )
    errors = identity_errors(net, *problem(net))
    assert errors["kernel_error"].min() > 1e-3
    assert errors["logits_error"].max() < 1e-13


def test_a_kernel_with_the_first_layers_jacobian_shows(monkeypatch):
    net = network()
    right = identities.layer_blocks

    def wrong(net, parameters, x):
        scale = parameters["weight1"].square().sum((1, 2))[:, None, None]
        return [dataclasses.replace(b, inner=scale * b.inner) for b in right(net, parameters, x)]

    monkeypatch.setattr(identities, "layer_blocks", wrong)
    assert identity_errors(net, *problem(net))["later_layers_error"].min() > 1
