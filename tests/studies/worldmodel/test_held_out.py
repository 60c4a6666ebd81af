"""Filtered states and rollouts: which step is whose, closed forms of models set by hand, resets, shared noise."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from tests.studies.worldmodel.agents_at_random import small, stack

from jacnorm.studies.worldmodel import episodes as study_episodes
from jacnorm.studies.worldmodel import rssm
from jacnorm.studies.worldmodel.episodes import held_out_episodes
from jacnorm.studies.worldmodel.held_out import DRAWS, HeldOut, predicted_images, roll, rollouts

torch.set_num_threads(1)

CPU = torch.device("cpu")
SETTINGS = small()
D, LATENT, C = SETTINGS.deter, SETTINGS.groups * SETTINGS.classes, SETTINGS.classes


def precise(held_out):
    """The same in float64."""
    names = [each.name for each in fields(held_out) if getattr(held_out, each.name).dtype == torch.float32]
    return replace(held_out, **{name: getattr(held_out, name).double() for name in names})


def gated(model, update):
    """The model with its update gate fixed: -200 keeps h, 200 forgets it."""
    model["sequence.gru_scale"][:] = 0
    model["sequence.gru_offset"][:, 2 * D :] = update
    return model


def test_a_seed_has_the_same_episodes_and_draws_alone():
    together, alone = HeldOut.of(SETTINGS, CPU), HeldOut.of(small(seeds=[11]), CPU)
    for each in fields(HeldOut):
        mine, its = getattr(together, each.name)[1], getattr(alone, each.name)[0]
        assert torch.equal(mine, its), each.name
        assert each.name == "first" or not torch.equal(getattr(together, each.name)[0], its), each.name
    assert torch.equal(together.images[0] * 255, held_out_episodes(SETTINGS, 10).image.float())


def test_longer_rollouts_begin_with_the_noise_of_shorter_ones():
    longer, shorter = (HeldOut.of(small(horizons=each), CPU) for each in ([1, 8], [5]))
    assert torch.equal(longer.rollout_noise[:, :5], shorter.rollout_noise)
    assert torch.equal(longer.noise, shorter.noise)


def test_the_model_leads_from_chosen_starts_to_the_next_state():
    """The next state f(h, z, a) has to be the one that filtering reached one step later: nothing is off by one."""
    held_out, model = HeldOut.of(SETTINGS, CPU), stack(SETTINGS, 0)
    states = held_out.states(model, C)
    h, z, a = held_out.starts(states)
    assert h.shape == (2, 10, D)
    assert z.shape == (2, 10, LATENT)
    following = rssm.f(model, h, z, a)
    for run in range(2):
        chosen = held_out.transitions[run]
        assert len(set(chosen.tolist())) == 10
        reached = states.h[run].flatten(0, 1)[chosen + 1]
        assert torch.allclose(following[run], reached, atol=1e-6)
    assert not torch.allclose(following, h, atol=0.05)


def with_resets(tmp_path, at):
    """Settings with own episodes that have a reset at the given (episode, step)."""
    found = study_episodes.generate(SETTINGS, 0, 5, "own")
    for episode, step in at:
        for name, value in (("first", True), ("action", 0), ("reward", 0)):
            getattr(found, name)[episode, step] = value
    study_episodes.save(tmp_path / "own.safetensors", found)
    return small(episodes_path=str(tmp_path / "own.safetensors"), jacobian_transitions=1000)


def test_no_transition_crosses_a_reset(tmp_path):
    # Episodes 2 to 4 are held out; they have 3 * 12 transitions, and three resets take one each.
    settings = with_resets(tmp_path, [(0, 5), (2, 1), (3, 12), (4, 7)])
    chosen = HeldOut.of(settings, CPU).transitions
    assert chosen.shape == (2, 3 * 12 - 3)
    left_out = {0, 13 + 11, 26 + 6}
    last = {12, 25, 38}
    assert set(chosen[0].tolist()) == set(range(39)) - left_out - last


def test_rollouts_with_a_reset_on_the_way_do_not_count(tmp_path):
    # Observed are steps 0 to 3; a reset at 3 is within the context, one at 4 before horizon 1, one at 8 after 3.
    settings = with_resets(tmp_path, [(2, 3), (3, 4), (4, 8)])
    held_out, model = precise(HeldOut.of(settings, CPU)), stack(settings, 0, dtype=torch.float64)
    found = rollouts(model, held_out, held_out.states(model, C), settings)
    h, z, noise = (
        held_out.states(model, C).h[:, :, 3].repeat_interleave(DRAWS, 1),
        held_out.states(model, C).z[:, :, 3].repeat_interleave(DRAWS, 1),
        held_out.rollout_noise,
    )
    actions = held_out.actions[:, :, 4:12].repeat_interleave(DRAWS, 1).transpose(1, 2)
    later = roll(model, h, z, actions, noise, C)
    for number, (horizon, counted) in enumerate([(1, [0, 2]), (3, [0, 2]), (8, [0])]):
        errors = [
            (rssm.reward(model, later[0][:, horizon - 1], later[1][:, horizon - 1]).view(2, 3, DRAWS)[:, episode]
             - held_out.rewards[:, episode, 3 + horizon, None]).square().mean(1)
            for episode in counted
        ]  # fmt: skip
        assert torch.allclose(found.reward_error[:, number], sum(errors) / len(counted)), horizon
    everywhere = replace(held_out, first=torch.ones_like(held_out.first))
    lost = rollouts(model, everywhere, held_out.states(model, C), settings)
    assert all(getattr(lost, each.name).isnan().all() for each in fields(lost))


@pytest.mark.parametrize(("update", "expected"), [(-200.0, 1.0), (200.0, 0.0)])
def test_divergence_of_a_model_that_keeps_or_forgets_h(update, expected):
    """A model with h' = h carries a disturbance on unchanged; one whose h' does not depend on h ends it at once."""
    held_out = precise(HeldOut.of(SETTINGS, CPU))
    model = gated(stack(SETTINGS, 0, dtype=torch.float64), update)
    states = held_out.states(model, C)
    states = replace(states, h=states.h + 0.3)  # a model that keeps h stays at 0, which has no direction
    found = rollouts(model, held_out, states, SETTINGS)
    assert found.divergence.shape == (2, 3)
    assert torch.allclose(found.divergence, torch.full((2, 3), expected, dtype=torch.float64), atol=1e-12)


def test_a_small_disturbance_grows_by_the_jacobian():
    """At horizon 1 and for a disturbance that tends to 0, the divergence is the mean of ||df/dh d||."""
    settings = small(disturbance=1e-7, horizons=[1])
    held_out = precise(HeldOut.of(settings, CPU))
    model = stack(settings, 0, dtype=torch.float64)
    states = held_out.states(model, C)
    h, z, a = (
        each[:, :, at].repeat_interleave(DRAWS, 1)
        for each, at in ((states.h, 3), (states.z, 3), (held_out.actions.unsqueeze(-1), 4))
    )
    _, moved = torch.autograd.functional.jvp(lambda h: rssm.f(model, h, z, a), h, held_out.directions)
    found = rollouts(model, held_out, states, settings).divergence
    assert torch.allclose(found[:, 0], moved.norm(dim=2).mean(1), rtol=1e-5)
    assert torch.allclose(held_out.directions.norm(dim=2), torch.ones(2, 3 * DRAWS, dtype=torch.float64))


def test_open_loop_errors_of_a_model_that_predicts_a_constant():
    held_out, model = HeldOut.of(SETTINGS, CPU), stack(SETTINGS, 0)
    for name in ("decoder", "reward"):
        model[f"{name}.output"][:] = 0
        model[f"{name}.output_bias"][:] = 0.25
    found = rollouts(model, held_out, held_out.states(model, C), SETTINGS)
    for number, horizon in enumerate(SETTINGS.horizons):
        seen = held_out.images[:, :, 3 + horizon].double()  # four observations are the context
        assert torch.allclose(found.image_error[:, number], (seen - 0.25).square().sum((2, 3)).mean(1), rtol=1e-5)
        received = held_out.rewards[:, :, 3 + horizon].double()
        assert torch.allclose(found.reward_error[:, number], (received - 0.25).square().mean(1), rtol=1e-5)


def test_predicted_images_begin_with_the_reconstruction():
    held_out, model = HeldOut.of(SETTINGS, CPU), stack(SETTINGS, 0)
    states = held_out.states(model, C)
    h, z = states.h[:, :1, 3], states.z[:, :1, 3]
    actions, noise = held_out.actions[:, :1, 4:12].transpose(1, 2), held_out.rollout_noise[:, :, :1]
    found = predicted_images(model, h, z, actions, noise, SETTINGS)
    assert found.shape == (2, 4, 1, 16, 16)
    assert torch.equal(found[:, 0], rssm.decode(model, h, z))
    for step in range(8):
        h, z = rssm.imagine_step(model, h, z, actions[:, step].unsqueeze(-1), noise[:, step], C)
        if step + 1 in SETTINGS.horizons:
            position = 1 + SETTINGS.horizons.index(step + 1)
            assert torch.allclose(found[:, position], rssm.decode(model, h, z), atol=1e-6)
