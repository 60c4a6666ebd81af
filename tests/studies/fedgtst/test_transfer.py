"""Stacked fine-tuning against PyTorch's own Linear, cross-entropy and Adam, a run at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from jacnorm.studies.fedgtst.settings import FederatedSettings
from jacnorm.studies.fedgtst.transfer import (
    Part,
    accuracy,
    fine_tune,
    initial_read_out,
    mean_loss,
    read_out_gradients,
)
from jacnorm.training.batches import batch_indices
from jacnorm.training.seeds import RunId

torch.set_num_threads(1)

CLASSES, WIDTH = 3, 5
SETTINGS = FederatedSettings(fine_tuning_epochs=4, fine_tuning_batch=8, fine_tuning_rate=0.05, fine_tuning_decay=0.02)
RUNS = [RunId("fedgtst", "fine-tuning", seed) for seed in (0, 1, 1)]


def parts(seed=0, runs=3, separation=2.0):
    """Training, validation and test features around one centre per class, other centres for each run."""
    stream = torch.Generator().manual_seed(seed)
    centres = separation * torch.randn(runs, CLASSES, WIDTH, generator=stream)
    for count in (30, 12, 21):
        labels = torch.randint(CLASSES, (count,), generator=stream)
        yield Part(centres[:, labels] + torch.randn(runs, count, WIDTH, generator=stream), labels)


def by_torch(run, position, train, validation, test):
    """The same by modules of PyTorch; the order of samples is the loop's own."""
    head = nn.Linear(WIDTH, CLASSES)
    head.load_state_dict(initial_read_out(run, WIDTH, CLASSES))
    adam = torch.optim.Adam(head.parameters(), lr=0.05, weight_decay=0.02)
    curve = []
    for step in range(4 * 4):  # 30 samples: batches of 8, 8, 8 and 6
        rows = batch_indices(step, [run], 30, 8)[0]
        adam.zero_grad()
        nn.functional.cross_entropy(head(train.features[position][rows]), train.labels[rows]).backward()
        adam.step()
        if step % 4 == 3:
            curve.append(right(head, position, train))
    loss = nn.functional.cross_entropy(head(test.features[position]), test.labels).item()
    return curve, right(head, position, validation), right(head, position, test), loss


def right(head, position, part):
    return (head(part.features[position]).argmax(1) == part.labels).double().mean().item()


def test_each_run_is_an_ordinary_pytorch_loop():
    train, validation, test = parts()
    found = fine_tune(SETTINGS, RUNS, CLASSES, train, validation, test)
    assert found.train_curve.shape == found.target_curve.shape == (5, 3)
    for position, run in enumerate(RUNS):
        curve, validation_accuracy, target_accuracy, loss = by_torch(run, position, train, validation, test)
        assert found.train_curve[1:, position].tolist() == pytest.approx(curve)
        assert found.train_accuracy[position].item() == pytest.approx(curve[-1])
        assert found.validation_accuracy[position].item() == pytest.approx(validation_accuracy)
        assert found.target_accuracy[position].item() == pytest.approx(target_accuracy)
        assert found.target_curve[-1, position].item() == pytest.approx(target_accuracy)
        assert found.target_loss[position].item() == pytest.approx(loss, rel=1e-4)


@given(seed=st.integers(0, 2**31), runs=st.integers(1, 4), count=st.integers(1, 9))
def test_gradients_are_those_of_autograd(seed, runs, count):
    stream = torch.Generator().manual_seed(seed)
    read_out = {
        "weight": torch.randn(runs, CLASSES, WIDTH, generator=stream, dtype=torch.float64).requires_grad_(),
        "bias": torch.randn(runs, CLASSES, generator=stream, dtype=torch.float64).requires_grad_(),
    }
    features = torch.randn(runs, count, WIDTH, generator=stream, dtype=torch.float64)
    labels = torch.randint(CLASSES, (runs, count), generator=stream)
    total = sum(
        nn.functional.cross_entropy(features[run] @ read_out["weight"][run].T + read_out["bias"][run], labels[run])
        for run in range(runs)
    )
    expected = torch.autograd.grad(total, list(read_out.values()))
    found = read_out_gradients({name: each.detach() for name, each in read_out.items()}, features, labels)
    for tensor, each in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(tensor, each, rtol=1e-10, atol=1e-12)


