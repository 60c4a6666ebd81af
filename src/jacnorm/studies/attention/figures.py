"""Plotting step of the `attention` study: tables in, one figure for each entry of ``captions.yaml`` out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from jacnorm.report.drawing import draw
from jacnorm.report.estimands import select
from jacnorm.report.plotting import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    dots,
    drop,
    legend_below,
    logarithmic,
    mean_interval,
    panels,
)
from jacnorm.step import run
from jacnorm.studies.attention.curves import (
    EXPECTATIONS,
    LEVEL,
    SOFTMAX,
    Tables,
    agreement,
    critical,
    curve,
    logs,
    sources,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LENGTH = "length L [tokens]"
SELECTED = "selected keys N"
TEMPERATURE = "temperature T"
SHARE = "separable share $N_s / N$"
FEW = 5
"""N of the paper's sweep over lengths."""
WHERE_FLAT = 16
"""N of the heat map, where Figure 3 begins to be flat."""
MOST_BOXES = 16
"""Of one panel; of more numbers N, powers of two are shown."""
PAPERS_SHARE = 0.06
"""Of the length, at which Figure 2c has the critical N."""
NORMALISERS = {
    SOFTMAX: (BLUE, "softmax"),
    "ssmax": (ORANGE, "SSMax"),
    "sparsemax": (GREEN, "sparsemax"),
    "entmax15": (PURPLE, "1.5-entmax"),
    "sigmoid": (GREY, "sigmoid"),
    "sa-softmax": (RED, "SA-Softmax"),
}
SPACES = {
    "embedding": (BLUE, "embedding and position"),
    "wte": (ORANGE, "embedding"),
    "layer_input": (GREEN, "input of the layer"),
    "value": (PURPLE, "value"),
}
MEASURED = (GREEN, "-", "distance")
EXPECTED = {
    "expectation_all": (BLUE, "-", "closed form without N / (L - 1)"),
    "expectation": (SKY, "--", "closed form"),
    "expectation_sampled": (PURPLE, ":", "sampled sets"),
}
BOUNDS = {"bound": (RED, "-", "bound U"), "loose_bound": (ORANGE, "--", "bound U'")}
TESTED = {
    "all": EXPECTED["expectation_all"],
    "closed-form": EXPECTED["expectation"],
    "sampled": EXPECTED["expectation_sampled"],
}


# --- distances -------------------------------------------------------------------------------------------------------


def distance(tables: Tables) -> Figure:
    """Figure 2a and 2b: distance, expectations and bounds against L and N, and the other normalisers."""
    shown = sources(tables, "distances", untrained=False)
    figure, axes = panels(3, 4.4, 3.4, rows=len(shown))
    lines = {"distance": MEASURED, **EXPECTED, **BOUNDS}
    for (over_length, over_n, others), source in zip(_by_threes(axes), shown, strict=True):
        rows = _first_space(source.rows(tables, "distances"))
        few, longest = _nearest(rows.selected, FEW), rows.length.max()
        for column, (colour, style, words) in lines.items():
            label = {"colour": colour, "style": style, "label": words, "marker": "o"}
            _line(over_length, curve(select(rows, selected=few), column, "length"), **label)
            _line(over_n, curve(select(rows, length=longest), column, "selected"), **label)
        for name, colour, words in _normalisers(tables["distances"]):
            cell = select(_first_space(source.rows(tables, "distances", name)), length=longest)
            _line(others, curve(cell, "distance", "selected"), colour=colour, label=words, marker="o")
        over_length.set(xlabel=LENGTH, ylabel="distance", title=f"{source.label}, N = {few}")
        over_n.set(xlabel=SELECTED, ylabel="distance", title=f"L = {longest}")
        others.set(xlabel=SELECTED, ylabel="distance", title="other normalisers, same logits")
        for ax in (over_length, over_n, others):
            logarithmic(ax, "xy")
            _doublings(ax)
        _legend(others)
    legend_below(figure, axes[0], 3)
    return figure


