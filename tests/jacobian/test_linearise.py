import functools

import pytest
import torch
from tests.jacobian.cases import CASES, IDS, convnet, oracle
from torch import nn

from jacnorm.jacobian import (
    AdjointMismatch,
    CoupledSamples,
    DtypeError,
    JacobianError,
    NonDeterministicModel,
    NonFiniteValue,
    NotDifferentiable,
    ShapeError,
    spectral_norm,
)
from jacnorm.jacobian.linearise import Linearisation


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("expected_pushes", [1, 20])
def test_pull_and_push_are_the_products_with_the_jacobian(case, expected_pushes):
    model, x = case.build(torch.float64)
    lin = Linearisation(model, x, expected_pushes)
    j = oracle(model, x)
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(lin.samples, lin.outputs, generator=generator, dtype=torch.float64)
    v = torch.randn(lin.samples, lin.inputs, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(lin.pull(u), torch.einsum("bmn,bm->bn", j, u))
    torch.testing.assert_close(lin.push(v), torch.einsum("bmn,bn->bm", j, v))
    torch.testing.assert_close(lin.rows()[0], j)
    torch.testing.assert_close(lin.columns()[0], j)


@pytest.mark.parametrize("way", ["_by_double_backward", "_by_linearize", "_by_jvp"])
def test_the_three_ways_to_push_are_one_map(way):
    model, x = CASES[4].build(torch.float64)
    lin = Linearisation(model, x)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = torch.func.jvp(model, (x,), (v,))[1]
    torch.testing.assert_close(getattr(lin, way)()(v), expected)


def test_way_to_push_follows_the_graph_and_the_number_of_pushes():
    conv, image = convnet(), torch.randn(2, 2, 5, 5)
    ways = []
    for f, x, pushes in ((nn.Tanh(), torch.ones(2, 3), 20), (conv, image, 20), (conv, image, 2)):
        lin = Linearisation(f, x, pushes)
        lin.push(torch.zeros(2, lin.inputs))
        ways.append(lin.push_method)
    assert ways == ["double backward", "linearize", "double backward"]


class NoDoubleBackward(torch.autograd.Function):
    """3 x with pulls only."""

    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * g


class NoDoubleBackwardButForward(NoDoubleBackward):
    """3 x with pulls, and pushes by forward differentiation only."""

    @staticmethod
    def jvp(ctx, v):
        return 3 * v


class WrongBackward(torch.autograd.Function):
    """x, with the derivative of 2 x going back and of x going forward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g

    @staticmethod
    def jvp(ctx, v):
        return v.clone()


class LooksAtItsGradient(NoDoubleBackward):
    """3 x with a pull that reads a number, which no vmapped pass can give it."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return (3 if g.sum().item() < torch.inf else 4) * g


def test_an_operation_without_double_backward_takes_another_way_and_says_so():
    result = spectral_norm(NoDoubleBackwardButForward.apply, torch.ones(2, 80), method="krylov", rtol=1e-2)
    assert result.method == "krylov, pushes by linearize"
    torch.testing.assert_close(result.value, torch.full((2,), 3.0, dtype=torch.float64), rtol=1e-5, atol=0)


def test_an_operation_without_any_push_is_refused_by_krylov_and_measured_by_rows():
    with pytest.raises(NotDifferentiable, match="method='rows'"):
        spectral_norm(NoDoubleBackward.apply, torch.ones(2, 80), method="krylov")
    result = spectral_norm(NoDoubleBackward.apply, torch.ones(2, 80), method="rows")
    assert result.value.tolist() == pytest.approx([3.0, 3.0])


def test_a_wrong_backward_breaks_the_adjoint_identity():
    with pytest.raises(AdjointMismatch, match="not adjoint"):
        spectral_norm(WrongBackward.apply, torch.ones(2, 80))


def test_rows_without_a_vmapped_gradient_go_one_by_one():
    result = spectral_norm(LooksAtItsGradient.apply, torch.ones(2, 5))
    assert result.method == "rows one by one"
    assert result.pulls.tolist() == [5, 5]


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_batch_norm_in_train_mode_is_refused(samples):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(CoupledSamples, match=r"model\.eval\(\)"):
        spectral_norm(model, torch.randn(samples, 1, 5, 5))
    assert model.training
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)
    spectral_norm(model.eval(), torch.randn(samples, 1, 5, 5))


@pytest.mark.parametrize("shift", [1, -1])
def test_coupling_in_one_direction_is_seen(shift):
    def f(x):  # each sample also depends on its left (or right) neighbour
        keep = torch.ones(len(x), 1)
        keep[0 if shift == 1 else -1] = 0
        return x + 0.01 * keep * x.roll(shift, 0)

    with pytest.raises(CoupledSamples, match="another sample"):
        spectral_norm(f, torch.ones(2, 3))


def test_dropout_is_refused_and_the_generator_left_as_found():
    state = torch.get_rng_state()
    with pytest.raises(NonDeterministicModel, match="two forward passes"):
        spectral_norm(nn.Dropout(0.5), torch.ones(2, 300))
    assert torch.equal(torch.get_rng_state(), state)


def test_checks_can_be_left_out():
    model = nn.BatchNorm1d(3)
    assert spectral_norm(model, torch.randn(4, 3), check=False).value.shape == (4,)
    assert int(model.num_batches_tracked) == 0