def test_runs_of_one_seed_share_read_out_and_order_and_others_do_not():
    train, validation, test = (Part(part.features[:1].expand(3, -1, -1), part.labels) for part in parts())
    found = fine_tune(SETTINGS, RUNS, CLASSES, train, validation, test)
    assert found.target_loss[1] == found.target_loss[2]
    assert found.target_loss[0] != found.target_loss[1]
    assert not torch.equal(initial_read_out(RUNS[0], 5, 3)["weight"], initial_read_out(RUNS[1], 5, 3)["weight"])


def test_a_run_alone_ends_as_in_a_stack():
    whole = list(parts())
    found = fine_tune(SETTINGS, RUNS, CLASSES, *whole)
    alone = fine_tune(SETTINGS, RUNS[1:2], CLASSES, *(Part(part.features[1:2], part.labels) for part in whole))
    assert alone.target_loss[0].item() == pytest.approx(found.target_loss[1].item(), rel=1e-4)
    assert alone.train_curve[:, 0].tolist() == found.train_curve[:, 1].tolist()


def test_nothing_is_learnt_from_validation_and_test_samples():
    train, validation, test = parts()
    other = Part(-validation.features, validation.labels), Part(-test.features, test.labels)
    found, changed = (fine_tune(SETTINGS, RUNS, CLASSES, train, *held) for held in ((validation, test), other))
    assert torch.equal(found.train_curve, changed.train_curve)
    assert not torch.equal(found.target_loss, changed.target_loss)


def test_separable_classes_are_learnt():
    train, validation, test = parts(separation=8.0)
    settings = SETTINGS.model_copy(update={"fine_tuning_epochs": 60})
    found = fine_tune(settings, RUNS, CLASSES, train, validation, test)
    assert (found.train_accuracy > 0.95).all()
    assert (found.target_accuracy > 0.9).all()


def test_the_initial_read_out_is_that_of_pytorch_s_linear_in_range():
    drawn = initial_read_out(RUNS[0], 400, 50)
    assert drawn["weight"].shape == (50, 400)
    assert drawn["bias"].shape == (50,)
    assert drawn["weight"].abs().max() <= 1 / 20
    # the variance of a uniform number within 1/20 of 0 is 1 / 1200; of 20,000 of them, 1 % is 1.1 standard errors off
    assert drawn["weight"].var().item() == pytest.approx(1 / 1200, rel=0.04)


def test_features_that_overflow_are_classified_wrongly_and_leave_other_runs_alone():
    whole = list(parts())
    found = fine_tune(SETTINGS, RUNS, CLASSES, *whole)
    spoilt = [Part(part.features.clone(), part.labels) for part in whole]
    for part in spoilt:
        part.features[0] = math.inf
    broken = fine_tune(SETTINGS, RUNS, CLASSES, *spoilt)
    assert broken.target_accuracy[0] == 0
    assert not broken.target_loss[0].isfinite()
    assert torch.equal(broken.train_curve[:, 1:], found.train_curve[:, 1:])
    assert torch.equal(broken.target_loss[1:], found.target_loss[1:])


def test_accuracy_and_loss_of_a_known_read_out():
    read_out = {"weight": torch.eye(2)[None], "bias": torch.tensor([[0.0, 1.0]])}
    part = Part(torch.tensor([[[2.0, 0.0], [0.5, 0.0], [0.0, 0.0], [3.0, 1.0]]]), torch.tensor([0, 0, 1, 1]))
    assert accuracy(read_out, part).tolist() == [0.5]  # margins of class 0: 1, -1/2, -1, 1
    expected = [math.log1p(math.exp(-1)), math.log1p(math.exp(0.5)), math.log1p(math.exp(-1)), math.log1p(math.e)]
    assert mean_loss(read_out, part).item() == pytest.approx(sum(expected) / 4)
