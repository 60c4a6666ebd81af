"""Which training samples each client holds: as many for every client, none held by two.

"paper": each client draws two classes, independently of the others, so that some classes may be nobody's (with 10
clients and 10 classes, 10 * 0.8^10 = 1.07 of them on average). "balanced": two classes each, drawn so that the numbers
of clients of two classes differ by at most one. "dirichlet": the shares of a client's classes are drawn from a
symmetric Dirichlet distribution (Hsu, Qi and Brown 2019, arXiv 1909.06335). "domains": client k holds samples of domain
k. Letters: K clients, n samples of each, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jacnorm.errors import UserError
from jacnorm.studies.fedgtst.inputs import STUDY
from jacnorm.studies.fedgtst.settings import BoundsSettings, Split, TrainingSettings
from jacnorm.training.seeds import generator, numpy_generator

ClientSplit = Split | Literal["domains"]
CLASSES_EACH = 2
"""Classes of a client in the splits "paper" and "balanced"."""


def clients(
    settings: TrainingSettings | BoundsSettings,
    number: int,
    split: ClientSplit,
    seed: int,
    y: Tensor,
    classes: int,
    domains: Tensor | None = None,
) -> Tensor:
    """Rows of the training samples of each client, (K, n) int64, ascending in a client; n: `samples_each`.

    number: K; y: (N,) class numbers 0 .. C-1; domains: (N,) domain numbers, for the split "domains" only. The split
    depends on K, kind, seed and data, never on the method; who has which classes does not depend on n.
    Raises UserError if a class, a domain or the whole has too few samples, or if there are not two classes.
    """
    cell = f"clients={number} split={split}"
    if split == "domains":
        if domains is None:
            raise UserError('the split "domains" needs the domain of each sample; use it with DomainNet only')
        return _take(_one_domain_each(settings, number, domains), domains, cell, seed)
    if split == "dirichlet":
        assert isinstance(settings, TrainingSettings)
        return _take(_dirichlet(settings, number, cell, seed, y, classes), y, cell, seed)
    if classes < CLASSES_EACH:
        raise UserError(f'the split "{split}" gives each client two classes, but there is {classes}; use dirichlet')
    draw = generator(STUDY, cell, seed, "split/classes")
    pairs = (_independent if split == "paper" else _balanced)(number, classes, draw)
    return _take(_halves(_size(settings, number), pairs, split, y, classes), y, cell, seed)


def histogram(rows: Tensor, y: Tensor, classes: int) -> Tensor:
    """Samples of each class that each client holds, (K, C) int64; rows: (K, n) as `clients` gives them."""
    return torch.zeros((len(rows), classes), dtype=torch.int64).scatter_add(1, y[rows], torch.ones_like(rows))


def coverage(rows: Tensor, y: Tensor) -> int:
    """Number of classes of which some client holds a sample."""
    return len(y[rows].unique())


def client_rows(
    seed: int, source: str, split: ClientSplit, rows: Tensor, y: Tensor, classes: int
) -> Iterator[dict[str, Any]]:
    """Rows of the tables of clients: one for each client and class, those without samples too."""
    for client, counts in enumerate(histogram(rows, y, classes).tolist()):
        for label, samples in enumerate(counts):
            yield {
                "seed": seed,
                "source": source,
                "clients": len(rows),
                "split": split,
                "client": client,
                "label": label,
                "samples": samples,
            }


def _size(settings: TrainingSettings | BoundsSettings, number: int) -> int:
    size = settings.samples_each(number) if isinstance(settings, TrainingSettings) else settings.client_samples
    if not size:
        raise UserError(f"total_samples is too small for {number} clients; take at least {number}")
    return size


# --- how many of which group, (K, groups) ----------------------------------------------------------------------------


def _independent(number: int, classes: int, draw: torch.Generator) -> Tensor:
    """Two classes for each client, (K, 2), uniformly and independently of the other clients."""
    return torch.stack([torch.randperm(classes, generator=draw)[:CLASSES_EACH] for _ in range(number)])


def _balanced(number: int, classes: int, draw: torch.Generator) -> Tensor:
    """Two classes for each client, (K, 2), such that the numbers of clients of any two classes differ by at most 1."""
    slots = CLASSES_EACH * number
    wanted = torch.full((classes,), slots // classes)
    wanted[torch.randperm(classes, generator=draw)[: slots % classes]] += 1
    labels = torch.arange(classes).repeat_interleave(wanted)
    pairs = labels[torch.randperm(slots, generator=draw)].view(number, CLASSES_EACH)
    # A client with one class twice gives one of them away, for a class that it lacks, to a client without that class.
    # There is one: at most K slots hold a class, two of them here. Each exchange leaves one such client less.
    for client in range(number):
        own = pairs[client, 0]
        if own == pairs[client, 1]:
            others = (pairs != own).all(1).nonzero().flatten()
            other = others[torch.randint(len(others), (), generator=draw)]
            pairs[client, 1], pairs[other, 1] = pairs[other, 1].clone(), own.clone()
    return pairs


def _halves(size: int, pairs: Tensor, split: str, y: Tensor, classes: int) -> Tensor:
    """Half of each client's samples from each of its classes, one more from the first if their number is odd."""
    counts = torch.zeros((len(pairs), classes), dtype=torch.int64)
    counts.scatter_(1, pairs, torch.tensor([size - size // 2, size // 2]).expand_as(pairs))
    available, holders = y.bincount(minlength=classes), pairs.flatten().bincount(minlength=classes)
    short = counts.sum(0) - available
    if (short > 0).any():
        label = int(short.argmax())
        most = 2 * int((available // holders.clamp(min=1))[holders > 0].min())
        raise UserError(
            f"client_samples is {size}, so class {label}, which {int(holders[label])} of {len(pairs)} clients hold in "
            f'the split "{split}", needs {int(counts[:, label].sum())} samples, but has {int(available[label])}; '
            + _advice(most)
        )
    return counts


def _dirichlet(settings: TrainingSettings, number: int, cell: str, seed: int, y: Tensor, classes: int) -> Tensor:
    """Class counts of each client, multinomial with shares from a Dirichlet distribution.

    Clients come one after another: what a class no longer has is drawn again from the shares of the classes that are
    left, so the fuller the data are used, the less the last clients follow their shares.
    """
    size = _size(settings, number)
    if number * size > len(y):
        raise UserError(
            f"client_samples is {size}, so {number} clients need {number * size} samples, but there are {len(y)}; "
            + _advice(len(y) // number)
        )
    draw = numpy_generator(STUDY, cell, seed, "split/classes")
    shares = draw.dirichlet(np.full(classes, settings.concentration), number)  # (K, C)
    left = y.bincount(minlength=classes).numpy()
    counts = np.zeros((number, classes), np.int64)
    for client in range(number):
        while (missing := size - counts[client].sum()) > 0:
            # Shares may underflow to 0, which would leave nothing to draw from once the other classes are used up.
            weights = np.maximum(shares[client], 1e-300) * (left > 0)
            drawn = np.minimum(draw.multinomial(missing, weights / weights.sum()), left)
            counts[client] += drawn
            left = left - drawn
    return torch.from_numpy(counts)


def _one_domain_each(settings: TrainingSettings | BoundsSettings, number: int, domains: Tensor) -> Tensor:
    available = domains.bincount()
    if number != len(available):
        raise UserError(f'the split "domains" has one client per domain: set clients to {len(available)}, not {number}')
    size = _size(settings, number)
    if size > available.min():
        raise UserError(
            f"client_samples is {size}, but domain {int(available.argmin())} has {int(available.min())} training "
            f"samples; {_advice(int(available.min()))}"
        )
    return torch.eye(number, dtype=torch.int64) * size


def _advice(most: int) -> str:
    return f"set client_samples to at most {most}" if most else "take fewer clients"


def _take(counts: Tensor, groups: Tensor, cell: str, seed: int) -> Tensor:
    """Samples of each group in random order, handed out to the clients one after another."""
    draw = generator(STUDY, cell, seed, "split/samples")
    rows: list[list[Tensor]] = [[] for _ in counts]
    for group, wanted in enumerate(counts.T):
        members = (groups == group).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=draw)]
        for own, part in zip(rows, members[: int(wanted.sum())].split(wanted.tolist()), strict=True):
            own.append(part)
    return torch.stack([torch.cat(own).sort().values for own in rows])
