"""Plotting step of the `sharpening` study: tables in, one figure for each entry of ``captions.yaml`` out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from jacnorm.report.drawing import draw
from jacnorm.report.estimands import select
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
    logarithmic,
    mean_interval,
    once,
    panels,
)
from jacnorm.step import run
from jacnorm.studies.sharpening.conditions import keys_of, unconverged, with_keys
from jacnorm.studies.sharpening.sweeps import BASE, FEWEST_ARMS, accuracy_gap, gap_of
from jacnorm.studies.sharpening.trends import (
    before_threshold,
    last_half,
    last_third,
    rank_correlation,
    reaches_threshold,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Tables = Mapping[str, pd.DataFrame]
STEP = "update [steps]"
SHARPNESS, JACOBIAN = "sharpness", "jacobian_max"
JACOBIAN_AXIS = "largest Jacobian norm [1/input]"
EARLY = 1 / 3
"""Share of a run that counts as its early stretch, as in Figure 1."""
STYLES = ("-", "--", "-.", ":")
RUN = ["seed", "cost", "smoothing", "learning_rate"]
REGULARISERS = {
    "none": ("black", "none"),
    "weight decay": (BLUE, "weight decay"),
    "label smoothing": (ORANGE, "label smoothing"),
    "mixup": (GREEN, "mixup"),
    "sam": (RED, "SAM"),
    "jacobian penalty": (PURPLE, "Jacobian penalty"),
    "shifts": (SKY, "shifts"),
    "crops": (GREY, "crops"),
}
RULES = {
    "updates": ("fixed updates", "-", "o"),
    "epochs": ("equal epochs", ":", "s"),
    "matched": ("equal training loss", "--", "^"),
}


# --- full-batch descent ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Descent:
    """One data set and network under full-batch descent, finished runs only."""

    title: str
    trajectory: pd.DataFrame
    layers: pd.DataFrame | None = None

    def cells(self) -> Iterator[tuple[str, float, float, pd.DataFrame]]:
        """(cost, smoothing, step size, checkpoints) of the runs that differ in the seed alone."""
        yield from ((*key, rows) for key, rows in self.trajectory.groupby(["cost", "smoothing", "learning_rate"]))


def _descents(tables: Tables, layers: bool = False) -> list[_Descent]:
    """Each data set and network of the experiments that this scale made."""
    found = []
    for name, fits, kernels in (
        ("trajectory", "descent_fits", "layer_kernels"),
        ("image_trajectory", "image_fits", "image_layer_kernels"),
    ):
        trajectory = tables.get(name)
        if trajectory is None or trajectory.empty:
            continue
        for (data_set, network), rows in _finished(trajectory, tables[fits]).groupby(["data_set", "network"]):
            own = tables.get(kernels) if layers else None
            own = None if own is None else select(own, data_set=data_set, network=network)
            found.append(_Descent(f"{data_set}, {network}", rows, own))
    return found


def _finished(trajectory: pd.DataFrame, fits: pd.DataFrame) -> pd.DataFrame:
    """Checkpoints of the runs that did not diverge."""
    key = ["data_set", "network", *RUN]
    bad = keys_of(fits[fits.diverged_at >= 0], key)
    return with_keys(trajectory, key, bad, out=True)


def _cost_words(cost: str, smoothing: float) -> str:
    return "square cost" if cost == "square" else f"smoothing {smoothing:g}"


def _cost_colours(descents: Sequence[_Descent]) -> dict[tuple[str, float], str]:
    """One colour for each cost and smoothing, the same in every panel."""
    keys = sorted({(cost, smoothing) for each in descents for cost, smoothing, _, _ in each.cells()}, reverse=True)
    return dict(zip(keys, (GREY, BLUE, GREEN, ORANGE, RED, PURPLE, SKY), strict=False))


def early(tables: Tables) -> Figure:
    """Figure 1: sharpness and Jacobian norm relative to their start, early in training."""
    descents = _descents(tables)
    keys = list(_cost_colours(descents))
    figure, axes = panels(len(keys), 3.1, 3.0, rows=len(descents))
    for row, descent in enumerate(descents):
        for ax, (cost, smoothing) in zip(axes[row * len(keys) :], keys, strict=False):
            rows = select(descent.trajectory, cost=cost, smoothing=smoothing)
            if rows.empty:
                ax.remove()
                continue
            words = _early_panel(ax, rows[rows.step <= max(EARLY * rows.step.max(), rows[rows.step > 0].step.min())])
            ax.set(xlabel=STEP, ylabel="relative to step 0")
            ax.set_title(f"{descent.title}, {_cost_words(cost, smoothing)}\nstep size {words}", fontsize=9)
            logarithmic(ax, "y")
    legend_below(figure, axes[0], 2)
    return figure


def _early_panel(ax: Axes, rows: pd.DataFrame) -> str:
    """Draw both curves of each step size and return the step sizes with their line styles, in words."""
    first = rows.sort_values("step").groupby(["seed", "learning_rate"])[[SHARPNESS, JACOBIAN]].transform("first")
    rows = rows.assign(relative_sharpness=rows[SHARPNESS] / first[SHARPNESS], relative=rows[JACOBIAN] / first[JACOBIAN])
    rates = list(rows.groupby("learning_rate"))
    for style, (rate, cell) in zip(STYLES, rates, strict=False):
        hidden = "_" * (rate != rates[0][0])
        curve(ax, cell, "step", "relative_sharpness", colour=BLUE, style=style, label=f"{hidden}sharpness")
        curve(ax, cell, "step", "relative", colour=ORANGE, style=style, label=f"{hidden}largest Jacobian norm")
    names = {"-": "—", "--": "- -", "-.": "-·-", ":": "···"}
    words = [f"{rate:g} {names[style]}" for style, (rate, _) in zip(STYLES, rates, strict=False)]
    return ", ".join(words) if len(words) > 1 else f"{rates[0][0]:g}"


def whole(tables: Tables) -> Figure:
    """Figure 29: sharpness and Jacobian norms over whole runs."""
    descents = _descents(tables)
    colours = _cost_colours(descents)
    columns = {
        SHARPNESS: "sharpness",
        JACOBIAN: JACOBIAN_AXIS,
        "jacobian_mean": "mean Jacobian norm [1/input]",
        "train_loss": "training cost",
    }
    figure, axes = panels(len(columns), 3.8, 3.5, rows=len(descents))
    for row, descent in enumerate(descents):
        own = axes[row * len(columns) : (row + 1) * len(columns)]
        for (cost, smoothing, rate, cell), style in _styled(descent):
            label = f"{_cost_words(cost, smoothing)}, step size {rate:g}"
            for ax, column in zip(own, columns, strict=True):
                curve(ax, cell, "step", column, colour=colours[cost, smoothing], style=style, label=label)
        for ax, words in zip(own, columns.values(), strict=True):
            ax.set(xlabel=STEP, ylabel=words, title=descent.title)
            logarithmic(ax, "y")
    legend_below(figure, max(axes, key=lambda ax: len(ax.get_lines())), 4)
    return figure


def _styled(descent: _Descent) -> Iterator[tuple[tuple[str, float, float, pd.DataFrame], str]]:
    """Each cell with a line style that tells the step sizes of one cost apart."""
    seen: dict[tuple[str, float], int] = {}
    for cost, smoothing, rate, rows in descent.cells():
        place = seen.setdefault((cost, smoothing), 0)
        seen[cost, smoothing] += 1
        yield (cost, smoothing, rate, rows), STYLES[place % len(STYLES)]


def correlations(tables: Tables) -> Figure:
    """C1 and C5: rank correlations of sharpness and Jacobian norm, cost by cost."""
    descents = _descents(tables)
    figure, axes = panels(2, 5.2, 3.4, rows=len(descents))
    parts = (("before 2 over the step size is reached", before_threshold), ("last half of the run", last_half))
    for row, descent in enumerate(descents):
        keys = list(_cost_colours([descent]))
        for ax, (words, part) in zip(axes[2 * row :], parts, strict=False):
            for place, (cost, smoothing) in enumerate(keys):
                for reached, colour, label in ((False, BLUE, "stays below"), (True, ORANGE, "reaches it")):
                    values = _run_correlations(
                        select(descent.trajectory, cost=cost, smoothing=smoothing), part, reached
                    )
                    if values:
                        shift = 0.18 if reached else -0.18
                        dots(ax, place + shift, values, colour=colour, label=once(ax, label), width=0.1)
            ax.axhline(0, color="black", linewidth=1)
            ax.set_xticks(range(len(keys)), [_cost_words(*key).replace(" ", "\n") for key in keys], fontsize=8)
            ax.set(ylabel="rank correlation", title=f"{descent.title}, {words}", ylim=(-1.12, 1.12))
            ax.grid(axis="x", visible=False)
            ax.set_xlim(-0.5, len(keys) - 0.5)
    legend_below(figure, max(axes, key=lambda ax: len(ax.get_legend_handles_labels()[1])), 2)
    return figure


def _run_correlations(rows: pd.DataFrame, part: Callable[[pd.DataFrame], pd.DataFrame], reached: bool) -> list[float]:
    """Rank correlation of each run that does or does not reach the threshold; runs with under 3 points have none."""
    found = []
    for _, one in rows.groupby(["seed", "learning_rate"]):
        points = part(one)
        if reaches_threshold(one) == reached and len(points) > 2:
            found.append(rank_correlation(points[SHARPNESS], points[JACOBIAN]))
    return found


def chain(tables: Tables) -> Figure:
    """E2: from sharpness through the Gauss-Newton matrix and the kernel to the Jacobian."""
    descents = _descents(tables)
    colours = _cost_colours(descents)
    figure, axes = panels(4, 3.8, 3.2, rows=len(descents))
    for row, descent in enumerate(descents):
        ratio, cost_axis, kernel, against = axes[4 * row : 4 * row + 4]
        for (cost, smoothing, rate, cell), style in _styled(descent):
            colour = colours[cost, smoothing]
            label = f"{_cost_words(cost, smoothing)}, step size {rate:g}"
            cell = cell.assign(ratio=cell.gauss_newton / cell[SHARPNESS])
            curve(ratio, cell[cell.step > 0], "step", "ratio", colour=colour, style=style, label=label)
            curve(cost_axis, cell, "step", "cost_hessian_mean", colour=colour, style=style, label=label)
            if cell.kernel_top.notna().any():
                for ax, column in ((kernel, JACOBIAN), (against, SHARPNESS)):
                    means = cell.groupby("step")[["kernel_top", column]].mean()
                    means = means.where(np.isfinite(means) & (means > 0))
                    ax.plot(means[column], means.kernel_top, style, color=colour, marker=".", markersize=4)
        ratio.axhline(0.9, color="black", linewidth=1, linestyle=":")
        missed = unconverged(descent.trajectory, (SHARPNESS, "gauss_newton")).removeprefix("; ")
        ratio.set(xlabel=STEP, ylabel="Gauss-Newton over sharpness", title=f"{descent.title}\n{missed}".strip())
        cost_axis.set(xlabel=STEP, ylabel="mean norm of cost Hessians", title="factor 1: the cost's curvature")
        logarithmic(cost_axis, "y")
        for ax, words in ((kernel, JACOBIAN_AXIS), (against, "sharpness")):
            if ax.get_lines():
                ax.set(xlabel=words, ylabel="largest kernel eigenvalue", title="kernel, means over seeds")
                logarithmic(ax, "xy")
            else:
                ax.remove()
    legend_below(
        figure, max((ax for ax in axes if ax.figure), key=lambda ax: len(ax.get_legend_handles_labels()[1])), 4
    )
    return figure


def edge(tables: Tables) -> Figure:
    """E3: sharpness over its threshold, and its median at the end of the runs that reach it."""
    descents = _descents(tables)
    colours = _cost_colours(descents)
    figure, axes = panels(2, 5.0, 3.4, rows=len(descents))
    for row, descent in enumerate(descents):
        left, right = axes[2 * row : 2 * row + 2]
        names = []
        for (cost, smoothing, rate, cell), style in _styled(descent):
            words = f"{_cost_words(cost, smoothing)}, step size {rate:g}"
            cell = cell.assign(ratio=cell[SHARPNESS] / cell.threshold)
            colour = colours[cost, smoothing]
            curve(left, cell, "step", "ratio", colour=colour, style=style, label=words)
            tails = [np.median(last_third(one).ratio) for _, one in cell.groupby("seed") if reaches_threshold(one)]
            if tails:
                dots(right, len(names), tails, colour=colour)
                names.append(words.replace(", ", ",\n"))
        left.axhline(1, color="black", linewidth=1)
        left.set(xlabel=STEP, ylabel="sharpness over 2 / step size", title=descent.title)
        if names:
            right.axhspan(0.9, 1.15, color=GREY, alpha=0.15, linewidth=0)
            right.axhline(1, color="black", linewidth=1)
            right.set_xticks(range(len(names)), names, fontsize=8)
            right.set(ylabel="median over the last third", title="runs that reach it", xlim=(-0.6, len(names) - 0.4))
            right.grid(axis="x", visible=False)
        else:
            right.remove()
    legend_below(figure, axes[0], 4)
    return figure


def lower_bound(tables: Tables) -> Figure:
    """E9: lower bound, largest slope and Jacobian norm along runs with the square cost."""
    descents = [each for each in _descents(tables) if (each.trajectory.cost == "square").any()]
    figure, axes = panels(2, 4.8, 3.4, rows=max(len(descents), 1))
    lines = {
        "lower_bound": (BLUE, "lower bound"),
        "slope": (GREEN, "largest slope"),
        JACOBIAN: (ORANGE, "largest Jacobian norm"),
    }
    for row, descent in enumerate(descents):
        left, right = axes[2 * row : 2 * row + 2]
        square = select(descent.trajectory, cost="square")
        for style, (rate, cell) in zip(STYLES, square.groupby("learning_rate"), strict=False):
            for column, (colour, words) in lines.items():
                label = f"{words}, step size {rate:g}"
                curve(left, cell, "step", column, colour=colour, style=style, label=label)
            for place, (_, one) in enumerate(cell.sort_values("step").groupby("seed")):
                label = None if place else f"step size {rate:g}"
                right.plot(one.train_loss, one.lower_bound, style, color=BLUE, alpha=0.6, label=label, linewidth=1.2)
        left.axhline(0, color="black", linewidth=1)
        left.set(xlabel=STEP, ylabel="slope or norm [1/input]", title=f"{descent.title}, square cost")
        right.set(xlabel="training cost", ylabel="lower bound [1/input]", title="each line a run")
        logarithmic(right, "x")
        right.invert_xaxis()
        right.legend(loc="upper left", fontsize=8)
    legend_below(figure, axes[0], 3)
    return figure


def cost(tables: Tables) -> Figure:
    """What measuring costs beside training, counted in gradients."""
    parts = [tables[name] for name in ("measuring_cost", "image_measuring_cost") if name in tables]
    shown = [
        (data_set, network, rows)
        for table in parts
        for (data_set, network), rows in table.groupby(["data_set", "network"])
    ]
    figure, axes = panels(min(len(shown), 3), 5.0, 3.4, rows=math.ceil(len(shown) / 3))
    for ax, (data_set, network, rows) in zip(axes, shown, strict=False):
        names = []
        for place, ((cost_of, smoothing, rate), cell) in enumerate(
            rows.groupby(["cost", "smoothing", "learning_rate"])
        ):
            names.append(f"{_cost_words(cost_of, smoothing)},\nstep size {rate:g}")
            for shift, (column, colour) in zip(
                (-0.12, 0.12), (("curvature", BLUE), ("jacobians", ORANGE)), strict=True
            ):
                ratios = cell[column] / cell.training
                dots(ax, place + shift, ratios, colour=colour, label=once(ax, column), width=0.05)
        ratio = (rows.curvature + rows.jacobians).sum() / rows.training.sum()
        ax.axhline(1, color="black", linewidth=1)
        ax.set_xticks(range(len(names)), names, fontsize=7, rotation=45, ha="right", rotation_mode="anchor")
        ax.set(ylabel="gradients, over training's", title=f"{data_set}, {network}: {ratio:.2f} in all")
        ax.set_ylim(0, max(1.05, ax.get_ylim()[1]))
        ax.grid(axis="x", visible=False)
    drop(axes[len(shown) :])
    legend_below(figure, axes[0], 2)
    return figure


# --- regularisers ----------------------------------------------------------------------------------------------------


def weight_decay(tables: Tables) -> Figure:
    """E4: what weight decay does to gap, sharpness and Jacobian norm."""

    def chosen(rows: pd.DataFrame) -> pd.DataFrame:
        rows = _at_base_batch(rows)
        decays = rows[rows.regulariser == "weight decay"]
        plain = rows[(rows.regulariser == BASE) & rows.learning_rate.isin(decays.learning_rate)]
        return pd.concat([plain, decays])

    return _sweep_figure(tables, chosen, "strength", "weight decay", "learning_rate", "step size {:g}")


def learning_rate(tables: Tables) -> Figure:
    """E5: what the step size does, without regulariser."""

    def chosen(rows: pd.DataFrame) -> pd.DataFrame:
        return select(_at_base_batch(rows), regulariser=BASE)

    return _sweep_figure(tables, chosen, "learning_rate", "step size", "regulariser", "{}")


def batch(tables: Tables) -> Figure:
    """E6: what the batch size does, without regulariser, at equal updates, equal epochs and equal training loss."""

    def chosen(rows: pd.DataFrame) -> pd.DataFrame:
        plain = select(rows, regulariser=BASE)
        counts = plain.groupby("learning_rate").batch.nunique()
        return plain[plain.learning_rate.isin(counts.index[counts > 1])]

    return _sweep_figure(tables, chosen, "batch", "batch [samples]", "learning_rate", "step size {:g}", list(RULES))


def _sweep_figure(
    tables: Tables,
    chosen: Callable[[pd.DataFrame], pd.DataFrame],
    column: str,
    words: str,
    by: str,
    label: str,
    rules: Sequence[str] = ("updates", "matched"),
) -> Figure:
    """Gap, sharpness, Jacobian norm and training loss against one column; colours by another, styles by rule."""
    columns = {
        "gap": "test minus training loss [nat]",
        SHARPNESS: "sharpness",
        JACOBIAN: JACOBIAN_AXIS,
        "train_loss": "training cross-entropy [nat]",
    }
    shown = [(title, chosen(rows)) for title, rows in _ends(tables)]
    figure, axes = panels(len(columns), 3.7, 3.5, rows=len(shown))
    for row, (title, rows) in enumerate(shown):
        if rows.empty:
            _not_tried(axes[row * len(columns) : (row + 1) * len(columns)], title)
            continue
        rows = rows.assign(gap=gap_of)
        places = sorted(rows[column].unique())
        where = {value: place for place, value in enumerate(places)}
        rows = rows.assign(place=rows[column].map(where))
        for colour, (value, cell) in zip(COLOURS, rows.groupby(by), strict=False):
            for rule in rules:
                rule_words, style, marker = RULES[rule]
                some = select(cell, rule=rule)
                if some.empty:
                    continue
                name = f"{label.format(value)}, {rule_words}" if by != "regulariser" else rule_words
                for ax, each in zip(axes[row * len(columns) :], columns, strict=False):
                    curve(ax, some, "place", each, colour=colour, style=style, marker=marker, label=name)
        for ax, (each, axis) in zip(axes[row * len(columns) :], columns.items(), strict=False):
            ax.set_xticks(range(len(places)), [f"{value:g}" for value in places])
            ax.set(xlabel=words, ylabel=axis, title=title)
            if each != "gap":
                logarithmic(ax, "y")
    legend_below(figure, max(axes, key=lambda ax: len(ax.get_lines())), 3)
    return figure


def _ends(tables: Tables) -> list[tuple[str, pd.DataFrame]]:
    """Title and end points of each data set and network."""
    groups = tables["endpoints"].groupby(["data_set", "network"])
    return [(f"{data_set}, {network}", rows) for (data_set, network), rows in groups]


def _at_base_batch(rows: pd.DataFrame) -> pd.DataFrame:
    """The batch size at which regularisers are tried; without any, the one with most arms."""
    tried = rows[rows.regulariser != BASE]
    return select(rows, batch=(tried if len(tried) else rows).batch.mode().iloc[0])


def _tried(rows: pd.DataFrame) -> pd.DataFrame:
    """End points at the step sizes and the batch size at which regularisers are tried."""
    rows = _at_base_batch(rows)
    tried = rows[rows.regulariser != BASE]
    return rows[rows.learning_rate.isin(tried.learning_rate)] if len(tried) else rows


def gap(tables: Tables) -> Figure:
    """E7: the gap against Jacobian norm and sharpness, over regularisers."""
    shown = _by_rate(tables, ("updates", "matched"))
    figure, axes = panels(3, 4.2, 3.4, rows=len(shown))
    for row, (title, rows) in enumerate(shown):
        own = axes[3 * row : 3 * row + 3]
        for ax, x, y, words in (
            (own[0], JACOBIAN, gap_of, JACOBIAN_AXIS),
            (own[1], SHARPNESS, gap_of, "sharpness"),
            (own[2], JACOBIAN, accuracy_gap, JACOBIAN_AXIS),
        ):
            _scatter(ax, rows.assign(gap=y), x)
            ax.set_xlabel(words)
            ax.set_title(f"{title}\n{_correlation_words(rows.assign(gap=y), x)}", fontsize=9)
            logarithmic(ax, "x")
            ax.set_ylabel("training minus test accuracy" if y is accuracy_gap else "test minus training loss [nat]")
    _regulariser_legend(figure, axes)
    return figure


def _scatter(ax: Axes, rows: pd.DataFrame, x: str) -> None:
    """Mean over seeds of each arm with its 95 % interval; stronger arms are larger."""
    for regulariser, (colour, words) in REGULARISERS.items():
        arms = select(rows, regulariser=regulariser).groupby("strength")
        for place, (_, cell) in enumerate(arms):
            mean, half = mean_interval(cell.gap.to_numpy())
            ax.errorbar(
                [cell[x].mean()],
                [mean],
                yerr=[0.0 if math.isnan(half) else half],
                fmt="o",
                color=colour,
                label=None if place else words,
                markersize=4 + 1.5 * place,
                alpha=0.8,
                elinewidth=0.8,
            )


def _correlation_words(rows: pd.DataFrame, x: str) -> str:
    """Median and range over seeds of the rank correlation over arms."""
    found = [rank_correlation(one.gap, one[x]) for _, one in rows.groupby("seed") if len(one) >= FEWEST_ARMS]
    found = [value for value in found if not math.isnan(value)]
    if not found:
        return f"fewer than {FEWEST_ARMS} arms"
    return f"rank correlation {np.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def _by_rate(tables: Tables, rules: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """Title and end points of each data set, network, step size and rule at which regularisers are tried."""
    found = []
    for title, rows in _ends(tables):
        for rate, cell in _tried(rows).groupby("learning_rate"):
            for rule in rules:
                some = select(cell, rule=rule)
                if len(some):
                    found.append((f"{title}, step size {rate:g}, {RULES[rule][0]}", some))
    return found


def _regulariser_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Each regulariser once, whichever panels have it."""
    entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4)


