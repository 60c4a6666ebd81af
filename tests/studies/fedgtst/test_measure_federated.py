"""Statistics over clients against the covariance of explicit gradients, and transfer against single networks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.studies.fedgtst.federated_peers import TINY, coloured, domain_files, measure, train
from torch import nn

from jacnorm.errors import UserError
from jacnorm.studies.fedgtst import measure_federated
from jacnorm.studies.fedgtst.cells import Run, client_rows, network_of
from jacnorm.studies.fedgtst.inputs import load
from jacnorm.studies.fedgtst.measure_federated import client_gradient, dispersion, source_accuracies, statistics
from jacnorm.studies.fedgtst.networks import build
from jacnorm.studies.fedgtst.settings import DomainSettings
from jacnorm.studies.fedgtst.tables import COLUMNS
from jacnorm.studies.fedgtst.transfer import Part, fine_tune
from jacnorm.training.seeds import RunId

torch.set_num_threads(1)

CPU = torch.device("cpu")
K, N = 4, 7


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    return coloured(digits, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        kept = train(folder, data)[-1]
        return folder, kept, *measure(folder, data)


def problem(*, probabilistic=False):
    """A network in float64 with its weights, and clients' samples."""
    stream = torch.Generator().manual_seed(5)
    network = build("lenet", (3, 8, 8), 3, probabilistic=probabilistic)
    weights = {name: tensor.double() for name, tensor in network.parameters(stream).items()}
    x = torch.randn(K, N, 3, 8, 8, generator=stream, dtype=torch.float64)
    return network, weights, x, torch.randint(3, (K, N), generator=stream)


def explicit(network, weights, x, y):
    """Losses (K,) and gradients (K, D), the rows of the Jacobian of all losses at once."""

    def losses(own):
        logits = torch.stack([network.logits(own, images) for images in x])  # (K, n, C)
        return -logits.log_softmax(2).gather(2, y[..., None]).squeeze(2).mean(1)

    rows = torch.func.jacrev(losses)(weights)
    return losses(weights), torch.cat([rows[name].flatten(1) for name in weights], 1)


@pytest.mark.parametrize("probabilistic", [False, True])
def test_statistics_are_norm_of_the_mean_and_trace_of_the_covariance(probabilistic):
    network, weights, x, y = problem(probabilistic=probabilistic)
    losses, gradients = explicit(network, weights, x, y)
    found = statistics(network, weights, x, y)
    mean = gradients.mean(0)
    assert found["norm_of_mean"] == pytest.approx(mean.norm().item(), rel=1e-9)
    assert found["variance"] == pytest.approx((gradients - mean).square().sum(1).mean().item(), rel=1e-9)
    norms = gradients.norm(dim=1)
    assert found["norm_mean"] == pytest.approx(norms.mean().item(), rel=1e-9)
    assert found["norm_max"] == pytest.approx(norms.max().item(), rel=1e-9)
    assert found["norm_dispersion"] == pytest.approx((norms - norms.mean()).square().mean().item(), rel=1e-6)
    assert found["source_loss"] == pytest.approx(losses.mean().item(), rel=1e-9)


def test_a_gradient_does_not_depend_on_how_samples_are_cut(monkeypatch):
    network, weights, x, y = problem()
    loss, whole = client_gradient(network, weights, x[0], y[0])
    monkeypatch.setattr(measure_federated, "CHUNK", 3)
    again, parts = client_gradient(network, weights, x[0], y[0])
    assert again == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-14)


