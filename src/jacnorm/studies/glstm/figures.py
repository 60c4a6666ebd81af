"""Plotting step of the `glstm` study: tables in, one figure for each entry of ``captions.yaml`` out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from jacnorm.report.drawing import draw
from jacnorm.report.estimands import select
from jacnorm.report.plotting import BLUE, COLOURS, GREY, curve, dots, drop, mean_interval, once, panels
from jacnorm.step import run
from jacnorm.studies.glstm.cells import (
    FITTED,
    NAMES,
    cells_of,
    histogram,
    mean_line,
    memory_line,
    rows_of,
    words,
)
from jacnorm.studies.glstm.networks import LAYERS, Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Tables = Mapping[str, pd.DataFrame]
NEIGHBOURS = "neighbours N"
RAMPS = {
    "glstm": ("#74add1", "#0072B2", "#023858"),
    "gcn": ("#E69F00", "#D55E00", "#7f2704"),
    "gatv2": ("#66c2a4", "#009E73", "#00441b"),
    "gatedgcn": ("#CC79A7", "#984ea3", "#4d004b"),
}
"""Colours of a network, from its smallest size to its largest."""
MARKERS = {"glstm": "o", "gcn": "s", "gatv2": "^", "gatedgcn": "D"}
SCORES = {"nar": "accuracy", "narr": "mean squared error"}
TASKS = {"nar": "recall (NAR)", "narr": "regression (NARR)"}
VARIANTS = {
    "none": "",
    "no-output-gate": "no output gate",
    "no-input-gate": "no input gate",
    "no-forget-gate": "no forget gate",
    "no-gates": "no gates",
    "1-hop": "1-hop",
}

# Printed in the paper: mean and sample standard deviation over four seeds. GPP: log10 of the mean squared error, by
# what the archive's users call a column; Peptides: average precision and absolute error, ablations at fixed width.
TABLE_GPP = {
    ("glstm", "none"): {"diameter": (-0.715, 0.030), "eccentricity": (-4.036, 0.311), "sssp": (-2.836, 0.178)},
    ("glstm", "no-output-gate"): {
        "diameter": (-0.696, 0.046),
        "eccentricity": (-3.710, 0.162),
        "sssp": (-2.771, 0.190),
    },
    ("glstm", "no-input-gate"): {"diameter": (-0.753, 0.011), "eccentricity": (-4.721, 0.363), "sssp": (-3.272, 0.164)},
    ("glstm", "no-forget-gate"): {
        "diameter": (-0.710, 0.026),
        "eccentricity": (-4.300, 0.207),
        "sssp": (-3.144, 0.070),
    },
    ("glstm", "no-gates"): {"diameter": (-0.746, 0.028), "eccentricity": (-4.139, 0.423), "sssp": (-3.157, 0.151)},
    ("glstm", "1-hop"): {"diameter": (0.042, 0.123), "eccentricity": (0.673, 0.021), "sssp": (-3.377, 0.142)},
    ("gcn", "none"): {"diameter": (0.742, 0.047), "eccentricity": (0.846, 0.003), "sssp": (0.950, 0.000)},
    ("adgn", "none"): {"diameter": (-0.546, 0.033), "eccentricity": (0.305, 0.118), "sssp": (-3.402, 0.137)},
}
TABLE_LRGB = {
    "none": {"func": (0.7250, 0.0023), "struct": (0.2527, 0.0015)},
    "no-output-gate": {"func": (0.7086, 0.0049), "struct": (0.2540, 0.0016)},
    "no-input-gate": {"func": (0.7186, 0.0029), "struct": (0.2524, 0.0027)},
    "no-forget-gate": {"func": (0.7236, 0.0063), "struct": (0.2522, 0.0011)},
    "no-gates": {"func": (0.7180, 0.0088), "struct": (0.2526, 0.0012)},
    "1-hop": {"func": (0.6030, 0.0096), "struct": (0.2638, 0.0010)},
}


# --- deep against wide -----------------------------------------------------------------------------------------------


def trees(tables: Tables) -> Figure:
    """Figure 2: norms at the leaves of deep and shallow graphs, and RingTransfer where it was trained."""
    rows, ring = tables["trees"], tables.get("ring_fits")
    figure, axes = panels(3 if ring is None else 4, 4.2, 3.8)
    for colour, (activation, cell) in zip(COLOURS, rows.groupby("activation"), strict=False):
        for ax, shape in zip(axes, ("deep", "shallow"), strict=False):
            one = select(cell, shape=shape)
            curve(ax, one, "leaves", "norm", colour=colour, marker="o", label=str(activation))
            means = one.groupby("leaves")[["norm", "norm_square"]].mean()
            deviation = np.sqrt(np.maximum(means.norm_square - means.norm**2, 0.0))
            ax.plot(means.index, means.norm + deviation, ":", color=colour, linewidth=1, label="_deviation")
        means = cell.pivot_table(index="leaves", columns="shape", values="norm", aggfunc="mean", dropna=False)
        axes[2].plot(means.index, means.deep / means.shallow, "o-", color=colour, markersize=4, label="_ratio")
    titles = ("complete binary tree, log2 n layers", "star, one layer", "deep over shallow, ratio of means")
    for ax, title in zip(axes, titles, strict=False):
        _powers(ax, rows.leaves)
        _log(ax)
        ax.set(xlabel="leaves n", ylabel="norm of Jacobian, mean over leaves", title=title)
    axes[1].sharey(axes[0])
    axes[0].autoscale_view()
    axes[2].set_ylabel("ratio")
    if ring is not None:
        _ring(axes[3], ring)
    _legend_below(figure, axes, 6)
    return figure


def _ring(ax: Axes, fits: pd.DataFrame) -> None:
    for model in ("glstm", "gcn"):
        rows, colour = select(fits, model=model), RAMPS[model][-1]
        if len(rows):
            sizes = rows.parameters
            label = f"{NAMES[model]}, {sizes.min()} to {sizes.max()} parameters"
            curve(ax, rows, "layers", "test_score", colour=colour, marker=MARKERS[model], label=label)
    _powers(ax, fits.layers)
    ax.set(xlabel="layers, half the ring [layers]", ylabel="test accuracy", title="RingTransfer")


# --- recall ----------------------------------------------------------------------------------------------------------


def accuracy(tables: Tables) -> Figure:
    """Test accuracy (or error) and parameters against N."""
    shown = list(_tasks(tables, "fits"))
    figure, axes = panels(2, 5.2, 3.8, rows=len(shown))
    for row, (task, fits) in enumerate(shown):
        left, right = axes[2 * row : 2 * row + 2]
        for cell in _main(fits):
            rows = rows_of(fits, cell)
            _line(left, fits, cell, rows, "test_score")
            counts = rows.groupby("neighbours").parameters.max()
            right.plot(counts.index, counts, color=_colour(fits, cell), marker=MARKERS[cell.model], markersize=4)
        _references(left, task, fits)
        left.set(ylabel=f"test {SCORES[task]}", title=f"{TASKS[task]}, {fits.seed.nunique()} seeds")
        _log(right)
        right.set(ylabel="parameters", title="trainable parameters")
        for ax in (left, right):
            _neighbours(ax, fits)
    _legend_below(figure, axes, 4)
    return figure


def k_hop(tables: Tables) -> Figure:
    """Test accuracy of every network with and without K-hop, and of deeper GCNs."""
    fits = tables["nar_fits"]
    cells = [cell for cell in cells_of(fits) if cell.data == _data(fits)]
    deeper = sorted({cell.layers for cell in cells})
    figure, axes = panels(3 if len(deeper) > 1 else 2, 4.8, 3.8)
    for ax, hop in zip(axes, (True, False), strict=False):
        shown = [cell for cell in cells if cell.k_hop == hop and cell.layers == LAYERS]
        for cell in shown:
            _line(ax, fits, cell, rows_of(fits, cell), "test_score")
        _references(ax, "nar", fits)
        _neighbours(ax, fits)
        ax.set(ylabel="test accuracy", title="with K-hop" if hop else "without K-hop")
        if not shown:
            ax.annotate("none trained", (0.5, 0.5), xycoords="axes fraction", ha="center")
    if len(deeper) > 1:
        _depth(axes[2], fits, deeper)
    _legend_below(figure, axes, 4)
    return figure


def _depth(ax: Axes, fits: pd.DataFrame, deeper: list[int]) -> None:
    """Accuracy of GCNs of one width against layers, a line for each N."""
    rows = select(fits, model="gcn", k_hop=False, data=_data(fits))
    width = rows["size"][rows.layers > LAYERS].iloc[0]
    rows = select(rows, size=width)
    numbers = sorted(set(rows.neighbours[rows.layers > LAYERS]))
    for share, n in zip(np.linspace(0, 0.9, len(numbers)), numbers, strict=True):
        colour = to_hex(colormaps["viridis"](share))
        curve(ax, select(rows, neighbours=n), "layers", "test_score", colour=colour, marker="s", label=f"GCN, N = {n}")
        ax.axhline(histogram(int(n)), color=colour, linestyle="--", linewidth=1)
    ax.set_xticks(deeper)
    ax.set(xlabel="layers", ylabel="test accuracy", title=f"GCN d = {width}, dashed: histogram")


def norms(tables: Tables) -> Figure:
    """Norms of the centre's Jacobian by a neighbour, against N."""
    shown = list(_tasks(tables, "jacobians"))
    figure, axes = panels(4, 4.0, 3.4, rows=len(shown))
    for row, (task, table) in enumerate(shown):
        table = _mean_over_graphs(table)
        table["per_output"] = table["mean"] / table.neighbours
        parts = (("full", "mean", "all inputs"), ("full", "per_output", "all inputs, divided by N"))
        parts += (("value", "mean", "part by the value"), ("key", "mean", "part by the key"))
        for ax, (part, column, title) in zip(axes[4 * row :], parts, strict=False):
            for cell in _main(table):
                _line(ax, table, cell, rows_of(table, cell, part=part), column)
            _log(ax)
            _neighbours(ax, table)
            ax.set(ylabel="entrywise L1 norm", title=f"{task.upper()}, {title}")
    _legend_below(figure, axes, 6)
    return figure


