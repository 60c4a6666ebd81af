"""Environments of their own: locks read, built once, whole or not at all; pip is replaced by one that only looks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jacnorm import environments
from jacnorm.environments import environment, explain, interpreter, read, read_lock
from jacnorm.errors import UserError

LOCK = """\
# Made for a test.
setuptools==79.0.1 \\
    --hash=sha256:00
some-package==1.5.0 \\
    --hash=sha256:11 \\
    --hash=sha256:22
"""


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text(LOCK)
    return path


@pytest.fixture
def calls(monkeypatch):
    """Commands that would be run; `python -m venv` makes a folder with an interpreter, pip only reads its lock."""
    found = []

    def run(command, **options):
        found.append(command)
        if "venv" in command:
            python = Path(command[-1], "bin", "python")
            python.parent.mkdir(parents=True)
            python.touch()
        elif "pip" in command:
            found[-1] = Path(command[-1]).read_text()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(environments.subprocess, "run", run)
    monkeypatch.setattr(environments, "interpreter", lambda: ("python3.11", "3.11"))
    return found


def test_a_lock_is_read_with_its_hashes(lock):
    assert [(pin.name, pin.version) for pin in read_lock(lock)] == [("setuptools", "79.0.1"), ("some-package", "1.5.0")]
    assert read_lock(lock)[1].text.splitlines()[-1].strip() == "--hash=sha256:22"


@pytest.mark.parametrize("name", ["dreamerv3.txt", "dreamerv3-cuda.txt"])
def test_our_locks_can_be_read(name):
    pins = read_lock(Path(__file__).parents[1] / "requirements" / name)
    versions = {pin.name: pin.version for pin in pins}
    expected = {"dreamerv3.txt": ("dreamerv3", "1.5.0"), "dreamerv3-cuda.txt": ("jax-cuda12-plugin", "0.4.26")}[name]
    assert versions[expected[0]] == expected[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("package>=1\n    --hash=sha256:00\n", "no exact version"),
        ("package==1\n", "no hash"),
        ("# nothing\n", "names no package"),
        (None, "cannot be read"),
    ],
)
def test_a_lock_that_locks_nothing_is_a_mistake(tmp_path, text, words):
    path = tmp_path / "lock.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_lock(path)


def test_what_builds_packages_is_installed_before_them(tmp_path, lock, calls):
    environment([lock], tmp_path / "env" / "environment.json")
    _, first, second = calls
    assert "setuptools" in first
    assert "some-package" not in first
    assert "some-package" in second
    found = read(tmp_path / "env" / "environment.json")
    assert found.python.exists()
    assert found.packages == {"setuptools": "79.0.1", "some-package": "1.5.0"}


def test_an_environment_is_built_once_for_a_lock_and_anew_for_another(tmp_path, lock, calls):
    out = tmp_path / "env" / "environment.json"
    environment([lock], out)
    text, built = out.read_text(), len(calls)
    out.unlink()  # as a workflow does before it runs a rule again
    lock.write_text("# another comment\n" + LOCK)
    environment([lock], out)
    assert len(calls) == built
    assert out.read_text() == text
    lock.write_text(LOCK.replace("1.5.0", "1.5.1"))
    environment([lock], out)
    assert len(calls) == 2 * built
    assert len(list(out.parent.glob("venv-*"))) == 1
    assert str(tmp_path) not in out.read_text()


def test_a_build_that_fails_leaves_nothing(tmp_path, lock, calls, monkeypatch):
    working = environments.subprocess.run

    def run(command, **options):
        if "pip" in command:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: it broke")
        return working(command, **options)

    monkeypatch.setattr(environments.subprocess, "run", run)
    with pytest.raises(UserError, match="it broke"):
        environment([lock], tmp_path / "env" / "environment.json")
    assert list((tmp_path / "env").iterdir()) == []


def test_what_a_killed_build_left_is_removed(tmp_path, lock, calls):
    (tmp_path / "env" / ".building-1-ab").mkdir(parents=True)
    environment([lock], tmp_path / "env" / "environment.json")
    assert not list((tmp_path / "env").glob(".building-*"))


def test_a_python_that_cannot_make_environments_is_a_mistake(tmp_path, lock, calls, monkeypatch):
    monkeypatch.setattr(
        environments.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "no ensurepip")
    )
    with pytest.raises(UserError, match="venv module"):
        environment([lock], tmp_path / "env" / "environment.json")


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("ERROR: Could not find a version ...\nERROR: No matching distribution found for jax==0.4.26", "registry"),
        ("WARNING: Retrying after NewConnectionError('...')", "registry"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "hash does not match"),
        ("ERROR: Failed building wheel for labmaze", "Failed building wheel for labmaze"),
        ("", "no reason"),
    ],
)
def test_what_pip_says_becomes_one_sentence(stderr, words):
    assert words in explain(stderr)
    assert "\n" not in explain(stderr)


def test_a_file_without_its_environment_is_a_mistake(tmp_path, lock, calls):
    out = tmp_path / "env" / "environment.json"
    environment([lock], out)
    read(out).python.unlink()
    with pytest.raises(UserError, match="not there"):
        read(out)
    out.write_text("[]")
    with pytest.raises(UserError, match="does not describe"):
        read(out)


def test_the_running_python_is_taken_if_the_locks_fit_it(monkeypatch):
    monkeypatch.setattr(environments, "PYTHONS", (f"{sys.version_info.major}.{sys.version_info.minor}",))
    python, version = interpreter()
    assert version in environments.PYTHONS
    assert Path(python).exists()


def test_another_python_is_looked_for_and_asked(monkeypatch):
    monkeypatch.setattr(environments, "PYTHONS", ("2.1", "2.2"))
    monkeypatch.setattr(environments.shutil, "which", lambda name: f"/somewhere/{name}")
    answers = {"/somewhere/python2.1": (127, ""), "/somewhere/python2.2": (0, "2.2\n")}

    def run(command, **options):
        return subprocess.CompletedProcess(command, *answers[command[0]], "")

    monkeypatch.setattr(environments.subprocess, "run", run)
    assert interpreter() == ("/somewhere/python2.2", "2.2")
    answers["/somewhere/python2.2"] = (0, "2.7\n")
    with pytest.raises(UserError, match=r"2\.1 or 2\.2"):
        interpreter()
