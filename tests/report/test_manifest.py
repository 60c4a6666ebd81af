"""What a study says about itself is written and read back, and refused where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from jacnorm.errors import UserError
from jacnorm.files import read_json, write_json
from jacnorm.report.manifest import (
    Caption,
    DataUsed,
    Departure,
    Setting,
    StudyManifest,
    read_captions,
    read_manifest,
    write_captions,
    write_manifest,
)

MANIFEST = StudyManifest(
    settings=[Setting(key="depth.widths", value=[64, 128]), Setting(key="grid", value=[[1, 2], [3, 4]], unit="1")],
    departures=[Departure(paper="three runs", ours="ten seeds", why="an interval")],
    data=[DataUsed(label="digits", digest="ab", source="scikit-learn")],
    tables=["depth-s10-14.parquet"],
)


def test_manifests_and_captions_survive_their_files(tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest.json", MANIFEST)
    assert read_manifest(tmp_path / "manifest.json") == MANIFEST
    captions = {"depth": Caption(title="T", caption="C", claims=["C1"], tables=["depth"], alt="a line")}
    write_captions(tmp_path / "captions.json", captions)
    assert read_captions(tmp_path / "captions.json") == captions


def test_wrong_files_are_refused_with_the_key(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_manifest(path, MANIFEST)
    content = read_json(path)
    content["departures"][0]["why"] = ""
    write_json(path, content)
    with pytest.raises(UserError, match=r"manifest.json: departures\[0\].why: string should have at least 1 character"):
        read_manifest(path)
    write_json(path, {"Depth figure": {"title": "T", "caption": "C"}})
    with pytest.raises(UserError, match=r"Depth figure.*: string should match pattern"):
        read_captions(path)
    write_json(path, {"depth": {"title": "T", "caption": "C", "colour": "red"}})
    with pytest.raises(UserError, match=r"depth\.colour is not a known key"):
        read_captions(path)
