"""Peptides in tiny files of the benchmark's format: what networks take in, and training."""

from __future__ import annotations

import math
import os
import signal

import networkx as nx
import pytest
import torch
from sklearn.metrics import average_precision_score
from tests.studies.glstm.fake_peptides import write

from jacnorm.errors import UserError
from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run as run_step
from jacnorm.studies.glstm import peptides, train_peptides
from jacnorm.studies.glstm.peptides import average_precision, flipped, join, laplacian, load, random_walks
from jacnorm.studies.glstm.settings import PeptidesSettings
from jacnorm.studies.glstm.tables import COLUMNS
from jacnorm.studies.glstm.train_peptides import Body, Run, largest_width
from jacnorm.training.loop import RunId
from jacnorm.training.snapshots import load as load_snapshots

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyG

CPU = torch.device("cpu")
SMALL = PeptidesSettings(seeds=[10], tasks=["func", "struct"], parameters=20_000, epochs=3, patience=3, batch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both tasks' files."""
    found = tmp_path_factory.mktemp("lrgb")
    for task in ("func", "struct"):
        write(found, task)
    return found


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")
    monkeypatch.setattr(
        train_peptides, "BODIES", {"func": Body(3, 2, 2, 0.2, "identity"), "struct": Body(3, 1, 2, 0.0, "relu")}
    )


# --- what goes in ----------------------------------------------------------------------------------------------------


def test_molecules_come_through_pytorch_geometric(folder):
    found = load("func", folder)
    assert {split: len(data) for split, data in found.items()} == {"train": 5, "validation": 4, "test": 4}
    data = found["train"]
    assert [len(atoms) for atoms in data.atoms] == [2, 5, 8, 3, 6]
    assert data.targets.shape == (5, 10)
    for number, distances in enumerate(data.distances):
        size = len(data.atoms[number])
        graph = nx.cycle_graph(size) if number % 3 == 2 else nx.path_graph(size)
        lengths = dict(nx.all_pairs_shortest_path_length(graph))
        assert distances.tolist() == [[lengths[i][j] for j in range(size)] for i in range(size)]
    assert found["train"].digest() != found["test"].digest()


def test_walks_and_spectra_of_a_ring_are_those_of_its_closed_form():
    """On a ring of n: return probabilities are means of cos^k(2 pi j / n), eigenvalues 1 - cos(2 pi j / n)."""
    n = 7
    ring = torch.from_numpy(nx.to_numpy_array(nx.cycle_graph(n))).float()
    angles = 2 * math.pi * torch.arange(n).double() / n
    walks = random_walks(ring, 5)
    for k in range(1, 6):
        assert torch.allclose(walks[:, k - 1].double(), torch.cos(angles).pow(k).mean(), atol=1e-6)
    found = laplacian(ring, 10)
    assert found.shape == (n, 10, 2)
    assert torch.allclose(found[0, :n, 1].double(), (1 - torch.cos(angles)).sort().values, atol=1e-6)
    assert torch.allclose(found[:, 0, 0].abs(), torch.full((n,), n**-0.5), atol=1e-6)
    assert found[:, n:].isnan().all()


def test_distant_and_separate_atoms_are_in_no_edge_set():
    line = torch.from_numpy(nx.to_numpy_array(nx.path_graph(300))).float()
    line[150, 151] = line[151, 150] = 0
    found = peptides.bond_distances(line)
    assert found[0, 150] == 150
    assert found[0, 299] == peptides.FARTHEST
    far = peptides.bond_distances(torch.from_numpy(nx.to_numpy_array(nx.path_graph(300))).float())
    assert far[0, 299] == peptides.FARTHEST


@pytest.mark.parametrize("k_hop", [True, False])
def test_molecules_are_joined_without_mixing(folder, k_hop):
    data = load("struct", folder)["train"]
    joined = join(data, [4, 0, 2], 3, k_hop=k_hop, device=CPU)
    assert joined.graph.tolist() == [0] * 6 + [1] * 2 + [2] * 8
    assert torch.equal(joined.targets, data.targets[[4, 0, 2]])
    assert torch.equal(joined.atoms[6:8], data.atoms[0])
    starts = {0: 0, 1: 6, 2: 8}
    for layer, edges in enumerate(joined.edges, start=1):
        distance = layer if k_hop else 1
        expected = {
            (starts[place] + i, starts[place] + j)
            for place, row in enumerate([4, 0, 2])
            for i, j in (data.distances[row] == distance).nonzero().tolist()
        }
        assert set(map(tuple, edges.T.tolist())) == expected
        assert edges.shape[1] == len(expected)


def test_signs_are_flipped_for_whole_eigenvectors(folder):
    data = load("struct", folder)["train"]
    joined = join(data, [1, 2], 3, k_hop=True, device=CPU)
    found = flipped(joined.encodings, joined.graph, torch.Generator().manual_seed(1))
    assert torch.equal(found[..., 1].nan_to_num(), joined.encodings[..., 1].nan_to_num())
    ratio = (found / joined.encodings)[..., 0]
    for graph in (0, 1):
        column = ratio[joined.graph == graph]
        signs = [set(values[~values.isnan()].tolist()) for values in column.T]
        assert all(len(each) <= 1 and each <= {1.0, -1.0} for each in signs)
    assert {1.0, -1.0} <= set(ratio[~ratio.isnan()].tolist())


def test_encodings_that_are_missing_change_nothing():
    encoder = peptides.SpectrumEncoder(4)
    x = torch.randn(3, 10, 2, generator=torch.Generator().manual_seed(0))
    x[:, 6:] = torch.nan
    assert torch.allclose(encoder(x), encoder.maps(x[:, :6]).sum(1))


def test_average_precision_is_the_mean_over_classes_that_occur():
    scores = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    targets = (torch.rand(30, 4, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    targets[:, 1], targets[:, 2] = 0, 1
    expected = sum(average_precision_score(targets[:, k].numpy(), scores[:, k].numpy()) for k in (0, 3)) / 2
    assert average_precision(scores, targets) == pytest.approx(expected)
    assert math.isnan(average_precision(scores * math.nan, targets))
    assert math.isnan(average_precision(scores, torch.zeros(30, 4)))


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_mistakes_are_told(tmp_path, folder, monkeypatch):
    raw = write(tmp_path / "evil", "func") / "peptides-func" / "raw" / "train.pt"
    torch.save(Evil(tmp_path / "it ran"), raw)
    with pytest.raises(UserError, match=r"Peptides-func cannot be fetched or read .*put its files into evil/"):
        load("func", tmp_path / "evil")
    assert not (tmp_path / "it ran").exists()
    torch.load(raw, weights_only=False)
    assert (tmp_path / "it ran").exists()  # the check can fail
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ

    def refused(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("torch_geometric.datasets.lrgb.download_url", refused)
    with pytest.raises(UserError, match=r"Peptides-func cannot be fetched or read \(no network\)"):
        load("func", tmp_path / "nothing")

    class Item:
        x = torch.full((2, 9), 200)
        edge_index = torch.tensor([[0, 1], [1, 0]])
        y = torch.zeros(1, 10)

    with pytest.raises(UserError, match="molecule 0 of Peptides-func has atoms of other features"):
        peptides.molecules("func", [Item()])
    Item.x = torch.zeros(2, 9, dtype=torch.int64)
    with pytest.raises(UserError, match="molecule 0 of Peptides-struct has 10 labels instead of 11"):
        peptides.molecules("struct", [Item()])


# --- training --------------------------------------------------------------------------------------------------------


def test_the_width_is_the_largest_that_fits(monkeypatch):
    for task in ("func", "struct"):
        width = largest_width(task, 30_000)
        counts = [train_peptides.parameter_count(train_peptides.PeptidesNetwork(task, width + more)) for more in (0, 1)]
        assert counts[0] <= 30_000 < counts[1]
    with pytest.raises(UserError, match="setting parameters is 100, but the narrowest network of Peptides-func has"):
        largest_width("func", 100)
    monkeypatch.undo()
    assert train_peptides.BODIES["func"] == (27, 2, 32, 0.1, "identity")
    assert train_peptides.BODIES["struct"] == (23, 5, 16, 0.0, "relu")


def call(folder, data, settings=SMALL):
    before = torch.get_deterministic_debug_mode()
    if not (folder / "lrgb").exists():
        (folder / "lrgb").symlink_to(data)
    words = ["--device", "cpu", "--tables", str(folder), "--weights", str(folder / "peptides.safetensors")]
    try:
        run_step({"peptides": train_peptides.peptides}, [*words, *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)
    return read_table(folder / "peptides_fits-s10-10.parquet")


def test_a_job_trains_every_cell_and_goes_on_after_a_kill(folder, tmp_path, monkeypatch):
    settings = SMALL.model_copy(update={"ablations": ["1-hop"]})
    (tmp_path / "whole").mkdir()
    whole = call(tmp_path / "whole", folder, settings)
    assert list(whole.columns) == list(COLUMNS["peptides_fits"])
    assert whole[["task", "ablation"]].values.tolist() == [
        [task, ablation] for task in ("func", "struct") for ablation in ("none", "1-hop")
    ]
    assert (whole.parameters <= 20_000).all()
    assert (whole.epochs == 3).all()
    assert (whole.diverged_at == -1).all()
    assert whole.test_score.between(0, 1.5).all()
    kept = load_snapshots(tmp_path / "whole" / "peptides.safetensors")
    assert [snapshot.cell["ablation"] for snapshot in kept] == ["none", "1-hop"] * 2

    real, count = Run.step, [0]

    def interrupted(self, index):
        count[0] += 1
        if count[0] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, index)

    (tmp_path / "cut").mkdir()
    monkeypatch.setattr(Run, "step", interrupted)
    with pytest.raises(SystemExit):
        call(tmp_path / "cut", folder, settings)
    monkeypatch.setattr(Run, "step", real)
    assert call(tmp_path / "cut", folder, settings).equals(whole)
    files = [tmp_path / name / "peptides.safetensors" for name in ("cut", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture
def run(folder):
    """One run of the regression, before training."""
    return Run(SMALL, "struct", "none", 10, 20, load("struct", folder), CPU)


def looked(run, scores, monkeypatch):
    """Let a run look at these validation scores, the weights of its head being the number of the look."""
    found = iter(scores)

    def evaluate(split):
        score = next(found)
        return score, score

    monkeypatch.setattr(run, "evaluate", evaluate)
    for number in range(len(scores)):
        run.network.head.bias.data.fill_(number)
        run._look()


def test_the_last_of_the_best_epochs_is_selected_and_patience_ends(run, monkeypatch):
    looked(run, [3.0, 1.0, 2.0, 1.0], monkeypatch)
    assert run.selected["head.bias"][0] == 3
    assert not run.finished()
    looked(run, [2.0], monkeypatch)  # the third epoch without a better one: patience is 3
    assert run.finished()
    assert run.selected["head.bias"][0] == 3


def test_the_step_size_is_halved_on_a_plateau_down_to_the_smallest(run, monkeypatch):
    rate = run._seen["rate"]
    looked(run, [1.0] * 21, monkeypatch)
    assert rate.item() == 1e-3
    looked(run, [1.0], monkeypatch)
    assert rate.item() == 5e-4
    looked(run, [1.0] * 21 * 10, monkeypatch)
    assert rate.item() == 1e-5


def test_ablations_start_alike(folder):
    data = load("func", folder)
    one, other = (Run(SMALL, "func", ablation, 10, 32, data, CPU) for ablation in ("none", "no-gates"))
    assert all(torch.equal(a, b) for a, b in zip(one.selected.values(), other.selected.values(), strict=True))
    assert one.id == RunId("glstm", "peptides func none", 10)
    assert other.network.body.layers[0].without == {"input", "output", "forget"}


def test_training_learns(run):
    before = run.evaluate("train")[1]
    for index in range(40):
        run.step(index)
    assert run.evaluate("train")[1] < 0.7 * before


def test_a_run_that_diverges_has_no_scores(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "_loss", lambda self, outputs, targets: outputs.sum() * math.nan)
    found = call(tmp_path, folder, SMALL.model_copy(update={"tasks": ["struct"]}))
    assert found.diverged_at.tolist() == [0]
    assert found[["validation_score", "test_score"]].isna().all(axis=None)
