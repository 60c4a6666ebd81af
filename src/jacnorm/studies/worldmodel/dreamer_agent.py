"""DreamerV3 (version 1.5.0 on PyPI) with the penalty on its Jacobians and with errors in its latents, by subclassing.

Runs in DreamerV3's own environment: imports JAX and that package, and of this project nothing that needs more. The
penalty has the definition of `penalty` (this study's torch module), with the RSSM's own layers as f and p; p are the
prior's class probabilities as the package samples from them, with 1 % of the uniform distribution mixed in.

Letters: B sequences, T steps, N transitions, D size of h (`deter`), K groups of C classes in z (`stoch`), P
projections.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dreamerv3
import embodied
import jax
import jax.numpy as jnp
import numpy as np
from dreamerv3 import agent as package
from dreamerv3 import nets
from dreamerv3 import ninjax as nj

ROOT_EPSILON = 1e-8
"""As in `penalty`."""
REPLAY_STEPS = 1_000_000
PREFIX = "jacnorm_"
"""Of the metrics that are added to DreamerV3's own."""


@dataclass(frozen=True)
class Penalty:
    """The penalty's options; see the settings."""

    weight: float
    wrt: Sequence[str]
    include_prior: bool
    power: int
    n_proj: int


@dataclass(frozen=True)
class LatentError:
    """An error added to the sampled z in training: none, zero-drift (variance) or drift (upper end)."""

    kind: str
    size: float


def configuration(task: Mapping[str, Any]) -> embodied.Config:
    """DreamerV3's configuration: its defaults, those for what the agent sees, those of the size, and our few."""
    config = embodied.Config(dreamerv3.configs["defaults"])
    for name in ({"pixels": "dmc_vision", "proprio": "dmc_proprio"}[task["observation"]], task["size"]):
        config = config.update(dreamerv3.configs[name])
    changes: dict[str, Any] = {
        "jax.platform": task["platform"],
        "jax.precision": "float32",  # Jacobians of half-precision networks are too coarse
        "jax.debug": False,  # would compile without optimising: slower in all
        "jax.prealloc": False,
        "jax.metrics_every": 1,
        "batch_size": task["batch"],
        "batch_length": task["length"],
        "data_loaders": 0,  # threads would sample in another order in every run
        "wrapper.length": 0,
        "wrapper.checks": False,
    }
    if task["size"] == "debug":  # the package leaves these at 5 x 1024
        changes |= {r".*\.mlp_layers": 2, r".*\.mlp_units": 64}
    return config.update(changes)


def squared_norm(function: Callable[..., jax.Array], inputs: Sequence[jax.Array], projections: jax.Array) -> jax.Array:
    """Estimate of the squared Frobenius norm of d function / d inputs of each sample, (N,), differentiable.

    function: inputs (N, n) each to outputs (N, C_o); samples do not mix. projections: (P, N, C_o), unit vectors; one
    vector-Jacobian product each, and the mean over the P of them.
    """
    outputs, pull = jax.vjp(function, *map(jax.lax.stop_gradient, inputs))
    total = sum(sum((part**2).sum(-1) for part in pull(v)) for v in projections)
    return total * (outputs.shape[-1] / len(projections))


