"""The runs of an experiment: which methods, coefficients and conditions it has, and which of them train together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from jacnorm.errors import UserError
from jacnorm.studies.fedgtst.inputs import STUDY, Inputs
from jacnorm.studies.fedgtst.networks import Network, build
from jacnorm.studies.fedgtst.settings import FederatedSettings
from jacnorm.studies.fedgtst.splits import clients as client_split
from jacnorm.studies.fedgtst.strategies import is_probabilistic
from jacnorm.training.seeds import RunId

DOMAIN_SPLIT = "domains"
"""The split of DomainNet: each client has the samples of one domain."""


@dataclass(frozen=True)
class Condition:
    """What the runs of every seed, method and coefficient have in common; the fields are columns of the tables."""

    source: str
    target: str
    network: str
    clients: int
    participation: float
    local_epochs: int
    split: str
    extra_share: float

    def settings(self, settings: FederatedSettings) -> FederatedSettings:
        """The experiment's settings with this condition's values in the place of the common ones."""
        values: dict[str, Any] = {
            "participation": self.participation,
            "local_epochs": self.local_epochs,
            "extra_share": self.extra_share,
        }
        if self.split != DOMAIN_SPLIT:
            values["split"] = self.split
        return settings.model_copy(update=values)

    @property
    def draws(self) -> str:
        """The cell of the random streams of a training: not the method, nor what else is compared within a seed."""
        return f"{self.source} clients={self.clients} split={self.split}"


@dataclass(frozen=True)
class Run:
    """One federated training: its condition, its method with a coefficient (0 for a method without), its seed."""

    condition: Condition
    method: str
    coefficient: float
    seed: int

    @property
    def columns(self) -> dict[str, Any]:
        """The run as columns of the tables."""
        condition = {field.name: getattr(self.condition, field.name) for field in fields(Condition)}
        return {"seed": self.seed, "method": self.method, "coefficient": self.coefficient, **condition}

    @property
    def id(self) -> RunId:
        """Its name for the training loop."""
        words = " ".join(f"{name}={value}" for name, value in self.columns.items() if name != "seed")
        return RunId(STUDY, words, self.seed)

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> Run:
        """The run of a row, or of an entry of a snapshot's cell."""
        condition = Condition(**{field.name: columns[field.name] for field in fields(Condition)})
        return cls(condition, columns["method"], columns["coefficient"], columns["seed"])


def coefficients(settings: FederatedSettings, method: str) -> list[float]:
    """The values of a method's coefficient: xi, rho, or the factor of FedSR's regularisers; [0] if it has none."""
    return {
        "fedgtst": settings.coefficients,
        "fedgtst-mean": settings.mean_coefficients,
        "fediir": settings.fediir_coefficients,
        "fedsr": settings.fedsr_coefficients,
    }.get(method, [0.0])


def has_guide(method: str) -> bool:
    """Whether clients are sent a guide, to which alone the extra training without penalty contributes."""
    return method.startswith("fedgtst")


def conditions(settings: FederatedSettings, source: str, target: str) -> Iterator[tuple[Condition, list[str]]]:
    """Each condition of a source and its target with its methods.

    Every network and every K have all methods. Alternatives to a common value come one at a time, for the first network
    at `ablation_clients`, with those of `ablation_methods` to which they make a difference. DomainNet has one split.

    Raises UserError if an alternative would have no run of the common values to be compared with, or if DomainNet is to
    be split otherwise.
    """
    domains = settings.pair == "domainnet"
    common = Condition(
        source,
        target,
        settings.networks[0],
        settings.ablation_clients,
        settings.participation,
        settings.local_epochs,
        DOMAIN_SPLIT if domains else settings.split,
        settings.extra_share,
    )
    for network in settings.networks:
        for clients in settings.clients:
            yield replace(common, network=network, clients=clients), list(settings.methods)
    if domains and settings.splits:
        raise UserError(f"splits is {settings.splits}, but DomainNet is split by its domains; leave it empty")
    alternatives = {
        "participation": settings.participations,
        "local_epochs": settings.epochs,
        "split": settings.splits,
        "extra_share": settings.extra_shares,
    }
    if any(alternatives.values()):
        _check_compared(settings)
    for name, values in alternatives.items():
        methods = [each for each in settings.ablation_methods if name != "extra_share" or has_guide(each)]
        for value in values if methods else ():
            yield replace(common, **{name: value}), methods


def _check_compared(settings: FederatedSettings) -> None:
    if settings.ablation_clients not in settings.clients:
        raise UserError(
            f"ablation_clients is {settings.ablation_clients}, which is none of clients {settings.clients}, so that "
            "alternatives would have nothing to be compared with; add it there"
        )
    missing = [method for method in settings.ablation_methods if method not in settings.methods]
    if missing:
        raise UserError(
            f"ablation_methods names {', '.join(missing)}, which methods lacks: alternatives would have nothing to be "
            "compared with; add it there"
        )


def grid(settings: FederatedSettings, source: str, target: str) -> list[list[Run]]:
    """All runs of the settings' seeds, in stacks that train together.

    A stack has one condition and one method, because conditions differ in shapes, and methods in cost: FedAVG would
    pay for FedGTST's second derivatives. Its runs are all coefficients, and for each of them all seeds, `runs_together`
    at most.
    """
    return [
        stack
        for condition, methods in conditions(settings, source, target)
        for method in methods
        for stack in _cut(
            [
                Run(condition, method, coefficient, seed)
                for coefficient in coefficients(settings, method)
                for seed in settings.seeds
            ],
            settings.runs_together,
        )
    ]


def _cut(runs: Sequence[Run], size: int) -> Iterator[list[Run]]:
    """As few parts as possible of at most `size` runs, as equal as possible."""
    each = math.ceil(len(runs) / math.ceil(len(runs) / size)) if runs else 1
    for start in range(0, len(runs), each):
        yield list(runs[start : start + each])


def network_of(run: Run, inputs: Inputs) -> Network:
    """The network that a run trains; FedSR's gives distributions of features."""
    return build(run.condition.network, inputs.shape, inputs.classes, probabilistic=is_probabilistic(run.method))


def client_rows(settings: FederatedSettings, condition: Condition, seed: int, inputs: Inputs) -> Tensor:
    """Rows of the source's training samples that each client of a seed holds, (K, n)."""
    return client_split(
        settings, condition.clients, condition.split, seed, inputs.source_train.y, inputs.classes, inputs.domains
    )
