"""The tables of the study: what their columns mean, and how a job's block of seeds becomes a file.

Leading terms carry no margin: they are what stands before 1/margin in the bounds, so that their ratio is defined for
every network. Logs are natural.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jacnorm.files import Column
from jacnorm.settings import SeededSettings
from jacnorm.training.results import write_rows
from jacnorm.training.tracking import Tracker

_SEED = Column("random seed of the network")
_DATA_SET = Column("name of the data set")
_ACTIVATION = Column("activation function")
_WIDTH = Column("width of the hidden layers", "units")
_MATRICES = Column("number r of weight matrices", "layers")
_WRN_DEPTH = Column("depth of the WideResNet, 6 n + 4", "layers")
_STAGE = Column("initial: before training; trained: after it")
_NORMALISATION = Column("batch: batch norm; layer: layer norm; none")
_DIVERGED = Column("step whose loss was not finite; -1: none", "steps")
_NETWORK = Column("mlp: two normalised hidden layers; wrn: WideResNet")
_SETTING = Column("baseline, or what was taken away from it")
_REGULARISED = Column("trained with the Jacobian regulariser")
_COEFFICIENT = Column("weight of the penalty; 0 without it")
_NETWORKS_KEY = {
    "seed": _SEED,
    "data_set": _DATA_SET,
    "activation": _ACTIVATION,
    "width": _WIDTH,
    "depth": _MATRICES,
}
_CELL = {
    "seed": _SEED,
    "data_set": _DATA_SET,
    "network": _NETWORK,
    "setting": _SETTING,
    "regularised": _REGULARISED,
    "coefficient": _COEFFICIENT,
}
_MARGINS = {
    "margin": Column("smallest margin over the training samples"),
    "margin_p01": Column("1 % quantile of the training margins"),
    "margin_p10": Column("10 % quantile of the training margins"),
    "margin_p50": Column("median of the training margins"),
}
_ERRORS = {
    **_CELL,
    "variant": Column("paper: gradient of each sample's margin; released: of the batch mean"),
    "learning_rate": Column("first step size"),
    "test_error": Column("test samples classified wrongly after the last epoch", "%"),
    "best_test_error": Column("smallest test error over the epochs; flatters, since it is chosen on test samples", "%"),
    "validation_error": Column("validation samples classified wrongly after the last epoch; NaN: none held out", "%"),
    "train_error": Column("training samples classified wrongly after the last epoch, without augmentation", "%"),
    "train_loss": Column("cross-entropy, mean over the last epoch", "nat"),
    "penalised_share": Column("share of samples and layers above the threshold, mean over the last epoch"),
    "diverged_at": _DIVERGED,
}
_NORMS = {
    **_CELL,
    "layer": Column("number of the normalisation output from the input, from 1"),
    "squared_norm": Column("squared norm of the margin's gradient there, mean over training samples"),
    "penalised_share": Column("share of training samples whose squared norm reaches the threshold"),
    "released_share": Column("that share if the squared norm is divided by the squared batch size, as released"),
}

COLUMNS: dict[str, dict[str, Column]] = {
    "fits": {
        **_NETWORKS_KEY,
        "epochs": Column("passes over the training samples until training stopped", "epochs"),
        "reached": Column("whether every training margin exceeded the target"),
        "train_loss": Column("cross-entropy, mean over the last epoch before stopping", "nat"),
        "test_accuracy": Column("share of test samples classified correctly after training"),
        "diverged_at": _DIVERGED,
    },
    "leading": {
        **_NETWORKS_KEY,
        "stage": _STAGE,
        **_MARGINS,
        "log_ours_weighted": Column(
            "log leading term with (2,1) norms of the weights, from interlayer Jacobians", "nat"
        ),
        "log_spectral_weighted": Column("log spectral bound with (2,1) norms, without the root of n", "nat"),
        "log_ours_unweighted": Column("log of the sum of Jacobian norm times hidden norm", "nat"),
        "log_spectral_unweighted": Column("log of the input norm times the product of spectral norms", "nat"),
        "log_largest_term": Column("log of the largest single Jacobian norm times hidden norm", "nat"),
        "not_applicable": Column("why the inequality between the leading terms need not hold; empty: it must"),
    },
    "layers": {
        **_NETWORKS_KEY,
        "stage": _STAGE,
        "layer": Column("number i of the weight matrix, from 1"),
        "log_jacobian": Column("log of the largest norm of the Jacobian of the output by pre-activation i", "nat"),
        "log_hidden": Column("log of the largest norm of the input of matrix i", "nat"),
        "log_spectral_norm": Column("log spectral norm of matrix i", "nat"),
        "log_rows": Column("log of the sum of the row norms of matrix i, its (2,1) norm transposed", "nat"),
        "log_entries": Column("log of the sum of the absolute entries of matrix i, its (1,1) norm", "nat"),
    },
    "theorem": {
        **_NETWORKS_KEY,
        "samples": Column("training samples over which norms were maximised", "samples"),
        "pairs": Column("interlayer Jacobian norms that the bound needs", "pairs"),
        "passes": Column("layer steps applied to the products of one sample to get all pairs", "steps"),
        "separate_passes": Column("layer steps if each pair were computed by itself", "steps"),
        "log_h1": Column("log first term with the (H1) part alone, the leading term over the margin", "nat"),
        "log_h2": Column("log first term with the (H2) part alone", "nat"),
        "log_h3": Column(
            "log first term with the curvature part alone: (H3), or for ReLU the pre-activation part", "nat"
        ),
        "log_jac": Column("log first term with the Jacobian part alone", "nat"),
        "log_bound": Column(
            "log first term of the theorem without the root of n; inf: a margin is not positive", "nat"
        ),
        "log_simplified": Column("log first term of the simplified theorem; inf: a margin is not positive", "nat"),
        "log_spectral": Column("log spectral bound without the root of n; inf: a margin is not positive", "nat"),
    },
    "augmented": {
        **_NETWORKS_KEY,
        "split": Column("train: samples that set the thresholds; test; noise: inputs far from the data"),
        "smallest_gap": Column("smallest augmented minus plain loss"),
        "largest_gap": Column("largest augmented minus plain loss"),
        "indicator_slope": Column("largest slope of the soft indicator between random points, times its threshold"),
        "ramp_slope": Column("largest slope of the ramp loss between random points, times its margin"),
    },
    "residual_fits": {
        "seed": _SEED,
        "data_set": _DATA_SET,
        "depth": _WRN_DEPTH,
        "normalisation": _NORMALISATION,
        "part": Column("sweep: against depth; figure1: with and without batch norm"),
        "train_error": Column("training samples classified wrongly after training", "%"),
        "test_error": Column("test samples classified wrongly after training", "%"),
        "train_loss": Column("cross-entropy, mean over the last epoch", "nat"),
        "diverged_at": _DIVERGED,
    },
    "residual": {
        "seed": _SEED,
        "data_set": _DATA_SET,
        "depth": _WRN_DEPTH,
        "stage": _STAGE,
        **_MARGINS,
        "log_ours_unweighted": Column(
            "log of the sum over convolutions and read-out of Jacobian norm times input norm", "nat"
        ),
        "log_spectral_unweighted": Column("log of the input norm times the product of layer norms", "nat"),
        "log_ours_weighted": Column("log leading term with unrolled (2,1) norms", "nat"),
        "log_spectral_weighted": Column("log spectral bound with unrolled (2,1) norms, without the root of n", "nat"),
    },
    "blocks": {
        "seed": _SEED,
        "data_set": _DATA_SET,
        "depth": _WRN_DEPTH,
        "normalisation": _NORMALISATION,
        "rank": Column("place among the training samples, 1 is the largest"),
        "log_value": Column(
            "log of the sum over groups of hidden norm times Jacobian norm, over the sample's margin", "nat"
        ),
        "misclassified": Column("training samples left out because their margin is not positive", "samples"),
    },
    "paired_errors": _ERRORS,
    "paired_norms": _NORMS,
    "table_errors": _ERRORS,
    "table_norms": _NORMS,
}


def write(
    folder: Path, name: str, settings: SeededSettings, rows: Iterable[Mapping[str, Any]], tracker: Tracker
) -> None:
    """Write `rows` as table `name` for the settings' block of seeds; see `jacnorm.training.results.write_rows`."""
    write_rows(folder, name, COLUMNS[name], settings, rows, tracker)
