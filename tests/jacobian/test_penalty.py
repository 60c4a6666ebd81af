import math

import pytest
import torch
from tests.jacobian.cases import oracle
from torch import nn

from jacnorm.jacobian import NotDifferentiable, OptionError, jacobian_penalty


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()


X = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6)


def numerical_gradient(model: nn.Module, value) -> torch.Tensor:
    """Central differences of `value(J of every sample)` in the first layer's weight, by the oracle's Jacobian."""
    weight, step = model[0].weight, 1e-5
    gradient = torch.zeros_like(weight)
    with torch.no_grad():
        for index in range(weight.numel()):
            ends = []
            for sign in (1, -1):
                weight.view(-1)[index] += sign * step
                with torch.enable_grad():
                    ends.append(value(oracle(model, X)).sum())
                weight.view(-1)[index] -= sign * step
            gradient.view(-1)[index] = (ends[0] - ends[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"kind": "frobenius", "probes": None}, lambda j: j.square().sum((1, 2))),
        ({"kind": "spectral", "pairs": 4}, lambda j: torch.linalg.svdvals(j)[:, 0].square()),
    ],
)
def test_value_and_gradient_of_the_exact_penalties(model, options, value):
    penalty = jacobian_penalty(model, X, **options)
    torch.testing.assert_close(penalty, value(oracle(model, X)))
    (gradient,) = torch.autograd.grad(penalty.sum(), model[0].weight)
    torch.testing.assert_close(gradient, numerical_gradient(model, value), rtol=1e-5, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_stochastic_penalty_is_unbiased_with_its_gradient(model):
    generator = torch.Generator().manual_seed(0)
    draws, gradients = [], []
    for _ in range(400):
        penalty = jacobian_penalty(model, X, generator=generator).sum()
        gradients.append(torch.autograd.grad(penalty, model[0].weight)[0])
        draws.append(penalty.detach())
    for sample, exact in (
        (torch.stack(draws), oracle(model, X).square().sum()),
        (torch.stack(gradients), numerical_gradient(model, lambda j: j.square().sum((1, 2)))),
    ):
        error = sample.std(0) / math.sqrt(400)
        assert bool(((sample.mean(0) - exact).abs() <= 5 * error).all())
    many = jacobian_penalty(model, X, probes=200).sum().item()
    assert many == pytest.approx(oracle(model, X).square().sum().item(), rel=0.15)


def test_training_on_the_penalty_lowers_the_jacobian(model):
    before = oracle(model, X).norm()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        optimiser.zero_grad()
        jacobian_penalty(model, X, generator=generator).mean().backward()
        optimiser.step()
    assert oracle(model, X).norm() < 0.8 * before


def test_without_a_generator_the_probes_repeat(model):
    assert torch.equal(jacobian_penalty(model, X), jacobian_penalty(model, X))


def test_batch_norm_in_train_mode_is_accepted_and_scalar_samples_work():
    norm = nn.BatchNorm1d(6).double()
    assert jacobian_penalty(norm, X).shape == (3,)
    assert jacobian_penalty(torch.sin, torch.zeros(4), probes=None).tolist() == [1.0] * 4


@pytest.mark.parametrize("options", [{"kind": "nuclear"}, {"probes": 0}, {"pairs": 0}])
def test_options_out_of_range(options):
    with pytest.raises(OptionError):
        jacobian_penalty(torch.tanh, X, **options)


def test_constant_functions_are_refused():
    with pytest.raises(NotDifferentiable):
        jacobian_penalty(lambda x: x.detach() * torch.ones(6, requires_grad=True), X)
