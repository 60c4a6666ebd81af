"""A copy of the project in a folder of its own, and what Snakemake runs there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from jacnorm.config import study_names

ROOT = Path(__file__).parents[2]
TINY = "tiny.yaml"
# Every job's shell command ends with its log, which names step, experiment and seed block.
_JOB = re.compile(r"> \S+/logs/(\S+)\.log 2>&1$", re.MULTILINE)
_TOTAL = re.compile(r"^total +(\d+)$", re.MULTILINE)
_TARGETS = re.compile(rf"^(?:all|{'|'.join(study_names())}) +1$", re.MULTILINE)
_VARIABLES = ("JACNORM_", "SNAKEMAKE_", "WANDB_")


@dataclass(frozen=True)
class Project:
    """A copy of the project; jobs import the copy's own source."""

    folder: Path

    @classmethod
    def new(cls, folder: Path) -> Project:
        """What a clone holds of the workflow, without results."""
        folder.mkdir(parents=True)
        shutil.copy2(ROOT / "Snakefile", folder)
        shutil.copy2(Path(__file__).with_name(TINY), folder)
        for name in ("workflow", "configs", "requirements", "src"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        (folder / "profiles").symlink_to((ROOT / "profiles").readlink())
        return cls(folder)

    def copy(self, folder: Path) -> Project:
        """A copy with everything that was run, times of modification included."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Project(folder)

    @property
    def package(self) -> Path:
        return self.folder / "src" / "jacnorm"

    @property
    def study(self) -> Path:
        """Source of the study."""
        return self.package / "studies" / "stability"

    @property
    def results(self) -> Path:
        return self.folder / "results" / "tiny" / "smoke"

    @property
    def environment(self) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if not name.startswith(_VARIABLES)}
        return {**mine, "PYTHONPATH": str(self.folder / "src"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def command(self, *options: str, overlay: str | None = TINY) -> list[str]:
        """A plain call of Snakemake, which leaves everything else to the default profile."""
        configuration = ["--configfile", overlay] if overlay else []
        return [sys.executable, "-m", "snakemake", "--printshellcmds", *options, *configuration]

    def snakemake(self, *options: str, overlay: str | None = TINY) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*options, overlay=overlay),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def jobs(self, *options: str, overlay: str | None = TINY) -> set[str]:
        """Jobs that this call runs (or would run, with --dry-run), by the name of their log."""
        done = self.snakemake(*options, overlay=overlay)
        assert done.returncode == 0, done.stdout
        jobs = _JOB.findall(done.stdout)
        # The table that Snakemake prints first says how many there are, its target rules included.
        total = _TOTAL.search(done.stdout)
        count = int(total[1]) - len(_TARGETS.findall(done.stdout, 0, total.end())) if total else 0
        assert len(jobs) == len(set(jobs)) == count
        assert ("Nothing to be done" in done.stdout) == (not jobs)
        return set(jobs)

    def planned(self, *options: str, overlay: str | None = TINY) -> set[str]:
        """Jobs of a dry run."""
        return self.jobs("--dry-run", *options, overlay=overlay)

    def edit(self, path: Path | str, old: str, new: str) -> None:
        """Replace one piece of text, which must occur exactly once, in a file of the copy."""
        path = self.folder / path
        text = path.read_text()
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {path.name}"
        path.write_text(text.replace(old, new))

    def append(self, path: Path | str, text: str) -> None:
        """Add text to the end of a file of the copy."""
        with (self.folder / path).open("a") as file:
            file.write(text)

    def content(self) -> dict[str, bytes]:
        """Every file of the copy, without what Snakemake and Python keep for themselves."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in self.folder.rglob("*")
            if path.is_file() and not {".snakemake", "__pycache__"} & set(path.relative_to(self.folder).parts)
        }
