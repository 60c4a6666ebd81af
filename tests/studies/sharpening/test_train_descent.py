"""Full-batch descent against plain PyTorch, what is kept, when runs end; killed jobs end with the same bits."""

from __future__ import annotations

import math
import os
import signal

import pandas as pd
import pytest
import torch
from torch import nn

from jacnorm.errors import UserError
from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.sharpening import train_descent
from jacnorm.studies.sharpening.inputs import load_all
from jacnorm.studies.sharpening.networks import Convolutional, _BatchNorm
from jacnorm.studies.sharpening.settings import DescentSettings, ImageSettings
from jacnorm.studies.sharpening.tables import COLUMNS
from jacnorm.studies.sharpening.train_descent import Arm, Run, Stack, arms, stacks
from jacnorm.training import snapshots

torch.set_num_threads(1)

CPU = torch.device("cpu")
TINY = DescentSettings(
    seeds=[10, 11],
    train_samples=50,
    pool=100,
    width=12,
    square_learning_rates=[0.1],
    smoothings=[0.0, 0.3],
    entropy_learning_rates=[0.5],
    edge_learning_rates=[2.0],
    steps=50,
    measure_every=20,
)
ARMS = [
    Arm("square", 0.0, 0.1),
    Arm("cross-entropy", 0.0, 0.5),
    Arm("cross-entropy", 0.3, 0.5),
    Arm("cross-entropy", 0.1, 2.0),
]


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def inputs(digits):
    return load_all([digits], TINY)[0]


def train(folder, digits, settings=TINY, command="descent"):
    """Call the step as a rule does; its table and its snapshots."""
    before = torch.get_deterministic_debug_mode()
    files = ["--tables", str(folder), "--data", str(digits), "--weights", str(folder / "weights.safetensors")]
    try:
        run(
            {name: getattr(train_descent, name) for name in ("descent", "images")},
            [command, "--device", "cpu", *files, *flags(settings).split()],
        )
    finally:
        torch.set_deterministic_debug_mode(before)
    name = "image_fits" if command == "images" else "descent_fits"
    block = f"s{min(settings.seeds)}-{max(settings.seeds)}"
    return read_table(folder / f"{name}-{block}.parquet"), snapshots.load(folder / "weights.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        return folder, *train(folder, digits)


def kept_of(kept, arm, seed):
    """The parameters of one run by step."""
    found = {}
    for each in kept:
        for position, columns in enumerate(each.cell["runs"]):
            if Run.of(columns).arm == arm and columns["seed"] == seed:
                found[each.cell["step"]] = {name: tensor[position] for name, tensor in each.tensors.items()}
    return found


def assert_same(kept, others, **tolerance):
    """Each run has the same steps and parameters in both."""
    for arm in ARMS:
        for seed in TINY.seeds:
            ours, theirs = kept_of(kept, arm, seed), kept_of(others, arm, seed)
            assert list(ours) == list(theirs) != []
            for step, tensors in ours.items():
                for name, tensor in tensors.items():
                    torch.testing.assert_close(tensor, theirs[step][name], **tolerance)


def plain(parameters, activation=nn.Tanh):
    """One network as a module."""
    modules = [nn.Flatten()]
    for layer in (1, 2, 3):
        weight, bias = parameters[f"weight{layer}"], parameters[f"bias{layer}"]
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        modules += [linear, activation()]
    return nn.Sequential(*modules[:-1])


def plain_cost(arm, logits, labels):
    if arm.cost == "square":
        one_hot = nn.functional.one_hot(labels, 10).float()
        return (logits - one_hot).square().sum(1).mean() / 2
    return nn.functional.cross_entropy(logits, labels, label_smoothing=arm.smoothing)


# --- what is trained and kept ----------------------------------------------------------------------------------------


def test_parameters_are_kept_before_on_the_way_and_after_for_every_run(trained):
    folder, fits, kept = trained
    assert list(fits.columns) == list(COLUMNS["descent_fits"])
    assert [Arm(*row) for row in fits[["cost", "smoothing", "learning_rate"]][::2].itertuples(index=False)] == ARMS
    assert fits.seed.tolist() == [10, 11] * 4
    assert (fits.steps == TINY.steps).all()
    assert (fits.diverged_at == -1).all()
    assert [each.cell["step"] for each in kept] == [0, 20, 40, 50]
    assert all(len(each.cell["runs"]) == 8 for each in kept)
    assert not list(folder.glob("*checkpoint*"))


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_a_run_is_an_ordinary_pytorch_loop(trained, inputs, arm):
    _, fits, kept = trained
    found = kept_of(kept, arm, 11)
    model = plain(found[0])
    optimiser = torch.optim.SGD(model.parameters(), lr=arm.learning_rate)
    for step in range(TINY.steps):
        if step in found:
            for name, parameter in zip(found[step].values(), model.parameters(), strict=True):
                torch.testing.assert_close(name, parameter.detach(), rtol=1e-3, atol=1e-5)
        loss = plain_cost(arm, model(inputs.train_x), inputs.train_y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, parameter in zip(found[TINY.steps].values(), model.parameters(), strict=True):
        torch.testing.assert_close(name, parameter.detach(), rtol=1e-3, atol=1e-5)
    row = fits[(fits.seed == 11) & (fits.cost == arm.cost) & (fits.smoothing == arm.smoothing)]
    assert row.train_loss.item() == pytest.approx(loss.item(), rel=1e-4)


def test_a_seed_has_one_initialisation_in_every_arm(trained):
    _, _, kept = trained
    first = {seed: [kept_of(kept, arm, seed)[0] for arm in ARMS] for seed in TINY.seeds}
    for own in first.values():
        for other in own[1:]:
            assert all(torch.equal(own[0][name], other[name]) for name in other)
    assert not torch.equal(first[10][0]["weight1"], first[11][0]["weight1"])


def test_a_run_in_a_stack_is_the_run_alone(trained, tmp_path, digits):
    _, together, kept = trained
    fits, alone = train(tmp_path, digits, TINY.model_copy(update={"runs_together": 3}))
    assert sorted({each.cell["stack"] for each in alone}) == [1, 2, 3]
    pd.testing.assert_frame_equal(fits, together, rtol=1e-4)
    assert_same(kept, alone, rtol=1e-3, atol=1e-5)


def test_chunks_change_nothing_but_rounding(trained, tmp_path, digits):
    _, whole, kept = trained
    fits, parts = train(tmp_path, digits, TINY.model_copy(update={"chunk": 17}))
    pd.testing.assert_frame_equal(fits, whole, rtol=1e-4)
    assert_same(kept, parts, rtol=1e-3, atol=1e-5)


def test_images_train_every_network_and_fill_a_table_of_their_own(tmp_path, digits):
    settings = ImageSettings(
        **TINY.model_dump(exclude={"seeds", "steps"}) | {"networks": ["mlp", "cnn"], "channels": 2, "runs_together": 8},
        seeds=[10],
        steps=3,
    )
    fits, kept = train(tmp_path, digits, settings, "images")
    assert list(fits.columns) == list(COLUMNS["image_fits"])
    assert fits.network.tolist() == ["mlp"] * 4 + ["cnn"] * 4
    assert fits.train_loss.notna().all()
    assert [(each.cell["network"], each.cell["stack"], each.cell["step"]) for each in kept] == [
        ("mlp", 1, 0), ("mlp", 1, 3), ("cnn", 2, 0), ("cnn", 2, 3)
    ]  # fmt: skip


def test_batch_norm_trains_on_the_statistics_of_the_batch(inputs, monkeypatch):
    layers = [nn.Conv2d(1, 2, 3), _BatchNorm(2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 10)]
    network = Convolutional(inputs.image, inputs.classes, nn.Sequential(*layers))
    monkeypatch.setattr(train_descent, "build", lambda *_: network)
    stack = Stack(TINY, [Run("digits", "cnn", arm, 10) for arm in ARMS], inputs, CPU)
    start = {name: tensor.clone() for name, tensor in stack.state().items()}
    found = stack.step(0)["loss"]
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 10))
    for name, tensor in model.named_parameters():
        tensor.data.copy_(start[f"parameter/{name}"][2])
    expected = plain_cost(ARMS[2], model(inputs.train_x), inputs.train_y)
    assert found[2].item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(stack.state()["statistic/1.variance"][2], model[1].running_var)


