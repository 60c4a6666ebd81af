"""What a person sees of a long loop: a bar on a terminal, sparse lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

_log = logging.getLogger(__name__)
_LINE = "%(asctime)s %(message)s"


class Progress:
    """Counts the steps of one loop, as a context manager.

    On a terminal (standard error): a bar. Otherwise log lines: one for every tenth of the loop, but not within 5 s of
    the last, one when a minute has passed without any, and one at the end. A loop of a few seconds writes one line.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        start: int = 0,
        unit: str = "steps",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.label, self.start, self.done, self.unit = total, label, start, start, unit
        self._stream, self._clock = stream or sys.stderr, clock
        self._begin = self._last_time = clock()
        self._last_tenth = self._tenth()
        self._text = ""
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total, initial=self.start, desc=self.label, unit=f" {self.unit}", file=self._stream,
                dynamic_ncols=True,
            )  # fmt: skip
        return self

    def update(self, done: int, text: str = "") -> None:
        """Say that `done` steps are done; `text` ("loss 0.21") goes beside the numbers."""
        self.done, self._text = done, text or self._text
        if self._bar is not None:
            self._bar.set_postfix_str(self._text, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        waited = self._clock() - self._last_time
        if done < self.total and (waited >= 60 or (waited >= 5 and self._tenth() > self._last_tenth)):
            self._line(f"{done} of {self.total} {self.unit}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            seconds = self._clock() - self._begin
            self._line(f"{self.done} of {self.total} {self.unit} done in {seconds:.1f} s")

    def _line(self, text: str) -> None:
        _log.info("%s: %s%s", self.label, text, f", {self._text}" if self._text else "")
        self._last_time, self._last_tenth = self._clock(), self._tenth()

    def _tenth(self) -> int:
        return 10 * self.done // max(self.total, 1)


def step_logger() -> logging.Logger:
    """Send the messages of `jacnorm` to standard error, one plain line each with its time.

    Calling it again changes nothing.
    """
    logger = logging.getLogger("jacnorm")
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        handler = _Handler()
        handler.setFormatter(logging.Formatter(_LINE, "%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


class _Handler(logging.Handler):
    """Writes to whatever standard error is at that moment, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if sys.stderr.isatty():
                from tqdm import tqdm

                tqdm.write(self.format(record), file=sys.stderr)
            else:
                print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)
