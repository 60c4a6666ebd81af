"""Norms of a transition's Jacobians against finite differences of the maps themselves, the composed one as a whole."""

from __future__ import annotations

import pytest
import torch
from tests.studies.worldmodel.agents_at_random import small, stack

from jacnorm.jacobian import NonFiniteValue
from jacnorm.studies.worldmodel import rssm
from jacnorm.studies.worldmodel.transition_norms import NORMS, norms

torch.set_num_threads(1)

SETTINGS = small(seeds=[3])
LATENT = SETTINGS.groups * SETTINGS.classes
N = 4


def inputs():
    source = torch.Generator().manual_seed(1)
    sizes = (SETTINGS.deter, LATENT, 1)
    return [torch.randn(N, size, generator=source, dtype=torch.float64) for size in sizes]


def slopes(function, x, step=1e-6):
    """Central differences, (N, outputs, inputs), of a function of (N, inputs)."""
    columns = []
    for i in range(x.shape[1]):
        by = torch.zeros_like(x)
        by[:, i] = step
        columns.append((function(x + by) - function(x - by)) / (2 * step))
    return torch.stack(columns, 2)


def test_norms_are_those_of_finite_differences():
    model = stack(SETTINGS, 0, dtype=torch.float64)
    h, z, a = inputs()

    def after(h, z):
        return rssm.f(model, h[None], z[None], a[None])[0]

    def prior(h):
        return torch.softmax(rssm.prior_logits(model, h[None])[0].unflatten(1, (-1, SETTINGS.classes)), 2).flatten(1)

    def composed(both):
        following = after(*both.split([SETTINGS.deter, LATENT], 1))
        return torch.cat([following, prior(following)], 1)

    found = norms(model, h, z, a, SETTINGS.classes)
    by_h, by_z = slopes(lambda h: after(h, z), h), slopes(lambda z: after(h, z), z)
    whole = slopes(composed, torch.cat([h, z], 1))
    frobenius = lambda j: j.square().sum((1, 2)).sqrt()  # noqa: E731
    length = h.square().sum(1).sqrt()
    expected = {
        "f_h": frobenius(by_h),
        "f_h_spectral": torch.linalg.svdvals(by_h)[:, 0],
        "f_z": frobenius(by_z),
        "p_h": frobenius(slopes(prior, after(h, z))),
        "composed": frobenius(whole),
        "composed_prior": frobenius(whole[:, SETTINGS.deter :]),
        "h_norm": length,
        "relative": frobenius(by_h) * length / after(h, z).square().sum(1).sqrt(),
    }
    assert set(found) == set(expected) == set(NORMS)
    for name, values in expected.items():
        assert found[name].shape == (N,)
        assert torch.allclose(found[name], values, rtol=1e-6), name
        assert (found[name] > 0.01).all(), name  # nothing is trivially equal


def test_single_precision_is_measured_in_double():
    model = stack(SETTINGS, 0)
    h, z, a = (each.float() for each in inputs())
    precise = {name: tensor.double() for name, tensor in model.items()}
    found, expected = norms(model, h, z, a, 3), norms(precise, h.double(), z.double(), a.double(), 3)
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == torch.float64 for name in NORMS)


def test_a_shut_gate_is_the_identity():
    """With h' = h the norm of f is sqrt(D), and that of the composed map sqrt(D + ||dp/dh||^2)."""
    model = stack(SETTINGS, 0, dtype=torch.float64)
    d = SETTINGS.deter
    model["sequence.gru_scale"][:, 2 * d :] = 0
    model["sequence.gru_offset"][:, 2 * d :] = -200.0  # the logistic function of it is 0 in floats: h' = h
    h, z, a = inputs()
    found = norms(model, h, z, a, SETTINGS.classes)
    ones = torch.ones(N, dtype=torch.float64)
    assert torch.allclose(found["f_h"], d**0.5 * ones)
    assert torch.allclose(found["f_h_spectral"], ones)
    assert torch.allclose(found["f_z"], 0 * ones, atol=1e-12)
    assert torch.allclose(found["composed_prior"], found["p_h"])
    assert torch.allclose(found["composed"].square(), d + found["p_h"].square())
    assert torch.allclose(found["relative"], found["f_h"])


def test_inputs_that_are_not_finite_are_refused():
    h, z, a = inputs()
    h[2, 0] = torch.nan
    with pytest.raises(NonFiniteValue):
        norms(stack(SETTINGS, 0), h, z, a, SETTINGS.classes)