# --- arms and stacks -------------------------------------------------------------------------------------------------


def test_an_arm_asked_for_twice_is_trained_once():
    settings = TINY.model_copy(update={"edge_smoothing": 0.3, "edge_learning_rates": [0.5, 1.0]})
    assert arms(settings) == [*ARMS[:3], Arm("cross-entropy", 0.3, 1.0)]


def test_without_any_step_size_one_sentence_says_so():
    none = {"square_learning_rates": [], "entropy_learning_rates": [], "edge_learning_rates": []}
    with pytest.raises(UserError, match="give square_learning_rates, edge_learning_rates, or entropy_learning_rates"):
        arms(TINY.model_copy(update=none))


def test_stacks_hold_runs_of_one_network(inputs):
    settings = TINY.model_copy(update={"networks": ["mlp", "cnn"], "runs_together": 5})
    found = [runs for _, runs in stacks(settings, [inputs])]
    assert [len(runs) for runs in found] == [5, 3, 5, 3]
    assert [{run.network for run in runs} for runs in found] == [{"mlp"}, {"mlp"}, {"cnn"}, {"cnn"}]
    assert len({run.id for runs in found for run in runs}) == 16


# --- when runs end ---------------------------------------------------------------------------------------------------


def test_runs_that_diverge_are_recorded_and_leave_the_others_alone(trained, tmp_path, digits):
    _, healthy, kept = trained
    settings = TINY.model_copy(update={"square_learning_rates": [0.1, 30.0], "measure_every": 1})
    fits, others = train(tmp_path, digits, settings)
    lost = fits[fits.learning_rate == 30.0]
    assert len(lost) == 2
    assert lost.diverged_at.between(1, TINY.steps - 1).all()
    assert (lost.steps == lost.diverged_at).all()
    assert lost.train_loss.isna().all()
    pd.testing.assert_frame_equal(fits[fits.learning_rate != 30.0].reset_index(drop=True), healthy, rtol=1e-4)
    for seed, diverged in zip(lost.seed, lost.diverged_at, strict=True):
        steps = kept_of(others, Arm("square", 0.0, 30.0), seed)
        assert list(steps) == list(range(diverged))
        assert all(tensor.isfinite().all() for tensors in steps.values() for tensor in tensors.values())
    wanted = {each.cell["step"] for each in kept}
    assert_same(kept, [each for each in others if each.cell["step"] in wanted], rtol=1e-3, atol=1e-5)


