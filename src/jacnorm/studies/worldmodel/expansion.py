r"""What an error of size epsilon does to the expected loss of a linear stochastic system, exactly and simulated.

dx = A x dt + s dB from x_0, with the error epsilon (mu dt + dW), W independent of B, and the loss L(x) = x^T H x / 2 at
time 1. The change of E L has a part that is even in epsilon, which for mu = 0 is

    epsilon^2 tr(H Sigma) / 2,  Sigma = int_0^1 e^{A t} e^{A^T t} dt,

and a part that is odd in epsilon, which the drift alone makes and which may have either sign,

    epsilon m^T H e^A x_0,  m = int_0^1 e^{A t} mu dt.

With a drift the even part grows by epsilon^2 m^T H m / 2, which is not looked at here. These are the terms S and P of
the paper's Theorems 3.7 and 3.9, where nothing remains of higher order: the system is linear and the loss quadratic.

Letters: M matrices, E sizes epsilon, P draws of the noise, K steps, d the dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from jacnorm.studies.worldmodel.settings import STUDY, ExpansionSettings
from jacnorm.training.seeds import generator

Family = Literal["random", "identity", "semidefinite"]
DIFFUSION = 0.5
"""s, the size of the noise that is there without an error."""
_CHUNK = 5_000
"""Draws of the noise at once."""


@dataclass(frozen=True)
class Case:
    """One matrix A (d, d), float64; its Frobenius norm is `scale`."""

    matrix: int
    family: Family
    scale: float
    a: Tensor


@dataclass(frozen=True)
class System:
    """Matrices A (M, d, d), the error's drift mu and the start x_0, both (d,), and the loss's H (d, d)."""

    a: Tensor
    drift: Tensor
    start: Tensor
    hessian: Tensor

    @property
    def dimension(self) -> int:
        """Of the state, d."""
        return len(self.start)


@dataclass(frozen=True)
class Simulated:
    """Means over the draws of the noise and their standard errors, (M, E) each."""

    even: Tensor
    even_error: Tensor
    odd: Tensor
    odd_error: Tensor
    odd_reversed: Tensor
    """`odd` with drift -mu."""


def cases(settings: ExpansionSettings, seed: int) -> list[Case]:
    """The matrices of a seed: random ones with Frobenius norm 1, and a M for every factor a.

    M is I / sqrt(d), or G G^T over its Frobenius norm, with independent N(0, 1) entries of G as of the random matrices.
    """
    size = settings.dimension
    source = generator(STUDY, f"expansion d={size}", seed, "matrices")

    def normal() -> Tensor:
        return torch.randn(size, size, generator=source, dtype=torch.float64)

    random, roots = zip(*((normal(), normal()) for _ in range(settings.matrices)), strict=True)
    found = [Case(number, "random", 1.0, a / a.norm()) for number, a in enumerate(random)]
    bases: list[tuple[int, Family, Tensor]] = [(0, "identity", torch.eye(size, dtype=torch.float64))]
    bases += [(number, "semidefinite", root @ root.T) for number, root in enumerate(roots)]
    for number, family, base in bases:
        found += [Case(number, family, scale, scale * base / base.norm()) for scale in settings.scales]
    return found


def system(settings: ExpansionSettings, a: Tensor) -> System:
    """The settings' start and drift, and H = I, for matrices (M, d, d)."""
    entries = torch.full((settings.dimension,), settings.drift).to(a)
    return System(a, entries, entries, torch.eye(settings.dimension).to(a))


def exact(system: System, epsilons: Tensor) -> tuple[Tensor, Tensor]:
    """The even part for zero drift and the odd part for drift mu, (M, E) each."""
    a, size = system.a, system.dimension
    # Van Loan (1978, IEEE Trans. Automat. Contr. 23): integrals of exponentials as blocks of one exponential.
    block = torch.cat(
        [torch.cat([-a, torch.eye(size).to(a).expand_as(a)], 2), torch.cat([torch.zeros_like(a), a.mT], 2)], 1
    )
    exponential = torch.linalg.matrix_exp(block)  # (M, 2 d, 2 d)
    flow = exponential[:, size:, size:].mT  # e^A
    sigma = flow @ exponential[:, :size, size:]
    column = torch.cat([a, system.drift.expand(len(a), size).unsqueeze(2)], 2)  # (M, d, d + 1)
    m = torch.linalg.matrix_exp(torch.nn.functional.pad(column, (0, 0, 0, 1)))[:, :size, size]  # (M, d)
    even = torch.einsum("ij,mji->m", system.hessian, sigma) / 2
    odd = torch.einsum("mi,ij,mjk,k->m", m, system.hessian, flow, system.start)
    return even.unsqueeze(1) * epsilons.square(), odd.unsqueeze(1) * epsilons