def selectivity(tables: Tables) -> Figure:
    """Norm for the neighbour asked for against the others."""
    shown = list(_tasks(tables, "jacobians"))
    figure, axes = panels(4, 4.0, 3.4, rows=len(shown))
    for row, (task, table) in enumerate(shown):
        table = _mean_over_graphs(table)
        table["geometric"] = np.exp(table.log_ratio)
        table["variation"] = np.sqrt(table.variance) / table["mean"]
        ratios, whole, sides, spread = axes[4 * row : 4 * row + 4]
        for cell in _main(table):
            value, full = (rows_of(table, cell, part=part) for part in ("value", "full"))
            for ax, rows in ((ratios, value), (whole, full)):
                _line(ax, table, cell, rows, "geometric")
                _line(ax, table, cell, rows, "ratio", style=":", quiet=True)
            _line(sides, table, cell, value, "selected")
            _line(sides, table, cell, value, "background", style="--", quiet=True)
            _line(spread, table, cell, full, "variation")
        titles = ("ratio, part by the value", "ratio, all inputs", "by the value, dashed: others", "over neighbours")
        labels = ("selected over others", "selected over others", "entrywise L1 norm", "standard deviation over mean")
        for ax, title, ylabel in zip(axes[4 * row :], titles, labels, strict=False):
            _neighbours(ax, table)
            ax.set(ylabel=ylabel, title=f"{task.upper()}, {title}")
        spread.set_ylim(bottom=0)
        for ax in (ratios, whole, sides):
            _log(ax)
        for ax in (ratios, whole):
            ax.axhline(1.0, color="black", linewidth=1)
    _legend_below(figure, axes, 6)
    return figure


