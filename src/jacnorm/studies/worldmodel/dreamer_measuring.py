"""Measuring DreamerV3: exact Jacobians, rollouts, and returns under perturbations.

Runs in DreamerV3's own environment. For each seed, episodes of the random policy are played once; every agent of the
seed is measured on them and plays in episodes with the same starts, random numbers of the policy and noise.

Letters: S sequences, T steps, N transitions, D size of h, K groups of C classes in z, Q rollout steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dreamerv3 import ninjax as nj

from jacnorm.studies.worldmodel import dreamer_agent
from jacnorm.studies.worldmodel.dreamer_agent import RSSM, Agent, LatentError, squared_norm, transitions
from jacnorm.studies.worldmodel.dreamer_tasks import Task
from jacnorm.studies.worldmodel.dreamer_worker import Mistake, Say

Episodes = dict[str, np.ndarray]
"""What was seen and done, (E, T, .) each."""


def measure(task: dict[str, Any], say: Say) -> dict[str, Any]:
    """Measure the agents of one kind of environment and size.

    task: as in `dreamer_training.train`, and conditions, options (of perturbations), evaluation_episodes,
    jacobian_transitions, context, horizons, disturbance, and ``runs``: seed, numbers and ``agents``, pairs of a name
    and a file of weights. Answers, by seed and name, with jacobians, divergence, prediction and returns.
    """
    dreamer_agent.install(None, LatentError("none", 0.0))
    config = dreamer_agent.configuration(task)
    players = [Task(task["task"], task["observation"], config) for _ in range(task["evaluation_episodes"])]
    agent = Agent(players[0], config, trains=False)
    meter = Meter(agent, task)
    found = []
    for run in task["runs"]:
        numbers = run["numbers"]
        random_returns: dict[float, float] = {}
        held_out: Episodes = {}
        for condition in task["conditions"]:
            factor = _gravity(condition)
            if factor not in random_returns:
                returns, episodes = play(players, RandomPolicy(numbers["random"]), condition, task, numbers)
                random_returns[factor] = float(returns.mean())
                held_out = held_out or episodes  # the first condition is clean
        for name, file in run["agents"]:
            with np.load(file, allow_pickle=False) as weights:
                agent.load({each: weights[each] for each in weights.files})
            rows = []
            for condition in task["conditions"]:
                returns, _ = play(players, Policy(agent, numbers["policy"]), condition, task, numbers)
                random = random_returns[_gravity(condition)]
                rows.append({**condition, "return": float(returns.mean()), "random_return": random})
            found.append({"seed": run["seed"], "name": name, "returns": rows, **meter(held_out, numbers)})
            say({"kind": "progress", "seed": run["seed"], "name": name, "clean_return": rows[0]["return"]})
    for player in players:
        player.close()
    return {"agents": found}


def _gravity(condition: Mapping[str, Any]) -> float:
    return condition["strength"] if condition["perturbation"] == "gravity" else 1.0


class RandomPolicy:
    """Actions from U(-1, 1)."""

    def __init__(self, number: int) -> None:
        self._source = np.random.default_rng(number)

    def __call__(self, seen: Mapping[str, np.ndarray], size: tuple[int, ...]) -> np.ndarray:
        """An action (E, A) for each environment."""
        return self._source.uniform(-1, 1, (len(seen["is_first"]), *size)).astype(np.float32)


class Policy:
    """The agent's own policy, sampled, with random numbers that begin anew."""

    def __init__(self, agent: Agent, number: int) -> None:
        agent.rng = np.random.default_rng(number)
        self._agent, self._state = agent, None

    def __call__(self, seen: Mapping[str, np.ndarray], size: tuple[int, ...]) -> np.ndarray:
        """An action (E, A) for each environment."""
        outs, self._state = self._agent.policy(seen, self._state, mode="eval")
        return outs["action"]


