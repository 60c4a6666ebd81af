"""The measuring step from trained tiny networks to tables, the exact inequality, and the exact synthetic networks."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.studies.lipschitz.test_train_depth import TINY, plain, train

from jacnorm.files import read_columns, read_table
from jacnorm.nets.mlp import init_gaussian
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.lipschitz import measure_depth
from jacnorm.studies.lipschitz.bounds import leading
from jacnorm.studies.lipschitz.inputs import load
from jacnorm.studies.lipschitz.tables import COLUMNS
from jacnorm.training import snapshots
from jacnorm.training.snapshots import Snapshot

torch.set_num_threads(1)

NAMES = ["augmented", "layers", "leading", "theorem"]


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


def measure(folder, digits, weights=None, settings=TINY):
    """Call the step as a rule does; its tables."""
    before = torch.get_deterministic_debug_mode()
    files = ["--tables", folder, "--data", digits, "--weights", weights or folder / "depth.safetensors"]
    try:
        run({"depth": measure_depth.depth}, ["--device", "cpu", *map(str, files), *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)
    block = f"s{min(settings.seeds)}-{max(settings.seeds)}"
    return {name: read_table(folder / f"{name}-{block}.parquet") for name in NAMES}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        fits, kept = train(folder, digits)
        assert fits.reached.all()
        return folder, kept, measure(folder, digits)


def row_of(table, each, position, **columns):
    """The row of one network of a snapshot."""
    cell = {k: v for k, v in each.cell.items() if k in table} | {"seed": TINY.seeds[position]} | columns
    rows = table[np.logical_and.reduce([table[name] == value for name, value in cell.items()])]
    assert len(rows) == 1
    return rows.iloc[0]


# --- from trained networks to tables ---------------------------------------------------------------------------------


def test_tables_have_their_rows_and_documented_columns_and_no_nan(measured):
    folder, _, tables = measured
    networks = 2 * 2 * 2  # seeds, activations, depths
    expected = {"leading": 2 * networks, "layers": 2 * 2 * 2 * (2 + 4), "theorem": networks, "augmented": 3 * networks}
    for name, rows in tables.items():
        assert len(rows) == expected[name]
        assert list(rows.columns) == list(COLUMNS[name]) == list(read_columns(folder / f"{name}-s10-11.parquet"))
        assert not rows.isna().any(axis=None)
        keys = [c for c in ("seed", "activation", "depth", "stage", "layer", "split") if c in rows]
        assert not rows.duplicated(keys).any()
        assert np.isfinite(rows[[c for c in rows if rows[c].dtype == float]]).all(axis=None)


def test_the_leading_terms_of_a_network_are_those_of_autograd(measured, digits):
    _, kept, tables = measured
    inputs = load(digits, TINY.train_samples)
    for each in (kept[3], kept[6]):  # ReLU trained, tanh initial, four matrices
        model = plain([w.double() for w in each.weights], each.cell["activation"], 1).requires_grad_(False)
        x = inputs.train_x.flatten(1).double()
        terms, hidden = [], x
        for layer in range(4):
            linear, rest = model[2 * layer], model[2 * layer + 1 :]
            before = linear(hidden)
            jacobians = torch.func.vmap(torch.func.jacrev(lambda z, part=rest: part(z)))(before)
            jacobian = torch.linalg.matrix_norm(jacobians, 2).max() if len(rest) else torch.tensor(1.0)
            terms.append((jacobian * hidden.norm(dim=1).max() * linear.weight.norm(dim=1).sum()).item())
            layers = row_of(tables["layers"], each, 1, layer=layer + 1)
            assert layers.log_jacobian == pytest.approx(math.log(jacobian), abs=1e-9)
            assert layers.log_hidden == pytest.approx(hidden.norm(dim=1).max().log().item())
            assert layers.log_spectral_norm == pytest.approx(torch.linalg.matrix_norm(linear.weight, 2).log().item())
            assert layers.log_entries == pytest.approx(linear.weight.abs().sum().log().item())
            hidden = model[2 * layer + 1](before) if layer < 3 else before
        row = row_of(tables["leading"], each, 1)
        assert row.log_ours_weighted == pytest.approx(1.5 * math.log(sum(term ** (2 / 3) for term in terms)))
        true = hidden.gather(1, inputs.train_y[:, None])[:, 0]
        other = hidden.scatter(1, inputs.train_y[:, None], -math.inf).max(1).values
        assert row.margin == pytest.approx((true - other).min().item())
        assert row.margin_p10 == pytest.approx((true - other).quantile(0.1).item())


def test_ours_is_at_most_the_spectral_term_for_every_network_that_was_measured(measured):
    rows = measured[2]["leading"]
    assert (rows.not_applicable == "").all()
    assert (rows.log_ours_weighted - rows.log_spectral_weighted).max() <= 1e-9
    assert (rows.log_largest_term <= rows.log_ours_unweighted).all()


def test_the_theorem_agrees_with_the_leading_terms(measured):
    tables = measured[2]
    trained = tables["leading"][tables["leading"].stage == "trained"]
    both = tables["theorem"].merge(trained, on=["seed", "data_set", "activation", "width", "depth"])
    assert len(both) == len(tables["theorem"])
    assert (both.samples == TINY.theorem_samples).all()
    # Norms over a tenth of the samples are smaller, and not by much.
    lag = both.log_ours_weighted - np.log(both.margin) - both.log_h1
    assert lag.between(0, 2).all()
    assert (both.log_spectral_weighted - np.log(both.margin) - both.log_spectral).between(0, 1).all()
    parts = both[["log_h1", "log_h2", "log_h3", "log_jac"]].to_numpy()
    # (sum of kappas)^(2/3) is at most the sum, and each part is at most the whole.
    assert (both.log_bound >= parts.max(1)).all()
    assert (both.log_bound <= 1.5 * np.log(np.exp(parts * 2 / 3).sum(1)) + 1e-9).all()
    assert (both.pairs == (2 * both.depth - 1) * both.depth).all()
    assert (both.passes == both.pairs).all()
    n = 2 * both.depth - 1
    assert (both.separate_passes == n * (n + 1) * (n + 2) // 6).all()


def test_all_training_samples_are_taken_where_there_are_no_more(measured, tmp_path, digits):
    folder, _, _ = measured
    settings = TINY.model_copy(update={"theorem_samples": 10_000})
    tables = measure(tmp_path, digits, folder / "depth.safetensors", settings)
    trained = tables["leading"][tables["leading"].stage == "trained"].reset_index(drop=True)
    theorem = tables["theorem"]
    assert (theorem.samples == TINY.train_samples).all()
    np.testing.assert_allclose(theorem.log_h1, trained.log_ours_weighted - np.log(trained.margin), rtol=1e-9)
    np.testing.assert_allclose(theorem.log_spectral, trained.log_spectral_weighted - np.log(trained.margin), rtol=1e-9)


def test_the_augmented_loss_is_the_loss_on_the_training_samples_and_rises_far_from_them(measured):
    rows = measured[2]["augmented"]
    assert (rows.smallest_gap >= 0).all()
    assert (rows[rows.split == "train"].largest_gap == 0).all()
    assert (rows[rows.split == "noise"].largest_gap > 0.5).all()
    assert (rows.largest_gap <= 1).all()
    for column in ("indicator_slope", "ramp_slope"):
        assert rows[column].between(0.99, 1 + 1e-9).all()


def test_two_runs_give_the_same_bytes(measured, tmp_path, digits):
    folder, _, _ = measured
    measure(tmp_path, digits, folder / "depth.safetensors")
    for name in NAMES:
        file = f"{name}-s10-11.parquet"
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_a_seed_in_a_block_is_the_seed_alone(measured, tmp_path, digits):
    _, kept, together = measured
    alone = [Snapshot(each.cell, {name: tensor[1:] for name, tensor in each.tensors.items()}) for each in kept]
    snapshots.save(tmp_path / "one.safetensors", alone)
    found = measure(tmp_path, digits, tmp_path / "one.safetensors", TINY.model_copy(update={"seeds": [11]}))
    for name, rows in found.items():
        expected = together[name][together[name].seed == 11].reset_index(drop=True)
        for column in rows:
            if rows[column].dtype == float:
                np.testing.assert_allclose(rows[column], expected[column], rtol=1e-8, atol=1e-9)
            else:
                assert (rows[column] == expected[column]).all()


def test_samples_in_several_chunks_are_those_in_one(measured, tmp_path, digits, monkeypatch):
    folder, _, together = measured
    monkeypatch.setattr(measure_depth, "CHUNK", 30)
    found = measure(tmp_path, digits, folder / "depth.safetensors")
    for column in (c for c in found["leading"] if found["leading"][c].dtype == float):
        np.testing.assert_allclose(found["leading"][column], together["leading"][column], rtol=1e-10, atol=1e-10)


def write(path, cell, weights, biases=None):
    tensors = {f"weight/{i}": w for i, w in enumerate(weights)}
    tensors |= {f"bias/{i}": b for i, b in enumerate(biases or [])}
    snapshots.save(path, [Snapshot({"data_set": "digits", "width": 12, "stage": "trained", **cell}, tensors)])


def untrained(depth=3, biases=None):
    widths = [64, *[12] * (depth - 1), 10]
    return init_gaussian(widths, 2.0, [torch.Generator().manual_seed(seed) for seed in TINY.seeds])


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu"])
def test_bounds_are_infinite_where_a_margin_is_not_positive_and_one_sentence_says_so(
    tmp_path, digits, caplog, activation
):
    write(tmp_path / "depth.safetensors", {"activation": activation, "depth": 3}, untrained())
    with caplog.at_level(logging.INFO, logger="jacnorm"):
        tables = measure(tmp_path, digits)
    assert (tables["leading"].margin < 0).all()
    theorem = tables["theorem"]
    for column in ("log_h1", "log_bound", "log_simplified", "log_spectral"):
        assert (theorem[column] == math.inf).all()
    assert np.isfinite(theorem[["log_h2", "log_h3", "log_jac"]]).all(axis=None)
    assert np.isfinite(tables["leading"].log_ours_weighted).all()
    (record,) = [each for each in caplog.records if "infinite" in each.getMessage()]
    assert record.getMessage() == (
        f"digits, {activation}, width 12, depth 3: the smallest training margin of seed 10, 11 is not positive, so the "
        "bounds are infinite there; raise max_epochs, or take fewer training samples"
    )
    # The augmented loss needs no margin.
    assert (tables["augmented"][tables["augmented"].split == "train"].largest_gap == 0).all()


def test_why_the_inequality_need_not_hold(tmp_path, digits):
    zeros = [torch.zeros(2, n) for n in (12, 12, 10)]
    for activation, biases, words in (
        ("softplus", None, "map 0 to 0"),
        ("tanh", zeros, "without biases"),
        ("elu", None, ""),
    ):
        write(tmp_path / "depth.safetensors", {"activation": activation, "depth": 3}, untrained(), biases)
        reasons = set(measure(tmp_path, digits)["leading"].not_applicable)
        assert len(reasons) == 1
        reason = reasons.pop()
        assert words in reason
        assert bool(reason) == bool(words)
        assert reason.count(".") == bool(words)


def test_a_network_that_is_not_finite_has_nan_and_leaves_the_other_its_numbers(measured, tmp_path, digits):
    _, kept, together = measured
    damaged = [Snapshot(each.cell, {k: v.clone() for k, v in each.tensors.items()}) for each in kept]
    for each in damaged:
        each.tensors["weight/1"][0, 0, 0] = math.nan
    snapshots.save(tmp_path / "depth.safetensors", damaged)
    for name, rows in measure(tmp_path, digits).items():
        numbers = [c for c in rows if rows[c].dtype == float]
        assert rows[rows.seed == 10][numbers].isna().all(axis=None)
        expected = together[name][together[name].seed == 11][numbers]
        np.testing.assert_allclose(rows[rows.seed == 11][numbers], expected, rtol=1e-12)


def test_weights_of_other_seeds_or_data_are_refused_in_one_sentence(measured, tmp_path, digits, capsys):
    folder, kept, _ = measured
    with pytest.raises(SystemExit, match="2"):
        measure(tmp_path, digits, folder / "depth.safetensors", TINY.model_copy(update={"seeds": [10, 11, 12]}))
    assert "holds 2 networks of each kind, but 3 seeds are given" in capsys.readouterr().err
    other = [Snapshot({**each.cell, "data_set": "mnist"}, each.tensors) for each in kept]
    snapshots.save(tmp_path / "depth.safetensors", other)
    with pytest.raises(SystemExit, match="2"):
        measure(tmp_path, digits)
    assert "trained on mnist, but the data are digits" in capsys.readouterr().err


# --- the exact inequality and exact networks -------------------------------------------------------------------------


def leading_of(weights, x, activation, biases=None):
    """The leading terms of networks over the samples x, as the step computes them."""
    networks = measure_depth.Networks(
        list(range(len(weights[0]))),
        {"activation": activation},
        weights,
        biases,
        torch.ones(len(weights[0]), dtype=torch.bool),
    )
    y = torch.zeros(len(x), dtype=torch.int64)
    samples = measure_depth.Samples(x, y, x, y, x, y)
    return leading(measure_depth._measure(networks, samples).layers)


def random_network(seed, depth, gain):
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(2, 9, (depth + 1,), generator=generator).tolist()
    weights = init_gaussian(widths, gain, [generator, generator])
    return weights, 3 * torch.randn(7, widths[0], generator=generator, dtype=torch.float64), generator


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(2, 9), st.floats(0.01, 30), st.sampled_from(["relu", "tanh", "elu", "linear"])
)
def test_without_biases_ours_is_at_most_the_spectral_term(seed, depth, gain, activation):
    weights, x, _ = random_network(seed, depth, gain)
    found = leading_of(weights, x, activation)
    assert (found.ours_weighted <= found.spectral_weighted + 1e-9).all()
    # Term i is at most |x| times the product of all norms but the i-th.
    smallest = torch.stack([torch.linalg.matrix_norm(w, 2).log() for w in weights]).amin(0)
    assert (found.ours_unweighted <= math.log(depth) + found.spectral_unweighted - smallest + 1e-9).all()


@pytest.mark.parametrize("reason", ["softplus", "biases"])
def test_with_biases_or_softplus_it_can_be_larger(reason):
    weights, x, generator = random_network(0, 4, 0.01)
    if reason == "softplus":
        found = leading_of(weights, 0.1 * x, "softplus")
    else:
        biases = [torch.randn(2, len(w[0]), generator=generator, dtype=torch.float64) for w in weights]
        found = leading_of(weights, 0.1 * x, "tanh", biases)
    assert (found.ours_weighted > found.spectral_weighted + 1).all()
    assert (leading_of(weights, 0.1 * x, "tanh").ours_weighted < found.spectral_weighted).all()


@pytest.mark.parametrize("r", [2, 5])
@pytest.mark.parametrize("c", [0.3, 2.0])
def test_multiples_of_the_identity_reach_the_spectral_term(r, c):
    weights = [c * torch.eye(4, dtype=torch.float64).expand(1, 4, 4) for _ in range(r)]
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = leading_of(weights, x, "linear")
    assert found.ours_weighted.item() == pytest.approx(found.spectral_weighted.item(), abs=1e-12)
    expected = math.log(x.norm(dim=1).max()) + (r - 1) * math.log(c) + math.log(4 * c) + 1.5 * math.log(r)
    assert found.ours_weighted.item() == pytest.approx(expected)
    # Counting a matrix twice (Jacobians that start at its input) would give c^r.
    assert found.ours_unweighted.item() == pytest.approx(
        math.log(r) + math.log(x.norm(dim=1).max()) + (r - 1) * math.log(c)
    )


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_alternating_diagonals_widen_the_gap_by_a_constant_per_layer(activation):
    ratios = []
    for r in (2, 4, 6, 8):
        weights = [torch.diag(torch.tensor([1.0, 0.5] if i % 2 else [0.5, 1.0], dtype=torch.float64)) for i in
                   range(1, r + 1)]  # fmt: skip
        found = leading_of([w[None] for w in weights], torch.ones(1, 2, dtype=torch.float64), activation)
        ratios.append((found.spectral_weighted - found.ours_weighted).item())
        assert found.spectral_unweighted.item() == pytest.approx(0.5 * math.log(2))
    assert ratios == pytest.approx([0.113, 0.806, 1.499, 2.192], abs=5e-4)
    assert np.diff(ratios) == pytest.approx([math.log(2)] * 3)
