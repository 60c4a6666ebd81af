"""Every captioned figure is drawn from whole and from poor tables, with the same bytes each time, without a warning."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tests.studies.glstm.invented import EVERYTHING, Watched, holding, invented, tables

from jacnorm.files import write_table
from jacnorm.report import plotting
from jacnorm.report.manifest import read_captions
from jacnorm.report.tables import read_tables
from jacnorm.step import run
from jacnorm.studies.glstm import figures
from jacnorm.studies.glstm.cells import histogram
from jacnorm.studies.glstm.settings import StudySettings
from jacnorm.studies.glstm.tables import COLUMNS

STUDY = Path(figures.__file__).parent
CAPTIONS = yaml.safe_load((STUDY / "captions.yaml").read_text())


@cache
def smoke():
    return invented(StudySettings())


def figure(name, content):
    with plotting.style():
        return figures.FIGURES[name](content)


def drawn(folder: Path, content) -> dict[str, bytes]:
    """Files that the step makes of tables, each in two blocks of seeds."""
    files = []
    for name, rows in content.items():
        for seeds in ((10, 11), (12, 29)):
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
    first = drawn(tmp_path / "a", smoke())
    again = read_tables(tmp_path / "a" / "tables")
    assert set(first) == {f"{name}.{kind}" for name in CAPTIONS for kind in ("svg", "png")} | {"captions.json"}
    for name in ("accuracy", "ablations"):  # curves, tables
        with plotting.style():
            plotting.save(figures.FIGURES[name](again), tmp_path, name)
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
    assert not {"ring_fits", "peptides_fits", "narr_fits"} & set(smoke())
    drawn(tmp_path / "smoke", smoke())
    written = read_captions(tmp_path / "smoke" / "figures" / "captions.json")
    assert written["trees"].tables == ["trees"]
    assert written["accuracy"].tables == ["nar_fits"]
    drawn(tmp_path / "all", holding())
    written = read_captions(tmp_path / "all" / "figures" / "captions.json")
    assert {name: caption.tables for name, caption in written.items()} == {n: c["tables"] for n, c in CAPTIONS.items()}


@pytest.mark.parametrize("name", CAPTIONS)
@pytest.mark.parametrize("content", [smoke, holding])
def test_no_panel_is_empty_and_the_caption_names_the_tables_that_are_read(name, content):
    tables = Watched(content())
    found = figure(name, tables)
    assert tables.read == set(CAPTIONS[name]["tables"])
    assert found.axes
    for ax in found.axes:
        if name == "ablations":
            assert len(ax.tables[0].get_celld()) > 5
            continue
        assert ax.get_lines() or ax.patches, ax.get_title()
        assert ax.get_ylabel()
        assert ax.get_xlabel() or len(ax.get_xticklabels()) > 0


def poor(content):
    """A single seed, some of whose numbers are infinite, undefined, zero or diverged."""
    content = {name: rows[rows.seed == 10].reset_index(drop=True) for name, rows in content.items()}
    for rows in content.values():
        for column in rows.select_dtypes("float"):
            rows.loc[rows.index[-1::-5], column] = math.nan
            rows.loc[rows.index[-2::-7], column] = math.inf
            rows.loc[rows.index[-3::-11], column] = 0.0
        if "diverged_at" in rows:
            rows.loc[rows.index[-1::-5], "diverged_at"] = 3
    return content


@pytest.mark.parametrize("name", CAPTIONS)
def test_one_seed_with_broken_networks_is_drawn(tmp_path, name):
    figure(name, poor(invented(StudySettings()))).savefig(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 5000


def test_accuracy_shows_means_and_the_lines_of_networks_without_keys():
    content = tables()
    found = figure("accuracy", content)
    shown = lines(found.axes[0])
    rows = content["nar_fits"]
    rows = rows[(rows.model == "glstm") & (rows["size"] == 8) & rows.k_hop]
    np.testing.assert_allclose(shown["gLSTM M = 8"], rows.groupby("neighbours").test_score.mean())
    np.testing.assert_allclose(shown["histogram line"], [histogram(n) for n in (8, 16, 32, 64)])
    np.testing.assert_allclose(shown["chance, 1/N"], [1 / 8, 1 / 16, 1 / 32, 1 / 64])
    regression = lines(found.axes[2])
    np.testing.assert_allclose(regression["mean of the values, 1 - 1/N"], 1 - 1 / np.array([8, 16, 32, 64]))
    np.testing.assert_allclose(regression["linear memory, 1 - 16/N"], [0, 0, 0.5, 0.75])
    counts = [np.asarray(line.get_ydata()) for line in found.axes[1].get_lines()]
    assert any(np.array_equal(each, rows.groupby("neighbours").parameters.max()) for each in counts)


def test_a_network_at_a_single_n_keeps_its_interval():
    found = figure("accuracy", smoke())
    (container,) = [each for each in found.axes[0].containers if each.get_label() == "gLSTM M = 16"]
    assert container.has_yerr


def test_norms_are_averaged_over_graphs_before_seeds_and_divided_by_n():
    content = tables()
    rows = content["nar_jacobians"]
    rows = rows[(rows.model == "gcn") & (rows["size"] == 64) & ~rows.k_hop & (rows.layers == 2) & (rows.part == "full")]
    rows = rows[rows.data == "fixed"]
    whole, divided = (lines(ax)["GCN d = 64"] for ax in figure("norms", content).axes[:2])
    expected = rows.groupby(["neighbours", "seed"])["mean"].mean().groupby("neighbours").mean()
    np.testing.assert_allclose(whole, expected)
    np.testing.assert_allclose(divided, expected / expected.index)


def test_ratios_are_geometric_means_beside_arithmetic_ones():
    shown = lines(figure("selectivity", tables()).axes[0])
    rows = holding()["nar_jacobians"]
    rows = rows[(rows.model == "glstm") & (rows["size"] == 8) & rows.k_hop & (rows.part == "value")]
    by_seed = rows.groupby(["neighbours", "seed"])
    np.testing.assert_allclose(shown["gLSTM M = 8"], np.exp(by_seed.log_ratio.mean()).groupby("neighbours").mean())
    np.testing.assert_allclose(shown["_gLSTM M = 8"], by_seed["ratio"].mean().groupby("neighbours").mean())


def test_deeper_gcns_have_a_panel_where_they_are_trained():
    assert len(figure("k_hop", smoke()).axes) == 2
    found = figure("k_hop", tables())
    assert len(found.axes) == 3
    rows = holding()["nar_fits"]
    rows = rows[(rows.model == "gcn") & (rows["size"] == 32) & ~rows.k_hop & (rows.neighbours == 16)]
    rows = rows[rows.data == "fixed"]
    np.testing.assert_allclose(lines(found.axes[2])["GCN, N = 16"], rows.groupby("layers").test_score.mean())


def test_no_network_with_or_without_k_hop_is_said_in_words():
    content = tables()
    content["nar_fits"] = content["nar_fits"][content["nar_fits"].k_hop]
    found = figure("k_hop", content)
    texts = [[text.get_text() for text in ax.texts] for ax in found.axes]
    assert texts == [[], ["none trained"]]


def test_learning_curves_have_a_panel_for_each_n_and_the_fresh_control():
    found = figure("training", tables())
    assert [ax.get_title(loc="left") for ax in found.axes] == [
        f"{task}, N = {n}" for task in ("NAR", "NARR") for n in (8, 16, 32, 64)
    ]
    assert "GCN d = 64, fresh graphs" in lines(found.axes[1])
    assert "GCN d = 64, fresh graphs" not in lines(found.axes[0])


def test_fitted_and_diverged_trainings_are_counted():
    content = tables()
    fits = content["nar_fits"]
    fits.loc[fits.index[:2], "diverged_at"] = 10
    fits.loc[fits.index[2:5], "train_score"] = 0.5
    title = figure("memorisation", content).axes[2].get_title(loc="left")
    assert title == f"{len(fits)} trainings, {len(fits) - 5} fitted, 2 diverged"


def test_the_papers_numbers_stand_beside_its_archive_only():
    found = figure("properties", tables())
    marked = {ax.get_title(loc="left"): "paper" in str(ax.get_legend_handles_labels()[1]) for ax in found.axes}
    assert marked == {
        "archive's diameter: diameter": True,
        "archive's eccentricity: sssp": True,
        "archive's sssp: laplacian": True,
        "toy, generated graphs: diameter": False,
        "toy, generated graphs: eccentricity": False,
        "toy, generated graphs: laplacian": False,
        "toy, generated graphs: sssp": False,
        "Peptides-func": True,
        "Peptides-struct": True,
    }


def test_the_table_has_means_sample_deviations_and_parameters():
    content = invented(EVERYTHING)
    rows = content["gpp_fits"]
    cell = rows[(rows.ablation == "1-hop") & (rows.task == "eccentricity")].test_error
    (table,) = figure("ablations", content).axes[0].tables
    texts = [[table[row, column].get_text().get_text() for column in range(6)] for row in range(10)]
    assert texts[0][:2] == ["network", "parameters"]
    (found,) = [row for row in texts if row[0] == "gLSTM, 1-hop"]
    assert found[1] == "4000"
    assert found[texts[0].index("toy: eccentricity")] == f"{cell.mean():.3f} ± {np.std(cell, ddof=1):.3f} (3)"
    assert texts[-1][0] == "a constant"