def simulate(system: System, epsilons: Tensor, draws: int, steps: int, source: torch.Generator) -> Simulated:
    """Both parts by Euler-Maruyama, with the same noise for all matrices, sizes, signs and drifts.

    Each of the P draws of (B, W) serves a path with epsilon and its antithetic partner with -epsilon, whose half sum
    and half difference are the even and the odd part.
    """
    kernel, flow, m = _unrolled(system, steps)
    total = torch.zeros(5, len(system.a), len(epsilons)).to(system.a)
    for count in _chunks(draws):
        # (K, d, P), with all of a draw in one column
        base, error = (_noise(system, count, steps, source) for _ in range(2))
        x = (flow @ system.start).unsqueeze(2) + DIFFUSION * (kernel @ base).unflatten(0, (-1, system.dimension))
        y = (kernel @ error).unflatten(0, (-1, system.dimension))  # (M, d, P)
        for each in range(len(system.a)):
            even, odd, reversed_ = _parts(system.hessian, x[each], y[each], m[each], epsilons)  # (E, P)
            sums = (even, even.square(), odd, odd.square(), reversed_)
            total[:, each] += torch.stack([values.sum(1) for values in sums])
    mean = total / draws
    errors = [((mean[at + 1] - mean[at].square()).clamp(min=0) / (draws - 1)).sqrt() for at in (0, 2)]
    return Simulated(mean[0], errors[0], mean[2], errors[1], mean[4])


def _parts(hessian: Tensor, x: Tensor, y: Tensor, m: Tensor, epsilons: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Even part for zero drift, odd parts for drift mu and -mu, of every draw, (E, P).

    x: (d, P) without an error; y: (d, P) what dW adds; m: (d,) what mu dt adds.
    """
    size = epsilons[:, None, None]

    def loss(end: Tensor) -> Tensor:
        return ((hessian @ end) * end).sum(-2) / 2

    def both(response: Tensor) -> tuple[Tensor, Tensor]:
        return loss(x + size * response), loss(x - size * response)

    plus, minus = both(y)
    even = (plus + minus) / 2 - loss(x)
    odd = [(plus - minus) / 2 for plus, minus in (both(y + m.unsqueeze(1)), both(y - m.unsqueeze(1)))]
    return even, odd[0], odd[1]


def _unrolled(system: System, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the noise, the start and the drift of K Euler-Maruyama steps add to the end point.

    A step is x <- (I + A / K) x + noise, so that the end point is linear in all of it and one product with the kernel
    (M d, K d) takes the place of K steps for each matrix and each error. Also (I + A / K)^K, (M, d, d), and the
    drift's part, (M, d).
    """
    a, size = system.a, system.dimension
    power = torch.eye(size).to(a).expand_as(a)
    powers = []
    for _ in range(steps):
        powers.append(power)
        power = power + a @ power / steps
    kernel = torch.stack(powers[::-1], 2)  # (M, d, K, d): the first step's noise is multiplied most often
    return kernel.flatten(2).flatten(0, 1), power, kernel.sum(2) @ system.drift / steps


def _noise(system: System, count: int, steps: int, source: torch.Generator) -> Tensor:
    """Increments of a d-dimensional Wiener process, (K d, P)."""
    normal = torch.randn(count, steps * system.dimension, generator=source, dtype=system.a.dtype)
    return (normal / math.sqrt(steps)).to(system.a.device).T


def _chunks(draws: int) -> Iterator[int]:
    for begin in range(0, draws, _CHUNK):
        yield min(_CHUNK, draws - begin)
