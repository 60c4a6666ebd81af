r"""Where the selected keys of attention lie among all keys: Algorithms 1 to 4 of the paper's Appendix B.

One query gives each of its keys i a weight alpha_i and a vector x_i. I_N holds the N keys with the largest weights, the
first of those that tie; s = sum_{i in I_N} alpha_i x_i is not renormalised, and m = sum_{i in I_N} alpha_i is their
mass. All lengths |s - alpha_i x_i| come from one expansion, in float64 because |s|^2 - 2 alpha_i s.x_i + alpha_i^2
|x_i|^2 cancels where s is nearly alpha_i x_i. The displayed formulas of the paper could not all be read: those for the
bounds are reconstructed from its proofs, see docs/studies/attention.md.

Letters: H heads, m rows (queries), n keys, L keys of one row, N selected keys, d dimensions. The keys of a row come
first: those that it sees, which alone are selected, then, if all keys of the window count, the others with weight 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Distance = Literal["sum_of_norms", "norm_of_sum"]
CANCELLED = 16 * torch.finfo(torch.float64).eps
"""Share of |s|^2 up to which |s - alpha_i x_i|^2 is rounding."""
WEIGHT_TOLERANCE = 1e-6
"""Of logarithms of weights, in nats, against Corollary 1."""
BOUND_TOLERANCE = 1e-5
"""Relative, of distances against the bounds of Theorem 1; `ROUNDING` comes on top."""
ROUNDING = 1e-9
"""Absolute, for bounds that are 0."""
RATIO_TOLERANCE = 1e-9
"""Of ratios against the lower bound of Theorem 2."""
GATHERED = 2**16
"""Distances to selected keys that are gathered at once, to stay in a core's cache."""


@dataclass(frozen=True)
class Points:
    """The vectors of the keys of a window, and what depends on nothing else.

    Heads may share them: G is 1 or H. `largest_norm[k]` and `separation[k]` are those of the first k + 1 vectors, the
    radius M of Assumption 1 and the distance delta of Assumption 2.
    """

    vectors: Tensor
    """x, (G, n, d)."""
    norms: Tensor
    """(G, n)."""
    distances: Tensor
    """|x_i - x_j|, (G, n, n); from a Gram matrix, so absolute errors are about 1e-8 of the norms."""
    largest_norm: Tensor
    """(G, n)."""
    separation: Tensor
    """(G, n); 0 for a single vector."""

    @classmethod
    def of(cls, vectors: Tensor, *, normalised: bool) -> Points:
        """From vectors (G, n, d) of any float dtype; normalised: scaled to length 1, a zero vector stays."""
        vectors = vectors.double()
        norms = torch.linalg.vector_norm(vectors, dim=-1)
        if normalised:
            vectors = vectors / norms.where(norms > 0, 1.0)[..., None]
            norms = torch.linalg.vector_norm(vectors, dim=-1)
        squares = norms.square()
        distances = vectors.new_empty(*norms.shape, norms.shape[1])
        nearest = torch.empty_like(norms)  # of the vectors before
        later = torch.ones_like(distances[0], dtype=torch.bool).triu()
        for x, square, out, smallest in zip(vectors, squares, distances, nearest, strict=True):  # each fits a cache
            torch.addmm(square[:, None] + square, x, x.T, alpha=-2, out=out)
            out.clamp_(min=0).sqrt_().diagonal().zero_()
            torch.amin(out.masked_fill(later, math.inf), -1, out=smallest)
        nearest[:, 0] = 0
        separation = torch.cat([nearest[:, :1], nearest[:, 1:].cummin(-1).values], -1)
        return cls(vectors, norms, distances, norms.cummax(-1).values, separation)

    def first(self, n: int) -> Points:
        """Those of the first n keys."""
        return Points(
            self.vectors[:, :n],
            self.norms[:, :n],
            self.distances[:, :n, :n].contiguous(),
            self.largest_norm[:, :n],
            self.separation[:, :n],
        )

    def assumptions(self, counted: Tensor) -> tuple[Tensor, Tensor]:
        """M and delta of the first `counted` keys, (r,) numbers; (G, r) each."""
        return self.largest_norm[:, counted - 1], self.separation[:, counted - 1]


