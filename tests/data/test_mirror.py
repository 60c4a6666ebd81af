import os
import subprocess
import sys
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.tiny import arrays, encode, shard, tiny, write_mirror, write_shard

from jacnorm.data import mirror as mirrors
from jacnorm.data.digests import idx_md5
from jacnorm.data.sources import load
from jacnorm.errors import UserError

MNIST, CIFAR = tiny("mnist"), tiny("cifar10")


@pytest.fixture(params=["mnist", "cifar10", "cifar100", "fashion_mnist"])
def entry(request):
    return tiny(request.param)


@pytest.fixture
def mirror(tmp_path):
    """A sound mirror of the tiny MNIST and CIFAR-10."""
    for dataset in (MNIST, CIFAR):
        write_mirror(tmp_path, dataset, arrays(dataset))
    return tmp_path


def refusal(dataset, place) -> str:
    with pytest.raises(UserError) as caught:
        load(dataset, place)
    return str(caught.value)


def test_png_comes_back_exactly(entry, tmp_path):
    made = arrays(entry)
    write_mirror(tmp_path, entry, made)
    loaded = load(entry, tmp_path)
    assert (loaded.label, loaded.source, loaded.revision) == (entry.label, "mirror", "")
    assert loaded.arrays.keys() == made.keys()
    for name, array in made.items():
        np.testing.assert_array_equal(loaded.arrays[name], array)
        assert loaded.arrays[name].dtype == array.dtype


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, 23), max_size=4).map(sorted))
def test_cutting_into_shards_changes_nothing(cuts, tmp_path_factory):
    place = tmp_path_factory.mktemp("mirror")
    write_mirror(place, MNIST, arrays(MNIST), cuts=tuple(cuts))
    loaded = load(MNIST, place)
    np.testing.assert_array_equal(loaded.arrays["train_x"], arrays(MNIST)["train_x"])
    assert len(mirrors.shards(MNIST.hub, "train", place)) == len(cuts) + 1


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_same_arrays_as_the_datasets_library(entry, form, tmp_path):
    """Independent oracle: `datasets` finds, reads and decodes the folder by its own means."""
    write_mirror(tmp_path / "mirror", entry, arrays(entry), form)
    folder = str(tmp_path / "mirror" / entry.hub.id)
    theirs = datasets.load_dataset(folder, cache_dir=str(tmp_path / "cache"))
    ours = load(entry, tmp_path / "mirror").arrays
    for split in ("train", "test"):
        x = np.stack([np.asarray(image).reshape(*entry.shape[1:], -1) for image in theirs[split][entry.hub.image]])
        np.testing.assert_array_equal(ours[f"{split}_x"], x.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(ours[f"{split}_y"], theirs[split][entry.hub.label])


@pytest.mark.parametrize("where", ["train_x", "test_x"])
def test_one_jpeg_image_is_enough_to_change_the_label(where, tmp_path):
    made = arrays(CIFAR)
    write_mirror(tmp_path, CIFAR, made)
    split = where.removesuffix("_x")
    images = [encode(image) for image in made[where]]
    images[3] = encode(made[where][3], "JPEG")
    write_shard(shard(tmp_path, CIFAR, split), CIFAR, images, made[f"{split}_y"].tolist())
    assert load(CIFAR, tmp_path).label == "CIFAR-10 (JPEG)"


def test_mirror_named_by_argument_or_environment(mirror, monkeypatch):
    monkeypatch.setenv("JACNORM_MIRROR", str(mirror))
    assert load(MNIST).source == "mirror"
    assert mirrors.folder("") == mirror
    assert mirrors.folder("elsewhere").name == "elsewhere"
    monkeypatch.setenv("JACNORM_MIRROR", "")
    assert mirrors.folder() is None


def test_nothing_is_written_into_the_mirror(mirror):
    def snapshot():
        return {path: path.stat().st_mtime_ns for path in mirror.rglob("*")}

    before = snapshot()
    load(CIFAR, mirror)
    assert snapshot() == before


def test_missing_shard_is_named(mirror):
    first = shard(mirror, MNIST, "test")
    second = shard(mirror, MNIST, "test", 1, 2)
    first.rename(shard(mirror, MNIST, "test", 0, 2))
    assert refusal(MNIST, mirror) == (
        f"{second} is missing from the mirror; copy it there from ylecun/mnist on the Hugging Face hub"
    )


@pytest.mark.parametrize("place", ["", "nowhere"])
def test_missing_folder_names_the_path_expected(place, tmp_path):
    expected = tmp_path / place / "uoft-cs" / "cifar10" / "plain_text" / "train-00000-of-00001.parquet"
    assert refusal(CIFAR, tmp_path / place).startswith(f"{expected} is missing from the mirror; ")


def test_two_sets_of_shards_are_refused(mirror):
    source = shard(mirror, MNIST, "train")
    shard(mirror, MNIST, "train", 1, 2).write_bytes(source.read_bytes())
    assert (
        refusal(MNIST, mirror)
        == f"{source.parent} holds several sets of train files, cut into 1 and 2 parts; keep one of them"
    )


def test_unreadable_folder(mirror, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(mirror), "iterdir", refuse)
    folder = shard(mirror, MNIST, "train").parent
    assert refusal(MNIST, mirror) == f"{folder} cannot be listed (Permission denied); make it readable"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncated_file_is_named(mirror, data):
    path = shard(mirror, CIFAR, "test")
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        message = refusal(CIFAR, mirror)
    finally:
        path.write_bytes(whole)
    assert message.startswith(f"{path} is not a whole Parquet file (")
    assert message.endswith("; replace it with a fresh copy")
    assert "\n" not in message


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_a_sentence_that_names_the_file_or_changes_no_pixel(mirror, data):
    path = shard(mirror, CIFAR, "test")
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    message, x = "", None
    try:
        path.write_bytes(damaged)
        x = load(CIFAR, mirror).arrays["test_x"]
    except UserError as error:
        message = str(error)
    finally:
        path.write_bytes(whole)
    assert str(path) in message or np.array_equal(x, arrays(CIFAR)["test_x"])


def test_names_that_are_no_text_are_damage(mirror):
    path = shard(mirror, CIFAR, "train")
    path.write_bytes(path.read_bytes().replace(b"label", b"\xffabel"))
    assert refusal(CIFAR, mirror).startswith(f"{path} is not a whole Parquet file (")


def rewrite(mirror, dataset, position, image=None, label=None):
    """Replace one image or label of the training shard."""
    made = arrays(dataset)
    images, labels = [encode(picture) for picture in made["train_x"]], made["train_y"].tolist()
    images[position] = images[position] if image is None else image(images[position])
    labels[position] = labels[position] if label is None else label
    write_shard(shard(mirror, dataset, "train"), dataset, images, labels)
    return f"{shard(mirror, dataset, 'train')}, row {position}: "


@pytest.mark.parametrize("spoil", [lambda data: data[:-40], lambda data: b"", lambda data: b"GIF89a" + data])
def test_undecodable_image_names_file_and_row(mirror, spoil):
    where = rewrite(mirror, MNIST, 17, image=spoil)
    message = refusal(MNIST, mirror)
    assert message.startswith(f"{where}the image cannot be decoded (")
    assert "0x" not in message


def test_rows_are_counted_over_batches(mirror, monkeypatch):
    monkeypatch.setattr(mirrors, "BATCH_ROWS", 4)
    where = rewrite(mirror, MNIST, 17, image=lambda _: b"")
    assert refusal(MNIST, mirror).startswith(where)


def test_other_image_formats_are_refused(mirror):
    where = rewrite(mirror, MNIST, 5, image=lambda _: encode(arrays(MNIST)["train_x"][5], "BMP"))
    assert refusal(MNIST, mirror).startswith(f"{where}the image cannot be decoded (")


def test_missing_image_names_file_and_row(mirror):
    where = rewrite(mirror, MNIST, 2)
    table = pq.read_table(shard(mirror, MNIST, "train"))
    images = table["image"].to_pylist()
    for none in ({"bytes": None, "path": "2.png"}, None):
        images[2] = none
        table = table.set_column(0, "image", pa.array(images, table.schema.field("image").type))
        pq.write_table(table, shard(mirror, MNIST, "train"))
        assert refusal(MNIST, mirror) == f"{where}the image is missing; replace the file with a fresh copy"


@pytest.mark.parametrize("shape", [(1, 28, 27), (3, 28, 28)])
def test_wrong_size_or_mode_names_file_and_row(mirror, shape):
    where = rewrite(mirror, MNIST, 22, image=lambda _: encode(np.zeros(shape, np.uint8)))
    mode = "RGB" if shape[0] == 3 else "L"
    assert refusal(MNIST, mirror).startswith(
        f"{where}the image has {shape[2]} x 28 pixels in mode {mode}, expected 28 x 28 in mode L; "
    )


@pytest.mark.parametrize("label", [-1, 10])
def test_impossible_label_names_file_and_row(mirror, label):
    where = rewrite(mirror, MNIST, 0, label=label)
    assert refusal(MNIST, mirror) == f"{where}the label is {label}, expected 0 to 9; replace the file with a fresh copy"


@pytest.mark.parametrize("size", [22, 24])
def test_wrong_number_of_rows(mirror, size):
    entry = replace(MNIST, sizes={"train": size, "test": 7})
    path = shard(mirror, MNIST, "train")
    assert refusal(entry, mirror) == (
        f"{path}: 23 rows where the train split of MNIST has {size}; replace it with a complete copy"
    )


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (pa.table({"label": [1]}), 'no column "image" of encoded images ({bytes, path})'),
        (pa.table({"image": ["a.png"], "label": [1]}), 'no column "image" of encoded images ({bytes, path})'),
        (pa.table({"image": [{"path": "a"}], "label": [1]}), 'no column "image" of encoded images ({bytes, path})'),
        (pa.table({"image": [{"bytes": b""}]}), 'no column "label" of integers'),
        (pa.table({"image": [{"bytes": b""}], "label": ["one"]}), 'no column "label" of integers'),
    ],
)
def test_wrong_columns(mirror, table, complaint):
    path = shard(mirror, MNIST, "train")
    pq.write_table(table, path)
    assert refusal(MNIST, mirror) == f"{path} has {complaint}; replace it with a fresh copy"


