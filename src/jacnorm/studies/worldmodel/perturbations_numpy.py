"""The perturbations of `perturbations` for one image at a time, where only NumPy is at hand: DreamerV3's environment.

Imports neither torch nor the settings. Options are a mapping with the keys of `OPTIONS`, as in the settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

OPTIONS = ("gauss_mean", "mask_mean", "mask_variance", "mask_mode", "fill", "clip")
LEVELS = 255


def perturb(
    image: NDArray[np.uint8],
    perturbation: str,
    strength: float,
    options: Mapping[str, Any],
    source: np.random.Generator,
) -> NDArray[Any]:
    """One image (H, W, 3) or (H, W), uint8, as seen under a perturbation, with noise from `source`.

    Returns uint8, or float32 in units of the full scale, [0, 1] and beyond, if `clip` is false and the image is
    perturbed. Raises ValueError for an unknown perturbation.
    """
    if perturbation in ("clean", "gravity"):
        return image
    normal = source.standard_normal(image.shape, dtype=np.float32)
    uniform = source.random(image.shape[:2], dtype=np.float32)
    seen = apply(image.astype(np.float32) / LEVELS, perturbation, strength, options, normal, uniform)
    return np.rint(np.clip(seen, 0, 1) * LEVELS).astype(np.uint8) if options["clip"] else seen


def apply(
    image: NDArray[np.float32],
    perturbation: str,
    strength: float,
    options: Mapping[str, Any],
    normal: NDArray[np.float32],
    uniform: NDArray[np.float32],
) -> NDArray[np.float32]:
    """An image in [0, 1] with given noise, before it is cut and rounded; normal: (H, W[, 3]), uniform: (H, W).

    Raises ValueError for an unknown perturbation, to which clean and gravity belong here.
    """
    match perturbation:
        case "gauss":
            seen = image + options["gauss_mean"] + math.sqrt(strength) * normal
        case "mask":
            values = options["mask_mean"] + math.sqrt(options["mask_variance"]) * normal
            chosen = lowest(uniform, strength).reshape(uniform.shape + (1,) * (image.ndim - 2))
            seen = np.where(chosen, image + values if options["mask_mode"] == "add" else values, image)
        case "rotation":
            seen = rotated(image, strength, options["fill"])
        case _:
            raise ValueError(f"unknown perturbation {perturbation}")
    return seen.astype(np.float32)


def lowest(uniform: NDArray[np.float32], share: float) -> NDArray[np.bool_]:
    """The round(share * H * W) pixels with the lowest numbers."""
    count = round(share * uniform.size)
    return uniform <= np.sort(uniform, axis=None)[count - 1] if count else np.zeros(uniform.shape, bool)


def rotated(image: NDArray[np.float32], degrees: float, fill: str) -> NDArray[np.float32]:
    """An image (H, W[, 3]) rotated counter-clockwise about its centre, bilinear; fill: zero or edge."""
    height, width = image.shape[:2]
    angle = math.radians(degrees)
    sin, cos = math.sin(angle), math.cos(angle)
    x = np.arange(width) - (width - 1) / 2
    y = (height - 1) / 2 - np.arange(height)[:, None]
    column = (x * cos + y * sin) + (width - 1) / 2  # where the pixel was before; (H, W)
    row = (height - 1) / 2 - (y * cos - x * sin)
    left, top = np.floor(column), np.floor(row)
    seen = np.zeros(image.shape)
    for down in (0, 1):
        for right in (0, 1):
            at_row, at_column = top + down, left + right
            part = (1 - abs(row - at_row)) * (1 - abs(column - at_column))
            if fill == "zero":
                part = part * ((at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width))
            pixels = image[at_row.clip(0, height - 1).astype(int), at_column.clip(0, width - 1).astype(int)]
            seen += part.reshape(part.shape + (1,) * (image.ndim - 2)) * pixels
    return seen.astype(np.float32)
