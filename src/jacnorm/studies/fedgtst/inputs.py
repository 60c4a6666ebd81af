"""The prepared data as this study uses them: source and target as colour images in one scaling.

Pixels are divided by their data set's largest value and shifted and scaled channel by channel with the mean and
deviation of the *source's* training pixels, in the target too: the features that are frozen see the target as they
would in use, where no statistics of it are known. Grey images get three equal channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from jacnorm.data.read import Prepared, Split, read, split
from jacnorm.errors import UserError
from jacnorm.studies.fedgtst.settings import EnginesSettings, FederatedSettings
from jacnorm.training.seeds import generator

STUDY = "fedgtst"
_CHANNELS = 3
_CHUNK = 4096


@dataclass(frozen=True)
class Samples:
    """Images and their class numbers; the images are scaled when asked for, so that stored ones stay in their files.

    images: parts (N_i, 1 or 3, h, w) uint8, in order; y: (N,) int64; gain, shift: (3, 1, 1) float32, by which a pixel p
    becomes gain * p - shift.
    """

    images: tuple[Tensor, ...]
    y: Tensor
    gain: Tensor
    shift: Tensor

    def __len__(self) -> int:
        """Number of samples N."""
        return len(self.y)

    @cached_property
    def x(self) -> Tensor:
        """All images, (N, 3, h, w) float32, kept once made; see `take` for some of a large set."""
        return torch.cat([self._scaled(part) for images in self.images for part in images.split(_CHUNK)])

    def take(self, rows: Tensor) -> Tensor:
        """Images of the given rows, (*rows.shape, 3, h, w) float32, without scaling the others."""
        flat = rows.flatten()
        height, width = self.images[0].shape[2:]
        found = torch.empty((len(flat), _CHANNELS, height, width))
        start = 0
        for part in self.images:
            here = ((flat >= start) & (flat < start + len(part))).nonzero().flatten()
            found[here] = self._scaled(part[flat[here] - start])
            start += len(part)
        return found.unflatten(0, rows.shape)

    def _scaled(self, pixels: Tensor) -> Tensor:
        return pixels * self.gain - self.shift  # (n, 3, h, w): one channel becomes three here


@dataclass(frozen=True)
class Inputs:
    """One source and one target.

    `domains` is the number of the source domain of each training sample, (N,) int64: all 0 but for DomainNet. Without a
    target, its name is "" and its parts have no samples.
    """

    source: str
    target: str
    source_train: Samples
    source_test: Samples
    domains: Tensor
    target_train: Samples
    target_validation: Samples
    target_test: Samples
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        height, width = self.source_train.images[0].shape[2:]
        return _CHANNELS, height, width


def load(settings: FederatedSettings | EnginesSettings, paths: Sequence[Path]) -> list[Inputs]:
    """The source and target that the settings name, from whichever files hold them; one for each target.

    DomainNet gives six, each domain in turn the target of the other five, whose training samples follow one another in
    the order of `settings.data_sets`. Part of the target's training samples is held out for validation; which ones, and
    which `target_samples` are kept, is the same for every seed.

    Raises UserError if a file is missing or damaged, if source and target differ in classes or size, or if
    target_samples or validation_share leave a part without samples.
    """
    if isinstance(settings, EnginesSettings):
        source = _find(paths, [settings.data_set])
        return [_pair(source[0].name, source, None, None)]
    data = _find(paths, settings.data_sets)
    if settings.pair != "domainnet":
        return [_pair(data[0].name, data[:1], data[1], settings)]
    return [_pair("domainnet", [other for other in data if other is not target], target, settings) for target in data]


def _find(paths: Sequence[Path], names: Sequence[str]) -> list[Prepared]:
    files = {found.name: found for found in map(read, paths)}
    missing = [name for name in names if name not in files]
    if missing:
        raise UserError(
            f"the settings name the data set {', '.join(missing)}, but the files given hold "
            f"{', '.join(sorted(files)) or 'nothing'}; prepare it with jacnorm.data.prepare and pass its file too"
        )
    return [files[name] for name in names]


def _pair(
    name: str, sources: Sequence[Prepared], target: Prepared | None, settings: FederatedSettings | None
) -> Inputs:
    first = sources[0]
    for other in [*sources[1:], *([target] if target else [])]:
        if other.classes != first.classes or other.train.x.shape[2:] != first.train.x.shape[2:]:
            raise UserError(
                f"{other.name} has {_form(other)}, but {first.name} has {_form(first)}; "
                "prepare both with the same release of jacnorm"
            )
    mean, deviation = _statistics(sources)
    domains = torch.cat([torch.full((len(each.train),), number) for number, each in enumerate(sources)])
    whole = target.train if target else Split(first.train.x[:0], first.train.y[:0])
    train, validation = _held_out(whole, target.name, settings) if target and settings else (whole, whole)
    test = target.test if target else whole
    pixel_max = target.pixel_max if target else first.pixel_max

    def samples(parts: Sequence[Split], largest: int) -> Samples:
        # A channel that never changes in the source becomes 0.
        inverse = torch.where(deviation > 0, 1 / deviation, 0.0)
        gain, shift = ((each[:, None, None]).float() for each in (inverse / largest, mean * inverse))
        shape = (_CHANNELS, 1, 1)
        images = tuple(part.x for part in parts)
        return Samples(images, torch.cat([part.y for part in parts]), gain.expand(shape), shift.expand(shape))

    return Inputs(
        source=name,
        target=target.name if target else "",
        source_train=samples([each.train for each in sources], first.pixel_max),
        source_test=samples([each.test for each in sources], first.pixel_max),
        domains=domains,
        target_train=samples([train], pixel_max),
        target_validation=samples([validation], pixel_max),
        target_test=samples([test], pixel_max),
        classes=len(first.classes),
    )


def _form(data: Prepared) -> str:
    height, width = data.train.x.shape[2:]
    return f"{len(data.classes)} classes and images of {height} x {width} pixels"


def _statistics(sources: Sequence[Prepared]) -> tuple[Tensor, Tensor]:
    """Mean and population deviation of the training pixels over their largest value, one of each per channel, float64.

    From counts of the 256 values, so exact up to the last rounding however many images there are.
    """
    channels = sources[0].train.x.shape[1]
    counts = torch.zeros((channels, 256), dtype=torch.int64)
    for data in sources:
        for part in data.train.x.split(_CHUNK):
            for channel in range(channels):
                counts[channel] += part[:, channel].flatten().bincount(minlength=256)
    values = torch.arange(256, dtype=torch.float64) / sources[0].pixel_max
    share = counts / counts.sum(1, keepdim=True).double()
    mean = share @ values  # (channels,)
    deviation = (share * (values - mean[:, None]).square()).sum(1).sqrt()
    constant = counts.amax(1) == counts.sum(1)
    return mean, torch.where(constant, 0.0, deviation)


def _held_out(whole: Split, name: str, settings: FederatedSettings) -> tuple[Split, Split]:
    """Training and validation part of the target's training samples."""
    size = settings.target_samples
    if size is not None:
        if size > len(whole):
            raise UserError(
                f"target_samples is {size}, but {name} has {len(whole)} training samples; choose at most that many"
            )
        order = torch.randperm(len(whole), generator=generator(STUDY, name, 0, "target subset"))
        whole = whole.take(order[:size].sort().values)
    try:
        rows = split(len(whole), settings.validation_share, generator(STUDY, name, 0, "target validation"))
    except UserError as error:
        raise UserError(f"validation_share is {settings.validation_share}: {error}") from None
    train, validation = (whole.take(part) for part in rows)
    return train, validation
