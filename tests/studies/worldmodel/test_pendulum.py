"""The pendulum against its recursion in plain Python, its energy, its symmetries, and rods drawn as many points."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jacnorm.studies.worldmodel.pendulum import Pendulum, draw, to_intensity, to_levels, wrapped

torch.set_num_threads(1)


def by_hand(angle, velocity, action, gravity):
    """One action, written out for one pendulum."""
    torque = 2 * min(max(action, -1.0), 1.0)
    rewards = []
    for _ in range(2):
        velocity = min(max(velocity + (1.5 * gravity * math.sin(angle) + 3 * torque) * 0.05, -8.0), 8.0)
        angle += velocity * 0.05
        around = math.atan2(math.sin(angle), math.cos(angle))  # another way to wrap
        rewards.append(1 - (around**2 + 0.1 * velocity**2 + 0.001 * torque**2) / 16.27)
    return angle, velocity, sum(rewards) / 2


@given(
    st.floats(-10, 10), st.floats(-8, 8), st.lists(st.floats(-2, 2), min_size=1, max_size=5), st.sampled_from([5, 10.0])
)
def test_motion_and_reward_are_those_of_the_recursion(angle, velocity, actions, gravity):
    pendulum = Pendulum(gravity)
    pendulum.reset(torch.tensor([angle], dtype=torch.float64), torch.tensor([velocity], dtype=torch.float64))
    for action in actions:
        angle, velocity, reward = by_hand(angle, velocity, action, gravity)
        found = pendulum.step(torch.tensor([action], dtype=torch.float64))
        assert pendulum.angle.item() == pytest.approx(angle, abs=1e-9)
        assert pendulum.velocity.item() == pytest.approx(velocity, abs=1e-9)
        assert found.item() == pytest.approx(reward, abs=1e-9)


def test_rewards_at_the_top_and_at_the_bottom():
    pendulum = Pendulum()
    pendulum.reset(torch.tensor([0.0, math.pi], dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    top, bottom = pendulum.step(torch.zeros(2, dtype=torch.float64)).tolist()
    assert top == 1
    assert bottom == pytest.approx(1 - math.pi**2 / 16.27, abs=1e-12)


def test_without_torque_the_energy_stays():
    # Symplectic Euler: the energy of the rod, theta'^2 / 2 + 15 cos theta, oscillates but does not drift.
    pendulum = Pendulum()
    angle = torch.linspace(1.5, 3.0, 7, dtype=torch.float64)
    pendulum.reset(angle, torch.zeros_like(angle))
    energies = []
    for _ in range(300):
        pendulum.step(torch.zeros_like(angle))
        energies.append(pendulum.velocity**2 / 2 + 15 * pendulum.angle.cos())
    late, early = torch.stack(energies[150:]).mean(0), torch.stack(energies[:150]).mean(0)
    assert (late - early).abs().max() < 0.1  # of 30, the range of 15 cos theta
    assert (pendulum.velocity.abs() < 8).all()  # so the limit of the speed played no part


def test_environments_do_not_touch_one_another_and_have_their_own_gravity():
    angle, velocity = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    gravity = torch.tensor([[5.0], [10.0], [15.0]])
    together = Pendulum(gravity)
    together.reset(angle, velocity)
    action = torch.linspace(-1, 1, 12).reshape(3, 4)
    rewards = [together.step(action) for _ in range(5)][-1]
    for row in range(3):
        alone = Pendulum(gravity[row].item())
        alone.reset(angle[row], velocity[row])
        alone_rewards = [alone.step(action[row]) for _ in range(5)][-1]
        assert torch.equal(alone_rewards, rewards[row])
        assert torch.equal(alone.image(), together.image()[row])


def test_a_reset_copies_what_it_is_given():
    angle, velocity = torch.zeros(2), torch.ones(2)
    pendulum = Pendulum()
    pendulum.reset(angle, velocity)
    angle += 1
    pendulum.step(torch.ones(2))
    assert (velocity == 1).all()
    assert (pendulum.angle < 0.5).all()


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.1, 2.0, math.pi, -2.5])
def test_the_image_is_that_of_many_points_along_the_rod(angle):
    along = torch.linspace(0, 0.8, 4001, dtype=torch.float64)
    points = torch.stack([along * math.sin(angle), along * math.cos(angle)])  # x to the right, y upwards
    expected = torch.empty(16, 16, dtype=torch.float64)
    for row in range(16):
        for column in range(16):
            centre = torch.tensor([[-1 + (2 * column + 1) / 16], [1 - (2 * row + 1) / 16]], dtype=torch.float64)
            distance = (points - centre).square().sum(0).min().sqrt()
            expected[row, column] = (1.2 - distance / 0.15).clamp(0, 1)
    found = draw(torch.tensor(angle, dtype=torch.float64))
    assert (found - expected).abs().max() < 0.5 / 255 + 1e-4


def test_an_upright_rod_lies_between_the_two_columns_in_the_middle():
    image = draw(torch.tensor(0.0))
    on_both_sides = round((1.2 - (1 / 16) / 0.15) * 255) / 255  # pixels' centres are 1 / 16 away
    assert image[2:8, 7:9].flatten().tolist() == pytest.approx([on_both_sides] * 12)
    assert not image[:, :6].any()


def test_images_have_the_symmetries_of_the_motion():
    angle = torch.linspace(-3, 3, 25, dtype=torch.float64)
    image = draw(angle)
    tolerance = 1.001 / 255  # of rounding to levels
    assert (draw(-angle) - image.flip(-1)).abs().max() < tolerance
    assert (draw(math.pi - angle) - image.flip(-2)).abs().max() < tolerance
    assert (draw(angle - math.pi / 2) - image.rot90(1, (-2, -1))).abs().max() < tolerance
    upright = draw(torch.tensor(0.0))
    assert upright[:8].sum() > 5 * upright[8:].sum()  # row 0 is the top


def test_images_are_those_of_eight_bits():
    image = draw(torch.linspace(-3, 3, 50))
    assert image.dtype == torch.float32
    assert image.min() == 0
    assert image.max() == 1
    assert torch.equal(to_intensity(to_levels(image)), image)


@given(st.floats(-100, 100))
def test_wrapped_angles_are_the_same_angles(angle):
    found = wrapped(torch.tensor(angle, dtype=torch.float64)).item()
    assert -math.pi <= found < math.pi + 1e-12
    assert math.sin(found) == pytest.approx(math.sin(angle), abs=1e-9)
    assert math.cos(found) == pytest.approx(math.cos(angle), abs=1e-9)
