"""The promised decreases, against losses whose steps can be worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jacnorm.studies.fedgtst import bounds as theory

positive = st.floats(1e-3, 1e3)
share = st.floats(0, 1.99)


def numbers(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


@given(positive, positive)
def test_one_client_with_a_parabola_reaches_its_minimum(alpha, weight):
    """Loss alpha w^2 / 2: the best step ends at 0 and gains J^2 / (2 alpha), a quarter of what Theorem 2 prints."""
    smoothness, square, none = numbers(alpha, (alpha * weight) ** 2, 0.0)
    rate = theory.optimal_rate(square, none, smoothness)
    torch.testing.assert_close(rate, 1 / smoothness)
    gained = smoothness * weight**2 / 2
    torch.testing.assert_close(theory.corrected(square, none, smoothness), gained)
    torch.testing.assert_close(theory.printed(square, none, smoothness), 4 * gained)


@given(positive, st.lists(st.floats(-10, 10), min_size=2, max_size=5), share)
def test_parabolas_of_one_curvature_attain_the_variance_free_promise(alpha, centres, step):
    """Clients alpha (w - c_k)^2 / 2 from w = 0: their mean is a parabola too, and the descent lemma an equality."""
    centre = torch.tensor(centres, dtype=torch.float64)
    smoothness, rate = numbers(alpha, step / alpha)
    gradients = -smoothness * centre[:, None]  # (K, 1) at w = 0
    square, variance = theory.moments(gradients)
    after = -rate * gradients.mean()
    loss = [smoothness * (weight - centre).square().mean() / 2 for weight in (torch.zeros(()), after)]
    scale = float(smoothness * centre.square().max()) + 1e-9
    promised = theory.variance_free(rate, square, smoothness)
    torch.testing.assert_close(loss[0] - loss[1], promised.double(), atol=1e-12 * scale, rtol=1e-9)
    lower = theory.lemma(rate, square, variance, smoothness)
    torch.testing.assert_close(promised - lower, smoothness * rate**2 / 2 * variance)


@given(positive, positive, st.floats(0, 1e3), st.floats(0, 2))
def test_the_optimal_step_promises_most_and_gives_appendix_e(alpha, square, variance, other):
    smoothness, square, variance, other = numbers(alpha, square, variance, other / alpha)
    best = theory.optimal_rate(square, variance, smoothness)
    torch.testing.assert_close(best, 1 / (smoothness * (1 + variance / square)))
    promised = theory.lemma(best, square, variance, smoothness)
    torch.testing.assert_close(promised, theory.corrected(square, variance, smoothness))
    torch.testing.assert_close(promised, square / (2 * smoothness * (1 + variance / square)))
    assert theory.lemma(other, square, variance, smoothness) <= promised * (1 + 1e-12)


def test_vanishing_gradients_promise_nothing():
    alpha, none = numbers(2.0, 0.0)
    for value in (theory.optimal_rate, theory.corrected, theory.printed):
        assert value(none, none, alpha) == 0


def test_moments_are_those_of_definition_four():
    gradients = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    square, variance = theory.moments(gradients)
    for run in range(3):
        mean = gradients[run].mean(0)
        torch.testing.assert_close(square[run], mean @ mean)
        torch.testing.assert_close(variance[run], gradients[run].square().sum(1).mean() - mean @ mean)


def test_variance_of_equal_gradients_is_zero_and_not_below():
    gradients = torch.full((4, 3), 1e8 / 3, dtype=torch.float64)
    assert theory.moments(gradients)[1] >= 0


@pytest.mark.parametrize("classes", [2, 5])
def test_smoothness_bounds_the_hessian_and_is_attained_by_two_classes(classes):
    """Oracle: the Hessian of the loss by torch. At equal shares of two classes diag(p) - p p^T has eigenvalue 1/2."""
    draw = torch.Generator().manual_seed(classes)
    x = torch.randn(3, 20, 4, generator=draw, dtype=torch.float64)  # (K, n, d)
    y = torch.randint(0, classes, (20,), generator=draw)
    alpha = theory.softmax_smoothness(x)
    tops = []
    for weights in (torch.zeros(4, classes, dtype=torch.float64), torch.randn(4, classes, generator=draw).double()):
        for own in x:

            def loss(flat, own=own):
                return torch.nn.functional.cross_entropy(own @ flat.view(4, classes), y)

            hessian = torch.autograd.functional.hessian(loss, weights.flatten())
            tops.append(torch.linalg.eigvalsh(hessian)[-1])
    assert max(tops) <= alpha * (1 + 1e-12)
    if classes == 2:
        torch.testing.assert_close(max(tops[:3]), alpha)
