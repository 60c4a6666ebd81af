"""A run that was killed outright does not stop the next one; a run that still goes on does. On a real Snakemake."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jacnorm import unlock
from jacnorm.errors import UserError

# The rule waits for a file, so that the test decides when the run may end.
SNAKEFILE = """
rule all:
    output: "done"
    shell: "touch started; while [ ! -e go ]; do sleep 0.05; done; touch {output}"
"""


@pytest.fixture
def running(tmp_path):
    """A Snakemake that is in the middle of its only job, in `tmp_path`."""
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--cores", "1", "--quiet", "all"],
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(tmp_path / "started", process)
        yield process
    finally:
        (tmp_path / "go").touch()  # lets an orphaned job end too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(path: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "Snakemake ended early"
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.05)


def call(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jacnorm.unlock"], cwd=folder, capture_output=True, text=True)


def test_a_killed_run_is_followed_by_the_next(tmp_path, running):
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    again = [sys.executable, "-m", "snakemake", "--cores", "1", "--rerun-incomplete"]
    (tmp_path / "go").touch()
    assert subprocess.run(again, cwd=tmp_path, capture_output=True).returncode != 0  # the lock it left

    done = call(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Going on after an interrupted run." in done.stderr
    assert subprocess.run(again, cwd=tmp_path, capture_output=True).returncode == 0
    assert (tmp_path / "done").exists()


def test_a_run_that_goes_on_is_left_alone(tmp_path, running):
    locks = sorted((tmp_path / ".snakemake/locks").iterdir())
    assert locks
    refused = call(tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"ERROR: a run is still going on in this folder (process {running.pid}); ")
    assert refused.stderr.count("\n") == 1
    assert sorted((tmp_path / ".snakemake/locks").iterdir()) == locks
    assert unlock.snakemakes(tmp_path) == [running.pid]
    assert unlock.snakemakes(tmp_path.parent) == []

    (tmp_path / "go").touch()
    assert running.wait(60) == 0
    assert unlock.unlock(tmp_path) is False


def test_a_folder_without_a_run_needs_nothing(tmp_path):
    assert unlock.unlock(tmp_path) is False
    done = call(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_lock_that_cannot_be_removed_is_reported(tmp_path):
    (tmp_path / "Snakefile").write_text("rule broken\n")
    (tmp_path / ".snakemake/locks").mkdir(parents=True)
    (tmp_path / ".snakemake/locks/0.input.lock").touch()
    with pytest.raises(UserError, match="could not be removed with `snakemake --unlock`"):
        unlock.unlock(tmp_path)
