"""The end points of stochastic gradient descent that claims compare: the arms of one data set and network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import pandas as pd

from jacnorm.report.estimands import account, by_seed, paired, quantity, select
from jacnorm.report.verdicts import Accounting, Quantity
from jacnorm.studies.sharpening.arms import Arm, arms
from jacnorm.studies.sharpening.conditions import Key, Number, Tables, keys_of, plural, unconverged, with_keys
from jacnorm.studies.sharpening.settings import RegulariserSettings, StudySettings
from jacnorm.studies.sharpening.trends import rank_correlation

BASE = "none"
FEWEST_ARMS = 5
"""Arms that a rank correlation over regularisers takes (C8)."""
SHARPNESS, JACOBIAN = "sharpness", "jacobian_max"
RULE_WORDS = {"updates": "fixed updates", "epochs": "equal epochs", "matched": "equal training loss"}
ARM = ["regulariser", "strength", "learning_rate", "batch"]


def gap_of(ends: pd.DataFrame) -> pd.Series:
    """Generalisation gap: test minus training cross-entropy."""
    return ends.test_loss - ends.train_loss


def accuracy_gap(ends: pd.DataFrame) -> pd.Series:
    """Training minus test accuracy."""
    return ends.train_accuracy - ends.test_accuracy


@dataclass(frozen=True)
class Sweep:
    """The arms of one data set and network."""

    data_set: str
    network: str
    settings: RegulariserSettings
    ends: pd.DataFrame
    fits: pd.DataFrame

    @property
    def arms(self) -> list[Arm]:
        """All planned arms."""
        return arms(self.settings)

    def planned(self, regulariser: str | None = None, *, learning_rate: float) -> list[Arm]:
        """No regulariser and then the strengths of `regulariser`, or of all, at one step size and the base batch."""
        return [
            arm
            for arm in self.arms
            if arm.learning_rate == learning_rate
            and arm.batch == self.settings.batch
            and (arm.regulariser == BASE or regulariser in (None, arm.regulariser))
        ]

    def base(self, learning_rate: float) -> Arm:
        """The arm without regulariser."""
        return self.planned(BASE, learning_rate=learning_rate)[0]

    def middle(self, regulariser: str, learning_rate: float) -> Arm | None:
        """The arm of middle strength, of two the stronger; None if the regulariser is not tried."""
        strengths = sorted(self.planned(regulariser, learning_rate=learning_rate)[1:], key=lambda arm: arm.strength)
        return strengths[len(strengths) // 2] if strengths else None

    @cached_property
    def _fates(self) -> dict[str, tuple[pd.DataFrame, set[Key], set[Key], set[Key]]]:
        """By rule: end points without diverged runs, runs that have them, diverged, or stayed above the loss."""
        found = {}
        key = ["seed", *ARM]
        for rule in RULE_WORDS:
            ends, fits = select(self.ends, rule=rule), select(self.fits, rule=rule)
            diverged = keys_of(fits[fits.diverged_at >= 0], key)
            short = keys_of(fits[~fits.reached.astype(bool) & (fits.diverged_at < 0)], key)
            found[rule] = with_keys(ends, key, diverged, out=True), keys_of(ends, key), diverged, short
        return found

    def rows(self, rule: str, these: Sequence[Arm]) -> pd.DataFrame:
        """End points of `these` by `rule`, those of diverged runs left out."""
        return _of(self._fates[rule][0], these)

    def runs(self, rule: str, these: Sequence[Arm], excluded: Mapping[str, Iterable[Key]] | None = None) -> Accounting:
        """Where the runs of `these` went."""
        _, present, diverged, short = self._fates[rule]
        reasons = {"did not come down to the training loss": short, **(excluded or {})}
        planned = [(seed, *_key(arm)) for seed, arm in product(self.settings.seeds, these)]
        return account(planned, present, diverged=diverged, excluded=reasons, what="runs")

    def label(self, rule: str, words: str) -> str:
        """Which quantity, for a reader."""
        return f"{self.data_set}, {self.network}, {words}, {RULE_WORDS[rule]}"

    def correlation(
        self,
        criterion: str,
        rule: str,
        these: Sequence[Arm],
        first: Callable[[pd.DataFrame], pd.Series],
        column: str,
        fewest: int,
    ) -> Quantity:
        """Rank correlation of `first` and `column` over the arms of each seed that has at least `fewest`."""
        return self._over_arms(
            criterion, rule, these, fewest, lambda ends: rank_correlation(first(ends), ends[column]), [column]
        )

    def advantage(self, criterion: str, rule: str, these: Sequence[Arm]) -> Quantity:
        """Rank correlation of gap and Jacobian norm minus that of gap and sharpness."""

        def number(ends: pd.DataFrame) -> float:
            gap = gap_of(ends)
            return rank_correlation(gap, ends[JACOBIAN]) - rank_correlation(gap, ends[SHARPNESS])

        return self._over_arms(criterion, rule, these, FEWEST_ARMS, number, [SHARPNESS])

    def _over_arms(
        self, criterion: str, rule: str, these: Sequence[Arm], fewest: int, number: Number, columns: Sequence[str]
    ) -> Quantity:
        ends = self.rows(rule, these)
        enough = ends.groupby("seed").filter(lambda one: len(one) >= fewest)
        few = keys_of(ends[~ends.seed.isin(enough.seed)], ["seed", *ARM])
        runs = self.runs(rule, these, {f"its seed has fewer than {fewest} arms at this end": few})
        samples = pd.Series({seed: number(one) for seed, one in enough.groupby("seed")}, dtype=float)
        label = self.label(rule, f"{_rates(these)}, {len(these)} arms") + _converged_at(ends, columns)
        return quantity(criterion, label, samples, runs, "median")

    def ratio(self, criterion: str, rule: str, arm: Arm, over: Arm, column: str) -> Quantity:
        """`column` of one arm over that of another, in the same seed."""
        ends = self.rows(rule, [arm, over])
        above, below = (by_seed(_of(ends, [each]), column) for each in (arm, over))
        shared = above.index.intersection(below.index)
        label = self.label(rule, _against(arm, over)) + _converged_at(ends, [column])
        return quantity(criterion, label, above[shared] / below[shared], self.runs(rule, [arm, over]), "median")

    def difference(self, criterion: str, arm: Arm, base: Arm) -> Quantity:
        """Gap of one arm minus that of another after the fixed number of updates, in the same seed."""
        ends = self.rows("updates", [arm, base]).assign(gap=gap_of)
        gaps = (by_seed(_of(ends, [each]), "gap") for each in (arm, base))
        label = self.label("updates", _against(arm, base))
        return quantity(criterion, label, paired(*gaps), self.runs("updates", [arm, base]), "median")

    def effective_share(self, criterion: str, rule: str, these: Sequence[Arm], base: Arm) -> Quantity:
        """Share of the effective arms of each seed whose Jacobian norm is below that of `base` in the same seed.

        An arm is effective if its mean gap is below that of `base` minus the latter's standard deviation over seeds.
        """
        ends = self.rows(rule, [base, *these]).assign(gap=gap_of)
        own = {arm: _of(ends, [arm]).set_index("seed") for arm in (base, *these)}
        plain = own[base]
        least = np.mean(plain.gap.to_numpy()) - np.std(plain.gap.to_numpy(), ddof=1) if len(plain) > 1 else -np.inf
        # A gap that is not a number must not drop out unseen, so it counts as effective and makes the share NaN.
        effective = [arm for arm in these if len(own[arm]) and not np.mean(own[arm].gap.to_numpy()) >= least]
        shares = {}
        for seed in plain.index:
            lower = [_lower(own[arm].loc[seed], plain.loc[seed]) for arm in effective if seed in own[arm].index]
            if lower:
                shares[seed] = float(np.mean(lower))
        words = f"step size {base.learning_rate:g}, {len(effective)} of {len(these)} strengths effective"
        runs = self.runs(rule, [base, *effective])
        return quantity(criterion, self.label(rule, words), pd.Series(shares, dtype=float), runs, "median")


def _lower(own: pd.Series, plain: pd.Series) -> float:
    """1 if the Jacobian norm is below that without regulariser, else 0; NaN if it or the gap is not a number."""
    numbers = [own[JACOBIAN], plain[JACOBIAN], own.gap, plain.gap]
    return float("nan") if np.isnan(numbers).any() else float(own[JACOBIAN] < plain[JACOBIAN])


def sweeps(tables: Tables, settings: StudySettings) -> Iterator[Sweep]:
    """One of each data set and network."""
    this = settings.regularisers
    for data_set, network in product(this.data_sets, this.networks):
        cell = {"data_set": data_set, "network": network}
        yield Sweep(data_set, network, this, select(tables["endpoints"], **cell), select(tables["sgd_fits"], **cell))


def _of(rows: pd.DataFrame, these: Sequence[Arm]) -> pd.DataFrame:
    """Rows of some arms."""
    return with_keys(rows, ARM, {_key(arm) for arm in these})


def _key(arm: Arm) -> Key:
    """The arm as its columns in the tables, in the order of `ARM`."""
    return tuple(arm.columns[name] for name in ARM)


def _rates(these: Sequence[Arm]) -> str:
    return plural("step size", sorted({arm.learning_rate for arm in these}))


def _against(arm: Arm, over: Arm) -> str:
    """What differs between two arms."""
    if arm.regulariser != BASE:
        return f"{arm.regulariser} {arm.strength:g}, step size {arm.learning_rate:g}"
    if arm.batch != over.batch:
        return f"batch {arm.batch} over {over.batch}, step size {arm.learning_rate:g}"
    return f"step size {arm.learning_rate:g} over {over.learning_rate:g}"


def _converged_at(ends: pd.DataFrame, columns: Sequence[str]) -> str:
    return unconverged(ends, [column for column in columns if column == SHARPNESS])
