"""What is measured on rows of attention, wherever they come from: from logits and vectors to rows of the tables.

Letters: H heads, m rows (queries) of each, n keys. A row sees its first keys. Where rows see ever more keys, as those
of a causal model do, a shorter window is the head of a longer one, and its rows are the first rows: `ends` says how
many rows belong to a window of each length.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jacnorm.studies.attention import geometry
from jacnorm.studies.attention.geometry import Expectations, Measures, Points, Rows
from jacnorm.studies.attention.normalisers import NORMALISERS
from jacnorm.studies.attention.sensitivity import jacobian_rows, sensitivity_rows
from jacnorm.studies.attention.settings import RowSettings
from jacnorm.training.seeds import RunId

Row = dict[str, Any]
Found = Iterator[tuple[str, Row]]
"""Rows, each after the name of its table."""
SOFTMAX = "softmax"
_MEANS = {
    "distances": (
        *("mass", "distance", "bound", "loose_bound", "within_bound", "within_loose_bound"),
        *("expectation", "expectation_all"),
    ),
    "separability": ("ratio", "radius", "lower", "upper", "above_lower"),
}
"""Columns that are means over rows, by table; but for the first, names of `Measures`."""
_NOT_SAMPLED = dict.fromkeys(("expectation_sampled", "expectation_of_sampled", "sampling_error"), math.nan)


@dataclass(frozen=True)
class Heads:
    """Logits of some heads over the same keys."""

    labels: Sequence[Mapping[str, Any]]
    """What identifies each head, as columns of the tables."""
    logits: Tensor
    """(H, m, n) float64, before the temperature; any value where a row does not see the key."""
    visible: Tensor
    """Number of keys that each row sees, (m,), in ascending order."""
    temperature: float
    """The model's own T."""
    reach: Tensor
    """A bound of the absolute logits of each row, (H, m)."""

    @property
    def mask(self) -> Tensor:
        """Whether a row sees a key, (m, n)."""
        return torch.arange(self.logits.shape[-1], device=self.logits.device) < self.visible[:, None]

    def weights(self, normaliser: str) -> Tensor:
        """Weights at the model's own temperature, (H, m, n) float64."""
        return NORMALISERS[normaliser].weights(self.logits, self.mask, self.temperature)


# --- weights and gradients -------------------------------------------------------------------------------------------


def weight_rows(heads: Heads, normaliser: str, ends: Mapping[int, int]) -> Found:
    """The table `weights`: Corollary 1, whose bounds are those of softmax for every normaliser."""
    weights = heads.weights(normaliser)
    log_weights = weights.log()
    if normaliser == SOFTMAX:  # its weights may underflow, their logs do not
        log_weights = (heads.logits / heads.temperature).masked_fill(~heads.mask, -math.inf).log_softmax(-1)
    within, excess = geometry.corollary_1(log_weights, heads.visible, heads.reach / heads.temperature)
    zeros = ((weights == 0) & heads.mask).sum(-1)
    keys = heads.visible.cumsum(0).double()
    for length, end in ends.items():
        columns = {
            "within": within[:, :end].sum(-1) / keys[end - 1],
            "excess": excess[:, :end].amax(-1),
            "largest_weight": weights[:, :end].amax(-1).mean(-1),
            "zeros": zeros[:, :end].sum(-1) / keys[end - 1],
        }
        for label, found in _by_head(heads, columns):
            yield "weights", {**label, "normaliser": normaliser, "length": length, "rows": end, **found}


def gradient_rows(heads: Heads, normaliser: str, settings: RowSettings, run: RunId) -> Found:
    """The tables `sensitivity` and `jacobians` (Algorithm 5); in some rows only, unless it is softmax."""
    count = len(heads.visible)
    places = spaced(count if normaliser == SOFTMAX else min(settings.gradient_rows, count), count)
    places = places.to(heads.logits.device)
    function, temperatures = NORMALISERS[normaliser], settings.temperatures
    rows = (heads.labels, function, heads.logits[:, places], heads.mask[places], temperatures)
    for row in sensitivity_rows(*rows, settings.perturbations, run):
        yield "sensitivity", row
    for row in jacobian_rows(*rows):
        yield "jacobians", row


def spaced(count: int, of: int) -> Tensor:
    """Places of some rows, evenly spaced and the last among them, (count,)."""
    return torch.arange(1, count + 1) * of // count - 1


def all_selected(settings: RowSettings) -> set[int]:
    """Every N of the settings."""
    return {settings.distance_selected, *settings.selected}


# --- geometry --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Weights of some heads with the vectors of their keys."""

    heads: Heads
    normaliser: str
    space: str
    rows: Rows
    points: Points

    def part(self, places: Tensor, keys: int | None = None) -> Scene:
        """Some of the rows, (r,), with the first keys or all."""
        n = self.rows.weights.shape[-1] if keys is None else keys
        visible, counted = self.rows.visible[places], self.rows.counted[places].clamp(max=n)
        return replace(self, rows=Rows(self.rows.weights[:, places, :n], visible, counted), points=self.points.first(n))


