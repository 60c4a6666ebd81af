"""The real MNIST, CIFAR-10, tiny Shakespeare and BSDS500, where JACNORM_MIRROR names a folder that holds them."""

import numpy as np
import pytest
import torch

from jacnorm.data.photos import load
from jacnorm.data.prepare import prepare
from jacnorm.data.read import Prepared, read, read_text


@pytest.fixture(scope="module", params=["mnist", "cifar10"])
def prepared(request, real_mirror, tmp_path_factory) -> Prepared:
    out = tmp_path_factory.mktemp("prepared") / f"{request.param}.safetensors"
    prepare(request.param, out, real_mirror)
    return read(out)


def test_shapes_and_classes(prepared):
    train, shape = (60_000, (1, 28, 28)) if prepared.name == "mnist" else (50_000, (3, 32, 32))
    assert prepared.train.x.shape == (train, *shape)
    assert prepared.test.x.shape == (10_000, *shape)
    assert prepared.train.x.dtype == prepared.test.x.dtype == torch.uint8
    counts = [torch.bincount(part.y).tolist() for part in (prepared.train, prepared.test)]
    if prepared.name == "mnist":  # as published with the original files
        assert counts[0] == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert counts[1] == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    else:
        assert counts == [[5000] * 10, [1000] * 10]


def test_label_and_source(prepared):
    """MNIST passed the MD5 of its four IDX files, or `prepare` would have refused it; JPEG is called by its name."""
    assert prepared.label in {"mnist": ("MNIST",), "cifar10": ("CIFAR-10", "CIFAR-10 (JPEG)")}[prepared.name]
    assert prepared.source == "mirror"


def test_pixels_are_plausible(prepared):
    mean = prepared.train.x.numpy().mean((0, 2, 3)) / 255
    known = {"mnist": [0.1307], "cifar10": [0.4914, 0.4822, 0.4465]}[prepared.name]
    np.testing.assert_allclose(mean, known, atol=5e-4)


def test_tiny_shakespeare(real_mirror, tmp_path):
    """`prepare` compared its digest; that it is cut where it is known to be cut is seen without one."""
    prepare("tinyshakespeare", tmp_path / "out.safetensors", real_mirror)
    prepared = read_text(tmp_path / "out.safetensors")
    assert (prepared.label, prepared.source) == ("tiny Shakespeare", "mirror")
    assert (len(prepared.text), prepared.text.count("\n")) == (1_115_394, 40_000)
    assert prepared.text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n")


def test_photos_of_bsds500(real_mirror):
    """`load` compared their digest; all are 481 x 321 pixels, lying or standing."""
    found = load(None, real_mirror)
    assert (found.label, len(found.train), len(found.test)) == ("BSDS500", 160, 40)
    assert {photo.shape for photo in (*found.train, *found.test)} == {(3, 321, 481), (3, 481, 321)}


def test_mnist_m(real_mirror, tmp_path):
    """Without ink the photos' mean colour is seen, under full ink its complement; patches spare the edges a little."""
    prepare("mnist_m", tmp_path / "out.safetensors", real_mirror)
    prepare("mnist", tmp_path / "mnist.safetensors", real_mirror)
    made, digits = read(tmp_path / "out.safetensors"), read(tmp_path / "mnist.safetensors")
    assert made.label == "MNIST-M (made here from BSDS500)"
    assert made.train.x.shape == (60_000, 3, 28, 28)
    photos = load(None, real_mirror)
    for part, ink, shown in ((made.train, digits.train, photos.train), (made.test, digits.test, photos.test)):
        assert torch.equal(part.y, ink.y)
        colour = np.mean([photo.mean((1, 2)) for photo in shown], 0)
        pixels = part.x.numpy().transpose(1, 0, 2, 3)
        np.testing.assert_allclose(pixels[:, ink.x[:, 0] == 0].mean(1), colour, atol=5)
        np.testing.assert_allclose(pixels[:, ink.x[:, 0] == 255].mean(1), 255 - colour, atol=5)
