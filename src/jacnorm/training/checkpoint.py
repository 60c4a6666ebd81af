"""Checkpoints of a training job: one safetensors file with every tensor that changes and a JSON record.

A checkpoint is replaced atomically, so killing the job at any instant leaves either the last one or the new one whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jacnorm.errors import UserError
from jacnorm.files import load_tensors, save_tensors

FORMAT = 1
_KEY = "jacnorm-checkpoint"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors (on the CPU) and a JSON record of numbers and text."""

    tensors: dict[str, torch.Tensor]
    record: dict[str, Any] = field(default_factory=dict)


def fingerprint(settings: Any, code: str) -> str:
    """Digest of everything that decides a job's bits besides its random streams: settings, code and PyTorch's version.

    settings: anything JSON can hold (a pydantic model's ``model_dump(mode="json")``); name the device in it too. code:
    the digest of the step's code. Mappings count by content, whatever their order.
    """
    text = json.dumps({"settings": settings, "code": code, "torch": torch.__version__}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(path: Path | str, checkpoint: Checkpoint, fingerprint: str) -> None:
    """Replace `path` by `checkpoint`, all or nothing. Tensors on any device; views and shared storage are allowed."""
    record = {"format": FORMAT, "fingerprint": fingerprint, "record": checkpoint.record}
    # Copies, because safetensors refuses tensors that share memory, as a stack and a part of it do.
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in checkpoint.tensors.items()
    }
    save_tensors(path, tensors, {_KEY: json.dumps(record, sort_keys=True, allow_nan=False)})


def load(path: Path | str, fingerprint: str) -> Checkpoint | None:
    """Read `path`; None if there is none, or one of other settings or code (said in one logged sentence).

    Raises UserError if the file is damaged. Writing is atomic, so that takes a failing disk or another program: not
    something to pass over in silence by training again.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        tensors, metadata = load_tensors(path)
        stored = json.loads(metadata[_KEY])
        found, version, record = stored["fingerprint"], stored["format"], stored["record"]
    except (UserError, KeyError, TypeError, ValueError):
        raise UserError(
            f"checkpoint {path} is damaged or not a checkpoint, which a killed job cannot cause (it is written all or "
            "nothing): check the disk, then delete the file to train from the start"
        ) from None
    if version != FORMAT or found != fingerprint:
        _log.info("checkpoint %s was written with other settings or code; training starts from the beginning", path)
        return None
    return Checkpoint(tensors, record)


def discard(path: Path | str) -> None:
    """Delete a checkpoint and what killed writers left beside it; call it once the job's outputs are written."""
    path = Path(path)
    path.unlink(missing_ok=True)
    sweep(path)


def sweep(path: Path | str) -> None:
    """Delete the temporary files of writers of `path` that were killed."""
    path = Path(path)
    name = re.compile(rf"\.{re.escape(path.stem)}\.\d+-[0-9a-f]{{8}}{re.escape(path.suffix)}")
    for left in path.parent.iterdir() if path.parent.is_dir() else ():
        if name.fullmatch(left.name):
            left.unlink(missing_ok=True)


def pack(**groups: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put named groups of tensors into one flat mapping, "group/name"."""
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def unpack(tensors: Mapping[str, torch.Tensor], group: str) -> dict[str, torch.Tensor]:
    """One group of a mapping made by `pack`."""
    return {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.partition("/")[0] == group}