def bounds(tables: Tables) -> Figure:
    """The bounds of Theorem 1 against the measured distance, head by head, and their ratio against N."""
    shown = sources(tables, "distances", untrained=False)
    figure, axes = panels(2, 4.8, 3.6, rows=len(shown))
    for (heads, ratios), source in zip(zip(axes[::2], axes[1::2], strict=True), shown, strict=True):
        rows = _first_space(source.rows(tables, "distances"))
        rows = select(rows, length=rows.length.max())
        for column, (colour, style, words) in reversed(BOUNDS.items()):
            # As pixels, since at the paper's scale an SVG would hold hundreds of thousands of points.
            heads.plot(rows.distance, rows[column], ".", color=colour, markersize=3, alpha=0.4, rasterized=True)
            heads.plot([], [], "o", color=colour, markersize=5, label=words)
            ratio = curve(rows, column, "selected") / curve(rows, "distance", "selected")
            _line(ratios, ratio, colour=colour, style=style, label=words, marker="o")
        ends = [np.nanmin(rows.distance), np.nanmax(rows.distance)] if rows.distance.notna().any() else [1, 1]
        heads.plot(ends, ends, color="black", linewidth=1, label="equal")
        ratios.axhline(1.0, color="black", linewidth=1)
        heads.set(xlabel="measured distance", ylabel="bound", title=f"{source.label}, each head and N")
        ratios.set(xlabel=SELECTED, ylabel="bound over distance", title=f"means over heads, L = {rows.length.max()}")
        for ax in (heads, ratios):
            logarithmic(ax, "xy")
        _doublings(ratios)
    legend_below(figure, axes[0], 3)
    return figure


def collapse(tables: Tables) -> Figure:
    """Corollary 2(ii): the distance as nearly all keys are selected."""
    shown = sources(tables, "collapse")
    figure, axes = panels(min(len(shown), 3), 4.4, 3.4, rows=math.ceil(len(shown) / 3))
    for ax, source in zip(axes, shown, strict=False):
        for name, colour, words in _normalisers(tables["collapse"]):
            points = curve(source.rows(tables, "collapse", name), "distance", "fraction")
            _line(ax, points.div(points.max(axis=1), axis=0), colour=colour, label=words, marker="o", log=False)
        ax.axhline(0.1, color="black", linewidth=1, linestyle=":")
        ax.set(xlabel="share of the keys that is selected", ylabel="distance over its largest", title=source.label)
        ax.set_ylim(-0.03, 1.05)
    legend_below(figure, axes[0], 6)
    drop(axes[len(shown) :])
    return figure


def critical_n(tables: Tables) -> Figure:
    """Figure 2c: where the test over heads stops to tell the distance from its expectation."""
    shown = sources(tables, "distances", untrained=False)
    figure, axes = panels(2, 5.0, 3.4, rows=len(shown))
    for (statistic, against_length), source in zip(zip(axes[::2], axes[1::2], strict=True), shown, strict=True):
        rows = _first_space(source.rows(tables, "distances"))
        longest = rows.length.max()
        heads = rows[["layer", "head"]].drop_duplicates()
        for which in EXPECTATIONS:
            colour, style, words = TESTED[which]
            tests = {key: agreement(one, which) for key, one in rows.groupby(["length", "seed"])}
            points = pd.DataFrame(
                {seed: each.statistic for (length, seed), each in tests.items() if length == longest}
            ).T
            _line(statistic, points, colour=colour, style=style, label=words, marker="o", log=False)
            firsts = pd.Series(
                {key: critical(each, key[0]) for key, each in tests.items() if len(each) > 1}, dtype=float
            )
            if len(firsts):
                _line(against_length, firsts.unstack(0), colour=colour, style=style, label=words, marker="o")
        for level, style in ((LEVEL, "-"), (0.05, ":")):
            edge = math.sqrt(-math.log(level / 2) / len(heads))
            statistic.axhline(edge, color="black", linewidth=1, linestyle=style, label=f"rejected at {level:g} above")
        lengths = np.array(sorted(rows.length.unique()), dtype=float)
        against_length.plot(lengths, PAPERS_SHARE * lengths, color="black", linewidth=1, label="0.06 L, the paper's")
        against_length.plot(lengths, lengths, color=GREY, linewidth=1, linestyle=":", label="L: always rejected")
        title = f"{source.label}, L = {longest}, {len(heads)} heads"
        statistic.set(xlabel=SELECTED, ylabel="largest difference of distributions", title=title, ylim=(-0.03, 1.05))
        _doublings(statistic)
        against_length.set(xlabel=LENGTH, ylabel="critical N", title=f"first N not rejected at {LEVEL:g}")
        logarithmic(against_length, "xy")
        _doublings(against_length)
        _legend(against_length)
    legend_below(figure, axes[0], 3)
    return figure


