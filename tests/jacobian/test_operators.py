import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jacnorm.jacobian import NonFiniteValue, OptionError
from jacnorm.jacobian.operators import gauss_newton, loss_hessian, stacked_top_eigenvalues, top_eigenvalues


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch.func's first use of forward mode
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


def symmetric(*spectra, dtype=torch.float64):
    """Matrices (R, p, p) of chosen spectra, in a random orthonormal basis each."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for spectrum in spectra:
        basis, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))
        found.append(basis * torch.as_tensor(spectrum, dtype=torch.float64) @ basis.mT)
    return torch.stack(found).to(dtype)


def random_start(runs, size, dtype=torch.float64):
    return torch.randn(runs, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def times(matrices):
    return lambda v: (matrices @ v.unsqueeze(2)).squeeze(2)


EDGES = {
    "positive": torch.linspace(0, 4, 40) ** 2,
    "larger below zero": torch.cat([torch.linspace(-90, 0, 39), torch.tensor([7.0])]),
    "negative": torch.linspace(-5, -1, 40),
    "negative, one zero": torch.linspace(-3, 0, 40),
    "zero": torch.zeros(40),
    "one value": torch.full((40,), -2.0),
    "rank one": torch.cat([torch.zeros(39), torch.tensor([6.0])]),
    "double top": torch.cat([torch.linspace(-1, 1, 38), torch.tensor([3.0, 3.0])]),
    "tiny": torch.linspace(-1e-12, 2e-12, 40),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stacked_top_eigenvalues_are_those_of_numpy_and_arpack(dtype):
    """Both oracles share no code with the Lanczos process here, and ARPACK is what the field uses."""
    matrices = symmetric(*EDGES.values(), dtype=dtype)
    result = stacked_top_eigenvalues(times(matrices), random_start(len(EDGES), 40, dtype), rtol=1e-6)
    exact = np.linalg.eigvalsh(matrices.double().numpy())
    scale = np.abs(exact).max(1)
    precision = 1e-9 if dtype == torch.float64 else 1e-5
    assert (np.abs(result.values.numpy() - exact[:, -1]) <= precision * scale).all()
    if dtype == torch.float64:
        assert bool(result.converged.all())
        for name, matrix, value in zip(EDGES, matrices.numpy(), result.values.tolist(), strict=True):
            if name not in ("zero", "one value", "negative, one zero"):  # where ARPACK's relative tolerance stalls
                ((arpack,), _) = scipy.sparse.linalg.eigsh(matrix, 1, which="LA", v0=np.ones(len(matrix)))
                assert value == pytest.approx(arpack, rel=1e-9)
    residuals = torch.linalg.vector_norm(
        times(matrices)(result.vectors) - result.values[:, None].to(dtype) * result.vectors, dim=1
    ).double()
    bound = 1e-6 * result.values.abs() + precision * torch.from_numpy(scale)
    assert bool((residuals <= bound).all())
    torch.testing.assert_close(result.vectors.norm(dim=1), torch.ones(len(EDGES), dtype=dtype))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 12), runs=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_property_an_exhausted_space_holds_the_largest_eigenvalue(size, runs, seed):
    matrices = torch.randn(runs, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrices = matrices + matrices.mT
    result = stacked_top_eigenvalues(times(matrices), random_start(runs, size), rtol=0)
    exact = torch.linalg.eigvalsh(matrices)
    torch.testing.assert_close(result.values, exact[:, -1], rtol=1e-8, atol=1e-8 * float(exact.abs().max()))
    assert bool((result.products <= size).all())


def test_a_run_does_not_depend_on_its_company():
    spectra = [torch.linspace(0, 1, 60) ** power for power in (1, 2, 8, 30)]
    matrices, start = symmetric(*spectra), random_start(4, 60)
    together = stacked_top_eigenvalues(times(matrices), start, rtol=1e-4)
    assert len(set(together.products.tolist())) > 1
    for run in range(4):
        alone = stacked_top_eigenvalues(times(matrices[run : run + 1]), start[run : run + 1], rtol=1e-4)
        assert alone.products == together.products[run]
        torch.testing.assert_close(alone.values[0], together.values[run], rtol=1e-12, atol=0)
        torch.testing.assert_close(alone.vectors[0], together.vectors[run], rtol=0, atol=1e-10)


def test_the_stack_is_narrowed_to_the_runs_left():
    spectra = [torch.linspace(0, 1, 60) ** power for power in (30, 1, 8, 2, 40)]
    matrices, start = symmetric(*spectra), random_start(5, 60)
    plain = stacked_top_eigenvalues(times(matrices), start, rtol=1e-5)
    asked, widths = [], []

    def narrow(runs):
        asked.append(runs.tolist())
        return counted(matrices[runs])

    def counted(chosen):
        def multiply(v):
            widths.append(len(v))
            return times(chosen)(v)

        return multiply

    narrowed = stacked_top_eigenvalues(counted(matrices), start, rtol=1e-5, narrow=narrow)
    slowest = plain.products.argsort(descending=True).tolist()
    assert asked == [sorted(slowest[:2]), slowest[:1]]
    assert len(widths) == plain.products.max()
    assert sum(widths) < 5 * len(widths)
    torch.testing.assert_close(narrowed.values, plain.values, rtol=1e-12, atol=0)
    torch.testing.assert_close(narrowed.vectors, plain.vectors, rtol=0, atol=1e-9)
    assert torch.equal(narrowed.products, plain.products)


def test_without_convergence_the_best_ritz_value_comes_back():
    matrices = symmetric(torch.linspace(-1, 1, 80), torch.cat([torch.zeros(79), torch.ones(1)]))
    result = stacked_top_eigenvalues(times(matrices), random_start(2, 80), rtol=1e-10, max_products=5)
    assert result.converged.tolist() == [False, True]
    assert result.products.tolist() == [5, 2]
    assert 0 < result.values[0] < 1
    nearest = (torch.linalg.eigvalsh(matrices[0]) - result.values[0]).abs().min()
    assert nearest <= result.residuals[0]


def test_a_product_that_is_not_finite_spoils_its_own_run_alone():
    matrices, start = symmetric(*[torch.linspace(0, 1, 30) ** 3] * 3), random_start(3, 30)
    plain = stacked_top_eigenvalues(times(matrices), start)
    calls = []

    def multiply(v):
        calls.append(v)
        w = times(matrices)(v)
        if len(calls) >= 3:
            w[1, 4] = torch.nan
        return w

    result = stacked_top_eigenvalues(multiply, start)
    assert bool(result.values[1].isnan())
    assert bool(result.residuals[1].isnan())
    assert result.converged.tolist() == [True, False, True]
    assert result.products[1] == 3
    torch.testing.assert_close(result.vectors[1], start[1] / start[1].norm())
    assert torch.equal(result.values[[0, 2]], plain.values[[0, 2]])
    assert torch.equal(result.vectors[[0, 2]], plain.vectors[[0, 2]])
    alone = stacked_top_eigenvalues(lambda v: v * torch.inf, start)
    assert bool(alone.values.isnan().all())
    assert alone.products.tolist() == [1, 1, 1]


def test_a_start_from_the_eigenvectors_takes_one_product_whatever_its_length():
    matrices = symmetric(torch.linspace(0, 1, 50) ** 2, torch.linspace(-4, 3, 50), dtype=torch.float32)
    first = stacked_top_eigenvalues(times(matrices), random_start(2, 50, torch.float32), rtol=1e-4)
    again = stacked_top_eigenvalues(times(matrices), first.vectors * 1e-30, rtol=2e-4)
    assert again.products.tolist() == [1, 1]
    torch.testing.assert_close(again.values, first.values, rtol=1e-6, atol=0)


def test_stacked_refusals():
    for start in (torch.ones(3), torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[torch.nan, 1.0]])):
        with pytest.raises(OptionError, match="finite, non-zero rows"):
            stacked_top_eigenvalues(lambda v: v, start)
    for options in ({"rtol": -1e-3}, {"max_products": 0}):
        with pytest.raises(OptionError, match="rtol is at least 0"):
            stacked_top_eigenvalues(lambda v: v, torch.ones(1, 2), **options)
