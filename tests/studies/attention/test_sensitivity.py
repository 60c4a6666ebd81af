"""Algorithm 5 against the Jacobian's products and norms, whose oracles are in test_normalisers."""

from __future__ import annotations

import math

import pytest
import torch

from jacnorm.studies.attention.normalisers import NORMALISERS
from jacnorm.studies.attention.sensitivity import directions, jacobian_rows, sensitivity_rows
from jacnorm.studies.attention.tables import COLUMNS
from jacnorm.training.seeds import RunId

RUN = RunId("attention", "test", 0)
HEADS = [{"seed": 0, "data_set": "test", "model": "synthetic", "layer": 0, "head": head} for head in (1, 2)]
SOFTMAX = NORMALISERS["softmax"]


def causal(heads=2, n=16, seed=0, spread=2.0):
    """Logits (H, n, n) of causal rows and their mask (n, n)."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(heads, n, n, generator=generator, dtype=torch.float64)
    return logits, torch.ones(n, n, dtype=torch.bool).tril()


def changes(normaliser, logits, visible, temperatures, perturbations, run=RUN):
    """Change by temperature, perturbation and head."""
    rows = sensitivity_rows(HEADS[: len(logits)], normaliser, logits, visible, temperatures, perturbations, run)
    return {(row["temperature"], row["perturbation"], row["head"]): row["change"] for row in rows}


def test_directions_are_unit_vectors_of_the_visible_keys():
    visible = causal()[1]
    drawn = directions(visible, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.norm(dim=-1), torch.ones(16, dtype=torch.float64))
    assert not drawn[~visible].any()
    many = directions(torch.ones(20_000, 3, dtype=torch.bool), torch.Generator().manual_seed(1))
    assert many.mean(0).abs().max() < 0.02
    assert torch.allclose(many.mT @ many / 20_000, torch.eye(3, dtype=torch.float64) / 3, atol=0.01)


@pytest.mark.parametrize("name", list(NORMALISERS))
def test_a_small_perturbation_gives_the_product_with_the_jacobian(name):
    logits, visible = causal()
    logits = logits + 0.1  # no row of a single logit 0, for which sa-softmax is not defined
    temperature, perturbation = 0.7, 1e-7
    found = changes(NORMALISERS[name], logits, visible, [temperature], [perturbation])
    seen = visible.expand(logits.shape)
    v = directions(seen, RUN.generator(f"direction/{temperature!r}/{perturbation!r}"))
    expected = NORMALISERS[name].jacobian(logits, seen, temperature).product(v).norm(dim=-1).mean(-1)
    assert [found[temperature, perturbation, head] for head in (1, 2)] == pytest.approx(expected.tolist(), rel=1e-5)


def test_its_mean_square_is_that_of_the_frobenius_norm_over_the_root_of_the_keys():
    # One row 4000 times: E |J v|^2 = |J|_F^2 / n for v uniform on the sphere, whose cosines vary little.
    row = torch.tensor([1.0, 0.3, -0.5, 0.9, 0.0], dtype=torch.float64)
    logits, visible = row.expand(2, 4000, 5), torch.ones(4000, 5, dtype=torch.bool)
    seen = visible.expand(logits.shape)
    jacobian = SOFTMAX.jacobian(logits, seen, 1.0)
    v = directions(seen, RUN.generator("check"))
    mean_square = jacobian.product(v).square().sum(-1).mean().item()
    (found, _) = jacobian_rows(HEADS, SOFTMAX, logits, visible, [1.0])
    assert mean_square == pytest.approx(found["frobenius_per_root"] ** 2, rel=0.03)
    assert changes(SOFTMAX, logits, visible, [1.0], [1e-3])[1.0, 1e-3, 1] < found["frobenius_per_root"]


def test_a_long_perturbation_is_capped_by_the_diameter_of_the_simplex():
    # Two opposite logits that swap order whenever the perturbation says so: g = sqrt(2) / epsilon or 0.
    logits = torch.tensor([[[0.0, 0.0]] * 400], dtype=torch.float64)
    visible = torch.ones(400, 2, dtype=torch.bool)
    found = changes(SOFTMAX, logits, visible, [1e-6], [10.0])[1e-6, 10.0, 1]
    # From (1/2, 1/2) to a corner is half the diagonal; |v_1 - v_2| is almost never below 1e-6.
    assert found == pytest.approx(math.sqrt(0.5) / 10.0)


def test_directions_depend_on_the_run_and_the_point_of_the_grid_only():
    logits, visible = causal()
    grid = [0.5, 1.0, 2.0], [1e-3, 1e-1]
    whole = changes(SOFTMAX, logits, visible, *grid)
    assert changes(SOFTMAX, logits, visible, [2.0], [1e-1]) == {
        key: whole[key] for key in whole if key[:2] == (2.0, 0.1)
    }
    other = changes(SOFTMAX, logits, visible, *grid, run=RunId("attention", "test", 1))
    assert all(whole[key] != other[key] for key in whole)
    # At equal weights the product with J depends on the direction alone: fresh ones for each point of the grid.
    flat = changes(SOFTMAX, torch.zeros_like(logits), visible, [1.0, 2.0], [1e-6, 2e-6])
    assert len({round(value * temperature, 4) for (temperature, _, _), value in flat.items()}) == len(flat)


def test_rows_have_the_columns_of_their_tables():
    logits, visible = causal()
    for name, normaliser in NORMALISERS.items():
        changed = list(sensitivity_rows(HEADS, normaliser, logits, visible, [0.5, 1.0], [1e-3], RUN))
        norms = list(jacobian_rows(HEADS, normaliser, logits, visible, [0.5, 1.0]))
        for table, rows in (("sensitivity", changed), ("jacobians", norms)):
            assert len(rows) == 4
            assert all(set(row) == set(COLUMNS[table]) for row in rows)
            assert {row["normaliser"] for row in rows} == {name}
            assert {row["rows"] for row in rows} == {16}
            assert [row["head"] for row in rows] == [1, 2, 1, 2]


@pytest.mark.parametrize("temperature", [0.01, 0.5, 3.0])
def test_norms_of_known_rows(temperature):
    # Head 1: two equal logits, |J|_2 = |J|_F = 1 / (2 T). Head 2: one visible key, or three equal: |J|_2 = 1 / (3 T).
    two = torch.tensor([1.0, 1.0, -math.inf], dtype=torch.float64)
    logits = torch.stack([torch.stack([two, two]), torch.full((2, 3), 0.4, dtype=torch.float64)])
    visible = torch.tensor([[[True, True, False]] * 2, [[False, False, True], [True, True, True]]])
    first, second = jacobian_rows(HEADS, SOFTMAX, logits, visible, [temperature])
    half, third = 1 / (2 * temperature), 1 / (3 * temperature)
    assert first["spectral"] == first["spectral_max"] == pytest.approx(half)
    assert first["frobenius"] == pytest.approx(half)
    assert first["frobenius_per_root"] == pytest.approx(half / math.sqrt(2))
    assert first["spectral_largest_product"] == pytest.approx(1 / 2)
    assert (first["above_quarter"], first["above_half"]) == (1.0, 0.0)
    assert second["spectral"] == pytest.approx(third / 2)
    assert second["spectral_max"] == pytest.approx(third)
    assert second["frobenius"] == pytest.approx(third * math.sqrt(2) / 2)
    assert second["frobenius_per_root"] == pytest.approx(third * math.sqrt(2 / 3) / 2)
    assert second["spectral_largest_product"] == pytest.approx(1 / 3)
    assert (second["above_quarter"], second["above_half"]) == (0.5, 0.0)


def test_a_normaliser_may_exceed_both_constants():
    # Sparsemax with two keys in its support: |J|_2 = 1 / T.
    logits, visible = torch.tensor([[[0.3, 0.2, -9.0]]], dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    (row,) = jacobian_rows(HEADS[:1], NORMALISERS["sparsemax"], logits, visible, [2.0])
    assert (row["above_quarter"], row["above_half"]) == (1.0, 1.0)
    assert row["spectral_largest_product"] == pytest.approx(1.0)
