"""R recurrent state-space models (RSSM; Hafner et al. 2023, arXiv 2301.04104) of one shape, side by side.

Parameters carry the R runs as their first axis and every product is one batched product over runs. Letters: R runs, B
sequences, T steps, N = any number of samples, D size of h, K groups of C classes in z, E = 4 W size of an
embedded image, A size of an action, W width of the hidden layers.

h' = f(h, z, a) is a dense layer and a gated recurrent unit (GRU), both with LayerNorm (epsilon 1e-3) and no other bias,
as in DreamerV3: x = SiLU(LN([z, a] U)), (r, c, u) = LN([h, x] V), h' = g tanh(s(r) c) + (1 - g) h with g = s(u - 1) and
s the logistic function. Posterior (from h' and the image), prior (from h'), decoder and reward head (from h' and z)
have one hidden layer of the same kind each, as wide as an embedding in the decoder; the encoder is such a layer of the
pixels. z is sampled by adding Gumbel noise, which is always given from outside, so that runs can share it; its gradient
is that of the class probabilities (straight-through).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from jacnorm.studies.worldmodel.categorical import probabilities, sampled
from jacnorm.studies.worldmodel.layer_norm import layer_norm
from jacnorm.studies.worldmodel.settings import PendulumSettings
from jacnorm.training.stacked import Stack

Parameters = Mapping[str, Tensor]
IMAGE = 16
"""Side of an image, in pixels."""
EPSILON = 1e-3
"""What LayerNorm adds to the variance."""
_WIDER = 4
"""How much wider than other hidden layers those next to images are."""
_FIRST_IMAGES = 0.1
"""Scale of the decoder's output at the start; at 1, z takes hundreds of updates longer to carry anything."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model: D, K, C, W and A."""

    deter: int
    groups: int
    classes: int
    hidden: int
    actions: int = 1

    @classmethod
    def of(cls, settings: PendulumSettings) -> Self:
        """The sizes that the settings ask for."""
        return cls(settings.deter, settings.groups, settings.classes, settings.hidden)

    @property
    def latent(self) -> int:
        """K C, the size of z."""
        return self.groups * self.classes

    @property
    def embedding(self) -> int:
        """E, the size of an embedded image."""
        return _WIDER * self.hidden

    @property
    def state(self) -> int:
        """D + K C, the size of h and z together."""
        return self.deter + self.latent


