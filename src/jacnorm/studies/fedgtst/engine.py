"""Rounds of R federated runs at once: clients and runs batched together by `torch.func.vmap`.

`Engine` does what a server does and keeps the books; subclasses say how the clients' work is computed: `BatchedEngine`
here, client after client in `loop`. The runs of an engine share method, network, number of clients and settings; seeds,
splits and coefficients are their own. Letters: R runs, K clients, k participants, n samples of a client, J pairs of
(run, participant).
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jacnorm.studies.fedgtst import draws as drawing
from jacnorm.studies.fedgtst.algorithm import Tensors, unweighted_mean
from jacnorm.studies.fedgtst.strategies import (
    DIVERGED,
    GOING_ON,
    UNSTABLE,
    Strategy,
    finite,
    payload_bytes,
)

_log = logging.getLogger(__name__)

CHUNK = 32
"""Clients computed at once on a CPU, by default: more gained little and cost memory."""


@dataclass(frozen=True)
class Data:
    """The clients' samples: x (N, 3, h, w) and y (N,) of all, and which are whose, index (R, K, n) int64."""

    x: Tensor
    y: Tensor
    index: Tensor

    def of(self, runs: Tensor | int, clients: Tensor | int) -> tuple[Tensor, Tensor]:
        """Samples of one client of one run, (n, 3, h, w) and (n,); or of J pairs, (J, n, 3, h, w) and (J, n)."""
        samples = self.index[runs, clients]
        return self.x[samples], self.y[samples]


@dataclass(frozen=True)
class RoundReport:
    """What a round did. Numbers of runs that had ended before are NaN, or -1 for participants, or 0 for counts.

    loss: (R,) float64, mean training loss of the participants without penalties. guide: (R,) float64, that of the next
    round. norms: (R, k) float64, as sent; NaN where none was. participants: (R, k) int64. answered: (R, k) bool, false
    for dropped clients. outcome: (R,) int64, GOING_ON, UNSTABLE or DIVERGED after this round. Bytes are those of one
    client, with the weights of one direction beside them.
    """

    loss: Tensor
    guide: Tensor
    norms: Tensor
    participants: Tensor
    answered: Tensor
    outcome: Tensor
    bytes_down: int
    bytes_up: int
    weight_bytes: int

    @property
    def dropped(self) -> Tensor:
        """Participants whose answers were left out, (R,) int64."""
        return ((self.participants >= 0) & ~self.answered).sum(1)


@dataclass(frozen=True)
class Jobs:
    """Pairs of a run that goes on and one of its participants, and what they draw.

    runs and clients: (J,). places: (J,), the run's place among those that go on, which messages are ordered by.
    draws: (J, ...). extra: (J,) bool.
    """

    runs: Tensor
    clients: Tensor
    places: Tensor
    draws: Tensors
    extra: Tensor

    def __len__(self) -> int:
        return len(self.runs)

    def pair(self, job: int) -> tuple[int, int, int]:
        """Run, client and place of one of them."""
        return int(self.runs[job]), int(self.clients[job]), int(self.places[job])

    def to(self, device: torch.device) -> Jobs:
        """The same on a device."""
        draws = {name: each.to(device) for name, each in self.draws.items()}
        return Jobs(self.runs.to(device), self.clients.to(device), self.places.to(device), draws, self.extra.to(device))

    def take(self, which: Tensor | slice) -> Jobs:
        """Some of them."""
        draws = {name: each[which] for name, each in self.draws.items()}
        return Jobs(self.runs[which], self.clients[which], self.places[which], draws, self.extra[which])


def stacked(each: Sequence[Mapping[str, Tensor]]) -> Tensors:
    """Dicts of equal names and shapes as one, along a new first axis."""
    return {name: torch.stack([one[name] for one in each]) for name in each[0]} if each else {}


def taken(tensors: Mapping[str, Tensor], which: Tensor | int | slice) -> Tensors:
    """The entries `which` of each first axis."""
    return {name: tensor[which] for name, tensor in tensors.items()}


