"""The arms of the regularisers' experiments, and after how many updates each of their networks is kept (E4-E7).

A run of plain stochastic gradient descent without momentum is changed in one respect at a time: a regulariser, the step
size, or the batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jacnorm.studies.sharpening.settings import RegulariserSettings
from jacnorm.training.batches import steps_per_epoch

Regulariser = Literal["none", "weight decay", "label smoothing", "mixup", "sam", "jacobian penalty", "shifts", "crops"]
Rule = Literal["updates", "epochs", "matched"]
Step = Literal["plain", "weight decay", "sam", "jacobian penalty"]


@dataclass(frozen=True)
class Arm:
    """What distinguishes runs besides the seed. strength: in the unit of the regulariser's setting; 0 for none."""

    regulariser: Regulariser
    strength: float
    learning_rate: float
    batch: int

    def strength_of(self, regulariser: Regulariser) -> float:
        """Strength of one regulariser: 0 unless it is the arm's own."""
        return self.strength if regulariser == self.regulariser else 0.0

    @property
    def step(self) -> Step:
        """How an update is made: from one gradient, with the weights added, from two, or with second derivatives."""
        return self.regulariser if self.regulariser in ("weight decay", "sam", "jacobian penalty") else "plain"

    @property
    def columns(self) -> dict[str, Any]:
        """The arm as columns of the tables."""
        return {
            "regulariser": self.regulariser,
            "strength": self.strength,
            "learning_rate": self.learning_rate,
            "batch": self.batch,
        }

    def __str__(self) -> str:
        return f"{self.regulariser} {self.strength:g} learning_rate={self.learning_rate:g} batch={self.batch}"


@dataclass(frozen=True)
class Training:
    """How each seed of an arm trains.

    budgets: the updates after which a rule keeps the network. matched: whether it is also kept once the plain training
    loss is low enough. decays: shares of `updates` after which the step size falls.
    """

    arm: Arm
    budgets: Mapping[Rule, int]
    matched: bool
    decays: Sequence[float]

    @property
    def updates(self) -> int:
        """Updates in all."""
        return max(self.budgets.values())

    @property
    def rules(self) -> list[Rule]:
        """Rules by which a network is kept, in the order of the tables."""
        return [*self.budgets, "matched"] if self.matched else list(self.budgets)


def arms(settings: RegulariserSettings) -> list[Arm]:
    """All arms, each once: those of a base step size in turn, then further step sizes, then further batch sizes.

    Further step sizes have the base batch size, further batch sizes every base step size; neither has a regulariser.
    """
    strengths: dict[Regulariser, Sequence[float]] = {
        "none": [0.0],
        "weight decay": settings.weight_decays,
        "label smoothing": settings.smoothings,
        "mixup": settings.mixups,
        "sam": settings.sam_radii,
        "jacobian penalty": settings.jacobian_penalties,
        "shifts": settings.shifts,
        "crops": settings.crops,
    }
    found = [
        Arm(regulariser, float(strength), rate, settings.batch)
        for rate in settings.learning_rates
        for regulariser, each in strengths.items()
        for strength in each
    ]
    found += [Arm("none", 0.0, rate, settings.batch) for rate in settings.other_learning_rates]
    found += [Arm("none", 0.0, rate, batch) for batch in settings.other_batches for rate in settings.learning_rates]
    return list(dict.fromkeys(found))


def trainings(settings: RegulariserSettings, samples: int) -> Iterator[Training]:
    """The trainings of every arm, with `samples` training samples.

    An arm trains once and its networks are kept on the way: after `settings.updates` updates and, where batch sizes are
    compared, after as many epochs as those updates are at the base batch size. With decays of the step size, which
    belong to one budget, an arm of another batch size trains once for each budget.
    """
    for arm in arms(settings):
        updates, epochs = settings.updates, _equal_epochs(settings, samples, arm.batch)
        if not _compares_batches(settings, arm):
            yield Training(arm, {"updates": updates}, True, settings.decays)
        elif settings.decays and epochs != updates:
            yield Training(arm, {"updates": updates}, True, settings.decays)
            yield Training(arm, {"epochs": epochs}, False, settings.decays)
        else:
            yield Training(arm, {"updates": updates, "epochs": epochs}, True, settings.decays)


def _equal_epochs(settings: RegulariserSettings, samples: int, batch: int) -> int:
    """Updates at a batch size in as many epochs as `settings.updates` are at the base batch size."""
    epochs = settings.updates / steps_per_epoch(samples, settings.batch)
    return max(1, round(epochs * steps_per_epoch(samples, batch)))


def _compares_batches(settings: RegulariserSettings, arm: Arm) -> bool:
    """Whether the arm is one of those that differ in the batch size alone, the base batch size included."""
    compared = bool(set(settings.other_batches) - {settings.batch})
    return compared and arm.regulariser == "none" and arm.learning_rate in settings.learning_rates
