"""A killed training job, started again, ends with the same bits as one that was left alone.

The jobs are real processes, killed by real signals. A fork server that has imported PyTorch starts them, so that
each restart does not pay for the import.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from tests.training import jobs

from jacnorm.files import load_tensors

STEPS = 600  # about 0.7 s
OUTPUTS = ("weights.safetensors", "history.safetensors", "curves.parquet")
CHECKPOINT = "checkpoint.safetensors"


@pytest.fixture(scope="module")
def server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # Not the job's own module: the server does not have the test run's import path.
    context.set_forkserver_preload(["torch", "pandas", "pyarrow.parquet", "safetensors.torch"])
    return context


def start(
    server: multiprocessing.context.ForkServerContext, target: Callable[..., object], *arguments: object
) -> BaseProcess:
    process = server.Process(target=target, args=arguments)
    process.start()
    return process


def finish(process: BaseProcess) -> int | None:
    process.join(120)
    return process.exitcode


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def resumed(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "resumed").read_text().split()]


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert finish(start(server, jobs.train, folder, STEPS, 60.0)) == 0
    assert resumed(folder) == [0]
    return content(folder)


def test_the_job_learns_and_its_runs_differ(uninterrupted, tmp_path):
    for name, data in uninterrupted.items():
        (tmp_path / name).write_bytes(data)
    loss = load_tensors(tmp_path / "history.safetensors")[0]["loss"]
    assert loss.shape == (STEPS, len(jobs.RUNS))
    assert (loss[-15:].mean(0) < 0.5 * loss[:15].mean(0)).all()
    assert len(set(loss[-1].tolist())) == len(jobs.RUNS)


def test_kill_nine_at_ten_random_instants(server, uninterrupted, tmp_path):
    instants = random.Random(20241107)
    kills, attempt, resumes = 0, 0, []
    while kills < 10:  # a job that finishes before its turn to be killed is compared, and another one started
        folder = tmp_path / str(attempt)
        folder.mkdir()
        while True:
            begun = server.Event()
            process = start(server, jobs.train, folder, STEPS, 0.01, begun)
            if kills < 10:
                if kills % 3:  # otherwise while the job starts, reads its checkpoint or makes its first steps
                    begun.wait(60)
                process.join(instants.uniform(0.0, 0.15))
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
            code = finish(process)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            kills += 1
        assert content(folder) == uninterrupted
        assert sorted(path.name for path in folder.iterdir()) == sorted([*OUTPUTS, "resumed"])
        resumes += resumed(folder)
        attempt += 1
    assert max(resumes) > 0


@pytest.mark.parametrize("moment", ["half written", "before renaming", "after renaming"])
def test_kill_nine_while_a_checkpoint_is_written(server, uninterrupted, tmp_path, moment):
    assert finish(start(server, jobs.train_and_die_writing, tmp_path, STEPS, moment)) == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir() if path.name != CHECKPOINT]
    assert len(left) == (0 if moment == "after renaming" else 1)
    assert finish(start(server, jobs.train, tmp_path, STEPS, 60.0)) == 0
    assert resumed(tmp_path) == [5 if moment == "after renaming" else 4]
    assert content(tmp_path) == uninterrupted
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_the_job_writes_a_checkpoint_and_exits(server, uninterrupted, tmp_path, number, status):
    instants = random.Random(number)
    for _ in range(2):
        begun = server.Event()
        process = start(server, jobs.train, tmp_path, STEPS, 60.0, begun)
        assert begun.wait(60)
        process.join(instants.uniform(0.0, 0.05))
        os.kill(process.pid, number)
        assert finish(process) == status
        assert (tmp_path / CHECKPOINT).exists()
    assert finish(start(server, jobs.train, tmp_path, STEPS, 60.0)) == 0
    assert resumed(tmp_path)[-1] > 0
    assert content(tmp_path) == uninterrupted
