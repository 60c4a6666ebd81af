"""Normalisers against definitions written out, autograd, dense linear algebra and arithmetic with 60 digits.

Autograd differentiates the weights, not the closed forms, so it is an independent oracle for the Jacobians wherever
their entries are not tiny differences. Where a row is nearly one-hot it loses all digits, as do dense decompositions of
what it returns; there mpmath evaluates the definitions and their difference quotients with 60 digits and more.
"""

from __future__ import annotations

import math
from typing import get_args

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jacnorm.errors import UserError
from jacnorm.studies.attention import normalisers
from jacnorm.studies.attention.normalisers import NORMALISERS, BorderedJacobian, largest_variance
from jacnorm.studies.attention.settings import Normaliser as Name

NAMES = list(NORMALISERS)
SMOOTH = ["softmax", "ssmax", "sigmoid", "sa-softmax"]


def all_visible(logits):
    return torch.ones_like(logits, dtype=torch.bool)


def row(*logits):
    return torch.tensor([logits], dtype=torch.float64)


def random_rows(rows, n, spread=3.0, seed=0):
    """Logits and masks; every row sees at least one key."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, n, generator=generator, dtype=torch.float64)
    visible = torch.rand(rows, n, generator=generator) < 0.7
    visible[torch.arange(rows), torch.randint(n, (rows,), generator=generator)] = True
    return logits, visible


@st.composite
def visible_rows(draw):
    """One row with distinct logits of sizes from 0.01 to 100, its mask and a temperature."""
    n = draw(st.integers(1, 6))
    steps = draw(arrays(np.int64, n, elements=st.integers(-1000, 1000), unique=True))
    size = 10.0 ** draw(st.integers(-5, -1))
    mask = draw(arrays(np.bool_, n))
    mask[draw(st.integers(0, n - 1))] = True
    logits = torch.from_numpy(steps * size + size / 3)[None]  # never exactly 0
    return logits, torch.from_numpy(mask)[None], draw(st.sampled_from([0.3, 1.0, 7.0]))


def test_the_registry_is_what_settings_offer():
    assert set(NAMES) == set(get_args(Name))
    assert all(NORMALISERS[name].name == name for name in NAMES)


# Weights


def definition(name, logits, temperature):
    """The weights of one row of visible logits, by the formulas of the papers in NumPy."""
    z = np.asarray(logits) / temperature
    if name == "ssmax":
        powers = len(z) ** (z - z.max())
        return powers / powers.sum()
    if name == "sigmoid":
        sigmoids = 1 / (1 + np.exp(-z))
        return sigmoids / sigmoids.sum()
    p = np.exp(z - z.max())
    p /= p.sum()
    if name == "softmax":
        return p
    low, high = min(z.min(), 0), max(z.max(), 0)
    return (z - low) / (high - low) * p


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_weights_are_the_definition_on_visible_keys_and_zero_elsewhere(name, temperature):
    logits, visible = random_rows(20, 7)
    weights = NORMALISERS[name].weights(logits, visible, temperature)
    assert weights.dtype == torch.float64
    assert (weights[~visible] == 0).all()
    for found, values, mask in zip(weights, logits, visible, strict=True):
        assert found[mask].numpy() == pytest.approx(definition(name, values[mask], temperature), rel=1e-12)


@pytest.mark.parametrize(("name", "order"), [("sparsemax", 2.0), ("entmax15", 1.5)])
def test_entmax_weights_meet_their_conditions_of_optimality(name, order):
    # p maximises p^T z + H_order(p) on the simplex iff p^(order - 1) = [(order - 1) z - tau]_+ for one tau.
    logits, visible = random_rows(50, 9)
    weights = NORMALISERS[name].weights(logits, visible, 0.8)
    assert torch.allclose(weights.sum(-1), torch.ones(50, dtype=torch.float64))
    assert (weights[~visible] == 0).all()
    z = (order - 1) * logits / 0.8
    on = weights > 0
    tau = z - weights ** (order - 1)
    highest, lowest = tau.where(on, -math.inf).amax(-1), tau.where(on, math.inf).amin(-1)
    assert torch.allclose(highest, lowest, atol=1e-12)
    assert (z.where(visible & ~on, -math.inf).amax(-1) <= lowest + 1e-12).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_where_nothing_is_visible_does_not_count(name):
    logits, visible = random_rows(10, 6)
    normaliser = NORMALISERS[name]
    expected = normaliser.weights(logits, visible, 1.0), normaliser.jacobian(logits, visible, 1.0).dense()
    for other in (-math.inf, math.inf, math.nan, 1e300):
        hidden = logits.where(visible, other)
        assert torch.equal(normaliser.weights(hidden, visible, 1.0), expected[0])
        assert torch.equal(normaliser.jacobian(hidden, visible, 1.0).dense(), expected[1])


@pytest.mark.parametrize("name", NAMES)
def test_weights_sum_to_one_but_for_sa_softmax(name):
    logits, visible = random_rows(30, 8)
    total = NORMALISERS[name].weights(logits, visible, 1.0).sum(-1)
    if name == "sa-softmax":
        assert (total < 1).any()
        assert (total <= 1 + 1e-12).all()
    else:
        assert torch.allclose(total, torch.ones_like(total))


def test_ssmax_is_softmax_at_a_temperature_that_falls_with_the_number_of_visible_keys():
    logits, _ = random_rows(1, 8)
    visible = torch.arange(8)[None] < torch.arange(2, 9)[:, None]  # (7, 8), 2 to 8 keys
    found = NORMALISERS["ssmax"].weights(logits, visible, 0.9)
    for weights, mask in zip(found, visible, strict=True):
        n = int(mask.sum())
        expected = NORMALISERS["softmax"].weights(logits, mask, 0.9 / math.log(n))
        assert torch.allclose(weights, expected[0])


def test_sigmoids_that_all_underflow_still_have_weights():
    weights = NORMALISERS["sigmoid"].weights(row(-1000.0, -1001.0, -2000.0), torch.ones(3, dtype=torch.bool), 1.0)
    assert weights[0].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0.0])


@pytest.mark.parametrize("name", NAMES)
def test_a_single_key_has_a_constant_weight(name):
    normaliser, visible = NORMALISERS[name], torch.tensor([False, True, False])
    for logit in (2.0, -2.0):
        logits = row(5.0, logit, -5.0)
        jacobian = normaliser.jacobian(logits, visible, 1.0)
        expected = 0.0 if name == "sa-softmax" and logit < 0 else 1.0
        assert normaliser.weights(logits, visible, 1.0).tolist() == [[0.0, expected, 0.0]]
        assert not jacobian.dense().any()
        assert jacobian.frobenius().tolist() == jacobian.spectral().tolist() == [0.0]


def test_a_row_that_sees_nothing_is_refused():
    with pytest.raises(ValueError, match="a row without a visible key has no weights"):
        NORMALISERS["softmax"].weights(row(1.0, 2.0), torch.tensor([[False, False]]), 1.0)


def test_sa_softmax_refuses_logits_that_are_all_zero():
    logits, visible = row(0.0, 0.0, 3.0), torch.tensor([[True, True, False]])
    sentence = "sa-softmax is not defined for a row of attention whose logits are all 0: take it out of `normalisers`"
    with pytest.raises(UserError, match=sentence):
        NORMALISERS["sa-softmax"].weights(logits, visible, 1.0)
    with pytest.raises(UserError, match=sentence):
        NORMALISERS["sa-softmax"].jacobian(logits, visible, 1.0)


# Jacobians


def by_autograd(name, logits, visible, temperature):
    """Jacobian of one row, (n, n), differentiated over its visible keys only."""
    keys = visible.nonzero()[:, 0]
    seen = torch.ones(len(keys), dtype=torch.bool)
    matrix = torch.zeros(len(logits), len(logits), dtype=torch.float64)
    matrix[keys[:, None], keys] = torch.autograd.functional.jacobian(
        lambda x: NORMALISERS[name].weights(x, seen, temperature), logits[keys]
    )
    return matrix


@pytest.mark.parametrize("name", NAMES)
@given(case=visible_rows())
@settings(max_examples=60, deadline=None)
def test_the_closed_form_is_the_derivative_of_the_weights(name, case):
    logits, visible, temperature = case
    matrix = NORMALISERS[name].jacobian(logits, visible, temperature).dense()[0]
    expected = by_autograd(name, logits[0], visible[0], temperature)
    assert torch.allclose(matrix, expected, rtol=1e-9, atol=1e-13 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", NAMES)
@given(case=visible_rows(), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_products_and_norms_are_those_of_the_matrix(name, case, seed):
    jacobian = NORMALISERS[name].jacobian(*case)
    matrix = jacobian.dense()
    v = torch.randn(matrix.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale = matrix.abs().max().item() or 1.0
    assert torch.allclose(jacobian.product(v), matrix @ v, rtol=1e-9, atol=1e-13 * scale)
    norms = jacobian.frobenius().item(), jacobian.spectral().item()
    unit = matrix[0].numpy() / scale  # NumPy squares entries, which underflow
    expected = scale * np.linalg.norm(unit), scale * np.linalg.norm(unit, 2)
    assert norms == pytest.approx(expected, rel=1e-9, abs=1e-280)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_norms_of_long_rows(name, temperature):
    logits, visible = random_rows(12, 100, seed=1)
    jacobian = NORMALISERS[name].jacobian(logits, visible, temperature)
    matrices = jacobian.dense()
    assert torch.allclose(jacobian.frobenius(), torch.linalg.matrix_norm(matrices), rtol=1e-12, atol=0)
    assert torch.allclose(jacobian.spectral(), torch.linalg.matrix_norm(matrices, 2), rtol=1e-9, atol=0)


def near_ties(kind, generator):
    """300 rows of 6 logits with ties: exact, or but for 1e-14 to 1; or all within that of one number."""
    size = 10 ** (4 * torch.rand(300, 1, generator=generator, dtype=torch.float64) - 2)
    gap = 10 ** (-14 * torch.rand(300, 6, generator=generator, dtype=torch.float64))
    noise = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    steps = size * torch.randint(-2, 3, (300, 6), generator=generator)
    offset = torch.randn(300, 1, generator=generator, dtype=torch.float64)
    return {"exact": steps + offset, "near": steps + gap * noise, "one": offset + gap[:, :1] * noise}[kind]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["exact", "near", "one"])
def test_norms_of_rows_with_ties(name, kind):
    # Ties make the poles of the secular equations coincide, which is where such solvers go wrong.
    logits = near_ties(kind, torch.Generator().manual_seed(5))
    jacobian = NORMALISERS[name].jacobian(logits, all_visible(logits), 0.7)
    matrices = jacobian.dense()
    largest = matrices.abs().amax((-2, -1))
    there = largest > 1e-280  # decompositions of matrices that small are not an oracle
    expected = torch.linalg.matrix_norm(matrices[there] / largest[there, None, None], 2) * largest[there]
    assert there.sum() > 200
    assert torch.allclose(jacobian.spectral()[there], expected, rtol=1e-9, atol=0)


def in_high_precision(name, logits, temperature):
    """Frobenius and spectral norm of a row's Jacobian, from difference quotients of the definition."""
    with mpmath.workdps(300):
        z = [mpmath.mpf(x) / mpmath.mpf(temperature) for x in logits]
        h = mpmath.mpf(10) ** -120

        def weights(z):
            powers = {
                "softmax": lambda: [mpmath.exp(x) for x in z],
                "ssmax": lambda: [mpmath.mpf(len(z)) ** x for x in z],
                "sigmoid": lambda: [1 / (1 + mpmath.exp(-x)) for x in z],
                "sa-softmax": lambda: [mpmath.exp(x) for x in z],
            }[name]()
            low, high = min(*z, 0), max(*z, 0)
            factors = [(x - low) / (high - low) for x in z] if name == "sa-softmax" else [1] * len(z)
            return [r * x / sum(powers) for r, x in zip(factors, powers, strict=True)]

        columns = []
        for j in range(len(z)):
            ends = [weights([x + sign * h * (i == j) for i, x in enumerate(z)]) for sign in (1, -1)]
            columns.append([(up - down) / (2 * h * mpmath.mpf(temperature)) for up, down in zip(*ends, strict=True)])
        largest = max(abs(x) for column in columns for x in column)
        matrix = mpmath.matrix(columns) / largest
        squares = mpmath.eigsy(matrix * matrix.T, eigvals_only=True)
        return float(largest * mpmath.sqrt(sum(squares))), float(largest * mpmath.sqrt(max(squares)))


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(
    "logits",
    [
        (40.0, 1.0, 0.5),  # one key wins by e^-39: 1 - alpha would have one digit left
        (-50.0, -130.0, -131.0),  # the same among negative logits, where sigmoids are as sharp as exponentials
        (100.0, -100.0, 99.0, -250.0),
        (0.3, 250.0, -3.0),
        (-1.0, -1.2, -0.9, -400.0),
    ],
)
def test_norms_of_nearly_one_hot_rows_keep_their_digits(name, logits):
    jacobian = NORMALISERS[name].jacobian(row(*logits), torch.ones(len(logits), dtype=torch.bool), 1.0)
    norms = jacobian.frobenius().item(), jacobian.spectral().item()
    assert norms == pytest.approx(in_high_precision(name, logits, 1.0), rel=1e-9, abs=1e-280)


