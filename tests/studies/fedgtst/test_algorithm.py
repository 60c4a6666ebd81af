"""The formulas against closed forms, plain autograd, torch's optimisers and torch's divergences.

Plain autograd with `create_graph` is independent of the product with the Hessian that the module makes instead.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jacnorm.studies.fedgtst import algorithm
from jacnorm.studies.fedgtst.settings import EnginesSettings

torch.set_num_threads(1)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def smooth_problem(seed):
    """A tanh network in float64, without the kinks that finite differences do not see through."""
    draw = {"generator": stream(seed), "dtype": torch.float64}
    weights = {"a": torch.randn(6, 5, **draw), "b": torch.randn(6, **draw), "c": torch.randn(3, 6, **draw)}
    x, y = torch.randn(8, 5, **draw), torch.randint(3, (8,), generator=stream(seed + 1))

    def loss(w):
        return algorithm.cross_entropy(torch.tanh(x @ w["a"].T + w["b"]) @ w["c"].T, y)

    return loss, weights


@given(seed=st.integers(0, 99), xi=st.floats(0, 2), guide=st.floats(0, 5))
@settings(max_examples=20, deadline=None)
def test_the_penalised_gradient_is_that_of_autograd_through_the_whole_objective(seed, xi, guide):
    loss, weights = smooth_problem(seed)
    value, norm, gradient = algorithm.objective_and_gradient(loss, weights, scalar(xi), scalar(guide))
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    plain = loss(leaves)
    first = torch.autograd.grad(plain, list(leaves.values()), create_graph=True)
    length = torch.cat([g.flatten() for g in first]).norm()
    expected = torch.autograd.grad(plain + xi * (length - guide) ** 2, list(leaves.values()))
    torch.testing.assert_close(value, plain.detach())
    torch.testing.assert_close(norm, length.detach())
    for g, e in zip(gradient.values(), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def test_the_penalised_gradient_is_that_of_finite_differences():
    loss, weights = smooth_problem(3)
    xi, guide = scalar(0.7), scalar(0.1)

    def objective(w):
        return algorithm.penalised(loss(w), algorithm.gradient_norm(torch.func.grad(loss)(w)), xi, guide)

    _, _, gradient = algorithm.objective_and_gradient(loss, weights, xi, guide)
    step = {name: torch.randn(w.shape, generator=stream(5), dtype=w.dtype) for name, w in weights.items()}
    ends = [objective({name: w + sign * 1e-5 * step[name] for name, w in weights.items()}) for sign in (1, -1)]
    slope = sum((gradient[name] * step[name]).sum() for name in weights)
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, slope, rtol=1e-7, atol=0)


def test_on_a_quadratic_the_penalised_gradient_has_its_closed_form():
    curvature, w, xi, guide = 3.0, -0.4, 0.25, 2.0  # loss = curvature w^2 / 2, J = curvature w
    _, norm, gradient = algorithm.objective_and_gradient(
        lambda v: curvature * v["w"].square().sum() / 2, {"w": scalar([w])}, scalar(xi), scalar(guide)
    )
    assert norm.item() == pytest.approx(1.2)
    assert gradient["w"].item() == pytest.approx(curvature * w - 2 * xi * (1.2 - guide) * curvature)


def test_a_zero_gradient_has_norm_zero_and_no_nan():
    value, norm, gradient = algorithm.objective_and_gradient(
        lambda w: w["w"].square().sum(), {"w": torch.zeros(3)}, torch.tensor(0.1), torch.tensor(5.0)
    )
    assert norm.item() == pytest.approx(0, abs=1e-11)
    assert gradient["w"].tolist() == [0, 0, 0]
    assert value == 0


def test_the_norm_is_that_of_the_flat_gradient():
    assert algorithm.gradient_norm({"a": torch.tensor([[3.0], [0.0]]), "b": torch.tensor(4.0)}).item() == 5.0


def test_fediir_penalises_the_distance_of_the_head_gradient():
    head, mean_head = {"w": scalar([1.0, 2.0]), "b": scalar([3.0])}, {"w": scalar([0.0, 0.0]), "b": scalar([1.0])}
    assert algorithm.fediir_objective(scalar(0.5), head, mean_head, scalar(0.1)).item() == pytest.approx(0.5 + 0.9)


@given(seed=st.integers(0, 99), scale=st.floats(0.2, 2), factor=st.floats(0, 3), sign=st.sampled_from([-1, 1]))
@settings(max_examples=20, deadline=None)
def test_fedsr_adds_length_and_the_divergence_of_normals(seed, scale, factor, sign):
    draw = {"generator": stream(seed), "dtype": torch.float64}
    z, mean = torch.randn(5, 4, **draw), torch.randn(5, 4, **draw)
    deviation = torch.rand(5, 4, **draw) + 0.1
    r_mu, r_sigma = torch.randn(3, 4, **draw), torch.randn(3, 4, **draw)
    y = torch.randint(3, (5,), generator=stream(seed))
    reference = {"r_mu": r_mu, "r_sigma": r_sigma, "scale": scalar(sign * scale)}
    found = algorithm.fedsr_objective(scalar(1.0), z, mean, deviation, y, reference, scalar(factor))
    own = torch.distributions.Normal(sign * scale * mean, scale * deviation)
    other = torch.distributions.Normal(r_mu[y], torch.nn.functional.softplus(r_sigma)[y])
    divergence = torch.distributions.kl_divergence(own, other).sum(1).mean()
    expected = 1 + factor * (0.01 * z.norm(dim=1).mean() + 0.0005 * divergence)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 24])
def test_a_full_gradient_does_not_depend_on_its_slices(samples, monkeypatch):
    x = torch.randn(samples, 4, generator=stream(), dtype=torch.float64)
    y = torch.randint(3, (samples,), generator=stream())
    weights = {"w": torch.randn(3, 4, generator=stream(1), dtype=torch.float64)}

    def loss(w, x, y):
        return algorithm.cross_entropy(x @ w["w"].T, y)

    whole = torch.func.grad(loss)(weights, x, y)["w"]
    monkeypatch.setattr(algorithm, "SLICE", 8)
    torch.testing.assert_close(algorithm.full_gradient(loss, weights, x, y)["w"], whole)


def test_a_client_without_samples_has_no_gradient():
    with pytest.raises(ValueError, match="no samples"):
        algorithm.full_gradient(lambda w, x, y: x.sum(), {}, torch.zeros(0, 2), torch.zeros(0))


def test_means_and_guides_leave_out_who_did_not_answer():
    norms = scalar([3.0, math.nan, 5.0, 900.0])
    answered = torch.tensor([True, False, True, False])
    assert algorithm.max_guide(norms, answered).item() == 5
    assert algorithm.mean_guide(norms, answered).item() == 4
    values = torch.tensor([[1.0, 2.0], [math.inf, 0.0], [3.0, 6.0], [math.nan, 0.0]])
    assert algorithm.unweighted_mean(values, answered).tolist() == [2, 4]
    assert algorithm.unweighted_mean(values, torch.zeros(4, dtype=torch.bool)).isnan().all()


def test_schedules():
    def at(kind, *rounds):
        chosen = EnginesSettings(schedule=kind, schedule_rounds=10)
        return [algorithm.schedule(chosen, index) for index in rounds]

    assert at("constant", 0, 5, 500) == [1, 1, 1]
    assert at("warmup", 0, 5, 10, 11) == [0, 0.5, 1, 1]
    assert at("decay", 0, 5, 10, 11) == pytest.approx([1, 0.5, 0, 0])
    rates = [algorithm.learning_rate(EnginesSettings(learning_rate=0.1, decay_rounds=3), r) for r in (0, 2, 3, 6)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])


@pytest.mark.parametrize(("name", "theirs"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_the_optimisers_are_torchs(name, theirs):
    parameter = torch.nn.Parameter(torch.randn(3, 2, generator=stream(), dtype=torch.float64))
    weights, state = {"w": parameter.detach().clone()}, {}
    optimiser = theirs([parameter], lr=0.05)
    for number in range(1, 6):
        gradient = torch.randn(3, 2, generator=stream(number), dtype=torch.float64)
        parameter.grad = gradient
        optimiser.step()
        weights, state = algorithm.STEPS[name](weights, {"w": gradient}, state, scalar(0.05), number)
        torch.testing.assert_close(weights["w"], parameter.detach(), rtol=1e-12, atol=1e-14)
