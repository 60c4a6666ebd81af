"""Encoded images to arrays, with every refusal naming the file and the row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np

from jacnorm.data.catalogue import Dataset
from jacnorm.errors import UserError

_FORMATS = ("PNG", "JPEG")
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Batch:
    """Some rows of one file, in its order."""

    images: list[bytes | None]
    labels: list[int | None]
    where: str
    """The file, for error messages."""
    rows: Sequence[int]
    """Rows of the file that these are, counted from 0."""


@dataclass(frozen=True)
class Decoded:
    """The images and labels of one split, and the formats in which the images were stored."""

    x: np.ndarray
    """(N, channels, height, width), uint8."""
    y: np.ndarray
    """(N,), int64."""
    formats: frozenset[str]
    """Subset of {"PNG", "JPEG"}, read from the image bytes themselves."""
    files: tuple[str, ...]
    """Where the rows came from, for error messages."""


def decode(dataset: Dataset, split: str, batches: Iterable[Batch]) -> Decoded:
    """Decode all rows of a split, in stored order.

    Images of a data set that is `resized` become RGB and are scaled with antialiasing (bilinear).
    Raises UserError if an image cannot be decoded or has another size or colour mode, if a label is not a class
    number, or if the number of rows differs from the catalogue's.
    """
    size = dataset.sizes[split]
    x = np.empty((size, *dataset.shape), np.uint8)
    y = np.empty(size, np.int64)
    formats: set[str] = set()
    files: dict[str, None] = {}
    count = 0
    for batch in batches:
        files[batch.where] = None
        for data, label, row in zip(batch.images, batch.labels, batch.rows, strict=True):
            where = f"{batch.where}, row {row}"
            if count < size:
                x[count], stored = _image(data, dataset, where)
                y[count] = _label(label, len(dataset.classes), where)
                formats.add(stored)
            count += 1
    if count != size:
        raise UserError(
            f"{', '.join(files) or 'the source'}: {count} rows where the {split} split of {dataset.label} has {size}; "
            "replace it with a complete copy"
        )
    return Decoded(x, y, frozenset(formats), tuple(files))


def _image(data: bytes | None, dataset: Dataset, where: str) -> tuple[np.ndarray, str]:
    from PIL import Image

    if data is None:
        raise UserError(f"{where}: the image is missing; replace the file with a fresh copy")
    channels, height, width = dataset.shape
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            stored = str(image.format)
            if dataset.resized:
                image = image.convert(_MODES[channels]).resize((width, height), Image.Resampling.BILINEAR)
            # Before decoding, so that a header which claims a huge picture costs nothing.
            if image.size != (width, height) or image.mode != _MODES[channels]:
                raise UserError(
                    f"{where}: the image has {image.size[0]} x {image.size[1]} pixels in mode {image.mode}, expected "
                    f"{width} x {height} in mode {_MODES[channels]}; replace the file with a fresh copy"
                )
            pixels = np.asarray(image)
    # Pillow reports damage with whatever its decoder met: OSError, SyntaxError, ValueError, struct.error and others.
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{where}: the image cannot be decoded ({_brief(error)}); replace the file with a fresh copy"
        ) from error
    return (pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)), stored


def _label(label: int | None, classes: int, where: str) -> int:
    if label is None or not 0 <= label < classes:
        raise UserError(
            f"{where}: the label is {label}, expected 0 to {classes - 1}; replace the file with a fresh copy"
        )
    return label


def _brief(error: Exception) -> str:
    """One line about an error, without the addresses of objects that some messages hold."""
    return f"{type(error).__name__}: {error}".splitlines()[0].split(" <_io.")[0]
