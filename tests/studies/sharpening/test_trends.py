"""Correlations against scipy's, and windows of trajectories by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr, spearmanr

from jacnorm.studies.sharpening.trends import (
    before_threshold,
    last_half,
    last_third,
    log_correlation,
    rank_correlation,
    reaches_threshold,
)


def trajectory(sharpness, threshold=4.0) -> pd.DataFrame:
    steps = 10 * np.arange(len(sharpness))
    rows = pd.DataFrame({"step": steps, "sharpness": np.array(sharpness, float), "threshold": threshold})
    return rows.sample(frac=1.0, random_state=1)  # order in a table means nothing


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_those_of_scipy_ties_included(seed):
    rng = np.random.default_rng(seed)
    x, y = pd.Series(rng.integers(1, 6, 12).astype(float)), pd.Series(np.exp(rng.normal(size=12)))
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert log_correlation(x, y) == pytest.approx(pearsonr(np.log(x), np.log(y)).statistic, abs=1e-12)


def test_a_correlation_that_is_not_defined_is_nan():
    x = pd.Series([1.0, 2.0, 3.0])
    assert math.isnan(rank_correlation(x, pd.Series([1.0, math.nan, 2.0])))
    assert math.isnan(rank_correlation(x, pd.Series([1.0, 1.0, 1.0])))
    assert math.isnan(log_correlation(x, pd.Series([1.0, -1.0, 2.0])))
    assert math.isnan(log_correlation(x, pd.Series([1.0, math.nan, 2.0])))
    assert math.isnan(log_correlation(x, pd.Series([2.0, 2.0, 2.0])))


def test_windows_end_where_the_threshold_is_first_reached_and_begin_at_shares_of_the_last_step():
    run = trajectory([1, 2, 3, 4, 3, 2, 5])
    assert reaches_threshold(run)
    assert before_threshold(run).step.tolist() == [0, 10, 20]
    assert last_half(run).step.tolist() == [30, 40, 50, 60]
    assert last_third(run).step.tolist() == [40, 50, 60]
    assert not reaches_threshold(trajectory([1, 2, 3.9]))
    assert before_threshold(trajectory([5, 1])).empty


def test_a_nan_ends_no_window():
    run = trajectory([1, math.nan, 3, 5])
    assert before_threshold(run).step.tolist() == [0, 10, 20]
    assert not reaches_threshold(trajectory([1, math.nan]))
