"""Training with regularisers against plain PyTorch, both stopping rules, and jobs that are cut off or diverge."""

from __future__ import annotations

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
from jacnorm.studies.sharpening import train_regularisers
from jacnorm.studies.sharpening.arms import trainings
from jacnorm.studies.sharpening.inputs import load_all
from jacnorm.studies.sharpening.networks import Convolutional, _BatchNorm
from jacnorm.studies.sharpening.regularisers import cropped, shifted
from jacnorm.studies.sharpening.settings import RegulariserSettings
from jacnorm.studies.sharpening.train_regularisers import Run, Stack, stacks
from jacnorm.training.batches import epoch_order
from jacnorm.training.seeds import RunId, numpy_generator
from jacnorm.training.snapshots import load as load_snapshots

torch.set_num_threads(1)

CPU = torch.device("cpu")
SETTINGS = RegulariserSettings(
    seeds=[10, 11],
    train_samples=50,
    pool=100,
    width=12,
    batch=20,
    updates=12,
    learning_rates=[0.2],
    other_learning_rates=[0.5],
    other_batches=[10, 50],
    weight_decays=[0.1],
    smoothings=[0.3],
    mixups=[0.4],
    sam_radii=[0.5],
    jacobian_penalties=[0.3],
    shifts=[0.5],
    crops=[1],
    matched_loss=1.8,
    look_every=2,
    decays=[],
)
KEY = ["regulariser", "strength", "learning_rate", "batch", "seed", "rule"]


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def inputs(digits):
    return load_all([digits], SETTINGS)[0]


