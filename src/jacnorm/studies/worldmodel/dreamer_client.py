"""Work done in DreamerV3's own environment: what is asked, how its process is started, and what comes back.

DreamerV3 needs versions of JAX and NumPy that cannot live beside ours, so it runs as a process of its own interpreter
(`dreamer_worker`), with this package's folder on its path and nothing else of the main environment.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import jacnorm
from jacnorm.environments import Environment
from jacnorm.errors import UserError
from jacnorm.studies.worldmodel import dreamer_worker
from jacnorm.studies.worldmodel.arms import Arm
from jacnorm.studies.worldmodel.perturbations import Condition, conditions
from jacnorm.studies.worldmodel.settings import DreamerSettings
from jacnorm.training.job import Job
from jacnorm.training.seeds import derive

STUDY = "worldmodel"
AGENT = "dreamerv3"
CUDA = "jax-cuda12-plugin"
"""What JAX needs to see an Nvidia GPU."""
RENDERERS = ("egl", "osmesa")
"""Ways to draw images without a display, the faster one first."""
CHECKPOINT_SECONDS = 60.0
_LAST_LINES = 15
_log = logging.getLogger(__name__)

Task = dict[str, Any]
"""What the worker is asked for; JSON."""


def kind(settings: DreamerSettings, task: str, arm: Arm, platform: str) -> Task:
    """The part of a task that says what is trained or measured."""
    return {
        "task": task,
        "observation": settings.observation,
        "size": settings.size,
        "platform": platform,
        "batch": arm.batch,
        "length": arm.length,
        "train_ratio": settings.train_ratio,
        "frames": settings.frames,
        "penalty": {
            "weight": arm.weight,
            "wrt": list(arm.wrt),
            "include_prior": arm.include_prior,
            "power": arm.power,
            "n_proj": settings.n_proj,
        },
        "error": {"kind": arm.error, "size": arm.error_size},
    }


def columns(task: str, arm: Arm, seed: int) -> dict[str, Any]:
    """What every row of an agent begins with."""
    return {"seed": seed, "agent": AGENT, "task": task, **arm.columns}


def numbers(task: str, seed: int, purposes: tuple[str, ...]) -> dict[str, int]:
    """Numbers for the worker's random streams: the same for every arm of a task and seed."""
    return {purpose: derive(STUDY, f"dreamer {task}", seed, purpose) for purpose in purposes}


def platform(environment: Environment, job: Job, device: str) -> str:
    """JAX's name of the device: that of the job; with "auto", the CPU if DreamerV3's environment has no CUDA."""
    if job.device.type == "cpu":
        return "cpu"
    if device == "auto" and CUDA not in environment.packages:
        _log.info("DreamerV3 runs on the CPU: its environment was built without %s", CUDA)
        return "cpu"
    return "gpu"


def seen_conditions(settings: DreamerSettings) -> list[Condition]:
    """The conditions of evaluation; those that perturb images only where the agent sees images."""
    kinds = ("clean", "gravity") if settings.observation == "proprio" else ()
    return [each for each in conditions(settings) if not kinds or each.perturbation in kinds]


def renderer(environment: Environment, settings: DreamerSettings, folder: Path) -> str:
    """What MuJoCo is to render with, found out by trying; "disable" where nothing is rendered by it.

    Raises UserError if images are asked for and neither EGL nor OSMesa draws one.
    """
    simulated = [task for task in settings.tasks if task != "dummy"]
    if settings.observation == "proprio" or not simulated:
        return "disable"
    for name in RENDERERS:
        answer = ask(environment, dreamer_worker, {"task": simulated[0]}, folder, name)
        if answer["renders"]:
            _log.info("images are drawn with %s", name)
            return name
        _log.info("%s draws no image here (%s)", name, answer.get("reason", "it is blank"))
    raise UserError(
        "DreamerV3 is to see images, but neither EGL nor OSMesa can draw them here: install one of them (Debian, "
        "Ubuntu: apt install libegl1 libgl1-mesa-dri, or apt install libosmesa6), or set observation to proprio"
    )


def ask(
    environment: Environment,
    worker: ModuleType,
    task: Task,
    folder: Path,
    gl: str,
    progress: Callable[[dict[str, Any]], None] = lambda line: None,
) -> dict[str, Any]:
    """Have a worker do a task; its result.

    worker: the module that runs. folder: for its log and what it is asked. gl: what MuJoCo renders with. progress: gets
    what it says on the way. Raises UserError for what the worker says the user can mend, or if it was killed;
    RuntimeError, with the end of its log, for any other failure.
    """
    with _answers_of(environment, worker, task, folder, gl) as answers:
        for answer in answers:
            if answer["kind"] == "result":
                return answer
            progress(answer)
    raise AssertionError("a worker without a result has failed")


@contextmanager
def _answers_of(
    environment: Environment, worker: ModuleType, task: Task, folder: Path, gl: str
) -> Iterator[Iterator[dict[str, Any]]]:
    """The answers of a process that is started for a task and ended with the block, in whatever way."""
    folder.mkdir(parents=True, exist_ok=True)
    question, log = folder / "task.json", folder / "worker.log"
    question.write_text(json.dumps({**task, "ends_with_parent": True}), encoding="utf-8")
    command = [str(environment.python), "-m", worker.__name__, str(question)]
    with log.open("w", encoding="utf-8") as errors:
        variables = _variables(folder, task.get("platform", "cpu"), gl)
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            encoding="utf-8",
        )  # fmt: skip
    try:
        yield _answers(process, log)
    finally:
        process.kill()
        process.communicate()


def _answers(process: subprocess.Popen[str], log: Path) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        answer = json.loads(line)
        if answer["kind"] == "mistake":
            raise UserError(answer["sentence"])
        yield answer
    code = process.wait()
    if code < 0:
        raise UserError(
            f"DreamerV3's process was killed by signal {-code}, for example for want of memory; give the step more "
            "(key jobs), or make batch, length or size smaller"
        )
    last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:])
    raise RuntimeError(f"DreamerV3's process ended with status {code}:\n{last}")


def _variables(folder: Path, platform: str, gl: str) -> dict[str, str]:
    """Environment variables of the worker: one thread, sums in a repeatable order, and only our code on its path."""
    code = folder / "code"
    code.mkdir(exist_ok=True)
    link = code / "jacnorm"
    link.unlink(missing_ok=True)
    # A link, because the folder that holds the package may hold the main environment's other packages as well.
    link.symlink_to(Path(jacnorm.__file__).parent.absolute())
    kept: Mapping[str, str] = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "JAX_", "XLA_", "VIRTUAL_ENV"))
    }
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    return {
        **kept,
        **threads,
        "PYTHONPATH": str(code),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XLA_FLAGS": f"{flags} --xla_gpu_deterministic_ops=true" if platform == "gpu" else flags,
        "JAX_PLATFORMS": "cuda,cpu" if platform == "gpu" else "cpu",
        "MUJOCO_GL": gl,
    }
