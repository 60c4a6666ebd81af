"""What a paper claims, declared before any run: the typed form of a study's `claims.yaml`.

Importing this module is cheap (pydantic and yaml only), because the Snakefile reads every ledger before it plans.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jacnorm.errors import UserError
from jacnorm.files import read_yaml

Scale = Literal["smoke", "laptop", "paper"]
Evidence = Literal["published", "second-hand", "reconstructed"]
Direction = Literal["above", "below", "within"]
IntervalMethod = Literal["t", "bootstrap", "rank", "binomial", "exact"]

SCALES: tuple[Scale, ...] = ("smoke", "laptop", "paper")

EVIDENCE_MEANING: dict[str, str] = {
    "published": "The paper's own text, figures or tables state it.",
    "second-hand": "A public summary of the paper states it; the paper's own words could not be read.",
    "reconstructed": "Derived for this project from the paper's subject; the paper may state it otherwise.",
}

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Record(BaseModel):
    """A strict, frozen record: no unknown keys, no silent conversions ("1" is not 1)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Paper(Record):
    """Which paper a study reproduces."""

    title: Text
    authors: Text = Field(description="Names as printed, separated by commas.")
    arxiv: str = Field(
        pattern=r"^\d{4}\.\d{4,5}$", description="arXiv identifier without a version, as text: '2506.08764'."
    )
    versions: str | None = Field(None, description="Which versions were read, and what differs between them.")


class Published(Record):
    """The paper's own number."""

    value: Finite | None = Field(description="null where the paper makes the claim without a number.")
    unit: str = ""
    source: Text = Field(description="Where the number is printed.")


