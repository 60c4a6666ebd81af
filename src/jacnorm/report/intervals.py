"""Interval estimates from one number per independent seed, each with the guarantee it carries.

All of them see the samples as a set: a permutation changes no bit of the result.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

Statistic = str | Callable[[np.ndarray], float]
STATISTICS = ("mean", "median", "geometric mean", "proportion")
RESAMPLES = 9999


class NoInterval(Exception):
    """The samples admit no interval of the asked kind; the message is a sentence for the reader."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    value: the statistic of the samples. low, high: its confidence interval (equal to `value` for exact numbers).
    standard_error: of `value`, in its unit; None where it is infinite or unknown. log_scale: the interval is symmetric
    for the logarithm, so distances are taken there. method: in words. notes: what a reader must know besides.
    also: a second interval that must agree before anything is concluded (an infinite mean beside a finite median).
    instead: the statistic that `value` is, where it is not the one asked for.
    """

    value: float
    low: float
    high: float
    standard_error: float | None
    method: str
    log_scale: bool = False
    notes: tuple[str, ...] = ()
    also: tuple[float, float] | None = None
    instead: str | None = None


def statistic_name(statistic: Statistic) -> str:
    """The statistic in words."""
    if isinstance(statistic, str):
        return statistic
    name = getattr(statistic, "__name__", "").strip("_").replace("_", " ")
    return name if name and "<" not in name else "statistic of the samples"


def point_value(samples: np.ndarray, statistic: Statistic) -> float:
    """The statistic itself. Raises ValueError for an unknown name or samples outside its domain."""
    if callable(statistic):
        return float(statistic(samples))
    if statistic not in STATISTICS:
        raise ValueError(f"unknown statistic {statistic!r}; it is a function or one of {', '.join(STATISTICS)}")
    if samples.ndim != 1:
        raise ValueError(f"the {statistic} needs one number per seed, but the samples have shape {samples.shape}")
    if statistic == "median":
        return float(np.median(samples))
    if statistic == "proportion" and not np.isin(samples, (0.0, 1.0)).all():
        raise ValueError("a proportion needs samples that are 0 or 1")
    if statistic == "geometric mean":
        return math.exp(_mean(_logs(samples)))
    return _mean(samples)


def estimate(samples: np.ndarray, statistic: Statistic, method: str, confidence: float) -> Estimate:
    """The statistic with an interval at level `confidence`.

    samples: (n,) numbers or (n, k) rows, one per independent seed, free of NaN; infinities are allowed.
    method: `t` (Student; mean or geometric mean), `bootstrap` (BCa with 9999 fixed resamples; any statistic), `rank`
    (order statistics; median; coverage at least `confidence` for any law), `binomial` (Clopper-Pearson; proportion) or
    `exact` (no sampling noise; interval equals value).

    A sample of -inf (a network whose Jacobian is 0, say) makes the mean -inf. The median with its order statistics is
    then reported, and the mean's own place must lead to the same conclusion. Raises NoInterval where nothing honest can
    be said, ValueError where `method` does not fit `statistic`.
    """
    samples = np.sort(samples) if samples.ndim == 1 else samples[np.lexsort(samples.T[::-1])]
    if method == "exact":
        return _exact(samples, statistic)
    needed = {"t": ("mean", "geometric mean"), "rank": ("median",), "binomial": ("proportion",)}.get(method)
    if needed is not None and statistic not in needed:
        raise ValueError(
            f"interval {method!r} is for the {' or '.join(needed)}, not for the {statistic_name(statistic)}"
        )
    value = point_value(samples, statistic)
    if len(samples) < 2:
        raise NoInterval("one sample has no spread, so it gives no interval")
    if method == "binomial":
        return _binomial(samples, confidence)
    if method == "rank":
        return _rank(samples, confidence)
    logs = statistic == "geometric mean"
    if not np.isfinite(_logs(samples) if logs else samples).all():
        return _with_infinities(samples, statistic, value, confidence)
    if method == "t":
        return _student(samples, confidence, logs)
    if method == "bootstrap":
        return _bootstrap(samples, statistic, value, confidence)
    raise ValueError(f"unknown interval {method!r}; it is t, bootstrap, rank, binomial or exact")


def _exact(samples: np.ndarray, statistic: Statistic) -> Estimate:
    value = point_value(samples, statistic)
    if math.isnan(value):
        raise NoInterval("the number is not defined (NaN)")
    return Estimate(value, value, value, 0.0, "exact, without sampling noise")


def _student(samples: np.ndarray, confidence: float, logs: bool) -> Estimate:
    from scipy.stats import t

    numbers = _logs(samples) if logs else samples
    centre = _mean(numbers)
    error = float(np.std(numbers, ddof=1)) / math.sqrt(len(numbers))
    half = float(t.ppf((1 + confidence) / 2, len(numbers) - 1)) * error
    notes = _no_spread(samples)
    if not logs:
        return Estimate(centre, centre - half, centre + half, error, "Student t", notes=notes)
    value = math.exp(centre)
    low, high = math.exp(centre - half), math.exp(centre + half)
    return Estimate(value, low, high, value * error, "Student t on logarithms", log_scale=True, notes=notes)


def _bootstrap(samples: np.ndarray, statistic: Statistic, value: float, confidence: float) -> Estimate:
    from scipy.stats import bootstrap

    notes = _no_spread(samples)
    if notes:
        return Estimate(value, value, value, 0.0, "bootstrap", notes=notes)
    index = np.arange(len(samples))
    vectors = {"mean": np.mean, "median": np.median}.get(statistic) if isinstance(statistic, str) else None

    def one(rows: np.ndarray) -> float:
        return point_value(samples[rows], statistic)

    def run(method: str):
        common = {"confidence_level": confidence, "n_resamples": RESAMPLES, "method": method, "batch": 1000}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # degenerate resamples show as NaN below and are reported in words
            if vectors is not None:
                return bootstrap((samples,), vectors, vectorized=True, rng=np.random.default_rng(0), **common)
            return bootstrap((index,), one, vectorized=False, rng=np.random.default_rng(0), **common)

    for method, name in (("BCa", "bootstrap, BCa"), ("percentile", "bootstrap, percentile (BCa is undefined here)")):
        result = run(method)
        low, high = map(float, result.confidence_interval)
        error = float(result.standard_error)
        if all(map(math.isfinite, (value, low, high, error))):
            return Estimate(value, low, high, error, name)
    raise NoInterval(f"the {statistic_name(statistic)} is undefined on some bootstrap resamples, so it has no interval")


def _rank(samples: np.ndarray, confidence: float, notes: tuple[str, ...] = ()) -> Estimate:
    """Interval [x_(k), x_(n+1-k)] for the median; coverage 1 - 2 P(Bin(n, 1/2) < k) for every continuous law."""
    from scipy.stats import binom, norm

    n = len(samples)
    k = int(binom.ppf((1 - confidence) / 2, n, 0.5))  # the largest with P(Bin < k) below half of what may be missed
    if k == 0:
        least = math.ceil(1 - math.log2(1 - confidence))
        raise NoInterval(f"order statistics at level {confidence:g} need at least {least} samples, but there are {n}")
    low, high = float(samples[k - 1]), float(samples[n - k])
    coverage = 1 - 2 * float(binom.cdf(k - 1, n, 0.5))
    finite = math.isfinite(low) and math.isfinite(high)
    error = (high - low) / (2 * float(norm.ppf((1 + coverage) / 2))) if finite else None
    return Estimate(float(np.median(samples)), low, high, error, "order statistics", notes=notes)


def _binomial(samples: np.ndarray, confidence: float) -> Estimate:
    from scipy.stats import binomtest

    hits, n = int(samples.sum()), len(samples)
    interval = binomtest(hits, n).proportion_ci(confidence, method="exact")
    # At 0 or n hits the usual formula gives 0, which would claim certainty.
    error = math.sqrt(hits * (n - hits) / n**3) or None
    return Estimate(hits / n, float(interval.low), float(interval.high), error, f"Clopper-Pearson, {hits} of {n}")


def _with_infinities(samples: np.ndarray, statistic: Statistic, value: float, confidence: float) -> Estimate:
    numbers = _logs(samples) if statistic == "geometric mean" else samples
    count = int((~np.isfinite(numbers)).sum())
    kind = "0 or infinite" if statistic == "geometric mean" else "infinite"
    what = f"{count} of {len(samples)} samples {'is' if count == 1 else 'are'} {kind}"
    if callable(statistic):
        raise NoInterval(f"{what}, so the {statistic_name(statistic)} has no bootstrap interval")
    if statistic == "median":
        return _rank(samples, confidence, (f"{what}, so the interval is made of order statistics, not by bootstrap",))
    if math.isnan(value):
        raise NoInterval(f"{what}, with both signs, so the {statistic} is undefined")
    note = f"{what}, so the {statistic} is {value:g}; the median is shown, and both must agree"
    return replace(_rank(samples, confidence, (note,)), also=(value, value), instead="median")


def _no_spread(samples: np.ndarray) -> tuple[str, ...]:
    same = bool((samples == samples[0]).all())
    return ("all samples are equal, so the interval has no width",) if same else ()


def _mean(samples: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.mean(samples))


def _logs(samples: np.ndarray) -> np.ndarray:
    if (samples < 0).any():
        raise ValueError("a geometric mean needs samples that are not negative")
    with np.errstate(divide="ignore"):
        return np.log(samples)
