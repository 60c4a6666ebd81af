"""Settings of the `lipschitz` study: one class per experiment; the defaults are the `smoke` scale.

r is the number of weight matrices of a fully connected network; the depth of a WideResNet is 6 n + 4 with n blocks in
each of its three groups.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jacnorm.settings import Count, Distinct, Positive, SeededSettings, Seeds, Settings, setting

Device = Literal["auto", "cpu", "cuda"]
DataSet = Literal["digits", "mnist", "cifar10"]
Activation = Literal["relu", "tanh", "elu", "softplus"]
Normalisation = Literal["batch", "layer", "none"]
Degradation = Literal["low-learning-rate", "no-augmentation", "layer-norm", "no-normalisation"]
Precision = Literal["float32", "bfloat16"]
MatrixCounts = Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1), Distinct]
Coefficients = Annotated[list[Positive], Field(min_length=1), Distinct]


def _is_wide_resnet_depth(depth: int) -> int:
    if depth < 10 or (depth - 4) % 6:
        raise ValueError("the depth of a WideResNet is 10, 16, 22, 28, ... (6 n + 4)")
    return depth


class DepthSettings(SeededSettings):
    """Leading terms and bounds of fully connected networks against depth (author response, figure on MNIST)."""

    seeds: Seeds = setting(list(range(10, 15)), "one network per cell and seed")
    data_set: Literal["digits", "mnist"] = setting("digits", "data set")
    train_samples: Count | None = setting(600, "training samples, class-balanced; None takes all", unit="samples")
    widths: Annotated[list[Count], Field(min_length=1), Distinct] = setting([32], "hidden widths", unit="units")
    depths: MatrixCounts = setting([2, 4, 6, 8, 10], "numbers r of weight matrices", unit="layers")
    activations: Annotated[list[Activation], Field(min_length=1), Distinct] = setting(
        ["relu", "tanh"], "activation functions"
    )
    biases: bool = setting(False, "train biases; the inequality between the two leading terms then does not apply")
    learning_rate: Positive = setting(2e-3, "step size of Adam")
    batch: Count = setting(60, "samples per step", unit="samples")
    margin: Positive = setting(1.0, "a network stops training once every training margin exceeds this")
    max_epochs: Count = setting(200, "passes after which training stops in any case", unit="epochs")
    theorem_samples: Count = setting(
        50, "training samples over which all interlayer Jacobian norms are maximised", unit="samples"
    )


class ResidualSettings(SeededSettings):
    """Leading terms of WideResNets against depth (author response, figure on CIFAR-10) and Figure 1."""

    seeds: Seeds = setting([10, 11, 12], "one network per cell and seed")
    data_set: DataSet = setting("digits", "data set")
    train_samples: Count | None = setting(600, "training samples, class-balanced; None takes all", unit="samples")
    stem: Count = setting(8, "channels of the first convolution", unit="channels")
    channels: Count = setting(
        8, "channels of the first group; the next two have two and four times as many", unit="channels"
    )
    depths: Annotated[list[int], Field(min_length=1), Distinct] = setting(
        [10, 16, 22], "depths of the sweep, with batch norm", unit="layers"
    )
    epochs: Count = setting(20, "passes over the training samples in the sweep", unit="epochs")
    learning_rate: Positive = setting(
        0.1, "first step size of the sweep; times 0.2 after 30, 60 and 75 % of the epochs"
    )
    compared_depth: int = setting(10, "depth of Figure 1, with batch norm and without any", unit="layers")
    compared_epochs: Count = setting(60, "passes of Figure 1", unit="epochs")
    compared_learning_rate: Positive = setting(0.05, "first step size of Figure 1")
    batch: Count = setting(60, "samples per step", unit="samples")
    momentum: float = setting(0.9, "Nesterov momentum", gt=0, lt=1)
    weight_decay: float = setting(5e-4, "weight decay, on all parameters", ge=0)
    clip: Positive = setting(5.0, "largest norm of a run's gradient; longer ones are shortened to it")
    augment: bool = setting(False, "reflect-pad by 4, crop at random and flip the training images")
    precision: Precision = setting("float32", "number format of the training passes")
    top: Count = setting(100, "largest training-set values shown in Figure 1", unit="samples")
    measured_samples: Count | None = setting(
        None, "training samples over which norms are maximised; None takes all", unit="samples"
    )

    @model_validator(mode="after")
    def _depths_exist(self) -> Self:
        for depth in (*self.depths, self.compared_depth):
            _is_wide_resnet_depth(depth)
        return self


class RegulariserSettings(SeededSettings):
    """The Jacobian regulariser with paired seeds (Table 1), on an MLP or a WideResNet."""

    network: Literal["mlp", "wrn"] = setting("mlp", "mlp: two normalised hidden layers; wrn: WideResNet")
    data_set: DataSet = setting("digits", "data set")
    train_samples: Count | None = setting(
        100, "training samples of each seed's own subset; None takes all", unit="samples"
    )
    validation_samples: Annotated[int, Field(ge=0)] = setting(
        0, "samples held out to choose the coefficient; 0 needs a single coefficient", unit="samples"
    )
    test_samples: Count = setting(
        700, "most test samples of a seed: the test split, then training samples not in use", unit="samples"
    )
    width: Count = setting(100, "hidden width of the MLP", unit="units")
    depth: int = setting(16, "depth of the WideResNet", unit="layers")
    stem: Count = setting(16, "channels of the WideResNet's first convolution", unit="channels")
    channels: Count = setting(160, "channels of its first group", unit="channels")
    settings: Annotated[list[Degradation], Field(min_length=1), Distinct] = setting(
        ["low-learning-rate", "layer-norm", "no-normalisation"], "what is taken away from the baseline, one at a time"
    )
    shift: Annotated[int, Field(ge=0)] = setting(
        0, "largest shift of a training image in each direction (augmentation), edges mirrored; 0: none", unit="pixels"
    )
    flip: bool = setting(False, "mirror training images at random (augmentation)")
    learning_rate: Positive = setting(0.1, "first step size; times 0.2 after 30, 60 and 75 % of the epochs")
    low_learning_rate: Positive = setting(0.01, "first step size of the setting low-learning-rate")
    epochs: Count = setting(150, "passes over the training samples", unit="epochs")
    batch: Count = setting(50, "samples per step", unit="samples")
    momentum: float = setting(0.9, "Nesterov momentum", gt=0, lt=1)
    weight_decay: float = setting(5e-4, "weight decay, on all parameters", ge=0)
    variant: Literal["paper", "released"] = setting(
        "paper", "regulariser as printed in the paper, or as computed by the released code"
    )
    threshold: Positive = setting(0.1, "squared Jacobian norm from which a layer of a sample is penalised")
    coefficients: Coefficients = setting(
        [0.03], "weights of the penalty; of several, the best by mean validation error is taken in each setting"
    )
    precision: Precision = setting("float32", "number format of the training passes")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        _is_wide_resnet_depth(self.depth)
        if len(self.coefficients) > 1 and not self.validation_samples:
            raise ValueError(
                f"coefficients has {len(self.coefficients)} values and validation_samples is 0; hold samples out, "
                "or give one coefficient"
            )
        if "no-augmentation" in self.settings and not (self.shift or self.flip):
            raise ValueError("settings has no-augmentation, but nothing is augmented; set shift or flip")
        return self


class PairedSettings(RegulariserSettings):
    """Many paired seeds of a small MLP: the effect of the regulariser with its interval."""

    seeds: Seeds = setting(list(range(10, 26)), "paired seeds: one subset, initialisation and data order each")
    seeds_per_job: Count = setting(100, "seeds that share one job", unit="seeds")


class TableSettings(RegulariserSettings):
    """Table 1 with WideResNets."""

    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Distinct] = setting(
        [], "paired seeds; an empty list leaves the table out"
    )
    network: Literal["mlp", "wrn"] = setting("wrn", "mlp: two normalised hidden layers; wrn: WideResNet")


class StudySettings(Settings):
    """All experiments of the study."""

    depth: DepthSettings = setting(DepthSettings(), "fully connected networks against depth")
    residual: ResidualSettings = setting(ResidualSettings(), "WideResNets against depth, with and without batch norm")
    paired: PairedSettings = setting(PairedSettings(), "the Jacobian regulariser on small MLPs")
    table: TableSettings = setting(TableSettings(), "the Jacobian regulariser on WideResNets")
