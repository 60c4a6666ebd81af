"""Training against plain PyTorch, which weights are selected, when runs end, and that a killed job ends the same."""

from __future__ import annotations

import math
import os
import signal

import pandas as pd
import pytest
import torch
from tests.studies.glstm.recall_peers import centres, edge_sets, filled, raw
from torch import nn

from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.glstm import train_recall
from jacnorm.studies.glstm.networks import Cell, planned
from jacnorm.studies.glstm.recall import Graphs, data_run, draw, split, stacked
from jacnorm.studies.glstm.recall_models import Architecture, logits
from jacnorm.studies.glstm.settings import RecallSettings, RegressionSettings
from jacnorm.studies.glstm.tables import COLUMNS
from jacnorm.studies.glstm.train_recall import Stack, clipped, looks, together
from jacnorm.training import snapshots
from jacnorm.training.batches import batch_indices
from jacnorm.training.stacked import StackedAdamW

torch.set_num_threads(1)

# PyTorch Geometric compiles a function of its own when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

EXACT = {"rtol": 1e-7, "atol": 1e-8}
CPU = torch.device("cpu")
SIZES = {
    "seeds": [10, 11],
    "neighbours": [3, 4],
    "memories": [4],
    "one_hop_memories": [4],
    "one_hop_neighbours": [3],
    "widths": [6],
    "further_memories": [],
    "train_graphs": 100,
    "validation_graphs": 30,
    "test_graphs": 40,
    "steps": 30,
    "batch": 16,  # the last batch of an epoch has 4
    "evaluations": 4,
}
TINY = RecallSettings(**SIZES)
REGRESSION = RegressionSettings(**{**SIZES, "neighbours": [3]})
NETWORK = Cell("glstm", 4, True)


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