def ratios(tables: Tables) -> Figure:
    """E7: sharpness and Jacobian norm of each regulariser over those without, in the same seed."""
    shown = _by_rate(tables, ("updates", "matched"))
    figure, axes = panels(2, 5.6, 3.4, rows=len(shown))
    for row, (title, rows) in enumerate(shown):
        plain = select(rows, regulariser=BASE).set_index("seed")
        arms = [(name, strength, cell) for (name, strength), cell in rows.groupby(["regulariser", "strength"])]
        arms = sorted((arm for arm in arms if arm[0] != BASE), key=lambda arm: list(REGULARISERS).index(arm[0]))
        for ax, (column, words) in zip(
            axes[2 * row :], ((SHARPNESS, "sharpness"), (JACOBIAN, "Jacobian norm")), strict=False
        ):
            for place, (name, _, cell) in enumerate(arms):
                own = cell.set_index("seed")[column]
                shared = own.index.intersection(plain.index)
                colour, label = REGULARISERS[name]
                if len(shared):
                    dots(ax, place, own[shared] / plain[column][shared], colour=colour, label=once(ax, label))
            ax.axhline(1, color="black", linewidth=1)
            ax.set_xticks(range(len(arms)), [f"{strength:g}" for _, strength, _ in arms], fontsize=8)
            ax.set(xlabel="strength", ylabel=f"{words}, over that without")
            ax.set_title(title, fontsize=9)
            ax.grid(axis="x", visible=False)
            logarithmic(ax, "y")
    _regulariser_legend(figure, axes)
    return figure


