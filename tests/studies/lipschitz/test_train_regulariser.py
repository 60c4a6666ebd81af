"""Training with the regulariser against plain PyTorch, its pairs, and jobs that are cut off, through the commands."""

from __future__ import annotations

import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.lipschitz import measure_regulariser, train_regulariser
from jacnorm.studies.lipschitz.inputs import load
from jacnorm.studies.lipschitz.samples import augment, draw
from jacnorm.studies.lipschitz.settings import PairedSettings, TableSettings
from jacnorm.studies.lipschitz.train_regulariser import Arm, Run, Stack, arms, evaluation_interval, stacks
from jacnorm.training.seeds import RunId
from jacnorm.training.snapshots import load as load_snapshots

torch.set_num_threads(1)

CPU = torch.device("cpu")
PAIRED = PairedSettings(
    seeds=[10, 11],
    train_samples=50,
    validation_samples=20,
    test_samples=100,
    width=12,
    batch=20,
    epochs=4,
    shift=1,
    settings=["low-learning-rate", "no-augmentation", "layer-norm", "no-normalisation"],
    coefficients=[0.1, 0.01],
    threshold=0.01,
)
TABLE = TableSettings(
    seeds=[10, 11],
    train_samples=40,
    test_samples=60,
    depth=10,
    stem=2,
    channels=2,
    batch=20,
    epochs=2,
    settings=["layer-norm", "no-normalisation"],
    coefficients=[0.1],
)
COMMANDS = {
    "train": {"paired": train_regulariser.paired, "table": train_regulariser.table},
    "measure": {"paired": measure_regulariser.paired, "table": measure_regulariser.table},
}


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def inputs(digits):
    return load(digits, scaling="standard")


def call(step, command, settings, folder, digits):
    """Call a step with the options that a rule would give; the table that it wrote and the file of weights."""
    before = torch.get_deterministic_debug_mode()
    weights = folder / f"{command}.safetensors"
    words = [command, "--device", "cpu", "--tables", str(folder), "--data", str(digits), "--weights", str(weights)]
    try:
        run(COMMANDS[step], [*words, *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)
    kind = "errors" if step == "train" else "norms"
    seeds = settings.seeds
    return read_table(folder / f"{command}_{kind}-s{min(seeds)}-{max(seeds)}.parquet"), weights


def stack_of(settings, inputs, chosen, seeds=None):
    """One stack of the given arms."""
    runs = [Run(arm, seed) for arm in chosen for seed in seeds or settings.seeds]
    return Stack(settings, runs, draw(settings, inputs), CPU)


def parameters_of(stack):
    return {name: tensor.clone() for name, tensor in stack.state().items() if name.startswith("parameter/")}


def arm(settings, name, coefficient=0.0):
    return next(each for each in arms(settings) if (each.setting, each.coefficient) == (name, coefficient))


# --- what is trained -------------------------------------------------------------------------------------------------


def test_the_arms_are_the_rows_of_table_1():
    settings = PairedSettings(
        settings=PAIRED.settings, flip=True, learning_rate=0.1, low_learning_rate=0.01, coefficients=[0.05]
    )
    assert arms(settings) == [
        Arm("baseline", "batch", 0.1, True, 0.0),
        Arm("low-learning-rate", "batch", 0.01, True, 0.0),
        Arm("low-learning-rate", "batch", 0.01, True, 0.05),
        Arm("no-augmentation", "batch", 0.1, False, 0.0),
        Arm("no-augmentation", "batch", 0.1, False, 0.05),
        Arm("layer-norm", "layer", 0.1, True, 0.0),
        Arm("layer-norm", "layer", 0.1, True, 0.05),
        Arm("no-normalisation", "none", 0.1, True, 0.0),
    ]
    assert not any(each.augmented for each in arms(PairedSettings()))


@pytest.mark.parametrize("numbers", [2**20, 6000])
def test_each_run_trains_once_beside_runs_of_its_kind(inputs, monkeypatch, numbers):
    monkeypatch.setattr(train_regulariser, "STACK_NUMBERS", numbers)
    found = list(stacks(PAIRED, draw(PAIRED, inputs)))
    assert sorted(str(each) for runs in found for each in runs) == sorted(
        str(Run(each, seed)) for each in arms(PAIRED) for seed in PAIRED.seeds
    )
    for runs in found:
        assert len({(each.arm.normalisation, each.arm.regularised) for each in runs}) == 1
    # a run has 64 * 12 + 12 * 12 + 12 * 10 weights and 20 * 12 activations: 1272 numbers
    assert max(map(len, found)) == (8 if numbers == 2**20 else 4)


def test_test_errors_on_the_way_cost_a_tenth_of_training():
    assert evaluation_interval(50_000, 10_000) == 1  # the published scale: every epoch
    assert evaluation_interval(100, 700) == 24
    for train, test in ((100, 700), (500, 2000), (1000, 10)):
        assert test / evaluation_interval(train, test) <= 0.1 * 3 * train + 1e-9


# --- a run is an ordinary training -----------------------------------------------------------------------------------


def plain_penalty(model, x, y, threshold):
    """The paper's regulariser sample by sample where samples do not mix (layer norm), from the modules' outputs."""
    total = 0.0
    kept = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, output: kept.append(output))
        for module in model
        if isinstance(module, nn.LayerNorm)
    ]
    for sample, label in zip(x, y, strict=True):
        kept.clear()
        logits = model(sample[None])[0]
        margin = logits[label] - torch.cat([logits[:label], logits[label + 1 :]]).max()
        for gradient in torch.autograd.grad(margin, kept, create_graph=True):
            norm = gradient.square().sum()
            total = total + norm * (norm.item() >= threshold)
    for hook in hooks:
        hook.remove()
    return total / len(y)


