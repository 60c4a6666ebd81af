"""Training WideResNets against plain PyTorch: schedule, clipping, data order, killed jobs and runs that diverge."""

from __future__ import annotations

import math
import os
import signal

import pandas as pd
import pytest
import torch
from tests.nets.plain_wide_resnet import pairs, plain_of, statistics

from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.lipschitz import train_residual
from jacnorm.studies.lipschitz.inputs import load
from jacnorm.studies.lipschitz.schedule import step_factor
from jacnorm.studies.lipschitz.settings import ResidualSettings
from jacnorm.studies.lipschitz.train_residual import Cell, Stack, cells, clipped, stacks
from jacnorm.training.snapshots import load as load_snapshots

torch.set_num_threads(1)

CPU = torch.device("cpu")
SETTINGS = ResidualSettings(
    seeds=[10, 11],
    train_samples=120,
    stem=3,
    channels=3,
    depths=[10, 16],
    epochs=3,
    compared_epochs=4,
    batch=50,  # batches of 50, 50 and 20
    top=5,
)
SWEEP = Cell("digits", "sweep", 10, "batch", 3, 0.1)


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def inputs(digits):
    return load(digits, SETTINGS.train_samples, scaling="standard")


def call(settings, folder, digits):
    """The command as a rule would call it: its table, and the file of weights."""
    before = torch.get_deterministic_debug_mode()
    words = ["--device", "cpu", "--tables", folder, "--data", digits, "--weights", folder / "residual.safetensors"]
    try:
        run({"residual": train_residual.residual}, [*map(str, words), *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)  # a job switches it on for its process, and this one goes on
    return read_table(next(folder.glob("residual_fits-*.parquet"))), folder / "residual.safetensors"


def stack_of(inputs, cell=SWEEP, settings=SETTINGS, seeds=None):
    return Stack(settings, cell, seeds or settings.seeds, inputs, CPU)


def test_the_step_size_falls_to_a_fifth_at_the_milestones_of_the_paper():
    factors = [step_factor(epoch, 200) for epoch in range(200)]
    assert factors == pytest.approx([1.0] * 60 + [0.2] * 60 + [0.04] * 30 + [0.008] * 50)


def test_what_is_trained(digits, tmp_path):
    rows, path = call(SETTINGS, tmp_path, digits)
    assert [tuple(row) for row in rows[["part", "depth", "normalisation", "seed"]].itertuples(index=False)] == [
        *(("sweep", depth, "batch", seed) for depth in (10, 16) for seed in (10, 11)),
        *(("figure1", 10, normalisation, seed) for normalisation in ("batch", "none") for seed in (10, 11)),
    ]
    assert (rows.diverged_at == -1).all()
    assert rows.train_error[rows.normalisation == "batch"].between(0, 85).all()  # chance is 90
    snapshots = load_snapshots(path)
    found = [(s.cell["part"], s.cell["depth"], s.cell["normalisation"], s.cell["stage"]) for s in snapshots]
    assert found == [
        *(("sweep", depth, "batch", stage) for depth in (10, 16) for stage in ("initial", "trained")),
        *(("figure1", 10, normalisation, "trained") for normalisation in ("batch", "none")),
    ]
    assert not list(tmp_path.glob("*checkpoint*"))  # discarded once the outputs are there
    first = snapshots[0].tensors
    assert all((tensor == (name.endswith("variance"))).all() for name, tensor in first.items() if "statistic/" in name)
    assert {tensor.shape[0] for snapshot in snapshots for tensor in snapshot.tensors.values()} == {2}


def test_digits_are_learned_and_errors_are_those_of_the_kept_networks(digits, tmp_path):
    settings = SETTINGS.model_copy(
        update={
            "train_samples": 300,
            "depths": [10],
            "epochs": 12,
            "compared_epochs": 25,
            "compared_learning_rate": 0.2,
            "stem": 4,
            "channels": 6,
        }
    )
    rows, path = call(settings, tmp_path, digits)
    assert (rows.train_error < 5).all()
    assert (rows.test_error < 20).all()
    assert (rows.train_loss < 0.3).all()  # chance is log 10 = 2.303
    data = load(digits, 300, scaling="standard")
    for snapshot in (s for s in load_snapshots(path) if s.cell["stage"] == "trained"):
        net = train_residual.network(settings, snapshot.cell, 2, 10, data.image)
        groups = [
            {name.partition("/")[2]: tensor for name, tensor in snapshot.tensors.items() if name.startswith(group)}
            for group in ("parameter", "statistic")
        ]
        chosen = (rows.part == snapshot.cell["part"]) & (rows.normalisation == snapshot.cell["normalisation"])
        for position, row in enumerate(rows[chosen].itertuples()):
            plain = plain_of(net, 10, *groups, position).eval()
            with torch.no_grad():
                for x, y, error in (
                    (data.train_x, data.train_y, row.train_error),
                    (data.test_x, data.test_y, row.test_error),
                ):
                    assert 100 * (plain(x).argmax(1) != y).double().mean() == pytest.approx(error, abs=0.4)


@pytest.mark.parametrize(("normalisation", "clip"), [("batch", 0.8), ("none", 0.15)])
def test_a_run_is_an_ordinary_pytorch_loop(inputs, monkeypatch, normalisation, clip):
    batches = []
    original = train_residual.batch_indices

    def recording(*arguments, **options):
        batches.append(original(*arguments, **options))
        return batches[-1]

    monkeypatch.setattr(train_residual, "batch_indices", recording)
    settings = SETTINGS.model_copy(update={"clip": clip})
    cell = Cell("digits", "figure1", 10, normalisation, 3, 0.1)
    stack = stack_of(inputs, cell, settings)
    net = stack._network
    module = plain_of(net, 10, stack._parameters, stack._buffers, 1).train()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    norms = []
    for index in range(9):
        loss = stack.step(index)["loss"][1]
        if index == 3:
            optimiser.param_groups[0]["lr"] = 0.1 * 0.2  # after 30 % of three epochs
        if index == 6:
            optimiser.param_groups[0]["lr"] = 0.1 * 0.2**2  # after 60 %
        optimiser.zero_grad()
        expected = torch.nn.functional.cross_entropy(
            module(inputs.train_x[batches[index][1]]), inputs.train_y[batches[index][1]]
        )
        expected.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), clip).item())
        optimiser.step()
        assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    assert min(norms) < clip < max(norms)  # both cases were seen
    for name, parameter in pairs(module, net).items():
        torch.testing.assert_close(stack._parameters[name][1], parameter.detach(), rtol=5e-3, atol=2e-4, msg=name)
    if normalisation == "batch":
        for name, statistic in statistics(module, net).items():
            torch.testing.assert_close(stack._buffers[name][1], statistic, rtol=5e-3, atol=2e-4, msg=name)
    assert [tuple(rows.shape) for rows in batches[:3]] == [(2, 50), (2, 50), (2, 20)]
    for epoch in range(3):
        visited = torch.cat([rows[1] for rows in batches[3 * epoch : 3 * epoch + 3]])
        assert torch.equal(visited.sort().values, torch.arange(120))


