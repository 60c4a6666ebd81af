"""Golden values of the limits, their asymptotics, and their agreement with minimisation and with random matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.special import erfc

from jacnorm.studies.stability import theory

# m: gamma_m, both ends masked, one end, no end (four decimals; all square, ReLU with sigma_w2 = 2)
LIMITS = {
    1: (2.0000, 2.0000, 2.4142, 2.8284),
    2: (2.5981, 2.5981, 3.3302, 4.1996),
    3: (3.0792, 3.0792, 4.0568, 5.2955),
    5: (3.8639, 3.8639, 5.2223, 7.0302),
    10: (5.3415, 5.3415, 7.3764, 10.1751),
    20: (7.4645, 7.4645, 10.4285, 14.5651),
    30: (9.1052, 9.1052, 12.7715, 17.9118),
    50: (11.7163, 11.7163, 16.4875, 23.2006),
    100: (16.5283, 16.5283, 23.3165, 32.8922),
}

# sparsity: (1-s)^(-1/2), alpha_mag, unscaled slope, slope of magnitude under (1-s)^(-1/2), mean-field SNIP factor
FACTORS = {
    0.5: (1.4142, 1.0377, -0.0370, 0.3096, 1.134),
    0.8: (2.2361, 1.2405, -0.2155, 0.5892, 1.468),
    0.9: (3.1623, 1.5088, -0.4113, 0.7400, 1.850),
    0.95: (4.4721, 1.8929, -0.6381, 0.8598, 2.379),
    0.99: (10.000, 3.4403, -1.2356, 1.0670, None),
}


def minimised(log_x):
    """Log-norm by SciPy's bounded minimiser over log psi, which shares no step with the root finding under test."""
    return 0.5 * minimize_scalar(log_x, bounds=(-15, 15), method="bounded", options={"xatol": 1e-10}).fun


@pytest.mark.parametrize("m", LIMITS)
def test_limit_table(m):
    found = (theory.gamma_m(m), *(theory.relu_limit(m, ends) for ends in ("both", "one", "none")))
    assert found == pytest.approx(LIMITS[m], abs=5.1e-5)


@given(m=st.integers(1, 400), data=st.data())
def test_masked_products_are_the_minimum_of_the_general_formula(m, data):
    q = data.draw(st.integers(0, m + 1))
    keep = data.draw(st.floats(0.05, 1.0))
    sigma_w2 = data.draw(st.floats(0.1, 5.0))

    def log_x(u):
        psi = math.exp(u)
        return math.log1p(psi) - u + m * math.log(sigma_w2) + (m - q) * math.log1p(psi) + q * math.log(keep + psi)

    assert theory.log_masked_product_norm(m, q, sigma_w2, keep) == pytest.approx(minimised(log_x), abs=1e-9)


@given(m=st.integers(1, 3000))
def test_closed_forms_are_the_general_formula(m):
    assert theory.log_relu_limit(m, "both") == pytest.approx(theory.log_masked_product_norm(m, m + 1), abs=1e-10)
    assert theory.log_relu_limit(m, "one") == pytest.approx(theory.log_masked_product_norm(m, m), abs=1e-10)
    assert theory.log_gamma_m(m) == pytest.approx(theory.log_masked_product_norm(m, 0, sigma_w2=1.0), abs=1e-10)


@given(m=st.integers(1, 200))
def test_each_end_without_a_mask_raises_the_norm_by_at_most_root_two(m):
    both, one, none = (theory.log_relu_limit(m, ends) for ends in ("both", "one", "none"))
    assert 0 < one - both < 0.5 * math.log(2)
    assert 0 < none - one < 0.5 * math.log(2)


def test_norms_grow_like_the_square_root_of_depth():
    m = 10_000
    assert theory.gamma_m(m) == pytest.approx(math.sqrt(math.e * (m + 1)), rel=1e-4)
    assert theory.relu_limit(m, "one") == pytest.approx(math.sqrt(2 * math.e * m), rel=1e-3)
    assert theory.relu_limit(m, "none") == pytest.approx(math.sqrt(4 * math.e * m), rel=1e-3)


def test_gamma_is_a_ratio_of_whole_numbers():
    for m in (1, 2, 7, 30, 1000):
        exact = 0.5 * ((m + 1) * math.log(m + 1) - m * math.log(m))
        assert theory.log_gamma_m(m) == pytest.approx(exact, abs=1e-10)
    assert math.isfinite(theory.log_gamma_m(10**9))


@pytest.mark.parametrize(("depth", "expected"), [(3, 0.706), (10, 1.030), (20, 1.262)])
def test_rectangular_golden_values(depth, expected):
    widths = [784] + [256] * (depth - 1) + [10]
    assert theory.log_network_norm(widths) == pytest.approx(expected, abs=5.1e-4)


