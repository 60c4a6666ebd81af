"""An actor and a critic that learn in the imagination of frozen world models (Hafner et al. 2020, arXiv 1912.01603).

Letters: R runs, N starts, H imagined steps, A size of an action; see `rssm`. An action is normal with mean tanh(m) and
a standard deviation from 0.1 to 1, cut to [-1, 1] (the cut passes gradients on). The actor maximises lambda-returns,
differentiated through the dynamics with straight-through samples of z; the critic regresses on them. The reward of an
action is that predicted from the state it leads to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jacnorm.studies.worldmodel import rssm
from jacnorm.studies.worldmodel.rssm import Parameters, Sizes
from jacnorm.studies.worldmodel.settings import PendulumSettings
from jacnorm.training.stacked import Stack

SMALLEST_DEVIATION = 0.1
_HALF_LOG = 0.5 * math.log(2 * math.pi * math.e)


@dataclass(frozen=True)
class Draws:
    """Standard noise of H imagined steps."""

    action: Tensor
    """(R, H, N, A), normal."""
    latent: Tensor
    """(R, H, N, K C), Gumbel."""


@dataclass(frozen=True)
class Imagined:
    """What the actor does in imagination."""

    h: Tensor
    """(R, H + 1, N, D), the starts first."""
    z: Tensor
    """(R, H + 1, N, K C)."""
    entropy: Tensor
    """(R, H, N), of each action's distribution, in nats."""


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of one actor and its critic, two hidden layers each."""
    return {
        **rssm.head_shapes("actor", sizes.state, sizes.hidden, 2 * sizes.actions, depth=2),
        **rssm.head_shapes("critic", sizes.state, sizes.hidden, 1, depth=2),
    }


def initial(sizes: Sizes, generators: Sequence[torch.Generator]) -> Stack:
    """Parameters of actor and critic; mean, deviation and value are the same everywhere."""
    stack = rssm.drawn(shapes(sizes), generators)
    for name in ("actor.output", "critic.output"):
        stack[name].zero_()
    return stack


def distribution(parameters: Parameters, h: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (R, N, A) each."""
    mean, deviation = rssm.head(parameters, "actor", h, z).chunk(2, -1)
    return mean.tanh(), SMALLEST_DEVIATION + (1 - SMALLEST_DEVIATION) * torch.sigmoid(deviation + 2)


def act(parameters: Parameters, h: Tensor, z: Tensor) -> Tensor:
    """What the actor does when it is evaluated: the mean, (R, N, A)."""
    return distribution(parameters, h, z)[0]


def value(parameters: Parameters, h: Tensor, z: Tensor) -> Tensor:
    """The critic's value, (R, N)."""
    return rssm.head(parameters, "critic", h, z).squeeze(-1)


def imagine(parameters: Parameters, model: Parameters, h: Tensor, z: Tensor, draws: Draws, classes: int) -> Imagined:
    """Let the actor act in the model from starts h (R, N, D) and z (R, N, K C)."""
    states, entropies = [(h, z)], []
    for action_noise, latent_noise in zip(draws.action.unbind(1), draws.latent.unbind(1), strict=True):
        # The state's own gradient comes from what follows the action, not from how the action would change with it.
        mean, deviation = distribution(parameters, h.detach(), z.detach())
        a = mean + deviation * action_noise
        a = a + (a.clamp(-1, 1) - a).detach()
        h, z = rssm.imagine_step(model, h, z, a, latent_noise, classes)
        states.append((h, z))
        entropies.append(deviation.log().sum(-1) + mean.shape[-1] * _HALF_LOG)
    each_h, each_z = zip(*states, strict=True)
    return Imagined(torch.stack(each_h, 1), torch.stack(each_z, 1), torch.stack(entropies, 1))


def lambda_returns(rewards: Tensor, values: Tensor, discount: float, mixing: float) -> Tensor:
    """Returns (R, H, N) of each step but the last state's.

    G_t = r_{t+1} + discount ((1 - mixing) v_{t+1} + mixing G_{t+1}), G_H = v_H. rewards, values: (R, H, N), of the
    states that the H actions lead to.
    """
    following = values[:, -1]
    found = []
    for r, v in zip(reversed(rewards.unbind(1)), reversed(values.unbind(1)), strict=True):
        following = r + discount * ((1 - mixing) * v + mixing * following)
        found.append(following)
    return torch.stack(found[::-1], 1)


def losses(
    parameters: Parameters, model: Parameters, imagined: Imagined, settings: PendulumSettings
) -> Mapping[str, Tensor]:
    """Each run's `actor_loss`, `critic_loss` and mean `return` from the starts, (R,) each.

    The critic's values inside the returns carry no gradient to the critic, nor does the regression carry any to the
    model.
    """
    steps, starts = imagined.entropy.shape[1:]
    later_h, later_z = imagined.h[:, 1:].flatten(1, 2), imagined.z[:, 1:].flatten(1, 2)  # (R, H N, .)
    fixed = {name: tensor.detach() for name, tensor in parameters.items()}
    rewards = rssm.reward(model, later_h, later_z).unflatten(1, (steps, starts))
    values = value(fixed, later_h, later_z).unflatten(1, (steps, starts))
    returns = lambda_returns(rewards, values, settings.discount, settings.return_lambda)  # (R, H, N)
    weights = settings.discount ** torch.arange(steps, device=returns.device)[:, None]  # (H, 1)
    gain = weights * (returns + settings.entropy * imagined.entropy)
    states = [each[:, :-1].flatten(1, 2).detach() for each in (imagined.h, imagined.z)]
    guesses = value(parameters, *states).unflatten(1, (steps, starts))
    misses = weights * (guesses - returns.detach()).square()
    return {
        "actor_loss": -gain.mean((1, 2)),
        "critic_loss": misses.mean((1, 2)),
        "return": returns[:, 0].mean(1).detach(),
    }
