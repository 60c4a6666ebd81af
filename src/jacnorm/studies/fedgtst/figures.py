"""Plotting step of the `fedgtst` study: tables in, one figure for each entry of ``captions.yaml`` out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
    curve,
    dots,
    drop,
    legend_below,
    logarithmic,
    mean_interval,
    once,
    panels,
)
from jacnorm.step import run
from jacnorm.studies.fedgtst.selection import (
    CONDITION,
    NAMES,
    PREFIXES,
    Arm,
    Cell,
    arm_of,
    cells_of,
    coefficients,
    random_rows,
    rows_of,
    trained,
    validation,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Tables = Mapping[str, pd.DataFrame]

ROUND = "round"
ACCURACY = "target accuracy [%]"
METHODS = {
    "fedavg": GREY,
    "fedsr": SKY,
    "fediir": BLUE,
    "scaffold": GREEN,
    "fedgtst": RED,
    "fedgtst-mean": ORANGE,
}
LINES = {"fedavg": "--", "fedgtst-mean": "-."}
SWEEP = (BLUE, GREEN, RED, PURPLE, SKY, ORANGE)
"""Colours of FedGTST's coefficients, ascending."""
SHORT = {"fedgtst-mean": "FedGTST,\nmean guide"}
RANDOM = "initial weights"


# --- experiments and cells -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """The tables of one experiment, by the ends of their names, and its cells with the common condition."""

    tables: Mapping[str, pd.DataFrame]
    cells: list[Cell]

    def arms(self, cell: Cell) -> Iterator[Arm]:
        """Every method of a cell at its chosen coefficient, in the order of their names."""
        for method in NAMES:
            arm = arm_of(self.tables["transfer"], cell, method)
            if arm is not None:
                yield arm


def _parts(tables: Tables, first: str, *more: str, prefixes: Sequence[str] = tuple(PREFIXES)) -> list[_Part]:
    """The experiments whose tables this scale made; the rows of `first` say which cells there are."""
    found = []
    for prefix in prefixes:
        own = {name: tables.get(f"{prefix}_{name}") for name in (first, *more)}
        made = {name: table for name, table in own.items() if table is not None}
        if len(made) == len(own) and len(made[first]):
            found.append(_Part(made, _common_cells(made[first])))
    return found


def _common_cells(table: pd.DataFrame) -> list[Cell]:
    """Cells of the condition that most rows share; alternatives to it come one at a time, with fewer methods."""
    counts = table.groupby(list(CONDITION), sort=False).size()
    return [cell for cell in cells_of(table) if tuple(getattr(cell, name) for name in CONDITION) == counts.idxmax()]


def _rows(parts: Sequence[_Part]) -> list[tuple[_Part, Cell]]:
    """Each common cell of each experiment."""
    return [(part, cell) for part in parts for cell in part.cells]


def _grid(count: int, width: float, height: float, most: int = 3) -> tuple[Figure, list[Axes], int]:
    """Panels in rows of `most`, a single one wider so that a legend fits below; and how many columns there are."""
    columns = min(count, most)
    figure, axes = panels(columns, 6.4 if columns == 1 else width, height, rows=math.ceil(count / columns))
    drop(axes[count:])
    return figure, axes[:count], columns


def _spread(ax: Axes) -> None:
    """Logarithmic where the lines span more than a factor of 3; less has too few round numbers for that scale."""
    lines = [np.asarray(line.get_ydata(), float) for line in ax.get_lines()]
    values = np.concatenate([*lines, np.zeros(0)])
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > 3 * values.min():
        logarithmic(ax, "y")


def _title(cell: Cell) -> str:
    return f"{cell.task}, {cell.network}, K = {cell.clients}"


def _largest_legend(figure: Figure, axes: Sequence[Axes], columns: int) -> None:
    """The legend of the panel with most entries, below the figure."""
    legend_below(figure, max(axes, key=lambda ax: len(ax.get_legend_handles_labels()[1])), columns)


def _ticks(ax: Axes, names: Sequence[str], **more: float) -> None:
    ax.set_xticks(range(len(names)), names, fontsize=8, **more)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.grid(axis="x", visible=False)


