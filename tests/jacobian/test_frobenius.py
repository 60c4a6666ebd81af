import math

import pytest
import torch
from scipy import stats
from tests.jacobian.cases import CASES, IDS, SPECTRA, linear_map, oracle, with_spectrum

from jacnorm.jacobian import NotConvergedWarning, OptionError, Outcome, frobenius_norm
from jacnorm.jacobian.frobenius import student_quantile


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_exact(case, dtype):
    model, x = case.build(dtype)
    result = frobenius_norm(model, x, method="rows")
    expected = oracle(model, x).norm(dim=(1, 2))
    torch.testing.assert_close(result.value, expected, rtol=2e-6, atol=0)
    assert bool(((result.lower <= expected) & (expected <= result.upper)).all())
    assert result.standard_error.tolist() == [0.0] * len(x)
    assert bool(result.converged.all())


@pytest.mark.parametrize("pairs", [0, 8])
@pytest.mark.parametrize("shape", [(150, 170), (170, 150)])
def test_probes_cover_and_their_standard_error_is_the_observed_one(pairs, shape):
    matrix = with_spectrum(SPECTRA["isolated"], *shape)
    expected = matrix.norm().item()
    x = torch.ones(1, shape[1], dtype=torch.float64)
    results = [
        frobenius_norm(linear_map(matrix), x, method="hutchinson", pairs=pairs, samples=12, seed=7 * seed, check=False)
        for seed in range(300)
    ]
    values = torch.cat([result.value for result in results])
    claimed = torch.cat([result.standard_error for result in results]).square().mean().sqrt().item()
    assert (values.std() / claimed).item() == pytest.approx(1, abs=0.2)
    assert values.square().mean().item() == pytest.approx(expected**2, abs=4 * 2 * expected * claimed / math.sqrt(300))
    covered = sum(result.lower.item() <= expected <= result.upper.item() for result in results)
    assert covered >= 300 * 0.95 - 3 * math.sqrt(300 * 0.95 * 0.05)


def test_krylov_vectors_take_the_uncertainty_out_of_a_steep_spectrum():
    f = linear_map(with_spectrum(10.0 ** -torch.arange(150.0), 150, 150))
    x = torch.ones(1, 150, dtype=torch.float64)
    errors = [
        frobenius_norm(f, x, method="hutchinson", pairs=pairs, rtol=0.9).standard_error.item() for pairs in (0, 8)
    ]
    assert errors[1] < 1e-3 * errors[0]


def test_a_basis_of_the_whole_space_is_exact_and_zero_is_zero():
    result = frobenius_norm(torch.tanh, torch.zeros(2, 5), method="hutchinson", pairs=8)
    torch.testing.assert_close(result.value, torch.full((2,), math.sqrt(5), dtype=torch.float64), rtol=1e-6, atol=0)
    assert bool((result.standard_error < 1e-7).all())
    result = frobenius_norm(lambda x: 0 * x, torch.ones(1, 80))
    assert [result.value.item(), result.lower.item(), result.upper.item()] == [0.0, 0.0, 0.0]


def test_probes_do_not_depend_on_the_split_and_few_probes_warn():
    model, x = CASES[0].build()
    whole = frobenius_norm(model, x)
    assert whole.method == "hutchinson by pulls, 8 Krylov vectors exact"
    assert whole.pulls.tolist() == [8 + 32] * len(x)
    torch.testing.assert_close(frobenius_norm(model, x, memory_limit=1).value, whole.value, rtol=1e-6, atol=0)
    with pytest.warns(NotConvergedWarning, match="Raise samples"):
        result = frobenius_norm(model, x, rtol=1e-4)
    assert result.outcome.tolist() == [int(Outcome.SAMPLING)] * len(x)


@pytest.mark.parametrize("freedom", [5, 11, 31])
@pytest.mark.parametrize("p", [0.75, 0.975, 0.995])
def test_student_quantile(freedom, p):
    assert student_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=0.01)


@pytest.mark.parametrize("options", [{"samples": 1}, {"pairs": -1}, {"method": "krylov"}, {"rtol": 2.0}])
def test_options_out_of_range(options):
    with pytest.raises(OptionError):
        frobenius_norm(torch.tanh, torch.ones(1, 3), **options)
