import pytest
import torch
from torch import nn

from jacnorm.jacobian import UnknownLayer, cross_check, frobenius_norm, jacobian, partial_jacobians, spectral_norm
from jacnorm.jacobian.partial import Between


class Residual(nn.Module):
    """Two layers with a skip connection from the input around both."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.second(torch.tanh(self.first(x)))) + x**2


@pytest.fixture
def stack():
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        return model, torch.randn(4, 5)


def test_chain_rule_over_named_layers(stack):
    model, x = stack
    parts = partial_jacobians(model, x, [(None, "1"), ("1", "3"), ("3", None), (None, None)], measure=jacobian)
    torch.testing.assert_close(parts["3", None] @ parts["1", "3"] @ parts[None, "1"], parts[None, None])
    torch.testing.assert_close(parts["3", None], model[4].weight.expand(4, 3, 8))


def test_norms_and_options_are_passed_on(stack):
    model, x = stack
    norms = partial_jacobians(model, x, [("3", None)], measure=frobenius_norm, rtol=0.2)
    torch.testing.assert_close(norms["3", None].value, model[4].weight.norm().double().expand(4), rtol=1e-6, atol=0)


def test_other_paths_are_held_fixed_sample_by_sample():
    """With a skip connection the part after a layer depends on x too; every sample must meet its own x."""
    model = Residual()
    x = torch.randn(5, 6)
    parts = partial_jacobians(model, x, [("first", None)], measure=jacobian, memory_limit=1)
    hidden = model.first(x).detach()

    def rest(h):
        return torch.tanh(model.second(torch.tanh(h)))

    torch.testing.assert_close(parts["first", None], jacobian(rest, hidden))
    one = partial_jacobians(model, x, [("first", None)], method="krylov")["first", None]
    torch.testing.assert_close(one.value, spectral_norm(rest, hidden).value, rtol=1e-3, atol=0)


def test_cross_check_of_a_part_and_half_precision():
    model = Residual()
    x = torch.randn(5, 6)
    hidden = model.first(x).detach()
    result = cross_check(Between(model, model, x, "first", None), hidden, samples=3)
    assert result.disagreement == 0
    assert result.in_float64.dtype == torch.float64
    half = partial_jacobians(model.bfloat16(), x.bfloat16(), [("first", None)])["first", None]
    torch.testing.assert_close(half.value, result.measurement.value, rtol=0.05, atol=0)
    assert half.dtype == torch.float32


def test_layers_that_cannot_be_named(stack):
    model, x = stack
    for pair, words in (
        ((None, "nine"), "no layer 'nine'; its layers are 0, 1"),
        (("3", "1"), "'1' runs before layer '3'"),
    ):
        with pytest.raises(UnknownLayer, match=words):
            partial_jacobians(model, x, [pair])
    shared = nn.Tanh()
    with pytest.raises(UnknownLayer, match="ran 2 times"):
        partial_jacobians(nn.Sequential(shared, nn.Linear(5, 5), shared), x, [("0", None)])
    recurrent = nn.Sequential(nn.LSTM(5, 3, batch_first=True))
    with pytest.raises(UnknownLayer, match="returned tuple"):
        partial_jacobians(recurrent, x[:, None], [(None, "0")])


def test_model_is_left_as_found(stack):
    model, x = stack
    partial_jacobians(model, x, [("1", "3")])
    with pytest.raises(UnknownLayer):
        partial_jacobians(model, x, [("3", "1")])
    assert all(not module._forward_hooks for module in model.modules())
