"""Tiny federations for the tests: a few clients of random images."""

from __future__ import annotations

import torch

from jacnorm.studies.fedgtst.draws import initial_weights
from jacnorm.studies.fedgtst.engine import BatchedEngine, Data
from jacnorm.studies.fedgtst.networks import build
from jacnorm.studies.fedgtst.settings import EnginesSettings
from jacnorm.studies.fedgtst.strategies import is_probabilistic, strategy

METHODS = ["fedavg", "fedsr", "fediir", "scaffold", "fedgtst", "fedgtst-mean"]
COEFFICIENTS = {"fedavg": 0.0, "scaffold": 0.0, "fedsr": 1.0, "fediir": 0.5, "fedgtst": 0.02, "fedgtst-mean": 0.05}
SAMPLES = 20


def settings(**changes):
    return EnginesSettings(**{"batch": 8, "extra_share": 0.3} | changes)


def data(runs=2, clients=4, seed=0):
    """Images whose class shows in their mean, so that there is something to learn."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (60,), generator=draw)
    x = torch.randn(60, 3, 8, 8, generator=draw) + 0.3 * (y.float() - 4.5)[:, None, None, None]
    index = torch.stack([torch.randperm(60, generator=draw)[:SAMPLES] for _ in range(runs * clients)])
    return Data(x, y, index.view(runs, clients, SAMPLES))


def federation(
    method="fedgtst", chosen=None, *, kind=BatchedEngine, given=None, coefficients=None, seeds=(10, 11), **more
):
    """Engine, servers and memories before round 0."""
    network = build("lenet", (3, 8, 8), 10, probabilistic=is_probabilistic(method))
    coefficients = coefficients or [COEFFICIENTS[method]] * len(seeds)
    strategies = [strategy(method, each, chosen or settings(), network) for each in coefficients]
    engine = kind(strategies, seeds, "tiny", given or data(len(seeds)), **more)
    return engine, *engine.start([initial_weights(network, "tiny", seed) for seed in seeds])


def after(engine, servers, memories, rounds, first=0):
    """Servers and memories after some rounds, and all reports."""
    reports = []
    for index in range(first, first + rounds):
        servers, memories, report = engine.round(servers, memories, index)
        reports.append(report)
    return servers, memories, reports
