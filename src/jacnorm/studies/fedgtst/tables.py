"""The tables of the study: what their columns mean, and how a job's block of seeds becomes a file.

J of a client is the gradient of its mean loss by all weights, flattened; norms are Euclidean. What the server of an
algorithm sees (`rounds`) and what only an all-knowing measurement sees (`statistics`) are different tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jacnorm.files import Column
from jacnorm.settings import SeededSettings
from jacnorm.training.results import write_rows
from jacnorm.training.tracking import Tracker

_SEED = Column("random seed of the run; runs of one seed share split, start, batches, participants and fine-tuning")
_ROUND = Column("rounds made", "rounds")
_RUN = {
    "seed": _SEED,
    "source": Column("name of the source data set; for DomainNet: without the target's name"),
    "target": Column("name of the target data set"),
    "network": Column("lenet or resnet18"),
    "clients": Column("number of clients K", "clients"),
    "method": Column("fedavg, fedsr, fediir, scaffold, fedgtst (guide: largest norm) or fedgtst-mean (mean norm)"),
    "coefficient": Column("xi, rho, or the factor of fedsr's regularisers; 0 if the method has none"),
    "participation": Column("share of the clients that take part in a round"),
    "local_epochs": Column("passes over a client's samples in a round", "epochs"),
    "split": Column("paper, balanced, dirichlet or domains"),
    "extra_share": Column("share of all clients that also train without penalty for the guide"),
}
_FEDERATED: dict[str, dict[str, Column]] = {
    "runs": {
        **_RUN,
        "parameters": Column("number of weights D of the network that is sent"),
        "rounds": Column("rounds made", "rounds"),
        "outcome": Column("finished, unstable (the guide ran away) or diverged (too few finite clients)"),
        "ended_at": Column("round at which it became unstable or diverged; -1: none", "rounds"),
        "dropped": Column("answers of clients dropped for values that were not finite, over all rounds"),
        "bytes_down": Column("sent to one client in a round", "bytes"),
        "bytes_up": Column("sent by one client in a round", "bytes"),
        "weight_bytes": Column("of those, the weights themselves, in one direction", "bytes"),
    },
    "rounds": {
        **_RUN,
        "round": _ROUND,
        "participants": Column("clients that took part", "clients"),
        "loss": Column("mean training loss of the participants over the round, without penalties", "nat"),
        "guide": Column("guide that the next round is sent; NaN for methods without one"),
        "norm_mean": Column("mean over participants of their norm ||J||, where guide_at says; NaN if none is sent"),
        "norm_sd": Column("its standard deviation over participants (divided by their number)"),
        "norm_max": Column("its largest value"),
    },
    "clients": {
        "seed": _SEED,
        "source": Column("name of the source data set"),
        "clients": Column("number of clients K", "clients"),
        "split": Column("paper, balanced, dirichlet or domains"),
        "client": Column("number of the client, from 0"),
        "label": Column("class number"),
        "samples": Column("samples of that class that the client holds", "samples"),
    },
    "statistics": {
        **_RUN,
        "round": _ROUND,
        "norm_of_mean": Column("norm of the mean over all clients of J, at the weights after that round (Def. 4)"),
        "variance": Column("mean over clients of ||J||^2 minus that norm squared (Def. 4)"),
        "norm_dispersion": Column("part of it: variance over clients of ||J||"),
        "direction_dispersion": Column("the rest: square of the mean ||J|| minus the square of norm_of_mean"),
        "norm_mean": Column("mean over clients of ||J||"),
        "norm_max": Column("largest ||J||"),
        "source_loss": Column("mean over clients of their mean loss", "nat"),
        "source_accuracy": Column("share of the source's test samples classified correctly"),
    },
    "transfer": {
        **_RUN,
        "features": Column("trained, or random: those of the initial weights"),
        "train_accuracy": Column("share of the target's training samples classified correctly after fine-tuning"),
        "validation_accuracy": Column("share of its held-out training samples"),
        "target_accuracy": Column("share of its test samples"),
        "target_loss": Column("mean loss over its test samples", "nat"),
    },
    "fine_tuning": {
        **_RUN,
        "features": Column("trained, or random: those of the initial weights"),
        "epoch": Column("passes made over the target's training samples", "epochs"),
        "train_accuracy": Column("share of the target's training samples classified correctly"),
        "target_accuracy": Column("share of its test samples"),
    },
}

COLUMNS: dict[str, dict[str, Column]] = {
    "bounds": {
        "seed": Column("random seed of split and start"),
        "rule": Column("step size: optimal (assumption 4.3) or fixed"),
        "rate": Column("step size in units of 1 / alpha"),
        "round": Column("rounds made before this step", "rounds"),
        "smoothness": Column("alpha: largest smoothness constant over clients"),
        "loss": Column("mean over clients of the loss before the step", "nat"),
        "decrease": Column("by how much the step lowers it", "nat"),
        "norm_of_mean": Column("norm of the mean gradient"),
        "variance": Column("variance of the clients' gradients (Def. 4)"),
        "lemma": Column("decrease promised by Lemma B.3", "nat"),
        "corrected": Column("decrease promised by Theorem 2 with the factor 1/(2 alpha); NaN for fixed steps", "nat"),
        "printed": Column("decrease promised by Theorem 2 with the factor 2/alpha; NaN for fixed steps", "nat"),
        "variance_free": Column("decrease promised by the descent lemma for the mean gradient", "nat"),
    },
    "engines": {
        "seed": Column("random seed of split and start"),
        "method": Column("method"),
        "engine": Column("loop (client after client) or flower (client app and strategy in one process)"),
        "round": _ROUND,
        "weights_difference": Column("largest difference of a weight from the batched engine's"),
        "guide_difference": Column("relative difference of the guide from the batched engine's; 0 without a guide"),
        "bytes_down": Column("payload sent to one client, counted in the messages or tensors", "bytes"),
        "bytes_up": Column("payload sent by one client", "bytes"),
        "weight_bytes": Column("of those, the weights themselves, in one direction", "bytes"),
    },
    **{
        f"{prefix}_{name}": columns
        for prefix in ("federated", "image", "domain")
        for name, columns in _FEDERATED.items()
    },
}


def write(
    folder: Path, name: str, settings: SeededSettings, rows: Iterable[Mapping[str, Any]], tracker: Tracker
) -> None:
    """Write `rows` as table `name` for the settings' block of seeds; see `jacnorm.training.results.write_rows`."""
    write_rows(folder, name, COLUMNS[name], settings, rows, tracker)
