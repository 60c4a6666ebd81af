"""The study's methods on Flower: a ClientApp and a strategy of its ServerApp over the same functions as the engines.

Server and clients send each other the tensors of `strategies`, as arrays of a record "arrays"; the plan of the run, the
number of the round and what the server counted travel beside them. A client is known by its partition, never by the
random number of its node, and answers are summed in the order of partitions, so a run repeats bit for bit wherever
the clients are. Each finished round is in a file, from which a server that was killed goes on.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.errors import UserError
from jacnorm.files import load_tensors, save_tensors
from jacnorm.studies.fedgtst.algorithm import Tensors
from jacnorm.studies.fedgtst.flower_api import (
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    ErrorCode,
    Grid,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
    ServerApp,
    Strategy,
)
from jacnorm.studies.fedgtst.plan import Plan
from jacnorm.studies.fedgtst.strategies import GOING_ON, OUTCOMES, finite, part, payload_bytes, prefixed
from jacnorm.training import checkpoint
from jacnorm.training.checkpoint import Checkpoint
from jacnorm.training.devices import one_thread

SURVEY = f"{MessageType.TRAIN}.survey"
NEVER = -1
"""Where a round's number stands: no round."""
METRICS = "metrics."
ROSTER_SECONDS = 120.0
"""How long a new node may take, at most, to say which client it is; a node that is gone never says."""
_log = logging.getLogger(__name__)

NodeConfig = Mapping[str, bool | float | int | str | bytes]
Provider = Callable[[Plan, int, NodeConfig], tuple[Tensor, Tensor]]
"""(plan, client, configuration of its node) -> its samples, x (n, 3, h, w) float32 and y (n,) int64."""


# --- what travels ----------------------------------------------------------------------------------------------------