@pytest.mark.parametrize("name", NAMES)
def test_leading_axes_and_chunks_do_not_matter(name, monkeypatch):
    logits, visible = random_rows(24, 10)
    normaliser = NORMALISERS[name]
    flat = normaliser.jacobian(logits, visible, 1.0)
    monkeypatch.setattr(normalisers, "NEWTON_CHUNK", 50)
    monkeypatch.setattr(normalisers, "SECULAR_CHUNK", 70)
    shape = (2, 3, 4, 10)
    shaped = normaliser.jacobian(logits.reshape(shape), visible.reshape(shape), 1.0)
    assert shaped.dense().shape == (*shape, 10)
    for norm in ("frobenius", "spectral"):
        expected = getattr(flat, norm)().reshape(shape[:-1])
        assert torch.allclose(getattr(shaped, norm)(), expected, rtol=1e-11, atol=0)
    assert normaliser.jacobian(logits[:0], visible[:0], 1.0).spectral().shape == (0,)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "sa-softmax"])
def test_an_iteration_that_does_not_settle_is_no_result(name, monkeypatch):
    monkeypatch.setattr(normalisers, "NEWTON_STEPS", 1)
    with pytest.raises(ArithmeticError, match="did not settle in 1 steps"):
        NORMALISERS[name].jacobian(*random_rows(5, 6), 1.0).spectral()


