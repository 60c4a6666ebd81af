"""The small drawings: what is drawn, where, and what is said to readers who do not see it."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from jacnorm.report.claims import Criterion
from jacnorm.report.strip import EDGE, WIDTH, Axis, common_axis, dots, draw
from jacnorm.report.verdicts import Accounting, Quantity, QuantityVerdict, judge_quantity


def asked(**changes: object) -> Criterion:
    given = {"id": "c", "quantity": "q", "unit": "nats", "direction": "above", "margin": 1.0} | changes
    return Criterion.model_validate({key: value for key, value in given.items() if value is not None})


def judged(criterion: Criterion, samples: list, **more: object) -> QuantityVerdict:
    return judge_quantity(criterion, Quantity("c", "", samples, Accounting.all_finished(len(samples)), **more))


def shapes(criterion: Criterion, quantity: QuantityVerdict) -> dict[str, list[ET.Element]]:
    """Elements by class, from SVG that must be well-formed XML."""
    root = ET.fromstring(str(draw(criterion, quantity, common_axis(criterion, [quantity]))))
    found: dict[str, list[ET.Element]] = {"svg": [root]}
    for element in root.iter():
        found.setdefault(element.get("class") or element.tag, []).append(element)
    return found


def test_an_axis_is_monotone_and_stays_inside() -> None:
    for axis in (Axis(-1.0, 3.0), Axis(0.1, 1000.0, logarithmic=True)):
        places = [axis.x(value) for value in (axis.low, 0.5, 1.0, 2.0, axis.high, axis.high * 10)]
        assert places == sorted(places)
        assert (places[0], places[-1]) == (EDGE, WIDTH - EDGE)
        assert axis.x(-100.0) == EDGE


def test_axes_cover_what_they_show() -> None:
    criterion = asked()
    axis = common_axis(criterion, [judged(criterion, [2.0, 3.0, 4.0])])
    assert axis.low < 1.0 < 4.0 < axis.high
    assert not axis.logarithmic
    assert common_axis(criterion, [judged(criterion, [100.0, 101.0, 102.0])]).logarithmic
    assert common_axis(criterion, []).low < 1.0 < common_axis(criterion, []).high
    nothing = common_axis(asked(margin=0.0), [])
    assert (nothing.low, nothing.high) == (-1.0, 1.0)


def test_every_seed_is_a_dot_with_its_name() -> None:
    criterion = asked()
    found = shapes(criterion, judged(criterion, [3.0, 2.0, 4.0], seeds=[10, 11, 12], reference=2.5))
    assert [dot.find("title").text for dot in found["dot"]] == ["11: 2", "10: 3", "12: 4"]
    assert len({dot.get("cx") for dot in found["dot"]}) == 3
    assert len(found["interval"]) == len(found["estimate"]) == len(found["margin"]) == len(found["reference"]) == 1


def test_close_dots_do_not_hide_one_another() -> None:
    criterion = asked()
    found = shapes(criterion, judged(criterion, [2.0, 2.0, 2.0, 9.0]))
    assert len({(dot.get("cx"), dot.get("cy")) for dot in found["dot"]}) == 4


def test_infinite_samples_stand_at_the_edge() -> None:
    criterion = asked(direction="below")
    quantity = judged(criterion, [-math.inf, -math.inf, *map(float, range(8))])
    found = shapes(criterion, quantity)
    assert [dot.find("title").text for dot in found["dot"] if dot.tag == "path"] == [
        "2 samples at \N{MINUS SIGN}\N{INFINITY}"
    ]
    assert sum(dot.tag == "circle" for dot in found["dot"]) == 8


def test_what_cannot_be_dots_is_not_drawn_as_dots() -> None:
    share = asked(interval="binomial", margin=0.5)
    assert "dot" not in shapes(share, judged(share, [1.0, 0.0, 1.0], statistic="proportion"))
    rows = asked(interval="bootstrap")
    assert dots(judged(rows, [[1.0, 2.0], [3.0, 4.0]], statistic=lambda s: float(s.mean()))) == []
    assert len(dots(judged(asked(), [float(i) for i in range(5000)]))) == 200
    broken = judged(asked(), [1.0, math.nan, 2.0])
    assert dots(broken) == [1.0, 2.0]
    assert "interval" not in shapes(asked(), broken)


@pytest.mark.parametrize(("low", "high"), [(2.0, 3.0), (2.0, 2.0)])
def test_the_asked_range_is_visible(low: float, high: float) -> None:
    criterion = asked(direction="within", margin=None, low=low, high=high)
    band = shapes(criterion, judged(criterion, [0.0, 10.0]))["asked"][0]
    assert float(band.get("width")) >= 2.0
    assert float(band.get("x")) > EDGE


def test_the_label_says_it_in_words() -> None:
    criterion = asked()
    label = shapes(criterion, judged(criterion, [2.0, 3.0, 4.0]))["svg"][0].get("aria-label")
    assert label == "3 samples from 2 to 4; mean 3.0 [0.5, 5.5]; asked: at least 1 nats"
