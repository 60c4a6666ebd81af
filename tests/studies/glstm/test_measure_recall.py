"""Node Jacobians and mixing Hessians against finite differences in float64, symmetry, and sums done by hand.

Finite differences use the network's values only, so that neither the transforms of `torch.func` nor the batching over
graphs and runs is its own oracle.
"""

from __future__ import annotations

import math

import pytest
import torch

from jacnorm.errors import UserError
from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run as run_step
from jacnorm.studies.glstm import measure_recall, train_recall
from jacnorm.studies.glstm.measure_recall import architecture_of, entry_sums, mixing, norms, statistics
from jacnorm.studies.glstm.recall import NEIGHBOURS, QUERY, split
from jacnorm.studies.glstm.recall_models import Architecture, draw_parameters, initial_statistics, inputs, outputs
from jacnorm.studies.glstm.settings import RecallSettings, RegressionSettings
from jacnorm.studies.glstm.tables import COLUMNS
from jacnorm.training import snapshots
from jacnorm.training.snapshots import Snapshot

torch.set_num_threads(1)

N = 3
SEEDS = [0, 1]
NETWORKS = [
    ("nar", "glstm", 2, True),
    ("nar", "glstm", 2, False),
    ("nar", "gcn", 5, False),
    ("nar", "gatv2", 4, True),
    ("nar", "gatedgcn", 4, False),
    ("narr", "glstm", 2, True),
    ("narr", "gcn", 4, False),
]


def case(task, model, size, k_hop, graphs=2, neighbours=N, dtype=torch.float64):
    """An untrained network of two runs, and graphs; weights are enlarged so that gates and norms are in play."""
    architecture = Architecture(task, model, size, k_hop, 2, neighbours)
    drawn = draw_parameters(architecture, [torch.Generator().manual_seed(5 + seed) for seed in SEEDS])
    tensors = {name: 1.5 * tensor for name, tensor in drawn.items()} | initial_statistics(architecture, 2)
    found = split(task, neighbours, graphs, SEEDS, "test")
    if task == "narr":
        found = type(found)(found.values.to(dtype), found.asked)
    return architecture, {name: tensor.to(dtype) for name, tensor in tensors.items()}, found


def moved(x, node, feature, by):
    """The inputs with one number changed in all graphs of all runs; node may differ between graphs, (R, B)."""
    x = x.clone()
    run, graph = torch.meshgrid(torch.arange(x.shape[0]), torch.arange(x.shape[1]), indexing="ij")
    x[run, graph, node, feature] += by
    return x


@pytest.mark.parametrize(("task", "model", "size", "k_hop"), NETWORKS)
def test_jacobians_are_those_of_finite_differences(task, model, size, k_hop):
    architecture, tensors, graphs = case(task, model, size, k_hop)
    x, step = inputs(architecture, tensors, graphs), 1e-6
    found = entry_sums(architecture, tensors, graphs)
    assert found.shape == (2, 2, N, architecture.features)
    for neighbour in range(N):
        for feature in range(architecture.features):
            up, down = (
                outputs(architecture, tensors, moved(x, NEIGHBOURS + neighbour, feature, sign * step))
                for sign in (1, -1)
            )
            slopes = (up - down) / (2 * step)  # (R, B, m)
            assert torch.allclose(found[:, :, neighbour, feature], slopes.abs().sum(2), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("task", "model", "size", "k_hop"), NETWORKS)
