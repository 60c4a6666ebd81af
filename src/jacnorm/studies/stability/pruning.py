"""Pruning at initialisation on stacks of networks: scores, masks and the factors that rescale what is left.

`sparsity` is the fraction of weights REMOVED, in [0, 1). Scores are high for weights to keep. Weights are L tensors
(R, n_l, n_{l-1}) as in `jacnorm.nets.mlp`; scores, masks and factors of one run depend on that run alone.
Methods after Tanaka et al. 2020 (arXiv 2006.05467) and the references there. Which of them the paper uses, and with
which factor, is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from jacnorm.nets.mlp import Activation, activate, cross_entropy, draw_stack, logits, stacked_input
from jacnorm.studies.stability.theory import alpha_mag, alpha_random, check_sparsity

Method = Literal["random", "magnitude", "snip", "grasp", "synflow"]
Scope = Literal["local", "global"]
Scaling = Literal["none", "inverse_sqrt_density", "frobenius", "alpha_mag", "activity"]

GRASP_TEMPERATURE = 200.0
SYNFLOW_ROUNDS = 100


# --- scores --------------------------------------------------------------------------------------------------------


def random_scores(weights: Sequence[Tensor], generators: Sequence[torch.Generator]) -> list[Tensor]:
    """Uniform scores in [0, 1), one generator per run. Raises ValueError if their number is not that of the runs.

    Seed these generators differently from those that made the weights: torch draws normal and uniform numbers from one
    stream, and masks of the same seed follow the weights' sizes (at s = 0.9 they keep 1.8 times the second moment).
    """
    if len(generators) != weights[0].shape[0]:
        raise ValueError(f"there are {len(generators)} generators for {weights[0].shape[0]} runs; give one per run")
    widths = [weights[0].shape[2], *(weight.shape[1] for weight in weights)]

    # float64: 24-bit float32 numbers would tie within a layer of a few thousand weights.
    def draw(rows: int, columns: int, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(rows, columns, generator=generator, dtype=torch.float64, device=generator.device)
        return uniform.to(weights[0].device)

    return draw_stack(widths, generators, draw)


def magnitude_scores(weights: Sequence[Tensor]) -> list[Tensor]:
    """|w|. Under a global scope layers compete by raw size, so the widest fan-in loses most."""
    return [weight.detach().abs() for weight in weights]


def _leaves(weights: Sequence[Tensor]) -> list[Tensor]:
    # Gradients shrink like the Jacobian with depth; in float32 they would underflow before they are compared.
    return [weight.detach().double().requires_grad_() for weight in weights]


def snip_scores(weights: Sequence[Tensor], x: Tensor, labels: Tensor, activation: Activation = "relu") -> list[Tensor]:
    """|w dL/dw| with L the mean cross-entropy of the run on the batch (Lee et al. 2019), in float64.

    x: (B, n_0) or (R, B, n_0); labels: (B,) or (R, B). The scores change with the batch.
    """
    leaves = _leaves(weights)
    with torch.enable_grad():
        # The runs share no weight, so the gradient of the sum over runs is each run's own.
        loss = cross_entropy(logits(leaves, x.detach().double(), activation), labels).sum()
    gradients = torch.autograd.grad(loss, leaves)
    return [(leaf.detach() * gradient).abs() for leaf, gradient in zip(leaves, gradients, strict=True)]


def grasp_scores(
    weights: Sequence[Tensor],
    x: Tensor,
    labels: Tensor,
    activation: Activation = "relu",
    temperature: float = GRASP_TEMPERATURE,
) -> list[Tensor]:
    """Score w (H g)_w, g and H the gradient and Hessian of the loss of logits / temperature (Wang et al. 2020).

    The lowest scores are removed, as in the public code: to first order, those removals raise the squared gradient
    norm most. H g is exact, by double backward in float64, as there. A finite difference of gradients is no substitute
    in a deep ReLU net: a step of 1e-4 along g / |g| crosses kinks of the loss and gives other scores (correlation below
    0.1 with these at depth 30, width 128), hence other masks. Raises ValueError if temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    leaves = _leaves(weights)
    with torch.enable_grad():
        loss = cross_entropy(logits(leaves, x.detach().double(), activation) / temperature, labels).sum()
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        along = sum((gradient * gradient.detach()).sum() for gradient in gradients)
    products = torch.autograd.grad(along, leaves)
    return [leaf.detach() * product for leaf, product in zip(leaves, products, strict=True)]


