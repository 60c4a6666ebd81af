"""Every captioned figure is drawn from whole and from poor tables, with the same bytes each time, without a warning."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tests.studies.lipschitz.invented import EVERYTHING, holding, invented, tables

from jacnorm.files import write_table
from jacnorm.report import plotting
from jacnorm.report.claims import load_claims
from jacnorm.report.manifest import read_captions
from jacnorm.report.tables import read_tables
from jacnorm.step import run
from jacnorm.studies.lipschitz import figures
from jacnorm.studies.lipschitz.settings import StudySettings
from jacnorm.studies.lipschitz.tables import COLUMNS

STUDY = Path(figures.__file__).parent
CAPTIONS = yaml.safe_load((STUDY / "captions.yaml").read_text())


def figure(name, content):
    with plotting.style():
        return figures.FIGURES[name](content)


def drawn(folder: Path, content) -> dict[str, bytes]:
    """Files that the step makes of tables, each in two blocks of seeds."""
    files = []
    for name, rows in content.items():
        for seeds in ((10, 11), (12, 17)):
            files.append(folder / "tables" / f"{name}-s{seeds[0]}-{seeds[1]}.parquet")
            write_table(files[-1], rows[rows.seed.between(*seeds)], COLUMNS[name])
    run({"plot": figures.plot}, ["--tables", *map(str, files), "--out", str(folder / "figures")])
    return {path.name: path.read_bytes() for path in sorted((folder / "figures").iterdir())}


def lines(ax):
    return {line.get_label(): np.asarray(line.get_ydata(), float) for line in ax.get_lines()}


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


def test_every_caption_has_a_function_and_every_function_a_caption():
    assert list(figures.FIGURES) == list(CAPTIONS)


def test_figures_are_svg_and_png_with_the_same_bytes_each_time(tmp_path):
    first = drawn(tmp_path / "a", invented(StudySettings()))
    smoke = read_tables(tmp_path / "a" / "tables")
    assert set(first) == {f"{name}.{kind}" for name in CAPTIONS for kind in ("svg", "png")} | {"captions.json"}
    for name in ("leading", "tail", "errors"):  # curves, histograms, dots
        with plotting.style():
            plotting.save(figures.FIGURES[name](smoke), tmp_path, name)
        for kind in ("svg", "png"):
            assert (tmp_path / f"{name}.{kind}").read_bytes() == first[f"{name}.{kind}"]
    for name in CAPTIONS:
        root = ElementTree.fromstring(first[f"{name}.svg"])
        assert root.tag.endswith("svg")
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 10
        with Image.open(tmp_path / "a" / "figures" / f"{name}.png") as image:
            assert min(image.size) > 300
            assert len(np.unique(np.asarray(image.convert("L")))) > 10  # not a blank page


def test_captions_name_only_tables_that_the_scale_made(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", dict.fromkeys(CAPTIONS, lambda tables: None))
    monkeypatch.setattr(plotting, "save", lambda figure, folder, name: None)
    smoke = invented(StudySettings())
    assert "table_errors" not in smoke
    drawn(tmp_path / "smoke", smoke)
    written = read_captions(tmp_path / "smoke" / "figures" / "captions.json")
    assert written["errors"].tables == ["paired_errors"]
    assert written["norms"].tables == ["paired_errors", "paired_norms"]
    drawn(tmp_path / "all", holding())
    written = read_captions(tmp_path / "all" / "figures" / "captions.json")
    assert {name: caption.tables for name, caption in written.items()} == {n: c["tables"] for n, c in CAPTIONS.items()}


@pytest.mark.parametrize("name", CAPTIONS)
def test_no_panel_is_empty_at_smoke(name):
    found = figure(name, invented(StudySettings()))
    assert found.axes
    for ax in found.axes:
        assert ax.get_lines() or ax.patches, ax.get_title()
        assert ax.get_ylabel()
        assert ax.get_xlabel() or len(ax.get_xticklabels()) > 0


def poor(content):
    """A single seed, some of whose numbers are infinite, undefined or dead."""
    content = {name: rows[rows.seed == 10].reset_index(drop=True) for name, rows in content.items()}
    for rows in content.values():
        for column in rows.select_dtypes("float").columns:
            if column.startswith("log_") or column in ("test_error", "squared_norm", "largest_gap"):
                rows.loc[rows.index[-1::-5], column] = math.nan
                rows.loc[rows.index[-2::-7], column] = math.inf if column != "test_error" else 90.0
    return content


@pytest.mark.parametrize("name", CAPTIONS)
def test_one_seed_with_broken_networks_is_drawn(tmp_path, name):
    figure(name, poor(tables())).savefig(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 5000


@pytest.mark.parametrize("name", CAPTIONS)
def test_one_depth_of_one_activation_is_drawn(tmp_path, name):
    depth = EVERYTHING.depth.model_copy(update={"depths": [6], "activations": ["elu"], "seeds": [10, 11]})
    residual = EVERYTHING.residual.model_copy(update={"depths": [16]})
    settings = EVERYTHING.model_copy(update={"depth": depth, "residual": residual})
    figure(name, invented(settings)).savefig(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 5000


def test_a_panel_for_each_activation_and_width():
    depth = EVERYTHING.depth.model_copy(update={"widths": [64, 128], "activations": ["relu", "tanh", "elu"]})
    content = invented(EVERYTHING.model_copy(update={"depth": depth}))
    for name in ("leading", "theorem"):
        titles = [ax.get_title(loc="left") for ax in figure(name, content).axes]
        assert titles == [f"{a}, width {w}" for w in (64, 128) for a in ("elu", "relu", "tanh")]


def test_leading_terms_are_means_of_the_table_with_slopes_in_the_legend():
    content = tables()
    found = figure("leading", content).axes[0]
    rows = content["leading"]
    rows = rows[(rows.activation == "relu") & (rows.stage == "trained")]
    shown = lines(found)
    label = next(label for label in shown if label.startswith("spectral, weighted"))
    np.testing.assert_allclose(shown[label], rows.groupby("depth").log_spectral_weighted.mean())
    slopes = [
        np.polyfit(one.depth, one.log_spectral_weighted, 1)[0] for _, one in rows[rows.depth >= 4].groupby("seed")
    ]
    mean, half = plotting.mean_interval(np.array(slopes))
    assert label == rf"spectral, weighted: {mean:.2f} $\pm$ {half:.2f} per layer"


def test_lines_in_depth_and_log_depth_carry_their_share_of_variance():
    found = figure("ratio", tables())
    labels = list(lines(found.axes[1]))
    # The invented spectral term is linear in depth and the other one in log depth.
    assert [label.split(" = ")[-1] for label in labels if "line" in label] == ["0.947", "1.000", "1.000", "0.947"]


def test_the_products_of_layer_norms_leave_the_layers_own_matrix_out():
    content = tables()
    shown = lines(figure("layers", content).axes[2])["relu"]
    rows = content["layers"]
    rows = rows[(rows.seed == 10) & (rows.activation == "relu") & (rows.stage == "trained") & (rows.depth == 10)]
    expected = [
        rows.log_hidden.iloc[0]
        + sum(norm for other, norm in enumerate(rows.log_spectral_norm) if other != i)
        - rows.log_jacobian.iloc[i]
        - rows.log_hidden.iloc[i]
        for i in range(10)
    ]
    np.testing.assert_allclose(shown, expected)


def test_infinite_bounds_are_counted_in_words():
    content = tables()
    rows = content["theorem"]
    rows.loc[(rows.activation == "relu") & (rows.seed == 11), ["log_bound", "log_simplified"]] = math.inf
    titles = [ax.get_title(loc="left") for ax in figure("theorem", content).axes]
    assert titles == ["relu, width 32\n5 of 25 networks infinite, left out", "tanh, width 32"]
    content["theorem"].loc[rows.activation == "relu", "log_bound"] = math.inf
    found = figure("theorem", content)
    assert len(found.legends[0].get_texts()) == 7


def test_histograms_show_every_value_and_the_papers_numbers():
    found = figure("tail", tables())
    ours, theirs, _ = found.axes
    for patch in ours.patches:
        assert sum(patch.get_data().values) == pytest.approx(EVERYTHING.residual.top)  # mean over seeds
    batch, none = (patch.get_data() for patch in theirs.patches)
    assert sum(batch.values) == sum(none.values) == 100
    assert list(batch.values[:3]) == [88, 10, 2]
    assert batch.edges[[0, -1]] == pytest.approx([1.37, 8.17])
    # What the claim says of the paper's figure.
    assert batch.edges[np.flatnonzero(batch.values)[-1] + 1] == pytest.approx(3.41, abs=0.01)


def test_table_1_is_marked_beside_wide_resnets_only():
    found = figure("errors", tables())
    assert len(found.axes) == 4
    marks = [
        sum(line.get_marker() == "_" and line.get_markersize() > 10 for line in ax.get_lines()) for ax in found.axes
    ]
    assert marks == [0, 0, 8, 3]
    gain = load_claims(STUDY / "claims.yaml").claim("L8").published.value
    assert any(np.isclose(values, gain).all() for values in lines(found.axes[3]).values())


def test_without_a_regularised_cell_only_errors_are_drawn():
    content = tables()
    for name in ("paired_errors", "paired_norms"):
        content[name] = content[name][~content[name].regularised]
    content = {name: rows for name, rows in content.items() if not name.startswith("table_")}
    assert len(figure("errors", content).axes) == 1
    assert len(figure("norms", content).axes) == 10
