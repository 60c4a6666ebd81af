"""Episodes of the pendulum under a random policy, or of the user's, and sequences of them to learn from.

Letters: E episodes, T steps, so T + 1 observations, B sequences of a batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from jacnorm.errors import UserError
from jacnorm.files import load_tensors, save_tensors
from jacnorm.studies.worldmodel.pendulum import MAX_SPEED, SIZE, Pendulum, to_levels
from jacnorm.studies.worldmodel.settings import STUDY, PendulumSettings
from jacnorm.training.seeds import generator

EVALUATION_SPEED = 1.0
"""Largest |theta'| at the start of an episode that is played to evaluate an agent, in rad/s."""
CHANGE = 0.3
"""Probability that the random policy draws a new action."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Episodes:
    """What was seen, done and received; observation t is what action t led to.

    Where `first` is true nothing led to the observation: action and reward are 0 there, h and z are to start from 0,
    and the pair (t - 1, t) is no transition.
    """

    image: Tensor
    """(E, T + 1, 16, 16), uint8."""
    action: Tensor
    """(E, T + 1), float32 in [-1, 1]."""
    reward: Tensor
    """(E, T + 1), float32."""
    first: Tensor
    """(E, T + 1), bool."""

    def __len__(self) -> int:
        """E."""
        return len(self.action)

    @property
    def steps(self) -> int:
        """T."""
        return self.action.shape[1] - 1

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """Some of the episodes."""
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))


def training_episodes(settings: PendulumSettings, seed: int) -> Episodes:
    """The episodes a seed learns from: generated, or the first ones of the user's file, the same for every seed."""
    if settings.episodes_path is None:
        return generate(settings, seed, settings.episodes, "training episodes")
    return _own(settings)[: settings.episodes]


def held_out_episodes(settings: PendulumSettings, seed: int) -> Episodes:
    """Held-out episodes: generated, or those of the user's file that follow the ones to learn from."""
    if settings.episodes_path is None:
        return generate(settings, seed, settings.test_episodes, "held-out episodes")
    return _own(settings)[settings.episodes : settings.episodes + settings.test_episodes]


def generate(settings: PendulumSettings, seed: int, episodes: int, purpose: str) -> Episodes:
    """Episodes of the random policy, from angles U(-pi, pi) and velocities U(-8, 8).

    They depend on their length, gravity, number, `seed` and `purpose`, and on nothing of the agents.
    """
    cell = f"pendulum steps={settings.episode_steps} gravity={settings.gravity} episodes={episodes}"
    source = generator(STUDY, cell, seed, purpose)
    pendulum = Pendulum(settings.gravity)
    pendulum.reset(*starts(episodes, source, MAX_SPEED))
    action = random_actions(episodes, settings.episode_steps, source)  # (E, T)
    images, rewards = [to_levels(pendulum.image())], [torch.zeros(episodes)]
    for step in range(settings.episode_steps):
        rewards.append(pendulum.step(action[:, step]))
        images.append(to_levels(pendulum.image()))
    first = torch.zeros(episodes, settings.episode_steps + 1, dtype=torch.bool)
    first[:, 0] = True
    nothing = torch.zeros(episodes, 1)
    return Episodes(torch.stack(images, 1), torch.cat([nothing, action], 1), torch.stack(rewards, 1), first)


def starts(episodes: int, source: torch.Generator, speed: float) -> tuple[Tensor, Tensor]:
    """Angles (E,) from U(-pi, pi) and velocities (E,) from U(-speed, speed)."""
    angle, velocity = 2 * torch.rand(2, episodes, generator=source) - 1
    return math.pi * angle, speed * velocity


def random_actions(episodes: int, steps: int, source: torch.Generator) -> Tensor:
    """Actions (E, T) of the random policy: from U(-1, 1), drawn anew with probability 0.3 and otherwise kept."""
    fresh = 2 * torch.rand(episodes, steps, generator=source) - 1
    changes = torch.rand(episodes, steps, generator=source) < CHANGE
    since = torch.where(changes, torch.arange(steps), 0).cummax(1).values  # step of the latest change; 0: the start
    return fresh.gather(1, since)


def sample(episodes: Episodes, source: torch.Generator, batch: int, length: int) -> Episodes:
    """Sequences of `length` observations, (B, length, ...), each from a random place in a random episode.

    Their first observation is marked `first`, whatever it was in its episode, since nothing before it is known; its
    action is then 0, and its reward stays. Raises UserError if episodes are shorter.
    """
    if length > episodes.steps + 1:
        raise UserError(
            f"sequences of {length} observations cannot be cut from episodes of {episodes.steps + 1}; lower length "
            "and lengths, or give longer episodes"
        )
    device = episodes.action.device
    rows = torch.randint(len(episodes), (batch, 1), generator=source).to(device)
    begin = torch.randint(episodes.steps + 2 - length, (batch, 1), generator=source).to(device)
    times = begin + torch.arange(length, device=device)  # (B, length)
    image, action, reward, first = (getattr(episodes, field.name)[rows, times] for field in fields(episodes))
    action[:, 0], first[:, 0] = 0, True
    return Episodes(image, action, reward, first)


