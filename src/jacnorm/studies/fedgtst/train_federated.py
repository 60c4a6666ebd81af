"""Federated training on the source: the coefficients and seeds of one method and condition train as one stack.

Kept are the server's weights before the first round, after every `measure_every` rounds, and after a run's last one.
A run ends early if its guide runs away (unstable) or too few of its clients answer with finite numbers (diverged); its
last weights are then those of the last round that changed them, which are finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.code_version import code_version
from jacnorm.data.read import read
from jacnorm.studies.fedgtst import tables as study_tables
from jacnorm.studies.fedgtst.cells import Condition, Run, client_rows, grid, network_of
from jacnorm.studies.fedgtst.draws import initial_weights
from jacnorm.studies.fedgtst.engine import BatchedEngine, Data, RoundReport
from jacnorm.studies.fedgtst.inputs import STUDY, Inputs, load
from jacnorm.studies.fedgtst.settings import Device, DomainSettings, FederatedSettings, ImageSettings
from jacnorm.studies.fedgtst.splits import client_rows as split_rows
from jacnorm.studies.fedgtst.strategies import GOING_ON, OUTCOMES, part, strategy
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.checkpoint import fingerprint, pack, unpack
from jacnorm.training.job import Job, job
from jacnorm.training.loop import FitReport, discard, fit
from jacnorm.training.snapshots import Snapshot

Row = dict[str, Any]


def federated(
    settings: FederatedSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto"
) -> None:
    """Train every method on the source's clients; keep the server's weights along the way."""
    _train(settings, "federated", "federated", tables, data, weights, device)


def images(settings: ImageSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto") -> None:
    """Train every method on the clients of CIFAR-10; keep the server's weights along the way."""
    _train(settings, "images", "image", tables, data, weights, device)


