"""Measuring DreamerV3: exact Jacobians, growth of disturbances, open-loop errors, and returns under perturbations.

Everything is computed in DreamerV3's own environment (`dreamer_measuring`); here its answers become tables.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from jacnorm import environments
from jacnorm.errors import UserError
from jacnorm.studies.worldmodel import dreamer_client as client
from jacnorm.studies.worldmodel import dreamer_measure_worker
from jacnorm.studies.worldmodel import tables as study_tables
from jacnorm.studies.worldmodel.arms import Arm
from jacnorm.studies.worldmodel.perturbations_numpy import OPTIONS
from jacnorm.studies.worldmodel.settings import Device, DreamerSettings
from jacnorm.training import snapshots
from jacnorm.training.job import Job, job
from jacnorm.training.progress import Progress
from jacnorm.training.snapshots import Snapshot

STREAMS = ("random", "policy", "transitions", "rollouts")
"""Of random numbers in measuring: the random policy, the agents' sampling, transitions chosen, rollouts."""
_MEASURING = ("evaluation_episodes", "jacobian_transitions", "context", "horizons", "disturbance")
NORMS = ("f_h", "f_h_spectral", "f_z", "p_h", "composed", "composed_prior", "h_norm", "relative")


@dataclass(frozen=True)
class Agent:
    """One trained agent."""

    task: str
    arm: Arm
    seed: int
    weights: dict[str, Tensor]
    diverged: bool


Measured = tuple[Agent, dict[str, Any] | None]
"""An agent and what `dreamer_measuring` says of it; None for one that diverged."""


def dreamer(settings: DreamerSettings, tables: Path, environment: Path, weights: Path, device: Device = "auto") -> None:
    """Measure every agent; tables of Jacobians, divergence, prediction and returns.

    Args:
        settings: what is measured.
        tables: folder of the tables.
        environment: file that names DreamerV3's environment, as `jacnorm.environments` writes it.
        weights: what training wrote.
        device: auto, cpu or cuda.

    """
    with job(client.STUDY, "measure", "dreamer", settings, device) as this, tempfile.TemporaryDirectory() as scratch:
        there = environments.read(environment)
        agents = [agent for kept in snapshots.load(weights) for agent in unpacked(kept, weights)]
        gl = client.renderer(there, settings, Path(scratch, "renderer"))
        platform = client.platform(there, this, device)
        found: list[Measured] = []
        for task in settings.tasks:
            of_task = [agent for agent in agents if agent.task == task]
            found += _measure(settings, there, of_task, platform, Path(scratch, task), gl, this)
        conditions = [vars(each) for each in client.seen_conditions(settings)]
        rows = {
            "jacobians": _jacobian_rows(found),
            "divergence": _horizon_rows(found, settings.horizons, ("divergence",)),
            "prediction": _horizon_rows(found, settings.horizons, ("image_error", "reward_error")),
            "returns": _return_rows(found, conditions, settings.evaluation_episodes),
        }
        for name, each in rows.items():
            study_tables.write(tables, f"dreamer_{name}", settings, each, this.tracker)


def unpacked(kept: Snapshot, path: Path) -> Iterator[Agent]:
    """The agents of one snapshot. UserError if it holds something else."""
    try:
        arm, ends = Arm.of(kept.cell), kept.tensors["diverged_at"]
        weights = {name: tensor for name, tensor in kept.tensors.items() if name != "diverged_at"}
        for position, seed in enumerate(kept.cell["seeds"]):
            own = {name: tensor[position] for name, tensor in weights.items()}
            yield Agent(kept.cell["task"], arm, seed, own, bool(ends[position] >= 0))
    except KeyError:
        raise UserError(f"{path} does not hold agents of DreamerV3; delete it and train again") from None


def _measure(
    settings: DreamerSettings,
    environment: environments.Environment,
    agents: list[Agent],
    platform: str,
    folder: Path,
    gl: str,
    this: Job,
) -> list[Measured]:
    """Measure the agents of one task in one process; those that diverged are left out there."""
    sound = [agent for agent in agents if not agent.diverged]
    if not sound:
        return [(agent, None) for agent in agents]
    folder.mkdir(parents=True)
    runs: dict[int, dict[str, Any]] = {}
    for name, agent in enumerate(sound):
        file = folder / f"{name}.npz"
        np.savez(file, **{key: tensor.numpy() for key, tensor in agent.weights.items()})
        run = runs.setdefault(agent.seed, {"seed": agent.seed, "agents": [], "numbers": _numbers(settings, agent)})
        run["agents"].append([name, str(file)])
    question: client.Task = {
        "command": "measure",
        **client.kind(settings, sound[0].task, sound[0].arm, platform),
        "conditions": [vars(each) for each in client.seen_conditions(settings)],
        "options": {name: getattr(settings, name) for name in OPTIONS},
        **{name: getattr(settings, name) for name in _MEASURING},
        "runs": list(runs.values()),
    }
    with Progress(len(sound), f"measuring DreamerV3, {sound[0].task}", unit="agents") as progress:
        done = 0

        def tell(line: dict[str, Any]) -> None:
            nonlocal done
            done += 1
            progress.update(done, f"return {line['clean_return']:.1f}")
            agent = sound[line["name"]]
            this.tracker.log({f"{agent.task}/{agent.arm}/clean_return": line["clean_return"]}, agent.seed)

        answer = client.ask(environment, dreamer_measure_worker, question, folder, gl, tell)
    by_name = {each["name"]: each for each in answer["agents"]}
    measured = {id(agent): by_name[name] for name, agent in enumerate(sound)}
    return [(agent, measured.get(id(agent))) for agent in agents]


def _numbers(settings: DreamerSettings, agent: Agent) -> dict[str, Any]:
    """Numbers for the random streams of a seed, and one for each episode of evaluation: the same for every arm."""
    episodes = tuple(f"episode {number}" for number in range(settings.evaluation_episodes))
    found = client.numbers(agent.task, agent.seed, (*STREAMS, *episodes))
    return {**{name: found[name] for name in STREAMS}, "episodes": [found[name] for name in episodes]}


def _jacobian_rows(found: list[Measured]) -> Iterator[dict[str, Any]]:
    for agent, answer in found:
        norms = dict.fromkeys(NORMS, math.nan) | {"transitions": 0} if answer is None else answer["jacobians"]
        yield {**client.columns(agent.task, agent.arm, agent.seed), **norms}


def _horizon_rows(found: list[Measured], horizons: list[int], names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for agent, answer in found:
        rows = (
            [{"horizon": horizon} | dict.fromkeys(names, math.nan) for horizon in horizons]
            if answer is None
            else answer["horizons"]
        )
        for row in rows:
            yield {
                **client.columns(agent.task, agent.arm, agent.seed),
                **{name: row[name] for name in ("horizon", *names)},
            }


def _return_rows(found: list[Measured], conditions: list[dict[str, Any]], episodes: int) -> Iterator[dict[str, Any]]:
    nothing = [{**condition, "return": math.nan, "random_return": math.nan} for condition in conditions]
    for agent, answer in found:
        for row in nothing if answer is None else answer["returns"]:
            yield {**client.columns(agent.task, agent.arm, agent.seed), **row, "episodes": episodes}
