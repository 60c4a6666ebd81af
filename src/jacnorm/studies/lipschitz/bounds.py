"""Theorems 7.1, 1.1 and F.1 of Wei and Ma (2019, arXiv:1905.03684v2) and the spectral bound, as functions of norms.

A network of r matrices without biases has n = 2r - 1 layers: odd layer 2i - 1 multiplies by W_i, even layer 2i applies
phi. Its *places* are 0 (the input) to n (the output); place p is the output of layer p. The paper's sigma_{j' <- j} is
the norm of the Jacobian from place j - 1 to place j', so that sigma_{j-1 <- j} = 1 lies on the diagonal.

Everything is in natural logs and stacked: letters R networks, r matrices, n layers. The paper's xi is 0 here. No
constants and no logarithmic factors, which the theorems leave open: differences and slopes have a meaning, values have
none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GUARD = 1e-12
"""Smallest denominator among interlayer and hidden norms, in place of the paper's unspecified xi."""


@dataclass(frozen=True)
class LayerNorms:
    """Norms of each of R networks' matrices, and over samples; log, (R, r) each.

    jacobian: largest norm of the Jacobian of the output by the pre-activations of matrix i, sigma_{2r-1 <- 2i}; 0 for
    the last. hidden: largest norm of the input of matrix i, t_{i-1}. spectral: operator norm of W_i. rows: sum of the
    Euclidean norms of the rows of W_i (the reference matrix is zero), a_i. entries: sum of its absolute entries, b_i.
    """

    jacobian: Tensor
    hidden: Tensor
    spectral: Tensor
    rows: Tensor
    entries: Tensor


@dataclass(frozen=True)
class DataNorms:
    """What the theorems need of R networks and their data.

    layers: norms by matrix. interlayer: log of the largest norm of the Jacobian between two places, (R, n + 1, n + 1),
    row the later place, column the earlier one; zero on the diagonal, not read above it. preactivation: log of the
    smallest absolute pre-activation of matrices 1 to r - 1, over samples and units, (R, r - 1). margin: smallest
    training margin, (R,), of any sign.
    """

    layers: LayerNorms
    interlayer: Tensor
    preactivation: Tensor
    margin: Tensor


@dataclass(frozen=True)
class Leading:
    """Leading terms without their factor 1 / margin, log, (R,) each; sections 1 and 7 and the author response.

    ours_weighted: (sum_i (sigma_{2r-1 <- 2i} a_i t_{i-1})^(2/3))^(3/2). spectral_weighted: the spectral bound,
    |x| prod_i |W_i| (sum_i (a_i / |W_i|)^(2/3))^(3/2). ours_unweighted: sum_i sigma_{2r-1 <- 2i} t_{i-1}.
    spectral_unweighted: |x| prod_i |W_i|. largest_term: max_i sigma_{2r-1 <- 2i} t_{i-1}.

    Without biases and for a 1-Lipschitz phi with phi(0) = 0, ours_weighted <= spectral_weighted for every network.
    """

    ours_weighted: Tensor
    spectral_weighted: Tensor
    ours_unweighted: Tensor
    spectral_unweighted: Tensor
    largest_term: Tensor


@dataclass(frozen=True)
class Bound:
    """First term of Theorem 7.1 (smooth phi) or F.1 (ReLU) without the root of n, and of it each part alone.

    All log, (R,). Parts: h1, the leading term over the margin; h2, hidden norms; h3, curvature or, for ReLU,
    pre-activations; jac. `total` is that of the four together. inf where a margin is not positive.
    """

    h1: Tensor
    h2: Tensor
    h3: Tensor
    jac: Tensor
    total: Tensor


@dataclass(frozen=True)
class Kappas:
    """The factors of Theorem 7.1 or F.1, log, (R, r) each: kappa_hid is the sum of h1, h2 and h3; jac is kappa_jac."""

    h1: Tensor
    h2: Tensor
    h3: Tensor
    jac: Tensor

    @property
    def hid(self) -> Tensor:
        """The log of kappa_hid."""
        return torch.stack([self.h1, self.h2, self.h3]).logsumexp(0)


def leading(norms: LayerNorms) -> Leading:
    """The leading terms of Theorem 7.1 and of the spectral bound."""
    terms = norms.jacobian + norms.hidden  # (R, r)
    product = norms.hidden[:, 0] + norms.spectral.sum(1)  # (R,)
    return Leading(
        ours_weighted=_two_thirds(terms + norms.rows),
        spectral_weighted=product + _two_thirds(norms.rows - norms.spectral),
        ours_unweighted=terms.logsumexp(1),
        spectral_unweighted=product,
        largest_term=terms.amax(1),
    )


def spectral_bound(norms: DataNorms) -> Tensor:
    """Log of the bound of Bartlett, Foster and Telgarsky (2017) without the root of n, (R,); reference matrices 0."""
    return leading(norms.layers).spectral_weighted + _log_inverse(norms.margin)


def smooth_kappas(norms: DataNorms, curvature: float) -> Kappas:
    """Factors of Theorem 7.1. curvature: sup |phi''|; 0 if phi is linear."""
    sigma = norms.interlayer
    log_curvature = math.log(curvature) if curvature else -math.inf
    crossings = _crossings(sigma)
    h3 = []
    for place in _before_activations(sigma):
        # The sum over j and j' of a curvature term is what passes through the activation layer j'', whatever i is.
        later = range(place + 1, sigma.shape[1], 2)  # even layers j'' >= 2i
        terms = [sigma[:, layer - 1, place] + crossings[layer] for layer in later]
        h3.append(_log_sum(terms, like=norms.margin) + log_curvature)
    return Kappas(_h1(norms), _h2(norms), torch.stack(h3, 1), torch.stack(crossings[1::2], 1))