def _sweep_colours(parts: Sequence[_Part]) -> dict[float, str]:
    """One colour for each coefficient of FedGTST, the same in every panel."""
    values = sorted({x for part in parts for x in select(_base(part), method="fedgtst").coefficient})
    return {value: SWEEP[place % len(SWEEP)] for place, value in enumerate(values)}


def _base(part: _Part) -> pd.DataFrame:
    """A table of the experiment that names its runs."""
    return next(iter(part.tables.values()))


# --- what was reached ------------------------------------------------------------------------------------------------


def accuracy(tables: Tables) -> Figure:
    """Tables 1 to 3, 6 to 8: target accuracy by method, with the read-out on random features."""
    rows = _rows(_parts(tables, "transfer", "runs"))
    figure, axes, _ = _grid(len(rows), 6.4, 3.4, most=2)
    for ax, (part, cell) in zip(axes, rows, strict=True):
        arms = list(part.arms(cell))
        start = 100 * random_rows(part.tables["transfer"], cell, "fedavg").target_accuracy
        if len(start):
            ax.axhline(mean_interval(start.to_numpy())[0], color=GREY, linewidth=1, linestyle=":")
            dots(ax, 0, start, colour=GREY)
        for place, arm in enumerate(arms, start=1):
            own = arm.rows(trained(part.tables["transfer"]))
            dots(ax, place, 100 * own.target_accuracy, colour=METHODS[arm.method])
            _mark_ended(ax, place, own, arm.rows(part.tables["runs"]))
        _ticks(ax, [RANDOM.replace(" ", "\n"), *(_short(arm) for arm in arms)])
        _percent(ax)
        ax.set_title(_title(cell), fontsize=10)
    return figure


def _percent(ax: Axes) -> None:
    """Name the axis and keep it to shares that exist; the interval of an unstable method may reach beyond."""
    low, high = ax.get_ylim()
    ax.set(ylabel=ACCURACY, ylim=(max(low, -2), min(high, 102)))


def _mark_ended(ax: Axes, place: float, rows: pd.DataFrame, fits: pd.DataFrame) -> None:
    """A square around the runs that did not finish."""
    ended = rows[rows.seed.isin(fits[fits.outcome != "finished"].seed)]
    if len(ended):
        points = 100 * ended.target_accuracy
        ax.plot(np.full(len(ended), place), points, "s", markersize=7, markerfacecolor="none", color="black")


def _short(arm: Arm) -> str:
    name = SHORT.get(arm.method, NAMES[arm.method])
    symbol = arm.words.rpartition(", ")[2] if " = " in arm.words else ""
    return f"{name}\n{symbol}".strip()


def selection(tables: Tables) -> Figure:
    """Validation and test accuracy against the coefficient, with the choice."""
    rows = _rows(_parts(tables, "transfer"))
    figure, axes, columns = _grid(len(rows), 4.8, 3.6)
    for ax, (part, cell) in zip(axes, rows, strict=True):
        transfer = part.tables["transfer"]
        for arm in part.arms(cell):
            own = rows_of(trained(transfer), cell, method=arm.method)
            own = own.assign(test=100 * own.target_accuracy, held_out=100 * own.validation_accuracy)
            if set(own.coefficient) == {0.0}:
                ax.axhline(own.test.mean(), color=GREY, linewidth=1, linestyle=":")
                ax.annotate(
                    NAMES[arm.method],
                    (1, own.test.mean()),
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="bottom",
                    fontsize=7,
                    color=GREY,
                )
                continue
            _choice(ax, own, arm, 100 * validation(transfer, cell, arm.method)[arm.coefficient])
        logarithmic(ax, "x")
        ax.set(xlabel="coefficient: xi, rho or FedSR's factor", ylabel=ACCURACY)
        ax.set_title(_title(cell), fontsize=10)
    _largest_legend(figure, axes, 2 * min(columns, 2))
    return figure


def _choice(ax: Axes, rows: pd.DataFrame, arm: Arm, best: float) -> None:
    """Both accuracies of a method against its coefficient, and a ring where it was chosen."""
    colour = METHODS[arm.method]
    for column, marker, style, words in (("test", "o", "-", "test"), ("held_out", "s", "--", "validation")):
        points = [(place, *mean_interval(own[column].to_numpy())) for place, own in rows.groupby("coefficient")]
        places, means, halves = (np.array(values, float) for values in zip(*points, strict=True))
        halves = np.where(np.isfinite(halves), halves, 0.0)
        label = f"{NAMES[arm.method]}, {words}"
        ax.errorbar(places, means, halves, fmt=marker + style, color=colour, markersize=4, capsize=2, label=label)
    label = once(ax, "chosen")
    ax.plot([arm.coefficient], [best], "o", markersize=12, markerfacecolor="none", color="black", label=label)


