"""What runs share of their batches, and what is their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jacnorm.studies.sharpening.arms import Arm
from jacnorm.studies.sharpening.minibatches import Batches
from jacnorm.training.seeds import RunId

torch.set_num_threads(1)

X = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(20) % 3
KINDS = [
    ("none", 0.0),
    ("weight decay", 0.1),
    ("label smoothing", 0.3),
    ("mixup", 0.2),
    ("mixup", 1.0),
    ("shifts", 0.5),
    ("shifts", 0.25),
    ("crops", 1.0),
    ("crops", 2.0),
]
ARMS = [Arm(regulariser, strength, 0.1, 8) for regulariser, strength in KINDS]


def batches(arms, seeds):
    """All arms with all seeds."""
    pairs = [(arm, RunId("sharpening", "x", seed)) for arm in arms for seed in seeds]
    return Batches([arm for arm, _ in pairs], [draws for _, draws in pairs], *of_each(X, Y, len(seeds)), 3)


def of_each(x, y, seeds):
    """The same samples for every seed."""
    return x.expand(seeds, *x.shape), y.expand(seeds, *y.shape)


@pytest.mark.parametrize("index", [0, 2, 4])
def test_a_run_sees_the_same_batch_alone_and_beside_others(index):
    together = batches(ARMS, [10, 11]).batch(index)
    for position, arm in enumerate(ARMS):
        for tensor, whole in zip(batches([arm], [11]).batch(index), together, strict=True):
            assert torch.equal(tensor[0], whole[2 * position + 1])


def test_an_epoch_shows_every_sample_once_and_each_seed_has_its_own_order():
    found = batches(ARMS[:2], [10, 11])
    parts = [found.batch(index) for index in range(3)]
    assert [x.shape[1] for x, _ in parts] == [8, 8, 4]
    x = torch.cat([x for x, _ in parts], 1).flatten(2)  # (R, N, 16)
    for run in range(4):
        nearest = torch.cdist(x[run], X.flatten(1)).argmin(1)
        assert sorted(nearest.tolist()) == list(range(20))
    assert torch.equal(x[0], x[2])  # arms of one seed
    assert not torch.equal(x[0], x[1])


def test_targets_are_one_hot_or_smoothed():
    x, wanted = batches([ARMS[0], ARMS[2]], [10]).batch(1)
    labels = Y[torch.cdist(x[0].flatten(1), X.flatten(1)).argmin(1)]
    one_hot = torch.nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(wanted[0], one_hot)
    torch.testing.assert_close(wanted[1], 0.7 * one_hot + 0.1)


def test_mixup_mixes_images_and_targets_alike_with_the_same_partners_at_every_strength():
    x, wanted = batches([ARMS[0], ARMS[3], ARMS[4]], [10]).batch(0)
    whole = torch.cat([x.flatten(2), wanted], 2)  # (R, B, 16 + 3)
    shares = []
    for mixed in whole[1:]:
        # Least squares on the batch itself: each mixed sample is w times one of them and 1 - w times another.
        shares.append(torch.linalg.lstsq(whole[0].T, mixed.T).solution.T)
    for share in shares:
        torch.testing.assert_close(share.sum(1), torch.ones(8), rtol=1e-3, atol=1e-3)
        weight = share.diagonal()
        own = weight[(share.abs() > 1e-3).sum(1) > 1]  # a sample may be its own partner
        assert own.max() - own.min() < 1e-3
        assert 0 < own.mean() < 1
    torch.testing.assert_close(*((share - torch.diag(share.diagonal())).argmax(1) for share in shares))
    assert not torch.allclose(shares[0], shares[1], atol=1e-2)


@pytest.mark.parametrize(("kind", "variance"), [(3, 1 / (4 * 1.4)), (4, 1 / 12)])
def test_the_weights_of_mixup_are_those_of_its_beta_distribution(kind, variance):
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)), read off a batch of two samples of opposite sign."""
    x = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    arm = Arm("mixup", ARMS[kind].strength, 0.1, 2)
    draws = [RunId("sharpening", "x", seed) for seed in range(40)]
    found = Batches([arm] * 40, draws, *of_each(x, torch.tensor([0, 1]), 40), 2)
    weights = []
    for index in range(40):
        mixed = found.batch(index)[0].flatten(1)[:, 0]  # +-1 with itself, +-(2 w - 1) with the other
        swapped = mixed.abs() < 1
        weights.append((mixed[swapped] + 1) / 2)
    drawn = torch.cat(weights).numpy()
    assert len(drawn) > 500
    assert drawn.mean() == pytest.approx(0.5, abs=4 * (variance / len(drawn)) ** 0.5)
    assert np.var(drawn) == pytest.approx(variance, rel=0.15)


def test_shifts_of_a_seed_differ_in_scale_alone_and_crops_stay_within_their_padding():
    flat = torch.arange(16.0).view(1, 1, 4, 4).expand(20, 1, 4, 4).contiguous()
    arms = [Arm("shifts", 0.5, 0.1, 8), Arm("shifts", 0.25, 0.1, 8), Arm("crops", 1.0, 0.1, 8)]
    draws = [RunId("sharpening", "x", 10)] * 3
    x, _ = Batches(arms, draws, *of_each(flat, Y, 1), 3).batch(0)
    inside = (x[..., 1:-1, 1:-1] - flat[0, :, 1:-1, 1:-1]).flatten(2)  # a plane moves by one number
    torch.testing.assert_close(inside[0], 2 * inside[1], rtol=1e-4, atol=1e-4)
    assert inside[0].abs().max() <= 0.5 * (4 + 1) + 1e-4
    assert inside[0].std(0).min() > 0.3
    assert set(x[2].unique().tolist()) <= set(range(16))


def test_probes_belong_to_the_step_and_the_seed():
    found = batches(ARMS[:2], [10, 11])
    probes = found.probes(3, 8)
    assert probes.shape == (4, 8, 3)
    assert torch.equal(probes[0], probes[2])
    assert not torch.equal(probes[0], probes[1])
    assert not torch.equal(probes, found.probes(4, 8))
    assert torch.equal(batches(ARMS[1:2], [11]).probes(3, 8)[0], probes[1])


def test_each_seed_has_samples_of_its_own():
    x = torch.stack([torch.zeros(20, 1, 1, 1), torch.ones(20, 1, 1, 1)])
    draws = [RunId("sharpening", "x", seed) for seed in (11, 10, 11)]
    found, wanted = Batches([Arm("none", 0.0, 0.1, 8)] * 3, draws, x, torch.tensor([[0], [2]]).expand(2, 20), 3).batch(
        0
    )
    assert found.flatten(1).unique(dim=1).flatten().tolist() == [0.0, 1.0, 0.0]
    assert wanted.argmax(2).unique(dim=1).flatten().tolist() == [0, 2, 0]
