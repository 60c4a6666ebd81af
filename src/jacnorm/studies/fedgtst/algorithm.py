"""Federated learning as the study's methods do it, each formula stated once, as pure functions of tensors.

Everything works on one client's tensors and can be mapped over clients and runs by `torch.func.vmap`. J is the
gradient of a client's mean loss by all weights, flattened; norms are Euclidean. Letters: k participants, B samples,
C classes, d features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from jacnorm.studies.fedgtst.settings import TrainingSettings

Tensors = dict[str, Tensor]

TINY = 1e-24
"""Added inside roots of sums of squares: the norm of a zero gradient then has the derivative 0, not NaN."""
SLICE = 256
"""Samples, at most, of one piece of a full gradient: bounds memory and changes rounding only."""
LENGTH_WEIGHT, CONDITIONAL_WEIGHT = 1e-2, 5e-4
"""Weights of FedSR's two regularisers, as in the authors' code; the study's coefficient multiplies both."""
ALIGNMENT_KEPT = 0.95
"""Share of the former mean head gradient that FedIIR keeps in a round, as in the authors' code."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of (B, C) logits and (B,) labels, in nat."""
    return functional.cross_entropy(logits, y)


def gradient_norm(gradient: Mapping[str, Tensor]) -> Tensor:
    """||J||, the statistic of FedGTST (Def. 4): Euclidean norm of a gradient given by parameter, not normalised."""
    return (torch.stack([g.square().sum() for g in gradient.values()]).sum() + TINY).sqrt()


def penalised(loss: Tensor, norm: Tensor, xi: Tensor, guide: Tensor) -> Tensor:
    """FedGTST's client objective (Eq. 10): loss + xi (||J|| - guide)^2."""
    return loss + xi * (norm - guide).square()


def objective_and_gradient(
    loss: Callable[[Tensors], Tensor], weights: Tensors, xi: Tensor, guide: Tensor
) -> tuple[Tensor, Tensor, Tensors]:
    """The loss without penalty, ||J|| and the gradient of `penalised` at `weights`, by double backward.

    The gradient is J + H d(penalty)/dJ, H the Hessian of the loss: one product with H, whatever the penalty.
    """

    def once(w: Tensors) -> tuple[Tensors, Tensor]:
        return torch.func.grad_and_value(loss)(w)

    gradient, pull, value = torch.func.vjp(once, weights, has_aux=True)
    by_gradient, norm = torch.func.grad_and_value(gradient_norm)(gradient)
    by_norm = torch.func.grad(lambda n: penalised(torch.zeros_like(n), n, xi, guide))(norm)
    (curved,) = pull({name: by_norm * g for name, g in by_gradient.items()})
    return value, norm, {name: g + curved[name] for name, g in gradient.items()}


def fediir_objective(loss: Tensor, head: Mapping[str, Tensor], mean_head: Mapping[str, Tensor], rho: Tensor) -> Tensor:
    """FedIIR's client objective (Guo et al. 2023): loss + rho |g - m|^2.

    head: g, the gradient of the loss by the read-out. mean_head: m, the server's moving average of it over clients.
    """
    return loss + rho * sum((g - mean_head[name]).square().sum() for name, g in head.items())


def fedsr_objective(
    loss: Tensor, z: Tensor, mean: Tensor, deviation: Tensor, y: Tensor, reference: Mapping[str, Tensor], factor: Tensor
) -> Tensor:
    """FedSR's client objective (Nguyen, Torr and Lim 2022): loss + factor (0.01 length + 0.0005 conditional).

    length: mean Euclidean norm of the sampled features z (B, d). conditional: mean over samples of the divergence of
    N(scale mean, (scale deviation)^2) from the class's reference N(r_mu[y], r_sigma[y]^2), summed over features.
    reference: "r_mu" and "r_sigma" (C, d), the latter before softplus, and "scale" (); learnt, and each client's own.
    """
    length = (z.square().sum(-1) + TINY).sqrt().mean()
    r_mu, r_sigma = reference["r_mu"][y], functional.softplus(reference["r_sigma"][y])  # (B, d)
    own, centre = reference["scale"] * deviation, reference["scale"] * mean
    # log(own^2)/2 rather than log(own), so that a learnt scale may change its sign.
    divergence = r_sigma.log() - 0.5 * (own.square() + TINY).log()
    divergence = divergence + (own.square() + (centre - r_mu).square()) / (2 * r_sigma.square()) - 0.5
    return loss + factor * (LENGTH_WEIGHT * length + CONDITIONAL_WEIGHT * divergence.sum(-1).mean())


