"""A named text, from wherever it is: Python itself, a local mirror, or a file of the user's. Cheap to import."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jacnorm.data.catalogue import Text
from jacnorm.errors import UserError

VARIABLE = "JACNORM_TEXT"
Source = Literal["embedded", "mirror", "file"]


@dataclass(frozen=True)
class LoadedText:
    """A text and what is known about it."""

    text: str
    """Line ends are ``\\n``."""
    label: str
    source: Source

    @property
    def digest(self) -> str:
        """SHA-256 of the text in UTF-8, as 64 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load(entry: Text, folder: Path | str | None = None, own: Path | str | None = None) -> LoadedText:
    """Load a text: from the mirror `folder` (else JACNORM_MIRROR) or the user's file `own` (else JACNORM_TEXT).

    Raises UserError if the text is missing, empty, not UTF-8, or not the one that the catalogue expects.
    """
    if entry.file is not None:
        return _mirrored(entry, folder)
    if entry.name == "python_docs":
        return LoadedText(_python_docs(), entry.label.format(version=platform.python_version()), "embedded")
    return LoadedText(_own(given(own)), entry.label, "file")


def given(own: Path | str | None = None) -> str:
    """The file that the user names as the data set `text`: the argument, else JACNORM_TEXT, else ""."""
    return str(own or "") or os.environ.get(VARIABLE, "")


def _own(chosen: str) -> str:
    if not chosen:
        raise UserError(
            'data set "text" is a file of your own, and none is given; '
            f"set text_path: in the configuration or {VARIABLE} to a UTF-8 text file"
        )
    return _read(Path(chosen).expanduser(), f"does not exist; correct text_path: in the configuration or {VARIABLE}")


def _mirrored(entry: Text, folder: Path | str | None) -> LoadedText:
    from jacnorm.data import mirror

    place = mirror.folder(folder)
    if place is None:
        raise UserError(
            f"{entry.label} is read from a local mirror only; set mirror: in the configuration or {mirror.VARIABLE} "
            f"to a folder that holds {entry.file} (copy it from {entry.origin})"
        )
    path = place / entry.file
    text = _read(path, f"is missing from the mirror; copy it there from {entry.origin}")
    loaded = LoadedText(text, entry.label, "mirror")
    if loaded.digest != entry.sha256:
        raise UserError(
            f"{path}: the text has SHA-256 {loaded.digest}, but that of {entry.label} is {entry.sha256}; "
            "replace it with a copy of the original"
        )
    return loaded


def _read(path: Path, missing: str) -> str:
    """The text of a file, without a byte order mark and with line ends as a line feed; `missing`: what to say if so."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} {missing}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it in that encoding") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a text file that can be") from None
    if not text.strip():
        raise UserError(f"{path} holds no text; give a file with some")
    return text


def _python_docs() -> str:
    """The topics of Python's ``help()``: the reference of the language, in the order of their names.

    Runs of spaces become one space, runs of blank lines one blank line.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            f"this Python {platform.python_version()} comes without the module pydoc_data, whose text is the data set "
            '"python_docs"; use a complete Python, or the data set "text" with a file of your own'
        ) from None
    return collapse("\n".join(topics[name] for name in sorted(topics)))


def collapse(text: str) -> str:
    """The text with one space for each run of spaces, none at the end of a line, and no two blank lines in a row."""
    text = re.sub(r" +$", "", re.sub(r" +", " ", text), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text)
