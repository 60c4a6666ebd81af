"""Settings of the `sharpening` study: one class per experiment; the defaults are the `smoke` scale.

E1-E10 are the experiments of ``docs/studies/sharpening.md``. Sharpness is the largest eigenvalue of the Hessian of the
mean training cost. The square cost is half the squared distance to the one-hot target, summed over classes.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jacnorm.settings import Count, Distinct, Positive, SeededSettings, Seeds, Settings, setting

Device = Literal["auto", "cpu", "cuda"]
DataSet = Literal["digits", "cifar10", "cifar100"]
Network = Literal["mlp", "cnn", "vgg11", "vgg11-bn", "resnet18"]
Activation = Literal["tanh", "relu", "gelu"]
Scaling = Literal["pixel-mean", "pixel", "channel"]
Smoothing = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
NoSeeds = Annotated[list[Annotated[int, Field(ge=0)]], Distinct]
DataSets = Annotated[list[DataSet], Field(min_length=1), Distinct]
Networks = Annotated[list[Network], Field(min_length=1), Distinct]
Positives = Annotated[list[Positive], Distinct]
Counts = Annotated[list[Count], Distinct]


class NetworkSettings(SeededSettings):
    """What is trained, on what, and where it is measured."""

    train_samples: Count | None = setting(
        300, "training samples, class-balanced, the same for every seed; None takes all", unit="samples"
    )
    pool: Count | None = setting(
        1000,
        "class-balanced part of the training split that training samples come from, the rest of it joins the test "
        "samples; None: the whole split",
        unit="samples",
    )
    scaling: Scaling = setting(
        "pixel-mean",
        "pixel-mean: every pixel minus its mean, all over one standard deviation; pixel: mean 0 and variance 1 for "
        "every pixel; channel: for every channel",
    )
    activation: Activation = setting("tanh", "activation function of mlp and cnn")
    width: Count = setting(64, "units of each hidden layer of the mlp", unit="units")
    hidden_layers: Count = setting(2, "hidden layers of the mlp", unit="layers")
    channels: Count = setting(16, "channels of the cnn", unit="channels")
    curvature_samples: Count = setting(
        5000, "training samples, the first ones, over which curvature is measured", unit="samples"
    )
    jacobian_samples: Count = setting(
        300, "training samples, the first ones, with a Jacobian; as many of the test set", unit="samples"
    )
    chunk: Count = setting(
        1000,
        "samples in the network at once; also batch norm's batch in full-batch descent",
        unit="samples",
    )
    runs_together: Count = setting(100, "most runs of equal shape that advance together", unit="runs")


class DescentSettings(NetworkSettings):
    """Full-batch gradient descent: progressive sharpening, edge of stability, the chain of the ansatz (E1-E3, E9)."""

    seeds: Seeds = setting([10, 11, 12, 13], "one run per cost, step size and seed")
    data_sets: DataSets = setting(["digits"], "data sets")
    networks: Networks = setting(["mlp"], "networks, see docs/studies/sharpening.md")
    square_learning_rates: Positives = setting([0.1, 0.4], "step sizes with the square cost")
    smoothings: Annotated[list[Smoothing], Distinct] = setting(
        [0.0, 0.1, 0.3, 0.5], "label smoothing of the cross-entropy runs"
    )
    entropy_learning_rates: Positives = setting([0.5], "step sizes with cross-entropy, at each smoothing")
    edge_smoothing: Smoothing = setting(0.1, "label smoothing of further cross-entropy runs, meant to reach the edge")
    edge_learning_rates: Positives = setting([2.0], "their step sizes")
    steps: Count = setting(600, "updates", unit="steps")
    measure_every: Count = setting(50, "updates between two measurements", unit="steps")
    stop_accuracy: Share | None = setting(
        None, "share of training samples classified correctly at which a run ends; None: never"
    )
    kernel_samples: Annotated[int, Field(ge=0)] = setting(
        100, "training samples, the first ones, of the tangent kernel of an mlp; 0 leaves it out", unit="samples"
    )


class ImageSettings(DescentSettings):
    """The same on larger images and with convolutions."""

    seeds: NoSeeds = setting([], "one run per cost, step size and seed; an empty list leaves the experiment out")
    data_sets: DataSets = setting(["cifar10"], "data sets")
    networks: Networks = setting(["mlp", "cnn"], "networks, see docs/studies/sharpening.md")
    pool: Count | None = setting(
        None,
        "class-balanced part of the training split that training samples come from, the rest of it joins the test "
        "samples; None: the whole split",
        unit="samples",
    )
    scaling: Scaling = setting(
        "pixel",
        "pixel-mean: every pixel minus its mean, all over one standard deviation; pixel: mean 0 and variance 1 for "
        "every pixel; channel: for every channel",
    )


class RegulariserSettings(NetworkSettings):
    """Stochastic gradient descent with one regulariser at a time, at two stopping rules (E4-E7)."""

    seeds: Seeds = setting([10, 11, 12], "one run per arm and seed")
    data_sets: DataSets = setting(["digits"], "data sets")
    networks: Networks = setting(["mlp"], "networks, see docs/studies/sharpening.md")
    train_samples: Count | None = setting(
        200, "training samples, class-balanced, others for every seed; None takes all", unit="samples"
    )
    activation: Activation = setting("relu", "activation function of mlp and cnn")
    width: Count = setting(128, "units of each hidden layer of the mlp", unit="units")
    learning_rates: Annotated[list[Positive], Field(min_length=1), Distinct] = setting(
        [0.1], "step sizes at which every regulariser is tried"
    )
    batch: Count = setting(32, "samples per step", unit="samples")
    updates: Count = setting(1400, "updates of the fixed budget at that batch size", unit="steps")
    other_learning_rates: Positives = setting([0.02, 0.5], "further step sizes without any regulariser")
    other_batches: Counts = setting(
        [8, 200], "further batch sizes without any regulariser, at equal updates and at equal epochs", unit="samples"
    )
    weight_decays: Positives = setting([1e-3, 5e-3, 2e-2], "weight decay, added to the gradient")
    smoothings: Annotated[list[Share], Distinct] = setting([0.1, 0.3], "label smoothing")
    mixups: Positives = setting([0.2, 1.0], "alpha of mixup's Beta(alpha, alpha)")
    sam_radii: Positives = setting([0.05, 0.2], "radius rho of sharpness-aware minimisation")
    jacobian_penalties: Positives = setting(
        [0.03], "weight of half the squared Frobenius norm of the Jacobian, by one probe per sample and step"
    )
    shifts: Positives = setting([], "largest shift of a training image, bilinear (augmentation)", unit="pixels")
    crops: Counts = setting(
        [],
        "zeros around a training image, which is cropped and mirrored at random (augmentation)",
        unit="pixels",
    )
    matched_loss: Positive = setting(
        0.03, "plain training cross-entropy at or below which the second rule stops a run", unit="nat"
    )
    look_every: Count = setting(10, "updates between two looks at the plain training loss", unit="steps")
    decays: Annotated[list[Share], Distinct] = setting(
        [], "shares of the updates after which the step size is divided by 5"
    )


class ScalingSettings(NetworkSettings):
    """Full-batch descent of the mlp at several sample sizes and widths, and on a known support (E8, E10)."""

    seeds: Seeds = setting([10, 11, 12], "one run per cell and seed")
    data_set: DataSet = setting("digits", "data set")
    jacobian_samples: Count = setting(
        1000, "training samples, the first ones, with a Jacobian; as many of the test set", unit="samples"
    )
    sizes: Annotated[list[Count], Field(min_length=1), Distinct] = setting(
        [100, 300, 1000], "training samples of the sweep over sample sizes", unit="samples"
    )
    smoothing: Smoothing = setting(0.1, "label smoothing of that sweep's cross-entropy")
    learning_rate: Positive = setting(0.5, "its step size")
    widths: Annotated[list[Count], Field(min_length=1), Distinct] = setting(
        [16, 64], "hidden widths of the sweep over widths, with the square cost", unit="units"
    )
    width_learning_rate: Positive = setting(0.1, "its step size")
    parametrisations: Annotated[list[Literal["standard", "ntk"]], Field(min_length=1), Distinct] = setting(
        ["standard", "ntk"],
        "standard: weights of variance of order 1/fan-in; ntk: unit variance, the factor in the forward pass",
    )
    steps: Count = setting(600, "updates", unit="steps")
    dimension: Annotated[int, Field(ge=1, le=4)] = setting(
        2, "dimension of the cube of uniform inputs, whose support is known", unit="dimensions"
    )
    cube_sizes: Annotated[list[Count], Field(min_length=1), Distinct] = setting(
        [30, 100, 300], "training samples on the cube", unit="samples"
    )
    cube_learning_rate: Positive = setting(0.3, "step size on the cube, with the square cost")

    @model_validator(mode="after")
    def _sizes_exist(self) -> Self:
        if self.pool is not None and max(self.sizes) > self.pool:
            raise ValueError(f"sizes asks for {max(self.sizes)} samples, but pool holds {self.pool}; enlarge pool")
        return self


class StudySettings(Settings):
    """All experiments of the study."""

    descent: DescentSettings = setting(DescentSettings(), "full-batch gradient descent")
    images: ImageSettings = setting(ImageSettings(), "full-batch gradient descent on larger images")
    regularisers: RegulariserSettings = setting(RegulariserSettings(), "regularisers under stochastic gradient descent")
    scaling: ScalingSettings = setting(ScalingSettings(), "sample size, width and a known support")
