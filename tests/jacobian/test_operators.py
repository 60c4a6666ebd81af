import pytest
import torch
from torch import nn

from jacnorm.jacobian import NonFiniteValue, OptionError
from jacnorm.jacobian.operators import gauss_newton, loss_hessian, top_eigenvalues


@pytest.fixture(scope="module")
def problem():
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))
    return model, nn.CrossEntropyLoss(), x, y


def dense(model, of):
    """Hessian of `of(parameters)` by torch.func, an implementation apart from curvlinops."""
    names, shapes = zip(*[(name, p.shape) for name, p in model.named_parameters()], strict=True)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def split(vector):
        pieces = vector.split([shape.numel() for shape in shapes])
        return {name: piece.reshape(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}

    return flat, split


def test_hessian_and_gauss_newton_against_torch_func(problem):
    model, loss, x, y = problem
    flat, split = dense(model, None)

    def logits(vector):
        return torch.func.functional_call(model, split(vector), (x,))

    hessian = torch.func.hessian(lambda v: loss(logits(v), y))(flat)
    j = torch.func.jacrev(logits)(flat)  # (12, 3, p)
    h_loss = torch.func.hessian(lambda z: loss(z, y))(logits(flat))  # (12, 3, 12, 3)
    ggn = torch.einsum("aip,aibj,bjq->pq", j, h_loss, j)
    for operator, matrix in ((loss_hessian, hessian), (gauss_newton, ggn)):
        result = top_eigenvalues(operator(model, loss, [(x[:5], y[:5]), (x[5:], y[5:])]), 3, rtol=1e-9)
        expected = torch.linalg.eigvalsh(matrix).flip(0)[:3]
        torch.testing.assert_close(result.values, expected, rtol=1e-7, atol=1e-9)
        assert bool(result.converged.all())
        residual = (matrix @ result.vectors.mT - result.vectors.mT * result.values).norm(dim=0)
        torch.testing.assert_close(residual, result.residuals, rtol=1e-3, atol=1e-9)


def test_residual_bounds_the_distance_to_an_eigenvalue_before_convergence():
    spectrum = torch.linspace(-1, 1, 200, dtype=torch.float64)
    result = top_eigenvalues(lambda v: spectrum * v, 2, size=200, dtype=torch.float64, max_products=6)
    assert not bool(result.converged.any())
    assert result.products == 6
    for value, residual in zip(result.values, result.residuals, strict=True):
        assert (spectrum - value).abs().min() <= residual


def test_an_exhausted_space_ends_early():
    result = top_eigenvalues(lambda v: 2 * v, 1, size=50, dtype=torch.float64)
    assert result.products == 1
    assert result.values.item() == pytest.approx(2)


def test_refusals(problem):
    model, loss, x, y = problem
    with pytest.raises(OptionError, match="trainable"):
        loss_hessian(model, loss, [(x, y)], parameters=[])
    with pytest.raises(OptionError, match="size="):
        top_eigenvalues(lambda v: v)
    with pytest.raises(OptionError, match="between 1 and"):
        top_eigenvalues(lambda v: v, 9, size=5)
    with pytest.raises(OptionError, match="max_products"):
        top_eigenvalues(lambda v: v, 4, size=5, max_products=3)
    with pytest.raises(NonFiniteValue, match="product 1"):
        top_eigenvalues(lambda v: v / 0, size=5)