def test_false_mnist_is_refused_with_both_digests(mirror):
    message = refusal(tiny("mnist", checked=True), mirror)
    path = shard(mirror, MNIST, "train")
    assert message.startswith(f"{path}: train_x in IDX form has MD5 ")
    assert message.endswith(
        "but that of MNIST is 6bbc9ace898e44ae57da46a324031adb; replace it with a copy of the original"
    )


@pytest.mark.parametrize("name", ["train_y", "test_x", "test_y"])
def test_every_digest_counts(mirror, name):
    made = arrays(MNIST)
    true = {key: idx_md5(array[:, 0] if key.endswith("x") else array) for key, array in made.items()}
    assert load(replace(MNIST, idx_md5=true), mirror).label == "MNIST"
    path = shard(mirror, MNIST, name.split("_")[0])
    message = refusal(replace(MNIST, idx_md5={**true, name: "0" * 32}), mirror)
    assert message.startswith(f"{path}: {name} in IDX form has MD5 {true[name]}, but that of MNIST is 000")


def test_mirror_is_read_without_any_network_library(mirror):
    """The hub cannot be asked by mistake: neither `datasets` nor `huggingface_hub` is even imported."""
    program = (
        "import sys; from tests.data.tiny import tiny; from jacnorm.data.sources import load; "
        f"load(tiny('mnist'), {str(mirror)!r}); sys.exit('datasets' in sys.modules or 'huggingface_hub' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0
