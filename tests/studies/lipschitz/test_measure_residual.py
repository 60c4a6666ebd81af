"""Leading terms and Figure 1 of small WideResNets against plain modules whose Jacobians come from torch.func.jacrev.

The oracle adds a perturbation to the output of a module by a hook and differentiates by it, so it shares neither the
network's code nor the vector-Jacobian products with what it checks.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tests.nets.plain_wide_resnet import PlainWideResNet, plain_of

from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.lipschitz import measure_residual, train_residual
from jacnorm.studies.lipschitz.inputs import load
from jacnorm.studies.lipschitz.measure_residual import (
    Networks,
    Samples,
    block_values,
    jacobian_norms,
    layer_maxima,
    mean_statistics,
)
from jacnorm.studies.lipschitz.operator_norms import log_rows, spectral_terms
from jacnorm.studies.lipschitz.settings import ResidualSettings
from jacnorm.studies.lipschitz.tables import COLUMNS
from jacnorm.training import snapshots as snapshot_files
from jacnorm.training.job import Job
from jacnorm.training.snapshots import Snapshot

torch.set_num_threads(1)

SETTINGS = ResidualSettings(
    seeds=[10, 11],
    train_samples=120,
    stem=3,
    channels=3,
    depths=[10, 16],
    epochs=6,
    compared_epochs=8,
    batch=40,
    top=5,
)
JOB = Job(torch.device("cpu"), None)
KEY = ["seed", "data_set", "depth"]


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


def call(step, settings, folder: Path, digits) -> dict[str, pd.DataFrame]:
    """The command as a rule would call it; the tables that lie in the folder then."""
    before = torch.get_deterministic_debug_mode()
    words = ["--device", "cpu", "--tables", folder, "--data", digits, "--weights", folder / "residual.safetensors"]
    try:
        run({"residual": step.residual}, [*map(str, words), *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)  # a job switches it on for its process, and this one goes on
    return {path.stem.rpartition("-s")[0]: read_table(path) for path in folder.glob("*.parquet")}


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """Weights of the tiny experiment and the tables measured from them."""
    folder = tmp_path_factory.mktemp("residual")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        call(train_residual, SETTINGS, folder, digits)
        return folder / "residual.safetensors", call(measure_residual, SETTINGS, folder, digits)


@pytest.fixture(scope="module")
def samples(digits):
    return measure_residual._samples(load(digits, SETTINGS.train_samples, scaling="standard"), SETTINGS, JOB)


def networks_of(path, samples, settings=SETTINGS, **cell):
    """The networks of the snapshots whose cell is the given one."""
    for snapshot in snapshot_files.load(path):
        if all(snapshot.cell[name] == value for name, value in cell.items()):
            yield from measure_residual._networks(snapshot, settings, samples, JOB)


def plain(networks: Networks, run: int) -> PlainWideResNet:
    return plain_of(networks.net, networks.cell["depth"], networks.parameters, networks.buffers, run).double().eval()


def jacobians(model, module, x):
    """Jacobian of the logits of one sample by the output of a module, (K, d), and the module's input and output."""
    seen = {}

    def look(_module, taken, given):
        seen["input"], seen["output"] = taken[0].detach(), given.detach()

    with module.register_forward_hook(look):
        model(x[None])

    def logits(perturbation):
        with module.register_forward_hook(lambda _module, _taken, given: given + perturbation):
            return model(x[None])[0]

    return (
        torch.func.jacrev(logits)(torch.zeros_like(seen["output"])).flatten(1).detach(),
        seen["input"],
        seen["output"],
    )


def operator_norm(jacobian):
    return torch.linalg.svdvals(jacobian)[0].item()


def test_leading_terms_are_sums_over_the_layers_of_plain_networks(trained, samples):
    path, _ = trained
    few = Samples(samples.x, samples.y, samples.x[:6], samples.classes)
    for stage in ("initial", "trained"):
        for networks in networks_of(path, few, part="sweep", depth=16, stage=stage):
            found = layer_maxima(networks, few)
            weights = log_rows(networks.net, networks.parameters)
            rows = list(measure_residual._leading_rows(networks, few))
            for position in range(2):
                model = plain(networks, position)
                products, weighted = [], []
                for number, name in enumerate(found.names):
                    module = [*model.convolutions, model.linear][number]
                    each = [jacobians(model, module, x) for x in few.measured_x.double()]
                    jacobian = max(operator_norm(j) for j, _, _ in each)
                    hidden = max(h.norm().item() for _, h, _ in each)
                    assert found.jacobian[position, number].exp().item() == pytest.approx(jacobian, rel=2e-4), name
                    assert found.hidden[position, number].exp().item() == pytest.approx(hidden, rel=2e-4), name
                    products.append(jacobian * hidden)
                    weighted.append(jacobian * hidden * weights[name][position].exp().item())
                row = rows[position]
                assert row["log_ours_unweighted"] == pytest.approx(math.log(sum(products)), abs=1e-3)
                total = sum(term ** (2 / 3) for term in weighted)
                assert row["log_ours_weighted"] == pytest.approx(1.5 * math.log(total), abs=1e-3)
                spectral = spectral_terms(networks.net, networks.parameters, networks.buffers)
                largest = few.measured_x.flatten(1).norm(dim=1).max().log().item()
                for kind in ("unweighted", "weighted"):
                    expected = largest + getattr(spectral, kind)[position].item()
                    assert row[f"log_spectral_{kind}"] == pytest.approx(expected, abs=1e-6)


