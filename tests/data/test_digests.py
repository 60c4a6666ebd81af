import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from jacnorm.data.digests import content_digest, idx_md5

small = arrays(np.uint8, array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4))


@given(small)
def test_digest_does_not_depend_on_memory_layout(array):
    assert content_digest({"x": np.asfortranarray(array)}) == content_digest({"x": array})
    swapped = array.astype(">i8")
    assert content_digest({"x": swapped}) == content_digest({"x": array.astype("<i8")})


@given(small.filter(lambda array: array.size), st.data())
def test_digest_changes_with_any_value(array, data):
    changed = array.copy()
    changed.flat[data.draw(st.integers(0, array.size - 1))] ^= data.draw(st.integers(1, 255))
    assert content_digest({"x": changed}) != content_digest({"x": array})


def test_digest_is_the_documented_one():
    values = {"b": np.arange(3, dtype=np.int64), "a": np.array([[7, 8]], np.uint8)}
    text = b"a uint8 1,2\n" + b"\7\10" + b"b int64 3\n" + b"".join(bytes([value, *[0] * 7]) for value in range(3))
    assert content_digest(values) == hashlib.sha256(text).hexdigest()


def test_digest_distinguishes_name_shape_and_dtype():
    array = np.zeros((2, 3), np.uint8)
    others = [{"y": array}, {"x": array.reshape(3, 2)}, {"x": array.view(np.int8)}, {"x": array, "y": array[:0]}]
    assert len({content_digest(other) for other in [{"x": array}, *others]}) == 5


def test_idx_of_images_and_labels():
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    file = bytes.fromhex("00000803 00000002 00000003 00000004") + bytes(range(24))
    assert idx_md5(images) == hashlib.md5(file).hexdigest()
    labels = np.array([9, 0, 255])
    assert idx_md5(labels) == hashlib.md5(bytes.fromhex("00000801 00000003 09 00 ff")).hexdigest()


@pytest.mark.parametrize("value", [-1, 256])
def test_idx_refuses_what_is_no_byte(value):
    with pytest.raises(ValueError, match="from 0 to 255"):
        idx_md5(np.array([value]))
