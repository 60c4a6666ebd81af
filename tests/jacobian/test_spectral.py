import dataclasses
import itertools
import math
import warnings

import pytest
import torch
from benchmarks.models import mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.jacobian.cases import CASES, IDS, SPECTRA, linear_map, oracle, with_spectrum
from torch import nn

from jacnorm.jacobian import (
    MESSAGES,
    NonFiniteValue,
    NotConvergedWarning,
    OptionError,
    Outcome,
    jacobian,
    spectral_norm,
)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["auto", "rows", "krylov"])
def test_value_and_interval_against_the_materialised_jacobian(case, dtype, method):
    model, x = case.build(dtype)
    result = spectral_norm(model, x, method=method, rtol=1e-4, max_pairs=200)
    expected = torch.linalg.svdvals(oracle(model, x))[:, 0]
    assert result.value.dtype == torch.float64
    assert result.dtype == dtype
    torch.testing.assert_close(result.value, expected, rtol=1e-4 if method == "krylov" else 2e-6, atol=0)
    assert bool((result.lower <= expected).all())
    assert bool((expected <= result.upper).all())
    assert bool(result.converged.all())
    assert bool((result.upper - result.lower <= 1e-4 * result.upper).all())


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_jacobian_is_the_materialised_one(case):
    model, x = case.build()
    torch.testing.assert_close(jacobian(model, x).double(), oracle(model, x), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(150, 150), (150, 200), (200, 150)])
