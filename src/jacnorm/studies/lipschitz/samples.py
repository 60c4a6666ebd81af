"""Each seed's own samples: its training, validation and test rows, and the augmentation of its batches.

A seed draws its rows from its own generators, so that they are the same in every setting, with and without the
regulariser, and whichever seeds share a job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jacnorm.data.read import balanced
from jacnorm.errors import UserError
from jacnorm.studies.lipschitz.inputs import STUDY, Inputs
from jacnorm.studies.lipschitz.settings import RegulariserSettings
from jacnorm.training.seeds import generator

CELL = "regulariser samples"


@dataclass(frozen=True)
class Samples:
    """All images of a data set and the rows of S seeds.

    x: (N, channels, height, width), the training split first; y: (N,). train, validation, test: (S, n) int64 rows.
    """

    name: str
    digest: str
    classes: int
    seeds: tuple[int, ...]
    x: Tensor
    y: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor

    @property
    def image(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.x.shape[1:]
        return channels, height, width

    def of(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> Samples:
        """The samples of some of the seeds, on a device; the images are shared, not copied, if they lie there."""
        chosen = torch.tensor([self.seeds.index(seed) for seed in seeds])
        rows = {part: getattr(self, part)[chosen].to(device) for part in ("train", "validation", "test")}
        return replace(self, seeds=tuple(seeds), x=self.x.to(device), y=self.y.to(device), **rows)


def draw(settings: RegulariserSettings, inputs: Inputs) -> Samples:
    """The samples of each seed.

    Training: a class-balanced subset of the training split (all but the validation rows if `train_samples` is None).
    Validation: a class-balanced subset of what is left. Test: the test split, then unused rows of the training split,
    at random up to `test_samples` in all. Raises UserError if a class has too few rows, or if the last batch of an
    epoch would be a single sample.
    """
    parts = [_rows(settings, inputs, seed) for seed in settings.seeds]
    train, validation, test = (torch.stack(part) for part in zip(*parts, strict=True))  # (S, n) each
    n = train.shape[1]
    if n % settings.batch == 1 or settings.batch == 1:
        raise UserError(
            f"batch is {settings.batch}, which leaves a single one of {n} training samples for a step, and batch norm "
            "needs two; choose another batch or train_samples"
        )
    x, y = torch.cat([inputs.train_x, inputs.test_x]), torch.cat([inputs.train_y, inputs.test_y])
    return Samples(inputs.name, inputs.digest, inputs.classes, tuple(settings.seeds), x, y, train, validation, test)


def _rows(settings: RegulariserSettings, inputs: Inputs, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test rows of one seed."""
    free = torch.arange(len(inputs.train_y))

    def take(count: int, key: str) -> Tensor:
        """Remove a class-balanced subset from the free rows; none if count is 0."""
        nonlocal free
        if count == 0:
            return free[:0]
        stream = generator(STUDY, CELL, seed, key)
        try:
            chosen = balanced(inputs.train_y[free], count, inputs.classes, stream)
        except UserError as error:
            raise UserError(
                f"{key} is {count}, more than {inputs.name} can give: {error}; lower {key} or train_samples"
            ) from None
        taken, kept = free[chosen], torch.ones(len(free), dtype=torch.bool)
        kept[chosen] = False
        free = free[kept]
        return taken

    if settings.train_samples is None:
        validation = take(settings.validation_samples, "validation_samples")
        train, free = free, free[:0]
    else:
        train = take(settings.train_samples, "train_samples")
        validation = take(settings.validation_samples, "validation_samples")
    stream = generator(STUDY, CELL, seed, "test_samples")
    tests, unused = len(inputs.test_y), len(free)
    test = torch.cat(
        [
            len(inputs.train_y) + torch.randperm(tests, generator=stream),
            free[torch.randperm(unused, generator=stream)],
        ]
    )
    return train, validation, test[: settings.test_samples]


def augment(x: Tensor, shift: int, flip: bool, generators: Sequence[torch.Generator]) -> Tensor:
    """Shift each image by up to `shift` pixels in both directions and, if wanted, mirror it left to right at random.

    x: (S, B, channels, height, width). Pixels that come in at an edge mirror those inside it (without repeating the
    edge), which is the paper's reflecting pad and random crop. One generator per seed; offsets are uniform and
    independent, a mirror image has probability 1/2. Raises UserError if an image is too small for the shift.
    """
    size = min(x.shape[3:])
    if shift >= size:
        raise UserError(
            f"shift is {shift}, but the images measure {x.shape[3]} x {x.shape[4]} pixels; take at most {size - 1}"
        )
    seeds, batch, channels, height, width = x.shape
    offsets, mirrored = [], []
    for each in generators:
        offsets.append(torch.randint(-shift, shift + 1, (2, batch), generator=each))
        mirrored.append(torch.rand(batch, generator=each) < 0.5)
    down, right = torch.cat(offsets, dim=1).unsqueeze(2)  # (S B, 1) each
    rows = _mirror(torch.arange(height) + down, height)  # (S B, height)
    columns = _mirror(torch.arange(width) + right, width)  # (S B, width)
    if flip:
        columns = torch.where(torch.cat(mirrored).unsqueeze(1), width - 1 - columns, columns)
    image = torch.arange(seeds * batch)[:, None, None, None]
    channel = torch.arange(channels)[None, :, None, None]
    where = (each.to(x.device) for each in (image, channel, rows[:, None, :, None], columns[:, None, None, :]))
    return x.flatten(0, 1)[tuple(where)].unflatten(0, (seeds, batch))


def _mirror(position: Tensor, size: int) -> Tensor:
    """Positions -size < p < 2 size - 1 folded back into 0 .. size - 1."""
    return size - 1 - (size - 1 - position.abs()).abs()