# --- sample size, width, the first layer -----------------------------------------------------------------------------


def sample_size(tables: Tables) -> Figure:
    """E8: test over training Jacobian norm, distance and variation against the number of samples."""
    rows = tables["sizes"].assign(ratio=lambda t: t.test_jacobian_max / t.jacobian_max)
    figure, axes = panels(3, 4.2, 3.4)
    columns = {
        "ratio": "Jacobian norm, test over training",
        "distance": "distance to nearest sample [input]",
        "variation": "variation of the Jacobian [1/input]",
    }
    for colour, (data_set, cell) in zip((BLUE, ORANGE), rows.groupby("data_set", sort=False), strict=False):
        words = "cube, dense grid" if data_set == "cube" else f"{data_set}, test samples"
        for ax, column in zip(axes, columns, strict=True):
            curve(ax, cell, "samples", column, colour=colour, marker="o", label=words)
    for ax, words in zip(axes, columns.values(), strict=True):
        ax.set(xlabel="training samples", ylabel=words, xscale="log")
        _plain_ticks(ax, sorted(rows.samples.unique()))
    axes[0].axhline(1, color="black", linewidth=1)
    for ax in axes[1:]:
        logarithmic(ax, "y")
    legend_below(figure, axes[0], 2)
    return figure


def width(tables: Tables) -> Figure:
    """E10: growth of sharpness and Jacobian norm during training, and the first layer's share of the kernel."""
    rows = tables["widths"].assign(
        sharpness=lambda t: t.sharpness_end / t.sharpness_start, jacobian=lambda t: t.jacobian_end / t.jacobian_start
    )
    figure, axes = panels(3, 4.2, 3.4)
    columns = {
        "sharpness": "sharpness, end over start",
        "jacobian": "Jacobian norm, end over start",
        "first_layer_share": "first layer's over whole kernel",
    }
    for colour, (parametrisation, cell) in zip((BLUE, ORANGE), rows.groupby("parametrisation"), strict=False):
        for ax, column in zip(axes, columns, strict=True):
            label = f"{parametrisation} parametrisation"
            curve(ax, cell, "width", column, colour=colour, marker="o", label=label)
    missed = int((~rows.sharpness_converged.astype(bool)).sum())
    for ax, words in zip(axes, columns.values(), strict=True):
        ax.set(xlabel="hidden width [units]", ylabel=words, xscale="log")
        _plain_ticks(ax, sorted(rows.width.unique()))
    axes[0].set_title(f"{missed} of {len(rows)} did not converge" if missed else "")
    for ax in axes[:2]:
        ax.axhline(1, color="black", linewidth=1)
    axes[2].set_ylim(bottom=0)
    legend_below(figure, axes[0], 2)
    return figure


