"""The tables of the study: what their columns mean, and how a job's block of seeds becomes a file.

Jacobians are those of the logits by the standardised input, norms are spectral. A run has no rows after the step at
which it diverged. Eigenvalues that did not converge are the best Ritz values, and say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jacnorm.files import Column
from jacnorm.settings import SeededSettings
from jacnorm.training.results import write_rows
from jacnorm.training.tracking import Tracker

_SEED = Column("random seed of the run")
_DATA_SET = Column("name of the data set")
_NETWORK = Column("architecture")
_STEP = Column("updates made", "steps")
_DIVERGED = Column("step whose loss was not finite; -1: none", "steps")
_RATE = Column("step size")
_RUN = {
    "seed": _SEED,
    "data_set": _DATA_SET,
    "network": _NETWORK,
    "cost": Column("square or cross-entropy"),
    "smoothing": Column("label smoothing of the cross-entropy; 0 for the square cost"),
    "learning_rate": _RATE,
}
_ARM = {
    "seed": _SEED,
    "data_set": _DATA_SET,
    "network": _NETWORK,
    "regulariser": Column("none, weight decay, label smoothing, mixup, sam, jacobian penalty, shifts or crops"),
    "strength": Column("its strength, in the unit of its setting; 0 for none"),
    "learning_rate": _RATE,
    "batch": Column("samples per step", "samples"),
    "rule": Column("updates: fixed number of updates; epochs: of epochs; matched: plain training cross-entropy"),
}
_FIT = {
    "train_loss": Column("mean cost over the training samples", "nat for cross-entropy"),
    "train_accuracy": Column("share of training samples classified correctly"),
    "test_loss": Column("mean cost over the test samples", "nat for cross-entropy"),
    "test_accuracy": Column("share of test samples classified correctly"),
}
_CURVATURE = {
    "sharpness": Column("largest eigenvalue of the Hessian of the mean cost"),
    "sharpness_residual": Column("residual of its Ritz vector over the Ritz value"),
    "sharpness_converged": Column("whether that residual met the tolerance; else it is the best Ritz value"),
    "gauss_newton": Column("largest eigenvalue of the Gauss-Newton matrix"),
    "gauss_newton_residual": Column("residual of its Ritz vector over the Ritz value"),
    "gauss_newton_converged": Column("whether that residual met the tolerance; else it is the best Ritz value"),
    "cost_hessian_max": Column("largest spectral norm of a sample's cost Hessian by its logits"),
    "cost_hessian_mean": Column("mean spectral norm of the samples' cost Hessians by their logits"),
}
_JACOBIANS = {
    "jacobian_max": Column("largest Jacobian norm over the training samples"),
    "jacobian_mean": Column("mean Jacobian norm over the training samples"),
    "jacobian_argmax": Column("training sample at which it is largest, counted from 0 in the stored order"),
    "test_jacobian_max": Column("largest Jacobian norm over the test samples"),
    "test_jacobian_mean": Column("mean Jacobian norm over the test samples"),
    "distance": Column("95 % quantile over test samples of the distance to the nearest training sample"),
    "variation": Column("largest spectral norm of the Jacobian's change from a test to the nearest training sample"),
}
_DESCENT: dict[str, dict[str, Column]] = {
    "fits": {
        **_RUN,
        "steps": Column("updates made", "steps"),
        "train_loss": Column("training cost at the last update; NaN after divergence", "nat for cross-entropy"),
        "diverged_at": Column("step whose loss was not finite or above 1000 times the first; -1: none", "steps"),
    },
    "trajectory": {
        **_RUN,
        "step": _STEP,
        **_FIT,
        **_CURVATURE,
        **_JACOBIANS,
        "threshold": Column("2 over the step size, above which gradient descent on a quadratic is unstable"),
        "kernel_top": Column("largest eigenvalue of the tangent kernel over the number of its samples; NaN: none"),
        "lower_bound": Column("lower bound on the Lipschitz norm from targets and residuals (LB, Theorem 5.1)"),
        "slope": Column("largest slope of the outputs between two training samples (S, Theorem 5.1)"),
        "products": Column("products with the Hessian and with the Gauss-Newton matrix spent", "products"),
    },
    "layer_kernels": {
        **_RUN,
        "step": _STEP,
        "layer": Column("number of the weight matrix from the input, from 1"),
        "kernel_top": Column("largest eigenvalue of that layer's part of the tangent kernel, divided by the samples"),
    },
    "measuring_cost": {
        **_RUN,
        "training": Column("gradients of the whole training set that training took", "gradients"),
        "curvature": Column("what curvature took, a product counted as two gradients", "gradients"),
        "jacobians": Column("what Jacobians took, each row counted as half a gradient", "gradients"),
    },
}

COLUMNS: dict[str, dict[str, Column]] = {
    **{("descent_fits" if name == "fits" else name): columns for name, columns in _DESCENT.items()},
    **{f"image_{name}": columns for name, columns in _DESCENT.items()},
    "sgd_fits": {
        **_ARM,
        "step": _STEP,
        "reached": Column("whether the training loss of the matched rule was reached; true for other rules"),
        "diverged_at": _DIVERGED,
    },
    "endpoints": {**_ARM, "step": _STEP, **_FIT, **_CURVATURE, **_JACOBIANS},
    "scaling_fits": {
        "seed": _SEED,
        "part": Column("sizes: training samples; widths: hidden width; cube: uniform inputs"),
        "samples": Column("training samples", "samples"),
        "width": Column("hidden width", "units"),
        "parametrisation": Column("standard or ntk"),
        "train_loss": Column("training cost at the last update; NaN after divergence", "nat for cross-entropy"),
        "diverged_at": _DIVERGED,
    },
    "sizes": {
        "seed": _SEED,
        "data_set": Column("name of the data set, or cube"),
        "samples": Column("training samples", "samples"),
        "train_loss": Column("mean cost over the training samples", "nat for cross-entropy"),
        "jacobian_max": Column("largest Jacobian norm over the training samples"),
        "test_jacobian_max": Column("largest Jacobian norm over the test samples; on the cube over a dense grid"),
        "distance": Column(
            "95 % quantile of the test samples' distance to the nearest training sample; on the cube the largest"
        ),
        "variation": Column(
            "largest spectral norm of the Jacobian's change from a test to the nearest training sample"
        ),
    },
    "widths": {
        "seed": _SEED,
        "width": Column("hidden width", "units"),
        "parametrisation": Column("standard or ntk"),
        "sharpness_start": Column("sharpness before training"),
        "sharpness_end": Column("sharpness after training"),
        "sharpness_converged": Column("whether both met the tolerance; else they are the best Ritz values"),
        "jacobian_start": Column("largest Jacobian norm over the training samples before training"),
        "jacobian_end": Column("the same after training"),
        "first_layer_share": Column(
            "first layer's share of the largest eigenvalue of the kernel: its own over the whole's, after training"
        ),
    },
    "identities": {
        "seed": _SEED,
        "width": Column("hidden width", "units"),
        "parametrisation": Column("standard or ntk"),
        "kernel_error": Column("closed-form tangent kernel against automatic differentiation, relative"),
        "logits_error": Column("change of the logits when inputs are divided and first weights multiplied, relative"),
        "later_layers_error": Column("largest change of the kernels of layers 2 and above, likewise"),
        "jacobian_error": Column("Jacobian norm against the factor times the one before, likewise"),
    },
}


def write(
    folder: Path, name: str, settings: SeededSettings, rows: Iterable[Mapping[str, Any]], tracker: Tracker
) -> None:
    """Write `rows` as table `name` for the settings' block of seeds; see `jacnorm.training.results.write_rows`."""
    write_rows(folder, name, COLUMNS[name], settings, rows, tracker)
