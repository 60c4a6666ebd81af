"""The one training loop of all studies.

A study supplies a `Trainee` that knows how to make one update; `fit` runs it to the end, however often the job is
killed on the way: the result has the same bits as that of an uninterrupted job.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol, runtime_checkable

import torch

from jacnorm.errors import UserError
from jacnorm.training import checkpoint as checkpoints
from jacnorm.training.checkpoint import Checkpoint, discard
from jacnorm.training.progress import Progress
from jacnorm.training.seeds import RunId

__all__ = ["Diverged", "Finishing", "FitReport", "Freezable", "MetricSink", "RunId", "Trainee", "discard", "fit"]

_log = logging.getLogger(__name__)


class Trainee(Protocol):
    """What is trained: one run, or R stacked runs that advance together.

    `generators` are those that `step` draws from; the loop stores and restores them. Numbers that are a pure function
    of the step (`batches.batch_indices`) need none.
    """

    generators: Mapping[str, torch.Generator]

    def step(self, index: int) -> Mapping[str, torch.Tensor]:
        """Make update number `index` (from 0) and return its metrics, on any device.

        "loss" is required, of shape () or (R,). Others may have more axes after the first, and may be absent in some
        steps (say, test accuracy once an epoch). The loop reads them without waiting for a GPU.
        """

    def state(self) -> Mapping[str, torch.Tensor]:
        """Everything that `step` changes, apart from generators: weights, optimiser buffers, running sums."""

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned in an earlier process (CPU tensors; copy them into place)."""


@runtime_checkable
class Freezable(Protocol):
    """A trainee whose diverged runs can stop changing while the others go on."""

    def freeze(self, diverged: torch.Tensor) -> None:
        """Leave the runs where `diverged` (shape (R,), bool, CPU) is true as they are from now on."""


@runtime_checkable
class Finishing(Protocol):
    """A trainee that may be done before the last step, say once every run fits its data."""

    def finished(self) -> bool:
        """Whether no run has anything left to learn; decided by what `state` holds, so that a resumed job agrees."""


class MetricSink(Protocol):
    """Where the loop reports metrics as it goes, such as a `tracking.Tracker`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the metrics of one step."""


class Diverged(UserError):
    """The loss of a run became NaN or infinite. Attributes: run (a RunId), step (counted from 0) and loss."""

    def __init__(self, run: RunId, step: int, loss: float) -> None:
        super().__init__(
            f"training diverged: the loss of {run} is {loss} at step {step}; "
            "lower its learning rate, or leave that cell out"
        )
        self.run, self.step, self.loss = run, step, loss


@dataclass(frozen=True)
class FitReport:
    """What `fit` did.

    steps: updates made in all, in this process and before. resumed_from: the step at which this process took over (0
    for a fresh start). diverged: for each run, the first step whose loss was not finite, or None. history: each metric
    at each step, shape (steps, R, ...), on the CPU, NaN where a step did not return it.
    """

    steps: int
    resumed_from: int
    runs: tuple[RunId, ...]
    diverged: tuple[int | None, ...]
    history: dict[str, torch.Tensor]


