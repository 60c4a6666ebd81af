"""What Snakemake plans at each scale, and what every rule carries."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.workflow.projects import ROOT, Project

SCALES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
RULES = [ROOT / "Snakefile", *sorted((ROOT / "workflow" / "rules").glob("*.smk"))]
EXPERIMENTS = {"depth", "theorem", "conditions", "scores", "trainability", "drift"}


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_plans_without_any_data(fresh: Project, scale):
    jobs = fresh.planned("--config", f"scale={scale}", overlay=None)
    measured = {name for job in jobs for name in re.findall(r"^stability/measure-(\w+)-s\d+-\d+$", job)}
    trained = {name for job in jobs for name in re.findall(r"^stability/train-(\w+)-s\d+-\d+$", job)}
    assert measured == EXPERIMENTS
    assert trained == {"trainability", "drift"}
    assert {"stability/plot", "stability/judge", "report"} < jobs
    assert {job for job in jobs if job.startswith("data/")} <= {"data/digits", "data/mnist", "data/cifar10"}


def test_the_study_takes_at_most_twelve_jobs_at_smoke(fresh: Project):
    done = fresh.snakemake("--dry-run", "stability", overlay=None)
    assert done.returncode == 0
    assert int(re.search(r"^total +(\d+)$", done.stdout, re.MULTILINE)[1]) <= 12


def test_a_plain_call_takes_the_default_profile(finished: Project):
    # The run that made `finished` named no cores, which Snakemake refuses without a profile.
    log = (finished.folder / "run.log").read_text()
    assert "Using workflow specific profile profiles/default" in log
    assert re.search(r"^Provided cores: \d+$", log, re.MULTILINE)


def test_no_run_is_recorded_where_recording_is_off(finished: Project):
    assert not (finished.results / "wandb").exists()


# --- the text of the rules -------------------------------------------------------------------------------------------


def rules(path: Path) -> dict[str, list[str]]:
    """Sections of each rule of a file, in their order."""
    found: dict[str, list[str]] = {}
    rule, margin = "", 0
    for line in path.read_text().splitlines():
        indent = len(line) - len(line.lstrip())
        if match := re.match(r"\s*(?:rule|checkpoint)(?: (\w+))?:$", line):
            rule, margin = match[1] or f"line {len(found)}", indent + 4
            found[rule] = []
        elif rule and (match := re.match(r"\s*(\w+):", line)) and indent == margin:
            found[rule].append(match[1])
        elif line.strip() and indent < margin:
            rule = ""
    return found


def test_every_rule_has_a_log_a_benchmark_and_resources_and_none_hides_code():
    found = {f"{path.name}: {rule}": sections for path in RULES for rule, sections in rules(path).items()}
    targets = {rule for rule, sections in found.items() if set(sections) <= {"default_target", "input"}}
    assert {rule.rpartition(" ")[2] for rule in targets} == {"all", "stability"}
    assert len(found) - len(targets) == 6  # data, train, measure, plot, judge, report
    order = ["name", "input", "output", "log", "benchmark", "resources", "params", "message", "shell"]
    for rule in found.keys() - targets:
        assert set(order) - {"name", "input"} <= set(found[rule]) <= set(order), rule
        assert found[rule] == sorted(found[rule], key=order.index), rule


def test_the_snakefile_only_includes_and_names_targets():
    assert rules(RULES[0]) == {"all": ["default_target", "input"]}
    code = [line for line in RULES[0].read_text().splitlines() if line and not line.startswith(("#", " "))]
    assert all(re.match(r"(from snakemake\.utils import|min_version|include:|rule all:)", line) for line in code)
