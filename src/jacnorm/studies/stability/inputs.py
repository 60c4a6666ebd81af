"""The prepared data as this study uses them: flat standardised float32 features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jacnorm.data.read import balanced, read, standardise
from jacnorm.training.seeds import generator

STUDY = "stability"


@dataclass(frozen=True)
class Inputs:
    """Flat standardised samples (N, n_0), float32, and labels (N,); `classes` is the number of logits."""

    name: str
    digest: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def features(self) -> int:
        """Input width n_0."""
        return self.train_x.shape[1]


def load(path: Path, train_samples: int | None = None) -> Inputs:
    """Read a prepared data set; `train_samples` keeps a class-balanced subset, the same for every seed.

    Features are standardised with the statistics of the training samples that are kept. Raises UserError for a damaged
    file or a subset that the data set cannot give.
    """
    data = read(path)
    train = data.train
    if train_samples is not None:
        rows = balanced(train.y, train_samples, len(data.classes), generator(STUDY, data.name, 0, "training subset"))
        train = train.take(rows)
    train_x, test_x = standardise(train.x.flatten(1), data.test.x.flatten(1))
    return Inputs(data.name, data.digest, train_x, train.y, test_x, data.test.y, len(data.classes))


def batches_of(inputs: Inputs, seeds: list[int], size: int, purpose: str) -> tuple[Tensor, Tensor]:
    """A random training batch for each seed: x (R, size, n_0), labels (R, size); at most the samples there are."""
    rows = torch.stack(
        [
            torch.randperm(len(inputs.train_y), generator=generator(STUDY, "batch", seed, purpose))[:size]
            for seed in seeds
        ]
    )
    return inputs.train_x[rows], inputs.train_y[rows]
