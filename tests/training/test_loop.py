"""The loop with scripted trainees: what is recorded, reported, stopped and carried on."""

from __future__ import annotations

import logging
import math
import signal
import threading

import pytest
import torch

from jacnorm.errors import UserError
from jacnorm.training import loop
from jacnorm.training.loop import Diverged, RunId, discard, fit

RUNS = (RunId("study", "a", 10), RunId("study", "a", 11), RunId("study", "b", 10))
NAN, INF = math.nan, math.inf


class Scripted:
    """Returns given losses; its only state is how often each run was advanced, and what its generator drew."""

    def __init__(self, losses, runs=3, **more):
        self.losses, self.more = losses, more
        self.count = torch.zeros(runs)
        self.frozen = torch.zeros(runs, dtype=torch.bool)
        self.drawn = torch.zeros(len(losses), dtype=torch.float64)
        self.generators = {"noise": torch.Generator().manual_seed(5)}
        self.calls = []

    def step(self, index):
        self.calls.append(index)
        self.count += (~self.frozen).float()
        self.drawn[index] = torch.rand((), dtype=torch.float64, generator=self.generators["noise"])
        metrics = {name: values[index] for name, values in self.more.items() if values[index] is not None}
        return {"loss": torch.as_tensor(self.losses[index]), **metrics}

    def state(self):
        return {"count": self.count, "drawn": self.drawn}

    def load_state(self, state):
        self.count.copy_(state["count"])
        self.drawn.copy_(state["drawn"])

    def freeze(self, diverged):
        self.frozen = diverged.clone()


class Sink:
    """A tracker that remembers."""

    def __init__(self):
        self.points = []

    def log(self, metrics, step):
        self.points.append((step, dict(metrics)))


def losses(steps, bad=()):
    """Falling losses of three runs, with bad ones as (step, run, value)."""
    table = [[1.0 / (step + 1) + run for run in range(3)] for step in range(steps)]
    for step, run, value in bad:
        table[step][run] = value
    return table


@pytest.fixture
def options(tmp_path):
    return {"checkpoint": tmp_path / "c.safetensors", "runs": RUNS, "fingerprint": "f", "label": "fit"}


class Interrupted(Exception):
    """Stands for a kill: the loop gets no chance to act."""


def interrupted_at(step, trainee, **options):
    """Fit until `step` (which is not made), with a checkpoint after every step; then the process is gone."""
    plain = trainee.step

    def limited(index):
        if index == step:
            raise Interrupted
        return plain(index)

    trainee.step = limited
    with pytest.raises(Interrupted):
        fit(trainee, checkpoint_seconds=0.0, **options)


def test_the_learning_curve_is_complete(options):
    accuracy = [None, torch.tensor([1, 2, 3]), None, torch.tensor([4, 5, 6])]
    norms = [torch.full((3, 2), float(step)) for step in range(4)]
    report = fit(Scripted(losses(4), accuracy=accuracy, norms=norms), steps=4, **options)
    assert (report.steps, report.resumed_from, report.runs, report.diverged) == (4, 0, RUNS, (None, None, None))
    assert list(report.history) == ["accuracy", "loss", "norms"]
    assert report.history["loss"].tolist() == torch.tensor(losses(4)).tolist()
    assert report.history["norms"].shape == (4, 3, 2)
    assert report.history["accuracy"][[1, 3]].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert report.history["accuracy"][[0, 2]].isnan().all()


def test_a_scalar_loss_counts_for_its_only_run(options):
    report = fit(Scripted([1.0, 0.5], runs=1), steps=2, **options | {"runs": RUNS[:1]})
    assert report.history["loss"].tolist() == [[1.0], [0.5]]


def test_nothing_holds_a_graph_or_the_trainees_tensors(options):
    value = torch.ones(3, requires_grad=True)
    trainee = Scripted(losses(2), norm=[value * 2, value * 3])
    history = fit(trainee, steps=2, **options).history
    assert not history["norm"].requires_grad
    assert history["norm"].tolist() == [[2.0] * 3, [3.0] * 3]


@pytest.mark.parametrize("stop", range(1, 12))
def test_resuming_gives_the_same_as_going_through(options, tmp_path, stop):
    def trainee():
        return Scripted(losses(12, [(3, 1, NAN)]), odd=[torch.ones(3) * k if k % 5 == 1 else None for k in range(12)])

    how = {"steps": 12, "on_divergence": "record", "check_every": 5}
    through = trainee()
    expected = fit(through, **how, **options | {"checkpoint": tmp_path / "through.safetensors"})
    interrupted_at(stop, trainee(), **how, **options)
    resumed = trainee()
    report = fit(resumed, **how, **options)
    assert report.resumed_from == stop
    assert resumed.calls == list(range(stop, 12))
    assert report.diverged == expected.diverged == (None, 3, None)
    assert through.count.tolist() == resumed.count.tolist() == [12, 5, 12]
    assert torch.equal(through.drawn, resumed.drawn)
    assert report.history.keys() == expected.history.keys()
    for name, values in expected.history.items():
        torch.testing.assert_close(report.history[name], values, rtol=0, atol=0, equal_nan=True)


