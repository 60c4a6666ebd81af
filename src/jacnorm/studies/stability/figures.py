"""Plotting step of the `stability` study: tables in, one figure for each entry of ``captions.yaml`` out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import binomtest

from jacnorm.report.drawing import draw
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
    legend_below,
    mean_interval,
    panels,
)
from jacnorm.step import run
from jacnorm.studies.stability import theory

Tables = Mapping[str, pd.DataFrame]
LOG_NORM = "log Jacobian norm [nat]"
DEPTH = "depth [layers]"


def variance(tables: Tables) -> Figure:
    """E1."""
    rows = _where(tables["depth"], activation="relu", method="dense")
    widths = sorted(rows.width.unique())
    figure, axes = panels(len(widths), 5.4)
    for ax, width in zip(axes, widths, strict=True):
        for colour, (sigma_w2, group) in zip(COLOURS, _where(rows, width=width).groupby("sigma_w2"), strict=False):
            curve(ax, group, "depth", "log_norm", colour=colour, label=rf"$\sigma_w^2$ = {sigma_w2:g}")
            depths = np.array([10, group.depth.max()])
            start = group[group.depth == 10].log_norm.mean()
            ax.plot(depths, start + (depths - 10) * theory.slope(sigma_w2), "--", color=colour, linewidth=1)
        ax.set(xlabel=DEPTH, ylabel=LOG_NORM, title=f"dense ReLU, width {width}")
        ax.legend()
    return figure


def critical(tables: Tables) -> Figure:
    """E2, against depth, with the finite-width law of a fixed vector's gain."""
    rows = _where(tables["depth"], activation="relu", method="dense", sigma_w2=2.0)
    figure, axes = panels(3, 4.4, 3.6)
    depths = np.arange(1, rows.depth.max() + 1)
    limit = np.array([theory.log_relu_limit(int(depth), "none") for depth in depths])
    axes[0].plot(depths, limit, color="black", linewidth=1.2, label="infinite width")
    axes[0].plot(depths, limit + math.log(1.5), ":", color=GREY, linewidth=1.2, label="1.5 x that (margin of C2)")
    for colour, (width, group) in zip(COLOURS, rows.groupby("width"), strict=False):
        law = [theory.finite_width_log_gain(int(depth), int(width)) for depth in depths]
        curve(axes[0], group, "depth", "log_norm", colour=colour, label=f"width {width}")
        curve(axes[1], group, "depth", "log_gain", colour=colour, label=f"width {width}")
        axes[1].plot(depths, [(math.log(2) + each.mean) / 2 for each in law], "--", color=colour, linewidth=1.2)
        spread = group.groupby("depth").log_gain.std()
        axes[2].plot(spread.index, spread, color=colour, marker="o", markersize=4, label=f"width {width}")
        axes[2].plot(depths, [math.sqrt(each.variance) / 2 for each in law], "--", color=colour, linewidth=1.2)
    axes[0].set(ylabel=LOG_NORM, title=r"dense ReLU, $\sigma_w^2$ = 2")
    axes[1].set(ylabel="mean log gain of a fixed vector [nat]", title=r"dashed: $\frac{1}{2}\log 2 - 5L/(4n)$")
    axes[2].set(ylabel="its standard deviation [nat]", title=r"dashed: $\sqrt{5L/n}\,/\,2$")
    for ax in axes:
        ax.set_xlabel(DEPTH)
        ax.legend()
    return figure


