"""The judging step that all studies share: tables in, ``verdicts.json`` and ``manifest.json`` out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter

from jacnorm.data.stored import unpack
from jacnorm.files import read_metadata, read_yaml
from jacnorm.report.manifest import DataUsed, Departure, Setting, StudyManifest, write_manifest
from jacnorm.report.tables import gather_tables, group_files
from jacnorm.report.verdicts import judge_study, write_verdicts
from jacnorm.settings import Settings, table


def judge_files(
    estimands: object,
    folder: Path,
    settings: Settings,
    scale: str,
    tables: Iterable[Path],
    data: Iterable[Path],
    verdicts: Path,
    manifest: Path,
) -> None:
    """Judge the claims of the study in `folder` (its claims.yaml, departures.yaml) from `tables`.

    estimands: the study's judge module. data: the prepared data sets that were read; their labels and digests enter
    the manifest.
    """
    files = group_files(tables)
    found = judge_study(folder / "claims.yaml", estimands, gather_tables(files), settings, scale)
    departures = TypeAdapter(list[Departure]).validate_python(read_yaml(folder / "departures.yaml"))
    used = [unpack(read_metadata(path)) for path in sorted(set(data))]
    about = StudyManifest(
        settings=[Setting(**row) for row in table(settings, f"{found.study}.")],
        departures=departures,
        tables=[path.name for paths in files.values() for path in paths],
        data=[DataUsed(label=each["label"], digest=each["digest"], source=each["source"]) for each in used],
    )
    write_manifest(manifest, about)
    write_verdicts(verdicts, found)
