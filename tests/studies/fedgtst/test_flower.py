"""The apps of Flower: what is agreed on with the engines, who is dropped and why, and what survives a kill."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.studies.fedgtst.tiny_federation import CLIENTS, METHODS, SAMPLES, images, plan, samples

from jacnorm.errors import UserError
from jacnorm.studies.fedgtst.engine import BatchedEngine, Data
from jacnorm.studies.fedgtst.flower import JacnormStrategy, client_app, server_app
from jacnorm.studies.fedgtst.flower_api import (
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    Error,
    ErrorCode,
    Message,
    MetricRecord,
    RecordDict,
)
from jacnorm.studies.fedgtst.in_process import SERVER, InProcessGrid, quietly, run_in_process
from jacnorm.studies.fedgtst.plan import Plan
from jacnorm.studies.fedgtst.strategies import part

ALL = range(CLIENTS)


def nodes(clients=ALL, **more):
    return [{"partition-id": client, **more} for client in clients]


def run(plan: Plan, grid: InProcessGrid, folder: Path, **options):
    with quietly():
        return JacnormStrategy(plan, folder / SERVER, timeout=options.pop("timeout", 0.1), **options).run(grid)


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def nothing_remembered(folder: Path) -> bool:
    return not any(folder.glob("client-*/*"))


@pytest.fixture
def lines(caplog):
    """What is logged, line by line."""
    logger = logging.getLogger("jacnorm")
    propagates, logger.propagate = logger.propagate, True
    caplog.set_level(logging.INFO, "jacnorm")
    yield lambda: [record.getMessage() for record in caplog.records if record.name.endswith("flower")]
    logger.propagate = propagates


# --- a plan ----------------------------------------------------------------------------------------------------------


def test_a_plan_survives_its_text():
    this = plan("fedsr", local_epochs=2)
    assert Plan.of(this.text()) == this
    assert Plan.of(this.text()).text() == this.text()


def test_a_plan_keeps_the_settings_of_training_only():
    from jacnorm.studies.fedgtst.settings import EnginesSettings

    settings = EnginesSettings(seeds=[10, 11], clients=4)
    first, second = (
        Plan(each, 11, "noise", 4, "fedavg", 0.0, "lenet", (3, 8, 8), 10)
        for each in (settings, settings.model_copy(update={"methods": ["fedavg"], "seeds": [11]}))
    )
    assert first == second
    assert first.settings.seeds == [11]


def test_every_part_of_a_plan_counts_in_its_fingerprint():
    prints = {
        plan().fingerprint,
        plan("fedgtst-mean").fingerprint,
        plan(learning_rate=0.02).fingerprint,
        plan(rounds=4).fingerprint,
    }
    assert len(prints) == 4


# --- agreement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_flower_agrees_with_the_batched_engine(method, participation, tmp_path):
    this = plan(method, participation=participation)
    x, y = images()
    engine = BatchedEngine(
        [this.strategy],
        [this.seed],
        this.cell,
        Data(x.flatten(0, 1), y.flatten(), torch.arange(CLIENTS * SAMPLES).view(1, CLIENTS, SAMPLES)),
    )
    servers, memories = engine.start([part("weights", this.start())])
    seen = []
    end = run_in_process(this, samples, tmp_path, on_round=lambda number, server: seen.append(server))
    assert len(seen) == len(end.history) == 3
    for index, (server, row) in enumerate(zip(seen, end.history, strict=True)):
        servers, memories, report = engine.round(servers, memories, index)
        assert server.keys() == servers.keys()
        for name, tensor in server.items():
            torch.testing.assert_close(tensor, servers[name][0], rtol=1e-5, atol=1e-5, equal_nan=True)
        assert row["participants"] == report.participants[0].tolist()
        assert row["loss"] == pytest.approx(float(report.loss[0]), rel=1e-5)
        assert (row["bytes_down"], row["bytes_up"], row["weight_bytes"]) == (
            report.bytes_down,
            report.bytes_up,
            report.weight_bytes,
        )
    assert end.outcome == "finished"


def test_a_client_that_sends_nan_counts_as_in_the_engine(tmp_path, lines):
    this = plan("fedgtst")
    x, y = images()
    x[2] = torch.nan
    engine = BatchedEngine(
        [this.strategy],
        [this.seed],
        this.cell,
        Data(x.flatten(0, 1), y.flatten(), torch.arange(CLIENTS * SAMPLES).view(1, CLIENTS, SAMPLES)),
    )
    servers, memories = engine.start([part("weights", this.start())])
    for index in range(3):
        servers, memories, _ = engine.round(servers, memories, index)
    end = run_in_process(this, lambda plan, client, node: (x[client], y[client]), tmp_path)
    for name, tensor in end.server.items():
        torch.testing.assert_close(tensor, servers[name][0], rtol=1e-5, atol=1e-5)
    dropped = [line for line in lines() if "dropped" in line]
    assert dropped.count("round 2: client 2 is dropped: its answer is not finite") == 1
    assert [row["dropped"] for row in end.history] == [{"2": "its answer is not finite"}] * 3


@pytest.mark.parametrize("method", METHODS)
def test_answers_have_the_form_that_is_expected(method, tmp_path):
    """A client's answer with one tensor less, or another shape, would be told apart."""
    this = plan(method)
    expected = JacnormStrategy(this, tmp_path / SERVER)._expected_reply()
    draws, extra = this.draws(0, 1)
    message = this.strategy.broadcast(this.start() | {"guide": torch.ones((), dtype=torch.float64)})
    reply, _ = this.strategy.client(message, this.strategy.memory(), *samples(this, 1, {}), draws, extra=extra)
    assert {name: (each.shape, each.dtype) for name, each in reply.items()} == {
        name: (each.shape, each.dtype) for name, each in expected.items()
    }


