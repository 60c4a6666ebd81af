"""The hub's path, against a server on this machine that answers like the hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from tests.data.fake_hub import COMMIT, serve
from tests.data.tiny import arrays, encode, shard, tiny, write_mirror

from jacnorm.data import hub
from jacnorm.errors import UserError

CIFAR = tiny("cifar10")
REMEDY = "set mirror: in the configuration or JACNORM_MIRROR to a folder in the hub's layout"

# In a process of its own, because the libraries read the hub's address and their cache's place when they are imported.
PROGRAM = """
import json, sys
from jacnorm.data.sources import load
from jacnorm.errors import UserError
from tests.data.tiny import tiny
try:
    loaded = load(tiny(sys.argv[1]))
    print(json.dumps([loaded.label, loaded.source, loaded.revision, loaded.digest]))
except UserError as error:
    print(json.dumps(str(error)))
"""


def load_from(address: str, home: Path, cwd: Path, name: str = "cifar10", **environment: str) -> tuple[list | str, str]:
    """What a fresh process makes of the hub at `address`: (description of the data or the error's sentence, stderr)."""
    paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)
    variables = {**os.environ, "PYTHONPATH": paths, "HF_ENDPOINT": address, "HF_HOME": str(home), **environment}
    command = [sys.executable, "-c", PROGRAM, name]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout), done.stderr


def publish(folder: Path, name: str = "cifar10", form: str = "PNG", seed: int = 0) -> None:
    """A repository as on the hub: the Parquet files, and a card that lists them."""
    entry = tiny(name)
    write_mirror(folder, entry, arrays(entry, seed), form)
    files = "\n".join(f"  - split: {split}\n    path: {entry.hub.config}/{split}-*" for split in ("train", "test"))
    card = f"---\nconfigs:\n- config_name: {entry.hub.config}\n  data_files:\n{files}\n---\n"
    (folder / entry.hub.id / "README.md").write_text(card)


def test_hub_then_its_cache_give_what_the_mirror_gives(tmp_path):
    from jacnorm.data.sources import load

    publish(tmp_path / "hub")
    # A folder of the same name where the process runs must not be taken for the hub.
    publish(tmp_path / "work", seed=1)
    expected = load(CIFAR, tmp_path / "hub")
    description = ["CIFAR-10", "hub", COMMIT, expected.digest]
    with serve(tmp_path / "hub") as (address, _):
        assert load_from(address, tmp_path / "home", tmp_path / "work")[0] == description
    assert load_from(address, tmp_path / "home", tmp_path / "work")[0] == description


def test_jpeg_on_the_hub_changes_the_label(tmp_path):
    publish(tmp_path / "hub", form="JPEG")
    with serve(tmp_path / "hub") as (address, _):
        assert load_from(address, tmp_path / "home", tmp_path)[0][0] == "CIFAR-10 (JPEG)"


def test_damaged_file_on_the_hub(tmp_path):
    publish(tmp_path / "hub")
    path = shard(tmp_path / "hub", CIFAR, "train")
    path.write_bytes(path.read_bytes()[:-5000])
    with serve(tmp_path / "hub") as (address, _):
        message, _ = load_from(address, tmp_path / "home", tmp_path)
    assert message.startswith("CIFAR-10 (uoft-cs/cifar10) as it came from the Hugging Face hub cannot be read (")
    assert message.endswith(f"delete its folders in the cache {tmp_path / 'home'} and try again, or {REMEDY}")


def test_configuration_that_the_hub_no_longer_has(tmp_path):
    publish(tmp_path / "hub")
    card = tmp_path / "hub" / CIFAR.hub.id / "README.md"
    card.write_text(card.read_text().replace("config_name: plain_text", "config_name: renamed"))
    with serve(tmp_path / "hub") as (address, _):
        message, _ = load_from(address, tmp_path / "home", tmp_path)
    assert "cannot be read (ValueError: BuilderConfig 'plain_text' not found" in message


def test_without_network_and_mirror_one_request_then_both_remedies(tmp_path):
    with serve(None) as (address, requests):
        message, log = load_from(address, tmp_path / "home", tmp_path)
    assert requests.count("/api/datasets/uoft-cs/cifar10/revision/main") == 1
    assert not [path for path in requests if path.startswith("/datasets/")]
    assert "Retrying" not in log
    assert message.startswith("CIFAR-10 (uoft-cs/cifar10) cannot be fetched from the Hugging Face hub (")
    assert message.endswith(f"; connect this machine to the network, or {REMEDY}")


def test_unknown_host_and_offline_mode(tmp_path):
    # The domain .invalid never resolves (RFC 2606).
    for address, environment in [("http://hub.invalid", {}), ("http://127.0.0.1:9", {"HF_HUB_OFFLINE": "1"})]:
        message, log = load_from(address, tmp_path / "home", tmp_path, **environment)
        assert message.endswith(f"; connect this machine to the network, or {REMEDY}")
        assert "Retrying" not in log


def in_memory(columns: dict[str, list], split: str = "train") -> hub.Download:
    return hub.Download(CIFAR.hub, {split: datasets.Dataset.from_dict(columns)})


def test_rows_of_a_missing_split_or_column():
    with pytest.raises(UserError) as caught:
        next(in_memory({"img": [], "label": []}, "validation").rows("train"))
    assert (
        str(caught.value) == f'uoft-cs/cifar10 on the Hugging Face hub has no split "train", only validation; {REMEDY}'
    )
    with pytest.raises(UserError) as caught:
        next(in_memory({"img": [None], "fine": [1]}).rows("train"))
    assert (
        str(caught.value) == f'uoft-cs/cifar10 on the Hugging Face hub has no column "label", only img, fine; {REMEDY}'
    )


def test_revision_of_rows_without_a_cache_is_unknown():
    assert in_memory({"img": [], "label": []}).revision == ""


def test_offline_mode_is_restored():
    before = datasets.config.HF_HUB_OFFLINE
    seen = []

    def fail():
        with hub._offline():
            seen.append(datasets.config.HF_HUB_OFFLINE)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (seen, datasets.config.HF_HUB_OFFLINE) == ([True], before)


def test_rows_come_in_order_over_batches(monkeypatch):
    monkeypatch.setattr(hub, "BATCH_ROWS", 4)
    encoded = [{"bytes": encode(image), "path": None} for image in arrays(CIFAR)["train_x"]]
    images = datasets.Dataset.from_dict({"img": encoded, "label": list(range(23))})
    opened = hub.Download(CIFAR.hub, {"train": images.cast_column("img", datasets.Image())})
    batches = list(opened.rows("train"))
    assert [batch.rows[0] for batch in batches] == [0, 4, 8, 12, 16, 20]
    assert [label for batch in batches for label in batch.labels] == list(range(23))
    assert [image for batch in batches for image in batch.images] == [image["bytes"] for image in encoded]
