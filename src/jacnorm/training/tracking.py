"""One Weights & Biases run for each training or measuring job, which can never make the job fail.

The default is offline: the run is written to a folder, nothing is contacted, and `wandb sync <run folder>` uploads it
later. What is written names no user, host, path or key.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MODE_VARIABLE = "JACNORM_WANDB_MODE"
FOLDER_VARIABLE = "JACNORM_WANDB_DIR"
PROJECT = "jacnorm"
_MODES = ("offline", "online", "disabled")
# Variables of the user that an online run may need; all other WANDB_* ones would change what is recorded, and where.
_ONLINE_VARIABLES = frozenset(
    f"WANDB_{name}"
    for name in ("API_KEY", "BASE_URL", "CONFIG_DIR", "CREDENTIALS_FILE", "ENTITY", "IDENTITY_TOKEN_FILE")
)
_LOCAL_SECONDS = 60.0  # for W&B's own process on this machine, which a busy machine may start slowly
_IMAGES = (".png", ".jpg", ".jpeg")
_log = logging.getLogger(__name__)


class Tracker:
    """Takes the metrics, summary and figures of one job; without a run behind it, it takes them and does nothing."""

    def __init__(self, run: Any = None) -> None:
        self._run = run

    @property
    def active(self) -> bool:
        """Whether a W&B run is being written."""
        return self._run is not None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics by name at a step. Several loops of one job may count their steps from 0 each."""
        # `step` travels as a metric of its own: W&B's built-in counter drops whatever goes back in time.
        self._try(lambda run: run.log({**_scrub(metrics), "step": step}))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record final values by name."""
        self._try(lambda run: run.summary.update(_scrub(values)))

    def figure(self, name: str, path: Path | str) -> None:
        """Record a PNG or JPEG image under `name`."""

        def send(run: Any) -> None:
            import wandb

            if Path(path).suffix.lower() not in _IMAGES:
                raise ValueError(f"figure {Path(path).name} is not one of {', '.join(_IMAGES)}")
            run.log({name: wandb.Image(str(path))})

        self._try(send)

    def _try(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            _warn("recording stopped", error)
            self._run = None


@contextlib.contextmanager
def track(
    study: str,
    job_type: str,
    name: str,
    config: Mapping[str, Any],
    *,
    mode: str | None = None,
    folder: Path | str | None = None,
    timeout: float = 30.0,
) -> Iterator[Tracker]:
    """Record a job as a W&B run: project jacnorm, group `study`, job type `job_type` (the step), config = the settings.

    mode: offline, online or disabled; by default the variable JACNORM_WANDB_MODE, else offline. folder: where the
    run's folder goes; by default the variable JACNORM_WANDB_DIR, else ./wandb. They are environment variables because
    where a job is recorded must not decide whether it is run again.

    timeout: seconds to wait for W&B's servers at the start, and again at the end. If W&B is missing or does not
    answer, or the folder cannot be written, the job gets one warning and a tracker that does nothing; an online run
    that W&B does not take is recorded offline. Ends every other W&B run of this process, too.
    """
    mode = os.environ.get(MODE_VARIABLE, "offline") if mode is None else mode
    folder = Path(os.environ.get(FOLDER_VARIABLE, "wandb") if folder is None else folder)
    if mode not in _MODES:
        _log.warning('Weights & Biases: mode "%s" is unknown (%s); nothing is recorded', mode, ", ".join(_MODES))
        mode = "disabled"
    if mode == "disabled":
        yield Tracker()
        return
    # W&B's own logs name paths and users. The run is written to a private place, and what belongs to it moved over.
    with tempfile.TemporaryDirectory(prefix="jacnorm-wandb-", ignore_cleanup_errors=True) as scratch:
        tracker = Tracker()
        run = None
        try:
            _check_writable(folder)
            with _environment(mode, Path(scratch)):
                run = _start(study, job_type, name, config, mode, Path(scratch), timeout)
            tracker = Tracker(run)
        except Exception as error:
            _warn("nothing is recorded", error)
        code = 1
        try:
            yield tracker
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            raise
        finally:
            if run is not None:
                _finish(run, code, folder)


def _start(
    study: str, job_type: str, name: str, config: Mapping[str, Any], mode: str, scratch: Path, timeout: float
) -> Any:
    import wandb

    def start(mode: str) -> Any:
        seconds = timeout if mode == "online" else _LOCAL_SECONDS
        run = wandb.init(
            project=PROJECT, group=study, job_type=job_type, name=name, config=_scrub(config),
            settings=wandb.Settings(mode=mode, root_dir=str(scratch), **_quiet(seconds)),
        )  # fmt: skip
        run.define_metric("*", step_metric="step")
        return run

    if mode == "offline":
        return start(mode)
    try:
        return start(mode)
    except Exception as error:
        _warn("the online run is recorded offline (`wandb sync` uploads it later)", error)
        return start("offline")


def _quiet(timeout: float) -> dict[str, Any]:
    """Settings that keep names of people, machines, paths and code out of the run, and W&B off the terminal."""
    return {
        "silent": True,
        "console": "off",
        "symlink": False,
        "host": "",
        "username": "",
        "email": "",
        "program": "",
        "save_code": False,
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "label_disable": True,
        "x_disable_meta": True,
        "x_disable_stats": True,
        "x_disable_machine_info": True,
        "x_executable": "",
        "x_save_requirements": False,
        "reinit": "create_new",
        "init_timeout": timeout,
        "login_timeout": timeout,
        "finish_timeout": timeout,
        "finish_timeout_raises": True,
        "x_service_wait": _LOCAL_SECONDS,
    }


@contextlib.contextmanager
def _environment(mode: str, scratch: Path) -> Iterator[None]:
    """W&B's environment while it starts: no caches at home, no error reports and, offline, nothing of the user."""
    values: dict[str, str | None] = {
        name: None
        for name in os.environ
        if name.startswith("WANDB_") and (mode == "offline" or name not in _ONLINE_VARIABLES)
    }
    values |= {
        "WANDB_SERVICE": None,  # W&B sets it, and a job started by this one would take this job's service for its own
        "WANDB_CACHE_DIR": str(scratch / "cache"),
        "WANDB_DATA_DIR": str(scratch / "data"),
        "WANDB_ERROR_REPORTING": "false",
    }
    if mode == "offline":
        values["WANDB_CONFIG_DIR"] = str(scratch / "config")
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _check_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _finish(run: Any, code: int, folder: Path) -> None:
    """End the run and move its record and media, without W&B's logs, into `folder`."""
    import wandb

    try:
        run.finish(exit_code=code)
    except Exception as error:
        _warn("the run was not uploaded in time (`wandb sync` its folder later)", error)
    try:
        wandb.teardown(code)  # `finish` does not wait until the file is written to its end; this does
        source = Path(run.settings.sync_dir)
        part = folder / f".{source.name}"
        shutil.copytree(source, part, ignore=shutil.ignore_patterns("logs", "tmp"))
        part.replace(folder / source.name)
    except Exception as error:
        _warn("the run's record was lost", error)


def _scrub(value: Any) -> Any:
    """The same value with absolute paths cut to their last part: the rest names users and machines."""
    if isinstance(value, Mapping):
        return {str(key): _scrub(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_scrub(each) for each in value]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~")):
        return f".../{Path(value).name}"
    return value


def _warn(consequence: str, error: Exception) -> None:
    """One line; an error of W&B can hold a key or a path, so only its kind and first words without them are given."""
    text = " ".join(str(error).split())
    home = str(Path.home())
    secrets = [os.environ.get(name, "") for name in ("WANDB_API_KEY",)]
    for private in [home, *secrets]:
        if len(private) > 1:
            text = text.replace(private, "...")
    _log.warning("Weights & Biases: %s (%s: %s)", consequence, type(error).__name__, text[:200] or "no message")