@given(seed=st.integers(0, 2**31), clients=st.integers(1, 8), scale=st.floats(1e-3, 1e3))
def test_variance_is_the_sum_of_its_two_parts_and_neither_is_negative(seed, clients, scale):
    gradients = scale * torch.randn(clients, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = dispersion(gradients.norm(dim=1), gradients.mean(0).norm().item())
    size = scale**2 * 25
    assert found["variance"] == pytest.approx(
        found["norm_dispersion"] + found["direction_dispersion"], abs=1e-12 * size
    )
    assert found["norm_dispersion"] >= 0
    assert found["direction_dispersion"] >= -1e-12 * size
    assert found["norm_of_mean"] <= found["norm_mean"] * (1 + 1e-12)


def test_dispersion_of_gradients_that_differ_in_length_or_in_direction_only():
    length = dispersion(torch.tensor([1.0, 3.0], dtype=torch.float64), 2.0)
    assert (length["variance"], length["norm_dispersion"], length["direction_dispersion"]) == (1.0, 1.0, 0.0)
    opposite = dispersion(torch.tensor([2.0, 2.0], dtype=torch.float64), 0.0)
    assert (opposite["variance"], opposite["norm_dispersion"], opposite["direction_dispersion"]) == (4.0, 0.0, 4.0)


def test_weights_that_overflow_give_numbers_that_are_not_finite_and_no_correct_answer(data):
    network, weights, x, y = problem()
    spoilt = {name: tensor * 1e200 for name, tensor in weights.items()}
    found = statistics(network, spoilt, x, y)
    assert math.isnan(found["source_loss"])
    assert not math.isfinite(found["variance"])
    (inputs,) = load(TINY, data)
    wide = build("lenet", (3, 8, 8), 10)
    broken = {name: tensor * 1e38 for name, tensor in wide.parameters(torch.Generator().manual_seed(1)).items()}
    assert source_accuracies(wide, [broken], inputs.source_test, CPU) == [0.0]


def test_the_tables_have_a_row_for_every_run_where_it_was_kept(measured):
    _, _, found, transfer, curves = measured
    for table, name in ((found, "statistics"), (transfer, "transfer"), (curves, "fine_tuning")):
        assert list(table.columns) == list(COLUMNS[f"federated_{name}"])
    assert (found.groupby(["method", "seed"])["round"].apply(list).map(str) == "[0, 3, 4]").all()
    assert len(found) == 3 * 2 * 3
    own = transfer[transfer.features == "trained"]
    assert sorted(zip(own.method, own.seed, strict=True)) == [
        (method, seed) for method in ("fedavg", "fedgtst", "fedsr") for seed in (10, 11)
    ]
    assert (curves.groupby(["features", "method", "seed"]).epoch.apply(list).map(str) == "[0, 1, 2]").all()


def test_random_features_are_measured_once_for_each_start(measured):
    transfer = measured[3]
    start = transfer[transfer.features == "random"]
    assert sorted(zip(start.method, start.seed, strict=True)) == [
        ("fedavg", 10), ("fedavg", 11), ("fedsr", 10), ("fedsr", 11),
    ]  # fmt: skip


def test_statistics_are_taken_of_the_kept_weights_and_all_clients(measured, data):
    _, kept, found, _, _ = measured
    (inputs,) = load(TINY, data)
    snapshot = kept[-1]  # fedgtst after its last round
    run = Run.of(snapshot.cell["runs"][1])
    assert run.method == "fedgtst"
    network = network_of(run, inputs)
    weights = {name: tensor[1].double() for name, tensor in snapshot.tensors.items()}
    rows = client_rows(TINY, run.condition, run.seed, inputs)
    x, y = inputs.source_train.x[rows].double(), inputs.source_train.y[rows]
    losses, gradients = explicit(network, weights, x, y)
    row = found[(found.method == "fedgtst") & (found.seed == 11) & (found["round"] == 4)].iloc[0]
    assert row.norm_of_mean == pytest.approx(gradients.mean(0).norm().item(), rel=1e-4)
    assert row.variance == pytest.approx(gradients.var(0, correction=0).sum().item(), rel=1e-4)
    assert row.source_loss == pytest.approx(losses.mean().item(), rel=1e-4)
    right = network.logits(weights, inputs.source_test.x.double()).argmax(1) == inputs.source_test.y
    assert row.source_accuracy == pytest.approx(right.double().mean().item())


def test_methods_of_a_seed_start_with_the_same_statistics(measured):
    found = measured[2]
    start = found[found["round"] == 0].set_index(["method", "seed"])
    for seed in TINY.seeds:
        assert start.variance["fedavg", seed] == start.variance["fedgtst", seed]
    assert start.variance["fedavg", 10] != start.variance["fedavg", 11]


@pytest.mark.parametrize(("features", "position"), [("trained", -1), ("random", 0)])
def test_transfer_is_fine_tuning_on_the_last_weights_and_on_the_first(measured, data, features, position):
    _, kept, _, transfer, curves = measured
    (inputs,) = load(TINY, data)
    method = "fedgtst" if features == "trained" else "fedavg"
    snapshot = kept[position]
    assert snapshot.cell["runs"][0]["method"] == method
    network = build("lenet", inputs.shape, 10)
    weights = {name: tensor[0] for name, tensor in snapshot.tensors.items()}
    with torch.no_grad():
        parts = [
            Part(network.features(weights, samples.x)[None], samples.y)
            for samples in (inputs.target_train, inputs.target_validation, inputs.target_test)
        ]
    expected = fine_tune(TINY, [RunId("fedgtst", "fine-tuning digits_m", 10)], 10, *parts)
    row = transfer[(transfer.features == features) & (transfer.method == method) & (transfer.seed == 10)].iloc[0]
    assert row.target_loss == pytest.approx(expected.target_loss.item(), rel=1e-4)
    assert row.target_accuracy == pytest.approx(expected.target_accuracy.item(), abs=0.004)
    assert row.validation_accuracy == pytest.approx(expected.validation_accuracy.item(), abs=0.1)
    own = curves[(curves.features == features) & (curves.method == method) & (curves.seed == 10)]
    assert own.train_accuracy.tolist() == pytest.approx(expected.train_curve[:, 0].tolist(), abs=0.03)
    assert own.target_accuracy.iloc[-1] == row.target_accuracy


def test_how_many_runs_are_fine_tuned_together_does_not_matter(measured, data, monkeypatch):
    folder, _, _, transfer, _ = measured
    monkeypatch.setattr(measure_federated, "NUMBERS", 1)
    alone = measure(folder, data)[1]
    keys = ["features", "method", "seed"]
    assert alone[keys].equals(transfer[keys])
    assert alone.target_loss.tolist() == pytest.approx(transfer.target_loss.tolist(), rel=1e-4)


@pytest.mark.parametrize("update", [{"coefficients": [1e-4]}, {"seeds": [10]}, {"methods": ["fedavg", "fedgtst"]}])
def test_weights_of_other_settings_are_refused(measured, data, update, capsys):
    with pytest.raises(SystemExit, match="2"):
        measure(measured[0], data, TINY.model_copy(update=update))
    assert "holds the weights of other settings; run the training step again" in capsys.readouterr().err


def test_weights_of_another_shape_are_refused(measured, data):
    folder, kept, *_ = measured
    (inputs,) = load(TINY, data)
    other = type(kept[0])(kept[0].cell, {"read_out.weight": torch.zeros(2, 1, 1)})
    with pytest.raises(UserError, match="other settings"):
        measure_federated._check(TINY, {"digits_m": inputs}, [other, *kept[1:]], folder / "weights.safetensors")


def test_a_run_that_ended_early_is_measured_at_its_last_weights(data, tmp_path):
    update = {"methods": ["fedgtst"], "ablation_methods": ["fedgtst"], "coefficients": [3.0], "runaway": 20.0}
    settings = TINY.model_copy(update=update)
    runs = train(tmp_path, data, settings)[0]
    found, transfer, _ = measure(tmp_path, data, settings)
    assert (runs.outcome != "finished").any()
    last = found.groupby("seed")["round"].max()
    for row in runs.itertuples():
        assert last[row.seed] == row.rounds
    own = transfer[transfer.features == "trained"]
    assert own.seed.tolist() == settings.seeds
    assert own.target_accuracy.between(0, 1).all()


def test_every_domain_is_a_target(tmp_path):
    settings = DomainSettings(
        seeds=[10], methods=["fedavg"], client_samples=6, rounds=1, batch=8, ablation_clients=5,
        ablation_methods=["fedavg"], fine_tuning_epochs=1,
    )  # fmt: skip
    files = domain_files(tmp_path)
    train(tmp_path, files, settings, "domains")
    found, transfer, _ = measure(tmp_path, files, settings, "domains")
    assert found.groupby("target")["round"].apply(list).map(lambda each: each == [0, 1]).all()
    assert transfer.target.nunique() == 6
    assert len(transfer) == 12


def test_accuracy_of_a_network_that_knows_the_answers(data):
    (inputs,) = load(TINY, data)
    network = build("lenet", (3, 8, 8), 10)
    weights = network.parameters(torch.Generator().manual_seed(0))
    weights["read_out.weight"] = torch.zeros_like(weights["read_out.weight"])
    weights["read_out.bias"] = nn.functional.one_hot(torch.tensor(7), 10).float()
    expected = (inputs.source_test.y == 7).double().mean().item()
    assert source_accuracies(network, [weights], inputs.source_test, CPU) == [pytest.approx(expected)]
