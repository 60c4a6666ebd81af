"""What a network does to its inputs: Jacobian norms, their variation, slopes between samples, costs and accuracies.

Everything is stacked over R runs and takes some samples at a time. Letters: R runs, B samples of a chunk, n training
and m test samples with a Jacobian, K logits, d input features. Jacobians are those of the logits by the standardised
input, J(x) = d z / d x of shape (K, d), in evaluation mode; norms are spectral.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from jacnorm.studies.sharpening.costs import costs, targets
from jacnorm.studies.sharpening.inputs import Inputs
from jacnorm.studies.sharpening.networks import Network

Stack = Mapping[str, Tensor]
NUMBERS = 2**25
"""Numbers of the training Jacobians that are held at once, and eight times those of a chunk; one run's in any case."""
PIECE = 2**18
"""Numbers of the matrices whose Gram matrices are made at once on a CPU."""
BLOCK = 64
"""Samples whose distances to the later ones are taken at once."""


# --- Jacobians -------------------------------------------------------------------------------------------------------


def jacobians(network: Network, parameters: Stack, buffers: Stack, x: Tensor) -> Tensor:
    """J(x_b) of every run and sample, (R, B, K, d), d the input's features in the order of `x.flatten(1)`.

    x: (B, c, h, w), shared by the runs. Exact: K pulls, each for all runs and samples together.
    """
    runs = len(next(iter(parameters.values())))
    inputs = x.expand(runs, *x.shape).detach().requires_grad_()  # (R, B, c, h, w)
    logits = network(parameters, buffers, inputs)  # (R, B, K)
    # Runs and samples are independent, so the gradient of a sum over them holds each one's own row.
    sums = logits.sum((0, 1)).unbind()
    rows = [torch.autograd.grad(each, inputs, retain_graph=each is not sums[-1])[0] for each in sums]
    return torch.stack(rows, 2).flatten(3)  # (R, B, K, d)


def norms(matrices: Tensor) -> Tensor:
    """Spectral norms of matrices (..., K, d), (...) float64, by the K x K Gram matrix in float64; NaN if not finite."""
    return _top(_gram(matrices))


def largest_norm(matrices: Tensor) -> Tensor:
    """Largest spectral norm of matrices (R, B, K, d) over samples, (R,) float64: the maximum of `norms`, at less cost.

    With M = A A^T, |M^2|_F^(1/4) = (sum_k sigma_k^8)^(1/8) is at least the norm and at most K^(1/8) times the norm. So
    only matrices for which it is as large as the norm of the one with the largest such bound need eigenvalues.
    """
    gram = _gram(matrices)  # (R, B, K, K)
    bound = torch.linalg.matrix_norm(gram @ gram).pow(0.25) * (1 + 1e-12)  # rounded up
    runs = torch.arange(len(gram), device=gram.device)
    found = _top(gram[runs, bound.argmax(1)])  # (R,); NaN counts as largest
    candidates = ~(bound < found[:, None])
    every = torch.full_like(bound, -math.inf)
    every[candidates] = _top(gram[candidates])
    return every.amax(1)


def _gram(matrices: Tensor) -> Tensor:
    """A A^T of matrices (..., K, d), (..., K, K) float64."""
    flat = matrices.flatten(0, -3)
    # In pieces that stay in a processor's cache: copies of everything in float64 took five times as long.
    at_once = max(1, PIECE // flat[0].numel()) if flat.device.type == "cpu" else len(flat)
    found = [wide @ wide.mT for wide in map(Tensor.double, flat.split(at_once))]
    return torch.cat(found).unflatten(0, matrices.shape[:-2])


def _top(gram: Tensor) -> Tensor:
    """Roots of the largest eigenvalues of positive semi-definite matrices (..., K, K)."""
    finite = gram.isfinite().flatten(-2).all(-1)
    if not finite.all():  # LAPACK refuses a whole batch for one NaN
        gram = torch.where(finite[..., None, None], gram, 0.0)
    top = torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0).sqrt()
    return torch.where(finite, top, math.nan)


