"""Leading terms, full bounds and augmented losses of the fully connected networks that the training step kept.

Everything is measured in float64, stacked over the seeds of a cell. Letters: R networks, N training samples, r weight
matrices.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacnorm.data.read import balanced
from jacnorm.errors import UserError
from jacnorm.nets.mlp import Activation, activate, curvature, forward
from jacnorm.studies.lipschitz import tables as study_tables
from jacnorm.studies.lipschitz.augmented import (
    Thresholds,
    augment,
    indicators,
    largest_slope,
    node_norms,
    ramp_loss,
    random_pairs,
    soft_indicator,
)
from jacnorm.studies.lipschitz.bounds import (
    GUARD,
    DataNorms,
    LayerNorms,
    bound,
    leading,
    relu_kappas,
    simplified,
    smooth_kappas,
    spectral_bound,
)
from jacnorm.studies.lipschitz.inputs import STUDY, Inputs, load
from jacnorm.studies.lipschitz.interlayer import Passes, Sweep, largest_norms, output_norms
from jacnorm.studies.lipschitz.margins import margins, summary
from jacnorm.studies.lipschitz.settings import DepthSettings, Device
from jacnorm.studies.lipschitz.train_depth import parts
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.job import Job, job
from jacnorm.training.seeds import generator
from jacnorm.training.snapshots import Snapshot

Row = dict[str, Any]
CHUNK = 512
"""Training samples whose products to the output are held at once."""
EVALUATED = 20
"""Test samples, and noise inputs, of a network on which the augmented loss is evaluated."""
PAIRS = 400
"""Pairs of points between which slopes are taken."""
_log = logging.getLogger(__name__)


def depth(settings: DepthSettings, tables: Path, data: Path, weights: Path, device: Device = "auto") -> None:
    """Leading terms before and after training; the theorems and the augmented loss after it."""
    with job(STUDY, "measure", "depth", settings, device) as this:
        inputs = load(data, settings.train_samples)
        samples = _samples(inputs, settings, this)
        rows: dict[str, list[Row]] = {name: [] for name in ("leading", "layers", "theorem", "augmented")}
        for snapshot in snapshot_files.load(weights):
            _check_fit(weights, snapshot, inputs, settings)
            networks = _networks(snapshot, settings, this)
            measured = _measure(networks, samples)
            rows["leading"] += _leading_rows(networks, measured)
            rows["layers"] += _layer_rows(networks, measured)
            if snapshot.cell["stage"] == "trained":
                theorem = _theorem(networks, measured, samples)
                rows["theorem"] += _theorem_rows(networks, theorem, len(samples.bounded_y))
                rows["augmented"] += _augmented_rows(networks, theorem, samples, settings)
        for name, found in rows.items():
            study_tables.write(tables, name, settings, found, this.tracker)


@dataclass(frozen=True)
class Samples:
    """float64 inputs, flat, and labels. bounded: those over which interlayer norms are maximised."""

    train_x: Tensor
    train_y: Tensor
    bounded_x: Tensor
    bounded_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Networks:
    """The networks of a snapshot, float64. finite: (R,), false for those that training left with infinities or NaN."""

    seeds: list[int]
    cell: dict[str, Any]
    weights: list[Tensor]
    biases: list[Tensor] | None
    finite: Tensor

    @property
    def activation(self) -> Activation:
        """Activation function."""
        return self.cell["activation"]

    def sweep(self, x: Tensor) -> Sweep:
        """Start a sweep over samples (B, n_0) or (R, B, n_0)."""
        return Sweep(self.weights, x, self.activation, self.biases)

    def rows(self, **columns: Tensor | str | int) -> Iterator[Row]:
        """One row per network; tensors are (R,). A network that is not finite has NaN, which no verdict passes over."""
        values = {
            name: torch.where(self.finite, value, math.nan).tolist() if isinstance(value, Tensor) else value
            for name, value in columns.items()
        }
        for run, seed in enumerate(self.seeds):
            own = {name: value[run] if isinstance(value, list) else value for name, value in values.items()}
            yield {"seed": seed, **self.cell, **own}


@dataclass(frozen=True)
class Measured:
    """Norms by layer over all training samples, and the training margins, (R, N)."""

    layers: LayerNorms
    margins: Tensor


def _samples(inputs: Inputs, settings: DepthSettings, this: Job) -> Samples:
    """Put the inputs on the job's device, with a class-balanced subset for interlayer norms and a few test samples."""
    train_x, train_y, test_x, test_y = this.put([inputs.train_x, inputs.train_y, inputs.test_x, inputs.test_y])
    train_x, test_x = train_x.flatten(1).double(), test_x[:EVALUATED].flatten(1).double()
    bounded = torch.arange(len(train_y))
    if settings.theorem_samples < len(bounded):
        chosen = generator(STUDY, inputs.name, 0, "samples of the theorem")
        bounded = balanced(inputs.train_y, settings.theorem_samples, inputs.classes, chosen)
    bounded = bounded.to(train_y.device)
    return Samples(train_x, train_y, train_x[bounded], train_y[bounded], test_x, test_y[:EVALUATED])


