"""Federated training against PyTorch modules, client after client; what is kept; killed jobs; runs that end early."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from tests.studies.fedgtst.federated_peers import TINY, coloured, domain_files, train
from torch import nn

from jacnorm.studies.fedgtst import train_federated
from jacnorm.studies.fedgtst.cells import Run, client_rows, grid
from jacnorm.studies.fedgtst.draws import client_draws, initial_weights
from jacnorm.studies.fedgtst.inputs import load
from jacnorm.studies.fedgtst.networks import build
from jacnorm.studies.fedgtst.settings import DOMAINS, DomainSettings
from jacnorm.studies.fedgtst.tables import COLUMNS
from jacnorm.studies.fedgtst.train_federated import Stack

torch.set_num_threads(1)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    return coloured(digits, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        return folder, *train(folder, data)


def runs_of(settings, method):
    return next(stack for stack in grid(settings, "digits", "digits_m") if stack[0].method == method)


class Plain(nn.Module):
    """The small network out of PyTorch's own layers."""

    def __init__(self, weights):
        super().__init__()
        self.convolution1, self.convolution2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 16, 3, padding=1)
        self.dense1, self.read_out = nn.Linear(64, 84), nn.Linear(84, 10)
        self.load_state_dict(weights)

    def forward(self, x):
        for convolution in (self.convolution1, self.convolution2):
            x = nn.functional.max_pool2d(convolution(x).relu(), 2)
        return self.read_out(self.dense1(x.flatten(1)).relu())


def test_fedavg_is_the_mean_of_ordinary_pytorch_loops(data):
    (inputs,) = load(TINY, data)
    runs = runs_of(TINY, "fedavg")
    stack = Stack(TINY, runs, inputs, CPU)
    seed, cell = 11, runs[1].condition.draws
    rows = client_rows(TINY, runs[1].condition, seed, inputs)
    x, y = inputs.source_train.x[rows], inputs.source_train.y[rows]
    network = build("lenet", inputs.shape, 10)
    weights = initial_weights(network, "digits", seed)
    for index in range(2):
        loss = stack.step(index)["loss"][1].item()
        ends, losses = [], []
        for client in range(3):
            plain = Plain(weights)
            optimiser = torch.optim.SGD(plain.parameters(), lr=0.1)
            order = client_draws(TINY, cell, seed, index, client, 20)["order"][0]
            for batch in order.split(8):
                optimiser.zero_grad()
                value = nn.functional.cross_entropy(plain(x[client][batch]), y[client][batch])
                value.backward()
                optimiser.step()
                losses.append(value.item() * len(batch))
            ends.append({name: each.detach() for name, each in plain.named_parameters()})
        weights = {name: torch.stack([end[name] for end in ends]).mean(0) for name in weights}
        assert loss == pytest.approx(sum(losses) / 60, rel=1e-5)
    for name, found in stack._servers.items():
        if name.startswith("weights."):
            torch.testing.assert_close(found[1], weights[name.removeprefix("weights.")], rtol=1e-4, atol=1e-6)


def test_the_tables_have_every_run_and_round(trained):
    _, runs, rounds, clients, _ = trained
    for table, name in ((runs, "runs"), (rounds, "rounds"), (clients, "clients")):
        assert list(table.columns) == list(COLUMNS[f"federated_{name}"])
    planned = {run for stack in grid(TINY, "digits", "digits_m") for run in stack}
    assert {Run.of(row) for row in runs.to_dict("records")} == planned
    assert len(runs) == len(planned) == 6
    assert (runs.outcome == "finished").all()
    assert (runs.rounds == 4).all()
    assert (runs.ended_at == -1).all()
    assert rounds.groupby(["method", "seed"])["round"].apply(list).map(lambda each: each == [1, 2, 3, 4]).all()
    assert (rounds.participants == 3).all()
    assert rounds.loss.between(0, 10).all()


