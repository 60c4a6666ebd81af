r"""Normalisers: from the logits of a row to its weights, and the exact Jacobian of the weights by the logits.

A row has n keys, of which some are visible; the others have weight 0 and do not count. Below, z = l / T are the visible
logits over the temperature T, n their number, and D(g) = diag(g) - g g^T for a vector g that sums to 1. With
`Normaliser.jacobian` all matrices have closed forms:

- softmax, alpha = p = softmax(z): J = D(p) / T.
- ssmax, F = n^(s l) in the paper's Eq. 3 with s = 1 / T (Nakanishi 2025, arXiv:2501.19399, where s is learnt), so
  alpha = p = softmax(z log n): J = log(n) D(p) / T. Alone among these it depends on n at given logits.
- sparsemax, the projection of z on the simplex (Martins and Astudillo 2016): J = |S| D(u) / T, with u uniform on the
  support S of the weights.
- entmax15, argmax of p^T z plus the Tsallis entropy of order 1.5 (Peters, Niculae and Martins 2019):
  J = G D(g / G) / T, with g the root of the weights and G its sum.
- sigmoid, F = sigmoid(z) in Eq. 3: J = (I - alpha 1^T) diag(alpha sigmoid(-z)) / T.
- sa-softmax (Zheng et al. 2025, arXiv:2502.18277), alpha = r p with p = softmax(z), r = (z - m) / w, w = M - m,
  m = min(min z, 0) and M = max(max z, 0): J = (diag(alpha + p / w) - alpha p^T - [min z < 0] (p - alpha) e_min^T / w
  - [max z > 0] alpha e_max^T / w) / T. Its weights sum to at most 1.

Where weights are not differentiable (the edge of a support, tied extremes of sa-softmax) J is one of the limits.

No norm goes through a matrix: Frobenius norms are sums, spectral norms roots of secular equations, n operations a step.
Where a row is nearly one-hot and J nearly 0, plain formulas lose their digits in 1 - alpha; here the largest weight is
kept apart. All is float64. Letters: n keys; leading axes are rows of any shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import entmax
import torch
from torch import Tensor

from jacnorm.errors import UserError

NEWTON_CHUNK = 2**16
"""Entries of rows that Newton's method works on together, so that they stay in a core's cache."""
SECULAR_CHUNK = 2**14
"""The same for `_secular`, which keeps some ten numbers for each."""
NEWTON_STEPS = 64
"""Steps of Newton's method after which it stops in any case; 4 to 15 are usual."""
TOLERANCE = 1e-10
"""Relative step after which Newton's method for a squared spectral norm stops; its error is then about the square."""
AT_ROOT = 1e-8
"""How far above 1 the function of `_secular` may be where it stops."""
OFFSET = 1e-11
"""Relative distance that `_secular` keeps from poles, where its sums would cancel."""
PARTIAL_SORT = 16
"""Logits of a row that are sorted to find the support of sparse weights; twice as many if that is larger, and so on."""


class Jacobian(Protocol):
    """The Jacobian d alpha / d l of each of some rows, zero outside the visible keys; exact up to rounding."""

    def dense(self) -> Tensor:
        """The matrices, (..., n, n): row the weight, column the logit."""
        ...

    def product(self, v: Tensor) -> Tensor:
        """J v for v (..., n), in n operations a row."""
        ...

    def frobenius(self) -> Tensor:
        """Frobenius norms, (...,), in closed form and without cancellation."""
        ...

    def spectral(self) -> Tensor:
        """Spectral norms, (...,), to 1e-9 relative; those below 1e-290 lose digits with the weights themselves.

        Raises ArithmeticError if Newton's method does not settle.
        """
        ...


class Normaliser(ABC):
    """A function from logits to weights.

    In all methods: logits (..., n), any value (also -inf) where not visible; visible (..., n) bool, broadcast, with
    at least one key in each row; temperature above 0. Raises ValueError for a row without visible keys.
    """

    name: str

    @abstractmethod
    def weights(self, logits: Tensor, visible: Tensor, temperature: float) -> Tensor:
        """The weights alpha, (..., n) float64, exactly 0 where not visible."""

    @abstractmethod
    def jacobian(self, logits: Tensor, visible: Tensor, temperature: float) -> Jacobian:
        """The Jacobian of the weights by the logits."""