def full_gradient(loss: Callable[[Tensors, Tensor, Tensor], Tensor], weights: Tensors, x: Tensor, y: Tensor) -> Tensors:
    """J of a client: gradient by `weights` of the mean loss over all its samples x (n, ...), y (n,)."""
    n, total = len(y), None
    for start in range(0, n, SLICE):
        part = torch.func.grad(loss)(weights, x[start : start + SLICE], y[start : start + SLICE])
        share = min(SLICE, n - start) / n
        part = {name: share * g for name, g in part.items()} if share < 1 else part
        total = part if total is None else {name: total[name] + g for name, g in part.items()}
    if total is None:
        raise ValueError("a client has no samples")
    return total


def unweighted_mean(values: Tensor, answered: Tensor) -> Tensor:
    """Mean over the clients that answered: values (k, ...), answered (k,) bool; NaN if none did."""
    mask = answered.view(-1, *[1] * (values.ndim - 1))
    return torch.where(mask, values, 0).sum(0) / answered.sum().to(values.dtype)


def max_guide(norms: Tensor, answered: Tensor) -> Tensor:
    """Guide of the next round (step D): largest norm of the clients that answered; norms (k,)."""
    return torch.where(answered, norms, -math.inf).amax(0)


def mean_guide(norms: Tensor, answered: Tensor) -> Tensor:
    """Our alternative to it: the mean norm, which cannot run away by one client's doing."""
    return unweighted_mean(norms, answered)


def schedule(settings: TrainingSettings, index: int) -> float:
    """Factor of the coefficient in round `index` (from 0): 1, a linear warmup to 1, or a cosine decay to 0."""
    if settings.schedule == "constant":
        return 1.0
    part = min(1.0, index / settings.schedule_rounds)
    return part if settings.schedule == "warmup" else 0.5 * (1 + math.cos(math.pi * part))


def learning_rate(settings: TrainingSettings, index: int) -> float:
    """Step size of the clients in round `index` (from 0), divided by 10 every `decay_rounds`."""
    return settings.learning_rate * 0.1 ** (index // settings.decay_rounds)


def sgd_step(weights: Tensors, gradient: Tensors, state: Tensors, rate: Tensor, number: int) -> tuple[Tensors, Tensors]:
    """Plain gradient step w - rate g: new weights and the empty state. number: of the step, from 1; not used."""
    return {name: w - rate * gradient[name] for name, w in weights.items()}, state


def adam_step(
    weights: Tensors, gradient: Tensors, state: Tensors, rate: Tensor, number: int
) -> tuple[Tensors, Tensors]:
    """A step of Adam (Kingma and Ba 2015, algorithm 1, usual constants): new weights and state.

    state: both moments, or empty before the first step. number: of the step, from 1.
    """
    (b1, b2), epsilon = (0.9, 0.999), 1e-8
    moved, new = {}, {}
    for name, w in weights.items():
        g = gradient[name]
        m, v = (1 - b1) * g, (1 - b2) * g.square()
        if state:
            m, v = b1 * state[f"first.{name}"] + m, b2 * state[f"second.{name}"] + v
        new[f"first.{name}"], new[f"second.{name}"] = m, v
        moved[name] = w - rate * (m / (1 - b1**number)) / ((v / (1 - b2**number)).sqrt() + epsilon)
    return moved, new


STEPS = {"sgd": sgd_step, "adam": adam_step}
"""Optimisers of the clients, started anew in every round."""
