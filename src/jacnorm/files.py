"""Files that travel between steps: written atomically, read back as they were.

Every writer goes through `atomic`, so a file under its final name is always whole: a killed job leaves at most a
hidden temporary file that the next run ignores.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jacnorm.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    import torch


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it to `path`.

    The temporary file has the suffix of `path`, so that writers which look at suffixes work. If the body raises,
    `path` stays as it was and the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # some writers make files that a group cannot read
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any, *, sort_keys: bool = True) -> None:
    """Write `value` as indented JSON; NaN and infinities are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file. Raises UserError if it is missing or not JSON."""
    with _in_words(path, "valid JSON", ValueError):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_yaml(path: Path | str) -> Any:
    """Read a YAML file. Raises UserError if it is missing, not YAML, or gives a key twice."""
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        """Plain YAML would keep the last of two equal keys and say nothing."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [str(self.construct_object(key, deep=True)) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    problem = f"key {key!r} is given {keys.count(key)} times"
                    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=UniqueKeys)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; correct its name or restore it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error})") from None
    except yaml.YAMLError as error:
        where = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
        raise UserError(f"{path} is not valid YAML: {where}") from None


@dataclass(frozen=True)
class Column:
    """What one column of a tidy table holds: its meaning and its unit ("" for names and pure numbers)."""

    meaning: str
    unit: str = ""


def write_table(path: Path | str, rows: pd.DataFrame, columns: Mapping[str, Column]) -> None:
    """Write a tidy Parquet table whose columns carry their meaning and unit as field metadata.

    The bytes depend on the rows only. Raises ValueError if `rows` and `columns` disagree about the columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if set(rows.columns) != set(columns):
        raise ValueError(
            f"{path}: undocumented columns {sorted(set(rows.columns) - set(columns))}, "
            f"missing columns {sorted(set(columns) - set(rows.columns))}"
        )
    table = pa.Table.from_pandas(rows[list(columns)], preserve_index=False)
    fields = [
        field.with_metadata({"meaning": columns[field.name].meaning, "unit": columns[field.name].unit})
        for field in table.schema
    ]
    with atomic(path) as temporary:
        pq.write_table(table.cast(pa.schema(fields)), temporary, compression="zstd")


def read_table(path: Path | str) -> pd.DataFrame:
    """Read one Parquet table. Raises UserError if it is missing or damaged."""
    import pandas as pd
    import pyarrow as pa

    with _in_words(path, "a readable Parquet table", pa.ArrowInvalid, OSError):
        return pd.read_parquet(path)


def read_columns(path: Path | str) -> dict[str, Column]:
    """Read the documentation of a table's columns back. Raises UserError as `read_table`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _in_words(path, "a readable Parquet table", pa.ArrowInvalid, OSError):
        schema = pq.read_schema(path)
    return {
        field.name: Column(
            (field.metadata or {}).get(b"meaning", b"").decode(), (field.metadata or {}).get(b"unit", b"").decode()
        )
        for field in schema
    }


def save_tensors(
    path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors and a flat string dictionary as safetensors."""
    from safetensors.torch import save

    # Not save_file: it writes through a temporary file of its own, which a killed job would leave for good.
    content = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, dict(metadata or {}))
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def read_metadata(path: Path | str) -> dict[str, str]:
    """The string dictionary of a safetensors file, without its tensors. Raises UserError as `load_tensors`."""
    with _opened(path, "numpy", "cpu") as file:
        return dict(file.metadata() or {})


def load_tensors(path: Path | str, device: str = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read tensors (memory-mapped on a CPU) and their metadata. Raises UserError if the file is missing or damaged."""
    with _opened(path, "pt", device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path | str, framework: str, device: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    with (
        _in_words(path, "a readable safetensors file", SafetensorError, OSError),
        safe_open(path, framework=framework, device=device) as file,
    ):
        yield file


@contextlib.contextmanager
def _in_words(path: Path | str, what: str, *damage: type[Exception]) -> Iterator[None]:
    """Say that `path` is missing or, for the `damage` kinds of error, that it is not `what`."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the step that makes it (snakemake {path})") from None
    except damage as error:
        raise UserError(f"{path} is not {what} ({error}); delete it and run again") from None
