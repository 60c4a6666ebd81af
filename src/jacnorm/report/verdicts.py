"""From quantities to verdicts, by one rule for all studies.

A criterion *holds* if its whole interval lies on the asked side of the margin, *fails* if the whole interval lies on
the other side, *straddles* otherwise, and is *undecided* if there are too few seeds, a NaN, or no interval. A claim is
`reproduced` if every deciding quantity holds, `contradicted` if at least one fails, else `inconclusive`; `not tested`
if the study says why it has no evidence. At a scale outside the claim's `expected_at` the numbers are shown and the
verdict stays `inconclusive`, whichever way they point. Each interval has its own confidence; none is widened for the
number of criteria, so a claim with many criteria is harder to reproduce and easier to contradict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jacnorm.errors import UserError
from jacnorm.report.claims import Claim, Criterion, Scale, claims_digest, load_claims
from jacnorm.report.intervals import Estimate, NoInterval, Statistic, estimate, point_value, statistic_name
from jacnorm.report.records import (
    Accounting,
    ClaimVerdict,
    Outcome,
    QuantityVerdict,
    StudyVerdicts,
    Verdict,
    package_version,
    read_verdicts,
    write_verdicts,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Accounting",
    "ClaimVerdict",
    "Estimand",
    "Measured",
    "NotTested",
    "Outcome",
    "Quantity",
    "QuantityVerdict",
    "StudyVerdicts",
    "Verdict",
    "judge_claim",
    "judge_quantity",
    "judge_study",
    "read_verdicts",
    "write_verdicts",
]


@dataclass(frozen=True)
class Quantity:
    """What an estimand function measured for one criterion.

    criterion: id in claims.yaml; several quantities may serve one criterion and each must satisfy it.
    label: which one ("width 256, sparsity 0.9"). samples: one number per independent seed or draw, or one row per seed
    where `statistic` is a function of an (n, k) array; their order carries no meaning. statistic: "mean", "median",
    "geometric mean", "proportion" (of zeros and ones) or a function. reference: the theory or the other arm in the same
    unit, shown beside the estimate; it takes no part in the outcome, so a criterion about a deviation gives deviations.
    runs: where the runs went. seeds: which seed or draw each sample comes from, so that a dot can be traced to its run.
    """

    criterion: str
    label: str
    samples: Sequence[float] | np.ndarray
    runs: Accounting
    statistic: Statistic = "mean"
    reference: float | None = None
    seeds: Sequence[int | str] | None = None


@dataclass(frozen=True)
class NotTested:
    """Why there is no evidence: for a whole claim, or, with `criterion`, for one of its criteria."""

    reason: str
    criterion: str | None = None


Measured = Sequence[Quantity | NotTested] | NotTested
Estimand = Callable[[Mapping[str, "pd.DataFrame"], Any], Measured]


def judge_quantity(criterion: Criterion, quantity: Quantity) -> QuantityVerdict:
    """Estimate one quantity and hold it against its criterion.

    Raises ValueError if the samples have no (n,) or (n, k) shape, the seeds another length, or if the statistic does
    not fit the interval.
    """
    samples = np.asarray(quantity.samples, dtype=np.float64)
    if samples.ndim not in (1, 2):
        raise ValueError(f"quantity {quantity.label!r} has samples of shape {samples.shape}; expected (n,) or (n, k)")
    if quantity.seeds is not None and len(quantity.seeds) != len(samples):
        raise ValueError(f"quantity {quantity.label!r} names {len(quantity.seeds)} seeds for {len(samples)} samples")
    broken = np.isnan(samples) if samples.ndim == 1 else np.isnan(samples).any(axis=1)
    n, lacking = len(samples), int(broken.sum())
    found: Estimate | None = None
    value: float | None = None
    reason = ""
    if lacking:
        reason = f"{lacking} of {n} samples {'is' if lacking == 1 else 'are'} NaN, and none is dropped"
    elif n == 0:
        reason = "there is no sample"
    else:
        try:
            found = estimate(samples, quantity.statistic, criterion.interval, criterion.confidence)
            value, reason = found.value, "; ".join(found.notes)
        except NoInterval as problem:
            value, reason = point_value(samples, quantity.statistic), str(problem)
        if n < criterion.min_seeds:
            reason = f"{n} samples are too few (at least {criterion.min_seeds} are asked for)" + (
                f"; {reason}" if reason else ""
            )
    if value is not None and math.isnan(value):
        value = None
    decided = found is not None and n >= criterion.min_seeds
    return QuantityVerdict(
        criterion=criterion.id,
        label=quantity.label,
        outcome=_outcome(criterion, found) if decided else Outcome.undecided,  # type: ignore[arg-type]
        reason=reason,
        statistic=found.instead if found and found.instead else statistic_name(quantity.statistic),
        estimate=value,
        low=found.low if found else None,
        high=found.high if found else None,
        method=found.method if found else "no interval",
        standard_error=found.standard_error if found else None,
        spread=_spread(samples),
        **_effects(criterion, value, found, _spread(samples)),
        reference=None if quantity.reference is None else float(quantity.reference),
        samples=samples.tolist(),
        seeds=None if quantity.seeds is None else list(quantity.seeds),
        not_a_number=lacking,
        runs=quantity.runs,
    )


def judge_claim(claim: Claim, measured: Measured, scale: Scale | None = None) -> ClaimVerdict:
    """Judge one claim from what its estimand function measured.

    `scale` selects the criteria that are asked and whether the claim is expected to be decidable; None asks all.
    Quantities of a criterion that is not asked at this scale are passed over. Raises ValueError if one names an unknown
    criterion, or if a criterion that is asked has neither a quantity nor a NotTested that says why.
    """
    expected = scale is None or scale in claim.expected_at
    if isinstance(measured, NotTested):
        return ClaimVerdict(
            claim=claim, verdict=Verdict.not_tested, expected=expected, reasons=[measured.reason], quantities=[]
        )
    asked = [criterion for criterion in claim.criteria if scale is None or scale in criterion.at]
    rows: list[QuantityVerdict] = []
    for item in measured:
        criterion = next((c for c in claim.criteria if c.id == item.criterion), None)
        if criterion is None:
            known = ", ".join(c.id for c in claim.criteria)
            raise ValueError(f"{claim.estimand} gives criterion {item.criterion!r}, but {claim.id} has {known}")
        if criterion in asked:
            rows.append(_untested(item) if isinstance(item, NotTested) else judge_quantity(criterion, item))
    silent = [criterion.id for criterion in asked if criterion.id not in {row.criterion for row in rows}]
    if silent:
        raise ValueError(
            f"{claim.estimand} gives nothing for criterion {silent[0]!r} of {claim.id}; "
            "return a NotTested that says why"
        )
    rows.sort(key=lambda row: [criterion.id for criterion in asked].index(row.criterion))
    deciding = [row for row in rows if claim.criterion(row.criterion).decides]
    if not deciding:
        reasons = ["No deciding criterion is asked at this scale."]
        return ClaimVerdict(
            claim=claim, verdict=Verdict.not_tested, expected=expected, reasons=reasons, quantities=rows
        )
    verdict = _verdict([row.outcome for row in deciding])
    reasons = _reasons(deciding)
    if not expected:
        reasons.insert(
            0,
            f"Not expected to be decidable at scale {scale} (declared: {', '.join(claim.expected_at)}); "
            f"the numbers by themselves would say {verdict}.",
        )
        verdict = Verdict.inconclusive if verdict is not Verdict.not_tested else verdict
    return ClaimVerdict(claim=claim, verdict=verdict, expected=expected, reasons=reasons, quantities=rows)


def judge_study(
    claims: Path | str,
    estimands: Mapping[str, Estimand] | object,
    tables: Mapping[str, pd.DataFrame],
    settings: Any,
    scale: Scale,
) -> StudyVerdicts:
    """Judge every claim of the ledger at path `claims`.

    estimands: the study's judge module, or a mapping from name to function; each function takes (tables, settings).
    A claim whose evidence tables do not all exist is `not tested`. Raises UserError if an estimand is missing.
    """
    ledger = load_claims(claims)
    verdicts = []
    for claim in ledger.claims:
        function = (
            estimands.get(claim.estimand)
            if isinstance(estimands, Mapping)
            else getattr(estimands, claim.estimand, None)
        )
        if not callable(function):
            raise UserError(
                f'study "{ledger.study}", claim {claim.id}: judge.py has no function {claim.estimand!r}; '
                'add it or correct "estimand"'
            )
        absent = [table for table in claim.evidence_tables if table not in tables]
        measured = (
            NotTested(f"Table {absent[0]!r} was not made at scale {scale}.") if absent else function(tables, settings)
        )
        verdicts.append(judge_claim(claim, measured, scale))
    return StudyVerdicts(
        study=ledger.study,
        scale=scale,
        paper=ledger.paper,
        package_version=package_version(),
        claims_digest=claims_digest(claims),
        claims=verdicts,
    )


def _outcome(criterion: Criterion, found: Estimate) -> Outcome:
    intervals = [(found.low, found.high)] + ([found.also] if found.also else [])
    asked_low, asked_high = criterion.bounds
    if all(asked_low <= low and high <= asked_high for low, high in intervals):
        return Outcome.holds
    if all(high < asked_low or low > asked_high for low, high in intervals):
        return Outcome.fails
    return Outcome.straddles


def _effects(
    criterion: Criterion, value: float | None, found: Estimate | None, spread: float | None
) -> dict[str, float | None]:
    if value is None:
        return {"effect": None, "effect_in_spreads": None, "effect_in_standard_errors": None}
    low, high = criterion.bounds
    effect = min(value - low if low > -math.inf else math.inf, high - value if high < math.inf else math.inf)
    error = found.standard_error if found else None
    in_errors = effect / error if error else None
    if error and found and found.log_scale:
        # The interval of a geometric mean is symmetric for logarithms; a margin at or below 0 is then infinitely far.
        below = math.log(value / low) if low > 0 else math.inf
        above = math.log(high / value) if high > 0 else -math.inf
        in_errors = min(below, above) / (error / value)
    return {
        "effect": effect,
        "effect_in_spreads": effect / spread if spread else None,
        "effect_in_standard_errors": in_errors,
    }


def _spread(samples: np.ndarray) -> float | None:
    if samples.ndim != 1 or len(samples) < 2 or not np.isfinite(samples).all():
        return None
    return float(np.std(np.sort(samples), ddof=1))


def _untested(item: NotTested) -> QuantityVerdict:
    nothing = dict.fromkeys(
        [
            "estimate",
            "low",
            "high",
            "standard_error",
            "spread",
            "effect",
            "effect_in_spreads",
            "effect_in_standard_errors",
        ]
    )
    return QuantityVerdict(
        criterion=str(item.criterion),
        label="",
        outcome=Outcome.not_tested,
        reason=item.reason,
        statistic="",
        method="no interval",
        reference=None,
        samples=[],
        seeds=None,
        not_a_number=0,
        runs=None,
        **nothing,
    )


def _verdict(outcomes: Iterable[Outcome]) -> Verdict:
    outcomes = set(outcomes)
    if Outcome.fails in outcomes:
        return Verdict.contradicted
    if outcomes == {Outcome.holds}:
        return Verdict.reproduced
    return Verdict.not_tested if outcomes == {Outcome.not_tested} else Verdict.inconclusive


_VERBS = {
    Outcome.holds: ("holds", "hold"),
    Outcome.fails: ("fails", "fail"),
    Outcome.straddles: ("straddles the margin", "straddle the margin"),
    Outcome.undecided: ("is undecided", "are undecided"),
    Outcome.not_tested: ("is not tested", "are not tested"),
}


def _tally(outcomes: list[Outcome]) -> str:
    if len(set(outcomes)) == 1:
        verb = _VERBS[outcomes[0]][len(outcomes) > 1]
        return (
            f"The deciding quantity {verb}."
            if len(outcomes) == 1
            else f"All {len(outcomes)} deciding quantities {verb}."
        )
    counts = [(outcome, outcomes.count(outcome)) for outcome in Outcome if outcome in outcomes]
    return f"Of {len(outcomes)} deciding quantities, {', '.join(f'{n} {_VERBS[o][n > 1]}' for o, n in counts)}."


def _reasons(rows: list[QuantityVerdict]) -> list[str]:
    """The tally, then a sentence for each quantity and each set of runs that needs a word."""
    sentences = [_tally([row.outcome for row in rows])]
    for row in rows:
        if row.reason:
            sentences.append(f"{row.criterion}{f' ({row.label})' if row.label else ''}: {row.reason}.")
        sentence = f"{row.runs.sentence}." if row.runs and not row.runs.complete else ""
        if sentence and sentence not in sentences:
            sentences.append(sentence)
    return sentences
