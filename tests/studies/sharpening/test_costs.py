"""Costs against PyTorch's fused losses, their Hessians against torch.func and dense eigenvalues."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from jacnorm.studies.sharpening.costs import cost_hessian_norms, cost_hessian_product, costs, squares, targets

MIXED = ["square", "cross-entropy", "cross-entropy"]
SMOOTHING = torch.tensor([0.0, 0.0, 0.3], dtype=torch.float64)


def problem(runs=3, samples=6, classes=4, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(runs, samples, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (runs, samples), generator=generator)


def test_each_run_has_its_own_cost():
    logits, labels = problem()
    found = costs(logits, labels, squares(MIXED), SMOOTHING)
    one_hot = functional.one_hot(labels[0], 4)
    torch.testing.assert_close(found[0], functional.mse_loss(logits[0], one_hot.double(), reduction="none").sum(1) / 2)
    for run, smoothing in ((1, 0.0), (2, 0.3)):
        expected = functional.cross_entropy(logits[run], labels[run], reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(found[run], expected)


@pytest.mark.parametrize("cost", ["square", "cross-entropy"])
def test_stacks_of_one_cost_give_what_the_mixed_one_gives(cost):
    logits, labels = problem()
    smoothing = torch.full((3,), 0.2 * (cost != "square"), dtype=torch.float64)
    alone = costs(logits, labels, squares([cost] * 3), smoothing)
    other = next(name for name in MIXED if name != cost)
    mixed = costs(logits, labels, squares([cost, cost, other]), smoothing * torch.tensor([1, 1, 0]))
    assert torch.equal(alone[:2], mixed[:2])


def test_labels_may_be_shared_and_targets_given():
    logits, labels = problem()
    square = squares(MIXED)
    shared = costs(logits, labels[0], square, SMOOTHING)
    assert torch.equal(shared, costs(logits, labels[:1].expand(3, -1), square, SMOOTHING))
    assert torch.equal(shared, costs(logits, targets(labels[0], 4, SMOOTHING, torch.float64), square))
    assert targets(labels[0], 4).shape == (1, 6, 4)
    mixed_up = (targets(labels, 4) + targets(labels.roll(1, 1), 4)).double() / 2
    expected = functional.cross_entropy(logits[1], mixed_up[1], reduction="none")
    torch.testing.assert_close(costs(logits, mixed_up, square)[1], expected)


def test_products_with_cost_hessians_are_those_of_torch_func():
    logits, labels = problem()
    direction = problem(seed=1)[0]
    found = cost_hessian_product(logits, direction, squares(MIXED))
    wanted = targets(labels, 4, SMOOTHING, torch.float64)

    def one(z, run, sample):
        return costs(z[None, None], wanted[run, sample][None, None], squares(MIXED)[run : run + 1])[0, 0]

    for run in range(3):
        for sample in range(6):
            # Twice reverse mode: the forward mode of torch.func.hessian is not needed for so few classes.
            hessian = torch.func.jacrev(torch.func.jacrev(one))(logits[run, sample], run, sample)
            torch.testing.assert_close(found[run, sample], hessian @ direction[run, sample])


@settings(max_examples=40, deadline=None)
@given(classes=st.integers(2, 12), scale=st.floats(0, 12), seed=st.integers(0, 10**6))
def test_property_norms_of_cost_hessians_are_dense_eigenvalues(classes, scale, seed):
    logits, _ = problem(2, 5, classes, scale, seed)
    found = cost_hessian_norms(logits, squares(["cross-entropy", "square"]))
    p = torch.softmax(logits, -1)
    dense = torch.linalg.eigvalsh(torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2))[..., -1]
    torch.testing.assert_close(found[0], dense[0], rtol=1e-12, atol=1e-14)
    assert torch.equal(found[1], torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("margin", [0.0, 1e-3, 1.0, 30.0, 200.0])
def test_norms_keep_their_relative_precision_where_the_network_is_confident(margin):
    """With two classes the eigenvalue is 2 p (1 - p) = 1 / (1 + cosh margin)."""
    found = cost_hessian_norms(torch.tensor([[[margin, 0.0]]], dtype=torch.float64), squares(["cross-entropy"]))
    assert found.item() == pytest.approx(1 / (1 + math.cosh(margin)), rel=1e-12)


def test_norms_at_ties_and_at_one_hot_probabilities():
    logits = torch.tensor([[[0.0] * 10, [5.0, 5.0] + [-900.0] * 8, [900.0] + [0.0] * 9]])
    found = cost_hessian_norms(logits, squares(["cross-entropy"]))[0]
    torch.testing.assert_close(found, torch.tensor([0.1, 0.5, 0.0], dtype=torch.float64))


def test_refusals():
    logits, labels = problem()
    with pytest.raises(ValueError, match="'hinge'; it must be one of square, cross-entropy"):
        squares(["square", "hinge"])
    with pytest.raises(ValueError, match="smoothing 0"):
        costs(logits, labels, squares(["square"] * 3), SMOOTHING)
    with pytest.raises(ValueError, match="taken as they are"):
        costs(logits, targets(labels, 4).double(), squares(MIXED), SMOOTHING)
