"""Jobs and runs that are killed outright leave nothing half-written, and end with the same bits when started again."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.workflow import training
from tests.workflow.projects import Project


def outputs(folder: Path) -> dict[str, bytes]:
    """Files under their final names; checkpoints belong to the job itself."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and ".checkpoint" not in path.name
    }


def test_a_training_job_killed_at_ten_random_instants(digits, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["jacnorm.studies.stability.train", "pandas", "pyarrow.parquet", "safetensors.torch"]
    )

    def start(folder: Path, checkpoint_seconds: float) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=training.drift, args=(folder, digits, checkpoint_seconds))
        process.start()
        return process

    calm = start(tmp_path / "calm", 60.0)
    began = time.monotonic()
    calm.join(120)
    assert calm.exitcode == 0
    whole, duration = outputs(tmp_path / "calm"), time.monotonic() - began
    assert sorted(whole) == ["tables/curves-s10-11.parquet", "train/drift-s10-11.safetensors"]

    instants = random.Random(20260101)
    kills, attempt, resumed = 0, 0, 0
    while kills < 10:
        folder = tmp_path / str(attempt)
        while True:
            resumed += any(folder.glob("train/*.checkpoint.safetensors"))
            process = start(folder, 0.02)
            if kills % 2 == 0:  # while it trains: some time after its next checkpoint
                until_written(folder, process)
            process.join(instants.uniform(0, 0.5 * duration) if kills < 10 else 120)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join(60)
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            assert outputs(folder).items() <= whole.items()
        assert outputs(folder) == whole
        assert not list(folder.glob("train/*checkpoint*"))
        attempt += 1
    assert resumed >= 3


def until_written(folder: Path, process: multiprocessing.process.BaseProcess) -> None:
    """Wait until the process has written a checkpoint, or has ended."""

    def stamps() -> set[tuple[str, int]]:
        found = set()
        for path in folder.glob("train/*.checkpoint.safetensors"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    before = stamps()
    while process.is_alive() and stamps() <= before:
        time.sleep(0.002)


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(project: Project):
    stability = project.results / "stability"
    names = ["tables/curves-s10-11.parquet", "tables/drift-s10-11.parquet", "train/drift-s10-11.safetensors"]
    whole = {name: (stability / name).read_bytes() for name in names}
    target = str((stability / names[1]).relative_to(project.folder))
    for name in names:
        (stability / name).unlink()
    log = project.results / "logs" / "stability" / "train-drift-s10-11.log"
    log.unlink()

    # The whole group dies at once, as when a machine stops: Snakemake, which leaves its lock, and the job.
    run = subprocess.Popen(
        project.command(target),
        cwd=project.folder,
        env=project.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while not log.exists():
        assert run.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(random.Random(7).uniform(0, 1))
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert not (stability / names[1]).exists()
    assert all((stability / name).read_bytes() == whole[name] for name in names if (stability / name).exists())

    refused = project.snakemake(target)
    assert refused.returncode != 0
    assert "LockException" in refused.stdout
    subprocess.run([sys.executable, "-m", "jacnorm.unlock"], cwd=project.folder, env=project.environment, check=True)
    assert project.jobs(target) == {"stability/train-drift-s10-11", "stability/measure-drift-s10-11"}
    assert {name: (stability / name).read_bytes() for name in names} == whole