def save(path: Path | str, episodes: Episodes) -> None:
    """Write the four tensors, by their names, as safetensors."""
    save_tensors(path, {field.name: getattr(episodes, field.name) for field in fields(episodes)})


def load(path: Path | str) -> Episodes:
    """Read what `save` wrote, or a file of one's own with the same four tensors.

    A reset inside a sequence is allowed where `first` marks it. One that is not marked cannot be told from a movement
    and would be learnt as one.

    Raises UserError if the file is missing, cut short or damaged; lacks one of the tensors or has another shape or
    dtype than `Episodes`; holds numbers that are not finite or actions beyond [-1, 1]; or if a sequence does not begin
    with `first`, or an action or reward stands where it is set.
    """
    if not Path(path).exists():
        raise UserError(f"episodes file {path} does not exist; correct episodes_path, or leave it out to generate some")
    try:
        tensors, _ = load_tensors(path)
    except UserError:
        raise UserError(
            f"episodes file {path} is cut short or no safetensors file; copy it again, or leave episodes_path out to "
            "generate episodes"
        ) from None
    episodes = _checked(tensors, str(path))
    resets = int(episodes.first[:, 1:].sum())
    _log.info(
        "%s: %d episodes of %d steps with %d marked resets inside; a reset that is not marked cannot be seen",
        path, len(episodes), episodes.steps, resets,
    )  # fmt: skip
    return episodes


def _own(settings: PendulumSettings) -> Episodes:
    """The user's episodes, enough and long enough for the settings."""
    assert settings.episodes_path is not None
    episodes = load(settings.episodes_path)
    needed = settings.episodes + settings.test_episodes
    if len(episodes) < needed:
        raise UserError(
            f"episodes file {settings.episodes_path} holds {len(episodes)} episodes, but episodes and test_episodes "
            f"ask for {needed}; lower them, or give more episodes"
        )
    if episodes.steps < settings.episode_steps:
        raise UserError(
            f"episodes in {settings.episodes_path} have {episodes.steps} steps, fewer than episode_steps, "
            f"{settings.episode_steps}; lower episode_steps, or give longer episodes"
        )
    return episodes


def _checked(tensors: Mapping[str, Tensor], name: str) -> Episodes:
    """The tensors as episodes; see `load`."""
    dtypes = {"image": torch.uint8, "action": torch.float32, "reward": torch.float32, "first": torch.bool}
    if set(tensors) != set(dtypes):
        raise UserError(
            f"episodes file {name} holds the tensors {', '.join(sorted(tensors)) or 'none'}; needed are exactly "
            f"{', '.join(dtypes)}"
        )
    for each, dtype in dtypes.items():
        if tensors[each].dtype != dtype:
            raise UserError(f"episodes file {name}: {each} is {tensors[each].dtype}; store it as {dtype}")
    size = tuple(tensors["action"].shape)
    shapes = {each: tuple(tensor.shape) for each, tensor in tensors.items()}
    expected = {each: (*size, SIZE, SIZE) if each == "image" else size for each in dtypes}
    if len(size) != 2 or size[0] < 1 or size[1] < 2 or shapes != expected:
        raise UserError(
            f"episodes file {name} has the shapes {', '.join(f'{each} {shapes[each]}' for each in dtypes)}; needed are "
            f"image (E, T + 1, {SIZE}, {SIZE}) and action, reward and first (E, T + 1), with E and T at least 1"
        )
    episodes = Episodes(**tensors)
    if not (episodes.action.abs() <= 1).all():  # not true of NaN either
        raise UserError(f"episodes file {name} has actions beyond [-1, 1]; divide them by the largest torque")
    if not episodes.reward.isfinite().all():
        raise UserError(f"episodes file {name} has rewards that are not finite; leave out the episodes that have them")
    if not episodes.first[:, 0].all():
        raise UserError(f"episodes file {name}: not every sequence begins with first set; set it at step 0 of each")
    if episodes.action[episodes.first].any() or episodes.reward[episodes.first].any():
        raise UserError(
            f"episodes file {name} has an action or reward where first is set, though nothing led there; action[t] and "
            "reward[t] belong to the step that led to image[t], so shift them by one step"
        )
    return episodes
