"""Figures from invented tables: what they show, and that nothing in the numbers stops them."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image
from tests.studies.sharpening.invented import EVERYTHING, invented, tables

from jacnorm.files import write_table
from jacnorm.report import plotting
from jacnorm.report.manifest import read_captions
from jacnorm.report.tables import read_tables
from jacnorm.step import run
from jacnorm.studies.sharpening import figures
from jacnorm.studies.sharpening.settings import RegulariserSettings, StudySettings
from jacnorm.studies.sharpening.tables import COLUMNS

STUDY = Path(figures.__file__).parent
CAPTIONS = yaml.safe_load((STUDY / "captions.yaml").read_text())
SMALL = invented(StudySettings())


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


def test_figures_are_svg_and_png_with_the_same_bytes_each_time(tmp_path, monkeypatch):
    some = {name: figures.FIGURES[name] for name in ("width", "edge")}  # curves, dots
    captions = {name: CAPTIONS[name] for name in some}
    monkeypatch.setattr(figures, "FIGURES", some)
    monkeypatch.setattr(figures, "__file__", str(tmp_path / "figures.py"))
    (tmp_path / "captions.yaml").write_text(yaml.safe_dump(captions))
    first = drawn(tmp_path / "a", SMALL)
    smoke = read_tables(tmp_path / "a" / "tables")
    assert set(first) == {f"{name}.{kind}" for name in some for kind in ("svg", "png")} | {"captions.json"}
    for name in some:
        with plotting.style():
            plotting.save(some[name](smoke), tmp_path, name)
        for kind in ("svg", "png"):
            assert (tmp_path / f"{name}.{kind}").read_bytes() == first[f"{name}.{kind}"]
        root = ElementTree.fromstring(first[f"{name}.svg"])
        assert root.tag.endswith("svg")
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 10
        with Image.open(tmp_path / "a" / "figures" / f"{name}.png") as image:
            assert min(image.size) > 300
            assert len(np.unique(np.asarray(image.convert("L")))) > 10  # not a blank page


def test_captions_name_only_tables_that_the_scale_made(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", dict.fromkeys(CAPTIONS, lambda tables: None))
    monkeypatch.setattr(plotting, "save", lambda figure, folder, name: None)
    drawn(tmp_path / "smoke", SMALL)
    written = read_captions(tmp_path / "smoke" / "figures" / "captions.json")
    assert written["edge"].tables == ["trajectory", "descent_fits"]
    assert written["cost"].tables == ["measuring_cost"]
    drawn(tmp_path / "all", tables())
    written = read_captions(tmp_path / "all" / "figures" / "captions.json")
    assert {name: caption.tables for name, caption in written.items()} == {n: c["tables"] for n, c in CAPTIONS.items()}


@pytest.mark.parametrize("name", CAPTIONS)
def test_no_panel_is_empty_at_smoke(name):
    found = figure(name, SMALL)
    assert found.axes
    for ax in found.axes:
        assert ax.get_lines() or ax.patches, ax.get_title()
        assert ax.get_ylabel()
        assert ax.get_xlabel() or len(ax.get_xticklabels()) > 0


@pytest.mark.parametrize("name", ["early", "whole", "correlations", "chain", "edge", "lower_bound", "cost"])
def test_larger_images_have_panels_of_their_own(name):
    assert not any("cifar10" in ax.get_title(loc="left") for ax in figure(name, SMALL).axes)
    assert any("cifar10, cnn" in ax.get_title(loc="left") for ax in figure(name, tables()).axes)


def poor(content):
    """A single seed, some of whose numbers are undefined, infinite, zero or not converged."""
    content = {name: rows[rows.seed == 10].reset_index(drop=True) for name, rows in content.items()}
    for rows in content.values():
        for column in rows.select_dtypes("float").columns.difference(
            ["smoothing", "learning_rate", "strength", "batch", "threshold"]
        ):
            rows.loc[rows.index[-1::-5], column] = math.nan
            rows.loc[rows.index[-2::-7], column] = math.inf
            rows.loc[rows.index[-3::-9], column] = 0.0
        for column in rows.columns[rows.columns.str.endswith("converged") | (rows.columns == "reached")]:
            rows[column] = False
    return content


@pytest.mark.parametrize("name", CAPTIONS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
def test_one_seed_with_broken_networks_is_drawn(name):
    found = figure(name, poor(SMALL))
    found.draw_without_rendering()
    assert any(ax.get_lines() for ax in found.axes)


@pytest.mark.parametrize("name", ["weight_decay", "learning_rate", "batch", "gap", "training"])
def test_without_regularisers_the_figures_are_drawn(name):
    names = ("weight_decays", "smoothings", "mixups", "sam_radii", "jacobian_penalties", "shifts", "other_batches")
    nothing: dict[str, list[float]] = {key: [] for key in names}
    settings = EVERYTHING.model_copy(update={"regularisers": RegulariserSettings(**nothing)})
    found = figure(name, invented(settings))
    found.draw_without_rendering()
    assert all(ax.get_lines() or ax.patches or ax.texts for ax in found.axes)
    if name in ("weight_decay", "batch"):
        assert [text.get_text() for text in found.axes[0].texts] == ["not tried at this scale"]


def test_early_curves_are_relative_to_the_first_checkpoint_and_end_at_a_third():
    content = tables()
    found = figure("early", content)
    ax = next(ax for ax in found.axes if ax.get_title(loc="left") == "digits, mlp, smoothing 0.5\nstep size 0.5")
    rows = content["trajectory"]
    rows = rows[(rows.cost == "cross-entropy") & (rows.smoothing == 0.5)]
    start = rows[rows.step == 0].set_index("seed").jacobian_max
    relative = rows.assign(r=rows.jacobian_max / rows.seed.map(start))[rows.step <= 200].groupby("step").r.mean()
    np.testing.assert_allclose(lines(ax)["largest Jacobian norm"], relative)


def test_runs_that_reach_the_threshold_are_drawn_apart():
    found = figure("edge", tables())
    labels = [text.get_text().replace("\n", " ") for text in found.axes[1].get_xticklabels()]
    assert labels == ["smoothing 0.1, step size 2", "square cost, step size 0.4"]


def test_diverged_runs_are_counted_and_not_drawn():
    content = tables()
    bad = content["descent_fits"].eval("cost == 'square' and learning_rate == 0.4 and seed in [10, 11]")
    content["descent_fits"].loc[bad, "diverged_at"] = 77
    gone = content["trajectory"].eval("cost == 'square' and learning_rate == 0.4 and seed in [10, 11]")
    content["trajectory"].loc[gone, "sharpness"] = 1e9
    ax = figure("edge", content).axes[0]
    assert max(values.max() for values in lines(ax).values()) < 2
    bars = [patch.get_height() for patch in figure("training", content).axes[3].patches]
    assert bars[:2] == [len(bad) - 2, 2]


def test_titles_of_the_gap_carry_the_rank_correlation_of_the_verdict():
    found = figure("gap", tables())
    titles = [ax.get_title(loc="left") for ax in found.axes]
    assert titles[0] == "digits, mlp, step size 0.1, fixed updates\nrank correlation 1.00 (1.00 to 1.00)"
    assert titles[3].startswith("digits, mlp, step size 0.1, equal training loss")
    assert "rank correlation -0.9" in titles[1]


def test_weight_decay_starts_at_none_and_has_both_rules():
    content = tables()
    ax = figure("weight_decay", content).axes[2]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "0.001", "0.005", "0.02"]
    rows = content["endpoints"]
    rows = rows[(rows.learning_rate == 0.1) & (rows.batch == 32) & rows.regulariser.isin(["none", "weight decay"])]
    for rule, words in (("updates", "fixed updates"), ("matched", "equal training loss")):
        expected = rows[rows.rule == rule].groupby("strength").jacobian_max.mean()
        np.testing.assert_allclose(lines(ax)[f"step size 0.1, {words}"], expected)


def test_what_measuring_cost_is_in_the_title():
    title = figure("cost", tables()).axes[0].get_title(loc="left")
    assert title == "digits, mlp: 0.80 in all"


def test_eigenvalues_short_of_the_tolerance_are_counted():
    content = tables()
    content["trajectory"].loc[content["trajectory"].step == 40, "gauss_newton_converged"] = False
    title = next(ax for ax in figure("chain", content).axes if "digits" in ax.get_title(loc="left")).get_title(
        loc="left"
    )
    assert title == "digits, mlp\n28 of 896 eigenvalues did not converge"
    content["widths"].loc[0, "sharpness_converged"] = False
    assert figure("width", content).axes[0].get_title(loc="left") == "1 of 16 did not converge"