def train(folder, settings=TINY, task="nar"):
    """Call the step as a rule does; its tables and its snapshots."""
    before = torch.get_deterministic_debug_mode()
    files = ["--tables", str(folder), "--weights", str(folder / f"{task}.safetensors")]
    try:
        run({task: getattr(train_recall, task)}, ["--device", "cpu", *files, *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)
    block = f"s{min(settings.seeds)}-{max(settings.seeds)}"
    tables = [read_table(folder / f"{task}_{name}-{block}.parquet") for name in ("fits", "curves")]
    return *tables, snapshots.load(folder / f"{task}.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        return folder, *train(folder)


def stack_of(cell=NETWORK, neighbours=4, task="nar", **changes):
    settings = (TINY if task == "nar" else REGRESSION).model_copy(update=changes)
    return Stack(task, settings, cell, neighbours if isinstance(neighbours, list) else [neighbours], CPU)


def doubled(stack):
    """The stack in float64, where parameters whose slope is nothing but rounding do not move."""
    stack._optimiser = StackedAdamW({"flat": stack._flat.double()}, 1.0, weight_decay=0.0)
    stack._flat = stack._optimiser.stack["flat"]
    stack._statistics = {name: tensor.double() for name, tensor in stack._statistics.items()}
    stack._selected = {name: tensor.double() for name, tensor in stack._selected.items()}
    if stack.architecture.task == "narr":
        stack.graphs = {name: Graphs(each.values.double(), each.asked) for name, each in stack.graphs.items()}
    return stack


def losses_of(task, outputs, targets):
    return nn.functional.cross_entropy(outputs, targets) if task == "nar" else ((outputs - targets) ** 2).mean()


def test_tables_and_snapshots_hold_every_training(trained):
    folder, fits, curves, kept = trained
    cells = [(*cell, neighbours) for cell, sizes in planned(TINY).items() for neighbours in sizes]
    assert len(cells) == 2 + 1 + 2
    names = ["model", "size", "k_hop", "layers", "data", "neighbours"]
    assert list(fits.columns) == list(COLUMNS["nar_fits"])
    assert list(curves.columns) == list(COLUMNS["nar_curves"])
    assert [tuple(row) for row in fits[names].itertuples(index=False)] == [each for each in cells for _ in TINY.seeds]
    assert [tuple(each.cell[name] for name in names) for each in kept] == cells
    assert (fits.diverged_at == -1).all()
    assert (fits.steps == 30).all()
    assert len(curves) == len(fits) * 4
    assert sorted(curves.step.unique()) == [7, 15, 22, 30]
    assert not list(folder.glob("*checkpoint*"))
    for each in kept:
        architecture = Architecture("nar", *(each.cell[name] for name in names if name != "data"))
        test = split("nar", each.cell["neighbours"], 40, TINY.seeds, "test")
        right = (logits(architecture, each.tensors, test).argmax(2) == test.targets).double().mean(1)
        rows = fits[(fits[names] == pd.Series(each.cell)[names]).all(axis=1)]
        assert rows.test_score.tolist() == pytest.approx(right.tolist(), abs=1e-6)
        assert (rows.parameters == architecture.parameters).all()


def test_the_last_of_the_best_looks_is_selected(trained):
    _, fits, curves, _ = trained
    keys = ["seed", "model", "k_hop", "neighbours"]
    for _, fit in fits.iterrows():
        own = curves[(curves[keys] == fit[keys]).all(axis=1)]
        best = own[own.validation_score == own.validation_score.max()].iloc[-1]
        assert fit.selected_step == best.step
        assert fit.validation_score == pytest.approx(best.validation_score)
        assert fit.train_score == pytest.approx(best.train_score)


@pytest.mark.parametrize(
    ("task", "cell"),
    [
        ("nar", NETWORK),
        ("nar", Cell("glstm", 4, False)),
        ("nar", Cell("gcn", 6, False)),
        ("nar", Cell("gcn", 6, True)),
        ("nar", Cell("gatedgcn", 6, False)),
        ("narr", NETWORK),
        ("narr", Cell("gatv2", 6, False)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.model}-{value.k_hop}",
)
def test_a_run_is_an_ordinary_pytorch_loop(task, cell):
    """AdamW, a cosine per step, gradients clipped; over more than an epoch."""
    settings = {"steps": 12, "clip": 0.05, "learning_rate": 0.02}
    stack = doubled(stack_of(cell, 3, task, **settings))
    architecture, graphs = stack.architecture, stack.graphs["train"]
    networks = [filled(architecture, stack._named(stack._flat), run).train() for run in range(2)]
    optimisers = [torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.0) for net in networks]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, T_max=12) for each in optimisers]
    orders = [data_run(task, 3, seed) for seed in TINY.seeds]
    for index in range(12):
        found = stack.step(index)["loss"]
        taken = graphs.take(batch_indices(index, orders, 100, 16))
        for position, (network, optimiser, schedule) in enumerate(zip(networks, optimisers, schedules, strict=True)):
            outputs = network(raw(architecture, taken, position), edge_sets(architecture, taken), centres(taken))
            loss = losses_of(task, outputs, taken.targets[position])
            optimiser.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), 0.05)
            assert norm > 0.05
            optimiser.step()
            schedule.step()
            torch.testing.assert_close(found[position], loss.detach(), **EXACT)
    tensors = stack._named(stack._flat)
    for position, network in enumerate(networks):
        theirs = network.state_dict()
        for name, tensor in architecture.as_modules(tensors, position).items():
            if "layers.1.edge_norm" not in name:  # the edges of the last layer, which nothing reads, are left out
                torch.testing.assert_close(tensor, theirs[name], **EXACT)


def test_a_seed_gives_the_same_alone_and_in_a_stack():
    together, alone = stack_of(), stack_of(seeds=[11])
    for index in range(8):
        both, one = together.step(index), alone.step(index)
        torch.testing.assert_close(both["loss"][1:], one["loss"], rtol=1e-5, atol=1e-6)
    assert set(both) == {"loss"}
    assert set(together.step(14)) == {"loss", "train_score", "validation_score"}


def test_numbers_of_neighbours_train_together_as_they_do_alone():
    whole = doubled(stack_of(neighbours=[3, 4, 2]))
    assert whole.members == [(3, 10), (3, 11), (4, 10), (4, 11), (2, 10), (2, 11)]
    apart = [doubled(stack_of(neighbours=n)) for n in (3, 4, 2)]
    for index in range(16):  # a look at validation on the way
        found = whole.step(index)
        expected = [stack.step(index) for stack in apart]
        for name, values in found.items():
            torch.testing.assert_close(values, torch.cat([each[name] for each in expected]), **EXACT)
    for snapshot, stack in zip(whole.snapshots(), apart, strict=True):
        (alone,) = stack.snapshots()
        assert snapshot.cell == alone.cell
        torch.testing.assert_close(dict(snapshot.tensors), dict(alone.tensors), **EXACT)
    test = whole.evaluate(whole.selected, whole.graphs["test"])
    for position, stack in enumerate(apart):
        for one, two in zip(test, stack.evaluate(stack.selected, stack.graphs["test"]), strict=True):
            torch.testing.assert_close(one[2 * position : 2 * position + 2], two, **EXACT)


