"""Interval estimates against closed forms, coverage over many draws, and behaviour at the edges.

The closed forms are independent of the code: textbook tables, the beta distribution, or counting.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from jacnorm.report.intervals import NoInterval, estimate, point_value, statistic_name


def test_student_interval_matches_the_textbook() -> None:
    found = estimate(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), "mean", "t", 0.95)
    half = 2.776445105198 * math.sqrt(2.5 / 5)  # t quantile with 4 degrees of freedom, printed in any table
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3.0 - half, 3.0 + half))
    assert found.standard_error == pytest.approx(math.sqrt(0.5))


def test_geometric_mean_is_the_mean_of_logarithms() -> None:
    logs = np.array([0.3, -0.2, 0.9, 1.4, 0.1])
    plain, geometric = estimate(logs, "mean", "t", 0.9), estimate(np.exp(logs), "geometric mean", "t", 0.9)
    assert geometric.log_scale
    assert (geometric.value, geometric.low, geometric.high) == pytest.approx(
        tuple(map(math.exp, (plain.value, plain.low, plain.high)))
    )
    assert geometric.standard_error == pytest.approx(geometric.value * plain.standard_error)


@pytest.mark.parametrize(("hits", "n"), [(0, 12), (12, 12), (3, 40), (7, 9)])
def test_clopper_pearson_matches_the_beta_quantiles(hits: int, n: int) -> None:
    found = estimate(np.r_[np.ones(hits), np.zeros(n - hits)], "proportion", "binomial", 0.95)
    low = beta.ppf(0.025, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, n - hits) if hits < n else 1.0
    assert (found.value, found.low, found.high) == pytest.approx((hits / n, low, high), abs=1e-9)
    assert (found.standard_error is None) == (hits in (0, n))


def test_order_statistics_have_the_counted_coverage() -> None:
    # P(Bin(10, 1/2) <= 1) = 11/1024, so [x_(2), x_(9)] covers with 0.979 and [x_(3), x_(8)] only with 0.891.
    found = estimate(np.arange(10.0), "median", "rank", 0.95)
    assert (found.value, found.low, found.high) == (4.5, 1.0, 8.0)
    with pytest.raises(NoInterval, match=r"order statistics at level 0\.95 need at least 6 samples, but there are 5"):
        estimate(np.arange(5.0), "median", "rank", 0.95)
    assert estimate(np.arange(6.0), "median", "rank", 0.95).low == 0.0


@pytest.mark.parametrize(
    ("statistic", "method", "draw", "truth"),
    [
        ("mean", "t", lambda r: r.normal(2.0, 3.0, 6), 2.0),
        ("geometric mean", "t", lambda r: r.lognormal(1.0, 2.0, 6), math.e),
        ("median", "rank", lambda r: r.exponential(1.0, 15), math.log(2)),
        ("proportion", "binomial", lambda r: (r.random(20) < 0.3).astype(float), 0.3),
    ],
)  # fmt: skip
def test_intervals_cover_the_truth(statistic, method, draw, truth) -> None:
    rng = np.random.default_rng(20)
    found = [estimate(draw(rng), statistic, method, 0.9) for _ in range(600)]
    covered = sum(e.low <= truth <= e.high for e in found) / len(found)
    assert covered >= 0.9 - 3 * math.sqrt(0.09 / 600)
    if method == "t":  # exact for normal logarithms; the other two are conservative by construction
        assert covered <= 0.9 + 3 * math.sqrt(0.09 / 600)


def test_bootstrap_covers_a_median_and_repeats_itself() -> None:
    rng = np.random.default_rng(3)
    draws = [rng.normal(size=25) for _ in range(40)]
    found = [estimate(draw, "median", "bootstrap", 0.9) for draw in draws]
    assert sum(e.low <= 0 <= e.high for e in found) >= 30  # Bin(40, 0.9) is below 30 with probability 0.001
    assert estimate(draws[0], "median", "bootstrap", 0.9) == found[0]


def ratio_of_means(rows: np.ndarray) -> float:
    return float(rows[:, 0].mean() / rows[:, 1].mean())


def test_rows_may_be_bootstrapped_with_a_function() -> None:
    rng = np.random.default_rng(5)
    rows = rng.normal((6.0, 2.0), 0.1, (30, 2))
    found = estimate(rows, ratio_of_means, "bootstrap", 0.95)
    assert found.value == pytest.approx(ratio_of_means(rows))
    assert found.low < 3.0 < found.high
    delta = 3.0 * math.hypot(0.1 / 6, 0.1 / 2) / math.sqrt(30)  # the delta method's standard error
    assert found.standard_error == pytest.approx(delta, rel=0.35)
    with pytest.raises(ValueError, match="the mean needs one number per seed"):
        estimate(rows, "mean", "bootstrap", 0.95)


finite = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


@settings(max_examples=25, deadline=None)
@given(samples=st.lists(finite, min_size=6, max_size=12), data=st.data())
def test_a_permutation_changes_no_bit(samples: list[float], data: st.DataObject) -> None:
    shuffled = np.array(data.draw(st.permutations(samples)))
    for statistic, method in (("mean", "t"), ("median", "rank"), ("mean", "bootstrap"), ("mean", "exact")):
        assert estimate(np.array(samples), statistic, method, 0.95) == estimate(shuffled, statistic, method, 0.95)


@settings(max_examples=50, deadline=None)
@given(samples=st.lists(finite, min_size=6, max_size=30))
def test_intervals_contain_the_estimate_and_nest(samples: list[float]) -> None:
    for statistic, method in (("mean", "t"), ("median", "rank")):
        narrow, wide = (estimate(np.array(samples), statistic, method, level) for level in (0.8, 0.95))
        assert wide.low <= narrow.low <= narrow.value <= narrow.high <= wide.high


def test_exact_numbers_have_no_width() -> None:
    found = estimate(np.array([0.25]), "mean", "exact", 0.95)
    assert (found.value, found.low, found.high, found.standard_error) == (0.25, 0.25, 0.25, 0.0)
    assert estimate(np.array([1.0, 5.0, 3.0]), np.max, "exact", 0.95).value == 5.0
    with pytest.raises(NoInterval, match="not defined"):
        estimate(np.array([math.inf, -math.inf]), "mean", "exact", 0.95)


def test_equal_samples_are_said_to_be_equal() -> None:
    for method in ("t", "bootstrap"):
        found = estimate(np.full(6, 0.1), "mean", method, 0.95)
        assert found.notes == ("all samples are equal, so the interval has no width",)
        assert found.high - found.low < 1e-12


def test_infinities_are_never_dropped() -> None:
    dead = np.array([-math.inf, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0])
    found = estimate(dead, "mean", "t", 0.95)
    assert (found.value, found.instead, found.also) == (-1.0, "median", (-math.inf, -math.inf))
    assert "1 of 7 samples is infinite, so the mean is -inf" in found.notes[0]
    assert estimate(dead, "median", "bootstrap", 0.95).method == "order statistics"
    with pytest.raises(NoInterval, match="2 of 7 samples are infinite, with both signs"):
        estimate(np.r_[dead[:-1], math.inf], "mean", "t", 0.95)
    with pytest.raises(NoInterval, match="so the max has no bootstrap interval"):
        estimate(dead, np.max, "bootstrap", 0.95)
    zero = estimate(np.array([0.0, 1, 1, 2, 3, 4, 5]), "geometric mean", "t", 0.95)
    assert (zero.value, zero.also) == (2.0, (0.0, 0.0))
    assert "is 0 or infinite, so the geometric mean is 0" in zero.notes[0]


def test_too_little_gives_no_interval() -> None:
    with pytest.raises(NoInterval, match="one sample has no spread"):
        estimate(np.array([1.0]), "mean", "t", 0.95)
    with pytest.raises(NoInterval, match="undefined on some bootstrap resamples"):
        estimate(np.arange(6.0), lambda s: math.nan if len(set(s)) < 6 else 1.0, "bootstrap", 0.95)


@pytest.mark.parametrize(
    ("statistic", "method", "sentence"),
    [
        ("median", "t", "interval 't' is for the mean or geometric mean, not for the median"),
        ("mean", "rank", "interval 'rank' is for the median, not for the mean"),
        ("mean", "binomial", "interval 'binomial' is for the proportion, not for the mean"),
        ("mode", "bootstrap", "unknown statistic 'mode'; it is a function or one of mean, median"),
        ("mean", "guess", "unknown interval 'guess'; it is t, bootstrap, rank, binomial or exact"),
        ("proportion", "binomial", "a proportion needs samples that are 0 or 1"),
        ("geometric mean", "t", "a geometric mean needs samples that are not negative"),
    ],
)
def test_what_does_not_fit_is_refused(statistic: str, method: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        estimate(np.array([-1.0, 0.5, 2.0]), statistic, method, 0.95)


def test_statistics_have_names() -> None:
    assert statistic_name("median") == "median"
    assert statistic_name(ratio_of_means) == "ratio of means"
    assert statistic_name(lambda s: 0.0) == statistic_name(partial(np.quantile, q=0.9)) == "statistic of the samples"
    assert point_value(np.array([1.0, 0.0, 1.0, 1.0]), "proportion") == 0.75