# Closed forms


@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 8.0])
def test_two_equal_logits_reach_the_tight_constant(temperature):
    logits = row(1.5, -math.inf, 1.5, -math.inf)
    jacobian = NORMALISERS["softmax"].jacobian(logits, all_visible(logits), temperature)
    assert jacobian.spectral().item() == pytest.approx(1 / (2 * temperature), rel=1e-15)
    assert jacobian.frobenius().item() == pytest.approx(1 / (2 * temperature), rel=1e-15)


@given(case=visible_rows())
@settings(max_examples=100, deadline=None)
def test_softmax_never_exceeds_the_tight_constant(case):
    logits, visible, temperature = case
    norm = NORMALISERS["softmax"].jacobian(logits, visible, temperature).spectral().item()
    assert norm <= (1 + 1e-12) / (2 * temperature)


def test_softmax_exceeds_the_constant_of_corollary_3():
    # 1 / (4 T) bounds the entries of the Jacobian, not its norm: two nearly equal leaders are enough.
    logits = row(1.0, 0.9, -2.0, -3.0)
    jacobian = NORMALISERS["softmax"].jacobian(logits, all_visible(logits), 1.0)
    assert jacobian.dense().abs().max() <= 1 / 4
    assert jacobian.spectral().item() > 0.45


@given(case=visible_rows())
@settings(max_examples=60, deadline=None)
def test_the_largest_variance_interlaces(case):
    p = NORMALISERS["softmax"].weights(*case)
    value = largest_variance(p).item()
    first, second = (*p[0].sort(descending=True).values.tolist(), 0.0)[:2]
    assert second * (1 - 1e-12) <= value <= first * (1 + 1e-12)


