"""What the federated networks were along the way, over all clients, and how their features transfer.

The statistics of Def. 4 need every client's gradient at the server's weights, which no method of the paper sends: they
are measured here, beside the training. FedSR's network is taken at the means of its features throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from jacnorm.errors import UserError
from jacnorm.studies.fedgtst import tables as study_tables
from jacnorm.studies.fedgtst.cells import Run, client_rows, grid, network_of
from jacnorm.studies.fedgtst.inputs import STUDY, Inputs, Samples, load
from jacnorm.studies.fedgtst.networks import Network
from jacnorm.studies.fedgtst.settings import Device, DomainSettings, FederatedSettings, ImageSettings
from jacnorm.studies.fedgtst.strategies import is_probabilistic
from jacnorm.studies.fedgtst.transfer import FineTuned, Part, fine_tune
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.job import job
from jacnorm.training.progress import Progress
from jacnorm.training.seeds import RunId
from jacnorm.training.snapshots import Snapshot

Row = dict[str, Any]
Weights = Mapping[str, Tensor]
Features = Literal["trained", "random"]
CHUNK = 256
"""Samples of one client that a gradient is taken of at once."""
IMAGES = 1024
"""Images that go through a network at once without a gradient."""
NUMBERS = 2**30
"""Numbers, at most, of the features that are fine-tuned on together."""


def federated(
    settings: FederatedSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto"
) -> None:
    """Measure gradients over all clients along the training, and fine-tune on the target."""
    _measure(settings, "federated", "federated", tables, data, weights, device)


def images(settings: ImageSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto") -> None:
    """Measure gradients over all clients of CIFAR-10, and fine-tune on SVHN."""
    _measure(settings, "images", "image", tables, data, weights, device)


def domains(settings: DomainSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto") -> None:
    """Measure gradients over all clients of five domains, and fine-tune on the sixth."""
    _measure(settings, "domains", "domain", tables, data, weights, device)


def _measure(
    settings: FederatedSettings,
    command: str,
    prefix: str,
    tables: Path,
    data: Sequence[Path],
    weights: Path,
    device: Device,
) -> None:
    with job(STUDY, "measure", command, settings, device) as this:
        inputs = {each.target: each for each in load(settings, data)}
        snapshots = snapshot_files.load(weights)
        _check(settings, inputs, snapshots, weights)
        rows: dict[str, list[Row]] = {"transfer": [], "fine_tuning": []}
        rows["statistics"] = list(_statistics_rows(settings, inputs, snapshots, this.device))
        for features, runs, found in _fine_tuned(settings, inputs, snapshots, this.device):
            rows["transfer"] += _transfer_rows(features, runs, found)
            rows["fine_tuning"] += _curve_rows(features, runs, found)
        for name, table in rows.items():
            study_tables.write(tables, f"{prefix}_{name}", settings, table, this.tracker)


def _runs(snapshot: Snapshot) -> list[Run]:
    return [Run.of(columns) for columns in snapshot.cell["runs"]]


def _of(snapshot: Snapshot, position: int, device: torch.device) -> dict[str, Tensor]:
    """The weights of one run."""
    return {name: tensor[position].to(device) for name, tensor in snapshot.tensors.items()}


def _check(
    settings: FederatedSettings, inputs: Mapping[str, Inputs], snapshots: Sequence[Snapshot], weights: Path
) -> None:
    """Raises UserError unless the weights are those of the settings' runs, and of their networks."""
    planned = {run for each in inputs.values() for stack in grid(settings, each.source, each.target) for run in stack}
    if {run for snapshot in snapshots for run in _runs(snapshot)} == planned and all(
        network_of(first, inputs[first.condition.target]).shapes == _stored_shapes(snapshot)
        for snapshot in snapshots
        for first in _runs(snapshot)[:1]
    ):
        return
    raise UserError(f"{weights} holds the weights of other settings; run the training step again with these")


def _stored_shapes(snapshot: Snapshot) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape[1:]) for name, tensor in snapshot.tensors.items()}


# --- statistics over all clients -------------------------------------------------------------------------------------


