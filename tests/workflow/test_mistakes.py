"""A mistake in the configuration gives one sentence and a failing status before any job starts, and writes nothing."""

from __future__ import annotations

import pytest
from tests.workflow.projects import Project

# The user's file, and what the one sentence must hold: the key's full path and what is allowed.
MISTAKES = {
    "unknown key": (
        "studies: {stability: {depth: {widht: [8]}}}",
        ['"studies.stability.depth.widht" is unknown', 'did you mean "width', "allowed here: seeds, "],
    ),
    "wrong type": (
        "studies: {stability: {scores: {width: wide}}}",
        ["\"studies.stability.scores.width\" is 'wide'", "input should be a valid integer"],
    ),
    "negative width": (
        "studies: {stability: {depth: {widths: [8, -3]}}}",
        ['"studies.stability.depth.widths.1" is -3', "greater than or equal to 1"],
    ),
    "everything removed": (
        "studies: {stability: {trainability: {sparsities: [1.0]}}}",
        ['"studies.stability.trainability.sparsities.0" is 1.0', "less than 1"],
    ),
    "no seeds": (
        "studies: {stability: {drift: {seeds: []}}}",
        ['"studies.stability.drift.seeds" is []', "at least 1 item"],
    ),
    "unknown study": (
        "studies: {stabilty: {}}",
        ['"studies.stabilty" is unknown', 'did you mean "stability"', "allowed here: "],
    ),
    "unknown scale": ("scale: huge", ['"scale" is "huge"', "choose one of laptop, paper, smoke"]),
    "unknown top-level key": ("device_: cpu", ['"device_" is unknown', 'did you mean "device"']),
    "no such device": ("device: tpu", ["\"device\" is 'tpu'", "'auto', 'cpu' or 'cuda'"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(fresh: Project, tmp_path, mistake):
    text, wanted = MISTAKES[mistake]
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    before = fresh.content()
    done = fresh.snakemake(overlay=str(mine))
    lines = done.stdout.splitlines()
    assert done.returncode == 2
    assert len(lines) == 2, done.stdout
    assert lines[0].startswith("Using workflow specific profile")
    assert lines[1].startswith("ERROR: configuration key ")
    for part in wanted:
        assert part in lines[1]
    assert fresh.content() == before


@pytest.mark.parametrize("text", ["studies: [unclosed", "- a list"], ids=["malformed", "not a mapping"])
def test_a_file_that_snakemake_itself_cannot_read(fresh: Project, tmp_path, text):
    # Snakemake reads the user's file before it reads the Snakefile, so the words are its own.
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    before = fresh.content()
    done = fresh.snakemake(overlay=str(mine))
    assert done.returncode == 1
    assert "Config file " in done.stdout
    assert "YAML" in done.stdout
    assert "Traceback" not in done.stdout
    assert fresh.content() == before


def test_a_broken_scale_file_is_named(fresh: Project, tmp_path):
    project = fresh.copy(tmp_path / "broken")
    (project.folder / "configs" / "smoke.yaml").write_text("studies: [unclosed")
    before = project.content()
    done = project.snakemake(overlay=None)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 2
    assert "configs/smoke.yaml is not valid YAML: " in done.stdout
    assert project.content() == before
