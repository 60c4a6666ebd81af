"""Training against plain PyTorch, when runs stop, what they keep, and that a killed job ends with the same bits."""

from __future__ import annotations

import logging
import os
import signal

import pandas as pd
import pytest
import torch
from torch import nn

from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.lipschitz import train_depth
from jacnorm.studies.lipschitz.inputs import load
from jacnorm.studies.lipschitz.margins import margins
from jacnorm.studies.lipschitz.settings import DepthSettings
from jacnorm.studies.lipschitz.tables import COLUMNS
from jacnorm.training import snapshots
from jacnorm.training.batches import batch_indices

torch.set_num_threads(1)

CPU = torch.device("cpu")
TINY = DepthSettings(
    seeds=[10, 11],
    train_samples=100,
    widths=[12],
    depths=[2, 4],
    activations=["relu", "tanh"],
    learning_rate=0.01,
    batch=40,  # the last batch of an epoch has 20
    max_epochs=150,
    theorem_samples=10,
)


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def inputs(digits):
    return load(digits, TINY.train_samples)


def train(folder, digits, settings=TINY):
    """Call the step as a rule does; its table and its snapshots."""
    before = torch.get_deterministic_debug_mode()
    files = ["--tables", str(folder), "--data", str(digits), "--weights", str(folder / "depth.safetensors")]
    try:
        run({"depth": train_depth.depth}, ["--device", "cpu", *files, *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)
    block = f"s{min(settings.seeds)}-{max(settings.seeds)}"
    return read_table(folder / f"fits-{block}.parquet"), snapshots.load(folder / "depth.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        return folder, *train(folder, digits)


def stack_of(inputs, settings=TINY, activation="relu", depth=4):
    return train_depth.Stack(settings, train_depth.Cell("digits", activation, 12, depth), inputs, CPU)


def plain(weights, activation, run, biases=None):
    """One network of a stack as a module."""
    functions = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "softplus": nn.Softplus}
    modules = []
    for layer, weight in enumerate(weights):
        linear = nn.Linear(weight.shape[2], weight.shape[1], bias=biases is not None)
        linear.weight = nn.Parameter(weight[run].clone())
        if biases is not None:
            linear.bias = nn.Parameter(biases[layer][run].clone())
        modules += [linear, functions[activation]()]
    return nn.Sequential(*modules[:-1])


def test_every_training_margin_exceeds_the_target_and_the_table_says_so(trained, inputs):
    folder, fits, kept = trained
    assert list(fits.columns) == list(COLUMNS["fits"])
    assert len(fits) == 2 * 2 * 2
    assert fits.reached.all()
    assert fits.epochs.between(2, TINY.max_epochs - 1).all()
    assert (fits.diverged_at == -1).all()
    assert [(each.cell["activation"], each.cell["depth"], each.cell["stage"]) for each in kept] == [
        (activation, depth, stage)
        for activation in ("relu", "tanh")
        for depth in (2, 4)
        for stage in ("initial", "trained")
    ]
    for each in kept:
        for position, seed in enumerate(TINY.seeds):
            model = plain(each.weights, each.cell["activation"], position)
            found = margins(model(inputs.train_x.flatten(1))[None], inputs.train_y[None])
            assert (found.min() > TINY.margin) == (each.cell["stage"] == "trained")
            if each.cell["stage"] == "trained":
                row = fits[(fits.seed == seed) & (fits.activation == each.cell["activation"])
                           & (fits.depth == each.cell["depth"])]  # fmt: skip
                right = (model(inputs.test_x.flatten(1)).argmax(1) == inputs.test_y).double().mean().item()
                assert row.test_accuracy.item() == pytest.approx(right, abs=0.003)
                assert row.train_loss.item() < 0.5
    assert not list(folder.glob("*checkpoint*"))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", "softplus"])
def test_a_run_is_an_ordinary_pytorch_loop_until_it_reaches_the_target(inputs, activation, biases):
    settings = TINY.model_copy(update={"biases": biases})
    stack = stack_of(inputs, settings, activation, depth=3)
    weights, offsets = train_depth.parts(stack.snapshot("initial").tensors)
    assert (offsets is not None) == biases
    model = plain(weights, activation, 1, offsets)
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    x, y = inputs.train_x.flatten(1), inputs.train_y
    runs = [stack._cell.run(seed) for seed in settings.seeds]
    for index in range(3 * settings.max_epochs):
        loss = stack.step(index)["loss"][1]
        rows = batch_indices(index, runs, 100, settings.batch)[1]
        optimiser.zero_grad()
        expected = nn.functional.cross_entropy(model(x[rows]), y[rows])
        expected.backward()
        optimiser.step()
        assert loss.item() == pytest.approx(expected.item(), rel=0.02, abs=1e-4)
        if index % 3 == 2:  # the end of an epoch
            smallest = margins(model(x)[None], y[None]).min()
            if abs(smallest - settings.margin) > 0.05:
                assert stack.reached[1] == (smallest > settings.margin)
            if stack.reached[1]:
                break
    assert stack.epochs[1] == (index + 1) // 3
    found, _ = train_depth.parts(stack.snapshot("trained").tensors)
    for weight, module in zip(found, model[::2], strict=True):
        torch.testing.assert_close(weight[1], module.weight.detach(), rtol=0.02, atol=2e-3)


def test_initial_weights_have_their_variance(inputs):
    settings = TINY.model_copy(update={"seeds": list(range(10, 60))})
    for activation, variance in {"relu": 2, "tanh": 1, "elu": 2, "softplus": 2}.items():
        weights, _ = train_depth.parts(stack_of(inputs, settings, activation).snapshot("initial").tensors)
        squares = torch.cat([(weight.square() * weight.shape[2]).flatten() for weight in weights])
        assert squares.mean().item() == pytest.approx(variance, rel=0.05)


def test_a_run_that_reached_the_target_keeps_its_weights_while_another_goes_on(inputs):
    stack = stack_of(inputs)
    index = 0
    while stack.reached.sum() != 1:
        assert not stack.reached.all(), "both runs reached the target together; choose other seeds"
        stack.step(index)
        index += 1
    early = int(stack.reached.nonzero())
    before = stack.snapshot("").weights
    assert not stack.finished()
    stack.step(index)
    for old, new in zip(before, stack.snapshot("").weights, strict=True):
        assert torch.equal(old[early], new[early])
        assert not torch.equal(old[1 - early], new[1 - early])
    while not stack.finished():
        index += 1
        stack.step(index)
    assert (stack.epochs[1 - early] > stack.epochs[early]).all()


def test_a_run_in_a_stack_is_the_run_alone(trained, tmp_path, digits):
    _, together, kept = trained
    fits, alone = train(tmp_path, digits, TINY.model_copy(update={"seeds": [11]}))
    expected = together[together.seed == 11].reset_index(drop=True)
    pd.testing.assert_frame_equal(fits, expected, rtol=1e-3, atol=1e-4)
    for each, other in zip(kept, alone, strict=True):
        for a, b in zip(each.weights, other.weights, strict=True):
            if each.cell["stage"] == "initial":
                assert torch.equal(a[1:], b)
            torch.testing.assert_close(a[1:], b, rtol=1e-2, atol=1e-3)


def test_a_job_that_is_killed_again_and_again_ends_with_the_same_bits(trained, tmp_path, digits, monkeypatch):
    reference, fits, _ = trained
    original = train_depth.Stack.step
    # Where it is killed: at a step of a cell; in the second stack once in the first epoch, and once between the two
    # runs' ends, so that what is frozen has to be restored.
    ends = fits[(fits.activation == "relu") & (fits.depth == 4)].epochs.sort_values().tolist()
    assert ends[0] < ends[1]
    kills = [("relu", 2, 10), ("relu", 4, 1), ("relu", 4, 3 * ends[0] + 1), ("tanh", 4, 7)]

    def killed(self, index):
        if kills and (self._cell.activation, self._cell.depth, index) == kills[0]:
            kills.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index)

    monkeypatch.setattr(train_depth.Stack, "step", killed)
    while kills:
        with pytest.raises(SystemExit, match="143"):
            train(tmp_path, digits)
        assert list(tmp_path.glob("*.checkpoint.safetensors"))
    train(tmp_path, digits)
    for name in ("depth.safetensors", "fits-s10-11.parquet"):
        assert (tmp_path / name).read_bytes() == (reference / name).read_bytes()
    assert not list(tmp_path.glob("*checkpoint*"))


