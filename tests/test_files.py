"""Files between steps: all or nothing, and read back as they were written."""

from __future__ import annotations

import json
import math
import os
import re
import threading

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jacnorm import files
from jacnorm.errors import UserError
from jacnorm.files import (
    Column,
    atomic,
    load_tensors,
    read_columns,
    read_json,
    read_metadata,
    read_table,
    save_tensors,
    write_json,
    write_table,
    write_text,
)

# --- atomic ----------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_and_nothing_else_stays(tmp_path):
    path = tmp_path / "new" / "folder" / "data.txt"
    with atomic(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".txt"
        assert temporary.name.startswith(".")
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", ["old", None])
def test_a_crash_leaves_what_was_there(tmp_path, error, before):
    path = tmp_path / "data.txt"
    if before is not None:
        path.write_text(before)

    def crash() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        crash()
    assert [p.name for p in tmp_path.iterdir()] == (["data.txt"] if before else [])
    if before is not None:
        assert path.read_text() == before


def test_a_body_that_writes_nothing_is_an_error_and_changes_nothing(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic(path):
        pass
    assert path.read_text() == "old"


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path = tmp_path / "data.txt"
    flushed = []
    monkeypatch.setattr(files, "_flush", lambda p: flushed.append((p.name, path.exists())))
    write_text(path, "x")
    (content, named_then), (folder, named_now) = flushed
    assert content.startswith(".data.")
    assert folder == tmp_path.name
    assert (named_then, named_now) == (False, True)


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    path = tmp_path / "data.txt"
    texts = [str(number) * 100_000 for number in range(8)]
    start = threading.Barrier(len(texts))
    seen = set()

    def write(text: str) -> None:
        start.wait()
        for _ in range(5):
            write_text(path, text)
            seen.add(path.read_text())

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen <= set(texts)
    assert len(seen) >= 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "x")
        save_tensors(tmp_path / "b.safetensors", {"x": torch.ones(1)})
        assert os.umask(mask) == mask  # left as it was
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_json_is_sorted_readable_and_unicode(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5], "a": "σ"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "σ",\n  "b": [\n    1,\n    2.5\n  ]\n}\n'
    assert read_json(path) == {"b": [1, 2.5], "a": "σ"}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(JSON)
def test_json_round_trip(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf]])
def test_json_refuses_what_json_does_not_have(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b'{"a": 1', b"", b"\xff\xfe"])
def test_damaged_json(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json is not valid JSON \(.*\); delete it and run again"):
        read_json(path)


# --- tables ----------------------------------------------------------------------------------------------------------

COLUMNS = {"seed": Column("random seed"), "norm": Column("größte Norm", "nat"), "name": Column("who")}


def rows(**changes) -> pd.DataFrame:
    return pd.DataFrame({"seed": [10, 11, 12], "norm": [0.5, -math.inf, math.nan], "name": ["a", "b", "c"], **changes})


def test_tables_keep_rows_types_and_meanings(tmp_path):
    path = tmp_path / "tables" / "t-s10-12.parquet"
    write_table(path, rows()[["name", "norm", "seed"]], COLUMNS)
    read = read_table(path)
    assert list(read.columns) == list(COLUMNS)  # in the order of their documentation
    pd.testing.assert_frame_equal(read, rows())
    assert read_columns(path) == COLUMNS


def test_equal_rows_give_equal_bytes_whatever_their_index(tmp_path):
    write_table(tmp_path / "a.parquet", rows(), COLUMNS)
    write_table(tmp_path / "b.parquet", rows().set_index(pd.Index([7, 8, 9])), COLUMNS)
    write_table(tmp_path / "c.parquet", rows(seed=[10, 11, 13]), COLUMNS)
    a, b, c = ((tmp_path / f"{name}.parquet").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (rows(extra=1), r"undocumented columns \['extra'\], missing columns \[\]"),
        (rows().drop(columns="name"), r"undocumented columns \[\], missing columns \['name'\]"),
    ],
)
def test_a_table_that_differs_from_its_documentation_is_refused(tmp_path, table, words):
    with pytest.raises(ValueError, match=words):
        write_table(tmp_path / "t.parquet", table, COLUMNS)
    assert list(tmp_path.iterdir()) == []


def test_columns_of_a_foreign_table_have_no_meaning(tmp_path):
    rows().to_parquet(tmp_path / "t.parquet")
    assert read_columns(tmp_path / "t.parquet") == {name: Column("") for name in COLUMNS}


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_tensors_keep_bits_types_and_metadata(tmp_path):
    path = tmp_path / "w.safetensors"
    tensors = {
        "weight": torch.arange(6.0).reshape(2, 3).T.requires_grad_(),  # not contiguous, with a graph
        "half": torch.tensor([1.5, math.nan], dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "count": torch.tensor(3),
    }
    save_tensors(path, tensors, {"step": "4", "name": "σ"})
    read, metadata = load_tensors(path)
    assert metadata == read_metadata(path) == {"step": "4", "name": "σ"}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert not read[name].requires_grad
        torch.testing.assert_close(read[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)


def test_tensors_without_metadata(tmp_path):
    save_tensors(tmp_path / "w.safetensors", {"x": torch.ones(2)})
    assert load_tensors(tmp_path / "w.safetensors")[1] == read_metadata(tmp_path / "w.safetensors") == {}


# --- what is missing or damaged --------------------------------------------------------------------------------------

READERS = {
    "json": (read_json, "valid JSON"),
    "table": (read_table, "a readable Parquet table"),
    "columns": (read_columns, "a readable Parquet table"),
    "tensors": (load_tensors, "a readable safetensors file"),
    "metadata": (read_metadata, "a readable safetensors file"),
}


def whole(path, kind: str) -> None:
    """Write a file of a kind that is large enough to be cut."""
    if kind == "json":
        path.write_text(json.dumps(list(range(100))))
    elif kind in ("table", "columns"):
        write_table(path, rows(), COLUMNS)
    else:
        save_tensors(path, {"x": torch.arange(100)})


@pytest.mark.parametrize("kind", READERS)
def test_a_missing_file_says_how_to_make_it(tmp_path, kind):
    path = tmp_path / "results" / "x.file"
    with pytest.raises(UserError) as caught:
        READERS[kind][0](path)
    assert str(caught.value) == f"{path} does not exist; run the step that makes it (snakemake {path})"


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("left", [0, 5, 0.5, 0.99])
def test_a_damaged_file_is_named(tmp_path, kind, left):
    path = tmp_path / "x.file"
    whole(path, kind)
    READERS[kind][0](path)
    size = path.stat().st_size
    os.truncate(path, left if isinstance(left, int) else int(left * size))
    with pytest.raises(UserError) as caught:
        READERS[kind][0](path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path} is not {READERS[kind][1]} (")
    assert sentence.endswith("; delete it and run again")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [1\n", "is not valid YAML: while parsing a flow sequence"),
        ("a: 1\nb: 2\na: 3\n", "is not valid YAML: key 'a' is given 2 times at line 1, column 1"),
    ],
)
def test_yaml_that_cannot_be_meant_is_refused(text, sentence, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{path} {sentence}")):
        files.read_yaml(path)
    with pytest.raises(UserError, match="does not exist; correct its name or restore it"):
        files.read_yaml(tmp_path / "none.yaml")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read as text"):
        files.read_yaml(path)


def test_yaml_is_read_as_it_stands(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("b: {c: [1, 2.5, x]}\na: null\n")
    assert files.read_yaml(path) == {"b": {"c": [1, 2.5, "x"]}, "a": None}
