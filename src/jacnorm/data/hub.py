"""Rows of a data set from the Hugging Face hub, through `datasets` and its cache. No code from the hub is ever run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jacnorm.data.catalogue import Dataset, Hub
from jacnorm.data.images import Batch
from jacnorm.data.mirror import BATCH_ROWS, VARIABLE, to_batch
from jacnorm.errors import UserError

if TYPE_CHECKING:
    import datasets

TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""

_MIRROR = f"set mirror: in the configuration or {VARIABLE} to a folder in the hub's layout"


@dataclass(frozen=True)
class Download:
    """A data set opened on the hub, or in the cache that an earlier download left on this machine."""

    hub: Hub
    splits: Mapping[str, datasets.Dataset]

    @property
    def revision(self) -> str:
        """The commit that the rows come from, "" if the cache does not tell."""
        files = [Path(file["filename"]) for rows in self.splits.values() for file in rows.cache_files]
        commits = {file.parent.name for file in files}  # <cache>/<set>/<config>/<version>/<commit>/<split>.arrow
        commit = commits.pop() if len(commits) == 1 else ""
        return commit if re.fullmatch("[0-9a-f]{40}", commit) else ""

    def rows(self, split: str) -> Iterator[Batch]:
        """Yield the rows of one split in stored order. Raises UserError if the split or a column does not exist."""
        import datasets

        where = f"{self.hub.id} on the Hugging Face hub"
        if split not in self.splits:
            raise UserError(f'{where} has no split "{split}", only {", ".join(self.splits)}; {_MIRROR}')
        rows = self.splits[split]
        for column in (self.hub.image, self.hub.label, *(self.hub.only or ())[:1]):
            if column not in rows.column_names:
                raise UserError(f'{where} has no column "{column}", only {", ".join(rows.column_names)}; {_MIRROR}')
        rows = rows.cast_column(self.hub.image, datasets.Image(decode=False)).with_format("arrow")
        for first in range(0, len(rows), BATCH_ROWS):
            yield to_batch(rows[first : first + BATCH_ROWS], self.hub, f"{where} ({split})", first)


def download(dataset: Dataset) -> Download:
    """Open a data set on the hub; without a network, the copy that is in the cache of `datasets`.

    Raises UserError, which names the remedies, if there is neither network nor copy, or if what came cannot be read.
    """
    from datasets.exceptions import DatasetsError

    unreachable = _unreachable(dataset.hub)
    try:
        with _offline() if unreachable else contextlib.nullcontext():
            return Download(dataset.hub, _load(dataset.hub))
    # ValueError: the hub no longer has this configuration of the data set.
    except (*_failures(), DatasetsError, ValueError) as error:
        name = f"{dataset.label} ({dataset.hub.id})"
        if unreachable:
            raise UserError(
                f"{name} cannot be fetched from the Hugging Face hub ({unreachable}); "
                f"connect this machine to the network, or {_MIRROR}"
            ) from error
        raise UserError(
            f"{name} as it came from the Hugging Face hub cannot be read ({_brief(error.__cause__ or error)}); "
            f"delete its folders in the cache {_cache()} and try again, or {_MIRROR}"
        ) from error


def _unreachable(hub: Hub) -> str:
    """Why the hub cannot be reached, or "": one request, no retry (`datasets` alone keeps trying for 23 s)."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(hub.id, revision=hub.revision, timeout=TIMEOUT)
    except _failures() as error:
        return _brief(error)
    return ""


def _load(hub: Hub) -> Mapping[str, datasets.Dataset]:
    import datasets

    # Without the scheme, a folder of that name under the working directory would be read instead of the hub.
    return datasets.load_dataset(f"hf://datasets/{hub.id}", hub.config, revision=hub.revision)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let `datasets` look at its cache only, as the environment variable HF_HUB_OFFLINE would from the start."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _failures() -> tuple[type[Exception], ...]:
    """What a missing network and a refusing server raise."""
    from huggingface_hub.errors import HTTPError

    return (OSError, HTTPError)


def _cache() -> str:
    from huggingface_hub.constants import HF_HOME

    return HF_HOME


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
