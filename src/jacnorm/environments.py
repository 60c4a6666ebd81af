"""Step: a virtual environment of its own, built from a lock, for a program whose versions cannot live beside ours.

``python -m jacnorm.environments --lock requirements/dreamerv3.txt --out results/envs/dreamerv3/environment.json``

The environment stands beside that file, in a folder named after the lock's content, and appears there when complete:
a killed build leaves nothing that counts. The file names the interpreter in it, relative to itself, and is the same for
the same lock and Python. `read` finds the interpreter again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jacnorm import step
from jacnorm.errors import UserError
from jacnorm.files import read_json, write_json
from jacnorm.training.progress import step_logger

PYTHONS = ("3.12", "3.11")
"""Pythons that the locks of such environments are resolved for, the preferred one first."""
_UNREACHABLE = (
    "No matching distribution",
    "NewConnectionError",
    "NameResolutionError",
    "ReadTimeout",
    "ConnectTimeout",
    "Max retries",
    "HTTP error",
    "ProxyError",
    "SSLError",
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Environment:
    """An environment that was built."""

    python: Path
    """Its interpreter."""
    packages: dict[str, str]
    """Versions by name."""


def environment(lock: list[Path], out: Path) -> None:
    """Build a virtual environment with exactly the packages of one or more locks.

    Args:
        lock: files of `name==version` with hashes, as pip reads them; several are installed together.
        out: JSON file to write; the environment is built beside it.

    """
    step_logger()
    pins = [pin for file in lock for pin in read_lock(file)]
    python, version = interpreter()
    text = "\n".join([version, *(pin.text for pin in pins)])
    folder = out.parent.absolute() / f"venv-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove(out.parent.glob(".building-*"))  # of builds that were killed
    if not _python_of(folder).exists():
        _log.info("building an environment of %d packages with Python %s (minutes)", len(pins), version)
        _build(folder, python, pins)
    _remove(other for other in out.parent.glob("venv-*") if other.name != folder.name)  # of earlier locks
    write_json(
        out,
        {
            "interpreter": _python_of(folder).relative_to(out.parent.absolute()).as_posix(),
            "python": version,
            "packages": {pin.name: pin.version for pin in pins},
        },
    )


def read(path: Path) -> Environment:
    """The environment that a file of this step names. Raises UserError if the file or the environment is not there."""
    record = read_json(path)
    try:
        found = Environment(path.parent.absolute() / record["interpreter"], dict(record["packages"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} does not describe an environment; delete it and build it again") from None
    if not found.python.exists():  # also if it is a link to a Python that was removed
        raise UserError(f"{path} names an environment that is not there (any more); delete {path} and build it again")
    return found


@dataclass(frozen=True)
class Pin:
    """One package of a lock."""

    name: str
    version: str
    text: str
    """Its lines, with the hashes."""


def read_lock(path: Path) -> list[Pin]:
    """The packages of a lock. Raises UserError if it is missing, empty, or a package lacks its version or hash."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UserError(f"{path} cannot be read; name a lock such as requirements/dreamerv3.txt") from None
    text = "\n".join(line for line in lines if line.strip() and not line.startswith("#"))
    pins = []
    for block in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        if not block:
            continue
        match = re.match(r"([\w.-]+)==([\w.+!-]+)(?=[\s;\\]|$)", block)
        if match is None or "--hash=" not in block:
            raise UserError(
                f'{path}: "{block.splitlines()[0].rstrip(chr(92)).strip()}" has no exact version or no hash; '
                "write the lock with make lock"
            )
        pins.append(Pin(match[1], match[2], block.rstrip()))
    if not pins:
        raise UserError(f"{path} names no package; write the lock with make lock")
    return pins


def interpreter() -> tuple[str, str]:
    """A Python that the locks were made for and its version (3.11): the one that runs this, or one on the path.

    Raises UserError if there is none.
    """
    running = getattr(sys, "_base_executable", "") or sys.executable  # below any active environment
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    if ours in PYTHONS:
        return running, ours
    for version in PYTHONS:
        found = shutil.which(f"python{version}")
        if found and _answers(found, version):
            return found, version
    raise UserError(
        f"this environment needs Python {' or '.join(PYTHONS)}, and neither is on the path (this is {ours}): install "
        f"one of them (Debian, Ubuntu: apt install python{PYTHONS[-1]} python{PYTHONS[-1]}-venv)"
    )


def _answers(python: str, version: str) -> bool:
    """Whether a command is that Python; a version manager puts commands on the path that only say what is missing."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and answer.stdout.strip() == version


def _build(folder: Path, python: str, pins: Sequence[Pin]) -> None:
    """Make the environment beside its place and move it there; commands in its bin/ keep the first name, unused."""
    building = folder.with_name(f".building-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        made = subprocess.run([python, "-m", "venv", str(building)], capture_output=True, text=True, check=False)
        if made.returncode:
            raise UserError(
                f"{Path(python).name} cannot make a virtual environment; install its venv module (Debian, Ubuntu: "
                "apt install python3-venv)"
            )
        # What builds packages without a wheel has to be there before them.
        _install(building, [pin for pin in pins if pin.name == "setuptools"])
        _install(building, pins)
        building.replace(folder)
    finally:
        _remove([building])


def _install(building: Path, pins: Sequence[Pin]) -> None:
    if not pins:
        return
    lock = building / "lock.txt"
    lock.write_text("\n".join(pin.text for pin in pins) + "\n", encoding="utf-8")
    options = ["--no-deps", "--require-hashes", "--no-build-isolation", "--use-pep517"]
    command = [
        str(_python_of(building)),
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        "install",
        "--quiet",
    ]
    done = subprocess.run([*command, *options, "--requirement", str(lock)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(explain(done.stderr))


def explain(stderr: str) -> str:
    """One sentence for what pip printed when it failed."""
    errors = [line.removeprefix("ERROR:").strip() for line in stderr.splitlines() if line.startswith("ERROR:")]
    if any(word in stderr for word in _UNREACHABLE):
        return (
            "pip cannot reach a package registry that has the locked packages: connect to a network, or name a mirror "
            "with PIP_INDEX_URL or PIP_FIND_LINKS, and run again"
        )
    if "HASHES" in stderr or "hashes" in stderr:
        return (
            "a package differs from the one in the lock (its hash does not match): use another registry, or write the "
            "lock anew with make lock"
        )
    return f"pip could not install the lock: {errors[-1] if errors else 'it gave no reason'}"


def _python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the step from the command line."""
    step.run({"environment": environment}, arguments)


if __name__ == "__main__":
    main()
