"""Which runs an experiment has, and how they are stacked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jacnorm.errors import UserError
from jacnorm.studies.fedgtst.cells import Condition, Run, grid
from jacnorm.studies.fedgtst.settings import DomainSettings, FederatedSettings
from jacnorm.studies.fedgtst.tables import COLUMNS

SMALL = FederatedSettings(
    seeds=[10, 11], clients=[10, 20], methods=["fedavg", "fediir", "fedgtst"], coefficients=[1e-4, 1e-3]
)


def runs(settings, target="digits_m"):
    return [run for stack in grid(settings, "digits", target) for run in stack]


def conditions(found):
    return list(dict.fromkeys(run.condition for run in found))


def test_every_network_and_number_of_clients_has_every_method_with_every_coefficient_and_seed():
    found = runs(SMALL.model_copy(update={"networks": ["lenet", "resnet18"]}))
    expected = {
        (network, clients, method, coefficient, seed)
        for network in ("lenet", "resnet18")
        for clients in (10, 20)
        for method, coefficient in [("fedavg", 0.0), ("fediir", 1e-3), ("fedgtst", 1e-4), ("fedgtst", 1e-3)]
        for seed in (10, 11)
    }
    cells = [(run.condition.network, run.condition.clients, run.method, run.coefficient, run.seed) for run in found]
    assert set(cells) == expected
    assert len(cells) == len(expected)


def test_a_stack_has_one_condition_and_one_method():
    for stack in grid(SMALL.model_copy(update={"participations": [0.5]}), "digits", "digits_m"):
        assert len({(run.condition, run.method) for run in stack}) == 1


def test_alternatives_come_one_at_a_time_for_the_first_network_and_only_where_they_matter():
    update = {
        "networks": ["lenet", "resnet18"], "participations": [0.1, 0.5], "epochs": [10], "splits": ["dirichlet"],
        "extra_shares": [0.0], "clients": [10],
    }  # fmt: skip
    found = runs(SMALL.model_copy(update=update))
    common = {"participation": 1.0, "local_epochs": 1, "split": "balanced", "extra_share": 0.1}
    other = [
        {name: run.columns[name] for name, value in common.items() if run.columns[name] != value} | {"by": run.method}
        for run in found
        if any(run.columns[name] != value for name, value in common.items())
    ]
    assert all(len(each) == 2 for each in other)
    seen = {(*each.items(),) for each in other}
    for name, value, methods in [
        ("participation", 0.1, ["fedavg", "fedgtst"]),
        ("participation", 0.5, ["fedavg", "fedgtst"]),
        ("local_epochs", 10, ["fedavg", "fedgtst"]),
        ("split", "dirichlet", ["fedavg", "fedgtst"]),
        ("extra_share", 0.0, ["fedgtst"]),
    ]:
        assert {(*{name: value, "by": method}.items(),) for method in methods} <= seen
    assert len(seen) == 9
    changed = [run for run in found if any(run.columns[name] != value for name, value in common.items())]
    assert {run.condition.network for run in changed} == {"lenet"}
    assert {run.condition.clients for run in changed} == {10}


def test_all_coefficients_of_a_method_are_run_at_an_alternative():
    found = runs(SMALL.model_copy(update={"epochs": [10]}))
    assert {run.coefficient for run in found if run.condition.local_epochs == 10 and run.method == "fedgtst"} == {
        1e-4,
        1e-3,
    }


def test_alternatives_of_nothing_are_refused():
    with pytest.raises(UserError, match=r"ablation_clients is 10, which is none of clients \[50\]"):
        runs(SMALL.model_copy(update={"clients": [50], "epochs": [10]}))
    with pytest.raises(UserError, match="ablation_methods names scaffold, which methods lacks"):
        runs(SMALL.model_copy(update={"ablation_methods": ["fedavg", "scaffold"], "epochs": [10]}))


def test_domainnet_has_one_split():
    settings = DomainSettings(seeds=[10], methods=["fedavg"])
    (stack,) = grid(settings, "domainnet", "domainnet_real")
    assert stack[0].condition.split == "domains"
    assert stack[0].condition.settings(settings).split == "balanced"
    with pytest.raises(UserError, match="DomainNet is split by its domains"):
        grid(settings.model_copy(update={"splits": ["dirichlet"]}), "domainnet", "domainnet_real")


@given(seeds=st.integers(1, 7), together=st.integers(1, 9))
def test_stacks_hold_every_run_once_and_are_of_nearly_equal_size(seeds, together):
    settings = SMALL.model_copy(update={"seeds": list(range(10, 10 + seeds)), "runs_together": together})
    whole = grid(settings.model_copy(update={"runs_together": 10_000}), "digits", "digits_m")
    stacks = grid(settings, "digits", "digits_m")
    assert [run for stack in stacks for run in stack] == [run for stack in whole for run in stack]
    assert all(1 <= len(stack) <= together for stack in stacks)
    assert len(stacks) == sum(-(-len(stack) // together) for stack in whole)


def test_a_run_is_its_columns_and_its_name_leaves_out_nothing_but_the_seed():
    found = runs(SMALL.model_copy(update={"participations": [0.5]}))
    assert all(Run.of(run.columns) == run for run in found)
    assert len({run.id for run in found}) == len(found)
    for columns in (COLUMNS["federated_runs"], COLUMNS["federated_statistics"], COLUMNS["domain_transfer"]):
        assert set(found[0].columns) <= set(columns)


def test_a_condition_s_settings_are_the_experiment_s_but_for_its_own_values():
    condition = Condition("digits", "digits_m", "lenet", 10, 0.5, 3, "dirichlet", 0.0)
    found = condition.settings(SMALL)
    changed = {name for name in type(SMALL).model_fields if getattr(found, name) != getattr(SMALL, name)}
    assert changed == {"participation", "local_epochs", "split", "extra_share"}
    assert (found.participation, found.local_epochs, found.split, found.extra_share) == (0.5, 3, "dirichlet", 0.0)
