"""The estimate of `make plan`, on a dry run's text and on the shipped scales."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from jacnorm.config import load
from jacnorm.files import load_tensors
from jacnorm.plan import estimate, job_counts, step_of
from jacnorm.studies.stability import storage, train
from jacnorm.studies.stability.settings import StudySettings

CONFIGS = Path(__file__).parents[1] / "configs"
DRY_RUN = """\
Building DAG of jobs...
Job stats:
job                      count
---------------------  -------
stability_train_drift        5
stability_measure_depth     20
report                       1
all                          1
total                       27
"""


def test_jobs_are_counted_by_rule_without_targets():
    expected = {"stability_train_drift": 5, "stability_measure_depth": 20, "report": 1}
    assert job_counts(DRY_RUN.splitlines()) == expected
    assert job_counts((DRY_RUN + DRY_RUN).splitlines()) == expected, "Snakemake prints the table twice"
    assert not job_counts(["Nothing to be done (all requested files are present and up to date)."])


@pytest.mark.parametrize(
    ("rule", "step"),
    [
        ("stability_train_drift", "train"),
        ("stability_measure_depth", "measure"),
        ("data", "data"),
        ("report", "judge"),
        ("stability", None),
    ],
)
def test_rules_belong_to_steps(rule, step):
    assert step_of(rule) == step


def test_gpu_hours_are_jobs_times_limit_times_gpus():
    overlay = {"jobs": {"train": {"gpu": 2, "runtime": 90}, "measure": {"gpu": 1, "runtime": 30}}}
    lines = list(estimate(load(CONFIGS, overlay), Counter(stability_train_drift=4, stability_measure_depth=6)))
    assert "at most 15 GPU hours; jobs usually end well before their limit" in lines  # 4 * 2 * 1.5 + 6 * 0.5


@pytest.mark.parametrize("experiment", ["trainability", "drift"])
def test_storage_is_what_training_keeps(experiment, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")
    tiny = {"seeds": [10, 11], "width": 8, "depths": [3, 4], "epochs": 1}
    changes = {"trainability": {**tiny, "learning_rates": [0.01]}, "drift": {**tiny, "measured_epochs": [0, 1]}}
    settings = StudySettings(**{name: {"seeds": [10], "width": 8, "epochs": 1} for name in changes} | changes)
    getattr(train, experiment)(getattr(settings, experiment), tmp_path, [digits], tmp_path / "weights.safetensors")
    tensors, _ = load_tensors(tmp_path / "weights.safetensors")
    kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert storage.kept_bytes(settings, [experiment]) == kept
