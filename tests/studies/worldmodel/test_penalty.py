"""The penalty against exact Jacobians.

With all C_o unit vectors of the axes as projections the estimator is no estimate any more: C_o times the mean of
||e_i^T J||^2 is ||J||_F^2. Jacobians come from `torch.func.jacrev`, which knows nothing of the estimator.
"""

from __future__ import annotations

import pytest
import torch

from jacnorm.studies.worldmodel import rssm
from jacnorm.studies.worldmodel.penalty import (
    ROOT_EPSILON,
    Projections,
    cell_penalty,
    directions,
    penalty,
    squared_norm,
)
from jacnorm.studies.worldmodel.rssm import Sizes

torch.set_num_threads(1)

SIZES = Sizes(deter=4, groups=2, classes=3, hidden=3)
R, N = 2, 5


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def model():
    found = rssm.initial(SIZES, [source(run) for run in range(R)])
    return {
        name: (each + 0.3 * torch.randn(each.shape, generator=source(len(name)))).double().requires_grad_()
        for name, each in found.items()
        if name.startswith(("sequence", "prior"))
    }


def transitions():
    return [torch.randn(R, N, n, generator=source(n)).double() for n in (SIZES.deter, SIZES.latent, 1)]


def axes(size):
    """Every axis of the outputs as a projection, (size, R, N, size)."""
    return torch.eye(size, dtype=torch.float64)[:, None, None].expand(size, R, N, size)


ALL = Projections(axes(SIZES.deter), axes(SIZES.latent))


def exact(parameters, h, z, a, wrt, include_prior):
    """Squared norms (R, N), differentiable, one transition at a time."""
    found = []
    for run in range(R):
        own = {name: each[run : run + 1] for name, each in parameters.items()}

        def f(h, z, a, own=own):
            return rssm.f(own, h[None, None], z[None, None], a[None, None])[0, 0]

        def prior(h, own=own):
            return rssm.prior_logits(own, h[None, None])[0, 0].unflatten(-1, (-1, SIZES.classes)).softmax(-1)

        for i in range(N):
            inputs = h[run, i], z[run, i], a[run, i]
            parts = [torch.func.jacrev(f, argnums={"h": 0, "z": 1}[name])(*inputs) for name in wrt]
            parts += [torch.func.jacrev(prior)(h[run, i])] if include_prior else []
            found.append(sum(part.square().sum() for part in parts))
    return torch.stack(found).view(R, N)


def ours(parameters, h, z, a, mask, projections=ALL, **options):
    return penalty(
        lambda h, z, a: rssm.f(parameters, h, z, a, twice=True),
        lambda h: rssm.prior(parameters, h, SIZES.classes, twice=True),
        h, z, a, mask, projections, **options,
    )  # fmt: skip


@pytest.mark.parametrize("include_prior", [False, True])
@pytest.mark.parametrize("wrt", [["h"], ["z"], ["h", "z"]])
@pytest.mark.parametrize("power", [1, 2])
def test_penalty_and_its_gradient_are_those_of_exact_jacobians(wrt, include_prior, power):
    parameters, (h, z, a) = model(), transitions()
    mask = torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])
    squares = exact(parameters, h, z, a, wrt, include_prior)
    each = squares if power == 2 else (squares + ROOT_EPSILON).sqrt()
    expected = torch.stack([each[run][mask[run]].mean() for run in range(R)])
    found = ours(parameters, h, z, a, mask, wrt=wrt, include_prior=include_prior, power=power)
    assert torch.allclose(found, expected, rtol=1e-10)
    used = {name: each for name, each in parameters.items() if include_prior or name.startswith("sequence")}
    used.pop("prior.output_bias", None) if not include_prior else None
    gradients = [
        torch.autograd.grad(value.sum(), list(used.values()), allow_unused=True) for value in (found, expected)
    ]
    for name, one, other in zip(used, *gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-10), name


def test_inputs_get_no_gradient():
    parameters, inputs = model(), [each.requires_grad_() for each in transitions()]
    found = ours(parameters, *inputs, torch.ones(R, N, dtype=torch.bool))
    assert torch.autograd.grad(found.sum(), inputs, allow_unused=True) == (None, None, None)


def test_the_estimator_has_no_bias():
    parameters, (h, z, a) = model(), transitions()
    mask = torch.ones(R, N, dtype=torch.bool)
    draws = 400
    with torch.no_grad():
        expected = exact(parameters, h, z, a, ["h", "z"], True).mean(1)
    estimates = []
    stream = source(7)
    for _ in range(draws):
        sizes = (SIZES.deter, SIZES.latent)
        drawn = Projections(*(directions((1, R, N, size), stream).double() for size in sizes))
        estimates.append(ours(parameters, h, z, a, mask, drawn).detach())
    found = torch.stack(estimates)  # (draws, R)
    assert ((found.mean(0) - expected).abs() < 4 * found.std(0) / draws**0.5).all()


def test_several_projections_are_averaged():
    parameters, (h, z, a) = model(), transitions()
    mask, stream = torch.ones(R, N, dtype=torch.bool), source(8)
    f, prior = (directions((3, R, N, size), stream).double() for size in (SIZES.deter, SIZES.latent))
    together = ours(parameters, h, z, a, mask, Projections(f, prior))
    alone = [ours(parameters, h, z, a, mask, Projections(f[i : i + 1], prior[i : i + 1])) for i in range(3)]
    assert torch.allclose(together, torch.stack(alone).mean(0))


def test_directions_are_unit_vectors_without_a_preferred_one():
    found = directions((20_000, 3), source(9))
    assert torch.allclose(found.norm(dim=1), torch.ones(20_000))
    assert torch.allclose(found.T @ found / 20_000, torch.eye(3) / 3, atol=0.01)


def test_a_linear_map_has_the_norm_of_its_matrix():
    matrix = torch.randn(6, 4, generator=source(1)).double()
    x = torch.randn(R, N, 6, generator=source(2)).double()
    found = squared_norm(lambda x: x @ matrix, [x], axes(4))
    assert torch.allclose(found, matrix.square().sum().expand(R, N))


def test_plain_weights_of_a_cell_give_the_norm_of_its_jacobian():
    size, width = 4, 3
    kernel, scale, offset = (
        torch.randn(*shape, generator=source(sum(shape))).double()
        for shape in ((size + width, 3 * size), (3 * size,), (3 * size,))
    )
    h, x = (torch.randn(N, n, generator=source(n)).double() for n in (size, width))

    def cell(h, x):
        parts = torch.nn.functional.layer_norm(torch.cat([h, x]) @ kernel, (3 * size,), scale, offset, 1e-3)
        reset, candidate, update = parts.chunk(3)
        gate = torch.sigmoid(update - 1)
        return gate * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - gate) * h

    jacobians = torch.func.vmap(torch.func.jacrev(cell, argnums=(0, 1)))(h, x)
    expected = sum(each.square().sum((1, 2)) for each in jacobians).mean()
    found = cell_penalty(kernel, scale, offset, h, x, torch.eye(size).double()[:, None].expand(size, N, size))
    assert torch.allclose(found, expected)
