"""Rows and augmentation of each seed. Shifts are compared with PyTorch's reflecting pad and a crop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jacnorm.errors import UserError
from jacnorm.studies.lipschitz.inputs import load
from jacnorm.studies.lipschitz.samples import augment, draw
from jacnorm.studies.lipschitz.settings import PairedSettings

torch.set_num_threads(1)

SETTINGS = PairedSettings(seeds=[10, 11], train_samples=50, validation_samples=30, test_samples=700, batch=20)


@pytest.fixture(scope="module")
def inputs(digits):
    return load(digits, scaling="standard")


def test_the_parts_of_a_seed_are_balanced_and_share_no_sample(inputs):
    samples = draw(SETTINGS, inputs)
    whole, tests = len(inputs.train_y), len(inputs.test_y)
    assert torch.equal(samples.x, torch.cat([inputs.train_x, inputs.test_x]))
    for run in range(2):
        train, validation, test = (each[run] for each in (samples.train, samples.validation, samples.test))
        assert (len(train), len(validation), len(test)) == (50, 30, 700)
        assert len(torch.cat([train, validation, test]).unique()) == 780
        assert torch.cat([train, validation]).max() < whole
        assert (samples.y[train].bincount() == 5).all()
        assert (samples.y[validation].bincount() == 3).all()
        assert set(range(whole, whole + tests)) <= set(test.tolist())  # the whole test split, then unused rows
    assert not torch.equal(samples.train[0], samples.train[1])


def test_few_test_samples_come_from_the_test_split_alone(inputs):
    samples = draw(SETTINGS.model_copy(update={"test_samples": 100}), inputs)
    assert samples.test.shape == (2, 100)
    assert (samples.test >= len(inputs.train_y)).all()
    assert not torch.equal(samples.test[0].sort().values, samples.test[1].sort().values)


def test_a_seed_has_the_same_samples_in_any_company_and_whatever_is_held_out(inputs):
    both = draw(SETTINGS, inputs)
    alone = draw(SETTINGS.model_copy(update={"seeds": [11]}), inputs)
    without = draw(SETTINGS.model_copy(update={"validation_samples": 0}), inputs)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(alone, part)[0], getattr(both, part)[1])
        assert torch.equal(getattr(both.of([11, 10]), part), getattr(both, part).flip(0))
    assert torch.equal(without.train, both.train)
    assert without.validation.shape == (2, 0)


def test_all_training_samples_are_what_validation_leaves(inputs):
    settings = SETTINGS.model_copy(update={"train_samples": None, "test_samples": 10_000})
    samples = draw(settings, inputs)
    whole = len(inputs.train_y)
    assert samples.train.shape == (2, whole - 30)
    assert samples.test.shape == (2, len(inputs.test_y))
    assert torch.equal(torch.cat([samples.train[0], samples.validation[0]]).sort().values, torch.arange(whole))


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (
            {"train_samples": 2000},
            r"train_samples is 2000, more than digits can give: .* class \d.*; lower train_samples",
        ),
        (
            {"validation_samples": 1400},
            "validation_samples is 1400, more than digits can give: .*; lower validation_samp",
        ),
        ({"batch": 7}, "batch is 7, which leaves a single one of 50 training samples for a step"),
        ({"batch": 1}, "batch is 1, which leaves a single one"),
    ],
)
def test_impossible_parts_are_refused_in_words(inputs, update, message):
    with pytest.raises(UserError, match=message):
        draw(SETTINGS.model_copy(update=update), inputs)


def streams(seed, count=2):
    return [torch.Generator().manual_seed(100 * seed + each) for each in range(count)]


@settings(max_examples=30, deadline=None)
@given(
    shift=st.integers(0, 4),
    flip=st.booleans(),
    height=st.integers(5, 7),
    width=st.integers(5, 7),
    seed=st.integers(0, 99),
)
def test_each_image_is_a_crop_of_its_reflecting_pad_or_the_mirror_image_of_one(shift, flip, height, width, seed):
    x = torch.arange(2 * 3 * 2 * height * width, dtype=torch.float32).view(2, 3, 2, height, width)
    found = augment(x, shift, flip, streams(seed))
    padded = torch.nn.functional.pad(x.flatten(0, 1), (shift,) * 4, mode="reflect") if shift else x.flatten(0, 1)
    for image, source in zip(found.flatten(0, 1), padded, strict=True):
        crops = [source[:, i : i + height, j : j + width] for i in range(2 * shift + 1) for j in range(2 * shift + 1)]
        if flip:
            crops += [crop.flip(2) for crop in crops]
        assert any(torch.equal(image, crop) for crop in crops)


def test_shifts_and_mirror_images_are_uniform():
    x = torch.arange(49.0).view(1, 1, 1, 7, 7).expand(1, 4000, 1, 7, 7)
    found = augment(x, 2, True, streams(0, 1))[0, :, 0]
    centre = found[:, 3, 3]  # of a shift by (i, j): 24 + 7 i + j, or mirrored the same
    counts = torch.stack([(centre == 24 + 7 * i + j).sum() for i in range(-2, 3) for j in range(-2, 3)])
    assert counts.sum() == 4000
    assert (counts.float() / 4000 - 1 / 25).abs().max() < 4 * (1 / 25 / 4000) ** 0.5
    mirrored = (found[:, 3, 2] > found[:, 3, 3]).float().mean().item()
    assert mirrored == pytest.approx(0.5, abs=0.03)


def test_no_shift_and_no_mirror_image_is_no_change_and_each_seed_has_its_own_stream():
    x = torch.randn(2, 3, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment(x, 0, False, streams(0)), x)
    twins = x[:1].expand(2, -1, -1, -1, -1)
    both = augment(twins, 2, True, streams(0))
    assert not torch.equal(both[0], both[1])
    assert torch.equal(augment(twins[1:], 2, True, streams(0)[1:])[0], both[1])


def test_a_shift_beyond_the_image_is_refused():
    with pytest.raises(UserError, match="shift is 5, but the images measure 6 x 5 pixels; take at most 4"):
        augment(torch.zeros(1, 2, 1, 6, 5), 5, False, streams(0, 1))