def conditions(tables: Tables) -> Figure:
    """Target accuracy against what was varied: the number of clients, and each alternative."""
    shown: list[tuple[_Part, str, list[Cell]]] = []
    for part in _parts(tables, "transfer"):
        for task, network in dict.fromkeys((cell.task, cell.network) for cell in part.cells):
            common = [cell for cell in part.cells if (cell.task, cell.network) == (task, network)]
            shown.append((part, "clients", common))
            for column in CONDITION:
                cells = _alternatives(part, common, column)
                if cells:
                    shown.append((part, column, cells))
    words = {
        "clients": "clients K",
        "participation": "share of clients in a round",
        "local_epochs": "local epochs",
        "split": "split",
        "extra_share": "share of clients that train twice",
    }
    figure, axes, columns = _grid(len(shown), 4.8, 3.4)
    for ax, (part, column, cells) in zip(axes, shown, strict=True):
        _by_condition(ax, part, column, cells)
        first = cells[0]
        beside = "" if column == "clients" else f", K = {first.clients}"
        ax.set(xlabel=words[column])
        _percent(ax)
        ax.set_title(f"{first.task}, {first.network}{beside}", fontsize=10)
    _largest_legend(figure, axes, 3 * min(columns, 2))
    return figure


def _alternatives(part: _Part, common: Sequence[Cell], column: str) -> list[Cell]:
    """The cells that differ from a common one in this column alone, and that one; none if there are none."""
    every = cells_of(trained(part.tables["transfer"]))
    found = []
    for cell in common:
        other = [each for each in every if each != cell and each._replace(**{column: getattr(cell, column)}) == cell]
        found += [cell, *other] if other else []
    return sorted(found, key=lambda cell: getattr(cell, column))


def _by_condition(ax: Axes, part: _Part, column: str, cells: Sequence[Cell]) -> None:
    """Each method's dots side by side at each value."""
    methods = [method for method in NAMES if any(arm_of(part.tables["transfer"], c, method) for c in cells)]
    width = 0.7 / len(methods)
    for place, cell in enumerate(cells):
        for shift, method in enumerate(methods):
            arm = arm_of(part.tables["transfer"], cell, method)
            if arm is not None:
                values = 100 * arm.rows(trained(part.tables["transfer"])).target_accuracy
                spot = place + (shift - (len(methods) - 1) / 2) * width
                label = once(ax, NAMES[method])
                dots(ax, spot, values, colour=METHODS[method], label=label, width=width / 4)
    values = [getattr(cell, column) for cell in cells]
    _ticks(ax, [value if isinstance(value, str) else f"{value:g}" for value in values])


def fine_tuning(tables: Tables) -> Figure:
    """Figure 1: accuracy on the target against passes of fine-tuning."""
    rows = []
    for part in _parts(tables, "transfer", "fine_tuning"):
        shares = [each for cell in part.cells for each in _alternatives(part, [cell], "participation")]
        rows += [(part, cell) for cell in dict.fromkeys([*part.cells, *shares])]
    columns = {"train_accuracy": "target training accuracy [%]", "target_accuracy": ACCURACY}
    figure, axes = panels(2, 5.4, 3.4, rows=len(rows))
    for place, (part, cell) in enumerate(rows):
        curves = part.tables["fine_tuning"]
        for ax, (column, words) in zip(axes[2 * place :], columns.items(), strict=False):
            start = random_rows(curves, cell, "fedavg")
            if len(start):
                start = start.assign(percent=100 * start[column])
                curve(ax, start, "epoch", "percent", colour="black", style=":", label=RANDOM)
            for arm in part.arms(cell):
                own = arm.rows(trained(curves))
                _method_curve(ax, own.assign(percent=100 * own[column]), "epoch", "percent", arm)
            ax.set(xlabel="pass of fine-tuning", ylabel=words)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set_title(f"{_title(cell)}, {cell.participation:.0%} a round", fontsize=10)
    _largest_legend(figure, axes, 4)
    return figure