# --- separability ----------------------------------------------------------------------------------------------------


def separability(tables: Tables) -> Figure:
    """Figure 3: the share of separable keys, boxes over heads, with both bounds; and the other normalisers."""
    shown = sources(tables, "separability")
    figure, axes = panels(2, 5.4, 3.4, rows=len(shown))
    for (boxes, others), source in zip(zip(axes[::2], axes[1::2], strict=True), shown, strict=True):
        rows = _first_space(source.rows(tables, "separability"))
        rows = select(rows, length=rows.length.max())
        _boxes(boxes, rows)
        boxes.set(xlabel=SELECTED, ylabel=SHARE, title=f"{source.label}, L = {rows.length.max()}", ylim=(-0.03, 1.05))
        for name, colour, words in _normalisers(tables["separability"]):
            cell = _first_space(source.rows(tables, "separability", name))
            cell = select(cell, length=rows.length.max())
            _line(others, curve(cell, "ratio", "selected"), colour=colour, label=words, marker="o", log=False)
        others.axhspan(0.7, 0.85, color=GREY, alpha=0.15, linewidth=0, label="0.70 to 0.85, the paper's level")
        others.set(xlabel=SELECTED, ylabel=SHARE, title="means over heads", ylim=(-0.03, 1.05))
        _doublings(others)
    _legend(axes[0])
    legend_below(figure, axes[1], 4)
    return figure


def _boxes(ax: Axes, rows: pd.DataFrame) -> None:
    """A box over the heads of all seeds for each N, whiskers from the smallest to the largest, and mean bounds."""
    places = sorted(rows.selected.unique())
    if len(places) > MOST_BOXES:
        places = [n for n in places if n & (n - 1) == 0]  # powers of two
    rows = rows[rows.selected.isin(places)]
    values = [group[np.isfinite(group)].to_numpy() for _, group in rows.groupby("selected").ratio]
    style = {"color": BLUE, "linewidth": 1.2}
    ax.boxplot(
        values,
        positions=range(len(places)),
        widths=0.5,
        whis=(0, 100),
        medianprops=style,
        boxprops=style,
        manage_ticks=False,
    )
    for column, colour, words in (("upper", RED, "upper bound"), ("lower", ORANGE, "lower bound")):
        points = curve(rows, column, "selected").set_axis(range(len(places)), axis="columns")
        _line(ax, points, colour=colour, style="--", label=words, log=False)
    ax.set_xticks(range(len(places)), places)
    ax.grid(axis="x", visible=False)