def test_model_modes_gradients_and_input_are_left_as_found():
    model = nn.Sequential(nn.Linear(70, 70), nn.BatchNorm1d(70), nn.Tanh())
    model[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(3, 70, requires_grad=True)
    kept = x.detach().clone()
    for f in (model, lambda x: model(x), functools.partial(nn.Module.__call__, model)):
        spectral_norm(f, x, method="krylov", rtol=1e-2)
    assert [module.training for module in model] == [True, False, True]
    assert all(bool((p.grad == 7.0).all()) for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert x.grad is None
    assert torch.equal(x.detach(), kept)
    assert x.requires_grad


def test_works_under_no_grad_and_in_inference_mode():
    model, x = CASES[0].build()
    expected = spectral_norm(model, x).value
    with torch.no_grad():
        torch.testing.assert_close(spectral_norm(model, x).value, expected)
    with torch.inference_mode():
        torch.testing.assert_close(spectral_norm(model, x + 0).value, expected)


def test_non_finite_values_name_the_first_bad_sample():
    x = torch.ones(5, 70)
    x[3, 0] = torch.nan
    with pytest.raises(NonFiniteValue, match="x holds NaN or infinity, first in sample 3"):
        spectral_norm(torch.tanh, x)
    x = torch.ones(5, 70)
    x[2, 5] = -1.0
    with pytest.raises(NonFiniteValue, match=r"f\(x\) .* sample 2"):
        spectral_norm(torch.log, x, check=False)
    x[2, 5] = 0.0  # the square root is finite at 0, its derivative is not
    for method in ("rows", "krylov"):
        with pytest.raises(NonFiniteValue, match=r"Jacobian.* sample 2"):
            spectral_norm(torch.sqrt, x, method=method, check=False)
        with pytest.raises(NonFiniteValue, match=r"Jacobian.* sample 2"):
            spectral_norm(torch.sqrt, x, method=method, check=False, memory_limit=1)


@pytest.mark.parametrize(
    ("f", "x", "error", "words"),
    [
        (torch.tanh, torch.ones(2, 3, dtype=torch.int64), DtypeError, "int64.*token ids"),
        (torch.tanh, torch.ones(2, 3, dtype=torch.complex64), DtypeError, "complex64"),
        (torch.tanh, [1.0], DtypeError, "list"),
        (torch.tanh, torch.tensor(1.0), ShapeError, "at least one sample"),
        (torch.tanh, torch.ones(0, 3), ShapeError, "at least one sample"),
        (lambda x: x.sum(), torch.ones(2, 3), ShapeError, "same B"),
        (lambda x: x[:1], torch.ones(2, 3), ShapeError, "same B"),
        (lambda x: (x, x), torch.ones(2, 3), ShapeError, "one tensor"),
        (lambda x: x.argmax(1), torch.ones(2, 3), DtypeError, "int64"),
        (lambda x: x.to(torch.complex64), torch.ones(2, 3), DtypeError, "complex64"),
        (lambda x: x.detach(), torch.ones(2, 3), NotDifferentiable, "detach"),
        (lambda x: x.detach() * torch.ones(3, requires_grad=True), torch.ones(2, 3), NotDifferentiable, "detach"),
    ],
)
def test_functions_without_a_jacobian_per_sample_are_refused(f, x, error, words):
    with pytest.raises(error, match=words):
        spectral_norm(f, x)
    assert issubclass(error, JacobianError)
    assert issubclass(error, ValueError)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_measured_in_float32(dtype):
    model, x = CASES[0].build(dtype)
    result = spectral_norm(model, x)
    assert result.dtype == torch.float32
    expected = torch.linalg.svdvals(oracle(model, x))[:, 0]
    torch.testing.assert_close(result.value, expected, rtol=1e-3, atol=0)
    assert bool(((result.lower <= expected) & (expected <= result.upper)).all())
    assert all(parameter.dtype == dtype for parameter in model.parameters())


def test_half_precision_functions_that_cannot_be_cast_are_refused():
    w = torch.ones(3, 3, dtype=torch.bfloat16)
    with pytest.raises(DtypeError, match=r"cannot be computed in torch\.float32"):
        spectral_norm(lambda x: x @ w, torch.ones(2, 3, dtype=torch.bfloat16))
    with pytest.raises(DtypeError, match=r"returned torch\.bfloat16"):
        spectral_norm(lambda x: x.bfloat16(), torch.ones(2, 3, dtype=torch.bfloat16))


def test_autocast_inside_the_function_is_too_coarse_for_an_interval():
    layer = nn.Linear(6, 4, bias=False)

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    with pytest.raises(DtypeError, match="autocast"):
        spectral_norm(f, torch.ones(2, 6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["rows", "krylov"])
def test_cuda_agrees_with_the_oracle(case, dtype, method):
    model, x = case.build(dtype)
    expected = torch.linalg.svdvals(oracle(model, x))[:, 0]
    result = spectral_norm(model.cuda(), x.cuda(), method=method, rtol=1e-3, max_pairs=200)
    assert result.value.is_cuda
    torch.testing.assert_close(result.value.cpu(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    "coupled",
    [
        lambda a: torch.tanh(a) + torch.roll(a, 2, 0),
        lambda a: torch.cat([a[:4], a[4:].flip(0)]),
        lambda a: a / a.detach().std(0),
    ],
    ids=["distant neighbours", "the last two", "detached statistics"],
)
@pytest.mark.parametrize("method", ["rows", "krylov"])
def test_samples_that_depend_on_one_another_anywhere_are_refused(coupled, method):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with pytest.raises(CoupledSamples, match="when other samples leave the batch"):
        spectral_norm(coupled, x, method=method)
    assert spectral_norm(torch.tanh, x, method=method).value.shape == (6,)
