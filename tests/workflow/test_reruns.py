"""A job runs again when, and only when, its inputs, its own settings or the code that it executes change.

Each test asserts the exact set of jobs. The sets are written out here by hand, from what the steps are for, and owe
nothing to the code that decides.
"""

from __future__ import annotations

import os
import re

import pytest
import yaml
from tests.workflow.projects import TINY, Project

DATA = {"data/digits"}
TRAIN = {"stability/train-trainability-s10-11", "stability/train-drift-s10-11"}
MEASURE_TRAINED = {"stability/measure-trainability-s10-11", "stability/measure-drift-s10-11"}
MEASURE_WITH_DATA = MEASURE_TRAINED | {"stability/measure-scores-s10-11"}
MEASURE = MEASURE_WITH_DATA | {
    "stability/measure-depth-s10-11",
    "stability/measure-theorem-s10-11",
    "stability/measure-conditions-s10-11",
}
PLOT, JUDGE, REPORT = {"stability/plot"}, {"stability/judge"}, {"report"}
LAST = PLOT | JUDGE | REPORT
EVERYTHING = DATA | TRAIN | MEASURE | LAST


def overlay(project: Project, change) -> None:
    """Change the user's configuration file."""
    path = project.folder / TINY
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))


def set_option(experiment: str, **values):
    """A change of settings of one experiment."""
    return lambda content: content["studies"]["stability"][experiment].update(values)


def test_a_fresh_project_runs_everything_and_a_finished_one_nothing(fresh, finished):
    assert fresh.planned() == EVERYTHING
    assert finished.planned() == set()


# --- what must not run anything --------------------------------------------------------------------------------------


def test_comments_docstrings_layout_and_times_rerun_nothing(project):
    future = "from __future__ import annotations"
    project.edit("src/jacnorm/nets/mlp.py", f"{future}\n", f"{future}  # a remark\n\n")
    project.append("src/jacnorm/training/loop.py", "\n\n# a remark\n")
    for name in ("nets/mlp.py", "report/build.py", "data/prepare.py", "studies/stability/judge.py"):
        path = project.package / name
        text = path.read_text()
        assert text.startswith('"""')
        path.write_text('"""Another description. ' + text[3:])
    for name in ("claims.yaml", "captions.yaml", "departures.yaml"):
        project.append(f"src/jacnorm/studies/stability/{name}", "# a remark\n")
    project.append("configs/smoke.yaml", "# a remark\n")
    for name in ("stability", "studies"):
        project.append(f"workflow/rules/{name}.smk", "# a remark\n")
    for path in project.folder.rglob("*"):
        if path.is_file() and ".snakemake" not in path.parts:
            os.utime(path)
    assert project.planned() == set()


def test_where_and_how_a_run_happens_reruns_nothing(project):
    def change(content):
        content["mirror"] = "elsewhere"
        content["wandb"] = "offline"
        content["jobs"] = {"train": {"mem_mb": 4000, "runtime": 60}, "measure": {"gpu": 1}, "plot": {"mem_mb": 900}}

    overlay(project, change)
    assert project.planned("--cores", "1") == set()


def test_the_order_of_keys_reruns_nothing(project):
    overlay(project, lambda content: None)  # written again, sorted
    assert project.planned() == set()


# --- code ------------------------------------------------------------------------------------------------------------

# File below src/jacnorm, and the jobs that execute it, with those that use their outputs.
CODE = {
    "nets/mlp.py": TRAIN | MEASURE | LAST,
    "data/catalogue.py": DATA | TRAIN | MEASURE_WITH_DATA | LAST,
    "data/read.py": TRAIN | MEASURE | LAST,
    "training/loop.py": TRAIN | MEASURE_TRAINED | LAST,
    "jacobian/results.py": MEASURE | LAST,
    "studies/stability/measure.py": MEASURE | LAST,
    "studies/stability/judge.py": JUDGE | REPORT,
    "report/intervals.py": JUDGE | REPORT,
    "report/plotting.py": PLOT | REPORT,
    "report/build.py": REPORT,
    "report/terminal.py": set(),
    "studies/lipschitz/tables.py": set(),
}


