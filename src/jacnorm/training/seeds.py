"""Random streams that depend on (study, cell, seed, purpose) and on nothing else.

No code of the project uses a global generator: whoever needs randomness names what it is for. The stream is then the
same whatever ran before, in which order, in which process and on how many cores.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jacnorm.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(study: str, cell: str, seed: int, purpose: str) -> int:
    """A 63-bit number for one purpose of one run: the first 63 bits of SHA-256 over the tuple as canonical JSON.

    `cell` names the point of the study's grid (every setting that distinguishes runs, as text), `purpose` what the
    numbers are for ("init", "mask", "order/3"). Runs that are to share a stream, such as the arms of a paired
    comparison, pass the same tuple. Raises UserError for a seed that is negative or not an integer.

    >>> derive("stability", "n=64", 10, "init")
    3570060008762036253
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed {seed!r} is not allowed: give a whole number >= 0")
    text = json.dumps([study, cell, seed, purpose], ensure_ascii=True, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(study: str, cell: str, seed: int, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator seeded with `derive`.

    On a CPU, torch's Mersenne Twister uses the low 32 bits of the seed only, so two given streams coincide with
    probability 2e-10. Streams on CPU and GPU differ: draw on the CPU what must be the same on both.
    """
    import torch

    return torch.Generator(device=device).manual_seed(derive(study, cell, seed, purpose))


def numpy_generator(study: str, cell: str, seed: int, purpose: str) -> np.random.Generator:
    """A NumPy generator (PCG64) seeded with `derive`."""
    import numpy as np

    return np.random.Generator(np.random.PCG64(derive(study, cell, seed, purpose)))


@dataclass(frozen=True, order=True)
class RunId:
    """One training run: its study, the point of the study's grid (all distinguishing settings as text), its seed."""

    study: str
    cell: str
    seed: int

    def generator(self, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
        """The run's torch generator for `purpose`."""
        return generator(self.study, self.cell, self.seed, purpose, device)

    def __str__(self) -> str:
        return f'study "{self.study}", cell "{self.cell}", seed {self.seed}'