@dataclass(frozen=True)
class States:
    """What observing sequences gives, each (R, B, T, .)."""

    h: Tensor
    """(R, B, T, D): h[t] was reached from h[t-1], z[t-1] by the action that leads to observation t."""
    z: Tensor
    """(R, B, T, K C): sampled from the posterior, with the error if one was given."""
    posterior: Tensor
    """(R, B, T, K C): logits."""

    def detach(self) -> States:
        """The same without gradients."""
        return States(self.h.detach(), self.z.detach(), self.posterior.detach())


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of one model; a matrix maps rows to columns."""
    hidden, latent, state = sizes.hidden, sizes.latent, sizes.state
    return {
        **layer_shapes("encoder", IMAGE**2, sizes.embedding),
        **layer_shapes("sequence.input", latent + sizes.actions, hidden),
        **layer_shapes("sequence.gru", sizes.deter + hidden, 3 * sizes.deter),
        **head_shapes("prior", sizes.deter, hidden, latent),
        **head_shapes("posterior", sizes.deter + sizes.embedding, hidden, latent),
        **head_shapes("decoder", state, sizes.embedding, IMAGE**2),
        **head_shapes("reward", state, hidden, 1),
    }


def layer_shapes(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """A matrix and the scale and offset of the LayerNorm after it."""
    return {name: (inputs, outputs), f"{name}_scale": (outputs,), f"{name}_offset": (outputs,)}


def head_shapes(name: str, inputs: int, hidden: int, outputs: int, depth: int = 1) -> dict[str, tuple[int, ...]]:
    """`depth` hidden layers with LayerNorm and a linear one with a bias."""
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(depth):
        found |= layer_shapes(f"{name}.hidden{layer}", inputs if layer == 0 else hidden, hidden)
    return {**found, f"{name}.output": (hidden, outputs), f"{name}.output_bias": (outputs,)}


def initial(sizes: Sizes, generators: Sequence[torch.Generator]) -> Stack:
    """Parameters of one model per generator, (R, ...); see `drawn`. The reward head starts at 0."""
    stack = drawn(shapes(sizes), generators)
    stack["decoder.output"] *= _FIRST_IMAGES
    stack["reward.output"].zero_()
    return stack


def drawn(wanted: Mapping[str, tuple[int, ...]], generators: Sequence[torch.Generator]) -> Stack:
    """Matrices from N(0, 1 / inputs), scales 1, offsets and biases 0; each generator fills one run."""
    stack: Stack = {}
    for name, shape in wanted.items():
        if len(shape) == 2:
            each = [torch.randn(shape, generator=generator) / math.sqrt(shape[0]) for generator in generators]
            stack[name] = torch.stack(each)
        else:
            fill = torch.ones if name.endswith("_scale") else torch.zeros
            stack[name] = fill(len(generators), *shape)
    return stack


def normalised(parameters: Parameters, name: str, x: Tensor, *, twice: bool = False) -> Tensor:
    """LayerNorm over the last axis of x (R, N, n), with each run's own scale and offset.

    twice: by `layer_norm`, whose second derivative is cheap; the numbers are the same.
    """
    plain = layer_norm(x, EPSILON) if twice else functional.layer_norm(x, x.shape[-1:], eps=EPSILON)
    return torch.addcmul(parameters[f"{name}_offset"].unsqueeze(1), plain, parameters[f"{name}_scale"].unsqueeze(1))


def linear(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    """A matrix and a bias: (R, N, inputs) to (R, N, outputs)."""
    return torch.baddbmm(parameters[f"{name}_bias"].unsqueeze(1), x, parameters[name])


def head(parameters: Parameters, name: str, *parts: Tensor, twice: bool = False) -> Tensor:
    """Hidden layers and a linear one, of the parts (R, N, .) one after another; twice: see `normalised`."""
    x = projected(parameters[f"{name}.hidden0"], *parts)
    layer = 0
    while True:
        x = functional.silu(normalised(parameters, f"{name}.hidden{layer}", x, twice=twice))
        layer += 1
        if f"{name}.hidden{layer}" not in parameters:
            return linear(parameters, f"{name}.output", x)
        x = torch.bmm(x, parameters[f"{name}.hidden{layer}"])


def projected(matrix: Tensor, *parts: Tensor) -> Tensor:
    """[parts] times matrix, (R, N, outputs), without putting the parts together."""
    found, start = None, 0
    for part in parts:
        rows = matrix[:, start : start + part.shape[-1]]
        found = torch.bmm(part, rows) if found is None else torch.baddbmm(found, part, rows)
        start += part.shape[-1]
    assert found is not None
    return found


def cell(h: Tensor, x: Tensor, kernel: Tensor, scale: Tensor, offset: Tensor, *, twice: bool = False) -> Tensor:
    """The GRU: h (R, N, D), x (R, N, W), kernel (R, D + W, 3 D), scale and offset (R, 3 D); returns h' (R, N, D).

    twice: see `normalised`.
    """
    parts = {"gru_scale": scale, "gru_offset": offset}
    return _gated(h, normalised(parts, "gru", projected(kernel, h, x), twice=twice))


def _gated(h: Tensor, gates: Tensor) -> Tensor:
    reset, candidate, update = gates.chunk(3, -1)  # (R, N, D) each
    return torch.lerp(h, torch.tanh(torch.sigmoid(reset) * candidate), torch.sigmoid(update - 1))


def f(parameters: Parameters, h: Tensor, z: Tensor, a: Tensor, *, twice: bool = False) -> Tensor:
    """The sequence model: h (R, N, D), z (R, N, K C), a (R, N, A) to h' (R, N, D); twice: see `normalised`."""
    x = projected(parameters["sequence.input"], z, a)
    x = functional.silu(normalised(parameters, "sequence.input", x, twice=twice))
    gru = "sequence.gru"
    return cell(h, x, parameters[gru], parameters[f"{gru}_scale"], parameters[f"{gru}_offset"], twice=twice)


def prior_logits(parameters: Parameters, h: Tensor, *, twice: bool = False) -> Tensor:
    """Logits (R, N, K C) of z, from h alone; twice: see `normalised`."""
    return head(parameters, "prior", h, twice=twice)


def prior(parameters: Parameters, h: Tensor, classes: int, *, twice: bool = False) -> Tensor:
    """Class probabilities (R, N, K C) of z, from h alone; twice: see `normalised`."""
    return probabilities(prior_logits(parameters, h, twice=twice), classes)