class Content(Scripted):
    """Is done once each run was advanced a number of times."""

    def __init__(self, losses, enough):
        super().__init__(losses)
        self.enough = enough

    def finished(self):
        return bool((self.count >= self.enough).all())


@pytest.mark.parametrize(("enough", "steps"), [(4, 5), (5, 5), (6, 10), (11, 12), (99, 12)])
def test_a_trainee_that_is_done_ends_the_loop_at_the_next_check(options, enough, steps):
    trainee = Content(losses(12), enough)
    report = fit(trainee, steps=12, check_every=5, **options)
    assert (report.steps, trainee.calls) == (steps, list(range(steps)))
    assert report.history["loss"].tolist() == torch.tensor(losses(12)[:steps]).tolist()


@pytest.mark.parametrize("stop", range(1, 10))
def test_a_resumed_job_ends_where_an_undisturbed_one_does(options, stop):
    interrupted_at(stop, Content(losses(12), 6), steps=12, check_every=5, **options)
    resumed = Content(losses(12), 6)
    report = fit(resumed, steps=12, check_every=5, **options)
    assert (report.steps, report.resumed_from, resumed.calls) == (10, stop, list(range(stop, 10)))
    again = Content(losses(12), 6)
    assert fit(again, steps=12, check_every=5, **options).history["loss"].shape == (10, 3)
    assert again.calls == []


def test_a_finished_fit_is_not_repeated_until_discarded(options, caplog):
    expected = fit(Scripted(losses(3)), steps=3, **options)
    again = Scripted(losses(3))
    report = fit(again, steps=3, **options)
    assert again.calls == []
    assert report.resumed_from == 3
    assert torch.equal(report.history["loss"], expected.history["loss"])
    discard(options["checkpoint"])
    fit(again, steps=3, **options)
    assert again.calls == [0, 1, 2]


@pytest.mark.parametrize(
    "change",
    [{"fingerprint": "g"}, {"runs": RUNS[::-1]}, {"steps": 5}, {"on_divergence": "record"}, {"check_every": 2}],
)
def test_a_checkpoint_of_another_fit_is_not_continued_from(options, change):
    interrupted_at(3, Scripted(losses(5)), steps=4, **options)
    trainee = Scripted(losses(5))
    report = fit(trainee, **{"steps": 4, **options, **change})
    assert (trainee.calls[0], report.resumed_from) == (0, 0)


def test_checkpoints_come_at_their_time(options, monkeypatch):
    written, clock = [], iter(range(100))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    save = loop.checkpoints.save
    monkeypatch.setattr(
        loop.checkpoints,
        "save",
        lambda path, found, digest: written.append(found.record["step"]) or save(path, found, digest),
    )
    monkeypatch.setattr(loop, "Progress", Quiet)
    fit(Scripted(losses(10)), steps=10, checkpoint_seconds=3.0, **options)
    assert written == [3, 6, 9, 10]  # the clock ticks once a step, and once for each checkpoint


class Quiet:
    """A progress display that needs no clock."""

    def __init__(self, *_args, **_options):
        self.update = lambda done, text: None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize("check_every", [1, 2, 7, 100])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_divergence_stops_with_the_exact_step(options, value, check_every):
    trainee = Scripted(losses(10, [(6, 0, NAN), (4, 2, value), (5, 1, NAN)]))
    with pytest.raises(Diverged) as caught:
        fit(trainee, steps=10, check_every=check_every, **options)
    assert str(caught.value) == (
        f'training diverged: the loss of study "study", cell "b", seed 10 is {value} at step 4; '
        "lower its learning rate, or leave that cell out"
    )
    assert isinstance(caught.value, UserError)
    assert (caught.value.run, caught.value.step) == (RUNS[2], 4)


def test_divergence_in_the_last_step_is_seen(options):
    with pytest.raises(Diverged, match="step 9"):
        fit(Scripted(losses(10, [(9, 1, INF)])), steps=10, **options)


def test_recorded_divergence_lets_the_others_go_on(options, caplog):
    bad = [(4, 2, NAN), (5, 2, INF), (11, 0, INF)]
    trainee = Scripted(losses(20, bad))
    with caplog.at_level(logging.INFO):
        report = fit(trainee, steps=20, on_divergence="record", check_every=3, **options)
    assert report.diverged == (11, None, 4)
    assert trainee.frozen.tolist() == [True, False, True]
    assert trainee.count.tolist() == [12, 20, 6]
    assert [record.message for record in caplog.records if "diverged" in record.message] == [
        f"diverged: the loss of {RUNS[2]} is nan at step 4",
        f"diverged: the loss of {RUNS[0]} is inf at step 11",
    ]


def test_a_trainee_that_cannot_freeze_goes_on(options):
    class Plain:
        def __init__(self):
            self.generators, self.count = {}, 0

        def step(self, index):
            self.count += 1
            return {"loss": torch.tensor([NAN, 1.0, 1.0])}

        def state(self):
            return {}

        def load_state(self, state):
            pass

    trainee = Plain()
    assert fit(trainee, steps=4, on_divergence="record", check_every=1, **options).diverged == (0, None, None)
    assert trainee.count == 4