def first_layer(tables: Tables) -> Figure:
    """C15: parts of the kernel by layer along training, and the errors of the identities."""
    descents = [each for each in _descents(tables, layers=True) if each.layers is not None and len(each.layers)]
    figure, axes = panels(1 + len(descents), 4.8, 3.4)
    for ax, descent in zip(axes, descents, strict=False):
        layers = _shares(descent)
        for colour, (layer, cell) in zip(COLOURS, layers.groupby("layer"), strict=False):
            for style, (of, rows) in zip(STYLES, cell.groupby("kind"), strict=False):
                curve(ax, rows, "step", "share", colour=colour, style=style, label=f"layer {layer}, {of}")
        ax.set(xlabel=STEP, ylabel="layer's part over whole kernel", title=f"{descent.title}, means over runs")
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=7, ncols=2)
        headroom(ax, 0.3)
    ax, errors = axes[len(descents)], tables["identities"]
    names = {
        "kernel_error": "sum of\nlayers",
        "logits_error": "logits\nunchanged",
        "later_layers_error": "later layers\nunchanged",
        "jacobian_error": "Jacobian\nmultiplied",
    }
    for place, column in enumerate(names):
        dots(ax, place, np.maximum(errors[column], 1e-18), colour=GREY)
    ax.axhline(1e-8, color="black", linewidth=1, linestyle=":")
    ax.set_yscale("log")
    ax.set_xticks(range(len(names)), names.values(), fontsize=8)
    ax.set(ylabel="relative error", title=f"identities, {len(errors)} networks, float64", xlim=(-0.5, len(names) - 0.5))
    ax.grid(axis="x", visible=False)
    return figure


