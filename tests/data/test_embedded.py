from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from jacnorm.data.catalogue import find
from jacnorm.data.embedded import evenly_spaced
from jacnorm.data.sources import load
from jacnorm.errors import UserError


def test_digits_are_all_there_once():
    loaded = load(find("digits"))
    assert loaded.arrays["train_x"].shape == (1437, 1, 8, 8)
    assert loaded.arrays["test_x"].shape == (360, 1, 8, 8)
    assert np.bincount(loaded.arrays["test_y"]).tolist() == [36] * 10
    assert (loaded.source, loaded.label, loaded.revision) == ("embedded", "scikit-learn digits", "")
    both = [
        np.concatenate([loaded.arrays[f"{split}_x"].reshape(-1, 64), loaded.arrays[f"{split}_y"][:, None]], 1)
        for split in ("train", "test")
    ]
    bunch = load_digits()
    expected = np.concatenate([bunch.data, bunch.target[:, None]], 1)
    assert sorted(map(tuple, np.concatenate(both))) == sorted(map(tuple, expected))


def test_a_mirror_does_not_change_embedded_data(tmp_path):
    assert load(find("digits"), tmp_path).source == "embedded"


def test_altered_digits_are_refused():
    entry = replace(find("digits"), sha256="0" * 64)
    with pytest.raises(UserError, match=r"scikit-learn digits: the arrays have SHA-256 f0cddb.*, expected 0000"):
        load(entry)


def test_photos():
    loaded = load(find("photos"))
    assert loaded.arrays["train_x"].shape == loaded.arrays["test_x"].shape == (1, 3, 427, 640)
    assert loaded.arrays["train_y"].tolist() == [0]
    assert loaded.arrays["test_y"].tolist() == [1]
    # The sky over the pavilion is blue, the middle of the flower is not.
    assert loaded.arrays["train_x"][0, :, :50].mean((1, 2)).argmax() == 2
    assert loaded.arrays["test_x"][0, :, 200:220, 300:320].mean((1, 2)).argmin() == 2
    assert loaded.arrays["train_x"].dtype == np.uint8


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 5))
def test_evenly_spaced_takes_that_many_of_each_class_evenly(labels, wanted):
    y = np.array(labels)
    chosen = evenly_spaced(y, wanted)
    for label in np.unique(y):
        members = chosen[y == label]
        assert members.sum() == min(wanted, len(members))
        places = np.flatnonzero(members)
        if wanted <= len(members) and len(places) > 1:
            assert np.ptp(np.diff(places)) <= 1
