"""Digits on photos: the recipe by which MNIST-M was made from MNIST (Ganin et al. 2016, JMLR 17(59), section 5.2.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from jacnorm.errors import UserError


def blend(digits: np.ndarray, pixel_max: int, photos: Sequence[np.ndarray], key: str) -> np.ndarray:
    """Lay each digit over a patch of a photo: |patch - digit| in each channel, (N, 3, h, w) uint8.

    digits: (N, 1, h, w) uint8 of 0 .. pixel_max, brought to 0 .. 255 and rounded; photos: (3, H, W) uint8, sizes may
    differ. Photo and place of each digit are uniformly random and follow from `key` alone (see `places`).
    Raises UserError if a photo is smaller than a digit.
    """
    height, width = digits.shape[2:]
    smallest = min(min(photo.shape[1] - height, photo.shape[2] - width) for photo in photos)
    if smallest < 0:
        raise UserError(f"a photo is smaller than {width} x {height} pixels, the size of a digit; leave it out")
    # 255 * 255 does not fit 16 bits.
    grey = ((digits.astype(np.int32) * 255 + pixel_max // 2) // pixel_max).astype(np.int16)  # (N, 1, h, w)
    made = np.empty((len(digits), 3, height, width), np.uint8)
    for row, (number, down, right) in enumerate(zip(*places(len(digits), photos, (height, width), key), strict=True)):
        patch = photos[number][:, down : down + height, right : right + width]
        made[row] = np.abs(patch - grey[row])
    return made


def places(
    count: int, photos: Sequence[np.ndarray], size: tuple[int, int], key: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of the photo, and top and left edge in it, of `count` patches of (height, width) `size`, (count,) each.

    From the raw 64-bit output of PCG64 seeded with the first 64 bits of SHA-256 of `key`: NumPy promises that stream
    for good, which it does not for the distributions drawn from it. The remainder's bias is below 1e-15.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    raw = np.random.PCG64(seed).random_raw((3, count))
    number = raw[0] % np.uint64(len(photos))
    free = np.array([np.subtract(photo.shape[1:], size) + 1 for photo in photos], np.uint64)  # (photos, 2)
    return number, raw[1] % free[number, 0], raw[2] % free[number, 1]
