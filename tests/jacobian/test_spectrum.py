import math
import warnings

import pytest
import torch
from tests.jacobian.cases import CASES, IDS, SPECTRA, linear_map, oracle, with_spectrum

from jacnorm.jacobian import NotConvergedWarning, OptionError, Outcome, condition_number, log_volume, singular_values


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_values_against_the_materialised_jacobian(case, dtype):
    model, x = case.build(dtype)
    result = singular_values(model, x)
    expected = torch.linalg.svdvals(oracle(model, x))
    assert result.value.shape == expected.shape
    assert bool(((result.value - expected).abs() <= 2e-6 * expected[:, :1]).all())
    assert bool(((result.lower <= expected) & (expected <= result.upper)).all())


def test_float64_keeps_values_that_a_gram_matrix_would_lose():
    f = linear_map(with_spectrum(10 ** torch.linspace(0, -12, 40, dtype=torch.float64), 50, 60))
    result = singular_values(f, torch.ones(1, 60, dtype=torch.float64))
    torch.testing.assert_close(result.value[0, 39].item(), 1e-12, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(150, 150), (150, 180), (180, 150)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_krylov_brackets_the_top_values_with_their_copies(name, shape, dtype):
    """Multiple values are the hard case: one start vector cannot see a second copy."""
    f = linear_map(with_spectrum(SPECTRA[name], *shape).to(dtype))
    expected = torch.nn.functional.pad(SPECTRA[name].double(), (0, 4))[:4]
    result = singular_values(f, torch.ones(2, shape[1], dtype=dtype), 4, method="krylov", rtol=1e-2, max_pairs=150)
    assert bool(((result.lower <= expected) & (expected <= result.upper)).all())
    assert bool(result.converged.all())
    torch.testing.assert_close(result.value, expected.expand(2, 4), rtol=0, atol=1e-2 * expected[0].item())


def test_krylov_on_a_network_agrees_with_rows():
    model, x = CASES[1].build()
    rows = singular_values(model, x, 3, method="rows")
    krylov = singular_values(model, x, 3, method="krylov")
    assert krylov.method == "krylov with deflation, pushes by double backward"
    torch.testing.assert_close(krylov.value, rows.value, rtol=1e-3, atol=0)
    assert bool((krylov.lower <= rows.upper).all())
    assert bool((rows.lower <= krylov.upper).all())


def test_too_few_pairs_warn_and_the_interval_still_holds():
    f = linear_map(with_spectrum(SPECTRA["clustered"], 150, 150))
    with pytest.warns(NotConvergedWarning, match="singular_values"):
        result = singular_values(f, torch.ones(1, 150, dtype=torch.float64), 3, method="krylov", rtol=1e-5, max_pairs=6)
    expected = SPECTRA["clustered"][:3].double()
    assert bool(((result.lower <= expected) & (expected <= result.upper)).all())
    assert not bool(result.converged.any())


def test_log_volume_of_a_square_map_is_the_log_determinant():
    matrix = with_spectrum(torch.linspace(3, 0.5, 20), 20, 20)
    result = log_volume(linear_map(matrix), torch.ones(2, 20, dtype=torch.float64))
    expected = torch.linalg.slogdet(matrix).logabsdet
    torch.testing.assert_close(result.value, expected.expand(2))
    assert bool(((result.lower <= expected) & (expected <= result.upper)).all())
    assert result.censored.tolist() == [False, False]


def test_condition_number_of_a_chosen_spectrum():
    f = linear_map(with_spectrum(torch.linspace(3, 0.5, 20), 20, 30))
    result = condition_number(f, torch.ones(1, 30, dtype=torch.float64))
    assert result.value.item() == pytest.approx(6.0)
    assert result.lower.item() <= 6.0 <= result.upper.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_the_dtype_cannot_resolve_is_censored(dtype):
    """Values down to 1e-8: float32 resolves 2e-6 of the largest and must say so; float64 resolves them all."""
    f = linear_map(with_spectrum(SPECTRA["geometric"], 150, 150).to(dtype))
    x = torch.ones(1, 150, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NotConvergedWarning)
        volume, condition = log_volume(f, x), condition_number(f, x)
    expected = SPECTRA["geometric"].double().log().sum().item()
    coarse = dtype == torch.float32
    assert volume.censored.tolist() == condition.censored.tolist() == [coarse]
    assert len(caught) == (2 if coarse else 0)
    if coarse:
        assert volume.outcome.tolist() == [int(Outcome.CENSORED)]
        assert volume.floor.item() == pytest.approx(16 * torch.finfo(dtype).eps, rel=1e-3)
        assert volume.lower.item() == -math.inf
        assert volume.value.item() > expected
        assert condition.upper.item() == math.inf
        assert condition.value.item() == pytest.approx(1 / (16 * torch.finfo(dtype).eps), rel=1e-3)
    else:
        assert volume.value.item() == pytest.approx(expected, rel=1e-6)
        assert condition.value.item() == pytest.approx(1e8, rel=1e-4)
    assert condition.lower.item() <= 1e8 <= condition.upper.item() * (1 + 1e-6)
    assert volume.lower.item() <= expected <= volume.upper.item()


def test_zero_jacobian_has_no_volume_and_no_condition():
    with pytest.warns(NotConvergedWarning):
        assert log_volume(lambda x: 0 * x, torch.ones(1, 3)).value.item() == -math.inf
    with pytest.warns(NotConvergedWarning):
        assert condition_number(lambda x: 0 * x, torch.ones(1, 3)).value.item() == math.inf


@pytest.mark.parametrize(
    ("k", "method", "words"),
    [
        (0, "auto", "at least 1"),
        (4, "auto", "has 3"),
        (4, "rows", "has 3"),
        (None, "krylov", "give k"),
        (1, "qr", "method"),
    ],
)
def test_options_out_of_range(k, method, words):
    with pytest.raises(OptionError, match=words):
        singular_values(torch.tanh, torch.ones(1, 3), k, method=method)
