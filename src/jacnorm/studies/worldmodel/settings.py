"""Settings of the `worldmodel` study: one class per experiment; the defaults are the `smoke` scale.

h is the deterministic state of the recurrent state-space model (RSSM), z its categorical latent (one-hot groups), f the
sequence model h' = f(h, z, a), p the prior's class probabilities of h. lambda is the weight of the penalty on their
Jacobians.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jacnorm.settings import Count, Distinct, Positive, SeededSettings, Seeds, Settings, setting

STUDY = "worldmodel"
Device = Literal["auto", "cpu", "cuda"]
Input = Literal["h", "z"]
NotNegative = Annotated[float, Field(ge=0)]
NotNegatives = Annotated[list[NotNegative], Distinct]
Positives = Annotated[list[Positive], Distinct]
Counts = Annotated[list[Count], Distinct]
NoSeeds = Annotated[list[Annotated[int, Field(ge=0)]], Distinct]


class ExpansionSettings(SeededSettings):
    """Linear stochastic differential equation with an error of size epsilon, against its exact expansion."""

    seeds: Seeds = setting([10], "one set of matrices and paths per seed")
    dimension: Count = setting(4, "dimension of the state")
    matrices: Count = setting(4, "random drift matrices A with Frobenius norm 1", unit="matrices")
    epsilons: Annotated[list[Positive], Field(min_length=2), Distinct] = setting(
        [0.01, 0.02, 0.05, 0.1, 0.2, 0.4], "sizes of the error"
    )
    scales: Annotated[list[Positive], Field(min_length=2), Distinct] = setting(
        [0.25, 0.5, 1.0, 1.5, 2.0, 2.5], "factors a of the family A = a M"
    )
    paths: Annotated[int, Field(ge=2, multiple_of=2)] = setting(20_000, "paths, half of them antithetic", unit="paths")
    steps: Count = setting(100, "Euler-Maruyama steps up to time 1", unit="steps")
    drift: Positive = setting(0.5, "every entry of the error's drift mu and of the start x_0")


class AgentSettings(SeededSettings):
    """What is common to every agent: the penalty, errors in training, and perturbations at evaluation."""

    lambdas: Annotated[list[NotNegative], Field(min_length=1), Distinct] = setting(
        [0.0, 0.01], "weights of the penalty; 0 is the unregularised agent"
    )
    wrt: Annotated[list[Input], Field(min_length=1), Distinct] = setting(
        ["h", "z"], "inputs of f in the penalised Jacobian"
    )
    include_prior: bool = setting(True, "whether the prior's Jacobian is penalised beside that of f")
    power: Literal[1, 2] = setting(2, "penalty on the Frobenius norm (1) or on its square (2)")
    n_proj: Count = setting(1, "random projections per transition of the penalty's estimator")
    f_only_lambdas: Positives = setting([], "weights of runs that penalise f alone, to show what it does to the prior")
    zero_drift: Positives = setting([], "variances of Gaussian errors added to z in training")
    drift: Positives = setting([], "upper ends u of errors added to z in training with mean and variance from U(0, u)")
    gauss: Positives = setting([0.15], "variances of Gaussian noise on the observed images")
    gauss_mean: float = setting(0.0, "its mean")
    masks: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Distinct] = setting([0.5], "shares of perturbed pixels")
    mask_mean: float = setting(0.5, "mean of the noise there")
    mask_variance: Positive = setting(0.15, "its variance")
    mask_mode: Literal["add", "replace"] = setting("add", "whether the noise is added to these pixels or replaces them")
    rotations: Positives = setting([20.0], "angles by which the observed images are rotated", unit="degrees")
    fill: Literal["zero", "edge"] = setting("zero", "what is seen beyond the border of a rotated image")
    clip: bool = setting(True, "whether perturbed images are cut to [0, 1] and rounded to 256 levels")
    gravities: Positives = setting([], "gravities at evaluation, as factors of that in training")


class PendulumSettings(AgentSettings):
    """A small RSSM and actor-critic on a pendulum seen as images without its velocity."""

    seeds: Seeds = setting([10, 11, 12], "paired seeds: data, start, batches and noise are the same for every lambda")
    f_only_lambdas: Positives = setting(
        [0.01], "weights of runs that penalise f alone, to show what it does to the prior"
    )
    episodes: Count = setting(100, "episodes of the random policy to learn from", unit="episodes")
    test_episodes: Count = setting(20, "held-out episodes to measure on", unit="episodes")
    episode_steps: Count = setting(60, "length of an episode", unit="steps")
    episodes_path: str | None = setting(
        None, "own episodes to learn from instead: a safetensors file (see docs)", private=True
    )
    deter: Count = setting(32, "size D of h", unit="units")
    groups: Count = setting(8, "categorical variables of z")
    classes: Count = setting(8, "classes of each")
    hidden: Count = setting(32, "width of the hidden layers", unit="units")
    batch: Count = setting(16, "sequences per update", unit="sequences")
    length: Count = setting(16, "steps per sequence T", unit="steps")
    updates: Count = setting(120, "updates of the world model", unit="updates")
    learning_rate: Positive = setting(1e-3, "step size of Adam, for the world model, the actor and the critic")
    free_nats: NotNegative = setting(0.5, "nats of the divergence between posterior and prior that cost nothing")
    reward_weight: Positive = setting(10.0, "weight of the reward's loss")
    actor_updates: Count = setting(30, "updates of actor and critic on the frozen world model", unit="updates")
    imagination: Count = setting(15, "imagined steps", unit="steps")
    discount: Annotated[float, Field(gt=0, lt=1)] = setting(0.97, "discount of rewards")
    return_lambda: Annotated[float, Field(ge=0, le=1)] = setting(0.95, "mixing of the lambda-return")
    entropy: NotNegative = setting(1e-3, "weight of the actor's entropy")
    lengths: Counts = setting([], "alternative T", unit="steps")
    batches: Counts = setting([], "alternative batches, at the same number of samples in all", unit="sequences")
    evaluation_episodes: Count = setting(64, "episodes played per condition", unit="episodes")
    evaluation_steps: Count = setting(60, "their length", unit="steps")
    gravity: Positive = setting(10.0, "gravity in training", unit="m/s^2")
    jacobian_transitions: Count = setting(256, "held-out transitions with exact Jacobians", unit="transitions")
    context: Count = setting(20, "observed steps before a rollout", unit="steps")
    horizons: Annotated[list[Count], Field(min_length=1), Distinct] = setting(
        [1, 3, 5, 10, 20, 35], "rollout lengths reported", unit="steps"
    )
    disturbance: Positive = setting(0.05, "length of a disturbance of h before a rollout, as a share of ||h||")

    @model_validator(mode="after")
    def _fits_the_episodes(self) -> Self:
        longest = max(self.length, *self.lengths, self.context + max(self.horizons))
        if longest > self.episode_steps:
            raise ValueError(
                f"length, lengths, or context and horizons together, ask for {longest} steps, but an episode has "
                f"{self.episode_steps}; enlarge episode_steps"
            )
        return self


class DreamerSettings(AgentSettings):
    """DreamerV3 itself, in an environment of its own."""

    seeds: NoSeeds = setting([], "paired seeds; none at this scale: compiling alone takes longer than the scale has")
    tasks: Annotated[list[Literal["dummy", "walker_walk", "quadruped_walk"]], Field(min_length=1), Distinct] = setting(
        ["walker_walk"], "tasks of the DeepMind Control Suite; dummy needs no MuJoCo"
    )
    observation: Literal["proprio", "pixels"] = setting("proprio", "what the agent sees")
    size: Literal["debug", "small", "medium", "large"] = setting("debug", "size of its networks")
    frames: Count = setting(2_000, "frames of the environment", unit="frames")
    train_ratio: Positive = setting(64.0, "replayed steps per environment step")
    batch: Count = setting(8, "sequences per update", unit="sequences")
    length: Count = setting(16, "steps per sequence T", unit="steps")
    lengths: Counts = setting([], "alternative T", unit="steps")
    batches: Counts = setting([], "alternative batches", unit="sequences")
    evaluation_episodes: Count = setting(5, "episodes played per condition", unit="episodes")
    jacobian_transitions: Count = setting(256, "held-out transitions with exact Jacobians", unit="transitions")
    context: Count = setting(20, "observed steps before a rollout", unit="steps")
    horizons: Annotated[list[Count], Field(min_length=1), Distinct] = setting(
        [1, 3, 5, 10, 20], "rollout lengths reported", unit="steps"
    )
    disturbance: Positive = setting(0.05, "length of a disturbance of h before a rollout, as a share of ||h||")


class StudySettings(Settings):
    """All experiments of the study."""

    expansion: ExpansionSettings = setting(ExpansionSettings(), "effect of an error in a linear system")
    pendulum: PendulumSettings = setting(PendulumSettings(), "small world model on the pixel pendulum")
    dreamer: DreamerSettings = setting(DreamerSettings(), "DreamerV3 on the DeepMind Control Suite")