@dataclass(frozen=True)
class CovarianceJacobian:
    """J = scale (diag(g) - g g^T), scale times the covariance of one draw from probabilities g (..., n).

    scale: (...,), at least 0.

    Norms split off the largest probability g_1 and use the sum c of the others instead of 1 - g_1, so they keep their
    relative accuracy where the row is nearly one-hot and J nearly 0.
    """

    probabilities: Tensor
    scale: Tensor

    def dense(self) -> Tensor:
        """(..., n, n)."""
        g = self.probabilities
        index = g.argmax(-1, keepdim=True)
        complement = (1 - g).scatter(-1, index, _without(g, index).sum(-1, keepdim=True))
        matrix = -g[..., :, None] * g[..., None, :]
        matrix.diagonal(dim1=-2, dim2=-1).copy_(g * complement)
        return self.scale[..., None, None] * matrix

    def product(self, v: Tensor) -> Tensor:
        """(..., n)."""
        g = self.probabilities
        top = g.argmax(-1, keepdim=True)
        others = _without(g, top)
        v = v.expand(g.shape)
        rest = (others * v).sum(-1, keepdim=True)
        at_top = others.sum(-1, keepdim=True) * v.gather(-1, top) - rest  # v_1 minus the mean of v, without cancelling
        centred = v - g.gather(-1, top) * v.gather(-1, top) - rest
        return self.scale[..., None] * g * centred.scatter(-1, top, at_top)

    def frobenius(self) -> Tensor:
        """The root of sum g^2 - 2 sum g^3 + (sum g^2)^2, times scale; rearranged into terms that do not cancel."""
        largest, left, others = _split(self.probabilities)
        squares = others.square()
        second = squares.sum(-1)
        third = (squares * others).sum(-1)
        total = largest.square() + left.square() * second  # sum of g^2
        inside = largest.square() * (1 + second) + second * (1 + total) - 2 * left * third
        return self.scale * left * inside.sqrt()

    def spectral(self) -> Tensor:
        """Its largest eigenvalue, from the secular equation; see `largest_variance`."""
        return self.scale * largest_variance(self.probabilities)


def largest_variance(probabilities: Tensor) -> Tensor:
    r"""Largest eigenvalue of diag(g) - g g^T for probabilities g (..., n), to about 1e-14 relative; (...,).

    Because g sums to 1, the secular equation of this rank-one update is sum_i g_i / (g_i - x) = 0. With g_1 the
    largest, c the sum of the others, h_i = g_i / c and x = c y it reads 1 / H(y) = 1 - c y / g_1, where
    H(y) = sum_{i>1} h_i / (y - h_i). Right of all h_i the left side is increasing and concave, and the right side is
    linear, so Newton's method has one root to find and comes to it from below after its first step. It starts from
    min(2 g_1, g_1 / c), bounds by Gershgorin and by interlacing, from which that step stays right of all h_i. Tied
    largest probabilities are the eigenvalue themselves, and a row with a single positive one has the eigenvalue 0.
    """
    largest, left, others = _split(probabilities)
    tied = others.amax(-1) * left * (1 + 1e-14) >= largest
    moving = ~tied & (left > 0)
    found = torch.where(tied, largest, 0.0)
    c, g = left[moving], largest[moving]
    found[moving] = c * _in_chunks(_newton, NEWTON_CHUNK, others[moving], torch.minimum(2 * g, g / c), c / g)
    return found


def _newton(others: Tensor, start: Tensor, slope: Tensor) -> Tensor:
    """The root y of 1 / H(y) = 1 - slope y; others h (rows, n), start and slope (rows,)."""
    y = start
    for _ in range(NEWTON_STEPS):
        inverse = (y[:, None] - others).reciprocal()  # (rows, n)
        value = torch.linalg.vecdot(others, inverse).reciprocal()  # 1 / H
        derivative = torch.linalg.vecdot(others, inverse.square()) * value.square() + slope
        step = (1 - slope * y - value) / derivative
        y = y + step
        if bool((step.abs() <= 1e-14 * y).all()):
            break
    _require_settled(step, y)
    return y