def _check_fit(path: Path, snapshot: Snapshot, inputs: Inputs, settings: DepthSettings) -> None:
    """Raise UserError if the weights belong to other seeds or another data set."""
    kept, asked = len(snapshot.weights[0]), len(settings.seeds)
    if kept != asked:
        raise UserError(
            f"{path} holds {kept} networks of each kind, but {asked} seeds are given; give those it was trained with"
        )
    if snapshot.cell["data_set"] != inputs.name:
        raise UserError(
            f"{path} holds networks trained on {snapshot.cell['data_set']}, but the data are {inputs.name}; give those"
        )


def _networks(snapshot: Snapshot, settings: DepthSettings, this: Job) -> Networks:
    weights, biases = parts(snapshot.tensors)
    every = this.put([*weights, *(biases or [])])
    finite = torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in every]).all(0)  # (R,)
    every = [torch.where(finite.view(-1, *[1] * (each.ndim - 1)), each, 0.0).double() for each in every]
    weights, biases = every[: len(weights)], every[len(weights) :] or None
    return Networks(settings.seeds, snapshot.cell, weights, biases, finite)


# --- leading terms ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _measure(networks: Networks, samples: Samples) -> Measured:
    """Maxima over all training samples, some samples at a time."""
    jacobian, hidden, found = [], [], []
    for start in range(0, len(samples.train_y), CHUNK):
        x, y = samples.train_x[start : start + CHUNK], samples.train_y[start : start + CHUNK]
        *preactivations, outputs = forward(networks.weights, x, networks.activation, networks.biases)
        inner = [torch.linalg.vector_norm(activate(z, networks.activation), dim=2).amax(1) for z in preactivations]
        largest = torch.linalg.vector_norm(x, dim=1).amax().expand(len(outputs))
        hidden.append(torch.stack([largest, *inner], 1).log())
        jacobian.append(output_norms(networks.weights, preactivations, networks.activation))
        found.append(margins(outputs, y))
    layers = _layer_norms(networks, torch.stack(jacobian).amax(0), torch.stack(hidden).amax(0))
    return Measured(layers, torch.cat(found, 1))


def _layer_norms(networks: Networks, jacobian: Tensor, hidden: Tensor) -> LayerNorms:
    weights = networks.weights
    return LayerNorms(
        jacobian=jacobian,
        hidden=hidden,
        spectral=torch.stack([torch.linalg.matrix_norm(w, 2).log() for w in weights], 1),
        rows=torch.stack([torch.linalg.vector_norm(w, dim=2).sum(1).log() for w in weights], 1),
        entries=torch.stack([w.abs().sum((1, 2)).log() for w in weights], 1),
    )


def not_applicable(activation: Activation, biases: bool) -> str:
    """Why the leading term may exceed the spectral one, one sentence; "" if it cannot."""
    if biases:
        return "The inequality is for networks without biases, and these have been trained with them."
    if activate(torch.zeros(()), activation) != 0:
        return f"The inequality is for activations that map 0 to 0, and {activation} does not."
    return ""


def _leading_rows(networks: Networks, measured: Measured) -> Iterator[Row]:
    terms = {f"log_{name}": value for name, value in asdict(leading(measured.layers)).items()}
    reason = not_applicable(networks.activation, networks.biases is not None)
    return networks.rows(**summary(measured.margins), **terms, not_applicable=reason)


def _layer_rows(networks: Networks, measured: Measured) -> Iterator[Row]:
    names = {"spectral": "log_spectral_norm"}
    norms = {names.get(name, f"log_{name}"): value for name, value in asdict(measured.layers).items()}
    for layer in range(len(networks.weights)):
        yield from networks.rows(layer=layer + 1, **{name: value[:, layer] for name, value in norms.items()})


# --- the theorems ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Theorem:
    """What one sweep over the chosen samples gives."""

    norms: DataNorms
    thresholds: Thresholds
    passes: Passes


@torch.no_grad()
def _theorem(networks: Networks, measured: Measured, samples: Samples) -> Theorem:
    """Interlayer norms over some of the training samples; the margin is that of all.

    The theorems are stated without biases; where they were trained, the same formulas are evaluated.
    """
    sweep = networks.sweep(samples.bounded_x)
    sigma = largest_norms(sweep)
    nodes = node_norms(sweep).amax(1)  # (R, n)
    first = torch.linalg.vector_norm(sweep.inputs, dim=2).amax(1, keepdim=True).log()
    smallest = torch.stack([z.abs().amin((1, 2)).log() for z in sweep.preactivations], 1)
    layers = _layer_norms(networks, sigma[:, -1, 1::2], torch.cat([first, nodes[:, 1::2]], 1))
    norms = DataNorms(layers, sigma, smallest, measured.margins.amin(1))
    _warn_of_infinite_bounds(networks, norms.margin)
    return Theorem(norms, Thresholds(nodes, sigma), sweep.passes)


