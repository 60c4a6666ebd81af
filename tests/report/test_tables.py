"""Tables in blocks of seeds come back as one, in order, and never with a block too many."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from jacnorm.errors import UserError
from jacnorm.files import Column, write_table
from jacnorm.report.tables import group_files, read_tables, table_columns, table_files

COLUMNS = {"seed": Column("seed"), "value": Column("a number", "nats")}


def block(folder: Path, name: str, seeds: range) -> Path:
    path = folder / f"{name}.parquet"
    write_table(path, pd.DataFrame({"seed": list(seeds), "value": [float(s) for s in seeds]}), COLUMNS)
    return path


def test_blocks_follow_their_first_seed(tmp_path: Path) -> None:
    for name, seeds in (("depth-s100-101", range(100, 102)), ("depth-s9-10", range(9, 11)), ("limit", range(2))):
        block(tmp_path, name, seeds)
    tables = read_tables(tmp_path)
    assert list(tables) == ["depth", "limit"]
    assert tables["depth"]["seed"].tolist() == [9, 10, 100, 101]
    assert tables["depth"].index.tolist() == [0, 1, 2, 3]
    assert table_columns(table_files(tmp_path)["depth"]) == COLUMNS


def test_named_files_leave_out_the_rest(tmp_path: Path) -> None:
    block(tmp_path, "depth-s10-11", range(10, 12))
    new = block(tmp_path, "depth-s10-14", range(10, 15))
    with pytest.raises(UserError, match=r"depth-s10-11.parquet and depth-s10-14.parquet share seeds; delete"):
        read_tables(tmp_path)
    assert len(read_tables([new])["depth"]) == 5
    assert table_files(tmp_path, ["depth-s10-14.parquet"]) == {"depth": [new]}


def test_a_table_is_whole_or_in_blocks(tmp_path: Path) -> None:
    paths = [block(tmp_path, "depth", range(3)), block(tmp_path, "depth-s3-4", range(3, 5))]
    with pytest.raises(UserError, match="are the whole table and a block of it; delete the one that is out of date"):
        group_files(paths)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tables does not exist; run the measuring steps first"):
        read_tables(tmp_path / "tables")
    with pytest.raises(UserError, match=r"gone\.parquet does not exist; run the step that makes it"):
        table_files(tmp_path, ["gone.parquet"])


def test_blocks_agree_about_columns(tmp_path: Path) -> None:
    block(tmp_path, "depth-s0-1", range(2))
    write_table(tmp_path / "depth-s2-3.parquet", pd.DataFrame({"seed": [2]}), {"seed": Column("seed")})
    with pytest.raises(UserError, match=r"depth-s2-3.parquet has other columns than depth-s0-1.parquet"):
        read_tables(tmp_path)


def test_unfinished_files_are_not_tables(tmp_path: Path) -> None:
    block(tmp_path, "depth", range(2))
    (tmp_path / ".depth.123-ab.parquet").write_bytes(b"half")
    assert list(read_tables(tmp_path)) == ["depth"]