def test_rectangular_of_square_layers_is_the_square_formula():
    for m in (1, 2, 10, 50):
        assert theory.log_network_norm([64] * (m + 1)) == pytest.approx(theory.log_relu_limit(m, "none"), abs=1e-10)
        assert theory.log_network_norm([64] * (m + 1), 1.0, "linear") == pytest.approx(theory.log_gamma_m(m), abs=1e-10)


def test_one_rectangular_layer_has_the_marchenko_pastur_edge():
    assert theory.log_rectangular_norm([784, 256], [1 / 784]) == pytest.approx(math.log(1 + math.sqrt(256 / 784)))


@given(
    widths=st.lists(st.integers(1, 5000), min_size=2, max_size=12),
    variance=st.floats(1e-4, 10.0),
)
def test_rectangular_is_the_minimum_and_is_unchanged_by_transposition(widths, variance):
    variances = [variance] * (len(widths) - 1)

    def log_x(u):
        big_m = math.exp(u)
        layers = sum(math.log(variance * (width + widths[0] * big_m)) for width in widths[1:])
        return math.log1p(big_m) - u + layers

    found = theory.log_rectangular_norm(widths, variances)
    assert found == pytest.approx(minimised(log_x), abs=1e-8)
    assert found == pytest.approx(theory.log_rectangular_norm(widths[::-1], variances), abs=1e-9)


@pytest.mark.parametrize(("ends", "masks"), [("both", (True, True)), ("one", (False, True)), ("none", (False, False))])
def test_limits_against_random_products(ends, masks):
    # Three layers of 500 units; the relative fluctuation of such norms is a few per cent.
    rng = np.random.default_rng(0)
    n, m = 500, 3
    product = np.diag(rng.random(n) < 0.5) if masks[0] else np.eye(n)
    for layer in range(m):
        product = rng.standard_normal((n, n)) * math.sqrt(2 / n) @ product
        if layer < m - 1 or masks[1]:
            product = (rng.random(n) < 0.5)[:, None] * product
    assert np.linalg.norm(product, 2) == pytest.approx(theory.relu_limit(m, ends), rel=0.08)


@pytest.mark.parametrize("sigma_w2", [1.0, 1.5, 2.0, 2.5, 4.0])
def test_slopes_off_criticality(sigma_w2):
    assert theory.slope(sigma_w2) == pytest.approx(0.5 * math.log(sigma_w2 / 2))
    assert theory.slope(sigma_w2, "linear") == pytest.approx(0.5 * math.log(sigma_w2))
    # The exponent is what the product formula gains per layer, up to the square-root growth at criticality.
    gained = theory.log_masked_product_norm(4000, 4000, sigma_w2) - theory.log_masked_product_norm(2000, 2000, sigma_w2)
    assert (gained - 0.5 * math.log(2)) / 2000 == pytest.approx(theory.slope(sigma_w2), abs=1e-6)


def test_tanh_is_critical_at_one_and_gains_above():
    assert theory.chi(0.8, "tanh") == 0.8
    assert theory.slope(1.0, "tanh") == 0.0
    assert 1 < theory.chi(1.2, "tanh") < theory.chi(2.0, "tanh") < 2.0
    rng = np.random.default_rng(1)
    z2 = 1.0  # iterate the length map on a large sample instead of solving for its fixed point
    sample = rng.standard_normal(400_000)
    for _ in range(60):
        z2 = 2.0 * np.mean(np.tanh(math.sqrt(z2) * sample) ** 2)
    by_sampling = 2.0 * np.mean((1 - np.tanh(math.sqrt(z2) * sample) ** 2) ** 2)
    assert theory.chi(2.0, "tanh") == pytest.approx(by_sampling, rel=5e-3)


def test_finite_width_law_of_a_vector():
    # A critical ReLU layer with independent Bernoulli diagonals maps a unit vector to squared length
    # (2/n) sum_i b_i g_i^2; depth multiplies independent copies.
    width, depth, draws = 64, 10, 20_000
    rng = np.random.default_rng(2)
    log_gain = np.zeros(draws)
    for _ in range(depth):
        active = rng.binomial(width, 0.5, size=draws)
        log_gain += np.log(2 / width * rng.chisquare(active))
    law = theory.finite_width_log_gain(depth, width)
    assert law == (-2.5 * depth / width, 5 * depth / width)
    # Corrections of the next order in 1/n are a few per cent at n = 64; 1.5 instead of 2.5 would be 40 % off.
    assert log_gain.mean() == pytest.approx(law.mean, rel=0.08)
    assert log_gain.var() == pytest.approx(law.variance, rel=0.12)


