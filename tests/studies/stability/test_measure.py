"""Each experiment through its command line: rows, repeatability, and which draws are shared and which are not."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency
from tests.studies.stability import tiny

from jacnorm.files import read_columns
from jacnorm.settings import flags
from jacnorm.studies.stability import ensembles, measure, model, stacks
from jacnorm.studies.stability.tables import COLUMNS
from jacnorm.training import seeds
from jacnorm.training.snapshots import Snapshot, load, save

torch.set_num_threads(1)

# Rows of one seed, counted by hand from the settings in tiny.py.
ROWS = {
    "depth": 3 * ((1 + 1) + 5 + 1 + 2),  # depths 1, 2, 4; two ReLU variances, five pruned, tanh, two pruned tanh
    "limit": 2 * (4 + 4 + 1),  # two widths; four ends at one and at three factors; the rectangle has no single factor
    "surrogate": 2 * 3 * 2,  # draws, masks, diagonals
    "independence": 2 * 5,  # repeats, pairs
    "edge_matrices": (1 + 2) * 2,  # one size with a degree that grows, two with a fixed one; two laws of entries
    "edge_networks": 2,
    "correlated": 2 * 3 * 3,  # kinds, exponents with infinity, diagonals
    "scores": 1 + 5 * 4,
    "trainability": 2 * 2,  # scalings, learning rates
    "start": 2,
    "curves": 2 * 2,  # depths, epochs
    "drift": 2 * 2,  # depths, measured epochs
}
MEASURED = {"depth": ["depth"], "theorem": ["limit", "surrogate", "independence"],
            "conditions": ["edge_matrices", "edge_networks", "correlated"], "scores": ["scores"]}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    """All experiments, with tracking switched off by hand: a module's fixture comes before the function's."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        tiny.everything(tiny.ALL, folder, digits)
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_a_table_has_its_rows_its_documented_columns_and_no_nan(run, name):
    path = run / "tables" / f"{name}-s10-11.parquet"
    rows = pd.read_parquet(path)
    assert len(rows) == 2 * ROWS[name]
    assert list(rows.columns) == list(COLUMNS[name]) == list(read_columns(path))
    assert all(column.meaning for column in read_columns(path).values())
    assert not rows.isna().any(axis=None)
    assert (rows.groupby("seed").size() == ROWS[name]).all()
    keys = [c for c in rows if not pd.api.types.is_float_dtype(rows[c]) or c in ("sigma_w2", "sparsity", "degree",
            "exponent", "learning_rate")]  # fmt: skip
    assert not rows.duplicated(keys).any()  # each cell once


def test_no_other_table_is_made(run):
    assert {path.name for path in (run / "tables").iterdir()} == {f"{name}-s10-11.parquet" for name in ROWS}
    assert set(ROWS) == set(COLUMNS)


def extras(name, digits):
    return ("--data", digits) if name == "scores" else ()


@pytest.mark.parametrize("name", MEASURED)
def test_two_runs_give_the_same_bytes(run, tmp_path, digits, name):
    tiny.call("measure", name, getattr(tiny.ALL, name), tmp_path, *extras(name, digits))
    for table in MEASURED[name]:
        file = f"{table}-s10-11.parquet"
        assert (tmp_path / file).read_bytes() == (run / "tables" / file).read_bytes()


@pytest.mark.parametrize("name", MEASURED)
def test_a_block_of_seeds_is_its_seeds_one_by_one(run, tmp_path, digits, name):
    together = tiny.read(run / "tables", [10, 11])
    for seed in (10, 11):
        settings = getattr(tiny.ALL, name).model_copy(update={"seeds": [seed]})
        alone = tiny.call("measure", name, settings, tmp_path, *extras(name, digits))
        for table in MEASURED[name]:
            expected = together[table][together[table].seed == seed].reset_index(drop=True)
            keys = [c for c in expected if not pd.api.types.is_float_dtype(expected[c])]
            pd.testing.assert_frame_equal(
                alone[table].sort_values(keys, kind="stable", ignore_index=True),
                expected.sort_values(keys, kind="stable", ignore_index=True),
                rtol=1e-9,
                atol=1e-9,
            )


def test_measurements_in_several_stacks_are_those_in_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stacks, "STACK_BYTES", 1)
    alone = tiny.call("measure", "depth", tiny.DEPTH, tmp_path)["depth"]
    keys = ["seed", "activation", "sigma_w2", "method", "scaling", "depth"]
    expected = tiny.read(run / "tables", [10, 11])["depth"]
    pd.testing.assert_frame_equal(
        alone.sort_values(keys, ignore_index=True), expected.sort_values(keys, ignore_index=True), rtol=1e-9, atol=1e-9
    )


