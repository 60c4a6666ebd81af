"""Plotting step of the `worldmodel` study: tables in, one figure for each entry of ``captions.yaml`` out.

Agents that diverged have rows of NaN, or are counted as diverged in the fits; they are left out of what is drawn and
counted in figure `training`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from jacnorm.report.claims import claim_margin
from jacnorm.report.drawing import draw
from jacnorm.report.estimands import by_seed, paired, select
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
    once,
    panels,
)
from jacnorm.step import run
from jacnorm.studies.worldmodel.evidence import NOISES, TASKS, WEIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Tables = Mapping[str, pd.DataFrame]

PREFIXES = ("pendulum", "dreamer")
ARM = ["lambda", "include_prior", "error", "error_size", "batch", "length"]
"""Columns in which the agents of one task differ, besides the seed."""
OTHERS = (GREEN, PURPLE, SKY, RED, ORANGE)
"""Colours of the weights that claims are not about, ascending."""
STRENGTHS = {
    "gauss": "variance of the noise",
    "mask": "share of perturbed pixels",
    "rotation": "rotation [degrees]",
    "gravity": "gravity over that in training",
    "clean": "no perturbation",
}
KINDS = {"clean": "clean", "gauss": "noise", "mask": "mask", "rotation": "rotation", "gravity": "gravity"}
NORMS = {
    "f_h": "f by h",
    "f_z": "f by z",
    "p_h": "prior by h",
    "composed": "composed step",
    "f_h_spectral": "f by h, spectral norm",
    "relative": "f by h, relative to h",
}
CLAIMS = Path(__file__).with_name("claims.yaml")


@dataclass(frozen=True)
class _Task:
    """One task's tables, by the ends of their names, without diverged agents; and the sweep's common columns."""

    name: str
    tables: Tables
    base: Mapping[str, Any]

    @property
    def words(self) -> str:
        return TASKS[self.name]

    @property
    def weights(self) -> list[float]:
        """Weights of the sweep, ascending."""
        return sorted(set(self.rows("fits")["lambda"]))

    def rows(self, table: str, **changes: Any) -> pd.DataFrame:
        """Rows of the sweep's agents, but for `changes`."""
        return select(self.tables[table], **{**self.base, **changes})

    def colours(self) -> dict[float, str]:
        """Black-free colours of the weights: grey without penalty, blue for the weight of the claims."""
        others = [weight for weight in self.weights if weight not in (0.0, WEIGHT)]
        return {0.0: GREY, WEIGHT: BLUE} | dict(zip(others, OTHERS, strict=False))

    def drawn(self) -> list[tuple[float, str]]:
        """Weights with their colours."""
        colours = self.colours()
        return [(weight, colours[weight]) for weight in self.weights if weight in colours]


def _tasks(tables: Tables, name: str) -> list[_Task]:
    """The tasks that this scale has, each with its fits and the table called `name`."""
    found = []
    for prefix in PREFIXES:
        own = {each: tables.get(f"{prefix}_{each}") for each in ("fits", name)}
        made = {each: table for each, table in own.items() if table is not None}
        if len(made) < len(own):
            continue
        for task in dict.fromkeys(made["fits"].task):
            fits = select(made["fits"], task=task)
            sound = {each: _sound(select(table, task=task), fits) for each, table in made.items()}
            found.append(_Task(task, sound, _base(fits)))
    return found


def _sound(rows: pd.DataFrame, fits: pd.DataFrame) -> pd.DataFrame:
    """Rows of the agents that did not diverge."""
    bad = set(fits[fits.diverged_at >= 0][["seed", *ARM]].itertuples(index=False, name=None))
    if not bad:
        return rows
    keys = rows[["seed", *ARM]].itertuples(index=False, name=None)
    return rows[[key not in bad for key in keys]]


def _base(fits: pd.DataFrame) -> dict[str, Any]:
    """What the sweep's agents have in common; alternatives to it come one at a time, so most arms share its columns."""
    arms = fits[ARM].drop_duplicates()
    plain = arms[arms.include_prior] if arms.include_prior.any() else arms
    common = {name: plain[name].value_counts(sort=False).idxmax() for name in ("batch", "length")}
    return {"include_prior": bool(arms.include_prior.any()), "error": "none", "error_size": 0.0, **common}


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    figure, axes = panels(columns, width, height, rows=rows)
    return figure, [axes[row * columns : (row + 1) * columns] for row in range(rows)]


