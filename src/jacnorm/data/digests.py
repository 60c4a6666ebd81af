"""Digests of decoded data: they identify the numbers, however the images were compressed or the files cut."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

import numpy as np


def content_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of named arrays, as 64 hexadecimal digits.

    Hashed in the order of the names: a line ``<name> <dtype> <shape>`` (for instance ``train_x uint8 1437,1,8,8``),
    then the values in C order, little-endian. Equal digests mean equal names, dtypes, shapes and values.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.name} {','.join(map(str, array.shape))}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data.cast("B") if array.size else b"")
    return digest.hexdigest()


def idx_md5(array: np.ndarray) -> str:
    """MD5 that an array of bytes has as an uncompressed IDX file, the format in which MNIST was published.

    The file is: two zero bytes, 0x08 (unsigned byte), the number of dimensions, each dimension as a big-endian 32-bit
    integer, then the values in C order. Images (n, 28, 28) have a header of 16 bytes that begins with 0x00000803,
    labels (n,) one of 8 bytes. Raises ValueError if a value does not fit a byte.
    """
    if array.min(initial=0) < 0 or array.max(initial=0) > 255:
        raise ValueError("IDX of unsigned bytes holds values from 0 to 255")
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    # MD5 is what the original files are known by; it guards against mix-ups, not against forgery.
    digest = hashlib.md5(header, usedforsecurity=False)
    digest.update(np.ascontiguousarray(array, dtype=np.uint8).data.cast("B") if array.size else b"")
    return digest.hexdigest()
