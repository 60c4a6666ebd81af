"""Training DreamerV3, one seed after another, from its own parts: driver, replay, agent and checkpoint.

Runs in DreamerV3's own environment. The package's training loop samples with threads and saves by the clock; this one
does neither, so that a seed has the same bits in every run: one environment, batches drawn when they are needed, and
checkpoints at the end of an episode, where nothing is in flight. A killed training goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import embodied
import numpy as np

from jacnorm.studies.worldmodel import dreamer_agent
from jacnorm.studies.worldmodel.dreamer_agent import PREFIX, Agent, LatentError, Penalty
from jacnorm.studies.worldmodel.dreamer_tasks import Task
from jacnorm.studies.worldmodel.dreamer_worker import Plan, Say

METRICS = ("model_loss", "image_loss", "reward_loss", "kl", "penalty")
ROWS = 50
"""Rows of a learning curve."""
WORLD_MODEL = "agent/wm/"
"""What the names of the world model's variables begin with."""


def train(task: dict[str, Any], say: Say) -> dict[str, Any]:
    """Train one agent per entry of ``runs`` (seed and numbers for its random streams), all of one kind.

    task: task, observation, size, platform, batch, length, train_ratio, frames, penalty, error, checkpoint_seconds,
    folder (for checkpoints and weights). Answers with the rows of fits and curves by seed; writes weights-<seed>.npz.
    """
    dreamer_agent.install(Penalty(**task["penalty"]), LatentError(**task["error"]))
    config = dreamer_agent.configuration(task)
    environment = Task(task["task"], task["observation"], config)
    agent: Agent | None = None
    found = []
    for number, run in enumerate(task["runs"]):
        folder = Path(task["folder"]) / f"seed-{run['seed']}"
        folder.mkdir(parents=True, exist_ok=True)
        done = folder / "result.json"
        if not done.exists():
            if agent is None:
                agent = Agent(environment, config)
            training = Training(task, run, agent, environment, folder, say, number)
            training.go_on()
            _replace(folder / "weights.npz", lambda path, agent=agent: np.savez(path, **agent.weights()))
            result = json.dumps(training.result())
            _replace(done, lambda path, text=result: path.write_text(text))
        found.append(json.loads(done.read_text()))
    environment.close()
    return {"runs": found}


