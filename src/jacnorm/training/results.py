"""How the rows that a job measured become a file, named after the job's block of seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jacnorm.files import Column, write_table
from jacnorm.settings import SeededSettings
from jacnorm.training.tracking import Tracker


def write_rows(
    folder: Path,
    name: str,
    columns: Mapping[str, Column],
    settings: SeededSettings,
    rows: Iterable[Mapping[str, Any]],
    tracker: Tracker,
) -> None:
    """Write `rows` of table `name` as ``<folder>/<name>-s<first seed>-<last seed>.parquet``.

    The tracked run gets the number of rows and the mean of the finite values of each measured column.
    """
    import pandas as pd

    block = f"s{min(settings.seeds)}-{max(settings.seeds)}"
    table = pd.DataFrame(list(rows), columns=list(columns))
    write_table(folder / f"{name}-{block}.parquet", table, columns)
    means = table.select_dtypes("float").replace([math.inf, -math.inf], math.nan).mean()
    tracker.summary({f"{name}/rows": len(table), **{f"{name}/{column}": mean for column, mean in means.items()}})
