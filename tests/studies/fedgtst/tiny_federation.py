"""A federation small enough for tests: four clients with a dozen random images each."""

from __future__ import annotations

import torch

from jacnorm.studies.fedgtst.plan import Plan
from jacnorm.studies.fedgtst.settings import TrainingSettings

CLIENTS, SAMPLES = 4, 12
METHODS = ("fedavg", "fedsr", "fediir", "scaffold", "fedgtst", "fedgtst-mean")
COEFFICIENTS = {"fedavg": 0.0, "scaffold": 0.0, "fedsr": 1.0}


def plan(method: str = "fedgtst", **settings) -> Plan:
    """Three rounds of two steps."""
    settings = TrainingSettings(
        **{"client_samples": SAMPLES, "rounds": 3, "batch": 8, "learning_rate": 0.05} | settings
    )
    coefficient = COEFFICIENTS.get(method, 1e-3)
    return Plan(settings, 10, "noise", CLIENTS, method, coefficient, "lenet", (3, 8, 8), 10)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """X (K, n, 3, 8, 8) and y (K, n) of all clients."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(CLIENTS, SAMPLES, 3, 8, 8, generator=source)
    return x, torch.randint(10, (CLIENTS, SAMPLES), generator=source)


def samples(plan: Plan, client: int, node) -> tuple[torch.Tensor, torch.Tensor]:
    """A client's own."""
    x, y = images()
    return x[client], y[client]