def test_only_methods_with_a_guide_have_norms_and_a_guide(trained):
    rounds = trained[2]
    columns = ["guide", "norm_mean", "norm_sd", "norm_max"]
    assert rounds[rounds.method == "fedgtst"][columns].notna().all(axis=None)
    assert rounds[rounds.method != "fedgtst"][columns].isna().all(axis=None)
    own = rounds[rounds.method == "fedgtst"]
    assert (own.guide == own.norm_max).all()
    assert (own.norm_max >= own.norm_mean).all()
    assert (own.norm_max - own.norm_mean <= own.norm_sd * 2**0.5 + 1e-12).all()  # Samuelson's bound for three numbers


def test_what_is_sent_is_counted_in_bytes(trained):
    runs = trained[1].set_index(["method", "seed"]).xs(10, level="seed")
    assert runs.parameters["fedavg"] == runs.parameters["fedgtst"] == 7358
    assert (runs.weight_bytes == 4 * runs.parameters).all()
    assert runs.bytes_down["fedavg"] == runs.bytes_up["fedavg"] == 4 * 7358
    assert runs.bytes_down["fedgtst"] == runs.bytes_up["fedgtst"] == 4 * 7358 + 8


def test_every_client_has_its_samples(trained):
    clients = trained[3]
    assert (clients.groupby(["seed", "client"]).samples.sum() == 20).all()
    assert (clients[clients.samples > 0].groupby(["seed", "client"]).label.nunique() == 2).all()
    assert len(clients) == 2 * 3 * 10


def test_weights_are_kept_before_along_and_after(trained):
    _, _, _, _, kept = trained
    assert [(each.cell["stack"], each.cell["round"]) for each in kept] == [
        (stack, done) for stack in (1, 2, 3) for done in (0, 3, 4)
    ]
    assert [[run["method"] for run in each.cell["runs"]] for each in kept[::3]] == [
        ["fedavg"] * 2,
        ["fedsr"] * 2,
        ["fedgtst"] * 2,
    ]
    fedavg, fedgtst = kept[0].tensors, kept[6].tensors
    for name, tensor in fedavg.items():
        assert torch.equal(tensor, fedgtst[name])  # methods of a seed start alike
        assert not torch.equal(tensor[0], tensor[1])
    assert not torch.equal(kept[2].tensors["read_out.weight"], kept[8].tensors["read_out.weight"])


def test_a_seed_alone_is_as_it_is_beside_others(trained, data, tmp_path):
    settings = TINY.model_copy(update={"seeds": [11], "methods": ["fedsr", "fedgtst"], "ablation_methods": ["fedsr"]})
    _, rounds, _, kept = train(tmp_path, data, settings)
    whole = trained[2].set_index(["method", "seed"])
    for method in ("fedsr", "fedgtst"):
        own = rounds[rounds.method == method]
        assert own.loss.tolist() == pytest.approx(whole.loss[method, 11].tolist(), rel=1e-4)
    for name, tensor in kept[-1].tensors.items():
        torch.testing.assert_close(tensor[0], trained[4][-1].tensors[name][1], rtol=1e-3, atol=1e-5)


