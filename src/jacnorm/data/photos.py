"""Photos to lay under digits: BSDS500 in a local mirror, or a folder of the user's. Cheap to import."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jacnorm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

VARIABLE = "JACNORM_PHOTOS"
MIRRORED = "bsds500/images/train"
"""Where the training photos of BSDS500 lie below a mirror."""
BSDS500 = "d11b47a6ba844165ee2b83967b6ad02642713627e839c1d81ec319b256e4384e"
"""`digest` of the 200 training photos of BSDS500."""
_ENDINGS = (".jpg", ".jpeg", ".png")
_FIX = f"correct photos_path: in the configuration or {VARIABLE}"


@dataclass(frozen=True)
class Photos:
    """Photos of any sizes, (3, height, width) uint8 each, in the order of their names."""

    train: list[np.ndarray]
    """The first four fifths of them (of BSDS500: 160)."""
    test: list[np.ndarray]
    """The others (40)."""
    label: str
    """BSDS500, if they are its training photos, wherever they lie; else "user's photos"."""


def given(own: Path | str | None = None) -> str:
    """The folder that the user names: the argument, else JACNORM_PHOTOS, else ""."""
    return str(own or "") or os.environ.get(VARIABLE, "")


def load(own: Path | str | None = None, mirror: Path | str | None = None) -> Photos:
    """Read the user's photos if a folder is given, else those of BSDS500 in the mirror (else JACNORM_MIRROR).

    Raises UserError if there is neither, if the folder holds fewer than two photos, if one cannot be decoded, or if
    those in the mirror are not BSDS500's.
    """
    files = listed(given(own)) if given(own) else _mirrored(mirror)
    label = "BSDS500" if digest(files) == BSDS500 else "user's photos"
    found = [_decoded(file) for file in files]
    cut = len(found) * 4 // 5
    return Photos(found[:cut], found[cut:], label)


def listed(folder: Path | str) -> list[Path]:
    """The JPEG and PNG files directly in a folder, by name. Raises UserError if there are fewer than two."""
    place = Path(folder).expanduser()
    try:
        files = sorted(file for file in place.iterdir() if file.suffix.lower() in _ENDINGS)
    except FileNotFoundError:
        raise UserError(f"{place} does not exist; {_FIX}") from None
    except NotADirectoryError:
        raise UserError(f"{place} is not a folder; {_FIX}") from None
    except OSError as error:
        raise UserError(f"{place} cannot be listed ({error.strerror}); make it readable") from None
    if len(files) < 2:
        raise UserError(f"{place} holds {len(files)} JPEG or PNG files; give a folder of at least two photos")
    return files


def digest(files: Sequence[Path]) -> str:
    """SHA-256 over the names of the files and the SHA-256 of each, in their order, as 64 hexadecimal digits."""
    whole = hashlib.sha256()
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); make it readable or leave it out") from None
        whole.update(f"{file.name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return whole.hexdigest()


def _mirrored(mirror: Path | str | None) -> list[Path]:
    from jacnorm.data.mirror import VARIABLE as MIRROR
    from jacnorm.data.mirror import folder

    place = folder(mirror)
    if place is None:
        raise UserError(
            f"mnist_m is made from MNIST and photos, and none are given; set photos_path: in the configuration or "
            f"{VARIABLE} to a folder of photos, or mirror: or {MIRROR} to one that holds {MIRRORED}"
        )
    if not (place / MIRRORED).is_dir():
        raise UserError(
            f"{place / MIRRORED} is missing from the mirror; copy the training photos of BSDS500 there, or set "
            f"photos_path: in the configuration or {VARIABLE} to a folder of photos"
        )
    files = listed(place / MIRRORED)
    if (found := digest(files)) != BSDS500:
        raise UserError(
            f"{place / MIRRORED}: the photos have digest {found}, but those of BSDS500 have {BSDS500}; replace them "
            "with a copy of the original, or name them as your own by photos_path: in the configuration"
        )
    return files


def _decoded(file: Path) -> np.ndarray:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    # Pillow reports damage with whatever its decoder met: OSError, SyntaxError, ValueError and others.
    except Exception as error:
        reason = str(error).splitlines()[0].split(" <_io.")[0] if str(error) else type(error).__name__
        raise UserError(f"{file} cannot be decoded ({type(error).__name__}: {reason}); leave it out") from error
