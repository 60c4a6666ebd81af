"""The prepared data as this study uses them: float32 images and class numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from jacnorm.data.read import balanced, read, standardise
from jacnorm.training.seeds import generator

STUDY = "lipschitz"


@dataclass(frozen=True)
class Inputs:
    """Images (N, channels, height, width), float32, and labels (N,), int64; `classes` is the number of logits."""

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
        """Input width n_0 of a fully connected network."""
        return math.prod(self.image)


def load(path: Path, train_samples: int | None = None, scaling: Literal["unit", "standard"] = "unit") -> Inputs:
    """Read a prepared data set; `train_samples` keeps a class-balanced subset, the same for every seed.

    scaling: "unit" divides by the largest pixel value; "standard" shifts and scales each channel to mean 0 and variance
    1 over the pixels of the training samples that are kept. Raises UserError for a damaged file or a subset that the
    data set cannot give.
    """
    data = read(path)
    train = data.train
    if train_samples is not None:
        rows = balanced(train.y, train_samples, len(data.classes), generator(STUDY, data.name, 0, "training subset"))
        train = train.take(rows)
    if scaling == "standard":
        train_x, test_x = standardise(train.x, data.test.x, over="pixels")
    else:
        train_x, test_x = (x.float() / data.pixel_max for x in (train.x, data.test.x))
    return Inputs(data.name, data.digest, train_x, train.y, test_x, data.test.y, len(data.classes))