@pytest.mark.parametrize("module", CODE)
def test_an_edit_reruns_the_steps_that_import_the_module_and_their_descendants(project, module):
    project.append(f"src/jacnorm/{module}", "\n_EDITED = True\n")
    assert project.planned() == CODE[module]


def test_an_edit_inside_a_function_counts(project):
    path = project.package / "nets" / "mlp.py"
    text, count = re.subn(r"(?m)^    return ", "    0  # noqa\n    return ", path.read_text(), count=1)
    assert count == 1
    path.write_text(text)
    assert project.planned() == TRAIN | MEASURE | LAST


def test_a_colour_redraws_the_figures_only(project):
    project.edit(project.study / "figures.py", '{"row sum (control)": RED,', '{"row sum (control)": GREEN,')
    assert project.planned() == PLOT | REPORT


def test_the_page_of_the_report(project):
    project.append("src/jacnorm/report/templates/style.css", "p { color: black }\n")
    assert project.planned() == REPORT


# --- declarations ----------------------------------------------------------------------------------------------------


def test_a_threshold_judges_again_for_real_and_then_nothing_is_left(project):
    path = project.study / "claims.yaml"
    text, count = re.subn(r"(margin: \d+\.\d+)", r"\g<1>1", path.read_text(), count=1)
    assert count == 1
    path.write_text(text)
    untouched = {p: p.stat().st_mtime_ns for p in project.results.rglob("*") if p.suffix in (".parquet", ".svg")}
    assert project.jobs() == JUDGE | REPORT
    assert {p: p.stat().st_mtime_ns for p in untouched} == untouched
    assert project.planned() == set()


def test_a_caption_draws_again_and_a_departure_judges_again(project):
    path = project.study / "captions.yaml"
    captions = yaml.safe_load(path.read_text())
    next(iter(captions.values()))["caption"] += " Indeed."
    path.write_text(yaml.safe_dump(captions))
    assert project.planned() == PLOT | REPORT
    path = project.study / "departures.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text())[:-1]))
    assert project.planned() == LAST


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experiment", "values", "expected"),
    [
        ("depth", {"widths": [8, 9]}, {"stability/measure-depth-s10-11"}),
        ("scores", {"batch": 17}, {"stability/measure-scores-s10-11"}),
        ("drift", {"learning_rate": 0.02}, {"stability/train-drift-s10-11", "stability/measure-drift-s10-11"}),
    ],
)
def test_a_setting_reruns_its_experiment(project, experiment, values, expected):
    overlay(project, set_option(experiment, **values))
    assert project.planned() == expected | LAST


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        ("theorem", {"stability/measure-theorem-s12-13"}),
        ("trainability", {"stability/train-trainability-s12-13", "stability/measure-trainability-s12-13"}),
    ],
)
def test_new_seeds_add_their_own_jobs(project, experiment, expected):
    overlay(project, set_option(experiment, seeds=[10, 11, 12, 13]))
    assert project.planned() == expected | LAST


def test_fewer_seeds_measure_nothing(project):
    overlay(project, set_option("depth", seeds=[10, 11, 12, 13]))
    assert project.planned() == {"stability/measure-depth-s12-13"} | LAST
    overlay(project, set_option("depth", seeds=[11, 10]))  # nor does their order
    assert project.planned() <= JUDGE | REPORT


def test_the_device_is_a_setting_of_training_and_measuring(project):
    assert project.planned("--config", "device=cpu") == TRAIN | MEASURE | LAST


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_lost_table_is_measured_again_when_asked_for(project):
    path = project.results / "stability" / "tables" / "depth-s10-11.parquet"
    path.unlink()
    assert project.planned(str(path.relative_to(project.folder))) == {"stability/measure-depth-s10-11"}


def test_changed_data_rerun_what_reads_them(project):
    path = project.results / "data" / "digits.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    assert project.planned() == TRAIN | MEASURE_WITH_DATA | LAST