def mixing(tables: Tables) -> Figure:
    """The mixing Hessian against N."""
    shown = list(_tasks(tables, "hessians"))
    columns = {"largest_absolute": "largest absolute entry", "largest": "largest entry", "frobenius": "Frobenius norm"}
    figure, axes = panels(3, 4.4, 3.4, rows=len(shown))
    for row, (task, table) in enumerate(shown):
        graphs = table.groupby([*Cell._fields, "neighbours", "seed"], as_index=False)[list(columns)]
        table = graphs.agg(lambda v: np.mean(v.to_numpy()))
        for ax, (column, title) in zip(axes[3 * row :], columns.items(), strict=False):
            for cell in _main(table):
                _line(ax, table, cell, rows_of(table, cell), column)
            _log(ax)
            _neighbours(ax, table)
            ax.set(ylabel="second derivative", title=f"{task.upper()}, {title}")
    _legend_below(figure, axes, 6)
    return figure


def training(tables: Tables) -> Figure:
    """Learning curves, a panel for each N."""
    shown = [(task, table, n) for task, table in _tasks(tables, "curves") for n in sorted(set(table.neighbours))]
    columns = min(4, len(shown))
    figure, axes = panels(columns, 3.9, 3.2, rows=math.ceil(len(shown) / columns))
    for ax, (task, table, n) in zip(axes, shown, strict=False):
        for cell in [*_main(table), *_controls(table)]:
            rows = rows_of(table, cell, int(n))
            fresh = cell in _controls(table)
            colour = GREY if fresh else _colour(table, cell)
            if len(rows):
                curve(ax, rows, "step", "train_score", colour=colour, label=words(cell))
                curve(ax, rows, "step", "validation_score", colour=colour, style="--", label="_validation")
        level = histogram(int(n)) if task == "nar" else mean_line(int(n))
        label = "histogram line" if task == "nar" else "mean of the values"
        ax.axhline(level, color="black", linestyle=":", linewidth=1.2, label=label)
        ax.locator_params(axis="x", nbins=5)
        ax.set(xlabel="updates [steps]", ylabel=SCORES[task], title=f"{task.upper()}, N = {n}")
    drop(axes[len(shown) :])
    _legend_below(figure, axes[: len(shown)], 4)
    return figure