@pytest.mark.parametrize("n", [2, 3, 50])
def test_equal_logits(n):
    # softmax: D(1/n) has the eigenvalue 1/n on all vectors that sum to 0; sigmoid: the same times 1 - sigmoid.
    logits = torch.full((1, n), -0.7, dtype=torch.float64)
    visible = all_visible(logits)
    for name, factor in (("softmax", 1.0), ("ssmax", math.log(n)), ("sigmoid", 1 / (1 + math.exp(-0.7)))):
        jacobian = NORMALISERS[name].jacobian(logits, visible, 1.0)
        assert jacobian.spectral().item() == pytest.approx(factor / n, rel=1e-10)
        assert jacobian.frobenius().item() == pytest.approx(factor / n * math.sqrt(n - 1), rel=1e-12)


def test_sparsemax_centres_on_its_support():
    logits = row(1.0, 0.8, 0.7, -2.0, -3.0)
    jacobian = NORMALISERS["sparsemax"].jacobian(logits, all_visible(logits), 0.5)
    matrix = torch.zeros(5, 5, dtype=torch.float64)
    matrix[:3, :3] = (torch.eye(3) - 1 / 3) / 0.5
    assert torch.allclose(jacobian.dense()[0], matrix)
    assert jacobian.spectral().item() == pytest.approx(1 / 0.5)
    assert jacobian.frobenius().item() == pytest.approx(math.sqrt(2) / 0.5)