def _method_curve(ax: Axes, rows: pd.DataFrame, x: str, y: str, arm: Arm) -> None:
    """Mean over seeds of one method; the legend names it without its coefficient, which cells may choose otherwise."""
    if len(rows):
        style, words = LINES.get(arm.method, "-"), NAMES[arm.method]
        curve(ax, rows, x, y, colour=METHODS[arm.method], style=style, label=words)


# --- gradients over the rounds ---------------------------------------------------------------------------------------


def statistics(tables: Tables) -> Figure:
    """Figure 2: norm of the mean gradient and variance, and both over FedAVG's."""
    parts = _parts(tables, "statistics", "transfer", prefixes=("federated", "image"))
    rows, colours = _rows(parts), _sweep_colours(parts)
    columns = {"norm_of_mean": "norm of the mean", "variance": "variance over clients"}
    figure, axes = panels(4, 3.8, 3.3, rows=len(rows))
    for place, (part, cell) in enumerate(rows):
        own = axes[4 * place : 4 * place + 4]
        for column, words, plain, ratio in zip(columns, columns.values(), own[:2], own[2:], strict=True):
            _statistic(plain, ratio, part, cell, column, colours)
            plain.set(xlabel=ROUND, ylabel=f"{words} [gradient{'²' * (column == 'variance')}]")
            plain.set_title(_title(cell), fontsize=9)
            ratio.axhline(1, color="black", linewidth=1)
            ratio.set(xlabel=ROUND, ylabel="ratio to FedAVG's")
            asked = "above" if column == "norm_of_mean" else "below"
            ratio.set_title(f"{words}, claimed {asked} 1", fontsize=9)
        for ax in own:
            _spread(ax)
    _largest_legend(figure, axes, 5)
    return figure


def _statistic(plain: Axes, ratio: Axes, part: _Part, cell: Cell, column: str, colours: Mapping[float, str]) -> None:
    """One statistic of FedAVG, of FedGTST at each coefficient and with the mean guide; and over FedAVG's."""
    table, transfer = part.tables["statistics"], part.tables["transfer"]
    base = arm_of(transfer, cell, "fedavg")
    arms = [Arm(cell, "fedgtst", value) for value in coefficients(transfer, cell, "fedgtst")]
    best, mean = arm_of(transfer, cell, "fedgtst"), arm_of(transfer, cell, "fedgtst-mean")
    for arm in [each for each in (base, *arms, mean) if each is not None]:
        colour = colours[arm.coefficient] if arm.method == "fedgtst" else METHODS[arm.method]
        style = LINES.get(arm.method, "-" if arm == best else ":")
        words = NAMES[arm.method] if arm.method != "fedgtst" else arm.words
        rows = arm.rows(table)
        if rows.empty:
            continue
        curve(plain, rows, "round", column, colour=colour, style=style, label=words)
        if base is not None and arm != base:
            _ratio_curve(ratio, rows, base.rows(table), column, colour=colour, style=style)


def _ratio_curve(ax: Axes, rows: pd.DataFrame, base: pd.DataFrame, column: str, *, colour: str, style: str) -> None:
    """Geometric mean over seeds of the ratio in each round, with its 95 % interval."""
    keys = ["seed", "round"]
    both = rows[[*keys, column]].merge(base[[*keys, column]], on=keys, suffixes=("", "_base"))
    ratios = both[column] / both[f"{column}_base"]
    logs = both.assign(log=np.log(ratios.where(ratios > 0)))
    logs = logs[np.isfinite(logs.log)]
    if logs.empty:
        return
    points = [(place, *mean_interval(own.log.to_numpy())) for place, own in logs.groupby("round")]
    places, means, halves = (np.array(values, float) for values in zip(*points, strict=True))
    halves = np.where(np.isfinite(halves), halves, 0.0)
    ax.plot(places, np.exp(means), style, color=colour)
    ax.fill_between(places, np.exp(means - halves), np.exp(means + halves), color=colour, alpha=0.2, linewidth=0)


