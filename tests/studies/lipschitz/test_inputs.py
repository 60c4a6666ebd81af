"""The prepared digits as both kinds of network take them."""

from __future__ import annotations

import pytest
import torch

from jacnorm.data.read import read
from jacnorm.errors import UserError
from jacnorm.studies.lipschitz.inputs import load


def test_unit_scaling_divides_by_the_largest_pixel_value(digits):
    inputs = load(digits)
    stored = read(digits)
    assert inputs.train_x.dtype == torch.float32
    assert torch.equal(inputs.train_x * 16, stored.train.x.float())
    assert torch.equal(inputs.test_x * 16, stored.test.x.float())
    assert (inputs.image, inputs.features, inputs.classes, inputs.name) == ((1, 8, 8), 64, 10, "digits")
    assert inputs.digest == stored.digest


def test_standard_scaling_is_one_mean_and_deviation_of_the_kept_samples(digits):
    inputs = load(digits, 100, "standard")
    assert inputs.train_x.double().mean().item() == pytest.approx(0, abs=1e-6)
    assert inputs.train_x.double().std(correction=0).item() == pytest.approx(1, abs=1e-6)
    unit = load(digits, 100)
    slope = (inputs.test_x.max() - inputs.test_x.min()) / (unit.test_x.max() - unit.test_x.min())
    torch.testing.assert_close(inputs.test_x, (unit.test_x - unit.train_x.mean()) * slope, rtol=1e-4, atol=1e-4)


def test_a_subset_is_balanced_and_always_the_same(digits):
    first, second = load(digits, 55), load(digits, 55, "standard")
    assert torch.equal(first.train_y, second.train_y)
    counts = first.train_y.bincount(minlength=10)
    assert counts.sum() == 55
    assert counts.max() - counts.min() == 1
    assert len(first.test_y) == len(load(digits).test_y)


def test_a_subset_that_does_not_exist_is_one_sentence(digits):
    with pytest.raises(UserError, match="class"):
        load(digits, 5000)