def domains(settings: DomainSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto") -> None:
    """Train every method on five domains, for each choice of them; keep the server's weights along the way."""
    _train(settings, "domains", "domain", tables, data, weights, device)


def _train(
    settings: FederatedSettings,
    command: str,
    prefix: str,
    tables: Path,
    data: Sequence[Path],
    weights: Path,
    device: Device,
) -> None:
    with job(STUDY, "train", command, settings, device) as this:
        rows: dict[str, list[Row]] = {"runs": [], "rounds": [], "clients": []}
        kept: list[Snapshot] = []
        checkpoints: list[Path] = []
        digests = sorted(read(path).digest for path in data)
        for inputs in load(settings, data):
            stacks = grid(settings, inputs.source, inputs.target)
            for runs in stacks:
                stack = Stack(settings, runs, inputs, this.device)
                number = len(checkpoints) + 1
                checkpoints.append(weights.with_name(f"{weights.stem}-stack{number}.checkpoint.safetensors"))
                report = _fit(settings, stack, digests, checkpoints[-1], this)
                rows["runs"] += stack.run_rows(report)
                rows["rounds"] += stack.round_rows(report)
                kept += stack.snapshots(number)
            rows["clients"] += _client_rows(settings, stacks, inputs)
        for name, table in rows.items():
            study_tables.write(tables, f"{prefix}_{name}", settings, table, this.tracker)
        snapshot_files.save(weights, kept)
        for checkpoint in checkpoints:
            discard(checkpoint)


def _fit(settings: FederatedSettings, stack: Stack, digests: Sequence[str], checkpoint: Path, this: Job) -> FitReport:
    return fit(
        stack,
        steps=settings.rounds,
        checkpoint=checkpoint,
        runs=[run.id for run in stack.runs],
        fingerprint=fingerprint(
            [settings.model_dump(), *digests, this.device.type],
            code_version(f"jacnorm.studies.{STUDY}.train_federated"),
        ),
        on_divergence="record",
        check_every=settings.measure_every,
        tracker=this.tracker,
        label=stack.label,
    )


def clients_data(settings: FederatedSettings, runs: Sequence[Run], inputs: Inputs, device: torch.device) -> Data:
    """The samples that the clients of some run hold, and which are whose."""
    seeds = {run.seed: client_rows(settings, run.condition, run.seed, inputs) for run in runs}
    rows = torch.stack([seeds[run.seed] for run in runs])  # (R, K, n)
    used, index = rows.unique(return_inverse=True)
    samples = inputs.source_train
    return Data(samples.take(used).to(device), samples.y[used].to(device), index.to(device))


class Stack:
    """R federated trainings of one condition and method, a round a step: a `jacnorm.training.loop.Trainee`."""

    def __init__(self, settings: FederatedSettings, runs: Sequence[Run], inputs: Inputs, device: torch.device) -> None:
        """Draw splits and initial weights, and ask the clients what the method wants to know before the first round."""
        self.generators: dict[str, torch.Generator] = {}
        self.runs, self._settings = list(runs), settings
        condition, method = runs[0].condition, runs[0].method
        self.label = f"{condition.target}, {condition.network}, {condition.clients} clients, {method}"
        own, network = condition.settings(settings), network_of(runs[0], inputs)
        self._size = network.size
        self._engine = BatchedEngine(
            [strategy(method, run.coefficient, own, network) for run in runs],
            [run.seed for run in runs],
            condition.draws,
            clients_data(settings, runs, inputs, device),
        )
        drawn = [initial_weights(network, inputs.source, run.seed) for run in runs]
        self._servers, self._memories = self._engine.start(drawn)
        self._traffic = torch.zeros(3, dtype=torch.int64)
        self.ended = torch.full((len(runs),), -1)
        """Round at which each run became unstable or diverged, (R,); -1: it has not."""
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._keep(0, torch.ones(len(runs), dtype=torch.bool))

    def step(self, index: int) -> dict[str, Tensor]:
        """One round of the runs that go on; the metric "loss" is infinite for a run that has ended."""
        before = self._going_on
        self._servers, self._memories, report = self._engine.round(self._servers, self._memories, index)
        if before.any():
            self._traffic = torch.tensor([report.bytes_down, report.bytes_up, report.weight_bytes])
        done, ending = index + 1, before & ~self._going_on
        self.ended[ending] = done
        due = done % self._settings.measure_every == 0 or done == self._settings.rounds
        self._keep(done, ending | self._going_on if due else ending)
        return _metrics(report)

    @property
    def _going_on(self) -> Tensor:
        """(R,) bool."""
        return (self._servers["outcome"] == GOING_ON).cpu()

    @property
    def _outcomes(self) -> list[str]:
        return [OUTCOMES[number] for number in self._servers["outcome"].tolist()]

    def _keep(self, done: int, chosen: Tensor) -> None:
        if chosen.any():
            rows = chosen.nonzero().flatten()
            weights = part("weights", self._servers)
            self._kept[done] = {**{name: each.cpu()[rows] for name, each in weights.items()}, _ROWS: rows}

    def finished(self) -> bool:
        """Whether no run goes on."""
        return not self._going_on.any()

    def snapshots(self, number: int) -> Iterator[Snapshot]:
        """What was kept, in the order of rounds.

        The cell names the `number` of the stack, the rounds made, and the runs whose weights these are, as columns of
        the tables.
        """
        for done, tensors in sorted(self._kept.items()):
            columns = [self.runs[row].columns for row in tensors[_ROWS].tolist()]
            # In the network's order, which a checkpoint does not keep.
            weights = {name: tensors[name] for name in part("weights", self._servers)}
            yield Snapshot({"stack": number, "round": done, "runs": columns}, weights)

    def run_rows(self, report: FitReport) -> Iterator[Row]:
        """A row of the table of runs for each run."""
        dropped = report.history["dropped"].nan_to_num().sum(0).tolist()
        down, up, of_weights = self._traffic.tolist()
        for place, run in enumerate(self.runs):
            yield {
                **run.columns,
                "parameters": self._size,
                "rounds": self._made(place),
                "outcome": self._outcomes[place],
                "ended_at": self.ended[place].item(),
                "dropped": int(dropped[place]),
                "bytes_down": down,
                "bytes_up": up,
                "weight_bytes": of_weights,
            }

    def round_rows(self, report: FitReport) -> Iterator[Row]:
        """A row of the table of rounds for each run and round that it made."""
        history = {name: report.history[name].double() for name in _METRICS}
        for place, run in enumerate(self.runs):
            values = {name: each[:, place].tolist() for name, each in history.items()}
            for done in range(1, self._made(place) + 1):
                own = {column: values[name][done - 1] for name, column in _METRICS.items()}
                yield {**run.columns, "round": done, **own, "participants": int(own["participants"])}

    def _made(self, place: int) -> int:
        ended = int(self.ended[place])
        return self._settings.rounds if ended < 0 else ended

    def state(self) -> dict[str, Tensor]:
        """Servers, what clients keep, when runs ended, bytes sent, and the weights that were kept."""
        kept = {f"kept {done}": tensors for done, tensors in self._kept.items()}
        own = {"ended": self.ended, "traffic": self._traffic}
        return pack(server=self._servers, memory=self._memories, own=own, **kept)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        # Copies: the checkpoint's file is mapped into memory, and will be replaced.
        groups: dict[str, dict[str, Tensor]] = {}
        for group in {name.partition("/")[0] for name in state}:
            groups[group] = {name: tensor.clone() for name, tensor in unpack(state, group).items()}
        device = self._engine.device
        self._servers = {name: groups["server"][name].to(device) for name in self._servers}
        self._memories = {name: groups["memory"][name].to(device) for name in self._memories}
        self.ended, self._traffic = groups["own"]["ended"], groups["own"]["traffic"]
        self._kept = {
            int(group.removeprefix("kept ")): tensors for group, tensors in groups.items() if group.startswith("kept ")
        }


_ROWS = "(rows)"
"""Beside the kept weights: the positions in the stack of the runs that they belong to."""
_METRICS = {
    "participants": "participants",
    "training loss": "loss",
    "guide": "guide",
    "norm mean": "norm_mean",
    "norm sd": "norm_sd",
    "norm max": "norm_max",
}
"""Metrics of a round, and the columns that hold them."""


def _metrics(report: RoundReport) -> dict[str, Tensor]:
    """What a round did, as (R,) metrics; norms of the clients that answered, NaN if none sent one."""
    sent = report.answered & report.norms.isfinite()
    count = torch.where(sent.any(1), sent.sum(1), math.nan)
    mean = report.norms.where(sent, 0).sum(1) / count
    variance = (report.norms - mean[:, None]).square().where(sent, 0).sum(1) / count
    largest = report.norms.where(sent, -math.inf).amax(1)
    return {
        "loss": torch.where(report.outcome == GOING_ON, report.loss, math.inf),
        "training loss": report.loss,
        "guide": report.guide,
        "norm mean": mean,
        "norm sd": variance.sqrt(),
        "norm max": torch.where(sent.any(1), largest, math.nan),
        "participants": (report.participants >= 0).sum(1),
        "dropped": report.dropped,
    }


def _client_rows(settings: FederatedSettings, stacks: Sequence[Sequence[Run]], inputs: Inputs) -> Iterator[Row]:
    """What each client holds, once for each number of clients, split and seed.

    Each target of DomainNet leaves other domains as clients, so there the source's name says which is left out.
    """
    found: dict[tuple[int, str, int], Condition] = {}
    for run in (run for stack in stacks for run in stack):
        found.setdefault((run.condition.clients, run.condition.split, run.seed), run.condition)
    left_out = f" without {inputs.target.removeprefix(f'{inputs.source}_')}" if inputs.source == "domainnet" else ""
    for (_, split, seed), condition in found.items():
        rows = client_rows(settings, condition, seed, inputs)
        yield from split_rows(seed, inputs.source + left_out, split, rows, inputs.source_train.y, inputs.classes)
