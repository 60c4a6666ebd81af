r"""A pendulum swung by a torque and seen as a small grey image that does not show its velocity.

theta' <- clip(theta' + (1.5 g sin theta + 3 u) / 20, -8, 8), theta <- theta + theta' / 20, with the torque
u = 2 clip(a, -1, 1); theta = 0 is upright and grows clockwise, in rad. An action lasts two such steps. Its reward is
the mean over them of 1 - (theta^2 + 0.1 theta'^2 + 0.001 u^2) / 16.27, with theta in [-pi, pi), after each step.

The constants of the motion are those of gymnasium's Pendulum-v1, but there the reward is of the state before a step and
has another scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEP = 0.05
"""Time of one step, in s."""
REPEAT = 2
"""Steps that an action lasts."""
MAX_SPEED = 8.0
"""Largest |theta'|, in rad/s."""
MAX_TORQUE = 2.0
"""Torque of action 1."""
COST_SCALE = 16.27
"""Largest cost, pi^2 + 0.1 * 8^2 + 0.001 * 2^2, rounded; rewards lie in [0, 1] but for this rounding."""
SIZE = 16
"""Pixels of an image's edge; it shows [-1, 1]^2."""
LENGTH = 0.8
"""Length of the rod, which starts at the image's centre."""
LEVELS = 255
"""Largest grey value of an 8-bit image."""


class Pendulum:
    """N pendulums at once; N may be several axes, such as agents and episodes.

    gravity: one number, or one per environment, in any shape that broadcasts to that of the angles.
    """

    def __init__(self, gravity: float | Tensor = 10.0) -> None:
        self.gravity = gravity
        self.angle = torch.empty(0)
        """(N,), theta, not wrapped."""
        self.velocity = torch.empty(0)
        """(N,), theta'."""

    def reset(self, angles: Tensor, velocities: Tensor) -> None:
        """Start anew at angles (N,) in rad and velocities (N,) in rad/s, on their device and with their dtype."""
        self.angle, self.velocity = angles.clone(), velocities.clone()

    def step(self, actions: Tensor) -> Tensor:
        """Apply actions (N,), cut to [-1, 1]; returns the rewards (N,)."""
        torque = MAX_TORQUE * actions.clamp(-1, 1)  # (N,)
        reward = torch.zeros_like(torque)
        for _ in range(REPEAT):
            push = 1.5 * self.gravity * self.angle.sin() + 3 * torque
            self.velocity = (self.velocity + push * STEP).clamp(-MAX_SPEED, MAX_SPEED)
            self.angle = self.angle + self.velocity * STEP
            cost = wrapped(self.angle).square() + 0.1 * self.velocity.square() + 0.001 * torque.square()
            reward += (1 - cost / COST_SCALE) / REPEAT
        return reward

    def image(self) -> Tensor:
        """What is seen now, (N, 16, 16), in the grey values k / 255 of an 8-bit image."""
        return draw(self.angle)


def wrapped(angle: Tensor) -> Tensor:
    """The same angle in [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def draw(angle: Tensor) -> Tensor:
    """Image of the rod, (N, 16, 16), for angles (N,): intensity clip(1.2 - distance / 0.15, 0, 1), rounded to 8 bits.

    The distance is that of a pixel's centre from the rod; row 0 is the top.
    """
    centres = (torch.arange(SIZE, device=angle.device, dtype=angle.dtype) + 0.5) * (2 / SIZE) - 1  # (16,)
    x, y = centres, -centres.unsqueeze(1)  # (16,), (16, 1)
    sin, cos = angle.sin()[..., None, None], angle.cos()[..., None, None]  # (N, 1, 1)
    along = (x * sin + y * cos).clamp(0, LENGTH)  # of the nearest point of the rod; (N, 16, 16)
    distance = ((x - along * sin).square() + (y - along * cos).square()).sqrt()
    return to_levels((1.2 - distance / 0.15).clamp(0, 1)).to(angle.dtype) / LEVELS


def to_levels(image: Tensor) -> Tensor:
    """Grey values in [0, 1] as those of an 8-bit image, uint8."""
    return (image * LEVELS).round().to(torch.uint8)


def to_intensity(levels: Tensor) -> Tensor:
    """8-bit grey values as float32 in [0, 1]."""
    return levels.float() / LEVELS
