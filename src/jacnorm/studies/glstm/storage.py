"""How much the study keeps on disk: the selected weights of every run, in float32."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from jacnorm.studies.glstm.settings import (
    PeptidesSettings,
    PropertySettings,
    RecallSettings,
    RingSettings,
    StudySettings,
)

EXPERIMENTS = ("nar", "narr", "gpp", "ring", "peptides")


def kept_bytes(settings: StudySettings, experiments: Collection[str] = EXPERIMENTS) -> int:
    """Bytes of the networks that training keeps; of Peptides, at most."""
    numbers = {
        "nar": lambda: _recall("nar", settings.nar),
        "narr": lambda: _recall("narr", settings.narr),
        "gpp": lambda: _properties(settings.gpp),
        "ring": lambda: _ring(settings.ring),
        "peptides": lambda: _peptides(settings.peptides),
    }
    seeds = {name: len(getattr(settings, name).seeds) for name in experiments}
    return 4 * sum(numbers[name]() * count for name, count in seeds.items() if count)


def _recall(task: str, settings: RecallSettings) -> int:
    """Parameters and running statistics of one seed."""
    from jacnorm.studies.glstm.networks import planned
    from jacnorm.studies.glstm.recall_models import Architecture, initial_statistics

    found = 0
    for cell, neighbours in planned(settings).items():
        for number in neighbours:
            architecture = Architecture(task, cell.model, cell.size, cell.k_hop, cell.layers, number)
            found += architecture.parameters
            found += sum(each.numel() for each in initial_statistics(architecture, 1).values())
    return found


def _properties(settings: PropertySettings) -> int:
    """Parameters of one seed."""
    from jacnorm.studies.glstm.property_models import network
    from jacnorm.studies.glstm.train_gpp import architecture

    found = 0
    for task in settings.tasks:
        sizes = architecture(settings, task)
        found += (1 + len(settings.ablations)) * network("glstm", sizes, ["none"]).parameter_count()
        found += sum(network(model, sizes, ["none"]).parameter_count() for model in settings.baselines)
    return found


def _ring(settings: RingSettings) -> int:
    """Parameters of one seed."""
    from jacnorm.studies.glstm.layers import parameter_count
    from jacnorm.studies.glstm.ring import network

    return sum(
        parameter_count(network(model, layers, settings.classes, settings.width, settings.memory))
        for layers, model in itertools.product(settings.layers, settings.models)
    )


def _peptides(settings: PeptidesSettings) -> int:
    """The largest number of parameters of one seed."""
    return len(settings.tasks) * (1 + len(settings.ablations)) * settings.parameters
