"""The quantities of one row by their definitions, vector by vector: no expansion of norms, no mask, no batch."""

from __future__ import annotations

import itertools
import math

import numpy as np


def selection(weights, visible, n):
    """The n visible keys with the largest weights, the first of those that tie."""
    return sorted(range(visible), key=lambda i: (-weights[i], i))[:n]


def offsets(weights, x, chosen):
    s = sum((weights[i] * x[i] for i in chosen), np.zeros(x.shape[1]))
    return s, [np.linalg.norm(s - a * v) for a, v in zip(weights, x, strict=True)]


def distance(weights, x, chosen, kind="sum_of_norms"):
    """From the sum over the chosen keys to the others of the row."""
    s, lengths = offsets(weights, x, chosen)
    left = [i for i in range(len(x)) if i not in set(chosen)]
    if kind == "sum_of_norms":
        return sum(lengths[i] for i in left)
    return np.linalg.norm(sum(weights[i] * x[i] for i in left) - s)


def closed_form(weights, x, n, all_others=False):
    """E_CF, or E_ALL, for random sets of n keys."""
    count = len(x)
    rho = 1.0 if all_others else n / (count - 1)
    total = 0.0
    for i in range(count):
        others = sum(weights[j] * x[j] for j in range(count) if j != i)
        total += np.linalg.norm(weights[i] * x[i] - rho * others)
    return (count - n) / count * total


def expected_distance(weights, x, n, kind="sum_of_norms"):
    """The mean over all sets of n keys."""
    return np.mean([distance(weights, x, set_, kind) for set_ in itertools.combinations(range(len(x)), n)])


def row(weights, x, visible, n, kind="sum_of_norms"):
    """Everything for one row with weights (L,) and vectors (L, d), of which the first `visible` are seen."""
    count = len(x)
    chosen = selection(weights, visible, n)
    left = [i for i in range(count) if i not in set(chosen)]
    _, lengths = offsets(weights, x, chosen)
    mass = sum(weights[i] for i in chosen)
    d_1 = max(np.linalg.norm(x[i] - x[j]) for i in left for j in chosen)
    d_2 = max(np.linalg.norm(x[j]) for j in chosen)
    radius = min(lengths[i] for i in left)
    largest = max(np.linalg.norm(v) for v in x)
    delta = min((np.linalg.norm(a - b) for a, b in itertools.combinations(x, 2)), default=0.0)
    xi = []
    for i in chosen:
        others = [j for j in chosen if j != i]
        squares = largest**2 * sum(weights[j] ** 2 for j in others)
        cross = sum(weights[j] * weights[k] for j in others for k in others if j != k)
        xi.append(math.sqrt(squares + (largest**2 - delta**2 / 2) * cross))
    return {
        "mass": mass,
        "distance": distance(weights, x, chosen, kind),
        "bound": (1 - mass) * d_1 + ((count - n + 1) * mass - 1) * d_2,
        "loose_bound": (1 - mass) * d_1 + (count - n - 1 + mass) * d_2,
        "expectation": closed_form(weights, x, n),
        "expectation_all": closed_form(weights, x, n, all_others=True),
        "ratio": sum(lengths[i] < radius for i in chosen) / n,
        "radius": radius,
        "lower": max(0.0, 1 - sum(xi) / (radius * n)),
        "upper": np.mean([math.exp(-(max(0.0, each - radius) ** 2) / (2 * largest**2)) for each in xi]),
    }
