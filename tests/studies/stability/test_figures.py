"""Every captioned figure is drawn from the tables of a tiny run, with the same bytes each time, without a warning."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from tests.studies.stability import tiny

from jacnorm.files import write_table
from jacnorm.report import plotting
from jacnorm.report.manifest import read_captions
from jacnorm.step import run
from jacnorm.studies.stability import figures
from jacnorm.studies.stability.settings import StudySettings
from jacnorm.studies.stability.tables import COLUMNS

CAPTIONS = yaml.safe_load(Path(figures.__file__).with_name("captions.yaml").read_text())


@pytest.fixture(scope="module")
def tables(tmp_path_factory, digits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        return tiny.everything(tiny.ALL, tmp_path_factory.mktemp("run"), digits)


def drawn(tables: Path, out: Path) -> dict[str, bytes]:
    run({"plot": figures.plot}, ["--tables", *map(str, sorted(tables.glob("*.parquet"))), "--out", str(out)])
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_every_caption_has_a_function_and_every_function_a_caption():
    assert set(figures.FIGURES) == set(CAPTIONS)


def test_figures_are_svg_and_png_with_the_same_bytes_each_time(tables, tmp_path):
    first, second = drawn(tables, tmp_path / "a"), drawn(tables, tmp_path / "b")
    assert set(first) == {f"{name}.{kind}" for name in CAPTIONS for kind in ("svg", "png")} | {"captions.json"}
    assert first == second
    assert set(read_captions(tmp_path / "a" / "captions.json")) == set(CAPTIONS)
    for name in CAPTIONS:
        root = ElementTree.fromstring(first[f"{name}.svg"])
        assert root.tag.endswith("svg")
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 20
        with Image.open(tmp_path / "a" / f"{name}.png") as image:
            assert min(image.size) > 300
            assert len(np.unique(np.asarray(image.convert("L")))) > 10  # not a blank page


@pytest.fixture(scope="module")
def poor(tables):
    """The same tables with a single seed, some of whose networks are dead."""
    content = tiny.read(tables, tiny.SEEDS)
    content = {name: rows[rows.seed == 10].reset_index(drop=True) for name, rows in content.items()}
    for name, rows in content.items():
        if "log_norm" in rows:
            rows.loc[rows.index[-1::-3], "log_norm"] = -math.inf
        if "log_gain" in rows:
            rows.loc[rows.index[-1::-3], "log_gain"] = -math.inf
        assert list(rows.columns) == list(COLUMNS[name])
    return content


@pytest.mark.parametrize("name", CAPTIONS)
def test_one_seed_with_dead_networks_is_drawn(poor, tmp_path, name):
    with plotting.style():
        figure = figures.FIGURES[name](poor)
        figure.savefig(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 5000


@pytest.mark.parametrize("name", CAPTIONS)
def test_several_seeds_some_of_them_dead_are_drawn(tables, tmp_path, name):
    content = tiny.read(tables, tiny.SEEDS)
    for rows in content.values():
        for column in {"log_norm", "log_gain"} & set(rows):
            rows.loc[rows.index[::5], column] = -math.inf
    with plotting.style():
        figures.FIGURES[name](content).savefig(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 5000


def axis_numbers(ax):
    return {line.get_label(): np.asarray(line.get_ydata(), float) for line in ax.get_lines()}


def test_curves_are_the_means_of_the_table(tables):
    content = tiny.read(tables, tiny.SEEDS)
    with plotting.style():
        figure = figures.FIGURES["curves"](content)
    rows = content["curves"]
    for ax, column in zip(figure.axes, ("train_loss", "test_accuracy"), strict=True):
        shown = axis_numbers(ax)
        for depth in tiny.DRIFT.depths:
            means = rows[rows.depth == depth].groupby("epoch")[column].mean().to_numpy()
            label = next(label for label in shown if label.endswith(f"depth {depth}"))
            np.testing.assert_allclose(shown[label], means)


def test_plotting_refuses_tables_that_are_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run({"plot": figures.plot}, ["--tables", str(tmp_path / "depth-s10-11.parquet"), "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "depth-s10-11.parquet does not exist" in capsys.readouterr().err


def test_blocks_of_seeds_are_drawn_together(tables, tmp_path):
    whole = tiny.read(tables, tiny.SEEDS)
    blocks = tmp_path / "tables"
    for name, rows in whole.items():
        for seed in tiny.SEEDS:
            part: pd.DataFrame = rows[rows.seed == seed]
            write_table(blocks / f"{name}-s{seed}-{seed}.parquet", part, COLUMNS[name])
    with plotting.style():
        from jacnorm.report.tables import read_tables

        together = figures.FIGURES["tanh"](read_tables(blocks))
        expected = figures.FIGURES["tanh"](whole)
    for ax, other in zip(together.axes, expected.axes, strict=True):
        shown, wanted = axis_numbers(ax), axis_numbers(other)
        assert set(shown) == set(wanted)
        for label, values in wanted.items():
            np.testing.assert_allclose(shown[label], values, rtol=1e-12)


def test_settings_of_the_tiny_run_are_valid():
    assert StudySettings.model_validate(tiny.ALL.model_dump()) == tiny.ALL