def test_a_run_that_runs_away_ends_early_and_says_so(tmp_path):
    end = run_in_process(plan("fedgtst", runaway=1e-6), samples, tmp_path)
    assert end.outcome == "unstable"
    assert len(end.history) == 1
    again = run_in_process(plan("fedgtst", runaway=1e-6), samples, tmp_path)
    assert again.outcome == "unstable"
    assert again.history == end.history


def test_the_server_app_runs_all_rounds(tmp_path):
    this, ends = plan("fedavg"), []
    app = server_app(lambda context: JacnormStrategy(this, tmp_path / SERVER), ends.append)
    with quietly():
        app(
            InProcessGrid(client_app(samples), nodes()),
            Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}),
        )
    assert len(ends[0].history) == 3


# --- clients that fail -----------------------------------------------------------------------------------------------


class Unreliable(InProcessGrid):
    """Loses the answers of some clients, and may replace others."""

    def __init__(self, app, which, *, silent=(), edit=lambda client, reply: reply):
        super().__init__(app, which)
        self.silent, self.edit = set(silent), edit

    def pull_messages(self, message_ids):
        kept = []
        for reply in super().pull_messages(message_ids):
            client = reply.metadata.src_node_id - 100
            if client in self.silent and reply.metadata.message_type != "query":
                continue
            kept.append(self.edit(client, reply) if reply.metadata.message_type != "query" else reply)
        return kept


def failing(client: int):
    def provider(plan, number, node):
        if number == client:
            raise RuntimeError("out of\nmemory")
        return samples(plan, number, node)

    return provider


@pytest.mark.parametrize("method", ["fedgtst", "fediir", "scaffold"])
def test_the_round_goes_on_without_a_client_that_fails(method, tmp_path, lines):
    grid = InProcessGrid(client_app(failing(1), tmp_path), nodes())
    end = run(plan(method), grid, tmp_path)
    assert end.outcome == "finished"
    assert [row["dropped"] for row in end.history] == [{"1": "RuntimeError: out of memory"}] * 3
    assert "round 3: client 1 is dropped: RuntimeError: out of memory" in lines()
    assert all(tensor.isfinite().all() for tensor in end.server.values())