def test_networks_that_take_no_padding_train_apart():
    assert together("nar", NETWORK, [3, 4]) == [[3, 4]]
    assert together("narr", NETWORK, [3, 4]) == [[3], [4]]
    assert together("nar", Cell("gcn", 6, True), [3, 4]) == [[3], [4]]
    assert together("nar", Cell("glstm", 4, False), [3, 4]) == [[3], [4]]


def test_networks_of_a_seed_see_the_same_graphs_in_the_same_order(monkeypatch):
    seen = {}
    for model in ("glstm", "gcn"):
        batches = seen.setdefault(model, [])
        monkeypatch.setattr(
            train_recall,
            "logits",
            lambda a, t, graphs, m=None, kept=batches: kept.append(graphs) or logits(a, t, graphs),
        )
        stack = stack_of(Cell(model, 4, False))
        for index in range(3):
            stack.step(index)
    for one, two in zip(seen["glstm"], seen["gcn"], strict=True):
        assert torch.equal(one.values, two.values)
        assert torch.equal(one.asked, two.asked)


def test_fresh_graphs_in_every_step(monkeypatch):
    seen = []
    monkeypatch.setattr(
        train_recall, "logits", lambda a, t, graphs, m=None: seen.append(graphs) or logits(a, t, graphs)
    )
    stack = stack_of(NETWORK._replace(data="fresh"))
    fixed = stack_of()
    assert all(torch.equal(stack.selected[name], fixed.selected[name]) for name in fixed.selected)
    for index in range(2):
        stack.step(index)
        drawn = [draw("nar", 4, 16, data_run("nar", 4, seed).generator(f"fresh/{index}")) for seed in TINY.seeds]
        assert torch.equal(seen[index].values, stacked(drawn).values)
    assert not torch.equal(seen[0].values, seen[1].values)
    both = stack_of(NETWORK._replace(data="fresh"), [3, 4])
    both.step(0)
    assert torch.equal(seen[-1].values[2:], seen[0].values)
    assert seen[-1].present.sum(1).tolist() == [3, 3, 4, 4]


def choose(stack, *scores, losses=None):
    """Give validation scores of two runs, look after look; step 10, 20, ..."""
    for number, score in enumerate(scores, 1):
        stack._flat.fill_(number)
        loss = torch.ones(2) if losses is None else torch.tensor(losses[number - 1])
        stack._select(10 * number, torch.tensor(score, dtype=torch.float64), loss)


def test_selection_of_each_run_with_patience_counted_from_the_first_best():
    stack = stack_of(patience=2)
    choose(stack, (0.5, 0.2), (0.5, 0.3), (0.5, 0.3), (0.9, 0.4), (0.9, 0.9))
    assert stack.selected_step.tolist() == [30, 50]  # an equal score is selected, but does not restart the patience
    assert stack.ended.tolist() == [30, 0]
    assert [stack._selected["flat"][run].unique().tolist() for run in (0, 1)] == [[3.0], [5.0]]
    assert not stack.finished()
    choose_again = [(0.0, 0.1), (0.0, 0.1)]
    for number, score in enumerate(choose_again, 6):
        stack._select(10 * number, torch.tensor(score, dtype=torch.float64), torch.ones(2))
    assert stack.ended.tolist() == [30, 70]
    assert stack.finished()


def test_a_run_ends_when_almost_nothing_is_left_to_learn_but_only_with_patience():
    for patience, ended in ((5, [10, 0]), (0, [0, 0])):
        stack = stack_of(patience=patience)
        choose(stack, (1.0, 1.0), losses=[(0.0009, 0.0011)])
        assert stack.ended.tolist() == ended


def test_in_regression_the_lowest_error_is_selected():
    stack = stack_of(neighbours=3, task="narr")
    choose(stack, (0.9, 0.2), (0.8, 0.3), (0.8, 0.2))
    assert stack.selected_step.tolist() == [30, 30]
    choose(stack, (0.9, 0.1))
    assert stack.selected_step.tolist() == [30, 10]


def test_ended_and_diverged_runs_stay_as_they_are():
    stack = stack_of(Cell("gatedgcn", 6, False), patience=1)
    stack.step(0)
    stack._select(1, torch.tensor([0.5, 0.5]).double(), torch.ones(2))
    stack._select(2, torch.tensor([0.5, 0.6]).double(), torch.ones(2))
    before = {name: tensor.clone() for name, tensor in stack._everything().items()}
    stack.step(2)
    for name, tensor in stack._everything().items():
        assert torch.equal(tensor[0], before[name][0])
    assert not torch.equal(stack._flat[1], before["flat"][1])
    stack.freeze(torch.tensor([False, True]))
    assert stack.finished()


