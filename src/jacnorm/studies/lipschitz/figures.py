"""Plotting step of the `lipschitz` study: tables in, one figure for each entry of ``captions.yaml`` out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from jacnorm.report.drawing import draw
from jacnorm.report.estimands import r_squared, select, slope
from jacnorm.report.plotting import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    curve,
    dots,
    drop,
    headroom,
    legend_below,
    mean_interval,
    once,
    panels,
)
from jacnorm.step import run
from jacnorm.studies.lipschitz import arms
from jacnorm.studies.lipschitz.judge import FIRST_DEPTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Tables = Mapping[str, pd.DataFrame]
MATRICES = "weight matrices r [layers]"
WRN_DEPTH = "depth [layers]"
LOG_TERM = "log leading term [nat]"
TERMS = {"ours": (BLUE, "data-dependent"), "spectral": (RED, "spectral")}
NORMALISATIONS = {"batch": (BLUE, "batch norm"), "none": (ORANGE, "no normalisation")}
ARMS = {False: (ORANGE, "without regulariser"), True: (BLUE, "with regulariser")}
SHORT = {
    "baseline": "baseline",
    "low-learning-rate": "small\nlearning rate",
    "no-augmentation": "no\naugmentation",
    "layer-norm": "layer norm",
    "no-normalisation": "no\nnormalisation",
}

# Printed in the paper: Table 1 (test error in %, one run each) and Figure 1 (numbers of training samples in ten bins of
# width 0.68 from 1.37 on, read off the plot with an error of 0.03).
TABLE_1 = {
    ("baseline", False): 4.43,
    ("low-learning-rate", False): 5.98,
    ("low-learning-rate", True): 5.46,
    ("no-augmentation", False): 10.44,
    ("no-augmentation", True): 8.25,
    ("layer-norm", False): 6.20,
    ("layer-norm", True): 5.57,
    ("no-normalisation", False): 6.65,
}
FIGURE_1_EDGES = 1.37 + 0.68 * np.arange(11)
FIGURE_1 = {"batch": [88, 10, 2, 0, 0, 0, 0, 0, 0, 0], "none": [69, 20, 4, 1, 4, 1, 0, 0, 0, 1]}


# --- fully connected networks ----------------------------------------------------------------------------------------


def leading(tables: Tables) -> Figure:
    """Leading terms against the number of weight matrices."""
    figure, grid = _grid(select(tables["leading"], stage="trained"), 3.8)
    for ax, title, cell in grid:
        for kind, style in (("weighted", "-"), ("unweighted", "--")):
            for term, (colour, words) in TERMS.items():
                column = f"log_{term}_{kind}"
                label = f"{words}, {kind}{_slope_words(cell, column)}"
                curve(ax, cell, "depth", column, colour=colour, style=style, marker="o", label=label)
        ax.set(xlabel=MATRICES, ylabel=LOG_TERM, title=title)
        _whole_numbers(ax)
        ax.legend(loc="upper left", fontsize=7.5)
        headroom(ax, 0.3)
    return figure


def ratio(tables: Tables) -> Figure:
    """Log-ratio of the leading terms against depth, and lines in depth and log depth through each term."""
    rows = tables["leading"].assign(ratio=lambda t: t.log_spectral_weighted - t.log_ours_weighted)
    trained = select(rows, stage="trained")
    widest = select(trained, width=trained.width.max())
    fits = list(widest.groupby("activation"))
    figure, axes = panels(min(1 + len(fits), 3), 4.6, 3.8, rows=math.ceil((1 + len(fits)) / 3))
    for colour, ((activation, width), cell) in zip(COLOURS, rows.groupby(["activation", "width"]), strict=False):
        label = f"{activation}, width {width}"
        after = select(cell, stage="trained")
        curve(axes[0], after, "depth", "ratio", colour=colour, marker="o", label=label + _slope_words(after, "ratio"))
        curve(axes[0], select(cell, stage="initial"), "depth", "ratio", colour=colour, style=":", label="_before")
    axes[0].set(xlabel=MATRICES, ylabel="log spectral / data-dependent [nat]", title="ratio, dotted: before training")
    _whole_numbers(axes[0])
    axes[0].legend(loc="upper left", fontsize=8)
    headroom(axes[0], 0.1 + 0.055 * len(axes[0].get_legend().get_texts()))
    for ax, (activation, cell) in zip(axes[1:], fits, strict=False):
        means = cell.groupby("depth")[["log_ours_weighted", "log_spectral_weighted"]].mean()
        for term, (colour, words) in TERMS.items():
            _two_lines(ax, means[f"log_{term}_weighted"], colour, words)
        ax.set(xlabel=MATRICES, ylabel=LOG_TERM, title=f"{activation}, width {cell.width.iloc[0]}, means")
        _whole_numbers(ax)
        ax.legend(loc="upper left", fontsize=7.5)
        headroom(ax, 0.42)
    drop(axes[1 + len(fits) :])
    return figure


def _two_lines(ax: Axes, means: pd.Series, colour: str, words: str) -> None:
    """Points and their least-squares lines in depth (dotted) and in log depth (dashed)."""
    means = means[np.isfinite(means)]
    depths, logs = means.index.to_numpy(float), means.to_numpy()
    ax.plot(depths, logs, "o", color=colour, markersize=4, label=words)
    if len(depths) < 3:
        return
    fine = np.linspace(depths.min(), depths.max(), 100)
    for change, style, name in ((lambda d: d, ":", "depth"), (np.log, "--", "log depth")):
        x = change(depths)
        line = logs.mean() + slope(x, logs) * (change(fine) - x.mean())
        label = f"line in {name}, $R^2$ = {r_squared(x, logs):.3f}"
        ax.plot(fine, line, style, color=colour, linewidth=1.2, label=label)


def theorem(tables: Tables) -> Figure:
    """The parts of Theorem 7.1 against depth, beside the simplified theorem and the spectral bound."""
    figure, grid = _grid(tables["theorem"], 3.6)
    lines = {
        "log_bound": ("black", "-", "Theorem 7.1"),
        "log_h1": (BLUE, "-", "(H1), leading"),
        "log_h2": (SKY, "--", "(H2)"),
        "log_h3": (PURPLE, "--", "(H3); ReLU: pre-activations"),
        "log_jac": (GREEN, "--", "Jacobian part"),
        "log_simplified": (GREY, ":", "Theorem 1.1, simplified"),
        "log_spectral": (RED, "-", "spectral"),
    }
    for ax, title, cell in grid:
        finite = cell[~np.isinf(cell[list(lines)]).any(axis=1)]
        for column, (colour, style, words) in lines.items():
            if len(finite):
                curve(ax, finite, "depth", column, colour=colour, style=style, marker="o", label=words)
        left_out = len(cell) - len(finite)
        note = f"\n{left_out} of {len(cell)} networks infinite, left out" if left_out else ""
        ax.set(xlabel=MATRICES, ylabel=r"log bound $\times \sqrt{n}$ [nat]", title=title + note)
        _whole_numbers(ax)
    legend_below(figure, max((ax for ax, _, _ in grid), key=lambda ax: len(ax.get_lines())), 4)
    return figure


def layers(tables: Tables) -> Figure:
    """Norms along the layers of the deepest networks."""
    rows = tables["layers"]
    rows = select(rows, depth=rows.depth.max(), width=rows.width.max())
    rows = _with_products(rows)
    figure, axes = panels(3, 4.4, 3.6)
    columns = {
        "log_jacobian": "Jacobian norm, layer to output",
        "log_hidden": "norm of the layer's input",
        "excess": "product of layer norms over both",
    }
    for colour, (activation, cell) in zip(COLOURS, rows.groupby("activation"), strict=False):
        for ax, column in zip(axes, columns, strict=True):
            for stage, style in (("trained", "-"), ("initial", ":")):
                label = f"{activation}{', before training' * (stage == 'initial')}"
                curve(ax, select(cell, stage=stage), "layer", column, colour=colour, style=style, label=label)
    for ax, label in zip(axes, columns.values(), strict=True):
        ax.set(xlabel=f"layer i of {rows.depth.iloc[0]}, width {rows.width.iloc[0]}", ylabel="log [nat]", title=label)
        _whole_numbers(ax)
    legend_below(figure, axes[0], 4)
    return figure


def _with_products(rows: pd.DataFrame) -> pd.DataFrame:
    """Adds `excess`: input norm times product of layer norms over Jacobian norm times hidden norm, in logs.

    The Jacobian at pre-activation i leaves matrix i out, so the product does too.
    """
    networks = rows.groupby(["seed", "activation", "stage"])
    product = networks.log_spectral_norm.transform("sum") - rows.log_spectral_norm
    first = rows.log_hidden.where(rows.layer == 1)
    inputs = first.groupby([rows.seed, rows.activation, rows.stage]).transform("max")
    return rows.assign(excess=inputs + product - rows.log_jacobian - rows.log_hidden)


def passes(tables: Tables) -> Figure:
    """What all interlayer Jacobians of one sample cost."""
    rows = tables["theorem"]
    figure, (ax,) = panels(1, 5.2)
    for column, colour, words in (
        ("separate_passes", RED, "each pair by itself"),
        ("passes", BLUE, "one sweep for all pairs"),
    ):
        counts = rows.groupby("depth")[column].max()
        ax.plot(counts.index, counts, "o-", color=colour, markersize=4, label=words)
    ax.set_yscale("log")
    ax.set(xlabel=MATRICES, ylabel="layer steps per sample [steps]", title="interlayer Jacobians of Theorem 7.1")
    _whole_numbers(ax)
    ax.legend(loc="upper left")
    return figure


def augmented(tables: Tables) -> Figure:
    """Augmented minus plain loss by split, and the slopes of its parts."""
    rows = tables["augmented"]
    figure, axes = panels(3, 4.2)
    splits = [split for split in ("train", "test", "noise") if split in set(rows.split)]
    activations = sorted(rows.activation.unique())
    for ax, (column, label) in zip(
        axes, {"largest_gap": "largest gap", "smallest_gap": "smallest gap"}.items(), strict=False
    ):
        for index, (colour, activation) in enumerate(zip(COLOURS, activations, strict=False)):
            for place, split in enumerate(splits):
                values = select(rows, split=split, activation=activation)[column]
                shift = (index - (len(activations) - 1) / 2) * 0.25
                dots(ax, place + shift, values, colour=colour, label=None if place else activation, width=0.08)
        ax.axhline(0.0, color="black", linewidth=1)
        ax.set_xticks(range(len(splits)), splits)
        ax.set(ylabel="augmented minus plain loss", title=f"{label} of a network")
        ax.grid(axis="x", visible=False)
    slopes = {"indicator_slope": "soft indicator", "ramp_slope": "ramp loss"}
    for place, (column, _) in enumerate(slopes.items()):
        dots(axes[2], place, rows[column], colour=GREY)
    axes[2].axhline(1.0, color="black", linewidth=1)
    axes[2].set_xticks(range(len(slopes)), slopes.values())
    axes[2].set(ylabel="slope x threshold", title="largest slope", xlim=(-0.5, 1.5))
    low, high = axes[2].get_ylim()  # rounding alone would fill the axis
    axes[2].set_ylim(min(low, 0.99), max(high, 1.01))
    axes[2].grid(axis="x", visible=False)
    legend_below(figure, axes[0], len(activations))
    return figure


# --- WideResNets -----------------------------------------------------------------------------------------------------


def residual(tables: Tables) -> Figure:
    """Leading terms of WideResNets against depth."""
    rows = select(tables["residual"], stage="trained")
    figure, axes = panels(3, 4.4, 3.6)
    for ax, kind in zip(axes, ("unweighted", "weighted"), strict=False):
        for term, (colour, words) in TERMS.items():
            column = f"log_{term}_{kind}"
            label = words + _slope_words(rows, column, first=0, per=6)
            curve(ax, rows, "depth", column, colour=colour, marker="o", label=label)
        weights = "unrolled (2,1) norms" if kind == "weighted" else "without norms of the weights"
        ax.set(xlabel=WRN_DEPTH, ylabel=LOG_TERM, title=weights)
        headroom(ax, 0.2)
    before = select(tables["residual"], stage="initial")
    for colour, kind in ((GREEN, "unweighted"), (PURPLE, "weighted")):
        for cell, style, words in ((rows, "-", kind), (before, ":", f"{kind}, before training")):
            cell = cell.assign(ratio=cell[f"log_spectral_{kind}"] - cell[f"log_ours_{kind}"])
            label = words + _slope_words(cell, "ratio", first=0, per=6)
            curve(axes[2], cell, "depth", "ratio", colour=colour, style=style, marker="o", label=label)
    axes[2].set(xlabel=WRN_DEPTH, ylabel="log spectral / data-dependent [nat]", title="ratio")
    headroom(axes[2], 0.35)
    for ax in axes:
        ax.set_xticks(sorted(rows.depth.unique()))
        ax.legend(loc="upper left", fontsize=8)
    return figure


def tail(tables: Tables) -> Figure:
    """Figure 1: the largest values with and without batch norm, beside the paper's."""
    rows = tables["blocks"]
    figure, axes = panels(3, 4.2, 3.6)
    finite = rows.log_value[np.isfinite(rows.log_value)]
    edges = (
        np.linspace(finite.min(), max(finite.max(), finite.min() + 0.1), 21) if len(finite) else np.linspace(0, 1, 21)
    )
    for name, (colour, words) in NORMALISATIONS.items():
        cell = select(rows, normalisation=name)
        counts = np.histogram(cell.log_value[np.isfinite(cell.log_value)], edges)[0] / max(cell.seed.nunique(), 1)
        axes[0].stairs(counts, edges, fill=True, color=colour, alpha=0.55, label=words)
        axes[1].stairs(FIGURE_1[name], FIGURE_1_EDGES, fill=True, color=colour, alpha=0.55, label=words)
    networks = f"{rows.data_set.iloc[0]}, WRN-{rows.depth.iloc[0]}, mean of {rows.seed.nunique()} seeds"
    axes[0].set_title(f"here: {networks}", fontsize=9)
    axes[1].set_title("the paper's Figure 1: CIFAR-10, WRN-16", fontsize=9)
    for ax in axes[:2]:
        ax.set(xlabel="log value [nat]", ylabel=f"training samples, of {rows['rank'].max()} largest")
        ax.set_yscale("symlog", linthresh=1)
    axes[1].set_ylabel("training samples, of 100 largest")
    statistics = {"largest": lambda v: v.max(), "median": lambda v: v.median()}
    for place, function in enumerate(statistics.values()):
        for shift, (name, (colour, words)) in zip((-0.15, 0.15), NORMALISATIONS.items(), strict=True):
            values = select(rows, normalisation=name).groupby("seed").log_value.agg(function)
            dots(axes[2], place + shift, values, colour=colour, label=None if place else words, width=0.06)
    axes[2].set_xticks(range(len(statistics)), statistics)
    axes[2].set(ylabel="log value [nat]", xlim=(-0.5, 1.5))
    axes[2].set_title(_left_out(rows), fontsize=9)
    axes[2].grid(axis="x", visible=False)
    legend_below(figure, axes[0], 2)
    return figure