class Criterion(Record):
    """One decidable statement about one number: the whole interval must lie on the asked side of the margin.

    `above`: the number is at least `margin`. `below`: at most `margin`. `within`: in [`low`, `high`].
    Bounds belong to the asked side, so an exact count of 0 violations is "below 0".
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="Short name, unique within the claim.")
    quantity: Text = Field(description="What the number is, in plain words.")
    unit: str = Field(description="Unit of the number and of the margin; '' for a pure number.")
    direction: Direction
    margin: Finite | None = Field(None, description="For above and below.")
    low: Finite | None = Field(None, description="For within.")
    high: Finite | None = Field(None, description="For within.")
    confidence: float = Field(0.95, gt=0.5, lt=1.0, description="Level of the interval.")
    min_seeds: int = Field(
        5, description="Fewer independent samples than this leave the criterion undecided; default 5, or 1 for exact."
    )
    interval: IntervalMethod = Field(
        "t",
        description="t: Student, for means. bootstrap: BCa, for any statistic. rank: order statistics, for medians. "
        "binomial: Clopper-Pearson, for proportions. exact: a number without sampling noise.",
    )
    at: tuple[Scale, ...] = Field(SCALES, min_length=1, strict=False, description="Scales at which it is asked.")
    decides: bool = Field(True, description="false: reported beside the verdict without entering it.")

    @model_validator(mode="before")
    @classmethod
    def _seeds_follow_the_interval(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("interval") == "exact":
            return {"min_seeds": 1, **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> Criterion:
        given = {name for name in ("margin", "low", "high") if getattr(self, name) is not None}
        wanted = {"low", "high"} if self.direction == "within" else {"margin"}
        if given != wanted:
            raise ValueError(
                f"direction {self.direction!r} needs {' and '.join(sorted(wanted, reverse=True))} and nothing else, "
                f"but {' and '.join(sorted(given, reverse=True)) or 'nothing'} is given"
            )
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low ({self.low:g}) must not exceed high ({self.high:g})")
        least = 1 if self.interval == "exact" else 2
        if self.min_seeds < least:
            raise ValueError(f"min_seeds must be at least {least} for interval {self.interval!r}, not {self.min_seeds}")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """The asked range as (low, high), with infinities for the open side."""
        if self.direction == "within":
            return float(self.low), float(self.high)  # type: ignore[arg-type]
        return (float(self.margin), math.inf) if self.direction == "above" else (-math.inf, float(self.margin))  # type: ignore[arg-type]


class Claim(Record):
    """One claim of the paper, or one stress test beyond it (`extension`)."""

    id: str = Field(pattern=r"^[A-Z][0-9]+[a-z]?$", description="C1, C2, ... as in the study's ledger.")
    statement: Text = Field(description="One plain sentence that can be true or false.")
    source: Text = Field(description="Figure, table or section of the paper.")
    evidence: Evidence
    extension: bool = Field(False, description="A stress test beyond the paper; reported apart from its claims.")
    expected_at: tuple[Scale, ...] = Field(
        min_length=1,
        strict=False,
        description="Scales at which it is expected to be decidable; elsewhere no verdict is drawn.",
    )
    estimand: str = Field(
        pattern=r"^[a-z_][a-z0-9_]*$", description="Name of the function in judge.py that gives its quantities."
    )
    published: Published | None = Field(description="The paper's number; null where it gives none.")
    criteria: tuple[Criterion, ...] = Field(min_length=1, strict=False)
    evidence_tables: tuple[Text, ...] = Field(
        min_length=1, strict=False, description="Tables that the verdict is computed from."
    )
    optional_tables: tuple[Text, ...] = Field(
        (), strict=False, description="Further tables that only some scales make; evidence where they exist."
    )
    note: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Claim:
        _refuse_repeats("criterion id", (criterion.id for criterion in self.criteria))
        _refuse_repeats("evidence table", (*self.evidence_tables, *self.optional_tables))
        if not any(criterion.decides for criterion in self.criteria):
            raise ValueError("at least one criterion must decide (decides: true)")
        return self

    def criterion(self, name: str) -> Criterion:
        """The criterion called `name`; KeyError lists those that exist."""
        for criterion in self.criteria:
            if criterion.id == name:
                return criterion
        raise KeyError(f"claim {self.id} has no criterion {name!r}; it has {', '.join(c.id for c in self.criteria)}")


class Ledger(Record):
    """All claims of one study: the content of its `claims.yaml`."""

    study: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    paper: Paper
    claims: tuple[Claim, ...] = Field(min_length=1, strict=False)

    @model_validator(mode="after")
    def _check(self) -> Ledger:
        _refuse_repeats("claim id", (claim.id for claim in self.claims))
        return self

    def claim(self, name: str) -> Claim:
        """The claim called `name`; KeyError lists those that exist."""
        for claim in self.claims:
            if claim.id == name:
                return claim
        raise KeyError(f"study {self.study} has no claim {name!r}; it has {', '.join(c.id for c in self.claims)}")


def load_claims(path: Path | str) -> Ledger:
    """Read and check a `claims.yaml`. Raises UserError, one sentence with the full path of the first wrong key."""
    content = read_yaml(path)
    try:
        return Ledger.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {complaint(error, content)}") from None


def claims_digest(path: Path | str) -> str:
    """SHA-256 of the parsed ledger: comments, key order and layout do not enter, defaults and order of claims do."""
    content = load_claims(path).model_dump(mode="json")
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def claim_margin(path: Path | str, claim: str, criterion: str) -> tuple[float, float]:
    """The asked range (low, high) of one criterion; raises KeyError naming what exists."""
    return load_claims(path).claim(claim).criterion(criterion).bounds


def _refuse_repeats(what: str, names: Iterable[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{what} {repeated[0]!r} is given more than once")


def complaint(error: ValidationError, content: Any) -> str:
    """The first complaint of pydantic as one sentence: where, what is allowed, what came."""
    first = error.errors(include_url=False)[0]
    where = _where(first["loc"], content)
    kind, value = first["type"], first["input"]
    if kind == "extra_forbidden":
        return f"{where} is not a known key; remove it or correct its spelling"
    if kind == "missing":
        return f"{where} is missing"
    message = re.sub(r"^(Value error|Assertion failed), ", "", first["msg"])
    if kind == "value_error":
        return f"{where}: {message}"
    shown = repr(value) if isinstance(value, str | int | float | bool | type(None)) else f"a {type(value).__name__}"
    hint = "; write it in quotes" if kind == "string_type" and isinstance(value, int | float) else ""
    return f"{where}: {message[0].lower()}{message[1:]}, but it is {shown}{hint}"


def _where(location: tuple[int | str, ...], content: Any) -> str:
    """A key's full path; list entries carry their id where they have one: claims[2] (C3).criteria[0] (slope).margin."""
    path = ""
    for key in location:
        if isinstance(key, int):
            path += f"[{key}]"
            content = content[key] if isinstance(content, list | tuple) and key < len(content) else None
            if isinstance(content, dict) and isinstance(content.get("id"), str):
                path += f" ({content['id']})"
        else:
            path += f".{key}" if path else key
            content = content.get(key) if isinstance(content, dict) else None
    return path or "the file"