def test_a_network_that_stays_short_of_the_target_is_said_in_one_sentence(tmp_path, digits, caplog):
    settings = TINY.model_copy(update={"max_epochs": 2, "depths": [3], "activations": ["tanh"]})
    with caplog.at_level(logging.INFO, logger="jacnorm"):
        fits, _ = train(tmp_path, digits, settings)
    assert not fits.reached.any()
    assert (fits.epochs == 2).all()
    (sentence,) = [each.getMessage() for each in caplog.records if "margins" in each.getMessage()]
    assert sentence == (
        "digits, tanh, width 12, depth 3: after 2 epochs the training margins of seed 10, 11 do not all exceed 1; "
        "raise max_epochs, or take fewer training samples"
    )


def test_runs_that_diverge_are_recorded_and_end_the_training(tmp_path, digits):
    settings = TINY.model_copy(update={"learning_rate": 1e30, "depths": [3], "activations": ["relu"]})
    fits, kept = train(tmp_path, digits, settings)
    assert (fits.diverged_at >= 0).all()
    assert not fits.reached.any()
    assert (fits.epochs < 5).all()
    assert [each.cell["stage"] for each in kept] == ["initial", "trained"]


def test_biases_are_trained_when_asked_for(tmp_path, digits):
    settings = TINY.model_copy(update={"biases": True, "depths": [3], "activations": ["tanh"]})
    fits, kept = train(tmp_path, digits, settings)
    assert fits.reached.all()
    for each, moved in zip(kept, (False, True), strict=True):
        _, biases = train_depth.parts(each.tensors)
        assert len(biases) == 3
        assert all((bias != 0).any() == moved for bias in biases)
