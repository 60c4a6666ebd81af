"""Training of the small world model on the pendulum, and of an actor and critic in its imagination.

All agents of one shape train side by side. Agents of a seed share episodes, start, batches and noise, whatever their
arm, as far as shapes agree: every draw is a function of seed and update. First come the world models, then, in the
frozen models, actors and critics, for which all arms use sequences of the same number and length.

Errors of z (where they enter is not known of the paper) are added to the sampled one-hot vector wherever
training filters a sequence, and nowhere else: a normal error of each entry, and, with drift, a mean and a variance that
are drawn anew for every sequence and step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.code_version import code_version
from jacnorm.studies.worldmodel import actor as actors
from jacnorm.studies.worldmodel import arms as kept_agents
from jacnorm.studies.worldmodel import rssm
from jacnorm.studies.worldmodel import tables as study_tables
from jacnorm.studies.worldmodel.arms import Agents, Arm, arms
from jacnorm.studies.worldmodel.categorical import divergence, gumbel
from jacnorm.studies.worldmodel.episodes import Episodes, sample, training_episodes
from jacnorm.studies.worldmodel.penalty import Projections, directions, penalty
from jacnorm.studies.worldmodel.rssm import Parameters, Sizes, States
from jacnorm.studies.worldmodel.settings import STUDY, Device, PendulumSettings
from jacnorm.training.checkpoint import fingerprint
from jacnorm.training.job import Job, job
from jacnorm.training.loop import FitReport, RunId, discard, fit
from jacnorm.training.seeds import generator
from jacnorm.training.stacked import Stack, StackedAdam, gradients

STACK_RUNS = 12
"""Most agents that train together; a constant, so that the same job always gives the same bits."""
STARTS = 256
"""Most states of a batch that imagination starts from in one update."""
CURVE_ROWS = 20
"""Most rows of a run in the table of curves."""
DYNAMICS_WEIGHT, REPRESENTATION_WEIGHT = 0.5, 0.1
"""Weights of the divergence that trains the prior, and of the one that trains the posterior (DreamerV3)."""


@dataclass(frozen=True)
class Run:
    """One agent."""

    arm: Arm
    seed: int

    @property
    def id(self) -> RunId:
        """Its name."""
        return RunId(STUDY, f"pendulum {self.arm}", self.seed)


def pendulum(settings: PendulumSettings, tables: Path, weights: Path, device: Device = "auto") -> None:
    """Train every arm of every seed; keep the agents, what each reached, and how."""
    with job(STUDY, "train", "pendulum", settings, device) as this:
        episodes = {seed: training_episodes(settings, seed) for seed in settings.seeds}
        fits: list[dict[str, Any]] = []
        curves: list[dict[str, Any]] = []
        checkpoints: list[Path] = []
        trained: dict[Run, tuple[Stack, Stack, int]] = {}
        for number, runs in enumerate(stacks(settings)):
            for kind in ("model", "actor"):
                checkpoints.append(weights.with_name(f"{weights.stem}-{kind}-{number}.checkpoint.safetensors"))
            models = ModelStack(settings, runs, episodes, this.device)
            report = _fit(settings, models, episodes, checkpoints[-2], this, f"world models {number}")
            agents = ActorStack(settings, runs, models.parameters, episodes, this.device)
            acted = _fit(settings, agents, episodes, checkpoints[-1], this, f"actors {number}")
            lost = lost_at(report, acted)
            fits += models.fits(report, lost)
            curves += models.curves(report)
            trained |= dict(zip(runs, agents.unstacked(lost), strict=True))
        study_tables.write(tables, "pendulum_fits", settings, fits, this.tracker)
        study_tables.write(tables, "pendulum_curves", settings, curves, this.tracker)
        kept_agents.save(weights, [_together(arm, settings.seeds, trained) for arm in arms(settings)])
        for checkpoint in checkpoints:
            discard(checkpoint)


def stacks(settings: PendulumSettings) -> Iterator[list[Run]]:
    """Agents that train together: of one shape, at most `STACK_RUNS`, those with equal penalties side by side."""
    found: dict[tuple[int, int], list[Run]] = {}
    for arm in arms(settings):
        found.setdefault((arm.batch, arm.length), []).extend(Run(arm, seed) for seed in settings.seeds)
    for runs in found.values():
        runs.sort(key=lambda run: (run.arm.weight > 0, run.arm.include_prior), reverse=True)  # stable
        for start in range(0, len(runs), STACK_RUNS):
            yield runs[start : start + STACK_RUNS]


def updates(settings: PendulumSettings, batch: int) -> int:
    """Updates of the world model: as many sequences in all, whatever the batch."""
    return max(1, round(settings.updates * settings.batch / batch))


def lost_at(report: FitReport, acted: FitReport) -> list[int]:
    """Update at which each run's loss was not finite, counting on from the world model's to the actor's; -1: none."""
    found = []
    for model, agent in zip(report.diverged, acted.diverged, strict=True):
        found.append(model if model is not None else -1 if agent is None else report.steps + agent)
    return found