def play(
    players: Sequence[Task],
    policy: Callable[[Mapping[str, np.ndarray], tuple[int, ...]], np.ndarray],
    condition: Mapping[str, Any],
    task: Mapping[str, Any],
    numbers: Mapping[str, Any],
) -> tuple[np.ndarray, Episodes]:
    """One episode in each environment, side by side: returns (E,), and what was seen and done.

    Episodes depend on their number and the condition, not on what was played before. They have one length: an episode
    that ends earlier than another is a mistake.
    """
    size = players[0].act_space["action"].shape
    for player, number in zip(players, numbers["episodes"], strict=True):
        player.change(condition["perturbation"], condition["strength"], task["options"])
        player.reseed(number)
    action = np.zeros((len(players), *size), np.float32)
    resets, steps, returns = True, [], np.zeros(len(players))
    while True:
        each = [player.step({"action": a, "reset": resets}) for player, a in zip(players, action, strict=True)]
        seen = {key: np.stack([_plain(one[key]) for one in each]) for key in each[0]}
        returns += seen["reward"]
        action, resets = policy(seen, size), False
        steps.append({**seen, "action": action})
        if seen["is_last"].any():
            if not seen["is_last"].all():
                raise Mistake(f'episodes of "{task["task"]}" have different lengths; use a task where they agree')
            return returns, {key: np.stack([step[key] for step in steps], 1) for key in steps[0]}


def _plain(value: Any) -> np.ndarray:
    """Numbers as DreamerV3's driver hands them on: no double precision."""
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype == np.float64 else array


