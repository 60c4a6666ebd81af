"""What judge and figures read off a run: correlations, and the parts of a trajectory that a claim asks about."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import rankdata


def rank_correlation(x: pd.Series, y: pd.Series) -> float:
    """Spearman's rank correlation of two columns of equal length; NaN if one has a NaN or does not vary."""
    if np.isnan(x).any() or np.isnan(y).any():
        return float("nan")
    return _correlation(rankdata(x), rankdata(y))


def log_correlation(x: pd.Series, y: pd.Series) -> float:
    """Pearson's correlation of the logs; NaN if a number is not positive, is NaN, or one column does not vary."""
    if not ((x > 0).all() and (y > 0).all()):
        return float("nan")
    return _correlation(np.log(x.to_numpy(float)), np.log(y.to_numpy(float)))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else float("nan")


def reaches_threshold(run: pd.DataFrame) -> bool:
    """Whether sharpness is at or above 2 over the step size at some checkpoint."""
    return bool((run.sharpness >= run.threshold).any())


def before_threshold(run: pd.DataFrame) -> pd.DataFrame:
    """Checkpoints before sharpness first reaches 2 over the step size, in order of steps; step 0 belongs to them.

    Afterwards sharpness is held at the threshold and dips below it now and then; those checkpoints say nothing. A NaN
    ends nothing, so that what is computed from the checkpoints is NaN too.
    """
    run = run.sort_values("step")
    return run[~(run.sharpness >= run.threshold).cummax()]


def last_half(run: pd.DataFrame) -> pd.DataFrame:
    """Checkpoints from half of the last step on, in order of steps."""
    run = run.sort_values("step")
    return run[run.step >= run.step.iloc[-1] / 2]


def last_third(run: pd.DataFrame) -> pd.DataFrame:
    """Checkpoints from two thirds of the last step on, in order of steps."""
    run = run.sort_values("step")
    return run[run.step >= 2 * run.step.iloc[-1] / 3]
