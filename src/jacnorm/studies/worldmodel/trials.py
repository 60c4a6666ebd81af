"""Episodes that agents play in the pendulum under perturbations, to be evaluated.

Whoever plays and whatever the condition, an episode has the same start, the same noise of the images before it is
scaled, and the same Gumbel noise of z (common random numbers).

Letters: S seeds, R = S runs, N episodes, T steps, K C size of z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from jacnorm.studies.worldmodel import actor as actors
from jacnorm.studies.worldmodel import rssm
from jacnorm.studies.worldmodel.categorical import gumbel
from jacnorm.studies.worldmodel.episodes import EVALUATION_SPEED, random_actions, starts
from jacnorm.studies.worldmodel.pendulum import SIZE, Pendulum
from jacnorm.studies.worldmodel.perturbations import Condition, Noise, draw, perturb
from jacnorm.studies.worldmodel.rssm import Parameters, Sizes
from jacnorm.studies.worldmodel.settings import STUDY, PendulumSettings
from jacnorm.training.seeds import generator


@dataclass(frozen=True)
class Trials:
    """What the episodes of each seed are played with, on the job's device."""

    settings: PendulumSettings
    angle: Tensor
    """(S, N), at the start, in rad."""
    velocity: Tensor
    """(S, N), in rad/s."""
    random: Tensor
    """(T, S, N), actions of the random policy."""
    latents: Sequence[Tensor]
    """T of (S, N, K C), Gumbel."""
    noise: Sequence[Noise]
    """T, of the images of all seeds, (S N, 16, 16)."""

    @classmethod
    def of(cls, settings: PendulumSettings, device: torch.device) -> Self:
        """Draw them."""
        episodes, steps, sizes = settings.evaluation_episodes, settings.evaluation_steps, Sizes.of(settings)

        def streams(purpose: str, of: str = "") -> list[torch.Generator]:
            cell = f"pendulum trials episodes={episodes}{of}"
            return [generator(STUDY, cell, seed, purpose) for seed in settings.seeds]

        begin = [torch.stack(starts(episodes, each, EVALUATION_SPEED)) for each in streams("starts")]
        random = [random_actions(episodes, steps, each).T for each in streams("random policy", f" steps={steps}")]
        of_images = streams("perturbations")
        of_latents = streams("latents", f" latent={sizes.groups}x{sizes.classes}")
        angle, velocity = torch.stack(begin, 1).to(device)
        return cls(
            settings,
            angle,
            velocity,
            torch.stack(random, 1).to(device),
            [
                torch.stack([gumbel((episodes, sizes.latent), each) for each in of_latents]).to(device)
                for _ in range(steps)
            ],
            [_noise(episodes, of_images).to(device) for _ in range(steps)],
        )

    def random_returns(self, condition: Condition) -> Tensor:
        """Returns (S, N) of the random policy, which does not look."""
        return self._played(condition, lambda step, _: self.random[step])

    def returns(self, model: Parameters, actor: Parameters, condition: Condition) -> Tensor:
        """Returns (S, N) of one agent per seed, which sees perturbed images and takes its actor's mean action."""
        settings = self.settings
        size = self.angle.shape
        h = self.angle.new_zeros(*size, settings.deter)
        z = self.angle.new_zeros(*size, settings.groups * settings.classes)
        a = self.angle.new_zeros(*size, 1)

        def policy(step: int, pendulum: Pendulum) -> Tensor:
            nonlocal h, z, a
            seen = perturb(pendulum.image().flatten(0, 1), condition, settings, self.noise[step]).unflatten(0, size)
            first = torch.full(size, step == 0, device=h.device)
            embedded = rssm.encode(model, seen)
            h, z = rssm.observe_step(model, h, z, a, first, embedded, self.latents[step], settings.classes)
            a = actors.act(actor, h, z)
            return a.squeeze(-1)

        return self._played(condition, policy)

    def _played(self, condition: Condition, policy: Callable[[int, Pendulum], Tensor]) -> Tensor:
        """Sums of rewards (S, N) of a policy that is given the step and the pendulums."""
        pendulum = Pendulum(self.settings.gravity * condition.gravity_factor)
        pendulum.reset(self.angle, self.velocity)
        total = torch.zeros_like(self.angle)
        for step in range(self.settings.evaluation_steps):
            total += pendulum.step(policy(step, pendulum))
        return total


def _noise(episodes: int, sources: Sequence[torch.Generator]) -> Noise:
    """Noise of one step of all seeds."""
    each = [draw((episodes, SIZE, SIZE), source) for source in sources]
    return Noise(torch.cat([one.normal for one in each]), torch.cat([one.uniform for one in each]))
