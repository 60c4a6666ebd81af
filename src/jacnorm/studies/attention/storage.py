"""How much the study keeps on disk."""

from __future__ import annotations

from collections.abc import Collection

from jacnorm.studies.attention.settings import ProbingSettings, StudySettings


def kept_bytes(settings: StudySettings, experiments: Collection[str] = ("probing",)) -> int:
    """Bytes of the token windows and, unless a model is given, of the networks before and after training."""
    if "probing" not in experiments:
        return 0
    probing = settings.probing
    windows = probing.windows * max(probing.lengths)
    networks = 0 if probing.model is not None else 2 * parameters(probing)
    return 4 * len(probing.seeds) * len(probing.data_sets) * (windows + networks)


def parameters(settings: ProbingSettings) -> int:
    """Parameters of the small GPT-2: both embeddings, the first of them also the read-out, layers and last norm."""
    width = settings.width
    layer = 12 * width**2 + 13 * width
    return (settings.vocabulary + settings.context + 2) * width + settings.layers * layer
