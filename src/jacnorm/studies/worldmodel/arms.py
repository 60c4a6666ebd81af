"""The arms of an agent's experiment, and how the agents that were trained are kept.

An arm differs from the regularised or unregularised agent in one respect: which Jacobian is penalised, an error of z
in training, the length of a sequence or the size of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor

from jacnorm.errors import UserError
from jacnorm.studies.worldmodel.settings import DreamerSettings, PendulumSettings
from jacnorm.training import snapshots
from jacnorm.training.snapshots import Snapshot
from jacnorm.training.stacked import Stack

Error = Literal["none", "zero-drift", "drift"]


@dataclass(frozen=True)
class Arm:
    """What distinguishes agents of one task besides the seed.

    weight: lambda. wrt: h, z or hz. error_size: variance (zero-drift), or upper end of mean and variance (drift).
    """

    weight: float
    wrt: str
    include_prior: bool
    power: int
    error: Error
    error_size: float
    batch: int
    length: int

    @property
    def columns(self) -> dict[str, Any]:
        """The arm as columns of the tables."""
        return {
            "lambda": self.weight,
            "wrt": self.wrt,
            "include_prior": self.include_prior,
            "power": self.power,
            "error": self.error,
            "error_size": self.error_size,
            "batch": self.batch,
            "length": self.length,
        }

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> Self:
        """The arm that has these columns."""
        return cls(columns["lambda"], *(columns[name] for name in list(cls.__dataclass_fields__)[1:]))

    def __str__(self) -> str:
        penalised = f"{self.wrt}{'+p' if self.include_prior else ''} power={self.power}"
        error = f"{self.error} {self.error_size:g}"
        return f"lambda={self.weight:g} {penalised} error={error} batch={self.batch} length={self.length}"


def arms(settings: PendulumSettings | DreamerSettings) -> list[Arm]:
    """All arms, each once, those of `lambdas` first.

    An arm of lambda 0 is written as if it were penalised like those of `lambdas`, so that these make one sweep; runs
    that penalise f alone have none of their own.
    """
    wrt = "".join(sorted(settings.wrt))
    sweep = [
        Arm(weight, wrt, settings.include_prior, settings.power, "none", 0.0, settings.batch, settings.length)
        for weight in settings.lambdas
    ]
    found = list(sweep)
    found += [replace(sweep[0], weight=weight, include_prior=False) for weight in settings.f_only_lambdas]
    for size in settings.zero_drift:
        found += [replace(arm, error="zero-drift", error_size=size) for arm in sweep]
    for size in settings.drift:
        found += [replace(arm, error="drift", error_size=size) for arm in sweep]
    found += [replace(arm, length=length) for length in settings.lengths for arm in sweep]
    found += [replace(arm, batch=batch) for batch in settings.batches for arm in sweep]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Agents:
    """The agents of one arm, in the order of the job's seeds (S of them)."""

    arm: Arm
    model: Stack
    """The world model's parameters, (S, ...)."""
    actor: Stack
    """Those of actor and critic, (S, ...)."""
    diverged_at: Tensor
    """(S,), int64: the update whose loss was not finite; -1: none. Parameters of such an agent may not be finite."""


def save(path: Path, agents: Sequence[Agents]) -> None:
    """Write the agents of a job."""
    kept = []
    for each in agents:
        tensors = {f"model/{name}": tensor for name, tensor in each.model.items()}
        tensors |= {f"actor/{name}": tensor for name, tensor in each.actor.items()}
        kept.append(Snapshot(each.arm.columns, {**tensors, "diverged_at": each.diverged_at}))
    snapshots.save(path, kept)


def load(path: Path) -> list[Agents]:
    """Read agents back. Raises UserError if the file is missing, damaged or holds something else."""
    try:
        return [_agents(each) for each in snapshots.load(path)]
    except KeyError:
        raise UserError(f"{path} does not hold agents of the pendulum; delete it and train again") from None


def _agents(kept: Snapshot) -> Agents:
    groups: dict[str, Stack] = {"model": {}, "actor": {}}
    for name, tensor in kept.tensors.items():
        group, _, rest = name.partition("/")
        if rest:
            groups[group][rest] = tensor
    return Agents(Arm.of(kept.cell), groups["model"], groups["actor"], kept.tensors["diverged_at"])
