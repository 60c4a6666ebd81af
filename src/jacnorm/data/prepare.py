"""Step: decode a named data set once and store it as one safetensors file.

``python -m jacnorm.data.prepare --name digits --out digits.safetensors``

The file holds train_x, test_x (N, channels, height, width) uint8 and train_y, test_y (N,) int64, and says what they
are: label, digest, licence, classes, split and kind of source (never a path). The same data and source give the same
bytes. Read it with `jacnorm.data.read`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jacnorm import step
from jacnorm.data import catalogue
from jacnorm.data.stored import pack
from jacnorm.files import save_tensors
from jacnorm.settings import Settings, setting


class PrepareSettings(Settings):
    """Which data set to store, and where to find it."""

    name: catalogue.Name = setting(..., "name of the data set")
    mirror: str | None = setting(
        None, "folder in the Hugging Face hub's layout to read from instead of the network (default: JACNORM_MIRROR)"
    )


def prepare(name: str, out: Path | str, mirror: Path | str | None = None) -> None:
    """Write the data set `name` to `out`, atomically. Raises UserError if it is unknown, missing or damaged."""
    import torch

    from jacnorm.data.sources import load

    loaded = load(catalogue.find(name), mirror)
    dataset = loaded.dataset
    about = {
        "name": dataset.name,
        "label": loaded.label,
        "digest": loaded.digest,
        "source": loaded.source,
        "revision": loaded.revision,
        "licence": dataset.licence,
        "classes": dataset.classes,
        "split": dataset.split,
        "pixel_max": dataset.pixel_max,
    }
    tensors = {key: torch.from_numpy(array) for key, array in loaded.arrays.items()}
    save_tensors(out, tensors, pack(about))


def run(settings: PrepareSettings, out: Path) -> None:
    """Decode a named data set once and store it.

    Args:
        settings: which data set.
        out: safetensors file to write.

    """
    prepare(settings.name, out, settings.mirror)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the step from the command line."""
    step.run({"prepare": run}, arguments)


if __name__ == "__main__":
    main()
