"""DreamerV3 itself, in its own environment; left out where that is not built. Minutes, most of them for compiling.

Build it with ``python -m jacnorm.environments --lock requirements/dreamerv3.txt --out
results/envs/dreamerv3/environment.json``, or name a file of such a build in JACNORM_DREAMERV3.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from jacnorm import environments
from jacnorm.errors import UserError
from jacnorm.files import read_table
from jacnorm.studies.worldmodel import dreamer_client as client
from jacnorm.studies.worldmodel import dreamer_measure_worker, dreamer_train_worker, measure_dreamer, train_dreamer
from jacnorm.studies.worldmodel.arms import arms
from jacnorm.studies.worldmodel.penalty import cell_penalty, directions
from jacnorm.studies.worldmodel.settings import DreamerSettings

FILE = Path(os.environ.get("JACNORM_DREAMERV3", Path(__file__).parents[3] / "results/envs/dreamerv3/environment.json"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILE.exists(), reason=f"DreamerV3's environment is not built ({FILE.name} is missing)"),
]
SETTINGS = DreamerSettings(
    seeds=[1], tasks=["dummy"], lambdas=[0.01], frames=300, gravities=[0.5], evaluation_episodes=2, context=10,
    horizons=[1, 3], jacobian_transitions=32,
)  # fmt: skip


@pytest.fixture
def environment():
    return environments.read(FILE)


def test_both_estimators_agree_on_the_weights_of_a_gru(tmp_path, environment):
    """The torch estimator on our GRU and the JAX estimator on DreamerV3's, from the same weights and projections."""
    source = torch.Generator().manual_seed(0)
    sizes = {"kernel": (6 + 5, 3 * 6), "scale": (3 * 6,), "offset": (3 * 6,), "h": (7, 6), "x": (7, 5)}
    given = {name: torch.randn(*shape, generator=source) for name, shape in sizes.items()}
    given["projections"] = directions((2, 7, 6), source)
    np.savez(tmp_path / "cell.npz", **{name: tensor.numpy() for name, tensor in given.items()})
    question = {"command": "estimate", "file": str(tmp_path / "cell.npz")}
    answer = client.ask(environment, dreamer_measure_worker, question, tmp_path, "disable")
    expected = cell_penalty(*given.values()).item()
    assert answer["value"] == pytest.approx(expected, rel=1e-5)


def test_a_device_that_is_not_there_is_a_mistake(tmp_path, environment):
    if client.CUDA in environment.packages:
        pytest.skip("this environment may have a GPU")
    with pytest.raises(UserError, match="set device to cpu"):
        client.ask(environment, dreamer_train_worker, {"platform": "gpu"}, tmp_path, "disable")


def test_a_killed_training_ends_with_the_same_bits_and_is_measured(tmp_path, environment, monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")
    monkeypatch.setattr(client, "CHECKPOINT_SECONDS", 0.0)
    question = {
        **client.kind(SETTINGS, "dummy", arms(SETTINGS)[0], "cpu"),
        "checkpoint_seconds": 0.0,
        "runs": [{"seed": 1, "numbers": client.numbers("dummy", 1, train_dreamer.STREAMS)}],
        "folder": str(tmp_path / "killed"),
    }

    class Killed(Exception):
        pass

    def kill(line):
        if line["update"] > 40:  # after the checkpoint at the end of the third episode, 183 decisions and 19 updates
            raise Killed

    with pytest.raises(Killed):
        client.ask(environment, dreamer_train_worker, question, tmp_path / "killed", "disable", kill)
    assert (tmp_path / "killed/seed-1/checkpoint.ckpt").exists()
    lines = []
    resumed = client.ask(environment, dreamer_train_worker, question, tmp_path / "killed", "disable", lines.append)
    assert lines[0]["update"] > 1  # it did not begin anew

    weights = tmp_path / "w" / "weights.safetensors"
    train_dreamer.dreamer(SETTINGS, tmp_path, FILE, weights, "cpu")
    (whole,) = train_dreamer.snapshots.load(weights)
    with np.load(tmp_path / "killed/seed-1/weights.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == set(whole.tensors) - {"diverged_at"}
        for name in arrays.files:
            assert np.array_equal(arrays[name], whole.tensors[name][0].numpy()), name
    curves = read_table(tmp_path / "dreamer_curves-s1-1.parquet")
    assert curves["model_loss"].tolist() == [row["model_loss"] for row in resumed["runs"][0]["curve"]]
    assert curves["model_loss"].iloc[-1] < curves["model_loss"].iloc[0]

    measure_dreamer.dreamer(SETTINGS, tmp_path, FILE, weights, "cpu")
    (norms,) = read_table(tmp_path / "dreamer_jacobians-s1-1.parquet").to_dict("records")
    # Training's estimate is of f and the prior at h together: the same size, on other transitions.
    (fit,) = read_table(tmp_path / "dreamer_fits-s1-1.parquet").to_dict("records")
    assert fit["penalty"] == pytest.approx(norms["f_h"] ** 2 + norms["f_z"] ** 2 + norms["p_h"] ** 2, rel=0.3)
    # Of a single transition the columns add up, whatever the weights.
    one = tmp_path / "one"
    measure_dreamer.dreamer(SETTINGS.model_copy(update={"jacobian_transitions": 1}), one, FILE, weights, "cpu")
    (norms,) = read_table(one / "dreamer_jacobians-s1-1.parquet").to_dict("records")
    assert norms["transitions"] == 1
    assert norms["f_h_spectral"] < norms["f_h"]
    squares = norms["f_h"] ** 2 + norms["f_z"] ** 2 + norms["composed_prior"] ** 2
    assert norms["composed"] ** 2 == pytest.approx(squares, rel=1e-4)

    returns = read_table(tmp_path / "dreamer_returns-s1-1.parquet")
    assert returns["perturbation"].tolist() == ["clean", "gravity"]
    assert returns["return"].between(0, 60).all()
    assert returns["return"].nunique() == 2