def dispersion(tables: Tables) -> Figure:
    """The variance's two parts, and the norms' share."""
    rows = _rows(_parts(tables, "statistics", "transfer"))
    columns = {"norm_dispersion": "dispersion of norms", "direction_dispersion": "dispersion of directions"}
    figure, axes = panels(3, 4.4, 3.3, rows=len(rows))
    for place, (part, cell) in enumerate(rows):
        own = axes[3 * place : 3 * place + 3]
        for arm in part.arms(cell):
            points = arm.rows(part.tables["statistics"])
            points = points.assign(share=100 * points.norm_dispersion / points.variance)
            for ax, column in zip(own, (*columns, "share"), strict=True):
                _method_curve(ax, points, "round", column, arm)
        for ax, words in zip(own, columns.values(), strict=False):
            ax.set(xlabel=ROUND, ylabel=f"{words} [gradient²]")
            _spread(ax)
            ax.set_title(_title(cell), fontsize=9)
        own[2].axhline(5, color="black", linewidth=1, linestyle=":")
        own[2].set(xlabel=ROUND, ylabel="norms' part of the variance [%]")
        own[2].set_ylim(bottom=0)
    _largest_legend(figure, axes, 6)
    return figure


def guide(tables: Tables) -> Figure:
    """The guide of every run, and where runs ended."""
    parts = _parts(tables, "rounds", "runs")
    rows, colours = _rows(parts), _sweep_colours(parts)
    figure, axes = panels(2, 5.4, 3.4, rows=len(rows))
    for place, (part, cell) in enumerate(rows):
        for ax, method in zip(axes[2 * place :], ("fedgtst", "fedgtst-mean"), strict=False):
            count = _guides(ax, part, cell, method, colours)
            plain = rows_of(part.tables["rounds"], cell, method="fedavg")
            for _, one in plain.groupby("seed"):
                _positive(ax, one["round"], one.norm_max, color=GREY, linewidth=0.7, label=once(ax, "FedAVG's norms"))
            if not ax.get_lines():
                ax.text(0.5, 0.5, "none trained", transform=ax.transAxes, ha="center", color=GREY)
            ax.set(xlabel=ROUND, ylabel="guide [gradient]")
            words = "largest norm" if method == "fedgtst" else "mean norm"
            ax.set_title(f"{_title(cell)}\nguide: {words}{count}", fontsize=9)
            _spread(ax)
            if ax.get_legend_handles_labels()[1]:
                ax.legend(fontsize=7)
    return figure


def _guides(ax: Axes, part: _Part, cell: Cell, method: str, colours: Mapping[float, str]) -> str:
    """Draw each run's guide and return how many ended early, in words."""
    fits = rows_of(part.tables["runs"], cell, method=method)
    rounds = rows_of(part.tables["rounds"], cell, method=method)
    for (coefficient, seed), one in rounds.groupby(["coefficient", "seed"]):
        colour = colours.get(coefficient, METHODS[method]) if method == "fedgtst" else METHODS[method]
        label = once(ax, f"xi = {coefficient:g}")
        one = one.sort_values("round")
        _positive(ax, one["round"], one.guide, color=colour, linewidth=1.2, label=label)
        ended = select(fits, coefficient=coefficient, seed=seed)
        ended = ended[ended.outcome != "finished"]
        finite = one[np.isfinite(one.guide) & (one.guide > 0)]
        if len(ended) and len(finite):
            place = (ended.ended_at.iloc[0], finite.guide.iloc[-1])
            ax.plot(*place, "X", color=colour, markersize=9, markeredgecolor="black", label=once(ax, "ended"))
    counts = {word: int((fits.outcome == word).sum()) for word in ("unstable", "diverged")}
    words = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"; {words} of {len(fits)} runs" if words else ""


def _positive(ax: Axes, x: pd.Series, y: pd.Series, **look: object) -> None:
    """A line through the finite positive numbers."""
    keep = np.isfinite(y) & (y > 0)
    if keep.any():
        ax.plot(x[keep], y[keep], **look)  # type: ignore[arg-type]