def memorisation(tables: Tables) -> Figure:
    """Scores on training and test graphs at the selected update, and what the budget left open."""
    shown = list(_tasks(tables, "fits"))
    figure, axes = panels(3, 4.6, 3.6, rows=len(shown))
    for row, (task, fits) in enumerate(shown):
        cells = {"glstm": [], "gcn": []}
        for cell in [*_main(fits), *_controls(fits)]:
            cells[cell.model].append(cell)
        for ax, model in zip(axes[3 * row :], cells, strict=False):
            for cell in cells[model]:
                rows, control = rows_of(fits, cell), cell in _controls(fits)
                _line(ax, fits, cell, rows, "train_score", colour=GREY if control else None)
                _line(ax, fits, cell, rows, "test_score", style="--", quiet=True, colour=GREY if control else None)
            _references(ax, task, fits, quiet=True)
            ax.set(ylabel=SCORES[task], title=f"{task.upper()}, {NAMES[model]}: training, dashed: test")
        share = axes[3 * row + 2]
        fits = fits.assign(share=fits.selected_step / fits.groupby("data").steps.transform("max"))
        for cell in _main(fits):
            _line(share, fits, cell, rows_of(fits, cell), "share")
        done = fits[fits.diverged_at < 0]
        fitted = f", {int((done.train_score >= FITTED).sum())} fitted" if task == "nar" else ""
        diverged = len(fits) - len(done)
        share.set(ylabel="selected update over longest run", ylim=(0, 1.05))
        share.set_title(f"{len(fits)} trainings{fitted}, {diverged} diverged", fontsize=10)
        for ax in axes[3 * row : 3 * row + 3]:
            _neighbours(ax, fits)
    _legend_below(figure, axes, 4)
    return figure