def _records(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> RecordDict:
    """A message's content. What is for the record only goes apart from the method's traffic."""
    arrays = {name: tensor for name, tensor in tensors.items() if not name.startswith(METRICS)}
    metrics = {name: tensor.item() for name, tensor in tensors.items() if name.startswith(METRICS)}
    return RecordDict(
        {"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics), "config": ConfigRecord(dict(config))}
    )


def _tensors(content: RecordDict) -> Tensors:
    metrics = {name: torch.tensor(float(value), dtype=torch.float64) for name, value in content["metrics"].items()}  # type: ignore[arg-type]
    return dict(content["arrays"].to_torch_state_dict()) | metrics


# --- client ----------------------------------------------------------------------------------------------------------


def client_app(samples: Provider, folder: Path | None = None) -> ClientApp:
    """The app of every client.

    samples: gives a client's own. folder: where clients keep what their method remembers between rounds, unless their
    node's configuration says `state`.
    """
    app = ClientApp()

    @app.query()
    def partition(message: Message, context: Context) -> Message:
        """Which client this node runs."""
        return Message(_records({}, {"partition": _partition(context)}), reply_to=message)

    @app.train("survey")
    def survey(message: Message, context: Context) -> Message:
        """The method's question before training."""
        this = _Call(message, context, samples, folder)
        return this.reply(this.plan.strategy.survey(this.tensors, *this.samples()))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """The client's part of one round."""
        this = _Call(message, context, samples, folder)
        draws, extra = this.plan.draws(this.index, this.client)
        memory = this.memory()
        reply, new = this.plan.strategy.client(this.tensors, memory, *this.samples(), draws, extra=extra)
        this.remember(new)
        return this.reply(reply)

    return app


def _partition(context: Context) -> int:
    if "partition-id" not in context.node_config:
        raise UserError("this node has no partition-id: start it with --node-config 'partition-id=0 num-partitions=2'")
    return int(context.node_config["partition-id"])


class _Call:
    """One message at its client."""

    def __init__(self, message: Message, context: Context, samples: Provider, folder: Path | None) -> None:
        one_thread()
        config = message.content["config"]
        self.plan = Plan.of(str(config["plan"]))
        self.index, self._counted, self._run = int(config["round"]), int(config["counted"]), str(config["run"])  # type: ignore[arg-type]
        self.client, self.tensors = _partition(context), _tensors(message.content)
        self._message, self._provider, self._node = message, samples, context.node_config
        state = context.node_config.get("state")
        self._folder = Path(str(state)) if state else folder

    def samples(self) -> tuple[Tensor, Tensor]:
        """The client's samples. Raises UserError if they do not fit the plan."""
        x, y = self._provider(self.plan, self.client, self._node)
        wanted = (self.plan.samples, *self.plan.shape)
        if x.shape != wanted or y.shape != wanted[:1] or x.dtype != torch.float32 or y.dtype != torch.int64:
            raise UserError(
                f"client {self.client} has x {tuple(x.shape)} {x.dtype} and y {tuple(y.shape)} {y.dtype}, but the run "
                f"wants x {wanted} torch.float32 and y {wanted[:1]} torch.int64: make the file anew or change the run"
            )
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.plan.classes:
            raise UserError(f"client {self.client} has labels outside 0 .. {self.plan.classes - 1}: correct its file")
        return x, y

    def memory(self) -> Tensors:
        """What the method remembers since the last round of this client that the server counted."""
        initial = self.plan.strategy.memory()
        if not initial or self._counted == NEVER:
            return initial
        path = self._file(self._counted)
        if not path.is_file():
            raise UserError(
                f"client {self.client} does not remember round {self._counted}, which {self.plan.method} needs: start "
                "the run anew, or this node with the `state` folder that it had then"
            )
        return load_tensors(path)[0]

    def remember(self, memory: Tensors) -> None:
        """Keep the memory after this round, beside the one before it: the server may not count this round."""
        if not memory:
            return
        save_tensors(self._file(self.index), memory)
        kept = {self._file(self.index), self._file(self._counted)}
        for old in self._file(0).parent.glob(f"{self._run}-*.safetensors"):
            if old not in kept:
                old.unlink()

    def reply(self, tensors: Tensors) -> Message:
        """The client's answer."""
        return Message(_records(tensors, {"partition": self.client}), reply_to=self._message)

    def _file(self, index: int) -> Path:
        if self._folder is None:
            raise UserError(
                f"{self.plan.method} remembers things between rounds, but client {self.client} has no folder for them: "
                "add state='FOLDER' to its --node-config"
            )
        return self._folder / f"client-{self.client}" / f"{self._run}-{index}.safetensors"


# --- server ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """A run's end: the server's state, one entry per round, and what came of it, a word of `OUTCOMES`."""

    server: Tensors
    history: list[dict[str, Any]]
    outcome: str


@dataclass
class _State:
    """What a server must not forget. counted: (K,), the last round of each client that it counted, or NEVER."""

    server: Tensors
    counted: Tensor
    done: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


class _Ended(Exception):
    """The run is over before its last round."""


class _Roster:
    """Which node runs which client. Nodes may come and go, and come back under another number."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._partitions: dict[int, int] = {}
        self._useless: set[int] = set()

    def update(self, grid: Grid, timeout: float) -> dict[int, int]:
        """Nodes by the numbers of their clients; asks nodes that are new.

        Raises UserError if two of them are the same client.
        """
        timeout = min(timeout, ROSTER_SECONDS)
        present = set(grid.get_node_ids())
        self._partitions = {node: client for node, client in self._partitions.items() if node in present}
        new = sorted(present - self._partitions.keys() - self._useless)
        asked = [Message(_records({}, {}), dst_node_id=node, message_type=MessageType.QUERY) for node in new]
        found: dict[int, int] = {}
        for reply in list(grid.send_and_receive(asked, timeout=timeout)) if asked else ():
            node = reply.metadata.src_node_id
            if reply.has_error():
                # Other errors are the connection's: the node is asked again in the next round.
                if reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
                    self._reject(node, _reason(reply))
                continue
            client = int(reply.content["config"]["partition"])
            if client in found.values():
                raise UserError(f"two nodes say that they are client {client}: give each a partition-id of its own")
            if not 0 <= client < self._plan.clients:
                self._reject(node, f"it is client {client}, but this run has clients 0 .. {self._plan.clients - 1}")
                continue
            found[node] = client
        # A client whose node was started anew is found twice for a while: its new node counts.
        replaced = {node for node, client in self._partitions.items() if client in found.values()}
        self._useless |= replaced
        self._partitions = {node: client for node, client in self._partitions.items() if node not in replaced} | found
        return {client: node for node, client in self._partitions.items()}

    def _reject(self, node: int, reason: str) -> None:
        self._useless.add(node)
        _log.warning("node %d is left alone: %s", node, reason)


def _reason(reply: Message) -> str:
    """What a client's error says, in one line."""
    text = " ".join(str(reply.error.reason or f"error {reply.error.code}").split())
    raised = re.fullmatch(r"<class '(?:[\w.]*\.)?(\w+)'>:<'(.*)'>", text)
    if not raised:
        return text
    kind, said = raised.groups()
    return said if kind == UserError.__name__ else f"{kind}: {said}"


class JacnormStrategy(Strategy):
    """Flower's strategy of a plan.

    path: file of the server's state, written after each round; a run of the same plan goes on from it. timeout: seconds
    until clients that have not answered are dropped for the round. on_round: called with the number of each round that
    is done and the server's state after it.
    """

    def __init__(
        self,
        plan: Plan,
        path: Path,
        *,
        timeout: float = 3600.0,
        on_round: Callable[[int, Tensors], None] | None = None,
    ) -> None:
        self.plan, self._path, self._timeout, self._on_round = plan, path, timeout, on_round
        self._fingerprint = plan.fingerprint
        self._state = self._resumed() or _State(plan.start(), torch.full((plan.clients,), NEVER))
        self._roster = _Roster(plan)
        self._asked: list[int] = []
        self._nodes: dict[int, int] = {}
        self._message: Tensors = {}
        self._traffic = (0, 0)

    def run(self, grid: Grid) -> Outcome:
        """All rounds that are left.

        Raises UserError if fewer clients answer in a round than the settings' minimum_clients; the rounds before it
        are kept.
        """
        left = self.plan.settings.rounds - self._state.done
        if self._state.done:
            _log.info("going on after round %d of %d", self._state.done, self.plan.settings.rounds)
        if left > 0 and self._going_on:
            self._wait(grid)
            weights = ArrayRecord(part("weights", self._state.server))
            with contextlib.suppress(_Ended):
                self.start(grid, weights, num_rounds=left, timeout=self._timeout)
        outcome = OUTCOMES[int(self._state.server["outcome"])]
        return Outcome(self._state.server, self._state.history, outcome)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to the round's participants, after the method's survey if it has one.

        Flower counts the rounds of this process from 1; `arrays` and `config` are not used: the server's state is more
        than weights.
        """
        index, strategy = self._state.done, self.plan.strategy
        self._nodes = self._roster.update(grid, self._timeout)
        self._asked = self.plan.participants(index)
        self._traffic = (0, 0)
        if strategy.surveys == "every" or (strategy.surveys == "first" and index == 0):
            self._survey(grid, self._asked if strategy.surveys == "every" else list(range(self.plan.clients)))
        self._message = strategy.broadcast(self._state.server)
        return self._messages(self._asked, MessageType.TRAIN, self._message)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new global weights, and the round's loss and guide."""
        state, strategy = self._state, self.plan.strategy
        tensors, answered, dropped = self._collect(replies, self._asked, self._expected_reply())
        server = strategy.aggregate(state.server, tensors, len(self._asked), answered)
        counted = state.counted.clone()
        counted[torch.tensor(self._asked)[answered]] = state.done
        losses, norms = tensors["metrics.loss"], tensors.get("norm")
        row = {
            "round": state.done + 1,
            "loss": float(losses[answered].mean()),
            "guide": float(server["guide"]) if strategy.guided else None,
            "norms": None if norms is None else norms[answered].tolist(),
            "participants": self._asked,
            "dropped": dropped,
            "bytes_down": self._traffic[0] + payload_bytes(self._message),
            "bytes_up": self._traffic[1] + payload_bytes({name: each[0] for name, each in tensors.items()}),
            "weight_bytes": payload_bytes(prefixed("weights", part("weights", self._message))),
        }
        self._state = _State(server, counted, state.done + 1, [*state.history, row])
        self._save()
        if self._on_round:
            self._on_round(self._state.done, server)
        if not self._going_on:
            raise _Ended
        metrics = {name: row[name] for name in ("loss", "guide") if row[name] is not None}
        return ArrayRecord(part("weights", server)), MetricRecord(metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No messages: what a run is worth is measured afterwards, on the target."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, as no client is asked."""
        return None

    def summary(self) -> None:
        """Log what runs."""
        plan = self.plan
        _log.info(
            "%s (coefficient %g) with %d clients, seed %d, %d rounds",
            plan.method, plan.coefficient, plan.clients, plan.seed, plan.settings.rounds,
        )  # fmt: skip

    @property
    def _going_on(self) -> bool:
        return int(self._state.server["outcome"]) == GOING_ON

    def _wait(self, grid: Grid) -> None:
        """Until all clients are there; after the timeout the rounds go on without those that are not."""
        end = time.monotonic() + self._timeout
        while len(found := self._roster.update(grid, self._timeout)) < self.plan.clients:
            if time.monotonic() >= end:
                missing = [str(client) for client in range(self.plan.clients) if client not in found]
                _log.warning("clients %s are not connected after %g s", ", ".join(missing), self._timeout)
                return
            time.sleep(min(1.0, self._timeout))

    def _survey(self, grid: Grid, asked: list[int]) -> None:
        strategy, server = self.plan.strategy, self._state.server
        message = prefixed("weights", part("weights", server))
        replies = grid.send_and_receive(self._messages(asked, SURVEY, message), timeout=self._timeout)
        expected = {"norm": torch.zeros((), dtype=torch.float64)}
        if not strategy.guided:
            expected = prefixed("head", part("mean_head", server))
        tensors, answered, _ = self._collect(replies, asked, expected)
        self._state.server = strategy.take_survey(server, tensors, answered)
        if strategy.surveys == "every":  # one that comes once is no part of a round's traffic
            self._traffic = payload_bytes(message), payload_bytes(expected)

    def _expected_reply(self) -> Tensors:
        """Tensors of the names, shapes and kinds that an answer has."""
        server = self._state.server
        scalar = torch.zeros((), dtype=torch.float64)
        like = {name: each for name, each in server.items() if name.startswith(("weights.", "control."))}
        return like | ({"norm": scalar} if self.plan.strategy.guided else {}) | {"metrics.loss": scalar}

    def _messages(self, asked: Collection[int], kind: str, tensors: Tensors) -> list[Message]:
        common = {"plan": self.plan.text(), "run": self._fingerprint, "round": self._state.done}
        return [
            Message(
                _records(tensors, common | {"counted": int(self._state.counted[client])}),
                dst_node_id=self._nodes[client],
                message_type=kind,
                ttl=self._timeout,
                group_id=str(self._state.done + 1),
            )
            for client in asked
            if client in self._nodes
        ]

    def _collect(
        self, replies: Iterable[Message], asked: list[int], expected: Tensors
    ) -> tuple[Tensors, Tensor, dict[str, str]]:
        """Answers stacked in the order of `asked` (k, ...), which of them count (k,), and why the others do not.

        Raises UserError if too few do.
        """
        by_node = {reply.metadata.src_node_id: reply for reply in replies}
        good: dict[int, Tensors] = {}
        dropped: dict[str, str] = {}
        for client in asked:
            reason = _fault(client, self._nodes, by_node, expected, good)
            if reason:
                dropped[str(client)] = reason
                _log.warning("round %d: client %d is dropped: %s", self._state.done + 1, client, reason)
        needed = self.plan.needed(len(asked))
        if len(good) < needed:
            raise UserError(
                f"round {self._state.done + 1}: {len(good)} of {len(asked)} clients answered, but minimum_clients "
                f"{self.plan.settings.minimum_clients:g} asks for {needed}: see to the clients named above, then start "
                "the run again, which goes on from the last round that was done"
            )
        absent = {name: torch.zeros_like(each) for name, each in expected.items()}
        rows = [good.get(client, absent) for client in asked]
        answered = torch.tensor([client in good for client in asked])
        return {name: torch.stack([row[name] for row in rows]) for name in expected}, answered, dropped

    def _save(self) -> None:
        tensors = checkpoint.pack(server=self._state.server, own={"counted": self._state.counted})
        record = {"round": self._state.done, "history": self._state.history}
        checkpoint.save(self._path, Checkpoint(tensors, record), self._fingerprint)

    def _resumed(self) -> _State | None:
        checkpoint.sweep(self._path)
        found = checkpoint.load(self._path, self._fingerprint)
        if found is None:
            return None
        server, own = (checkpoint.unpack(found.tensors, group) for group in ("server", "own"))
        return _State(server, own["counted"], found.record["round"], found.record["history"])


def _fault(
    client: int, nodes: Mapping[int, int], replies: Mapping[int, Message], expected: Tensors, good: dict[int, Tensors]
) -> str:
    """Why a client's answer does not count; "" if it does, and it is then put into `good`."""
    if client not in nodes:
        return "it is not connected"
    if nodes[client] not in replies:
        return "it did not answer in time"
    reply = replies[nodes[client]]
    if reply.has_error():
        return _reason(reply)
    whole = {"arrays", "metrics"} <= set(reply.content)
    tensors = _tensors(reply.content) if whole else {}
    if _forms(tensors) != _forms(expected):
        return "its answer has other tensors than the method sends; install the server's release of jacnorm there"
    if not finite(tensors):
        return "its answer is not finite"
    good[client] = {name: tensors[name] for name in expected}
    return ""


def _forms(tensors: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (each.shape, each.dtype) for name, each in tensors.items()}


def server_app(strategy: Callable[[Context], JacnormStrategy], done: Callable[[Outcome], None]) -> ServerApp:
    """The app of a server. strategy: made from its context, once it runs. done: handed the run's end."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        """Run all rounds."""
        one_thread()
        done(strategy(context).run(grid))

    return app
