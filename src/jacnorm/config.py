"""The configuration of a run: ``configs/<scale>.yaml`` with the user's own keys on top, validated before any job."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from jacnorm.errors import UserError
from jacnorm.files import read_yaml
from jacnorm.settings import Count, Settings, setting, suggestion

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class Job(Settings):
    """What one job of a step asks of the machine."""

    mem_mb: Count = setting(2000, "memory", unit="MB")
    runtime: Count = setting(30, "time limit on a cluster", unit="minutes")
    gpu: int = setting(0, "GPUs", ge=0)


class Jobs(Settings):
    """Resources by step; they never cause a rerun."""

    data: Job = setting(Job(), "preparing a data set")
    train: Job = setting(Job(), "training")
    measure: Job = setting(Job(), "measuring")
    plot: Job = setting(Job(), "drawing figures")
    judge: Job = setting(Job(), "judging claims and writing the report")


class Machine(Settings):
    """Where and how the run happens."""

    scale: str = setting("smoke", "which configs/<scale>.yaml to start from")
    only: list[str] | None = setting(None, "studies to run and report; None takes all")
    results: str = setting("results", "folder of all outputs", min_length=1)
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "where training and measuring run; auto takes a GPU if there is one"
    )
    mirror: str | None = setting(
        None, "folder in the Hugging Face hub's layout to read data sets from instead of the network", private=True
    )
    text_path: str | None = setting(
        None, "UTF-8 text file of your own, for settings that name the data set text", private=True
    )
    photos_path: str | None = setting(
        None,
        "folder of photos (JPEG or PNG) to make the data set mnist_m with; None takes BSDS500 from the mirror",
        private=True,
    )
    wandb: Literal["offline", "online", "disabled"] = setting("offline", "Weights & Biases mode")
    jobs: Jobs = setting(Jobs(), "resources by step")
    studies: dict[str, dict[str, Any] | None] = setting({}, "settings of each study, validated by its own class")


@dataclass(frozen=True)
class Configuration:
    """A validated configuration: the machine's part and the settings of each study."""

    machine: Machine
    studies: dict[str, Settings]

    @property
    def selected(self) -> list[str]:
        """Studies to run and report."""
        return [study for study in self.studies if self.machine.only is None or study in self.machine.only]

    @property
    def data_sets(self) -> set[str]:
        """Names of the data sets that the selected studies read."""
        parts = [self.studies[study] for study in self.selected]
        experiments = (getattr(part, name) for part in parts for name in type(part).model_fields)
        return {name for settings in experiments if settings.seeds for name in data_sets(settings)}


def data_sets(settings: Settings) -> list[str]:
    """Names of the data sets that an experiment reads, in their order."""
    names = getattr(settings, "data_sets", [getattr(settings, "data_set", None)])
    return [name for name in names if name]


@cache
def study_names() -> list[str]:
    """Studies that exist: packages of ``jacnorm.studies`` with a settings module."""
    return sorted(path.parent.name for path in (Path(__file__).parent / "studies").glob("*/settings.py"))


def study_settings(study: str) -> type[Settings]:
    """The class ``StudySettings`` of a study."""
    return importlib.import_module(f"jacnorm.studies.{study}.settings").StudySettings


def load(folder: Path | str, overlay: Mapping[str, Any] | None = None) -> Configuration:
    """Read ``<folder>/<scale>.yaml``, lay `overlay` over it and validate the whole.

    In the overlay, mappings merge and everything else replaces. `scale` is taken from the overlay (default `smoke`).
    Raises UserError with one sentence that names the key's full path and what is allowed.
    """
    folder, overlay = Path(folder), dict(overlay or {})
    scale = str(overlay.get("scale", "smoke"))
    scales = sorted(path.stem for path in folder.glob("*.yaml"))
    if scale not in scales:
        raise UserError(
            f'configuration key "scale" is "{scale}", which is not a scale; choose one of {", ".join(scales)}'
        )
    machine = Machine.validate(_merge(read(folder / f"{scale}.yaml"), overlay, ""), "")
    for study in machine.studies:
        if study not in study_names():
            raise UserError(f'configuration key "studies.{study}" is unknown; {suggestion(study, study_names())}')
    for study in machine.only or []:
        if study not in study_names():
            raise UserError(
                f'configuration key "only" names the unknown study "{study}"; {suggestion(study, study_names())}'
            )
    return Configuration(
        machine,
        {
            study: study_settings(study).validate(machine.studies.get(study) or {}, f"studies.{study}")
            for study in study_names()
        },
    )


def reference() -> str:
    """Every key with its default, and its meaning and unit as a comment: the text of ``configs/smoke.yaml``."""
    opening = [
        "# Scale smoke: every study in minutes on two cores, without a network. These are the defaults, written by",
        "#   python -m jacnorm.config > configs/smoke.yaml",
        "# The other scales name only what they change, and so can you: make reproduce CONFIG=mine.yaml",
    ]
    lines = list(_lines(Machine(), 0, skip="studies"))
    lines.append("studies:")
    for study in study_names():
        lines += [f"  {study}:", *_lines(study_settings(study)(), 2)]
    return "\n".join([*opening, *lines]) + "\n"


def _lines(settings: Settings, depth: int, skip: str = "") -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if name == skip:
            continue
        yield f"{indent}# {field.description}"
        if isinstance(value, Settings):
            yield f"{indent}{name}:"
            yield from _lines(value, depth + 1)
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
            yield f"{indent}{name}: {text.removesuffix('...' + chr(10)).strip()}"


def read(path: Path) -> dict[str, Any]:
    """The mapping in a configuration file, {} if it is empty. Raises UserError naming the file."""
    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; it must be a mapping with keys such as studies")
    return content


def _merge(base: dict[str, Any], overlay: Mapping[str, Any], path: str) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overlay.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            value = _merge(old, value, f"{path}{key}.")
        elif isinstance(old, dict) and value is None:  # a heading whose keys are all commented out
            continue
        elif isinstance(old, dict):
            raise UserError(
                f'configuration key "{path}{key}" is {value!r}; it must be a mapping with keys such as {", ".join(old)}'
            )
        merged[key] = value if isinstance(value, str) and not path else _typed(value)
    return merged


def _typed(value: Any) -> Any:
    """Undo what `snakemake --config` does to values inside a mapping or a list: it hands numbers over as text.

    YAML itself reads 1e-3 as text too; here it is a number.
    """
    if isinstance(value, Mapping):
        return {key: _typed(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_typed(each) for each in value]
    if isinstance(value, str):
        if _EXPONENT.fullmatch(value):
            return float(value)
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            return value
        return parsed if parsed is None or isinstance(parsed, bool | int | float) else value
    return value


def main(file: Path | None = None, scale: str = "smoke", folder: bool = False) -> None:
    """Validate the configuration of a run; print every key with its default where neither option is given.

    Args:
        file: YAML file of the user's own settings.
        scale: scale that it is laid over.
        folder: print the folder of the results of this scale.

    """
    if file is None and not folder:
        print(reference(), end="")
        return
    machine = load("configs", {**(read(file) if file else {}), "scale": scale}).machine
    if folder:
        print(f"{machine.results}/{machine.scale}")


if __name__ == "__main__":
    from jacnorm.step import run

    run({"configuration": main})
