"""The exact formulas against SciPy's solvers, and the simulation against a loop over steps and against the formulas."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import scipy.linalg
import torch

from jacnorm.studies.worldmodel.expansion import DIFFUSION, System, cases, exact, simulate, system
from jacnorm.studies.worldmodel.settings import ExpansionSettings

torch.set_num_threads(1)

EPSILONS = torch.tensor([0.05, 0.3], dtype=torch.float64)


def general(matrices=3, size=4, seed=0):
    """A system without any symmetry, so that a transpose too many or too few shows."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    root = normal(size, size)
    return System(normal(matrices, size, size) / 2, normal(size), normal(size), root @ root.T)


def scalar(a):
    one = torch.ones(1, dtype=torch.float64)
    return System(torch.full((1, 1, 1), a, dtype=torch.float64), 0.5 * one, 2 * one, torch.eye(1, dtype=torch.float64))


# --- the exact formulas ----------------------------------------------------------------------------------------------


def test_the_even_part_is_that_of_the_lyapunov_equation():
    # A Sigma + Sigma A^T = e^A e^(A^T) - I, solved by SciPy without any integral.
    linear = general()
    even, _ = exact(linear, EPSILONS)
    for number, a in enumerate(linear.a.numpy()):
        flow = scipy.linalg.expm(a)
        sigma = scipy.linalg.solve_continuous_lyapunov(a, flow @ flow.T - np.eye(4))
        expected = EPSILONS.numpy() ** 2 / 2 * np.trace(linear.hessian.numpy() @ sigma)
        assert even[number].numpy() == pytest.approx(expected, rel=1e-9)


def test_the_odd_part_is_that_of_quadrature():
    nodes, weights = np.polynomial.legendre.leggauss(20)  # exact to rounding for entire functions this tame
    linear = general()
    _, odd = exact(linear, EPSILONS)
    mu, start, hessian = linear.drift.numpy(), linear.start.numpy(), linear.hessian.numpy()
    for number, a in enumerate(linear.a.numpy()):
        m = sum(w / 2 * scipy.linalg.expm(a * (1 + x) / 2) @ mu for x, w in zip(nodes, weights, strict=True))
        expected = EPSILONS.numpy() * (m @ hessian @ scipy.linalg.expm(a) @ start)
        assert odd[number].numpy() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("a", [-1.5, 0.0, 0.7])
def test_one_dimension_is_done_by_hand(a):
    even, odd = exact(scalar(a), EPSILONS)
    sigma = (math.exp(2 * a) - 1) / (2 * a) if a else 1.0
    m = 0.5 * ((math.exp(a) - 1) / a if a else 1.0)
    assert even[0].tolist() == pytest.approx([e**2 * sigma / 2 for e in (0.05, 0.3)], rel=1e-12)
    assert odd[0].tolist() == pytest.approx([e * m * math.exp(a) * 2 for e in (0.05, 0.3)], rel=1e-12)


def test_a_drift_the_other_way_reverses_the_odd_part_only():
    linear = general()
    reversed_ = System(linear.a, -linear.drift, linear.start, linear.hessian)
    (even, odd), (even_too, odd_too) = exact(linear, EPSILONS), exact(reversed_, EPSILONS)
    assert torch.equal(even, even_too)
    assert torch.allclose(odd, -odd_too, rtol=1e-12)
    assert (odd > 0).any()
    assert (odd < 0).any()  # it has either sign


# --- the simulation --------------------------------------------------------------------------------------------------


def loss_changes(linear, draws, steps, seed):
    """Every path stepped by itself: loss changes by matrix, epsilon, sign of epsilon and drift, (P,) each."""
    source = torch.Generator().manual_seed(seed)
    size = linear.dimension
    base, error = (
        (torch.randn(draws, steps * size, generator=source, dtype=torch.float64) / math.sqrt(steps)).reshape(
            draws, steps, size
        )
        for _ in range(2)
    )

    def loss(a, epsilon, drift):
        x = linear.start.expand(draws, size)
        for step in range(steps):
            x = (
                x
                + x @ a.T / steps
                + DIFFUSION * base[:, step]
                + epsilon * (drift * linear.drift / steps + error[:, step])
            )
        return torch.einsum("pi,ij,pj->p", x, linear.hessian, x) / 2

    return {
        (number, epsilon, sign, drift): loss(a, sign * epsilon, drift) - loss(a, 0.0, drift)
        for number, a in enumerate(linear.a)
        for epsilon in EPSILONS.tolist()
        for sign in (1, -1)
        for drift in (0, 1, -1)
    }