class Engine(ABC):
    """R runs of one method.

    strategies and seeds: one for each run. cell: names the split in the streams of `draws`, the same for all methods.
    chunk: pairs computed at once; None for CHUNK on a CPU and all on a GPU.

    Raises ValueError if the numbers of strategies, seeds and splits differ, or the strategies' methods or settings do.
    """

    def __init__(
        self, strategies: Sequence[Strategy], seeds: Sequence[int], cell: str, data: Data, *, chunk: int | None = None
    ) -> None:
        if not len(strategies) == len(seeds) == len(data.index) > 0:
            raise ValueError(
                f"{len(strategies)} strategies, {len(seeds)} seeds and {len(data.index)} splits: give one for each run"
            )
        methods = sorted({each.method for each in strategies})
        if len(methods) > 1:
            raise ValueError(f"the runs of an engine share one method, not {', '.join(methods)}")
        if any(each.settings != strategies[0].settings for each in strategies):
            raise ValueError("the runs of an engine share their settings, but for seeds and coefficients")
        self.strategies, self.seeds, self.cell, self.data = list(strategies), list(seeds), cell, data
        self.clients, self.samples = data.index.shape[1:]
        self.device = data.x.device
        self._chunk = chunk or (CHUNK if self.device.type == "cpu" else None)

    @property
    def one(self) -> Strategy:
        """A strategy for what all runs have in common."""
        return self.strategies[0]

    @torch.no_grad()
    def start(self, weights: Sequence[Mapping[str, Tensor]]) -> tuple[Tensors, Tensors]:
        """Servers (R, ...) and memories (R, K, ...) before round 0, from each run's initial weights.

        FedGTST's clients are asked for their norms here, all of them, which gives the first guide.
        """
        moved = [{name: tensor.to(self.device) for name, tensor in each.items()} for each in weights]
        servers = stacked(
            [strategy.start(each, self.clients) for strategy, each in zip(self.strategies, moved, strict=True)]
        )
        runs = len(self.strategies)
        memories = {
            name: tensor.to(self.device).expand(runs, self.clients, *tensor.shape).clone()
            for name, tensor in self.one.memory().items()
        }
        if self.one.surveys == "first":
            everyone = _pairs(torch.arange(runs), torch.arange(self.clients).expand(runs, -1)).to(self.device)
            servers, _ = self._surveyed(servers, everyone, "at the start")
        return servers, memories

    @torch.no_grad()
    def round(self, servers: Tensors, memories: Tensors, index: int) -> tuple[Tensors, Tensors, RoundReport]:
        """Round `index` (from 0) of all runs that have not ended: new servers and memories, and what happened.

        The tensors handed in are not changed. Clients whose answer is not finite are dropped, each with a line in the
        log; runs whose "outcome" is no longer GOING_ON stay as they are.
        """
        alive = (servers["outcome"] == GOING_ON).nonzero().flatten()
        k = drawing.number_of_participants(self.one.settings, self.clients)
        if not len(alive):
            return servers, memories, self._nothing(servers, k)
        jobs, when = self._drawn(alive.tolist(), index), f"round {index}"
        current, survey_bytes = taken(servers, alive), (0, 0)
        if self.one.surveys == "every":
            current, survey_bytes = self._surveyed(current, jobs, when)
        messages = stacked([self.one.broadcast(taken(current, place)) for place in range(len(alive))])
        own = {name: tensor[jobs.runs, jobs.clients] for name, tensor in memories.items()}
        replies, own = self._train(messages, own, jobs)
        answered = self._answered(replies, jobs, when).view(-1, k)  # (alive, k)
        grouped = {name: tensor.unflatten(0, (-1, k)) for name, tensor in replies.items()}
        after = stacked(
            [
                self.strategies[run].aggregate(taken(current, place), taken(grouped, place), k, answered[place])
                for place, run in enumerate(alive.tolist())
            ]
        )
        report = self._nothing(servers, k)
        report.participants[alive] = jobs.clients.view(-1, k)
        report.answered[alive] = answered
        report.loss[alive] = torch.func.vmap(unweighted_mean)(grouped["metrics.loss"], answered)
        if self.one.guided:
            report.guide[alive] = after["guide"]
            report.norms[alive] = torch.where(answered, grouped["norm"], math.nan)
        report.outcome[alive] = after["outcome"]
        report = replace(
            report,
            bytes_down=survey_bytes[0] + payload_bytes(taken(messages, 0)),
            bytes_up=survey_bytes[1] + payload_bytes(taken(replies, 0)),
            weight_bytes=payload_bytes(self.one.survey_message(taken(current, 0))),
        )
        self._log_ends(report, alive.tolist(), when)
        servers = {name: tensor.index_copy(0, alive, after[name]) for name, tensor in servers.items()}
        memories = {name: tensor.index_put((jobs.runs, jobs.clients), own[name]) for name, tensor in memories.items()}
        return servers, memories, report

    @abstractmethod
    def _survey(self, messages: Tensors, jobs: Jobs) -> Tensors:
        """Answers of all jobs before training, (J, ...); messages: (runs going on, ...)."""

    @abstractmethod
    def _train(self, messages: Tensors, memories: Tensors, jobs: Jobs) -> tuple[Tensors, Tensors]:
        """Replies and new memories of all jobs, (J, ...); messages: (runs going on, ...); memories: (J, ...)."""

    def _surveyed(self, servers: Tensors, jobs: Jobs, when: str) -> tuple[Tensors, tuple[int, int]]:
        """Servers after the exchange before training, and its bytes down and up."""
        runs = len(servers["outcome"])
        messages = stacked([self.one.survey_message(taken(servers, place)) for place in range(runs)])
        replies = self._survey(messages, jobs)
        answered = self._answered(replies, jobs, when).view(runs, -1)
        grouped = {name: tensor.unflatten(0, (runs, -1)) for name, tensor in replies.items()}
        after = [
            self.one.take_survey(taken(servers, place), taken(grouped, place), answered[place]) for place in range(runs)
        ]
        return stacked(after), (payload_bytes(taken(messages, 0)), payload_bytes(taken(replies, 0)))

    def _drawn(self, alive: list[int], index: int) -> Jobs:
        """The jobs of a round; runs of one seed share their draws."""
        settings, width = self.one.settings, self.one.noise_width
        by_seed = {
            seed: drawing.round_draws(settings, self.clients, self.cell, seed, index, self.samples, width)
            for seed in {self.seeds[run] for run in alive}
        }
        drawn = [by_seed[self.seeds[run]] for run in alive]
        jobs = _pairs(torch.tensor(alive), torch.stack([chosen for chosen, _, _ in drawn]))
        k = len(drawn[0][0])
        known = stacked([self.strategies[run].draws(index) for run in alive])
        every = {name: torch.cat([each[name] for _, _, each in drawn]) for name in drawn[0][2]}
        every |= {name: tensor.repeat_interleave(k) for name, tensor in known.items()}
        jobs = replace(jobs, draws=every, extra=torch.cat([extra for _, extra, _ in drawn]))
        return jobs.to(self.device)

    def _answered(self, replies: Tensors, jobs: Jobs, when: str) -> Tensor:
        """Which replies are finite, (J,) bool; a line in the log for each that is not."""
        answered = torch.func.vmap(finite)(replies)
        for job in (~answered).nonzero().flatten().tolist():
            run, client = int(jobs.runs[job]), int(jobs.clients[job])
            _log.warning("%s, %s: client %d is dropped: its answer is not finite", self._named(run), when, client)
        return answered

    def _log_ends(self, report: RoundReport, alive: list[int], when: str) -> None:
        for run in alive:
            name, k = self._named(run), report.answered.shape[1]
            if report.outcome[run] == UNSTABLE:
                guide, limit = float(report.guide[run]), self.one.settings.runaway
                _log.warning("%s, %s: unstable: the guide is %.3g, over %g times its first", name, when, guide, limit)
            elif report.outcome[run] == DIVERGED:
                left = int(report.answered[run].sum())
                _log.warning("%s, %s: diverged: only %d of %d clients answered", name, when, left, k)

    def _named(self, run: int) -> str:
        return f"{self.one.method} {self.strategies[run].coefficient:g}, {self.cell}, seed {self.seeds[run]}"

    def _nothing(self, servers: Tensors, k: int) -> RoundReport:
        """The report of a round in which no run goes on."""
        runs, device = len(self.strategies), self.device
        nan = torch.full((runs,), math.nan, dtype=torch.float64, device=device)
        return RoundReport(
            loss=nan,
            guide=nan.clone(),
            norms=nan[:, None].repeat(1, k),
            participants=torch.full((runs, k), -1, device=device),
            answered=torch.zeros((runs, k), dtype=torch.bool, device=device),
            outcome=servers["outcome"].clone(),
            bytes_down=0,
            bytes_up=0,
            weight_bytes=0,
        )