def test_a_user_error_of_a_client_is_told_in_its_own_words(tmp_path, lines):
    def short(plan, client, node):
        x, y = samples(plan, client, node)
        return (x[:5], y[:5]) if client == 3 else (x, y)

    run(plan("fedavg", rounds=1), InProcessGrid(client_app(short), nodes()), tmp_path)
    (line,) = [line for line in lines() if "dropped" in line]
    assert line.startswith("round 1: client 3 is dropped: client 3 has x (5, 3, 8, 8) torch.float32 and y (5,)")
    assert line.endswith("make the file anew or change the run")


def test_labels_that_are_no_class_are_refused(tmp_path, lines):
    def wrong(plan, client, node):
        x, y = samples(plan, client, node)
        return x, torch.full_like(y, 10) if client == 0 else y

    run(plan("fedavg", rounds=1), InProcessGrid(client_app(wrong), nodes()), tmp_path)
    assert "round 1: client 0 is dropped: client 0 has labels outside 0 .. 9: correct its file" in lines()


def test_the_round_goes_on_without_a_client_that_is_silent(tmp_path, lines):
    grid = Unreliable(client_app(samples, tmp_path), nodes(), silent=[0])
    end = run(plan("scaffold"), grid, tmp_path)
    assert end.outcome == "finished"
    assert "round 1: client 0 is dropped: it did not answer in time" in lines()


def test_a_silent_client_remembers_what_the_server_counted(tmp_path):
    """It did the round, but its answer got lost: what it learnt there must not be used, as in the engine."""

    def lost(client, reply):
        return Message(RecordDict({}), reply_to=reply) if client == 2 and reply.metadata.group_id == "2" else reply

    this = plan("scaffold")
    run(this, Unreliable(client_app(samples, tmp_path / "a"), nodes(), edit=lost), tmp_path / "a")
    app = client_app(failing_in_round(this, 2, 1), tmp_path / "b")
    run(this, InProcessGrid(app, nodes()), tmp_path / "b")
    first, second = (JacnormStrategy(this, tmp_path / each / SERVER)._state for each in "ab")
    assert same(first.server, second.server)
    assert torch.equal(first.counted, second.counted)


def failing_in_round(this, client, index):
    """A provider that fails for one client in one round, told by how often it was asked."""
    asked = []

    def provider(plan, number, node):
        if number == client:
            asked.append(number)
            if len(asked) == index + 1:
                raise RuntimeError("no")
        return samples(plan, number, node)

    return provider


def test_an_answer_of_another_form_is_dropped(tmp_path, lines):
    def cut(client, reply):
        if client != 1:
            return reply
        arrays = dict(reply.content["arrays"].to_torch_state_dict())
        arrays["weights.read_out.bias"] = arrays["weights.read_out.bias"][:3]
        reply.content["arrays"] = ArrayRecord(arrays)
        return reply

    end = run(plan("fedavg"), Unreliable(client_app(samples), nodes(), edit=cut), tmp_path)
    assert end.outcome == "finished"
    assert (
        "round 1: client 1 is dropped: its answer has other tensors than the method sends; "
        "install the server's release of jacnorm there" in lines()
    )


def test_clients_that_never_come_are_named(tmp_path, lines):
    end = run(plan("fedavg"), InProcessGrid(client_app(samples), nodes([0, 1, 2])), tmp_path)
    assert "clients 3 are not connected after 0.1 s" in lines()
    assert "round 1: client 3 is dropped: it is not connected" in lines()
    assert end.outcome == "finished"


def test_too_few_clients_end_with_a_sentence_and_the_rounds_before_are_kept(tmp_path):
    this = plan("scaffold")
    with pytest.raises(UserError, match=r"round 2: 1 of 4 clients answered, but minimum_clients 0\.5 asks for 2: "):
        run(this, InProcessGrid(client_app(breaking(1), tmp_path), nodes()), tmp_path)
    resumed = run(this, InProcessGrid(client_app(samples, tmp_path), nodes()), tmp_path)
    whole = run(this, InProcessGrid(client_app(samples, tmp_path / "whole"), nodes()), tmp_path / "whole")
    assert same(resumed.server, whole.server)
    assert resumed.history == whole.history