@dataclass(frozen=True)
class BorderedJacobian:
    """J with columns diagonal_j e_j - left right_j, but for K special columns that are given whole.

    diagonal, left, right: (..., n), diagonal and right zero at the special keys. special: (..., K) their indices, all
    different unless a column of `columns`, (..., n, K), is zero.

    The special keys are those where the diagonal and the product of the other two would cancel, foremost the key with
    the largest weight: without it, entries keep their relative accuracy also where the row is nearly one-hot.
    """

    diagonal: Tensor
    left: Tensor
    right: Tensor
    special: Tensor
    columns: Tensor

    def dense(self) -> Tensor:
        """(..., n, n)."""
        rest = torch.diag_embed(self.diagonal) - self.left[..., :, None] * self.right[..., None, :]
        index = self.special[..., None, :].expand(self.columns.shape)
        return rest.scatter_add(-1, index, self.columns)

    def product(self, v: Tensor) -> Tensor:
        """(..., n)."""
        v = v.expand(self.diagonal.shape)
        at_special = v.gather(-1, self.special)[..., None]  # (..., K, 1)
        rest = self.diagonal * v - self.left * (self.right * v).sum(-1, keepdim=True)
        return rest + (self.columns @ at_special)[..., 0]

    def frobenius(self) -> Tensor:
        """The root of the sum of squared column norms."""
        unit, scaled = self._scaled()
        return unit * torch.linalg.vector_norm(scaled._column_norms(), dim=-1)

    def _scaled(self) -> tuple[Tensor, BorderedJacobian]:
        """The largest entry, (...,), and J over it: squares of J itself may underflow."""
        unit = torch.cat([self.diagonal, self.right, self.columns.flatten(-2)], -1).abs().amax(-1)
        over = unit.where(unit > 0, 1.0)[..., None]
        columns = self.columns / over[..., None]
        return unit, replace(self, diagonal=self.diagonal / over, right=self.right / over, columns=columns)

    def _column_norms(self) -> Tensor:
        """Norms of all columns, the special ones last, (..., n + K)."""
        squares = self.left.square()
        off = (squares.sum(-1, keepdim=True) - squares).clamp(min=0).sqrt() * self.right
        rest = torch.hypot(self.diagonal - self.left * self.right, off)
        return torch.cat([rest, torch.linalg.vector_norm(self.columns, dim=-2)], -1)

    def spectral(self) -> Tensor:
        """The root of the largest eigenvalue of J J^T, from its secular equation; see `_secular`."""
        unit, scaled = self._scaled()
        e, a, b, columns = scaled.diagonal, scaled.left, scaled.right, scaled.columns
        # Without the special columns, J J^T = diag(e^2) - u u^T + z z^T with z = |b| a - u.
        length = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
        u = e * b / length.where(length > 0, 1.0)
        z = torch.cat([(length * a - u)[..., None, :], columns.mT], -2)  # (..., K + 1, n)
        lower = scaled._column_norms().square().amax(-1).where(unit > 0, 1.0)
        return unit * _in_chunks(_secular, SECULAR_CHUNK, e.square(), u, z, lower).sqrt()


def _secular(squares: Tensor, u: Tensor, z: Tensor, lower: Tensor) -> Tensor:
    r"""The largest eigenvalue of B + Z Z^T, B = diag(squares) - u u^T, known to be at least `lower`, (rows,) each.

    squares, u: (rows, n); z: the columns of Z, (rows, K + 1, n). For x above the eigenvalues of B let f(x) be
    the largest eigenvalue of Z^T (x - B)^{-1} Z, which is 1 at the root. As a minimum of reciprocals of Stieltjes
    functions 1 / f is increasing and concave, so Newton's method, started between the eigenvalues of B and the root,
    comes to the root from below. Beside an eigenvalue of B its steps may be tiny at first, so it stops only when they
    are tiny, no longer grow, and f is near 1; and rounding may lead it past the root and far back, so it is kept
    between the numbers that were found to be below and above.
    """
    low = _start(squares, u.square(), lower)
    high = torch.full_like(low, math.inf)
    found = low.clone()
    last = torch.zeros_like(low)
    rows = torch.arange(len(low), device=low.device)  # those not yet found
    for _ in range(NEWTON_STEPS):
        x = found[rows]
        value, slope = _largest_and_slope(x, squares, u, z)
        below = value > 1
        low, high = torch.where(below, x, low), torch.where(below, high, x)
        step = (value * (value - 1) / slope).where(slope > 0, 0.0)
        far = value > 1 + AT_ROOT
        new = x + torch.where(far, torch.maximum(step, OFFSET * x), step)
        found[rows] = new.where((new >= low) & (new <= high), (low + high) / 2)
        step = (found[rows] - x).abs()
        moving = (high - low > TOLERANCE * low) & (far | (step > TOLERANCE * x) | (step > last))
        last = step
        if not bool(moving.any()):
            break
        if 2 * int(moving.sum()) < len(rows):
            rows, low, high, last = (each[moving] for each in (rows, low, high, last))
            squares, u, z = (each[moving] for each in (squares, u, z))
    _require_settled(last, found[rows])
    return found


