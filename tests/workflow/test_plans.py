"""What Snakemake plans at each scale, and what every rule carries."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.workflow.projects import ROOT, Project

from jacnorm.config import study_names

SCALES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
RULES = [ROOT / "Snakefile", *sorted((ROOT / "workflow" / "rules").glob("*.smk"))]
MEASURED = {
    "stability": {"depth", "theorem", "conditions", "scores", "trainability", "drift"},
    "lipschitz": {"depth", "residual", "paired", "table"},
    "sharpening": {"descent", "images", "regularisers", "scaling"},
    "attention": {"probing", "synthetic"},
    "glstm": {"trees", "nar", "narr"},
    "fedgtst": {"bounds", "engines", "federated", "images", "domains"},
    "worldmodel": {"expansion", "pendulum", "dreamer"},
}
TRAINED = {
    "stability": {"trainability", "drift"},
    "lipschitz": {"depth", "residual", "paired", "table"},
    "sharpening": {"descent", "images", "regularisers", "scaling"},
    "attention": {"probing"},
    "glstm": {"nar", "narr", "gpp", "ring", "peptides"},
    "fedgtst": {"federated", "images", "domains"},
    "worldmodel": {"pendulum", "dreamer"},
}
NOT_AT = {
    "smoke": {
        "lipschitz": {"table"},
        "sharpening": {"images"},
        "glstm": {"narr", "ring", "peptides"},
        "fedgtst": {"images", "domains"},
        "worldmodel": {"dreamer"},
    },
    "laptop": {"glstm": {"peptides"}, "fedgtst": {"images", "domains"}},
}
JOBS_AT_SMOKE = {
    "stability": 11,
    "lipschitz": 9,
    "sharpening": 9,
    "attention": 6,
    "glstm": 6,
    "fedgtst": 8,
    "worldmodel": 5,
}  # one of them prepares the data, two with fedgtst

DATA_SETS = {"digits", "mnist", "cifar10", "cifar100", "python_docs", "tinyshakespeare", "digits_m", "mnist_m", "svhn"}
DATA_SETS |= {f"domainnet_{name}" for name in ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")}


def experiments_of(jobs: set[str], study: str, step: str) -> set[str]:
    """Experiments of which jobs are planned."""
    return {name for job in jobs for name in re.findall(rf"^{study}/{step}-(\w+)-s\d+-\d+$", job)}


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_plans_without_any_data(fresh: Project, scale):
    jobs = fresh.planned("--config", f"scale={scale}", overlay=None)
    for study, experiments in MEASURED.items():
        left_out = NOT_AT.get(scale, {}).get(study, set())
        assert experiments_of(jobs, study, "measure") == experiments - left_out
        assert experiments_of(jobs, study, "train") == TRAINED[study] - left_out
        assert {f"{study}/plot", f"{study}/judge", "report"} < jobs
    assert {job for job in jobs if job.startswith("data/")} <= {f"data/{name}" for name in DATA_SETS}


def test_every_study_is_planned():
    assert set(MEASURED) == set(study_names())


@pytest.mark.parametrize("study", MEASURED)
def test_a_study_takes_few_jobs_at_smoke(fresh: Project, study):
    done = fresh.snakemake("--dry-run", study, overlay=None)
    assert done.returncode == 0
    assert int(re.search(r"^total +(\d+)$", done.stdout, re.MULTILINE)[1]) == JOBS_AT_SMOKE[study] + 1  # the target


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
    targets = {rule for rule, sections in found.items() if set(sections) <= {"default_target", "name", "input"}}
    assert {rule.partition(": ")[0] for rule in targets} == {"Snakefile", "studies.smk"}
    assert len(found) - len(targets) == 7  # data, environment, train, measure, plot, judge, report
    order = ["name", "input", "output", "log", "benchmark", "resources", "params", "message", "shell"]
    for rule in found.keys() - targets:
        assert set(order) - {"name", "input"} <= set(found[rule]) <= set(order), rule
        assert found[rule] == sorted(found[rule], key=order.index), rule


def test_the_snakefile_only_includes_and_names_targets():
    assert rules(RULES[0]) == {"all": ["default_target", "input"]}
    code = [line for line in RULES[0].read_text().splitlines() if line and not line.startswith(("#", " "))]
    assert all(re.match(r"(from snakemake\.utils import|min_version|include:|rule all:)", line) for line in code)
