"""A Flower grid whose clients live in the server's own process: the same apps, without Ray and without a network.

A message reaches its client by a call, one client after another in the order of the messages, so a run repeats bit for
bit. What a client raises comes back as an error message, as it does from a SuperNode.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from jacnorm.studies.fedgtst.algorithm import Tensors
from jacnorm.studies.fedgtst.flower import JacnormStrategy, Outcome, Provider, client_app, server_app
from jacnorm.studies.fedgtst.flower_api import (
    ClientApp,
    Context,
    Error,
    ErrorCode,
    Grid,
    Message,
    RecordDict,
    Run,
    TaskIdentity,
)
from jacnorm.studies.fedgtst.plan import Plan

_RUN, _SERVER, _TASK = 1, 1, 1
SERVER = "server.safetensors"
"""File of the server's state in the folder of a run."""
_FIRST_NODE = 100
"""Number of the first client's node: not a partition's number, which no code may take it for."""


class InProcessGrid(Grid):
    """One client per configuration in `nodes` (`partition-id` and whatever else a SuperNode is configured with)."""

    def __init__(self, app: ClientApp, nodes: Sequence[dict[str, bool | float | int | str | bytes]]) -> None:
        self._app = app
        self._contexts = {
            _FIRST_NODE + number: Context(
                run_id=_RUN, node_id=_FIRST_NODE + number, node_config=dict(node), state=RecordDict(), run_config={}
            )
            for number, node in enumerate(nodes)
        }
        self._replies: dict[str, Message] = {}
        self._sent = 0
        self.set_run(Run.create_empty(_RUN))
        # Flower writes the sender of a message down from here; private, so tied to the release of flwr that is pinned.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN, _SERVER, _TASK

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one client."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Numbers of the clients' nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand each message to its client and keep the answer until `pull_messages` asks for it."""
        names = []
        for message in messages:
            self._sent += 1
            name = f"message {self._sent}"
            self._replies[name] = self._answer(message)
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers to messages pushed before, each given once."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The answers to the messages, in their order; a call cannot run out of time, so `timeout` is of no effect."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            # As a SuperNode words it.
            reason = f"{type(error)}:<'{error}'>"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def run_in_process(
    plan: Plan, samples: Provider, folder: Path, *, on_round: Callable[[int, Tensors], None] | None = None
) -> Outcome:
    """All rounds of a plan with every client in this process; goes on from what `folder` holds of the same plan.

    samples, on_round: as for `client_app` and `JacnormStrategy`, which raises what may go wrong.
    """
    nodes = [{"partition-id": client, "num-partitions": plan.clients} for client in range(plan.clients)]
    grid = InProcessGrid(client_app(samples, folder), nodes)
    with quietly():
        return JacnormStrategy(plan, folder / SERVER, on_round=on_round).run(grid)


def run_simulation(plan: Plan, samples: Provider, folder: Path, *, cpus: int = 2) -> Outcome:
    """The same in Flower's simulation, that is, with clients in processes of Ray, `cpus` of them at a time.

    samples must be something that pickle takes, as must what it holds.
    """
    os.environ.setdefault("FLWR_HOME", str(folder / "flower"))
    from flwr.simulation import run_simulation as simulate

    ends: list[Outcome] = []
    server = server_app(lambda context: JacnormStrategy(plan, folder / SERVER), ends.append)
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": cpus}}
    with quietly():
        simulate(server, client_app(samples, folder.absolute()), plan.clients, backend_config=resources)  # type: ignore[arg-type]
    return ends[0]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without Flower's own lines, but for errors."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
