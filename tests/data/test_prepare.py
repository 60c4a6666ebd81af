import hashlib
import json
import os
import platform
import re

import numpy as np
import pytest
from tests.data.tiny import arrays, shard, tiny, write_mirror

from jacnorm.data import catalogue
from jacnorm.data.digests import content_digest
from jacnorm.data.prepare import PrepareSettings, main, prepare
from jacnorm.data.read import read, read_text
from jacnorm.data.texts import load
from jacnorm.errors import UserError
from jacnorm.files import load_tensors, save_tensors


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror of a small CIFAR-10 stored as JPEG, and a catalogue that expects it."""
    entry = tiny("cifar10")
    monkeypatch.setitem(catalogue.CATALOGUE, "cifar10", entry)
    write_mirror(tmp_path / "a private place", entry, arrays(entry), "JPEG")
    return tmp_path / "a private place"


def test_digits_from_the_command_line(tmp_path):
    out = tmp_path / "new" / "digits.safetensors"
    main(["--name", "digits", "--out", str(out)])
    prepared = read(out)
    assert (len(prepared.train), len(prepared.test)) == (1437, 360)
    assert prepared.train.x.numpy().dtype == np.uint8
    assert prepared.train.y.numpy().dtype == np.int64
    assert (prepared.name, prepared.label, prepared.source, prepared.revision) == (
        "digits",
        "scikit-learn digits",
        "embedded",
        "",
    )
    assert prepared.classes == tuple("0123456789")
    assert prepared.pixel_max == 16 == prepared.train.x.max()
    assert prepared.licence.startswith("CC BY 4.0")
    assert prepared.split.startswith("36 test images per class")
    assert [path.name for path in out.parent.iterdir()] == ["digits.safetensors"]


def test_documentation_of_python_from_the_command_line(tmp_path):
    out = tmp_path / "docs.safetensors"
    main(["--name", "python_docs", "--out", str(out)])
    prepared = read_text(out)
    assert prepared.text == load(catalogue.find("python_docs")).text
    assert prepared.digest == hashlib.sha256(prepared.text.encode()).hexdigest()
    assert prepared.label == f"Python {platform.python_version()} documentation"
    assert (prepared.name, prepared.source, prepared.revision) == ("python_docs", "embedded", "")
    assert prepared.licence.startswith("PSF-2.0")


def test_own_text_from_the_command_line_leaves_no_trace_of_its_path(tmp_path):
    out, mine = tmp_path / "text.safetensors", tmp_path / "a private place" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("Wie groß ist σ?\n")
    main(["--name", "text", "--out", str(out), "--text-path", str(mine)])
    prepared = read_text(out)
    assert (prepared.name, prepared.label, prepared.text) == ("text", "user's text", "Wie groß ist σ?\n")
    assert (prepared.source, prepared.digest) == ("file", hashlib.sha256(mine.read_bytes()).hexdigest())
    for private in (b"private", b"mine"):
        assert private not in out.read_bytes()


def test_the_same_text_has_the_same_bytes_wherever_it_lies(tmp_path, monkeypatch):
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for name, file in zip(("one.txt", "two.txt"), files, strict=True):
        (tmp_path / name).write_text("text")
        monkeypatch.setenv("JACNORM_TEXT", str(tmp_path / name))
        prepare("text", file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_images_are_no_text_and_a_text_no_images(tmp_path):
    digits, docs = tmp_path / "digits.safetensors", tmp_path / "docs.safetensors"
    prepare("digits", digits)
    prepare("python_docs", docs)
    with pytest.raises(UserError) as caught:
        read_text(digits)
    assert str(caught.value) == f"{digits} holds scikit-learn digits, images; give a text"
    with pytest.raises(UserError) as caught:
        read(docs)
    assert str(caught.value) == (
        f"{docs} holds Python {platform.python_version()} documentation, a text; give a data set of images"
    )


def test_digest_is_that_of_the_stored_tensors(mirror, tmp_path):
    prepare("cifar10", tmp_path / "cifar.safetensors", mirror)
    tensors, _ = load_tensors(tmp_path / "cifar.safetensors")
    assert (
        content_digest({name: tensor.numpy() for name, tensor in tensors.items()})
        == read(tmp_path / "cifar.safetensors").digest
    )


def test_mirror_from_the_command_line_leaves_no_trace_of_its_path(mirror, tmp_path):
    out = tmp_path / "cifar.safetensors"
    main(["--name", "cifar10", "--out", str(out), "--mirror", str(mirror)])
    assert (read(out).source, read(out).label) == ("mirror", "CIFAR-10 (JPEG)")
    assert b"private" not in out.read_bytes()


def test_same_bytes_every_time(mirror, tmp_path):
    files = [tmp_path / f"{run}.safetensors" for run in range(3)]
    for file in files:
        prepare("cifar10", file, mirror)
    assert len({file.read_bytes() for file in files}) == 1


def test_failure_leaves_the_old_file_alone(mirror, tmp_path):
    out = tmp_path / "out.safetensors"
    prepare("cifar10", out, mirror)
    before = out.read_bytes()
    shard(mirror, tiny("cifar10"), "test").unlink()
    with pytest.raises(UserError):
        prepare("cifar10", out, mirror)
    assert out.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a private place", "out.safetensors"]


def test_mistake_is_one_line_and_status_two(tmp_path, capfd):
    with pytest.raises(SystemExit) as caught:
        main(["--name", "mnist", "--out", str(tmp_path / "x"), "--mirror", str(tmp_path)])
    assert caught.value.code == 2
    expected = tmp_path / "ylecun" / "mnist" / "mnist" / "train-00000-of-00001.parquet"
    assert capfd.readouterr().err == (
        f"ERROR: {expected} is missing from the mirror; copy it there from ylecun/mnist on the Hugging Face hub\n"
    )
    assert not (tmp_path / "x").exists()


def test_unknown_name(tmp_path, capfd):
    with pytest.raises(UserError, match='data set "mnits" is unknown; choose one of digits, photos, digits_m, mnist, '):
        prepare("mnits", tmp_path / "x")
    with pytest.raises(UserError, match=r"'digits', 'photos', .* 'tinyshakespeare' or 'text'"):
        PrepareSettings(name="mnits")
    with pytest.raises(SystemExit) as caught:
        main(["--name", "mnits", "--out", str(tmp_path / "x")])
    assert caught.value.code == 2
    assert "fashion_mnist" in capfd.readouterr().err


def test_help_documents_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for words in (
        "--name {digits,photos,",
        "name of the data set",
        "--mirror",
        "JACNORM_MIRROR",
        "--text-path",
        "JACNORM_TEXT",
        "--photos-path",
        "JACNORM_PHOTOS",
        "--out",
        "safetensors file to write",
    ):
        assert words in text


def test_other_files_are_not_data_sets(tmp_path):
    import torch

    path = tmp_path / "weights.safetensors"
    for metadata in ({}, {"data set": "{"}, {"data set": json.dumps({"classes": []})}, {"data set": "[]"}):
        save_tensors(path, {"w": torch.zeros(1)}, metadata)
        for reader in (read, read_text):
            with pytest.raises(UserError) as caught:
                reader(path)
            assert (
                str(caught.value)
                == f"{path} is not a data set made by jacnorm.data.prepare; delete it and run that step again"
            )


def test_missing_or_cut_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        read_text(tmp_path / "none.safetensors")
    path = tmp_path / "digits.safetensors"
    prepare("digits", path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{re.escape(str(path))} is not a readable safetensors file"):
        read(path)
