"""The stacked model against plain modules, one run and one step at a time."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from jacnorm.studies.worldmodel import rssm
from jacnorm.studies.worldmodel.categorical import gumbel, probabilities
from jacnorm.studies.worldmodel.rssm import Sizes
from jacnorm.studies.worldmodel.settings import PendulumSettings

torch.set_num_threads(1)

SIZES = Sizes(deter=5, groups=2, classes=3, hidden=4)
R, B, T = 2, 3, 6


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def model(runs=R, dtype=torch.float64):
    """Random parameters in which no scale is 1 and no offset 0."""
    found = rssm.initial(SIZES, [source(run) for run in range(runs)])
    return {
        name: (each + 0.3 * torch.randn(each.shape, generator=source(len(name)))).to(dtype)
        for name, each in found.items()
    }


def sequences(runs=R):
    images = torch.rand(runs, B, T, 16, 16, generator=source(1)).double()
    actions = torch.rand(runs, B, T, generator=source(2)).double() * 2 - 1
    first = torch.zeros(runs, B, T, dtype=torch.bool)
    first[:, :, 0] = True
    first[:, 1, 3] = True
    return images, actions, first, gumbel((runs, B, T, SIZES.latent), source(3)).double()


def plain(parameters, run, name, x):
    """A dense layer with LayerNorm, by `nn.LayerNorm`."""
    norm = nn.LayerNorm(parameters[name].shape[2], eps=1e-3).double()
    norm.load_state_dict({"weight": parameters[f"{name}_scale"][run], "bias": parameters[f"{name}_offset"][run]})
    return norm(x @ parameters[name][run])


def test_f_is_the_gru_of_the_formula():
    parameters = model()
    h, z, a = (torch.randn(R, 7, n, generator=source(n)).double() for n in (SIZES.deter, SIZES.latent, 1))
    found = rssm.f(parameters, h, z, a)
    assert torch.equal(found, rssm.f(parameters, h, z, a, twice=True))
    for run in range(R):
        x = functional.silu(plain(parameters, run, "sequence.input", torch.cat([z[run], a[run]], 1)))
        reset, candidate, update = plain(parameters, run, "sequence.gru", torch.cat([h[run], x], 1)).chunk(3, 1)
        gate = (update - 1).sigmoid()
        expected = gate * (reset.sigmoid() * candidate).tanh() + (1 - gate) * h[run]
        assert torch.allclose(found[run], expected, atol=1e-12)


def test_heads_are_dense_layers():
    parameters = model()
    h, z = (torch.randn(R, 7, n, generator=source(n)).double() for n in (SIZES.deter, SIZES.latent))
    state = torch.cat([h, z], 2)
    heads = {
        "prior": (h, rssm.prior_logits(parameters, h)),
        "decoder": (state, rssm.decode(parameters, h, z).flatten(2)),
        "reward": (state, rssm.reward(parameters, h, z).unsqueeze(2)),
    }
    for name, (x, found) in heads.items():
        for run in range(R):
            hidden = functional.silu(plain(parameters, run, f"{name}.hidden0", x[run]))
            expected = hidden @ parameters[f"{name}.output"][run] + parameters[f"{name}.output_bias"][run]
            assert torch.allclose(found[run], expected, atol=1e-12), name
    assert torch.equal(rssm.prior(parameters, h, 3), probabilities(rssm.prior_logits(parameters, h), 3))


def test_observing_a_sequence_is_observing_its_steps():
    parameters, (images, actions, first, noise) = model(), sequences()
    states = rssm.observe(parameters, images, actions, first, noise, SIZES.classes)
    h, z = torch.zeros(R, B, SIZES.deter).double(), torch.zeros(R, B, SIZES.latent).double()
    for t in range(T):
        embedded = rssm.encode(parameters, images[:, :, t])
        h, z = rssm.observe_step(
            parameters, h, z, actions[:, :, t, None], first[:, :, t], embedded, noise[:, :, t], SIZES.classes
        )
        assert torch.allclose(states.h[:, :, t], h, atol=1e-12)
        assert torch.equal(states.z[:, :, t], z)
        expected = rssm.posterior_logits(parameters, h, embedded)
        assert torch.allclose(states.posterior[:, :, t], expected, atol=1e-12)
    assert torch.equal(states.z.unflatten(-1, (2, 3)).sum(-1), torch.ones(R, B, T, 2).double())


def test_a_reset_forgets_everything_before_it_and_the_action_that_led_there():
    parameters, (images, actions, first, noise) = model(), sequences()
    before = rssm.observe(parameters, images, actions, first, noise, SIZES.classes)
    changed_images, changed_actions = images.clone(), actions.clone()
    changed_images[:, 1, :3] = 0.5
    changed_actions[:, 1, :4] = 0.9  # the action at the reset too
    after = rssm.observe(parameters, changed_images, changed_actions, first, noise, SIZES.classes)
    assert torch.equal(before.h[:, 1, 3:], after.h[:, 1, 3:])
    assert torch.equal(before.z[:, 1, 3:], after.z[:, 1, 3:])
    assert not torch.equal(before.h[:, 1, 1:3], after.h[:, 1, 1:3])


def test_an_action_counts_from_the_observation_it_leads_to():
    parameters, (images, actions, first, noise) = model(), sequences()
    before = rssm.observe(parameters, images, actions, first, noise, SIZES.classes)
    changed = actions.clone()
    changed[:, 0, 2] += 0.5
    after = rssm.observe(parameters, images, changed, first, noise, SIZES.classes)
    assert torch.equal(before.h[:, 0, :2], after.h[:, 0, :2])
    assert not torch.isclose(before.h[:, 0, 2], after.h[:, 0, 2]).all()


def test_a_run_of_a_stack_is_the_run_alone():
    parameters, given = model(), sequences()
    together = rssm.observe(parameters, *given, SIZES.classes)
    alone = rssm.observe({name: each[1:] for name, each in parameters.items()}, *(each[1:] for each in given), 3)
    assert torch.allclose(together.h[1], alone.h[0], atol=1e-12)
    assert torch.equal(together.z[1], alone.z[0])


def test_an_error_is_added_to_z_and_reaches_the_next_h():
    parameters, (images, actions, first, noise) = model(), sequences()
    error = torch.zeros(R, B, T, SIZES.latent).double()
    error[:, 0, 1] = 0.25
    clean = rssm.observe(parameters, images, actions, first, noise, SIZES.classes)
    erring = rssm.observe(parameters, images, actions, first, noise, SIZES.classes, error)
    assert torch.equal(erring.z[:, 0, 1], clean.z[:, 0, 1] + 0.25)
    assert torch.equal(erring.h[:, 0, :2], clean.h[:, 0, :2])
    assert not torch.isclose(erring.h[:, 0, 2], clean.h[:, 0, 2]).all()
    assert torch.equal(erring.h[:, 2], clean.h[:, 2])


def test_imagination_samples_the_prior():
    parameters = model()
    h, z, a = (torch.randn(R, 7, n, generator=source(n)).double() for n in (SIZES.deter, SIZES.latent, 1))
    noise = gumbel((R, 7, SIZES.latent), source(4)).double()
    next_h, next_z = rssm.imagine_step(parameters, h, z, a, noise, SIZES.classes)
    assert torch.equal(next_h, rssm.f(parameters, h, z, a))
    largest = (rssm.prior_logits(parameters, next_h) + noise).unflatten(-1, (2, 3)).argmax(-1)
    assert torch.equal(next_z.unflatten(-1, (2, 3)).argmax(-1), largest)


def test_the_start_is_that_of_the_seed_and_knows_no_reward():
    one, two = rssm.initial(SIZES, [source(5)]), rssm.initial(SIZES, [source(4), source(5)])
    assert {name: tuple(each.shape[1:]) for name, each in two.items()} == rssm.shapes(SIZES)
    for name, each in one.items():
        assert torch.equal(each[0], two[name][1])
    h, z = torch.randn(1, 3, SIZES.deter), torch.randn(1, 3, SIZES.latent)
    assert not rssm.reward(one, h, z).any()


def test_sizes_are_those_of_the_settings():
    found = Sizes.of(PendulumSettings(deter=7, groups=2, classes=5, hidden=3))
    assert (found.deter, found.latent, found.state, found.embedding) == (7, 10, 17, 12)


def test_gradients_reach_every_parameter():
    parameters, given = {name: each.requires_grad_() for name, each in model().items()}, sequences()
    states = rssm.observe(parameters, *given, SIZES.classes)
    h, z = states.h.flatten(1, 2), states.z.flatten(1, 2)
    outputs = (rssm.decode(parameters, h, z), rssm.reward(parameters, h, z), rssm.prior_logits(parameters, h))
    found = torch.autograd.grad(sum(each.square().sum() for each in outputs), list(parameters.values()))
    for name, each in zip(parameters, found, strict=True):
        assert each.flatten(1).norm(dim=1).min() > 0, name


def test_noise_and_actions_may_come_in_groups():
    parameters, (images, actions, first, noise) = model(), sequences()
    flat = rssm.observe(parameters, images, actions, first, noise, 3)
    grouped = rssm.observe(parameters, images, actions.unsqueeze(-1), first, noise.unflatten(-1, (-1, 3)), 3)
    assert torch.equal(flat.z, grouped.z)