@dataclass(frozen=True)
class Neighbours:
    """Samples at which Jacobians are measured, and for each test sample the nearest of the training samples.

    train: (n, c, h, w); test: (m, c, h, w); nearest: (m,) int64 rows of train; distance: (m,) float64, Euclidean.
    """

    train: Tensor
    test: Tensor
    nearest: Tensor
    distance: Tensor

    @classmethod
    def of(cls, train: Tensor, test: Tensor) -> Self:
        """Find the neighbours; to be done once, since they depend on the inputs only."""
        points = train.flatten(1).double()
        nearest, distance = [], []
        for part in test.split(BLOCK):
            found = torch.cdist(part.flatten(1).double(), points).argmin(1)
            nearest.append(found)
            distance.append(torch.linalg.vector_norm(part.flatten(1).double() - points[found], dim=1))
        return cls(train, test, torch.cat(nearest), torch.cat(distance))


def jacobian_columns(
    network: Network, parameters: Stack, buffers: Stack, neighbours: Neighbours, *, chunk: int = 1000
) -> dict[str, Tensor]:
    """The columns of tables on Jacobians, (R,) each: norms over training and test samples, and local variation.

    distance: 95 % quantile of the test samples' distance to the nearest training sample. variation: V = max_j
    |J(x'_j) - J(x_nn(j))|, the measurable part of the variation of J over a ball (Theorem 4.3).
    """
    runs = len(next(iter(parameters.values())))
    numbers = network.classes * neighbours.train[0].numel()  # of one Jacobian
    together = max(1, NUMBERS // (numbers * len(neighbours.train)))
    parts = []
    for start in range(0, runs, together):
        some = slice(start, start + together)
        own = [{name: tensor[some] for name, tensor in each.items()} for each in (parameters, buffers)]
        at_once = min(chunk, max(1, NUMBERS // (8 * numbers * min(together, runs))))
        parts.append(_columns(network, *own, neighbours, at_once))
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {**columns, "distance": neighbours.distance.quantile(0.95).expand(runs)}


def _columns(
    network: Network, parameters: Stack, buffers: Stack, neighbours: Neighbours, chunk: int
) -> dict[str, Tensor]:
    """As `jacobian_columns`, for runs whose training Jacobians fit into memory together."""

    def parts(x: Tensor) -> Iterator[Tensor]:
        return (jacobians(network, parameters, buffers, part) for part in x.split(chunk))

    train = torch.cat(list(parts(neighbours.train)), 1)  # (R, n, K, d)
    own, test, variation = norms(train), [], []
    for found, nearest in zip(parts(neighbours.test), neighbours.nearest.split(chunk), strict=True):
        test.append(norms(found))
        variation.append(largest_norm(found.sub_(train[:, nearest])))
    others = torch.cat(test, 1)  # (R, m)
    return {
        "jacobian_max": own.amax(1),
        "jacobian_mean": own.mean(1),
        "jacobian_argmax": own.argmax(1),
        "test_jacobian_max": others.amax(1),
        "test_jacobian_mean": others.mean(1),
        "variation": torch.stack(variation).amax(0),
    }


# --- slopes between samples ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Distances between N samples, of each block of samples to itself and the later ones.

    blocks: (b, N - start) float64, infinite where a pair does not count: a sample and itself, each pair's second
    mention, and samples with equal inputs.
    """

    blocks: list[Tensor]

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """Take the distances of samples (N, ...); to be done once, since they depend on the inputs only."""
        points = x.flatten(1).double()
        blocks = []
        for start in range(0, len(points), BLOCK):
            later = points[start:]
            # Not by a matrix product, whose cancellation would give equal samples a distance.
            distances = torch.cdist(points[start : start + BLOCK], later, compute_mode="donot_use_mm_for_euclid_dist")
            counts = torch.ones_like(distances, dtype=torch.bool).triu(1) & (distances > 0)
            blocks.append(torch.where(counts, distances, math.inf))
        return cls(blocks)


def slopes(logits: Tensor, labels: Tensor, square: Tensor, smoothing: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    r"""Lower bound LB on the Lipschitz norm and the largest slope S, (R,) float64 each (Theorem 5.1, static form).

        LB = max_{i != j} (|t_i - t_j| - r_i - r_j) / |x_i - x_j|  <=  S = max_{i != j} |o_i - o_j| / |x_i - x_j|

    with r_i = |o_i - t_i|. Outputs o and targets t are the logits and the one-hot labels for the square cost; the
    probabilities and the smoothed labels for cross-entropy (softmax has Lipschitz constant at most 1, so that S stays
    below the logits' one). LB may be negative. -inf if no pair counts.

    logits: (R, N, K) at the samples of `pairs`; labels: (N,); square: (R,) bool; smoothing: (R,).
    """
    outputs = logits.double()
    outputs = torch.where(square[:, None, None], outputs, outputs.softmax(2))
    wanted = targets(labels, logits.shape[2], smoothing, torch.float64)  # (R, N, K)
    residuals = torch.linalg.vector_norm(outputs - wanted, dim=2)  # (R, N)
    apart = math.sqrt(2) * (1 - smoothing.double())[:, None, None]  # targets of different labels
    bounds, largest, start = [], [], 0
    for distances in pairs.blocks:
        rows, later = slice(start, start + len(distances)), slice(start, None)
        differ = labels[rows, None] != labels[later]  # (b, N - start)
        asked = apart * differ - residuals[:, rows, None] - residuals[:, None, later]  # (R, b, N - start)
        given = torch.cdist(outputs[:, rows], outputs[:, later])
        for found, difference in ((bounds, asked), (largest, given)):
            found.append((difference / distances).masked_fill(distances.isinf(), -math.inf).amax((1, 2)))
        start += len(distances)
    return torch.stack(bounds).amax(0), torch.stack(largest).amax(0)


# --- costs and accuracies --------------------------------------------------------------------------------------------


@torch.no_grad()
def fit_columns(
    network: Network,
    parameters: Stack,
    buffers: Stack,
    inputs: Inputs,
    square: Tensor,
    smoothing: Tensor,
    *,
    chunk: int = 1000,
) -> dict[str, Tensor]:
    """The columns of tables on the fit: mean cost and accuracy over all training and all test samples, (R,) float64.

    square: (R,) bool, which runs have the square cost; smoothing: (R,), of the labels of the others' cross-entropy (0
    gives plain cross-entropy, whatever a run was trained with). Samples may be on another device than the parameters.
    """
    device = square.device
    columns = {}
    for split, x, y in (("train", inputs.train_x, inputs.train_y), ("test", inputs.test_x, inputs.test_y)):
        loss, right = (torch.zeros(len(square), dtype=torch.float64, device=device) for _ in range(2))
        for some, labels in zip(x.split(chunk), y.to(device).split(chunk), strict=True):
            logits = network(parameters, buffers, some.to(device))  # (R, B, K)
            loss += costs(logits, labels, square, smoothing).double().sum(1)
            right += (logits.argmax(2) == labels).sum(1)
        columns |= {f"{split}_loss": loss / len(y), f"{split}_accuracy": right / len(y)}
    return columns


@torch.no_grad()
def refresh(network: Network, parameters: Stack, buffers: Stack, x: Tensor, chunk: int = 1000) -> dict[str, Tensor]:
    """Running statistics of batch norm for these parameters: the mean over chunks of all samples, weighted by size.

    x: (N, c, h, w). Returns new tensors (R, ...), for measuring in evaluation mode; nothing without batch norm.
    """
    found = {name: torch.zeros_like(tensor) for name, tensor in buffers.items()}
    done = 0
    for part in x.split(chunk) if network.has_batch_norm else ():
        done += len(part)
        network(parameters, found, part, training=True, momentum=len(part) / done)
    return found
