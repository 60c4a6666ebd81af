"""Which code, libraries and machine made a report: never a host name, a user name or an absolute path."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

LIBRARIES = (
    "torch",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "scikit-learn",
    "curvlinops-for-pytorch",
    "safetensors",
    "datasets",
    "matplotlib",
    "snakemake",
    "wandb",
)


def provenance() -> dict[str, str]:
    """Label -> value, in the order in which a reader wants them. Unknown things say so."""
    return {
        "Code": git_commit(Path(__file__).parent),
        "Written": written(),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "Libraries": libraries(),
        "System": f"{platform.system()} {platform.machine()}",
        "Processor": processor(),
        "Memory": memory(),
        "GPU": gpu(),
    }


def git_commit(folder: Path) -> str:
    """Commit of the checkout that holds `folder`, and whether tracked files differ from it."""
    commit = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if not commit:
        return "not a git checkout with a commit"
    changed = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return f"commit {commit}" + (" with uncommitted changes" if changed else "")


def written() -> str:
    """UTC time to the minute, or that of SOURCE_DATE_EPOCH where a builder sets it."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.fromtimestamp(int(epoch), UTC) if epoch and epoch.isdigit() else datetime.now(UTC)
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def libraries() -> str:
    """Installed versions of the libraries that enter the numbers."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def processor() -> str:
    """Model and number of logical cores."""
    import psutil

    model = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    elif shutil.which("sysctl"):
        model = _output(["sysctl", "-n", "machdep.cpu.brand_string"])
    cores = psutil.cpu_count() or 0
    return f"{model or platform.machine() or 'unknown'}, {cores} logical core{'' if cores == 1 else 's'}"


def memory() -> str:
    """Installed memory."""
    import psutil

    return f"{psutil.virtual_memory().total / 2**30:.1f} GiB"


def gpu() -> str:
    """Names, memory and driver of NVIDIA GPUs, or "none found"."""
    if not shutil.which("nvidia-smi"):
        return "none found"
    query = "--query-gpu=name,memory.total,driver_version"
    lines = _output(["nvidia-smi", query, "--format=csv,noheader"]).splitlines()
    return (
        "; ".join(f"{name.strip()}, {size.strip()}, driver {driver.strip()}" for name, size, driver in _triples(lines))
        or "none found"
    )


def _triples(lines: list[str]) -> list[list[str]]:
    return [parts for line in lines if len(parts := line.split(",")) == 3]


def _output(command: list[str]) -> str:
    """What a command prints, or nothing if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