def breaking(index):
    """A provider that fails for all clients but one from their round `index` on."""
    asked = [0] * CLIENTS

    def provider(plan, client, node):
        asked[client] += 1
        if client and asked[client] > index:
            raise RuntimeError("no")
        return samples(plan, client, node)

    return provider


# --- nodes -----------------------------------------------------------------------------------------------------------


def test_clients_are_known_by_partition_not_by_node(tmp_path):
    this = plan("scaffold", participation=0.5)
    ends = [
        run(this, InProcessGrid(client_app(samples, tmp_path / str(k)), nodes(order)), tmp_path / str(k))
        for k, order in enumerate(([0, 1, 2, 3], [2, 0, 3, 1]))
    ]
    assert same(ends[0].server, ends[1].server)
    assert ends[0].history == ends[1].history


def test_two_nodes_of_one_client_are_a_mistake(tmp_path):
    with pytest.raises(UserError, match=r"two nodes say that they are client 1: give each a partition-id of its own"):
        run(plan(), InProcessGrid(client_app(samples), nodes([0, 1, 1])), tmp_path)


def test_nodes_that_are_no_client_of_the_run_are_left_alone(tmp_path, lines):
    which = [*nodes(), {"partition-id": 4}, {"name": "x"}]
    end = run(plan("fedavg"), InProcessGrid(client_app(samples), which), tmp_path)
    assert end.history[0]["dropped"] == {}
    said = [line for line in lines() if "left alone" in line]
    assert said[0] == "node 104 is left alone: it is client 4, but this run has clients 0 .. 3"
    assert said[1].startswith("node 105 is left alone: this node has no partition-id: start it with --node-config")
    assert len(said) == 2


def test_a_client_that_was_started_anew_is_found_again(tmp_path):
    """Its old node is still listed, as after a crash; the new one is asked."""
    this = plan("scaffold")

    class Restarted(InProcessGrid):
        late = False

        def get_node_ids(self):
            return [node for node in super().get_node_ids() if self.late or node < 100 + CLIENTS]

    grid = Restarted(client_app(samples, tmp_path), nodes([0, 1, 2, 3, 1]))
    asked = []
    push = grid.push_messages

    def watched(messages):
        messages = list(messages)
        asked.append([message.metadata.dst_node_id for message in messages])
        return push(messages)

    grid.push_messages = watched
    end = run(this, grid, tmp_path, on_round=lambda number, server: setattr(grid, "late", True))
    everyone, moved = [100, 101, 102, 103], [100, 104, 102, 103]
    assert [each for each in asked if each] == [everyone, everyone, [104], moved, moved]
    whole = run(this, InProcessGrid(client_app(samples, tmp_path / "b"), nodes()), tmp_path / "b")
    assert same(end.server, whole.server)


def test_a_node_that_was_out_of_reach_is_asked_again(tmp_path, lines):
    class Late(InProcessGrid):
        lost = 0

        def pull_messages(self, message_ids):
            for reply in super().pull_messages(message_ids):
                if reply.metadata.message_type == "query" and reply.metadata.src_node_id == 102 and self.lost < 2:
                    self.lost += 1
                    reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=reply)
                    reply.metadata.__dict__["_src_node_id"] = 102
                yield reply

    end = run(plan("fedavg"), Late(client_app(samples), nodes()), tmp_path, timeout=5.0)
    assert [row["dropped"] for row in end.history] == [{}] * 3
    assert not [line for line in lines() if "left alone" in line]


# --- what clients remember -------------------------------------------------------------------------------------------


def test_a_method_that_remembers_needs_a_folder(tmp_path, lines):
    with pytest.raises(UserError, match="0 of 4 clients answered"):
        run(plan("scaffold"), InProcessGrid(client_app(samples), nodes()), tmp_path)
    assert (
        "round 1: client 0 is dropped: scaffold remembers things between rounds, but client 0 has no folder for them: "
        "add state='FOLDER' to its --node-config" in lines()
    )


