"""Training by sample size, by width and on the cube against plain PyTorch; what is kept; kills and divergence."""

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
from jacnorm.studies.sharpening import cube, train_scaling
from jacnorm.studies.sharpening.settings import ScalingSettings
from jacnorm.studies.sharpening.tables import COLUMNS
from jacnorm.studies.sharpening.train_scaling import Cell, Stack, cells, load_sizes, problem
from jacnorm.training import snapshots

torch.set_num_threads(1)

CPU = torch.device("cpu")
TINY = ScalingSettings(
    seeds=[10, 11],
    train_samples=40,
    pool=100,
    width=6,
    hidden_layers=1,
    sizes=[20, 50],
    widths=[3, 5],
    cube_sizes=[10, 30],
    steps=40,
)


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def inputs(digits):
    return load_sizes(TINY, digits)


def train(folder, digits, settings=TINY):
    """Call the step as a rule does; its table and its snapshots."""
    before = torch.get_deterministic_debug_mode()
    files = ["--tables", str(folder), "--data", str(digits), "--weights", str(folder / "scaling.safetensors")]
    try:
        run({"scaling": train_scaling.scaling}, ["--device", "cpu", *files, *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)
    block = f"s{min(settings.seeds)}-{max(settings.seeds)}"
    return read_table(folder / f"scaling_fits-{block}.parquet"), snapshots.load(folder / "scaling.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        return folder, *train(folder, digits)


def stack_of(cell, inputs, settings=TINY):
    return Stack(settings, cell, settings.seeds, problem(settings, cell, settings.seeds, inputs), CPU)


CELLS = [
    Cell("sizes", 50, 6, "standard"),
    Cell("widths", 40, 5, "standard"),
    Cell("widths", 40, 5, "ntk"),
    Cell("cube", 30, 6, "standard"),
]


class Scaled(nn.Linear):
    """W h / sqrt(n) + b."""

    def forward(self, x):
        return nn.functional.linear(x / x.shape[1] ** 0.5, self.weight, self.bias)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_run_is_an_ordinary_pytorch_loop(inputs, cell):
    stack = stack_of(cell, inputs)
    start = stack.snapshot("initial", [11]).tensors
    kind = Scaled if cell.parametrisation == "ntk" else nn.Linear
    sizes = [start["weight1"].shape[2], cell.width, start["weight2"].shape[1]]
    model = nn.Sequential(nn.Flatten(), kind(*sizes[:2]), nn.Tanh(), kind(*sizes[1:]))
    names = ["1.weight", "1.bias", "3.weight", "3.bias"]
    model.load_state_dict({name: tensor[0] for name, tensor in zip(names, start.values(), strict=True)})
    own = inputs.get(cell.samples) or inputs[40]
    x, y = own.train_x, nn.functional.one_hot(own.train_y, 10).float()
    if cell.part == "cube":
        x = cube.samples([11], 30, 2)[0]
        y = cube.target(x)
    entropy = nn.CrossEntropyLoss(label_smoothing=TINY.smoothing)
    cost = entropy if cell.part == "sizes" else lambda z, y: (z - y).square().sum() / 2 / len(z)
    optimiser = torch.optim.SGD(
        model.parameters(), {"sizes": 0.5, "widths": 0.1, "cube": TINY.cube_learning_rate}[cell.part]
    )
    for index in range(TINY.steps):
        loss = stack.step(index)["loss"][1]
        optimiser.zero_grad()
        expected = cost(model(x), own.train_y if cell.part == "sizes" else y)
        expected.backward()
        optimiser.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert loss.item() < (0.95 if cell.part == "sizes" else 0.9) * stack._first[1].item()
    for name, tensor in zip(names, stack.snapshot("trained", [11]).tensors.values(), strict=True):
        torch.testing.assert_close(tensor[0], model.state_dict()[name], rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_chunks_change_rounding_only(inputs, cell):
    whole, parts = stack_of(cell, inputs), stack_of(cell, inputs, TINY.model_copy(update={"chunk": 7}))
    for index in range(3):
        torch.testing.assert_close(parts.step(index)["loss"], whole.step(index)["loss"], rtol=1e-5, atol=0)


def test_the_table_and_the_snapshots_name_every_network(trained):
    folder, fits, kept = trained
    assert list(fits.columns) == list(COLUMNS["scaling_fits"])
    expected = [
        *(("sizes", n, 6, "standard") for n in (20, 50)),
        *(("widths", 40, width, how) for width in (3, 5) for how in ("standard", "ntk")),
        *(("cube", n, 6, "standard") for n in (10, 30)),
    ]
    columns = ["part", "samples", "width", "parametrisation"]
    assert [tuple(row) for row in fits[columns].drop_duplicates().to_numpy()] == expected
    assert fits.seed.tolist() == [10, 11] * len(expected)
    assert (fits.diverged_at == -1).all()
    assert fits.train_loss.between(0, 2.3).all()
    found = [(*(each.cell[name] for name in columns), each.cell["stage"]) for each in kept]
    assert found == [
        (*cell, stage)
        for cell in expected
        for stage in (["initial", "trained"] if cell[0] == "widths" else ["trained"])
    ]
    assert all(each.cell["seeds"] == [10, 11] for each in kept)
    assert not list(folder.glob("*checkpoint*"))


def test_a_seed_has_one_initialisation_for_all_sample_sizes_and_another_seed_another(inputs):
    for part, sizes in {"sizes": (20, 50), "cube": (10, 30)}.items():
        few, many = (stack_of(Cell(part, n, 6, "standard"), inputs).snapshot("", [10, 11]).tensors for n in sizes)
        assert all(torch.equal(few[name], many[name]) for name in few)
        assert all(not torch.equal(tensor[0], tensor[1]) for tensor in few.values())


def test_a_run_in_a_stack_is_the_run_alone(trained, tmp_path, digits):
    _, together, kept = trained
    fits, alone = train(tmp_path, digits, TINY.model_copy(update={"seeds": [11]}))
    expected = together[together.seed == 11].reset_index(drop=True)
    pd.testing.assert_frame_equal(fits, expected, rtol=1e-4)
    for each, other in zip(kept, alone, strict=True):
        for a, b in zip(each.weights, other.weights, strict=True):
            torch.testing.assert_close(a[1:], b, rtol=1e-3, atol=1e-4)


def test_stacks_hold_as_many_runs_as_allowed(trained, tmp_path, digits):
    _, together, _ = trained
    fits, kept = train(tmp_path, digits, TINY.model_copy(update={"runs_together": 1}))
    assert all(len(each.cell["seeds"]) == 1 for each in kept)
    assert [each.cell["seeds"][0] for each in kept if each.cell["stage"] == "trained"] == [10, 11] * 8
    pd.testing.assert_frame_equal(fits, together, rtol=1e-4)


def test_a_job_that_is_killed_again_and_again_ends_with_the_same_bits(trained, tmp_path, digits, monkeypatch):
    reference, *_ = trained
    original = Stack.step
    kills = [("sizes", 50, 10), ("widths", 40, 1), ("cube", 30, 39)]

    def killed(self, index):
        if kills and (self.cell.part, self.cell.samples, index) == kills[0]:
            kills.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index)

    monkeypatch.setattr(Stack, "step", killed)
    while kills:
        with pytest.raises(SystemExit, match="143"):
            train(tmp_path, digits)
        assert list(tmp_path.glob("*.checkpoint.safetensors"))
    train(tmp_path, digits)
    for name in ("scaling.safetensors", "scaling_fits-s10-11.parquet"):
        assert (tmp_path / name).read_bytes() == (reference / name).read_bytes()
    assert not list(tmp_path.glob("*checkpoint*"))


def test_runs_that_diverge_are_recorded_and_not_kept(tmp_path, digits):
    fits, kept = train(tmp_path, digits, TINY.model_copy(update={"cube_learning_rate": 100.0}))
    bad = fits.part == "cube"
    assert (fits.diverged_at[bad] > 0).all()
    assert fits.train_loss[bad].isna().all()
    assert (fits.diverged_at[~bad] == -1).all()
    assert fits.train_loss[~bad].notna().all()
    assert not [each for each in kept if each.cell["part"] == "cube"]


def test_a_cost_above_the_limit_is_a_divergence_and_freezes_its_run_alone(inputs):
    stack = stack_of(CELLS[0], inputs)
    stack.step(0)
    stack._first[0] = 1e-6
    assert stack.step(1)["loss"].isinf().tolist() == [True, False]
    stack.freeze(torch.tensor([True, False]))
    before = stack.snapshot("", [10, 11]).tensors
    stack.step(2)
    for name, after in stack.snapshot("", [10, 11]).tensors.items():
        assert torch.equal(after[0], before[name][0])
        assert not torch.equal(after[1], before[name][1])


def test_the_limit_survives_a_restart(inputs):
    stack, restarted = stack_of(CELLS[0], inputs), stack_of(CELLS[0], inputs)
    stack.step(0)
    stack._first[0] = 1e-6
    restarted.load_state({name: tensor.clone() for name, tensor in stack.state().items()})
    assert restarted.step(1)["loss"].isinf().tolist() == [True, False]


def test_all_cells_are_planned(inputs):
    assert len(list(cells(TINY, inputs))) == 2 + 4 + 2


def test_another_data_set_is_refused_in_one_sentence(digits):
    with pytest.raises(UserError, match=r"^data_set is cifar10, but .* holds digits; give the file of cifar10$"):
        load_sizes(TINY.model_copy(update={"data_set": "cifar10"}), digits)