def training(tables: Tables) -> Figure:
    """Training loss and source accuracy over the rounds."""
    rows = _rows(_parts(tables, "transfer", "rounds", "statistics", "runs"))
    figure, axes = panels(2, 5.4, 3.3, rows=len(rows))
    for place, (part, cell) in enumerate(rows):
        left, right = axes[2 * place : 2 * place + 2]
        for arm in part.arms(cell):
            _method_curve(left, arm.rows(part.tables["rounds"]), "round", "loss", arm)
            points = arm.rows(part.tables["statistics"])
            _method_curve(right, points.assign(percent=100 * points.source_accuracy), "round", "percent", arm)
        fits = rows_of(part.tables["runs"], cell)
        counts = [f"{int((fits.outcome == word).sum())} {word}" for word in ("finished", "unstable", "diverged")]
        started = rows_of(part.tables["rounds"], cell)
        # A run that diverges would press all others flat.
        left.set_ylim(0, min(left.get_ylim()[1], 2 * started[started["round"] == 1].loss.median()))
        left.set(xlabel=ROUND, ylabel="training loss [nat]")
        left.set_title(f"{_title(cell)}\n{len(fits)} runs: {', '.join(counts)}", fontsize=9)
        right.set(xlabel=ROUND, ylabel="source accuracy [%]", ylim=(0, 100))
        right.set_title("global model, source's test part", fontsize=9)
    _largest_legend(figure, axes, 4)
    return figure


# --- data, bounds, communication, engines ----------------------------------------------------------------------------


def clients(tables: Tables) -> Figure:
    """Figure 3: samples of each class with each client."""
    shown = []
    for prefix in PREFIXES:
        table = tables.get(f"{prefix}_clients")
        if table is not None and len(table):
            first = select(table, seed=table.seed.min())
            shown += list(first.groupby(["source", "clients", "split"]))
    figure, axes, _ = _grid(len(shown), 4.8, 3.2)
    for ax, ((source, count, split), rows) in zip(axes, shown, strict=True):
        held = rows.pivot(index="label", columns="client", values="samples").fillna(0)
        image = ax.imshow(held, aspect="auto", cmap="inferno", origin="lower", interpolation="nearest", vmin=0)
        figure.colorbar(image, ax=ax, label="samples")
        ax.grid(visible=False)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        covered = int((held.sum(axis=1) > 0).sum())
        ax.set(xlabel="client", ylabel="class")
        ax.set_title(f"{source}, K = {count}, split {split}\n{covered} of {len(held)} classes held", fontsize=9)
    return figure


PROMISES = {
    "lemma": (BLUE, "-", "Lemma B.3"),
    "corrected": (GREEN, "--", "Theorem 2 with 1/(2α)"),
    "printed": (RED, "-", "Theorem 2 as printed, 2/α"),
    "variance_free": (ORANGE, "-", "without variance"),
}


