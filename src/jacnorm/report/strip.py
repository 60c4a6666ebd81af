"""A small drawing per quantity: seeds as dots, the interval, and the range that the criterion asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup, escape

from jacnorm.report.claims import Criterion
from jacnorm.report.records import QuantityVerdict
from jacnorm.report.words import asked, estimate, number

WIDTH, HEIGHT, EDGE = 280.0, 48.0, 12.0
MOST_DOTS = 200


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high`, drawn between the edges of a strip."""

    low: float
    high: float
    logarithmic: bool = False

    def x(self, value: float) -> float:
        """Place of `value`, held inside the strip."""
        scale = math.log if self.logarithmic else float
        low, high = scale(self.low), scale(self.high)
        share = (scale(max(value, self.low)) - low) / (high - low)
        return round(EDGE + (WIDTH - 2 * EDGE) * min(max(share, 0.0), 1.0), 1)


def common_axis(criterion: Criterion, quantities: list[QuantityVerdict]) -> Axis:
    """One axis for all quantities of a criterion, so that strips compare; logarithmic over wide positive ranges."""
    values = [bound for bound in criterion.bounds if math.isfinite(bound)]
    for quantity in quantities:
        numbers = [*dots(quantity), quantity.low, quantity.high, quantity.estimate]
        values += [value for value in numbers if value is not None and math.isfinite(value)]
    low, high = min(values), max(values)
    if low > 0 and high / low > 50:
        return Axis(low / 1.3, high * 1.3, logarithmic=True)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - pad, high + pad)


def dots(quantity: QuantityVerdict) -> list[float]:
    """The samples to draw: none for zeros and ones or rows, evenly spaced ranks where there are very many."""
    numbers = sorted(s for s in quantity.samples if isinstance(s, float) and not math.isnan(s))
    if quantity.statistic == "proportion" or len(numbers) != len(quantity.samples) - quantity.not_a_number:
        return []
    if len(numbers) > MOST_DOTS:
        return [numbers[round(i * (len(numbers) - 1) / (MOST_DOTS - 1))] for i in range(MOST_DOTS)]
    return numbers


def draw(criterion: Criterion, quantity: QuantityVerdict, axis: Axis) -> Markup:
    """The strip as inline SVG, labelled in words for readers who do not see it."""
    parts = [_asked_range(criterion, axis)]
    if quantity.reference is not None and axis.low <= quantity.reference <= axis.high:
        x = axis.x(quantity.reference)
        parts.append(
            Markup('<path class="reference" d="M{} 4V32"><title>reference {}</title></path>').format(
                x, number(quantity.reference)
            )
        )
    parts.append(_dots(quantity, axis))
    parts.append(_interval(quantity, axis))
    parts.append(_labels(criterion, axis))
    return Markup(
        '<svg class="strip" viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">{}</svg>'
    ).format(
        f"{WIDTH:g}", f"{HEIGHT:g}", f"{WIDTH:g}", f"{HEIGHT:g}", describe(criterion, quantity), Markup("").join(parts)
    )


def describe(criterion: Criterion, quantity: QuantityVerdict) -> str:
    """The strip in words."""
    numbers = dots(quantity)
    seeds = f"{len(quantity.samples)} samples"
    if numbers:
        seeds += f" from {number(numbers[0])} to {number(numbers[-1])}"
    return f"{seeds}; {quantity.statistic} {estimate(quantity)}; asked: {asked(criterion)}"


def _asked_range(criterion: Criterion, axis: Axis) -> Markup:
    low, high = criterion.bounds
    left = axis.x(low) if math.isfinite(low) else 0.0
    right = axis.x(high) if math.isfinite(high) else WIDTH
    # A range of one value (exactly 0 violations) stays visible as a thin band.
    band = Markup('<rect class="asked" x="{}" y="4" width="{}" height="28"/>').format(
        left, round(max(right - left, 2.0), 1)
    )
    edges = [
        Markup('<path class="margin" d="M{} 4V32"/>').format(axis.x(bound))
        for bound in (low, high)
        if math.isfinite(bound)
    ]
    return band + Markup("").join(edges)


def _dots(quantity: QuantityVerdict, axis: Axis) -> Markup:
    numbers = dots(quantity)
    few = len(numbers) == len(quantity.samples) <= 60
    order = sorted(range(len(numbers)), key=quantity.samples.__getitem__) if few else []
    parts, last, row = [], -math.inf, 0
    for place, value in enumerate(numbers):
        if math.isinf(value):
            continue
        name = f"{quantity.seeds[order[place]]}: " if few and quantity.seeds else ""
        title = Markup("<title>{}{}</title>").format(name, number(value, 4)) if few else Markup("")
        x = axis.x(value)
        row = (row + 1) % 3 if x - last < 5 else 0
        last = x
        parts.append(
            Markup('<circle class="dot" cx="{}" cy="{}" r="2.4">{}</circle>').format(x, (11, 7, 15)[row], title)
        )
    for end, shape in ((-math.inf, "M1 11l8 -5v10z"), (math.inf, f"M{WIDTH - 1:g} 11l-8 -5v10z")):
        count = numbers.count(end)
        if count:
            words = f"{count} sample{'' if count == 1 else 's'} at {number(end)}"
            parts.append(Markup('<path class="dot" d="{}"><title>{}</title></path>').format(shape, words))
    return Markup("").join(parts)


def _interval(quantity: QuantityVerdict, axis: Axis) -> Markup:
    drawn = Markup("")
    if quantity.low is not None and quantity.high is not None:
        left = axis.x(quantity.low) if math.isfinite(quantity.low) else 0.0
        right = axis.x(quantity.high) if math.isfinite(quantity.high) else WIDTH
        drawn = Markup('<path class="interval" d="M{0} 22v8M{0} 26H{1}M{1} 22v8"/>').format(left, right)
    if quantity.estimate is not None and math.isfinite(quantity.estimate):
        drawn += Markup('<path class="estimate" d="M{} 21.5l4.5 4.5l-4.5 4.5l-4.5 -4.5z"/>').format(
            axis.x(quantity.estimate)
        )
    return drawn


def _labels(criterion: Criterion, axis: Axis) -> Markup:
    """Numbers under the margins, and under the ends of the axis where there is room."""
    placed = [(axis.x(bound), number(bound, 4)) for bound in dict.fromkeys(criterion.bounds) if math.isfinite(bound)]
    if len(placed) == 2 and placed[1][0] - placed[0][0] < 44:
        middle = (placed[0][0] + placed[1][0]) / 2
        placed = [(middle, f"{placed[0][1]} \N{EN DASH} {placed[1][1]}")]
    for x, value in ((EDGE, axis.low), (WIDTH - EDGE, axis.high)):
        if all(abs(x - other) > 70 for other, _ in placed):
            placed.append((x, number(value, 2)))
    labels = []
    for x, text in placed:
        half = 3.2 * len(text)
        labels.append(
            Markup('<text x="{}" y="44">{}</text>').format(round(min(max(x, half), WIDTH - half), 1), escape(text))
        )
    return Markup("").join(labels)