class BatchedEngine(Engine):
    """Clients of all runs mapped together, `chunk` pairs at a time; the extra training only of those that need it."""

    def _survey(self, messages: Tensors, jobs: Jobs) -> Tensors:
        return self._mapped(lambda message, own, x, y, draws: self.one.survey(message, x, y), messages, {}, jobs)

    def _train(self, messages: Tensors, memories: Tensors, jobs: Jobs) -> tuple[Tensors, Tensors]:
        replies, memories = self._mapped(self.one.client, messages, memories, jobs)
        which = jobs.extra.nonzero().flatten()
        if self.one.extra_training and len(which):
            norms = self._mapped(
                lambda message, own, x, y, draws: {"norm": self.one.extra_norm(message, x, y, draws)},
                messages,
                {},
                jobs.take(which),
            )["norm"]
            replies["norm"] = replies["norm"].index_copy(0, which, torch.maximum(replies["norm"][which], norms))
        return replies, memories

    def _mapped(self, work: Callable[..., Any], messages: Tensors, memories: Tensors, jobs: Jobs) -> Any:
        """`work` (message, memory, x, y, draws) of every job, in chunks, as dicts of (J, ...)."""
        size = self._chunk or len(jobs)
        parts = []
        for start in range(0, len(jobs), size):
            some, own = jobs.take(slice(start, start + size)), taken(memories, slice(start, start + size))
            x, y = self.data.of(some.runs, some.clients)
            parts.append(torch.func.vmap(work)(taken(messages, some.places), own, x, y, some.draws))
        return _joined(parts)


def _joined(parts: Sequence[Any]) -> Any:
    """Dicts, or tuples of dicts, of (J_i, ...) as one of (J, ...)."""
    if isinstance(parts[0], tuple):
        return tuple(_joined(each) for each in zip(*parts, strict=True))
    return {name: torch.cat([one[name] for one in parts]) for name in parts[0]}


def _pairs(runs: Tensor, clients: Tensor) -> Jobs:
    """Jobs without draws; runs: (A,). clients: (A, k)."""
    places = torch.arange(len(runs)).repeat_interleave(clients.shape[1])
    flat = clients.flatten()
    return Jobs(runs[places], flat, places, {}, torch.zeros(len(flat), dtype=torch.bool))
