"""How sensitive the root of a deep tree and of a star is to its leaves, before any training (Fig. 2)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch

from jacnorm.studies.glstm import tables as study_tables
from jacnorm.studies.glstm.recall import STUDY
from jacnorm.studies.glstm.settings import Device, TreesSettings
from jacnorm.studies.glstm.trees import ACTIVATIONS, Shape, Tree, draw_weights, leaf_norms
from jacnorm.training.job import Job, job
from jacnorm.training.seeds import generator


def trees(settings: TreesSettings, tables: Path, device: Device = "auto") -> None:
    """Norms of the root's Jacobian by the leaves of trees and stars of all sizes."""
    with job(STUDY, "measure", "trees", settings, device) as this:
        study_tables.write(tables, "trees", settings, _rows(settings, this), this.tracker)


def _rows(settings: TreesSettings, this: Job) -> Iterator[dict[str, Any]]:
    for activation in ACTIVATIONS:
        for shape in get_args(Shape):
            for exponent in settings.exponents:
                tree = Tree.of(shape, exponent)
                cell = f"trees {activation} {shape} leaves={tree.leaves} width={settings.width}"
                x, weights = this.put([torch.stack(each) for each in _draws(settings, tree, cell)])
                norms = leaf_norms(tree, weights, x, activation)  # (R, n)
                means = zip(settings.seeds, norms.mean(1).tolist(), norms.square().mean(1).tolist(), strict=True)
                for seed, norm, norm_square in means:
                    yield {
                        "seed": seed,
                        "activation": activation,
                        "shape": shape,
                        "leaves": tree.leaves,
                        "norm": norm,
                        "norm_square": norm_square,
                    }


def _draws(settings: TreesSettings, tree: Tree, cell: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Features (V, d) from N(0, 1), and weights (D, d, d), of each seed."""
    features = [
        torch.randn(tree.nodes, settings.width, generator=generator(STUDY, cell, seed, "features"), dtype=torch.float64)
        for seed in settings.seeds
    ]
    weights = [
        draw_weights(tree.depth, settings.width, generator(STUDY, cell, seed, "weights")) for seed in settings.seeds
    ]
    return features, weights