def _left_out(rows: pd.DataFrame) -> str:
    most = rows.groupby("normalisation").misclassified.max()
    counts = (int(most.get(name, 0)) for name in NORMALISATIONS)
    return "misclassified: at most {} with, {} without".format(*counts)


# --- training --------------------------------------------------------------------------------------------------------


def training(tables: Tables) -> Figure:
    """How the networks that are measured were trained."""
    fits, wide = tables["fits"], tables["residual_fits"]
    figure, axes = panels(2, 4.8, 3.4, rows=2)
    margins = select(tables["leading"], stage="trained")
    for colour, ((activation, width), cell) in zip(COLOURS, fits.groupby(["activation", "width"]), strict=False):
        label = f"{activation}, width {width}"
        curve(axes[0], cell, "depth", "epochs", colour=colour, marker="o", label=label)
        curve(axes[1], cell, "depth", "test_accuracy", colour=colour, marker="o", label=label)
        measured = select(margins, activation=activation, width=width)
        curve(axes[2], measured, "depth", "margin", colour=colour, marker="o", label=label)
        curve(axes[2], measured, "depth", "margin_p50", colour=colour, style=":", label="_median")
    short, diverged = int((~fits.reached.astype(bool)).sum()), int((fits.diverged_at >= 0).sum())
    counts = f"{short} of {len(fits)} short of the margin, {diverged} diverged"
    axes[0].set(xlabel=MATRICES, ylabel="training [epochs]", title=counts)
    axes[1].set(xlabel=MATRICES, ylabel="test accuracy", title=f"fully connected, {fits.data_set.iloc[0]}")
    axes[2].set(xlabel=MATRICES, ylabel="training margin", title="smallest margin, dotted: median")
    for ax in axes[:3]:
        _whole_numbers(ax)
    _residual_errors(axes[3], wide)
    axes[3].legend(loc="upper right", fontsize=8)
    headroom(axes[3], 0.35)
    legend_below(figure, axes[0], 4)
    return figure