@dataclass(frozen=True)
class Rows:
    """Rows of attention of some heads over the same keys."""

    weights: Tensor
    """alpha, (H, m, n) float64; exactly 0 beyond the keys that a row sees."""
    visible: Tensor
    """Number of keys that each row sees, (m,), in ascending order."""
    counted: Tensor
    """Number of keys L that count as keys of the row, (m,): those that it sees, or all of the window."""

    @functools.cached_property
    def ranking(self) -> tuple[Tensor, Tensor]:
        """The keys of each row by weight, largest first, and the place of each key in it, (H, m, n) each.

        Keys that tie stand in their own order, and those that the row does not see last.
        """
        unseen = _arange(self.weights) >= self.visible[:, None]  # (m, n)
        order = self.weights.masked_fill(unseen, -1.0).sort(dim=-1, descending=True, stable=True).indices
        return order, _inverse(order)

    def counts(self) -> Tensor:
        """Whether a key counts as one of the row, (m, n)."""
        return _arange(self.weights) < self.counted[:, None]

    def first_beyond(self, selected: int) -> int:
        """Place of the first row that sees more keys than are selected; m if there is none."""
        return int((self.visible <= selected).sum())

    def after(self, start: int) -> Rows:
        """The rows from `start` on."""
        return Rows(self.weights[:, start:], self.visible[start:], self.counted[start:])


@dataclass(frozen=True)
class Measures:
    """Quantities of the rows that see more than N keys, (H, r) each; the other rows have nothing left out."""

    selected: int
    """N."""
    rows: Tensor
    """Places of these rows among all, (r,): the last ones."""
    mass: Tensor
    """m, the sum of the selected weights."""
    distance: Tensor
    """sum_{i not in I_N} |s - alpha_i x_i| (Eq. 7), or |sum_{i not in I_N} alpha_i x_i - s|."""
    bound: Tensor
    """U = (1 - m) d_1 + ((L - N + 1) m - 1) d_2 of Theorem 1(i); d_1 the largest distance between a selected key and
    one left out, d_2 the largest norm of a selected one."""
    loose_bound: Tensor
    """U' = (1 - m) d_1 + (L - N - 1 + m) d_2, never below U."""
    expectation: Tensor
    """E_CF of `Expectations`."""
    expectation_all: Tensor
    """E_ALL of the same."""
    ratio: Tensor
    """N_s / N, the share of selected keys with |s - alpha_i x_i| < r."""
    radius: Tensor
    """r = min_{i not in I_N} |s - alpha_i x_i|."""
    lower: Tensor
    """Lower bound of Theorem 2, at least 0."""
    upper: Tensor
    """Its upper bound."""

    @property
    def within_bound(self) -> Tensor:
        """Whether the distance is at most U."""
        return _within(self.distance, self.bound)

    @property
    def within_loose_bound(self) -> Tensor:
        """Whether the distance is at most U'."""
        return _within(self.distance, self.loose_bound)

    @property
    def above_lower(self) -> Tensor:
        """Whether the ratio is at least the lower bound."""
        return self.ratio >= self.lower - RATIO_TOLERANCE


