"""Episodes: what leads to what, whose draws are whose, how they are kept and what may be wrong with a file."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from jacnorm.errors import UserError
from jacnorm.files import save_tensors
from jacnorm.studies.worldmodel.episodes import (
    Episodes,
    generate,
    held_out_episodes,
    load,
    random_actions,
    sample,
    save,
    starts,
    training_episodes,
)
from jacnorm.studies.worldmodel.pendulum import Pendulum, to_levels
from jacnorm.studies.worldmodel.settings import PendulumSettings
from jacnorm.training.seeds import generator

torch.set_num_threads(1)

SETTINGS = PendulumSettings(episodes=6, test_episodes=3)


def tensors(episodes):
    return {name: getattr(episodes, name).clone() for name in ("image", "action", "reward", "first")}


def same(one, other):
    theirs = tensors(other)
    return all(torch.equal(mine, theirs[name]) for name, mine in tensors(one).items())


def numbered(episodes=4, steps=9):
    """Episodes whose rewards say where they stand: 100 times the episode plus the step."""
    count = 100.0 * torch.arange(episodes).unsqueeze(1) + torch.arange(steps + 1)
    first = torch.zeros(episodes, steps + 1, dtype=torch.bool)
    first[:, 0] = True
    count[:, 0] = 0
    action = torch.where(first, 0, torch.rand(first.shape, generator=torch.Generator().manual_seed(0)))
    image = count.to(torch.uint8)[..., None, None].expand(-1, -1, 16, 16).contiguous()
    return Episodes(image, action, count, first)


# --- generated -------------------------------------------------------------------------------------------------------


def test_shapes_and_first_steps():
    episodes = training_episodes(SETTINGS, 0)
    assert len(episodes) == 6
    assert episodes.steps == 60
    assert episodes.image.shape == (6, 61, 16, 16)
    assert episodes.image.dtype == torch.uint8
    assert episodes.action.shape == episodes.reward.shape == episodes.first.shape == (6, 61)
    assert episodes.first[:, 0].all()
    assert not episodes.first[:, 1:].any()
    assert not episodes.action[:, 0].any()
    assert not episodes.reward[:, 0].any()
    assert episodes.action[:, 1:].abs().max() <= 1
    assert -0.001 < episodes.reward.min() < episodes.reward.max() < 1


def test_an_action_leads_to_the_observation_of_its_own_step():
    # Played again from the same starts, with the actions as they stand in the episodes.
    settings = PendulumSettings(gravity=8.0)
    episodes = generate(settings, 3, 5, "replay")
    source = generator("worldmodel", "pendulum steps=60 gravity=8.0 episodes=5", 3, "replay")
    pendulum = Pendulum(8.0)
    pendulum.reset(*starts(5, source, 8.0))
    assert torch.equal(to_levels(pendulum.image()), episodes.image[:, 0])
    for step in range(1, 61):
        assert torch.equal(pendulum.step(episodes.action[:, step]), episodes.reward[:, step])
        assert torch.equal(to_levels(pendulum.image()), episodes.image[:, step])


def test_seed_and_purpose_decide_and_agents_do_not():
    first = generate(SETTINGS, 0, 6, "training episodes")
    assert same(first, training_episodes(SETTINGS, 0))
    assert same(first, training_episodes(SETTINGS.model_copy(update={"lambdas": [0.5], "deter": 7}), 0))
    assert not same(first, generate(SETTINGS, 1, 6, "training episodes"))
    assert not same(first, generate(SETTINGS, 0, 6, "other"))
    held_out = held_out_episodes(SETTINGS, 0)
    assert len(held_out) == 3
    assert not torch.equal(held_out.image[:, 0], first.image[:3, 0])


def test_starts_fill_their_ranges():
    angle, velocity = starts(4000, torch.Generator().manual_seed(0), 1.0)
    for values, end in ((angle, math.pi), (velocity, 1.0)):
        assert values.abs().max() < end
        assert values.abs().max() > 0.99 * end
        assert abs(values.mean()) < 4 * end / math.sqrt(3 * 4000)
    assert abs(torch.corrcoef(torch.stack([angle, velocity]))[0, 1]) < 4 / math.sqrt(4000)


def test_random_actions_are_kept_seven_times_in_ten():
    action = random_actions(500, 100, torch.Generator().manual_seed(0))
    assert action.shape == (500, 100)
    kept = (action[:, 1:] == action[:, :-1]).double().mean().item()
    assert kept == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / (500 * 99)))
    assert action.min() < -0.99
    assert action.max() > 0.99
    assert action[:, 0].unique().numel() == 500
    assert (action[:, 0].square().mean() - 1 / 3).abs() < 4 * math.sqrt(4 / 45 / 500)  # uniform from the first on


# --- sequences -------------------------------------------------------------------------------------------------------


def test_sequences_are_cut_out_of_episodes_and_start_anew():
    episodes = numbered()
    found = sample(episodes, torch.Generator().manual_seed(0), 200, 4)
    assert found.image.shape == (200, 4, 16, 16)
    assert found.first[:, 0].all()
    assert not found.action[:, 0].any()
    assert not found.first[:, 1:].any()
    where = found.reward[:, 1].long()
    row, step = where // 100, where % 100
    for offset in range(1, 4):
        at = (row, step - 1 + offset)
        assert torch.equal(found.reward[:, offset], episodes.reward[at])
        assert torch.equal(found.action[:, offset], episodes.action[at])
        assert torch.equal(found.image[:, offset], episodes.image[at])
    # every place of every episode may be the start
    assert set(zip(row.tolist(), (step - 1).tolist(), strict=True)) == {(e, t) for e in range(4) for t in range(7)}


def test_a_reset_inside_stays_marked():
    episodes = numbered()
    episodes.first[:, 5] = True
    episodes.action[:, 5] = 0
    found = sample(episodes, torch.Generator().manual_seed(0), 50, 10)
    assert found.first[:, 5].all()
    assert found.first.sum() == 100


def test_sampling_leaves_the_episodes_as_they_are():
    episodes = numbered()
    before = tensors(episodes)
    sample(episodes, torch.Generator().manual_seed(0), 20, 10)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(episodes).items())


def test_the_same_generator_cuts_the_same_sequences():
    one, other = (sample(numbered(), torch.Generator().manual_seed(7), 8, 5) for _ in range(2))
    assert same(one, other)


def test_episodes_move_with_their_device():
    moved = numbered().to(torch.device("meta"))
    assert {tensor.device.type for tensor in tensors(moved).values()} == {"meta"}


def test_too_long_sequences_are_refused():
    assert sample(numbered(), torch.Generator(), 2, 10).steps == 9
    with pytest.raises(UserError, match=r"sequences of 11 observations cannot be cut from episodes of 10"):
        sample(numbered(), torch.Generator(), 2, 11)


# --- files -----------------------------------------------------------------------------------------------------------


def test_saved_episodes_come_back(tmp_path):
    episodes = training_episodes(SETTINGS, 0)
    save(tmp_path / "own.safetensors", episodes)
    assert same(load(tmp_path / "own.safetensors"), episodes)


def test_own_episodes_are_divided_in_order(tmp_path):
    episodes = generate(SETTINGS, 0, 11, "own")
    save(tmp_path / "own.safetensors", episodes)
    settings = PendulumSettings(episodes=6, test_episodes=3, episodes_path=str(tmp_path / "own.safetensors"))
    assert same(training_episodes(settings, 0), episodes[:6])
    assert same(training_episodes(settings, 1), episodes[:6])
    assert same(held_out_episodes(settings, 0), episodes[6:9])


def test_a_marked_reset_inside_is_allowed_and_counted(tmp_path, caplog):
    episodes = numbered()
    episodes.first[1, 4] = True
    episodes.action[1, 4] = episodes.reward[1, 4] = 0
    save(tmp_path / "own.safetensors", episodes)
    with caplog.at_level(logging.INFO, logger="jacnorm"):
        logging.getLogger("jacnorm").propagate = True
        assert same(load(tmp_path / "own.safetensors"), episodes)
    assert "4 episodes of 9 steps with 1 marked resets inside; a reset that is not marked cannot be seen" in caplog.text


def test_missing_and_damaged_files_are_said_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"none\.safetensors does not exist; correct episodes_path"):
        load(tmp_path / "none.safetensors")
    save(tmp_path / "whole.safetensors", numbered())
    content = (tmp_path / "whole.safetensors").read_bytes()
    for name, part in (("cut", content[: len(content) // 2]), ("empty", b""), ("text", b"no tensors at all")):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(part)
        with pytest.raises(UserError, match=rf"{name}\.safetensors is cut short or no safetensors file; copy it again"):
            load(path)


def dropped(parts):
    del parts["reward"]


def renamed(parts):
    parts["mask"] = parts.pop("first")


def floating(parts):
    parts["image"] = parts["image"].float()


def shortened(parts):
    parts["reward"] = parts["reward"][:, :-1]


def coloured(parts):
    parts["image"] = parts["image"].unsqueeze(-1).expand(-1, -1, -1, -1, 3)


def without_steps(parts):
    for name in parts:
        parts[name] = parts[name][:, :1]


def without_episodes(parts):
    for name in parts:
        parts[name] = parts[name][:0]


def flattened(parts):
    for name in ("action", "reward", "first"):
        parts[name] = parts[name].flatten()


def strong(parts):
    parts["action"][0, 3] = 1.5


def undefined(parts):
    parts["action"][0, 3] = math.nan


def infinite(parts):
    parts["reward"][0, 3] = math.inf


def unmarked(parts):
    parts["first"][2, 0] = False


def early(parts):
    parts["action"][0, 0] = 0.5


def rewarded(parts):
    parts["first"][0, 3] = True
    parts["action"][0, 3] = 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (dropped, "holds the tensors action, first, image; needed are exactly image, action, reward, first"),
        (renamed, "holds the tensors action, image, mask, reward; needed are exactly"),
        (floating, "image is torch.float32; store it as torch.uint8"),
        (shortened, r"reward \(4, 9\), first \(4, 10\); needed are image \(E, T \+ 1, 16, 16\)"),
        (coloured, r"image \(4, 10, 16, 16, 3\)"),
        (without_steps, r"action \(4, 1\).*with E and T at least 1"),
        (without_episodes, r"action \(0, 10\).*with E and T at least 1"),
        (flattened, r"action \(40,\)"),
        (strong, r"actions beyond \[-1, 1\]"),
        (undefined, r"actions beyond \[-1, 1\]"),
        (infinite, "rewards that are not finite"),
        (unmarked, "not every sequence begins with first set"),
        (early, "an action or reward where first is set"),
        (rewarded, "an action or reward where first is set"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, damage, message):
    parts = tensors(numbered())
    damage(parts)
    save_tensors(tmp_path / "own.safetensors", parts)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "own.safetensors")
    assert "own.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": 9}, "holds 11 episodes, but episodes and test_episodes ask for 12"),
        ({"episode_steps": 80}, "have 60 steps, fewer than episode_steps, 80"),
    ],
)
def test_own_episodes_that_are_too_few_or_too_short_are_refused(tmp_path, changes, message):
    save(tmp_path / "own.safetensors", generate(SETTINGS, 0, 11, "own"))
    values = {"episodes": 6, "test_episodes": 3, "episodes_path": str(tmp_path / "own.safetensors"), **changes}
    with pytest.raises(UserError, match=message):
        training_episodes(PendulumSettings(**values), 0)