def test_entmax_weighs_its_support_by_roots_of_weights():
    logits = row(1.0, 0.8, 0.1, -5.0)
    weights = NORMALISERS["entmax15"].weights(logits, all_visible(logits), 1.0)
    root = weights.sqrt()
    assert weights[0, 3] == 0
    assert (weights[0, :3] > 0).all()
    expected = torch.diag(root[0]) - root.mT @ root / root.sum()
    assert torch.allclose(NORMALISERS["entmax15"].jacobian(logits, all_visible(logits), 1.0).dense()[0], expected)


def test_sa_softmax_by_hand():
    # Logits 1 and -1: r = (1, 0), p = (s, 1 - s) with s = sigmoid(2), so alpha = (s, 0); both ends of the range move.
    s = 1 / (1 + math.exp(-2))
    logits = row(1.0, -1.0)
    jacobian = NORMALISERS["sa-softmax"].jacobian(logits, all_visible(logits), 1.0)
    # alpha_1 = p_1 and alpha_2 = 0 however the two move, as long as 1 is positive and -1 negative.
    assert jacobian.dense()[0].flatten().tolist() == pytest.approx([s * (1 - s), -s * (1 - s), 0.0, 0.0])
    assert jacobian.spectral().item() == pytest.approx(math.sqrt(2) * s * (1 - s), rel=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_the_secular_equation_of_any_bordered_matrix(seed):
    # Not only those of the normalisers: numbers without relation among them, and entries of either sign.
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, n = 200, 7
    special = torch.rand(rows, n, generator=generator).argsort(-1)[:, :2]
    diagonal = draw(rows, n).abs().scatter(-1, special, 0.0)
    right = draw(rows, n).scatter(-1, special, 0.0) * (seed > 0)  # none: diagonal but for two columns
    jacobian = BorderedJacobian(diagonal, draw(rows, n), right, special, 10 ** (seed - 4) * draw(rows, n, 2))
    matrices = jacobian.dense()
    assert torch.allclose(jacobian.frobenius(), torch.linalg.matrix_norm(matrices), rtol=1e-12, atol=0)
    assert torch.allclose(jacobian.spectral(), torch.linalg.matrix_norm(matrices, 2), rtol=1e-9, atol=0)
