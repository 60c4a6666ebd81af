"""Folders of photos: the user's and the mirror's."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jacnorm.data import photos
from jacnorm.data.photos import BSDS500, MIRRORED, digest, given, listed, load
from jacnorm.errors import UserError

FIX = "correct photos_path: in the configuration or JACNORM_PHOTOS"


def fill(folder, number: int = 6):
    """Photos that are each of one grey, named so that their order is not that of their making, and things beside."""
    folder.mkdir(parents=True)
    for value in reversed(range(number)):
        ending = ("jpg", "PNG", "jpeg")[value % 3]
        Image.fromarray(np.full((9, 8 + value, 3), 10 * value, np.uint8)).save(folder / f"photo {value}.{ending}")
    (folder / "Thumbs.db").write_bytes(b"what a download left")
    (folder / "notes.txt").write_text("no photo")
    return folder


def sentence(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def test_photos_by_name_four_fifths_to_train(tmp_path):
    found = load(fill(tmp_path / "mine"))
    assert found.label == "user's photos"
    assert [photo.shape for photo in (*found.train, *found.test)] == [(3, 9, 8 + value) for value in range(6)]
    assert [int(photo.mean().round()) for photo in found.train] == [0, 10, 20, 30]
    assert [int(photo.mean().round()) for photo in found.test] == [40, 50]


def test_grey_photos_and_those_with_transparency_become_three_channels(tmp_path):
    Image.fromarray(np.full((9, 8), 3, np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((9, 8, 4), 3, np.uint8)).save(tmp_path / "b.png")
    assert [photo.shape for each in (load(tmp_path).train, load(tmp_path).test) for photo in each] == [(3, 9, 8)] * 2


def test_the_argument_goes_before_the_variable(tmp_path, monkeypatch):
    assert given() == ""
    monkeypatch.setenv("JACNORM_PHOTOS", str(fill(tmp_path / "variable", 2)))
    assert len(load().train) == 1
    assert given(tmp_path / "argument") == str(tmp_path / "argument")
    assert len(load(fill(tmp_path / "argument", 5)).train) == 4


def test_digest_is_of_names_and_contents_and_not_of_the_place(tmp_path):
    first, second = fill(tmp_path / "one"), fill(tmp_path / "two")
    before = digest(listed(first))
    text = "".join(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in listed(first))
    assert before == digest(listed(second)) == hashlib.sha256(text.encode()).hexdigest()
    (second / "photo 0.jpg").rename(second / "photo 00.jpg")
    assert digest(listed(second)) != before
    (first / "photo 1.PNG").write_bytes(b"")
    assert digest(listed(first)) != before


def test_mirror_must_hold_bsds500(tmp_path, monkeypatch):
    missing = tmp_path / MIRRORED
    assert sentence(load, None, tmp_path) == (
        f"{missing} is missing from the mirror; copy the training photos of BSDS500 there, or set photos_path: in the "
        "configuration or JACNORM_PHOTOS to a folder of photos"
    )
    found = digest(listed(fill(missing)))
    assert sentence(load, None, tmp_path) == (
        f"{missing}: the photos have digest {found}, but those of BSDS500 have {BSDS500}; replace them with a copy of "
        "the original, or name them as your own by photos_path: in the configuration"
    )
    monkeypatch.setattr(photos, "BSDS500", found)
    assert load(None, tmp_path).label == "BSDS500"
    assert load(missing).label == "BSDS500"  # what it is called follows from what it is
    monkeypatch.setenv("JACNORM_MIRROR", str(tmp_path))
    assert len(load().test) == 2


def test_no_photos_at_all():
    assert sentence(load) == (
        "mnist_m is made from MNIST and photos, and none are given; set photos_path: in the configuration or "
        "JACNORM_PHOTOS to a folder of photos, or mirror: or JACNORM_MIRROR to one that holds bsds500/images/train"
    )


def test_folders_that_will_not_do(tmp_path):
    (tmp_path / "file").write_text("")
    assert sentence(load, tmp_path / "none") == f"{tmp_path / 'none'} does not exist; {FIX}"
    assert sentence(load, tmp_path / "file") == f"{tmp_path / 'file'} is not a folder; {FIX}"
    assert sentence(load, tmp_path / ("a" * 300)).endswith(" cannot be listed (File name too long); make it readable")
    assert sentence(load, fill(tmp_path / "one", 1)) == (
        f"{tmp_path / 'one'} holds 1 JPEG or PNG files; give a folder of at least two photos"
    )


def test_photos_that_will_not_do(tmp_path):
    folder = fill(tmp_path / "mine")
    (folder / "photo 9.png").mkdir()
    assert sentence(load, folder) == (
        f"{folder / 'photo 9.png'} cannot be read (Is a directory); make it readable or leave it out"
    )
    (folder / "photo 9.png").rmdir()
    whole = (folder / "photo 0.jpg").read_bytes()
    (folder / "photo 0.jpg").write_bytes(whole[: len(whole) // 2])
    assert sentence(load, folder).startswith(f"{folder / 'photo 0.jpg'} cannot be decoded (")
    (folder / "photo 0.jpg").write_bytes(b"no photo")
    assert sentence(load, folder).startswith(f"{folder / 'photo 0.jpg'} cannot be decoded (UnidentifiedImageError: ")


def test_cheap_to_import():
    heavy = "{'torch', 'datasets', 'pyarrow', 'numpy', 'sklearn', 'PIL'}"
    program = f"import sys, jacnorm.data.photos; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
