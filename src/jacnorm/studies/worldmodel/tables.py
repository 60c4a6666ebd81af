"""The tables of the study: what their columns mean, and how a job's block of seeds becomes a file.

The small RSSM and DreamerV3 fill the same columns. Jacobian norms are Frobenius norms, and means over transitions,
unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jacnorm.files import Column
from jacnorm.settings import SeededSettings
from jacnorm.training.results import write_rows
from jacnorm.training.tracking import Tracker

_ARM = {
    "seed": Column("random seed; runs of one seed share data, start, batches and noise"),
    "agent": Column("rssm (the small one) or dreamerv3"),
    "task": Column("pendulum, dummy, walker_walk or quadruped_walk"),
    "lambda": Column("weight of the penalty; 0: none"),
    "wrt": Column("inputs of f in the penalised Jacobian: h, z or hz"),
    "include_prior": Column("whether the prior's Jacobian is penalised too"),
    "power": Column("penalty on the norm (1) or its square (2)"),
    "error": Column("error added to z in training: none, zero-drift or drift"),
    "error_size": Column("variance (zero-drift) or upper end of mean and variance (drift); 0: none"),
    "batch": Column("sequences per update", "sequences"),
    "length": Column("steps per sequence T", "steps"),
}
_HORIZON = Column("rollout steps", "steps")
_AGENT: dict[str, dict[str, Column]] = {
    "fits": {
        **_ARM,
        "parameters": Column("number of the world model's weights"),
        "updates": Column("updates of the world model", "updates"),
        "model_loss": Column("world model's loss without penalty, mean over the last tenth; NaN after divergence"),
        "image_loss": Column("its reconstruction part (of whatever is observed)"),
        "reward_loss": Column("its reward part"),
        "kl": Column("divergence of the posterior from the prior, without free nats", "nat"),
        "penalty": Column("mean squared Jacobian norm (or norm) as estimated in training, without its weight"),
        "penalty_share": Column("weighted penalty over the loss without it"),
        "diverged_at": Column("update whose loss was not finite; -1: none", "updates"),
    },
    "curves": {
        **_ARM,
        "update": Column("updates made", "updates"),
        "frames": Column("frames of the environment seen", "frames"),
        "model_loss": Column("world model's loss without penalty, mean since the row before"),
        "kl": Column("divergence of the posterior from the prior, without free nats", "nat"),
        "penalty": Column("penalty as estimated, without its weight; NaN where it is not computed"),
        "return": Column("mean return of the episodes that ended since the row before; NaN if none"),
    },
    "jacobians": {
        **_ARM,
        "transitions": Column("number of held-out transitions", "transitions"),
        "f_h": Column("norm of df/dh"),
        "f_h_spectral": Column("spectral norm of df/dh"),
        "f_z": Column("norm of df/dz"),
        "p_h": Column("norm of dp/dh, by the next h"),
        "composed": Column("norm of the one-step map (h, z) to (h', p(h'))"),
        "composed_prior": Column("norm of its part (h, z) to p(h')"),
        "h_norm": Column("mean Euclidean norm of h"),
        "relative": Column("norm of df/dh times ||h|| over ||h'||"),
    },
    "divergence": {
        **_ARM,
        "horizon": _HORIZON,
        "divergence": Column("mean distance of the disturbed from the clean h over the disturbance's length"),
    },
    "prediction": {
        **_ARM,
        "horizon": _HORIZON,
        "image_error": Column("open-loop squared error of the observation, summed over it"),
        "reward_error": Column("open-loop squared error of the reward"),
    },
    "returns": {
        **_ARM,
        "perturbation": Column("clean, gauss, mask, rotation or gravity"),
        "strength": Column("variance, share, degrees or factor; 0: clean"),
        "episodes": Column("episodes played", "episodes"),
        "return": Column("mean return"),
        "random_return": Column("mean return of the random policy in the same episodes"),
    },
}
_FRAMES = {
    **_ARM,
    "kind": Column("true, clean (prediction from clean observations) or perturbed (from perturbed ones)"),
    "step": Column("steps after the last observation; 0: the last observed", "steps"),
    "row": Column("row of the image", "pixels"),
    "column": Column("column of the image", "pixels"),
    "intensity": Column("grey value from 0 to 1"),
}

COLUMNS: dict[str, dict[str, Column]] = {
    "expansion": {
        "seed": Column("random seed of matrices and paths"),
        "matrix": Column("number of the matrix, from 0"),
        "family": Column("random: Frobenius norm 1; identity, semidefinite: a M"),
        "scale": Column("factor a; 1 for random"),
        "epsilon": Column("size of the error"),
        "even": Column("part of the change of the loss that is even in epsilon, simulated"),
        "even_error": Column("its standard error"),
        "even_exact": Column("the same by the exact formula"),
        "odd": Column("part that is odd in epsilon, with drift mu, simulated"),
        "odd_error": Column("its standard error"),
        "odd_exact": Column("the same by the exact formula"),
        "odd_reversed": Column("odd part with drift -mu, simulated"),
    },
    **{f"{prefix}_{name}": columns for prefix in ("pendulum", "dreamer") for name, columns in _AGENT.items()},
    "pendulum_frames": _FRAMES,
}


def write(
    folder: Path, name: str, settings: SeededSettings, rows: Iterable[Mapping[str, Any]], tracker: Tracker
) -> None:
    """Write `rows` as table `name` for the settings' block of seeds; see `jacnorm.training.results.write_rows`."""
    write_rows(folder, name, COLUMNS[name], settings, rows, tracker)