def test_linear_maps_of_chosen_spectrum(name, shape):
    f = linear_map(with_spectrum(SPECTRA[name], *shape))
    result = spectral_norm(f, torch.ones(2, shape[1], dtype=torch.float64), method="krylov", rtol=1e-3, max_pairs=150)
    top = SPECTRA[name].max().double()
    assert bool(result.converged.all())
    assert bool(((result.lower <= top) & (top <= result.upper)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["rank two", "isometry"])
def test_an_exhausted_krylov_space_does_no_harm(name, dtype):
    """The process goes on with rounding noise once the space is used up; the interval must still hold."""
    f = linear_map(with_spectrum(SPECTRA[name], 150, 150).to(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        result = spectral_norm(f, torch.ones(1, 150, dtype=dtype), method="krylov", rtol=1e-14, max_pairs=40)
    top = SPECTRA[name].max().double()
    assert result.lower.item() <= top <= result.upper.item()
    assert result.value.item() == pytest.approx(top.item(), rel=2e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("method", ["rows", "krylov"])
def test_zero_jacobian_is_exactly_zero(method):
    result = spectral_norm(lambda x: 0 * x, torch.ones(2, 100), method=method)
    for field in (result.value, result.lower, result.upper):
        assert field.tolist() == [0.0, 0.0]
    assert result.log_value.tolist() == [-math.inf] * 2
    assert bool(result.converged.all())


def test_norms_far_outside_the_range_of_squares():
    for scale in (1e-30, 1e30):
        result = spectral_norm(lambda x, scale=scale: scale * x, torch.ones(1, 100), method="krylov", rtol=1e-2)
        assert result.value.item() == pytest.approx(scale, rel=1e-5)


@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100))
@settings(deadline=None, max_examples=15)
def test_invariance_under_rotations_and_scaling(seed, scale):
    """|c Q J P| = |c| |J| for orthogonal Q, P."""
    generator = torch.Generator().manual_seed(seed)
    a, q, p = (torch.randn(80, 80, generator=generator, dtype=torch.float64) for _ in range(3))
    q, p = torch.linalg.qr(q)[0], torch.linalg.qr(p)[0]
    x = torch.randn(1, 80, generator=generator, dtype=torch.float64)
    plain = spectral_norm(lambda x: torch.tanh(x) @ a, x, rtol=1e-6, max_pairs=80)
    turned = spectral_norm(lambda x: scale * (torch.tanh(x @ p @ p.mT) @ a) @ q, x, rtol=1e-6, max_pairs=80)
    assert turned.value.item() == pytest.approx(scale * plain.value.item(), rel=2e-6)


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=15)
def test_composition_is_bounded_by_the_product_of_norms(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(70, 70, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.randn(2, 70, generator=generator, dtype=torch.float64)
    inner, outer = (lambda x: torch.tanh(x @ a)), (lambda x: torch.sin(x @ b))
    both = spectral_norm(lambda x: outer(inner(x)), x)
    assert bool((both.lower <= spectral_norm(inner, x).upper * spectral_norm(outer, inner(x)).upper).all())


def test_values_do_not_depend_on_the_split_of_the_batch():
    model, x = CASES[0].build()
    whole = spectral_norm(model, x)
    pieces = spectral_norm(model, x, memory_limit=1)  # one sample at a time
    by_hand = [spectral_norm(model, sample[None], family=len(x)) for sample in x]
    torch.testing.assert_close(pieces.value, whole.value, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([r.value for r in by_hand]), whole.value, rtol=1e-6, atol=0)
    assert pieces.pulls.tolist() == whole.pulls.tolist()


def test_coverage_of_the_upper_bound_over_seeds():
    """At confidence 0.5 and a coarse tolerance, at least half of the seeds cover, up to 3 standard errors."""
    matrix = with_spectrum(SPECTRA["isolated"], 150, 150)
    x = torch.ones(1, 150, dtype=torch.float64)
    covered = [
        spectral_norm(
            linear_map(matrix), x, method="krylov", rtol=0.1, confidence=0.5, seed=seed, check=False
        ).upper.item()
        >= 1.1 * (1 - 1e-9)
        for seed in range(200)
    ]
    assert sum(covered) >= 100 - 3 * math.sqrt(50)


def test_samples_leave_the_batch_with_the_passes_they_needed():
    """One easy sample among hard ones: it stops early, the others go on alone, all keep their own counts."""
    easy = with_spectrum(10.0 ** -torch.arange(150.0), 150, 150)
    hard = with_spectrum(SPECTRA["clustered"], 150, 150)

    def f(x):
        return torch.where(x[:, :1] > 0, x @ easy.mT, x @ hard.mT)

    x = torch.ones(6, 150, dtype=torch.float64)
    x[4:] = -1
    result = spectral_norm(f, x, method="krylov", rtol=1e-3)
    assert int(result.pulls[:4].max()) < int(result.pulls[4:].min())
    torch.testing.assert_close(result.value, torch.ones(6, dtype=torch.float64), rtol=1e-3, atol=0)


def test_cost_of_a_small_side_is_that_many_pulls():
    calls = 0
    model, x = CASES[2].build()

    def f(x):
        nonlocal calls
        calls += 1
        return model(x)

    result = spectral_norm(f, x)
    assert result.pulls.tolist() == [7] * 4
    assert result.pushes.tolist() == [0] * 4
    assert calls == 4  # two on two samples (probe of memory, checks), one on every second sample (independence)


def test_pairs_needed_by_a_random_tanh_network():
    """A 95 % interval of relative width 1e-2 takes about 15 pairs, one of 1e-3 about 20 (median)."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        widths = [784, *[1000] * 5, 784]
        layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        x = torch.randn(8, 784)
    model = nn.Sequential(*[module for layer in layers for module in (layer, nn.Tanh())][:-1])
    for rtol, pairs in ((1e-2, 17), (1e-3, 22)):
        result = spectral_norm(model, x, rtol=rtol, family=1)
        assert bool(result.converged.all())
        assert result.pulls.double().median() <= pairs


def test_golden_norm_of_a_critical_relu_network():
    """Three square layers of variance 2/n, ReLU between them: 5.2955 in the limit of width (no end masks)."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        values = [spectral_norm(mlp([600] * 4, nn.ReLU, math.sqrt(2)), torch.randn(2, 600)).value for _ in range(4)]
    assert torch.cat(values).mean().item() == pytest.approx(5.2955, rel=0.04)


def test_an_unlucky_start_shows_where_the_bound_is_below_the_value():
    """With nearly all starts allowed to fail, some bounds do; upper is still never below the certain lower bound."""
    matrix = with_spectrum(SPECTRA["isolated"], 150, 150)
    x = torch.ones(1, 150, dtype=torch.float64)
    for seed in range(20):
        result = spectral_norm(
            linear_map(matrix), x, method="krylov", rtol=0.3, confidence=1e-6, seed=seed, check=False
        )
        assert result.lower.item() <= result.value.item() <= result.upper.item()


def test_non_finite_products_name_the_right_sample_after_others_have_left():
    """Samples 0-3 stop early and leave the batch; the next products of sample 5 overflow."""
    easy = with_spectrum(10.0 ** -torch.arange(150.0), 150, 150)
    hard = with_spectrum(SPECTRA["clustered"], 150, 150)
    calls = 0

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            nonlocal calls
            calls += 1
            if len(g) == 2 and calls > 12:
                g = g * torch.tensor([[1.0], [math.nan]], dtype=g.dtype)
            return g.clone()

    def f(x):
        return torch.where(x[:, :1] > 0, Breaks.apply(x) @ easy.mT, Breaks.apply(x) @ hard.mT)

    x = torch.ones(6, 150, dtype=torch.float64)
    x[4:] = -1
    with pytest.raises(NonFiniteValue, match="sample 5"):
        spectral_norm(f, x, method="krylov", rtol=1e-3, check=False)


def test_no_convergence_returns_value_bound_and_a_warning():
    f = linear_map(with_spectrum(SPECTRA["clustered"], 150, 150))
    with pytest.warns(NotConvergedWarning, match="spectral_norm: 2 of 2 samples .*Raise max_pairs"):
        result = spectral_norm(f, torch.ones(2, 150, dtype=torch.float64), method="krylov", rtol=1e-6, max_pairs=5)
    assert result.converged.tolist() == [False, False]
    assert result.reasons() == [MESSAGES[Outcome.PAIR_LIMIT]] * 2
    assert bool(((result.lower <= 1) & (result.upper >= 1)).all())


def test_tolerance_below_the_resolution_says_so():
    for method in ("rows", "krylov"):
        with pytest.warns(NotConvergedWarning, match="float64"):
            result = spectral_norm(torch.tanh, torch.ones(1, 100), method=method, rtol=1e-9)
        assert result.outcome.tolist() == [int(Outcome.RESOLUTION)]


def test_results_are_frozen_and_every_outcome_has_words():
    result = spectral_norm(torch.tanh, torch.ones(1, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.value = None
    assert set(MESSAGES) == set(Outcome)
    assert result.reasons() == [MESSAGES[Outcome.CONVERGED]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rtol": 0.0}, "rtol"),
        ({"confidence": 1.0}, "confidence"),
        ({"max_pairs": 0}, "max_pairs"),
        ({"family": 0}, "family"),
        ({"method": "power"}, "method must be one of"),
        ({"memory_limit": 0}, "memory_limit"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(OptionError, match=words):
        spectral_norm(torch.tanh, torch.ones(1, 3), **options)
