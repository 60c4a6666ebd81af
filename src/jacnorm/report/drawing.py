"""The plotting step that all studies share: read tables, draw every captioned figure, write the captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from jacnorm.errors import UserError
from jacnorm.files import read_yaml
from jacnorm.report.claims import complaint
from jacnorm.report.manifest import Caption, Captions, write_captions
from jacnorm.report.tables import gather_tables, group_files
from jacnorm.training.tracking import track

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@cache
def read_captions_file(path: Path) -> dict[str, Caption]:
    """A study's ``captions.yaml``: figure name -> caption. Raises UserError naming the wrong key."""
    content = read_yaml(path)
    try:
        return Captions.validate_python(content)
    except ValidationError as error:
        raise UserError(f"{path}: {complaint(error, content)}") from None


def draw(
    study: str,
    captions: Path,
    figures: Mapping[str, Callable[[Mapping[str, pd.DataFrame]], Figure]],
    tables: Iterable[Path],
    out: Path,
) -> None:
    """Draw each figure of `captions` with the function of its name and write SVG, PNG and ``captions.json`` to `out`.

    A caption written there names those of its tables that were made at this scale. The figures also go to a tracked
    run of job type `plot`.
    Raises ValueError if `figures` and `captions` name different figures.
    """
    from jacnorm.report.plotting import save, style

    described = read_captions_file(captions)
    if set(described) != set(figures):
        raise ValueError(f"{captions} and the figure functions differ in {sorted(set(described) ^ set(figures))}")
    content = gather_tables(group_files(tables))
    with track(study, "plot", f"{study} plot", {"figures": list(described)}) as tracker, style():
        for name in described:
            save(figures[name](content), out, name)
            tracker.figure(name, out / f"{name}.png")
    made = {name: [table for table in caption.tables if table in content] for name, caption in described.items()}
    written = {name: caption.model_copy(update={"tables": made[name]}) for name, caption in described.items()}
    write_captions(out / "captions.json", written)