def _largest_and_slope(x: Tensor, squares: Tensor, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The function f of `_secular` and -f' at x, (rows,) each."""
    inverse = _inverse_gaps(x, squares)  # M = (x - diag(squares))^{-1}, (rows, n)
    weighted = u * inverse
    uu = torch.linalg.vecdot(weighted, u)  # u^T M u, (rows,)
    uz = (z @ weighted[..., None])[..., 0]  # Z^T M u, (rows, K + 1)
    # With Z' = Z - u c orthogonal to u in the inner product M no term of f cancels another, unlike without:
    # Z^T (x - B)^{-1} Z = Z'^T M Z' + Z^T M u u^T M Z / (u^T M u (1 + u^T M u)), by Sherman and Morrison.
    some = uu != 0
    c = uz / uu.where(some, 1.0)[:, None]
    rest = torch.baddbmm(z, c[..., None], u[:, None], alpha=-1)  # Z', (rows, K + 1, n)
    factor = torch.where(some, 1 / (uu * (1 + uu)), 0.0)
    gram = (rest * inverse[:, None]) @ rest.mT + factor[:, None, None] * uz[:, :, None] * uz[:, None]
    values, directions = torch.linalg.eigh(gram)
    value, direction = values[:, -1], directions[..., -1]
    mixed = (direction[:, None] @ rest)[:, 0] + (factor * torch.linalg.vecdot(uz, direction))[:, None] * u
    return value, (mixed * inverse).square().sum(-1)


def _start(squares: Tensor, weights: Tensor, lower: Tensor) -> Tensor:
    """`lower`, or a number just above the eigenvalues of B = diag(squares) - u u^T if that is larger; weights: u^2."""
    inverse = _inverse_gaps(lower, squares)
    poles_above = (inverse < 0).sum(-1)
    fewer = 1 + torch.linalg.vecdot(weights, inverse) < -1e-9  # eigenvalues of B above than poles, by Sylvester's law
    behind = (poles_above > 1) | ((poles_above == 1) & ~fewer)
    start = lower.clone()
    if bool(behind.any()):
        top = _largest_of_downdate(squares[behind], weights[behind])
        start[behind] = torch.maximum(lower[behind], top * (1 + OFFSET))
    return start


def _largest_of_downdate(squares: Tensor, weights: Tensor) -> Tensor:
    """Largest eigenvalue of diag(s) - u u^T, (rows,), from s and the weights u^2, (rows, n) each.

    With s_1 the largest it solves 1 / H(x) = (s_1 - x) / u_1^2, H(x) = 1 + sum_{i>1} u_i^2 / (x - s_i), in which
    Newton's method comes from below as in `largest_variance`; a step that would cross s_2 goes half the way to it.
    Where the largest are tied, s_1 itself.
    """
    pole, index = squares.max(-1, keepdim=True)
    first = weights.gather(-1, index)[:, 0]
    squares, weights, pole = _without(squares, index), _without(weights, index), pole[:, 0]
    second = squares.amax(-1)
    settled = (second >= pole) | (first <= 0)
    slope = first.where(~settled, 1.0).reciprocal()
    x = pole
    for _ in range(NEWTON_STEPS):
        inverse = _inverse_gaps(x, squares)
        value = (1 + torch.linalg.vecdot(weights, inverse)).reciprocal()  # 1 / H
        derivative = torch.linalg.vecdot(weights, inverse.square()) * value.square() + slope
        step = torch.maximum(((pole - x) * slope - value) / derivative, (second - x) / 2).where(~settled, 0.0)
        x = x + step
        if bool((step.abs() <= 1e-14 * x).all()):
            break
    _require_settled(step, x)
    return x


def _require_settled(step: Tensor, x: Tensor) -> None:
    """Raise ArithmeticError if the last steps to x were not small; beside poles rounding may keep tiny ones going."""
    if not bool((step.abs() <= 1e-9 * x).all()):
        raise ArithmeticError(f"the spectral norm of a Jacobian did not settle in {NEWTON_STEPS} steps")


def _inverse_gaps(x: Tensor, squares: Tensor) -> Tensor:
    """1 / (x - squares), (rows, n), as if squares within OFFSET of x (rows,) were that much below it."""
    gaps = x[:, None] - squares
    least = OFFSET * x[:, None]
    return torch.where(gaps.abs() < least, least, gaps).reciprocal()


class Softmax(Normaliser):
    """softmax(l / T)."""

    name = "softmax"

    def weights(self, logits: Tensor, visible: Tensor, temperature: float) -> Tensor:
        """See the module."""
        return _scaled(logits, visible, temperature).softmax(-1)

    def jacobian(self, logits: Tensor, visible: Tensor, temperature: float) -> Jacobian:
        """D(alpha) / T; its spectral norm is at most 1 / (2 T), reached by two equal logits alone."""
        p = self.weights(logits, visible, temperature)
        return CovarianceJacobian(p, torch.full_like(p[..., 0], 1 / temperature))


class ScalableSoftmax(Normaliser):
    """softmax(l log(n) / T) for n visible keys."""

    name = "ssmax"

    def weights(self, logits: Tensor, visible: Tensor, temperature: float) -> Tensor:
        """See the module."""
        z = _scaled(logits, visible, temperature)
        return (z * _log_count(z)[..., None]).where(~z.isneginf(), -math.inf).softmax(-1)

    def jacobian(self, logits: Tensor, visible: Tensor, temperature: float) -> Jacobian:
        """The matrix log(n) D(alpha) / T."""
        p = self.weights(logits, visible, temperature)
        return CovarianceJacobian(p, _log_count(_scaled(logits, visible, temperature)) / temperature)


class Sparsemax(Normaliser):
    """The point of the simplex nearest to l / T."""

    name = "sparsemax"

    def weights(self, logits: Tensor, visible: Tensor, temperature: float) -> Tensor:
        """See the module."""
        return entmax.sparsemax(_scaled(logits, visible, temperature), dim=-1, k=PARTIAL_SORT)

    def jacobian(self, logits: Tensor, visible: Tensor, temperature: float) -> Jacobian:
        """Centring on the support over T."""
        return _on_support((self.weights(logits, visible, temperature) > 0).double(), temperature)


class Entmax15(Normaliser):
    """entmax of order 1.5 of l / T."""

    name = "entmax15"

    def weights(self, logits: Tensor, visible: Tensor, temperature: float) -> Tensor:
        """See the module."""
        return entmax.entmax15(_scaled(logits, visible, temperature), dim=-1, k=PARTIAL_SORT)

    def jacobian(self, logits: Tensor, visible: Tensor, temperature: float) -> Jacobian:
        """(diag(g) - g g^T / sum(g)) / T with g the root of alpha."""
        return _on_support(self.weights(logits, visible, temperature).sqrt(), temperature)


class Sigmoid(Normaliser):
    """sigmoid(l / T) over its sum."""

    name = "sigmoid"

    def weights(self, logits: Tensor, visible: Tensor, temperature: float) -> Tensor:
        """See the module; through logs, for all sigmoids of a row may underflow."""
        return torch.nn.functional.logsigmoid(_scaled(logits, visible, temperature)).softmax(-1)

    def jacobian(self, logits: Tensor, visible: Tensor, temperature: float) -> Jacobian:
        """Columns alpha_j sigmoid(-z_j) (e_j - alpha) / T."""
        z = _scaled(logits, visible, temperature)
        alpha = torch.nn.functional.logsigmoid(z).softmax(-1)
        d = alpha * (-z).sigmoid() / temperature
        top = alpha.argmax(-1, keepdim=True)  # (..., 1)
        column = (-alpha).scatter(-1, top, _without(alpha, top).sum(-1, keepdim=True)) * d.gather(-1, top)
        rest = _without(d, top)
        return BorderedJacobian(rest, alpha, rest, top, column[..., None])


class SelfAdjustSoftmax(Normaliser):
    """Softmax times the logits moved and scaled into [0, 1].

    Raises UserError for a row whose visible logits are all 0, for which it is not defined.
    """

    name = "sa-softmax"

    def weights(self, logits: Tensor, visible: Tensor, temperature: float) -> Tensor:
        """See the module."""
        z = _scaled(logits, visible, temperature)
        low, _, width = _range(z)
        return z.softmax(-1) * ((z - low) / width).where(~z.isneginf(), 0.0)

    def jacobian(self, logits: Tensor, visible: Tensor, temperature: float) -> Jacobian:
        """See the module; the special columns are those of the largest and the smallest logit."""
        z = _scaled(logits, visible, temperature)
        low, high, width = _range(z)
        seen = ~z.isneginf()
        p = z.softmax(-1)
        alpha = p * ((z - low) / width).where(seen, 0.0)
        short = p * ((high - z) / width).where(seen, 0.0)  # p - alpha
        top = z.argmax(-1, keepdim=True)
        bottom = z.where(seen, math.inf).scatter(-1, top, math.inf).argmin(-1, keepdim=True)
        alone = seen.sum(-1, keepdim=True) == 1
        follows_top, follows_bottom = high > 0, low < 0  # whether an end of the range moves with a logit

        def entry(of: Tensor, moves: Tensor) -> Tensor:
            """Diagonal entry at a special key: the range's own motion cancels that of the logit."""
            p_other = _without(p, of).sum(-1, keepdim=True)
            slope = p.gather(-1, of) / width
            return alpha.gather(-1, of) * p_other + slope.where(~moves, 0.0)

        at_top = -alpha * (p.gather(-1, top) + (1 / width).where(follows_top, 0.0))
        at_top = at_top.scatter(-1, top, entry(top, follows_top)).where(~alone, 0.0)
        at_bottom = -alpha * p.gather(-1, bottom) - (short / width).where(follows_bottom, 0.0)
        at_bottom = at_bottom.scatter(-1, bottom, entry(bottom, follows_bottom)).where(~alone, 0.0)
        special = torch.cat([top, bottom], -1)
        return BorderedJacobian(
            _without(alpha + p / width, special) / temperature,
            alpha,
            _without(p, special) / temperature,
            special,
            torch.stack([at_top, at_bottom], -1) / temperature,
        )


NORMALISERS: Mapping[str, Normaliser] = {
    each.name: each for each in (Softmax(), ScalableSoftmax(), Sparsemax(), Entmax15(), Sigmoid(), SelfAdjustSoftmax())
}
"""All normalisers by the name that settings and tables use."""


def _scaled(logits: Tensor, visible: Tensor, temperature: float) -> Tensor:
    """The scaled logits l / T in float64, -inf where not visible."""
    if not bool(visible.any(-1).all()):
        raise ValueError("a row without a visible key has no weights: leave it out")
    return (logits.double() / temperature).where(visible, -math.inf)


def _log_count(z: Tensor) -> Tensor:
    """The log of n, (...,)."""
    return (~z.isneginf()).sum(-1).double().log()


def _on_support(g: Tensor, temperature: float) -> Jacobian:
    """(diag(g) - g g^T / sum(g)) / T."""
    total = g.sum(-1)
    return CovarianceJacobian(g / total[..., None], total / temperature)


def _range(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ends of the range of the visible z and 0, and its width, (..., 1) each."""
    low = z.where(~z.isneginf(), math.inf).amin(-1, keepdim=True).clamp(max=0)
    high = z.amax(-1, keepdim=True).clamp(min=0)
    width = high - low
    if bool((width == 0).any()):
        raise UserError(
            "normaliser sa-softmax is not defined for a row of attention whose logits are all 0: "
            "take it out of `normalisers`"
        )
    return low, high, width


def _split(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest g, (...,), the sum of the others, and the others over that sum with 0 for the largest, (..., n)."""
    largest, index = g.max(-1, keepdim=True)
    others = _without(g, index)
    left = others.sum(-1, keepdim=True)
    return largest[..., 0], left[..., 0], others / left.where(left > 0, 1.0)


def _without(x: Tensor, index: Tensor) -> Tensor:
    """The tensor x (..., n) with zeros at index (..., k)."""
    return x.scatter(-1, index, 0.0)


def _in_chunks(function: Callable[..., Tensor], entries: int, first: Tensor, *more: Tensor) -> Tensor:
    """`function` of rows, about `entries` entries of `first` (..., n) at a time; (...,)."""
    shape = first.shape[:-1]
    count = len(shape)
    flat = [each.reshape(-1, *each.shape[count:]) for each in (first, *more)]
    size = max(1, entries // first.shape[-1])
    parts = [function(*part) for part in zip(*(each.split(size) for each in flat), strict=True)]
    return torch.cat(parts).reshape(shape) if parts else first.new_zeros(shape)