def test_mixing_is_that_of_finite_differences(task, model, size, k_hop):
    architecture, tensors, graphs = case(task, model, size, k_hop)
    x, step, keys = inputs(architecture, tensors, graphs), 1e-4, architecture.key_features
    found = mixing(architecture, tensors, graphs)
    values = architecture.features - keys
    assert found.shape == (2, 2, architecture.outputs, values, keys)
    assert found.abs().max() > 1e-6
    for value in {0, values - 1}:
        for key in range(keys):
            corners = [
                a * b * outputs(
                    architecture, tensors,
                    moved(moved(x, graphs.asked + NEIGHBOURS, keys + value, a * step), QUERY, key, b * step),
                )
                for a in (1, -1) for b in (1, -1)
            ]  # fmt: skip
            expected = sum(corners) / (4 * step**2)
            assert torch.allclose(found[:, :, :, value, key], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", ["nar", "narr"])
def test_parts_are_columns_of_the_inputs(task):
    """Half of the encoder's output, or the key's one-hot; the value's part of NARR holds the query's columns too."""
    architecture, tensors, graphs = case(task, "glstm", 3, True)
    found, sums = norms(architecture, tensors, graphs), entry_sums(architecture, tensors, graphs)
    first = 3 if task == "nar" else N
    assert torch.allclose(found["key"], sums[..., :first].sum(3))
    assert torch.allclose(found["value"], sums[..., first:].sum(3))
    assert torch.allclose(found["full"], found["key"] + found["value"])
    assert sums.shape[3] == (6 if task == "nar" else N + 16 + N)


@pytest.mark.parametrize("part", ["full", "key", "value"])
def test_a_gcn_with_k_hop_cannot_tell_neighbours_apart(part):
    """They enter the centre through one sum in layer 1 and not at all in layer 2: the ratio is 1 by symmetry."""
    architecture, tensors, graphs = case("nar", "gcn", 6, True, graphs=5, neighbours=7)
    found = norms(architecture, tensors, graphs)[part]
    ratios = statistics(found, graphs.asked)
    rounding = {"rtol": 0, "atol": 1e-14}
    assert torch.allclose(found, found[:, :, :1].expand_as(found), rtol=1e-14)
    assert torch.allclose(ratios["ratio"], torch.ones(2, 5).double(), **rounding)
    assert torch.allclose(ratios["log_ratio"], torch.zeros(2, 5).double(), **rounding)
    one_hop = Architecture("nar", "gcn", 6, False, 2, 7)
    assert (statistics(norms(one_hop, tensors, graphs)[part], graphs.asked)["ratio"] - 1).abs().min() > 1e-4


def test_statistics_by_hand():
    norm = torch.tensor([[[1.0, 4.0, 2.0], [3.0, 3.0, 3.0]]], dtype=torch.float64)
    found = statistics(norm, torch.tensor([[1, 0]]))
    expected = {
        "selected": [4, 3],
        "background": [1.5, 3],
        "mean": [7 / 3, 3],
        "variance": [14 / 9, 0],
        "log_ratio": [(math.log(4) + math.log(2)) / 2, 0],
        "ratio": [3, 1],
    }
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name][0].tolist() == pytest.approx(values), name
    dead = statistics(torch.tensor([[[2.0, 0.0], [0.0, 0.0]]]), torch.tensor([[0, 0]]))
    assert dead["ratio"][0, 0] == math.inf
    assert dead["ratio"][0, 1].isnan()


@pytest.mark.parametrize("task", ["nar", "narr"])
def test_the_size_of_chunks_changes_nothing(task, monkeypatch):
    architecture, tensors, graphs = case(task, "glstm", 2, True)
    whole = entry_sums(architecture, tensors, graphs), mixing(architecture, tensors, graphs)
    monkeypatch.setattr(measure_recall, "ENTRIES", 1)
    apart = entry_sums(architecture, tensors, graphs), mixing(architecture, tensors, graphs)
    for one, other in zip(whole, apart, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


def test_a_graph_is_measured_alike_alone_and_among_others():
    architecture, tensors, graphs = case("nar", "gatedgcn", 4, False, graphs=6)
    for of in (entry_sums, mixing):
        assert torch.allclose(of(architecture, tensors, graphs)[:, :2], of(architecture, tensors, graphs.first(2)))


# --- jobs ------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "seeds": [10, 11],
    "neighbours": [2, 4],
    "memories": [2],
    "one_hop_memories": [],
    "baselines": ["gcn"],
    "widths": [4],
    "further_memories": [],
    "further_neighbours": [],
    "train_graphs": 16,
    "validation_graphs": 8,
    "test_graphs": 6,
    "steps": 2,
    "batch": 8,
    "evaluations": 1,
    "measured_graphs": 4,
    "hessian_graphs": 2,
}
SETTINGS = {"nar": RecallSettings(**OPTIONS), "narr": RegressionSettings(**OPTIONS)}