def _warn_of_infinite_bounds(networks: Networks, margin: Tensor) -> None:
    seeds = [seed for seed, bad in zip(networks.seeds, (margin <= 0).tolist(), strict=True) if bad]
    if seeds:
        _log.info(
            "%s: the smallest training margin of seed %s is not positive, so the bounds are infinite there; raise "
            "max_epochs, or take fewer training samples",
            _name(networks),
            ", ".join(map(str, seeds)),
        )


def _theorem_rows(networks: Networks, theorem: Theorem, samples: int) -> Iterator[Row]:
    norms = theorem.norms
    relu = networks.activation == "relu"
    kappas = relu_kappas(norms) if relu else smooth_kappas(norms, curvature(networks.activation))
    found = bound(norms, kappas)
    yield from networks.rows(
        samples=samples,
        pairs=norms.interlayer.shape[1] * (norms.interlayer.shape[1] - 1) // 2,
        passes=theorem.passes.made,
        separate_passes=theorem.passes.separate,
        log_h1=found.h1,
        log_h2=found.h2,
        log_h3=found.h3,
        log_jac=found.jac,
        log_bound=found.total,
        log_simplified=simplified(norms),
        log_spectral=spectral_bound(norms),
    )


# --- the augmented loss ----------------------------------------------------------------------------------------------


@torch.no_grad()
def _augmented_rows(networks: Networks, theorem: Theorem, samples: Samples, settings: DepthSettings) -> Iterator[Row]:
    """Augmented against plain loss; the ramp ends at the margin that training aims at."""
    train = networks.sweep(samples.bounded_x)
    others = networks.sweep(
        torch.cat([samples.test_x.expand(len(networks.seeds), -1, -1), _noise(networks, samples)], 1)
    )
    kept = {"train": indicators(train, theorem.thresholds)}
    count = len(samples.test_y)
    kept["test"], kept["noise"] = indicators(others, theorem.thresholds).tensor_split([count], 1)
    test, noise = others.outputs.tensor_split([count], 1)
    # Noise has no class: the network's own answer leaves the plain loss below 1, and the augmented one room to rise.
    found = {
        "train": margins(train.outputs, samples.bounded_y),
        "test": margins(test, samples.test_y),
        "noise": margins(noise, noise.argmax(2)),
    }
    for split, margin in found.items():
        loss = ramp_loss(margin, settings.margin)
        gap = augment(loss, kept[split]) - loss  # (R, B)
        indicator_slope, ramp_slope = _slopes(networks, theorem.thresholds, settings.margin, split)
        yield from networks.rows(
            split=split,
            smallest_gap=gap.amin(1),
            largest_gap=gap.amax(1),
            indicator_slope=indicator_slope,
            ramp_slope=ramp_slope,
        )


def _noise(networks: Networks, samples: Samples) -> Tensor:
    """Gaussian directions, of one to ten times the largest norm of a training sample, (R, B, n_0)."""
    largest = torch.linalg.vector_norm(samples.train_x, dim=1).amax().cpu()
    found = []
    for seed in networks.seeds:
        draw = generator(STUDY, _name(networks), seed, "noise")
        x = torch.randn(EVALUATED, samples.train_x.shape[1], generator=draw, dtype=torch.float64)
        scale = 1 + 9 * torch.rand(EVALUATED, 1, generator=draw, dtype=torch.float64)
        found.append(torch.nn.functional.normalize(x, dim=1) * scale * largest)
    return torch.stack(found).to(samples.train_x.device)


def _slopes(networks: Networks, thresholds: Thresholds, margin: float, split: str) -> tuple[Tensor, Tensor]:
    """Largest slopes of soft indicator and ramp loss of each network, times threshold and margin, (R,) each."""
    scales = thresholds.node.exp().clamp(min=GUARD).cpu()  # (R, n)
    found = []
    for run, seed in enumerate(networks.seeds):
        draw = generator(STUDY, _name(networks), seed, f"slopes {split}")
        threshold = scales[run][torch.randint(scales.shape[1], (PAIRS, 1), generator=draw)]  # (PAIRS, 1)
        norm = threshold * random_pairs(PAIRS, 0.0, 3.0, draw)
        points = margin * random_pairs(PAIRS, -1.0, 2.0, draw)
        found.append(
            [
                largest_slope(norm, soft_indicator(norm, threshold), threshold),
                largest_slope(points, ramp_loss(points, margin), margin),
            ]
        )
    return torch.tensor(found, dtype=torch.float64, device=thresholds.node.device).unbind(1)


def _name(networks: Networks) -> str:
    """The cell as text, for generators and messages."""
    cell = networks.cell
    return f"{cell['data_set']}, {cell['activation']}, width {cell['width']}, depth {cell['depth']}"
