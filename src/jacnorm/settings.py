"""Settings: the typed options of a job, declared once.

The same class validates ``configs/*.yaml`` before any job starts, makes the command line of the step that uses it,
gives the defaults (the `smoke` scale) and fills the settings table of the report. Cheap to import: the Snakefile does.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Iterator
from typing import Annotated, Any, Self, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import core_schema

from jacnorm.errors import UserError


class Settings(BaseModel):
    """Base of all settings: unknown keys, wrong types and impossible values are refused; instances are immutable.

    A mistake raises UserError with one sentence. `validate` is for a part of a larger whole, whose keys have a path.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        # Around everything, the subclass's own checks included; a wrap validator would stand inside these.
        return core_schema.with_info_wrap_validator_function(cls._mistakes_in_words, handler(source))

    @classmethod
    def _mistakes_in_words(cls, values: Any, handler: Any, info: ValidationInfo) -> Any:
        try:
            return handler(values)
        except ValidationError as error:
            if info.context == _PART:
                raise
            raise UserError(explain(error, cls, 'setting "')) from None

    @classmethod
    def validate(cls, values: Any, path: str) -> Self:
        """Build settings from the mapping found at `path` of a configuration file; UserError names full paths."""
        try:
            return cls.model_validate(values, context=_PART)
        except ValidationError as error:
            raise UserError(explain(error, cls, f'configuration key "{path}{"." * bool(path)}')) from None

    def public(self) -> dict[str, Any]:
        """The values by name, as `model_dump`, for results and tracked runs: of a private path only its last part."""
        parts = {name: getattr(self, name) for name in type(self).model_fields}
        return self.model_dump() | {
            name: value.public() if isinstance(value, Settings) else _without_folders(value)
            for name, value in parts.items()
            if isinstance(value, Settings) or (isinstance(value, str) and _extra(type(self), name).get("private"))
        }


_PART = "part of a configuration"


def setting(default: Any, description: str, *, unit: str = "", private: bool = False, **limits: Any) -> Any:
    """Declare a field: its default at `smoke`, what it means, its unit and its limits (`ge`, `lt`, ...).

    A private value may be a path of the user's, which is not written into results.
    """
    with_unit = f"{description} [{unit}]" if unit else description
    extra = {"unit": unit, "meaning": description, "private": private}
    return Field(default, description=with_unit, json_schema_extra=extra, **limits)


def _without_folders(text: str) -> str:
    """The last part of a path; text that is none, such as an id on a hub, as it is.

    A path is absolute, begins with ``~`` or ``.``, or exists.
    """
    path = os.path.expanduser(text)
    if text.startswith(("~", ".")) or os.path.isabs(path) or os.path.exists(path):
        return os.path.basename(os.path.abspath(path))
    return text


def _extra(kind: type[Settings], name: str) -> dict[str, Any]:
    """What `setting` noted about a field."""
    extra = kind.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}


def _distinct(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError("values must be distinct")
    return values


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Sparsity = Annotated[float, Field(ge=0, lt=1)]
"""Fraction of weights removed."""
Distinct = AfterValidator(_distinct)
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), Distinct]


class SeededSettings(Settings):
    """Settings of an experiment that is repeated over seeds; blocks of seeds share a job."""

    seeds: Seeds = setting([10], "random seeds; pilots used 0-3, so judged runs use 10 and above")
    seeds_per_job: Count = setting(
        10,
        "seeds that share one job; a block starts at each multiple, so new seeds leave full blocks alone",
        unit="seeds",
    )

    def blocks(self) -> list[list[int]]:
        """Seeds of each job, in ascending order: those with equal ``seed // seeds_per_job`` travel together."""
        groups: dict[int, list[int]] = {}
        for seed in sorted(self.seeds):
            groups.setdefault(seed // self.seeds_per_job, []).append(seed)
        return list(groups.values())

    def block_names(self) -> list[str]:
        """``s<first>-<last>`` of each block, as in the names of its files."""
        return [f"s{block[0]}-{block[-1]}" for block in self.blocks()]

    def block(self, name: str) -> SeededSettings:
        """These settings for one block only."""
        for block in self.blocks():
            if name == f"s{block[0]}-{block[-1]}":
                return self.model_copy(update={"seeds": block})
        raise KeyError(f"no block {name}; there are {self.block_names()}")


def flags(settings: Settings, *, omit: tuple[str, ...] = ("seeds_per_job",)) -> str:
    """Command-line options that build `settings`: canonical, so that equal settings give equal text.

    `omit` names fields that only group jobs and never change what a job computes.
    """
    words: list[str] = []
    for name in type(settings).model_fields:
        if name in omit:
            continue
        value = getattr(settings, name)
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
            continue
        words.append(f"--{option}")
        words.extend(shlex.quote(str(item)) for item in (value if isinstance(value, list) else [value]))
    return " ".join(words)


def table(settings: Settings, prefix: str = "") -> Iterator[dict[str, str]]:
    """Rows (key, value, unit, description) of the settings table: public values, nested ones flattened with dots."""
    public = settings.public()
    for name in type(settings).model_fields:
        part, value = getattr(settings, name), public[name]
        if isinstance(part, Settings):
            yield from table(part, f"{prefix}{name}.")
        else:
            extra = _extra(type(settings), name)
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield {
                "key": f"{prefix}{name}",
                "value": text,
                "unit": str(extra.get("unit", "")),
                "description": str(extra.get("meaning", "")),
            }


def explain(error: ValidationError, model: type[BaseModel], opening: str) -> str:
    """One sentence per mistake: the key's full path after `opening`, what came and what is allowed."""
    return "; ".join(_sentence(mistake, model, opening) for mistake in error.errors())


def _sentence(mistake: dict[str, Any], model: type[BaseModel], opening: str) -> str:
    location = [str(part) for part in mistake["loc"]]
    key = f'{opening}{".".join(location)}"' if location else f'{opening.rstrip(".")}"'
    if mistake["type"] == "extra_forbidden":
        return f"{key} is unknown; {suggestion(location[-1], _fields(model, location[:-1]))}"
    if mistake["type"] == "missing":
        return f"{key} is missing; add it"
    reason = mistake["msg"].removeprefix("Value error, ")
    if isinstance(mistake["input"], dict):  # two of its keys do not fit together; the reason names them
        return reason if key.endswith('""') else f"{key}: {reason}"
    if mistake["type"] in ("model_type", "dict_type"):
        reason = "it must be a mapping of keys to values"
    return f"{key} is {mistake['input']!r}, which is not allowed: {reason[0].lower()}{reason[1:]}"


def suggestion(key: str, allowed: list[str]) -> str:
    """What to write instead of a `key` that does not exist."""
    near = difflib.get_close_matches(key, allowed, 1)
    return (f'did you mean "{near[0]}"? ' if near else "") + f"allowed here: {', '.join(allowed)}"


def _fields(model: type[BaseModel], location: list[str]) -> list[str]:
    """Names of the fields of the model that lies at `location` below `model`."""
    for part in location:
        annotation = model.model_fields[part].annotation
        while get_origin(annotation) is not None:
            annotation = get_args(annotation)[-1]
        model = annotation
    return list(model.model_fields)
