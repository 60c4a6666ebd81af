"""The user's photos: what they are decides whether digits are laid on them again, where they lie does not."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from PIL import Image
from tests.workflow.projects import TINY, Project

JOB = "data/mnist_m"
TARGET = f"results/tiny/smoke/{JOB}.safetensors"


@pytest.fixture
def project(tmp_path) -> Project:
    """A project whose configuration names a folder of photos, and which lays the small digits on them."""
    project = Project.new(tmp_path / "project")
    catalogue = project.package / "data" / "catalogue.py"
    changed = catalogue.read_text().replace('Blend("mnist", "bsds500")', 'Blend("digits", "bsds500")')
    assert changed != catalogue.read_text()
    catalogue.write_text(changed)
    (tmp_path / "mine").mkdir()
    for value in (0, 200):
        save(tmp_path / "mine", value)
    name(project, str(tmp_path / "mine"))
    return project


def save(folder, value: int) -> None:
    """One photo of one grey."""
    Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(folder / f"{value}.png")


def name(project: Project, path: str) -> None:
    """Set `photos_path`."""
    file = project.folder / TINY
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"photos_path": path}))


def test_changed_photos_are_used_again_and_moved_ones_are_not(project, tmp_path):
    assert project.jobs(TARGET) == {JOB}
    for file in project.results.rglob("*"):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes()
    (tmp_path / "mine").rename(project.folder / "yours")
    name(project, "yours")
    assert project.planned(TARGET) == set()
    save(project.folder / "yours", 100)
    assert project.planned(TARGET) == {JOB}


def test_a_missing_folder_is_one_sentence_before_anything_runs(project, tmp_path):
    name(project, str(tmp_path / "none"))
    before = project.content()
    done = project.snakemake(TARGET)
    assert done.returncode == 2
    assert done.stdout.splitlines()[1:] == [
        f"ERROR: {tmp_path / 'none'} does not exist; correct photos_path: in the configuration or JACNORM_PHOTOS"
    ]
    assert project.content() == before
