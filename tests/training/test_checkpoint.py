from __future__ import annotations

import logging

import pytest
import torch

from jacnorm.errors import UserError
from jacnorm.files import save_tensors
from jacnorm.training.checkpoint import Checkpoint, discard, fingerprint, load, pack, save, sweep, unpack

TENSORS = {
    "float32": torch.tensor([1.0, float("nan"), -0.0]),
    "float64": torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "bfloat16": torch.tensor([1.5, 2.0], dtype=torch.bfloat16),
    "int64": torch.tensor([2**62, -1]),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "bytes": torch.Generator().manual_seed(1).get_state(),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.safetensors"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_what_is_loaded_is_what_was_saved(path):
    record = {"step": 3, "diverged": [None, 7], "text": "é"}
    save(path, Checkpoint(TENSORS, record), "f")
    found = load(path, "f")
    assert found.record == record
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert found.tensors[name].shape == tensor.shape
        assert torch.equal(bits(found.tensors[name]), bits(tensor))


def test_views_and_shared_storage_may_be_saved(path):
    whole = torch.arange(12.0).view(3, 4)
    save(path, Checkpoint({"whole": whole, "same": whole, "row": whole[1], "turned": whole.T}), "f")
    found = load(path, "f").tensors
    assert torch.equal(found["whole"], whole)
    assert torch.equal(found["same"], whole)
    assert torch.equal(found["row"], whole[1])
    assert torch.equal(found["turned"], whole.T)


def test_changing_loaded_tensors_leaves_the_file_alone(path):
    save(path, Checkpoint({"x": torch.ones(1000)}), "f")
    load(path, "f").tensors["x"].zero_()
    assert load(path, "f").tensors["x"].all()


def test_no_file_is_a_fresh_start(path):
    assert load(path, "f") is None


def test_a_checkpoint_of_other_settings_is_a_fresh_start_and_is_said_once(path, caplog):
    save(path, Checkpoint({}, {}), fingerprint({"lr": 0.1}, "code"))
    with caplog.at_level(logging.INFO):
        assert load(path, fingerprint({"lr": 0.2}, "code")) is None
        assert load(path, fingerprint({"lr": 0.1}, "other code")) is None
    assert [record.message for record in caplog.records] == [
        f"checkpoint {path} was written with other settings or code; training starts from the beginning"
    ] * 2


def test_fingerprints_count_content_and_not_order():
    assert fingerprint({"a": 1, "b": [1, 2]}, "c") == fingerprint({"b": [1, 2], "a": 1}, "c")
    assert fingerprint({"a": [1, 2]}, "c") != fingerprint({"a": [2, 1]}, "c")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign"])
def test_damaged_files_are_refused(path, damage):
    save(path, Checkpoint({"x": torch.ones(1000)}), "f")
    if damage == "foreign":
        save_tensors(path, {"x": torch.ones(3)})
    else:
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no" * 100}[damage])
    with pytest.raises(UserError, match=rf"^checkpoint {path} is damaged .* delete the file") as caught:
        load(path, "f")
    assert "\n" not in str(caught.value)


def test_discarding_removes_the_checkpoint_and_what_killed_writers_left(path):
    ours = [path.with_name(".checkpoint.123-0a1b2c3d.safetensors"), path]
    others = [
        path.with_name(name)
        for name in (
            ".checkpoint.b.123-0a1b2c3d.safetensors",
            "checkpoint.b.safetensors",
            ".checkpoint.note.safetensors",
        )
    ]
    for each in ours + others:
        each.touch()
    sweep(path)
    assert [each.exists() for each in ours] == [False, True]
    discard(path)
    assert sorted(path.parent.iterdir()) == sorted(others)
    discard(path)  # nothing left to discard is fine
    discard(path.parent / "no folder" / "checkpoint.safetensors")


def test_groups_come_back_apart():
    state, history = {"a": torch.ones(1), "b/c": torch.ones(2)}, {"a": torch.ones(3)}
    flat = pack(state=state, history=history)
    assert unpack(flat, "state") == state
    assert unpack(flat, "history") == history
