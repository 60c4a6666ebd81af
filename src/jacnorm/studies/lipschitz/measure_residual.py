r"""Leading terms of WideResNets and the largest values of Figure 1, at evaluation, with frozen statistics.

A WideResNet has no single chain of matrices. Its *layers* are the convolutions, those of shortcuts too, and the
read-out, as matrices are in a fully connected network; norms, ReLUs and sums stand between them. For layer i, t_i is
the largest Euclidean norm of its input and s_i the largest operator norm of the Jacobian of the logits by its output,
both over training samples: what t_{i-1} and sigma_{2r-1 <- 2i} are for matrix i (Theorem 7.1 of Wei and Ma 2019). Then

    ours, unweighted: sum_i s_i t_i,   weighted: (sum_i (s_i a_i t_i)^(2/3))^(3/2),

beside the spectral terms of `operator_norms`, in which s_i and t_i are replaced by products of layer norms, with the
same a_i and the same largest input. If no norm had a shift, ours_weighted could not exceed spectral_weighted; trained
norms have shifts, so nothing forbids it here.

Networks before training have no running statistics yet. Theirs are the mean of the statistics of all training batches,
in stored order.

Passes are in float32, eigenvalues of Gram matrices in float64. Letters: R runs, B samples, K classes, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.data.read import balanced
from jacnorm.nets.wide_resnet import Pass, StackedWideResNet, per_run
from jacnorm.studies.lipschitz import tables as study_tables
from jacnorm.studies.lipschitz.inputs import STUDY, Inputs, load
from jacnorm.studies.lipschitz.margins import margins, summary
from jacnorm.studies.lipschitz.operator_norms import log_rows, spectral_terms, two_thirds
from jacnorm.studies.lipschitz.settings import Device, ResidualSettings
from jacnorm.studies.lipschitz.train_residual import EVALUATION_BATCH, network, stacks
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.checkpoint import unpack
from jacnorm.training.job import Job, job
from jacnorm.training.seeds import generator
from jacnorm.training.snapshots import Snapshot

Row = dict[str, Any]
NUMBERS = {"cpu": 2**24, "cuda": 2**31}
"""Entries of Jacobians that are held at once, by kind of device."""


def residual(settings: ResidualSettings, tables: Path, data: Path, weights: Path, device: Device = "auto") -> None:
    """Leading terms before and after training, by depth; the largest values of Figure 1."""
    with job(STUDY, "measure", "residual", settings, device) as this:
        samples = _samples(load(data, settings.train_samples, scaling="standard"), settings, this)
        rows: dict[str, list[Row]] = {"residual": [], "blocks": []}
        for snapshot in snapshot_files.load(weights):
            for networks in _networks(snapshot, settings, samples, this):
                if snapshot.cell["part"] == "sweep":
                    rows["residual"] += _leading_rows(networks, samples)
                else:
                    rows["blocks"] += _block_rows(networks, samples, settings.top)
        for name, found in rows.items():
            study_tables.write(tables, name, settings, found, this.tracker)


@dataclass(frozen=True)
class Samples:
    """All training samples, x (N, channels, height, width) and labels y, and those over which norms are maximised."""

    x: Tensor
    y: Tensor
    measured_x: Tensor
    classes: int

    @property
    def image(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.x.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class Networks:
    """Some networks of a snapshot. finite: (R,), false for those that training left with infinities or NaN."""

    seeds: list[int]
    cell: dict[str, Any]
    net: StackedWideResNet
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    finite: Tensor

    def __call__(self, x: Tensor) -> Pass:
        """Pass samples (B, channels, height, width) through all networks, with frozen statistics."""
        shared = x.expand(self.net.runs, *x.shape)
        return self.net(self.parameters, self.buffers, shared, training=False)

    @torch.no_grad()
    def margins(self, samples: Samples) -> Tensor:
        """Margins of all training samples, (R, N)."""
        chunk = max(1, EVALUATION_BATCH // self.net.runs)
        parts = zip(samples.x.split(chunk), samples.y.split(chunk), strict=True)
        return torch.cat([margins(self(x).logits, y) for x, y in parts], 1)


def _samples(inputs: Inputs, settings: ResidualSettings, this: Job) -> Samples:
    x, y = this.put([inputs.train_x, inputs.train_y])
    if settings.measured_samples is None or settings.measured_samples >= len(y):
        return Samples(x, y, x, inputs.classes)
    stream = generator(STUDY, inputs.name, 0, "measured samples")
    chosen = balanced(inputs.train_y, settings.measured_samples, inputs.classes, stream).to(this.device)
    return Samples(x, y, x[chosen], inputs.classes)


def _networks(snapshot: Snapshot, settings: ResidualSettings, samples: Samples, this: Job) -> Iterator[Networks]:
    """The networks of a snapshot, stacked as they were trained."""
    start = 0
    for seeds in stacks(settings, samples.image):
        part = {name: tensor[start : start + len(seeds)].to(this.device) for name, tensor in snapshot.tensors.items()}
        start += len(seeds)
        finite = torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in part.values()]).all(0)  # (R,)
        part = {
            name: torch.where(finite.view(-1, *[1] * (tensor.ndim - 1)), tensor, 0.0) for name, tensor in part.items()
        }
        net = network(settings, snapshot.cell, len(seeds), samples.classes, samples.image)
        parameters, buffers = unpack(part, "parameter"), unpack(part, "statistic")
        if snapshot.cell["stage"] == "initial":
            buffers = mean_statistics(net, parameters, samples.x, settings.batch)
        yield Networks(seeds, snapshot.cell, net, parameters, buffers, finite)


@torch.no_grad()
def mean_statistics(
    net: StackedWideResNet, parameters: Mapping[str, Tensor], x: Tensor, batch: int
) -> dict[str, Tensor]:
    """Mean over the batches of x (N, channels, height, width) of their statistics: means and unbiased variances."""
    buffers = {name: tensor.to(x.device) for name, tensor in net.buffers().items()}
    for number, part in enumerate(x.split(batch), start=1):
        net(parameters, buffers, part.expand(net.runs, *part.shape), training=True, momentum=1 / number)
    return buffers


# --- norms of Jacobians ----------------------------------------------------------------------------------------------


def jacobian_norms(logits: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Operator norms of the Jacobian of each sample's logits by each of L tensors of its graph, (L, R, B) float64.

    logits: (R, B, K), of samples that do not mix; tensors: (B, R * C, H, W) each. K vector-Jacobian products give the
    rows of all Jacobians, whose K x K Gram matrices have the squared norms as largest eigenvalues.
    """
    runs, _, classes = logits.shape
    rows: list[tuple[Tensor, ...]] = [
        torch.autograd.grad(logits[:, :, k].sum(), list(tensors), retain_graph=k < classes - 1) for k in range(classes)
    ]
    found = []
    for of_tensor in zip(*rows, strict=True):
        jacobian = torch.stack([per_run(row, runs).flatten(2) for row in of_tensor], 2)  # (R, B, K, d)
        gram = (jacobian @ jacobian.mT).double()  # (R, B, K, K)
        found.append(torch.linalg.eigvalsh(gram)[:, :, -1].clamp(min=0.0).sqrt())
    return torch.stack(found)