def separability_heads(tables: Tables) -> Figure:
    """Heat maps of the separable share over layers and heads."""
    shown = sources(tables, "separability", synthetic=False)
    grids = []
    for source in shown:
        rows = _first_space(source.rows(tables, "separability"))
        rows = select(rows, length=rows.length.max())
        n = _nearest(rows.selected, WHERE_FLAT)
        means = select(rows, selected=n).groupby(["layer", "head"]).ratio.agg(lambda values: np.mean(values.to_numpy()))
        grids.append((f"{source.label}, N = {n}, L = {rows.length.max()}", means.unstack("head")))
    figure, axes = panels(min(len(grids), 2), 4.6, 3.8, rows=math.ceil(len(grids) / 2))
    found = np.concatenate([grid.to_numpy().ravel() for _, grid in grids])
    found = found[np.isfinite(found)]
    low, high = (found.min(), found.max()) if len(found) else (0.0, 1.0)
    for ax, (title, grid) in zip(axes, grids, strict=False):
        image = ax.imshow(grid, cmap="viridis", vmin=low, vmax=high, aspect="auto", origin="lower")
        ax.set(xlabel="head", ylabel="layer", title=title)
        for axis, names in ((ax.xaxis, grid.columns), (ax.yaxis, grid.index)):
            axis.set_ticks(range(len(names)), names)
        ax.grid(visible=False)
    figure.colorbar(image, ax=axes, label=SHARE)
    drop(axes[len(grids) :])
    return figure


def spaces(tables: Tables) -> Figure:
    """Distance and separable share with other vectors of the tokens, before and after training."""
    ratios, distances = tables["separability"], tables["distances"]
    data_sets = list(dict.fromkeys(distances.data_set))
    figure, axes = panels(2, 5.2, 3.4, rows=len(data_sets))
    for row, data_set in enumerate(data_sets):
        left, right = axes[2 * row], axes[2 * row + 1]
        of_text = [each for each in sources(tables, "distances", synthetic=False) if each.data_set == data_set]
        for source in of_text:
            for ax, table, column in ((left, ratios, "ratio"), (right, distances, "distance")):
                rows = source.rows(tables, "separability" if column == "ratio" else "distances")
                for space in dict.fromkeys(table.space):
                    colour, words = SPACES[space]
                    cell = select(rows, space=space, length=rows.length.max())
                    style, words = (":", f"{words}, untrained") if source.untrained else ("-", words)
                    points = curve(cell, column, "selected")
                    _line(ax, points, colour=colour, style=style, label=words, log=ax is right)
        left.set(xlabel=SELECTED, ylabel=SHARE, title=f"{data_set}, L = {distances.length.max()}", ylim=(-0.03, 1.05))
        right.set(xlabel=SELECTED, ylabel="distance", title="distance to the keys left out")
        logarithmic(right, "xy")
        for ax in (left, right):
            _doublings(ax)
    legend_below(figure, axes[0], 4)
    return figure


# --- gradients -------------------------------------------------------------------------------------------------------


def gradient(tables: Tables) -> Figure:
    """Figure 4: change of the weights against temperature, the exact Jacobian beside it, and other normalisers."""
    shown = sources(tables, "sensitivity", untrained=False)
    figure, axes = panels(3, 4.6, 3.8, rows=len(shown))
    for (changes, exact, others), source in zip(_by_threes(axes), shown, strict=True):
        rows, norms = source.rows(tables, "sensitivity"), source.rows(tables, "jacobians")
        smallest = rows.perturbation.min()
        for colour, (size, cell) in zip((BLUE, SKY, PURPLE, GREEN), rows.groupby("perturbation"), strict=False):
            label = rf"change, $\epsilon$ = {size:g}"
            _line(changes, _largest(cell, "change"), colour=colour, label=label, marker="o")
        for column, colour, words in (
            ("spectral_max", RED, "spectral norm, largest row"),
            ("spectral", ORANGE, "spectral norm, mean over rows"),
            ("frobenius_per_root", GREEN, r"Frobenius norm over $\sqrt{n}$"),
        ):
            _line(exact, _largest(norms, column), colour=colour, label=words, marker="o")
        cell = select(rows, perturbation=smallest)
        _line(exact, _largest(cell, "change"), colour=BLUE, style=":", label=rf"change, $\epsilon$ = {smallest:g}")
        for name, colour, words in _normalisers(tables["sensitivity"]):
            cell = select(source.rows(tables, "sensitivity", name), perturbation=smallest)
            _line(others, _largest(cell, "change"), colour=colour, label=words, marker="o")
        titles = (source.label, "exact Jacobian of softmax", rf"other normalisers, $\epsilon$ = {smallest:g}")
        for ax, title in zip((changes, exact, others), titles, strict=True):
            _bound_lines(ax, np.array(sorted(rows.temperature.unique())))
            ax.set(xlabel=TEMPERATURE, ylabel="largest head", title=title)
            logarithmic(ax, "xy")
            _legend(ax)
    return figure


