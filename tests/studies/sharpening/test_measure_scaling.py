"""Tables by sample size and width against dense matrices and plain modules; the theorem's bound; refused weights."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

from jacnorm.errors import UserError
from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.sharpening import cube, measure_scaling, train_scaling
from jacnorm.studies.sharpening.networks import build
from jacnorm.studies.sharpening.settings import ScalingSettings
from jacnorm.studies.sharpening.tables import COLUMNS
from jacnorm.studies.sharpening.train_scaling import load_sizes
from jacnorm.training import snapshots

torch.set_num_threads(1)

TINY = ScalingSettings(
    seeds=[10, 11],
    train_samples=40,
    pool=100,
    width=6,
    hidden_layers=1,
    jacobian_samples=45,
    sizes=[20, 50],
    widths=[3],
    cube_sizes=[10, 40],
    cube_learning_rate=0.3,
    steps=150,
)


def step(module, folder, digits, settings):
    """Call a step as a rule does."""
    before = torch.get_deterministic_debug_mode()
    files = ["--tables", str(folder), "--data", str(digits), "--weights", str(folder / "scaling.safetensors")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        try:
            run({"scaling": module.scaling}, ["--device", "cpu", *files, *flags(settings).split()])
        finally:
            torch.set_deterministic_debug_mode(before)


def tables(folder):
    return {name: read_table(next(folder.glob(f"{name}-s*.parquet"))) for name in ("sizes", "widths")}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("measured")
    step(train_scaling, folder, digits, TINY)
    step(measure_scaling, folder, digits, TINY)
    return folder, tables(folder)


@pytest.fixture(scope="module")
def inputs(digits):
    return load_sizes(TINY, digits)


def parameters(folder, position, **cell):
    """One run's float64 parameters from the kept weights, (1, ...)."""
    (found,) = [
        each for each in snapshots.load(folder / "scaling.safetensors") if cell.items() <= each.cell.items()
    ]  # fmt: skip
    return {name: tensor[position : position + 1].double() for name, tensor in found.tensors.items()}


def jacobian_norms(network, own, x):
    """Spectral norms of the Jacobians of one run at x, one sample after another, in float64."""
    found = []
    for sample in x.double():
        j = torch.autograd.functional.jacobian(lambda u: network(own, {}, u[None])[0, 0], sample)
        found.append(np.linalg.norm(j.flatten(1).numpy(), 2))
    return np.array(found)


def test_tables_have_a_row_for_each_network(measured):
    _, found = measured
    for name, table in found.items():
        assert list(table.columns) == list(COLUMNS[name])
        assert not table.isna().any().any()
    cells = [("digits", 20), ("digits", 50), ("cube", 10), ("cube", 40)]
    sizes = found["sizes"]
    assert list(zip(sizes.data_set, sizes.samples, sizes.seed, strict=True)) == [
        (*cell, seed) for cell in cells for seed in (10, 11)
    ]
    widths = found["widths"]
    assert list(zip(widths.width, widths.parametrisation, widths.seed, strict=True)) == [
        (3, how, seed) for how in ("standard", "ntk") for seed in (10, 11)
    ]


@pytest.mark.parametrize("samples", [20, 50])
def test_rows_by_sample_size_are_those_of_single_networks(measured, inputs, samples):
    folder, found = measured
    own, data = parameters(folder, 1, part="sizes", samples=samples), inputs[samples]
    network = build(TINY, "mlp", data.image, 10)
    row = found["sizes"].query("data_set == 'digits' and samples == @samples and seed == 11").iloc[0]
    logits = network(own, {}, data.train_x.double())[0]
    loss = functional.cross_entropy(logits, data.train_y, label_smoothing=TINY.smoothing)
    assert row.train_loss == pytest.approx(loss.item(), rel=1e-5)
    train, test = data.train_x[:45], data.test_x[:45]
    assert row.jacobian_max == pytest.approx(jacobian_norms(network, own, train).max(), rel=1e-5)
    assert row.test_jacobian_max == pytest.approx(jacobian_norms(network, own, test).max(), rel=1e-5)
    distances = torch.cdist(test.flatten(1).double(), train.flatten(1).double()).amin(1)
    assert row.distance == pytest.approx(np.quantile(distances.numpy(), 0.95), rel=1e-9)


@pytest.mark.parametrize("samples", [10, 40])
def test_rows_on_the_cube_take_the_supremum_over_a_grid(measured, samples):
    folder, found = measured
    own = parameters(folder, 1, part="cube", samples=samples)
    network = build(TINY, "mlp", (1, 1, 2), cube.OUTPUTS)
    row = found["sizes"].query("data_set == 'cube' and samples == @samples and seed == 11").iloc[0]
    x = cube.samples([11], samples, 2)[0]
    cost = (network(own, {}, x.double())[0] - cube.target(x)).square().sum() / 2 / samples
    assert row.train_loss == pytest.approx(cost.item(), rel=1e-5)
    assert row.jacobian_max == pytest.approx(jacobian_norms(network, own, x).max(), rel=1e-5)
    # The Jacobian of one hidden layer, written down: W2 diag(1 - tanh^2) W1.
    hidden = torch.tanh(cube.grid(2).double().flatten(1) @ own["weight1"][0].T + own["bias1"][0])
    every = own["weight2"][0] @ ((1 - hidden.square()).unsqueeze(2) * own["weight1"][0])  # (G, K, d)
    assert row.test_jacobian_max == pytest.approx(np.linalg.norm(every.numpy(), 2, axis=(1, 2)).max(), rel=1e-5)
    distances = torch.cdist(cube.grid(2).flatten(1).double(), x.flatten(1).double()).amin(1)
    assert row.distance == pytest.approx(distances.max().item(), rel=1e-6)


