"""End points against dense matrices of single networks, built without stacks; whole jobs through the command."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from jacnorm.errors import UserError
from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.sharpening import measure_regularisers, train_regularisers
from jacnorm.studies.sharpening.arms import arms
from jacnorm.studies.sharpening.curvature import Curvature, top
from jacnorm.studies.sharpening.inputs import load_all
from jacnorm.studies.sharpening.measure_regularisers import Instrument, Kept, near
from jacnorm.studies.sharpening.networks import Convolutional, _BatchNorm, build
from jacnorm.studies.sharpening.settings import RegulariserSettings
from jacnorm.training.checkpoint import pack
from jacnorm.training.snapshots import load as load_snapshots

torch.set_num_threads(1)

SETTINGS = RegulariserSettings(
    seeds=[10, 11],
    train_samples=40,
    pool=60,
    width=6,
    hidden_layers=1,
    batch=20,
    updates=30,
    curvature_samples=30,
    jacobian_samples=25,
    other_learning_rates=[],
    other_batches=[10],
    weight_decays=[0.1],
    smoothings=[],
    mixups=[],
    sam_radii=[0.1],
    jacobian_penalties=[],
    matched_loss=2.0,
)
COMMANDS = {"train": train_regularisers.regularisers, "measure": measure_regularisers.regularisers}
KEY = ["regulariser", "strength", "learning_rate", "batch", "seed", "rule"]


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def inputs(digits):
    return load_all([digits], SETTINGS)[0]


def call(step, settings, folder, digits):
    """Call a step with the options that a rule would give; the table that it wrote."""
    before = torch.get_deterministic_debug_mode()
    words = ["--device", "cpu", "--tables", str(folder), "--data", str(digits)]
    words += ["--weights", str(folder / "regularisers.safetensors")]
    try:
        run({"regularisers": COMMANDS[step]}, [*words, *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)
    return read_table(folder / f"{'sgd_fits' if step == 'train' else 'endpoints'}-s10-11.parquet")


def kept(settings, scales, rules=("updates",)):
    """Networks at random, one for each scale of their weights."""
    network = build(settings, "mlp", (1, 8, 8), 10)
    streams = [torch.Generator().manual_seed(seed) for seed in range(len(scales))]
    stack = pack(parameter=network.initial(streams), statistic=network.buffers(len(scales)))
    return [
        Kept({"seed": run}, list(rules), 7, {name: scale * tensor[run] for name, tensor in stack.items()})
        for run, scale in enumerate(scales)
    ]


def dense(tensors, inputs, settings):
    """The columns of one network in float64: the whole Hessian, the whole Gauss-Newton matrix, each Jacobian."""
    t = {name.partition("/")[2]: tensor.double() for name, tensor in tensors.items()}
    shapes = {name: tensor.shape for name, tensor in t.items()}
    theta = torch.cat([tensor.flatten() for tensor in t.values()])

    def logits(theta, x):
        parts = theta.split([shape.numel() for shape in shapes.values()])
        w1, b1, w2, b2 = (part.view(shape) for part, shape in zip(parts, shapes.values(), strict=True))
        return torch.relu(x.flatten(1) @ w1.T + b1) @ w2.T + b2

    train, labels = inputs.train_x.double(), inputs.train_y
    m, n = settings.curvature_samples, settings.jacobian_samples

    def loss(theta):
        return nn.functional.cross_entropy(logits(theta, train[:m]), labels[:m])

    hessian = torch.autograd.functional.hessian(loss, theta)
    p = logits(theta, train[:m]).softmax(1)
    costs = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # (m, K, K)
    derivative = torch.autograd.functional.jacobian(lambda each: logits(each, train[:m]), theta)  # (m, K, P)
    gauss_newton = torch.einsum("ika,ikl,ilb->ab", derivative, costs, derivative) / m

    def jacobian_norms(x):
        rows = [torch.autograd.functional.jacobian(lambda z: logits(theta, z[None])[0], each) for each in x]
        return torch.stack([torch.linalg.matrix_norm(row.flatten(1), 2) for row in rows])

    own, others = jacobian_norms(train[:n]), jacobian_norms(inputs.test_x[:n].double())
    tops = torch.linalg.eigvalsh(costs)[:, -1]
    whole, test = logits(theta, train), logits(theta, inputs.test_x.double())
    return {
        "sharpness": torch.linalg.eigvalsh(hessian)[-1],
        "gauss_newton": torch.linalg.eigvalsh(gauss_newton)[-1],
        "cost_hessian_max": tops.max(),
        "cost_hessian_mean": tops.mean(),
        "jacobian_max": own.max(),
        "jacobian_mean": own.mean(),
        "jacobian_argmax": own.argmax(),
        "test_jacobian_max": others.max(),
        "test_jacobian_mean": others.mean(),
        "train_loss": nn.functional.cross_entropy(whole, labels),
        "test_loss": nn.functional.cross_entropy(test, inputs.test_y),
        "train_accuracy": (whole.argmax(1) == labels).double().mean(),
        "test_accuracy": (test.argmax(1) == inputs.test_y).double().mean(),
    }


@pytest.mark.parametrize("chunk", [1000, 16])
def test_columns_are_those_of_dense_matrices(inputs, chunk):
    settings = SETTINGS.model_copy(update={"chunk": chunk})
    networks = kept(settings, [1.0, 3.0, 6.0])
    rows = list(Instrument(settings, inputs, "mlp", torch.device("cpu")).measure(networks))
    for each, row in zip(networks, rows, strict=True):
        for name, value in dense(each.tensors, inputs, settings).items():
            assert row[name] == pytest.approx(value.item(), rel=2e-3 if "ss" in name else 1e-3), name
        assert row["sharpness_converged"]
        assert row["gauss_newton_converged"]
        assert max(row["sharpness_residual"], row["gauss_newton_residual"]) <= 1e-3
        assert (row["seed"], row["rule"], row["step"]) == (each.columns["seed"], "updates", 7)
        assert row["variation"] > 0
        assert row["distance"] > 0


def test_a_network_has_a_row_for_each_rule_that_kept_it(inputs):
    rows = list(
        Instrument(SETTINGS, inputs, "mlp", torch.device("cpu")).measure(kept(SETTINGS, [1.0], ["updates", "epochs"]))
    )
    assert [row.pop("rule") for row in rows] == ["updates", "epochs"]
    assert rows[0] == rows[1]


def test_the_hessian_s_eigenvector_is_a_start_that_finds_the_same_gauss_newton_eigenvalue_sooner(inputs):
    settings = SETTINGS.model_copy(update={"width": 32})
    networks = kept(settings, [3.0] * 8)
    parameters = {
        name.partition("/")[2]: torch.stack([each.tensors[name] for each in networks]) for name in networks[0].tensors
    }
    network = build(settings, "mlp", inputs.image, 10)
    zeros = torch.zeros(8)
    curvature = Curvature(
        network, parameters, {}, inputs.train_x, inputs.train_y, ["cross-entropy"] * 8, zeros, chunk=1000
    )
    cold = top(curvature, "gauss-newton")
    warm = top(curvature, "gauss-newton", near(curvature, top(curvature, "hessian").vectors))
    torch.testing.assert_close(warm.values, cold.values, rtol=1e-3, atol=0.0)
    assert warm.products.sum() < cold.products.sum()


def test_batch_norm_is_measured_with_the_statistics_of_all_training_samples(inputs, monkeypatch):
    layers = [nn.Conv2d(1, 2, 3, padding=1), _BatchNorm(2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)]
    network = Convolutional((1, 8, 8), 10, nn.Sequential(*layers))
    monkeypatch.setattr(measure_regularisers, "build", lambda *_: network)
    parameters = network.initial([torch.Generator().manual_seed(0)])
    stale = {name: tensor + 5 for name, tensor in network.buffers(1).items()}
    tensors = {name: tensor[0] for name, tensor in pack(parameter=parameters, statistic=stale).items()}
    instrument = Instrument(SETTINGS, inputs, "cnn", torch.device("cpu"))
    (row,) = instrument.measure([Kept({}, ["updates"], 1, tensors)])
    plain = nn.Sequential(layers[0], nn.BatchNorm2d(2, momentum=None), *layers[2:]).to_empty(device="cpu")
    plain[1].reset_running_stats()
    with torch.no_grad():
        for own, given in zip(plain.parameters(), parameters.values(), strict=True):
            own.copy_(given[0])
    plain.train()(inputs.train_x)
    expected = nn.functional.cross_entropy(plain.eval()(inputs.train_x), inputs.train_y).item()
    assert row["train_loss"] == pytest.approx(expected, rel=1e-4)


# --- whole jobs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [100, 1])
def test_every_kept_network_is_measured_once_and_nothing_is_missing(tmp_path, digits, together):
    settings = SETTINGS.model_copy(update={"runs_together": together})
    fits = call("train", settings, tmp_path, digits)
    found = call("measure", settings, tmp_path, digits)
    assert len(arms(settings)) == 4
    expected = fits[fits.reached][[*KEY, "step"]]
    assert len(found) == len(expected) > 8
    assert set(found[[*KEY, "step"]].itertuples(index=False, name=None)) == set(
        expected.itertuples(index=False, name=None)
    )
    assert np.isfinite(found.select_dtypes("number")).all(axis=None)
    base = found[(found.regulariser == "none") & (found.batch == 20)]
    measured = [name for name in found if name != "rule"]
    assert base[base.rule == "updates"][measured].to_numpy().tolist() == (
        base[base.rule == "epochs"][measured].to_numpy().tolist()
    )
    assert (found.train_loss[found.rule == "matched"] <= 2.0 + 1e-6).all()


def test_a_network_is_measured_alike_alone_and_beside_others(inputs):
    networks = kept(SETTINGS, [1.0, 4.0, 2.0])
    instrument = Instrument(SETTINGS, inputs, "mlp", torch.device("cpu"))
    together = list(instrument.measure(networks))
    (alone,) = instrument.measure(networks[1:2])
    for name, value in alone.items():
        if isinstance(value, float):
            assert together[1][name] == pytest.approx(value, rel=1e-3, abs=1e-3 if "residual" in name else 0.0)
            assert math.isfinite(value)
        else:
            assert together[1][name] == value


def test_weights_of_other_settings_are_refused(tmp_path, digits):
    call("train", SETTINGS, tmp_path, digits)
    weights = tmp_path / "regularisers.safetensors"
    assert {each.cell["network"] for each in load_snapshots(weights)} == {"mlp"}
    with pytest.raises(UserError, match="holds mlp on digits of seed 10, which the settings do not name; train again"):
        measure_regularisers.regularisers(
            SETTINGS.model_copy(update={"networks": ["cnn"]}), tmp_path, [digits], weights, "cpu"
        )