def synflow_scores(weights: Sequence[Tensor]) -> list[Tensor]:
    """|w dR/dw| / R with R = 1^T |W_L| ... |W_1| 1 (Tanaka et al. 2020), in float64.

    R grows like sqrt(n)^L, so the forward and backward vectors are normalised at every layer. The scores of each layer
    sum to R, the same for all layers: dividing each layer by its own sum therefore restores the layers' constants up
    to one factor per network, and global as well as local masks are those of the unnormalised scores. A network in
    which no path is left (R = 0) scores zero everywhere.
    """
    sizes = [weight.detach().double().abs() for weight in weights]
    forward = [torch.ones_like(sizes[0][:, 0, :])]  # (R, n_{l-1})
    for size in sizes[:-1]:
        forward.append(_unit_mean(torch.einsum("rij,rj->ri", size, forward[-1])))
    backward = torch.ones_like(sizes[-1][:, :, 0])  # (R, n_l)
    scores = []
    for size, incoming in zip(reversed(sizes), reversed(forward), strict=True):
        layer = backward.unsqueeze(2) * size * incoming.unsqueeze(1)
        total = layer.sum((1, 2), keepdim=True)
        scores.append(layer / torch.where(total > 0, total, 1.0))
        backward = _unit_mean(torch.einsum("rij,ri->rj", size, backward))
    return scores[::-1]


def _unit_mean(vector: Tensor) -> Tensor:
    mean = vector.mean(1, keepdim=True)
    return vector / torch.where(mean > 0, mean, 1.0)


# --- masks ---------------------------------------------------------------------------------------------------------


def masks_from_scores(scores: Sequence[Tensor], sparsity: float, scope: Scope = "local") -> list[Tensor]:
    """Keep the highest scores, exactly round((1 - sparsity) * N) of them (Python's rounding, halves to even).

    scope "local": N = n_l n_{l-1}, in each layer. "global": N = all weights of a run, so a layer can empty, which
    makes J = 0. Equal scores (zeros of dead units above all) are ranked by a shuffle of the N positions that depends
    on N only: repeatable, the same for every run, nested in sparsity, and without filling the first rows as the order
    of memory would. Returns L boolean tensors. Raises ValueError for sparsity outside [0, 1), another scope, or scores
    that are not numbers.
    """
    check_sparsity(sparsity)
    return _keep_fraction(scores, 1 - sparsity, scope)


def _keep_fraction(scores: Sequence[Tensor], density: float, scope: Scope) -> list[Tensor]:
    for layer, score in enumerate(scores, start=1):
        if torch.isnan(score).any():
            raise ValueError(f"scores of layer {layer} contain NaN; the weights or the batch are not finite")
    flat = [score.flatten(1) for score in scores]
    if scope == "local":
        kept = [_keep_top(layer, round(density * layer.shape[1])) for layer in flat]
    elif scope == "global":
        together = torch.cat(flat, dim=1)
        kept = _keep_top(together, round(density * together.shape[1])).split([layer.shape[1] for layer in flat], dim=1)
    else:
        raise ValueError(f'scope is {scope!r}; it must be "local" or "global"')
    return [mask.reshape(score.shape) for mask, score in zip(kept, scores, strict=True)]


