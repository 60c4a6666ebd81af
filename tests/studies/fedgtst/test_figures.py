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
from tests.studies.fedgtst.invented import METHODS, invented
from tests.studies.watched import Watched

from jacnorm.files import write_table
from jacnorm.report import plotting
from jacnorm.report.manifest import read_captions
from jacnorm.report.tables import read_tables
from jacnorm.step import run
from jacnorm.studies.fedgtst import figures
from jacnorm.studies.fedgtst.settings import DomainSettings, FederatedSettings, ImageSettings, StudySettings
from jacnorm.studies.fedgtst.tables import COLUMNS

STUDY = Path(figures.__file__).parent
CAPTIONS = yaml.safe_load((STUDY / "captions.yaml").read_text())
VARIED = StudySettings(
    federated=FederatedSettings(
        methods=METHODS,
        coefficients=[1e-4, 1e-3, 3e-3],
        participations=[0.1],
        epochs=[10],
        splits=["dirichlet"],
        rounds=12,
        fine_tuning_epochs=4,
    ),
    images=ImageSettings(seeds=[10, 11], rounds=4, fine_tuning_epochs=2),
    domains=DomainSettings(seeds=[10, 11], methods=["fedavg", "fedgtst"], rounds=4, fine_tuning_epochs=2),
)


@cache
def smoke():
    return invented(StudySettings())


@cache
def varied():
    """All experiments, with alternatives and a sweep; of DomainNet one target."""
    content = invented(VARIED)
    for name, rows in content.items():
        if name.startswith("domain_"):
            one = "source" if name == "domain_clients" else "target"
            content[name] = rows[rows[one].str.endswith("real")].reset_index(drop=True)
    return content


def copies(content):
    return {name: rows.copy() for name, rows in content.items()}


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
    assert set(figures.FIGURES) == set(CAPTIONS)


def test_figures_are_svg_and_png_with_the_same_bytes_each_time(tmp_path):
    first = drawn(tmp_path / "a", smoke())
    again = read_tables(tmp_path / "a" / "tables")
    assert set(first) == {f"{name}.{kind}" for name in CAPTIONS for kind in ("svg", "png")} | {"captions.json"}
    for name in ("accuracy", "guide"):
        with plotting.style():
            plotting.save(figures.FIGURES[name](again), tmp_path, name)
        for kind in ("svg", "png"):
            assert (tmp_path / f"{name}.{kind}").read_bytes() == first[f"{name}.{kind}"]
    for name in CAPTIONS:
        root = ElementTree.fromstring(first[f"{name}.svg"])
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 10
        with Image.open(tmp_path / "a" / "figures" / f"{name}.png") as image:
            assert min(image.size) > 300
            assert len(np.unique(np.asarray(image.convert("L")))) > 10  # not a blank page
    written = read_captions(tmp_path / "a" / "figures" / "captions.json")
    assert written["accuracy"].tables == ["federated_transfer", "federated_runs"]


@pytest.mark.parametrize("name", CAPTIONS)
@pytest.mark.parametrize("content", [smoke, varied])
def test_no_panel_is_empty_and_the_caption_names_the_tables_that_are_read(name, content):
    tables = Watched(content())
    found = figure(name, tables)
    assert tables.read == set(CAPTIONS[name]["tables"])
    assert found.axes
    for ax in found.axes:
        assert ax.get_lines() or ax.patches or ax.images or ax.collections or ax.texts, ax.get_title()
        assert ax.get_ylabel()


def poor(content):
    """A single seed, some of whose numbers are infinite, undefined, zero, or of runs that ended early."""
    content = {name: rows[rows.seed == 10].reset_index(drop=True) for name, rows in content.items()}
    for rows in content.values():
        for column in rows.select_dtypes("float"):
            if column in ("participation", "extra_share", "coefficient", "rate"):
                continue
            rows.loc[rows.index[-1::-5], column] = math.nan
            rows.loc[rows.index[-2::-7], column] = math.inf
            rows.loc[rows.index[-3::-11], column] = 0.0
        if "outcome" in rows:
            rows.loc[rows.index[-1::-2], ["outcome", "ended_at"]] = ["unstable", 3]
    return content


@pytest.mark.parametrize("name", CAPTIONS)
def test_one_seed_with_broken_runs_is_drawn(tmp_path, name):
    figure(name, poor(smoke())).savefig(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 5000


def test_ratios_are_geometric_means_of_pairs():
    content = copies(varied())
    rows = content["federated_statistics"]
    rows["variance"] *= np.exp(np.random.default_rng(3).normal(0, 0.2, len(rows)))
    common = (rows.participation == 1) & (rows.local_epochs == 1) & (rows.split == "balanced")
    points = rows[common].pivot(index=["round", "seed"], columns=["method", "coefficient"], values="variance")
    expected = np.log(points["fedgtst", 1e-3] / points["fedavg", 0.0]).groupby("round").mean()
    ratio = figure("statistics", content).axes[3]
    assert any(
        len(line.get_ydata()) == len(expected) and np.allclose(line.get_ydata(), np.exp(expected))
        for line in ratio.get_lines()
    )


def test_the_choice_is_ringed_at_its_validation_accuracy():
    content = copies(varied())
    rows = content["federated_transfer"]
    rows.loc[(rows.method == "fedgtst") & (rows.coefficient == 1e-4), "validation_accuracy"] = 0.95
    ax = figure("selection", content).axes[0]
    rings = [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.get_lines() if line.get_markersize() == 12]
    assert (1e-4, pytest.approx(95.0)) in rings


def test_runs_that_ended_are_marked_where_they_ended_and_counted():
    content = copies(smoke())
    fits = content["federated_runs"]
    here = (fits.method == "fedgtst") & (fits.seed == 11)
    fits.loc[here, ["outcome", "ended_at"]] = ["unstable", 17]
    found = figure("guide", content).axes[0]
    assert found.get_title(loc="left").endswith("1 unstable of 3 runs")
    (cross,) = [line for line in found.get_lines() if line.get_label() == "ended"]
    assert cross.get_xdata()[0] == 17
    assert "1 unstable" in figure("training", content).axes[0].get_title(loc="left")
    squares = [line for line in figure("accuracy", content).axes[0].get_lines() if line.get_marker() == "s"]
    assert len(squares) == 1


def test_bounds_are_promises_over_what_is_seen():
    shown = lines(figure("bounds", smoke()).axes[0])
    np.testing.assert_allclose(shown["Theorem 2 as printed, 2/α"], 0.8)
    np.testing.assert_allclose(shown["Lemma B.3"], 0.2)


def test_what_is_varied_has_a_panel():
    assert [ax.get_xlabel() for ax in figure("conditions", smoke()).axes] == ["clients K"]
    found = [ax.get_xlabel() for ax in figure("conditions", varied()).axes]
    assert found[:4] == ["clients K", "share of clients in a round", "local epochs", "split"]


def test_bytes_beside_the_weights_are_written_out():
    beside = figure("communication", smoke()).axes[1]
    assert [text.get_text() for text in beside.texts] == ["0", "0", "0", "0", "6,800", "3,400", "8", "8", "8", "8"]


def test_classes_that_some_client_holds_are_counted():
    content = copies(smoke())
    rows = content["federated_clients"]
    rows.loc[rows.label == 3, "samples"] = 0
    assert figure("clients", content).axes[0].get_title(loc="left").endswith("9 of 10 classes held")
