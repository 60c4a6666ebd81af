"""Clear the way for a run: ``python -m jacnorm.unlock``, in the project's folder.

Snakemake locks its folder while it runs; killed outright, it leaves the lock and refuses to start again. Outputs appear
under their names only when complete, so going on is safe as soon as nothing else runs here. This module removes such a
lock, and refuses when a Snakemake still works in the folder. It sees the processes of this machine only.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from jacnorm.errors import UserError


def unlock(folder: Path) -> bool:
    """Remove the lock that an interrupted run left in `folder`; return whether there was one.

    Raises UserError if a Snakemake is still running there, or if it cannot be unlocked.
    """
    if not any((folder / ".snakemake" / "locks").glob("*")):
        return False
    running = snakemakes(folder)
    if running:
        raise UserError(
            f"a run is still going on in this folder (process {', '.join(map(str, running))}); "
            f"wait for it, or stop it with `kill {' '.join(map(str, running))}`, then try again"
        )
    done = subprocess.run([sys.executable, "-m", "snakemake", "--unlock"], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip()
        raise UserError(f"the lock of an interrupted run could not be removed with `snakemake --unlock`: {reason}")
    return True


def snakemakes(folder: Path) -> list[int]:
    """Process ids of the Snakemakes on this machine whose working directory is `folder`."""
    folder = folder.resolve()
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):  # what may not be read comes as None
        # The interpreter, then either a script or `-m`, then the module.
        words = [Path(word).name for word in (process.info["cmdline"] or [])[:3]]
        if "snakemake" in words and process.info["cwd"] and Path(process.info["cwd"]) == folder:
            found.append(process.pid)
    return found


def main() -> None:
    """Unlock the current folder and say so; exit with status 2 when a run is still going on."""
    try:
        if unlock(Path.cwd()):
            print("Going on after an interrupted run.", file=sys.stderr)
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
