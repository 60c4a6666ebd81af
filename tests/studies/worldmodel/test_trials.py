"""Episodes played: who sees what when, common random numbers, and policies whose return is known."""

from __future__ import annotations

import pytest
import torch
from tests.studies.worldmodel.agents_at_random import small, stack

from jacnorm.studies.worldmodel import actor as actors
from jacnorm.studies.worldmodel import rssm, trials
from jacnorm.studies.worldmodel.pendulum import Pendulum
from jacnorm.studies.worldmodel.perturbations import Condition, perturb
from jacnorm.studies.worldmodel.trials import Trials

torch.set_num_threads(1)

CPU = torch.device("cpu")
SETTINGS = small()
CLEAN = Condition("clean", 0.0)
CONDITIONS = [
    CLEAN,
    Condition("gauss", 0.3),
    Condition("mask", 0.5),
    Condition("rotation", 20.0),
    Condition("gravity", 0.5),
]


def agent(settings=SETTINGS):
    return stack(settings, 0), stack(settings, 7, parts=actors)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_returns_of_a_constant_action_are_those_of_the_pendulum(factor):
    played = Trials.of(SETTINGS, CPU)
    model, actor = agent()
    actor["actor.output"][:] = 0
    actor["actor.output_bias"][:] = 0.4
    pendulum = Pendulum(SETTINGS.gravity * factor)
    pendulum.reset(played.angle, played.velocity)
    expected = sum(pendulum.step(torch.full((2, 4), 0.4).tanh()) for _ in range(SETTINGS.evaluation_steps))
    found = played.returns(model, actor, Condition("gravity", factor))
    assert torch.allclose(found, expected, atol=1e-6)
    # such a policy does not look
    assert factor != 1.0 or torch.equal(played.returns(model, actor, CONDITIONS[1]), found)


def test_the_random_policy_plays_its_actions_from_the_same_starts():
    played = Trials.of(SETTINGS, CPU)
    for factor in (1.0, 1.5):
        pendulum = Pendulum(SETTINGS.gravity * factor)
        pendulum.reset(played.angle, played.velocity)
        expected = sum(pendulum.step(each) for each in played.random)
        assert torch.equal(played.random_returns(Condition("gravity", factor)), expected)
    assert played.velocity.abs().max() <= 1
    assert played.angle.abs().max() <= torch.pi


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda each: each.perturbation)
def test_the_agent_acts_on_what_filtering_the_perturbed_images_gives(condition, monkeypatch):
    """Filter all images at once, each after the action that led to it: the actor's actions have to be those played."""
    actions, images = [], []

    class Recorded(Pendulum):
        def image(self):
            images.append(super().image())
            return images[-1]

        def step(self, action):
            actions.append(action)
            return super().step(action)

    played, (model, actor) = Trials.of(SETTINGS, CPU), agent()
    monkeypatch.setattr(trials, "Pendulum", Recorded)
    played.returns(model, actor, condition)
    assert len(images) == len(actions) == SETTINGS.evaluation_steps
    seen = [
        perturb(image.flatten(0, 1), condition, SETTINGS, noise).view_as(image)
        for image, noise in zip(images, played.noise, strict=True)
    ]
    before = torch.stack([torch.zeros_like(actions[0]), *actions[:-1]], 2)
    first = torch.zeros_like(before, dtype=torch.bool)
    first[:, :, 0] = True
    states = rssm.observe(
        model, torch.stack(seen, 2), before, first, torch.stack(list(played.latents), 2), SETTINGS.classes
    )
    expected = actors.act(actor, states.h.flatten(1, 2), states.z.flatten(1, 2)).view(2, 4, -1)
    assert torch.allclose(torch.stack(actions, 2), expected, atol=1e-5)
    assert expected.std() > 0.01
    if condition.perturbation not in ("clean", "gravity"):
        assert not torch.equal(seen[0], images[0])


def test_a_seed_plays_the_same_alone():
    together, alone = Trials.of(SETTINGS, CPU), Trials.of(small(seeds=[11]), CPU)
    model, actor = agent()
    for condition in CONDITIONS:
        both = together.returns(model, actor, condition)
        one = alone.returns(*({name: each[1:] for name, each in part.items()} for part in (model, actor)), condition)
        assert torch.allclose(both[1:], one, atol=1e-5)
        assert not torch.allclose(both[:1], one, atol=1e-3)
        assert torch.equal(together.random_returns(condition)[1:], alone.random_returns(condition))


def test_conditions_share_starts_noise_and_latents():
    """A perturbation too small for 256 levels leaves every return as it was, bit for bit."""
    played, (model, actor) = Trials.of(SETTINGS, CPU), agent()
    clean = played.returns(model, actor, CLEAN)
    assert torch.equal(played.returns(model, actor, Condition("gauss", 1e-12)), clean)
    assert torch.equal(played.returns(model, actor, CLEAN), clean)
    assert not torch.equal(played.returns(model, actor, Condition("mask", 1.0)), clean)