class Meter:
    """What is measured of an agent's world model on held-out episodes."""

    def __init__(self, agent: Agent, task: Mapping[str, Any]) -> None:
        self._agent, self._task = agent, task
        self._steps = max(task["horizons"])
        pure = partial(nj.pure, nested=False)
        self._norms = jax.jit(pure(self._jacobians))
        self._roll = jax.jit(pure(self._rollouts))

    def __call__(self, episodes: Episodes, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Means over transitions and, by horizon, over sequences of the episodes; see the study's tables."""
        task = self._task
        data = windows(episodes, task["context"] + self._steps)
        count = len(data["is_first"]) * (task["context"] + self._steps - 1)
        source = np.random.default_rng(numbers["transitions"])
        chosen = np.sort(source.permutation(count)[: task["jacobian_transitions"]])
        key = jax.random.PRNGKey(numbers["rollouts"] % 2**32)
        varibs = self._agent.varibs
        norms = self._norms(varibs, key, data, chosen)[0]
        rolled = {name: np.asarray(values) for name, values in self._roll(varibs, key, data)[0].items()}
        return {
            "jacobians": {"transitions": len(chosen), **{name: float(value) for name, value in norms.items()}},
            "horizons": [
                {"horizon": each, **{name: float(values[each - 1]) for name, values in rolled.items()}}
                for each in task["horizons"]
            ],
        }

    def _observed(self, data: Episodes) -> tuple[Any, dict[str, jax.Array], dict[str, jax.Array]]:
        """The world model, the data as it takes them, and its states on them, (S, T, .)."""
        model = self._agent.agent.wm
        ready = self._agent.agent.preprocess(data)
        before = jnp.concatenate([jnp.zeros_like(ready["action"][:, :1]), ready["action"][:, :-1]], 1)
        post, _ = model.rssm.observe(model.encoder(ready), before, ready["is_first"])
        return model, ready, post

    def _jacobians(self, data: Episodes, chosen: jax.Array) -> dict[str, jax.Array]:
        """Mean norms over the chosen transitions, from exact Jacobians, one transition after another."""
        model, ready, post = self._observed(data)
        h, z, a, _ = transitions(ready, post)
        f, p = model.rssm.sequence, model.rssm.probabilities

        def each(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> dict[str, jax.Array]:
            return norms(f, p, *inputs)

        found = jax.lax.map(each, (h[chosen], z[chosen], a[chosen]))
        return {name: values.mean() for name, values in found.items()}

    def _rollouts(self, data: Episodes) -> dict[str, jax.Array]:
        """By horizon 1 to Q: growth of a disturbance of h, and open-loop errors of the observation and the reward."""
        model, ready, post = self._observed(data)
        last = self._task["context"] - 1
        start = {name: value[:, last] for name, value in post.items()}
        actions = ready["action"][:, last:-1]  # action t leads on from observation t; (S, Q, A)
        key_direction, key_roll = jax.random.split(nj.rng())
        normal = jax.random.normal(key_direction, start["deter"].shape)
        unit = normal / jnp.linalg.norm(normal, axis=-1, keepdims=True)
        length = self._task["disturbance"] * jnp.linalg.norm(start["deter"], axis=-1, keepdims=True)
        roll = nj.pure(lambda begin: model.rssm.imagine(actions, begin), nested=True)
        variables = dict(nj.context())
        # One key: both rollouts sample z with the same Gumbel noise.
        clean = roll(variables, key_roll, start)[0]
        other = roll(variables, key_roll, {**start, "deter": start["deter"] + length * unit})[0]
        apart = jnp.linalg.norm(other["deter"] - clean["deter"], axis=-1) / length
        seen = model.heads["decoder"](clean)
        truth = {name: ready[name][:, last + 1 :].astype(jnp.float32) for name in seen}
        errors = [dist.mode() - truth[name] for name, dist in seen.items()]
        squares = [(error**2).reshape(*error.shape[:2], -1).sum(-1) for error in errors]
        reward = model.heads["reward"](clean).mean()
        return {
            "divergence": apart.mean(0),
            "image_error": sum(squares).mean(0),
            "reward_error": ((reward - ready["reward"][:, last + 1 :]) ** 2).mean(0),
        }


def norms(f: Callable, p: Callable, h: jax.Array, z: jax.Array, a: jax.Array) -> dict[str, jax.Array]:
    """Norms of the exact Jacobians of one transition, h (D,), z (K C,), a (A,); named as in the study's tables."""

    def step(h: jax.Array, z: jax.Array) -> jax.Array:
        return f(h[None], z[None], a[None])[0]

    def prior(h: jax.Array) -> jax.Array:
        return p(h[None])[0]

    frobenius = jnp.linalg.norm
    by_h, by_z = jax.jacrev(step, (0, 1))(h, z)  # (D, D), (D, K C)
    after = step(h, z)
    of_p = jax.jacrev(prior)(after)  # (K C, D)
    f_both = jnp.concatenate([by_h, by_z], 1)  # (D, D + K C)
    p_both = of_p @ f_both  # (K C, D + K C)
    return {
        "f_h": frobenius(by_h),
        "f_h_spectral": jnp.linalg.norm(by_h, 2),
        "f_z": frobenius(by_z),
        "p_h": frobenius(of_p),
        "composed": frobenius(jnp.concatenate([f_both, p_both])),
        "composed_prior": frobenius(p_both),
        "h_norm": frobenius(h),
        "relative": frobenius(by_h) * frobenius(h) / frobenius(after),
    }


def windows(episodes: Episodes, steps: int) -> Episodes:
    """Sequences of `steps` that do not overlap, cut from the episodes' beginnings on; each counts as a beginning.

    Raises Mistake if the episodes are shorter.
    """
    length = episodes["is_first"].shape[1]
    count = length // steps
    if not count:
        raise Mistake(
            f"context and the longest of horizons need {steps} observations in a row, but an episode has {length}; "
            "make them smaller"
        )
    cut = {
        key: value[:, : count * steps].reshape(-1, steps, *value.shape[2:])
        for key, value in episodes.items()
        if not key.startswith("log_")
    }
    first = np.zeros_like(cut["is_first"])
    first[:, 0] = True
    return {**cut, "is_first": first}


def estimate(task: dict[str, Any]) -> dict[str, Any]:
    """The estimated squared Jacobian norm of DreamerV3's GRU with given weights; see `penalty.cell_penalty`.

    task: file, an .npz with kernel (D + W, 3 D), scale and offset (3 D,), h (N, D), x (N, W), projections (P, N, D).
    """
    with np.load(task["file"], allow_pickle=False) as file:
        given = {name: jnp.asarray(file[name]) for name in file.files}
    model = RSSM(given["h"].shape[-1], norm="layer", act="silu", units=given["x"].shape[-1], name="rssm")
    variables = {
        "rssm/gru/kernel": given["kernel"],
        "rssm/gru/norm/scale": given["scale"],
        "rssm/gru/norm/bias": given["offset"],
    }

    def found() -> jax.Array:
        cell = lambda h, x: model._gru(x, h)[1]  # noqa: E731
        return squared_norm(cell, [given["h"], given["x"]], given["projections"]).mean()

    value, _ = nj.pure(found)(variables, jax.random.PRNGKey(0), create=False)
    return {"value": float(value)}
