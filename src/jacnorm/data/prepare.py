"""Step: decode a named data set once and store it as one safetensors file.

``python -m jacnorm.data.prepare --name digits --out digits.safetensors``

The file holds train_x, test_x (N, channels, height, width) uint8 and train_y, test_y (N,) int64, or the bytes of a
text, text (n,) uint8 in UTF-8. It says what they are: label, digest, licence, kind of source (never a path), for images
also classes and split. The same data and source give the same bytes. Read it with `jacnorm.data.read`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jacnorm import step
from jacnorm.data import catalogue
from jacnorm.data.stored import pack
from jacnorm.files import save_tensors
from jacnorm.settings import Settings, setting

if TYPE_CHECKING:
    from torch import Tensor


class PrepareSettings(Settings):
    """Which data set to store, and where to find it."""

    name: catalogue.Name = setting(..., "name of the data set")
    mirror: str | None = setting(
        None,
        "folder in the Hugging Face hub's layout to read from instead of the network (default: JACNORM_MIRROR)",
        private=True,
    )
    text_path: str | None = setting(
        None, "UTF-8 text file that is the data set text (default: JACNORM_TEXT)", private=True
    )
    photos_path: str | None = setting(
        None,
        "folder of photos that are laid under the digits of mnist_m (default: JACNORM_PHOTOS, else BSDS500 in the "
        "mirror)",
        private=True,
    )


def prepare(
    name: str,
    out: Path | str,
    mirror: Path | str | None = None,
    text_path: Path | str | None = None,
    photos_path: Path | str | None = None,
) -> None:
    """Write the data set `name` to `out`, atomically. Raises UserError if it is unknown, missing or damaged."""
    entry = catalogue.find(name)
    if isinstance(entry, catalogue.Text):
        tensors, about = _text(entry, mirror, text_path)
    else:
        tensors, about = _images(entry, mirror, photos_path)
    save_tensors(out, tensors, pack({"name": entry.name, "licence": entry.licence, **about}))


def _images(
    entry: catalogue.Dataset, mirror: Path | str | None, photos_path: Path | str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import torch

    from jacnorm.data.sources import load

    loaded = load(entry, mirror, photos_path)
    about = {
        "label": loaded.label,
        "digest": loaded.digest,
        "source": loaded.source,
        "revision": loaded.revision,
        "classes": entry.classes,
        "split": entry.split,
        "pixel_max": entry.pixel_max,
    }
    return {key: torch.from_numpy(array) for key, array in loaded.arrays.items()}, about


def _text(
    entry: catalogue.Text, mirror: Path | str | None, text_path: Path | str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import torch

    from jacnorm.data.texts import load

    loaded = load(entry, mirror, text_path)
    about = {"label": loaded.label, "digest": loaded.digest, "source": loaded.source, "revision": ""}
    return {"text": torch.frombuffer(bytearray(loaded.text.encode()), dtype=torch.uint8)}, about


def run(settings: PrepareSettings, out: Path) -> None:
    """Decode a named data set once and store it.

    Args:
        settings: which data set.
        out: safetensors file to write.

    """
    prepare(settings.name, out, settings.mirror, settings.text_path, settings.photos_path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the step from the command line."""
    step.run({"prepare": run}, arguments)


if __name__ == "__main__":
    main()