def _shares(descent: _Descent) -> pd.DataFrame:
    """Each layer's largest kernel eigenvalue over the whole kernel's, one row for each seed, kind of cost and step."""
    key = [*RUN, "step"]
    rows = descent.layers.merge(descent.trajectory[[*key, "kernel_top"]], on=key, suffixes=("", "_whole"))
    rows = rows.assign(share=rows.kernel_top / rows.kernel_top_whole, kind=rows.cost)
    return rows.groupby(["seed", "kind", "step", "layer"], as_index=False).share.mean()


# --- training --------------------------------------------------------------------------------------------------------


def training(tables: Tables) -> Figure:
    """How the networks were trained, and what became of the runs."""
    figure, axes = panels(2, 5.6, 3.4, rows=2)
    _descent_accuracy(axes[0], tables)
    _matched_steps(axes[1], tables["sgd_fits"])
    _scaling_losses(axes[2], tables["scaling_fits"])
    _fates(axes[3], tables)
    return figure


def _descent_accuracy(ax: Axes, tables: Tables) -> None:
    for colour, descent in zip(COLOURS, _descents(tables), strict=False):
        best = descent.trajectory.groupby(["seed", "step"], as_index=False)[["train_accuracy", "test_accuracy"]].mean()
        curve(ax, best, "step", "train_accuracy", colour=colour, label=f"{descent.title}, training")
        curve(ax, best, "step", "test_accuracy", colour=colour, style="--", label=f"{descent.title}, test")
    ax.set(xlabel=STEP, ylabel="accuracy", title="full-batch descent, mean over costs and step sizes")
    ax.legend(fontsize=8, loc="lower right")


