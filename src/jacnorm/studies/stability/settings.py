"""Settings of the `stability` study: one class per experiment; the defaults are the `smoke` scale.

E1-E10 are the experiments of ``docs/studies/stability.md``. Sparsity is always the fraction of weights *removed*;
`sigma_w2` is the variance of a weight times its fan-in.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jacnorm.settings import Count, Distinct, Positive, SeededSettings, Seeds, Settings, Sparsity, setting

Method = Literal["random", "magnitude", "snip", "grasp", "synflow"]
Scaling = Literal["none", "inverse_sqrt_density", "alpha_mag", "frobenius", "activity"]
Device = Literal["auto", "cpu", "cuda"]
DataSet = Literal["digits", "mnist", "cifar10"]
Depths = Annotated[list[Annotated[int, Field(ge=3)]], Field(min_length=1), Distinct]
"""Depths of classifiers: an input, a read-out and at least one square hidden layer between them."""
Counts = Annotated[list[Count], Field(min_length=1), Distinct]
Positives = Annotated[list[Positive], Field(min_length=1), Distinct]
Sparsities = Annotated[list[Sparsity], Field(min_length=1), Distinct]


class DepthSettings(SeededSettings):
    """E1, E2, E4, E10: log Jacobian norm of square networks against depth, dense and pruned, scaled and not."""

    seeds: Seeds = setting(list(range(10, 20)), "one network per cell and seed")
    widths: Counts = setting([128], "hidden widths", unit="units")
    depth: Count = setting(50, "depth of the deepest network", unit="layers")
    record_every: Count = setting(5, "depths between two measurements", unit="layers")
    relu_sigma_w2: Positives = setting([1.0, 2.0, 4.0], "weight variances of the dense ReLU networks")
    tanh_sigma_w2: Positives = setting([1.0], "weight variances of the dense tanh networks")
    sparsities: Sparsities = setting([0.5, 0.9], "fractions removed at the critical weight variance")


class TheoremSettings(SeededSettings):
    """E2, E3, E4: the limit of the main theorem, the independent-diagonals surrogate and the independence tests."""

    seeds: Seeds = setting(list(range(10, 50)), "one draw of each limit cell per seed")
    seeds_per_job: Count = setting(50, "seeds that share one job", unit="seeds")
    limit_widths: Counts = setting([64, 128, 256], "widths at which the limit is approached", unit="units")
    limit_depths: Counts = setting([1, 3, 10], "numbers of factors of the product", unit="layers")
    surrogate_width: Count = setting(64, "width of the true-against-surrogate comparison", unit="units")
    surrogate_depth: Count = setting(20, "depth of the true-against-surrogate comparison", unit="layers")
    surrogate_sparsity: Sparsity = setting(0.8, "fraction removed by the random and magnitude masks")
    surrogate_draws_per_seed: Count = setting(5, "networks per seed, mask and kind of diagonal", unit="networks")
    independence_widths: Counts = setting([32], "widths of the independence tests", unit="units")
    independence_networks: Count = setting(200, "resampled networks per chi-square test", unit="networks")
    independence_repeats_per_seed: Count = setting(5, "tests per seed and pair", unit="tests")


class ConditionsSettings(SeededSettings):
    """E5, E8: where the theorem's conditions end, at high sparsity and at slowly vanishing correlation."""

    seeds: Seeds = setting(list(range(10, 30)), "one draw per cell and seed; exponents share their noise")
    seeds_per_job: Count = setting(50, "seeds that share one job", unit="seeds")
    sizes: Counts = setting([256, 1024], "matrix sizes of the degree-over-log-size sweep", unit="units")
    degrees_over_log: Positives = setting([0.5, 1.0, 2.0, 8.0], "expected degree divided by the log of the size")
    fixed_degree: Positive = setting(4.0, "expected degree that is held while the size grows", unit="entries per row")
    fixed_degree_sizes: Counts = setting([128, 512, 2048], "matrix sizes at the fixed degree", unit="units")
    network_width: Count = setting(256, "width of the sparse networks", unit="units")
    network_depth: Count = setting(5, "depth of the sparse networks", unit="layers")
    network_degrees: Positives = setting(
        [2.0, 4.0, 8.0, 16.0, 32.0, 64.0], "expected degrees of the sparse networks", unit="entries per row"
    )
    correlated_widths: Counts = setting([128], "widths of the networks with correlated weights", unit="units")
    correlated_depth: Count = setting(20, "depth of the networks with correlated weights", unit="layers")
    exponents: Positives = setting(
        [0.5, 1.0, 1.5, 2.0], "exponents a of the correlation width^-a; the uncorrelated case is always added"
    )

    @model_validator(mode="after")
    def _degrees_fit(self) -> Self:
        widest = max(self.network_degrees)
        if widest > self.network_width:
            raise ValueError(
                f"network_degrees has {widest:g}; at most network_width ({self.network_width}) entries fit a row"
            )
        smallest = min(self.fixed_degree_sizes)
        if self.fixed_degree > smallest:
            raise ValueError(
                f"fixed_degree is {self.fixed_degree:g}; at most the smallest size ({smallest}) entries fit a row"
            )
        for size in self.sizes:
            degree = max(self.degrees_over_log) * math.log(size)
            if not 0 < degree <= size:
                raise ValueError(
                    f"degrees_over_log has {max(self.degrees_over_log):g}, which means {degree:.0f} entries a row at "
                    f"size {size}; it must lie between 0 and the size"
                )
        return self