@dataclass(frozen=True)
class Batch:
    """Sequences of each run and the noise that goes with them; (R, B, T, ...)."""

    images: Tensor
    """(R, B, T, 16, 16), in [0, 1]."""
    actions: Tensor
    rewards: Tensor
    first: Tensor
    noise: Tensor
    """(R, B, T, K C), Gumbel."""
    error: Tensor | None
    """(R, B, T, K C), what is added to z; None if no run of the stack has an error."""


class Source:
    """Sequences and noise of R runs, as a function of the update; runs of a seed share them.

    purpose: what the numbers are for. Nothing depends on the other runs.
    """

    def __init__(
        self,
        sizes: Sizes,
        runs: Sequence[Run],
        episodes: Mapping[int, Episodes],
        shape: tuple[int, int],
        purpose: str,
        device: torch.device,
    ) -> None:
        self._sizes, self._shape, self._purpose, self._device = sizes, shape, purpose, device
        self.seeds = list(dict.fromkeys(run.seed for run in runs))
        self._of = torch.tensor([self.seeds.index(run.seed) for run in runs], device=device)
        self._episodes = {seed: episodes[seed].to(device) for seed in self.seeds}
        sizes_of = {
            kind: torch.tensor([run.arm.error_size * (run.arm.error == kind) for run in runs], device=device)
            for kind in ("zero-drift", "drift")
        }
        self._variance, self._drift = (each[:, None, None, None] for each in sizes_of.values())  # (R, 1, 1, 1)
        self._erring = any(run.arm.error != "none" for run in runs)

    def generators(self, index: int, part: str) -> list[torch.Generator]:
        """A stream for each seed, for one part of update `index`."""
        batch, length = self._shape
        cell = f"pendulum {self._purpose} batch={batch} length={length}"
        return [generator(STUDY, cell, seed, f"{part}/{index}") for seed in self.seeds]

    def spread(self, each: Sequence[Tensor]) -> Tensor:
        """One tensor per seed, as one per run: (R, ...)."""
        return torch.stack(list(each)).to(self._device)[self._of]

    def batch(self, index: int) -> Batch:
        """Sequences and noise of update `index`."""
        batch, length = self._shape
        drawn = [
            sample(self._episodes[seed], source, batch, length)
            for seed, source in zip(self.seeds, self.generators(index, "sequences"), strict=True)
        ]
        images, actions, rewards, first = (
            self.spread([getattr(each, field.name) for each in drawn]) for field in fields(Episodes)
        )
        shape = (batch, length, self._sizes.latent)
        noise = self.spread([gumbel(shape, source) for source in self.generators(index, "latents")])
        return Batch(images / 255, actions, rewards, first, noise, self._error(index) if self._erring else None)

    def _error(self, index: int) -> Tensor:
        batch, length = self._shape
        sources = self.generators(index, "errors")
        normal = self.spread([torch.randn(batch, length, self._sizes.latent, generator=each) for each in sources])
        mean, variance = (
            self.spread([torch.rand(batch, length, 1, generator=each) for each in sources]) * self._drift
            for _ in range(2)
        )
        return mean + (variance + self._variance).sqrt() * normal


