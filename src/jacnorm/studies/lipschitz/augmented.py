"""The loss augmented with indicators of norms (Wei and Ma 2019, Section 6) for multilayer perceptrons.

Nodes V_1, ..., V_n are the outputs of the layers 1, ..., n = 2r - 1 (see `bounds`). Thresholds are the largest norms
over a set of samples, on which the augmented loss is then the loss itself. Letters: R networks, B samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from jacnorm.nets.mlp import activate
from jacnorm.studies.lipschitz.bounds import GUARD
from jacnorm.studies.lipschitz.interlayer import LogNorms, Sweep


def soft_indicator(norm: Tensor, threshold: Tensor | float) -> Tensor:
    """1 up to the threshold, 2 - norm / threshold up to its double, 0 beyond; 1/threshold-Lipschitz (Section 3)."""
    return (2 - norm / threshold).clamp(0, 1)


def ramp_loss(margin: Tensor, scale: float) -> Tensor:
    """1 for margins up to 0, 1 - margin / scale up to `scale`, 0 above; 1/scale-Lipschitz (Appendix A)."""
    return (1 - margin / scale).clamp(0, 1)


def augment(loss: Tensor, indicators: Tensor) -> Tensor:
    """1 + (loss - 1) indicators, the augmented loss (Theorem 6.3, Claim H.1), for a loss and a product in [0, 1].

    Written as loss + (1 - loss) (1 - indicators), the same number, so that rounding keeps it between the loss and 1 and
    makes it the loss itself, bit for bit, where every indicator is 1.
    """
    return (loss + (1 - loss) * (1 - indicators)).clamp(max=1)


@dataclass(frozen=True)
class Thresholds:
    """Log of the largest norms over some samples: node (R, n) of V_1, ..., V_n; jacobian (R, n + 1, n + 1).

    jacobian is laid out as in `bounds.DataNorms.interlayer`.
    """

    node: Tensor
    jacobian: Tensor


def node_norms(sweep: Sweep) -> Tensor:
    """Log of the Euclidean norm of every node, (R, B, n)."""
    nodes = [node for z in sweep.preactivations for node in (z, activate(z, sweep.activation))]
    return torch.stack([torch.linalg.vector_norm(node, dim=2).log() for node in [*nodes, sweep.outputs]], dim=2)


@torch.no_grad()
def indicators(sweep: Sweep, thresholds: Thresholds) -> Tensor:
    """The product of the soft indicators of all node norms and all interlayer Jacobian norms, (R, B) in [0, 1].

    A norm is computed only where its upper bound exceeds the threshold and the product is not zero yet; everywhere else
    the indicator, or the product, is known.
    """
    excess = node_norms(sweep) - _floored(thresholds.node)[:, None]
    product = soft_indicator(excess.exp(), 1.0).prod(2)  # (R, B)
    for later, earlier, norms in sweep:
        product = product * _indicator(norms, _floored(thresholds.jacobian[:, later, earlier]), product > 0)
    return product


def _floored(log_threshold: Tensor) -> Tensor:
    """A threshold of zero (a network that is dead) would divide by it."""
    return log_threshold.clamp(min=math.log(GUARD))


def _indicator(norms: LogNorms, log_threshold: Tensor, wanted: Tensor) -> Tensor:
    """Soft indicator of one Jacobian norm, (R, B); 1 where the mask `wanted` (R, B) is false."""
    bound = log_threshold[:, None].expand_as(wanted)
    over = (norms.upper > bound) & wanted  # (R, B), also where the samples share one norm
    found = torch.ones_like(bound)
    if norms.upper.shape[1] == 1:
        return torch.where(over, soft_indicator((norms.upper - bound).exp(), 1.0), found)
    over[over.clone()] = norms.tightened(over) > bound[over]
    if over.any():
        found[over] = soft_indicator((norms.exact(over) - bound[over]).exp(), 1.0)
    return found


def largest_slope(points: Tensor, values: Tensor, scale: Tensor | float) -> float:
    """Largest scale |f(a) - f(b)| / |a - b| over pairs; points (a, b) and values (P, 2), scale (P, 1) or a number."""
    return (scale * values.diff(dim=1) / points.diff(dim=1)).abs().max().item()


def random_pairs(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Pairs of points in [low, high), (count, 2) float64, at least a ten-thousandth of the range apart.

    Half of them are close, so that some lie where a function of slopes 0 and 1 is steep, whatever its bends.
    """
    width = high - low
    first, distance = torch.rand(2, count, generator=generator, dtype=torch.float64)
    distance = (1e-4 + 0.99 * distance * torch.where(torch.arange(count) < count // 2, 0.01, 1.0)) * width
    first = low + first * (width - distance)
    return torch.stack([first, first + distance], 1)
