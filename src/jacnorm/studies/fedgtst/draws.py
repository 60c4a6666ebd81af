"""All randomness of the federated experiments, as pure functions of seed and round.

Nothing here knows the method: runs of one seed and cell have the same participants, batches and noise whatever they
train. `cell` names what decides a split (data set, number of clients, kind of split); it must not name a method or its
coefficient. Rounds are counted from 0. Letters: k participants, n samples of a client, E local epochs, d features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jacnorm.studies.fedgtst.networks import Network
from jacnorm.studies.fedgtst.settings import TrainingSettings
from jacnorm.training.seeds import generator

STUDY = "fedgtst"


def initial_weights(network: Network, cell: str, seed: int) -> dict[str, Tensor]:
    """Weights before round 0, equal for all methods of one network; purpose "initialisation"."""
    return network.parameters(generator(STUDY, f"{cell} {network.name}", seed, "initialisation"))


def number_of_participants(settings: TrainingSettings, clients: int) -> int:
    """Clients k that take part in a round, at least 1."""
    return max(1, round(settings.participation * clients))


def number_of_extra(settings: TrainingSettings, clients: int) -> int:
    """Participants that also train without penalty (Phi): `extra_share` of all clients, at least 1 if it is not 0."""
    if settings.extra_share == 0:
        return 0
    return min(number_of_participants(settings, clients), max(1, round(settings.extra_share * clients)))


def participants(settings: TrainingSettings, clients: int, cell: str, seed: int, index: int) -> Tensor:
    """Numbers of the clients that take part in round `index`, (k,) int64, ascending; purpose "participants"."""
    k = number_of_participants(settings, clients)
    if k == clients:
        return torch.arange(clients)
    order = torch.randperm(clients, generator=generator(STUDY, cell, seed, f"participants/{index}"))
    return order[:k].sort().values


def extra(settings: TrainingSettings, clients: int, cell: str, seed: int, index: int) -> Tensor:
    """Which of the participants of round `index` also train without penalty, (k,) bool; purpose "extra"."""
    k = number_of_participants(settings, clients)
    chosen = torch.randperm(k, generator=generator(STUDY, cell, seed, f"extra/{index}"))
    return chosen < number_of_extra(settings, clients)


def orders(settings: TrainingSettings, cell: str, seed: int, index: int, client: int, samples: int) -> Tensor:
    """Two independent orders of a client's samples in round `index`, (2, E, n) int64; purpose "batches".

    The first is that of its training, the second that of its extra training without penalty.
    """
    source = generator(STUDY, cell, seed, f"batches/{index}/{client}")
    drawn = [torch.randperm(samples, generator=source) for _ in range(2 * settings.local_epochs)]
    return torch.stack(drawn).view(2, settings.local_epochs, samples)


def noise(
    settings: TrainingSettings, cell: str, seed: int, index: int, client: int, samples: int, width: int
) -> Tensor:
    """Standard normals for a client's random features in round `index`, (E, n, d); purpose "noise"."""
    source = generator(STUDY, cell, seed, f"noise/{index}/{client}")
    return torch.randn(settings.local_epochs, samples, width, generator=source)


def client_draws(
    settings: TrainingSettings, cell: str, seed: int, index: int, client: int, samples: int, width: int = 0
) -> dict[str, Tensor]:
    """What one client draws in round `index`: "order" and "order_extra" (E, n), and "noise" (E, n, d) if width is d.

    `Strategy.draws` adds what is not random.
    """
    order, order_extra = orders(settings, cell, seed, index, client, samples)
    drawn = {"order": order, "order_extra": order_extra}
    if width:
        drawn["noise"] = noise(settings, cell, seed, index, client, samples, width)
    return drawn


def round_draws(
    settings: TrainingSettings, clients: int, cell: str, seed: int, index: int, samples: int, width: int = 0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Participants (k,), which of them are extra (k,), and the `client_draws` of all, stacked: (k, ...)."""
    chosen = participants(settings, clients, cell, seed, index)
    each = [client_draws(settings, cell, seed, index, client, samples, width) for client in chosen.tolist()]
    stacked = {name: torch.stack([draw[name] for draw in each]) for name in each[0]}
    return chosen, extra(settings, clients, cell, seed, index), stacked