def test_a_cost_far_above_the_first_one_counts_as_divergence_before_it_overflows(inputs):
    stack = Stack(TINY, [Run("digits", "mlp", Arm("square", 0.0, 30.0), 10)], inputs, CPU)
    first = stack.step(0)["loss"].item()
    index, loss = 0, first
    while math.isfinite(loss):
        assert loss <= train_descent.LIMIT * first
        index += 1
        weights = [tensor.clone() for tensor in stack._parameters.values()]
        loss = stack.step(index)["loss"].item()
    model = plain(dict(zip(stack._parameters, (weight[0] for weight in weights), strict=True)))
    cost = plain_cost(ARMS[0], model(inputs.train_x), inputs.train_y).item()
    assert train_descent.LIMIT * first < cost < math.inf


def test_a_job_ends_when_all_of_its_runs_have_diverged(tmp_path, digits):
    settings = TINY.model_copy(update={"square_learning_rates": [30.0], "smoothings": [], "edge_learning_rates": []})
    fits, kept = train(tmp_path, digits, settings)
    assert (fits.diverged_at > 0).all()
    assert [each.cell["step"] for each in kept] == [0]


def test_a_run_ends_at_the_wanted_accuracy_and_keeps_its_last_parameters(trained, tmp_path, digits, inputs):
    _, _, whole = trained
    settings = TINY.model_copy(update={"stop_accuracy": 0.98})
    fits, kept = train(tmp_path, digits, settings)
    early = fits[fits.steps < TINY.steps]
    assert 2 <= len(early) < len(fits)
    assert early.steps.nunique() > 1
    for row in fits.itertuples():
        arm = Arm(row.cost, row.smoothing, row.learning_rate)
        found = kept_of(kept, arm, row.seed)
        full = kept_of(whole, arm, row.seed)
        assert list(found) == [step for step in (0, 20, 40, 50) if step < row.steps] + [row.steps]
        for step in found.keys() & full.keys():
            torch.testing.assert_close(found[step], full[step], rtol=1e-3, atol=1e-5)
        logits = plain(found[row.steps])(inputs.train_x)
        right = (logits.argmax(1) == inputs.train_y).double().mean().item()
        assert (right >= 0.98) == (row.steps < TINY.steps)
        if row.steps < TINY.steps:  # the cost of the parameters that were kept, which took no further update
            assert row.train_loss == pytest.approx(plain_cost(arm, logits, inputs.train_y).item(), rel=1e-4)


def test_training_ends_with_its_last_run(tmp_path, digits):
    settings = TINY.model_copy(update={"stop_accuracy": 0.3, "steps": 10000})
    fits, _ = train(tmp_path, digits, settings)
    assert (fits.steps < 1000).all()


# --- killed jobs -----------------------------------------------------------------------------------------------------


def test_a_job_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path, digits, monkeypatch):
    settings = TINY.model_copy(
        update={"runs_together": 6, "stop_accuracy": 0.9, "square_learning_rates": [0.1, 30.0], "networks": ["mlp"]}
    )
    (tmp_path / "reference").mkdir()
    (tmp_path / "killed").mkdir()
    fits, _ = train(tmp_path / "reference", digits, settings)
    assert (fits.diverged_at > 0).any()
    ends = fits.steps[fits.steps < TINY.steps]
    assert ends.max() > 30
    original = Stack.step
    # In the first stack before anything, after a divergence was noticed; in the second one early and late.
    kills = [("square", 0), ("square", 33), ("cross-entropy", 1), ("cross-entropy", int(ends.min()) + 1)]

    def killed(self, index):
        if kills and (self.runs[0].arm.cost, index) == kills[0]:
            kills.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index)

    monkeypatch.setattr(Stack, "step", killed)
    while kills:
        with pytest.raises(SystemExit, match="143"):
            train(tmp_path / "killed", digits, settings)
        assert list((tmp_path / "killed").glob("*.checkpoint.safetensors"))
    train(tmp_path / "killed", digits, settings)
    for name in ("weights.safetensors", "descent_fits-s10-11.parquet"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
    assert not list((tmp_path / "killed").glob("*checkpoint*"))
