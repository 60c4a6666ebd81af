import math

import pytest
import torch
from scipy import stats
from tests.jacobian.cases import SPECTRA, with_spectrum

from jacnorm.jacobian.bounds import log_start_threshold, upper_bound
from jacnorm.jacobian.errors import OptionError
from jacnorm.jacobian.lanczos import GolubKahan, top_ritz

STARTS = 400


@pytest.mark.parametrize("d", [2, 3, 10, 784, 32768, 10**6])
@pytest.mark.parametrize("eps", [0.5, 0.05, 0.05 / 64, 1e-6])
def test_threshold_is_the_beta_quantile(d, eps):
    expected = 0.5 * math.log(stats.beta.ppf(eps, 0.5, (d - 1) / 2))
    assert log_start_threshold(d, eps) == pytest.approx(expected, abs=1e-8)


def test_threshold_in_one_dimension_is_one():
    assert log_start_threshold(1, 0.05) == 0.0


@pytest.mark.parametrize(("d", "eps"), [(0, 0.1), (5, 0.0), (5, 1.0)])
def test_threshold_refuses_impossible_arguments(d, eps):
    with pytest.raises(OptionError, match="start vector"):
        log_start_threshold(d, eps)


def runs(matrix: torch.Tensor, steps: int) -> GolubKahan:
    """Many random starts as one batch, in float64."""
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(STARTS, matrix.shape[1], generator=generator, dtype=torch.float64)
    start = start / start.norm(dim=1, keepdim=True)
    process = GolubKahan(lambda p: p @ matrix.mT, lambda q: q @ matrix, start)
    for _ in range(steps):
        process.step()
    return process


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("eps", [0.05, 0.5])
def test_bound_covers_over_random_starts_at_every_step(name, eps):
    """The bound may fail for a share eps of the starts, at all steps together: 3 binomial standard errors of slack."""
    matrix = with_spectrum(SPECTRA[name], 150, 150)
    top = SPECTRA[name].max().double()
    process = runs(matrix, 24)
    log_delta = log_start_threshold(150, eps)
    failed = torch.zeros(STARTS, dtype=torch.bool)
    for k in range(1, 25):
        _, bound = upper_bound(process.alpha[:, :k], process.beta[:, :k], log_delta)
        failed |= bound < top * (1 - 1e-12)
        lower, _ = top_ritz(process.alpha[:, :k], process.beta[:, :k])
        assert bool((lower <= top * (1 + 1e-12)).all())
    assert failed.double().mean() <= eps + 3 * math.sqrt(eps * (1 - eps) / STARTS)


def test_bound_is_not_vacuous():
    """With half of the starts allowed to fail, a fair share does (here by the one-step bound): the bound has no fat."""
    matrix = with_spectrum(torch.tensor([1.0, 0.999]), 40, 40)
    process = runs(matrix, 1)
    _, bound = upper_bound(process.alpha, process.beta, log_start_threshold(40, 0.5))
    assert 0.1 < (bound < 1).double().mean() <= 0.5 + 3 * math.sqrt(0.25 / STARTS)


def test_bound_solves_its_equation():
    process = runs(with_spectrum(SPECTRA["isolated"], 150, 150), 8)
    log_delta = log_start_threshold(150, 0.05)
    ritz, bound = upper_bound(process.alpha, process.beta, log_delta)
    bidiagonal = torch.diag_embed(process.alpha) + torch.diag_embed(process.beta[:, :-1], 1)
    theta = torch.linalg.svdvals(bidiagonal)
    torch.testing.assert_close(ritz, theta[:, 0])
    log_p = (bound[:, None] ** 2 - theta**2).log().sum(1) - (process.alpha * process.beta).log().sum(1)
    torch.testing.assert_close(log_p, torch.full_like(log_p, -log_delta), rtol=1e-8, atol=0)


def test_exhausted_space_and_zero_map():
    zero = torch.zeros(3, 2, dtype=torch.float64)
    assert [t.tolist() for t in upper_bound(zero, zero, -5.0)] == [[0.0] * 3] * 2
    alpha, beta = torch.tensor([[2.0, 1.0]], dtype=torch.float64), torch.tensor([[0.5, 0.0]], dtype=torch.float64)
    ritz, bound = upper_bound(alpha, beta, -5.0)
    assert ritz.item() == bound.item()


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_bound_is_free_of_scale(scale):
    process = runs(with_spectrum(SPECTRA["isolated"], 150, 150), 6)
    one = upper_bound(process.alpha, process.beta, -4.0)[1]
    torch.testing.assert_close(upper_bound(scale * process.alpha, scale * process.beta, -4.0)[1] / scale, one)