class ScoresSettings(SeededSettings):
    """E6: input-output Jacobian of networks pruned by five scores under four scalings."""

    seeds: Seeds = setting(list(range(10, 20)), "one network per cell and seed")
    data_set: DataSet = setting("digits", "data set that SNIP, GraSP and activity matching see")
    width: Count = setting(128, "hidden width", unit="units")
    depths: Depths = setting([30], "depths", unit="layers")
    sparsities: Sparsities = setting([0.9], "fractions removed")
    methods: Annotated[list[Method], Field(min_length=1), Distinct] = setting(
        ["random", "magnitude", "synflow", "snip", "grasp"], "pruning scores"
    )
    scalings: Annotated[list[Scaling], Field(min_length=1), Distinct] = setting(
        ["none", "inverse_sqrt_density", "frobenius", "activity"], "factors applied to the kept weights"
    )
    batch: Count = setting(256, "labelled samples that the scores see", unit="samples")
    inputs: Count = setting(8, "samples at which the Jacobian is measured", unit="samples")
    sigma_w2: Positive = setting(2.0, "weight variance")


class TrainingSettings(SeededSettings):
    """What E7 and E9 share: ReLU networks, cross-entropy, stochastic gradient descent with momentum."""

    data_sets: Annotated[list[DataSet], Field(min_length=1), Distinct] = setting(["digits"], "data sets")
    train_samples: Count | None = setting(
        None, "training samples used, a class-balanced subset with validation included; None takes all", unit="samples"
    )
    width: Count = setting(64, "hidden width", unit="units")
    depths: Depths = setting([10], "depths", unit="layers")
    epochs: Count = setting(12, "passes over the training samples", unit="epochs")
    batch: Count = setting(64, "samples per step", unit="samples")
    momentum: float = setting(0.9, "heavy-ball momentum", ge=0, lt=1)
    sigma_w2: Positive = setting(2.0, "weight variance at initialisation")


class TrainabilitySettings(TrainingSettings):
    """E7: does rescaling at initialisation let deep pruned networks train?"""

    seeds: Seeds = setting(list(range(10, 20)), "one training run per arm, learning rate and seed")
    epochs: Count = setting(30, "passes over the training samples", unit="epochs")
    methods: Annotated[list[Literal["random", "magnitude"]], Field(min_length=1), Distinct] = setting(
        ["random"], "pruning scores of the frozen masks"
    )
    sparsities: Sparsities = setting([0.9], "fractions removed")
    learning_rates: Positives = setting([0.01, 0.03], "grid from which each arm takes its best by validation accuracy")
    validation_fraction: float = setting(
        0.15, "share of the training samples held out to choose the learning rate", gt=0, lt=1
    )


class DriftSettings(TrainingSettings):
    """E9: the Jacobian norm of dense networks while they train."""

    seeds: Seeds = setting(list(range(10, 15)), "one training run per depth and seed")
    width: Count = setting(128, "hidden width", unit="units")
    depths: Depths = setting([5, 20], "depths", unit="layers")
    epochs: Count = setting(10, "passes over the training samples", unit="epochs")
    learning_rate: Positive = setting(0.01, "step size")
    measured_epochs: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), Distinct] = setting(
        [0, 1, 2, 5, 10], "epochs after which weights are kept and measured", unit="epochs"
    )

    @model_validator(mode="after")
    def _epochs_happen(self) -> Self:
        if max(self.measured_epochs) > self.epochs:
            raise ValueError(
                f"measured_epochs has {max(self.measured_epochs)}, but training ends after {self.epochs} epochs"
            )
        return self


class StudySettings(Settings):
    """All experiments of the study."""

    depth: DepthSettings = setting(DepthSettings(), "log Jacobian norm against depth")
    theorem: TheoremSettings = setting(TheoremSettings(), "limit, surrogate and independence")
    conditions: ConditionsSettings = setting(ConditionsSettings(), "high sparsity and correlated weights")
    scores: ScoresSettings = setting(ScoresSettings(), "score-based pruning")
    trainability: TrainabilitySettings = setting(TrainabilitySettings(), "training of pruned networks")
    drift: DriftSettings = setting(DriftSettings(), "Jacobian norm during training")
