"""Numbers as a person reads them."""

from __future__ import annotations

import math

import pytest

from jacnorm.report.claims import Criterion
from jacnorm.report.verdicts import Accounting, Quantity, judge_quantity
from jacnorm.report.words import asked, estimate, number, size


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (math.nan, "NaN"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (0.0, "0"),
        (-0.0123456, "-0.0123"),
        (1234.5, "1230"),
        (123456.0, "123000"),
        (1.5e7, "1.5e7"),
        (2.5e-7, "2.5e-7"),
    ],
)
def test_numbers_in_plain_text(value: float | None, shown: str) -> None:
    assert number(value, plain=True) == shown


def test_numbers_on_a_page() -> None:
    assert number(-1.5) == "\N{MINUS SIGN}1.5"
    assert number(-math.inf) == "\N{MINUS SIGN}\N{INFINITY}"
    assert number(-123456.0) == "\N{MINUS SIGN}123\N{NARROW NO-BREAK SPACE}000"
    assert number(1234.0, 4) == "1234"
    assert number(None) == "\N{EN DASH}"


def shown(samples: list[float], interval: str = "t", statistic: str = "mean") -> str:
    criterion = Criterion(id="c", quantity="q", unit="", direction="above", margin=0.0, interval=interval)
    quantity = Quantity("c", "", samples, Accounting.all_finished(len(samples)), statistic)
    return estimate(judge_quantity(criterion, quantity), plain=True)


def test_estimates_have_the_decimals_their_interval_deserves() -> None:
    assert shown([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.0 [1.0, 5.0]"
    assert shown([100.1234, 100.1235, 100.1236]) == "100.12350 [100.12325, 100.12375]"
    assert shown([1e6, 2e6, 3e6]) == "2e6 [-484000, 4.48e6]"
    assert shown([0.5], "exact") == "0.5 (exact)"
    assert shown([2.0, 2.0, 2.0]) == "2"
    assert shown([2.0]) == "2 (no interval)"
    assert shown([]) == "not measured"
    assert shown([math.nan]) == "undefined"
    assert shown([-math.inf] * 2 + [1.0] * 5) == "1 [-inf, 1]"


def test_what_is_asked() -> None:
    given = {"id": "c", "quantity": "q", "unit": "nats"}
    assert asked(Criterion(**given, direction="below", margin=-10.0), plain=True) == "at most -10 nats"
    assert asked(Criterion(**given, direction="above", margin=1.5), plain=True) == "at least 1.5 nats"
    assert asked(Criterion(**given, direction="within", low=-1.0, high=1.0), plain=True) == "within [-1, 1] nats"


def test_sizes() -> None:
    assert [size(n) for n in (12, 3400, 5_600_000)] == ["12 B", "3 kB", "5.6 MB"]
