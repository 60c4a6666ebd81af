"""The tables of the study: what their columns mean, and how a job's block of seeds becomes a file.

A row of attention is one query of one head: its keys, their logits and weights. Means are over the rows of a head that
have more than N keys; the others have nothing left out, and are counted.
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
_TEXT = Column("name of the text; synthetic for rows with known geometry")
_ROWS = Column("rows averaged over", "rows")
_HEAD = {
    "seed": _SEED,
    "data_set": _TEXT,
    "model": Column("trained, untrained, the name of a given model, or synthetic"),
    "layer": Column("number of the layer, from 1; 0 for synthetic rows"),
    "head": Column("number of the head in its layer, from 1"),
    "normaliser": Column("function from logits to weights"),
}
_SPACE = Column("vectors x of the tokens")
_LENGTH = Column("length of the window, or keys of a synthetic row", "tokens")
_SELECTED = Column("selected keys N", "keys")

COLUMNS: dict[str, dict[str, Column]] = {
    "language_fits": {
        "seed": _SEED,
        "data_set": _TEXT,
        "model": Column("trained, or the name of a given model"),
        "steps": Column("updates made; 0 for a given model", "steps"),
        "training_tokens": Column("tokens that training sequences were taken from", "tokens"),
        "train_loss": Column("mean loss of the last tenth of updates; NaN: not trained or diverged", "nat per token"),
        "validation_loss": Column(
            "loss on the tokens held out, or on its windows for a given model; NaN after divergence", "nat per token"
        ),
        "diverged_at": Column("step whose loss was not finite; -1: none", "steps"),
    },
    "weights": {
        **_HEAD,
        "length": _LENGTH,
        "rows": _ROWS,
        "within": Column("share of weights within the bounds of Corollary 1, in logs, tolerance 1e-6"),
        "excess": Column("largest log weight minus its upper bound, or lower bound minus log weight", "nat"),
        "largest_weight": Column("mean largest weight of a row"),
        "zeros": Column("share of visible keys with weight exactly 0"),
    },
    "distances": {
        **_HEAD,
        "space": _SPACE,
        "length": _LENGTH,
        "selected": _SELECTED,
        "rows": _ROWS,
        "skipped_rows": Column("rows with no more than N keys, left out", "rows"),
        "selected_mass": Column("mean sum of the selected weights"),
        "distance": Column("mean distance to the keys left out (Eq. 7)"),
        "bound": Column("mean bound U of Theorem 1(i)"),
        "loose_bound": Column("mean bound U' of Theorem 1(i)"),
        "within_bound": Column("share of rows with distance at most U, relative tolerance 1e-5"),
        "within_loose_bound": Column("share of rows with distance at most U', relative tolerance 1e-5"),
        "expectation": Column("mean closed form over random sets (Theorem 1(ii), E_CF)"),
        "expectation_all": Column("the same without the factor N / (L - 1) (E_ALL)"),
        "expectation_sampled": Column("mean over sampled random sets, in some rows (E_MC); NaN: not sampled"),
        "expectation_of_sampled": Column("closed form E_CF in the same rows; NaN: not sampled"),
        "sampling_error": Column("standard error of expectation_sampled over the sampled sets; NaN: not sampled"),
    },
    "collapse": {
        **_HEAD,
        "fraction": Column("share of the visible keys that is selected"),
        "rows": _ROWS,
        "distance": Column("mean distance to the keys left out (Eq. 7)"),
    },
    "separability": {
        **_HEAD,
        "space": _SPACE,
        "length": _LENGTH,
        "selected": _SELECTED,
        "rows": _ROWS,
        "skipped_rows": Column("rows with no more than N keys, left out", "rows"),
        "ratio": Column("mean share of the selected keys strictly inside the ball (N_s / N)"),
        "radius": Column("mean radius: smallest distance of a key left out"),
        "lower": Column("mean lower bound of Theorem 2"),
        "upper": Column("mean upper bound of Theorem 2"),
        "above_lower": Column("share of rows whose ratio is at least the lower bound, tolerance 1e-9"),
    },
    "sensitivity": {
        **_HEAD,
        "temperature": Column("temperature T"),
        "perturbation": Column("length epsilon of the perturbation of the logits"),
        "rows": _ROWS,
        "change": Column("mean change of the weights over epsilon (g of Alg. 5)"),
    },
    "jacobians": {
        **_HEAD,
        "temperature": Column("temperature T"),
        "rows": _ROWS,
        "frobenius": Column("mean Frobenius norm of the Jacobian of the weights by the logits"),
        "frobenius_per_root": Column("mean Frobenius norm over the root of the number of keys"),
        "spectral": Column("mean spectral norm of that Jacobian"),
        "spectral_max": Column("its largest value over rows"),
        "spectral_largest_product": Column("largest product of T and the spectral norm over rows"),
        "above_quarter": Column("share of rows with spectral norm above 1 / (4 T)"),
        "above_half": Column("share of rows with spectral norm above 1 / (2 T), relative tolerance 1e-9"),
    },
}
MEASURED = tuple(name for name in COLUMNS if name != "language_fits")
"""Tables of measurements; each experiment has its own, those of `synthetic` under the names of `synthetic_table`."""


def synthetic_table(name: str) -> str:
    """Name of a table of measurements for rows with known geometry: the experiments of a study share no file."""
    return f"synthetic_{name}"


COLUMNS |= {synthetic_table(name): COLUMNS[name] for name in MEASURED}


def write(
    folder: Path, name: str, settings: SeededSettings, rows: Iterable[Mapping[str, Any]], tracker: Tracker
) -> None:
    """Write `rows` as table `name` for the settings' block of seeds; see `jacnorm.training.results.write_rows`."""
    write_rows(folder, name, COLUMNS[name], settings, rows, tracker)
