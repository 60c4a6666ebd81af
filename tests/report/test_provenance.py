"""Provenance says which code and machine, and nothing about who or where."""

from __future__ import annotations

import getpass
import re
import socket
import subprocess
from pathlib import Path

import pytest

from jacnorm.report import provenance as module
from jacnorm.report.provenance import git_commit, gpu, libraries, processor, provenance, written


def git(folder: Path, *words: str) -> str:
    options = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *options, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_and_uncommitted_changes_are_named(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == "not a git checkout with a commit"
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path) == f"commit {commit}"
    (tmp_path / "new").write_text("untracked files, results among them, do not count")
    assert git_commit(tmp_path) == f"commit {commit}"
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == f"commit {commit} with uncommitted changes"


def test_no_person_host_or_path_is_told() -> None:
    text = "\n".join(provenance().values())
    words = re.findall(r"[\w.-]+", text)
    assert getpass.getuser() not in words
    assert socket.gethostname() not in words
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    assert not re.search(r"(^|\s)/\w", text)


def test_versions_and_hardware_are_told() -> None:
    assert re.search(r"numpy \d+\.\d+", libraries())
    assert re.search(r", \d+ logical cores?$", processor())
    assert re.fullmatch(r"\d+\.\d GiB", module.memory())


def test_time_may_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert written() == "1970-01-01 00:00 UTC"
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", written())


def test_gpus_are_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert gpu() == "none found"
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    monkeypatch.setattr(module, "_output", lambda command: "NVIDIA X, 81559 MiB, 570.1\nNVIDIA X, 81559 MiB, 570.1")
    assert gpu() == "NVIDIA X, 81559 MiB, driver 570.1; NVIDIA X, 81559 MiB, driver 570.1"
    monkeypatch.setattr(module, "_output", lambda command: "")
    assert gpu() == "none found"
