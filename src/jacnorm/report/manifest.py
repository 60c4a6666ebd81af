"""What a study tells its readers besides numbers: settings, departures from the paper, data, captions.

`manifest.json` and `figures/captions.json` are written by the steps of a study and read by the report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from jacnorm.errors import UserError
from jacnorm.files import read_json, write_json
from jacnorm.report.claims import Record, Text, complaint

Value = str | int | float | bool | None


class Setting(Record):
    """One setting the study ran with."""

    key: Text = Field(description="Full path of the key: stability.depth.widths")
    value: Value | list[Value] | list[list[Value]]
    unit: str = ""
    description: str = ""


class Departure(Record):
    """One place where this study does something else than the paper."""

    paper: Text = Field(description="What the paper does, or that it is unknown.")
    ours: Text
    why: Text


class DataUsed(Record):
    """One data set that was really read."""

    label: Text
    digest: Text = Field(description="Digest of the decoded arrays.")
    source: Text = Field(description="Where it comes from: a package, a hub id, a generator. Never a local path.")


class StudyManifest(Record):
    """The content of a study's `manifest.json`."""

    settings: list[Setting]
    departures: list[Departure]
    data: list[DataUsed]
    tables: list[str] = Field(
        default_factory=list,
        description="File names of the tables that were judged; if empty, the report shows every table in the folder.",
    )


class Caption(Record):
    """What a figure shows. `claims` and `tables` link it to what it illustrates and what it is drawn from."""

    title: Text
    caption: Text
    claims: list[str] = Field(default_factory=list)
    tables: list[str] = Field(default_factory=list)
    alt: str | None = Field(
        None, description="What is to be seen, for readers who do not see it; default: title and caption."
    )


Captions = TypeAdapter(dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")], Caption])


def write_manifest(path: Path | str, manifest: StudyManifest) -> None:
    """Write `manifest.json`."""
    write_json(path, manifest.model_dump(mode="json"))


def read_manifest(path: Path | str) -> StudyManifest:
    """Read `manifest.json`. Raises UserError naming the wrong key."""
    content = read_json(path)
    try:
        return StudyManifest.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {complaint(error, content)}") from None


def write_captions(path: Path | str, captions: dict[str, Caption]) -> None:
    """Write `captions.json`: figure name (file name without suffix) -> caption, in the order of the page."""
    write_json(path, Captions.dump_python(captions, mode="json"), sort_keys=False)


def read_captions(path: Path | str) -> dict[str, Caption]:
    """Read `captions.json`. Raises UserError naming the wrong key."""
    content = read_json(path)
    try:
        return Captions.validate_python(content)
    except ValidationError as error:
        raise UserError(f"{path}: {complaint(error, content)}") from None
