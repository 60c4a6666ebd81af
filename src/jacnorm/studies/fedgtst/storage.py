"""How much the study keeps on disk: the server's weights along the way, in float32."""

from __future__ import annotations

import math
from collections.abc import Collection

from jacnorm.studies.fedgtst.settings import DOMAINS, FederatedSettings, StudySettings

EXPERIMENTS = ("federated", "images", "domains")


def kept_bytes(settings: StudySettings, experiments: Collection[str] = EXPERIMENTS) -> int:
    """Bytes of the weights that training keeps, if no run ends early."""
    chosen: list[FederatedSettings] = [getattr(settings, name) for name in experiments]
    return 4 * sum(_numbers(each) for each in chosen if each.seeds)


def _numbers(settings: FederatedSettings) -> int:
    """Weights before the first round, after every `measure_every` rounds and after the last one, of all runs."""
    from jacnorm.data.catalogue import find
    from jacnorm.studies.fedgtst.cells import grid
    from jacnorm.studies.fedgtst.networks import build
    from jacnorm.studies.fedgtst.strategies import is_probabilistic

    source = find(settings.data_sets[0])
    shape, classes = (3, *source.shape[1:]), len(source.classes)
    moments = 1 + math.ceil(settings.rounds / settings.measure_every)
    targets = len(DOMAINS) if settings.pair == "domainnet" else 1
    runs = [run for stack in grid(settings, "source", "target") for run in stack]
    sizes = {
        (run.condition.network, run.method): build(
            run.condition.network, shape, classes, probabilistic=is_probabilistic(run.method)
        ).size
        for run in runs
    }
    return targets * moments * sum(sizes[run.condition.network, run.method] for run in runs)