def _residual_errors(ax: Axes, fits: pd.DataFrame) -> None:
    """Errors of the sweep as curves, of the networks of Figure 1 as dots beside their depth."""
    sweep = select(fits, part="sweep")
    curve(ax, sweep, "depth", "train_error", colour=GREY, marker="o", label="training, sweep")
    curve(ax, sweep, "depth", "test_error", colour=BLUE, marker="o", label="test, sweep")
    for shift, (name, (colour, words)) in zip((0.6, 1.2), NORMALISATIONS.items(), strict=True):
        for depth, cell in select(fits, part="figure1", normalisation=name).groupby("depth"):
            dots(ax, depth + shift, cell.test_error, colour=colour, label=f"test, Figure 1, {words}", width=0.15)
    ax.set(xlabel=WRN_DEPTH, ylabel="error [%]", title=f"WideResNets, {fits.data_set.iloc[0]}")
    ax.set_xticks(sorted(fits.depth.unique()))


# --- the regulariser -------------------------------------------------------------------------------------------------


def errors(tables: Tables) -> Figure:
    """Table 1: test errors with and without the regulariser, and the paired differences."""
    shown = _experiments(tables)
    figure, axes = panels(2, 5.6, 3.8, rows=len(shown))
    for row, (table, _, words) in enumerate(shown):
        left, right = axes[2 * row], axes[2 * row + 1]
        cells = arms.trained(table)
        settings = list(dict.fromkeys(setting for setting, _ in cells))
        published = words == "WideResNets"
        for place, setting in enumerate(settings):
            for regularised, (colour, label) in ARMS.items():
                if (setting, regularised) not in cells:
                    continue
                at = place + (0.17 if regularised else -0.17)
                values = arms.error(table, setting, regularised=regularised)
                dots(left, at, values, colour=colour, label=once(left, label), width=0.08)
                if published and (setting, regularised) in TABLE_1:
                    number = TABLE_1[setting, regularised]
                    mark = {"marker": "_", "markersize": 14, "markeredgewidth": 2, "linestyle": ""}
                    left.plot([at], [number], color="black", label=once(left, "the paper, CIFAR-10"), **mark)
        both = [setting for setting in settings if {(setting, False), (setting, True)} <= set(cells)]
        for place, setting in enumerate(both):
            coefficient = arms.chosen_coefficient(table, setting)
            dots(right, place, arms.gain(table, setting), colour=GREEN, label=once(right, "last epoch"), width=0.06)
            best = arms.gain(table, setting, "best_test_error")
            dots(right, place + 0.25, best, colour=GREY, label=once(right, "best epoch"), width=0.06)
            if published and (setting, True) in TABLE_1:
                number = TABLE_1[setting, False] - TABLE_1[setting, True]
                mark = {"marker": "_", "markersize": 16, "markeredgewidth": 2, "linestyle": ""}
                right.plot([place], [number], color="black", label=once(right, "the paper, CIFAR-10"), **mark)
            right.annotate(
                rf"$\lambda$ = {coefficient:g}",
                (place + 0.12, 0.99),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="top",
                fontsize=8,
            )
        title = f"{words}, {table.data_set.iloc[0]}, {table.seed.nunique()} seeds"
        left.set(ylabel="test error [%]", title=title)
        left.set_xticks(range(len(settings)), [SHORT[setting] for setting in settings], fontsize=8)
        left.set_xlim(-0.6, len(settings) - 0.4)
        right.axhline(0.0, color="black", linewidth=1)
        right.set(ylabel="error without minus with [points]", title="gain, paired by seed")
        right.set_xticks([place + 0.12 for place in range(len(both))], [SHORT[setting] for setting in both], fontsize=8)
        right.set_xlim(-0.4, max(len(both), 1) - 0.35)
        headroom(right, 0.15)
        for ax in (left, right) if both else (left,):
            ax.grid(axis="x", visible=False)
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=8)
        if not both:
            right.remove()
    return figure