class Training:
    """The training of one seed."""

    def __init__(
        self,
        task: Mapping[str, Any],
        run: Mapping[str, Any],
        agent: Agent,
        environment: Task,
        folder: Path,
        say: Say,
        number: int,
    ) -> None:
        self._task, self._run, self._agent, self._environment = task, run, agent, environment
        self._folder, self._say, self._number = folder, say, number
        numbers = run["numbers"]
        agent.begin(numbers["agent"])
        environment.reseed(numbers["environment"])
        self._random = np.random.default_rng(numbers["random"])
        self._replay = embodied.replay.Uniform(
            task["length"], dreamer_agent.REPLAY_STEPS, directory=None, seed=numbers["replay"]
        )
        self._batches = agent.dataset(self._replay.dataset)
        self._driver = embodied.Driver(embodied.BatchEnv([environment], parallel=False))
        self._driver.on_step(self._take)
        self._plan = Plan.of(task)
        self._log: list[dict[str, np.ndarray]] = []
        self._carry: Any = None
        self.decisions = self.updates = self.parts = 0
        self.diverged_at = -1
        self._score = 0.0
        self._window: dict[str, list[float]] = {}
        self._tail: dict[str, list[float]] = {}
        self.curve: list[dict[str, Any]] = []

    def go_on(self) -> None:
        """Train to the end, from the last checkpoint if there is one."""
        path = self._folder / "checkpoint.ckpt"
        checkpoint = embodied.Checkpoint(str(path), parallel=False)
        checkpoint.agent, checkpoint.training = self._agent, self
        if path.exists():
            checkpoint.load(str(path))
        saved = time.monotonic()
        while self.decisions < self._plan.decisions and self.diverged_at < 0:
            ended = self._decide()
            self._learn()
            if ended and time.monotonic() - saved >= self._task["checkpoint_seconds"]:
                self._write_log()
                _replace(path, lambda part: checkpoint.save(str(part)))
                saved = time.monotonic()
        if self._window:
            self._row()

    def _decide(self) -> bool:
        """One decision of the agent, or a random one at the beginning; whether it ended an episode."""
        policy = self._explore if self.decisions < self._plan.prefill else self._agent.policy
        self._driver(policy, steps=1)
        self.decisions += 1
        return bool(self._log[-1]["is_last"])

    def _explore(self, seen: Mapping[str, np.ndarray], state: Any = None) -> tuple[dict[str, np.ndarray], Any]:
        space = self._environment.act_space["action"]
        return {"action": self._random.uniform(-1, 1, (1, *space.shape)).astype(np.float32)}, state

    def _take(self, transition: dict[str, np.ndarray], worker: int) -> None:
        """Keep a transition, and the score of an episode that it ends."""
        kept = {name: value for name, value in transition.items() if not name.startswith("log_")}
        self._replay.add(kept, worker)
        self._log.append(kept)
        self._score += float(kept["reward"])
        if kept["is_last"]:
            self._window.setdefault("return", []).append(self._score)
            self._score = 0.0

    def _learn(self) -> None:
        """Make the updates that are due."""
        while self.updates < self._plan.due(self.decisions) and self.diverged_at < 0:
            _, self._carry, metrics = self._agent.train(next(self._batches), self._carry)
            self.updates += 1
            losses = [float(value) for name, value in metrics.items() if name.endswith("_opt_loss")]
            if not all(map(math.isfinite, losses)):
                self.diverged_at = self.updates
                return
            for name in METRICS:
                value = float(metrics.get(PREFIX + name, math.nan))
                self._window.setdefault(name, []).append(value)
                if self.updates > 0.9 * self._plan.updates:
                    self._tail.setdefault(name, []).append(value)
            if self.updates % max(1, self._plan.updates // ROWS) == 0:
                self._row()

    def _row(self) -> None:
        """Put what was seen since the last row into one, and tell it."""
        means = {name: _mean(values) for name, values in self._window.items()}
        row = {
            "update": self.updates,
            "frames": self.decisions * self._environment.repeat,
            **{name: means.get(name) for name in ("model_loss", "kl", "penalty", "return")},
        }
        self.curve.append(row)
        self._window = {}
        of = {"seed": self._run["seed"], "number": self._number, "updates": self._plan.updates}
        self._say({"kind": "progress", **of, **row})

    def result(self) -> dict[str, Any]:
        """What the tables need: numbers that are not finite are null."""
        weights = self._agent.weights()
        return {
            "seed": self._run["seed"],
            "parameters": sum(value.size for name, value in weights.items() if name.startswith(WORLD_MODEL)),
            "updates": self.updates,
            "diverged_at": self.diverged_at,
            **{name: None if self.diverged_at >= 0 else _mean(self._tail.get(name, [])) for name in METRICS},
            "curve": self.curve,
        }

    def _write_log(self) -> None:
        """Append the transitions since the last checkpoint to those on disk."""
        steps = {name: np.stack([step[name] for step in self._log]) for name in self._log[0]}
        _replace(self._folder / f"replay-{self.parts:06d}.npz", lambda path: np.savez(path, **steps))
        self.parts += 1
        self._log = []

    def _stored(self, parts: int) -> Iterator[dict[str, np.ndarray]]:
        """The transitions of the first parts on disk."""
        for part in range(parts):
            with np.load(self._folder / f"replay-{part:06d}.npz", allow_pickle=False) as file:
                steps = {name: file[name] for name in file.files}
            for index in range(len(steps["reward"])):
                yield {name: values[index] for name, values in steps.items()}

    def save(self) -> dict[str, Any]:
        """Everything that a step changes, apart from the agent's variables and the replay's content."""
        return {
            "numbers": [self.decisions, self.updates, self.parts, self.diverged_at],
            "kept": [self._window, self._tail, self.curve],
            "random": self._random.bit_generator.state,
            "agent": self._agent.rng.bit_generator.state,
            "replay": self._replay.sampler.rng.bit_generator.state,
            "environment": self._environment.random.get_state(),
            "driver": [self._driver._acts, self._driver._state],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned in a killed process; between two episodes."""
        self.decisions, self.updates, self.parts, self.diverged_at = state["numbers"]
        self._window, self._tail, self.curve = state["kept"]
        self._driver.reset()
        self._driver._acts, self._driver._state = state["driver"]
        for step in self._stored(self.parts):
            self._replay.add(step, load=True)
        self._random.bit_generator.state = state["random"]
        self._agent.rng.bit_generator.state = state["agent"]
        self._replay.sampler.rng.bit_generator.state = state["replay"]
        self._environment.random.set_state(state["environment"])


def _mean(values: list[float]) -> float | None:
    """The mean; None if there is none or it is not finite, as JSON has no other word for that."""
    mean = math.fsum(values) / len(values) if values else math.nan
    return mean if math.isfinite(mean) else None


def _replace(path: Path, write: Any) -> None:
    """Let `write` make a file beside `path` and put it in its place, all or nothing."""
    part = path.with_name(f"part-{path.name}")
    write(part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
