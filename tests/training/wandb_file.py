"""Reads the file of an offline W&B run, of which W&B ships no reader in Python.

The file is a LevelDB log: a header, then blocks of 32 KiB holding chunks (CRC, length, kind, data); a record is one
whole chunk or a chain of first, middle and last ones, and holds a protobuf `Record` of wandb_internal.proto.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = b":W&B\xe1\xbe\x00"
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def payloads(data: bytes) -> Iterator[bytes]:
    """The records of a file, undecoded."""
    assert data.startswith(HEADER)
    position, chain = len(HEADER), b""
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:  # too little room for a chunk's header: the rest of the block is padding
            position += BLOCK - position % BLOCK
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        chain += data[position + 7 : position + 7 + length]
        position += 7 + length
        assert kind in (WHOLE, FIRST, MIDDLE, LAST)
        if kind in (WHOLE, LAST):
            yield chain
            chain = b""


@dataclass
class OfflineRun:
    """What a run's file says: the run record, its config, history and summary, its exit code and all of it as text."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    text: str = ""


def read(path: Path) -> OfflineRun:
    """Decode the file of one offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = OfflineRun()
    for payload in payloads(path.read_bytes()):
        record = Record.FromString(payload)
        found.text += str(record)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            found.history.append(_items(record.history.item))
        elif kind == "summary":
            found.summary |= _items(record.summary.update)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _items(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