def relu_kappas(norms: DataNorms) -> Kappas:
    """Factors of Theorem F.1, whose h3 divides by the smallest absolute pre-activation: inf where that is 0."""
    sigma = norms.interlayer
    inverse = torch.where(norms.preactivation.isneginf(), math.inf, -norms.preactivation)  # (R, r - 1)
    h3 = []
    for i, place in enumerate(_before_activations(sigma)):
        later = range(i, inverse.shape[1])
        terms = [_plus(sigma[:, 2 * k + 1, place], inverse[:, k]) for k in later]
        h3.append(_log_sum(terms, like=norms.margin))
    return Kappas(_h1(norms), _h2(norms), torch.stack(h3, 1), torch.stack(_crossings(sigma)[1::2], 1))


def bound(norms: DataNorms, kappas: Kappas) -> Bound:
    """(sum_i (kappa_hid_i a_i t_{i-1})^(2/3) + (kappa_jac_i b_i)^(2/3))^(3/2), and each of its parts alone."""
    layers = norms.layers
    weight = layers.rows + layers.hidden  # (R, r)
    jac = kappas.jac + layers.entries
    both = torch.cat([_plus(kappas.hid, weight), jac], 1)  # (R, 2r)
    return Bound(
        h1=_two_thirds(_plus(kappas.h1, weight)),
        h2=_two_thirds(_plus(kappas.h2, weight)),
        h3=_two_thirds(_plus(kappas.h3, weight)),
        jac=_two_thirds(jac),
        total=_two_thirds(both),
    )


def simplified(norms: DataNorms) -> Tensor:
    """Log first term of Theorem 1.1 without the root of n, (R,): every interlayer norm replaced by the largest.

    ((s / margin + r^3 s^2) t (1 + sum_i a_i^(2/3))^(3/2) + r^2 s (1 + sum_i b_i^(2/3))^(3/2)), with s the largest
    interlayer norm and t the largest hidden norm, input included, both at least 1.
    """
    layers = norms.layers
    places = norms.interlayer.shape[1]
    below = torch.ones(places, places, dtype=torch.bool, device=norms.margin.device).tril()
    s = norms.interlayer.masked_fill(~below, -math.inf).amax((1, 2)).clamp(min=0)  # the diagonal is log 1
    t = layers.hidden.amax(1).clamp(min=0)
    log_r = math.log(layers.hidden.shape[1])
    one = torch.zeros_like(t)[:, None]
    rows, entries = (_two_thirds(torch.cat([one, each], 1)) for each in (layers.rows, layers.entries))
    hidden = torch.logaddexp(s + _log_inverse(norms.margin), 3 * log_r + 2 * s) + t + rows
    return torch.logaddexp(hidden, 2 * log_r + s + entries)


def _before_activations(sigma: Tensor) -> range:
    """Places 2i - 1, the pre-activations of matrix i, for i = 1, ..., r; the last is the output."""
    return range(1, sigma.shape[1], 2)


def _crossings(sigma: Tensor) -> list[Tensor]:
    """For each layer l = 1, ..., n the sum over pairs of places around it, b < l <= a, log, (R,) each.

    sum_{a, b} sigma[a, l] sigma[l - 1, b] / sigma[a, b]: kappa_jac_i is that of layer 2i - 1. Entry 0 is a placeholder,
    since layers count from 1.
    """
    denominators = sigma.clamp(min=math.log(GUARD))
    found = [torch.full_like(sigma[:, 0, 0], math.nan)]
    for layer in range(1, sigma.shape[1]):
        after = sigma[:, layer:, layer]  # (R, n + 1 - l)
        before = sigma[:, layer - 1, :layer]  # (R, l)
        terms = after[:, :, None] + before[:, None, :] - denominators[:, layer:, :layer]
        found.append(terms.flatten(1).logsumexp(1))
    return found


def _h1(norms: DataNorms) -> Tensor:
    """sigma_{2r-1 <- 2i} / margin."""
    return _plus(norms.interlayer[:, -1, 1::2], _log_inverse(norms.margin)[:, None])


def _h2(norms: DataNorms) -> Tensor:
    """The sum over i <= i' < r of sigma_{2i' <- 2i} / t_{i'}."""
    sigma = norms.interlayer
    hidden = norms.layers.hidden.clamp(min=math.log(GUARD))
    found = []
    for place in _before_activations(sigma):
        terms = [sigma[:, later, place] - hidden[:, later // 2] for later in range(place + 1, sigma.shape[1], 2)]
        found.append(_log_sum(terms, like=norms.margin))
    return torch.stack(found, 1)


def _log_inverse(margin: Tensor) -> Tensor:
    """log(1 / margin); inf where the margin is not positive."""
    return torch.where(margin > 0, -margin.log(), math.inf)


def _plus(a: Tensor, b: Tensor) -> Tensor:
    """Log of the product of exp(a) and exp(b); an infinite factor wins over a zero one."""
    infinite = a.isposinf() | b.isposinf()
    return torch.where(infinite, math.inf, a + b)


def _log_sum(terms: list[Tensor], like: Tensor) -> Tensor:
    """Log of the sum of the exponentials, (R,); -inf for an empty sum."""
    return torch.stack(terms).logsumexp(0) if terms else torch.full_like(like, -math.inf)


def _two_thirds(terms: Tensor) -> Tensor:
    """(sum_i x_i^(2/3))^(3/2) over the last axis, in logs."""
    return 1.5 * (terms * (2 / 3)).logsumexp(-1)
