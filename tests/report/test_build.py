"""The page as text: what enters it, what is escaped, and what stops it."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.report.sample_study import HOSTILE, write_study

from jacnorm.errors import UserError
from jacnorm.files import read_json, write_json
from jacnorm.report import build as module
from jacnorm.report.build import build


class Tags(HTMLParser):
    """What a browser would make of a page: its script elements and the names of all attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts = 0
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.attributes.update(name for name, _ in attrs)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_study(tmp_path / "results" / "smoke")
    return tmp_path / "results" / "smoke"


def page(results: Path) -> str:
    out = results / "report" / "index.html"
    build(results, ["sample"], out)
    return out.read_text(encoding="utf-8")


def test_everything_a_study_left_is_on_the_page(results: Path) -> None:
    text = page(results)
    for word in (
        "What was reproduced at scale <em>smoke</em>",
        "Invented Jacobians &amp; Other &lt;Matrices&gt;",
        "7 of 10 networks finished, 2 diverged, 1 excluded (width below 64)",
        "Table &#39;drift&#39; was not made at scale smoke.",
        "64, 128, 256",
        "Widths of the hidden layers.",
        "Three runs give no interval worth reading.",
        "ab" * 32,
        "natural logarithm of the spectral norm of the input-output Jacobian",
        "30 rows, 12 columns, 2 files",
        'href="../sample/tables/depth-s15-19.parquet"',
        'src="../sample/figures/depth.svg"',
        'href="../sample/figures/depth.png"',
        'alt="A rising line."',
    ):
        assert word in text, word


def test_nothing_a_study_says_becomes_markup(results: Path) -> None:
    text = page(results)
    assert "<script" not in text
    assert HOSTILE not in text
    assert "&lt;script&gt;document.title" in text
    tags = Tags()
    tags.feed(text)
    assert tags.scripts == 0
    assert not [name for name in tags.attributes if name.startswith("on")]
    assert not re.search(r'(src|href)="(https?:)?//(?!arxiv\.org/abs/)', text)


def test_each_claim_has_the_command_for_its_own_evidence(results: Path) -> None:
    verdicts = module.study_view(results, "sample", results / "report" / "index.html")
    commands = {view.verdict.claim.id: view.command for view in verdicts.claims}
    assert commands["C1"] == (
        "snakemake --config scale=smoke --forcerun \\\n"
        "  results/smoke/sample/tables/depth-s10-14.parquet \\\n"
        "  results/smoke/sample/tables/depth-s15-19.parquet \\\n"
        "  -- results/smoke/sample/verdicts.json"
    )
    assert "limit.parquet" in commands["C3"]
    assert "depth" not in commands["C3"]
    assert commands["C5"] == ""


def test_relative_results_keep_their_folder(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (results.parent.parent / "elsewhere").mkdir()
    results.rename(results.parent.parent / "elsewhere" / "smoke")
    monkeypatch.chdir(results.parent.parent)
    view = module.study_view(Path("elsewhere/smoke"), "sample", Path("elsewhere/smoke/report/index.html"))
    assert "elsewhere/smoke/sample/tables/depth-s10-14.parquet" in view.claims[0].command
    assert view.figures[0].shown == "../sample/figures/depth.svg"


def test_bytes_depend_on_time_only_in_the_provenance(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "provenance", lambda: {"Written": "now"})
    now = page(results)
    monkeypatch.setattr(module, "provenance", lambda: {"Written": "later"})
    later = page(results)
    assert now != later
    assert now.replace("<dd>now</dd>", "<dd>later</dd>") == later


def test_no_absolute_path_is_told(results: Path) -> None:
    assert str(results) not in page(results)
    assert str(Path(module.__file__).parent) not in page(results)


def test_only_the_judged_tables_are_shown(results: Path) -> None:
    manifest = read_json(results / "sample" / "manifest.json")
    manifest["tables"] = ["depth-s10-14.parquet", "limit.parquet"]
    write_json(results / "sample" / "manifest.json", manifest)
    text = page(results)
    assert "15 rows, 12 columns, 1 file<" in text
    assert "depth-s15-19" not in text


def test_a_study_without_figures_and_tables_says_so(results: Path) -> None:
    study = results / "sample"
    for file in [*study.glob("tables/*"), *study.glob("figures/*")]:
        file.unlink()
    write_json(study / "figures" / "captions.json", {})
    write_json(study / "manifest.json", {"settings": [], "departures": [], "data": []})
    text = page(results)
    for word in (
        "This study has no figures.",
        "This study has no tables.",
        "None is declared.",
        "None is recorded.",
        "None: all inputs are generated.",
        "depth (not made)",
    ):
        assert word in text, word


def rename_study(verdicts: Path) -> None:
    verdicts.write_text(verdicts.read_text().replace('"study": "sample"', '"study": "other"'))


def break_captions(study: Path, figure: str, key: str, value: list[str]) -> None:
    captions = read_json(study / "figures" / "captions.json")
    captions[figure][key] = value
    write_json(study / "figures" / "captions.json", captions)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda s: (s / "verdicts.json").unlink(), "verdicts.json does not exist; run the step that makes it"),
        (lambda s: (s / "manifest.json").unlink(), "manifest.json does not exist"),
        (lambda s: (s / "figures" / "captions.json").unlink(), "captions.json does not exist"),
        (
            lambda s: (s / "figures" / "new.svg").touch(),
            "captions.json has no caption for figure 'new'; add one or delete",
        ),
        (lambda s: [f.unlink() for f in s.glob("figures/limit.*")], "describes figure 'limit', which does not exist"),
        (lambda s: break_captions(s, "depth", "claims", ["C9"]), "figure 'depth': claim 'C9' does not exist; correct"),
        (lambda s: break_captions(s, "depth", "tables", ["no"]), "figure 'depth': table 'no' does not exist; correct"),
        (lambda s: (s / "verdicts.json").write_text("{"), "is not valid JSON"),
        (
            lambda s: rename_study(s / "verdicts.json"),
            'verdicts.json belongs to study "other"; delete it and run again',
        ),
    ],
)
def test_what_stops_the_report_is_named(results: Path, damage, sentence: str) -> None:
    damage(results / "sample")
    with pytest.raises(UserError, match=re.escape(sentence)):
        page(results)
    assert not (results / "report").exists()


def test_scales_do_not_mix(results: Path) -> None:
    write_study(results / "x", "paper")
    (results / "x" / "sample").rename(results / "other")
    rename_study(results / "other" / "verdicts.json")
    with pytest.raises(UserError, match="mixes the scales paper and smoke; give each scale its own folder"):
        build(results, ["sample", "other"], results / "report" / "index.html")
    with pytest.raises(UserError, match="--studies is empty"):
        build(results, [], results / "report" / "index.html")


def test_the_command_line(results: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "jacnorm.report.build",
        "--results",
        str(results),
        "--out",
        str(results / "p.html"),
    ]
    done = subprocess.run([*command, "--studies", "sample"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([*command, "--studies", "absent"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("ERROR: ")
    assert "absent/verdicts.json does not exist" in done.stderr
    assert "Traceback" not in done.stderr