def test_the_folder_of_a_node_comes_first(tmp_path):
    this = plan("fedsr", rounds=1)
    grid = InProcessGrid(client_app(samples, tmp_path / "common"), nodes(state=str(tmp_path / "own")))
    run(this, grid, tmp_path)
    assert nothing_remembered(tmp_path / "common")
    assert len(list((tmp_path / "own").glob("client-*/*-0.safetensors"))) == CLIENTS


def test_methods_that_remember_nothing_write_nothing(tmp_path):
    run_in_process(plan("fedgtst"), samples, tmp_path)
    assert nothing_remembered(tmp_path)


def test_a_client_keeps_two_rounds(tmp_path):
    this = plan("fedsr", rounds=4)
    run_in_process(this, samples, tmp_path)
    kept = sorted(path.name.rpartition("-")[2] for path in (tmp_path / "client-1").iterdir())
    assert kept == ["2.safetensors", "3.safetensors"]


def test_a_client_that_forgot_says_so(tmp_path, lines):
    this = plan("fedsr")

    def forget(number, server):
        for path in (tmp_path / "client-1").glob("*"):
            path.unlink()

    run(this, InProcessGrid(client_app(samples, tmp_path), nodes()), tmp_path, on_round=forget)
    assert (
        "round 2: client 1 is dropped: client 1 does not remember round 0, which fedsr needs: start the run anew, or "
        "this node with the `state` folder that it had then" in lines()
    )


# --- going on --------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from jacnorm.studies.fedgtst import flower
from jacnorm.studies.fedgtst.in_process import run_in_process
from tests.studies.fedgtst.tiny_federation import plan, samples

folder, when = Path(sys.argv[1]), sys.argv[2]
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
if when == "before the round is written":
    write = flower.JacnormStrategy._save
    flower.JacnormStrategy._save = lambda self: kill() if self._state.done == 2 else write(self)
run_in_process(plan("scaffold"), samples, folder, on_round=lambda number, server: kill() if number == 2 else None)
"""


@pytest.mark.parametrize("when", ["after the round is written", "before the round is written"])
def test_a_killed_server_goes_on_with_the_same_bits(when, tmp_path, lines):
    this = plan("scaffold")
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed"), when], env=environment, timeout=300, check=False
    )
    assert done.returncode == -signal.SIGKILL
    resumed = run_in_process(this, samples, tmp_path / "killed")
    assert f"going on after round {2 if when.startswith('after') else 1} of 3" in lines()
    whole = run_in_process(this, samples, tmp_path / "whole")
    assert same(resumed.server, whole.server)
    assert resumed.history == whole.history
    assert resumed.outcome == "finished"


def test_a_finished_run_is_not_done_again(tmp_path):
    first = run_in_process(plan("fedavg"), samples, tmp_path)
    again = JacnormStrategy(plan("fedavg"), tmp_path / SERVER).run(InProcessGrid(ClientApp(), []))
    assert same(first.server, again.server)


def test_another_plan_starts_from_the_beginning(tmp_path):
    run_in_process(plan("fedavg"), samples, tmp_path)
    end = run_in_process(plan("fedavg", learning_rate=0.02), samples, tmp_path)
    whole = run_in_process(plan("fedavg", learning_rate=0.02), samples, tmp_path / "whole")
    assert same(end.server, whole.server)


def test_scalars_travel_as_float64(tmp_path):
    """So that what the engines count, eight bytes, is what is sent."""
    this = plan("fedgtst")
    sent = []

    class Watched(InProcessGrid):
        def push_messages(self, messages):
            messages = list(messages)
            sent.extend(message.content for message in messages if message.metadata.message_type == "train")
            return super().push_messages(messages)

    run(this, Watched(client_app(samples), nodes()), tmp_path)
    arrays = sent[0]["arrays"]
    assert arrays["guide"].dtype == "float64"
    assert arrays["guide"].shape == ()
    assert isinstance(sent[0]["config"], ConfigRecord)
    assert sent[0]["metrics"] == MetricRecord({})
