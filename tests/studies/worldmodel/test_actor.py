"""Actor and critic: returns by their definition, where gradients go, and what is learnt."""

from __future__ import annotations

import pytest
import torch

from jacnorm.studies.worldmodel import actor, rssm
from jacnorm.studies.worldmodel.actor import Draws, Imagined
from jacnorm.studies.worldmodel.categorical import gumbel
from jacnorm.studies.worldmodel.rssm import Sizes
from jacnorm.studies.worldmodel.settings import PendulumSettings
from jacnorm.training.stacked import StackedAdam, gradients

torch.set_num_threads(1)

SIZES = Sizes(deter=4, groups=2, classes=3, hidden=5)
R, N, H = 2, 6, 4
SETTINGS = PendulumSettings(discount=0.9, return_lambda=0.8, entropy=0.0)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def random(stack, scale=0.3):
    return {name: each + scale * torch.randn(each.shape, generator=source(len(name))) for name, each in stack.items()}


def agents():
    generators = [source(run) for run in range(R)]
    return random(actor.initial(SIZES, generators)), random(rssm.initial(SIZES, generators))


def starts():
    return torch.randn(R, N, SIZES.deter, generator=source(1)), torch.rand(R, N, SIZES.latent, generator=source(2))


def draws(seed=3):
    return Draws(torch.randn(R, H, N, 1, generator=source(seed)), gumbel((R, H, N, SIZES.latent), source(seed)))


def test_lambda_returns_mix_the_returns_of_every_number_of_steps():
    """(1 - l) sum_n l^(n-1) G^(n) + l^(m-1) G^(m), G^(n) of n rewards and a value (Sutton and Barto, eq. 12.3)."""
    rewards, values = (torch.rand(1, H, 1, generator=source(n), dtype=torch.float64) for n in (1, 2))
    discount, mixing = 0.9, 0.7
    found = actor.lambda_returns(rewards, values, discount, mixing).flatten()
    r, v = rewards.flatten().tolist(), values.flatten().tolist()
    for t in range(H):
        left = H - t
        n_step = [
            sum(discount**k * r[t + k] for k in range(n)) + discount**n * v[t + n - 1] for n in range(1, left + 1)
        ]
        expected = (1 - mixing) * sum(mixing ** (n - 1) * n_step[n - 1] for n in range(1, left))
        expected += mixing ** (left - 1) * n_step[-1]
        assert found[t].item() == pytest.approx(expected, rel=1e-12)


def test_imagination_follows_the_model_step_by_step():
    parameters, model = agents()
    (h, z), noise = starts(), draws()
    found = actor.imagine(parameters, model, h, z, noise, SIZES.classes)
    assert found.h.shape == (R, H + 1, N, SIZES.deter)
    for t in range(H):
        mean, deviation = actor.distribution(parameters, h, z)
        normal = torch.distributions.Normal(mean, deviation)
        a = (mean + deviation * noise.action[:, t]).clamp(-1, 1)
        h, z = rssm.imagine_step(model, h, z, a, noise.latent[:, t], SIZES.classes)
        assert torch.allclose(found.h[:, t + 1], h, atol=1e-6)
        assert torch.equal(found.z[:, t + 1], z)
        assert torch.allclose(found.entropy[:, t], normal.entropy().sum(-1), atol=1e-6)


def test_actions_stay_in_their_range_and_deviations_in_theirs():
    parameters = {name: 50 * each for name, each in agents()[0].items()}
    mean, deviation = actor.distribution(parameters, *starts())
    assert mean.abs().max() <= 1
    assert deviation.min() >= 0.1
    assert deviation.max() <= 1
    assert torch.equal(actor.act(parameters, *starts()), mean)


def test_the_start_acts_and_values_alike_everywhere():
    fresh = actor.initial(SIZES, [source(run) for run in range(R)])
    mean, deviation = actor.distribution(fresh, *starts())
    assert not mean.any()
    assert (deviation == deviation[0, 0, 0]).all()
    assert not actor.value(fresh, *starts()).any()


def test_each_loss_trains_its_own_network():
    parameters, model = agents()
    leaves = {name: each.requires_grad_() for name, each in parameters.items()}
    imagined = actor.imagine(leaves, model, *starts(), draws(), SIZES.classes)
    found = actor.losses(leaves, model, imagined, SETTINGS)
    for loss, own in (("actor_loss", "actor"), ("critic_loss", "critic")):
        each = torch.autograd.grad(found[loss].sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(leaves, each, strict=True):
            assert (gradient is not None and bool(gradient.any())) == name.startswith(own), (loss, name)


def test_losses_are_discounted_means():
    parameters, model = agents()
    settings = SETTINGS.model_copy(update={"entropy": 0.5})
    imagined = actor.imagine(parameters, model, *starts(), draws(), SIZES.classes)
    found = actor.losses(parameters, model, imagined, settings)
    rewards, values = (
        torch.stack([of(imagined.h[:, t], imagined.z[:, t]) for t in range(H + 1)], 1)
        for of in (lambda h, z: rssm.reward(model, h, z), lambda h, z: actor.value(parameters, h, z))
    )
    returns = actor.lambda_returns(rewards[:, 1:], values[:, 1:], 0.9, 0.8)
    gain, miss = torch.zeros(R), torch.zeros(R)
    for t in range(H):
        gain += 0.9**t * (returns[:, t] + 0.5 * imagined.entropy[:, t]).mean(1) / H
        miss += 0.9**t * (values[:, t] - returns[:, t]).square().mean(1) / H
    assert torch.allclose(found["actor_loss"], -gain, atol=1e-5)
    assert torch.allclose(found["critic_loss"], miss, atol=1e-5)
    assert torch.allclose(found["return"], returns[:, 0].mean(1), atol=1e-5)


def test_training_raises_the_imagined_return_and_the_critic_comes_to_know_it():
    parameters, (_, model) = actor.initial(SIZES, [source(run) for run in range(R)]), agents()
    model["sequence.input"][:, -1] *= 10  # the action matters, and the reward sees what it does to h
    model["reward.hidden0"][:, SIZES.deter :] = 0
    optimiser = StackedAdam(parameters, 0.02)
    history = []

    def losses(leaves):
        imagined = actor.imagine(leaves, model, *starts(), noise, SIZES.classes)
        found = actor.losses(leaves, model, imagined, SETTINGS)
        history.append(torch.stack([found["return"], found["critic_loss"].detach()]))
        return found["actor_loss"] + found["critic_loss"]

    for update in range(150):
        noise = draws(10 + update)
        optimiser.step(gradients(losses, parameters)[1])
    fixed = draws(1000)
    with torch.no_grad():
        first, last = (
            rssm.reward(model, *(each[:, 1:].flatten(1, 2) for each in (imagined.h, imagined.z))).mean(1)
            for imagined in (
                actor.imagine(each, model, *starts(), fixed, SIZES.classes)
                for each in (actor.initial(SIZES, [source(run) for run in range(R)]), parameters)
            )
        )
    assert (last > first).all()
    critic = torch.stack(history)[:, 1]  # (updates, R)
    assert (critic[-20:].mean(0) < critic[:5].mean(0)).all()


def test_entropy_is_that_of_a_normal():
    imagined = actor.imagine(*agents(), *starts(), draws(), SIZES.classes)
    assert isinstance(imagined, Imagined)
    assert imagined.entropy.max() <= torch.distributions.Normal(0.0, 1.0).entropy()
