"""Infinite-width limits, exponents and scaling factors for Jacobian products, in closed form or by a scalar root.

Nothing here is sampled. Norms are spectral norms; logarithms are natural; `m` and `depth` count weight matrices;
`sigma_w2` is the weight variance times the fan-in; sparsity is the fraction of weights REMOVED.
Only the shape of the limit theorem (a norm of a product of free semicircular elements) is the paper's
(arXiv 2506.08764); the values follow from free multiplicative convolution: if A_1, ..., A_k are free with S-transforms
S_i of A_i* A_i, the largest point of the spectrum of the product is the minimum over psi > 0 of
(1 + psi) / (psi prod_i S_i(psi)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import iti0k0, k0, ndtri

Ends = Literal["both", "one", "none"]


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError unless 0 <= sparsity < 1."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it is the fraction of weights removed and must lie in [0, 1)")


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


# --- limits of the norm --------------------------------------------------------------------------------------------


def log_gamma_m(m: int) -> float:
    """Log of the norm of a product of m free standard semicircular elements (Fuss-Catalan law of order m).

    gamma_m = sqrt((m+1)^(m+1) / m^m) ~ sqrt(e (m+1)). Also the limit for m independent square matrices with entries of
    variance 1/n (arXiv 2606.14450), and for a critical ReLU product masked at both ends. Raises ValueError for m < 1.
    """
    _check_count("m", m)
    return 0.5 * (math.log(m + 1) + m * math.log1p(1 / m))


def gamma_m(m: int) -> float:
    """Exp of `log_gamma_m`: gamma_1 = 2, gamma_10 = 5.3415.

    >>> gamma_m(1)
    2.0
    """
    return math.exp(log_gamma_m(m))


def _log_minimum(constant: float, terms: Sequence[tuple[float, float, float]]) -> float:
    """Min over t > 0 of constant - log t + sum_i count_i * log(offset_i + slope_i t), counts >= 0.

    t times the derivative, -1 + sum_i count_i slope_i t / (offset_i + slope_i t), increases from -1, so its zero is
    the only stationary point and brackets safely; no minimiser's tolerance enters.
    """

    def stationarity(log_t: float) -> float:
        t = math.exp(log_t)
        return sum(count * slope * t / (offset + slope * t) for count, offset, slope in terms) - 1

    low, high = -1.0, 1.0
    while stationarity(low) > 0:
        low *= 2
    while stationarity(high) < 0:
        high *= 2
    log_t = brentq(stationarity, low, high, xtol=1e-13)
    t = math.exp(log_t)
    return constant - log_t + sum(count * math.log(offset + slope * t) for count, offset, slope in terms)


def log_masked_product_norm(m: int, q: int, sigma_w2: float = 2.0, keep: float = 0.5) -> float:
    """Log-norm limit of a product of m square weights and q independent Bernoulli(keep) diagonals.

    |J|^2 -> min over psi > 0 of (1+psi)/psi * sigma_w2^m * (1+psi)^(m-q) * (keep+psi)^q. The interleaving does not
    matter as long as no two diagonals are adjacent, hence 0 <= q <= m + 1 (otherwise ValueError).
    """
    _check_count("m", m)
    if not 0 <= q <= m + 1:
        raise ValueError(f"q is {q}; between and around {m} weights there is room for 0 to {m + 1} diagonals")
    if not (sigma_w2 > 0 and 0 < keep <= 1):
        raise ValueError(f"sigma_w2 is {sigma_w2} and keep is {keep}; they must be positive, and keep at most 1")
    return 0.5 * _log_minimum(m * math.log(sigma_w2), [(m - q + 1, 1.0, 1.0), (q, keep, 1.0)])


def log_relu_limit(m: int, ends: Ends) -> float:
    """Log-norm limit of a critical (sigma_w2 = 2) square ReLU product of m weights, by which ends carry a diagonal.

    "both": D W_m D ... W_1 D, equal to gamma_m. "one": (W D)^m, ~ sqrt(2 e m). "none": W_m D ... D W_1 (plain input,
    linear read-out), ~ sqrt(4 e m), by a scalar root. The three differ by up to sqrt(2) per end: overlay the one that
    was measured. Raises ValueError for another `ends` or m < 1.
    """
    _check_count("m", m)
    if ends == "both":
        return log_gamma_m(m)
    if ends == "one":
        psi = (1 + 1 / (math.hypot(m, 1) + m)) / (2 * m)  # = (sqrt(m^2+1) - (m-1)) / (2m) without cancellation
        return 0.5 * (math.log1p(psi) - math.log(psi) + m * math.log1p(2 * psi))
    if ends == "none":
        return log_masked_product_norm(m, m - 1)
    raise ValueError(f'ends is {ends!r}; it must be "both", "one" or "none"')


def relu_limit(m: int, ends: Ends) -> float:
    """Exp of `log_relu_limit`."""
    return math.exp(log_relu_limit(m, ends))


def log_rectangular_norm(effective_widths: Sequence[float], variances: Sequence[float]) -> float:
    """Log-norm limit of a product of L rectangular matrices with independent centred entries.

    |J|^2 -> min over M > 0 of (1+M)/M * prod_l v_l (m_l + m_0 M), with m_l the effective widths (m_0, ..., m_L), that
    is the number of units a diagonal of zeros and ones leaves, and v_l the entry variances (v_1, ..., v_L).
    Raises ValueError if the lengths do not match or a value is not positive.
    """
    if len(variances) < 1 or len(effective_widths) != len(variances) + 1:
        raise ValueError(
            f"there are {len(effective_widths)} widths and {len(variances)} variances; L layers need L + 1 and L"
        )
    if not (min(effective_widths) > 0 and min(variances) > 0):
        raise ValueError("effective widths and variances must be positive")
    first, *others = effective_widths
    constant = sum(math.log(v) for v in variances)
    return 0.5 * _log_minimum(constant, [(1.0, 1.0, 1.0), *((1.0, width, first) for width in others)])


def log_network_norm(widths: Sequence[int], sigma_w2: float = 2.0, activation: str = "relu") -> float:
    """Log-norm limit of the input-output Jacobian W_L D_{L-1} ... D_1 W_1 of an MLP of these widths (n_0, ..., n_L).

    Entry variances are sigma_w2 / n_{l-1}; ReLU leaves half of each hidden layer, "linear" all of it (other
    activations are refused: their diagonals are not projections).
    """
    if activation not in ("relu", "linear"):
        raise ValueError(f'activation is {activation!r}; this limit is known for "relu" and "linear"')
    kept = 0.5 if activation == "relu" else 1.0
    effective = [widths[0], *(kept * width for width in widths[1:-1]), widths[-1]]
    return log_rectangular_norm(effective, [sigma_w2 / width for width in widths[:-1]])


# --- exponents and fluctuations ------------------------------------------------------------------------------------


def _gaussian_mean(function: Callable[[np.ndarray], np.ndarray], variance: float) -> float:
    nodes, weights = np.polynomial.hermite_e.hermegauss(128)
    return float(weights @ function(math.sqrt(variance) * nodes) / math.sqrt(2 * math.pi))


def chi(sigma_w2: float, activation: str = "relu") -> float:
    """Mean-square gain per layer, chi = sigma_w2 E[phi'(z)^2]; 1 is critical.

    sigma_w2 / 2 for ReLU, sigma_w2 for linear; for tanh at the fixed point q = sigma_w2 E[tanh(z)^2], z ~ N(0, q)
    (q = 0 up to sigma_w2 = 1). Raises ValueError for sigma_w2 <= 0 or another activation.
    """
    if not sigma_w2 > 0:
        raise ValueError(f"sigma_w2 is {sigma_w2}; the weight variance must be positive")
    if activation == "relu":
        return sigma_w2 / 2
    if activation == "linear":
        return sigma_w2
    if activation != "tanh":
        raise ValueError(f"activation is {activation!r}; it must be relu, tanh or linear")
    if sigma_w2 <= 1:
        return sigma_w2
    # Divided by q, the map sigma_w2 E[tanh^2]/q - 1 falls from sigma_w2 - 1 > 0 at q = 0 to below 0 at q = sigma_w2.
    fixed_point = brentq(
        lambda q: sigma_w2 * _gaussian_mean(lambda z: np.tanh(z) ** 2, q) / q - 1, 1e-9 * (sigma_w2 - 1), sigma_w2
    )
    return sigma_w2 * _gaussian_mean(lambda z: np.cosh(z) ** -4.0, fixed_point)


def slope(sigma_w2: float, activation: str = "relu") -> float:
    """Exponent of the log-norm per layer, (1/2) log chi; zero at criticality."""
    return 0.5 * math.log(chi(sigma_w2, activation))


class LogGain(NamedTuple):
    """Mean and variance of a log-gain over a whole depth, in nats and nats squared."""

    mean: float
    variance: float


def finite_width_log_gain(depth: int, width: int) -> LogGain:
    """Law of log |J u|^2 for a fixed unit vector u in a critical ReLU net: about N(-5 L / (2 n), 5 L / n).

    Each layer multiplies |J u|^2 by a factor of mean 1 and variance 5/n; higher orders in 1/n are dropped, so it
    describes n >> 5. For log |J| itself halve the mean (drift -5/(4n) per layer) and quarter the variance
    (standard deviation about sqrt(5 L / n) / 2). Raises ValueError for depth or width below 1.
    """
    _check_count("depth", depth)
    _check_count("width", width)
    return LogGain(mean=-2.5 * depth / width, variance=5 * depth / width)


# --- pruning -------------------------------------------------------------------------------------------------------


def retained_second_moment(method: Literal["random", "magnitude", "snip"], sparsity: float) -> float:
    """E[w^2 delta] / E[w^2] of Gaussian weights after removing the fraction `sparsity` (one at sparsity 0).

    random: 1 - s. magnitude: (1-s) + 2 t phi(t) with t = Phi^{-1}((1+s)/2).
    snip: the mean-field idealisation, score |w g| with an independent Gaussian g, (1-s) + (2/pi) t K_0(t) with t the
    s-quantile of |w g|; real SNIP masks follow the gradient and need more than this (see `pruning.rescale`).
    Raises ValueError for sparsity outside [0, 1) or another method.
    """
    check_sparsity(sparsity)
    density = 1 - sparsity
    if method == "random" or sparsity == 0:
        return density
    if method == "magnitude":
        t = float(ndtri((1 + sparsity) / 2))
        return density + 2 * t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    if method == "snip":
        # w g has density K_0(|x|)/pi, and E[w^2 | w g = x] K_0(|x|) = |x| K_1(|x|), whose tail integral is
        # t K_0(t) + int_t^inf K_0.
        t = brentq(lambda x: 2 / math.pi * iti0k0(x)[1] - sparsity, 0.0, 40.0, xtol=1e-14)
        return density + (2 / math.pi * t * float(k0(t)) if t > 0 else 0.0)
    raise ValueError(f'method is {method!r}; a closed form is known for "random", "magnitude" and "snip"')


def alpha_random(sparsity: float) -> float:
    """Scaling that keeps the second moment under random pruning, (1-s)^(-1/2)."""
    return retained_second_moment("random", sparsity) ** -0.5


def alpha_mag(sparsity: float) -> float:
    """Scaling that keeps the second moment of Gaussian weights under magnitude pruning, ((1-s) + 2 t phi(t))^(-1/2)."""
    return retained_second_moment("magnitude", sparsity) ** -0.5


def alpha_snip(sparsity: float) -> float:
    """Mean-field SNIP factor E[w^2 1{|w g| > t}]^(-1/2) for independent standard normals (see the warning there)."""
    return retained_second_moment("snip", sparsity) ** -0.5


def pruned_slope(method: Literal["random", "magnitude", "snip"], sparsity: float, factor: float = 1.0) -> float:
    """Exponent of log |J| per layer after pruning a critical net and multiplying its weights by `factor`.

    (1/2) log of the retained second moment, plus log factor: (1/2) log(1-s) for unscaled random pruning;
    for magnitude masks wrongly scaled by `alpha_random(s)` it is positive (+0.740 at s = 0.9).
    """
    if not factor > 0:
        raise ValueError(f"factor is {factor}; a scaling must be positive")
    return 0.5 * math.log(retained_second_moment(method, sparsity)) + math.log(factor)
