"""The measuring step from tiny networks to tables, against dense matrices built from an ordinary module in float64."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tests.studies.sharpening.test_train_descent import ARMS, CPU, TINY, kept_of, plain, plain_cost, train
from torch import nn

from jacnorm.files import read_columns, read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.sharpening import measure_descent, train_descent
from jacnorm.studies.sharpening.inputs import load_all
from jacnorm.studies.sharpening.measure_descent import Samples, Spent, Stack
from jacnorm.studies.sharpening.networks import Convolutional, _BatchNorm
from jacnorm.studies.sharpening.settings import ImageSettings
from jacnorm.studies.sharpening.tables import COLUMNS
from jacnorm.studies.sharpening.train_descent import Run
from jacnorm.training import snapshots

torch.set_num_threads(1)

NAMES = ["trajectory", "layer_kernels", "measuring_cost"]
SETTINGS = TINY.model_copy(update={"kernel_samples": 20, "jacobian_samples": 40})


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


def measure(folder, digits, settings=SETTINGS, weights=None, command="descent"):
    """Call the step as a rule does; its tables."""
    before = torch.get_deterministic_debug_mode()
    files = ["--tables", folder, "--data", digits, "--weights", weights or folder / "weights.safetensors"]
    try:
        run(
            {name: getattr(measure_descent, name) for name in ("descent", "images")},
            [command, "--device", "cpu", *map(str, files), *flags(settings).split()],
        )
    finally:
        torch.set_deterministic_debug_mode(before)
    prefix = "image_" if command == "images" else ""
    block = f"s{min(settings.seeds)}-{max(settings.seeds)}"
    return {name: read_table(folder / f"{prefix}{name}-{block}.parquet") for name in NAMES}


@pytest.fixture(scope="module")
def inputs(digits):
    return load_all([digits], SETTINGS)[0]


@pytest.fixture(scope="module")
def measured(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        _, kept = train(folder, digits, SETTINGS)
        return folder, kept, measure(folder, digits)


def rows_of(table, arm, seed, **columns):
    """Rows of one run."""
    wanted = {"cost": arm.cost, "smoothing": arm.smoothing, "learning_rate": arm.learning_rate, "seed": seed, **columns}
    return table[np.logical_and.reduce([table[name] == value for name, value in wanted.items()])]


class Dense:
    """One network in float64 with its whole Jacobians, by the parameters and by the input, from plain autograd."""

    def __init__(self, parameters, arm, inputs, layers=plain):
        self.model = layers(parameters).double()
        self.arm, self.x, self.y = arm, inputs.train_x.double(), inputs.train_y
        names = [name for name, _ in self.model.named_parameters()]
        flat = torch.cat([each.detach().flatten() for each in self.model.parameters()])
        sizes = [each.numel() for each in self.model.parameters()]

        def outputs(vector, x):
            pieces = zip(names, vector.split(sizes), self.model.parameters(), strict=True)
            return torch.func.functional_call(self.model, {name: p.view_as(q) for name, p, q in pieces}, (x,))

        def cost(vector):
            return plain_cost(arm, outputs(vector, self.x), self.y)

        self.hessian = torch.func.jacrev(torch.func.grad(cost), chunk_size=128)(flat)
        by_parameters = torch.func.jacrev(lambda vector: outputs(vector, self.x))(flat)  # (N, K, p)
        z = self.model(self.x).detach()
        p = z.softmax(1)
        blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        self.blocks = torch.eye(10).double().expand_as(blocks) if arm.cost == "square" else blocks
        self.gauss_newton = torch.einsum("nkp,nkl,nlq->pq", by_parameters, self.blocks, by_parameters) / len(z)
        self.kernel_rows = by_parameters[: SETTINGS.kernel_samples].flatten(0, 1)  # (m K, p)
        self.sizes, self.outputs = sizes, z

    def jacobians(self, x):
        """By the input, (B, K, d)."""
        found = torch.func.vmap(torch.func.jacrev(lambda one: self.model(one[None])[0]))(x.double())
        return found.flatten(2)


def top(matrix):
    return torch.linalg.eigvalsh(matrix)[-1].item()


# --- from trained networks to tables ---------------------------------------------------------------------------------


def test_tables_have_a_row_for_every_run_and_checkpoint_and_no_nan(measured):
    folder, _, tables = measured
    assert {name: len(table) for name, table in tables.items()} == {
        "trajectory": 8 * 4, "layer_kernels": 8 * 4 * 3, "measuring_cost": 8
    }  # fmt: skip
    for name, table in tables.items():
        assert list(table.columns) == list(COLUMNS[name])
        assert read_columns(folder / f"{name}-s10-11.parquet") == COLUMNS[name]
        assert table.notna().all(axis=None)
    trajectory = tables["trajectory"]
    assert (
        trajectory.groupby(["cost", "smoothing", "learning_rate", "seed"])
        .step.apply(list)
        .map(lambda steps: steps == [0, 20, 40, 50])
        .all()
    )
    assert (trajectory.threshold == 2 / trajectory.learning_rate).all()
    assert trajectory.sharpness_converged.all()
    assert trajectory.gauss_newton_converged.all()
    assert (trajectory[["sharpness_residual", "gauss_newton_residual"]] <= measure_descent.TOLERANCE).all(axis=None)


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_a_row_agrees_with_dense_matrices(measured, inputs, arm):
    _, kept, tables = measured
    dense = Dense(kept_of(kept, arm, 11)[50], arm, inputs)
    (row,) = rows_of(tables["trajectory"], arm, 11, step=50).itertuples()
    assert row.train_loss == pytest.approx(plain_cost(arm, dense.outputs, dense.y).item(), rel=1e-4)
    assert row.sharpness == pytest.approx(top(dense.hessian), rel=1e-3)
    assert row.gauss_newton == pytest.approx(top(dense.gauss_newton), rel=1e-3)
    norms = torch.linalg.matrix_norm(dense.blocks, 2)
    assert row.cost_hessian_max == pytest.approx(norms.max().item(), rel=1e-4)
    assert row.cost_hessian_mean == pytest.approx(norms.mean().item(), rel=1e-4)

    train_x, test_x = inputs.train_x[:40], inputs.test_x[:40]
    ours, others = dense.jacobians(train_x), dense.jacobians(test_x)
    own, test = (torch.linalg.matrix_norm(each, 2) for each in (ours, others))
    nearest = torch.cdist(test_x.flatten(1).double(), train_x.flatten(1).double()).min(1)
    variation = torch.linalg.matrix_norm(others - ours[nearest.indices], 2).max().item()
    expected = {
        "jacobian_max": own.max().item(), "jacobian_mean": own.mean().item(), "test_jacobian_max": test.max().item(),
        "test_jacobian_mean": test.mean().item(), "variation": variation,
    }  # fmt: skip
    for name, value in expected.items():
        assert getattr(row, name) == pytest.approx(value, rel=1e-4), name
    assert row.jacobian_argmax == own.argmax().item()
    assert row.distance == pytest.approx(nearest.values.quantile(0.95).item(), rel=1e-6)

    kernel = dense.kernel_rows @ dense.kernel_rows.T / SETTINGS.kernel_samples
    assert row.kernel_top == pytest.approx(top(kernel), rel=1e-3)
    parts = dense.kernel_rows.split(dense.sizes, 1)
    for layer, (weight, bias) in enumerate(zip(parts[::2], parts[1::2], strict=True), start=1):
        part = (weight @ weight.T + bias @ bias.T) / SETTINGS.kernel_samples
        (found,) = rows_of(tables["layer_kernels"], arm, 11, step=50, layer=layer).kernel_top
        assert found == pytest.approx(top(part), rel=1e-3)

    o = dense.outputs if arm.cost == "square" else dense.outputs.softmax(1)
    t = nn.functional.one_hot(dense.y, 10) * (1 - arm.smoothing) + arm.smoothing / 10
    pairs = [(i, j) for i in range(50) for j in range(i)]
    distance = torch.stack([(dense.x[i] - dense.x[j]).norm() for i, j in pairs])
    gap = torch.stack([(t[i] - t[j]).norm() - (o[i] - t[i]).norm() - (o[j] - t[j]).norm() for i, j in pairs])
    assert row.lower_bound == pytest.approx((gap / distance).max().item(), rel=1e-4)
    difference = torch.stack([(o[i] - o[j]).norm() for i, j in pairs])
    assert row.slope == pytest.approx((difference / distance).max().item(), rel=1e-4)


def test_accuracies_and_test_losses_are_those_of_all_samples(measured, inputs):
    _, kept, tables = measured
    model = plain(kept_of(kept, ARMS[2], 10)[40])
    (row,) = rows_of(tables["trajectory"], ARMS[2], 10, step=40).itertuples()
    assert len(inputs.test_y) > 1000
    logits = model(inputs.test_x)
    assert row.test_loss == pytest.approx(plain_cost(ARMS[2], logits, inputs.test_y).item(), rel=1e-4)
    assert row.test_accuracy == pytest.approx((logits.argmax(1) == inputs.test_y).double().mean().item())
    right = (model(inputs.train_x).argmax(1) == inputs.train_y).double().mean().item()
    assert row.train_accuracy == pytest.approx(right)


def test_what_measuring_cost_follows_from_its_products(measured):
    _, _, tables = measured
    for row in tables["measuring_cost"].itertuples():
        own = rows_of(tables["trajectory"], train_descent.Arm(row.cost, row.smoothing, row.learning_rate), row.seed)
        assert row.training == 50
        assert row.curvature == 4 + 2 * own["products"].sum()
        assert row.jacobians == pytest.approx(4 * 0.5 * 10 * (40 + 40) / 50)


def test_a_start_from_the_last_checkpoint_saves_products_and_moves_no_eigenvalue(measured, tmp_path, digits):
    _, kept, tables = measured
    snapshots.save(tmp_path / "weights.safetensors", kept[-1:])
    alone = measure(tmp_path, digits)["trajectory"]
    warm = tables["trajectory"][tables["trajectory"].step == 50].reset_index(drop=True)
    for name in ("sharpness", "gauss_newton"):
        np.testing.assert_allclose(warm[name], alone[name], rtol=1e-3)
    assert warm["products"].sum() < alone["products"].sum()
    others = [name for name in warm if not name.startswith(("sharpness", "gauss_newton", "products"))]
    pd.testing.assert_frame_equal(warm[others], alone[others])


def test_an_eigenvector_that_was_overtaken_does_not_hide_the_new_one(measured, inputs):
    _, kept, _ = measured
    arm = ARMS[0]
    dense = Dense(kept_of(kept, arm, 10)[50], arm, inputs)
    values, vectors = torch.linalg.eigh(dense.hessian)
    assert values[-2] < 0.95 * values[-1]
    stack = Stack(SETTINGS, {"digits": Samples.of(inputs, SETTINGS, CPU)}, kept[-1], None, CPU)
    networks = next(stack._networks(kept[-1]))
    assert networks.runs[0] == Run("digits", "mlp", arm, 10)
    for run_ in networks.runs:
        stack._spent[run_] = Spent(vector=vectors[:, -2].float())
    assert stack._curvature(networks)["sharpness"][0].item() == pytest.approx(values[-1].item(), rel=1e-3)


def test_a_run_measured_among_others_is_the_run_alone(measured, tmp_path, digits):
    _, kept, tables = measured
    rows = [[n for n, columns in enumerate(each.cell["runs"]) if columns["seed"] == 11] for each in kept]
    own = [
        snapshots.Snapshot(
            {**each.cell, "runs": [each.cell["runs"][n] for n in chosen]},
            {name: tensor[chosen] for name, tensor in each.tensors.items()},
        )
        for each, chosen in zip(kept, rows, strict=True)
    ]
    snapshots.save(tmp_path / "weights.safetensors", own)
    alone = measure(tmp_path, digits, SETTINGS.model_copy(update={"seeds": [11]}))["trajectory"]
    together = tables["trajectory"][tables["trajectory"].seed == 11].reset_index(drop=True)
    drop = ["sharpness_residual", "gauss_newton_residual", "products"]
    pd.testing.assert_frame_equal(alone.drop(columns=drop), together.drop(columns=drop), rtol=1e-4, atol=1e-6)


def test_chunks_change_nothing_but_rounding(measured, tmp_path, digits):
    folder, _, tables = measured
    settings = SETTINGS.model_copy(update={"chunk": 17})
    parts = measure(tmp_path, digits, settings, folder / "weights.safetensors")["trajectory"]
    drop = ["sharpness_residual", "gauss_newton_residual", "products"]
    pd.testing.assert_frame_equal(
        parts.drop(columns=drop), tables["trajectory"].drop(columns=drop), rtol=1e-4, atol=1e-6
    )


def test_curvature_of_some_samples_counts_for_their_share(measured, tmp_path, digits, inputs):
    folder, kept, _ = measured
    settings = SETTINGS.model_copy(update={"curvature_samples": 25})
    found = measure(tmp_path, digits, settings, folder / "weights.safetensors")
    cost, products = found["measuring_cost"], found["trajectory"].groupby("seed")["products"].sum()
    assert cost.groupby("seed").curvature.sum().to_dict() == ((4 * 4 + 2 * products) / 2).to_dict()
    half = type(inputs)(**{**vars(inputs), "train_x": inputs.train_x[:25], "train_y": inputs.train_y[:25]})
    dense = Dense(kept_of(kept, ARMS[1], 11)[20], ARMS[1], half)
    (row,) = rows_of(found["trajectory"], ARMS[1], 11, step=20).itertuples()
    assert row.sharpness == pytest.approx(top(dense.hessian), rel=1e-3)


# --- runs that end early, other networks -----------------------------------------------------------------------------


def test_a_diverged_run_has_rows_up_to_its_divergence_and_no_nan(tmp_path, digits):
    settings = SETTINGS.model_copy(
        update={"square_learning_rates": [0.1, 30.0], "measure_every": 1, "steps": 5, "smoothings": []}
    )
    fits, _ = train(tmp_path, digits, settings)
    tables = measure(tmp_path, digits, settings)
    lost = fits[fits.learning_rate == 30.0]
    assert (lost.diverged_at > 0).all()
    trajectory = tables["trajectory"]
    assert trajectory.notna().all(axis=None)
    for row in lost.itertuples():
        own = trajectory[(trajectory.seed == row.seed) & (trajectory.learning_rate == 30.0)]
        assert own.step.tolist() == list(range(row.diverged_at))
    assert (trajectory[trajectory.learning_rate == 0.1].groupby("seed").step.max() == 5).all()


def test_convolutions_have_no_kernel_and_fill_the_tables_of_images(tmp_path, digits):
    settings = ImageSettings(
        **SETTINGS.model_dump(exclude={"seeds", "steps"}) | {"networks": ["mlp", "cnn"], "channels": 2},
        seeds=[10],
        steps=3,
    )
    train(tmp_path, digits, settings, "images")
    tables = measure(tmp_path, digits, settings, command="images")
    trajectory = tables["trajectory"]
    assert trajectory.groupby("network").size().to_dict() == {"mlp": 8, "cnn": 8}
    assert trajectory[trajectory.network == "cnn"].kernel_top.isna().all()
    assert trajectory.drop(columns="kernel_top").notna().all(axis=None)
    assert set(tables["layer_kernels"].network) == {"mlp"}
    without = measure(tmp_path, digits, settings.model_copy(update={"kernel_samples": 0}), command="images")
    assert without["trajectory"].kernel_top.isna().all()
    assert len(without["layer_kernels"]) == 0


def test_batch_norm_is_measured_with_the_statistics_of_all_training_samples(inputs, monkeypatch):
    layers = [nn.Conv2d(1, 2, 3), _BatchNorm(2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 10)]
    network = Convolutional(inputs.image, inputs.classes, nn.Sequential(*layers))
    for module in (train_descent, measure_descent):
        monkeypatch.setattr(module, "build", lambda *_: network)
    settings = SETTINGS.model_copy(update={"steps": 5, "networks": ["cnn"]})
    trained = train_descent.Stack(settings, [Run("digits", "cnn", ARMS[2], 10)], inputs, CPU)
    for index in range(5):
        trained.step(index)
    *_, last = trained.snapshots(1, [None])
    rows = {name: [] for name in NAMES}
    Stack(settings, {"digits": Samples.of(inputs, settings, CPU)}, last, None, CPU).measure(last, rows)
    (row,) = rows["trajectory"]

    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, momentum=1.0), nn.Tanh(), nn.Flatten(), nn.Linear(72, 10)
    )
    for name, tensor in model.named_parameters():
        tensor.data.copy_(last.tensors[name][0])
    model(inputs.train_x)  # running statistics become those of the training samples
    model.eval()
    assert row["train_loss"] == pytest.approx(
        plain_cost(ARMS[2], model(inputs.train_x), inputs.train_y).item(), rel=1e-4
    )
    jacobians = torch.func.vmap(torch.func.jacrev(lambda one: model(one[None])[0]))(inputs.train_x[:40]).flatten(2)
    assert row["jacobian_max"] == pytest.approx(torch.linalg.matrix_norm(jacobians, 2).max().item(), rel=1e-4)


@pytest.mark.parametrize("change", [{"width": 13}, {"networks": ["cnn"]}, {"hidden_layers": 1}])
def test_weights_of_other_settings_are_refused_in_one_sentence(measured, tmp_path, digits, change, capsys):
    folder, _, _ = measured
    with pytest.raises(SystemExit, match="2"):
        measure(tmp_path, digits, SETTINGS.model_copy(update=change), folder / "weights.safetensors")
    assert "weights.safetensors holds networks (mlp on digits) of other settings" in capsys.readouterr().err
