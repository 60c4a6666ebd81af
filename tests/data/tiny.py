"""Tiny data sets in the layout of the Hugging Face hub: Parquet shards of encoded images, as `datasets` writes them."""

from dataclasses import replace
from io import BytesIO
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jacnorm.data.catalogue import SPLITS, Dataset, find

SIZES = {"train": 23, "test": 7}


def tiny(name: str, sizes: dict[str, int] = SIZES, *, checked: bool = False) -> Dataset:
    """The catalogue's entry with fewer images, and without its digests unless `checked`."""
    entry = find(name)
    return replace(entry, sizes=sizes, idx_md5=entry.idx_md5 if checked else {})


def arrays(dataset: Dataset, seed: int = 0) -> dict[str, np.ndarray]:
    """Random images and labels of the right shapes."""
    generator = np.random.default_rng(seed)
    made = {}
    for split in SPLITS:
        size = dataset.sizes[split]
        made[f"{split}_x"] = generator.integers(0, 256, (size, *dataset.shape), np.uint8)
        made[f"{split}_y"] = generator.integers(0, len(dataset.classes), size)
    return made


def encode(image: np.ndarray, form: str = "PNG") -> bytes:
    """One image, channels first, as the bytes of a picture file."""
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    buffer = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, form)
    return buffer.getvalue()


def write_shard(path, dataset: Dataset, images: list, labels: list) -> None:
    """One Parquet file with the feature description that `datasets` leaves in the schema."""
    hub = dataset.hub
    image = pa.array(
        [{"bytes": data, "path": None} for data in images], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    about = b'{"info": {"features": {"%s": {"_type": "Image"}, "%s": {"dtype": "int64", "_type": "Value"}}}}'
    table = pa.table({hub.image: image, hub.label: pa.array(labels, pa.int64())})
    table = table.replace_schema_metadata({b"huggingface": about % (hub.image.encode(), hub.label.encode())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=5)


def shard(mirror, dataset: Dataset, split: str, part: int = 0, total: int = 1):
    return mirror / dataset.hub.id / dataset.hub.folder / f"{split}-{part:05d}-of-{total:05d}.parquet"


def write_mirror(
    mirror, dataset: Dataset, made: dict[str, np.ndarray], form: str = "PNG", cuts: tuple[int, ...] = ()
) -> None:
    """Write both splits; `cuts` are the rows at which the training part is cut into shards."""
    for split in SPLITS:
        bounds = [0, *(cuts if split == "train" else ()), dataset.sizes[split]]
        for part, (start, stop) in enumerate(pairwise(bounds)):
            images = [encode(image, form) for image in made[f"{split}_x"][start:stop]]
            labels = made[f"{split}_y"][start:stop].tolist()
            write_shard(shard(mirror, dataset, split, part, len(bounds) - 1), dataset, images, labels)