def test_one_product_takes_the_place_of_all_steps():
    linear, draws, steps = general(), 50, 7
    found = simulate(linear, EPSILONS, draws, steps, torch.Generator().manual_seed(4))
    changes = loss_changes(linear, draws, steps, 4)
    for number in range(3):
        for column, epsilon in enumerate(EPSILONS.tolist()):

            def part(sign, drift, at=(number, epsilon)):
                return (changes[*at, 1, drift] + sign * changes[*at, -1, drift]) / 2

            even, odd, reversed_ = part(1, 0), part(-1, 1), part(-1, -1)
            expected = {
                "even": even.mean(),
                "even_error": even.std() / math.sqrt(draws),
                "odd": odd.mean(),
                "odd_error": odd.std() / math.sqrt(draws),
                "odd_reversed": reversed_.mean(),
            }
            for name, value in expected.items():
                assert getattr(found, name)[number, column].item() == pytest.approx(value.item(), rel=1e-8), name


def test_simulated_parts_cover_the_formulas():
    # 200 steps of matrices with norm 1 are off by well below the standard error of 1000 draws; 20 sets of paths.
    settings = ExpansionSettings(matrices=2)
    linear = system(settings, torch.stack([case.a for case in cases(settings, 0)[:2]]))
    even, odd = exact(linear, EPSILONS)
    outside = []
    for seed in range(20):
        found = simulate(linear, EPSILONS[:1], 1000, 200, torch.Generator().manual_seed(seed))
        for mean, error, expected in (
            (found.even, found.even_error, even),
            (found.odd, found.odd_error, odd),
            (-found.odd_reversed, found.odd_error, odd),
        ):
            outside.append((mean - expected[:, :1]).abs() > 1.96 * error)
    share = torch.stack(outside).double().mean().item()
    assert 0.0 < share < 0.15  # about 0.05 of 120 intervals


def test_a_sum_of_chunks_is_the_sum_of_all_draws():
    linear = general(matrices=1)
    whole = simulate(linear, EPSILONS, 7000, 2, torch.Generator().manual_seed(0))
    source = torch.Generator().manual_seed(0)
    parts = [simulate(linear, EPSILONS, count, 2, source) for count in (5000, 2000)]
    for name in ("even", "odd", "odd_reversed"):
        expected = (5 * getattr(parts[0], name) + 2 * getattr(parts[1], name)) / 7
        assert torch.allclose(getattr(whole, name), expected, rtol=1e-10)


def test_a_matrix_alone_has_the_paths_it_has_among_others():
    linear = general()
    together = simulate(linear, EPSILONS, 100, 5, torch.Generator().manual_seed(0))
    for number in range(3):
        alone = System(linear.a[number : number + 1], linear.drift, linear.start, linear.hessian)
        found = simulate(alone, EPSILONS, 100, 5, torch.Generator().manual_seed(0))
        for field in fields(found):
            one, all_ = getattr(found, field.name)[0], getattr(together, field.name)[number]
            assert torch.allclose(one, all_, rtol=1e-9)


# --- matrices --------------------------------------------------------------------------------------------------------


def test_matrices_have_the_norms_and_families_they_say():
    settings = ExpansionSettings(matrices=3, scales=[0.5, 2.0])
    found = cases(settings, 0)
    assert len(found) == 3 + 2 + 3 * 2
    for case in found:
        assert case.a.norm().item() == pytest.approx(case.scale)
        if case.family == "identity":
            assert torch.allclose(case.a, case.scale / 2 * torch.eye(4, dtype=torch.float64))
        if case.family == "semidefinite":
            assert torch.equal(case.a, case.a.T)
            assert torch.linalg.eigvalsh(case.a).min() > -1e-12
    semidefinite = {(case.matrix, case.scale): case.a for case in found if case.family == "semidefinite"}
    for number in range(3):
        assert torch.allclose(4 * semidefinite[number, 0.5], semidefinite[number, 2.0])
    assert len({tuple(case.a.flatten().tolist()) for case in found}) == len(found)


def test_a_matrix_does_not_depend_on_how_many_follow():
    few, many = (cases(ExpansionSettings(matrices=count), 0) for count in (2, 5))
    first = {(case.family, case.matrix, case.scale): case.a for case in many}
    assert all(torch.equal(case.a, first[case.family, case.matrix, case.scale]) for case in few)
    assert not torch.equal(few[0].a, cases(ExpansionSettings(matrices=2), 1)[0].a)


def test_families_let_both_parts_grow_with_their_factor():
    # What Section 4 of the paper argues, where it holds without exception: symmetric A >= 0, mu along x_0.
    settings = ExpansionSettings()
    found = [case for case in cases(settings, 0) if case.family != "random"]
    parts = exact(system(settings, torch.stack([case.a for case in found])), EPSILONS)
    for part in parts:
        assert (part[:, 0].unflatten(0, (5, 6)).diff(dim=1) > 0).all()
