"""Digits on photos."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.tiny import arrays, tiny, write_mirror

from jacnorm.data import catalogue, photos
from jacnorm.data.blend import blend, places
from jacnorm.data.catalogue import find
from jacnorm.data.digests import content_digest
from jacnorm.data.embedded import arrays as embedded
from jacnorm.data.photos import Photos
from jacnorm.data.prepare import main, prepare
from jacnorm.data.read import read
from jacnorm.data.sources import load
from jacnorm.errors import UserError

SMALL, LARGE = np.full((3, 4, 5), 7, np.uint8), np.arange(3 * 9 * 6).reshape(3, 9, 6).astype(np.uint8)


def test_golden_places():
    """They must never change, nor may the data sets; worked out with integers of Python, apart from the generator."""
    import hashlib

    seed = int(hashlib.sha256(b"digits_m train").hexdigest()[:16], 16)
    raw = [int(number) for number in np.random.PCG64(seed).random_raw(6)]
    sizes = [(427, 640), (100, 50)]
    found = places(2, [np.zeros((3, *size)) for size in sizes], (8, 8), "digits_m train")
    expected = [
        (raw[i] % 2, raw[2 + i] % (sizes[raw[i] % 2][0] - 7), raw[4 + i] % (sizes[raw[i] % 2][1] - 7)) for i in (0, 1)
    ]
    assert np.array(found).T.tolist() == [list(row) for row in expected]
    assert np.array(places(3, [np.zeros((3, 427, 640))], (8, 8), "digits_m train")).T.tolist() == [
        [0, 213, 548],
        [0, 378, 421],
        [0, 408, 418],
    ]


@given(st.integers(1, 4), st.integers(1, 4))
def test_every_place_of_every_photo_is_reached_and_none_outside(height, width):
    number, down, right = places(2000, [SMALL, LARGE], (height, width), f"{height} {width}")
    reached = set(zip(number.tolist(), down.tolist(), right.tolist(), strict=True))
    assert reached == {
        (which, top, left)
        for which, photo in enumerate((SMALL, LARGE))
        for top in range(photo.shape[1] - height + 1)
        for left in range(photo.shape[2] - width + 1)
    }


@pytest.mark.parametrize("pixel_max", [16, 255])
def test_pixels_are_absolute_differences(pixel_max):
    """Oracle: pixel by pixel with numbers of Python, which do not overflow; full ink on black and white among them."""
    digits = np.random.default_rng(0).integers(0, pixel_max + 1, (40, 1, 2, 3)).astype(np.uint8)
    digits[0] = pixel_max
    under = [LARGE, np.full((3, 4, 4), 255, np.uint8), np.zeros((3, 2, 3), np.uint8)]
    made = blend(digits, pixel_max, under, "key")
    assert (made.shape, made.dtype) == ((40, 3, 2, 3), np.uint8)
    number, down, right = places(40, under, (2, 3), "key")
    for n in range(40):
        for c in range(3):
            for i in range(2):
                for j in range(3):
                    ink = int(int(digits[n, 0, i, j]) * 255 / pixel_max + 0.5)
                    patch = int(under[number[n]][c, int(down[n]) + i, int(right[n]) + j])
                    assert made[n, c, i, j] == abs(patch - ink)


def test_a_photo_smaller_than_a_digit():
    with pytest.raises(UserError) as caught:
        blend(np.zeros((1, 1, 5, 5), np.uint8), 255, [LARGE, SMALL], "key")
    assert str(caught.value) == "a photo is smaller than 5 x 5 pixels, the size of a digit; leave it out"


def test_digits_m_from_the_command_line(tmp_path):
    out = tmp_path / "digits_m.safetensors"
    main(["--name", "digits_m", "--out", str(out)])
    made, digits = read(out), embedded(find("digits"))
    assert (made.name, made.label, made.source, made.pixel_max) == ("digits_m", "digits-M (made here)", "embedded", 255)
    assert made.train.x.shape == (1437, 3, 8, 8)
    assert made.test.x.shape == (360, 3, 8, 8)
    shown = embedded(find("photos"))
    for split, part in (("train", made.train), ("test", made.test)):
        np.testing.assert_array_equal(part.y, digits[f"{split}_y"])
        # Where there is no ink, the patch is seen as it is, and so that it is from this split's photo.
        x, photo = part.x.numpy(), shown[f"{split}_x"]
        _, down, right = places(len(x), photo, (8, 8), f"digits_m {split}")
        for row in range(0, len(x), 50):
            patch = photo[0][:, int(down[row]) :, int(right[row]) :][:, :8, :8]
            bare = digits[f"{split}_x"][row, 0] == 0
            np.testing.assert_array_equal(x[row][:, bare], patch[:, bare])
            full = digits[f"{split}_x"][row, 0] == 16
            np.testing.assert_array_equal(x[row][:, full], 255 - patch[:, full])


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror of a small MNIST, and a catalogue that expects it."""
    entry = tiny("mnist")
    monkeypatch.setitem(catalogue.CATALOGUE, "mnist", entry)
    monkeypatch.setitem(catalogue.CATALOGUE, "mnist_m", replace(find("mnist_m"), sizes=entry.sizes))
    write_mirror(tmp_path / "mirror", entry, arrays(entry))
    return tmp_path / "mirror"


@pytest.mark.parametrize("label", ["BSDS500", "user's photos"])
def test_mnist_m_is_the_mirrors_digits_on_the_given_photos(label, mirror, monkeypatch, tmp_path):
    shown = [np.full((3, 30, 31), value, np.uint8) for value in (255, 0, 255)]
    asked = []
    monkeypatch.setattr(photos, "load", lambda *places: asked.append(places) or Photos(shown[:1], shown[1:2], label))
    loaded = load(find("mnist_m"), mirror, tmp_path / "own")
    assert asked == [(tmp_path / "own", mirror)]
    assert (loaded.label, loaded.source) == (f"MNIST-M (made here from {label})", "mirror")
    assert loaded.digest == content_digest(loaded.arrays)
    digits = arrays(tiny("mnist"))
    for split, made in (("train", 255 - digits["train_x"]), ("test", digits["test_x"])):  # on white, on black
        np.testing.assert_array_equal(loaded.arrays[f"{split}_x"], np.repeat(made, 3, axis=1))
        np.testing.assert_array_equal(loaded.arrays[f"{split}_y"], digits[f"{split}_y"])


def test_photos_path_of_the_command_line_leaves_no_trace(mirror, tmp_path):
    from PIL import Image

    folder, out = tmp_path / "a private place", tmp_path / "out.safetensors"
    folder.mkdir()
    for name in "ab":
        Image.fromarray(np.full((40, 30, 3), 255, np.uint8)).save(folder / f"{name}.png")
    main(["--name", "mnist_m", "--out", str(out), "--mirror", str(mirror), "--photos-path", str(folder)])
    assert read(out).label == "MNIST-M (made here from user's photos)"
    assert b"private" not in out.read_bytes()


def test_mnist_m_without_photos_asks_for_them_before_it_fetches_digits(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr("jacnorm.data.hub.download", never)
    with pytest.raises(UserError, match="mnist_m is made from MNIST and photos, and none are given"):
        prepare("mnist_m", tmp_path / "out")
