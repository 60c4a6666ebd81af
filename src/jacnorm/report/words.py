"""Numbers, intervals and margins as a person reads them."""

from __future__ import annotations

import math

from jacnorm.report.claims import Claim, Criterion
from jacnorm.report.records import QuantityVerdict

MINUS = "\N{MINUS SIGN}"
THIN = "\N{NARROW NO-BREAK SPACE}"


def number(value: float | None, digits: int = 3, *, plain: bool = False) -> str:
    """`value` to `digits` significant digits; `plain` keeps to ASCII. None is a dash."""
    if value is None:
        return "-" if plain else "\N{EN DASH}"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        text = "inf" if plain else "\N{INFINITY}"
        return f"-{text}" if plain and value < 0 else f"{MINUS}{text}" if value < 0 else text
    text = f"{value:.{digits}g}" if value else "0"
    if "e" in text and 1 <= abs(value) < 1e6:
        text = f"{float(text):.0f}"
    text = text.replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
    return text if plain else _typeset(text)


def _typeset(text: str) -> str:
    """A true minus sign, and thin gaps between thousands from five digits on."""
    whole, point, rest = text.partition(".")
    if "e" not in whole and len(whole.lstrip("-")) > 4:
        whole = f"{int(whole):,}".replace(",", THIN)
    return (whole + point + rest).replace("-", MINUS)


def estimate(quantity: QuantityVerdict, *, plain: bool = False) -> str:
    """Estimate and interval, with as many decimals as the interval's width makes meaningful."""
    value, low, high = quantity.estimate, quantity.low, quantity.high
    if value is None:
        return "not measured" if not quantity.samples else "undefined"
    if low is None or high is None:
        return f"{number(value, plain=plain)} (no interval)"
    if low == high == value:
        return number(value, 4, plain=plain) + (" (exact)" if quantity.method.startswith("exact") else "")
    if not (math.isfinite(low) and math.isfinite(high)):
        shown = [number(n, plain=plain) for n in (value, low, high)]
    else:
        shown = [_decimals(n, high - low, plain) for n in (value, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _decimals(value: float, width: float, plain: bool) -> str:
    places = 1 - math.floor(math.log10(width / 2)) if width > 0 else 4
    if not 0 <= places <= 6 or abs(value) >= 1e6:
        return number(value, plain=plain)
    text = f"{value:.{places}f}"
    return text if plain else _typeset(text)


def asked(criterion: Criterion, *, plain: bool = False) -> str:
    """What a criterion asks for, with its unit."""
    unit = f" {criterion.unit}" if criterion.unit else ""
    if criterion.direction == "within":
        low, high = (number(bound, 4, plain=plain) for bound in criterion.bounds)
        return f"within [{low}, {high}]{unit}"
    words = {"above": "at least", "below": "at most"}[criterion.direction]
    return f"{words} {number(criterion.margin, 4, plain=plain)}{unit}"


def published(claim: Claim, *, plain: bool = False) -> str:
    """The paper's number with its unit, or that it gives none."""
    if claim.published is None or claim.published.value is None:
        return "no number"
    unit = f" {claim.published.unit}" if claim.published.unit else ""
    return f"{number(claim.published.value, 4, plain=plain)}{unit}"


def size(count: int) -> str:
    """A file's size."""
    return f"{count} B" if count < 1000 else f"{count / 1e3:.0f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"