def test_each_runs_gradient_is_shortened_by_itself():
    gradients = [torch.tensor([[3.0, 0.0], [0.3, 0.0]]), torch.tensor([[[4.0]], [[0.4]]])]
    first, second = clipped(gradients, 1.0)
    torch.testing.assert_close(first, torch.tensor([[0.6, 0.0], [0.3, 0.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(second, torch.tensor([[[0.8]], [[0.4]]]), atol=1e-6, rtol=0)


def test_runs_of_figure_1_are_paired_and_the_sweep_is_another_training(inputs):
    stack_by_name = {cell.normalisation + cell.part: stack_of(inputs, cell) for cell in cells(SETTINGS, "digits")}
    batch, none = (stack_by_name[f"{name}figure1"] for name in ("batch", "none"))
    for name in ("stem.weight", "group1.block1.shortcut.weight"):
        assert torch.equal(batch._parameters[name], none._parameters[name])
    assert not torch.equal(batch._parameters["stem.weight"][0], batch._parameters["stem.weight"][1])
    assert torch.equal(batch._batch(4)[1], none._batch(4)[1])
    epochs = {(cell.part, cell.depth): (cell.epochs, cell.learning_rate) for cell in cells(SETTINGS, "digits")}
    assert epochs == {("sweep", 10): (3, 0.1), ("sweep", 16): (3, 0.1), ("figure1", 10): (4, 0.05)}


def test_small_images_are_stacked_and_large_ones_are_not():
    seeds = list(range(10, 22))
    small = ResidualSettings(seeds=seeds)  # 60 * 8 * 64 = 30,720 numbers a run
    assert [len(part) for part in stacks(small, (1, 8, 8))] == [8, 4]
    assert [seed for part in stacks(small, (1, 8, 8)) for seed in part] == seeds
    assert [len(part) for part in stacks(small, (3, 32, 32))] == [1] * 12


def test_a_seed_trains_alike_alone_and_in_any_stack(inputs, digits, tmp_path, monkeypatch):
    rows, path = call(SETTINGS, tmp_path / "together", digits)
    monkeypatch.setattr(train_residual, "STACK_NUMBERS", 1)
    rows_alone, path_alone = call(SETTINGS, tmp_path / "alone", digits)
    pd.testing.assert_frame_equal(rows, rows_alone, rtol=0.05, atol=2.0)
    for one, all_ in zip(load_snapshots(path_alone), load_snapshots(path), strict=True):
        for name, tensor in all_.tensors.items():
            difference = (one.tensors[name] - tensor).abs().amax()
            assert difference < 0.05 * tensor.abs().amax() + 1e-3, name  # float32, other kernels, 9 to 12 steps


def test_two_runs_give_the_same_bytes(digits, tmp_path):
    settings = SETTINGS.model_copy(update={"depths": [10], "compared_epochs": 1, "epochs": 1})
    first, second = (call(settings, tmp_path / name, digits) for name in ("first", "second"))
    pd.testing.assert_frame_equal(first[0], second[0], check_exact=True)
    assert first[1].read_bytes() == second[1].read_bytes()


def test_a_killed_job_ends_with_the_same_bytes(digits, tmp_path, monkeypatch):
    settings = SETTINGS.model_copy(update={"depths": [10], "augment": True})
    uninterrupted = call(settings, tmp_path / "whole", digits)
    steps = []
    original = Stack.step

    def killed_twice(self, index):
        steps.append((self._cell.part, self._cell.normalisation, index))
        if len(steps) in (4, 15):  # in the second epoch of the sweep and of Figure 1
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index)

    monkeypatch.setattr(Stack, "step", killed_twice)
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            call(settings, tmp_path / "killed", digits)
        assert stopped.value.code == 143
        assert list((tmp_path / "killed").glob("*.checkpoint.safetensors"))
    rows, path = call(settings, tmp_path / "killed", digits)
    assert steps[3:5] == [("sweep", "batch", 3), ("sweep", "batch", 4)]  # nothing is done twice
    assert len(steps) == 9 + 12 + 12
    pd.testing.assert_frame_equal(rows, uninterrupted[0], check_exact=True)
    assert path.read_bytes() == uninterrupted[1].read_bytes()


def test_a_diverged_run_is_recorded_with_no_errors(digits, tmp_path):
    settings = SETTINGS.model_copy(update={"depths": [10], "learning_rate": 1e30})
    rows, _ = call(settings, tmp_path, digits)
    wild = rows[rows.part == "sweep"]
    assert wild.diverged_at.between(0, 8).all()
    assert wild[["train_error", "test_error", "train_loss"]].isna().all(axis=None)
    calm = rows[rows.part == "figure1"]
    assert (calm.diverged_at == -1).all()
    assert calm[["train_error", "test_error", "train_loss"]].notna().all(axis=None)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_broken_run_leaves_the_others_their_bits_and_stays_as_it_was_frozen(inputs, value):
    sound, broken = stack_of(inputs), stack_of(inputs)
    broken._parameters["stem.weight"][0, 0, 0, 0, 0] = value
    for index in range(2):
        losses = broken.step(index)["loss"]
        assert losses[1] == sound.step(index)["loss"][1]
        assert not losses[0].isfinite()
    broken.freeze(torch.tensor([True, False]))
    before = broken.tensors()
    for index in range(2, 4):
        assert broken.step(index)["loss"][1] == sound.step(index)["loss"][1]
    for (name, frozen), other in zip(broken.tensors().items(), sound.tensors().values(), strict=True):
        torch.testing.assert_close(frozen[0], before[name][0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(frozen[1], other[1])


def test_augmentation_is_a_function_of_the_step(inputs):
    settings = SETTINGS.model_copy(update={"augment": True})
    stack, other = stack_of(inputs, settings=settings), stack_of(inputs, settings=settings, seeds=[11])
    plain = stack_of(inputs)
    stack.step(0)
    for index in (0, 1, 1):
        x, y = stack._batch(index)
        assert torch.equal(x, stack._batch(index)[0])
        assert torch.equal(x[1], other._batch(index)[0][0])
        assert torch.equal(y, plain._batch(index)[1])
        changed = (x != plain._batch(index)[0]).flatten(2).any(2)
        assert changed.double().mean() > 0.9  # 1/162 of the images keep their place and side
    assert not torch.equal(stack._batch(0)[0], stack._batch(1)[0])


def test_half_precision_is_used_in_training_passes_only(inputs):
    settings = SETTINGS.model_copy(update={"precision": "bfloat16"})
    half, whole = stack_of(inputs, settings=settings), stack_of(inputs)
    for index in range(3):
        losses, exact = half.step(index)["loss"], whole.step(index)["loss"]
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, exact, rtol=0.1, atol=0.1)
        assert not torch.equal(losses, exact)
    assert {tensor.dtype for tensor in half.state().values()} == {torch.float32}
