"""Algorithms 1 to 4 against `brute`, closed forms and the theorems.

The oracle applies the definitions to explicit vectors in loops of numpy, so it shares neither the expansion of norms
nor masks, sorting and running maxima with the code.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.studies.attention import brute

from jacnorm.studies.attention import geometry
from jacnorm.studies.attention.geometry import Expectations, Points, Rows

torch.set_num_threads(1)
NAMES = (
    *("mass", "distance", "bound", "loose_bound", "expectation", "expectation_all"),
    *("ratio", "radius", "lower", "upper"),
)


def causal(heads, length, seed=0, spread=2.0):
    """Softmax rows of a causal model."""
    logits = spread * torch.randn(heads, length, length, generator=torch.Generator().manual_seed(seed)).double()
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    visible = torch.arange(1, length + 1)
    return Rows(logits.masked_fill(hidden, -math.inf).softmax(-1), visible, visible)


def full(weights):
    """Rows that see all of their keys."""
    weights = torch.as_tensor(weights, dtype=torch.float64)
    counts = torch.full(weights.shape[1:2], weights.shape[2])
    return Rows(weights, counts, counts)


def vectors(groups, length, d, seed=1):
    return torch.randn(groups, length, d, generator=torch.Generator().manual_seed(seed)).double()


def measured(rows, points, selected, distance="sum_of_norms"):
    return list(geometry.measure(rows, points, selected, distance))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("keys", ["visible", "all"])
@pytest.mark.parametrize("distance", ["sum_of_norms", "norm_of_sum"])
def test_everything_is_what_the_definitions_say(groups, normalised, keys, distance):
    rows, points = causal(3, 9), Points.of(vectors(groups, 9, 4), normalised=normalised)
    if keys == "all":
        rows = Rows(rows.weights, rows.visible, torch.full((9,), 9))
    selected = [5, 1, 2, 8]
    found = measured(rows, points, selected, distance)
    assert [each.selected for each in found] == [1, 2, 5, 8]
    for each in found:
        assert each.rows.tolist() == list(range(each.selected, 9))  # row t sees t + 1 keys
        for head in range(3):
            x = points.vectors[head % groups].numpy()
            for place, row in enumerate(each.rows.tolist()):
                count = int(rows.counted[row])
                weights = rows.weights[head, row, :count].numpy()
                expected = brute.row(weights, x[:count], row + 1, each.selected, distance)
                got = {name: getattr(each, name)[head, place].item() for name in NAMES}
                assert got == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_no_selected_key_of_a_uniform_row_with_orthogonal_vectors_is_outside():
    n, chosen = 12, 5
    points = Points.of(torch.eye(n)[None], normalised=True)
    (each,) = measured(full(np.full((1, 1, n), 1 / n)), points, [chosen])
    assert each.ratio.item() == 1
    assert each.radius.item() == pytest.approx(math.sqrt(chosen + 1) / n)
    assert each.distance.item() == pytest.approx((n - chosen) * math.sqrt(chosen + 1) / n)


def test_the_bound_is_reached_when_all_vectors_are_equal():
    weights = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    points = Points.of(torch.ones(1, 6, 3), normalised=True)
    for each in measured(full(weights[None, None]), points, [1, 2, 3, 5]):
        n = each.selected
        mass = weights[:n].sum()
        assert each.ratio.item() == 1
        assert each.distance.item() == pytest.approx(sum(mass - weights[n:]), abs=1e-12)
        assert each.bound.item() == pytest.approx(each.distance.item(), abs=1e-7)
        assert each.within_bound.all()


@given(
    length=st.integers(2, 12),
    d=st.integers(1, 5),
    seed=st.integers(0, 2**20),
    spread=st.sampled_from([0.0, 0.3, 2.0, 30.0]),
    normalised=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_theorems_hold_in_every_row(length, d, seed, spread, normalised, data):
    selected = data.draw(st.lists(st.integers(1, length - 1), min_size=1, max_size=4, unique=True))
    rows, points = causal(2, length, seed, spread), Points.of(vectors(1, length, d, seed + 1), normalised=normalised)
    for each in measured(rows, points, selected):
        assert each.within_bound.all()
        assert (each.loose_bound >= each.bound - 1e-12).all()
        assert each.within_loose_bound.all()
        assert each.above_lower.all()
        if each.selected == 1:
            apart = each.radius > 0  # else a key left out has the same weight and vector as the selected one
            assert (each.ratio[apart] == 1).all()
            assert (each.lower[apart] == 1).all()
        if normalised:
            assert (each.upper <= 1).all()


def test_a_distance_beyond_its_bound_is_seen():
    (each,) = measured(causal(1, 4), Points.of(vectors(1, 4, 2), normalised=True), [2])
    worse = each.loose_bound * (1 + 2e-5)
    broken = geometry.Measures(**{**vars(each), "distance": worse, "lower": each.ratio + 2e-9})
    assert not broken.within_bound.any()
    assert not broken.within_loose_bound.any()
    assert not broken.above_lower.any()


def test_of_tied_keys_the_first_are_selected_and_unseen_ones_never():
    weights = torch.tensor([[[0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0]]], dtype=torch.float64)
    weights[0, 0, 3] = 0
    rows = Rows(weights, torch.tensor([3, 3]), torch.tensor([4, 4]))
    order, ranks = rows.ranking
    assert order.tolist() == ranks.tolist() == [[[0, 1, 2, 3], [0, 1, 2, 3]]]


def test_keys_without_weight_tie_with_those_left_out_and_are_not_inside():
    points = Points.of(vectors(1, 6, 3), normalised=True)
    (each,) = measured(full([[[0.6, 0.4, 0.0, 0.0, 0.0, 0.0]]]), points, [4])
    s = 0.6 * points.vectors[0, 0] + 0.4 * points.vectors[0, 1]
    assert each.radius.item() == pytest.approx(s.norm().item())
    inside = [(s - a * x).norm() < s.norm() for a, x in zip([0.6, 0.4], points.vectors[0], strict=False)]
    assert each.ratio.item() == sum(inside) / 4


def test_rows_of_a_shorter_window_are_those_of_the_longer_one():
    rows, x = causal(2, 12), vectors(1, 12, 4)
    whole = measured(rows, Points.of(x, normalised=True), [2, 3])
    head = Rows(rows.weights[:, :7, :7], rows.visible[:7], rows.counted[:7])
    short = measured(head, Points.of(x[:, :7], normalised=True), [2, 3])
    cut = measured(head, Points.of(x, normalised=True).first(7), [2, 3])
    for a, b, c in zip(whole, short, cut, strict=True):
        for name in NAMES:
            torch.testing.assert_close(getattr(a, name)[:, : 7 - a.selected], getattr(b, name))
            assert torch.equal(getattr(b, name), getattr(c, name)) or name in ("bound", "loose_bound")
            torch.testing.assert_close(getattr(b, name), getattr(c, name))


def test_nothing_is_measured_where_every_key_is_selected():
    assert measured(causal(1, 5), Points.of(vectors(1, 5, 2), normalised=True), [5, 9]) == []


def test_distances_do_not_depend_on_how_many_are_gathered_at_once(monkeypatch):
    rows, points = causal(2, 20), Points.of(vectors(2, 20, 3), normalised=True)
    together = measured(rows, points, [3, 11])
    monkeypatch.setattr(geometry, "GATHERED", 1)
    for a, b in zip(together, measured(rows, points, [3, 11]), strict=True):
        assert torch.equal(a.bound, b.bound)


# --- vectors ---------------------------------------------------------------------------------------------------------


def test_points_know_the_radius_and_the_separation_of_the_first_keys():
    points = Points.of(vectors(2, 8, 3), normalised=False)
    for group in range(2):
        x = points.vectors[group]
        for count in range(1, 9):
            pairs = [(x[i] - x[j]).norm().item() for i in range(count) for j in range(i)]
            largest, separation = points.assumptions(torch.tensor([count]))
            assert largest[group].item() == pytest.approx(x[:count].norm(dim=1).max().item())
            assert separation[group].item() == pytest.approx(min(pairs, default=0.0), abs=1e-7)
        torch.testing.assert_close(points.distances[group], (x[:, None] - x).norm(dim=-1), atol=1e-7, rtol=1e-7)


def test_normalised_vectors_have_length_one_and_a_zero_vector_stays():
    x = vectors(1, 5, 3)
    x[0, 2] = 0
    points = Points.of(x.float(), normalised=True)
    assert points.vectors.dtype == torch.float64
    torch.testing.assert_close(points.norms[0], torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64))


def test_equal_vectors_are_not_separated():
    points = Points.of(vectors(1, 4, 3)[:, [0, 1, 1, 2]], normalised=True)
    assert points.distances[0, 1, 2].item() < 1e-7
    assert (points.separation[0, 2:] < 1e-7).all()
    assert points.separation[0, 1] > 1e-3


# --- random sets -----------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_closed_form_is_below_the_mean_over_all_sets(n, seed):
    rows, points = full(torch.rand(1, 1, 6, generator=torch.Generator().manual_seed(seed))), Points.of(
        vectors(1, 6, 3, seed), normalised=True
    )  # fmt: skip
    closed, _ = Expectations(rows, points).at(n)
    exact = brute.expected_distance(rows.weights[0, 0].numpy(), points.vectors[0].numpy(), n)
    assert closed.item() <= exact * (1 + 1e-12)


@pytest.mark.parametrize("distance", ["sum_of_norms", "norm_of_sum"])
def test_the_mean_over_sampled_sets_is_that_over_all_sets(distance):
    rows, points = causal(2, 7), Points.of(vectors(1, 7, 3), normalised=True)
    keys = torch.rand(2, 7, 4000, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n, places, values in geometry.sampled(rows, points, [1, 3], keys, distance):
        assert places.tolist() == list(range(n, 7))
        for head in range(2):
            for place, row in enumerate(places.tolist()):
                weights = rows.weights[head, row, : row + 1].numpy()
                exact = brute.expected_distance(weights, points.vectors[0, : row + 1].numpy(), n, distance)
                drawn = values[head, place]
                assert abs(drawn.mean().item() - exact) <= 5 * drawn.std().item() / math.sqrt(4000) + 1e-12


def test_a_sampled_set_holds_the_keys_with_the_smallest_numbers():
    rows, points = full(torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])), Points.of(vectors(1, 4, 3), normalised=True)
    keys = torch.tensor([[[[0.9, 0.1, 0.5, 0.2]]]], dtype=torch.float64)
    found = {n: values.item() for n, _, values in geometry.sampled(rows, points, [1, 2, 4], keys, "sum_of_norms")}
    weights, x = rows.weights[0, 0].numpy(), points.vectors[0].numpy()
    assert found == pytest.approx({1: brute.distance(weights, x, [1]), 2: brute.distance(weights, x, [1, 3])})


# --- collapse --------------------------------------------------------------------------------------------------------


def test_the_distance_collapses_as_all_keys_are_selected():
    rows, points = full(torch.rand(1, 2, 100, generator=torch.Generator().manual_seed(3))), Points.of(
        vectors(1, 100, 5), normalised=True
    )  # fmt: skip
    found = dict(geometry.collapse(rows, points, [0.07, 0.5, 0.98, 0.995], "sum_of_norms"))
    (seven,) = measured(rows, points, [7])  # 0.07 * 100 is a little more than 7 in floating point
    torch.testing.assert_close(found[0.07], seven.distance)
    assert (found[0.98] < found[0.5]).all()
    assert found[0.995].shape == (1, 0)  # nothing is left out


def test_collapse_selects_a_share_of_what_a_row_sees():
    rows, points = causal(2, 9), Points.of(vectors(1, 9, 4), normalised=True)
    ((_, distances),) = geometry.collapse(rows, points, [0.5], "sum_of_norms")
    assert distances.shape == (2, 8)  # the first row sees one key
    for row in range(1, 9):
        weights, x = rows.weights[0, row, : row + 1].numpy(), points.vectors[0, : row + 1].numpy()
        expected = brute.row(weights, x, row + 1, math.ceil((row + 1) / 2))["distance"]
        assert distances[0, row - 1].item() == pytest.approx(expected)


# --- Corollary 1 -----------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), reach=st.floats(0, 400))
@settings(max_examples=30, deadline=None)
def test_weights_of_bounded_logits_are_within_the_bounds_of_corollary_1(seed, reach):
    visible = torch.arange(1, 8)
    logits = reach * (2 * torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(seed)).double() - 1)
    log_weights = logits.masked_fill(torch.arange(7) >= visible[:, None], -math.inf).log_softmax(-1)
    within, excess = geometry.corollary_1(log_weights, visible, torch.full((2, 7), reach))
    assert torch.equal(within, visible.expand(2, 7))
    assert (excess <= 1e-6).all()


def test_the_bounds_of_corollary_1_are_reached_up_to_one_part_in_n():
    n, a = 1000, 2.0
    logits = torch.full((1, 1, n), -a, dtype=torch.float64)
    logits[..., 0] = a
    _, excess = geometry.corollary_1(logits.log_softmax(-1), torch.tensor([n]), torch.full((1, 1), a))
    slack = math.log((n - 1 + math.exp(2 * a)) / n)
    assert excess.item() == pytest.approx(-slack) == pytest.approx(math.log(n) - math.log(n - 1 + math.exp(2 * a)))


def test_weights_beyond_the_bounds_of_corollary_1_are_counted():
    log_weights = torch.tensor([[[0.9, 0.1, 0.0]]], dtype=torch.float64).log()
    within, excess = geometry.corollary_1(log_weights, torch.tensor([3]), torch.full((1, 1), 0.5))
    assert within.item() == 1  # 0.9 is below e / 3, but 0.1 and 0 are below 1 / (3 e)
    assert excess.item() == math.inf
