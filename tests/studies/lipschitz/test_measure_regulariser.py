"""Norms of margin gradients of stored networks, against one sample at a time in plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jacnorm.studies.lipschitz.inputs import load
from jacnorm.studies.lipschitz.measure_regulariser import _rows, training_norms
from jacnorm.studies.lipschitz.regulariser import StackedMLP
from jacnorm.studies.lipschitz.samples import draw
from jacnorm.studies.lipschitz.settings import PairedSettings
from jacnorm.training.checkpoint import pack
from jacnorm.training.snapshots import Snapshot

torch.set_num_threads(1)

SETTINGS = PairedSettings(seeds=[10, 11], train_samples=30, test_samples=50, width=7, batch=4, threshold=2.0)


@pytest.fixture(scope="module")
def samples(digits):
    return draw(SETTINGS, load(digits, scaling="standard"))


def snapshot(normalisation):
    net = StackedMLP(2, 64, 7, 10, normalisation)
    draw = torch.Generator().manual_seed(4)
    parameters = net.initial([draw, draw])
    buffers = {name: tensor + torch.rand(tensor.shape, generator=draw) for name, tensor in net.buffers().items()}
    cell = {"setting": "layer-norm", "regularised": True, "coefficient": 0.5, "normalisation": normalisation}
    return Snapshot(cell, pack(parameter=parameters, statistic=buffers))


def norms_by_hand(snapshot, run, x, label):
    """Both squared norms of one sample by the chain rule, in float64."""
    t = {name.partition("/")[2]: tensor[run].double().numpy() for name, tensor in snapshot.tensors.items()}
    kind = snapshot.cell["normalisation"]

    def normalise(z, layer):
        """The normalised z and the Jacobian of the normalisation."""
        if kind == "batch":
            scale = 1 / np.sqrt(t[f"variance{layer}"] + 1e-5)
            return (z - t[f"mean{layer}"]) * scale, np.diag(scale)
        if kind == "none":
            return z, np.eye(len(z))
        deviation = np.sqrt(z.var() + 1e-5)
        h = (z - z.mean()) / deviation
        return h, (np.eye(len(z)) - 1 / len(z) - np.outer(h, h) / len(z)) / deviation

    h1, _ = normalise(t["matrix1"] @ x, 1)
    h2, jacobian = normalise(t["matrix2"] @ np.maximum(h1, 0), 2)
    logits = t["matrix3"] @ np.maximum(h2, 0)
    wrong = max((k for k in range(10) if k != label), key=lambda k: logits[k])
    second = (t["matrix3"][label] - t["matrix3"][wrong]) * (h2 > 0)
    first = (second @ jacobian @ t["matrix2"]) * (h1 > 0)
    return (first**2).sum(), (second**2).sum()


@pytest.mark.parametrize("normalisation", ["batch", "layer", "none"])
def test_norms_and_shares_are_those_of_single_samples(samples, normalisation):
    stored = snapshot(normalisation)
    expected = np.array(
        [
            [
                norms_by_hand(stored, run, samples.x[row].double().numpy().ravel(), samples.y[row].item())
                for row in samples.train[run]
            ]
            for run in range(2)
        ]
    ).transpose(2, 0, 1)  # (L, R, n)
    found = training_norms(SETTINGS, samples, stored)  # 30 samples in batches of 4, the last shorter
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-5)
    rows = list(_rows(SETTINGS, samples, stored))
    assert [(row["layer"], row["seed"]) for row in rows] == [(1, 10), (1, 11), (2, 10), (2, 11)]
    for row in rows:
        each = expected[row["layer"] - 1, row["seed"] - 10]
        assert row["squared_norm"] == pytest.approx(each.mean(), rel=1e-3)
        assert row["penalised_share"] == pytest.approx((each >= 2.0).mean(), abs=1e-9)
        assert row["released_share"] == pytest.approx((each / 16 > 2.0).mean(), abs=1e-9)
        assert (row["setting"], row["regularised"], row["coefficient"]) == ("layer-norm", True, 0.5)
    shares = [row["penalised_share"] for row in rows]
    assert min(shares) > 0
    assert max(shares) <= 1


@pytest.mark.parametrize("normalisation", ["layer", "none"])
def test_a_network_that_diverged_has_no_norms_and_leaves_its_neighbour_s(samples, normalisation):
    stored = snapshot(normalisation)
    good = list(_rows(SETTINGS, samples, stored))
    stored.tensors["parameter/matrix1"][0] = torch.nan
    for before, row in zip(good, _rows(SETTINGS, samples, stored), strict=True):
        for name in ("squared_norm", "penalised_share", "released_share"):
            assert np.isnan(row[name]) if row["seed"] == 10 else row[name] == before[name]
