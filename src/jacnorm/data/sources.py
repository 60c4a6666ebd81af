"""A named data set as arrays, from wherever it is: scikit-learn itself, a local mirror, or the Hugging Face hub.

Or made here, of digits and photos.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from jacnorm.data import embedded, mirror, photos
from jacnorm.data.blend import blend
from jacnorm.data.catalogue import SPLITS, Dataset, find
from jacnorm.data.digests import content_digest, idx_md5
from jacnorm.data.images import Decoded, decode
from jacnorm.errors import UserError

Source = Literal["embedded", "hub", "mirror"]


@dataclass(frozen=True)
class Loaded:
    """The decoded arrays of a data set and what is known about them."""

    dataset: Dataset
    arrays: dict[str, np.ndarray]
    """train_x, test_x: (N, channels, height, width) uint8; train_y, test_y: (N,) int64."""
    label: str
    """Honest name: "CIFAR-10 (JPEG)" if any image was stored as JPEG, whose pixels are not the original ones; blended
    digits say what the photos were.
    """
    digest: str
    """`content_digest` of the arrays."""
    source: Source
    revision: str = ""
    """Commit on the hub, where known."""


def load(dataset: Dataset, folder: Path | str | None = None, photo_folder: Path | str | None = None) -> Loaded:
    """Load a data set: embedded ones from scikit-learn, others from the mirror if there is one, else from the hub.

    The mirror is `folder`, else the environment variable JACNORM_MIRROR. If a mirror is named, the hub is never asked,
    even if the mirror lacks the data set. Photos under digits come from `photo_folder`, else JACNORM_PHOTOS, else the
    mirror. Raises UserError if the data are missing, damaged or not those that the catalogue expects.
    """
    if dataset.blend is not None:
        return _blended(dataset, folder, photo_folder)
    if dataset.hub is None:
        arrays = {name: np.ascontiguousarray(array) for name, array in embedded.arrays(dataset).items()}
        loaded = Loaded(dataset, arrays, dataset.label, content_digest(arrays), "embedded")
        _check_sha256(loaded)
        return loaded
    place = mirror.folder(folder)
    if place is not None:
        parts = {split: decode(dataset, split, mirror.rows(dataset, split, place)) for split in SPLITS}
        return _assemble(dataset, parts, "mirror", "")
    from jacnorm.data.hub import download

    opened = download(dataset)
    parts = {split: decode(dataset, split, opened.rows(split)) for split in SPLITS}
    return _assemble(dataset, parts, "hub", opened.revision)


def _assemble(dataset: Dataset, parts: dict[str, Decoded], source: Source, revision: str) -> Loaded:
    for split, part in parts.items():
        _check_idx(dataset, f"{split}_x", part.x[:, 0], part.files)
        _check_idx(dataset, f"{split}_y", part.y, part.files)
    arrays = {f"{split}_{kind}": getattr(part, kind) for split, part in parts.items() for kind in ("x", "y")}
    lossy = any("JPEG" in part.formats for part in parts.values())
    # What is resized has lost its original pixels anyway, and its label says so.
    label = f"{dataset.label} (JPEG)" if lossy and not dataset.resized else dataset.label
    return Loaded(dataset, arrays, label, content_digest(arrays), source, revision)


def _blended(dataset: Dataset, folder: Path | str | None, photo_folder: Path | str | None) -> Loaded:
    """Digits laid over photos; source and revision are those of the digits."""
    # Photos first: without them, the digits need not be fetched.
    if dataset.blend.photos == "photos":
        shown = embedded.arrays(find("photos"))
        under = {split: list(shown[f"{split}_x"]) for split in SPLITS}
        label = dataset.label
    else:
        found = photos.load(photo_folder, folder)
        under = {"train": found.train, "test": found.test}
        label = dataset.label.format(photos=found.label)
    source = find(dataset.blend.digits)
    digits = load(source, folder)
    arrays = dict(digits.arrays)
    for split in SPLITS:
        arrays[f"{split}_x"] = blend(arrays[f"{split}_x"], source.pixel_max, under[split], f"{dataset.name} {split}")
    return replace(digits, dataset=dataset, arrays=arrays, label=label, digest=content_digest(arrays))


def _check_idx(dataset: Dataset, name: str, array: np.ndarray, files: tuple[str, ...]) -> None:
    expected = dataset.idx_md5.get(name)
    if expected is not None and (found := idx_md5(array)) != expected:
        raise UserError(
            f"{', '.join(files)}: {name} in IDX form has MD5 {found}, but that of {dataset.label} is {expected}; "
            "replace it with a copy of the original"
        )


def _check_sha256(loaded: Loaded) -> None:
    expected = loaded.dataset.sha256
    if expected is not None and loaded.digest != expected:
        raise UserError(
            f"{loaded.label}: the arrays have SHA-256 {loaded.digest}, expected {expected}; "
            "install scikit-learn afresh in the pinned version"
        )
