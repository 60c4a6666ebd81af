"""The user's text: what it says decides whether it is prepared again, where it lies does not."""

from __future__ import annotations

import pytest
import yaml
from tests.workflow.projects import TINY, Project

JOB = "data/text"
TARGET = f"results/tiny/smoke/{JOB}.safetensors"


@pytest.fixture
def project(tmp_path) -> Project:
    """A project whose configuration names a text of the user's."""
    project = Project.new(tmp_path / "project")
    (tmp_path / "mine.txt").write_text("What is this?")
    name(project, str(tmp_path / "mine.txt"))
    return project


def name(project: Project, path: str) -> None:
    """Set `text_path`."""
    file = project.folder / TINY
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"text_path": path}))


def test_a_changed_text_is_prepared_again_and_a_moved_one_is_not(project, tmp_path):
    assert project.jobs(TARGET) == {JOB}
    for file in project.results.rglob("*"):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes()
    (tmp_path / "mine.txt").rename(project.folder / "yours.txt")
    name(project, "yours.txt")
    assert project.planned(TARGET) == set()
    (project.folder / "yours.txt").write_text("Something else.")
    assert project.planned(TARGET) == {JOB}


def test_a_missing_text_is_one_sentence_before_anything_runs(project, tmp_path):
    (tmp_path / "mine.txt").unlink()
    before = project.content()
    done = project.snakemake(TARGET)
    assert done.returncode == 2
    assert done.stdout.splitlines()[1:] == [
        f"ERROR: {tmp_path / 'mine.txt'} does not exist; correct text_path: in the configuration or JACNORM_TEXT"
    ]
    assert project.content() == before


def test_a_text_that_settings_name_but_nobody_gives_is_one_sentence(fresh, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("studies: {attention: {probing: {data_sets: [text]}}}")
    done = fresh.snakemake("--dry-run", overlay=str(mine))
    assert done.returncode == 2
    assert done.stdout.splitlines()[1:] == [
        'ERROR: data set "text" is a file of your own, and none is given; '
        "set text_path: in the configuration or JACNORM_TEXT to a UTF-8 text file"
    ]