def plain_training(settings, samples, chosen, weights, seed):
    """One network as an nn.Sequential under torch.optim.SGD."""
    layer = {"batch": lambda: nn.BatchNorm1d(settings.width, affine=False), "none": nn.Identity}.get(
        chosen.normalisation, lambda: nn.LayerNorm(settings.width, elementwise_affine=False)
    )
    linear = [nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights]
    for each, weight in zip(linear, weights, strict=True):
        each.weight = nn.Parameter(weight.clone())
    model = nn.Sequential(linear[0], layer(), nn.ReLU(), linear[1], layer(), nn.ReLU(), linear[2])
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=chosen.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )
    rows = samples.train[samples.seeds.index(seed)]
    step = 0
    for epoch in range(settings.epochs):
        # 4 epochs: the milestones at 30, 60 and 75 % are before the last two epochs, twice before the last
        optimiser.param_groups[0]["lr"] = chosen.learning_rate * (1.0, 1.0, 0.2, 0.2**3)[epoch]
        order = torch.randperm(
            len(rows), generator=RunId("lipschitz", "regulariser digits order", seed).generator(f"order/{epoch}")
        )
        for part in order.split(settings.batch):
            x, y = samples.x[rows[part]], samples.y[rows[part]]
            if chosen.augmented:
                stream = RunId("lipschitz", "regulariser digits", seed).generator(f"augmentation/{step}")
                x = augment(x[None], settings.shift, settings.flip, [stream])[0]
            x = x.flatten(1)
            loss = nn.functional.cross_entropy(model(x), y)
            if chosen.regularised:
                loss = loss + chosen.coefficient * plain_penalty(model, x, y, settings.threshold)
            optimiser.zero_grad()
            loss.backward()
            if chosen.normalisation == "none":
                nn.utils.clip_grad_norm_(model.parameters(), train_regulariser.CLIP)
            optimiser.step()
            step += 1
    return model