def directions(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Vectors on the last axis, uniform on the unit sphere."""
    normal = jax.random.normal(key, shape)
    return normal / jnp.linalg.norm(normal, axis=-1, keepdims=True)


class RSSM(nets.RSSM):
    """DreamerV3's RSSM, whose f and p can be asked alone, and which may add an error to z."""

    error = LatentError("none", 0.0)
    """Of all instances; set by `install`."""
    _training = False

    def sequence(self, deter: jax.Array, stoch: jax.Array, action: jax.Array) -> jax.Array:
        """f: h (N, D), z (N, K C) and a (N, A) to h' (N, D), without sampling what follows."""
        if self._action_clip > 0.0:
            action = action * (self._action_clip / jnp.maximum(self._action_clip, jnp.abs(action)))
        x = self.get("img_in", nets.Linear, **self._kw)(jnp.concatenate([stoch, action], -1))
        return self._gru(x, deter)[1]

    def probabilities(self, deter: jax.Array) -> jax.Array:
        """p: h (N, D) to the prior's class probabilities (N, K C)."""
        x = self.get("img_out", nets.Linear, **self._kw)(deter)
        return jax.nn.softmax(self._stats("img_stats", x)["logit"], -1).reshape(*deter.shape[:-1], -1)

    def obs_step(self, prev_state: Any, prev_action: Any, embed: Any, is_first: Any) -> Any:
        """The package's step of the posterior; in training with the error added to the sampled z."""
        post, prior = super().obs_step(prev_state, prev_action, embed, is_first)
        if self._training and self.error.kind != "none":
            post = {**post, "stoch": post["stoch"] + latent_error(self.error, nj.rng(), post["stoch"].shape)}
        return post, prior

    @contextlib.contextmanager
    def in_training(self) -> Iterator[None]:
        """While it lasts, z is observed with the error."""
        self._training = True
        try:
            yield
        finally:
            self._training = False


def latent_error(error: LatentError, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The error of one step, of z's shape (B, K, C).

    zero-drift: N(0, size) for each number. drift: N(mu, s) with one mean mu and one variance s per sequence and step,
    both from U(0, size).
    """
    normal, mean, variance = jax.random.split(key, 3)
    noise = jax.random.normal(normal, shape)
    if error.kind == "zero-drift":
        return jnp.sqrt(error.size) * noise
    each = (shape[0],) + (1,) * (len(shape) - 1)
    drift = jax.random.uniform(mean, each, maxval=error.size)
    return drift + jnp.sqrt(jax.random.uniform(variance, each, maxval=error.size)) * noise


class WorldModel(package.WorldModel):
    """DreamerV3's world model, whose loss has the penalty on top."""

    penalty: Penalty | None = None
    """Of all instances; set by `install`."""

    def loss(self, data: Mapping[str, jax.Array], state: Any) -> Any:
        """The package's loss plus the weighted penalty; what was added or is not in the package's metrics beside it."""
        with self.rssm.in_training():
            loss, (state, out, metrics) = super().loss(data, state)
        kl = self.rssm.dyn_loss(out["post"], out["prior"], impl="kl", free=0.0)
        seen = self.heads["decoder"].shapes
        found = {
            "model_loss": loss,
            "kl": kl.mean(),
            "image_loss": sum(out[f"{key}_loss"].mean() for key in seen),
            "reward_loss": out["reward_loss"].mean(),
        }
        if self.penalty is not None and self.penalty.weight:
            found["penalty"] = self.omega(data, out["post"], self.penalty)
            loss = loss + self.penalty.weight * found["penalty"]
        return loss, (state, out, {**metrics, **{PREFIX + name: value for name, value in found.items()}})

    def omega(self, data: Mapping[str, jax.Array], post: Mapping[str, jax.Array], penalty: Penalty) -> jax.Array:
        """Mean over the transitions inside episodes of the (squared) Jacobian norm, as estimated; see `penalty`."""
        h, z, a, first = transitions(data, post)
        key_f, key_prior = jax.random.split(nj.rng())
        given = {"h": h, "z": z}

        def f(*inputs: jax.Array) -> jax.Array:
            chosen = {**given, **dict(zip(penalty.wrt, inputs, strict=True))}
            return self.rssm.sequence(chosen["h"], chosen["z"], a)

        squares = squared_norm(f, [given[name] for name in penalty.wrt], directions(key_f, (penalty.n_proj, *h.shape)))
        if penalty.include_prior:
            shape = (penalty.n_proj, *z.shape)
            squares = squares + squared_norm(self.rssm.probabilities, [h], directions(key_prior, shape))
        each = squares if penalty.power == 2 else jnp.sqrt(squares + ROOT_EPSILON)
        counted = 1.0 - first
        return (each * counted).sum() / jnp.maximum(counted.sum(), 1.0)


def transitions(data: Mapping[str, jax.Array], post: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
    """Transitions: h (N, D), z (N, K C), the action (N, A) that leads on, and whether an episode begins there, (N,).

    data: what was seen, (B, T, .); its action t is chosen at observation t. Gradients do not flow back.
    """
    parts = post["deter"], post["stoch"], data["action"]
    h, z, a = (jax.lax.stop_gradient(part)[:, :-1] for part in parts)
    count = h.shape[0] * h.shape[1]
    first = data["is_first"][:, 1:].reshape(count).astype(jnp.float32)
    return h.reshape(count, -1), z.reshape(count, -1), a.reshape(count, -1), first


class Agent(dreamerv3.Agent):
    """DreamerV3's agent, which can begin again for another seed without compiling anew."""

    def __init__(self, environment: embodied.Env, config: embodied.Config, *, trains: bool = True) -> None:
        self.spaces = (environment.obs_space, environment.act_space)
        self._trains = trains
        super().__init__(*self.spaces, embodied.Counter(), config)

    def _setup(self) -> None:
        super()._setup()
        # The package moves numbers to the device without saying so, which later versions of JAX refuse.
        jax.config.update("jax_transfer_guard", "allow")

    def _init_varibs(self, obs_space: Any, act_space: Any) -> Any:
        # Tracing the training step takes most of the start; what only plays needs none of it.
        return super()._init_varibs(obs_space, act_space) if self._trains else {}

    def begin(self, seed: int) -> None:
        """Take the initial weights and the random numbers of a seed."""
        self.rng = np.random.default_rng(seed)
        for function in (self._init_train, self._train):
            vars(function).pop("keys", None)  # so that they make variables again; what is compiled stays
        self.varibs = self._init_varibs(*self.spaces)

    def weights(self) -> dict[str, np.ndarray]:
        """All variables but those of the optimisers."""
        return {name: value for name, value in self.save().items() if is_weight(name)}


def is_weight(name: str) -> bool:
    """Whether a variable belongs to a network (and not to an optimiser)."""
    return not any(part.endswith("_opt") for part in name.split("/"))


def install(penalty: Penalty | None, error: LatentError) -> None:
    """Make DreamerV3 build its agents from these classes, which it looks up by name when it needs them."""
    RSSM.error = error
    WorldModel.penalty = penalty
    nets.RSSM = RSSM
    package.WorldModel = WorldModel