def bounds(tables: Tables) -> Figure:
    """Promised over seen decrease, by step size."""
    table = tables["bounds"]
    cells = [("optimal step size", select(table, rule="optimal"))] * bool((table.rule == "optimal").any())
    fixed = select(table, rule="fixed")
    cells += [(f"step size {rate:g} / α", rows) for rate, rows in fixed.groupby("rate")]
    columns = min(len(cells), 4)
    figure, axes = panels(columns, 4.0, 3.5, rows=math.ceil(len(cells) / columns))
    for ax, (words, rows) in zip(axes, cells, strict=False):
        for promise, (colour, style, label) in PROMISES.items():
            ratios = (rows[promise] / rows.decrease).replace([np.inf, -np.inf], np.nan)
            groups = ratios.groupby(rows["round"])
            middle, low, high = groups.median(), groups.min(), groups.max()
            if middle.notna().any():
                ax.plot(middle.index, middle, style, color=colour, label=label)
                ax.fill_between(middle.index, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.axhline(1, color="black", linewidth=1)
        ax.set_yscale("symlog", linthresh=1)
        _plain_symlog(ax)
        ax.set(xlabel="rounds made before", ylabel="promised over seen decrease", title=words)
    drop(axes[len(cells) :])
    _largest_legend(figure, axes[: len(cells)], 4)
    return figure


def _plain_symlog(ax: Axes) -> None:
    """Plain numbers on an axis that is linear within 1 and logarithmic beyond."""
    low, high = ax.get_ylim()
    powers = [10.0**n for n in range(1, 12)]
    places = [*(-each for each in reversed(powers)), -1.0, 0.0, 0.5, 1.0, 2.0, 4.0, *powers]
    inside = [place for place in places if low <= place <= high]
    ax.set_yticks(inside, [f"{place:g}" for place in inside])
    ax.set_yticks([], minor=True)


def communication(tables: Tables) -> Figure:
    """Payload of one client in a round, all of it and beside the weights."""
    shown = []
    for part in _parts(tables, "runs"):
        for cell in dict.fromkeys((cell.source, cell.network) for cell in part.cells):
            rows = select(_base(part), source=cell[0], network=cell[1])
            shown.append((f"{cell[0]}, {cell[1]}, D = {rows.parameters.min():,}", rows, False))
    engines_table = select(tables["engines"], engine="flower")
    if len(engines_table):
        shown.append(
            (f"Flower, engines' check, {engines_table.weight_bytes.min() // 4:,} weights", engines_table, True)
        )
    figure, axes = panels(2, 5.6, 3.2, rows=len(shown))
    for place, (title, rows, flower) in enumerate(shown):
        whole, beside = axes[2 * place : 2 * place + 2]
        methods = [method for method in NAMES if (rows.method == method).any()]
        for spot, method in enumerate(methods):
            own = select(rows, method=method)
            for shift, column, colour, words in (
                (-0.18, "bytes_down", BLUE, "to a client"),
                (0.18, "bytes_up", ORANGE, "from a client"),
            ):
                sent, extra = own[column].max(), (own[column] - own.weight_bytes).max()
                look = {"color": colour, "hatch": "//" if flower else "", "edgecolor": "white"}
                whole.bar(spot + shift, sent / 1e3, 0.34, label=once(whole, words), **look)
                beside.bar(spot + shift, extra, 0.34, **look)
                beside.annotate(f"{extra:,}", (spot + shift, extra), ha="center", va="bottom", fontsize=6)
        whole.set(ylabel="payload [kB]")
        whole.set_title(title, fontsize=9)
        beside.set_yscale("symlog", linthresh=1)
        beside.set_ylim(0, 10 * max(1.0, beside.get_ylim()[1]))
        beside.set(ylabel="beside the weights [bytes]")
        for ax in (whole, beside):
            _ticks(ax, [SHORT.get(method, NAMES[method]) for method in methods])
    legend_below(figure, axes[0], 2)
    return figure


def engines(tables: Tables) -> Figure:
    """Differences of the other engines from the batched one."""
    table = tables["engines"]
    columns = {
        "weights_difference": "largest difference of a weight",
        "guide_difference": "relative difference of guide",
    }
    looks = {"loop": (BLUE, "plain loop", "o"), "flower": (ORANGE, "Flower, one process", "s")}
    figure, axes = panels(2, 5.2, 3.4)
    methods = [method for method in NAMES if (table.method == method).any()]
    for ax, (column, words) in zip(axes, columns.items(), strict=True):
        positive = table[column][np.isfinite(table[column]) & (table[column] > 0)]
        foot = min(positive.min() / 10 if len(positive) else 1e-12, 1e-9)
        for engine, (colour, label, marker) in looks.items():
            own = select(table, engine=engine)
            places = own.method.map(methods.index) + (-0.12 if engine == "loop" else 0.12)
            values = own[column].where(own[column] > 0, foot)
            ax.plot(places, values, marker, color=colour, alpha=0.6, label=label, markersize=5)
        ax.axhline(1e-5, color="black", linewidth=1, linestyle=":", label="asked: at most")
        logarithmic(ax, "y")
        ax.set(ylabel=words)
        _ticks(ax, [SHORT.get(method, NAMES[method]) for method in methods])
    legend_below(figure, axes[0], 3)
    return figure


FIGURES: dict[str, Callable[[Tables], Figure]] = {
    function.__name__: function
    for function in (
        accuracy,
        selection,
        statistics,
        dispersion,
        guide,
        training,
        fine_tuning,
        conditions,
        clients,
        bounds,
        communication,
        engines,
    )
}


def plot(tables: list[Path], out: Path) -> None:
    """Draw every figure.

    Args:
        tables: Parquet files of the measuring and training steps.
        out: folder for the SVG and PNG files and captions.json.

    """
    draw("fedgtst", Path(__file__).with_name("captions.yaml"), FIGURES, tables, out)


if __name__ == "__main__":
    run({"plot": plot})