def test_the_module_is_a_command_line(tmp_path, run):
    command = [sys.executable, "-m", "jacnorm.studies.stability.measure", "depth", "--tables", str(tmp_path)]
    done = subprocess.run(
        [*command, *flags(tiny.DEPTH).split()],
        env={**os.environ, "JACNORM_WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    file = "depth-s10-11.parquet"
    assert (tmp_path / file).read_bytes() == (run / "tables" / file).read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is present here, so asking for it is no mistake")
def test_cuda_that_is_absent_is_refused_in_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tiny.call("measure", "depth", tiny.DEPTH, tmp_path, "--device", "cuda")
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert said.startswith('ERROR: device "cuda" was asked for')
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


# --- which draws are shared ------------------------------------------------------------------------------------------


@pytest.fixture
def measured_networks(monkeypatch):
    """Every list of weights, and every diagonal, that was measured."""
    seen = {"log_norms": [], "log_product_norms": []}
    for name, calls in seen.items():
        function = getattr(model, name)

        def recording(*arguments, function=function, calls=calls):
            calls.append(arguments)
            return function(*arguments)

        for module in (measure, ensembles):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, recording)
    return seen


def test_pruned_networks_are_the_dense_one_of_their_seed_with_weights_removed(tmp_path, measured_networks):
    tiny.call("measure", "depth", tiny.DEPTH, tmp_path)
    relu = [weights for weights, _, activation, _ in measured_networks["log_norms"] if activation == "relu"]
    dense, *pruned = relu[:6]  # variance 2, then random twice and magnitude three times
    for number, network in enumerate(pruned):
        for full, left in zip(dense, network, strict=True):
            kept = left != 0
            assert kept.flatten(1).sum(1).tolist() == [18, 18]  # half of 36
            ratios = (left / full)[kept]
            assert (ratios - ratios[0]).abs().max() < 1e-12
            assert ratios[0].item() == pytest.approx(1.0 if number in (0, 2) else ratios[0].item())
    one, two = relu[0], relu[6]
    assert not torch.allclose(one[0], two[0] / 2**0.5)  # another variance is another network


def test_true_and_surrogate_networks_are_drawn_apart(tmp_path, measured_networks):
    tiny.call("measure", "theorem", tiny.THEOREM, tmp_path)
    true = [arguments[0][0] for arguments in measured_networks["log_norms"]]
    surrogate = [weights[0] for weights, _, depths in measured_networks["log_product_norms"] if depths == [3]]
    surrogate = [first for first in surrogate if first.shape[1:] == (12, 12)]
    assert len(true) == len(surrogate) == 6  # two draws of three masks
    networks = [network[run] for network in [*true, *surrogate] for run in range(2)]
    for i, first in enumerate(networks):
        for second in networks[:i]:
            assert not ((first == second) & (first != 0)).any()


def correlation_with_uniform_bits(diagonals, weights):
    """Of each unit's diagonal entry with the sign of the weight at its place in memory, over all units and seeds."""
    bits = torch.cat([d.flatten() for d in diagonals]).numpy()
    signs = torch.cat([w.flatten(1)[:, : d.shape[1]].sign().flatten() for d, w in zip(diagonals, weights, strict=True)])
    return abs(np.corrcoef(bits, signs.numpy())[0, 1]), len(bits)


def test_surrogate_diagonals_do_not_share_the_stream_of_the_weights(tmp_path, measured_networks):
    settings = tiny.THEOREM.model_copy(update={"seeds": list(range(10, 60)), "limit_widths": [32], "limit_depths": [1]})
    tiny.call("measure", "theorem", settings, tmp_path)
    weights, diagonals, _ = next(a for a in measured_networks["log_product_norms"] if a[0][0].shape[1] == 32)
    found, count = correlation_with_uniform_bits(diagonals[:1], weights[:1])
    assert count == 1600
    assert found < 4 / math.sqrt(count)
    # The control: from one stream, they do follow each other.
    seeds = range(50)
    shared = [[f(32, 32, generator=torch.Generator().manual_seed(s)) for s in seeds] for f in (torch.rand, torch.randn)]
    bits, normals = torch.stack(shared[0])[:, 0] < 0.5, torch.stack(shared[1])
    assert correlation_with_uniform_bits([bits.double()], [normals])[0] > 8 / math.sqrt(count)


@pytest.mark.parametrize("name", ["depth", "conditions", "scores"])
def test_masks_do_not_follow_the_sizes_of_the_weights(tmp_path, measured_networks, digits, name):
    # Divided by the root of the density, a random mask keeps the second moment; one from the weights' stream keeps 1.8
    # times as much at sparsity 0.9.
    update = {"seeds": list(range(10, 60))} | {
        "depth": {"widths": [12], "sparsities": [0.9]},
        "conditions": {"network_width": 20, "network_degrees": [2.0], "correlated_widths": [2]},
        "scores": {"sparsities": [0.9], "methods": ["random"]},
    }[name]
    tiny.call("measure", name, getattr(tiny.ALL, name).model_copy(update=update), tmp_path, *extras(name, digits))
    networks = [weights for weights, _, activation, _ in measured_networks["log_norms"] if activation == "relu"]
    rescaled = networks[{"depth": 2, "conditions": 0, "scores": 2}[name]]  # dense, unscaled, rescaled
    squares = torch.cat([(weight.square() * weight.shape[2] / 2.0).flatten() for weight in rescaled])
    kept = (squares > 0).sum().item()
    assert 0.08 < kept / len(squares) < 0.12
    assert squares.mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(3 / kept))  # E z^4 = 3
    assert 5 * math.sqrt(3 / kept) < 0.4


