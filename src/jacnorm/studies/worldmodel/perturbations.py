"""Perturbations of what an agent sees when it is evaluated (Section 5 of the paper), on images in [0, 1].

gauss: noise N(mean, variance) on every pixel and channel. mask: a share of the pixels, chosen anew in every image,
gets noise N(mean, variance) on each channel, added or instead. rotation: about the centre, counter-clockwise, bilinear.
Then images are cut to [0, 1] and rounded to 256 levels, unless `clip` is false. gravity changes the environment, not
the images. `perturbations_numpy` has the same for one image of DreamerV3.

Letters: N images, H rows, W columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from jacnorm.studies.worldmodel.settings import AgentSettings

Perturbation = Literal["clean", "gauss", "mask", "rotation", "gravity"]
LEVELS = 255


@dataclass(frozen=True)
class Condition:
    """One perturbation: variance (gauss), share (mask), degrees (rotation) or factor (gravity); 0: clean."""

    perturbation: Perturbation
    strength: float

    @property
    def gravity_factor(self) -> float:
        """Factor of the gravity in training."""
        return self.strength if self.perturbation == "gravity" else 1.0


@dataclass(frozen=True)
class Noise:
    """Standard numbers that perturb images; the same ones may serve any strength and any agent."""

    normal: Tensor
    """From N(0, 1), of the images' shape."""
    uniform: Tensor
    """From U(0, 1), (N, H, W)."""

    def to(self, device: torch.device) -> Noise:
        """The same on another device."""
        return Noise(self.normal.to(device), self.uniform.to(device))


def conditions(settings: AgentSettings) -> list[Condition]:
    """All conditions of evaluation, clean first."""
    kinds: list[tuple[Perturbation, list[float]]] = [
        ("gauss", settings.gauss),
        ("mask", settings.masks),
        ("rotation", settings.rotations),
        ("gravity", settings.gravities),
    ]
    return [Condition("clean", 0.0), *(Condition(kind, strength) for kind, each in kinds for strength in each)]


def draw(shape: tuple[int, ...], source: torch.Generator) -> Noise:
    """Noise for images of `shape`, (N, H, W) or (N, H, W, 3)."""
    return Noise(torch.randn(shape, generator=source), torch.rand(shape[:3], generator=source))


def perturb(images: Tensor, condition: Condition, settings: AgentSettings, noise: Noise) -> Tensor:
    """The images as seen under `condition`.

    images: (..., N, H, W) or (..., N, H, W, 3), with the noise of (N, H, W) or (N, H, W, 3): agents along leading axes
    see the same noise. Clean images, also those under another gravity, come back as they are. Raises ValueError for an
    unknown perturbation.
    """
    match condition.perturbation:
        case "gauss":
            seen = images + settings.gauss_mean + math.sqrt(condition.strength) * noise.normal
        case "mask":
            values = settings.mask_mean + math.sqrt(settings.mask_variance) * noise.normal
            chosen = lowest(noise.uniform, condition.strength)
            if noise.normal.ndim == 4:
                chosen = chosen.unsqueeze(-1)  # all channels of a pixel
            seen = torch.where(chosen, images + values if settings.mask_mode == "add" else values, images)
        case "rotation":
            seen = rotated(images, condition.strength, settings.fill, colour=noise.normal.ndim == 4)
        case "clean" | "gravity":
            return images
        case _:
            raise ValueError(f"unknown perturbation {condition.perturbation}")
    return requantised(seen) if settings.clip else seen


def lowest(uniform: Tensor, share: float) -> Tensor:
    """The round(share * H * W) pixels of each image (N, H, W) with the lowest numbers, as bool.

    The pixels of a smaller share are among those of a larger one.
    """
    flat = uniform.flatten(1)
    count = round(share * flat.shape[1])
    if not count:
        return torch.zeros_like(uniform, dtype=torch.bool)
    return uniform <= flat.sort(1).values[:, count - 1, None, None]


def rotated(images: Tensor, degrees: float, fill: Literal["zero", "edge"], *, colour: bool = False) -> Tensor:
    """Images (..., H, W), or (..., H, W, 3) if `colour`, rotated counter-clockwise about their centre.

    A pixel's value is interpolated between the four pixels around the place that it comes from. Beyond the border are
    zeros, or the nearest pixel at the edge.
    """
    channels_last = images if colour else images.unsqueeze(-1)
    height, width = channels_last.shape[-3:-1]
    index, weight = _taps(height, width, degrees, fill)
    flat = channels_last.flatten(-3, -2)  # (..., H W, 3)
    seen = sum(
        flat[..., index[tap].to(images.device), :] * weight[tap].to(images).unsqueeze(-1) for tap in range(len(index))
    )
    assert isinstance(seen, Tensor)
    return seen.reshape(images.shape)


def requantised(images: Tensor) -> Tensor:
    """Images cut to [0, 1] and rounded to k / 255."""
    return (images.clamp(0, 1) * LEVELS).round() / LEVELS


@lru_cache(maxsize=16)
def _taps(height: int, width: int, degrees: float, fill: str) -> tuple[Tensor, Tensor]:
    """For each pixel of the rotated image, four pixels it comes from and their weights, (4, H W)."""
    angle = math.radians(degrees)
    sin, cos = math.sin(angle), math.cos(angle)
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2  # to the right
    y = (height - 1) / 2 - torch.arange(height, dtype=torch.float64).unsqueeze(1)  # upwards
    column = (x * cos + y * sin) + (width - 1) / 2  # where the pixel was before; (H, W)
    row = (height - 1) / 2 - (y * cos - x * sin)
    left, top = column.floor(), row.floor()
    index, weight = [], []
    for down in (0, 1):
        for right in (0, 1):
            at_row, at_column = top + down, left + right
            part = (1 - (row - at_row).abs()) * (1 - (column - at_column).abs())
            if fill == "zero":
                part = part * ((at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width))
            nearest = at_row.clamp(0, height - 1) * width + at_column.clamp(0, width - 1)
            index.append(nearest.long().flatten())
            weight.append(part.flatten())
    return torch.stack(index), torch.stack(weight)