def test_the_step_size_falls_on_a_cosine_per_step_or_per_epoch():
    for schedule, expected in (
        ("step", [(1 + math.cos(math.pi * index / 30)) / 2 for index in range(30)]),
        ("epoch", [(1 + math.cos(math.pi * (index // 7) / 5)) / 2 for index in range(30)]),  # 7 steps an epoch
    ):
        stack = stack_of(schedule=schedule)
        assert [stack._cosine(index) for index in range(30)] == pytest.approx(expected)


def test_gradients_are_clipped_run_by_run():
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    torch.testing.assert_close(clipped(gradient, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_looks_are_evenly_spaced_and_end_with_the_last_update():
    assert looks(1200, 8) == [150, 300, 450, 600, 750, 900, 1050, 1200]
    assert looks(3, 8) == [1, 2, 3]
    assert looks(30, 4) == [7, 15, 22, 30]


def test_scores_do_not_depend_on_how_graphs_are_parted(monkeypatch):
    stack = stack_of()
    whole = stack.evaluate(stack.selected, stack.graphs["test"])
    monkeypatch.setattr(train_recall, "EVALUATION_BATCH", 7)
    for one, two in zip(whole, stack.evaluate(stack.selected, stack.graphs["test"]), strict=True):
        torch.testing.assert_close(one, two)
    test = stack.graphs["test"]
    outputs = logits(stack.architecture, stack.selected, test)
    right = (outputs.argmax(2) == test.targets).double().mean(1)
    torch.testing.assert_close(whole[0], right)


def test_killed_jobs_end_with_the_same_bits(trained, tmp_path, monkeypatch):
    reference, original = trained[0], Stack.step
    kills = [("glstm", True, 4, 16), ("glstm", False, 3, 5), ("gcn", False, 4, 29)]

    def killed(self, index):
        here = (self.architecture.model, self.architecture.k_hop, self.architecture.neighbours, index)
        if kills and here == kills[0]:
            kills.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index)

    monkeypatch.setattr(Stack, "step", killed)
    while kills:
        with pytest.raises(SystemExit, match="143"):
            train(tmp_path)
        assert list(tmp_path.glob("*.checkpoint.safetensors"))
    train(tmp_path)
    for name in ("nar.safetensors", "nar_fits-s10-11.parquet", "nar_curves-s10-11.parquet"):
        assert (tmp_path / name).read_bytes() == (reference / name).read_bytes()
    assert not list(tmp_path.glob("*checkpoint*"))


def test_diverged_runs_are_recorded(tmp_path):
    settings = TINY.model_copy(update={"learning_rate": 1e30, "neighbours": [3], "one_hop_memories": [], "steps": 60})
    fits, curves, kept = train(tmp_path, settings)
    assert (fits.diverged_at >= 0).all()
    assert fits[["train_loss", "train_score", "validation_score", "test_score"]].isna().all(axis=None)
    assert len(kept) == 2
    assert (curves.step <= 60).all()


def test_early_ends_shorten_runs_and_their_curves(tmp_path):
    settings = TINY.model_copy(
        update={"learning_rate": 1e-12, "patience": 2, "steps": 60, "evaluations": 12, "widths": [], "neighbours": [3]}
    )
    fits, curves, _ = train(tmp_path, settings)
    assert (fits.steps == 15).all()  # looks at 5, 10, 15; nothing changes after the first
    assert (fits.selected_step == 15).all()
    assert (curves.groupby(["seed", "model", "k_hop"]).step.max() == 15).all()


def test_regression_is_trained_as_well(tmp_path):
    settings = REGRESSION.model_copy(update={"steps": 200, "one_hop_memories": [], "learning_rate": 0.02})
    fits, curves, kept = train(tmp_path, settings, "narr")
    assert list(fits.columns) == list(COLUMNS["narr_fits"])
    assert len(kept) == 2
    ours = fits[fits.model == "glstm"]
    assert (ours.train_score < 0.8).all()  # below predicting zero, 1
    first, last = (curves[(curves.model == "glstm") & (curves.step == step)] for step in (50, 200))
    assert last.train_loss.mean() < first.train_loss.mean()