def _bound_lines(ax: Axes, temperatures: np.ndarray) -> None:
    """Corollary 3 as printed and as corrected."""
    ax.plot(temperatures, 1 / (4 * temperatures), "--", color="black", linewidth=1, label="1 / (4 T), printed")
    ax.axhline(math.sqrt(2), color="black", linestyle=":", linewidth=1, label=r"$\sqrt{2}$, printed")
    ax.plot(temperatures, 1 / (2 * temperatures), "-", color="black", linewidth=1, label="1 / (2 T), tight")


def spectral(tables: Tables) -> Figure:
    """Exact spectral norms times T: the largest, and the share of rows above the printed bound."""
    shown = sources(tables, "jacobians", untrained=False)
    figure, axes = panels(2, 5.0, 3.4, rows=len(shown))
    for (largest, share), source in zip(zip(axes[::2], axes[1::2], strict=True), shown, strict=True):
        for name, colour, words in _normalisers(tables["jacobians"]):
            rows = source.rows(tables, "jacobians", name)
            _line(largest, _largest(rows, "spectral_largest_product"), colour=colour, label=words, marker="o")
            shares = curve(rows, "above_quarter", "temperature")
            _line(share, shares, colour=colour, label=words, marker="o", log=False)
        for level, style, words in ((0.25, "--", "1 / 4, printed"), (0.5, "-", "1 / 2, tight for softmax")):
            largest.axhline(level, color="black", linestyle=style, linewidth=1, label=words)
        largest.set(xlabel=TEMPERATURE, ylabel="T times spectral norm, largest row", title=source.label)
        logarithmic(largest, "xy")
        share.set(xlabel=TEMPERATURE, ylabel="share of rows", title="spectral norm above 1 / (4 T)", ylim=(-0.03, 1.03))
        share.set_xscale("log")
    legend_below(figure, axes[0], 4)
    return figure


# --- weights and training --------------------------------------------------------------------------------------------


def weights(tables: Tables) -> Figure:
    """Corollary 1: how the largest weight shrinks with the length, and which normalisers keep to its bounds."""
    shown = sources(tables, "weights", untrained=False)
    figure, axes = panels(3, 4.4, 3.4, rows=len(shown))
    for (largest, within, zeros), source in zip(_by_threes(axes), shown, strict=True):
        for name, colour, words in _normalisers(tables["weights"]):
            rows = source.rows(tables, "weights", name)
            for ax, column in ((largest, "largest_weight"), (within, "within"), (zeros, "zeros")):
                points = curve(rows, column, "length")
                _line(ax, points, colour=colour, label=words, marker="o", log=ax is largest)
        lengths = np.array(sorted(source.rows(tables, "weights").length.unique()), dtype=float)
        largest.plot(lengths, 1 / lengths, color="black", linewidth=1, label="1 / L")
        largest.set(xlabel=LENGTH, ylabel="mean largest weight of a row", title=source.label)
        logarithmic(largest, "xy")
        within.set(
            xlabel=LENGTH, ylabel="share of weights", title="within the bounds of Corollary 1", ylim=(-0.03, 1.05)
        )
        zeros.set(xlabel=LENGTH, ylabel="share of visible keys", title="weight exactly 0", ylim=(-0.03, 1.05))
        for ax in (largest, within, zeros):
            _doublings(ax)
    legend_below(figure, axes[0], 7)
    return figure


