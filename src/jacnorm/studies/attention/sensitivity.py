"""How weights answer to a change of the logits: Algorithm 5 of the paper, and the exact Jacobian beside it.

Algorithm 5 perturbs the logits l of a row by epsilon v, with v uniform on the unit sphere of the visible keys and drawn
anew for every temperature, epsilon and row, and takes the change of the weights over epsilon: g = |a' - a| / epsilon.
For small epsilon g^2 is |J|_F^2 / n on average, so g falls short of the spectral norm of J by about the root of n and
cannot be compared between rows of different lengths; the Jacobian's norms can. All is float64, since a perturbation
of 1e-3 at T = 10 changes weights by a millionth of themselves.

Letters: H heads, R rows of each, n keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jacnorm.studies.attention.normalisers import Normaliser
from jacnorm.training.seeds import RunId

TOLERANCE = 1e-9
"""Relative, of the bound 1 / (2 T): rows with two equal logits reach it."""

Rows = Iterator[dict[str, Any]]


def sensitivity_rows(
    heads: Sequence[Mapping[str, Any]],
    normaliser: Normaliser,
    logits: Tensor,
    visible: Tensor,
    temperatures: Sequence[float],
    perturbations: Sequence[float],
    run: RunId,
) -> Rows:
    """Rows of the table `sensitivity`: g averaged over the rows of each head, for every temperature and perturbation.

    heads: what identifies each of the H heads, copied into its rows. logits: (H, R, n); visible: (H, R, n) or (R, n).
    run names the heads that are passed together, since their directions come from one stream; directions do not depend
    on the normaliser, nor on which other temperatures and perturbations are asked for.
    """
    seen = visible.expand(logits.shape)
    for temperature in temperatures:
        before = normaliser.weights(logits, seen, temperature)
        for perturbation in perturbations:
            generator = run.generator(f"direction/{temperature!r}/{perturbation!r}")
            moved = logits + perturbation * directions(seen, generator)
            change = normaliser.weights(moved, seen, temperature) - before
            g = torch.linalg.vector_norm(change, dim=-1) / perturbation  # (H, R)
            values = {"temperature": temperature, "perturbation": perturbation, "rows": g.shape[-1]}
            for head, mean in zip(heads, g.mean(-1).tolist(), strict=True):
                yield {**head, "normaliser": normaliser.name, **values, "change": mean}


def jacobian_rows(
    heads: Sequence[Mapping[str, Any]],
    normaliser: Normaliser,
    logits: Tensor,
    visible: Tensor,
    temperatures: Sequence[float],
) -> Rows:
    """Rows of the table `jacobians`: exact norms of the Jacobian over the rows of each head, for every temperature.

    heads, logits and visible as in `sensitivity_rows`.
    """
    seen = visible.expand(logits.shape)
    root = seen.sum(-1).double().sqrt()  # (H, R)
    for temperature in temperatures:
        jacobian = normaliser.jacobian(logits, seen, temperature)
        frobenius, spectral = jacobian.frobenius(), jacobian.spectral()  # (H, R)
        product = temperature * spectral
        columns = {
            "frobenius": frobenius.mean(-1),
            "frobenius_per_root": (frobenius / root).mean(-1),
            "spectral": spectral.mean(-1),
            "spectral_max": spectral.amax(-1),
            "spectral_largest_product": product.amax(-1),
            "above_quarter": (product > 1 / 4).double().mean(-1),
            "above_half": (product > (1 + TOLERANCE) / 2).double().mean(-1),
        }
        values = torch.stack(list(columns.values()), -1).tolist()  # H lists
        for head, row in zip(heads, values, strict=True):
            found = dict(zip(columns, row, strict=True))
            yield {
                **head,
                "normaliser": normaliser.name,
                "temperature": temperature,
                "rows": spectral.shape[-1],
                **found,
            }


def directions(visible: Tensor, generator: torch.Generator) -> Tensor:
    """Vectors uniform on the unit sphere of the visible keys, one for each row of `visible` (..., n); float64.

    Drawn on the CPU, so that they are the same on every device.
    """
    drawn = torch.randn(visible.shape, generator=generator, dtype=torch.float64).to(visible.device)
    drawn = drawn.where(visible, 0.0)
    return drawn / torch.linalg.vector_norm(drawn, dim=-1, keepdim=True)
