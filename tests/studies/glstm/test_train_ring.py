"""Training on rings against plain PyTorch on explicit batches, killed jobs, diverged runs, and what is learnt."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
from torch import nn

from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.glstm import train_ring
from jacnorm.studies.glstm.ring import network, rings
from jacnorm.studies.glstm.settings import RingSettings
from jacnorm.studies.glstm.tables import COLUMNS
from jacnorm.training import snapshots
from jacnorm.training.batches import batch_indices

torch.set_num_threads(1)

# PyTorch Geometric compiles a function of its own when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

CPU = torch.device("cpu")
TINY = RingSettings(
    seeds=[10, 11], layers=[2], classes=3, width=6, memory=3, train_graphs=20, test_graphs=15, steps=40, batch=8,
    learning_rate=0.05,
)  # fmt: skip


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


def train(folder, settings=TINY):
    """Call the step as a rule does; its table and its snapshots."""
    before = torch.get_deterministic_debug_mode()
    weights = folder / "ring.safetensors"
    try:
        files = ["--tables", str(folder), "--weights", str(weights), "--device", "cpu"]
        run({"ring": train_ring.ring}, [*files, *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)
    block = f"s{min(settings.seeds)}-{max(settings.seeds)}"
    return read_table(folder / f"ring_fits-{block}.parquet"), snapshots.load(weights)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        return folder, *train(folder)


@pytest.mark.parametrize("model", ["glstm", "gcn"])
def test_a_run_of_a_stack_is_an_ordinary_pytorch_loop_over_single_graphs(model):
    stack = train_ring.Stack(TINY, train_ring.Cell(model, 2), CPU)
    plain = network(model, 2, 3, 6, 3)
    plain.load_state_dict({name: tensor[1] for name, tensor in stack.snapshot().tensors.items()})
    optimiser = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=TINY.steps)
    found = rings(2, 3, k_hop=model == "glstm")
    labels = stack._labels[1]
    runs = [train_ring.Cell(model, 2).run(seed) for seed in TINY.seeds]
    for index in range(7):  # epochs of two batches of 8 and one of 4
        batch = labels[batch_indices(index, runs, 20, 8)[1]]
        outputs = plain(found.x, found.edges, found.asked)[batch]  # (B, C)
        loss = nn.functional.cross_entropy(outputs, batch)
        assert stack.step(index)["loss"][1].item() == pytest.approx(loss.item(), rel=1e-3)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    right = (
        plain(found.x, found.edges, found.asked).argmax(1)[stack._test_labels[1]] == stack._test_labels[1]
    ).double()
    assert stack.accuracy()[1].item() == pytest.approx(right.mean().item())


def test_labels_are_those_of_the_seed_whatever_the_model_and_the_other_seeds():
    one = train_ring.Stack(TINY, train_ring.Cell("glstm", 2), CPU)
    other = train_ring.Stack(TINY.model_copy(update={"seeds": [11]}), train_ring.Cell("gcn", 3), CPU)
    assert torch.equal(one._labels[1], other._labels[0])
    assert torch.equal(one._test_labels[1], other._test_labels[0])
    assert not torch.equal(one._labels[0], one._labels[1])
    assert not torch.equal(one._labels[1, :15], one._test_labels[1])


def test_the_table_and_the_weights_say_what_was_learnt(trained):
    folder, table, kept = trained
    assert list(table.columns) == list(COLUMNS["ring_fits"])
    assert [(each.cell["model"], each.cell["layers"]) for each in kept] == [("glstm", 2), ("gcn", 2)]
    assert len(table) == 4
    assert (table.diverged_at == -1).all()
    for each in kept:
        found = rings(2, 3, k_hop=each.cell["model"] == "glstm")
        for position, seed in enumerate(TINY.seeds):
            row = table[(table.seed == seed) & (table.model == each.cell["model"])].iloc[0]
            plain = network(each.cell["model"], 2, 3, 6, 3)
            plain.load_state_dict({name: tensor[position] for name, tensor in each.tensors.items()})
            right = plain(found.x, found.edges, found.asked).argmax(1) == torch.arange(3)
            labels = train_ring.Stack(TINY, train_ring.Cell("gcn", 2), CPU)._test_labels[position]
            assert row.test_score == pytest.approx(right[labels].double().mean().item())
            assert row.parameters == sum(each.numel() for each in plain.parameters())
    assert not list(folder.glob("*checkpoint*"))


def test_the_loss_of_the_table_is_that_of_the_last_tenth(tmp_path):
    stack = train_ring.Stack(TINY, train_ring.Cell("glstm", 2), CPU)
    losses = torch.stack([stack.step(index)["loss"] for index in range(TINY.steps)])
    table, _ = train(tmp_path, TINY.model_copy(update={"models": ["glstm"]}))
    assert table.train_loss.tolist() == pytest.approx(losses[-4:].mean(0).tolist(), rel=1e-6)


def test_both_networks_learn_to_carry_a_label_over_two_edges(tmp_path):
    settings = TINY.model_copy(update={"width": 16, "memory": 8, "steps": 200, "learning_rate": 0.01})
    table, _ = train(tmp_path, settings)
    assert (table.test_score == 1.0).all()
    assert (table.train_loss < 0.1).all()


def test_a_killed_job_ends_with_the_same_bits(trained, tmp_path, monkeypatch):
    reference, kills = trained[0], [("glstm", 13), ("gcn", 30)]
    original = train_ring.Stack.step

    def killed(self, index):
        if kills and (self._cell.model, index) == kills[0]:
            kills.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index)

    monkeypatch.setattr(train_ring.Stack, "step", killed)
    while kills:
        with pytest.raises(SystemExit, match="143"):
            train(tmp_path)
        assert list(tmp_path.glob("*.checkpoint.safetensors"))
    train(tmp_path)
    for name in ("ring.safetensors", "ring_fits-s10-11.parquet"):
        assert (tmp_path / name).read_bytes() == (reference / name).read_bytes()
    assert not list(tmp_path.glob("*checkpoint*"))


def test_a_diverged_run_is_recorded_without_scores_and_leaves_the_others_alone(trained, tmp_path, monkeypatch):
    original = train_ring.losses_and_gradients

    def spoilt(loss, stack, *batch):
        losses, gradients = original(loss, stack, *batch)
        if spoilt.calls == 3:
            losses = losses * torch.tensor([math.nan, 1.0])
        spoilt.calls += 1
        return losses, gradients

    spoilt.calls = 0
    monkeypatch.setattr(train_ring, "losses_and_gradients", spoilt)
    table, kept = train(tmp_path, TINY.model_copy(update={"models": ["glstm"]}))
    bad, good = (table[table.seed == seed].iloc[0] for seed in TINY.seeds)
    assert bad.diverged_at == 3
    assert math.isnan(bad.train_loss)
    assert math.isnan(bad.test_score)
    _, expected, weights = trained
    assert good.to_dict() == expected[(expected.seed == 11) & (expected.model == "glstm")].iloc[0].to_dict()
    for name, tensor in kept[0].tensors.items():
        assert torch.equal(tensor[1], weights[0].tensors[name][1])