def _statistics_rows(
    settings: FederatedSettings, inputs: Mapping[str, Inputs], snapshots: Sequence[Snapshot], device: torch.device
) -> Iterator[Row]:
    clients = _Clients(settings, device)
    with Progress(len(snapshots), "statistics", unit="snapshots") as progress:
        for done, snapshot in enumerate(snapshots, start=1):
            runs = _runs(snapshot)
            here = inputs[runs[0].condition.target]
            network = network_of(runs[0], here)
            weights = [_of(snapshot, position, device) for position in range(len(runs))]
            accuracies = source_accuracies(network, weights, here.source_test, device)
            for run, own, accuracy in zip(runs, weights, accuracies, strict=True):
                columns = statistics(network, own, *clients.of(run, here))
                yield {**run.columns, "round": snapshot.cell["round"], **columns, "source_accuracy": accuracy}
            progress.update(done)


class _Clients:
    """The samples of all clients of a seed, kept for the runs that share them."""

    def __init__(self, settings: FederatedSettings, device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._about: tuple[str, int, str] | None = None
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, run: Run, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Images (K, n, 3, h, w) and labels (K, n)."""
        about = (run.condition.target, run.condition.clients, run.condition.split)
        if about != self._about:
            self._about, self._found = about, {}
        if run.seed not in self._found:
            rows = client_rows(self._settings, run.condition, run.seed, inputs)
            samples = inputs.source_train
            self._found[run.seed] = samples.take(rows).to(self._device), samples.y[rows].to(self._device)
        return self._found[run.seed]


def client_gradient(network: Network, weights: Weights, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Mean loss over a client's samples and its gradient J by all weights, flattened, (D,) float64."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
    total = 0.0
    gradient = torch.zeros(sum(leaf.numel() for leaf in leaves.values()), dtype=torch.float64, device=y.device)
    for images, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        loss = functional.cross_entropy(network.logits(leaves, images), labels, reduction="sum") / len(y)
        parts = torch.autograd.grad(loss, list(leaves.values()))
        gradient += torch.cat([part.flatten() for part in parts])
        total += loss.item()
    return total, gradient


def statistics(network: Network, weights: Weights, x: Tensor, y: Tensor) -> dict[str, float]:
    """The statistics of Def. 4 at the weights of one network, and the mean loss; x: (K, n, 3, h, w), y: (K, n).

    The clients' gradients follow one another: on a CPU that took the time of `torch.func.vmap` over clients, without
    its memory.
    """
    norms, losses = [], []
    mean = torch.zeros((), dtype=torch.float64, device=y.device)
    for images, labels in zip(x, y, strict=True):
        loss, gradient = client_gradient(network, weights, images, labels)
        mean = mean + gradient / len(y)
        norms.append(gradient.norm().item())
        losses.append(loss)
    return {**dispersion(torch.tensor(norms, dtype=torch.float64), mean.norm().item()), "source_loss": _mean(losses)}


def dispersion(norms: Tensor, norm_of_mean: float) -> dict[str, float]:
    """How far clients' gradients with these norms, (K,) float64, are apart if their mean has the given norm.

    variance = mean ||J_k||^2 - ||mean J||^2 is the sum of the variance of the norms and of what directions add.
    """
    mean = norms.mean().item()
    return {
        "norm_of_mean": norm_of_mean,
        "variance": norms.square().mean().item() - norm_of_mean**2,
        "norm_dispersion": norms.var(correction=0).item(),
        "direction_dispersion": mean**2 - norm_of_mean**2,
        "norm_mean": mean,
        "norm_max": norms.max().item(),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


@torch.no_grad()
def source_accuracies(
    network: Network, weights: Sequence[Weights], samples: Samples, device: torch.device
) -> list[float]:
    """Share of the samples that each network classifies correctly; one whose logits are not finite is not."""
    found = _outputs(network.logits, weights, samples, device)  # (R, N, C)
    right = (found.argmax(2) == samples.y.to(device)) & found.isfinite().all(2)
    return right.double().mean(1).tolist()


@torch.no_grad()
def _outputs(
    function: Callable[[Weights, Tensor], Tensor], weights: Sequence[Weights], samples: Samples, device: torch.device
) -> Tensor:
    """What `function` gives for every sample with each network's weights, (R, N, ...)."""
    parts = []
    for rows in torch.arange(len(samples)).split(IMAGES):
        x = samples.take(rows).to(device)
        parts.append(torch.stack([function(own, x) for own in weights]))
    return torch.cat(parts, 1)


# --- transfer --------------------------------------------------------------------------------------------------------


def _fine_tuned(
    settings: FederatedSettings, inputs: Mapping[str, Inputs], snapshots: Sequence[Snapshot], device: torch.device
) -> Iterator[tuple[Features, list[Run], FineTuned]]:
    """What read-outs reach on trained and on random features."""
    places: dict[Features, dict[Run, tuple[int, int]]] = {"trained": last_places(snapshots)}
    places["random"] = first_places(snapshots)
    for features, found in places.items():
        for runs in _together(settings, inputs, list(found)):
            here = inputs[runs[0].condition.target]
            networks = [network_of(run, here) for run in runs]
            weights = [_of(snapshots[found[run][0]], found[run][1], device) for run in runs]
            parts = [
                _part(networks, weights, samples, device)
                for samples in (here.target_train, here.target_validation, here.target_test)
            ]
            yield features, runs, fine_tune(settings, [_stream(run) for run in runs], here.classes, *parts)


def last_places(snapshots: Sequence[Snapshot]) -> dict[Run, tuple[int, int]]:
    """For each run the snapshot with its last weights, and its position there."""
    return {run: (n, position) for n, snapshot in enumerate(snapshots) for position, run in enumerate(_runs(snapshot))}


def first_places(snapshots: Sequence[Snapshot]) -> dict[Run, tuple[int, int]]:
    """Of each seed, network and target the run of the first stack, and where its initial weights are.

    Methods start from the same weights, so that one of them stands for all; but FedSR, whose network is another.
    """
    found: dict[tuple[str, str, bool, int], tuple[Run, tuple[int, int]]] = {}
    for number, snapshot in enumerate(snapshots):
        if snapshot.cell["round"] == 0:
            for position, run in enumerate(_runs(snapshot)):
                start = (run.condition.target, run.condition.network, is_probabilistic(run.method), run.seed)
                found.setdefault(start, (run, (number, position)))
    return dict(found.values())


def _together(settings: FederatedSettings, inputs: Mapping[str, Inputs], runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Runs of one target and feature width, as many at once as `NUMBERS` allows."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        width = network_of(run, inputs[run.condition.target]).feature_width
        groups.setdefault((run.condition.target, width), []).append(run)
    for (target, width), group in groups.items():
        here = inputs[target]
        each = (len(here.target_train) + len(here.target_validation) + len(here.target_test)) * width
        size = max(1, NUMBERS // each)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _part(networks: Sequence[Network], weights: Sequence[Weights], samples: Samples, device: torch.device) -> Part:
    features = [
        _outputs(network.features, [own], samples, device)[0] for network, own in zip(networks, weights, strict=True)
    ]
    return Part(torch.stack(features), samples.y.to(device))


def _stream(run: Run) -> RunId:
    """Where a run's fine-tuning takes its random numbers: the same for every method and condition of a seed."""
    return RunId(STUDY, f"fine-tuning {run.condition.target}", run.seed)


def _transfer_rows(features: Features, runs: Sequence[Run], found: FineTuned) -> Iterator[Row]:
    measured = {
        "train_accuracy": found.train_accuracy,
        "validation_accuracy": found.validation_accuracy,
        "target_accuracy": found.target_accuracy,
        "target_loss": found.target_loss,
    }
    for position, run in enumerate(runs):
        own = {name: values[position].item() for name, values in measured.items()}
        yield {**run.columns, "features": features, **own}


def _curve_rows(features: Features, runs: Sequence[Run], found: FineTuned) -> Iterator[Row]:
    for position, run in enumerate(runs):
        curves = zip(found.train_curve[:, position].tolist(), found.target_curve[:, position].tolist(), strict=True)
        for epoch, (train, target) in enumerate(curves):
            about = {**run.columns, "features": features, "epoch": epoch}
            yield {**about, "train_accuracy": train, "target_accuracy": target}
