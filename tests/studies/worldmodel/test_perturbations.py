"""Perturbations against torch's own sampling of images, the laws of their noise, and their second writing in NumPy."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jacnorm.studies.worldmodel import perturbations_numpy
from jacnorm.studies.worldmodel.pendulum import draw as draw_pendulum
from jacnorm.studies.worldmodel.perturbations import Condition, Noise, conditions, draw, lowest, perturb, rotated
from jacnorm.studies.worldmodel.settings import PendulumSettings

torch.set_num_threads(1)

RAW = PendulumSettings(clip=False, gauss_mean=0.1)
KINDS = [Condition("gauss", 0.15), Condition("mask", 0.3), Condition("rotation", 20.0)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(*shape):
    return torch.rand(shape, generator=generator(5))


def test_conditions_are_the_settings_lists_with_clean_first():
    settings = PendulumSettings(gauss=[0.05, 0.5], masks=[0.25], rotations=[10, 30], gravities=[0.5, 1.5])
    assert conditions(settings) == [
        Condition("clean", 0.0),
        Condition("gauss", 0.05),
        Condition("gauss", 0.5),
        Condition("mask", 0.25),
        Condition("rotation", 10.0),
        Condition("rotation", 30.0),
        Condition("gravity", 0.5),
        Condition("gravity", 1.5),
    ]
    assert [condition.gravity_factor for condition in conditions(settings)] == [1, 1, 1, 1, 1, 1, 0.5, 1.5]


@pytest.mark.parametrize("condition", [Condition("clean", 0.0), Condition("gravity", 1.5)])
def test_clean_images_and_another_gravity_leave_images_alone(condition):
    clean = images(3, 16, 16)
    assert torch.equal(perturb(clean, condition, PendulumSettings(), draw((3, 16, 16), generator())), clean)


# --- noise -----------------------------------------------------------------------------------------------------------


def test_gaussian_noise_has_its_mean_and_variance_on_every_pixel_and_channel():
    clean = images(100, 16, 16, 3)
    added = perturb(clean, Condition("gauss", 0.35), RAW, draw((100, 16, 16, 3), generator())) - clean
    count = added.numel()
    assert added.mean().item() == pytest.approx(0.1, abs=4 * math.sqrt(0.35 / count))
    assert added.var().item() == pytest.approx(0.35, abs=4 * 0.35 * math.sqrt(2 / count))
    channels = torch.corrcoef(added.flatten(0, 2).T) - torch.eye(3)
    assert channels.abs().max() < 4 / math.sqrt(count / 3)


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("shape", [(50, 16, 16), (50, 16, 16, 3)])
def test_a_mask_changes_its_share_of_the_pixels(mode, shape):
    settings = RAW.model_copy(update={"mask_mode": mode, "mask_mean": 0.4, "mask_variance": 0.15})
    clean = images(*shape)
    seen = perturb(clean, Condition("mask", 0.3), settings, draw(shape, generator()))
    changed = (seen != clean).reshape(50, 256, -1)
    assert (changed.all(2) == changed.any(2)).all()  # all channels of a pixel or none
    assert (changed.all(2).sum(1) == round(0.3 * 256)).all()
    values = (seen - clean if mode == "add" else seen)[seen != clean]
    assert values.mean().item() == pytest.approx(0.4, abs=4 * math.sqrt(0.15 / len(values)))
    assert values.var().item() == pytest.approx(0.15, abs=4 * 0.15 * math.sqrt(2 / len(values)))
    if mode == "replace":
        assert abs(torch.corrcoef(torch.stack([seen, clean]).flatten(1)[:, (seen != clean).flatten()])[0, 1]) < 0.1


def test_pixels_are_chosen_anew_in_every_image_and_each_as_often():
    chosen = lowest(torch.rand(4000, 6, 6, generator=generator()), 0.25)
    assert (chosen.flatten(1).sum(1) == 9).all()
    assert (chosen.double().mean(0) - 0.25).abs().max() < 4.5 * math.sqrt(0.25 * 0.75 / 4000)


@given(st.floats(0, 1), st.floats(0, 1))
def test_smaller_masks_lie_in_larger_ones(one, other):
    uniform = torch.rand(2, 5, 7, generator=generator())
    small, large = lowest(uniform, min(one, other)), lowest(uniform, max(one, other))
    assert (large | ~small).all()
    assert small.flatten(1).sum(1).tolist() == [round(min(one, other) * 35)] * 2


@pytest.mark.parametrize("condition", KINDS)
def test_images_are_cut_and_rounded_unless_asked_not_to(condition):
    noise = draw((20, 16, 16), generator())
    clean = images(20, 16, 16)
    raw = perturb(clean, condition, RAW, noise)
    seen = perturb(clean, condition, RAW.model_copy(update={"clip": True}), noise)
    assert seen.min() >= 0
    assert seen.max() <= 1
    assert ((seen * 255).round() - seen * 255).abs().max() < 1e-4
    inside = (raw >= 0) & (raw <= 1)
    assert (seen - raw)[inside].abs().max() <= 0.5 / 255 + 1e-6
    assert (seen[raw < 0] == 0).all()
    assert (seen[raw > 1] == 1).all()
    assert inside.all() == (condition.perturbation == "rotation")


@pytest.mark.parametrize("condition", KINDS)
def test_agents_see_the_same_noise(condition):
    stacked = images(3, 8, 16, 16)
    noise = draw((8, 16, 16), generator())
    together = perturb(stacked, condition, PendulumSettings(), noise)
    for agent in range(3):
        assert torch.equal(perturb(stacked[agent], condition, PendulumSettings(), noise), together[agent])


# --- rotation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0.0, 10.0, 33.3, 90.0, 200.0])
@pytest.mark.parametrize("fill", ["zero", "edge"])
@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 9, 14)])
def test_rotation_is_that_of_torchs_sampling(degrees, fill, shape):
    # Independent: torch interpolates in normalised coordinates and pads by itself.
    height, width = shape[1:]
    before = images(*shape).double()
    angle = math.radians(degrees)
    # from pixels of the result, y downwards, to those of the source; normalised to the edges of half the size
    turn = torch.tensor(
        [
            [math.cos(angle), -math.sin(angle) * height / width, 0],
            [math.sin(angle) * width / height, math.cos(angle), 0],
        ],
        dtype=torch.float64,
    )
    grid = torch.nn.functional.affine_grid(turn[None].expand(2, -1, -1), [2, 1, height, width], align_corners=False)
    expected = torch.nn.functional.grid_sample(
        before.unsqueeze(1), grid, padding_mode="zeros" if fill == "zero" else "border", align_corners=False
    ).squeeze(1)
    assert (rotated(before, degrees, fill) - expected).abs().max() < 1e-9


def test_a_quarter_turn_is_counter_clockwise():
    before = images(3, 16, 16)
    assert (rotated(before, 90.0, "zero") - before.rot90(1, (-2, -1))).abs().max() < 1e-5


def test_a_rotated_pendulum_is_one_at_another_angle():
    angle = torch.linspace(-3, 3, 13, dtype=torch.float64)
    difference = rotated(draw_pendulum(angle), 20.0, "zero") - draw_pendulum(angle - math.radians(20))
    assert difference.abs().mean() < 0.015  # interpolation blurs the rod's border
    wrong = rotated(draw_pendulum(angle), 20.0, "zero") - draw_pendulum(angle + math.radians(20))
    assert wrong.abs().mean() > 0.05


def test_colours_turn_each_by_itself():
    before = images(2, 8, 8, 3)
    together = rotated(before, 25.0, "edge", colour=True)
    for channel in range(3):
        assert torch.equal(together[..., channel], rotated(before[..., channel], 25.0, "edge"))


@pytest.mark.parametrize("degrees", [10.0, 45.0])
def test_fill_shows_beyond_the_border(degrees):
    white = torch.ones(1, 16, 16)
    assert torch.allclose(rotated(white, degrees, "edge"), white)
    dark = rotated(white, degrees, "zero")
    assert dark[0, 0, 0] == 0
    assert dark[0, 8, 8] == pytest.approx(1, abs=1e-6)


# --- the same in NumPy -----------------------------------------------------------------------------------------------


def options(settings):
    return {name: getattr(settings, name) for name in perturbations_numpy.OPTIONS}


@pytest.mark.parametrize("condition", KINDS)
@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("fill", ["zero", "edge"])
@pytest.mark.parametrize("shape", [(20, 24, 3), (16, 16)])
def test_both_writings_agree(condition, mode, fill, shape):
    settings = RAW.model_copy(update={"mask_mode": mode, "fill": fill})
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    noise = draw((1, *shape), generator())
    expected = perturb(torch.from_numpy(image).unsqueeze(0).float() / 255, condition, settings, noise)[0]
    found = perturbations_numpy.apply(
        image.astype(np.float32) / 255,
        condition.perturbation,
        condition.strength,
        options(settings),
        noise.normal[0].numpy(),
        noise.uniform[0].numpy(),
    )
    assert found.dtype == np.float32
    assert np.abs(found - expected.numpy()).max() < 1e-6
    # cut and rounded: the same levels from the same noise, but for ties of rounding
    clipped = perturb(
        torch.from_numpy(image).unsqueeze(0).float() / 255, condition, settings.model_copy(update={"clip": True}), noise
    )[0]
    levels = perturbations_numpy.perturb(
        image,
        condition.perturbation,
        condition.strength,
        options(settings) | {"clip": True},
        Replayed(noise),
    )
    assert levels.dtype == np.uint8
    assert np.abs(levels.astype(int) - (clipped * 255).round().numpy().astype(int)).max() <= 1
    assert (levels == (clipped * 255).round().numpy()).mean() > 0.99


class Replayed:
    """A NumPy generator that hands out given noise."""

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def standard_normal(self, shape, dtype):
        assert shape == self.noise.normal.shape[1:]
        return self.noise.normal[0].numpy().astype(dtype)

    def random(self, shape, dtype):
        assert shape == self.noise.uniform.shape[1:]
        return self.noise.uniform[0].numpy().astype(dtype)


@pytest.mark.parametrize("kind", ["clean", "gravity"])
def test_clean_images_stay_in_numpy_too(kind):
    image = np.full((4, 4, 3), 7, dtype=np.uint8)
    assert perturbations_numpy.perturb(image, kind, 1.0, options(RAW), np.random.default_rng(0)) is image


def test_numpy_noise_is_real_and_repeats_with_its_generator():
    image = np.full((64, 64, 3), 128, dtype=np.uint8)
    one, other, third = (
        perturbations_numpy.perturb(image, "gauss", 0.01, options(RAW), np.random.default_rng(seed))
        for seed in (0, 0, 1)
    )
    assert one.dtype == np.float32  # not clipped: in units of the full scale
    assert (one == other).all()
    assert (one != third).any()
    assert one.mean() == pytest.approx(128 / 255 + 0.1, abs=4 * 0.1 / math.sqrt(image.size))
    assert one.std() == pytest.approx(0.1, rel=0.05)


def test_an_empty_mask_changes_nothing_in_numpy():
    assert not perturbations_numpy.lowest(np.zeros((3, 3), np.float32), 0.0).any()


def test_an_unknown_perturbation_is_refused():
    with pytest.raises(ValueError, match="unknown perturbation blur"):
        perturb(images(1, 4, 4), Condition("blur", 1.0), RAW, draw((1, 4, 4), generator()))
    image = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(ValueError, match="unknown perturbation blur"):
        perturbations_numpy.perturb(image, "blur", 1.0, options(RAW), np.random.default_rng(0))


def test_noise_moves_with_its_device():
    noise = draw((1, 4, 4), generator())
    moved = noise.to(torch.device("meta"))
    assert {moved.normal.device.type, moved.uniform.device.type} == {"meta"}


def test_the_numpy_writing_needs_neither_torch_nor_pydantic():
    code = (
        "import sys; import jacnorm.studies.worldmodel.perturbations_numpy; "
        "print(sorted({'torch', 'pydantic'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