def test_margins_are_those_of_all_training_samples(trained, samples, digits):
    path, tables = trained
    (networks,) = networks_of(path, samples, part="sweep", depth=10, stage="trained")
    for position, seed in enumerate(SETTINGS.seeds):
        with torch.no_grad():
            logits = plain(networks, position)(samples.x.double()).numpy()
        true = logits[np.arange(120), samples.y.numpy()]
        logits[np.arange(120), samples.y.numpy()] = -np.inf
        margins = true - logits.max(1)
        rows = tables["residual"]
        row = rows[(rows.seed == seed) & (rows.depth == 10) & (rows.stage == "trained")].iloc[0]
        expected = np.quantile(margins, [0.0, 0.01, 0.1, 0.5])
        np.testing.assert_allclose(
            row[["margin", "margin_p01", "margin_p10", "margin_p50"]].tolist(), expected, atol=1e-4
        )


@pytest.mark.parametrize("normalisation", ["batch", "none"])
def test_values_of_figure_1_are_those_of_plain_networks(trained, samples, normalisation):
    path, _ = trained
    (networks,) = networks_of(path, samples, part="figure1", normalisation=normalisation)
    few = Samples(samples.x[:8], samples.y[:8], samples.x[:8], samples.classes)
    found = block_values(networks, few)
    for position in range(2):
        model = plain(networks, position)
        for number, x in enumerate(few.x.double()):
            each = [jacobians(model, group, x) for group in model.groups]
            value = sum(operator_norm(jacobian) * output.norm().item() for jacobian, _, output in each)
            assert found[position, number].item() == pytest.approx(value, rel=2e-4)


def test_ranks_run_over_correctly_classified_samples(trained, samples):
    path, tables = trained
    rows = tables["blocks"]
    assert set(rows.normalisation) == {"batch", "none"}
    for (normalisation, seed), cell in rows.groupby(["normalisation", "seed"]):
        (networks,) = networks_of(path, samples, part="figure1", normalisation=normalisation)
        position = SETTINGS.seeds.index(seed)
        values = block_values(networks, samples)[position]
        margin = networks.margins(samples)[position].double()
        every = [math.log(v / m) for v, m in zip(values.tolist(), margin.tolist(), strict=True) if m > 0]
        assert (cell.misclassified == 120 - len(every)).all()
        assert cell["rank"].tolist() == list(range(1, min(5, len(every)) + 1))
        assert cell.log_value.tolist() == pytest.approx(sorted(every, reverse=True)[:5], abs=1e-6)
    assert rows.misclassified.max() > 0  # the case was seen


def test_a_network_without_a_correct_sample_has_one_row_without_a_value(trained, samples):
    path, _ = trained
    (networks,) = networks_of(path, samples, part="figure1", normalisation="batch")
    right = networks.margins(samples) > 0
    wrong = Samples(samples.x[~right[0]], samples.y[~right[0]], samples.x, samples.classes)
    row = next(measure_residual._block_rows(networks, wrong, 5))
    assert (row["seed"], row["rank"], row["misclassified"]) == (10, 1, int((~right[0]).sum()))
    assert math.isnan(row["log_value"])


def test_every_network_is_measured_before_and_after_training(trained):
    _, tables = trained
    rows = tables["residual"]
    assert sorted(rows[["seed", "depth", "stage"]].itertuples(index=False, name=None)) == sorted(
        (seed, depth, stage) for seed in (10, 11) for depth in (10, 16) for stage in ("initial", "trained")
    )
    assert {name: set(table.columns) for name, table in tables.items()} == {
        name: set(COLUMNS[name]) for name in ("residual_fits", "residual", "blocks")
    }
    assert rows.notna().all(axis=None)
    assert tables["blocks"].notna().all(axis=None)
    assert (rows.data_set == "digits").all()


def test_without_shifts_the_leading_term_never_exceeds_the_spectral_one(trained, samples):
    path, _ = trained
    for stage in ("initial", "trained"):
        for networks in networks_of(path, samples, part="sweep", depth=16, stage=stage):
            for name in networks.net.norms:
                networks.parameters[f"{name}.shift"].zero_()
                networks.buffers[f"{name}.mean"].zero_()
            for row in measure_residual._leading_rows(networks, samples):
                assert row["log_ours_weighted"] < row["log_spectral_weighted"]


