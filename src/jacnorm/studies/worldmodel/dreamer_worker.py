"""What every process in DreamerV3's own environment does: it reads a task, does it and answers.

``python -m jacnorm.studies.worldmodel.dreamer_train_worker task.json``, ``dreamer_measure_worker`` likewise; this
module itself tries whether images can be drawn. A task is a JSON object; see the modules that carry it out. Answers are
lines of JSON on standard output with the key `kind`: progress, result, or mistake with one sentence for the user (exit
status 2). What the packages print goes to standard error. Weights travel as .npz files of arrays, without pickle.

Imports the standard library only, so that the main environment can import it, too.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPEAT = {"dummy": 1, "walker_walk": 2, "quadruped_walk": 2}
"""Frames per decision of the agent, by task; two for simulated robots, as in DreamerV3's configuration."""

Say = Callable[[dict[str, Any]], None]
"""Sends one answer."""


class Mistake(Exception):
    """Something the user can mend; one sentence."""


@dataclass(frozen=True)
class Plan:
    """How far a training goes; see the settings for `task`, batch, length, frames and train_ratio."""

    decisions: int
    """Of the agent in all."""
    prefill: int
    """Random ones among them, at the beginning: enough for one batch of different sequences."""
    per_decision: float
    """Updates per decision after that."""

    @classmethod
    def of(cls, task: Mapping[str, Any]) -> Plan:
        """The plan of a task."""
        steps = task["batch"] * task["length"]
        return cls(task["frames"] // REPEAT[task["task"]], steps + task["length"], task["train_ratio"] / steps)

    @property
    def updates(self) -> int:
        """Updates in all."""
        return self.due(self.decisions)

    def due(self, decisions: int) -> int:
        """Updates that are to be made after so many decisions."""
        return max(0, int((decisions - self.prefill) * self.per_decision))


def serve(arguments: list[str], command: Callable[[dict[str, Any], Say], dict[str, Any]]) -> int:
    """Carry out the task in the file that the arguments name; the exit status."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    task = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    if task.get("ends_with_parent"):
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _check_device(task.get("platform", "cpu"))
        say({"kind": "result", **command(task, say)})
    except Mistake as mistake:
        say({"kind": "mistake", "sentence": str(mistake)})
        return 2
    return 0


def _end_with_parent() -> None:
    """Wait until standard input is closed, as happens when the process that holds it dies, however that happens."""
    sys.stdin.buffer.read()
    os._exit(1)


def _check_device(platform: str) -> None:
    """Mistake if JAX has no such device."""
    import dreamerv3  # noqa: F401 (makes `embodied`, a part of it, a package that can be imported)
    import jax

    try:
        jax.devices(platform)
    except RuntimeError:
        raise Mistake(
            f'DreamerV3 was to run on device "{platform}", but its JAX {jax.__version__} sees none: set device to cpu, '
            "or build its environment with requirements/dreamerv3-cuda.txt beside dreamerv3.txt on a machine with an "
            "Nvidia GPU"
        ) from None


def render(task: dict[str, Any], say: Say) -> dict[str, Any]:
    """Whether an image comes out of the renderer that MUJOCO_GL names: any two pixels of it differ."""
    try:
        from dm_control import suite

        image = suite.load(*task["task"].split("_")).physics.render(16, 16, camera_id=0)
        return {"renders": bool(image.max() > image.min())}
    except Exception as error:  # whatever a missing library leads to
        return {"renders": False, "reason": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], render))
