"""Prepared data: read images or a text; divide, take subsets, standardise. Everything is deterministic."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from jacnorm.data.stored import unpack
from jacnorm.errors import UserError
from jacnorm.files import load_tensors

_CHUNK = 4096


@dataclass(frozen=True)
class Split:
    """Images and their class numbers, row by row."""

    x: Tensor
    """(N, channels, height, width), uint8 as stored."""
    y: Tensor
    """(N,), int64."""

    def __len__(self) -> int:
        """Number of rows N."""
        return len(self.y)

    def take(self, rows: Tensor) -> Split:
        """The given rows, in the given order."""
        return Split(self.x[rows], self.y[rows])


@dataclass(frozen=True)
class Prepared:
    """A data set as the step `jacnorm.data.prepare` stored it."""

    name: str
    label: str
    """What to call it in a report, for instance "CIFAR-10 (JPEG)"."""
    train: Split
    test: Split
    classes: tuple[str, ...]
    pixel_max: int
    """Largest value that a pixel can take: 16 for digits, else 255."""
    split: str
    """How train and test were separated."""
    digest: str
    """SHA-256 of the decoded arrays."""
    source: str
    """embedded, hub or mirror."""
    revision: str
    """Commit on the hub, or "" if it does not apply or is not known."""
    licence: str


@dataclass(frozen=True)
class PreparedText:
    """A text as the step `jacnorm.data.prepare` stored it."""

    name: str
    label: str
    """What to call it in a report, for instance "user's text"."""
    text: str
    """Line ends are ``\\n``."""
    digest: str
    """SHA-256 of the text in UTF-8."""
    source: str
    """embedded, mirror or file."""
    revision: str
    """Always ""."""
    licence: str


def read(path: Path | str) -> Prepared:
    """Read a prepared data set of images; tensors are mapped from the file, so only rows in use take memory.

    Raises UserError if the file is missing, damaged, a text, or was not made by `jacnorm.data.prepare`.
    """
    tensors, metadata = load_tensors(path)
    with _in_words(path):
        about = unpack(metadata)
        if "text" in tensors:
            raise UserError(f"{path} holds {about['label']}, a text; give a data set of images")
        about["classes"] = tuple(about["classes"])
        parts = {split: Split(tensors[f"{split}_x"], tensors[f"{split}_y"]) for split in ("train", "test")}
        return Prepared(**parts, **about)


def read_text(path: Path | str) -> PreparedText:
    """Read a prepared text.

    Raises UserError if the file is missing, damaged, holds images, or was not made by `jacnorm.data.prepare`.
    """
    tensors, metadata = load_tensors(path)
    with _in_words(path):
        about = unpack(metadata)
        if "train_x" in tensors:
            raise UserError(f"{path} holds {about['label']}, images; give a text")
        return PreparedText(text=tensors["text"].numpy().tobytes().decode(), **about)


@contextlib.contextmanager
def _in_words(path: Path | str) -> Iterator[None]:
    """Say that a file lacks what the step `jacnorm.data.prepare` writes."""
    try:
        yield
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} is not a data set made by jacnorm.data.prepare; delete it and run that step again"
        ) from None


def standardise(train: Tensor, *others: Tensor, over: Literal["samples", "pixels"] = "samples") -> tuple[Tensor, ...]:
    """Shift and scale to mean 0 and variance 1 over the training rows; returns float32 versions of all arguments.

    For each feature j: (x_j - mean_j) / std_j, with the mean and the population standard deviation (divisor N) of
    `train`, computed in float64. `over="samples"`: every pixel of every channel is a feature of its own.
    `over="pixels"`: one mean and deviation per channel, over samples and pixels. A feature that is constant in `train`
    becomes exactly 0 everywhere, in `others` too.

    train, others: (N, ...) of any real dtype, same trailing shape. Not to be confused with division by `pixel_max`,
    which keeps 0 at 0. Raises UserError if `train` has no rows, or a trailing shape differs.
    """
    if len(train) == 0:
        raise UserError("standardise needs at least one training row, got none")
    for other in others:
        if other.shape[1:] != train.shape[1:]:
            raise UserError(
                f"rows of {tuple(other.shape[1:])} cannot be scaled like training rows of {tuple(train.shape[1:])}"
            )
    axes = (0,) if over == "samples" or train.ndim < 3 else (0, *range(2, train.ndim))
    rows = [train[start : start + _CHUNK] for start in range(0, len(train), _CHUNK)]
    count = math.prod(train.shape[axis] for axis in axes)
    mean = sum(part.double().sum(axes, keepdim=True) for part in rows) / count
    variance = sum((part.double() - mean).square().sum(axes, keepdim=True) for part in rows) / count
    # Compared exactly: rounding in the mean would give a constant feature a tiny deviation, and dividing by it, noise.
    constant = (train.amin(axes, keepdim=True) == train.amax(axes, keepdim=True)) | (variance == 0)
    factor = torch.where(constant, 0.0, 1 / variance.sqrt())
    return tuple(_scaled(values, mean, factor) for values in (train, *others))


def _scaled(values: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    out = torch.empty(values.shape, dtype=torch.float32)
    for start in range(0, len(values), _CHUNK):
        out[start : start + _CHUNK] = (values[start : start + _CHUNK].double() - mean) * factor
    return out


def split(n: int, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Divide rows 0 .. n-1 at random into two parts, the second of round(fraction * n) rows (for validation).

    Returns two ascending int64 index tensors that together hold every row once. Raises UserError if a part would be
    empty.
    """
    held = round(fraction * n)
    if not 0 < held < n:
        raise UserError(
            f"a fraction {fraction} of {n} rows leaves an empty part; choose one that gives 1 to {n - 1} rows"
        )
    order = torch.randperm(n, generator=generator)
    return order[held:].sort().values, order[:held].sort().values


def balanced(y: Tensor, size: int, classes: int, generator: torch.Generator) -> Tensor:
    """Rows of a random subset in which the class counts differ by at most one.

    y: (N,) class numbers 0 .. classes-1. Where `classes` does not divide `size`, the generator chooses the classes that
    get one more. Returns (size,) ascending int64 indices. Raises UserError if `size` is not positive or a class has too
    few rows.
    """
    if size < 1:
        raise UserError(f"a subset needs at least 1 row, got {size}")
    wanted = torch.full((classes,), size // classes)
    wanted[torch.randperm(classes, generator=generator)[: size % classes]] += 1
    chosen = []
    for label, count in enumerate(wanted.tolist()):
        members = (y == label).nonzero().flatten()
        if len(members) < count:
            raise UserError(
                f"a balanced subset of {size} rows needs {count} of class {label}, but there are {len(members)}"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def subset(part: Split, size: int, classes: int, generator: torch.Generator) -> Split:
    """A random class-balanced subset, in stored order; see `balanced`."""
    return part.take(balanced(part.y, size, classes, generator))
