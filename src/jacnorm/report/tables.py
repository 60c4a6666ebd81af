"""The tables of a study, put together from the blocks that its jobs wrote.

A logical table `depth` lies in `depth.parquet`, or in seed blocks `depth-s10-14.parquet`, `depth-s15-19.parquet`
(first and last seed), so that new seeds add files and rewrite none.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jacnorm.errors import UserError
from jacnorm.files import Column, read_columns, read_table

if TYPE_CHECKING:
    import pandas as pd

_BLOCK = re.compile(r"^(?P<name>.+?)-s(?P<first>\d+)-(?P<last>\d+)$")


def read_tables(source: Path | str | Sequence[Path | str]) -> dict[str, pd.DataFrame]:
    """Name -> rows of every logical table in a folder, or in a list of files.

    Blocks follow one another in the order of their first seed. A step names its files, so that a block left over from
    an earlier list of seeds cannot slip in. Raises UserError if something is missing, two blocks share a seed, or the
    blocks of a table differ in columns.
    """
    return gather_tables(table_files(source) if isinstance(source, Path | str) else group_files(source))


def gather_tables(files: Mapping[str, Sequence[Path]]) -> dict[str, pd.DataFrame]:
    """Read and concatenate the files of each table, in the given order."""
    import pandas as pd

    tables: dict[str, pd.DataFrame] = {}
    for name, paths in files.items():
        blocks = [read_table(path) for path in paths]
        for path, block in zip(paths, blocks, strict=True):
            if list(block.columns) != list(blocks[0].columns):
                raise UserError(f"{path} has other columns than {paths[0].name}; delete it and run again")
        tables[name] = blocks[0] if len(blocks) == 1 else pd.concat(blocks, ignore_index=True)
    return tables


def table_files(folder: Path | str, names: Sequence[str] = ()) -> dict[str, list[Path]]:
    """Files of each logical table in `folder`: those called `names`, or all if none is named."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; run the measuring steps first")
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} does not exist; run the step that makes it (snakemake {folder / name})")
    return group_files([folder / name for name in names] or sorted(folder.glob("[!.]*.parquet")))


def group_files(files: Iterable[Path | str]) -> dict[str, list[Path]]:
    """Files of each logical table, blocks in order of their first seed; names in alphabetical order.

    Raises UserError if a table exists both whole and in blocks, or if two blocks share a seed.
    """
    found: dict[str, list[tuple[int, int, Path]]] = {}
    for path in map(Path, files):
        block = _BLOCK.match(path.stem)
        name, first, last = (block["name"], int(block["first"]), int(block["last"])) if block else (path.stem, -1, -1)
        found.setdefault(name, []).append((first, last, path))
    for name, blocks in found.items():
        blocks.sort(key=lambda block: block[:2])
        for (_, last, earlier), (first, _, later) in itertools.pairwise(blocks):
            clash = "share seeds" if earlier.stem != name else "are the whole table and a block of it"
            if first <= last or earlier.stem == name:
                raise UserError(f"{earlier} and {later.name} {clash}; delete the one that is out of date")
    return {name: [path for _, _, path in found[name]] for name in sorted(found)}


def table_columns(files: Sequence[Path]) -> dict[str, Column]:
    """Documentation of the columns of one logical table (all its blocks carry the same)."""
    return read_columns(files[0])
