import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from jacnorm.data.read import Split, balanced, split, standardise, subset
from jacnorm.errors import UserError

images = arrays(np.uint8, array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(images)
def test_standardised_features_have_mean_zero_and_variance_one(x):
    (result,) = standardise(torch.from_numpy(x))
    assert result.dtype == torch.float32
    values = result.double().numpy()
    constant = (x == x[0]).all(0)
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(values.std(0), np.where(constant, 0, 1), atol=1e-6)
    assert (values[:, constant] == 0).all()


@given(images, st.sampled_from([np.uint8, np.float32, np.float64]))
def test_standardise_against_numpy(x, dtype):
    """Independent oracle: NumPy's own mean and standard deviation."""
    x = x.astype(dtype)
    half = (len(x) + 1) // 2
    train, test = x[:half], x[half:]
    ours = standardise(torch.from_numpy(train), torch.from_numpy(test))[1].numpy()
    deviation = train.astype(float).std(0)
    expected = np.where(deviation > 0, (test - train.astype(float).mean(0)) / np.where(deviation > 0, deviation, 1), 0)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_standardise_over_pixels_has_one_scale_per_channel():
    x = torch.randint(0, 256, (50, 3, 4, 5), generator=seeded(), dtype=torch.uint8)
    x[:, 1] = 7
    (result,) = standardise(x, over="pixels")
    torch.testing.assert_close(result.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(result.std((0, 2, 3), correction=0), torch.tensor([1.0, 0, 1]))
    # One affine map for the whole channel keeps equal pixels equal.
    assert len(result[:, 0].unique()) == len(x[:, 0].unique())


def test_constant_features_stay_zero_even_where_rounding_would_not():
    train = torch.full((3, 2), 0.1)
    train[:, 1] = torch.tensor([1.0, 2.0, 3.0])
    test = torch.tensor([[0.2, 2.0]])
    scaled_train, scaled_test = standardise(train, test)
    assert scaled_train[:, 0].tolist() == [0, 0, 0]
    assert scaled_test.tolist() == [[0, 0]]


def test_differences_too_small_to_square_count_as_constant():
    (result,) = standardise(torch.tensor([[0.0], [1e-200]], dtype=torch.float64))
    assert result.tolist() == [[0], [0]]


def test_long_data_are_scaled_in_pieces_alike():
    x = torch.randint(0, 256, (9000, 2), generator=seeded(), dtype=torch.uint8)
    (result,) = standardise(x)
    expected = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    torch.testing.assert_close(result, expected.float())


def test_standardise_refuses_nothing_and_other_shapes():
    with pytest.raises(UserError, match="needs at least one training row, got none"):
        standardise(torch.zeros(0, 3))
    with pytest.raises(UserError, match=r"rows of \(4,\) cannot be scaled like training rows of \(3,\)"):
        standardise(torch.zeros(2, 3), torch.zeros(2, 4))


@given(st.integers(2, 200), st.floats(0, 1), st.integers(0, 9))
def test_split_is_a_partition_that_the_seed_determines(n, fraction, seed):
    assume(0 < round(fraction * n) < n)
    first, second = split(n, fraction, seeded(seed))
    assert len(second) == round(fraction * n)
    assert torch.cat([first, second]).sort().values.tolist() == list(range(n))
    assert first.tolist() == sorted(first.tolist())
    assert second.tolist() == sorted(second.tolist())
    again = split(n, fraction, seeded(seed))
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])


def test_split_depends_on_the_seed_and_not_on_global_state():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert not torch.equal(split(100, 0.3, seeded(0))[1], split(100, 0.3, seeded(1))[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("n", "fraction"), [(10, 0.0), (10, 1.0), (10, 0.04), (1, 0.5), (10, -0.2), (10, 1.5)])
def test_split_refuses_an_empty_part(n, fraction):
    with pytest.raises(UserError, match=f"a fraction {fraction} of {n} rows leaves an empty part"):
        split(n, fraction, seeded())


@given(st.integers(1, 5), st.integers(1, 40), st.data())
def test_balanced_counts_differ_by_at_most_one(classes, size, data):
    each = -(-size // classes)
    extra = data.draw(st.lists(st.integers(0, classes - 1), max_size=20))
    y = torch.tensor(data.draw(st.permutations([*list(range(classes)) * each, *extra])))
    rows = balanced(y, size, classes, seeded(3))
    assert len(rows.unique()) == size
    assert rows.tolist() == sorted(rows.tolist())
    counts = torch.bincount(y[rows], minlength=classes)
    assert counts.max() - counts.min() <= 1
    assert torch.equal(rows, balanced(y, size, classes, seeded(3)))


def test_balanced_draws_every_row_sooner_or_later():
    y = torch.arange(12) % 3
    drawn = {row for seed in range(60) for row in balanced(y, 4, 3, seeded(seed)).tolist()}
    assert drawn == set(range(12))


def test_any_class_may_get_the_extra_row():
    y = torch.arange(12) % 3
    largest = {torch.bincount(y[balanced(y, 4, 3, seeded(seed))]).argmax().item() for seed in range(30)}
    assert largest == {0, 1, 2}


def test_balanced_refuses():
    with pytest.raises(UserError, match="a subset needs at least 1 row, got 0"):
        balanced(torch.tensor([0, 1]), 0, 2, seeded())
    with pytest.raises(UserError, match="a balanced subset of 4 rows needs 2 of class 1, but there are 1"):
        balanced(torch.tensor([0, 0, 0, 1]), 4, 2, seeded())


def test_subset_keeps_images_with_their_labels():
    part = Split(torch.arange(40).reshape(40, 1), torch.arange(40) % 4)
    small = subset(part, 8, 4, seeded())
    assert len(small) == 8
    assert torch.equal(small.x[:, 0] % 4, small.y)