def limit(tables: Tables) -> Figure:
    """E2, against width."""
    rows = tables["limit"].assign(ratio=lambda table: np.exp(table.log_norm - table.log_limit))
    products = ["both ends", "one end", "no end", "linear", "rectangular"]
    figure, axes = panels(3, 4.6, 3.2, rows=2)
    widths = sorted(rows.width.unique())
    for ax, product in zip(axes, products, strict=False):
        depths = sorted(rows.depth.unique())
        for place, (colour, depth) in enumerate(zip(COLOURS, depths, strict=False)):
            for index, width in enumerate(widths):
                values = _where(rows, product=product, depth=depth, width=width).ratio
                label = f"{depth} factor{'s' if depth > 1 else ''}" if index == 0 else None
                shift = (place - (len(depths) - 1) / 2) * 0.75 / len(depths)
                dots(ax, index + shift, values, colour=colour, label=label, width=0.08)
        ax.axhline(1.0, color="black", linewidth=1.2)
        ax.set_xticks(range(len(widths)), [str(width) for width in widths])
        title = {"linear": "linear, no diagonals", "rectangular": "784 to 10, no end masked"}.get(product)
        ax.set(xlabel="width [units]", ylabel="norm over its limit", title=title or f"ReLU surrogate, {product} masked")
        ax.grid(axis="x", visible=False)
    legend_below(figure, axes[0], len(rows.depth.unique()))
    axes[-1].remove()
    return figure


def independence(tables: Tables) -> Figure:
    """E3."""
    rows = tables["independence"]
    widths = sorted(rows.width.unique())
    figure, axes = panels(len(widths), 6.0, 3.0)
    order = ["same layer", "next layer", "weight magnitude", "weight sign", "row sum (control)"]
    for ax, width in zip(axes, widths, strict=True):
        for place, pair in enumerate(reversed(order)):
            tests = _where(rows, width=width, pair=pair)
            rejected = binomtest(int((tests.p_value < 0.05).sum()), len(tests))
            low, high = rejected.proportion_ci(0.95)
            share = rejected.statistic
            colour = {"row sum (control)": RED, "weight sign": GREY}.get(pair, BLUE)
            ax.errorbar(share, place, xerr=[[share - low], [high - share]], fmt="o", color=colour, capsize=3)
        ax.axvline(0.05, color="black", linewidth=1, label="level of the test")
        ax.axvline(0.15, color=GREY, linestyle=":", label="margin of C5")
        ax.set_yticks(range(len(order)), list(reversed(order)))
        networks, tests = rows.networks.iloc[0], len(rows[rows.width == width]) // len(order)
        ax.set(xlabel="share of tests that reject", xlim=(-0.02, 1.05))
        ax.set_title(f"width {width}: {tests} tests of {networks} networks each")
        ax.legend(loc="center right")
    return figure


def surrogate(tables: Tables) -> Figure:
    """E4, law of the norm."""
    figure, axes = panels(3, 3.6, 3.2)
    for ax, method in zip(axes, ("dense", "random", "magnitude"), strict=True):
        for colour, diagonal in ((BLUE, "true"), (ORANGE, "surrogate")):
            values = np.sort(_where(tables["surrogate"], method=method, diagonal=diagonal).log_norm)
            ax.step(
                values,
                np.arange(1, len(values) + 1) / len(values),
                where="post",
                color=colour,
                label=f"{diagonal} ({len(values)})",
            )
        ax.set(xlabel=LOG_NORM, ylabel="share of networks", title=f"{method}{' masks' * (method != 'dense')}")
        ax.legend(title="diagonals", loc="upper left")
    return figure


def pruning(tables: Tables) -> Figure:
    """E4, against depth."""
    rows = _where(tables["depth"], activation="relu", sigma_w2=2.0)
    width = rows.width.max()
    rows = rows[rows.width == width]
    figure, axes = panels(2, 5.4, 3.8)
    styles = {
        "none": (":", "unscaled"),
        "inverse_sqrt_density": ("--", "one over root density"),
        "alpha_mag": ("-", "own closed form"),
    }
    for ax, method in zip(axes, ("random", "magnitude"), strict=True):
        curve(ax, rows[rows.method == "dense"], "depth", "log_norm", colour="black", label="dense")
        for colour, (sparsity, cell) in zip(COLOURS, rows[rows.method == method].groupby("sparsity"), strict=False):
            for scaling, group in cell.groupby("scaling"):
                style, words = styles[scaling]
                curve(ax, group, "depth", "log_norm", colour=colour, style=style, label=f"s = {sparsity:g}, {words}")
        ax.set(xlabel=DEPTH, ylabel=LOG_NORM, title=f"{method} masks, width {width}")
    legend_below(figure, axes[1], 3)
    return figure


