"""Ensembles have the moments they claim; sparse norms agree with a full decomposition and with reference values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.stats import ks_2samp

from jacnorm.nets import mlp
from jacnorm.studies.stability import weights as ensembles

torch.set_num_threads(1)


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + run) for run in range(count)]


ENSEMBLES = {
    "gaussian": lambda widths, gens: ensembles.gaussian_weights(widths, 2.0, gens),
    "rademacher": lambda widths, gens: ensembles.rademacher_weights(widths, 2.0, gens),
    "equicorrelated": lambda widths, gens: ensembles.correlated_weights(
        widths, 2.0, gens, correlation="equicorrelated", rho=0.2
    ),
    "row": lambda widths, gens: ensembles.correlated_weights(widths, 2.0, gens, correlation="row", exponent=0.5),
    "masks": lambda widths, gens: ensembles.bernoulli_masks(widths, 0.7, gens),
    "surrogates": lambda widths, gens: ensembles.surrogate_diagonals(widths, gens),
}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_a_run_has_the_same_bits_alone_and_stacked(name):
    together = ENSEMBLES[name]((6, 9, 4), generators(3))
    alone = ENSEMBLES[name]((6, 9, 4), generators(1, first=2))
    assert all(torch.equal(a[0], b[2]) for a, b in zip(alone, together, strict=True))
    assert not torch.equal(together[0][0], together[0][1])


@pytest.mark.parametrize("name", ["gaussian", "rademacher", "equicorrelated", "row"])
def test_entries_are_centred_with_variance_sigma_w2_over_fan_in(name):
    # Over 4000 runs one fixed entry is an independent sample: standard errors 1/sqrt(4000) and sqrt(2/4000).
    (weight,) = ENSEMBLES[name]((4, 3), generators(4000))
    entries = weight * math.sqrt(4 / 2.0)
    assert entries.mean(0).abs().max() < 4.5 / math.sqrt(4000)
    assert (entries.square().mean(0) - 1).abs().max() < 4.5 * math.sqrt(2 / 4000)


def test_rademacher_entries_are_signs():
    (weight,) = ensembles.rademacher_weights((8, 50), 2.0, generators(2))
    assert set((weight / math.sqrt(2 / 8)).unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("correlation", ["equicorrelated", "row"])
@pytest.mark.parametrize(("rho", "exponent"), [(0.3, None), (None, 0.5), (0.0, None), (1.0, None)])
def test_correlation_within_and_across_rows(correlation, rho, exponent):
    draws = 4000
    (weight,) = ensembles.correlated_weights(
        (4, 3), 1.0, generators(draws), correlation=correlation, rho=rho, exponent=exponent
    )
    expected = rho if rho is not None else 4**-exponent
    measured = torch.corrcoef(weight.reshape(draws, 12).T)
    row = torch.arange(12) // 4
    same_row = row[:, None] == row[None, :]
    off_diagonal = ~torch.eye(12, dtype=torch.bool)
    within = measured[same_row & off_diagonal]
    across = measured[~same_row]
    tolerance = 4.5 / math.sqrt(draws)
    assert (within - expected).abs().max() < tolerance
    assert (across - (expected if correlation == "equicorrelated" else 0.0)).abs().max() < tolerance


def test_the_independent_part_does_not_depend_on_rho():
    def draw(rho):
        return ensembles.correlated_weights((5, 6), 1.0, generators(1), correlation="row", rho=rho)[0]

    # W(rho) is a combination of W(0) and W(1) when all three share G and g.
    torch.testing.assert_close(draw(0.36), 0.8 * draw(0.0) + 0.6 * draw(1.0), rtol=1e-12, atol=1e-14)


def test_the_shared_part_has_norm_sigma_root_rho_n():
    width, rho = 200, 0.25
    (shared,) = ensembles.correlated_weights((width, width), 2.0, generators(1), correlation="row", rho=1.0)
    norm = torch.linalg.matrix_norm(shared[0], ord=2).item() * math.sqrt(rho)
    assert torch.linalg.matrix_rank(shared[0]) == 1
    assert norm == pytest.approx(math.sqrt(2.0 * rho * width), rel=0.2)  # |g| is sqrt(n) within 1/sqrt(2n), 5 %


def test_bernoulli_masks_keep_the_density_with_a_binomial_count():
    masks = ensembles.bernoulli_masks((30, 40), 0.9, generators(500))[0]
    counts = masks.sum((1, 2)).double()
    assert masks.dtype == torch.bool
    assert counts.mean().item() == pytest.approx(120, abs=4.5 * math.sqrt(108 / 500))
    assert counts.var().item() == pytest.approx(108, rel=4.5 * math.sqrt(2 / 500))


def surrogate_norms(weights, diagonals):
    product = weights[0]
    for weight, diagonal in zip(weights[1:], diagonals, strict=True):
        product = weight @ (diagonal.unsqueeze(2) * product)
    return torch.linalg.matrix_norm(product, ord=2)


def test_surrogate_diagonals_give_the_law_of_the_true_relu_jacobian():
    widths, runs = (10, 12, 12, 12, 12, 6), 500
    true_weights = ensembles.gaussian_weights(widths, 2.0, generators(runs, first=0))
    x = torch.randn(1, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    z = mlp.forward(true_weights, x, "relu")
    true = surrogate_norms(true_weights, [mlp.derivative(layer[:, 0], "relu") for layer in z[:-1]])
    surrogate = surrogate_norms(
        ensembles.gaussian_weights(widths, 2.0, generators(runs, first=10_000)),
        ensembles.surrogate_diagonals(widths[1:-1], generators(runs, first=20_000)),
    )
    assert ks_2samp(true, surrogate).pvalue > 0.01
    # The test has power: diagonals that keep 60 % instead of half are told apart.
    denser = surrogate_norms(
        ensembles.gaussian_weights(widths, 2.0, generators(runs, first=10_000)),
        ensembles.surrogate_diagonals(widths[1:-1], generators(runs, first=20_000), probability=0.6),
    )
    assert ks_2samp(true, denser).pvalue < 1e-6


def test_surrogate_diagonals_are_zeros_and_ones_of_the_given_probability():
    (diagonal,) = ensembles.surrogate_diagonals([1000], generators(20), torch.float32, probability=0.3)
    assert diagonal.shape == (20, 1000)
    assert diagonal.dtype == torch.float32
    assert set(diagonal.unique().tolist()) == {0.0, 1.0}
    assert diagonal.mean().item() == pytest.approx(0.3, abs=4.5 * math.sqrt(0.21 / 20_000))


# --- sparse matrices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", ["gaussian", "rademacher"])
def test_sparse_matrices_have_the_density_and_the_second_moment(entries):
    n, d = 600, 12.0
    matrix = ensembles.sparse_matrix(n, d, np.random.default_rng(0), entries)
    # nnz is Binomial(n^2, d/n); the squared Frobenius norm over n is 1 on average.
    assert matrix.nnz == pytest.approx(n * d, abs=4.5 * math.sqrt(n * d))
    assert matrix.power(2).sum() / n == pytest.approx(1.0, abs=0.1)
    assert matrix.has_canonical_format
    per_row = np.diff(matrix.indptr)
    per_column = np.bincount(matrix.indices, minlength=n)
    for counts in (per_row, per_column):  # Poisson-like: variance d (1 - d/n)
        assert counts.mean() == pytest.approx(d, rel=0.05)
        assert counts.var() == pytest.approx(d * (1 - d / n), rel=0.3)
    if entries == "rademacher":
        assert np.allclose(np.abs(matrix.data), 1 / math.sqrt(d))


def test_each_position_is_kept_with_the_same_probability():
    n, draws, probability = 5, 4000, 0.4
    rng = np.random.default_rng(3)
    kept = sum((ensembles.sparse_matrix(n, n * probability, rng).toarray() != 0).astype(int) for _ in range(draws))
    assert np.abs(kept / draws - probability).max() < 4.5 * math.sqrt(probability * (1 - probability) / draws)


def test_a_full_matrix_is_dense():
    assert ensembles.sparse_matrix(7, 7.0, np.random.default_rng(0)).nnz == 49


@pytest.mark.parametrize(("n", "d"), [(40, 3.0), (65, 1.0), (200, 2.0), (300, 40.0)])
def test_sparse_norm_equals_a_full_decomposition(n, d):
    matrix = ensembles.sparse_matrix(n, d, np.random.default_rng(n))
    found = ensembles.sparse_spectral_norm(matrix)
    assert found.value == pytest.approx(np.linalg.norm(matrix.toarray(), 2), rel=1e-9)
    assert found.residual < 1e-7
    assert found.method == ("dense" if n <= 64 else "lanczos")


@pytest.mark.parametrize("shape", [(150, 90), (90, 150), (500, 20)])
def test_sparse_norm_of_rectangular_matrices(shape):
    matrix = scipy.sparse.random_array(shape, density=0.2, rng=np.random.default_rng(0), format="csr")
    found = ensembles.sparse_spectral_norm(matrix)
    assert found.value == pytest.approx(np.linalg.norm(matrix.toarray(), 2), rel=1e-9)


def test_sparse_norm_is_repeatable_and_zero_for_nothing():
    matrix = ensembles.sparse_matrix(300, 5.0, np.random.default_rng(1))
    assert ensembles.sparse_spectral_norm(matrix) == ensembles.sparse_spectral_norm(matrix)
    for n in (10, 100):
        empty = scipy.sparse.csr_array((n, n))
        assert ensembles.sparse_spectral_norm(empty).value == 0.0


def test_sparse_norm_says_when_it_did_not_converge():
    matrix = ensembles.sparse_matrix(400, 100.0, np.random.default_rng(1))
    with pytest.raises(RuntimeError, match=r"400 x 400 .* in 1 restarts"):
        ensembles.sparse_spectral_norm(matrix, tolerance=1e-14, max_restarts=1)


# Norms at c = d / log n, one draw of unknown number each; draws differ by about 0.2, 0.2, 0.1, 0.04 at these c.
EDGE = {
    "gaussian": {256: (2.79, 2.46, 2.09, 2.01), 1024: (2.97, 2.49, 2.13, 2.02)},
    "rademacher": {4096: (2.25, 2.12, 2.03, 2.01)},
}


@pytest.mark.parametrize(("entries", "n"), [("gaussian", 256), ("gaussian", 1024), ("rademacher", 4096)])
def test_edge_at_high_sparsity(entries, n):
    for c, expected, tolerance in zip((0.5, 1.0, 4.0, 16.0), EDGE[entries][n], (0.25, 0.15, 0.08, 0.05), strict=True):
        draws = [
            ensembles.sparse_spectral_norm(
                ensembles.sparse_matrix(n, ensembles.degree(n, c), np.random.default_rng(seed), entries)
            ).value
            for seed in range(10, 14)
        ]
        assert np.mean(draws) == pytest.approx(expected, abs=tolerance), c


def test_fixed_degree_norms_grow_with_width():
    means = [
        np.mean(
            [
                ensembles.sparse_spectral_norm(ensembles.sparse_matrix(n, 4.0, np.random.default_rng(seed))).value
                for seed in range(6)
            ]
        )
        for n in (128, 2048)
    ]
    assert means[0] == pytest.approx(2.44, abs=0.25)
    assert means[1] == pytest.approx(2.83, abs=0.25)
    assert means[1] > means[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ensembles.rademacher_weights((3, 3), 0.0, generators(1)), "variance must be positive"),
        (lambda: ensembles.correlated_weights((3, 3), 1.0, generators(1), correlation="row"), "exactly one of rho"),
        (
            lambda: ensembles.correlated_weights((3, 3), 1.0, generators(1), correlation="row", rho=0.1, exponent=1.0),
            "exactly one of rho",
        ),
        (lambda: ensembles.correlated_weights((3, 3), 1.0, generators(1), correlation="row", rho=1.5), "rho is 1.5"),
        (
            lambda: ensembles.correlated_weights((3, 3), 1.0, generators(1), correlation="row", exponent=-1.0),
            "exponent is -1.0",
        ),
        (
            lambda: ensembles.correlated_weights((3, 3), 1.0, generators(1), correlation="column", rho=0.1),
            "correlation is 'column'",
        ),
        (
            lambda: ensembles.correlated_weights((3, 3), -1.0, generators(1), correlation="row", rho=0.1),
            "variance must be positive",
        ),
        (lambda: ensembles.bernoulli_masks((3, 3), 1.0, generators(1)), "fraction of weights removed"),
        (lambda: ensembles.surrogate_diagonals([], generators(1)), "one or more of each"),
        (lambda: ensembles.surrogate_diagonals([3, 0], generators(1)), "one or more of each"),
        (lambda: ensembles.surrogate_diagonals([3], []), "one or more of each"),
        (lambda: ensembles.surrogate_diagonals([3], generators(1), probability=1.1), "probability is 1.1"),
        (lambda: ensembles.degree(16, 100.0), "entries per row"),
        (lambda: ensembles.degree(16, 0.0), "entries per row"),
        (lambda: ensembles.sparse_matrix(4, 5.0, np.random.default_rng(0)), "expected_degree is 5.0"),
        (lambda: ensembles.sparse_matrix(0, 1.0, np.random.default_rng(0)), "widths are"),
        (lambda: ensembles.sparse_matrix(4, 2.0, np.random.default_rng(0), "cauchy"), "entries is 'cauchy'"),
    ],
)
def test_impossible_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