def _keep_top(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` highest of each row of (R, N); see `masks_from_scores` for ties."""
    total = scores.shape[1]
    if count in (0, total):
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    threshold = scores.kthvalue(total - count + 1, dim=1, keepdim=True).values
    mask = scores > threshold
    order = torch.randperm(total, generator=torch.Generator().manual_seed(total)).to(scores.device)
    tied = (scores == threshold)[:, order]
    room = count - mask.sum(1, keepdim=True)
    mask[:, order] |= tied & (tied.cumsum(1) <= room)
    return mask


def synflow_masks(
    weights: Sequence[Tensor], sparsity: float, scope: Scope = "global", rounds: int = SYNFLOW_ROUNDS
) -> list[Tensor]:
    """Iterative SynFlow: after round k of `rounds` the density is (1 - sparsity)^(k / rounds).

    Each round scores the network as masked so far, and a removed weight never comes back. One round is one-shot
    SynFlow. The original is global with 100 rounds. Raises ValueError for fewer than one round, sparsity outside
    [0, 1) or another scope.
    """
    check_sparsity(sparsity)
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; SynFlow needs at least 1")
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    for step in range(1, rounds + 1):
        scores = synflow_scores([weight * mask for weight, mask in zip(weights, masks, strict=True)])
        below_all = [torch.where(mask, score, -1.0) for score, mask in zip(scores, masks, strict=True)]
        masks = _keep_fraction(below_all, (1 - sparsity) ** (step / rounds), scope)
    return masks


def prune(
    method: Method,
    weights: Sequence[Tensor],
    sparsity: float,
    *,
    scope: Scope = "local",
    generators: Sequence[torch.Generator] | None = None,
    x: Tensor | None = None,
    labels: Tensor | None = None,
    activation: Activation = "relu",
    rounds: int = 1,
) -> list[Tensor]:
    """Exact-count masks of one method; all layers are pruned, the first and the last included.

    generators: for "random" only, one per run, seeded differently from the weights. x, labels: the scoring batch of
    "snip" and "grasp". rounds: of "synflow" (1 is one-shot, the original has 100). Returns L boolean tensors
    (R, n_l, n_{l-1}). Raises ValueError for an unknown method, what a method needs but was not given, or sparsity
    outside [0, 1).
    """
    check_sparsity(sparsity)
    if method == "random":
        if generators is None:
            raise ValueError('method "random" needs generators, one per run')
        scores = random_scores(weights, generators)
    elif method == "magnitude":
        scores = magnitude_scores(weights)
    elif method in ("snip", "grasp"):
        if x is None or labels is None:
            raise ValueError(f'method "{method}" needs a batch: give x and labels')
        scores = (snip_scores if method == "snip" else grasp_scores)(weights, x, labels, activation)
    elif method == "synflow":
        return synflow_masks(weights, sparsity, scope, rounds)
    else:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(get_args(Method))}")
    return masks_from_scores(scores, sparsity, scope)


# --- scalings ------------------------------------------------------------------------------------------------------


class Rescaled(NamedTuple):
    """Masked and rescaled weights, L tensors (R, n_l, n_{l-1}), and the factors used, (R, L) in float64."""

    weights: list[Tensor]
    factors: Tensor


def rescale(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    scaling: Scaling,
    *,
    sparsity: float | None = None,
    x: Tensor | None = None,
    activation: Activation = "relu",
) -> Rescaled:
    """Masked weights times one factor per run and layer, c_l (W_l o delta_l).

    - "none": 1.
    - "inverse_sqrt_density": (1 - sparsity)^(-1/2), the paper's factor for random masks; `sparsity` is the nominal one,
      also under a global scope, where layers differ from it.
    - "frobenius": |W_l|_F / |W_l o delta_l|_F, which restores each layer's Frobenius norm.
    - "alpha_mag": the closed form for local magnitude masks of Gaussian weights (`theory.alpha_mag`).
    - "activity": sequentially for l = 1, ..., L on the batch `x`, sqrt(mean z_l^2 of the dense network / mean z_l^2 of
      the pruned one), means over batch and units, the pruned network fed by its own rescaled layers.

    A layer with nothing left to match (all weights removed, or no activity on the batch) has factor 1. For SNIP and
    GraSP only "activity" keeps deep Jacobians in range: their masks follow the active rows, and "frobenius" explodes
    them. Raises ValueError for an unknown scaling, or a sparsity or batch that it needs but was not given.
    """
    runs = weights[0].shape[0]
    masked = [weight * mask for weight, mask in zip(weights, masks, strict=True)]
    if scaling == "none":
        factors = [torch.ones(runs, dtype=torch.float64)] * len(masked)
    elif scaling in ("inverse_sqrt_density", "alpha_mag"):
        if sparsity is None:
            raise ValueError(f'scaling "{scaling}" needs the sparsity')
        factor = alpha_random(sparsity) if scaling == "inverse_sqrt_density" else alpha_mag(sparsity)
        factors = [torch.full((runs,), factor, dtype=torch.float64)] * len(masked)
    elif scaling == "frobenius":
        factors = [_ratio(_mean_square(w), _mean_square(m)) for w, m in zip(weights, masked, strict=True)]
    elif scaling == "activity":
        if x is None:
            raise ValueError('scaling "activity" needs a batch x')
        factors = _activity_factors(weights, masked, x, activation)
    else:
        raise ValueError(f"scaling is {scaling!r}; it must be one of {', '.join(get_args(Scaling))}")
    stacked = torch.stack([factor.to(weights[0].device) for factor in factors], dim=1)  # (R, L)
    scaled = [_times(weight, stacked[:, layer]) for layer, weight in enumerate(masked)]
    return Rescaled(scaled, stacked)


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    return weight * factor.to(weight.dtype).reshape(-1, 1, 1)


def _mean_square(values: Tensor) -> Tensor:
    return values.detach().double().square().mean((1, 2))  # (R,)


def _ratio(wanted: Tensor, present: Tensor) -> Tensor:
    """sqrt(wanted / present), and 1 where either is zero."""
    usable = (wanted > 0) & (present > 0)
    return torch.where(usable, wanted / torch.where(usable, present, 1.0), 1.0).sqrt()


@torch.no_grad()
def _activity_factors(
    weights: Sequence[Tensor], masked: Sequence[Tensor], x: Tensor, activation: Activation
) -> list[Tensor]:
    dense = pruned = stacked_input(weights, x).double()  # (R, B, n_0)
    factors = []
    for weight, kept in zip(weights, masked, strict=True):
        dense_z = torch.bmm(dense, weight.double().transpose(1, 2))
        pruned_z = torch.bmm(pruned, kept.double().transpose(1, 2))
        factors.append(_ratio(_mean_square(dense_z), _mean_square(pruned_z)))
        dense = activate(dense_z, activation)
        pruned = activate(_times(pruned_z, factors[-1]), activation)
    return factors
