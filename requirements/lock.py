"""Write the locks in this folder and environment.yml from pyproject.toml: `make lock`.

All extras are resolved together for every supported Python and platform, so that any of them can be installed side
by side. Each lock then holds exact versions with the hashes of every wheel: `build.txt` what builds packages (to be
installed first), `base.txt` all that the package itself needs, `<extra>.txt` what that extra adds. torch and the
libraries that only its CUDA build needs stay out, because the right wheel depends on the machine: `torch.txt` pins
its version, and pip fetches what that wheel asks for.

DreamerV3 lives in an environment of its own (see `jacnorm.environments`), resolved alone from `dreamerv3.in`:
`dreamerv3.txt`, and `dreamerv3-cuda.txt` with what a GPU needs on top.

Versions already locked are kept while they satisfy pyproject.toml; `python requirements/lock.py --upgrade` takes the
newest.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.markers import Marker

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = (("linux", "Linux", "x86_64"), ("linux", "Linux", "aarch64"), ("darwin", "Darwin", "arm64"))
# DreamerV3's JAX has no wheels for a later Python; what its package asks for and training does without stays out.
APART = ("3.11", "3.12")
WITHOUT = ("gym", "tensorflow-cpu", "crafter")
# torch itself, and what only its CUDA build asks for.
OF_TORCH = re.compile(r"torch|triton|(nvidia|cuda)-.*")

NOTE = "# Made by `make lock` from pyproject.toml; do not edit.\n"
ENVIRONMENT = """\
# The locked versions for conda users (made by `make lock`):
#     conda env create --file environment.yml && conda activate jacnorm && pip install --no-deps --editable .
name: jacnorm
channels:
  - conda-forge
dependencies:
  - python >=3.11,<3.14
  - pip
  - make
  - pip:
"""


def main() -> None:
    """Resolve once, then split the result into one file per extra."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions instead of the locked ones")
    upgrade = parser.parse_args().upgrade
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    builders = [re.match(r"[\w.-]+", requirement)[0] for requirement in project["build-system"]["requires"]]
    extras = sorted(project["project"]["optional-dependencies"])

    with tempfile.TemporaryDirectory() as folder:
        kept, together = Path(folder, "kept.txt"), Path(folder, "together.txt")
        files = [file for file in HERE.glob("*.txt") if not file.name.startswith("dreamerv3")]
        kept.write_text("" if upgrade else "\n".join(pin for file in files for pin in pins(file)))
        together.write_text(kept.read_text())  # uv prefers the versions it finds in its output file
        resolve("--all-extras", "--output-file", str(together))
        constraint = ("--constraint", str(together), "--generate-hashes")
        base = blocks(resolve(*constraint))
        added = {extra: blocks(resolve(*constraint, "--extra", extra)) for extra in extras}

    torch = base["torch"].partition(" ")[0]
    base = {name: block for name, block in base.items() if not OF_TORCH.fullmatch(name)}
    build = {name: base[name] for name in builders}  # torch asks for setuptools, so it is always there
    write("build.txt", NOTE + "".join(build.values()))
    write("torch.txt", NOTE + "# No hash: the wheel depends on the machine (CPU or CUDA build).\n" + torch + "\n")
    write("base.txt", NOTE + "".join(block for name, block in base.items() if name not in build))
    for extra, found in added.items():
        more = {name: b for name, b in found.items() if name not in base and not OF_TORCH.fullmatch(name)}
        write(f"{extra}.txt", NOTE + f"# What the extra `{extra}` adds to base.txt.\n" + "".join(more.values()))
    lock_apart(upgrade)
    lines = [torch, *(pin for block in base.values() for pin in block.splitlines() if "==" in pin)]
    (ROOT / "environment.yml").write_text(
        ENVIRONMENT + "".join(f"      - {quoted(line.removesuffix(chr(92)).strip())}\n" for line in lines)
    )


def lock_apart(upgrade: bool) -> None:
    """Write the locks of DreamerV3's environment."""
    with tempfile.TemporaryDirectory() as folder:
        without, kept = Path(folder, "without.txt"), Path(folder, "kept.txt")
        without.write_text("".join(f"{name} ; sys_platform == 'never'\n" for name in WITHOUT))
        locked: dict[str, str] = {}
        for name in ("dreamerv3", "dreamerv3-cuda"):
            # uv prefers the versions it finds in its output file; the second lock has to fit on top of the first.
            kept.write_text("" if upgrade else "\n".join(pins(HERE / f"{name}.txt")))
            base = Path(folder, "base.txt")
            fixed = [block.partition(" ")[0] for block in locked.values()]
            base.write_text("".join(f"{pin} ; python_version <= '{APART[-1]}'\n" for pin in fixed))
            options = ("--override", str(without), "--constraint", str(base), "--output-file", str(kept))
            resolve(*options, "--generate-hashes", source=f"{name}.in")
            found = {each: block for each, block in blocks(kept.read_text(), APART).items() if each not in locked}
            write(f"{name}.txt", NOTE.replace("pyproject.toml", f"{name}.in") + "".join(found.values()))
            locked |= found


def resolve(*options: str, source: str = "../pyproject.toml") -> str:
    """Run `uv pip compile` on a file for every supported Python and platform; return what it prints."""
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        str(HERE / source),
        "--quiet",
        "--no-header",
        "--no-annotate",
    ]
    command += ["--universal", "--python-version", PYTHONS[0], "--fork-strategy", "fewest", *options]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def blocks(text: str, pythons: tuple[str, ...] = PYTHONS) -> dict[str, str]:
    """Split a requirements file into package name -> its pins with their hashes, for the machines supported here."""
    found: dict[str, str] = {}
    for block in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]:
        pin, hashes = block.split(" \\\n", 1)
        requirement, _, marker = (part.strip() for part in pin.partition(" ; "))
        applies = [Marker(marker).evaluate(machine) for machine in machines(pythons)] if marker else [True]
        if any(applies):
            pin = requirement if all(applies) else f"{requirement} ; {marker}"
            name = requirement.partition("==")[0]
            found[name] = found.get(name, "") + f"{pin} \\\n{hashes}"
    return found


def machines(pythons: tuple[str, ...]) -> list[dict[str, str]]:
    """Marker variables of these Pythons on every supported platform."""
    return [
        {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "sys_platform": sys_platform,
            "platform_system": system,
            "platform_machine": machine,
            "os_name": "posix",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
        }
        for python in pythons
        for sys_platform, system, machine in PLATFORMS
    ]


def pins(file: Path) -> list[str]:
    """Return the `name==version` lines of a lock, without hashes."""
    return re.findall(r"^[a-z0-9].*?==.*?(?= *\\?$)", file.read_text(), flags=re.MULTILINE)


def quoted(pin: str) -> str:
    """Quote a pin with a marker for YAML."""
    return f'"{pin}"' if " " in pin else pin


def write(name: str, text: str) -> None:
    """Write one lock and say what it holds."""
    (HERE / name).write_text(text)
    print(f"requirements/{name}: {len(pins(HERE / name))} packages")


if __name__ == "__main__":
    main()
