"""Locks, environment.yml, set-up and the commands of the Makefile agree with one another and with pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
HASHED = ["build", "base", *EXTRAS]
APART = ["dreamerv3", "dreamerv3-cuda"]
"""Locks of environments of their own, which need not agree with ours."""


def pins(*names: str) -> list[str]:
    """Return the pins `name==version [; marker]` of some locks, read without the code that wrote them."""
    lines = [line for name in names for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines()]
    return [line.removesuffix("\\").strip() for line in lines if line and not line.startswith(("#", " "))]


def versions(*names: str) -> dict[str, str]:
    requirements = [Requirement(pin) for pin in pins(*names)]
    return {r.name: str(r.specifier).removeprefix("==") for r in requirements}


def lock_module():
    spec = importlib.util.spec_from_file_location("lock", ROOT / "requirements/lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [*HASHED, *APART])
def test_every_pin_is_exact_and_hashed(name):
    text = (ROOT / f"requirements/{name}.txt").read_text()
    blocks = re.split(r"^(?=[^ #\n])", text, flags=re.MULTILINE)[1:]
    assert blocks
    for block in blocks:
        assert re.match(r"[a-z0-9][a-z0-9-]*==[^ ]+( ; [^\\]+)? \\\n(    --hash=sha256:[0-9a-f]{64}( \\)?\n)+$", block)


def test_no_lock_names_an_index_a_path_or_torch():
    for file in [*(ROOT / "requirements").glob("*.txt"), ROOT / "environment.yml"]:
        assert not re.search(
            r"://|/|--(index|extra-index|find-links)|^-", re.sub(r"(?m)^ *#.*", "", file.read_text())
        ), file
    torch_needs = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.*")
    assert not [name for name in versions(*HASHED) if torch_needs.fullmatch(name)]
    assert pins("torch") == ["torch==2.13.0"]


def test_locks_satisfy_pyproject_and_one_another():
    assert sorted(path.stem for path in (ROOT / "requirements").glob("*.txt")) == sorted([*HASHED, *APART, "torch"])
    locked = versions(*HASHED, "torch")
    asked = [*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(locked[requirement.name]), requirement
    for name in HASHED:
        assert not {(n, v) for n, v in versions(name).items() if locked[n] != v}
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert requirement.name in versions("base", "torch")
    assert locked["snakemake"] == "9.27.1"


@pytest.mark.parametrize("name", APART)
def test_a_lock_apart_satisfies_what_is_asked_for_there(name):
    locked = versions("dreamerv3", name)
    lines = (ROOT / f"requirements/{name}.in").read_text().splitlines()
    asked = [Requirement(line.partition("#")[0]) for line in lines if line and not line.startswith(("#", "-"))]
    assert asked
    assert all(each.specifier.contains(locked[canonicalize_name(each.name)]) for each in asked)


def test_environment_yml_names_the_locked_versions():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    listed = next(entry["pip"] for entry in dependencies if isinstance(entry, dict))
    assert sorted(listed) == sorted(pins("torch", "build", "base"))
    python = next(entry for entry in dependencies if isinstance(entry, str) and entry.startswith("python "))
    assert python == f"python {PROJECT['requires-python']}"


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not running in the .venv that make sets up")
def test_the_environment_is_the_lock():
    installed = {canonicalize_name(d.metadata["Name"]): d.version for d in metadata.distributions()}
    applying = [r for r in map(Requirement, pins("build", "base", "dev")) if r.marker is None or r.marker.evaluate()]
    assert {r.name: str(r.specifier) for r in applying} == {r.name: f"=={installed.get(r.name)}" for r in applying}
    assert installed["torch"].partition("+")[0] == versions("torch")["torch"]


def test_markers_that_never_apply_here_drop_their_package_and_those_that_always_do_go():
    text = (
        "always==1 ; sys_platform == 'linux' or sys_platform == 'darwin' \\\n    --hash=sha256:a\n"
        "never==1 ; sys_platform == 'win32' \\\n    --hash=sha256:b\n"
        "plain==1 \\\n    --hash=sha256:c\n"
        "split==1 ; python_full_version < '3.12' \\\n    --hash=sha256:d\n"
        "split==2 ; python_full_version >= '3.12' \\\n    --hash=sha256:e\n"
    )
    assert lock_module().blocks(text) == {
        "always": "always==1 \\\n    --hash=sha256:a\n",
        "plain": "plain==1 \\\n    --hash=sha256:c\n",
        "split": "split==1 ; python_full_version < '3.12' \\\n    --hash=sha256:d\n"
        "split==2 ; python_full_version >= '3.12' \\\n    --hash=sha256:e\n",
    }


def test_one_version_everywhere():
    version = PROJECT["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == version


def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    with zipfile.ZipFile(next((tmp_path / "out").glob("jacnorm-*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if name.startswith("jacnorm/")}
    written = (path for path in (ROOT / "src/jacnorm").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert held == {str(path.relative_to(ROOT / "src")) for path in written}


def test_contracts_about_imports_forget_no_module():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    entries = (ROOT / "src/jacnorm").glob("[a-z]*")
    modules = {
        f"jacnorm.{entry.stem}" for entry in entries if entry.suffix == ".py" or (entry / "__init__.py").exists()
    }
    for contract in contracts:
        if contract["type"] == "forbidden" and contract["forbidden_modules"] != ["curvlinops"]:
            assert set(contract["source_modules"]) | set(contract["forbidden_modules"]) == modules, contract["name"]


# --- the Makefile -----------------------------------------------------------------------------------------------------


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_make_alone_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    listed = re.findall(r"^make (\S+)", make().stdout, re.MULTILINE)
    assert sorted(["help", *listed]) == sorted(targets)


def test_reproduce_hands_its_options_on():
    said = make("-n", "reproduce", "SCALE=laptop", "STUDY=stability", "CORES=8", "CONFIG=mine.yaml").stdout
    command = next(line for line in said.splitlines() if " snakemake " in line)
    assert "--cores 8 " in command
    assert "--config scale=laptop 'only=[stability]' --configfile mine.yaml " in command
    everything = next(line for line in make("-n", "reproduce").stdout.splitlines() if " snakemake " in line)
    assert "--config scale=smoke " in everything
    assert "--configfile" not in everything
    assert "only=" not in everything


@pytest.mark.parametrize("scale", ["..", "", "smoke/../.."])
def test_clean_deletes_results_of_a_scale_only(scale, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "results/paper").mkdir(parents=True)
    refused = make("clean", f"SCALE={scale}", cwd=tmp_path)
    assert refused.returncode == 2
    assert "is none of smoke, laptop, paper" in refused.stderr
    assert (tmp_path / "results/paper").is_dir()


def test_clean_leaves_the_other_scales(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in ("results/paper", "results/smoke", "src/__pycache__", "tests", "benchmarks"):
        (tmp_path / folder).mkdir(parents=True)
    assert make("clean", cwd=tmp_path).returncode == 0
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_dir())
    assert left == ["benchmarks", "results", "results/paper", "src", "tests"]


def test_the_environment_is_remade_when_a_lock_changes_and_not_when_it_is_touched(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")

    def stamp() -> str:
        return re.search(r"\.venv/\.ready-\d+", make("-n", "-B", "set-up", cwd=tmp_path).stdout)[0]

    first = stamp()
    (tmp_path / ".venv").mkdir()
    (tmp_path / first).touch()
    os.utime(tmp_path / "requirements/base.txt")
    assert stamp() == first
    assert make("-q", "set-up", cwd=tmp_path).returncode == 0  # nothing to do
    with (tmp_path / "requirements/dev.txt").open("a") as file:
        file.write("# changed\n")
    assert stamp() != first
    assert make("-q", "set-up", cwd=tmp_path).returncode == 1


# --- the set-up -------------------------------------------------------------------------------------------------------

# Answers the questions that install.sh asks of a Python, and writes down what pip is asked to do.
STUB = """#!/bin/sh
case "$*" in
    --version) echo "Python ${STUB_VERSION:-3.12.1}" ;;
    *"(3, 11)"*) [ "${STUB_VERSION:-3.12.1}" = 3.12.1 ] ;;
    *_base_executable*) echo "$STUB_PYTHON" ;;
    *ensurepip*) [ -z "${STUB_NO_VENV:-}" ] ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$STUB_PYTHON" .venv/bin/python ;;
    "-m pip "*) echo "$*" >> pip.log; [ ! -e offline ] ;;
    *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


