"""The prepared digits as the study divides and standardises them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from jacnorm.data.read import Prepared, Split, read
from jacnorm.errors import UserError
from jacnorm.studies.sharpening import inputs as module
from jacnorm.studies.sharpening.inputs import load, load_all
from jacnorm.studies.sharpening.settings import DescentSettings

SCALINGS = ("pixel-mean", "pixel", "channel")


def loaded(digits, train_samples=300, pool=1000, scaling="pixel-mean"):
    return load(digits, train_samples=train_samples, pool=pool, scaling=scaling)


@pytest.fixture
def numbered(monkeypatch):
    """A data set whose only pixel is the row's number, with which rows can be recognised after standardising."""
    labels = torch.arange(120) % 3
    train = Split(torch.arange(120, dtype=torch.uint8).reshape(120, 1, 1, 1), labels)
    test = Split(torch.arange(200, 230, dtype=torch.uint8).reshape(30, 1, 1, 1), torch.arange(30) % 3)
    data = Prepared("numbered", "", train, test, ("a", "b", "c"), 255, "", "digest", "", "", "")
    monkeypatch.setattr(module, "read", lambda path: data)

    def rows(size, pool):
        """Numbers of the training and of the test samples."""
        inputs = load("numbered", train_samples=size, pool=pool, scaling="pixel-mean")
        return [numbers(x, inputs.test_x) for x in (inputs.train_x, inputs.test_x)]

    return rows


def numbers(x, test_x):
    """Row numbers from scaled pixels: the scale is undone by rows 200 and 229, which always lead the test samples."""
    first, last = test_x.flatten()[[0, 29]].double()
    return (200 + (x.flatten().double() - first) * 29 / (last - first)).round().int().tolist()


def test_the_rest_of_the_training_split_joins_the_test_samples(digits):
    stored, inputs = read(digits), loaded(digits)
    assert (len(inputs.train_y), len(inputs.test_y)) == (300, 797)
    assert len(inputs.train_x) == 300
    assert len(inputs.test_x) == 797
    assert torch.equal(inputs.test_y[: len(stored.test)], stored.test.y)
    assert inputs.train_y.bincount().tolist() == [30] * 10
    every = torch.cat([stored.train.y, stored.test.y]).bincount()
    assert (inputs.test_y.bincount() + 100).tolist() == every.tolist()
    assert (inputs.name, inputs.digest, inputs.classes) == ("digits", stored.digest, 10)
    assert (inputs.image, inputs.features, inputs.train_x.dtype) == ((1, 8, 8), 64, torch.float32)


def test_training_and_test_samples_share_no_row_and_lose_none(numbered):
    train, test = numbered(60, 60)
    assert sorted(train + test) == [*range(120), *range(200, 230)]


def test_without_a_pool_and_a_number_the_splits_are_those_stored(numbered):
    assert numbered(None, None) == [list(range(120)), list(range(200, 230))]


def test_subsets_of_one_pool_are_nested_and_leave_the_test_samples_alone(numbered):
    sizes = [2, 7, 30, 31, 60]
    found = [numbered(size, 60) for size in sizes]
    assert [len(train) for train, _ in found] == sizes
    for (small, small_test), (large, large_test) in pairwise(found):
        assert set(small) < set(large)
        assert small_test == large_test
    assert all(train == sorted(train) for train, _ in found)
    assert numbered(None, 60) == found[-1]


def test_every_call_gives_the_same_samples(digits):
    assert torch.equal(loaded(digits).train_x, loaded(digits).train_x)
    assert torch.equal(loaded(digits, scaling="pixel").train_y, loaded(digits, scaling="channel").train_y)


def test_pixel_mean_keeps_relative_scales_of_pixels(digits):
    inputs, plain = loaded(digits), loaded(digits, scaling="channel")
    train = inputs.train_x.double()
    assert train.mean(0).abs().max() < 1e-6
    assert train.square().mean().item() == pytest.approx(1, abs=1e-6)
    # Both scalings are affine with one slope for all pixels, so differences of images are proportional.
    slope = (train[0] - train[1]).norm() / (plain.train_x[0] - plain.train_x[1]).norm()
    torch.testing.assert_close(
        (inputs.test_x[5] - train[7]).float(),
        slope.float() * (plain.test_x[5] - plain.train_x[7]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_other_scalings_standardise_pixels_or_channels(digits):
    pixel, channel = (loaded(digits, scaling=each).train_x.double() for each in ("pixel", "channel"))
    deviation = pixel.std(0, correction=0)
    assert torch.where(deviation > 0, deviation - 1, 0).abs().max() < 1e-6
    assert channel.mean().item() == pytest.approx(0, abs=1e-6)
    assert channel.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_scaling_is_fitted_on_the_kept_samples_only(digits):
    small, large = loaded(digits, 100), loaded(digits, 1000)
    assert small.train_x.mean(0).abs().max() < 1e-5
    assert not torch.allclose(small.test_x, large.test_x)


@pytest.mark.parametrize(("size", "pool", "key"), [(1001, 1000, "train_samples"), (300, 1437, "pool")])
def test_a_subset_that_does_not_exist_is_one_sentence(digits, size, pool, key):
    with pytest.raises(UserError, match=rf"^{key} is \d+, too many for digits: .*; choose a smaller {key}$"):
        loaded(digits, size, pool)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_images_without_variation_are_refused(digits, scaling):
    with pytest.raises(UserError, match="the 1 training samples of digits are all alike; enlarge train_samples"):
        loaded(digits, 1, scaling=scaling)


def test_data_sets_are_found_by_name_in_the_order_of_the_settings(digits, tmp_path):
    settings = DescentSettings(train_samples=50)
    [inputs] = load_all([digits], settings)
    assert torch.equal(inputs.train_x, loaded(digits, 50).train_x)
    with pytest.raises(UserError, match=r"data_sets names cifar10, but the files given hold digits"):
        load_all([digits], settings.model_copy(update={"data_sets": ["digits", "cifar10"]}))
    with pytest.raises(UserError, match="the files given hold nothing"):
        load_all([], settings)


def test_another_seed_trains_on_another_part_of_the_pool_and_is_tested_on_the_same(digits):
    first, again, other = (
        load(digits, train_samples=200, pool=1000, scaling="pixel-mean", seed=seed) for seed in (10, 10, 11)
    )
    assert torch.equal(first.train_x, again.train_x)
    assert not torch.equal(first.train_y, other.train_y) or not torch.equal(first.train_x, other.train_x)
    assert torch.equal(first.test_y, other.test_y)
    assert other.train_y.bincount().tolist() == [20] * 10
