"""Rows of a data set from a local mirror: a folder laid out as on the Hugging Face hub.

The Parquet files are read where they lie. Nothing is written: not into the mirror, nor into any cache.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jacnorm.data.catalogue import Dataset, Hub
from jacnorm.data.images import Batch
from jacnorm.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

VARIABLE = "JACNORM_MIRROR"
BATCH_ROWS = 1000
_REPLACE = "replace it with a fresh copy"


def folder(mirror: Path | str | None = None) -> Path | None:
    """The mirror to use: the argument, else the environment variable JACNORM_MIRROR, else None; "" counts as none."""
    chosen = str(mirror or "") or os.environ.get(VARIABLE, "")
    return Path(chosen).expanduser() if chosen else None


def rows(dataset: Dataset, split: str, mirror: Path) -> Iterator[Batch]:
    """Yield the rows of one split, shard after shard, in stored order.

    Raises UserError naming the path that is expected and missing, or the file that is damaged.
    """
    for path in shards(dataset.hub, split, mirror):
        yield from _read(path, dataset.hub)


def shards(hub: Hub, split: str, mirror: Path) -> list[Path]:
    """The Parquet files of a split: ``<mirror>/<id>/<folder>/<split>-<k>-of-<n>.parquet`` for k = 0 .. n-1."""
    parent = mirror / hub.id / hub.folder
    pattern = re.compile(rf"{re.escape(split)}-\d{{5}}-of-(\d{{5}})\.parquet")
    try:
        names = [entry.name for entry in parent.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise UserError(f"{parent} cannot be listed ({error.strerror}); make it readable") from error
    totals = {int(match[1]) for name in names if (match := pattern.fullmatch(name))}
    if len(totals) > 1:
        raise UserError(
            f"{parent} holds several sets of {split} files, cut into {' and '.join(map(str, sorted(totals)))} parts; "
            "keep one of them"
        )
    total = max(totals, default=1)
    paths = [parent / f"{split}-{part:05d}-of-{total:05d}.parquet" for part in range(total)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing from the mirror; copy it there from {hub.id} on the Hugging Face hub")
    return paths


def _read(path: Path, hub: Hub) -> Iterator[Batch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_columns(file.schema_arrow, hub, path)
            first = 0
            columns = [f"{hub.image}.bytes", hub.label, *(hub.only or ())[:1]]
            for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                yield to_batch(batch, hub, str(path), first)
                first += batch.num_rows
    # ValueError: names or text that are no longer UTF-8.
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"{path} is not a whole Parquet file ({reason}); {_REPLACE}") from error


def _check_columns(schema: pa.Schema, hub: Hub, path: Path) -> None:
    import pyarrow.types as kinds

    image = schema.field(hub.image).type if hub.image in schema.names else None
    if image is None or not kinds.is_struct(image) or image.get_field_index("bytes") < 0:
        raise UserError(f'{path} has no column "{hub.image}" of encoded images ({{bytes, path}}); {_REPLACE}')
    for name in (hub.label, *(hub.only or ())[:1]):
        if name not in schema.names or not kinds.is_integer(schema.field(name).type):
            raise UserError(f'{path} has no column "{name}" of integers; {_REPLACE}')


def to_batch(batch: pa.RecordBatch | pa.Table, hub: Hub, where: str, first_row: int) -> Batch:
    """Take the image bytes and the labels out of Arrow rows, of those rows that belong to the data set."""
    numbers: Sequence[int] = range(first_row, first_row + batch.num_rows)
    if hub.only is not None:
        import pyarrow as pa

        column, value = hub.only
        kept = [place for place, found in enumerate(batch.column(column).to_pylist()) if found == value]
        batch, numbers = batch.take(pa.array(kept, pa.int64())), [numbers[place] for place in kept]
    images = [None if image is None else image["bytes"] for image in batch.column(hub.image).to_pylist()]
    return Batch(images, batch.column(hub.label).to_pylist(), where, numbers)