def fit(
    trainee: Trainee,
    *,
    steps: int,
    checkpoint: Path | str,
    runs: Sequence[RunId],
    fingerprint: str,
    checkpoint_seconds: float = 60.0,
    on_divergence: Literal["stop", "record"] = "stop",
    check_every: int = 25,
    tracker: MetricSink | None = None,
    label: str = "training",
) -> FitReport:
    """Make `steps` updates of `trainee`, or fewer if it says that it is finished; go on from an existing `checkpoint`.

    runs: the R stacked runs, in the order of the loss's entries. fingerprint: `checkpoint.fingerprint` of settings and
    code; a checkpoint of another fingerprint is not continued from. A checkpoint is written every `checkpoint_seconds`,
    after the last step, and on SIGTERM or SIGINT, upon which the process exits with status 143 or 130 (a second signal
    acts at once, without a checkpoint). Call `discard(checkpoint)` once the job's outputs are on disk.

    Losses are looked at every `check_every` steps only, so that a GPU is not made to wait; the step reported is
    nevertheless the first bad one. With on_divergence="stop" a NaN or infinite loss raises Diverged; with "record" the
    other runs go on, and the trainee, if it is `Freezable`, is told which runs to leave alone. The check falls on the
    same steps in a resumed job, so what happens to a diverged run between its first bad loss and the check is
    repeatable too. At the same steps a `Finishing` trainee is asked whether it is done, which ends the loop early.

    tracker receives at most about 200 points per loop under "<label>/<metric>": the value for one run; mean, min and
    max over runs that have not diverged for several.
    """
    if steps < 1:
        raise UserError(f"{label}: the number of training steps is {steps}, but at least 1 is needed")
    if not runs:
        raise UserError(f"{label}: there are no runs to train: give at least one cell and one seed")
    if check_every < 1:
        raise ValueError(f"check_every is {check_every}; it must be at least 1")
    history = _History(steps, len(runs))
    watch = _Watch(trainee, tuple(runs), on_divergence)
    identity = [[[run.study, run.cell, run.seed] for run in runs], steps, on_divergence, check_every]
    whole_fingerprint = checkpoints.fingerprint(identity, fingerprint)
    done = resumed_from = _resume(trainee, history, watch, checkpoint, whole_fingerprint)
    report = _Reporter(tracker, label, steps, check_every, history, watch)
    for step in range(1, done + 1):  # a tracker starts empty in each process: give it what came before
        report.after(step)

    def write() -> None:
        record = {"step": done, "diverged": watch.first_bad}
        groups = checkpoints.pack(
            state=trainee.state(),
            generator={name: generator.get_state() for name, generator in trainee.generators.items()},
            history=history.until(done),
        )
        checkpoints.save(checkpoint, Checkpoint(groups, record), whole_fingerprint)

    def ended() -> bool:
        asked = done % check_every == 0 and isinstance(trainee, Finishing)
        return done == steps or (asked and trainee.finished())

    if done:
        _log.info("%s: going on from step %d of %d", label, done, steps)
    with _signals() as stop, Progress(steps, label, start=done) as progress:
        written = time.monotonic()
        while not ended():
            history.add(done, trainee.step(done))
            done += 1
            if done % check_every == 0 or done == steps:
                watch.check(history, (done - 1) // check_every * check_every, done)
                progress.update(done, f"loss {history.summary('loss', done - 1, watch.alive):.4g}")
            report.after(done)
            if ended() or stop.signal or time.monotonic() - written >= checkpoint_seconds:
                write()
                written = time.monotonic()
            if stop.signal:
                break
    if stop.signal:
        _log.info("%s: stopped by %s after step %d of %d; run again to go on", label, stop.name, done, steps)
        raise SystemExit(128 + stop.signal)
    return FitReport(done, resumed_from, tuple(runs), tuple(watch.first_bad), history.until(done))


def _resume(trainee: Trainee, history: _History, watch: _Watch, path: Path | str, fingerprint: str) -> int:
    """Restore everything from the checkpoint at `path`; returns the number of steps already made."""
    checkpoints.sweep(path)
    found = checkpoints.load(path, fingerprint)
    if found is None:
        return 0
    trainee.load_state(checkpoints.unpack(found.tensors, "state"))
    for name, state in checkpoints.unpack(found.tensors, "generator").items():
        trainee.generators[name].set_state(state)
    history.restore(checkpoints.unpack(found.tensors, "history"))
    watch.restore(found.record["diverged"])
    return found.record["step"]


class _History:
    """Each metric at each step, kept on the metric's own device, so that storing it does not wait for the device."""

    def __init__(self, steps: int, runs: int) -> None:
        self._steps, self._runs = steps, runs
        self._tables: dict[str, torch.Tensor] = {}
        self._restored: dict[str, torch.Tensor] = {}

    def add(self, index: int, metrics: Mapping[str, torch.Tensor]) -> None:
        if "loss" not in metrics:
            raise ValueError(f'a trainee\'s step must return "loss"; step {index} returned {sorted(metrics)}')
        for name, value in metrics.items():
            value = value.detach()
            if value.ndim == 0:
                value = value.expand(self._runs)
            if value.shape[0] != self._runs:
                shape = tuple(value.shape)
                raise ValueError(f'metric "{name}" has shape {shape}; its first axis must be the {self._runs} runs')
            if name not in self._tables:
                self._tables[name] = self._new(name, value)
            self._tables[name][index] = value

    def _new(self, name: str, like: torch.Tensor) -> torch.Tensor:
        dtype = like.dtype if like.is_floating_point() else torch.float64
        table = torch.full((self._steps, *like.shape), torch.nan, dtype=dtype, device=like.device)
        if name in self._restored:
            old = self._restored.pop(name)
            table[: len(old)] = old.to(table)
        return table

    def restore(self, tables: Mapping[str, torch.Tensor]) -> None:
        self._restored = dict(tables)

    def until(self, done: int) -> dict[str, torch.Tensor]:
        """The first `done` steps on the CPU, including metrics that only an earlier process returned."""
        whole = {name: table[:done].to("cpu", copy=True) for name, table in self._tables.items()}
        for name, old in self._restored.items():
            whole[name] = torch.full((done, *old.shape[1:]), torch.nan, dtype=old.dtype)
            whole[name][: len(old)] = old[:done]
        return dict(sorted(whole.items()))

    def rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Steps start..end-1 of one metric, on the CPU."""
        return (self._tables[name] if name in self._tables else self._restored[name])[start:end].cpu()

    def names(self) -> list[str]:
        """Metrics with one number per run."""
        tables = {**self._restored, **self._tables}
        return sorted(name for name, table in tables.items() if table.ndim == 2)

    def summary(self, name: str, index: int, alive: torch.Tensor) -> float:
        """Mean over the runs that are alive, NaN if none is."""
        return self.rows(name, index, index + 1)[0][alive].double().mean().item()


class _Watch:
    """Looks for losses that are not finite."""

    def __init__(self, trainee: Trainee, runs: tuple[RunId, ...], on_divergence: Literal["stop", "record"]) -> None:
        if on_divergence not in ("stop", "record"):
            raise ValueError(f'on_divergence is "{on_divergence}"; choose "stop" or "record"')
        self._trainee, self._runs, self._stop = trainee, runs, on_divergence == "stop"
        self.first_bad: list[int | None] = [None] * len(runs)

    @property
    def alive(self) -> torch.Tensor:
        return torch.tensor([bad is None for bad in self.first_bad])

    def alive_until(self, done: int) -> torch.Tensor:
        """Runs whose first `done` losses are finite."""
        return torch.tensor([bad is None or bad >= done for bad in self.first_bad])

    def restore(self, first_bad: list[int | None]) -> None:
        self.first_bad = first_bad
        self._freeze()

    def check(self, history: _History, start: int, end: int) -> None:
        """Look at the losses of steps start..end-1."""
        losses = history.rows("loss", start, end)  # (end - start, R)
        bad = ~losses.isfinite() & self.alive
        if not bad.any():
            return
        found = [(int(bad[:, run].int().argmax()), run) for run in range(len(self._runs)) if bad[:, run].any()]
        row, run = min(found)
        if self._stop:
            raise Diverged(self._runs[run], start + row, losses[row, run].item())
        for row, run in found:
            self.first_bad[run] = start + row
            loss = losses[row, run].item()
            _log.info("diverged: the loss of %s is %s at step %d", self._runs[run], loss, start + row)
        self._freeze()

    def _freeze(self) -> None:
        if isinstance(self._trainee, Freezable) and not self.alive.all():
            self._trainee.freeze(~self.alive)


class _Reporter:
    """Sends metrics to a tracker every so many steps; each metric's last value since the time before."""

    def __init__(
        self, tracker: MetricSink | None, label: str, steps: int, check_every: int, history: _History, watch: _Watch
    ) -> None:
        self._tracker, self._label, self._steps, self._history, self._watch = tracker, label, steps, history, watch
        checks = -(-steps // check_every)
        self._every = check_every * -(-checks // 200)

    def after(self, done: int) -> None:
        """Report if it is time to, after step number `done - 1`."""
        if self._tracker is None or (done % self._every and done != self._steps):
            return
        alive = self._watch.alive_until(done)
        metrics: dict[str, float] = {}
        for name in self._history.names():
            rows = self._history.rows(name, (done - 1) // self._every * self._every, done)[:, alive].double()
            rows = rows[rows.isfinite().all(dim=1)]
            if not rows.numel():
                continue
            values = rows[-1]  # (runs alive,)
            if len(alive) == 1:
                metrics[f"{self._label}/{name}"] = values.item()
            else:
                parts = {"mean": values.mean(), "min": values.min(), "max": values.max()}
                metrics |= {f"{self._label}/{name}/{part}": value.item() for part, value in parts.items()}
        if metrics:
            self._tracker.log(metrics, done)


class _Stop:
    """The signal that asked the loop to stop (0: none)."""

    signal = 0

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name


@contextmanager
def _signals() -> Iterator[_Stop]:
    """Catch SIGTERM and SIGINT, to be acted on between two steps; outside the main thread there is nothing to catch."""
    stop = _Stop()
    before = {}

    def note(number: int, _frame: FrameType | None) -> None:
        stop.signal = number
        for each, handler in before.items():  # a second signal acts at once
            signal.signal(each, handler)

    try:
        for each in (signal.SIGTERM, signal.SIGINT):
            before[each] = signal.signal(each, note)
    except ValueError:  # "signal only works in main thread"
        pass
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
