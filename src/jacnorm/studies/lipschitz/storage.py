"""How much the study keeps on disk."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

from jacnorm.data.catalogue import find
from jacnorm.studies.lipschitz.settings import DepthSettings, RegulariserSettings, ResidualSettings, StudySettings


def kept_bytes(settings: StudySettings, experiments: Collection[str] = ("depth", "residual", "paired", "table")) -> int:
    """Bytes of the weights and running statistics that training keeps, all in float32."""
    numbers = {
        "depth": _depth(settings.depth),
        "residual": _residual(settings.residual),
        "paired": _regularised(settings.paired),
        "table": _regularised(settings.table),
    }
    return 4 * sum(numbers[experiment] * len(getattr(settings, experiment).seeds) for experiment in experiments)


def _depth(settings: DepthSettings) -> int:
    """Numbers of one seed: every network before and after training."""
    inputs, classes = _shape(settings.data_set)
    found = 0
    for width, depth in itertools.product(settings.widths, settings.depths):
        widths = [math.prod(inputs), *[width] * (depth - 1), classes]
        found += sum(a * b for a, b in itertools.pairwise(widths)) + sum(widths[1:]) * settings.biases
    return 2 * len(settings.activations) * found


def _residual(settings: ResidualSettings) -> int:
    """Numbers of one seed: the sweep before and after training, Figure 1 after it."""

    def size(depth: int, normalisation: str) -> int:
        return _wide_resnet(settings.data_set, depth, settings.stem, settings.channels, normalisation)

    sweep = sum(size(depth, "batch") for depth in settings.depths)
    return 2 * sweep + size(settings.compared_depth, "batch") + size(settings.compared_depth, "none")


def _regularised(settings: RegulariserSettings) -> int:
    """Numbers of one seed: every cell of the table after training."""
    from jacnorm.studies.lipschitz.train_regulariser import arms

    inputs, classes = _shape(settings.data_set)
    found = 0
    for arm in arms(settings):
        if settings.network == "wrn":
            found += _wide_resnet(
                settings.data_set, settings.depth, settings.stem, settings.channels, arm.normalisation
            )
        else:
            width = settings.width
            statistics = 4 * width if arm.normalisation == "batch" else 0
            found += math.prod(inputs) * width + width**2 + width * classes + statistics
    return found


def _wide_resnet(data_set: str, depth: int, stem: int, channels: int, normalisation: str) -> int:
    """Parameters and running statistics of one network."""
    from jacnorm.nets.wide_resnet import StackedWideResNet

    image, classes = _shape(data_set)
    net = StackedWideResNet(1, depth, stem, channels, classes, image, normalisation)
    return sum(map(math.prod, net.shapes().values())) + sum(each.numel() for each in net.buffers().values())


def _shape(data_set: str) -> tuple[tuple[int, ...], int]:
    """Shape of an image, and the number of classes."""
    found = find(data_set)
    return tuple(found.shape), len(found.classes)
