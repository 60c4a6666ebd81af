"""The report: one static page over all studies of one scale, readable from file:// without a network.

    python -m jacnorm.report.build --results results/smoke --studies stability --out results/smoke/report/index.html

Its bytes depend on what the studies wrote, except for the provenance block (code, libraries, machine, time).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
from markupsafe import Markup

from jacnorm.errors import UserError
from jacnorm.files import Column, write_text
from jacnorm.report import words
from jacnorm.report.claims import EVIDENCE_MEANING, Criterion
from jacnorm.report.manifest import Caption, StudyManifest, read_captions, read_manifest
from jacnorm.report.provenance import provenance
from jacnorm.report.records import ClaimVerdict, QuantityVerdict, StudyVerdicts, Verdict, read_verdicts
from jacnorm.report.strip import common_axis, draw
from jacnorm.report.tables import table_columns, table_files
from jacnorm.step import run

TEMPLATES = Path(__file__).parent / "templates"
FIRST_ROWS = 8
SYMBOLS = {
    Verdict.reproduced: "\N{CHECK MARK}",
    Verdict.contradicted: "\N{MULTIPLICATION X}",
    Verdict.inconclusive: "\N{ALMOST EQUAL TO}",
    Verdict.not_tested: "\N{EN DASH}",
}


@dataclass(frozen=True)
class CriterionView:
    """A criterion with its quantities, each with its drawing on one common axis."""

    criterion: Criterion
    rows: list[tuple[QuantityVerdict, Markup]]


@dataclass(frozen=True)
class TableView:
    """A logical table: its files, its size, its documented columns and its first rows."""

    name: str
    anchor: str
    files: list[tuple[str, str]]
    rows: int
    columns: dict[str, Column]
    first_rows: list[list[str]]


@dataclass(frozen=True)
class FigureView:
    """A figure: links relative to the page, caption, and what it belongs to."""

    name: str
    anchor: str
    shown: str
    links: list[tuple[str, str]]
    caption: Caption


@dataclass(frozen=True)
class ClaimView:
    """A claim as the page shows it."""

    anchor: str
    verdict: ClaimVerdict
    criteria: list[CriterionView]
    figures: list[FigureView]
    command: str


@dataclass(frozen=True)
class StudyView:
    """All of one study."""

    name: str
    verdicts: StudyVerdicts
    manifest: StudyManifest
    claims: list[ClaimView]
    figures: list[FigureView]
    tables: list[TableView]

    @cached_property
    def ours(self) -> list[ClaimView]:
        """Stress tests beyond the paper."""
        return [view for view in self.claims if view.verdict.claim.extension]

    @cached_property
    def published(self) -> list[ClaimView]:
        """Claims of the paper."""
        return [view for view in self.claims if not view.verdict.claim.extension]


def build(results: Path, studies: Sequence[str], out: Path) -> None:
    """Write the report of one scale.

    Args:
        results: Results of one scale, for instance results/smoke.
        studies: Names of the studies, in the order of the page.
        out: The page, for instance results/smoke/report/index.html.

    """
    if not studies:
        raise UserError("--studies is empty; name at least one study")
    views = [study_view(results, name, out) for name in studies]
    scales = {view.verdicts.scale for view in views}
    if len(scales) > 1:
        raise UserError(f"{results} mixes the scales {' and '.join(sorted(scales))}; give each scale its own folder")
    write_text(out, render(views, provenance()))


def render(views: Sequence[StudyView], origin: dict[str, str]) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": words.number,
        "estimate": words.estimate,
        "asked": words.asked,
        "paper": words.published,
    }
    totals = {verdict: sum(view.verdicts.counts[verdict] for view in views) for verdict in Verdict}
    return environment.get_template("page.html.j2").render(
        studies=views,
        scale=views[0].verdicts.scale,
        totals=totals,
        symbols=SYMBOLS,
        evidence=EVIDENCE_MEANING,
        provenance=origin,
        # The style sheet is ours and trusted; everything else is escaped.
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
    )


def study_view(results: Path, name: str, out: Path) -> StudyView:
    """Gather what one study left in `results`, checked. Raises UserError naming the file that is missing or wrong."""
    folder = results / name
    verdicts = read_verdicts(folder / "verdicts.json")
    if verdicts.study != name:
        raise UserError(f'{folder / "verdicts.json"} belongs to study "{verdicts.study}"; delete it and run again')
    manifest = read_manifest(folder / "manifest.json")
    files = table_files(folder / "tables", manifest.tables)
    figures = figure_views(folder, verdicts, set(files), out)
    tables = [_table_view(name, table, paths, out) for table, paths in files.items()]
    claims = [_claim_view(verdict, verdicts, figures, files, results) for verdict in verdicts.claims]
    return StudyView(name, verdicts, manifest, claims, figures, tables)


def figure_views(folder: Path, verdicts: StudyVerdicts, tables: set[str], out: Path) -> list[FigureView]:
    """The figures in the order of captions.json. Raises UserError if files and captions disagree."""
    path = folder / "figures" / "captions.json"
    captions = read_captions(path)
    files: dict[str, dict[str, Path]] = {}
    for file in sorted([*path.parent.glob("[!.]*.svg"), *path.parent.glob("[!.]*.png")]):
        files.setdefault(file.stem, {})[file.suffix[1:]] = file
    for figure in sorted(set(files) - set(captions)):
        raise UserError(f"{path} has no caption for figure {figure!r}; add one or delete the figure")
    claims = {verdict.claim.id for verdict in verdicts.claims}
    views = []
    for figure, caption in captions.items():
        if figure not in files:
            raise UserError(f"{path} describes figure {figure!r}, which does not exist; run the plotting step again")
        for kind, named, known in (("claim", caption.claims, claims), ("table", caption.tables, tables)):
            unknown = [item for item in named if item not in known]
            if unknown:
                raise UserError(f"{path}, figure {figure!r}: {kind} {unknown[0]!r} does not exist; correct the caption")
        links = [(kind.upper(), _link(file, out)) for kind, file in sorted(files[figure].items(), reverse=True)]
        views.append(FigureView(figure, f"{verdicts.study}-figure-{figure}", links[0][1], links, caption))
    return views


def rerun_command(results: Path, verdicts: StudyVerdicts, evidence: list[Path]) -> str:
    """The command that measures a claim's evidence again, and nothing else, and judges it again."""
    base = f"results/{verdicts.scale}" if results.is_absolute() else results.as_posix()
    folder = f"{base}/{verdicts.study}"
    targets = [f"{folder}/tables/{path.name}" for path in evidence]
    parts = [f"snakemake --config scale={verdicts.scale} --forcerun", *targets, f"-- {folder}/verdicts.json"]
    return " \\\n  ".join(parts)


