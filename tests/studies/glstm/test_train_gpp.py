"""Training on graph properties against plain PyTorch, its selection, its data, and jobs that are cut off."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
from tests.studies.glstm.archives import content, saved

from jacnorm.errors import UserError
from jacnorm.files import read_columns, read_table
from jacnorm.settings import flags
from jacnorm.step import run as run_step
from jacnorm.studies.glstm import train_gpp
from jacnorm.studies.glstm.layers import drawn, k_hop_edges
from jacnorm.studies.glstm.settings import PropertySettings
from jacnorm.studies.glstm.tables import COLUMNS
from jacnorm.studies.glstm.train_gpp import PUBLISHED, Run, Selection, Stack, architecture, load, looks, stacks
from jacnorm.training.batches import batch_indices
from jacnorm.training.seeds import RunId
from jacnorm.training.snapshots import load as load_snapshots

torch.set_num_threads(1)

CPU = torch.device("cpu")
SMALL = PropertySettings(
    seeds=[10, 11],
    tasks=["eccentricity"],
    smallest=4,
    largest=6,
    train_graphs=20,
    validation_graphs=7,
    test_graphs=9,
    layers=3,
    width=4,
    heads=2,
    memory=2,
    steps=12,
    batch=8,
    evaluations=3,
    ablations=["1-hop"],
)


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


def other(**changes):
    return SMALL.model_copy(update=changes)


def call(settings, folder):
    """Call the step with the options that a rule would give; both tables and the file of weights."""
    before = torch.get_deterministic_debug_mode()
    weights = folder / "gpp.safetensors"
    words = ["--device", "cpu", "--tables", str(folder), "--weights", str(weights)]
    try:
        run_step({"gpp": train_gpp.gpp}, [*words, *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)
    block = f"s{min(settings.seeds)}-{max(settings.seeds)}"
    return [read_table(folder / f"gpp_{name}-{block}.parquet") for name in ("fits", "graphs")], weights


def stack_of(settings, runs, task="eccentricity"):
    return Stack(settings, task, runs, load(settings), CPU)


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_seed_has_its_own_graphs_and_no_split_shares_any():
    data = load(SMALL)
    assert not torch.equal(data[10].graphs.values, data[11].graphs.values)
    assert data[10].parts == {"train": slice(0, 20), "validation": slice(20, 27), "test": slice(27, 36)}
    values = data[10].graphs.values
    assert len(torch.unique(values, dim=0)) == 36
    more = load(other(train_graphs=30, seeds=[10]))
    assert torch.equal(more[10].graphs.values[30:37], values[20:27])  # validation, whatever the training graphs
    assert torch.equal(more[10].graphs.adjacency[:20], data[10].graphs.adjacency[:20])
    assert data[10].digest != data[11].digest


def test_targets_count_where_nodes_are():
    data = load(SMALL)[10]
    found, counted = data.targets("eccentricity")
    assert found.shape == counted.shape == (36, 6)
    assert torch.equal(counted.sum(1), data.graphs.nodes)
    whole, counted = data.targets("diameter")
    assert torch.equal(whole, found.amax(1))
    assert counted.shape == (36,)
    assert counted.all()


def test_the_error_of_a_constant_is_that_of_the_mean_training_label():
    data = load(SMALL)[10]
    found, counted = data.targets("eccentricity")
    mean = sum(found[:20][counted[:20]].tolist()) / int(counted[:20].sum())
    squares = [(value - mean) ** 2 for value in found[27:][counted[27:]].tolist()]
    assert train_gpp.constant_error(data, "eccentricity") == pytest.approx(math.log10(sum(squares) / len(squares)))


def test_the_archive_is_what_every_seed_learns_from(tmp_path):
    path = saved(tmp_path, content())
    settings = other(archive=str(path), tasks=["sssp", "laplacian"], ablations=[], steps=2, evaluations=1)
    (fits, graphs), _ = call(settings, tmp_path)
    assert set(fits.source) == set(graphs.source) == {"archive"}
    assert fits.groupby("task").column.unique().map(list).to_dict() == {"sssp": ["eccentricity"], "laplacian": ["sssp"]}
    assert set(graphs.graphs) == {15}
    assert graphs.disconnected.tolist() == [pytest.approx(1 / 3)] * 4
    assert graphs.groupby("task").variance.nunique().tolist() == [1, 1]  # one data set
    assert fits[fits.task == "sssp"].train_error.nunique() == 2  # two initialisations
    with pytest.raises(UserError, match="does not exist"):
        load(other(archive=str(tmp_path / "none.pkl")))


# --- what is trained -------------------------------------------------------------------------------------------------


def test_runs_of_one_model_train_together_and_each_once(monkeypatch):
    settings = other(ablations=["1-hop", "no-gates"], baselines=["gcn", "adgn"])
    for size, count in ((12, 3), (4, 4)):
        monkeypatch.setattr(train_gpp, "STACK_RUNS", size)
        found = list(stacks(settings))
        assert len(found) == count
        assert all(len({run.model for run in runs}) == 1 and len(runs) <= size for runs in found)
        runs = [run for each in found for run in each]
        assert len(runs) == len(set(runs)) == 2 * (1 + 2 + 2)
    assert Run("glstm", "no-gates", 11) in runs


def test_sizes_are_the_settings_or_the_papers():
    assert architecture(SMALL, "sssp") == (3, 4, 2, 2, "relu", False)
    assert architecture(SMALL, "diameter").graph_level
    assert architecture(other(published=True), "sssp") == (10, 10, 1, 16, "tanh", False)
    assert PUBLISHED["diameter"] == (20, 10, 1, 16, "relu", True)
    assert PUBLISHED["eccentricity"] == (10, 20, 4, 8, "relu", False)


def test_validation_is_looked_at_evenly_and_at_the_end():
    assert looks(SMALL) == [4, 8, 12]
    assert looks(other(steps=10, evaluations=4)) == [3, 5, 8, 10]
    assert looks(other(steps=2, evaluations=5)) == [1, 2]


@pytest.mark.parametrize(("cosine", "task"), [(True, "eccentricity"), (False, "diameter")])
def test_a_run_is_an_ordinary_training(cosine, task):
    """Against AdamW of PyTorch on the module that passes messages along the edges of one graph after another."""
    settings = other(cosine=cosine, weight_decay=0.1, learning_rate=0.01)
    stack = stack_of(settings, [Run("glstm", "none", 10), Run("glstm", "1-hop", 11)], task)
    module = drawn(stack._network.module, RunId("glstm", f"gpp {task} glstm", 11).generator("initial"))
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
    data = load(settings)[11]
    targets, _ = data.targets(task)

    def predicted(graph):
        nodes = int(data.graphs.nodes[graph])
        edge_index = data.graphs.adjacency[graph, :nodes, :nodes].nonzero().T
        edges = k_hop_edges(edge_index, nodes, 1) * 3  # 1-hop: the neighbours in every layer
        where = torch.zeros(nodes, dtype=torch.int64) if task == "diameter" else None
        return module(data.graphs.features[graph, :nodes], edges, where).squeeze(1), nodes

    for index in range(4):
        losses = stack.step(index)["loss"]
        rows = batch_indices(index, [RunId("glstm", "gpp order", 11)], 20, 8)[0].tolist()
        parts = [(predicted(graph), targets[graph]) for graph in rows]
        errors = [found - (target if target.ndim == 0 else target[:nodes]) for (found, nodes), target in parts]
        loss = torch.cat(errors).square().mean()
        assert losses[1].item() == pytest.approx(loss.item(), rel=1e-4)
        optimiser.param_groups[0]["lr"] = 0.005 * (1 + math.cos(math.pi * index / 12)) if cosine else 0.01
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, tensor in stack._network.arranged(module).items():
        assert torch.allclose(stack.state()[f"parameter/{name}"][1], tensor.detach(), atol=2e-4), name


def test_a_run_is_the_same_alone_and_beside_others():
    alone = stack_of(other(seeds=[11]), [Run("glstm", "1-hop", 11)])
    beside = stack_of(SMALL, [Run("glstm", "none", 10), Run("glstm", "1-hop", 11), Run("glstm", "none", 11)])
    for index in range(3):
        assert torch.allclose(alone.step(index)["loss"][0], beside.step(index)["loss"][1], rtol=1e-4)


# --- selection -------------------------------------------------------------------------------------------------------


def selection_after(errors, patience=0):
    """Looks after 10, 20, ... updates, whose parameters are the number of the look; a column of errors per run."""
    found = Selection({"w": torch.zeros(len(errors[0]), 1)}, patience)
    for number, row in enumerate(errors, start=1):
        stack = {"w": torch.full((len(row), 1), float(number))}
        found.look(torch.tensor(row, dtype=torch.float64), 10 * number, stack)
    return found


def test_the_last_of_the_best_looks_is_selected():
    found = selection_after([[3.0, 1.0, math.nan], [2.0, 2.0, 5.0], [2.0, 3.0, math.nan], [4.0, 1.0, 6.0]])
    assert found.step.tolist() == [30, 40, 20]
    assert found.parameters["w"].flatten().tolist() == [3, 4, 2]
    assert found.error.tolist() == [2, 1, 5]
    assert not found.ended.any()


def test_patience_counts_from_the_first_of_the_best_and_what_comes_after_the_end_does_not_count():
    found = selection_after([[1.0, 4.0], [1.0, 3.0], [2.0, 2.0], [0.0, 1.0]], patience=2)
    assert found.ended.tolist() == [30, 0]
    assert found.step.tolist() == [20, 40]
    assert found.parameters["w"].flatten().tolist() == [2, 4]


def test_runs_end_by_their_patience_and_keep_what_they_had(monkeypatch, tmp_path):
    errors = iter(range(1, 100))
    monkeypatch.setattr(
        Stack, "errors", lambda self, parameters, split: torch.tensor([float(next(errors))] * 2).double()
    )
    stack = stack_of(other(patience=2, steps=60, evaluations=30), [Run("glstm", "none", seed) for seed in (10, 11)])
    for index in range(6):
        assert not stack.finished()
        stack.step(index)
        if index == 1:
            first = {name: tensor.clone() for name, tensor in stack.state().items() if name.startswith("parameter/")}
    assert stack.finished()
    assert stack.selection.ended.tolist() == [6, 6]
    before = {name: tensor.clone() for name, tensor in stack.state().items() if name.startswith("parameter/")}
    stack.step(6)
    after = stack.state()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(
        torch.equal(after[name.replace("parameter/", "selection/parameters/")], tensor)
        for name, tensor in first.items()
    )


# --- jobs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        return call(SMALL, tmp_path_factory.mktemp("whole"))


def test_the_table_has_a_row_for_each_run_and_errors_of_what_was_kept(whole):
    (fits, graphs), weights = whole
    assert fits[["ablation", "seed"]].values.tolist() == [["none", 10], ["none", 11], ["1-hop", 10], ["1-hop", 11]]
    assert list(fits.columns) == list(COLUMNS["gpp_fits"])
    assert read_columns(next(weights.parent.glob("gpp_graphs-*")))["nodes"].unit == "nodes"
    assert set(fits.source) == {"generated"}
    assert (fits.column == fits.task).all()
    assert (fits.steps == 12).all()
    assert fits.selected_step.isin([4, 8, 12]).all()
    assert (fits.diverged_at == -1).all()
    snapshots = load_snapshots(weights)
    assert [snapshot.cell["ablation"] for snapshot in snapshots] == ["none", "1-hop"]
    runs = [Run("glstm", ablation, seed) for ablation in ("none", "1-hop") for seed in SMALL.seeds]
    stack = stack_of(SMALL, runs)
    kept = {name: torch.cat([each.tensors[name] for each in snapshots]) for name in snapshots[0].tensors}
    for split in ("train", "validation", "test"):
        assert fits[f"{split}_error"].tolist() == pytest.approx(stack.errors(kept, split).log10().tolist(), abs=1e-9)
    assert graphs.nodes.tolist() == pytest.approx(
        [load(SMALL)[seed].graphs.nodes.double().mean().item() for seed in (10, 11)]
    )
    assert (fits.parameters == sum(tensor[0].numel() for tensor in kept.values())).all()
    assert not list(weights.parent.glob("*.checkpoint.*"))


def test_errors_are_means_over_nodes_however_graphs_are_split(monkeypatch):
    stack = stack_of(SMALL, [Run("glstm", "none", 10)])
    whole = stack.errors(stack.selection.parameters, "train")
    monkeypatch.setattr(train_gpp, "EVALUATION_GRAPHS", 3)
    assert torch.allclose(stack.errors(stack.selection.parameters, "train"), whole, rtol=1e-6)


def test_training_learns(tmp_path):
    settings = other(seeds=[10], ablations=[], steps=150, learning_rate=0.01, train_graphs=60, batch=30)
    (fits, _), _ = call(settings, tmp_path)
    assert fits.train_error.item() < fits.constant_error.item() - 0.3


def test_a_killed_job_goes_on_and_ends_with_the_same_bits(whole, tmp_path, monkeypatch):
    real, count = Stack.step, [0]

    def interrupted(self, index):
        count[0] += 1
        if count[0] == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, index)

    monkeypatch.setattr(Stack, "step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        call(SMALL, tmp_path)
    assert stopped.value.code == 143
    assert list(tmp_path.glob("*.checkpoint.safetensors"))
    monkeypatch.setattr(Stack, "step", real)
    resumed = []
    monkeypatch.setattr(
        train_gpp,
        "fit",
        lambda *args, fit=train_gpp.fit, **options: resumed.append(fit(*args, **options)) or resumed[-1],
    )
    (fits, _), weights = call(SMALL, tmp_path)
    assert [report.resumed_from for report in resumed] == [7]
    assert fits.equals(whole[0][0])
    assert weights.read_bytes() == whole[1].read_bytes()


def test_a_run_that_diverges_is_recorded_and_leaves_the_others_alone(tmp_path, monkeypatch, whole):
    real = Stack._errors

    def poisoned(self, parameters, rows):
        squares, counts = real(self, parameters, rows)
        bad = torch.tensor([run.seed == 11 and run.ablation == "none" for run in self.runs])
        return squares * torch.where(bad, math.nan, 1.0), counts

    monkeypatch.setattr(Stack, "_errors", poisoned)
    (fits, _), _ = call(SMALL, tmp_path)
    bad = fits[fits.diverged_at >= 0]
    assert bad[["seed", "ablation", "diverged_at", "selected_step"]].values.tolist() == [[11, "none", 0, -1]]
    assert bad[["train_error", "validation_error", "test_error"]].isna().all(axis=None)
    others = fits.diverged_at < 0
    assert fits[others].test_error.tolist() == pytest.approx(whole[0][0][others].test_error.tolist(), abs=1e-4)