def norms(tables: Tables) -> Figure:
    """Squared norms of the margin's gradient and shares above the threshold, layer by layer."""
    shown = [each for each in _experiments(tables) if each[1] is not None]
    settings = {words: list(dict.fromkeys(setting for setting, _ in arms.trained(rows))) for _, rows, words in shown}
    columns = max(map(len, settings.values()))
    figure, axes = panels(columns, 4.0, 3.0, rows=2 * len(shown))
    used = set()
    for block, (table, rows, words) in enumerate(shown):
        for column, setting in enumerate(settings[words]):
            top, bottom = (axes[(2 * block + row) * columns + column] for row in (0, 1))
            used |= {id(top), id(bottom)}
            for regularised, (colour, label) in ARMS.items():
                cell = arms.arm(rows, table, setting, regularised=regularised)
                if cell.empty:
                    continue
                curve(top, cell, "layer", "squared_norm", colour=colour, marker="o", label=label)
                curve(bottom, cell, "layer", "penalised_share", colour=colour, marker="o", label=label)
                if not regularised:
                    scaled = "share with the released code's scaling"
                    curve(bottom, cell, "layer", "released_share", colour=GREY, style=":", label=scaled)
            if any((line.get_ydata() > 0).any() for line in top.get_lines()):  # a log axis needs a positive number
                top.set_yscale("log")
            top.set(ylabel="squared gradient norm", title=f"{words}, {SHORT[setting]}".replace("\n", " "))
            bottom.set(xlabel="normalised layer", ylabel="share above threshold", ylim=(-0.03, 1.03))
            for ax in (top, bottom):
                _whole_numbers(ax)
    legend_below(figure, max(axes, key=lambda ax: len(ax.get_lines())), 3)
    drop([ax for ax in axes if id(ax) not in used])
    return figure