def test_statistics_before_training_are_the_means_of_those_of_all_batches(trained, samples):
    path, _ = trained
    (networks,) = networks_of(path, samples, part="sweep", depth=10, stage="initial")
    x = samples.x.double()
    model = plain(networks, 1)
    stem = [model.stem(part) for part in x.split(40)]
    found = {name: tensor[1].double() for name, tensor in networks.buffers.items()}
    mean = torch.stack([h.mean((0, 2, 3)) for h in stem]).mean(0)
    variance = torch.stack([h.var((0, 2, 3)) for h in stem]).mean(0)
    torch.testing.assert_close(found["stem.norm.mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["stem.norm.variance"], variance, rtol=1e-4, atol=1e-5)
    deep = []
    hook = model.groups[2].register_forward_hook(lambda _module, _taken, given: deep.append(given))
    model.train()
    for part in x.split(40):
        model(part)
    hook.remove()
    torch.testing.assert_close(
        found["norm.mean"], torch.stack([h.mean((0, 2, 3)) for h in deep]).mean(0), rtol=1e-3, atol=1e-4
    )
    whole = mean_statistics(networks.net, networks.parameters, samples.x, 120)
    torch.testing.assert_close(whole["stem.norm.variance"][1].double(), model.stem(x).var((0, 2, 3)), rtol=1e-4, atol=0)


def test_values_do_not_depend_on_how_many_samples_are_measured_at_once(trained, samples, monkeypatch):
    path, _ = trained
    (networks,) = networks_of(path, samples, part="sweep", depth=10, stage="trained")
    together, values = layer_maxima(networks, samples), block_values(networks, samples)
    monkeypatch.setitem(measure_residual.NUMBERS, "cpu", 1)  # one sample at a time
    few = Samples(samples.x[:30], samples.y[:30], samples.x[:30], samples.classes)
    torch.testing.assert_close(block_values(networks, few), values[:, :30], rtol=1e-4, atol=0)
    alone = layer_maxima(networks, few)
    monkeypatch.undo()
    torch.testing.assert_close(alone.jacobian, layer_maxima(networks, few).jacobian, rtol=0, atol=1e-4)
    assert (alone.jacobian <= together.jacobian + 1e-4).all()
    assert (alone.hidden <= together.hidden + 1e-4).all()


def test_fewer_samples_may_be_measured_and_margins_stay_those_of_all(trained, digits):
    path, tables = trained
    settings = SETTINGS.model_copy(update={"measured_samples": 30})
    few = measure_residual._samples(load(digits, 120, scaling="standard"), settings, JOB)
    assert len(few.measured_x) == 30
    assert torch.equal(few.x, measure_residual._samples(load(digits, 120, scaling="standard"), SETTINGS, JOB).x)
    (networks,) = networks_of(path, few, part="sweep", depth=10, stage="trained")
    found = pd.DataFrame(measure_residual._leading_rows(networks, few)).set_index("seed")
    whole = tables["residual"]
    whole = whole[(whole.depth == 10) & (whole.stage == "trained")].set_index("seed")
    assert (found.log_ours_unweighted < whole.log_ours_unweighted).all()
    np.testing.assert_allclose(found.margin, whole.margin, rtol=1e-5)


def test_a_diverged_network_has_no_values_and_leaves_the_others_theirs(trained, digits, tmp_path):
    path, tables = trained
    snapshots = []
    for snapshot in snapshot_files.load(path):
        tensors = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
        if snapshot.cell["stage"] == "trained":
            tensors["parameter/group2.block1.first.weight"][0, 0, 0, 0, 0] = math.inf
        snapshots.append(Snapshot(snapshot.cell, tensors))
    snapshot_files.save(tmp_path / "residual.safetensors", snapshots)
    found = call(measure_residual, SETTINGS, tmp_path, digits)
    lost = (found["residual"].seed == 10) & (found["residual"].stage == "trained")
    numbers = [name for name in COLUMNS["residual"] if name.startswith(("log_", "margin"))]
    assert found["residual"].loc[lost, numbers].isna().all(axis=None)
    pd.testing.assert_frame_equal(found["residual"][~lost], tables["residual"][~lost], rtol=1e-6)
    blocks = found["blocks"][found["blocks"].seed == 10]
    assert blocks[["normalisation", "rank", "misclassified"]].values.tolist() == [["batch", 1, 120], ["none", 1, 120]]
    assert blocks.log_value.isna().all()
    others = (each["blocks"][each["blocks"].seed == 11].reset_index(drop=True) for each in (found, tables))
    pd.testing.assert_frame_equal(*others, rtol=1e-6)


def test_measuring_twice_gives_the_same_tables(trained, digits):
    path, tables = trained
    again = call(measure_residual, SETTINGS, path.parent, digits)
    for name, table in tables.items():
        pd.testing.assert_frame_equal(again[name], table, check_exact=True)


def test_jacobian_norms_of_explicit_matrices():
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64)  # (R, B, K, d)
    hidden = torch.randn(3, 2 * 3, 2, 1, generator=generator, dtype=torch.float64).requires_grad_()  # d = 3 * 2 * 1
    flat = hidden.unflatten(1, (2, 3)).transpose(0, 1).flatten(2)  # (R, B, d)
    logits = (matrices @ flat[..., None])[..., 0]
    found = jacobian_norms(logits, [hidden])
    torch.testing.assert_close(found[0], torch.linalg.matrix_norm(matrices, 2))
