"""The two arms of the regulariser's experiments, paired by seed, and the coefficient that stands for each setting.

A cell is a setting (`baseline` or what was taken away from it), trained with or without the regulariser.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from jacnorm.report.estimands import by_seed, paired, select

if TYPE_CHECKING:
    import pandas as pd

BASELINE = "baseline"
DEGRADATIONS = ("low-learning-rate", "no-augmentation", "layer-norm", "no-normalisation")


def chosen_coefficient(errors: pd.DataFrame, setting: str) -> float | None:
    """Weight of the penalty with the smallest mean validation error over the seeds; None if none was trained.

    Test errors take no part. A run without a validation error (it diverged) counts as wrong on every sample. A single
    coefficient needs no choice. Raises ValueError if there are several and no validation error at all.
    """
    rows = select(errors, setting=setting, regularised=True)
    coefficients = sorted(rows.coefficient.unique())
    if len(coefficients) < 2:
        return coefficients[0] if coefficients else None
    if rows.validation_error.isna().all():
        raise ValueError(f"{setting} was trained with {len(coefficients)} coefficients and has no validation error")
    means = rows.validation_error.fillna(100.0).groupby(rows.coefficient).mean()
    return float(means.idxmin())


def arm(rows: pd.DataFrame, errors: pd.DataFrame, setting: str, *, regularised: bool) -> pd.DataFrame:
    """Rows of one cell, with the regulariser at its chosen coefficient.

    rows: the table of errors or of norms; errors: the table of errors, by which the coefficient is chosen.
    """
    rows = select(rows, setting=setting, regularised=regularised)
    return select(rows, coefficient=chosen_coefficient(errors, setting)) if regularised else rows


def error(errors: pd.DataFrame, setting: str, *, regularised: bool, column: str = "test_error") -> pd.Series:
    """Error of one cell by seed, in percent; NaN where the run left none."""
    return by_seed(arm(errors, errors, setting, regularised=regularised), column)


def gain(errors: pd.DataFrame, setting: str, column: str = "test_error") -> pd.Series:
    """Points of error that the regulariser takes away, by seed."""
    return paired(
        error(errors, setting, regularised=False, column=column),
        error(errors, setting, regularised=True, column=column),
    )


def trained(errors: pd.DataFrame) -> list[tuple[str, bool]]:
    """Cells in the table, in the order of the paper's: (setting, regularised)."""
    present = set(zip(errors.setting, errors.regularised.astype(bool), strict=True))
    return [(s, r) for s in (BASELINE, *DEGRADATIONS) for r in (False, True) if (s, r) in present]


def norm_ratio(norms: pd.DataFrame, errors: pd.DataFrame, setting: str) -> pd.Series:
    """Squared margin-Jacobian norm, mean over layers, without the regulariser over that with it, by seed."""
    means = [
        arm(norms, errors, setting, regularised=regularised).groupby("seed").squared_norm.agg(_mean)
        for regularised in (False, True)
    ]
    shared = means[0].index.intersection(means[1].index)
    with np.errstate(divide="ignore", invalid="ignore"):
        return means[0][shared] / means[1][shared]


def layer_mean(norms: pd.DataFrame, errors: pd.DataFrame, setting: str, column: str, *, regularised: bool) -> pd.Series:
    """Mean over layers of a column of norms, by seed."""
    return arm(norms, errors, setting, regularised=regularised).groupby("seed")[column].agg(_mean)


def _mean(values: pd.Series) -> float:
    """Mean that a NaN makes NaN, unlike that of pandas."""
    return math.fsum(values) / len(values)