def test_a_killed_job_ends_with_the_same_bits(trained, data, tmp_path, monkeypatch):
    kills = [("fedsr", 1), ("fedgtst", 2)]
    original = Stack.step

    def killed(self, index):
        if kills and (self.runs[0].method, index) == kills[0]:
            kills.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index)

    monkeypatch.setattr(Stack, "step", killed)
    while kills:
        with pytest.raises(SystemExit, match="143"):
            train(tmp_path, data)
        assert list(tmp_path.glob("*.checkpoint.safetensors"))
    train(tmp_path, data)
    names = {path.name for path in trained[0].iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    assert len(names) == 4
    for name in names:
        assert (tmp_path / name).read_bytes() == (trained[0] / name).read_bytes()


def test_a_run_that_runs_away_keeps_its_rows_and_leaves_the_others_alone(trained, data, tmp_path):
    update = {"methods": ["fedgtst"], "ablation_methods": ["fedgtst"], "coefficients": [1e-3, 3.0], "runaway": 20.0}
    runs, rounds, _, kept = train(tmp_path, data, TINY.model_copy(update=update))
    lost = runs[runs.coefficient == 3.0]
    assert set(lost.outcome) <= {"unstable", "diverged"}
    assert "unstable" in set(lost.outcome)
    assert (lost.ended_at == lost.rounds).all()
    assert (lost.ended_at < 4).all()
    for row in lost.itertuples():
        own = rounds[(rounds.coefficient == 3.0) & (rounds.seed == row.seed)]
        assert own["round"].tolist() == list(range(1, row.ended_at + 1))
        (last,) = [
            (each, place)
            for each in kept
            for place, run in enumerate(each.cell["runs"])
            if each.cell["round"] == row.ended_at and (run["seed"], run["coefficient"]) == (row.seed, 3.0)
        ]
        assert all(tensor[last[1]].isfinite().all() for tensor in last[0].tensors.values())
        assert not any(
            (run["seed"], run["coefficient"]) == (row.seed, 3.0)
            for each in kept
            for run in each.cell["runs"]
            if each.cell["round"] > row.ended_at
        )
    good = rounds[rounds.coefficient == 1e-3].sort_values(["seed", "round"])
    whole = trained[2][trained[2].method == "fedgtst"].sort_values(["seed", "round"])
    assert good.loss.tolist() == pytest.approx(whole.loss.tolist(), rel=1e-4)
    assert (runs[runs.coefficient == 1e-3].outcome == "finished").all()


def test_a_stack_goes_on_from_its_state_where_some_runs_have_ended(data):
    update = {"methods": ["fedgtst"], "coefficients": [1e-3, 3.0], "runaway": 20.0, "rounds": 6}
    settings = TINY.model_copy(update=update)
    (inputs,) = load(settings, data)
    first, second = (Stack(settings, runs_of(settings, "fedgtst"), inputs, CPU) for _ in range(2))
    for index in range(4):
        first.step(index)
    assert (first.ended >= 0).any()
    assert (first.ended < 0).any()
    second.load_state(first.state())
    for index in (4, 5):
        for stack in (first, second):
            stack.step(index)
    expected, found = first.state(), second.state()
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_a_stack_without_a_run_that_goes_on_ends(data, tmp_path, caplog):
    update = {"methods": ["fedavg"], "ablation_methods": ["fedavg"], "learning_rate": 1e20, "rounds": 50}
    runs, rounds, _, kept = train(tmp_path, data, TINY.model_copy(update=update))
    assert (runs.outcome == "diverged").all()
    assert (runs.ended_at == 1).all()
    assert (runs.dropped >= 2).all()
    assert rounds["round"].tolist() == [1, 1]
    first, last = kept
    assert (first.cell["round"], last.cell["round"]) == (0, 1)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, last.tensors[name])  # the last finite weights are the initial ones
    assert "client 0 is dropped" in caplog.text


def test_a_checkpoint_of_other_data_is_not_continued_from(data, digits, tmp_path, monkeypatch):
    def stopped(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index)

    original = Stack.step
    with monkeypatch.context() as patch:
        patch.setattr(Stack, "step", stopped)
        with pytest.raises(SystemExit, match="143"):
            train(tmp_path, data)
    started = []
    monkeypatch.setattr(Stack, "step", lambda self, index: (started.append(index), original(self, index))[1])
    monkeypatch.setattr(train_federated, "read", lambda path: type("Other", (), {"digest": "another"}))
    train(tmp_path, data)
    assert started[0] == 0


def test_domains_are_each_left_out_in_turn(tmp_path):
    settings = DomainSettings(
        seeds=[10], methods=["fedavg"], client_samples=6, rounds=1, batch=8, ablation_clients=5,
        ablation_methods=["fedavg"], fine_tuning_epochs=1,
    )  # fmt: skip
    runs, _, clients, kept = train(tmp_path, domain_files(tmp_path), settings, "domains")
    assert runs.target.tolist() == [f"domainnet_{name}" for name in DOMAINS]
    assert (runs.source == "domainnet").all()
    assert (runs.split == "domains").all()
    assert clients.source.unique().tolist() == [f"domainnet without {name}" for name in DOMAINS]
    assert (clients.groupby(["source", "client"]).samples.sum() == 6).all()
    assert len(kept) == 12
    ends = [each.tensors["read_out.bias"] for each in kept if each.cell["round"] == 1]
    assert not torch.equal(ends[0], ends[1])
