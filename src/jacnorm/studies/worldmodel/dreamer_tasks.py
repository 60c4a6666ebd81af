"""The environments that DreamerV3 plays in: DeepMind Control tasks and a small one that needs no MuJoCo.

Runs in DreamerV3's own environment. Each environment has a source of random numbers that can be set, kept and put back,
so that agents can be compared in the same episodes and a killed training goes on in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import dreamerv3
import embodied
import numpy as np

from jacnorm.studies.worldmodel import perturbations_numpy
from jacnorm.studies.worldmodel.dreamer_worker import REPEAT

SIDE = 64
"""Of images, in pixels."""


class Dummy(embodied.Env):
    """A pendulum pushed by a small torque, upright at angle 0; episodes of 60 decisions.

    Sees cosine and sine of the angle and the velocity (proprio), or an image of the rod (pixels). The reward is
    (1 + cos angle) / 2. Only there to try the machinery without a simulator: 20 lines of mechanics.
    """

    LENGTH = 60
    STEP = 0.05

    def __init__(self, observation: str) -> None:
        self.random = np.random.RandomState(0)
        self.gravity = 10.0
        self._observation = observation
        self._angle = self._velocity = 0.0
        self._count = 0
        self._done = True

    @property
    def obs_space(self) -> dict[str, embodied.Space]:
        """What is seen, the reward, and where episodes begin and end."""
        seen = {
            "pixels": {"image": embodied.Space(np.uint8, (SIDE, SIDE, 3))},
            "proprio": {"state": embodied.Space(np.float32, (3,))},
        }
        flags = {name: embodied.Space(bool) for name in ("is_first", "is_last", "is_terminal")}
        return {**seen[self._observation], "reward": embodied.Space(np.float32), **flags}

    @property
    def act_space(self) -> dict[str, embodied.Space]:
        """One torque in [-1, 1], and whether to begin anew."""
        return {"action": embodied.Space(np.float32, (1,), -1.0, 1.0), "reset": embodied.Space(bool)}

    def step(self, action: Mapping[str, Any]) -> dict[str, Any]:
        """One decision; after the last one of an episode, or on demand, a new start at random."""
        first = bool(action["reset"]) or self._done
        if first:
            self._angle, self._velocity = self.random.uniform(-math.pi, math.pi), self.random.uniform(-1, 1)
            self._count, self._done = 0, False
        else:
            push = 1.5 * self.gravity * math.sin(self._angle) + 6.0 * float(action["action"][0])
            self._velocity = min(8.0, max(-8.0, self._velocity + push * self.STEP))
            self._angle += self._velocity * self.STEP
            self._count += 1
            self._done = self._count >= self.LENGTH
        cos, sin = math.cos(self._angle), math.sin(self._angle)
        seen = {"state": np.array([cos, sin, self._velocity / 8], np.float32)}
        if self._observation == "pixels":
            seen = {"image": _rod(cos, sin)}
        reward = np.float32(0.0 if first else (1 + cos) / 2)
        return {**seen, "reward": reward, "is_first": first, "is_last": self._done, "is_terminal": False}


def _rod(cos: float, sin: float) -> np.ndarray:
    """A rod from the centre, upwards at angle 0, as a grey image (SIDE, SIDE, 3) uint8."""
    x, y = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(1, -1, SIDE))
    along = np.clip(x * sin + y * cos, 0, 0.8)
    away = np.hypot(x - along * sin, y - along * cos)
    return np.repeat((255 * np.clip(1.2 - away / 0.15, 0, 1)).astype(np.uint8)[..., None], 3, -1)


class Task(embodied.Wrapper):
    """A task as the agent plays it, with everything that an experiment changes from outside."""

    def __init__(self, name: str, observation: str, config: embodied.Config) -> None:
        self._physics: Any = None
        self._factor = 1.0
        self._perturbation: tuple[str, float, Mapping[str, Any]] | None = None
        self._noise = np.random.default_rng(0)
        if name == "dummy":
            self._dummy = Dummy(observation)
            self.random, inner = self._dummy.random, self._dummy
        else:
            inner = self._control(name, observation)
        self.repeat = REPEAT[name]
        super().__init__(dreamerv3.wrap_env(inner, config))

    def _control(self, name: str, observation: str) -> embodied.Env:
        """A task of the DeepMind Control Suite."""
        from dm_control import suite
        from embodied.envs.dmc import DMC

        domain, task = name.split("_")
        simulator = suite.load(domain, task, task_kwargs={"random": 0})
        self._physics, self.random = simulator.physics, simulator.task.random
        self._gravity = self._physics.model.opt.gravity.copy()
        camera = DMC.DEFAULT_CAMERAS.get(domain, 0)
        return DMC(simulator, REPEAT[name], observation == "pixels", (SIDE, SIDE), camera)

    def reseed(self, number: int) -> None:
        """Let the next episode depend on this number alone."""
        self.random.seed(number % 2**32)
        self._noise = np.random.default_rng(number)

    def change(self, perturbation: str, strength: float, options: Mapping[str, Any]) -> None:
        """Play under a condition from the next episode on; the perturbations are those of `perturbations`."""
        self._factor = strength if perturbation == "gravity" else 1.0
        self._perturbation = (perturbation, strength, options)

    def step(self, action: Mapping[str, Any]) -> dict[str, Any]:
        """One decision, seen under the condition."""
        seen = self.env.step(action)
        if seen["is_first"]:
            self._set_gravity()
        if self._perturbation is not None and "image" in seen:
            seen["image"] = perturbations_numpy.perturb(seen["image"], *self._perturbation, self._noise)
        return seen

    def _set_gravity(self) -> None:
        if self._physics is None:
            self._dummy.gravity = 10.0 * self._factor
        else:
            self._physics.model.opt.gravity[:] = self._factor * self._gravity