@pytest.mark.parametrize("sparsity", FACTORS)
def test_factor_table(sparsity):
    inverse_sqrt, magnitude, unscaled, misscaled, snip = FACTORS[sparsity]
    assert theory.alpha_random(sparsity) == pytest.approx(inverse_sqrt, abs=5.1e-5)
    assert theory.alpha_mag(sparsity) == pytest.approx(magnitude, abs=5.1e-5)
    assert theory.pruned_slope("magnitude", sparsity) == pytest.approx(unscaled, abs=5.1e-5)
    found = theory.pruned_slope("magnitude", sparsity, theory.alpha_random(sparsity))
    assert found == pytest.approx(misscaled, abs=5.1e-5)
    if snip is not None:
        assert theory.alpha_snip(sparsity) == pytest.approx(snip, abs=1.1e-3)  # the table is a Monte Carlo


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [(0.1, -0.0527), (0.3, -0.1783), (0.5, -0.3466), (0.7, -0.6020), (0.8, -0.8047), (0.9, -1.1513), (0.99, -2.3026)],
)
def test_unscaled_random_slopes(sparsity, expected):
    assert theory.pruned_slope("random", sparsity) == pytest.approx(expected, abs=5.1e-5)


@given(sparsity=st.floats(0.0, 0.999))
def test_the_right_factor_leaves_no_slope_and_methods_are_ordered(sparsity):
    alphas = {"random": theory.alpha_random, "snip": theory.alpha_snip, "magnitude": theory.alpha_mag}
    for method, alpha in alphas.items():
        assert theory.pruned_slope(method, sparsity, alpha(sparsity)) == pytest.approx(0, abs=1e-12)
    # Magnitude keeps the most second moment of any mask of this density, random the least of the three.
    kept = [theory.retained_second_moment(method, sparsity) for method in alphas]
    assert kept[0] <= kept[1] + 1e-12 <= kept[2] + 2e-12 <= 1 + 3e-12


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
def test_retained_second_moments_by_quadrature(sparsity):
    def density(w):
        return math.exp(-w * w / 2) / math.sqrt(2 * math.pi)

    def tail(function):
        return 2 * quad(function, 0, 12, epsabs=1e-12, limit=400)[0]

    def solve(survival):
        low, high = 1e-9, 12.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if survival(middle) > 1 - sparsity else (low, middle)
        return low

    t = solve(lambda u: erfc(u / math.sqrt(2)))
    magnitude = 2 * quad(lambda w: w * w * density(w), t, 12, epsabs=1e-12)[0]
    assert theory.retained_second_moment("magnitude", sparsity) == pytest.approx(magnitude, abs=1e-8)
    t = solve(lambda u: tail(lambda w: density(w) * erfc(u / (w * math.sqrt(2))) if w else 0.0))
    snip = tail(lambda w: w * w * density(w) * erfc(t / (w * math.sqrt(2))) if w else 0.0)
    assert theory.retained_second_moment("snip", sparsity) == pytest.approx(snip, abs=1e-7)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_sparsity_outside_zero_to_one_is_refused(sparsity):
    for function in (theory.alpha_random, theory.alpha_mag, theory.alpha_snip):
        with pytest.raises(ValueError, match="fraction of weights removed"):
            function(sparsity)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.log_gamma_m(0), "m is 0"),
        (lambda: theory.log_relu_limit(0, "one"), "m is 0"),
        (lambda: theory.log_relu_limit(2, "left"), "ends is 'left'"),
        (lambda: theory.log_masked_product_norm(3, 5), "room for 0 to 4"),
        (lambda: theory.log_masked_product_norm(3, -1), "room for 0 to 4"),
        (lambda: theory.log_masked_product_norm(3, 1, sigma_w2=0.0), "must be positive"),
        (lambda: theory.log_masked_product_norm(3, 1, keep=1.5), "keep at most 1"),
        (lambda: theory.log_rectangular_norm([3, 4], [1.0, 1.0]), "2 widths and 2 variances"),
        (lambda: theory.log_rectangular_norm([3], []), "1 widths and 0 variances"),
        (lambda: theory.log_rectangular_norm([3, 0], [1.0]), "must be positive"),
        (lambda: theory.log_network_norm([3, 4], 2.0, "tanh"), "activation is 'tanh'"),
        (lambda: theory.chi(0.0), "variance must be positive"),
        (lambda: theory.chi(1.0, "gelu"), "relu, tanh or linear"),
        (lambda: theory.finite_width_log_gain(0, 8), "depth is 0"),
        (lambda: theory.finite_width_log_gain(8, 0), "width is 0"),
        (lambda: theory.retained_second_moment("grasp", 0.5), "method is 'grasp'"),
        (lambda: theory.pruned_slope("random", 0.5, 0.0), "factor is 0.0"),
    ],
)
def test_impossible_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