def _matched_steps(ax: Axes, fits: pd.DataFrame) -> None:
    """Updates of the matched rule, at the step and batch sizes at which regularisers are tried."""
    fits = _tried(select(fits, rule="matched"))
    rows = fits[fits.reached.astype(bool)]
    names = [name for name in REGULARISERS if name in set(fits.regulariser)]
    for place, name in enumerate(names):
        cell = select(rows, regulariser=name)
        if len(cell):
            dots(ax, place, cell.step, colour=REGULARISERS[name][0], width=0.2)
    ax.set_xticks(range(len(names)), [REGULARISERS[name][1].replace(" ", "\n") for name in names], fontsize=8)
    ax.set(
        ylabel="updates to the training loss [steps]",
        title=f"{len(fits) - len(rows)} of {len(fits)} runs never come down to it",
    )
    ax.set_xlim(-0.5, len(names) - 0.5)
    ax.grid(axis="x", visible=False)


def _scaling_losses(ax: Axes, fits: pd.DataFrame) -> None:
    columns = {"sizes": ("samples", BLUE), "cube": ("samples", ORANGE), "widths": ("width", GREEN)}
    finished = fits[fits.diverged_at < 0]
    for part, (column, colour) in columns.items():
        cell = select(finished, part=part)
        for style, (parametrisation, rows) in zip(STYLES, cell.groupby("parametrisation"), strict=False):
            words = f"{part}, {parametrisation}" if cell.parametrisation.nunique() > 1 else part
            curve(ax, rows, column, "train_loss", colour=colour, style=style, marker="o", label=words)
    ax.set(xlabel="training samples, or hidden width", ylabel="training cost", title="sweeps over size and width")
    logarithmic(ax, "xy")
    ax.legend(fontsize=8)


