"""Distances, separability and gradients of attention rows of language models, layer by layer.

A window of text goes through a model once. Each layer is measured as the pass reaches it and only rows of tables are
kept, so memory does not grow with windows, layers or seeds. Letters: H heads, L tokens, d width, d_h width of a head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jacnorm.data.read import read_text
from jacnorm.errors import UserError
from jacnorm.studies.attention import language
from jacnorm.studies.attention import tables as study_tables
from jacnorm.studies.attention.capture import Layer, capture, embeddings
from jacnorm.studies.attention.geometry import Points, Rows
from jacnorm.studies.attention.language import STUDY, Kept
from jacnorm.studies.attention.measure_rows import (
    SOFTMAX,
    Found,
    Heads,
    Row,
    Scene,
    all_selected,
    blank,
    collapse_rows,
    geometry_rows,
    gradient_rows,
    mean_of_windows,
    weight_rows,
)
from jacnorm.studies.attention.settings import Device, ProbingSettings
from jacnorm.training.job import job
from jacnorm.training.progress import Progress
from jacnorm.training.seeds import RunId

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNTRAINED = language.STAGES[1]
"""The control, whose rows show which observations need no training; other normalisers are left out there."""
CHUNK = 2**20
"""Weights of one layer that are measured at once. Random streams belong to such a chunk of heads."""


def probing(settings: ProbingSettings, tables: Path, data: list[Path], weights: Path, device: Device = "auto") -> None:
    """Attention rows of the language models that the training step kept, or of the given one."""
    with job(STUDY, "measure", "probing", settings, device) as this:
        rows: dict[str, list[Row]] = {name: [] for name in study_tables.MEASURED}
        texts = language.load(weights)
        _check_fit(weights, texts, data, settings)
        with Progress(len(texts) * len(settings.seeds), "probing", unit="runs") as progress:
            for kept in texts:
                for number, seed in enumerate(settings.seeds):
                    for stage, model in language.models(kept, settings, number, this.device):
                        labels = {"seed": seed, "data_set": kept.data_set, "model": stage}
                        for table, row in probed(model, kept.windows[number], settings, labels):
                            rows[table].append(row)
                    progress.update(progress.done + 1)
        for name, found in rows.items():
            study_tables.write(tables, name, settings, found, this.tracker)


def _check_fit(path: Path, texts: Sequence[Kept], data: Sequence[Path], settings: ProbingSettings) -> None:
    """Raise UserError if the weights belong to other texts, seeds or windows."""
    given = {text.name: text.digest for text in map(read_text, data)}
    if given != {kept.data_set: kept.digest for kept in texts}:
        raise UserError(
            f"{path} belongs to the texts {', '.join(kept.data_set for kept in texts)} as they were, but the data are "
            f"{', '.join(given)}; run the training step again"
        )
    shape = (len(settings.seeds), settings.windows, max(settings.lengths))
    for kept in texts:
        if kept.seeds != settings.seeds or tuple(kept.windows.shape) != shape:
            raise UserError(
                f"{path} holds {tuple(kept.windows.shape)} (seeds, windows, tokens) for seeds {kept.seeds}, but the "
                f"settings ask for {shape} and seeds {settings.seeds}; run the training step again"
            )


def probed(model: PreTrainedModel, windows: Tensor, settings: ProbingSettings, labels: Mapping[str, Any]) -> Found:
    """The rows of all tables for one model and its windows (W, L); NaN for a model whose training diverged."""
    finite = all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    model = model if finite else _filled(model)
    found = [_Window(model, window, number, settings, labels).rows() for number, window in enumerate(windows)]
    for table, row in mean_of_windows(found):
        yield table, row if finite else blank(row)


@torch.no_grad()
def _filled(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with any finite parameters: a pass is made all the same, for the rows without numbers."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


class _Window:
    """One window on its way through one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        token_ids: Tensor,
        number: int,
        settings: ProbingSettings,
        labels: Mapping[str, Any],
    ) -> None:
        self._model, self._token_ids, self._settings, self._labels = model, token_ids, settings, labels
        self._cell = f"probing {labels['data_set']} {labels['model']} window {number + 1}"
        self._normalisers = [SOFTMAX] if labels["model"] == UNTRAINED else settings.normalisers
        self._ends = {length: length for length in settings.lengths}
        self._shared: dict[str, Points] = {}
        self._rows: list[tuple[str, Row]] = []

    def rows(self) -> list[tuple[str, Row]]:
        """Everything that is measured in it."""
        table = embeddings(self._model)
        self._keep("wte", table[self._token_ids.to(table.device)])
        capture(self._model, self._token_ids, self._measure)
        return self._rows

    def _keep(self, space: str, vectors: Tensor) -> None:
        """Prepare vectors (L, d) that all heads of a layer share, if they are asked for."""
        if space in self._settings.spaces:
            self._shared[space] = Points.of(vectors[None], normalised=self._settings.normalised)

    def _measure(self, layer: Layer) -> None:
        if layer.index == 0:
            self._keep("embedding", layer.inputs[0])
        self._keep("layer_input", layer.inputs[0])
        count = len(layer.queries[0])
        size = max(1, CHUNK // len(self._token_ids) ** 2)
        for first in range(0, count, size):
            self._rows += self._chunk(layer, slice(first, min(first + size, count)))

    def _chunk(self, layer: Layer, chosen: slice) -> Found:
        settings = self._settings
        heads = self._heads(layer, chosen)
        run = RunId(STUDY, f"{self._cell} layer {layer.index + 1} heads from {chosen.start + 1}", self._labels["seed"])
        spaces = self._spaces(layer, chosen)
        length = len(self._token_ids)
        counted = heads.visible if settings.keys == "visible" else torch.full_like(heads.visible, length)
        last = torch.arange(math.ceil(3 * length / 4), length, device=counted.device)
        for normaliser in self._normalisers:
            yield from weight_rows(heads, normaliser, self._ends)
            yield from gradient_rows(heads, normaliser, settings, run)
            rows = Rows(heads.weights(normaliser), heads.visible, counted)
            for number, (space, points) in enumerate(spaces.items()):
                scene = Scene(heads, normaliser, space, rows, points)
                if number == 0:
                    yield from collapse_rows(scene.part(last), settings)
                if number == 0 or normaliser == SOFTMAX:
                    yield from self._geometry(scene, run if number == 0 and normaliser == SOFTMAX else None)

    def _heads(self, layer: Layer, chosen: slice) -> Heads:
        """Logits of some heads; those of the model are divided by its temperature, the raw products are not."""
        queries, keys = layer.queries[0, chosen].double(), layer.keys[0, chosen].double()  # (H, L, d_h)
        factor, temperature = (layer.scaling, 1.0) if self._settings.scaled else (1.0, 1 / layer.scaling)
        longest_key = torch.linalg.vector_norm(keys, dim=-1).cummax(-1).values  # of those that a row sees
        return Heads(
            labels=[{**self._labels, "layer": layer.index + 1, "head": head + 1} for head in _numbers(layer, chosen)],
            logits=queries @ keys.mT * factor,
            visible=torch.arange(1, queries.shape[1] + 1, device=queries.device),
            temperature=temperature,
            reach=torch.linalg.vector_norm(queries, dim=-1) * longest_key * factor,
        )

    def _spaces(self, layer: Layer, chosen: slice) -> dict[str, Points]:
        """The vectors of each space that is asked for."""
        own = {}
        if "value" in self._settings.spaces:
            own["value"] = Points.of(layer.values[0, chosen], normalised=self._settings.normalised)
        return {space: (self._shared | own)[space] for space in self._settings.spaces}

    def _geometry(self, scene: Scene, run: RunId | None) -> Found:
        """If a row counts all keys of its window, those of a shorter one count fewer: each length is measured alone."""
        selected = all_selected(self._settings)
        if self._settings.keys == "visible":
            yield from geometry_rows(scene, self._settings, selected, self._ends, run)
            return
        for length in self._settings.lengths:
            part = scene.part(torch.arange(length, device=scene.rows.visible.device), length)
            yield from geometry_rows(part, self._settings, selected, {length: length}, run)


def _numbers(layer: Layer, chosen: slice) -> range:
    return range(layer.queries.shape[1])[chosen]
