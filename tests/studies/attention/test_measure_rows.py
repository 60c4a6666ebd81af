"""From rows of attention to rows of tables: means over the right rows, sampled sets, windows put together."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from tests.studies.attention import brute

from jacnorm.errors import UserError
from jacnorm.studies.attention.geometry import Points, Rows
from jacnorm.studies.attention.measure_rows import (
    Heads,
    Scene,
    blank,
    collapse_rows,
    geometry_rows,
    gradient_rows,
    mean_of_windows,
    spaced,
    weight_rows,
)
from jacnorm.studies.attention.settings import RowSettings
from jacnorm.studies.attention.tables import COLUMNS
from jacnorm.training.seeds import RunId

torch.set_num_threads(1)
SETTINGS = RowSettings(
    distance_selected=2,
    selected=[1, 3],
    fractions=[0.5],
    temperatures=[0.5, 1.0],
    perturbations=[0.1],
    subsets=6,
    subset_rows=3,
    gradient_rows=2,
)
ENDS = {5: 5, 8: 8}
RUN = RunId("attention", "test", 1)


def causal(seed=0, heads=2, length=8):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(heads, length, length, generator=generator, dtype=torch.float64)
    labels = [
        {"seed": 1, "data_set": "python_docs", "model": "trained", "layer": 2, "head": head + 1}
        for head in range(heads)
    ]
    return Heads(labels, logits, torch.arange(1, length + 1), 1.0, logits.abs().amax(-1))


def scene(heads, normaliser="softmax"):
    x = torch.randn(1, len(heads.visible), 3, generator=torch.Generator().manual_seed(9)).double()
    rows = Rows(heads.weights(normaliser), heads.visible, heads.visible)
    return Scene(heads, normaliser, "embedding", rows, Points.of(x, normalised=True))


def frame(found, table):
    return pd.DataFrame([row for name, row in found if name == table])


def test_distances_and_separability_are_means_over_the_rows_of_a_window_that_see_more_keys():
    heads = causal()
    found = list(geometry_rows(scene(heads), SETTINGS, {2, 3}, ENDS, RUN))
    rows, x = scene(heads).rows, scene(heads).points.vectors[0].numpy()
    for table, names in (
        ("distances", ["distance", "bound", "loose_bound", "expectation", "expectation_all"]),
        ("separability", ["ratio", "radius", "lower", "upper"]),
    ):
        got = frame(found, table)
        assert set(got) == set(COLUMNS[table])
        assert len(got) == 2 * 2 * 2  # heads, N, lengths
        for _, row in got.iterrows():
            length, n = int(row.length), int(row.selected)
            each = [
                brute.row(rows.weights[row["head"] - 1, t, : t + 1].numpy(), x[: t + 1], t + 1, n)
                for t in range(n, length)
            ]
            assert (row.rows, row.skipped_rows) == (length - n, n)
            expected = pd.DataFrame(each).mean()
            assert row[names].tolist() == pytest.approx(expected[names].tolist(), rel=1e-6)
            if table == "distances":
                assert row.selected_mass == pytest.approx(expected.mass)
                assert (row.within_bound, row.within_loose_bound) == (1, 1)
            else:
                assert row.above_lower == 1


def test_sampled_sets_give_the_expectation_with_the_error_that_is_stated():
    heads = causal(heads=1)
    weights, x = scene(heads).rows.weights[0], scene(heads).points.vectors[0].numpy()
    places = [t for t in spaced(3, 8).tolist() if t + 1 > 3]
    assert places == [4, 7]
    exact = np.mean([brute.expected_distance(weights[t, : t + 1].numpy(), x[: t + 1], 3) for t in places])
    closed = np.mean([brute.closed_form(weights[t, : t + 1].numpy(), x[: t + 1], 3) for t in places])
    many = SETTINGS.model_copy(update={"subsets": 64})  # of few draws the error is itself uncertain
    z = []
    for seed in range(60):
        run = RunId("attention", "coverage", seed)
        got = frame(geometry_rows(scene(heads), many, {3}, {8: 8}, run), "distances").iloc[0]
        assert got.expectation_of_sampled == pytest.approx(closed)
        z.append((got.expectation_sampled - exact) / got.sampling_error)
    assert abs(np.mean(z)) < 3.5 / math.sqrt(60)
    assert 0.7 < np.std(z) < 1.35


def test_without_a_run_nothing_is_sampled():
    got = frame(geometry_rows(scene(causal()), SETTINGS, {2}, ENDS, None), "distances")
    assert got[["expectation_sampled", "expectation_of_sampled", "sampling_error"]].isna().all(axis=None)
    assert got.drop(columns=["expectation_sampled", "expectation_of_sampled", "sampling_error"]).notna().all(axis=None)


def test_weights_are_held_to_corollary_1_in_every_window():
    heads = causal()
    got = frame(weight_rows(heads, "softmax", ENDS), "weights")
    assert set(got) == set(COLUMNS["weights"])
    assert (got.within == 1).all()
    assert (got.zeros == 0).all()
    weights = heads.weights("softmax")
    for _, row in got.iterrows():
        own = weights[row["head"] - 1, : int(row.length)]
        assert row.rows == row.length
        assert row.largest_weight == pytest.approx(own.amax(-1).mean().item())
        beyond = [
            abs(math.log(own[t, i]) + math.log(t + 1)) - 2 * heads.reach[row["head"] - 1, t].item()
            for t in range(int(row.length))
            for i in range(t + 1)
        ]
        assert row.excess == pytest.approx(max(beyond))


def test_weights_that_underflow_keep_their_logarithm_and_sparse_ones_are_zeros():
    heads = causal()
    steep = Heads(heads.labels, 1000 * heads.logits, heads.visible, 1.0, 1000 * heads.reach)
    softmax, sparse = (frame(weight_rows(steep, each, ENDS), "weights") for each in ("softmax", "sparsemax"))
    assert (softmax.within == 1).all()
    assert (sparse.excess == math.inf).all()
    keys = {length: length * (length + 1) / 2 for length in ENDS}
    one_key_a_row = [1 - length / keys[length] for length in (5, 5, 8, 8)]
    assert sparse.zeros.tolist() == pytest.approx(one_key_a_row)
    assert (sparse.within < 1).all()


def test_the_temperature_of_the_model_divides_logits_and_their_bound():
    heads = causal()
    hot = Heads(heads.labels, 4 * heads.logits, heads.visible, 4.0, 4 * heads.reach)
    pd.testing.assert_frame_equal(
        frame(weight_rows(heads, "softmax", ENDS), "weights"), frame(weight_rows(hot, "softmax", ENDS), "weights")
    )


def test_gradients_of_softmax_are_measured_in_all_rows_and_of_others_in_some():
    for normaliser, rows in (("softmax", 8), ("entmax15", 2)):
        found = list(gradient_rows(causal(), normaliser, SETTINGS, RUN))
        for table in ("sensitivity", "jacobians"):
            got = frame(found, table)
            assert set(got) == set(COLUMNS[table])
            assert (got.rows == rows).all()
            assert len(got) == 2 * 2


def test_softmax_cannot_be_left_out():
    with pytest.raises(UserError, match="normalisers lacks softmax, with which the others are compared; add it"):
        RowSettings(normalisers=["sparsemax"])


def test_spaced_places_end_with_the_last():
    assert spaced(4, 128).tolist() == [31, 63, 95, 127]
    assert spaced(3, 8).tolist() == [1, 4, 7]
    assert spaced(5, 5).tolist() == [0, 1, 2, 3, 4]


def test_windows_are_put_together():
    def row(**changes):
        return "distances", {"seed": 1, "selected": 2, "rows": 6, "skipped_rows": 2, "distance": 1.0} | changes

    first = [row(), ("jacobians", {"seed": 1, "rows": 4, "spectral": 1.0, "spectral_max": 5.0})]
    second = [row(distance=3.0), ("jacobians", {"seed": 1, "rows": 4, "spectral": 2.0, "spectral_max": 4.0})]
    assert list(mean_of_windows([first, second])) == [
        row(rows=12, skipped_rows=4, distance=2.0),
        ("jacobians", {"seed": 1, "rows": 8, "spectral": 1.5, "spectral_max": 5.0}),
    ]
    assert list(mean_of_windows([first])) == first
    errors = [[row(sampling_error=0.3)], [row(sampling_error=0.4)]]
    assert next(mean_of_windows(errors))[1]["sampling_error"] == pytest.approx(0.25)


def test_the_mean_of_two_windows_is_that_over_the_rows_of_both():
    windows = [causal(seed) for seed in (1, 2)]
    both = Heads(
        windows[0].labels,
        torch.cat([each.logits for each in windows], 1),
        torch.cat([each.visible for each in windows]),
        1.0,
        torch.cat([each.reach for each in windows], 1),
    )
    for table in ("sensitivity", "jacobians"):
        found = [list(gradient_rows(each, "softmax", SETTINGS, RUN)) for each in (*windows, both)]
        merged, whole = frame(mean_of_windows(found[:2]), table), frame(found[2], table)
        if table == "sensitivity":  # other directions
            merged, whole = merged.drop(columns="change"), whole.drop(columns="change")
        pd.testing.assert_frame_equal(merged, whole)


def test_a_blank_row_keeps_its_cell_and_its_counts():
    for _, row in geometry_rows(scene(causal()), SETTINGS, {2}, ENDS, RUN):
        found = blank(row)
        kept = {name for name, value in found.items() if value == value}
        assert kept == {"seed", "data_set", "model", "layer", "head", "normaliser", "space", "length", "selected"} | {
            "rows",
            "skipped_rows",
        }
        assert all(found[name] == row[name] for name in kept)


def test_collapse_is_the_mean_over_rows_in_which_keys_are_left_out():
    got = frame(collapse_rows(scene(causal()), SETTINGS), "collapse")
    assert set(got) == set(COLUMNS["collapse"])
    assert (got.rows == 7).all()  # the first row has one key
    nothing = SETTINGS.model_copy(update={"fractions": [0.99]})
    got = frame(collapse_rows(scene(causal()), nothing), "collapse")
    assert (got.rows == 0).all()
    assert got.distance.isna().all()
