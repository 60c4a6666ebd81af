"""What `verdicts.json` holds: typed records, written and read back without loss."""

from __future__ import annotations

import math
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, WithJsonSchema, model_validator

from jacnorm.errors import UserError
from jacnorm.files import read_json, write_json
from jacnorm.report.claims import Claim, Paper, Record, Scale, complaint

_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

# JSON has no infinities, and a dead network's log-norm is -inf: such numbers travel as the words inf, -inf and nan.
Number = Annotated[
    float,
    BeforeValidator(lambda value: _WORDS.get(value, value) if isinstance(value, str) else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else str(value), when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": sorted(_WORDS)}]}),
]


class Outcome(StrEnum):
    """What one quantity says about its criterion."""

    holds = "holds"
    fails = "fails"
    straddles = "straddles"
    undecided = "undecided"
    not_tested = "not tested"


class Verdict(StrEnum):
    """What the evidence says about one claim."""

    reproduced = "reproduced"
    contradicted = "contradicted"
    inconclusive = "inconclusive"
    not_tested = "not tested"


class Accounting(Record):
    """Where the runs behind a quantity went: planned = finished + diverged + lost + excluded."""

    planned: int = Field(ge=0)
    finished: int = Field(ge=0, description="Ran to the end with finite numbers, or with infinities that are results.")
    diverged: int = Field(0, ge=0, description="Stopped by NaN or Inf in training.")
    lost: int = Field(0, ge=0, description="Left no result (killed, missing file).")
    excluded: dict[str, int] = Field(default_factory=dict, description="Left out on purpose: reason -> number of runs.")
    what: str = Field("", description="What one run is: 'networks of width 64', 'trainings', 'random draws'.")

    @model_validator(mode="after")
    def _check(self) -> Accounting:
        excluded = sum(self.excluded.values())
        if any(count < 0 for count in self.excluded.values()):
            raise ValueError("excluded counts must not be negative")
        if self.planned != self.finished + self.diverged + self.lost + excluded:
            raise ValueError(
                f"planned ({self.planned}) is not finished ({self.finished}) + diverged ({self.diverged}) "
                f"+ lost ({self.lost}) + excluded ({excluded}); every planned run must be accounted for"
            )
        return self

    @classmethod
    def all_finished(cls, runs: int, what: str = "") -> Accounting:
        """`runs` planned, all of them finished."""
        return cls(planned=runs, finished=runs, what=what)

    @property
    def sentence(self) -> str:
        """The accounting in words, without a full stop."""
        missing = [f"{self.diverged} diverged"] * (self.diverged > 0) + [f"{self.lost} lost"] * (self.lost > 0)
        missing += [f"{count} excluded ({reason})" for reason, count in sorted(self.excluded.items()) if count]
        return f"{self.finished} of {self.planned} {self.what or 'runs'} finished" + "".join(
            f", {part}" for part in missing
        )

    @property
    def complete(self) -> bool:
        """Whether every planned run finished."""
        return self.planned == self.finished


class QuantityVerdict(Record):
    """One quantity against its criterion, with everything needed to draw and to doubt it."""

    criterion: str
    label: str
    outcome: Outcome
    reason: str = Field(description="Why it is undecided or not tested, or what else must be known; '' if nothing.")
    statistic: str
    estimate: Number | None
    low: Number | None = Field(description="Lower end of the confidence interval.")
    high: Number | None
    method: str = Field(description="How the interval was made.")
    standard_error: Number | None
    spread: Number | None = Field(description="Standard deviation over seeds.")
    effect: Number | None = Field(
        description="Distance of the estimate from the nearest margin; positive on the asked side."
    )
    effect_in_spreads: Number | None
    effect_in_standard_errors: Number | None
    reference: Number | None
    samples: list[Number | list[Number]] = Field(description="One entry per independent seed or draw.")
    seeds: list[int | str] | None = Field(description="The seed or draw behind each sample, where the study names it.")
    not_a_number: int = Field(description="How many samples contain NaN.")
    runs: Accounting | None


class ClaimVerdict(Record):
    """One claim with its verdict, its reasons and the evidence."""

    claim: Claim
    verdict: Verdict
    expected: bool = Field(description="Whether the claim is expected to be decidable at this scale.")
    reasons: list[str] = Field(description="Sentences a person reads beside the verdict.")
    quantities: list[QuantityVerdict]

    @property
    def deciding(self) -> list[QuantityVerdict]:
        """The quantities that enter the verdict."""
        return [quantity for quantity in self.quantities if self.claim.criterion(quantity.criterion).decides]

    @property
    def headline(self) -> QuantityVerdict | None:
        """The quantity that matters most: a failing one, else an open one, else the one nearest its margin."""
        order = [Outcome.fails, Outcome.straddles, Outcome.undecided, Outcome.holds, Outcome.not_tested]

        def rank(quantity: QuantityVerdict) -> tuple[int, float]:
            distance = quantity.effect_in_standard_errors
            return order.index(quantity.outcome), math.inf if distance is None or math.isnan(distance) else distance

        return min((quantity for quantity in self.deciding if quantity.estimate is not None), key=rank, default=None)

    @property
    def runs(self) -> list[Accounting]:
        """The distinct run accountings behind the quantities."""
        found: list[Accounting] = []
        for quantity in self.quantities:
            if quantity.runs is not None and quantity.runs not in found:
                found.append(quantity.runs)
        return found


class StudyVerdicts(Record):
    """The content of `verdicts.json`: no time, host or path, so that equal evidence gives equal bytes."""

    study: str
    scale: Scale
    paper: Paper
    package_version: str
    claims_digest: str = Field(description="SHA-256 of the parsed claims.yaml.")
    claims: list[ClaimVerdict]

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many claims of the paper have each verdict; extensions are not counted."""
        return {v: sum(c.verdict == v and not c.claim.extension for c in self.claims) for v in Verdict}


def package_version() -> str:
    """Version of this package, or "not installed" when it runs from a bare source tree."""
    try:
        return metadata.version("jacnorm")
    except metadata.PackageNotFoundError:
        return "not installed"


def write_verdicts(path: Path | str, verdicts: StudyVerdicts) -> None:
    """Write `verdicts.json`; its schema is `verdicts.schema.json` beside this module."""
    write_json(path, verdicts.model_dump(mode="json"))


def read_verdicts(path: Path | str) -> StudyVerdicts:
    """Read `verdicts.json` back. Raises UserError if it is missing, damaged or of another schema."""
    content = read_json(path)
    try:
        return StudyVerdicts.model_validate(content, strict=False)
    except ValidationError as error:
        raise UserError(
            f"{path}: {complaint(error, content)} (written by another version? delete it and run again)"
        ) from None