def training(tables: Tables) -> Figure:
    """Losses of the language models that are probed."""
    fits = tables["language_fits"]
    figure, (ax,) = panels(1, 5.6)
    groups = list(fits.groupby(["data_set", "model"]))
    losses = (("train_loss", GREY, "training, last tenth"), ("validation_loss", BLUE, "held-out tokens"))
    for place, (_, rows) in enumerate(groups):
        trained = rows.steps.max() > 0
        for shift, (column, colour, words) in zip((-0.15, 0.15), losses, strict=True):
            if trained or column == "validation_loss":
                known = words in ax.get_legend_handles_labels()[1]
                dots(ax, place + shift, rows[column], colour=colour, label=None if known else words, width=0.05)
    diverged = int((fits.diverged_at >= 0).sum())
    ax.set_xticks(range(len(groups)), [f"{data_set}\n{model}" for (data_set, model), _ in groups])
    ax.set(ylabel="loss [nat per token]", title=f"{fits.steps.max()} updates, {diverged} of {len(fits)} diverged")
    ax.set_xlim(-0.6, len(groups) - 0.4)
    ax.grid(axis="x", visible=False)
    _legend(ax)
    return figure


# --- shared ----------------------------------------------------------------------------------------------------------


def _line(
    ax: Axes, points: pd.DataFrame, *, colour: str, label: str, style: str = "-", marker: str = "", log: bool = True
) -> None:
    """Mean over seeds of a curve (`curves.curve`) with its 95 % interval, both of the logs on a log axis."""
    values = logs(points) if log else points
    found = [mean_interval(column.to_numpy()) for _, column in values.items() if len(column)]
    if not found:  # no seed has this curve
        return
    means, halves = np.array(found).T
    means = np.where(np.isfinite(means), means, np.nan)
    halves = np.where(np.isfinite(halves), halves, 0.0)
    low, middle, high = (np.exp(each) if log else each for each in (means - halves, means, means + halves))
    ax.plot(points.columns, middle, style, color=colour, label=label, marker=marker, markersize=4)
    ax.fill_between(points.columns, low, high, color=colour, alpha=0.2, linewidth=0)


_largest = partial(curve, by="temperature", over="max")
"""The largest head of each seed and temperature."""


def _first_space(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the space that all sweeps have; it stands first in its table."""
    return rows[rows.space == rows.space.iloc[0]] if len(rows) else rows


def _nearest(places: pd.Series, wanted: int) -> int:
    """The place whose log is nearest to that of the wanted one."""
    return min(sorted(places.unique()), key=lambda place: abs(math.log(place / wanted)))


def _normalisers(table: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """Those of a table, with colour and words."""
    there = set(table.normaliser)
    return ((name, *look) for name, look in NORMALISERS.items() if name in there)


def _by_threes(axes: list[Axes]) -> list[tuple[Axes, Axes, Axes]]:
    return list(zip(axes[::3], axes[1::3], axes[2::3], strict=True))


def _doublings(ax: Axes) -> None:
    """A log axis of numbers of keys, marked at powers of two."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")


def _legend(ax: Axes) -> None:
    """A small legend, if there is anything to name."""
    if ax.get_legend_handles_labels()[1]:
        # On a veil, since the bounds cross nearly every corner.
        ax.legend(fontsize=7, frameon=True, framealpha=0.85, edgecolor="none")


FIGURES: dict[str, Callable[[Tables], Figure]] = {
    function.__name__: function
    for function in (
        separability_heads,
        distance,
        bounds,
        critical_n,
        collapse,
        separability,
        spaces,
        gradient,
        spectral,
        weights,
        training,
    )
}


def plot(tables: list[Path], out: Path) -> None:
    """Draw every figure.

    Args:
        tables: Parquet files of the measuring and training steps.
        out: folder for the SVG and PNG files and captions.json.

    """
    draw("attention", Path(__file__).with_name("captions.yaml"), FIGURES, tables, out)


if __name__ == "__main__":
    run({"plot": plot})