def edge(tables: Tables) -> Figure:
    """E5."""
    figure, axes = panels(3, 4.2)
    matrices = tables["edge_matrices"].assign(half=lambda rows: rows.norm / 2)
    sweep = _where(matrices, sweep="degree-over-log")
    for colour, ((entries, size), group) in zip(COLOURS, sweep.groupby(["entries", "size"]), strict=False):
        curve(axes[0], group, "degree_over_log", "half", colour=colour, marker="o", label=f"{entries}, n = {size}")
    axes[0].set_xscale("log", base=2)
    axes[0].set(xlabel="expected degree / log n", ylabel="norm / 2", title="rescaled sparse matrices")
    fixed = _where(matrices, sweep="fixed-degree")
    for colour, (entries, group) in zip(COLOURS, fixed.groupby("entries"), strict=False):
        curve(axes[1], group, "size", "half", colour=colour, marker="o", label=entries)
    axes[1].set_xscale("log", base=2)
    axes[1].set(xlabel="size n [units]", ylabel="norm / 2", title=f"degree fixed at {fixed.degree.iloc[0]:g}")
    networks = tables["edge_networks"]
    curve(axes[2], networks, "degree", "log_norm", colour=GREEN, marker="o", label=f"width {networks.width.iloc[0]}")
    depth = int(networks.depth.iloc[0])
    axes[2].axhline(theory.log_relu_limit(depth, "none"), color="black", linewidth=1.2, label="dense, infinite width")
    axes[2].set_xscale("log", base=2)
    axes[2].set(xlabel="expected degree [entries per row]", ylabel=LOG_NORM, title=f"ReLU networks of depth {depth}")
    for ax in axes[:2]:
        ax.axhline(1.0, color="black", linewidth=1.2)
    for ax in axes:
        ax.legend()
    return figure


def scores(tables: Tables) -> Figure:
    """E6."""
    rows = tables["scores"]
    pruned = rows[rows.method != "dense"]
    cells = list(pruned.groupby(["depth", "sparsity"]))
    figure, axes = panels(min(len(cells), 2), 6.4, 3.8, rows=math.ceil(len(cells) / 2))
    words = {
        "none": "unscaled",
        "inverse_sqrt_density": "one over root density",
        "frobenius": "Frobenius",
        "activity": "activity-matched",
        "alpha_mag": "closed form",
    }
    methods = [m for m in ("random", "magnitude", "synflow", "snip", "grasp") if m in set(pruned.method)]
    names = {"synflow": "SynFlow", "snip": "SNIP", "grasp": "GraSP"}
    for ax, ((depth, sparsity), cell) in zip(axes, cells, strict=False):
        dense = rows[(rows.method == "dense") & (rows.depth == depth)].log_norm.to_numpy()
        mean, half = mean_interval(dense)
        ax.axhspan(mean - half, mean + half, color=GREY, alpha=0.3, label="dense", linewidth=0)
        ax.axhline(mean, color=GREY, linewidth=1)
        scalings = [s for s in words if s in set(cell.scaling)]
        for colour, (index, scaling) in zip(COLOURS, enumerate(scalings), strict=False):
            for place, method in enumerate(methods):
                values = _where(cell, method=method, scaling=scaling).log_norm
                label = words[scaling] if place == 0 else None
                dots(
                    ax, place + (index - (len(scalings) - 1) / 2) * 0.18, values, colour=colour, label=label, width=0.05
                )
        ax.set_xticks(range(len(methods)), [names.get(method, method) for method in methods])
        ax.set(ylabel=LOG_NORM, title=f"depth {depth}, sparsity {sparsity:g}")
        ax.grid(axis="x", visible=False)
    legend_below(figure, axes[0], 3)
    for ax in axes[len(cells) :]:
        ax.remove()
    return figure


