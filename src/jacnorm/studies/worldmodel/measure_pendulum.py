"""Jacobians, rollouts, predictions and returns of the agents trained on the pendulum.

Agents of one arm are measured together, one per seed, and independently of the other arms. An agent that diverged has
rows of NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.errors import UserError
from jacnorm.studies.worldmodel import arms as kept_agents
from jacnorm.studies.worldmodel import rssm
from jacnorm.studies.worldmodel import tables as study_tables
from jacnorm.studies.worldmodel.arms import Agents, arms
from jacnorm.studies.worldmodel.held_out import DRAWS, HeldOut, predicted_images, rollouts
from jacnorm.studies.worldmodel.perturbations import Condition, conditions, draw, perturb
from jacnorm.studies.worldmodel.rssm import Sizes, States
from jacnorm.studies.worldmodel.settings import STUDY, Device, PendulumSettings
from jacnorm.studies.worldmodel.transition_norms import NORMS, norms
from jacnorm.studies.worldmodel.trials import Trials
from jacnorm.training.job import job
from jacnorm.training.progress import Progress
from jacnorm.training.seeds import generator

Rows = Iterator[dict[str, Any]]
TABLES = ("jacobians", "divergence", "prediction", "returns", "frames")


def pendulum(settings: PendulumSettings, tables: Path, weights: Path, device: Device = "auto") -> None:
    """Measure every agent on held-out episodes, and let it play under every condition."""
    with job(STUDY, "measure", "pendulum", settings, device) as this:
        agents = trained_agents(settings, weights)
        measuring = Measuring.of(settings, this.device)
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
        with Progress(len(agents), "pendulum", unit="arms") as progress:
            for done, arm in enumerate(agents, start=1):
                for name, found in measuring.tables(_on(arm, this.device)).items():
                    rows[name] += found
                progress.update(done)
        for name, table in rows.items():
            study_tables.write(tables, f"pendulum_{name}", settings, table, this.tracker)


def trained_agents(settings: PendulumSettings, weights: Path) -> list[Agents]:
    """The agents that the training step kept. Raises UserError if they are of other settings."""
    agents = kept_agents.load(weights)
    expected = {name: (len(settings.seeds), *shape) for name, shape in rssm.shapes(Sizes.of(settings)).items()}
    alike = all({name: tuple(tensor.shape) for name, tensor in each.model.items()} == expected for each in agents)
    if not alike or [each.arm for each in agents] != arms(settings):
        raise UserError(f"{weights} holds agents of other settings; run the training step again with these")
    return agents


def image_condition(settings: PendulumSettings) -> Condition | None:
    """The first condition that changes what is seen, whose frames are kept; None if there is none."""
    return next((each for each in conditions(settings) if each.perturbation not in ("clean", "gravity")), None)


@dataclass(frozen=True)
class Measuring:
    """What all arms are measured with; random: returns (S,) of the random policy under each factor of gravity."""

    settings: PendulumSettings
    held_out: HeldOut
    trials: Trials
    random: Mapping[float, Tensor]

    @classmethod
    def of(cls, settings: PendulumSettings, device: torch.device) -> Measuring:
        """Generate the held-out episodes, draw all noise, and play the random policy."""
        trials = Trials.of(settings, device)
        each = {condition.gravity_factor: condition for condition in conditions(settings)}
        random = {factor: trials.random_returns(condition).double().mean(1) for factor, condition in each.items()}
        return cls(settings, HeldOut.of(settings, device), trials, random)

    def tables(self, agents: Agents) -> dict[str, list[dict[str, Any]]]:
        """The rows of one arm, by table."""
        states = self.held_out.states(agents.model, self.settings.classes)
        rolled = asdict(rollouts(agents.model, self.held_out, states, self.settings))
        return {
            "jacobians": list(self._jacobians(agents, states)),
            "divergence": list(self._by_horizon(agents, rolled, ["divergence"])),
            "prediction": list(self._by_horizon(agents, rolled, ["image_error", "reward_error"])),
            "returns": list(self._returns(agents)),
            "frames": list(self._frames(agents, states)),
        }

    def _rows(self, agents: Agents, more: Mapping[str, Any], measured: Mapping[str, Tensor]) -> Rows:
        """A row per seed; measured: (S,) each, NaN for agents that diverged."""
        lost = _lost(agents)
        values = {name: each.double().masked_fill(lost, math.nan).tolist() for name, each in measured.items()}
        for position, seed in enumerate(self.settings.seeds):
            own = {name: each[position] for name, each in values.items()}
            yield {**_columns(agents, seed), **more, **own}

    def _jacobians(self, agents: Agents, states: States) -> Rows:
        starts = self.held_out.starts(states)
        means = {name: torch.full((len(self.settings.seeds),), math.nan, dtype=torch.float64) for name in NORMS}
        for run, lost in enumerate(_lost(agents).tolist()):
            if lost:
                continue
            parameters = {name: tensor[run : run + 1] for name, tensor in agents.model.items()}
            found = norms(parameters, *(each[run] for each in starts), self.settings.classes)
            for name, values in found.items():
                means[name][run] = values.mean()
        means = {name: values.to(agents.diverged_at.device) for name, values in means.items()}
        yield from self._rows(agents, {"transitions": self.held_out.transitions.shape[1]}, means)

    def _by_horizon(self, agents: Agents, rolled: Mapping[str, Tensor], columns: Sequence[str]) -> Rows:
        for number, horizon in enumerate(self.settings.horizons):
            means = {column: rolled[column][:, number] for column in columns}
            yield from self._rows(agents, {"horizon": horizon}, means)

    def _returns(self, agents: Agents) -> Rows:
        for condition in conditions(self.settings):
            found = self.trials.returns(agents.model, agents.actor, condition).double().mean(1)
            more = {
                "perturbation": condition.perturbation,
                "strength": condition.strength,
                "episodes": self.settings.evaluation_episodes,
            }
            random = self.random[condition.gravity_factor].tolist()
            for row, other in zip(self._rows(agents, more, {"return": found}), random, strict=True):
                yield {**row, "random_return": other}

    def _frames(self, agents: Agents, states: States) -> Rows:
        """Images of an episode of the first seed, and predictions after clean and after perturbed observations.

        The episode is the first one without a reset on the way.
        """
        settings, held_out = self.settings, self.held_out
        seen, steps = settings.context, max(settings.horizons)
        episode = int(held_out.first[0, :, 1 : seen + steps].any(1).int().argmin())
        one = slice(episode, episode + 1)
        parameters = {name: tensor[:1] for name, tensor in agents.model.items()}
        truth = held_out.images[0, episode]  # (T + 1, 16, 16)
        strips = {"true": truth[[seen - 1, *(seen - 1 + horizon for horizon in settings.horizons)]]}
        filtered = {"clean": (states.h[:1, one, seen - 1], states.z[:1, one, seen - 1])}  # (1, 1, .) each
        condition = image_condition(settings)
        if condition is not None:
            source = generator(STUDY, f"pendulum frames context={seen}", settings.seeds[0], "perturbations")
            perturbed = perturb(truth[:seen], condition, settings, draw(truth[:seen].shape, source).to(truth.device))
            given = (each[:1, one, :seen] for each in (held_out.actions, held_out.first, held_out.noise))
            found = rssm.observe(parameters, perturbed[None, None], *given, settings.classes)
            filtered["perturbed"] = found.h[:, :, -1], found.z[:, :, -1]
        actions = held_out.actions[:1, one, seen : seen + steps].transpose(1, 2)  # (1, Q, 1)
        noise = held_out.rollout_noise[:1, :, [episode * DRAWS]]
        for kind, (h, z) in filtered.items():
            images = predicted_images(parameters, h, z, actions, noise, settings)[0, :, 0]
            strips[kind] = images.masked_fill(_lost(agents)[0], math.nan).clamp(0, 1)
        for kind, strip in strips.items():
            for step, image in zip([0, *settings.horizons], strip.tolist(), strict=True):
                place = {**_columns(agents, settings.seeds[0]), "kind": kind, "step": step}
                for row, line in enumerate(image):
                    yield from ({**place, "row": row, "column": i, "intensity": each} for i, each in enumerate(line))


def _columns(agents: Agents, seed: int) -> dict[str, Any]:
    return {"seed": seed, "agent": "rssm", "task": "pendulum", **agents.arm.columns}


def _lost(agents: Agents) -> Tensor:
    """Which agents diverged, (S,); the last update may leave numbers that are not finite behind, which no loss saw."""
    lost = agents.diverged_at >= 0
    for tensor in (*agents.model.values(), *agents.actor.values()):
        lost = lost | ~tensor.isfinite().flatten(1).all(1)
    return lost


def _on(agents: Agents, device: torch.device) -> Agents:
    """The same agents on another device."""
    model, actor = ({name: tensor.to(device) for name, tensor in part.items()} for part in (agents.model, agents.actor))
    return Agents(agents.arm, model, actor, agents.diverged_at.to(device))