def test_all_runs_may_diverge(options):
    sink = Sink()
    bad = [(1, run, NAN) for run in range(3)]
    report = fit(Scripted(losses(5, bad)), steps=5, on_divergence="record", check_every=1, tracker=sink, **options)
    assert report.diverged == (1, 1, 1)
    assert [step for step, _ in sink.points] == [1]


def test_a_tracker_gets_sparse_points_over_living_runs(options):
    sink = Sink()
    norm = [torch.ones(3) * step if step % 10 == 3 else None for step in range(1000)]
    trainee = Scripted(losses(1000, [(500, 1, NAN)]), norm=norm, wide=[torch.ones(3, 2)] * 1000)
    fit(trainee, steps=1000, on_divergence="record", check_every=2, tracker=sink, **options)
    assert [step for step, _ in sink.points] == [*range(6, 1000, 6), 1000]
    first, last = sink.points[0][1], sink.points[-1][1]
    assert first == pytest.approx(
        {
            "fit/loss/mean": 1 / 6 + 1, "fit/loss/min": 1 / 6, "fit/loss/max": 1 / 6 + 2,
            "fit/norm/mean": 3, "fit/norm/min": 3, "fit/norm/max": 3,
        }
    )  # fmt: skip
    assert last == pytest.approx({"fit/loss/mean": 1.001, "fit/loss/min": 0.001, "fit/loss/max": 2.001})


def test_a_resumed_job_tells_its_tracker_what_came_before(options):
    through, resumed = Sink(), Sink()
    how = {"steps": 30, "check_every": 4, "on_divergence": "record", **options}
    table = losses(30, [(9, 2, NAN)])
    fit(Scripted(table), tracker=through, **how)
    discard(options["checkpoint"])
    interrupted_at(18, Scripted(table), **how)
    fit(Scripted(table), tracker=resumed, **how)
    assert resumed.points == through.points
    assert [points["fit/loss/max"] > 2 for _, points in through.points] == [True] * 2 + [False] * 6


def test_one_run_is_reported_without_statistics(options):
    sink = Sink()
    fit(Scripted([1.0, 0.5], runs=1), steps=2, tracker=sink, **options | {"runs": RUNS[:1]})
    assert sink.points == [(2, {"fit/loss": 0.5})]


def test_a_signal_in_the_last_step_still_stops_the_job(options):
    trainee = Scripted(losses(3))
    plain = trainee.step

    def step(index):
        if index == 2:
            signal.raise_signal(signal.SIGTERM)
        return plain(index)

    trainee.step = step
    with pytest.raises(SystemExit) as caught:
        fit(trainee, steps=3, **options)
    assert caught.value.code == 143
    assert fit(Scripted(losses(3)), steps=3, **options).resumed_from == 3


def test_a_second_signal_acts_at_once_and_handlers_are_put_back(options):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainee = Scripted(losses(3))
    after = []

    def step(index):
        signal.raise_signal(signal.SIGINT)
        after.append("first")
        signal.raise_signal(signal.SIGINT)
        after.append("second")

    trainee.step = step
    with pytest.raises(KeyboardInterrupt):
        fit(trainee, steps=3, **options)
    assert after == ["first"]
    assert not options["checkpoint"].exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_fits_outside_the_main_thread(options):
    reports = []
    thread = threading.Thread(target=lambda: reports.append(fit(Scripted(losses(3)), steps=3, **options)))
    thread.start()
    thread.join()
    assert reports[0].steps == 3


def test_impossible_requests_are_refused(options):
    with pytest.raises(UserError, match="fit: the number of training steps is 0"):
        fit(Scripted(losses(1)), steps=0, **options)
    with pytest.raises(UserError, match="fit: there are no runs to train"):
        fit(Scripted(losses(1)), steps=1, **options | {"runs": ()})
    with pytest.raises(ValueError, match='on_divergence is "ignore"'):
        fit(Scripted(losses(1)), steps=1, on_divergence="ignore", **options)
    with pytest.raises(ValueError, match="check_every is 0"):
        fit(Scripted(losses(1)), steps=1, check_every=0, **options)


def test_trainees_that_break_the_rules_are_refused(options):
    trainee = Scripted(losses(1))
    trainee.step = lambda index: {"accuracy": torch.ones(3)}
    with pytest.raises(ValueError, match=r"must return \"loss\"; step 0 returned \['accuracy'\]"):
        fit(trainee, steps=1, **options)
    trainee.step = lambda index: {"loss": torch.ones(2)}
    with pytest.raises(ValueError, match=r'"loss" has shape \(2,\); its first axis must be the 3 runs'):
        fit(trainee, steps=1, **options)


def test_a_damaged_checkpoint_is_refused(options):
    options["checkpoint"].write_bytes(b"damage")
    with pytest.raises(UserError, match="is damaged"):
        fit(Scripted(losses(1)), steps=1, **options)