def trainability(tables: Tables) -> Figure:
    """E7."""
    rows = tables["trainability"]
    arms = sorted(rows.groupby(["data_set", "method", "sparsity", "depth"]).groups)
    figure, axes = panels(2, 5.0, 3.4 if len(arms) <= 2 else 5.6)
    looks = {"none": (ORANGE, "unscaled"), "frobenius": (BLUE, "rescaled")}
    for place, arm in enumerate(arms):
        cell = _where(rows, **dict(zip(("data_set", "method", "sparsity", "depth"), arm, strict=True)))
        for shift, (scaling, (colour, words)) in zip((-0.15, 0.15), looks.items(), strict=True):
            tried = _where(cell, scaling=scaling)
            rate = tried.groupby("learning_rate").validation_accuracy.mean().idxmax()
            values = tried[tried.learning_rate == rate].test_accuracy
            dots(axes[0], place + shift, values, colour=colour, label=words if place == 0 else None, width=0.08)
    names = [f"{data}, {method}, s = {sparsity:g}, depth {depth}" for data, method, sparsity, depth in arms]
    axes[0].set_xticks(range(len(arms)), names, rotation=90 if len(arms) > 2 else 0, fontsize=8)
    axes[0].set(ylabel="test accuracy", ylim=(0, 1.02), title=f"width {rows.width.iloc[0]}, best learning rate")
    axes[0].set_xlim(-0.6, len(arms) - 0.4)
    axes[0].grid(axis="x", visible=False)
    axes[0].legend(loc="center right")
    both = rows.merge(tables["start"], on=["seed", "data_set", "width", "depth", "method", "sparsity", "scaling"])
    for scaling, (colour, words) in looks.items():
        part = _where(both, scaling=scaling)
        axes[1].plot(part.log_norm, part.test_accuracy, "o", color=colour, alpha=0.6, markersize=4, label=words)
    axes[1].set(
        xlabel="log Jacobian norm at initialisation [nat]", ylabel="test accuracy", ylim=(0, 1.02), title="every run"
    )
    axes[1].legend(loc="center")
    return figure


def correlated(tables: Tables) -> Figure:
    """E8."""
    rows = tables["correlated"]
    width = rows.width.max()
    rows = rows[rows.width == width]
    figure, axes = panels(2, 5.0, 3.8)
    for ax, correlation in zip(axes, ("equicorrelated", "row"), strict=True):
        for colour, diagonal in ((BLUE, "linear"), (ORANGE, "surrogate"), (PURPLE, "true")):
            cell = _where(rows, correlation=correlation, diagonal=diagonal)
            means = cell.groupby("exponent").log_norm.agg(lambda logs: np.logaddexp.reduce(logs) - math.log(len(logs)))
            dead = cell.groupby("exponent").log_norm.agg(lambda logs: np.isneginf(logs).mean())
            finite = means[np.isfinite(means.index)]
            ax.plot(finite.index, finite, "o-", color=colour, markersize=4, label=diagonal)
            ax.axhline(means[math.inf], color=colour, linestyle=":", linewidth=1)
            for exponent, share in dead[dead > 0].items():
                ax.annotate(
                    f"{share:.0%} dead",
                    (exponent, means[exponent]),
                    xytext=(-4, 8),
                    textcoords="offset points",
                    color=colour,
                    fontsize=8,
                )
        ax.set(xlabel="exponent a of the correlation width$^{-a}$", ylabel="log of the expected norm [nat]")
        ax.set_title(
            f"{correlation if correlation != 'row' else 'row-correlated'}, width {width}, depth {rows.depth.iloc[0]}"
        )
        ax.legend(title="diagonals")
    return figure


