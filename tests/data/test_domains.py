"""Data sets that are some rows of one on the hub, with images of any size: the domains of DomainNet."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.data.tiny import shard

from jacnorm.data import hub, mirror
from jacnorm.data.catalogue import find
from jacnorm.data.sources import load
from jacnorm.errors import UserError

ROWS = 12
# Rows of the file whose domain is the third, painting.
MEMBERS = [1, 2, 7]
PAINTING = replace(find("domainnet_painting"), sizes={"train": len(MEMBERS), "test": len(MEMBERS)})


def picture(row: int) -> Image.Image:
    """A picture of one colour, its size and mode different from row to row."""
    # Multiples of 51 are in the palette to which Pillow converts; other colours become patterns of several.
    mode = ("RGB", "L", "P")[row % 3]
    return Image.new("RGB", (30 + 7 * row, 200 - 9 * row), (51 * (row % 6), 102, 51)).convert(mode)


def encoded(row: int, form: str = "PNG") -> bytes:
    buffer = BytesIO()
    picture(row).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def table() -> pa.Table:
    images = [{"bytes": encoded(row), "path": None} for row in range(ROWS)]
    domain = [2 if row in MEMBERS else row % 2 for row in range(ROWS)]
    return pa.table({"image": images, "domain": domain, "label": [30 * row for row in range(ROWS)]})


@pytest.fixture
def place(tmp_path, table):
    for split in ("train", "test"):
        path = shard(tmp_path, PAINTING, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=4)
    return tmp_path


def test_only_the_domains_rows_at_the_common_size(place, monkeypatch):
    assert shard(place, PAINTING, "train").parent == place / "wltjr1007" / "DomainNet" / "data"
    for rows in (1000, 3):  # batches without a member too
        monkeypatch.setattr(mirror, "BATCH_ROWS", rows)
        loaded = load(PAINTING, place)
        assert loaded.arrays["train_y"].tolist() == [30 * row for row in MEMBERS]
        assert loaded.arrays["train_x"].shape == (3, 3, 64, 64)
        for image, row in zip(loaded.arrays["train_x"], MEMBERS, strict=True):
            colour = np.asarray(picture(row).convert("RGB"))[0, 0]
            assert (image == colour[:, None, None]).all()
    assert loaded.label == "DomainNet painting, resized to 64 x 64"


def test_resizing_averages(place, table):
    """A fine pattern becomes its mean: neighbouring pixels are weighed, not left out."""
    stripes = np.zeros((640, 640, 3), np.uint8)
    stripes[:, ::2] = 200
    buffer = BytesIO()
    Image.fromarray(stripes).save(buffer, "PNG")
    images = table.column("image").to_pylist()
    images[1]["bytes"] = buffer.getvalue()
    pq.write_table(table.set_column(0, "image", pa.array(images)), shard(place, PAINTING, "test"))
    made = load(PAINTING, place).arrays["test_x"][0, :, :, 1:-1]  # at the edges a stripe more or less counts
    assert np.abs(made.astype(int) - 100).max() <= 1


def test_jpeg_is_no_news_for_images_that_are_resized(place, table):
    images = [{"bytes": encoded(row, "JPEG" if row % 3 < 2 else "PNG"), "path": None} for row in range(ROWS)]
    pq.write_table(table.set_column(0, "image", pa.array(images)), shard(place, PAINTING, "train"))
    assert load(PAINTING, place).label == PAINTING.label


def test_mistakes_name_the_row_of_the_file(place, table):
    path = shard(place, PAINTING, "train")
    images = table.column("image").to_pylist()
    images[7]["bytes"] = b"no image"
    pq.write_table(table.set_column(0, "image", pa.array(images)), path)
    with pytest.raises(UserError, match=rf"{path}, row 7: the image cannot be decoded \(UnidentifiedImageError"):
        load(PAINTING, place)
    pq.write_table(table.drop_columns(["domain"]), path)
    with pytest.raises(UserError, match=rf'{path} has no column "domain" of integers; replace it'):
        load(PAINTING, place)
    pq.write_table(table.slice(0, 6), path)
    with pytest.raises(UserError, match=f"{path}: 2 rows where the train split of DomainNet painting.* has 3;"):
        load(PAINTING, place)


def test_rows_of_the_hub_are_those_of_the_mirror(place, table, monkeypatch):
    monkeypatch.setattr(hub, "BATCH_ROWS", 5)
    rows = datasets.Dataset(table).cast_column("image", datasets.Image())
    batches = list(hub.Download(PAINTING.hub, {"train": rows}).rows("train"))
    assert [row for batch in batches for row in batch.rows] == MEMBERS
    assert [image for batch in batches for image in batch.images] == [encoded(row) for row in MEMBERS]
    assert [label for batch in batches for label in batch.labels] == [30 * row for row in MEMBERS]
    short = hub.Download(PAINTING.hub, {"train": rows.remove_columns("domain")})
    with pytest.raises(UserError, match='on the Hugging Face hub has no column "domain", only image, label; set'):
        next(short.rows("train"))
