"""Figures from invented tables: what they show, and that nothing in the numbers stops them."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image
from tests.studies.worldmodel.invented import invented, tables

from jacnorm.files import write_table
from jacnorm.report import plotting
from jacnorm.report.manifest import read_captions
from jacnorm.report.tables import read_tables
from jacnorm.step import run
from jacnorm.studies.worldmodel import figures
from jacnorm.studies.worldmodel.settings import DreamerSettings, PendulumSettings, StudySettings
from jacnorm.studies.worldmodel.tables import COLUMNS

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


def means(ax):
    """Label -> heights of the means that `dots` drew."""
    return {
        container.get_label(): container.lines[0].get_ydata()[0]
        for container in ax.containers
        if not container.get_label().startswith("_")
    }


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


def test_every_caption_has_a_function_and_every_function_a_caption():
    assert set(figures.FIGURES) == set(CAPTIONS)


def test_figures_are_svg_and_png_with_the_same_bytes_each_time(tmp_path, monkeypatch):
    some = {name: figures.FIGURES[name] for name in ("divergence", "rescaling")}  # curves, dots
    captions = {name: CAPTIONS[name] for name in some}
    monkeypatch.setattr(figures, "FIGURES", some)
    monkeypatch.setattr(figures, "__file__", str(tmp_path / "figures.py"))
    (tmp_path / "captions.yaml").write_text(yaml.safe_dump(captions))
    content = {name: rows for name, rows in SMALL.items() if name != "pendulum_frames"}
    first = drawn(tmp_path / "a", content)
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
    assert not any(name.startswith("dreamer") for name in SMALL)
    drawn(tmp_path / "smoke", SMALL)
    written = read_captions(tmp_path / "smoke" / "figures" / "captions.json")
    assert written["returns"].tables == ["pendulum_fits", "pendulum_returns"]
    drawn(tmp_path / "all", tables())
    written = read_captions(tmp_path / "all" / "figures" / "captions.json")
    assert {name: caption.tables for name, caption in written.items()} == {n: c["tables"] for n, c in CAPTIONS.items()}


@pytest.mark.parametrize("name", CAPTIONS)
def test_no_panel_is_empty_at_smoke(name):
    for ax in figure(name, SMALL).axes:
        if name == "frames":
            assert ax.images
            continue
        assert ax.get_lines() or ax.containers, ax.get_title(loc="left")
        assert ax.get_ylabel()
        assert ax.get_xlabel() or len(ax.get_xticklabels()) > 0


def tasks_of(name, content):
    titles = " ".join(ax.get_title(loc="left") for ax in figure(name, content).axes)
    return {task for task in ("pendulum", "walker walk", "quadruped walk") if task in titles}


@pytest.mark.parametrize("name", [name for name in CAPTIONS if name not in ("expansion", "frames")])
def test_dreamerv3_has_panels_of_its_own(name):
    assert tasks_of(name, SMALL) == {"pendulum"}
    assert tasks_of(name, tables()) == {"pendulum", "walker walk"}


def test_each_task_has_panels_of_its_own():
    settings = StudySettings(dreamer=DreamerSettings(seeds=[10, 11], tasks=["walker_walk", "quadruped_walk"]))
    assert tasks_of("divergence", invented(settings)) == {"pendulum", "walker walk", "quadruped walk"}


def poor(content):
    """A single seed, some of whose numbers are undefined, infinite, zero or diverged."""
    content = {name: rows[rows.seed == 10].reset_index(drop=True) for name, rows in content.items()}
    given = ["lambda", "error_size", "strength", "scale", "epsilon"]
    for rows in content.values():
        for column in rows.select_dtypes("float").columns.difference(given):
            rows.loc[rows.index[-1::-5], column] = math.nan
            rows.loc[rows.index[-2::-7], column] = math.inf
            rows.loc[rows.index[-3::-9], column] = 0.0
    content["pendulum_fits"].loc[1, "diverged_at"] = 7
    return content


@pytest.mark.parametrize("name", CAPTIONS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")
def test_one_seed_with_broken_agents_is_drawn(name):
    found = figure(name, poor(SMALL))
    found.draw_without_rendering()
    assert found.axes


@pytest.mark.parametrize("name", CAPTIONS)
def test_agents_without_penalty_alone_are_drawn(name):
    settings = StudySettings(
        pendulum=PendulumSettings(lambdas=[0.0], f_only_lambdas=[], gauss=[], masks=[], rotations=[])
    )
    found = figure(name, invented(settings))
    found.draw_without_rendering()
    assert all(ax.get_lines() or ax.images or ax.containers or ax.texts for ax in found.axes)


def test_jacobians_start_at_no_penalty_and_show_f_alone_beside():
    content = tables()
    rows = content["pendulum_jacobians"].query("error == 'none' and batch == 16 and length == 16")
    ax = figure("jacobians", content).axes[2]  # the prior by h
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "0.003", "0.01", "0.1"]
    shown = lines(ax)
    both = rows[rows.include_prior].groupby("lambda").p_h.mean()
    np.testing.assert_allclose(shown["f and prior penalised"], both)
    alone = rows[~rows.include_prior].groupby("lambda").p_h.mean()
    np.testing.assert_allclose(shown["f alone penalised"], [both[0.0], *alone])


def test_rescaling_shows_ratios_within_seeds_of_both_penalties():
    content = tables()
    rows = content["pendulum_jacobians"].query("error == 'none' and batch == 16 and length == 16").set_index("seed")
    plain = rows[rows["lambda"] == 0].f_h
    found = means(figure("rescaling", content).axes[0])  # labels stand at the first norm, f by h
    for include_prior, words in ((True, "f and prior"), (False, "f alone")):
        own = rows[(rows["lambda"] == 0.01) & (rows.include_prior == include_prior)].f_h
        np.testing.assert_allclose(found[f"{words}, lambda = 0.01"], (own / plain).mean())


def test_errors_are_also_drawn_over_those_without_penalty():
    content = tables()
    rows = content["pendulum_prediction"].query("error == 'none' and batch == 16 and length == 16 and include_prior")
    wide = rows.pivot(index=["seed", "horizon"], columns="lambda", values="reward_error")
    axes = figure("prediction", content).axes
    np.testing.assert_allclose(lines(axes[2])["no penalty"], wide[0.0].groupby("horizon").mean())
    np.testing.assert_allclose(lines(axes[3])["lambda = 0.01"], (wide[0.01] / wide[0.0]).groupby("horizon").mean())


def test_returns_start_at_the_clean_one_and_gravity_passes_through_it():
    content = tables()
    rows = content["pendulum_returns"].query("error == 'none' and batch == 16 and length == 16 and include_prior")
    rows = rows[rows["lambda"] == 0.01]
    clean = rows[rows.perturbation == "clean"]["return"].mean()
    axes = figure("returns", content).axes
    assert lines(axes[0])["lambda = 0.01"][0] == pytest.approx(clean)
    np.testing.assert_allclose(axes[3].get_lines()[0].get_xdata(), [0.5, 1.0, 1.5])
    assert lines(axes[3])["lambda = 0.01"][1] == pytest.approx(clean)
    np.testing.assert_allclose(lines(axes[0])["random policy"], 30.0)


def test_gains_are_differences_within_seeds_and_beside_the_clean_one():
    content = tables()
    rows = content["pendulum_returns"].query("error == 'none' and batch == 16 and length == 16 and include_prior")
    wide = rows.pivot(index=["perturbation", "strength"], columns=["lambda", "seed"], values="return")
    gain = (wide[0.01] - wide[0.0]).mean(axis=1)
    plain, beside = figure("gains", content).axes[:2]
    assert means(plain)["lambda = 0.01"] == pytest.approx(gain["clean", 0.0])
    assert means(beside)["lambda = 0.01"] == pytest.approx(gain["gauss", 0.05] - gain["clean", 0.0])


def test_diverged_agents_are_counted_and_not_drawn():
    content = tables()
    here = (
        "`lambda` == 0.01 and include_prior and error == 'none' and batch == 16 and length == 16 and seed in [10, 11]"
    )
    for name in ("pendulum_fits", "pendulum_divergence"):
        bad = content[name].eval(here)
        content[name].loc[bad, "diverged_at" if name == "pendulum_fits" else "divergence"] = 1e9 if "div" in name else 3
    content["pendulum_fits"]["diverged_at"] = content["pendulum_fits"].diverged_at.astype(int)
    assert max(lines(figure("divergence", content).axes[0])["lambda = 0.01"]) < 2
    title = figure("training", content).axes[3].get_title(loc="left")
    assert title == f"2 of {len(content['pendulum_fits'])} agents diverged"


def test_learning_curves_have_a_line_for_each_length():
    content = tables()
    ax = figure("training", content).axes[4 + 2]  # walker walk, returns
    rows = content["dreamer_curves"].query("task == 'walker_walk' and length == 32 and `lambda` == 0")
    np.testing.assert_allclose(lines(ax)["no penalty, T = 32"], rows.groupby("frames")["return"].mean())


def test_the_strip_has_truth_and_predictions_with_and_without_penalty():
    found = figure("frames", SMALL)
    steps = 1 + len(PendulumSettings().horizons)
    labels = [ax.get_ylabel().replace("\n", " ") for ax in found.axes[::steps]]
    assert labels == [
        "true",
        "from clean, no penalty",
        "from clean, penalty",
        "from perturbed, no penalty",
        "from perturbed, penalty",
    ]
    rows = SMALL["pendulum_frames"].query("`lambda` == 0.01 and include_prior and kind == 'perturbed' and step == 3")
    image = rows.pivot(index="row", columns="column", values="intensity").to_numpy()
    place = 4 * steps + 1 + PendulumSettings().horizons.index(3)
    np.testing.assert_array_equal(found.axes[place].images[0].get_array(), image)


def test_without_a_perturbation_the_strip_is_shorter():
    content = dict(SMALL)
    content["pendulum_frames"] = content["pendulum_frames"].query("kind != 'perturbed'")
    assert len(figure("frames", content).axes) == 3 * (1 + len(PendulumSettings().horizons))