def call(step, task, folder, settings=None):
    before = torch.get_deterministic_debug_mode()
    words = [task, "--device", "cpu", "--tables", str(folder), "--weights", str(folder / f"{task}.safetensors")]
    commands = {name: getattr(step, name) for name in SETTINGS}
    try:
        run_step(commands, [*words, *flags(settings or SETTINGS[task]).split()])
    finally:
        torch.set_deterministic_debug_mode(before)


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


@pytest.mark.parametrize("task", SETTINGS)
def test_tables_hold_each_run_graph_and_part(task, tmp_path):
    call(train_recall, task, tmp_path)
    call(measure_recall, task, tmp_path)
    tables = {name: read_table(tmp_path / f"{task}_{name}-s10-11.parquet") for name in ("jacobians", "hessians")}
    for name, table in tables.items():
        assert list(table.columns) == list(COLUMNS[f"{task}_{name}"])
        assert table.drop(columns=["ratio", "log_ratio"], errors="ignore").notna().all(axis=None)
    cells = 2 * 2  # networks, numbers of neighbours
    assert len(tables["jacobians"]) == cells * 2 * 4 * 3
    assert len(tables["hessians"]) == cells * 2 * 2
    assert set(tables["jacobians"].graph) == {0, 1, 2, 3}
    # the graphs are those of the test split, and a row is that of its own seed
    snapshot = next(each for each in snapshots.load(tmp_path / f"{task}.safetensors") if each.cell["model"] == "glstm")
    architecture = architecture_of(task, snapshot)
    graphs = split(task, architecture.neighbours, 6, [11], "test").first(4)
    alone = {name: tensor[1:] for name, tensor in snapshot.tensors.items()}
    expected = statistics(norms(architecture, alone, graphs)["key"], graphs.asked)
    rows = tables["jacobians"].query(
        f"seed == 11 and part == 'key' and model == 'glstm' and neighbours == {graphs.neighbours}"
    )
    assert rows.graph.tolist() == [0, 1, 2, 3]
    assert rows.selected.tolist() == pytest.approx(expected["selected"][0].tolist(), rel=1e-4)
    assert rows.background.tolist() == pytest.approx(expected["background"][0].tolist(), rel=1e-4)
    entries = mixing(architecture, alone, graphs.first(2)).flatten(2)[0].double()
    rows = tables["hessians"].query(f"seed == 11 and model == 'glstm' and neighbours == {graphs.neighbours}")
    for name, values in {
        "largest": entries.amax(1),
        "largest_absolute": entries.abs().amax(1),
        "mean": entries.mean(1),
        "frobenius": entries.square().sum(1).sqrt(),
    }.items():
        assert rows[name].tolist() == pytest.approx(values.tolist(), rel=1e-3, abs=1e-9), name


def test_fewer_test_graphs_than_to_be_measured_are_all_measured(tmp_path):
    settings = SETTINGS["nar"].model_copy(update={"test_graphs": 1, "neighbours": [2], "baselines": []})
    call(train_recall, "nar", tmp_path, settings)
    call(measure_recall, "nar", tmp_path, settings)
    assert set(read_table(tmp_path / "nar_jacobians-s10-11.parquet").graph) == {0}


def test_weights_of_something_else_are_refused(tmp_path):
    other = Snapshot({"model": "glstm", "depth": 3}, {"w": torch.ones(2, 1)})
    with pytest.raises(UserError, match="the weights name no size of their network; delete them"):
        architecture_of("nar", other)