class ModelStack:
    """R world models of one shape: a `jacnorm.training.loop.Trainee`."""

    def __init__(
        self, settings: PendulumSettings, runs: Sequence[Run], episodes: Mapping[int, Episodes], device: torch.device
    ) -> None:
        self.generators: dict[str, torch.Generator] = {}
        self.settings, self.runs, self.sizes = settings, list(runs), Sizes.of(settings)
        arm = runs[0].arm
        self.updates = updates(settings, arm.batch)
        self._source = Source(self.sizes, runs, episodes, (arm.batch, arm.length), "world model", device)
        self._frames = {seed: episodes[seed].action.shape[0] * episodes[seed].steps for seed in episodes}
        start = rssm.initial(self.sizes, [_start(settings, run.seed, "world model") for run in runs])
        self.parameters: Stack = {name: tensor.to(device) for name, tensor in start.items()}
        self._weights = torch.tensor([run.arm.weight for run in runs], device=device)
        self._optimiser = StackedAdam(self.parameters, settings.learning_rate)

    def step(self, index: int) -> dict[str, Tensor]:
        """One update of all runs. Metrics: loss (with the penalty), and the columns of the table of fits."""
        batch = self._source.batch(index)
        projections = self._projections(index)
        metrics: dict[str, Tensor] = {}

        def losses(parameters: Stack) -> Tensor:
            states = rssm.observe(
                parameters, batch.images, batch.actions, batch.first, batch.noise, self.sizes.classes, batch.error
            )
            metrics.update(self._model_losses(parameters, batch, states))
            plain = metrics["model_loss"]
            omega = self._penalties(parameters, batch, states.detach(), projections)
            if omega is None:
                return plain
            weighted = torch.where(self._weights > 0, self._weights * omega, 0.0)
            metrics.update(penalty=omega, penalty_share=weighted / plain)
            return plain + weighted

        found, changes = gradients(losses, self.parameters)
        self._optimiser.step(changes)
        return {"loss": found, **{name: each.detach() for name, each in metrics.items()}}

    def _model_losses(self, parameters: Parameters, batch: Batch, states: States) -> dict[str, Tensor]:
        """The loss without penalty and its parts, (R,) each."""
        settings, classes = self.settings, self.sizes.classes
        h, z, posterior = (each.flatten(1, 2) for each in (states.h, states.z, states.posterior))  # (R, B T, .)
        seen = rssm.decode(parameters, h, z) - batch.images.flatten(1, 2)
        image = seen.square().sum((-2, -1)).mean(1)
        received = (~batch.first).flatten(1, 2).to(h.dtype)  # nothing led to the first observation
        misses = (rssm.reward(parameters, h, z) - batch.rewards.flatten(1, 2)).square()
        reward = (misses * received).sum(1) / received.sum(1)
        prior = rssm.prior_logits(parameters, h)
        to_prior = divergence(posterior.detach(), prior, classes)  # (R, B T)
        to_posterior = divergence(posterior, prior.detach(), classes)
        dynamics, representation = (each.clamp(min=settings.free_nats).mean(1) for each in (to_prior, to_posterior))
        divergences = DYNAMICS_WEIGHT * dynamics + REPRESENTATION_WEIGHT * representation
        return {
            "model_loss": image + settings.reward_weight * reward + divergences,
            "image_loss": image,
            "reward_loss": reward,
            "kl": to_prior.mean(1),
        }

    def _groups(self) -> Iterator[tuple[slice, bool]]:
        """Neighbouring runs with one kind of penalty, and whether it includes the prior."""
        for include in (True, False):
            found = [i for i, run in enumerate(self.runs) if run.arm.weight > 0 and run.arm.include_prior == include]
            if found:
                yield slice(found[0], found[-1] + 1), include

    def _projections(self, index: int) -> Projections | None:
        """Directions for every run, (P, R, B (T - 1), .); None if none is penalised."""
        if not self._weights.any():
            return None
        arm = self.runs[0].arm
        samples = arm.batch * (arm.length - 1)

        def drawn(part: str, size: int) -> Tensor:
            shape = (self.settings.n_proj, samples, size)
            each = [directions(shape, one) for one in self._source.generators(index, part)]
            return self._source.spread(each).transpose(0, 1)

        return Projections(drawn("projections f", self.sizes.deter), drawn("projections prior", self.sizes.latent))

    def _penalties(
        self, parameters: Parameters, batch: Batch, states: States, projections: Projections | None
    ) -> Tensor | None:
        """Omega of each run, (R,), NaN where there is no penalty; None if no run has one.

        A transition leads from (h, z) at t by the action at t + 1, unless an episode begins at t + 1.
        """
        if projections is None:
            return None
        h, z = (each[:, :, :-1].flatten(1, 2) for each in (states.h, states.z))
        a, mask = batch.actions[:, :, 1:].flatten(1, 2).unsqueeze(-1), ~batch.first[:, :, 1:].flatten(1, 2)
        parts: list[Tensor] = []
        done = 0
        for group, include_prior in self._groups():
            own = {name: tensor[group] for name, tensor in parameters.items() if name.startswith(("sequence", "prior"))}
            parts.append(
                penalty(
                    lambda h, z, a, own=own: rssm.f(own, h, z, a, twice=True),
                    lambda h, own=own: rssm.prior(own, h, self.sizes.classes, twice=True),
                    h[group], z[group], a[group], mask[group],
                    Projections(projections.f[:, group], projections.prior[:, group]),
                    wrt=self.settings.wrt, include_prior=include_prior, power=self.settings.power,
                )
            )  # fmt: skip
            done = group.stop
        return torch.cat([*parts, parts[0].new_full((len(self.runs) - done,), torch.nan)])

    def freeze(self, diverged: Tensor) -> None:
        """Stop changing diverged runs."""
        self._optimiser.freeze(diverged)

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments."""
        return _state(self.parameters, self._optimiser)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        _load_state(self.parameters, self._optimiser, state)

    def fits(self, report: FitReport, lost: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Rows of the table of fits."""
        last = max(1, self.updates // 10)
        names = ("model_loss", "image_loss", "reward_loss", "kl", "penalty", "penalty_share")
        nothing = torch.full((self.updates, len(self.runs)), torch.nan)
        means = {name: report.history.get(name, nothing)[-last:].double().mean(0).tolist() for name in names}
        for i, (run, lost_at_) in enumerate(zip(self.runs, lost, strict=True)):
            diverged = report.diverged[i] is not None
            yield {
                **_row(run),
                "parameters": sum(tensor[0].numel() for tensor in self.parameters.values()),
                "updates": self.updates,
                **{name: math.nan if diverged else mean[i] for name, mean in means.items()},
                "diverged_at": lost_at_,
            }

    def curves(self, report: FitReport) -> Iterator[dict[str, Any]]:
        """Rows of the table of curves. All frames are seen from the start, and no episodes are played."""
        count = min(CURVE_ROWS, self.updates)
        ends = [-(-self.updates * number // count) for number in range(1, count + 1)]
        nothing = torch.full((self.updates, len(self.runs)), torch.nan)
        columns = {name: report.history.get(name, nothing).double() for name in ("model_loss", "kl", "penalty")}
        for i, run in enumerate(self.runs):
            for start, end in zip([0, *ends], ends, strict=False):
                means = {name: column[start:end, i].mean().item() for name, column in columns.items()}
                yield {**_row(run), "update": end, "frames": self._frames[run.seed], **means, "return": math.nan}


class ActorStack:
    """Actors and critics of R frozen world models: a `jacnorm.training.loop.Trainee`."""

    def __init__(
        self,
        settings: PendulumSettings,
        runs: Sequence[Run],
        models: Parameters,
        episodes: Mapping[int, Episodes],
        device: torch.device,
    ) -> None:
        self.generators: dict[str, torch.Generator] = {}
        self.settings, self.runs, self.sizes = settings, list(runs), Sizes.of(settings)
        self.updates = settings.actor_updates
        self._models = models
        self._shape = (settings.batch, settings.length)
        self._source = Source(self.sizes, runs, episodes, self._shape, "actor", device)
        start = actors.initial(self.sizes, [_start(settings, run.seed, "actor") for run in runs])
        self.parameters: Stack = {name: tensor.to(device) for name, tensor in start.items()}
        self._optimiser = StackedAdam(self.parameters, settings.learning_rate)

    def step(self, index: int) -> dict[str, Tensor]:
        """One update of all runs. Metrics: loss, return (imagined, from the starts)."""
        classes, batch = self.sizes.classes, self._source.batch(index)
        with torch.no_grad():
            seen = rssm.observe(
                self._models, batch.images, batch.actions, batch.first, batch.noise, classes, batch.error
            )
        starts, draws = self._draws(index)
        h, z = (each.flatten(1, 2).take_along_dim(starts, 1) for each in (seen.h, seen.z))  # (R, N, .)
        metrics: dict[str, Tensor] = {}

        def losses(parameters: Stack) -> Tensor:
            imagined = actors.imagine(parameters, self._models, h, z, draws, classes)
            found = actors.losses(parameters, self._models, imagined, self.settings)
            metrics["return"] = found["return"]
            return found["actor_loss"] + found["critic_loss"]

        found, changes = gradients(losses, self.parameters)
        self._optimiser.step(changes)
        return {"loss": found, **metrics}

    def _draws(self, index: int) -> tuple[Tensor, actors.Draws]:
        """Which states of the batch imagination starts from, (R, N, 1), and its noise."""
        states = math.prod(self._shape)
        count, steps = min(STARTS, states), self.settings.imagination
        order = [torch.randperm(states, generator=each)[:count] for each in self._source.generators(index, "starts")]
        normal = [
            torch.randn(steps, count, self.sizes.actions, generator=each)
            for each in self._source.generators(index, "actions")
        ]
        latent = [
            gumbel((steps, count, self.sizes.latent), each)
            for each in self._source.generators(index, "imagined latents")
        ]
        spread = self._source.spread
        return spread(order).unsqueeze(-1), actors.Draws(spread(normal), spread(latent))

    def freeze(self, diverged: Tensor) -> None:
        """Stop changing diverged runs."""
        self._optimiser.freeze(diverged)

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments."""
        return _state(self.parameters, self._optimiser)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        _load_state(self.parameters, self._optimiser, state)

    def unstacked(self, lost: Sequence[int]) -> Iterator[tuple[Stack, Stack, int]]:
        """For each run its model, its actor and critic, on the CPU, and where it was lost."""
        for i, each in enumerate(lost):
            model, agent = (
                {name: tensor[i].cpu() for name, tensor in stack.items()} for stack in (self._models, self.parameters)
            )
            yield model, agent, each


def _start(settings: PendulumSettings, seed: int, part: str) -> torch.Generator:
    """The stream that a seed's parameters start from, whatever the arm."""
    sizes = Sizes.of(settings)
    cell = f"pendulum deter={sizes.deter} latent={sizes.groups}x{sizes.classes} hidden={sizes.hidden}"
    return generator(STUDY, cell, seed, f"{part} start")


def _row(run: Run) -> dict[str, Any]:
    return {"seed": run.seed, "agent": "rssm", "task": "pendulum", **run.arm.columns}


def _state(parameters: Stack, optimiser: StackedAdam) -> dict[str, Tensor]:
    return {**parameters, **{f"optimiser/{name}": each for name, each in optimiser.state().items()}}


def _load_state(parameters: Stack, optimiser: StackedAdam, state: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(state[name])
    optimiser.load_state({name: state[f"optimiser/{name}"] for name in optimiser.state()})


def _together(arm: Arm, seeds: Sequence[int], trained: Mapping[Run, tuple[Stack, Stack, int]]) -> Agents:
    """The agents of an arm in the order of the seeds."""
    found = [trained[Run(arm, seed)] for seed in seeds]
    model, agent = (
        {name: torch.stack([each[part][name] for each in found]) for name in found[0][part]} for part in (0, 1)
    )
    return Agents(arm, model, agent, torch.tensor([each[2] for each in found]))


def _fit(
    settings: PendulumSettings,
    stack: ModelStack | ActorStack,
    episodes: Mapping[int, Episodes],
    checkpoint: Path,
    this: Job,
    label: str,
) -> FitReport:
    return fit(
        stack,
        steps=stack.updates,
        checkpoint=checkpoint,
        runs=[run.id for run in stack.runs],
        fingerprint=fingerprint(
            [settings.model_dump(), this.device.type, _digest(settings, episodes)],
            code_version(f"jacnorm.studies.{STUDY}.train_pendulum"),
        ),
        on_divergence="record",
        tracker=this.tracker,
        label=label,
    )


def _digest(settings: PendulumSettings, episodes: Mapping[int, Episodes]) -> str:
    """Of the user's own episodes, whose path says nothing about what is in them; generated ones need none."""
    if settings.episodes_path is None:
        return ""
    content = hashlib.sha256()
    own = episodes[settings.seeds[0]]
    for field in fields(own):
        content.update(getattr(own, field.name).contiguous().numpy().tobytes())
    return content.hexdigest()
