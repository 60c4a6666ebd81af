"""The tables of the study: what their columns mean, and how a job's block of seeds becomes a file."""

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
_WIDTH = Column("width of the hidden layers", "units")
_DEPTH = Column("number of weight matrices", "layers")
_METHOD = Column("pruning score; dense: nothing removed")
_SPARSITY = Column("fraction of weights removed")
_SCALING = Column("factor on the kept weights")
_LOG_NORM = Column("natural log of the spectral norm of the input-output Jacobian; -inf: exactly zero", "nat")
_LEARNING_RATE = Column("step size of stochastic gradient descent")
_EPOCH = Column("passes over the training samples so far; 0 is initialisation", "epochs")

COLUMNS: dict[str, dict[str, Column]] = {
    "depth": {
        "seed": _SEED,
        "activation": Column("activation function"),
        "width": _WIDTH,
        "sigma_w2": Column("variance of a weight before pruning, times fan-in"),
        "method": _METHOD,
        "sparsity": _SPARSITY,
        "scaling": _SCALING,
        "depth": _DEPTH,
        "log_norm": _LOG_NORM,
        "log_gain": Column("natural log of the norm of the Jacobian times a fixed unit vector", "nat"),
    },
    "limit": {
        "seed": _SEED,
        "product": Column("which diagonals the product carries besides those between its factors, or its shape"),
        "width": _WIDTH,
        "depth": Column("number of factors of the product", "factors"),
        "log_norm": _LOG_NORM,
        "log_limit": Column("its infinite-width value", "nat"),
    },
    "surrogate": {
        "seed": _SEED,
        "draw": Column("number of the network within the seed"),
        "method": _METHOD,
        "diagonal": Column("true: ReLU derivatives; surrogate: independent Bernoulli(1/2)"),
        "log_norm": _LOG_NORM,
    },
    "independence": {
        "seed": _SEED,
        "repeat": Column("number of the test within the seed"),
        "width": _WIDTH,
        "pair": Column("which two binary variables are tested"),
        "networks": Column("resampled networks in the 2 x 2 table", "networks"),
        "p_value": Column("p-value of Pearson's chi-square test of independence, 1 degree of freedom"),
    },
    "edge_matrices": {
        "seed": _SEED,
        "sweep": Column("degree-over-log: degree grows with the log of the size; fixed-degree: it does not"),
        "entries": Column("law of the kept entries"),
        "size": Column("rows and columns of the matrix", "units"),
        "degree": Column("expected entries per row", "entries per row"),
        "degree_over_log": Column("expected degree over the natural log of the size"),
        "norm": Column("spectral norm of the rescaled matrix; 2 in the dense limit"),
        "residual": Column("relative residual of the squared norm's eigenpair"),
    },
    "edge_networks": {
        "seed": _SEED,
        "width": _WIDTH,
        "depth": _DEPTH,
        "degree": Column("expected entries per row", "entries per row"),
        "log_norm": _LOG_NORM,
    },
    "correlated": {
        "seed": _SEED,
        "width": _WIDTH,
        "depth": _DEPTH,
        "correlation": Column("equicorrelated: all entries of a layer; row: entries of one row"),
        "diagonal": Column("linear: none; surrogate: independent Bernoulli(1/2); true: ReLU derivatives"),
        "exponent": Column("a in the correlation width^-a; inf: uncorrelated"),
        "log_norm": _LOG_NORM,
    },
    "scores": {
        "seed": _SEED,
        "depth": _DEPTH,
        "method": _METHOD,
        "sparsity": _SPARSITY,
        "scaling": _SCALING,
        "log_norm": Column(
            "log spectral norm of the input-output Jacobian, mean over inputs; -inf: zero at some input", "nat"
        ),
        "dead": Column("share of inputs at which the Jacobian is exactly zero"),
        "factor": Column("factor on the kept weights, mean over hidden layers"),
    },
    "trainability": {
        "seed": _SEED,
        "data_set": _DATA_SET,
        "width": _WIDTH,
        "depth": _DEPTH,
        "method": _METHOD,
        "sparsity": _SPARSITY,
        "scaling": _SCALING,
        "learning_rate": _LEARNING_RATE,
        "train_loss": Column("cross-entropy, mean over the last epoch", "nat"),
        "validation_accuracy": Column("share of validation samples classified correctly after training"),
        "test_accuracy": Column("share of test samples classified correctly after training"),
        "diverged_at": Column("step whose loss was not finite; -1: none", "steps"),
    },
    "curves": {
        "seed": _SEED,
        "data_set": _DATA_SET,
        "width": _WIDTH,
        "depth": _DEPTH,
        "epoch": _EPOCH,
        "train_loss": Column("cross-entropy, mean over the epoch", "nat"),
        "test_accuracy": Column("share of test samples classified correctly"),
        "diverged_at": Column("step whose loss was not finite; -1: none", "steps"),
    },
    "start": {
        "seed": _SEED,
        "data_set": _DATA_SET,
        "width": _WIDTH,
        "depth": _DEPTH,
        "method": _METHOD,
        "sparsity": _SPARSITY,
        "scaling": _SCALING,
        "log_norm": Column("log spectral norm of the input-output Jacobian at initialisation, mean over inputs", "nat"),
    },
    "drift": {
        "seed": _SEED,
        "data_set": _DATA_SET,
        "width": _WIDTH,
        "depth": _DEPTH,
        "epoch": _EPOCH,
        "log_norm": Column("log spectral norm of the input-output Jacobian, mean over inputs", "nat"),
        "hidden_norm": Column(
            "spectral norm of a hidden weight matrix over the root of its variance times fan-in, mean over layers"
        ),
        "row_correlation": Column("width times the mean correlation of two entries in a row, mean over hidden layers"),
        "column_correlation": Column(
            "width times the mean correlation of two entries in a column, mean over hidden layers"
        ),
    },
}


def write(
    folder: Path, name: str, settings: SeededSettings, rows: Iterable[Mapping[str, Any]], tracker: Tracker
) -> None:
    """Write `rows` as table `name` for the settings' block of seeds; see `jacnorm.training.results.write_rows`."""
    write_rows(folder, name, COLUMNS[name], settings, rows, tracker)