# --- graph properties ------------------------------------------------------------------------------------------------


def properties(tables: Tables) -> Figure:
    """Test errors on graph properties and Peptides, each network and ablation beside the others."""
    fits, molecules = tables["gpp_fits"], tables.get("peptides_fits")
    shown = list(fits.groupby(["source", "column", "task"], sort=True))
    tasks = [] if molecules is None else list(molecules.groupby("task"))
    count = len(shown) + len(tasks)
    columns = min(3, count)
    figure, axes = panels(columns, 5.0, 3.6, rows=math.ceil(count / columns))
    for ax, ((source, column, task), rows) in zip(axes, shown, strict=False):
        networks = _networks(rows)
        printed = [TABLE_GPP.get(each, {}).get(column) if source == "archive" else None for each in networks]
        values = [select(rows, model=model, ablation=ablation).test_error for model, ablation in networks]
        _variants(ax, networks, values, printed)
        constant = rows.constant_error.mean()
        ax.axhline(constant, color="black", linestyle="--", linewidth=1, label="a constant")
        title = f"toy, generated graphs: {task}" if source == "generated" else f"archive's {column}: {task}"
        ax.set(ylabel="test error [log10]", title=title)
    for ax, (task, rows) in zip(axes[len(shown) :], tasks, strict=False):
        variants = [variant for variant in VARIANTS if variant in set(rows.ablation)]
        values = [select(rows, ablation=variant).test_score for variant in variants]
        printed = [TABLE_LRGB[variant].get(str(task)) for variant in variants]
        _variants(ax, [("glstm", variant) for variant in variants], values, printed)
        score = "average precision" if task == "func" else "absolute error"
        ax.set(ylabel=f"test {score}", title=f"Peptides-{task}")
    drop(axes[count:])
    _legend_below(figure, axes[:count], 3)
    return figure


def _variants(
    ax: Axes,
    networks: list[tuple[str, str]],
    values: list[pd.Series],
    printed: list[tuple[float, float] | None],
) -> None:
    """Test scores of each network, with the paper's numbers where it prints them."""
    for place, (each, numbers) in enumerate(zip(values, printed, strict=True)):
        dots(ax, place, each, colour=BLUE, label=once(ax, "here, mean and 95 % interval"), width=0.12)
        if numbers is not None:
            label = once(ax, "the paper, mean and standard deviation")
            ax.errorbar([place + 0.25], numbers[:1], yerr=numbers[1:], fmt="_", color="black", capsize=3, label=label)
    names = [NAMES[model] if ablation == "none" else VARIANTS[ablation] for model, ablation in networks]
    ax.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=8)
    ax.set_xlim(-0.6, len(names) - 0.3)
    ax.grid(axis="x", visible=False)