def _fates(ax: Axes, tables: Tables) -> None:
    """Bars: finished and diverged runs of each experiment."""
    names = {
        "descent_fits": "descent",
        "image_fits": "larger\nimages",
        "sgd_fits": "regularisers",
        "scaling_fits": "scaling",
    }
    shown = [(words, tables[name]) for name, words in names.items() if name in tables]
    for place, (_, fits) in enumerate(shown):
        if "rule" in fits:
            fits = fits.drop_duplicates(
                ["seed", "data_set", "network", "regulariser", "strength", "learning_rate", "batch"]
            )
        diverged = int((fits.diverged_at >= 0).sum())
        finished = ax.bar(place, len(fits) - diverged, color=BLUE, width=0.6, label="finished" if not place else None)
        bad = ax.bar(
            place,
            diverged,
            bottom=len(fits) - diverged,
            color=RED,
            width=0.6,
            label="diverged" if not place else None,
        )
        ax.bar_label(finished, [str(len(fits) - diverged)], label_type="center", color="white", fontsize=9)
        ax.bar_label(bad, [str(diverged) if diverged else ""], label_type="edge", fontsize=9)
    ax.set_xticks(range(len(shown)), [words for words, _ in shown], fontsize=9)
    ax.set(ylabel="trainings", title="what became of the runs")
    ax.grid(axis="x", visible=False)
    ax.legend(fontsize=8)
    headroom(ax, 0.12)


