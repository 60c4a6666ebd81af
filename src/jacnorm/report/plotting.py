"""How figures look and how they are written: one style, the same bytes every time, SVG and PNG.

Draw within ``style()``; `drawing.draw` does.

Figures show a mean over seeds with its 95 % Student interval, or each seed as a point, and name units on their axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy.stats import t

from jacnorm.files import atomic

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart with any colour vision.
BLUE, ORANGE, GREEN, PURPLE, RED, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#666666",
)
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, GREY)
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "jacnorm",
    "svg.fonttype": "path",
}


def panels(columns: int, width: float = 4.4, height: float = 3.4, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with `rows` x `columns` panels of the given size in inches, and its axes in reading order."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def style() -> AbstractContextManager[None]:
    """The house style, for the time of a drawing."""
    return mpl.rc_context(STYLE)


def legend_below(figure: Figure, ax: Axes, columns: int) -> None:
    """The entries of one panel's legend under the whole figure, where they hide no data."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def logarithmic(ax: Axes, which: str) -> None:
    """Logarithmic axes with plain numbers at 1, 2 and 5, or at powers of ten over more than two decades.

    An axis without a positive number stays linear, as a logarithmic one would be empty.
    """
    for name in which:
        values = [getattr(line, f"get_{name}data")() for line in ax.get_lines()]
        values = np.concatenate([np.asarray(v, float) for v in values]) if values else np.zeros(0)
        values = values[np.isfinite(values) & (values > 0)]
        if not len(values):
            continue
        getattr(ax, f"set_{name}scale")("log")
        axis = getattr(ax, f"{name}axis")
        decades = math.log10(values.max() / values.min())
        axis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if 0.3 < decades <= 2 else (1,) if decades > 2 else range(1, 10))
        )
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def headroom(ax: Axes, share: float) -> None:
    """Leave this share of the panel's height free above the data, for a legend."""
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + share / (1 - share) * (high - low))


def once(ax: Axes, label: str) -> str | None:
    """The label, or None if the panel has it already, so that its legend names it once."""
    return None if label in ax.get_legend_handles_labels()[1] else label


def drop(axes: Iterable[Axes]) -> None:
    """Remove panels that have nothing to show."""
    for ax in axes:
        ax.remove()


def save(figure: Figure, folder: Path | str, name: str) -> None:
    """Write ``<folder>/<name>.svg`` and ``.png``; the bytes depend on the figure and the matplotlib version only."""
    for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        with atomic(Path(folder) / f"{name}.{kind}") as temporary:
            figure.savefig(temporary, format=kind, metadata=metadata)


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Mean of (n,) numbers and half the width of its Student interval (NaN for one number, or an infinite one)."""
    n = len(values)
    if n < 2 or not np.isfinite(values).all():
        return float(np.mean(values)), float("nan")
    half = t.ppf((1 + confidence) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return float(np.mean(values)), float(half)


def curve(
    ax: Axes, rows: pd.DataFrame, x: str, y: str, *, colour: str, label: str, style: str = "-", marker: str = ""
) -> None:
    """Mean of `y` over seeds against `x` as a line, with its 95 % interval as a band; infinite means leave a gap."""
    points = [(place, *mean_interval(group[y].to_numpy())) for place, group in rows.groupby(x)]
    places, means, halves = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    means = np.where(np.isfinite(means), means, np.nan)
    halves = np.where(np.isfinite(halves), halves, 0.0)
    ax.plot(places, means, style, color=colour, label=label, marker=marker, markersize=4)
    ax.fill_between(places, means - halves, means + halves, color=colour, alpha=0.2, linewidth=0)


def dots(
    ax: Axes, place: float, values: Sequence[float], *, colour: str, label: str | None = None, width: float = 0.12
) -> None:
    """Each seed as a dot around `place`, and the mean with its 95 % interval as a bar.

    Seeds without a finite value are counted in words at the foot, and the mean is that of the others.
    """
    values = np.asarray(values, dtype=float)
    finite = values[np.isfinite(values)]
    if len(finite) < len(values):
        words = f"{len(values) - len(finite)} of {len(values)}\nnot finite"
        ax.annotate(
            words, (place, 0), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=colour, fontsize=7
        )
    if not len(finite):
        return
    spread = np.linspace(-width, width, len(finite)) if len(finite) > 1 else np.zeros(1)
    ax.plot(place + spread, finite, "o", color=colour, alpha=0.35, markersize=3, markeredgewidth=0)
    mean, half = mean_interval(finite)
    ax.errorbar(
        [place],
        [mean],
        yerr=[0.0 if np.isnan(half) else half],
        fmt="o",
        color=colour,
        label=label,
        markersize=5,
        capsize=3,
    )
