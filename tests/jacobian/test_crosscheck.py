import pytest
import torch
from tests.jacobian.cases import CASES, IDS
from torch import nn

from jacnorm.jacobian import (
    JacobianError,
    NotConvergedWarning,
    OptionError,
    Outcome,
    condition_number,
    cross_check,
    frobenius_norm,
    singular_values,
    spectral_norm,
)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_sound_measurements_agree(case):
    model, x = case.build()
    result = cross_check(model, x, samples=2)
    plain = spectral_norm(model, x)
    torch.testing.assert_close(result.measurement.lower, plain.lower)
    torch.testing.assert_close(result.measurement.upper, plain.upper)
    assert result.disagreement == 0
    assert len(result.samples) == 2
    assert result.in_float64.dtype == torch.float64
    first, other = result.measurement.method, result.by_other_method.method
    assert first.startswith("krylov") != other.startswith("krylov")


class Coarse(nn.Module):
    """A map that loses digits in float32 only: (x + 1e4) - 1e4 inside a curved function."""

    def forward(self, x):
        return torch.sin(40 * ((x + 1e4) - 1e4))


def test_rounding_inside_the_model_is_found_and_widens_the_interval():
    x = torch.linspace(0.01, 0.02, 240).reshape(3, 80)
    result = cross_check(Coarse(), x, samples=3)
    exact = (40 * torch.cos(40 * x.double())).abs().amax(1)
    assert result.disagreement > 1e-6
    assert result.measurement.outcome.tolist() == [int(Outcome.DISAGREEMENT)] * 3
    assert not bool(result.measurement.converged.any())
    assert bool(((result.measurement.lower <= exact) & (exact <= result.measurement.upper)).all())


def test_other_quantities_have_their_own_second_method():
    model, x = CASES[0].build()
    result = cross_check(model, x, measure=frobenius_norm, samples=2)
    assert result.measurement.method.startswith("hutchinson")
    assert result.by_other_method.method.startswith("rows")
    values = cross_check(model, x, measure=singular_values, k=2, samples=2)
    assert values.measurement.value.shape == (len(x), 2)
    assert values.disagreement == 0


def test_what_could_not_be_checked_is_said():
    model, x = CASES[0].build()
    result = cross_check(model, x, rows_up_to=10, samples=1)
    assert result.by_other_method is None
    assert result.skipped == ("other method: all rows of a Jacobian with min(m, n) above rows_up_to=10",)
    w = torch.eye(5)
    result = cross_check(lambda x: x @ w, torch.ones(2, 5))
    assert result.in_float64 is None
    assert "float64: f cannot be computed in torch.float64" in result.skipped[0]
    result = cross_check(torch.tanh, torch.ones(2, 5, dtype=torch.float64), measure=condition_number)
    assert result.skipped == (
        "other method: this quantity has one method only",
        "float64: the measurement is in float64 already",
    )


def test_refusals():
    with pytest.raises(OptionError, match="samples"):
        cross_check(torch.tanh, torch.ones(2, 5), samples=0)
    with (
        pytest.warns(NotConvergedWarning),
        pytest.raises(JacobianError, match="infinite value"),
    ):
        cross_check(lambda x: x * 1e-50, torch.ones(1, 2), measure=condition_number)  # zero in float32 only