def geometry_rows(
    scene: Scene, settings: RowSettings, selected: Collection[int], ends: Mapping[int, int], run: RunId | None
) -> Found:
    """The tables `distances` and `separability` (Algorithms 1, 2 and 4).

    run: whose random subsets are drawn for the Monte-Carlo expectation; None: none are.
    """
    ascending = sorted(selected)
    sampled_ends = {} if run is None else ends
    drawn = {length: _sampled(scene, settings, ascending, length, end, run) for length, end in sampled_ends.items()}
    for measures in geometry.measure(scene.rows, scene.points, ascending, settings.distance):
        start = int(measures.rows[0])
        kept = {length: end for length, end in ends.items() if end > start}
        for table, names in _MEANS.items():
            means = _prefix_means(measures, names, [end - start for end in kept.values()])
            if table == "distances":
                means["selected_mass"] = means.pop("mass")
            for place, (length, end) in enumerate(kept.items()):
                cell = {"length": length, "selected": measures.selected, "rows": end - start, "skipped_rows": start}
                if table == "distances":
                    samples = drawn.get(length, {}).get(measures.selected, {})
                columns = {name: value[:, place] for name, value in means.items()}
                for head, (label, found) in enumerate(_by_head(scene.heads, columns)):
                    own = {**label, "normaliser": scene.normaliser, "space": scene.space, **cell, **found}
                    if table == "distances":
                        own |= {name: values[head] for name, values in samples.items()} or _NOT_SAMPLED
                    yield table, own


Sampled = dict[int, dict[str, list[float]]]
"""By N, columns of the Monte-Carlo expectation, a number for each head."""


def _prefix_means(measures: Measures, names: Sequence[str], ends: Sequence[int]) -> dict[str, Tensor]:
    """Means over the first rows, (H, number of ends) each."""
    values = torch.stack([getattr(measures, name).double() for name in names]).cpu()  # (K, H, r)
    last = torch.tensor(ends)
    sums = values.cumsum(-1)  # not on a GPU, whose order of summation changes
    return dict(zip(names, sums[..., last - 1] / last, strict=True))


def _sampled(
    scene: Scene, settings: RowSettings, selected: Sequence[int], length: int, end: int, run: RunId
) -> dict[int, dict[str, list]]:
    """The Monte-Carlo expectation in some rows of a window."""
    count = min(settings.subset_rows, end)
    device = scene.rows.weights.device
    part = scene.part(spaced(count, end).to(device), length)
    shape = (len(scene.heads.labels), count, settings.subsets, length)
    keys = torch.rand(shape, generator=run.generator(f"subsets/{length}"), dtype=torch.float64)
    closed = Expectations(part.rows, part.points)
    found = {}
    for n, rows, values in geometry.sampled(part.rows, part.points, selected, keys.to(device), settings.distance):
        variance = values.var(-1).sum(-1) / settings.subsets  # (H,)
        found[n] = {
            "expectation_sampled": values.mean((1, 2)).tolist(),
            "expectation_of_sampled": closed.at(n, int(rows[0]))[0].mean(-1).tolist(),
            "sampling_error": (variance.sqrt() / len(rows)).tolist(),
        }
    return found


def collapse_rows(scene: Scene, settings: RowSettings) -> Found:
    """The table `collapse` (Corollary 2(ii))."""
    for fraction, distances in geometry.collapse(scene.rows, scene.points, settings.fractions, settings.distance):
        for label, found in _by_head(scene.heads, {"distance": distances.mean(-1)}):
            cell = {"normaliser": scene.normaliser, "fraction": fraction, "rows": distances.shape[-1]}
            yield "collapse", {**label, **cell, **found}


# --- rows ------------------------------------------------------------------------------------------------------------

_IDENTITY = ("seed", "data_set", "model", "layer", "head", "normaliser", "space")
_CELL = frozenset((*_IDENTITY, "length", "selected", "fraction", "temperature", "perturbation"))
_COUNTS = frozenset(("rows", "skipped_rows"))
_LARGEST = frozenset(("excess", "spectral_max", "spectral_largest_product"))
_ERRORS = frozenset(("sampling_error",))


def mean_of_windows(windows: Sequence[Sequence[tuple[str, Row]]]) -> Found:
    """One row for each cell of windows that were measured alike, so that all have equal numbers of rows of attention.

    Counts add up, of largest values the largest is kept, standard errors are those of a mean, and the rest is averaged.
    """
    if len(windows) == 1:
        yield from windows[0]
        return
    for found in zip(*windows, strict=True):
        tables, rows = zip(*found, strict=True)
        cells = [{name: row[name] for name in row if name in _CELL} for row in rows]
        assert all(each == cells[0] for each in cells)
        combined = {name: _combined(name, [row[name] for row in rows]) for name in rows[0] if name not in _CELL}
        yield tables[0], cells[0] | combined


def _combined(name: str, values: Sequence[float]) -> float:
    if name in _COUNTS:
        return sum(values)
    if name in _LARGEST:
        return max(values)
    return (math.hypot(*values) if name in _ERRORS else math.fsum(values)) / len(values)


def blank(row: Row) -> Row:
    """The row of a model that gave no numbers."""
    return {name: value if name in _CELL | _COUNTS else math.nan for name, value in row.items()}


def _by_head(heads: Heads, columns: Mapping[str, Tensor]) -> Iterator[tuple[Mapping[str, Any], dict[str, float]]]:
    """The label of each head and its values of columns (H,)."""
    values = torch.stack([column.double() for column in columns.values()], -1).tolist()
    for label, row in zip(heads.labels, values, strict=True):
        yield label, dict(zip(columns, row, strict=True))