def _norms(activation: Tensor, runs: int) -> Tensor:
    """Euclidean norm of an activation (B, R * C, H, W) by run and sample, (R, B) float64."""
    return torch.linalg.vector_norm(per_run(activation, runs).flatten(2), dim=2, dtype=torch.float64)


def _passes(networks: Networks, x: Tensor, entries: int) -> Iterator[Pass]:
    """Passes with their graphs, of so many samples at a time that Jacobians fit; entries: of one sample and class."""
    size = max(1, NUMBERS[x.device.type] // (entries * networks.net.runs * networks.net.classes))
    for part in x.split(size):
        yield networks(part.detach().requires_grad_())


# --- leading terms ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerMaxima:
    """Largest norms over samples, log, (R, L) float64 each, L the layers in the order of `Pass.layers`.

    jacobian: of the logits by the layer's output, 0 for the read-out. hidden: of the layer's input.
    """

    names: list[str]
    jacobian: Tensor
    hidden: Tensor


def layer_maxima(networks: Networks, samples: Samples) -> LayerMaxima:
    """Norms of every layer, maximised over the measured samples."""
    runs = networks.net.runs
    entries = sum(each.outputs * math.prod(each.output_size) for each in networks.net.convolutions)
    jacobian, hidden, names = [], [], []
    for passed in _passes(networks, samples.measured_x, entries):
        *convolutions, linear = passed.layers
        names = [layer.name for layer in passed.layers]
        inner = torch.stack([_norms(layer.input.detach(), runs).amax(1) for layer in convolutions], 1)
        last = torch.linalg.vector_norm(linear.input.detach(), dim=2, dtype=torch.float64).amax(1, keepdim=True)
        hidden.append(torch.cat([inner, last], 1))  # (R, L)
        norms = jacobian_norms(passed.logits, [layer.output for layer in convolutions]).amax(2).T  # (R, L - 1)
        jacobian.append(torch.cat([norms, torch.ones_like(last)], 1))
    return LayerMaxima(names, torch.stack(jacobian).amax(0).log(), torch.stack(hidden).amax(0).log())


def _leading_rows(networks: Networks, samples: Samples) -> Iterator[Row]:
    """A row for each network; one that is not finite has NaN, which no verdict passes over."""
    maxima = layer_maxima(networks, samples)
    rows = log_rows(networks.net, networks.parameters)
    weights = torch.stack([rows[name] for name in maxima.names], 1)  # (R, L)
    terms = maxima.jacobian + maxima.hidden
    spectral = spectral_terms(networks.net, networks.parameters, networks.buffers)
    largest_input = maxima.hidden[:, 0]
    values = {
        **summary(networks.margins(samples)),
        "log_ours_unweighted": terms.logsumexp(1),
        "log_spectral_unweighted": largest_input + spectral.unweighted,
        "log_ours_weighted": two_thirds(terms + weights),
        "log_spectral_weighted": largest_input + spectral.weighted,
    }
    columns = {name: torch.where(networks.finite, value, math.nan).tolist() for name, value in values.items()}
    for run, seed in enumerate(networks.seeds):
        yield {"seed": seed, **networks.cell, **{name: value[run] for name, value in columns.items()}}


# --- Figure 1 --------------------------------------------------------------------------------------------------------


def block_values(networks: Networks, samples: Samples) -> Tensor:
    """Sum over the three groups of |h| |J| for each training sample, (R, N) float64.

    h: the output of a group; |J|: the operator norm of the Jacobian of the logits by it.
    """
    runs, values = networks.net.runs, []
    outputs = [group[-1].second for group in networks.net.groups]
    entries = sum(each.outputs * math.prod(each.output_size) for each in outputs)
    for passed in _passes(networks, samples.x, entries):
        hidden = torch.stack([_norms(group.detach(), runs) for group in passed.groups])  # (3, R, B)
        values.append((hidden * jacobian_norms(passed.logits, passed.groups)).sum(0))
    return torch.cat(values, 1)


def _block_rows(networks: Networks, samples: Samples, top: int) -> Iterator[Row]:
    """The largest values of each network over the margin; misclassified samples have none.

    A network without any value, since it is not finite or classifies nothing correctly, has one row with NaN.
    """
    values, margin = block_values(networks, samples), networks.margins(samples).double()
    for run, seed in enumerate(networks.seeds):
        right = (margin[run] > 0) & networks.finite[run]
        logs = (values[run][right].log() - margin[run][right].log()).sort(descending=True).values[:top].tolist()
        misclassified = int((~right).sum())
        for rank, value in enumerate(logs or [math.nan], start=1):
            yield {
                "seed": seed,
                **networks.cell,
                "rank": rank,
                "log_value": value,
                "misclassified": misclassified,
            }