def drift(tables: Tables) -> Figure:
    """E9."""
    figure, axes = panels(3, 4.0)
    columns = {
        "log_norm": LOG_NORM,
        "hidden_norm": r"hidden $\Vert W \Vert / \sigma_w$",
        "row_correlation": "width x mean row correlation",
    }
    for ax, (column, label) in zip(axes, columns.items(), strict=True):
        for colour, ((data_set, depth), group) in zip(
            COLOURS, tables["drift"].groupby(["data_set", "depth"]), strict=False
        ):
            curve(ax, group, "epoch", column, colour=colour, marker="o", label=f"{data_set}, depth {depth}")
        ax.set(xlabel="epoch", ylabel=label)
        ax.legend()
    axes[0].set_title(f"dense ReLU, width {tables['drift'].width.iloc[0]}")
    return figure


def curves(tables: Tables) -> Figure:
    """E9, learning curves."""
    figure, axes = panels(2, 4.4)
    for ax, (column, label) in zip(
        axes, {"train_loss": "training loss [nat]", "test_accuracy": "test accuracy"}.items(), strict=True
    ):
        for colour, ((data_set, depth), group) in zip(
            COLOURS, tables["curves"].groupby(["data_set", "depth"]), strict=False
        ):
            curve(ax, group, "epoch", column, colour=colour, marker="o", label=f"{data_set}, depth {depth}")
        ax.set(xlabel="epoch", ylabel=label)
        ax.legend()
    axes[0].set_yscale("log")
    return figure


def tanh(tables: Tables) -> Figure:
    """E10."""
    rows = _where(tables["depth"], activation="tanh")
    width = rows.width.max()
    rows = rows[rows.width == width]
    figure, axes = panels(2, 5.0)
    for colour, (sigma_w2, group) in zip(COLOURS, rows[rows.method == "dense"].groupby("sigma_w2"), strict=False):
        curve(axes[0], group, "depth", "log_norm", colour=colour, label=rf"$\sigma_w^2$ = {sigma_w2:g}")
    curve(axes[1], _where(rows, method="dense", sigma_w2=1.0), "depth", "log_norm", colour="black", label="dense")
    for colour, (sparsity, cell) in zip(
        (GREEN, RED, SKY, PURPLE), rows[rows.method == "random"].groupby("sparsity"), strict=False
    ):
        for scaling, style, words in (("none", ":", "unscaled"), ("inverse_sqrt_density", "--", "rescaled")):
            curve(
                axes[1],
                _where(cell, scaling=scaling),
                "depth",
                "log_norm",
                colour=colour,
                style=style,
                label=f"s = {sparsity:g}, {words}",
            )
    axes[0].set_title(f"dense tanh, width {width}")
    axes[1].set_title(r"random masks, $\sigma_w^2$ = 1")
    for ax in axes:
        ax.set(xlabel=DEPTH, ylabel=LOG_NORM)
        ax.legend()
    return figure


def _where(rows: pd.DataFrame, **cell: object) -> pd.DataFrame:
    for column, value in cell.items():
        rows = rows[rows[column] == value]
    return rows


FIGURES: dict[str, Callable[[Tables], Figure]] = {
    function.__name__: function
    for function in (
        variance,
        critical,
        limit,
        independence,
        surrogate,
        pruning,
        edge,
        scores,
        trainability,
        correlated,
        drift,
        curves,
        tanh,
    )
}


def plot(tables: list[Path], out: Path) -> None:
    """Draw every figure.

    Args:
        tables: Parquet files of the measuring and training steps.
        out: folder for the SVG and PNG files and captions.json.

    """
    draw("stability", Path(__file__).with_name("captions.yaml"), FIGURES, tables, out)


if __name__ == "__main__":
    run({"plot": plot})
