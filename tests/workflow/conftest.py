"""One finished run of the whole DAG, made once; each test works on a copy of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.workflow.projects import Project


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after a complete run of the tiny configuration; not to be changed. Its log is `run.log`."""
    project = Project.new(tmp_path_factory.mktemp("workflow") / "finished")
    done = project.snakemake()
    assert done.returncode == 0, done.stdout
    (project.folder / "run.log").write_text(done.stdout)
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy of the finished project, to be edited."""
    return finished.copy(tmp_path / "project")


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which nothing was run, and nothing may be."""
    return Project.new(tmp_path_factory.mktemp("workflow") / "fresh")
