"""The list of arms, and agents that are written and read."""

from __future__ import annotations

import pytest
import torch

from jacnorm.errors import UserError
from jacnorm.studies.worldmodel.arms import Agents, Arm, arms, load, save
from jacnorm.studies.worldmodel.settings import DreamerSettings, PendulumSettings
from jacnorm.studies.worldmodel.tables import COLUMNS
from jacnorm.training import snapshots
from jacnorm.training.snapshots import Snapshot

SETTINGS = PendulumSettings(
    lambdas=[0.0, 0.01], f_only_lambdas=[0.1], zero_drift=[0.3], drift=[0.5], lengths=[32], batches=[8]
)


def test_each_arm_differs_from_the_sweep_in_one_respect():
    found = arms(SETTINGS)
    assert found[:2] == [Arm(weight, "hz", True, 2, "none", 0.0, 16, 16) for weight in (0.0, 0.01)]
    assert found[2] == Arm(0.1, "hz", False, 2, "none", 0.0, 16, 16)
    rest = [(arm.weight, arm.include_prior, arm.error, arm.error_size, arm.batch, arm.length) for arm in found[3:]]
    assert rest == [
        *[(weight, True, "zero-drift", 0.3, 16, 16) for weight in (0.0, 0.01)],
        *[(weight, True, "drift", 0.5, 16, 16) for weight in (0.0, 0.01)],
        *[(weight, True, "none", 0.0, 16, 32) for weight in (0.0, 0.01)],
        *[(weight, True, "none", 0.0, 8, 16) for weight in (0.0, 0.01)],
    ]


def test_no_arm_stands_twice():
    repeated = SETTINGS.model_copy(
        update={"include_prior": False, "f_only_lambdas": [0.01], "lengths": [16], "batches": [16]}
    )
    found = arms(repeated)
    assert len(found) == len(set(found)) == 6


def test_inputs_are_written_in_one_order_and_the_other_agent_has_the_same_arms():
    assert {arm.wrt for arm in arms(SETTINGS.model_copy(update={"wrt": ["z", "h"]}))} == {"hz"}
    assert {arm.wrt for arm in arms(SETTINGS.model_copy(update={"wrt": ["z"]}))} == {"z"}
    found = arms(DreamerSettings(lambdas=[0.0, 0.01], batch=8, length=16))
    assert [arm.weight for arm in found] == [0.0, 0.01]
    assert {(arm.batch, arm.length) for arm in found} == {(8, 16)}


def test_columns_are_those_of_the_tables_and_lead_back():
    for arm in arms(SETTINGS):
        assert list(arm.columns) == [name for name in COLUMNS["pendulum_fits"] if name in arm.columns]
        assert set(COLUMNS["pendulum_fits"]) >= set(arm.columns)
        assert Arm.of(arm.columns) == arm
    assert len({str(arm) for arm in arms(SETTINGS)}) == len(arms(SETTINGS))


def test_agents_come_back_as_they_were(tmp_path):
    written = [
        Agents(arm, {"prior.output": torch.rand(2, 3)}, {"actor.output": torch.rand(2, 4)}, torch.tensor([-1, 7]))
        for arm in arms(SETTINGS)[:2]
    ]
    save(tmp_path / "agents.safetensors", written)
    for one, other in zip(load(tmp_path / "agents.safetensors"), written, strict=True):
        assert one.arm == other.arm
        assert torch.equal(one.model["prior.output"], other.model["prior.output"])
        assert torch.equal(one.actor["actor.output"], other.actor["actor.output"])
        assert one.diverged_at.tolist() == [-1, 7]


def test_another_files_snapshots_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    snapshots.save(path, [Snapshot({"depth": 3}, {"weight": torch.rand(2)})])
    with pytest.raises(UserError, match="does not hold agents of the pendulum; delete it and train again"):
        load(path)
