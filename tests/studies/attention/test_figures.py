"""Figures from invented tables: same bytes each time, nothing empty, numbers those of the tables."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.image import AxesImage
from PIL import Image
from tests.studies.attention.invented import SMALL, fewer, holding, invented, small, smoke, tables

from jacnorm.files import write_table
from jacnorm.report import plotting
from jacnorm.report.manifest import read_captions
from jacnorm.report.tables import read_tables
from jacnorm.step import run
from jacnorm.studies.attention import figures
from jacnorm.studies.attention.judge import FAR, KNEE
from jacnorm.studies.attention.tables import COLUMNS

STUDY = Path(figures.__file__).parent
CAPTIONS = yaml.safe_load((STUDY / "captions.yaml").read_text())
# One source and normaliser: fewer panels, less time.
TINY = SMALL.model_copy(
    update={
        "probing": fewer(SMALL.probing).model_copy(update={"normalisers": ["softmax"], "control": False}),
        "synthetic": SMALL.synthetic.model_copy(update={"seeds": []}),
    }
)


def figure(name, content):
    with plotting.style():
        return figures.FIGURES[name](content)


def drawn(folder: Path, content) -> dict[str, bytes]:
    """Files that the step makes of tables, each in two blocks of seeds."""
    files = []
    for name, rows in content.items():
        for seeds in ((10, 11), (12, 19)):
            files.append(folder / "tables" / f"{name}-s{seeds[0]}-{seeds[1]}.parquet")
            write_table(files[-1], rows[rows.seed.between(*seeds)], COLUMNS[name])
    run({"plot": figures.plot}, ["--tables", *map(str, files), "--out", str(folder / "figures")])
    return {path.name: path.read_bytes() for path in sorted((folder / "figures").iterdir())}


def lines(ax):
    return {line.get_label(): np.asarray(line.get_ydata(), float) for line in ax.get_lines()}


def titles(found):
    return [ax.get_title(loc="left") for ax in found.axes]


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


def test_every_caption_has_a_function_and_every_function_a_caption():
    assert list(figures.FIGURES) == list(CAPTIONS)


def test_figures_are_svg_and_png_with_the_same_bytes_each_time(tmp_path, monkeypatch):
    content = invented(TINY)
    monkeypatch.setitem(plotting.STYLE, "savefig.dpi", 100)
    first = drawn(tmp_path / "a", content)
    read = read_tables(tmp_path / "a" / "tables")
    assert set(first) == {f"{name}.{kind}" for name in CAPTIONS for kind in ("svg", "png")} | {"captions.json"}
    for name in ("separability_heads", "separability"):  # an image, boxes and curves
        with plotting.style():
            plotting.save(figures.FIGURES[name](read), tmp_path, name)
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
    drawn(tmp_path / "all", small())
    written = read_captions(tmp_path / "all" / "figures" / "captions.json")
    assert {name: caption.tables for name, caption in written.items()} == {n: c["tables"] for n, c in CAPTIONS.items()}
    drawn(tmp_path / "texts", {name: rows for name, rows in small().items() if not name.startswith("synthetic_")})
    written = read_captions(tmp_path / "texts" / "figures" / "captions.json")
    assert written["distance"].tables == ["distances"]
    assert written["gradient"].tables == ["sensitivity", "jacobians"]


@pytest.mark.parametrize("name", CAPTIONS)
def test_no_panel_is_empty_at_smoke(name):
    found = figure(name, smoke())
    assert found.axes
    for ax in found.axes:
        assert ax.get_lines() or ax.get_images() or ax.collections, ax.get_title(loc="left")
        assert ax.get_ylabel()
        assert ax.get_xlabel() or len(ax.get_xticklabels()) > 0 or ax.get_label() == "<colorbar>"


def poor(content):
    """A single seed, some of whose numbers are infinite, undefined or zero."""
    content = {name: rows[rows.seed == 10].reset_index(drop=True) for name, rows in content.items()}
    for rows in content.values():
        for column in rows.select_dtypes("float").columns:
            if column not in ("temperature", "perturbation", "fraction"):
                rows.loc[rows.index[-1::-5], column] = math.nan
                rows.loc[rows.index[-2::-7], column] = 0.0
    return content


@pytest.mark.parametrize("name", CAPTIONS)
def test_one_seed_with_broken_numbers_is_drawn(name):
    found = figure(name, poor(invented(TINY)))
    found.canvas.draw()
    assert found.axes


@pytest.mark.parametrize("name", CAPTIONS)
def test_one_length_and_one_number_of_keys_are_drawn(name):
    one = {"lengths": [16], "selected": [4], "distance_selected": 4, "temperatures": [1.0], "seeds": [10, 11]}
    found = figure(name, invented(TINY.model_copy(update={"probing": TINY.probing.model_copy(update=one)})))
    found.canvas.draw()
    assert found.axes


@pytest.mark.parametrize("name", CAPTIONS)
def test_models_that_diverged_are_drawn(name):
    content = invented(TINY)
    for rows in content.values():
        numbers = [c for c in rows.select_dtypes("float") if c not in ("temperature", "perturbation", "fraction")]
        rows[numbers] = math.nan
    found = figure(name, content)
    found.canvas.draw()
    assert found.axes


def test_distances_are_means_over_heads_and_geometric_means_over_seeds():
    content = tables()
    found = figure("distance", content)
    assert titles(found)[:3] == [
        "python_docs, openai-community/gpt2, N = 5",
        "L = 1024",
        "other normalisers, same logits",
    ]
    rows = content["distances"]
    rows = rows[(rows.normaliser == "softmax") & (rows.space == "embedding")]
    for ax, cell, by in ((0, rows.selected == 5, "length"), (1, rows.length == 1024, "selected")):
        shown = lines(found.axes[ax])
        for column, label in (("distance", "distance"), ("loose_bound", "bound U'"), ("expectation", "closed form")):
            means = rows[cell].groupby(["seed", by])[column].mean().unstack()
            np.testing.assert_allclose(shown[label], np.exp(np.log(means).mean()))
    assert {"softmax", "sparsemax", "sigmoid"} <= set(lines(found.axes[2]))


def test_every_head_is_a_point_above_the_line_where_bound_and_distance_are_equal():
    found = figure("bounds", tables(small()))
    points = [line for line in found.axes[0].get_lines() if line.get_marker() == "." and len(line.get_xdata())]
    heads = SMALL.probing.layers * SMALL.probing.heads * len(SMALL.probing.seeds)
    for line in points:
        assert len(line.get_xdata()) == heads * len(SMALL.probing.selected)
        assert (line.get_ydata() > line.get_xdata()).all()
    equal = next(line for line in found.axes[0].get_lines() if line.get_label() == "equal")
    np.testing.assert_array_equal(equal.get_xdata(), equal.get_ydata())


def test_the_critical_n_and_the_statistic_are_drawn_with_their_edges():
    found = figure("critical_n", tables())
    assert titles(found)[0] == "python_docs, openai-community/gpt2, L = 1024, 16 heads"
    shown = lines(found.axes[0])
    label = "closed form without N / (L - 1)"
    assert shown[label][0] == 1.0  # heads differ by less than the gap below 0.05 L
    assert shown[label][-1] == 0.0
    # The largest difference that is kept at level 0.01 is about 0.58 for 16 and 16 heads.
    assert shown["rejected at 0.01 above"][0] == pytest.approx(0.58, abs=0.005)
    assert shown["rejected at 0.05 above"][0] < shown["rejected at 0.01 above"][0]
    against_length = lines(found.axes[1])
    np.testing.assert_allclose(against_length[label], [4, 16, 64])
    np.testing.assert_allclose(against_length["0.06 L, the paper's"], 0.06 * np.array([64, 256, 1024]))


def test_boxes_hold_the_heads_of_all_seeds():
    content = tables(small())
    found = figure("separability", content).axes[0]
    rows = content["separability"]
    rows = rows[
        (rows.data_set == "python_docs")
        & (rows.model == "trained")
        & (rows.normaliser == "softmax")
        & (rows.space == "embedding")
        & (rows.length == 128)
    ]
    medians = [line.get_ydata()[0] for line in found.get_lines() if line.get_color() == figures.BLUE and _flat(line)]
    for n in (KNEE, FAR):
        assert any(np.isclose(rows[rows.selected == n].ratio.median(), medians))
    assert [tick.get_text() for tick in found.get_xticklabels()] == [str(n) for n in sorted(set(rows.selected))]


def test_of_many_numbers_of_keys_powers_of_two_get_a_box():
    probing = fewer(SMALL.probing).model_copy(update={"selected": list(range(1, 65)), "normalisers": ["softmax"]})
    found = figure("separability", invented(SMALL.model_copy(update={"probing": probing}))).axes[0]
    assert [tick.get_text() for tick in found.get_xticklabels()] == ["1", "2", "4", "8", "16", "32", "64"]


def _flat(line):
    return len(set(np.round(line.get_ydata(), 12))) == 1


def test_heat_maps_show_layers_and_heads_of_every_model_on_one_scale():
    content = tables(small())
    found = figure("separability_heads", content)
    images = [image for ax in found.axes for image in ax.get_images() if isinstance(image, AxesImage)]
    images = [image for image in images if image.axes.get_xlabel() == "head"]
    assert titles(found)[:4] == [
        f"{text}, {model}, N = 16, L = 128" for model in ("trained", "untrained") for text in ("python_docs", "text")
    ]
    assert len({image.get_clim() for image in images}) == 1
    rows = content["separability"]
    cell = (rows.data_set == "python_docs") & (rows.model == "trained") & (rows.selected == 16) & (rows.length == 128)
    cell &= (rows.normaliser == "softmax") & (rows.space == "embedding")
    expected = rows[cell].groupby(["layer", "head"]).ratio.mean().unstack()
    np.testing.assert_allclose(images[0].get_array(), expected)


def test_gradients_carry_the_printed_and_the_tight_bound():
    content = tables()
    found = figure("gradient", content)
    temperatures = np.array(sorted(content["sensitivity"].temperature.unique()))
    for ax in found.axes:
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        shown = lines(ax)
        np.testing.assert_allclose(shown["1 / (4 T), printed"], 0.25 / temperatures)
        np.testing.assert_allclose(shown["1 / (2 T), tight"], 0.5 / temperatures)
        assert set(shown[r"$\sqrt{2}$, printed"]) == {math.sqrt(2)}
    rows = content["sensitivity"]
    rows = rows[(rows.normaliser == "softmax") & (rows.perturbation == 0.1)]
    largest = rows.groupby(["seed", "temperature"]).change.max().unstack()
    np.testing.assert_allclose(lines(found.axes[0])[r"change, $\epsilon$ = 0.1"], np.exp(np.log(largest).mean()))


def test_violations_of_the_printed_bound_are_drawn_by_temperature():
    content = tables()
    rows = content["jacobians"]
    here = (rows.normaliser == "softmax") & (rows.temperature == 0.1)
    rows.loc[here, ["above_quarter", "spectral_largest_product"]] = [0.44, 0.5]
    largest, share = figure("spectral", content).axes[:2]
    place = sorted(rows.temperature.unique()).index(0.1)
    assert lines(largest)["softmax"][place] == pytest.approx(0.5)
    assert lines(share)["softmax"][place] == pytest.approx(0.44)


def test_collapse_is_relative_to_each_seeds_largest_distance():
    found = figure("collapse", tables())
    assert max(lines(found.axes[0])["softmax"]) == pytest.approx(1.0)
    assert len(found.axes) == 2  # GPT-2 and synthetic rows


def test_every_space_is_drawn_before_and_after_training():
    found = figure("spaces", tables(small()))
    assert set(lines(found.axes[0])) == {
        label + before for label in ("embedding and position", "value") for before in ("", ", untrained")
    }
    assert len(found.axes) == 2 * len(SMALL.probing.data_sets)


def test_a_given_model_has_no_training_loss():
    found = figure("training", holding())
    assert found.axes[0].get_legend_handles_labels()[1] == ["held-out tokens"]
    assert len(figure("training", small()).axes[0].get_xticks()) == 2


def test_curves_are_those_of_the_seeds_that_have_every_place():
    rows = pd.DataFrame(
        {
            "seed": [1, 1, 1, 1, 2],
            "head": [1, 2, 1, 2, 1],
            "length": [8, 8, 16, 16, 8],
            "x": [1.0, 3.0, 5.0, math.nan, 9.0],
        }
    )
    found = figures.curve(rows, "x", "length")
    assert found.index.tolist() == [1]
    assert found.loc[1, 8] == 2.0
    assert math.isnan(found.loc[1, 16])  # a NaN is not passed over
    assert figures.curve(rows, "x", "length", over="max").loc[1, 8] == 3.0
