"""Rows to numbers by seed, and where the runs went: closed forms, numpy's own fits, and an exact partition of runs."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jacnorm.report.estimands import (
    account,
    by_seed,
    complete,
    paired,
    quantity,
    r_squared,
    select,
    slope,
    whole_seeds,
)
from jacnorm.report.verdicts import NotTested

ROWS = pd.DataFrame(
    {"seed": [11, 10, 11, 10], "arm": ["a", "a", "b", "b"], "depth": [2, 2, 4, 4], "value": [1.0, 2.0, 4.0, 7.0]},
    index=[7, 3, 5, 1],
)


def test_select_keeps_rows_of_the_cell_and_their_index():
    assert select(ROWS, arm="b", depth=4).index.tolist() == [5, 1]
    assert select(ROWS).equals(ROWS)
    assert select(ROWS, arm=None).empty


def test_by_seed_sorts_seeds_and_refuses_an_open_cell():
    assert by_seed(select(ROWS, arm="a"), "value").to_dict() == {10: 2.0, 11: 1.0}
    assert by_seed(select(ROWS, arm="a"), "value").index.tolist() == [10, 11]
    with pytest.raises(ValueError, match="several rows of one seed for value"):
        by_seed(ROWS, "value")


def test_paired_differences_need_both_runs_and_keep_what_is_not_a_number():
    first, second = pd.Series({10: 3.0, 11: math.nan, 12: 5.0}), pd.Series({11: 1.0, 12: 7.0, 13: 0.0})
    found = paired(first, second)
    assert found.index.tolist() == [11, 12]
    assert math.isnan(found[11])
    assert found[12] == -2.0


def test_a_seed_without_one_of_its_points_is_left_out_as_a_whole():
    rows = ROWS[(ROWS.seed == 10) | (ROWS.depth == 2)]
    assert set(whole_seeds(rows, "depth", [2, 4]).seed) == {10}
    assert set(whole_seeds(rows, "depth", [2]).seed) == {10, 11}  # only the asked points count
    assert (whole_seeds(ROWS, "depth", [4]).depth == 4).all()
    with pytest.raises(ValueError, match="several rows of one seed and depth"):
        whole_seeds(ROWS.assign(depth=2), "depth", [2])


@given(
    st.lists(st.tuples(st.integers(-20, 20), st.floats(-100, 100)), min_size=3, max_size=12, unique_by=lambda p: p[0])
)
def test_slope_and_r_squared_are_those_of_numpy(points):
    x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    fitted = np.polyfit(x, y, 1)
    assert slope(x, y) == pytest.approx(fitted[0], abs=1e-8)
    if np.std(y) > 1e-3:
        explained = 1 - np.var(y - np.polyval(fitted, x)) / np.var(y)
        assert r_squared(x, y) == pytest.approx(explained, abs=1e-8)


def test_a_slope_needs_two_places_and_a_share_of_variance_some_variance():
    with pytest.raises(ValueError, match="two different values"):
        slope(np.array([4.0, 4.0]), np.array([1.0, 2.0]))
    assert math.isnan(r_squared(np.array([1.0, 2.0]), np.array([3.0, 3.0])))
    assert math.isnan(r_squared(np.array([1.0, 2.0]), np.array([3.0, math.nan])))


def test_a_run_counts_once():
    runs = account(
        range(6), [0, 1, 2, 3], diverged=[3, 4], excluded={"odd": [1, 3, 9], "small": [0, 1]}, what="networks"
    )
    assert (runs.planned, runs.finished, runs.diverged, runs.lost) == (6, 1, 2, 1)
    assert runs.excluded == {"odd": 1, "small": 1}
    assert runs.what == "networks"


keys = st.sets(st.integers(0, 12))


@given(keys, keys, keys, keys, keys)
def test_every_planned_run_is_accounted_for(planned, present, diverged, one, other):
    # Accounting itself refuses a sum that differs from what was planned.
    runs = account(planned, present, diverged=diverged, excluded={"one": one, "other": other})
    assert runs.planned == len(planned)
    assert runs.finished == len((planned & present) - diverged - one - other)
    assert runs.lost == len(planned - present - diverged - one - other)
    assert "one" in runs.excluded or not (planned & one) - diverged


def test_a_quantity_names_its_seeds():
    found = quantity("slope", "width 8", pd.Series({12: 0.5, 10: 1.5}), account([], []), "median", 2.0)
    assert list(found.samples) == [0.5, 1.5]
    assert list(found.seeds) == [12, 10]
    assert (found.statistic, found.reference) == ("median", 2.0)


def test_criteria_without_a_sample_get_the_reason():
    empty = quantity("a", "", pd.Series(dtype=float), account([], []))
    full = quantity("b", "", pd.Series({10: 1.0}), account([], []))
    said = NotTested("for another reason", "c")
    found = complete([empty, full, said], ["a", "b", "c"], "nothing was measured")
    assert found == [full, said, NotTested("nothing was measured", "a")]