def _experiments(tables: Tables) -> list[tuple[pd.DataFrame, pd.DataFrame | None, str]]:
    """(errors, norms, words) of the experiments with the regulariser that this scale made."""
    found = []
    for prefix in ("paired", "table"):
        table = tables.get(f"{prefix}_errors")
        if table is not None and len(table):
            words = {"mlp": "MLPs", "wrn": "WideResNets"}[table.network.iloc[0]]
            found.append((table, tables.get(f"{prefix}_norms"), words))
    return found


# --- shared ----------------------------------------------------------------------------------------------------------


def _grid(rows: pd.DataFrame, height: float) -> tuple[Figure, list[tuple[Axes, str, pd.DataFrame]]]:
    """A figure with a row for each width and a column for each activation: axes, title and rows of each panel."""
    widths, activations = sorted(rows.width.unique()), sorted(rows.activation.unique())
    figure, axes = panels(len(activations), 4.6, height, rows=len(widths))
    cells = [(f"{a}, width {w}", select(rows, activation=a, width=w)) for w in widths for a in activations]
    return figure, [(ax, *cell) for ax, cell in zip(axes, cells, strict=True)]


def _slope_words(rows: pd.DataFrame, column: str, first: int = FIRST_DEPTH, per: int = 1) -> str:
    """Mean over seeds of the least-squares slope on depth, with its 95 % interval, for a legend."""
    rows = rows[rows.depth >= first]
    if rows.depth.nunique() < 2:
        return ""
    slopes = [
        per * slope(one.depth.to_numpy(), one[column].to_numpy())
        for _, one in rows.groupby("seed")
        if one.depth.nunique() > 1
    ]
    if not np.isfinite(slopes).all() or not slopes:
        return ""
    mean, half = mean_interval(np.array(slopes))
    interval = "" if math.isnan(half) else rf" $\pm$ {half:.2f}"
    return f": {mean:.2f}{interval} per {f'{per} layers' if per > 1 else 'layer'}"


def _whole_numbers(ax: Axes) -> None:
    """Ticks at whole numbers of layers."""
    ax.xaxis.get_major_locator().set_params(integer=True)


FIGURES: dict[str, Callable[[Tables], Figure]] = {
    function.__name__: function
    for function in (
        leading,
        residual,
        ratio,
        tail,
        theorem,
        layers,
        errors,
        norms,
        passes,
        augmented,
        training,
    )
}


def plot(tables: list[Path], out: Path) -> None:
    """Draw every figure.

    Args:
        tables: Parquet files of the measuring and training steps.
        out: folder for the SVG and PNG files and captions.json.

    """
    draw("lipschitz", Path(__file__).with_name("captions.yaml"), FIGURES, tables, out)


if __name__ == "__main__":
    run({"plot": plot})