def ablations(tables: Tables) -> Figure:
    """The same as a table, with parameters, and what the labels are like."""
    fits, graphs, molecules = tables["gpp_fits"], tables["gpp_graphs"], tables.get("peptides_fits")
    blocks = [_property_block(fits), _graph_block(graphs)]
    if molecules is not None:
        blocks.insert(1, _peptide_block(molecules))
    sizes = [0.9 + 0.24 * len(body) for _, _, body in blocks]
    width = max(8.0, 2.6 + 1.75 * max(len(header) for _, header, _ in blocks))
    figure = Figure(figsize=(width, sum(sizes)), layout="constrained")
    axes = figure.subplots(len(blocks), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for ax, (title, header, body) in zip(axes, blocks, strict=True):
        ax.axis("off")
        ax.set_title(title)
        drawn = ax.table(body, colLabels=header, loc="upper center", cellLoc="center", edges="horizontal")
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(8)
        drawn.auto_set_column_width(range(len(header)))
        drawn.scale(1.0, 1.25)
    return figure


Block = tuple[str, list[str], list[list[str]]]


def _property_block(fits: pd.DataFrame) -> Block:
    labels = list(fits.groupby(["source", "column", "task"], sort=True).groups)
    names = [
        f"toy: {task}" if source == "generated" else f"archive's {column} ({task})" for source, column, task in labels
    ]
    body = []
    for network in _networks(fits):
        rows = select(fits, model=network[0], ablation=network[1])
        cells = [select(rows, source=source, column=column) for source, column, _ in labels]
        body.append([_network_words(*network), _range(rows.parameters), *(_spread(each.test_error) for each in cells)])
    constants = [_spread(select(fits, source=s, column=c).groupby("seed").constant_error.mean()) for s, c, _ in labels]
    body.append(["a constant", "", *constants])
    title = "log10 of the mean squared error on test graphs, mean and sample standard deviation over seeds"
    return title, ["network", "parameters", *names], body


def _peptide_block(fits: pd.DataFrame) -> Block:
    tasks = list(dict.fromkeys(fits.task))
    body = []
    for variant in VARIANTS:
        rows = select(fits, ablation=variant)
        if len(rows):
            scores = [_spread(select(rows, task=task).test_score, 4) for task in tasks]
            body.append([_network_words("glstm", variant), _range(rows.parameters), _range(rows.width), *scores])
    names = {"func": "func, average precision", "struct": "struct, absolute error"}
    return "Peptides", ["network", "parameters", "width", *(names[task] for task in tasks)], body


def _graph_block(graphs: pd.DataFrame) -> Block:
    body = []
    for (source, task), rows in graphs.groupby(["source", "task"], sort=True):
        shares = [f"{rows.nodes.mean():.1f}", f"{rows.disconnected.mean():.3f}"]
        body.append([f"{source}: {task}", _range(rows.graphs), *shares, f"{rows.variance.mean():.2f}"])
    return "graphs and labels", ["label", "graphs", "mean nodes", "share disconnected", "variance of label"], body


def _networks(fits: pd.DataFrame) -> list[tuple[str, str]]:
    """(model, ablation), gLSTM and its ablations first."""
    found = set(fits[["model", "ablation"]].itertuples(index=False, name=None))
    return sorted(found, key=lambda each: (list(NAMES).index(each[0]), list(VARIANTS).index(each[1])))


def _network_words(model: str, ablation: str) -> str:
    return NAMES[model] + (f", {VARIANTS[ablation]}" if ablation != "none" else "")


def _spread(values: pd.Series, digits: int = 3) -> str:
    if values.empty:
        return ""
    deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean(skipna=False):.{digits}f}{deviation} ({len(values)})"


def _range(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low}" if low == high else f"{low} to {high}"


# --- shared ----------------------------------------------------------------------------------------------------------


