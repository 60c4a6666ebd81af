"""What world models make of held-out episodes: filtered states, and rollouts from them.

All arms of a seed see the same episodes, sample z with the same Gumbel noise and are disturbed in the same directions,
so that their differences are not those of chance.

Letters: S seeds, R = S runs, E episodes, T steps, Q rollout steps, N = E DRAWS rollouts, D size of h, K C size of z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from jacnorm.studies.worldmodel import rssm
from jacnorm.studies.worldmodel.categorical import gumbel
from jacnorm.studies.worldmodel.episodes import held_out_episodes
from jacnorm.studies.worldmodel.penalty import directions
from jacnorm.studies.worldmodel.pendulum import to_intensity
from jacnorm.studies.worldmodel.rssm import Parameters, Sizes, States
from jacnorm.studies.worldmodel.settings import STUDY, PendulumSettings
from jacnorm.training.seeds import generator

DRAWS = 8
"""Rollouts of an episode, each with its own disturbance and Gumbel noise: one alone tells more of chance."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out episodes of each seed and the draws that go with them, on the job's device."""

    images: Tensor
    """(S, E, T + 1, 16, 16), in [0, 1]."""
    actions: Tensor
    """(S, E, T + 1): actions[t] leads to image t."""
    rewards: Tensor
    """(S, E, T + 1)."""
    first: Tensor
    """(S, E, T + 1), bool."""
    noise: Tensor
    """(S, E, T + 1, K C), Gumbel, of the posterior."""
    directions: Tensor
    """(S, N, D), unit vectors: where h is moved before a rollout."""
    rollout_noise: Tensor
    """(S, Q, N, K C), Gumbel, of the prior."""
    transitions: Tensor
    """(S, M): t + (T + 1) e of transitions from step t to t + 1 of episode e."""

    @classmethod
    def of(cls, settings: PendulumSettings, device: torch.device) -> Self:
        """Generate, or read, the episodes and draw the noise of every seed."""
        found = [cls._of_seed(settings, seed) for seed in settings.seeds]
        # Seeds of the user's episodes share them, and generated ones have no resets: as many transitions for each.
        return cls(*(torch.stack([getattr(one, each.name) for one in found]).to(device) for each in fields(cls)))

    @classmethod
    def _of_seed(cls, settings: PendulumSettings, seed: int) -> Self:
        episodes = held_out_episodes(settings, seed)
        sizes, observations, rollouts = Sizes.of(settings), episodes.steps + 1, len(episodes) * DRAWS
        cell = f"pendulum held out episodes={len(episodes)} latent={sizes.groups}x{sizes.classes} deter={sizes.deter}"
        streams = {
            purpose: generator(STUDY, cell, seed, purpose)
            for purpose in ("posterior", "directions", "rollouts", "transitions")
        }
        noise = gumbel((observations, len(episodes), sizes.latent), streams["posterior"]).transpose(0, 1)
        later = ~episodes.first
        later[:, 0] = False
        inside = later.flatten().nonzero().squeeze(1) - 1  # (transitions,), where they start
        order = torch.randperm(len(inside), generator=streams["transitions"])[: settings.jacobian_transitions]
        return cls(
            to_intensity(episodes.image),
            episodes.action,
            episodes.reward,
            episodes.first,
            noise,
            directions((rollouts, sizes.deter), streams["directions"]),
            gumbel((max(settings.horizons), rollouts, sizes.latent), streams["rollouts"]),
            inside[order.sort().values],
        )

    def states(self, parameters: Parameters, classes: int) -> States:
        """Filtered states of all episodes."""
        return rssm.observe(parameters, self.images, self.actions, self.first, self.noise, classes)

    def starts(self, states: States) -> tuple[Tensor, Tensor, Tensor]:
        """Where the chosen transitions start: h (S, M, D), z (S, M, K C) and the action that follows (S, M, 1)."""
        at = self.transitions.unsqueeze(-1)
        h, z = (each.flatten(1, 2).take_along_dim(at, 1) for each in (states.h, states.z))
        return h, z, self.actions.flatten(1).take_along_dim(self.transitions + 1, 1).unsqueeze(-1)