def test_no_two_purposes_of_a_cell_share_a_stream(tmp_path, monkeypatch, digits):
    streams = {}
    original = seeds.generator

    def recording(study, cell, seed, purpose):
        made = original(study, cell, seed, purpose)
        streams.setdefault(made.initial_seed() % 2**32, set()).add((cell, seed, purpose))
        return made

    for module in (stacks, ensembles):
        monkeypatch.setattr(module, "generator", recording)
    for name in MEASURED:
        tiny.call("measure", name, getattr(tiny.ALL, name), tmp_path, *extras(name, digits))
    assert len(streams) > 100
    assert all(len(users) == 1 for users in streams.values())
    assert {purpose.split()[0] for users in streams.values() for _, _, purpose in users} >= {
        "weights", "mask", "diagonals", "input"
    }  # fmt: skip


def test_correlated_networks_of_one_seed_share_their_noise_over_exponents(tmp_path, measured_networks):
    tiny.call("measure", "conditions", tiny.CONDITIONS, tmp_path)
    linear = [w for w, diagonals, _ in measured_networks["log_product_norms"] if diagonals == [None] * 4]
    fast, uncorrelated = linear[1], linear[2]  # equicorrelated, exponent 1.5 and infinity
    share = 6.0**-1.5
    rest = fast[0] - (1 - share) ** 0.5 * uncorrelated[0]
    assert rest.std((1, 2)).max() < 1e-12 * rest.abs().max()  # what is left is one number per layer and seed


def test_surrogate_log_norms_follow_the_true_ones(tmp_path):
    # Hanin and Nica's identity, with 200 networks of each kind: a wrong end diagonal would shift the mean by 0.35.
    update = {"seeds": list(range(10, 60)), "surrogate_draws_per_seed": 4, "surrogate_width": 24, "limit_widths": [2]}
    settings = tiny.THEOREM.model_copy(update={**update, "independence_networks": 2})
    rows = tiny.call("measure", "theorem", settings, tmp_path)["surrogate"]
    for _, cell in rows[rows.method != "magnitude"].groupby("method"):
        true, other = (cell[cell.diagonal == kind].log_norm for kind in ("true", "surrogate"))
        error = math.sqrt(true.var() / 200 + other.var() / 200)
        assert abs(true.mean() - other.mean()) < 4 * error < 0.2


# --- chi-square ------------------------------------------------------------------------------------------------------


@given(st.tuples(*[st.integers(1, 300)] * 4))
def test_chi_square_is_scipys_without_correction(counts):
    a = np.repeat([True, True, False, False], counts)
    b = np.repeat([True, False, True, False], counts)
    table = np.array(counts).reshape(2, 2)
    expected = chi2_contingency(table, correction=False).pvalue
    assert ensembles.chi_square_p_value(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_a_constant_variable_is_no_evidence():
    varying = np.array([True, False, True])
    assert ensembles.chi_square_p_value(np.ones(3, bool), varying) == 1.0
    assert ensembles.chi_square_p_value(varying, np.zeros(3, bool)) == 1.0


# --- trained networks ------------------------------------------------------------------------------------------------


def test_initial_weights_are_measured_at_their_scaling(run):
    tables = tiny.read(run / "tables", [10, 11])
    start = tables["start"].set_index(["seed", "scaling"]).log_norm.unstack()
    assert (start.frobenius > start.none).all()  # at sparsity 0.5 every factor is above one


def test_a_network_that_diverged_is_recorded_as_nan_and_the_others_are_measured_as_before(run, tmp_path, digits):
    snapshots = load(run / "drift.safetensors")
    last = next(i for i, each in enumerate(snapshots) if each.cell["depth"] == 3 and each.cell["epoch"] == 2)
    broken = [weight.clone() for weight in snapshots[last].weights]
    broken[1][0, 0, 0] = math.nan
    snapshots[last] = Snapshot.of_layers(snapshots[last].cell, broken)
    save(tmp_path / "drift.safetensors", snapshots)
    files = ("--data", digits, "--weights", tmp_path / "drift.safetensors")
    rows = tiny.call("measure", "drift", tiny.DRIFT, tmp_path / "tables", *files)["drift"]
    before = tiny.read(run / "tables", [10, 11])["drift"]
    lost = (rows.seed == 10) & (rows.depth == 3) & (rows.epoch == 2)
    numbers = ["log_norm", "hidden_norm", "row_correlation", "column_correlation"]
    assert rows[lost][numbers].isna().all(axis=None)
    pd.testing.assert_frame_equal(rows[~lost], before[~lost])
