"""Training steps against plain PyTorch: frozen masks, shared data order, and runs that diverge beside others."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from tests.studies.stability import tiny
from torch import nn

from jacnorm.studies.stability import train
from jacnorm.studies.stability.inputs import load
from jacnorm.training.snapshots import load as load_snapshots

torch.set_num_threads(1)

CPU = torch.device("cpu")
SETTINGS = tiny.TRAINABILITY


@pytest.fixture(scope="module")
def inputs(digits):
    return load(digits, SETTINGS.train_samples)


def stack_of(arms, inputs, settings=SETTINGS):
    return train.Stack(settings, arms, inputs, torch.arange(len(inputs.train_y)), CPU)


def pruned_arms(inputs, **update):
    return list(train._pruned_arms(SETTINGS.model_copy(update=update), inputs, 3))


def weights_of(stack):
    return [weight.clone() for weight in stack.state().values() if weight.ndim == 3][: len(stack._parameters)]


def test_digits_are_learned(tmp_path, digits):
    files = ("--data", digits, "--weights", tmp_path / "trainability.safetensors")
    settings = SETTINGS.model_copy(update={"epochs": 10})
    rows = tiny.call("train", "trainability", settings, tmp_path / "tables", *files)["trainability"]
    best = rows[(rows.scaling == "frobenius") & (rows.learning_rate == 0.05)]
    assert (best.test_accuracy > 0.6).all()  # chance is 0.1
    assert (best.validation_accuracy > 0.5).all()
    assert (best.train_loss < 0.8).all()  # chance is log 10 = 2.303
    assert (rows.diverged_at == -1).all()
    assert not list(tmp_path.glob("*checkpoint*"))  # discarded once the outputs are there


def test_removed_weights_stay_exactly_zero_and_the_others_move(inputs):
    arms = pruned_arms(inputs)
    stack = stack_of(arms, inputs)
    before = weights_of(stack)
    for index in range(2 * stack.steps_per_epoch):
        stack.step(index)
    for layer, (start, end) in enumerate(zip(before, weights_of(stack), strict=True)):
        mask = torch.cat([arm.masks[layer] for arm in arms])
        assert 0.4 < mask.float().mean() < 0.6
        assert (end[~mask] == 0).all()
        assert (start[~mask] == 0).all()
        assert (end != start)[mask].float().mean() > 0.8  # units that never fire, and constant pixels, keep theirs
        momentum = stack.state()[f"momentum/{layer}"]
        assert (momentum[~mask] == 0).all()


def test_arms_share_weights_and_masks_and_rescaling_is_one_factor_per_layer_at_the_start(inputs):
    unscaled, rescaled = (arm for arm in pruned_arms(inputs) if arm.learning_rate == 0.05)
    assert (unscaled.cell["scaling"], rescaled.cell["scaling"]) == ("none", "frobenius")
    dense = train._initial(SETTINGS, inputs, 3)
    for layer in range(3):
        mask = unscaled.masks[layer]
        assert torch.equal(mask, rescaled.masks[layer])
        assert torch.equal(unscaled.weights[layer], dense[layer] * mask)
        for run in range(2):
            kept = dense[layer][run][mask[run]]
            factor = math.sqrt(dense[layer][run].square().sum() / kept.square().sum())
            torch.testing.assert_close(rescaled.weights[layer][run], unscaled.weights[layer][run] * factor)


def test_masks_do_not_follow_the_sizes_of_the_weights(inputs):
    settings = SETTINGS.model_copy(update={"seeds": list(range(10, 40)), "sparsities": [0.9]})
    arm = next(train._pruned_arms(settings, inputs, 3))
    squares = torch.cat([(weight.square() * weight.shape[2] / 2.0).flatten() for weight in arm.weights])
    assert squares.sum().item() / (squares > 0).sum().item() == pytest.approx(1.0, abs=0.1)  # 1.8 from one stream


def plain_training(weights, masks, x, y, batches, rate, momentum):
    """One network as an nn.Sequential under torch.optim.SGD; removed weights are zeroed after each step instead."""
    layers = []
    for weight in weights:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.float().clone())
        layers += [linear, nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    for rows in batches:
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimiser.step()
        with torch.no_grad():
            for parameter, mask in zip(model.parameters(), masks, strict=True):
                parameter *= mask
    return model


@pytest.mark.parametrize("arm", range(4))
def test_a_run_is_an_ordinary_pytorch_loop(inputs, monkeypatch, arm):
    batches = []
    original = train.batch_indices

    def recording(*arguments, **options):
        batches.append(original(*arguments, **options))
        return batches[-1]

    monkeypatch.setattr(train, "batch_indices", recording)
    arms = pruned_arms(inputs)
    stack = stack_of(arms, inputs)
    for index in range(2 * stack.steps_per_epoch):
        stack.step(index)
    run = 2 * arm + 1  # its second seed
    chosen = arms[arm]
    model = plain_training(
        [weight[1] for weight in chosen.weights],
        [mask[1] for mask in chosen.masks],
        inputs.train_x,
        inputs.train_y,
        [rows[run] for rows in batches],
        chosen.learning_rate,
        SETTINGS.momentum,
    )
    for found, expected in zip(weights_of(stack), model.parameters(), strict=True):
        torch.testing.assert_close(found[run], expected.detach(), rtol=1e-3, atol=1e-5)
    right = (model(inputs.test_x).argmax(1) == inputs.test_y).double().mean()
    assert stack.accuracy(inputs.test_x, inputs.test_y)[run].item() == pytest.approx(right.item(), abs=0.006)
    for epoch in range(2):  # each epoch visits every sample once
        visited = torch.cat([rows[run] for rows in batches[epoch * stack.steps_per_epoch :][: stack.steps_per_epoch]])
        assert torch.equal(visited.sort().values, torch.arange(300))


def test_runs_of_one_seed_see_their_samples_in_one_order_and_other_seeds_in_another(inputs):
    first = pruned_arms(inputs)[0]
    equal = [weight[:1].expand(2, -1, -1).clone() for weight in first.weights]
    masks = [mask[:1].expand(2, -1, -1).clone() for mask in first.masks]
    twins = [train.Arm({**first.cell, "scaling": name}, equal, masks, 0.05) for name in ("none", "frobenius")]
    stack = stack_of(twins, inputs)
    for index in range(3):
        stack.step(index)
    weight = stack.state()["weight/1"]  # arm by arm: seeds 10, 11, 10, 11
    assert torch.equal(weight[0], weight[2])
    assert torch.equal(weight[1], weight[3])
    assert not torch.equal(weight[0], weight[1])


def test_a_run_that_diverges_is_recorded_and_leaves_the_others_their_bits(tmp_path, digits):
    found = {}
    for rate in (0.05, 1e6):
        folder = tmp_path / str(rate)
        settings = SETTINGS.model_copy(update={"learning_rates": [0.02, rate]})
        files = ("--data", digits, "--weights", folder / "trainability.safetensors")
        found[rate] = tiny.call("train", "trainability", settings, folder / "tables", *files)["trainability"]
    wild = found[1e6]
    diverged = wild.learning_rate == 1e6
    assert (wild[diverged].diverged_at >= 0).all()
    assert (wild[diverged].diverged_at < 25).all()
    assert wild[diverged].test_accuracy.between(0, 0.35).all()
    assert (wild[~diverged].diverged_at == -1).all()
    good = found[0.05][found[0.05].learning_rate == 0.02]
    pd.testing.assert_frame_equal(wild[~diverged], good, check_exact=True)


def test_initial_weights_are_kept_once_per_arm_of_one_learning_rate(tmp_path, digits):
    path = tmp_path / "trainability.safetensors"
    tiny.call("train", "trainability", SETTINGS, tmp_path / "tables", "--data", digits, "--weights", path)
    snapshots = load_snapshots(path)
    assert [(each.cell["scaling"], each.cell["epoch"]) for each in snapshots] == [("none", 0), ("frobenius", 0)]
    for unscaled, rescaled in zip(*(each.weights for each in snapshots), strict=True):
        assert torch.equal(unscaled != 0, rescaled != 0)


def test_drift_keeps_the_asked_epochs_and_ends_where_its_curve_says(tmp_path, digits):
    path = tmp_path / "drift.safetensors"
    curves = tiny.call("train", "drift", tiny.DRIFT, tmp_path / "tables", "--data", digits, "--weights", path)["curves"]
    snapshots = load_snapshots(path)
    assert [(each.cell["depth"], each.cell["epoch"]) for each in snapshots] == [(3, 0), (3, 2), (4, 0), (4, 2)]
    test = load(digits, tiny.DRIFT.train_samples)
    for each in (each for each in snapshots if each.cell["epoch"] == 2):
        for run, seed in enumerate(tiny.SEEDS):
            hidden = test.test_x.numpy()
            for layer, weight in enumerate(each.weights):
                hidden = hidden @ weight[run].numpy().T
                hidden = np.maximum(hidden, 0) if layer < len(each.weights) - 1 else hidden
            accuracy = (hidden.argmax(1) == test.test_y.numpy()).mean()
            row = curves[(curves.seed == seed) & (curves.depth == each.cell["depth"]) & (curves.epoch == 2)]
            assert row.test_accuracy.item() == pytest.approx(accuracy, abs=0.003)
    assert (curves[curves.epoch == 2].set_index(["seed", "depth"]).train_loss
            < curves[curves.epoch == 1].set_index(["seed", "depth"]).train_loss).all()  # fmt: skip


def test_two_runs_give_the_same_bytes_and_a_block_is_its_seeds(tmp_path, digits):
    def made(name, seeds):
        settings = tiny.DRIFT.model_copy(update={"seeds": seeds})
        path = tmp_path / name / "drift.safetensors"
        tables = tiny.call("train", "drift", settings, path.parent, "--data", digits, "--weights", path)
        return tables["curves"], path.read_bytes(), load_snapshots(path)

    first, again = made("first", [10, 11]), made("again", [10, 11])
    assert first[1] == again[1]
    pd.testing.assert_frame_equal(first[0], again[0], check_exact=True)
    alone = made("alone", [11])[2]
    for one, both in itertools.zip_longest(alone, first[2]):
        for weight, stacked in zip(one.weights, both.weights, strict=True):
            torch.testing.assert_close(weight[0], stacked[1], rtol=1e-3, atol=1e-5)  # float32, other batched products