def train(settings, folder, digits):
    """Call the step with the options that a rule would give; the table of fits and the file of weights."""
    before = torch.get_deterministic_debug_mode()
    weights = folder / "regularisers.safetensors"
    words = ["--device", "cpu", "--tables", str(folder), "--data", str(digits), "--weights", str(weights)]
    try:
        run({"regularisers": train_regularisers.regularisers}, [*words, *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)
    return read_table(folder / f"sgd_fits-s{min(settings.seeds)}-{max(settings.seeds)}.parquet"), weights


def stack_of(settings, inputs, *, seeds=None, network="mlp", **arm):
    """The first stack that holds arms with these attributes, those arms alone."""
    chosen = [
        each
        for each in trainings(settings, len(inputs.train_y))
        if all(getattr(each.arm, name) == value for name, value in arm.items())
    ]
    runs = [Run(inputs.name, network, each, seed) for each in chosen for seed in seeds or settings.seeds]
    return Stack(settings, runs, {seed: inputs for seed in seeds or settings.seeds}, CPU)


def parameters_of(stack, position):
    return {
        name.partition("/")[2]: tensor[position].clone()
        for name, tensor in stack.state().items()
        if name.startswith("parameter/")
    }


# --- a run is an ordinary training -----------------------------------------------------------------------------------


class PlainTraining:
    """One network as an nn.Sequential under torch.optim.SGD; regularisers written out for one run."""

    def __init__(self, settings, inputs, arm, weights, seed, model=None):
        self.settings, self.inputs, self.arm, self.seed = settings, inputs, arm, seed
        self.model = model or nn.Sequential(
            *(nn.Flatten(), nn.Linear(64, 12), nn.ReLU()), *(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 10))
        )
        with torch.no_grad():
            for own, given in zip(self.model.parameters(), weights.values(), strict=True):
                own.copy_(given)
        decay = arm.strength if arm.regulariser == "weight decay" else 0.0
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=arm.learning_rate, weight_decay=decay)
        self.draws = RunId("sharpening", f"regularisers digits {'mlp' if model is None else 'cnn'}", seed)

    def batch(self, index):
        arm, draws = self.arm, self.draws
        n = len(self.inputs.train_y)
        epoch, place = divmod(index, -(-n // arm.batch))
        rows = epoch_order(draws.study, draws.cell, draws.seed, epoch, n)[place * arm.batch : (place + 1) * arm.batch]
        x, y = self.inputs.train_x[rows], self.inputs.train_y[rows]
        own = torch.rand((len(x), 3), generator=draws.generator(f"augmentation/{index}"))
        if arm.regulariser == "shifts":
            x = shifted(x[None], arm.strength * (2 * own[None, :, :2] - 1))[0]
        if arm.regulariser == "crops":
            x = cropped(x[None], torch.tensor([int(arm.strength)]), own[None])[0]
        return x, y

    def loss(self, index, x, y):
        arm = self.arm
        if arm.regulariser == "label smoothing":
            return nn.functional.cross_entropy(self.model(x), y, label_smoothing=arm.strength)
        if arm.regulariser == "mixup":
            stream = numpy_generator(self.draws.study, self.draws.cell, self.seed, f"mixup/{index}")
            partners, weight = torch.from_numpy(stream.permutation(len(x))), stream.beta(arm.strength, arm.strength)
            logits = self.model(weight * x + (1 - weight) * x[partners])
            costs = [nn.functional.cross_entropy(logits, labels) for labels in (y, y[partners])]
            return weight * costs[0] + (1 - weight) * costs[1]
        loss = nn.functional.cross_entropy(self.model(x), y)
        if arm.regulariser == "jacobian penalty":
            probes = torch.randn((len(x), 10), generator=self.draws.generator(f"probe/{index}"))
            for sample, probe in zip(x, probes, strict=True):
                jacobian = torch.autograd.functional.jacobian(
                    lambda z: self.model(z[None])[0], sample, create_graph=True
                ).flatten(1)
                loss = loss + arm.strength / 2 * 10 * ((probe / probe.norm()) @ jacobian).square().sum() / len(x)
        return loss

    def step(self, index):
        x, y = self.batch(index)
        self.optimiser.zero_grad()
        self.loss(index, x, y).backward()
        if self.arm.regulariser == "sam":
            own = list(self.model.parameters())
            before = [each.detach().clone() for each in own]
            length = torch.cat([each.grad.flatten() for each in own]).norm()
            with torch.no_grad():
                for each in own:
                    each += self.arm.strength * each.grad / length
            self.optimiser.zero_grad()
            self.loss(index, x, y).backward()
            with torch.no_grad():
                for each, old in zip(own, before, strict=True):
                    each.copy_(old)
        self.optimiser.step()


@pytest.mark.parametrize(
    ("regulariser", "batch"),
    [
        ("none", 20),
        ("none", 10),
        ("weight decay", 20),
        ("label smoothing", 20),
        ("mixup", 20),
        ("sam", 20),
        ("jacobian penalty", 20),
        ("shifts", 20),
        ("crops", 20),
    ],
)
def test_a_run_is_an_ordinary_pytorch_training(inputs, regulariser, batch):
    stack = stack_of(SETTINGS, inputs, regulariser=regulariser, batch=batch, learning_rate=0.2)
    assert [each.seed for each in stack.runs] == [10, 11]
    before = parameters_of(stack, 1)
    plain = PlainTraining(SETTINGS, inputs, stack.runs[1].training.arm, before, 11)
    for index in range(7):  # through the shorter last batch of an epoch and into the third
        stack.step(index)
        plain.step(index)
    for (name, found), expected in zip(parameters_of(stack, 1).items(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-5)
        assert not torch.allclose(found, before[name], atol=1e-3)


@pytest.mark.parametrize("regulariser", ["none", "sam", "jacobian penalty"])
def test_so_is_one_of_convolutions(inputs, regulariser):
    settings = SETTINGS.model_copy(update={"channels": 2, "activation": "tanh"})
    stack = stack_of(settings, inputs, network="cnn", regulariser=regulariser, batch=20, learning_rate=0.2)
    model = nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(8, 10)),
    )
    plain = PlainTraining(settings, inputs, stack.runs[0].training.arm, parameters_of(stack, 0), 10, model)
    for index in range(4):
        stack.step(index)
        plain.step(index)
    for found, expected in zip(parameters_of(stack, 0).values(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-5)


def test_step_sizes_fall_by_five_at_their_shares_of_the_updates(inputs):
    settings = SETTINGS.model_copy(update={"decays": [0.25, 0.5]})
    stack = stack_of(settings, inputs, regulariser="none", batch=20, learning_rate=0.5)
    plain = PlainTraining(settings, inputs, stack.runs[0].training.arm, parameters_of(stack, 0), 10)
    for index in range(12):
        plain.optimiser.param_groups[0]["lr"] = 0.5 if index < 3 else 0.1 if index < 6 else 0.02
        stack.step(index)
        plain.step(index)
    for found, expected in zip(parameters_of(stack, 0).values(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-5)


# --- stacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [100, 3])
def test_each_run_trains_once_beside_runs_of_its_kind(inputs, together):
    settings = SETTINGS.model_copy(update={"runs_together": together})
    found = [runs for _, runs in stacks(settings, {10: [inputs], 11: [inputs]})]
    assert sorted(str(each.id) for runs in found for each in runs) == sorted(
        str(Run("digits", "mlp", each, seed).id) for each in trainings(settings, 50) for seed in (10, 11)
    )
    assert max(map(len, found)) == (12 if together == 100 else 3)  # 6 plain arms with two seeds
    for runs in found:
        assert len({(each.training.arm.batch, each.training.updates, each.training.arm.step) for each in runs}) == 1


def test_all_arms_of_a_seed_start_alike(inputs):
    first, *others = [Stack(SETTINGS, runs, own, CPU) for own, runs in stacks(SETTINGS, {10: [inputs], 11: [inputs]})]
    expected = parameters_of(first, 0)
    for stack in (first, *others):
        for position, each in enumerate(stack.runs):
            same = all(torch.equal(expected[name], own) for name, own in parameters_of(stack, position).items())
            assert same == (each.seed == 10)


def test_a_run_is_the_same_alone_and_beside_others(inputs):
    own, runs = next(stacks(SETTINGS, {10: [inputs], 11: [inputs]}))
    together = Stack(SETTINGS, runs, own, CPU)
    position = next(
        place
        for place, each in enumerate(together.runs)
        if each.training.arm.regulariser == "mixup" and each.seed == 11
    )
    alone = stack_of(SETTINGS, inputs, seeds=[11], regulariser="mixup")
    for index in range(12):
        metrics, one = together.step(index), alone.step(index)
        torch.testing.assert_close(metrics["loss"][position], one["loss"][0], rtol=1e-4, atol=1e-5)
    for name, tensor in parameters_of(alone, 0).items():
        torch.testing.assert_close(tensor, parameters_of(together, position)[name], rtol=1e-3, atol=1e-4)


# --- stopping rules --------------------------------------------------------------------------------------------------


def plain_losses(inputs, stack, updates):
    """Cross-entropy over all training samples of the stack's first run after each update, and its parameters."""
    plain = PlainTraining(SETTINGS, inputs, stack.runs[0].training.arm, parameters_of(stack, 0), 10)
    losses, parameters = [], []
    for index in range(updates):
        plain.step(index)
        losses.append(nn.functional.cross_entropy(plain.model(inputs.train_x), inputs.train_y).item())
        parameters.append([each.detach().clone() for each in plain.model.parameters()])
    return losses, parameters


def test_a_network_is_kept_at_the_first_look_with_a_low_enough_loss_and_after_its_budgets(inputs):
    settings = SETTINGS.model_copy(update={"chunk": 7})  # the loss is a sum over chunks
    stack = stack_of(settings, inputs, seeds=[10], regulariser="none", batch=10)
    losses, parameters = plain_losses(inputs, stack, 20)
    looks = [step for step in range(2, 21, 2) if losses[step - 1] <= 1.8]
    assert 2 < looks[0] < 20
    for index in range(20):  # 12 updates of batches of 20 are 4 epochs, which are 20 updates of batches of 10
        stack.step(index)
    rows = {row["rule"]: row for row in stack.rows([None])}
    assert {rule: row["step"] for rule, row in rows.items()} == {"updates": 12, "epochs": 20, "matched": looks[0]}
    assert all(row["reached"] and row["diverged_at"] == -1 for row in rows.values())
    for snapshot in stack.snapshots([None]):
        (entry,) = snapshot.cell["runs"]
        for found, expected in zip(snapshot.tensors.values(), parameters[entry["step"] - 1], strict=True):
            torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-5)


def test_a_loss_that_is_never_reached_leaves_no_network(inputs):
    settings = SETTINGS.model_copy(update={"matched_loss": 1e-6})
    stack = stack_of(settings, inputs, regulariser="sam")
    for index in range(12):
        stack.step(index)
    rows = [row for row in stack.rows([None, None]) if row["rule"] == "matched"]
    assert [(row["reached"], row["step"], row["diverged_at"]) for row in rows] == [(False, 12, -1)] * 2
    assert [[entry["rules"] for entry in each.cell["runs"]] for each in stack.snapshots([None, None])] == [
        [["updates"], ["updates"]]
    ]


def test_the_base_arm_is_one_network_with_both_budgets(inputs):
    stack = stack_of(SETTINGS, inputs, seeds=[10], regulariser="none", batch=20, learning_rate=0.2)
    for index in range(12):
        stack.step(index)
    rules = [entry["rules"] for each in stack.snapshots([None]) for entry in each.cell["runs"]]
    assert rules[0] == ["updates", "epochs"]
    assert [(row["rule"], row["step"]) for row in stack.rows([None])][:2] == [("updates", 12), ("epochs", 12)]


# --- batch norm ------------------------------------------------------------------------------------------------------


def normalised(_settings, _network, image, classes):
    layers = [nn.Conv2d(1, 2, 3, padding=1, bias=False), _BatchNorm(2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)]
    return Convolutional(image, classes, nn.Sequential(*layers))


def test_running_statistics_are_those_of_the_weights_not_of_where_sam_looks(inputs, monkeypatch):
    monkeypatch.setattr(train_regularisers, "build", normalised)
    settings = SETTINGS.model_copy(update={"updates": 1, "look_every": 1, "matched_loss": 100.0})
    plain = stack_of(settings, inputs, regulariser="none", batch=20, learning_rate=0.2)
    sam = stack_of(settings, inputs, regulariser="sam")
    for stack in (plain, sam):
        stack.step(0)
    for name, tensor in plain.state().items():
        if name.startswith("statistic/"):
            torch.testing.assert_close(sam.state()[name], tensor)
            assert not torch.equal(tensor, torch.full_like(tensor, float(name.endswith("variance"))))
    snapshot = next(iter(sam.snapshots([None, None])))
    assert {name for name in snapshot.tensors if name.startswith("statistic/")} == {
        "statistic/1.mean",
        "statistic/1.variance",
    }


@pytest.mark.parametrize("batch", [1, 7])
def test_batch_norm_refuses_a_batch_of_one_sample(inputs, monkeypatch, batch):
    monkeypatch.setattr(train_regularisers, "build", normalised)
    settings = SETTINGS.model_copy(update={"other_batches": [batch]})
    with pytest.raises(UserError, match=f"batch size {batch} leaves a single one of 50 training samples"):
        stack_of(settings, inputs, batch=batch)


# --- whole jobs ------------------------------------------------------------------------------------------------------


def test_the_command_fills_its_table_and_keeps_what_the_table_says(tmp_path, digits):
    fits, weights = train(SETTINGS, tmp_path, digits)
    assert not list(tmp_path.glob("*checkpoint*"))
    # 11 arms with two rules, three of them with a third, two seeds
    assert len(fits) == (11 * 2 + 3) * 2
    assert not fits[KEY].duplicated().any()
    assert (fits.diverged_at == -1).all()
    assert fits.reached[fits.rule != "matched"].all()
    assert 0 < fits.reached[fits.rule == "matched"].mean() < 1
    kept = [
        (*(entry["columns"][name] for name in KEY[:-1]), rule, entry["step"])
        for snapshot in load_snapshots(weights)
        for entry in snapshot.cell["runs"]
        for rule in entry["rules"]
    ]
    assert sorted(kept) == sorted(fits[fits.reached][[*KEY, "step"]].itertuples(index=False, name=None))


@pytest.mark.parametrize("decays", [[], [0.4]])
def test_a_job_that_is_cut_off_goes_on_and_ends_with_the_same_bits(tmp_path, digits, monkeypatch, decays):
    settings = SETTINGS.model_copy(update={"decays": decays, "smoothings": [], "shifts": [], "crops": []})
    whole, weights = train(settings, tmp_path / "whole", digits)
    original = Stack.step
    steps = []

    def interrupted(self, index):
        steps.append(index)
        if len(steps) in (5, 8, 30):  # before and after a network was kept, and in another stack
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index)

    monkeypatch.setattr(Stack, "step", interrupted)
    for _ in range(3):
        with pytest.raises(SystemExit, match="143"):
            train(settings, tmp_path / "parts", digits)
    assert not list((tmp_path / "parts").glob("*.parquet"))
    resumed, again = train(settings, tmp_path / "parts", digits)
    # stacks: plain, weight decay, sam, penalty, batches of 10 and of 50; with decays one for each budget of the latter
    assert len(steps) == 4 * 12 + (12 + 20 + 12 + 4 if decays else 20 + 12)
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert again.read_bytes() == weights.read_bytes()


def test_a_run_that_diverges_is_recorded_and_leaves_the_others_alone(tmp_path, digits):
    calm, wild = (
        SETTINGS.model_copy(update={"other_learning_rates": [rate], "updates": 40, "matched_loss": 1.0, **only})
        for rate, only in ((0.5, _FEW), (1e30, _FEW))
    )
    found = {name: train(each, tmp_path / name, digits) for name, each in (("calm", calm), ("wild", wild))}
    fits = found["wild"][0]
    diverged = fits.learning_rate == 1e30
    assert (fits.diverged_at[diverged] > 0).all()
    assert (fits.step[diverged] == fits.diverged_at[diverged]).all()
    assert not fits.reached[diverged & (fits.rule == "matched")].any()
    assert (fits.diverged_at[~diverged] == -1).all()
    expected = found["calm"][0]
    pd.testing.assert_frame_equal(fits[~diverged], expected[expected.learning_rate != 0.5], check_exact=True)
    for snapshot in load_snapshots(found["wild"][1]):
        assert all(entry["columns"]["learning_rate"] != 1e30 for entry in snapshot.cell["runs"])
        assert all(tensor.isfinite().all() for tensor in snapshot.tensors.values())


_FEW = {"other_batches": [], "smoothings": [], "mixups": [], "sam_radii": [], "shifts": [], "crops": []}


def test_a_network_kept_before_its_run_diverged_counts_and_one_kept_after_it_does_not(inputs):
    settings = SETTINGS.model_copy(update={"matched_loss": 2.15})
    stack = stack_of(settings, inputs, regulariser="none", batch=10)
    for index in range(20):
        stack.step(index)
    steps = {row["rule"]: row["step"] for row in stack.rows([None, None]) if row["seed"] == 10}
    assert steps["matched"] < steps["updates"] < steps["epochs"]
    bad = steps["updates"]  # the loss after so many updates was not finite
    rows = {row["rule"]: row for row in stack.rows([bad, None]) if row["seed"] == 10}
    assert {rule: (row["step"], row["diverged_at"]) for rule, row in rows.items()} == {
        "updates": (bad, bad),
        "epochs": (bad, bad),
        "matched": (steps["matched"], -1),
    }
    seeds = {
        tuple(entry["rules"]): [each["columns"]["seed"] for each in snapshot.cell["runs"]]
        for snapshot in stack.snapshots([bad, None])
        for entry in snapshot.cell["runs"]
    }
    assert seeds == {("updates",): [11], ("epochs",): [11], ("matched",): [10, 11]}


def test_a_network_that_only_the_last_update_spoilt_has_diverged(inputs):
    stack = stack_of(SETTINGS, inputs, regulariser="none", batch=10)
    for index in range(19):
        stack.step(index)
    assert stack.diverged([None, 3]) == [None, 3]
    stack._parameters["weight1"][0] = torch.inf
    stack.step(19)
    assert stack.diverged([None, 3]) == [20, 3]