def corollary_1(log_weights: Tensor, visible: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Whether e^(-2 a) / n <= alpha <= e^(2 a) / n, with n the visible keys and all logits over T in [-a, a].

    log_weights: (H, m, n), -inf for a weight of 0; visible: (m,); reach: a, (H, m). Returns the number of weights of
    each row within these bounds, tolerance 1e-6 in logs, and how far the farthest weight is beyond them, in nats and
    negative if it is inside, (H, m) each.
    """
    seen = _arange(log_weights) < visible[:, None]
    away = (log_weights + visible.double().log()[:, None]).abs() - 2 * reach[..., None]  # (H, m, n)
    away = away.masked_fill(~seen, -math.inf)
    return ((away <= WEIGHT_TOLERANCE) & seen).sum(-1), away.amax(-1)


def measure(rows: Rows, points: Points, selected: Sequence[int], distance: Distance) -> Iterator[Measures]:
    """Everything of Algorithms 1, 2 and 4 for each N of `selected`, ascending; not for those that leave no row."""
    order, ranks = rows.ranking
    descending = rows.weights.gather(-1, order)
    expectations = Expectations(rows, points)
    farthest = torch.zeros_like(rows.weights)  # of each key, the distance to the selected key farthest from it
    done = 0
    for n in sorted(selected):
        start = rows.first_beyond(n)
        if start == len(rows.visible):
            return
        _reach_out(farthest[:, start:], points.distances, order[:, start:, done:n])
        done = n
        kept = rows.after(start)  # (H, r, n)
        chosen = ranks[:, start:] < n
        left = ~chosen & kept.counts()
        sums, offsets = _offsets(kept.weights, chosen, points)
        top = descending[:, start:, :n]  # (H, r, N)
        mass = top.sum(-1)
        radius = offsets.masked_fill(~left, math.inf).amin(-1)
        norms = (points.norms[:, None, :] * chosen).amax(-1)
        bound, loose = theorem_1(n, kept.counted, mass, (farthest[:, start:] * left).amax(-1), norms)
        lower, upper = theorem_2(top, radius, *points.assumptions(kept.counted))
        closed, surrogate = expectations.at(n, start)
        yield Measures(
            selected=n,
            rows=torch.arange(start, len(rows.visible), device=radius.device),
            mass=mass,
            distance=_distance(distance, kept.weights, left, points, sums, offsets),
            bound=bound,
            loose_bound=loose,
            expectation=closed,
            expectation_all=surrogate,
            ratio=((offsets < radius[..., None]) & chosen).sum(-1).double() / n,
            radius=radius,
            lower=lower,
            upper=upper,
        )


def _reach_out(farthest: Tensor, distances: Tensor, keys: Tensor) -> None:
    """Enlarge `farthest` (H, r, n) to the distances from more selected keys of each row, (H, r, k)."""
    groups, n, _ = distances.shape
    if groups > 1:
        keys = keys + n * torch.arange(groups, device=keys.device)[:, None, None]
    flat = distances.view(-1, n)
    for some in keys.split(max(1, GATHERED // farthest.numel()), dim=-1):
        found = flat[some[..., 0]] if some.shape[-1] == 1 else flat[some].amax(-2)  # (H, r, n)
        torch.maximum(farthest, found, out=farthest)


def theorem_1(n: int, counted: Tensor, mass: Tensor, d_1: Tensor, d_2: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds U and U' of `Measures` for N = n, (H, r) each; counted: the keys L of each row, (r,)."""
    first, keys = (1 - mass) * d_1, counted.double()
    return first + ((keys - n + 1) * mass - 1) * d_2, first + (keys - n - 1 + mass) * d_2


def theorem_2(top: Tensor, radius: Tensor, largest_norm: Tensor, separation: Tensor) -> tuple[Tensor, Tensor]:
    r"""Lower and upper bound of the ratio N_s / N, (H, r) each.

    top: the selected weights, (H, r, N); radius: r, (H, r); M and delta: (G, r). With q_i the sum of alpha_j^2 over the
    other selected keys, xi_i^2 = M^2 q_i + (M^2 - delta^2 / 2) ((m - alpha_i)^2 - q_i),

        1 - sum_i xi_i / (r N)  and  the mean over i of exp(-(xi_i - r)_+^2 / (2 M^2)).

    The lower bound, here at least 0, holds in every row, for xi_i >= |s - alpha_i x_i|. The upper one is heuristic: it
    takes xi_i for a lower bound of the expected |s - alpha_i x_i|, and r for a constant.
    """
    square = largest_norm.square()[..., None]  # (G, r, 1)
    own = top.square()
    others = (own.sum(-1, keepdim=True) - own).clamp_(min=0)  # q, (H, r, N)
    cross = ((top.sum(-1, keepdim=True) - top).square_() - others).clamp_(min=0)
    product = square - separation.square()[..., None] / 2  # may be negative, but the sum is not
    xi = (square * others + product * cross).clamp_(min=0).sqrt_()
    mean = xi.mean(-1)
    lower = (1 - mean / radius).clamp(min=0).where(radius > 0, 0.0)
    return lower, ((xi - radius[..., None]).clamp_(min=0).square_() / (-2 * square)).exp_().mean(-1)


class Expectations:
    r"""Closed forms for N random keys of a row, each set as likely as any other (Theorem 1(ii)).

    E_CF = (L - N) / L sum_i |alpha_i x_i - rho sum_{j != i} alpha_j x_j| with rho = N / (L - 1) is the expected
    distance with expectations in place of indicators, hence by Jensen's inequality a lower bound of it. E_ALL has
    rho = 1: it is the one that grows with L as the paper's Figure 2 does.
    """

    def __init__(self, rows: Rows, points: Points) -> None:
        """Prepare what no N changes."""
        self._rows, self._norms = rows, points.norms
        self._means = rows.weights @ points.vectors  # z = sum_j alpha_j x_j, (H, m, d)
        self._products = self._means @ points.vectors.mT  # z . x_i, (H, m, n)
        self._all = self._sum(1.0, 0)

    def at(self, n: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """E_CF and E_ALL for N = n in the rows from `start` on, which must count more than n keys; (H, r) each."""
        keys = self._rows.counted[start:].double()
        share = (keys - n) / keys
        return share * self._sum((n / (keys - 1))[:, None], start), share * self._all[:, start:]

    def _sum(self, rho: Tensor | float, start: int) -> Tensor:
        """The sum over i of |(1 + rho) alpha_i x_i - rho z|, (H, r), with rho (r, 1)."""
        rows = self._rows.after(start)
        means, products = self._means[:, start:], self._products[:, start:]
        return (_lengths(rho * means, (1 + rho) * rows.weights, self._norms, rho * products) * rows.counts()).sum(-1)


def sampled(
    rows: Rows, points: Points, selected: Sequence[int], keys: Tensor, distance: Distance
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Distances for random sets of keys in place of I_N: N, places of the rows that see more, (r,), values (H, r, D).

    keys: (H, m, D, n), independent and uniform on [0, 1). The set of a draw holds the N keys with the smallest of its
    numbers, so it is uniform for each N; sets for different N are nested.
    """
    heads, m, draws, n = keys.shape
    ranks = _inverse(keys.masked_fill(~rows.counts()[:, None], 2.0).argsort(-1))
    for count in sorted(selected):
        start = rows.first_beyond(count)
        if start == m:
            return
        kept = rows.after(start)
        chosen = ranks[:, start:] < count  # (H, r, D, n)
        left = ~chosen & kept.counts()[:, None]
        weights = kept.weights[:, :, None].expand_as(chosen)
        flat = [each.reshape(heads, -1, n) for each in (weights, chosen, left)]
        values = _distance(distance, flat[0], flat[2], points, *_offsets(flat[0], flat[1], points))
        yield count, torch.arange(start, m, device=keys.device), values.unflatten(1, (m - start, draws))


def collapse(
    rows: Rows, points: Points, fractions: Sequence[float], distance: Distance
) -> Iterator[tuple[float, Tensor]]:
    """Distances with N = ceil(fraction n) keys selected of n that a row sees; Corollary 2(ii) has them go to 0.

    Yields each fraction with the distances, (H, r), of the rows in which keys are left out.
    """
    ranks = rows.ranking[1]
    for fraction in fractions:
        counts = (fraction * rows.visible.double() - 1e-9).ceil().long()  # 0.07 * 100 is 7.000000000000001
        some = (counts < rows.visible).nonzero()[:, 0]
        weights = rows.weights[:, some]  # (H, r, n)
        chosen = ranks[:, some] < counts[some, None]
        left = ~chosen & rows.counts()[some]
        yield fraction, _distance(distance, weights, left, points, *_offsets(weights, chosen, points))


def _offsets(weights: Tensor, chosen: Tensor, points: Points) -> tuple[Tensor, Tensor]:
    """The sums s over the chosen keys, (H, r, d), and |s - alpha_i x_i|, (H, r, n)."""
    sums = (weights * chosen) @ points.vectors
    return sums, _lengths(sums, weights, points.norms, sums @ points.vectors.mT)


def _lengths(sums: Tensor, weights: Tensor, norms: Tensor, products: Tensor) -> Tensor:
    """|s - alpha_i x_i| for s (H, r, d), alpha (H, r, n), |x_i| (G, n) and s . x_i (H, r, n); (H, r, n).

    What is left of |s|^2 after cancellation is rounding below `CANCELLED`, and taken as 0.
    """
    squares = (weights * norms[:, None, :]).square_()
    squares.addcmul_(weights, products, value=-2)
    whole = sums.square().sum(-1, keepdim=True)
    squares += whole
    return squares.masked_fill_(squares <= CANCELLED * whole, 0.0).sqrt_()


def _distance(kind: Distance, weights: Tensor, left: Tensor, points: Points, sums: Tensor, offsets: Tensor) -> Tensor:
    """The distance from s to the keys left out, (H, r)."""
    if kind == "sum_of_norms":
        return (offsets * left).sum(-1)
    return torch.linalg.vector_norm((weights * left) @ points.vectors - sums, dim=-1)


def _within(distance: Tensor, bound: Tensor) -> Tensor:
    return distance <= bound + BOUND_TOLERANCE * bound.abs() + ROUNDING


def _inverse(order: Tensor) -> Tensor:
    """The inverse of permutations (..., n)."""
    return torch.empty_like(order).scatter_(-1, order, _arange(order).expand(order.shape))


def _arange(like: Tensor) -> Tensor:
    """0 to n - 1 on the device of a tensor (..., n)."""
    return torch.arange(like.shape[-1], device=like.device)