def test_both_sides_of_the_theorem_hold_on_the_cube(measured):
    _, found = measured
    rows = found["sizes"].query("data_set == 'cube'")
    # Left: a training sample lies within half a diagonal of the grid, over which J hardly changes.
    assert (rows.jacobian_max <= 1.01 * rows.test_jacobian_max).all()
    assert (rows.test_jacobian_max <= (rows.jacobian_max + rows.variation) * (1 + 1e-6)).all()
    few, many = rows[rows.samples == 10], rows[rows.samples == 40]
    assert (many.distance.to_numpy() < few.distance.to_numpy()).all()


def square_cost(network, names, shapes, data):
    """The square cost as a function of one flat vector of parameters."""
    wanted = functional.one_hot(data.train_y, 10).double()

    def cost(flat):
        pieces = flat.split([math.prod(shape) for shape in shapes])
        own = {name: piece.view(1, *shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        return (network(own, {}, data.train_x.double())[0] - wanted).square().sum() / 2 / len(wanted)

    return cost


@pytest.mark.parametrize("how", ["standard", "ntk"])
def test_sharpness_by_width_is_the_top_of_the_whole_hessian(measured, inputs, how):
    folder, found = measured
    data = inputs[40]
    network = build(TINY, "mlp", data.image, 10, width=3, parametrisation=how)
    row = found["widths"].query("parametrisation == @how and seed == 11").iloc[0]
    for stage, moment in (("initial", "start"), ("trained", "end")):
        own = parameters(folder, 1, part="widths", parametrisation=how, stage=stage)
        cost = square_cost(network, list(own), [tensor.shape[1:] for tensor in own.values()], data)
        hessian = torch.autograd.functional.hessian(cost, torch.cat([tensor.flatten() for tensor in own.values()]))
        top = np.linalg.eigvalsh(hessian.numpy())[-1]
        assert row[f"sharpness_{moment}"] == pytest.approx(top, rel=2e-3)
        assert row[f"jacobian_{moment}"] == pytest.approx(jacobian_norms(network, own, data.train_x).max(), rel=1e-5)
    assert row.sharpness_converged


@pytest.mark.parametrize("how", ["standard", "ntk"])
def test_the_first_layers_share_is_that_of_the_kernel_by_autograd(measured, inputs, how):
    folder, found = measured
    data = inputs[40]
    network = build(TINY, "mlp", data.image, 10, width=3, parametrisation=how)
    own = parameters(folder, 1, part="widths", parametrisation=how, stage="trained")
    x = data.train_x[: measure_scaling.KERNEL_SAMPLES].double()
    rows = torch.autograd.functional.jacobian(
        lambda *tensors: network(dict(zip(own, tensors, strict=True)), {}, x).flatten(), tuple(own.values())
    )
    whole, first = (torch.cat([each.flatten(1) for each in part], 1) for part in (rows, rows[:2]))  # (m K, p)
    tops = [np.linalg.eigvalsh((each @ each.T).numpy())[-1] for each in (first, whole)]
    share = found["widths"].query("parametrisation == @how and seed == 11").first_layer_share.item()
    assert share == pytest.approx(tops[0] / tops[1], rel=3e-3)
    assert 0 < share < 1


def test_measuring_a_seed_alone_gives_the_same_rows(measured, tmp_path, digits):
    _, together = measured
    settings = TINY.model_copy(update={"seeds": [11], "chunk": 13})
    step(train_scaling, tmp_path, digits, settings)
    step(measure_scaling, tmp_path, digits, settings)
    for name, table in tables(tmp_path).items():
        expected = together[name].query("seed == 11").reset_index(drop=True)
        pd.testing.assert_frame_equal(table, expected, rtol=2e-3)


def test_diverged_runs_have_no_rows(tmp_path, digits):
    settings = TINY.model_copy(update={"cube_learning_rate": 100.0, "width_learning_rate": 100.0, "steps": 60})
    step(train_scaling, tmp_path, digits, settings)
    step(measure_scaling, tmp_path, digits, settings)
    found = tables(tmp_path)
    assert set(found["sizes"].data_set) == {"digits"}
    assert found["widths"].empty


def test_a_run_that_diverged_does_not_shift_the_rows_of_the_others(measured, tmp_path, digits):
    folder, together = measured
    kept = snapshots.load(folder / "scaling.safetensors")
    fewer = [
        snapshots.Snapshot({**each.cell, "seeds": [11]}, {name: t[1:] for name, t in each.tensors.items()})
        if each.cell["stage"] == "trained"
        else each
        for each in kept
    ]
    snapshots.save(tmp_path / "scaling.safetensors", fewer)
    step(measure_scaling, tmp_path, digits, TINY)
    for name, table in tables(tmp_path).items():
        expected = together[name].query("seed == 11").reset_index(drop=True)
        pd.testing.assert_frame_equal(table, expected, rtol=2e-3)


@pytest.mark.parametrize("change", [{"seeds": [11]}, {"widths": [4]}, {"cube_sizes": [10]}])
def test_weights_of_other_settings_are_refused_in_one_sentence(measured, inputs, change):
    folder, _ = measured
    settings = TINY.model_copy(update=change)
    path = folder / "scaling.safetensors"
    with pytest.raises(UserError, match=r"holds networks \(.*\) that the settings do not name; train again with these"):
        measure_scaling._check(path, snapshots.load(path), settings, list(train_scaling.cells(settings, inputs)))
