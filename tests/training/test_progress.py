from __future__ import annotations

import io
import logging

import pytest

from jacnorm.training.progress import Progress, step_logger


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def lines(caplog, steps: int, seconds_per_step: float) -> list[str]:
    clock = Clock()
    caplog.clear()
    with caplog.at_level(logging.INFO), Progress(steps, "fit", stream=io.StringIO(), clock=clock) as progress:
        for done in range(1, steps + 1):
            clock.now += seconds_per_step
            progress.update(done, f"loss {1 / done:.2f}")
    return [record.message for record in caplog.records]


@pytest.mark.parametrize(
    ("steps", "seconds", "most"), [(1000, 3.0, 1), (1000, 40.0, 8), (1000, 300.0, 10), (7, 300.0, 7)]
)
def test_lines_in_a_log_are_sparse(caplog, steps, seconds, most):
    said = lines(caplog, steps, seconds / steps)
    assert 1 <= len(said) <= most
    assert said[-1] == f"fit: {steps} of {steps} steps done in {seconds:.1f} s, loss {1 / steps:.2f}"


def test_a_log_has_a_line_at_least_once_a_minute(caplog):
    said = lines(caplog, 10_000, 1.0)
    assert said[0] == "fit: 60 of 10000 steps, loss 0.02"
    assert len(said) == pytest.approx(10_000 / 60, abs=10)


def test_a_failing_loop_does_not_say_that_it_is_done(caplog):
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(ValueError, match="boom"),
        Progress(3, "fit", stream=io.StringIO()),
    ):
        raise ValueError("boom")
    assert not caplog.records


def test_a_terminal_gets_a_bar_and_no_lines(caplog):
    terminal = Terminal()
    with caplog.at_level(logging.INFO), Progress(4, "fit", start=1, stream=terminal) as progress:
        progress.update(3, "loss 0.21")
        progress.update(4)
    assert not caplog.records
    last = terminal.getvalue().split("\r")[-1]
    assert all(part in last for part in ("fit: 100%", "4/4", "loss 0.21"))


@pytest.fixture
def logger():
    logger = logging.getLogger("jacnorm")
    before = logger.handlers[:], logger.level, logger.propagate
    yield logger
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_messages_go_to_standard_error_once(logger, monkeypatch, stream):
    error = stream()
    monkeypatch.setattr("sys.stderr", error)
    assert step_logger() is step_logger() is logger
    logging.getLogger("jacnorm.training.loop").info("stopped after %d", 3)
    assert error.getvalue().endswith(" stopped after 3\n")
    assert error.getvalue().count("\n") == 1


def test_a_message_that_cannot_be_written_is_reported_and_not_raised(logger, monkeypatch):
    closed = io.StringIO()
    closed.close()
    step_logger()
    reported = []
    monkeypatch.setattr(logging.Handler, "handleError", lambda self, record: reported.append(record.msg))
    monkeypatch.setattr("sys.stderr", closed)
    logger.info("hello")
    assert reported == ["hello"]