@pytest.mark.parametrize(
    ("setting", "coefficient"),
    [("baseline", 0.0), ("no-augmentation", 0.0), ("layer-norm", 0.1), ("no-normalisation", 0.0)],
)
def test_a_run_is_an_ordinary_pytorch_training(inputs, monkeypatch, setting, coefficient):
    monkeypatch.setattr(train_regulariser, "CLIP", 0.5)  # so small that it matters; without normalisation only
    chosen = arm(PAIRED, setting, coefficient)
    stack = stack_of(PAIRED, inputs, [chosen])
    before = parameters_of(stack)
    for index in range(PAIRED.epochs * stack.steps_per_epoch):
        stack.step(index)
    weights = [before[f"parameter/matrix{number}"][1] for number in (1, 2, 3)]
    model = plain_training(PAIRED, stack.samples, chosen, weights, 11)
    after = parameters_of(stack)
    for number, expected in zip((1, 2, 3), model.parameters(), strict=True):
        torch.testing.assert_close(after[f"parameter/matrix{number}"][1], expected.detach(), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(after[f"parameter/matrix{number}"][1], weights[number - 1], atol=1e-3)
    samples = stack.samples
    outputs = model.eval()(samples.x[samples.test[1]].flatten(1))
    wrong = (outputs.argmax(1) != samples.y[samples.test[1]]).double().mean().item() * 100
    assert stack.error(samples.test)[1].item() == pytest.approx(wrong, abs=1.01)  # one sample at most


def test_bfloat16_leaves_weights_in_float32_and_roughly_the_same_training(inputs):
    chosen = [arm(PAIRED, "layer-norm", 0.1)]
    ends = {}
    for precision in ("float32", "bfloat16"):
        stack = stack_of(PAIRED.model_copy(update={"precision": precision}), inputs, chosen)
        before = parameters_of(stack)
        for index in range(stack.steps_per_epoch):
            stack.step(index)
        ends[precision] = parameters_of(stack)
    for name, exact in ends["float32"].items():
        rounded = ends["bfloat16"][name]
        assert rounded.dtype == torch.float32
        assert not torch.equal(rounded, exact)
        assert (rounded - exact).norm() < 0.2 * (exact - before[name]).norm()


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmented", [True, False])
def test_with_and_without_the_regulariser_differ_in_the_penalty_alone(inputs, augmented):
    plain = Arm("x", "layer", 0.1, augmented, 0.0)
    tiny = Arm("x", "layer", 0.1, augmented, 1e-30)  # another code path, the same objective in float32
    stacked = [stack_of(PAIRED, inputs, [each]) for each in (plain, tiny)]
    for index in range(5):
        for stack in stacked:
            stack.step(index)
    for name, tensor in parameters_of(stacked[0]).items():
        torch.testing.assert_close(tensor, parameters_of(stacked[1])[name], rtol=1e-4, atol=1e-6)


def test_all_settings_of_a_seed_start_alike_and_see_the_same_batches(inputs):
    """Only in stacks of their own: what a run gets must not depend on what trains beside it."""
    found = [stack_of(PAIRED, inputs, [each]) for each in arms(PAIRED)]
    first = found[0]
    for stack in found[1:]:
        for name, tensor in parameters_of(first).items():
            assert torch.equal(tensor, parameters_of(stack)[name])
        for index in (0, 4):
            (x, labels), (expected, same) = stack._batch(index), first._batch(index)
            assert torch.equal(labels, same)
            assert torch.equal(x, expected) == stack.runs[0].arm.augmented  # the baseline is augmented
    mixed = stack_of(PAIRED, inputs, [arm(PAIRED, "baseline"), arm(PAIRED, "no-augmentation")])
    x, _ = mixed._batch(2)
    assert torch.equal(x[:2], first._batch(2)[0])
    assert torch.equal(x[2:], stack_of(PAIRED, inputs, [arm(PAIRED, "no-augmentation")])._batch(2)[0])


def test_a_run_is_the_same_alone_and_beside_others(inputs):
    chosen = [arm(PAIRED, "low-learning-rate", 0.1), arm(PAIRED, "no-augmentation", 0.01)]
    together = stack_of(PAIRED, inputs, chosen)
    alone = stack_of(PAIRED, inputs, chosen[1:], seeds=[11])
    for index in range(6):
        metrics, one = together.step(index), alone.step(index)
        torch.testing.assert_close(metrics["loss"][3], one["loss"][0], rtol=1e-4, atol=1e-5)
    for name, tensor in alone.state().items():
        torch.testing.assert_close(tensor[0], together.state()[name][3], rtol=1e-3, atol=1e-4)


def test_runs_without_the_penalty_are_spared_its_derivatives(inputs, monkeypatch):
    calls = []
    original = train_regulariser.penalty

    def counting(*arguments, **options):
        calls.append(options["create_graph"])
        return original(*arguments, **options)

    monkeypatch.setattr(train_regulariser, "penalty", counting)
    stack = stack_of(PAIRED, inputs, [arm(PAIRED, "layer-norm")])
    shares = [stack.step(index).get("penalised_share") for index in range(PAIRED.epochs * stack.steps_per_epoch)]
    assert calls == [False] * stack.steps_per_epoch  # the last epoch, for the share alone
    assert all(share is None for share in shares[: -stack.steps_per_epoch])
    assert all((share >= 0).all() and (share <= 1).all() for share in shares[-stack.steps_per_epoch :])


# --- whole jobs ------------------------------------------------------------------------------------------------------


def test_the_paired_command_fills_its_tables(tmp_path, digits):
    errors, weights = call("train", "paired", PAIRED, tmp_path, digits)
    assert len(errors) == 11 * 2
    assert not list(tmp_path.glob("*checkpoint*"))
    assert (errors.diverged_at == -1).all()
    for column in ("test_error", "best_test_error", "validation_error", "train_error"):
        assert errors[column].between(0, 100).all()
    assert (errors.best_test_error <= errors.test_error).all()
    assert (errors.coefficient > 0).equals(errors.regularised)
    assert errors[errors.setting == "baseline"].regularised.eq(False).all()
    assert errors.penalised_share.between(0, 1).all()
    assert set(errors.learning_rate[errors.setting == "low-learning-rate"]) == {0.01}
    snapshots = load_snapshots(weights)
    assert [(each.cell["setting"], each.cell["coefficient"]) for each in snapshots] == [
        (each.setting, each.coefficient) for each in arms(PAIRED)
    ]
    norms, _ = call("measure", "paired", PAIRED, tmp_path, digits)
    assert len(norms) == 11 * 2 * 2
    cell = ["setting", "coefficient", "seed"]
    assert set(map(tuple, norms[cell].to_numpy())) == set(map(tuple, errors[cell].to_numpy()))


@pytest.mark.parametrize(
    ("variant", "precision"), [("paper", "float32"), ("paper", "bfloat16"), ("released", "float32")]
)
def test_the_table_command_trains_wide_resnets(tmp_path, digits, variant, precision):
    settings = TABLE.model_copy(update={"variant": variant, "precision": precision})
    errors, weights = call("train", "table", settings, tmp_path, digits)
    assert list(errors.network.unique()) == ["wrn"]
    assert len(errors) == 4 * 2
    assert (errors.diverged_at == -1).all()
    assert errors.validation_error.isna().all()  # none held out
    trained = {(each.cell["setting"], each.cell["regularised"]): each.tensors for each in load_snapshots(weights)}
    gains = {name: t for name, t in trained["layer-norm", False].items() if name.endswith((".gain", ".shift"))}
    moved = [
        not torch.equal(tensor, torch.full_like(tensor, float(name.endswith("gain")))) for name, tensor in gains.items()
    ]
    assert any(moved) == (variant == "paper")
    if variant == "released":  # with its scaling nothing exceeds the threshold, so nothing is regularised
        assert (errors.penalised_share == 0).all()
        for name, tensor in trained["layer-norm", False].items():
            torch.testing.assert_close(tensor, trained["layer-norm", True][name], rtol=1e-4, atol=1e-5)
    norms, _ = call("measure", "table", settings, tmp_path, digits)
    assert sorted(norms.layer.unique()) == list(range(1, 9))
    assert np.isfinite(norms.squared_norm).all()


def test_a_job_that_is_cut_off_goes_on_and_ends_with_the_same_bits(tmp_path, digits, monkeypatch):
    whole, weights = call("train", "paired", PAIRED, tmp_path / "whole", digits)
    original = Stack.step
    steps = []

    def interrupted(self, index):
        steps.append(index)
        if len(steps) in (7, 20):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index)

    monkeypatch.setattr(Stack, "step", interrupted)
    for _ in range(2):
        with pytest.raises(SystemExit, match="143"):
            call("train", "paired", PAIRED, tmp_path / "parts", digits)
    assert not list((tmp_path / "parts").glob("*.parquet"))
    resumed, again = call("train", "paired", PAIRED, tmp_path / "parts", digits)
    assert len(steps) == 5 * PAIRED.epochs * 3  # 5 stacks of 3 steps an epoch; no step was made twice
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert again.read_bytes() == weights.read_bytes()


def test_a_run_that_diverges_is_recorded_without_errors_and_leaves_the_others_alone(tmp_path, digits):
    calm, wild = (PAIRED.model_copy(update={"low_learning_rate": rate, "epochs": 10}) for rate in (0.01, 1e7))
    found = {
        name: call("train", "paired", each, tmp_path / name, digits) for name, each in (("calm", calm), ("wild", wild))
    }
    errors = found["wild"][0]
    diverged = errors.setting == "low-learning-rate"
    assert (errors.diverged_at[diverged] >= 0).all()
    for column in ("test_error", "best_test_error", "validation_error", "train_error", "train_loss", "penalised_share"):
        assert errors[column][diverged].isna().all()
    pd.testing.assert_frame_equal(errors[~diverged], found["calm"][0][~diverged], check_exact=True)
    norms, _ = call("measure", "paired", wild, tmp_path / "wild", digits)
    bad = norms.setting == "low-learning-rate"
    columns = ["squared_norm", "penalised_share", "released_share"]
    assert norms[columns][bad].isna().all(axis=None)
    assert norms[columns][~bad].notna().all(axis=None)