def posterior_logits(parameters: Parameters, h: Tensor, embedding: Tensor) -> Tensor:
    """Logits (R, N, K C) of z, from h and an embedded image (R, N, E)."""
    return head(parameters, "posterior", h, embedding)


def encode(parameters: Parameters, images: Tensor) -> Tensor:
    """Embeddings (R, N, E) of images (R, N, 16, 16) in [0, 1]."""
    x = torch.bmm(images.flatten(2), parameters["encoder"])
    return functional.silu(normalised(parameters, "encoder", x))


def observe_step(
    parameters: Parameters,
    h: Tensor,
    z: Tensor,
    a: Tensor,
    first: Tensor,
    embedding: Tensor,
    noise: Tensor,
    classes: int,
) -> tuple[Tensor, Tensor]:
    """One observed step of N sequences: the next h and z.

    h, z: state before. a (R, N, A): action that leads to the observation. first (R, N), bool: where an episode begins,
    h, z and a count as 0. embedding (R, N, E): see `encode`. noise (R, N, K C): Gumbel.
    """
    kept = (~first).unsqueeze(-1).to(h.dtype)
    h = f(parameters, h * kept, z * kept, a * kept)
    return h, sampled(posterior_logits(parameters, h, embedding), noise, classes)


def observe(
    parameters: Parameters,
    images: Tensor,
    actions: Tensor,
    first: Tensor,
    noise: Tensor,
    classes: int,
    error: Tensor | None = None,
) -> States:
    """Filter sequences from h = 0 and z = 0.

    images: (R, B, T, 16, 16) in [0, 1]. actions: (R, B, T) or (R, B, T, A); actions[t] leads to image t. first
    (R, B, T), bool: where an episode begins; h, z and a before it count as 0. noise (R, B, T, K C) or
    (R, B, T, K, C): Gumbel. error (R, B, T, K C): added to the sampled z, if given.
    """
    runs, sequences, steps = images.shape[:3]
    actions = actions if actions.ndim == 4 else actions.unsqueeze(-1)
    kept = (~first).unsqueeze(-1).to(images.dtype)  # (R, B, T, 1)
    deter = parameters["prior.hidden0"].shape[1]
    latent = parameters["prior.output"].shape[2]
    # What does not depend on h or z is computed for all steps at once.
    embedded = encode(parameters, images.flatten(1, 2))  # (R, B T, E)
    seen = torch.bmm(embedded, parameters["posterior.hidden0"][:, deter:]).view(runs, sequences, steps, -1).unbind(2)
    acted = torch.bmm((actions * kept).flatten(1, 2), parameters["sequence.input"][:, latent:])
    acted = acted.view(runs, sequences, steps, -1).unbind(2)
    by_h, by_z = parameters["posterior.hidden0"][:, :deter], parameters["sequence.input"][:, :latent]
    gru = [parameters[f"sequence.gru{part}"] for part in ("", "_scale", "_offset")]
    draws = noise.reshape(runs, sequences, steps, latent).unbind(2)
    resets = kept.unbind(2)
    h, z = images.new_zeros(runs, sequences, deter), images.new_zeros(runs, sequences, latent)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for t in range(steps):
        x = torch.baddbmm(acted[t], z * resets[t], by_z)
        x = functional.silu(normalised(parameters, "sequence.input", x))
        h = cell(h * resets[t], x, *gru)
        y = functional.silu(normalised(parameters, "posterior.hidden0", torch.baddbmm(seen[t], h, by_h)))
        logits = linear(parameters, "posterior.output", y)
        z = sampled(logits, draws[t], classes)
        if error is not None:
            z = z + error[:, :, t]
        found.append((h, z, logits))
    return States(*(torch.stack(each, 2) for each in zip(*found, strict=True)))


def imagine_step(
    parameters: Parameters, h: Tensor, z: Tensor, a: Tensor, noise: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """One imagined step of N sequences: the next h and z, sampled from the prior with Gumbel noise (R, N, K C)."""
    h = f(parameters, h, z, a)
    return h, sampled(prior_logits(parameters, h), noise, classes)


def decode(parameters: Parameters, h: Tensor, z: Tensor) -> Tensor:
    """Predicted images (R, N, 16, 16); not confined to [0, 1]."""
    return head(parameters, "decoder", h, z).unflatten(-1, (IMAGE, IMAGE))


def reward(parameters: Parameters, h: Tensor, z: Tensor) -> Tensor:
    """Predicted rewards (R, N)."""
    return head(parameters, "reward", h, z).squeeze(-1)