def _legend(figure: Figure, axes: Sequence[Sequence[Axes]], columns: int) -> None:
    """The entries of all panels, each once, below the figure."""
    entries: dict[str, Any] = {}
    for ax in (ax for row in axes for ax in row):
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns)


def _weight_words(weight: float) -> str:
    return f"lambda = {weight:g}" if weight else "no penalty"


def _say_none(ax: Axes, words: str) -> None:
    ax.annotate(words, (0.5, 0.5), xycoords="axes fraction", ha="center", color=GREY)


# --- expansion -------------------------------------------------------------------------------------------------------


def expansion(tables: Tables) -> Figure:
    """Both parts over their formulas, and against the factor of the matrix."""
    rows = tables["expansion"]
    figure, axes = panels(4, 4.0, 3.6)
    for ax, part, claim in zip(axes[:2], ("even", "odd"), ("W1", "W2"), strict=True):
        asked = claim_margin(CLAIMS, claim, "formula")[1]
        ax.axhspan(1 - asked, 1 + asked, color=GREY, alpha=0.15, linewidth=0)
        ax.axhline(1.0, color="black", linewidth=1)
        _ratios_to_formula(ax, select(rows, family="random"), part)
        logarithmic(ax, "x")
        ax.set(xlabel="size of the error, epsilon", ylabel="simulated over exact", title=f"{part} part, random")
    middle = sorted(set(rows.epsilon))[rows.epsilon.nunique() // 2]
    for ax, part in zip(axes[2:], ("even", "odd"), strict=True):
        for family, colour in (("identity", BLUE), ("semidefinite", ORANGE)):
            own = select(rows, family=family, epsilon=middle)
            for _, one in own.sort_values("scale").groupby(["seed", "matrix"]):
                ax.plot(one.scale, one[part].abs(), "o", color=colour, markersize=3, label=once(ax, family))
                ax.plot(one.scale, one[f"{part}_exact"].abs(), "-", color=colour, linewidth=1, label="_exact")
        logarithmic(ax, "y")
        ax.set(xlabel="factor of the matrix, its Frobenius norm", ylabel="change of the loss")
        ax.set_title(f"{part} part, epsilon = {middle:g}, lines: exact")
    legend_below(figure, axes[2], 2)
    return figure


def _ratios_to_formula(ax: Axes, rows: pd.DataFrame, part: str) -> None:
    """A line for each matrix, beside one another, with two standard errors."""
    groups = list(rows.sort_values("epsilon").groupby(["seed", "matrix"]))
    for (_, one), shift in zip(groups, np.linspace(-0.04, 0.04, len(groups)), strict=True):
        exact = one[f"{part}_exact"]
        errors = (2 * one[f"{part}_error"] / exact.abs()).where(np.isfinite, 0.0)
        ax.errorbar(
            one.epsilon * 10**shift, one[part] / exact, yerr=errors, fmt="o-", color=BLUE, linewidth=0.8, markersize=3
        )


# --- Jacobians, rollouts, predictions --------------------------------------------------------------------------------


def jacobians(tables: Tables) -> Figure:
    """Norms against lambda."""
    tasks = _tasks(tables, "jacobians")
    figure, axes = _grid(2 * len(tasks), 3, 4.2, 3.0)
    for number, task in enumerate(tasks):
        places = {weight: place for place, weight in enumerate(task.weights)}
        arms = [("f and prior penalised", task.rows("jacobians"), BLUE, "o")]
        alone = pd.concat([select(task.rows("jacobians"), **{"lambda": 0.0}), _f_only(task)])
        if not _f_only(task).empty:
            arms.append(("f alone penalised", alone, ORANGE, "s"))
        if not task.base["include_prior"]:
            arms = [("f alone penalised", task.rows("jacobians"), ORANGE, "s")]
        every = sorted({*places, *alone["lambda"]})
        for ax, (column, words) in zip([*axes[2 * number], *axes[2 * number + 1]], NORMS.items(), strict=True):
            for label, rows, colour, marker in arms:
                at = rows.assign(place=rows["lambda"].map(every.index))
                curve(ax, at, "place", column, colour=colour, label=label, marker=marker)
            ax.set_xticks(range(len(every)), [f"{weight:g}" for weight in every])
            ax.set_ylim(bottom=0)
            ax.set(xlabel="weight of the penalty, lambda", ylabel="norm")
            ax.set_title(f"{task.words}: {words}", fontsize=10)
    _legend(figure, axes, 2)
    return figure


def _f_only(task: _Task) -> pd.DataFrame:
    """Jacobians of the agents in which f alone is penalised, where the sweep penalises the prior too."""
    rows = task.rows("jacobians", include_prior=False)
    return rows if task.base["include_prior"] else rows.iloc[:0]


RESCALED = {"f_h": "f by h", "p_h": "prior\nby h", "composed": "composed\nstep", "h_norm": "norm\nof h"}


def rescaling(tables: Tables) -> Figure:
    """Norms with the penalty over those without, f and prior penalised against f alone."""
    tasks = _tasks(tables, "jacobians")
    figure, axes = _grid(1, len(tasks), 5.6, 3.8)
    for ax, task in zip(axes[0], tasks, strict=True):
        plain = task.rows("jacobians", **{"lambda": 0.0})
        both = "f and prior" if task.base["include_prior"] else "f alone"
        arms = [(both, weight, task.rows("jacobians", **{"lambda": weight})) for weight in task.weights if weight]
        alone = dict(list(_f_only(task).groupby("lambda")))
        arms += [("f alone", weight, rows) for weight, rows in alone.items()]
        shifts = np.linspace(-0.3, 0.3, len(arms)) if len(arms) > 1 else np.zeros(len(arms))
        colours = {(both, weight): colour for weight, colour in task.drawn() if weight}
        colours |= dict(zip((("f alone", weight) for weight in alone), (ORANGE, RED, SKY), strict=False))
        for (name, weight, rows), shift in zip(arms, shifts, strict=True):
            for place, column in enumerate(RESCALED):
                ratios = _ratio(rows, plain, column)
                label = once(ax, f"{name}, lambda = {weight:g}")
                colour = colours.get((name, weight), GREY)
                dots(ax, place + shift, ratios.to_numpy(), colour=colour, label=label, width=0.04)
        ax.axhline(1.0, color="black", linewidth=1)
        ax.set_xticks(range(len(RESCALED)), list(RESCALED.values()))
        ax.set_xlim(-0.5, len(RESCALED) - 0.5)
        ax.set_ylim(bottom=0)
        ax.set(ylabel="with penalty over without", title=task.words)
        ax.grid(axis="x", visible=False)
    _legend(figure, axes, 2 if len(tasks) == 1 else 4)
    return figure


def _ratio(rows: pd.DataFrame, plain: pd.DataFrame, column: str) -> pd.Series:
    """Of one number per seed, indexed by seed."""
    first, second = (by_seed(each, column).astype(float) for each in (rows, plain))
    shared = first.index.intersection(second.index)
    return first[shared] / second[shared]


def divergence(tables: Tables) -> Figure:
    """Distances of disturbed rollouts by horizon."""
    return _by_horizon(tables, "divergence", {"divergence": "distance over disturbance"})


def prediction(tables: Tables) -> Figure:
    """Open-loop errors by horizon."""
    columns = {"image_error": "squared error of observation", "reward_error": "squared error of reward"}
    return _by_horizon(tables, "prediction", columns)


def _by_horizon(tables: Tables, table: str, columns: Mapping[str, str]) -> Figure:
    """Each column against the horizon, and over that without penalty at the same seed."""
    tasks = _tasks(tables, table)
    figure, axes = _grid(len(tasks), 2 * len(columns), 4.2, 3.3)
    for row, task in zip(axes, tasks, strict=True):
        for (column, words), (plain, relative) in zip(
            columns.items(), zip(row[::2], row[1::2], strict=True), strict=True
        ):
            base = task.rows(table, **{"lambda": 0.0})
            for weight, colour in task.drawn():
                rows = task.rows(table, **{"lambda": weight})
                curve(plain, rows, "horizon", column, colour=colour, label=_weight_words(weight), marker="o")
                if weight:
                    both = rows.merge(base, on=["seed", "horizon"], suffixes=("", "_base"))
                    both = both.assign(ratio=both[column] / both[f"{column}_base"])
                    label = _weight_words(weight)
                    if not both.empty:
                        curve(relative, both, "horizon", "ratio", colour=colour, label=label, marker="o")
            relative.axhline(1.0, color="black", linewidth=1)
            plain.set_ylim(bottom=0)
            plain.set(ylabel=words, title=task.words)
            relative.set(ylabel=f"{words.split(' over ')[0]}, ratio", title="over that without penalty")
            for ax in (plain, relative):
                ax.set_xlabel("horizon [steps]")
    _legend(figure, axes, 5)
    return figure


# --- returns ---------------------------------------------------------------------------------------------------------


def _kinds(rows: pd.DataFrame) -> list[str]:
    """Perturbations, in the order of the claims; clean where there is no other."""
    return [kind for kind in (*NOISES, "gravity") if (rows.perturbation == kind).any()] or ["clean"]


def _with_clean(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Rows of one perturbation, the clean return at strength 0, or at factor 1 of gravity."""
    clean = rows[rows.perturbation == "clean"].assign(strength=1.0 if kind == "gravity" else 0.0)
    return clean if kind == "clean" else pd.concat([clean, rows[rows.perturbation == kind]])


def returns(tables: Tables) -> Figure:
    """Returns against the strength of each perturbation."""
    tasks = _tasks(tables, "returns")
    columns = max(len(_kinds(task.rows("returns"))) for task in tasks)
    figure, axes = _grid(len(tasks), columns, 4.0, 3.3)
    for row, task in zip(axes, tasks, strict=True):
        kinds = _kinds(task.rows("returns"))
        for ax, kind in zip(row, kinds, strict=False):
            for weight, colour in task.drawn():
                rows = _with_clean(task.rows("returns", **{"lambda": weight}), kind)
                curve(ax, rows, "strength", "return", colour=colour, label=_weight_words(weight), marker="o")
            random = _with_clean(task.rows("returns"), kind).drop_duplicates(["seed", "strength"])
            curve(ax, random, "strength", "random_return", colour="black", label="random policy", style=":")
            ax.set(xlabel=STRENGTHS[kind], ylabel="mean return", title=f"{task.words}: {KINDS[kind]}")
        drop(row[len(kinds) :])
    _legend(figure, axes, 6)
    return figure


def gains(tables: Tables) -> Figure:
    """Differences in return under each perturbation, within seeds, and what remains of them beside the clean one."""
    tasks = _tasks(tables, "returns")
    figure, axes = _grid(len(tasks), 2, 6.0, 3.6)
    for (plain, beside), task in zip(axes, tasks, strict=True):
        places = task.rows("returns")[["perturbation", "strength"]].drop_duplicates()
        order = sorted(places.itertuples(index=False, name=None), key=lambda each: (_order(each[0]), each[1]))
        weights = [(weight, colour) for weight, colour in task.drawn() if weight]
        shifts = np.linspace(-0.22, 0.22, len(weights)) if len(weights) > 1 else np.zeros(len(weights))
        for (weight, colour), shift in zip(weights, shifts, strict=True):
            label = _weight_words(weight)
            found = [_gain(task, weight, *condition) for condition in order]
            for place, gain in enumerate(found):
                dots(plain, place + shift, gain.to_numpy(float), colour=colour, label=once(plain, label))
                if place:
                    rest = paired(gain, found[0]).to_numpy(float)
                    dots(beside, place - 1 + shift, rest, colour=colour, label=once(beside, label))
        _condition_ticks(plain, order)
        _condition_ticks(beside, order[1:])
        plain.set(ylabel="return, with penalty minus without", title=task.words)
        beside.set(ylabel="the same, minus that of clean", title="beyond the difference in clean return")
        for ax in (plain, beside):
            if not ax.get_lines():
                _say_none(ax, "nothing to compare")
            ax.axhline(0.0, color="black", linewidth=1)
            ax.grid(axis="x", visible=False)
    _legend(figure, axes, 5)
    return figure


def _gain(task: _Task, weight: float, kind: str, strength: float) -> pd.Series:
    """Return of the agents of one weight minus that of those without penalty, by seed."""
    here = {"perturbation": kind, "strength": strength}
    rows = (select(task.rows("returns", **{"lambda": each}), **here) for each in (weight, 0.0))
    return paired(*(by_seed(each, "return") for each in rows))


def _order(kind: str) -> int:
    return ["clean", *NOISES, "gravity"].index(kind)


def _condition_ticks(ax: Axes, order: Sequence[tuple[str, float]]) -> None:
    names = [f"{KINDS[kind]}\n{strength:g}" if kind != "clean" else "clean" for kind, strength in order]
    ax.set_xticks(range(len(order)), names, fontsize=7)
    ax.set_xlim(-0.6, max(len(order), 1) - 0.4)


def errors(tables: Tables) -> Figure:
    """Returns of agents trained with latent errors."""
    tasks = _tasks(tables, "returns")
    figure, axes = _grid(len(tasks), 2, 5.6, 3.4)
    for row, task in zip(axes, tasks, strict=True):
        whole = task.tables["returns"]
        sizes = whole[["error", "error_size"]].drop_duplicates().itertuples(index=False, name=None)
        arms = sorted(sizes, key=lambda each: (["none", "zero-drift", "drift"].index(each[0]), each[1]))
        for ax, (words, seen) in zip(
            row, (("clean", ("clean",)), ("mean over perturbations", tuple(NOISES))), strict=True
        ):
            for weight, colour, shift in ((0.0, GREY, -0.15), (WEIGHT, BLUE, 0.15)):
                for place, (error, size) in enumerate(arms):
                    changes = {"lambda": weight, "error": error, "error_size": size}
                    found = task.rows("returns", **changes)
                    values = found[found.perturbation.isin(seen)].groupby("seed")["return"].agg(_mean)
                    dots(
                        ax, place + shift, values.to_numpy(float), colour=colour, label=once(ax, _weight_words(weight))
                    )
            names = ["no error" if error == "none" else f"{error}\n{size:g}" for error, size in arms]
            ax.set_xticks(range(len(arms)), names, fontsize=8)
            ax.set_xlim(-0.6, len(arms) - 0.4)
            ax.grid(axis="x", visible=False)
            ax.set(ylabel="mean return", title=f"{task.words}: {words}")
            if not ax.get_lines():
                _say_none(ax, "not perturbed at this scale")
    _legend(figure, axes, 2)
    return figure


def _mean(values: pd.Series) -> float:
    """NumPy's mean, which lets a NaN through."""
    return float(np.mean(values.to_numpy()))


def batches(tables: Tables) -> Figure:
    """Returns against the batch size."""
    tasks = _tasks(tables, "returns")
    columns = max(1 + len(_seen(task)) for task in tasks)
    figure, axes = _grid(len(tasks), columns, 3.8, 3.3)
    for row, task in zip(axes, tasks, strict=True):
        kinds = ["clean", *_seen(task)]
        sizes = sorted(set(task.tables["returns"].batch))
        for ax, kind in zip(row, kinds, strict=False):
            for weight, colour, shift in ((0.0, GREY, -0.1), (WEIGHT, BLUE, 0.1)):
                for place, size in enumerate(sizes):
                    rows = task.rows("returns", batch=size, perturbation=kind, **{"lambda": weight})
                    values = rows.groupby("seed")["return"].agg(_mean).to_numpy(float)
                    label = once(ax, _weight_words(weight))
                    dots(ax, place + shift, values, colour=colour, label=label, width=0.06)
            ax.set_xlim(-0.5, len(sizes) - 0.5)
            ax.set_xticks(range(len(sizes)), [str(size) for size in sizes])
            ax.set(xlabel="sequences per update", ylabel="mean return", title=f"{task.words}: {KINDS[kind]}")
        drop(row[len(kinds) :])
    _legend(figure, axes, 2)
    return figure


def _seen(task: _Task) -> list[str]:
    """Perturbations of what is observed."""
    return [kind for kind in _kinds(task.rows("returns")) if kind in NOISES]


# --- training and frames ---------------------------------------------------------------------------------------------


def training(tables: Tables) -> Figure:
    """Learning curves for each length of sequences."""
    tasks = _tasks(tables, "curves")
    figure, axes = _grid(len(tasks), 4, 4.0, 3.3)
    for row, task in zip(axes, tasks, strict=True):
        loss, kl, third, share = row
        for weight, length, style, colour in _lengths(task):
            rows = task.rows("curves", length=length, **{"lambda": weight})
            label = f"{_weight_words(weight)}, T = {length}"
            for ax, column in ((loss, "model_loss"), (kl, "kl")):
                curve(ax, rows, "update", column, colour=colour, label=label, style=style)
            played = rows[rows["return"].notna()]
            column, x, rows = ("penalty", "update", rows) if task.name == "pendulum" else ("return", "frames", played)
            if rows[column].notna().any():
                curve(third, rows, x, column, colour=colour, label=label, style=style)
        logarithmic(loss, "y")
        for ax, words in ((loss, "model loss, without penalty"), (kl, "divergence from prior [nat]")):
            ax.set(xlabel="updates", ylabel=words, title=task.words)
        if task.name == "pendulum":
            third.set(xlabel="updates", ylabel="penalty, without its weight", title="mean squared norm, estimated")
        else:
            third.set(xlabel="frames", ylabel="return in training", title="episodes that ended")
        if not third.get_lines():
            _say_none(third, "nothing to show")
        _shares(share, task, tables)
    _legend(figure, axes, 4)
    return figure


def _lengths(task: _Task) -> Iterator[tuple[float, int, str, str]]:
    """(lambda, length, line style, colour) of the sweep, then of longer and shorter sequences."""
    curves = select(task.tables["curves"], error="none", batch=task.base["batch"])
    curves = select(curves, include_prior=task.base["include_prior"])
    lengths = [task.base["length"], *sorted(set(curves.length) - {task.base["length"]})]
    for length, style in zip(lengths, ("-", "--", ":", "-."), strict=False):
        for weight, colour in task.drawn():
            if not select(curves, length=length, **{"lambda": weight}).empty:
                yield weight, length, style, colour


def _shares(ax: Axes, task: _Task, tables: Tables) -> None:
    """Weighted penalty over the loss without it, by weight, and how many agents diverged."""
    fits = task.rows("fits")
    penalised = [(weight, colour) for weight, colour in task.drawn() if weight]
    for place, (weight, colour) in enumerate(penalised):
        dots(ax, place, select(fits, **{"lambda": weight}).penalty_share.to_numpy(float), colour=colour)
    ax.set_xticks(range(len(penalised)), [f"{weight:g}" for weight, _ in penalised])
    ax.set_xlim(-0.6, max(len(penalised), 1) - 0.4)
    if not penalised:
        _say_none(ax, "no agent was penalised")
    elif ax.get_lines():
        ax.set_ylim(bottom=0)
    every = select(tables["pendulum_fits" if task.name == "pendulum" else "dreamer_fits"], task=task.name)
    ax.set(xlabel="weight of the penalty, lambda", ylabel="weighted penalty over loss")
    ax.set_title(f"{int((every.diverged_at >= 0).sum())} of {len(every)} agents diverged")


def frames(tables: Tables) -> Figure:
    """Strips of true and predicted frames."""
    rows = tables["pendulum_frames"]
    rows = rows[rows.seed == rows.seed.min()]
    base = _frame_base(rows)
    plain, penalised = (select(rows, **base, **{"lambda": weight}) for weight in (0.0, WEIGHT))
    strips = [("true", select(plain if len(plain) else rows, kind="true"))]
    for words, kind in (("from clean", "clean"), ("from perturbed", "perturbed")):
        for agent, own in (("no penalty", plain), ("penalty", penalised)):
            strips.append((f"{words},\n{agent}", select(own, kind=kind)))
    strips = [(words, strip) for words, strip in strips if len(strip)]
    steps = sorted(set(rows.step))
    figure, axes = _grid(len(strips), len(steps), 1.35, 1.35)
    for line, (words, strip) in zip(axes, strips, strict=True):
        for ax, step in zip(line, steps, strict=True):
            image = select(strip, step=step).drop_duplicates(["row", "column"])
            pixels = image.pivot(index="row", columns="column", values="intensity").to_numpy(float)
            ax.imshow(pixels, cmap="gray", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(visible=False)
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(words, fontsize=8)
    for ax, step in zip(axes[0], steps, strict=True):
        ax.set_title("last observed" if step == 0 else f"step {step}", fontsize=8)
    return figure


def _frame_base(rows: pd.DataFrame) -> dict[str, Any]:
    return {**_base(rows), "task": "pendulum"}


FIGURES: dict[str, Callable[[Tables], Figure]] = {
    function.__name__: function
    for function in (
        expansion,
        jacobians,
        rescaling,
        divergence,
        prediction,
        returns,
        gains,
        errors,
        batches,
        training,
        frames,
    )
}


def plot(tables: list[Path], out: Path) -> None:
    """Draw every figure.

    Args:
        tables: Parquet files of the measuring and training steps.
        out: folder for the SVG and PNG files and captions.json.

    """
    draw("worldmodel", Path(__file__).with_name("captions.yaml"), FIGURES, tables, out)


if __name__ == "__main__":
    run({"plot": plot})
