"""Data that ship inside scikit-learn."""

from __future__ import annotations

import numpy as np

from jacnorm.data.catalogue import Dataset

TEST_PER_CLASS = 36


def arrays(dataset: Dataset) -> dict[str, np.ndarray]:
    """The arrays train_x, train_y, test_x, test_y of an embedded data set."""
    return {"digits": _digits, "photos": _photos}[dataset.name]()


def _digits() -> dict[str, np.ndarray]:
    """The 1797 digits as 1437 + 360.

    Of the n_c images of class c, in stored order, the one of rank r (from 0) is a test image exactly if
    floor(36 (r + 1) / n_c) > floor(36 r / n_c): 36 per class, evenly spaced. No random generator, so no new version of
    a library can change it.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = bunch.images.astype(np.uint8)[:, None]  # (1797, 1, 8, 8), values 0 .. 16
    y = bunch.target.astype(np.int64)
    test = evenly_spaced(y, TEST_PER_CLASS)
    return {"train_x": x[~test], "train_y": y[~test], "test_x": x[test], "test_y": y[test]}


def evenly_spaced(y: np.ndarray, per_class: int) -> np.ndarray:
    """Mark `per_class` members of each class, evenly spaced over it in stored order. Returns booleans, (N,)."""
    chosen = np.zeros(len(y), bool)
    for label in np.unique(y):
        members = np.flatnonzero(y == label)
        rank = np.arange(len(members))
        chosen[members] = (rank + 1) * per_class // len(members) > rank * per_class // len(members)
    return chosen


def _photos() -> dict[str, np.ndarray]:
    """china.jpg to train, flower.jpg to test, each (1, 3, 427, 640)."""
    from sklearn.datasets import load_sample_image

    china, flower = (load_sample_image(name).transpose(2, 0, 1)[None] for name in ("china.jpg", "flower.jpg"))
    return {"train_x": china, "train_y": np.array([0]), "test_x": flower, "test_y": np.array([1])}