def _claim_view(
    verdict: ClaimVerdict, study: StudyVerdicts, figures: list[FigureView], files: dict[str, list[Path]], results: Path
) -> ClaimView:
    criteria = []
    for criterion in verdict.claim.criteria:
        quantities = [quantity for quantity in verdict.quantities if quantity.criterion == criterion.id]
        axis = common_axis(criterion, quantities)
        criteria.append(
            CriterionView(criterion, [(quantity, draw(criterion, quantity, axis)) for quantity in quantities])
        )
    named = (*verdict.claim.evidence_tables, *verdict.claim.optional_tables)
    evidence = [path for table in named for path in files.get(table, [])]
    return ClaimView(
        anchor=f"{study.study}-{verdict.claim.id}",
        verdict=verdict,
        criteria=criteria,
        figures=[figure for figure in figures if verdict.claim.id in figure.caption.claims],
        command=rerun_command(results, study, evidence) if evidence else "",
    )


def _table_view(study: str, name: str, paths: list[Path], out: Path) -> TableView:
    import pyarrow.parquet as pq

    rows = 0
    for path in paths:
        rows += pq.read_metadata(path).num_rows
    first = next(pq.ParquetFile(paths[0]).iter_batches(batch_size=FIRST_ROWS), None)
    records = first.to_pylist() if first is not None else []
    return TableView(
        name=name,
        anchor=f"{study}-table-{name}",
        files=[(_link(path, out), f"{path.name}, {words.size(path.stat().st_size)}") for path in paths],
        rows=rows,
        columns=table_columns(paths),
        first_rows=[[_cell(value) for value in record.values()] for record in records],
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return words.number(value, 6)
    return "" if value is None else str(value)


def _link(path: Path, out: Path) -> str:
    return Path(os.path.relpath(path, out.parent)).as_posix()


if __name__ == "__main__":
    run({"build": build})
