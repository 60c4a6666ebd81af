import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jacnorm.jacobian import DtypeError, JacobianError, NonFiniteValue, ScaledProduct, ShapeError


@pytest.mark.parametrize(("m", "n"), [(6, 6), (3, 8), (8, 3)])
def test_product_agrees_with_the_product_written_out(m, n):
    generator = torch.Generator().manual_seed(3)
    product = ScaledProduct()
    expected = torch.eye(n, dtype=torch.float64).expand(4, n, n)
    for rows in (n, 7, m):
        a = torch.randn(4, rows, expected.shape[1], generator=generator, dtype=torch.float64)
        d = torch.rand(4, rows, generator=generator, dtype=torch.float64)
        product.left_multiply(a)
        product.scale_rows(d)
        expected = d[..., None] * (a @ expected)
    values = torch.linalg.svdvals(expected)
    torch.testing.assert_close(product.log_singular_values(), values.log(), rtol=0, atol=1e-9)
    torch.testing.assert_close(product.log_spectral_norm(), values[:, 0].log(), rtol=0, atol=1e-12)
    torch.testing.assert_close(product.log_frobenius_norm(), expected.norm(dim=(1, 2)).log(), rtol=0, atol=1e-12)
    torch.testing.assert_close(product.log_scale.exp()[:, None, None] * product.matrix, expected)


@given(
    log10_scale=st.floats(-150, 150),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    depth=st.integers(1, 500),
)
@settings(deadline=None, max_examples=40)
def test_scaled_orthogonal_factors_have_the_closed_form_at_any_depth(log10_scale, dtype, depth):
    if dtype == torch.float32:
        log10_scale /= 5  # its entries reach 1e38
    angle = torch.tensor(0.3, dtype=torch.float64)
    rotation = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    factor = (10**log10_scale * rotation).to(dtype)
    product = ScaledProduct(dtype)
    for _ in range(depth):
        product.left_multiply(factor)
    scale = torch.linalg.matrix_norm(factor.double() / factor.double().abs().max(), 2).log()
    expected = depth * (scale + factor.double().abs().max().log())
    tolerance = depth * (1e-6 if dtype == torch.float32 else 1e-13)
    assert abs(product.log_spectral_norm().item() - expected.item()) <= tolerance * max(1.0, abs(log10_scale))


def test_zero_product_is_minus_infinity_for_good_and_leaves_other_samples_alone():
    product = ScaledProduct()
    product.left_multiply(torch.eye(3).expand(2, 3, 3))
    product.scale_rows(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    product.left_multiply(torch.full((3, 3), 2.0))
    assert product.log_spectral_norm().tolist() == pytest.approx([math.log(6), -math.inf])
    assert product.log_frobenius_norm()[1] == -math.inf
    assert bool((product.log_singular_values()[1] == -math.inf).all())


def test_golden_norm_of_square_gaussian_products():
    """The limit sqrt((m+1)^(m+1) / m^m) = 3.0792 for m = 3 Gaussian factors (Penson and Zyczkowski 2011)."""
    generator = torch.Generator().manual_seed(5)
    product = ScaledProduct()
    for _ in range(3):
        product.left_multiply(torch.randn(4, 400, 400, generator=generator, dtype=torch.float64) / 20)
    assert product.log_spectral_norm().exp().mean().item() == pytest.approx(3.0792, rel=0.03)


def test_clone_branches_a_sweep():
    product = ScaledProduct()
    product.scale_rows(torch.tensor([[2.0, 1.0]]))
    branch = product.clone()
    branch.scale_rows(torch.tensor([3.0, 1.0]))
    assert product.log_spectral_norm().exp().item() == pytest.approx(2)
    assert branch.log_spectral_norm().exp().item() == pytest.approx(6)


def test_refusals():
    with pytest.raises(DtypeError, match=r"float32 or torch\.float64"):
        ScaledProduct(torch.bfloat16)
    product = ScaledProduct()
    with pytest.raises(JacobianError, match="no factor yet"):
        product.log_spectral_norm()
    with pytest.raises(ShapeError, match="shape"):
        product.left_multiply(torch.ones(3))
    with pytest.raises(ShapeError, match="diagonal"):
        product.scale_rows(torch.ones(2, 3, 3))
    with pytest.raises(DtypeError, match="int64"):
        product.left_multiply(torch.ones(2, 3, 3, dtype=torch.int64))
    product.left_multiply(torch.ones(2, 3, 3))
    with pytest.raises(ShapeError, match="from the left"):
        product.left_multiply(torch.ones(2, 3, 4))
    with pytest.raises(ShapeError, match="from the left"):
        product.left_multiply(torch.ones(5, 3, 3))
    with pytest.raises(ShapeError, match="scale the rows"):
        product.scale_rows(torch.ones(2, 4))
    bad = torch.ones(2, 3, 3)
    bad[1, 0, 0] = torch.nan
    with pytest.raises(NonFiniteValue, match="sample 1"):
        product.left_multiply(bad)