@dataclass(frozen=True)
class Rollouts:
    """What a model predicts after the context, by horizon (Q), of each run: means over rollouts, (R, Q) each.

    NaN where every episode has a reset on the way.
    """

    divergence: Tensor
    """Distance between the h of the disturbed and the clean rollout, over the disturbance's length."""
    image_error: Tensor
    """Squared error of the clean rollout's image, summed over pixels."""
    reward_error: Tensor
    """Squared error of its reward."""


def roll(
    parameters: Parameters, h: Tensor, z: Tensor, actions: Tensor, noise: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """Imagined states h (R, Q, N, D) and z (R, Q, N, K C) after each of Q actions (R, Q, N) from h (R, N, D) and z."""
    found = []
    for a, draws in zip(actions.unsqueeze(-1).unbind(1), noise.unbind(1), strict=True):
        h, z = rssm.imagine_step(parameters, h, z, a, draws, classes)
        found.append((h, z))
    each_h, each_z = zip(*found, strict=True)
    return torch.stack(each_h, 1), torch.stack(each_z, 1)


def rollouts(parameters: Parameters, held_out: HeldOut, states: States, settings: PendulumSettings) -> Rollouts:
    """Roll out from the last of `context` observations, with h as it is and disturbed, under equal actions and noise.

    The disturbance is `disturbance` times as long as h; z stays.
    """
    start, steps, classes = settings.context - 1, max(settings.horizons), settings.classes
    after = slice(start + 1, start + 1 + steps)
    h, z = (each[:, :, start].repeat_interleave(DRAWS, 1) for each in (states.h, states.z))  # (R, N, .)
    actions = held_out.actions[:, :, after].repeat_interleave(DRAWS, 1).transpose(1, 2)  # (R, Q, N)
    length = settings.disturbance * h.norm(dim=-1)  # (R, N)
    moved = h + length.unsqueeze(-1) * held_out.directions
    clean_h, clean_z = roll(parameters, h, z, actions, held_out.rollout_noise, classes)
    moved_h, _ = roll(parameters, moved, z, actions, held_out.rollout_noise, classes)
    apart = (moved_h - clean_h).norm(dim=-1) / length.unsqueeze(1)  # (R, Q, N)
    images, rewards = _predicted(parameters, clean_h, clean_z, settings.horizons)
    at = [start + horizon for horizon in settings.horizons]
    truth, received = (each[:, :, at].transpose(1, 2) for each in (held_out.images, held_out.rewards))  # (R, Q, E, .)
    misses = (images - truth.repeat_interleave(DRAWS, 2)).square().sum((-2, -1))  # (R, Q, N)
    reward_misses = (rewards - received.repeat_interleave(DRAWS, 2)).square()
    unbroken = held_out.first[:, :, after].cumsum(2).transpose(1, 2) == 0  # (R, Q, E)
    unbroken = unbroken[:, _index(settings.horizons)].repeat_interleave(DRAWS, 2)
    return Rollouts(*(_mean(each, unbroken) for each in (apart[:, _index(settings.horizons)], misses, reward_misses)))


def predicted_images(
    parameters: Parameters, h: Tensor, z: Tensor, actions: Tensor, noise: Tensor, settings: PendulumSettings
) -> Tensor:
    """Images (R, 1 + horizons, N, 16, 16) seen at the start of a rollout (see `roll`) and predicted at each horizon."""
    later = roll(parameters, h, z, actions, noise, settings.classes)
    images, _ = _predicted(parameters, *later, settings.horizons)
    return torch.cat([rssm.decode(parameters, h, z).unsqueeze(1), images], 1)


def _predicted(parameters: Parameters, h: Tensor, z: Tensor, horizons: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images (R, Q, N, 16, 16) and rewards (R, Q, N) at the horizons, from the states of all steps."""
    size = (len(horizons), h.shape[2])
    at_h, at_z = (each[:, _index(horizons)].flatten(1, 2) for each in (h, z))
    images, rewards = rssm.decode(parameters, at_h, at_z), rssm.reward(parameters, at_h, at_z)
    return images.unflatten(1, size), rewards.unflatten(1, size)


def _index(horizons: Sequence[int]) -> list[int]:
    return [horizon - 1 for horizon in horizons]


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over the last axis of what counts; NaN if nothing does. A NaN that does not count stays out."""
    return torch.where(counted, values.double(), 0.0).sum(-1) / counted.sum(-1)