def _tasks(tables: Tables, name: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """The recall tasks of this scale: their names and tables called `name`."""
    for task in TASKS:
        table = tables.get(f"{task}_{name}")
        if table is not None and len(table):
            yield task, table


def _data(table: pd.DataFrame) -> str:
    """Kind of training graphs of the main networks: fixed, unless all are fresh."""
    return "fixed" if (table.data == "fixed").any() else "fresh"


def _main(table: pd.DataFrame) -> list[Cell]:
    """The gLSTMs with K-hop and two-layer GCNs without: the networks of the paper's main figures."""
    data = _data(table)
    wanted = {("glstm", True), ("gcn", False)}
    return [
        cell
        for cell in cells_of(table)
        if (cell.model, cell.k_hop) in wanted and cell.layers == LAYERS and cell.data == data
    ]


def _controls(table: pd.DataFrame) -> list[Cell]:
    """Networks on fresh graphs beside those on fixed ones."""
    return [cell for cell in cells_of(table) if cell.data == "fresh" != _data(table)]


def _colour(table: pd.DataFrame, cell: Cell) -> str:
    """Colour of a network: hue by model, the darker the larger."""
    sizes = sorted({other.size for other in cells_of(table) if other.model == cell.model})
    ramp = RAMPS[cell.model]
    return ramp[1] if len(sizes) == 1 else ramp[min(sizes.index(cell.size), len(ramp) - 1)]


def _line(
    ax: Axes,
    table: pd.DataFrame,
    cell: Cell,
    rows: pd.DataFrame,
    column: str,
    *,
    style: str = "-",
    quiet: bool = False,
    colour: str | None = None,
) -> None:
    """One network's column against N, mean over seeds with its interval; `quiet` keeps it out of the legend."""
    if rows.empty:
        return
    label = f"_{words(cell)}" if quiet else words(cell)
    chosen = colour or _colour(table, cell)
    if rows.neighbours.nunique() == 1:  # a band of one point cannot be seen
        mean, half = mean_interval(rows[column].to_numpy())
        bar = [0.0 if np.isnan(half) else half]
        look = {"fmt": MARKERS[cell.model], "markersize": 4, "capsize": 3}
        ax.errorbar(rows.neighbours.iloc[:1], [mean], yerr=bar, color=chosen, label=label, **look)
        return
    curve(ax, rows, "neighbours", column, colour=chosen, style=style, marker=MARKERS[cell.model], label=label)


def _mean_over_graphs(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each run and part; a NaN of one graph is one of its mean."""
    keys = [*Cell._fields, "neighbours", "part", "seed"]
    columns = ["selected", "background", "mean", "variance", "log_ratio", "ratio"]
    return table.groupby(keys, as_index=False)[columns].agg(lambda v: np.mean(v.to_numpy()))


def _references(ax: Axes, task: str, fits: pd.DataFrame, *, quiet: bool = False) -> None:
    """What networks reach that bind no keys."""
    numbers = sorted({int(n) for n in fits.neighbours})
    if task == "nar":
        lines: dict[str, tuple[str, Iterable[float]]] = {
            "histogram line": ("--", [histogram(n) for n in numbers]),
            "chance, 1/N": (":", [1 / n for n in numbers]),
        }
    else:
        lines = {"mean of the values, 1 - 1/N": ("--", [mean_line(n) for n in numbers])}
        for cell in _main(fits):
            if cell.model == "glstm":
                label = f"linear memory, 1 - {cell.size}/N"
                lines[label] = (":", [memory_line(n, cell.size) for n in numbers])
    for label, (style, values) in lines.items():
        ax.plot(numbers, values, style, color="black", linewidth=1.2, label=f"_{label}" if quiet else label)


def _neighbours(ax: Axes, table: pd.DataFrame) -> None:
    _powers(ax, table.neighbours)
    ax.set_xlabel(NEIGHBOURS)


def _powers(ax: Axes, values: pd.Series) -> None:
    """A binary logarithmic axis with ticks at the values."""
    places = sorted(set(values))
    ax.set_xscale("log", base=2)
    ax.set_xticks(places, [str(place) for place in places], fontsize=8 if len(places) > 7 else None)
    ax.minorticks_off()


def _log(ax: Axes) -> None:
    """A logarithmic axis, which needs a positive number."""
    numbers = [np.asarray(line.get_ydata(), float) for line in ax.get_lines()]
    if any((each[np.isfinite(each)] > 0).any() for each in numbers):
        ax.set_yscale("log")


def _legend_below(figure: Figure, axes: Iterable[Axes], columns: int) -> None:
    """Each label of any panel once, under the figure."""
    found: dict[str, object] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)


FIGURES: dict[str, Callable[[Tables], Figure]] = {
    function.__name__: function
    for function in (
        accuracy,
        trees,
        norms,
        selectivity,
        mixing,
        k_hop,
        training,
        memorisation,
        properties,
        ablations,
    )
}


def plot(tables: list[Path], out: Path) -> None:
    """Draw every figure.

    Args:
        tables: Parquet files of the measuring and training steps.
        out: folder for the SVG and PNG files and captions.json.

    """
    draw("glstm", Path(__file__).with_name("captions.yaml"), FIGURES, tables, out)


if __name__ == "__main__":
    run({"plot": plot})