# --- shared ----------------------------------------------------------------------------------------------------------


def _not_tried(axes: Sequence[Axes], title: str) -> None:
    """One panel that says that there is nothing to draw, in place of several."""
    drop(axes[1:])
    axes[0].text(0.5, 0.5, "not tried at this scale", ha="center", transform=axes[0].transAxes)
    axes[0].set(title=title, xticks=[], yticks=[])


def _plain_ticks(ax: Axes, places: Sequence[float]) -> None:
    """Ticks of a log axis at the values that were measured."""
    ax.set_xticks(places, [f"{place:g}" for place in places])
    ax.minorticks_off()


FIGURES: dict[str, Callable[[Tables], Figure]] = {
    function.__name__: function
    for function in (
        early,
        whole,
        correlations,
        chain,
        edge,
        weight_decay,
        learning_rate,
        batch,
        gap,
        ratios,
        sample_size,
        lower_bound,
        width,
        first_layer,
        training,
        cost,
    )
}


def plot(tables: list[Path], out: Path) -> None:
    """Draw every figure.

    Args:
        tables: Parquet files of the measuring and training steps.
        out: folder for the SVG and PNG files and captions.json.

    """
    draw("sharpening", Path(__file__).with_name("captions.yaml"), FIGURES, tables, out)


if __name__ == "__main__":
    run({"plot": plot})
