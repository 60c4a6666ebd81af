"""The prepared data as this study uses them: float32 images, standardised, and class numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from jacnorm.data.read import Split, balanced, read, standardise
from jacnorm.errors import UserError
from jacnorm.studies.sharpening.settings import DataSet, Scaling
from jacnorm.training.seeds import generator

STUDY = "sharpening"
_CHUNK = 4096


class LoadSettings(Protocol):
    """The settings that say which data to load, and how."""

    data_sets: list[DataSet]
    train_samples: int | None
    pool: int | None
    scaling: Scaling


@dataclass(frozen=True)
class Inputs:
    """Images (N, channels, height, width), float32, and labels (N,), int64; `classes` is the number of logits K."""

    name: str
    digest: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def image(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    @property
    def features(self) -> int:
        """Input width d_0 of a fully connected network."""
        return math.prod(self.image)


def load(path: Path, *, train_samples: int | None, pool: int | None, scaling: Scaling, seed: int = 0) -> Inputs:
    """Read a prepared data set and divide it into training and test samples.

    pool: a class-balanced part of the training split; the rest of the split follows the test samples. None: the whole
    split. train_samples: a class-balanced part of the pool; None: all of it. Both keep the stored order. Subsets of one
    pool are nested: the classes that get one sample more, and the samples of each class, are the first ones of random
    orders that do not depend on the size. Pool and test samples are the same for every seed; the part of the pool that
    is trained on is drawn anew for every `seed`.

    scaling, fitted on the kept training samples: "pixel-mean" subtracts each pixel's mean and divides by one standard
    deviation, that of all centred pixels; "pixel" and "channel" give mean 0 and variance 1 to every pixel, or to every
    channel, as `jacnorm.data.read.standardise`. Jacobian norms are inversely proportional to these deviations.

    Raises UserError for a damaged file, a pool or subset that the data set cannot give, or images without variation.
    """
    data = read(path)
    train, test = data.train, data.test
    if pool is not None:
        rows = _subset(train.y, pool, len(data.classes), data.name, "pool", 0)
        left = torch.ones(len(train), dtype=torch.bool)
        left[rows] = False
        rest = train.take(left.nonzero().flatten())
        train, test = train.take(rows), Split(torch.cat([test.x, rest.x]), torch.cat([test.y, rest.y]))
    if train_samples is not None:
        train = train.take(_subset(train.y, train_samples, len(data.classes), data.name, "train_samples", seed))
    train_x, test_x = _scaled(train.x, test.x, scaling, data.name)
    return Inputs(data.name, data.digest, train_x, train.y, test_x, test.y, len(data.classes))


def load_all(paths: Sequence[Path], settings: LoadSettings, seed: int = 0) -> list[Inputs]:
    """Each of `settings.data_sets`, in that order, from whichever of the files holds it; see `load`.

    Raises UserError if no file holds one of them, or as `load` does.
    """
    files = {read(path).name: path for path in paths}
    missing = [name for name in settings.data_sets if name not in files]
    if missing:
        raise UserError(
            f"data_sets names {', '.join(missing)}, but the files given hold {', '.join(sorted(files)) or 'nothing'}; "
            "prepare it with jacnorm.data.prepare and pass its file too"
        )
    return [
        load(files[name], train_samples=settings.train_samples, pool=settings.pool, scaling=settings.scaling, seed=seed)
        for name in settings.data_sets
    ]


def _subset(labels: Tensor, size: int, classes: int, name: str, key: str, seed: int) -> Tensor:
    """Rows of a class-balanced subset; `balanced` draws the same orders from a generator whatever the size."""
    try:
        return balanced(labels, size, classes, generator(STUDY, name, seed, key))
    except UserError as error:
        raise UserError(f"{key} is {size}, too many for {name}: {error}; choose a smaller {key}") from None


def _scaled(train: Tensor, test: Tensor, scaling: Scaling, name: str) -> tuple[Tensor, Tensor]:
    if (train == train[:1]).all():
        raise UserError(f"the {len(train)} training samples of {name} are all alike; enlarge train_samples")
    if scaling == "pixel-mean":
        return _centred(train, test)
    train, test = standardise(train, test, over="samples" if scaling == "pixel" else "pixels")
    return train, test


def _centred(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Minus the pixel's mean, over the root of the mean of the pixels' variances; statistics in float64."""
    mean = sum(rows.double().sum(0) for rows in train.split(_CHUNK)) / len(train)
    squares = sum((rows.double() - mean).square().sum() for rows in train.split(_CHUNK))
    deviation = (squares / train.numel()).sqrt()
    train, test = (
        torch.cat([((rows.double() - mean) / deviation).float() for rows in x.split(_CHUNK)]) for x in (train, test)
    )
    return train, test