@pytest.fixture
def install(tmp_path):
    """Run install.sh in an empty folder with a stub for Python."""
    stub = tmp_path / "bin/python3"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    (tmp_path / "project").mkdir()

    def run(*arguments: str, path: str = "/usr/bin:/bin", **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{stub.parent}:{path}", "STUB_PYTHON": str(stub), **variables}
        command = ["/bin/sh", str(ROOT / "requirements/install.sh"), ".venv/.ready", *arguments]
        return subprocess.run(command, cwd=tmp_path / "project", env=environment, capture_output=True, text=True)

    run.project = tmp_path / "project"
    return run


def test_set_up_installs_locked_packages_then_torch_then_the_project(install):
    done = install(TORCH_ARGS="--index-url there")
    assert done.returncode == 0, done.stderr
    assert (install.project / ".venv/.ready").exists()
    build, base, torch, project = [
        line.removeprefix("-m pip --disable-pip-version-check ")
        for line in (install.project / "pip.log").read_text().splitlines()
    ]
    assert "--no-deps --require-hashes" in build
    assert build.endswith("-r requirements/build.txt")
    assert "--no-deps --require-hashes" in base
    assert base.endswith("-r requirements/base.txt -r requirements/dev.txt")
    assert torch == "install --no-warn-conflicts --index-url there -r requirements/torch.txt"
    assert project == "install --quiet --no-deps --no-build-isolation --editable ."


def test_an_interrupted_set_up_is_done_again_from_the_start(install):
    (install.project / "offline").touch()
    assert install().returncode != 0
    assert not (install.project / ".venv/.ready").exists()
    (install.project / ".venv/half").touch()
    (install.project / "offline").unlink()
    assert install().returncode == 0
    assert (install.project / ".venv/.ready").exists()
    assert not (install.project / ".venv/half").exists()


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        ([], {"STUB_VERSION": "3.9.6"}, "no Python 3.11, 3.12 or 3.13 found (python3 is Python 3.9.6)"),
        (["python3"], {"STUB_VERSION": "3.14.0"}, "PYTHON=python3 is Python 3.14.0, but 3.11, 3.12 or 3.13 is needed"),
        (["nowhere"], {}, "PYTHON=nowhere is not a command here"),
        ([], {"STUB_NO_VENV": "1"}, "its venv module is missing; install one (Debian, Ubuntu: apt install"),
    ],
)
def test_set_up_says_what_is_missing(install, arguments, variables, sentence):
    refused = install(*arguments, path="/nowhere", **variables)
    assert refused.returncode == 2
    assert sentence in refused.stderr
    assert refused.stderr.startswith("ERROR: ")
    assert refused.stderr.count("\n") == 1
    assert not (install.project / ".venv").exists()


# --- what people read -------------------------------------------------------------------------------------------------


def test_the_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(re.findall(r"\bmake ([a-z][a-z-]+)\b", text)) <= set(targets)
    assert {"reproduce", "test"} <= set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE))


def test_the_readme_lists_the_studies_that_exist_as_here():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (here|planned) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 7
    existing = {path.parent.name for path in (ROOT / "src/jacnorm/studies").glob("*/claims.yaml")}
    assert {study for study, status in rows if status == "here"} == existing
