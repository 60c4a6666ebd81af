"""One federated run that is handed from server to clients: everything that both must know, as text."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any

from torch import Tensor

from jacnorm.code_version import code_version
from jacnorm.studies.fedgtst import draws as drawing
from jacnorm.studies.fedgtst import networks, strategies
from jacnorm.studies.fedgtst.settings import TrainingSettings
from jacnorm.training.checkpoint import fingerprint


@cache
def _code() -> str:
    return code_version(f"jacnorm.studies.{drawing.STUDY}.flower")


@dataclass(frozen=True)
class Plan:
    """A run of one method.

    data: name of the samples, of which the streams of random numbers depend. clients: their number K. coefficient: xi,
    rho or FedSR's factor; 0 for methods without one. shape: of an image, (3, h, w).
    """

    settings: TrainingSettings
    seed: int
    data: str
    clients: int
    method: str
    coefficient: float
    network: str
    shape: tuple[int, int, int]
    classes: int

    def __post_init__(self) -> None:
        # Settings of an experiment hold more, which would count where only these may.
        own = {name: getattr(self.settings, name) for name in TrainingSettings.model_fields}
        object.__setattr__(self, "settings", TrainingSettings(**own | {"seeds": [self.seed]}))

    @property
    def cell(self) -> str:
        """What names the split in the streams of random numbers: nothing of the method."""
        return f"{self.data} clients={self.clients} split={self.settings.split}"

    @property
    def samples(self) -> int:
        """Samples n that each client holds."""
        return self.settings.samples_each(self.clients)

    @cached_property
    def strategy(self) -> strategies.Strategy:
        """Its strategy. Raises UserError for an unknown method or network, or images that the network does not take."""
        probabilistic = strategies.is_probabilistic(self.method)
        network = networks.build(self.network, self.shape, self.classes, probabilistic=probabilistic)
        return strategies.strategy(self.method, self.coefficient, self.settings, network)

    @property
    def fingerprint(self) -> str:
        """Digest of the plan and of the code that follows it."""
        return fingerprint(self.text(), _code())

    def text(self) -> str:
        """The plan as JSON."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(values | {"settings": self.settings.model_dump(mode="json")}, sort_keys=True)

    @classmethod
    def of(cls, text: str) -> Plan:
        """The plan of a text."""
        values = json.loads(text)
        settings = TrainingSettings.model_validate(values.pop("settings"))
        return cls(**values | {"settings": settings, "shape": tuple(values["shape"])})

    def needed(self, asked: int) -> int:
        """How many of the clients that were asked must answer."""
        return math.ceil(self.settings.minimum_clients * asked)

    def start(self) -> dict[str, Tensor]:
        """The server's state before round 0."""
        weights = drawing.initial_weights(self.strategy.network, self.cell, self.seed)
        return self.strategy.start(weights, self.clients)

    def participants(self, index: int) -> list[int]:
        """Numbers of the clients that take part in round `index`, ascending."""
        return drawing.participants(self.settings, self.clients, self.cell, self.seed, index).tolist()

    def draws(self, index: int, client: int) -> tuple[dict[str, Tensor], bool]:
        """What a participant of round `index` draws, and whether it also trains without penalty."""
        extra = drawing.extra(self.settings, self.clients, self.cell, self.seed, index)
        drawn = drawing.client_draws(
            self.settings, self.cell, self.seed, index, client, self.samples, self.strategy.noise_width
        )
        return drawn | self.strategy.draws(index), bool(extra[self.participants(index).index(client)])
