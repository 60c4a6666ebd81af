"""DreamerV3's steps without it: what is asked of its process, how that process ends, what becomes of answers.

Its process is replaced by a small script, or by a function that answers as the real one does. `test_dreamer_itself`
has the real one.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from jacnorm import environments
from jacnorm.environments import Environment
from jacnorm.errors import UserError
from jacnorm.files import read_table, write_json
from jacnorm.studies.worldmodel import dreamer_client as client
from jacnorm.studies.worldmodel import measure_dreamer, tables, train_dreamer
from jacnorm.studies.worldmodel.arms import arms
from jacnorm.studies.worldmodel.dreamer_worker import Plan
from jacnorm.studies.worldmodel.settings import DreamerSettings

HERE = Environment(Path(sys.executable), {})
SMALL = {"seeds": [10, 11], "tasks": ["dummy"], "frames": 300, "horizons": [1, 3], "evaluation_episodes": 2}
SETTINGS = DreamerSettings(**SMALL, gravities=[0.5])


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


def script(folder, text):
    """A worker that runs `text`; it finds its task in the file that is its argument."""
    (folder / "code").mkdir(parents=True, exist_ok=True)
    (folder / "code" / "fake.py").write_text(text)
    return ModuleType("fake")


def ask(folder, text, task=None, progress=lambda line: None):
    return client.ask(HERE, script(folder, text), task or {}, folder, "disable", progress)


def test_a_worker_gets_its_task_and_answers(tmp_path):
    text = """
import json, os, sys
task = json.load(open(sys.argv[1]))
print(json.dumps({"kind": "progress", "update": 1}), flush=True)
print(json.dumps({"kind": "result", "twice": 2 * task["number"], "gl": os.environ["MUJOCO_GL"]}))
"""
    said = []
    answer = ask(tmp_path, text, {"number": 4}, said.append)
    assert (answer["twice"], answer["gl"]) == (8, "disable")
    assert said == [{"kind": "progress", "update": 1}]


def test_a_worker_sees_this_package_and_nothing_else_of_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("XLA_FLAGS", "--of-the-user")
    text = """
import json, os, sys
import jacnorm
keys = ("PYTHONPATH", "XLA_FLAGS", "JAX_PLATFORMS", "OMP_NUM_THREADS")
print(json.dumps({"kind": "result", **{key: os.environ.get(key) for key in keys}}))
"""
    answer = ask(tmp_path, text)
    assert [path.name for path in Path(answer["PYTHONPATH"]).iterdir() if path.name != "fake.py"] == ["jacnorm"]
    assert "of-the-user" not in answer["XLA_FLAGS"]
    assert (answer["JAX_PLATFORMS"], answer["OMP_NUM_THREADS"]) == ("cpu", "1")


def test_a_mistake_of_the_user_is_told(tmp_path):
    text = 'import json; print(json.dumps({"kind": "mistake", "sentence": "set device to cpu"}))'
    with pytest.raises(UserError, match="set device to cpu"):
        ask(tmp_path, text)


def test_a_failure_shows_the_end_of_the_log(tmp_path):
    with pytest.raises(RuntimeError, match=r"status 1(.|\n)*ZeroDivisionError"):
        ask(tmp_path, "1 / 0")


def test_a_killed_worker_is_told_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"signal 9.*memory"):
        ask(tmp_path, "import os; os.kill(os.getpid(), 9)")


def test_a_worker_ends_when_its_parent_does(tmp_path):
    """The parent holds the worker's standard input; closing it is what the system does when the parent dies."""
    text = """
import json, threading, time
from jacnorm.studies.worldmodel.dreamer_worker import _end_with_parent
threading.Thread(target=_end_with_parent, daemon=True).start()
time.sleep(60)
"""
    script(tmp_path, text)
    variables = client._variables(tmp_path, "cpu", "disable")
    process = subprocess.Popen([sys.executable, "-m", "fake"], env=variables, stdin=subprocess.PIPE)
    time.sleep(0.1)
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=30) == 1


def test_a_worker_ends_when_the_step_fails(tmp_path):
    text = (
        'import json, os, time; print(json.dumps({"kind": "progress", "pid": os.getpid()}), flush=True); time.sleep(60)'
    )
    pids = []

    def fail(line):
        pids.append(line["pid"])
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        ask(tmp_path, text, progress=fail)
    assert not Path(f"/proc/{pids[0]}").exists()


@pytest.mark.parametrize(("works", "found"), [({"egl", "osmesa"}, "egl"), ({"osmesa"}, "osmesa")])
def test_the_first_renderer_that_draws_is_taken(tmp_path, monkeypatch, works, found):
    monkeypatch.setattr(client, "ask", lambda _, __, ___, ____, gl: {"renders": gl in works, "reason": "no library"})
    assert client.renderer(HERE, pixels(), tmp_path) == found


def test_without_a_renderer_the_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "ask", lambda *_: {"renders": False})
    with pytest.raises(UserError, match=r"libegl1.*libosmesa6"):
        client.renderer(HERE, pixels(), tmp_path)


def test_nothing_is_tried_where_no_image_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "ask", lambda *_: pytest.fail("asked"))
    assert client.renderer(HERE, SETTINGS, tmp_path) == "disable"
    assert client.renderer(HERE, DreamerSettings(tasks=["dummy"], observation="pixels"), tmp_path) == "disable"


def pixels():
    return DreamerSettings(tasks=["walker_walk"], observation="pixels")


def test_only_gravity_perturbs_an_agent_that_sees_no_images():
    kinds = [each.perturbation for each in client.seen_conditions(SETTINGS)]
    assert kinds == ["clean", "gravity"]
    assert {"gauss", "mask", "rotation"} <= {each.perturbation for each in client.seen_conditions(pixels())}


@pytest.mark.parametrize(
    ("device", "asked", "packages", "expected"),
    [
        ("cpu", "auto", {client.CUDA: "1"}, "cpu"),
        ("cuda", "auto", {client.CUDA: "1"}, "gpu"),
        ("cuda", "auto", {}, "cpu"),
        ("cuda", "cuda", {}, "gpu"),  # and the worker says that there is none
    ],
)
def test_the_device_is_never_changed_if_it_was_asked_for(device, asked, packages, expected):
    job = SimpleNamespace(device=torch.device(device))
    assert client.platform(Environment(Path("python"), packages), job, asked) == expected


def test_arms_of_a_seed_share_their_random_numbers():
    first = client.numbers("dummy", 10, ("agent", "replay"))
    assert first == client.numbers("dummy", 10, ("agent", "replay"))
    assert len({*first.values(), *client.numbers("dummy", 11, ("agent", "replay")).values()}) == 4


def test_a_plan_by_hand():
    """2000 frames of walker are 1000 decisions; 8 x 16 + 16 fill the memory; then 64 / 128 updates per decision."""
    plan = Plan.of({"task": "walker_walk", "frames": 2000, "batch": 8, "length": 16, "train_ratio": 64.0})
    assert (plan.decisions, plan.prefill, plan.updates) == (1000, 144, 428)
    assert [plan.due(decisions) for decisions in (0, 144, 145, 146, 148)] == [0, 0, 0, 1, 2]


def test_too_few_frames_are_a_mistake():
    with pytest.raises(UserError, match=r'"frames" is 100.*first 144 of 100 decisions'):
        train_dreamer.check(SETTINGS.model_copy(update={"frames": 100}))


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    write_json(tmp_path / "environment.json", {"interpreter": "bin/python", "packages": {}})
    assert environments.read(tmp_path / "environment.json").packages == {}
    return tmp_path / "environment.json"


def trains(environment, worker, question, folder, gl, progress=None):
    """Answers as `dreamer_training` does; seed 11 diverges where lambda is not 0. Weights tell who they are."""
    runs = []
    for number, run in enumerate(question["runs"]):
        weight = question["penalty"]["weight"]
        diverged = run["seed"] == 11 and weight > 0
        row = {"update": 5, "frames": 155, "model_loss": 7.5, "kl": 0.5, "penalty": 3.0 if weight else None}
        row["return"] = None
        progress({"kind": "progress", "seed": run["seed"], "number": number, "updates": 78, **row})
        place = Path(folder) / f"seed-{run['seed']}"
        place.mkdir(parents=True)
        np.savez(place / "weights.npz", **{"agent/wm/a": np.float32([run["seed"], weight])})
        names = ("model_loss", "image_loss", "reward_loss", "kl", "penalty")
        losses = dict.fromkeys(names, None if diverged else 2.0) | ({} if weight else {"penalty": None})
        ends = {"updates": 5 if diverged else 78, "diverged_at": 5 if diverged else -1}
        runs.append({"seed": run["seed"], "parameters": 2, **ends, **losses, "curve": [row]})
    return {"kind": "result", "runs": runs}


def measures(environment, worker, question, folder, gl, progress=None):
    """Answers as `dreamer_measuring` does, with numbers made from the weights that came."""
    found = []
    for run in question["runs"]:
        for name, file in run["agents"]:
            with np.load(file, allow_pickle=False) as arrays:
                seed, weight = arrays["agent/wm/a"].tolist()
            assert seed == run["seed"]
            progress({"kind": "progress", "seed": run["seed"], "name": name, "clean_return": 1.0})
            returns = [{**each, "return": weight, "random_return": seed} for each in question["conditions"]]
            found.append(
                {
                    "seed": run["seed"],
                    "name": name,
                    "jacobians": {"transitions": 5, **dict.fromkeys(measure_dreamer.NORMS, weight)},
                    "horizons": [
                        {"horizon": each, "divergence": weight, "image_error": 1.0, "reward_error": 2.0}
                        for each in question["horizons"]
                    ],
                    "returns": returns,
                }
            )
    return {"kind": "result", "agents": found}


def test_answers_become_tables(tmp_path, environment, monkeypatch):
    monkeypatch.setattr(client, "ask", trains)
    weights = tmp_path / "w" / "dreamer-s10-11.safetensors"
    train_dreamer.dreamer(SETTINGS, tmp_path, environment, weights, "cpu")
    assert [path.name for path in weights.parent.iterdir()] == [weights.name]  # no checkpoints are left

    fits = read_table(tmp_path / "dreamer_fits-s10-11.parquet").set_index(["seed", "lambda"])
    assert len(fits) == 4
    assert set(fits["agent"]) == {"dreamerv3"}
    assert fits.loc[(11, 0.01), "diverged_at"] == 5
    assert math.isnan(fits.loc[(11, 0.01), "model_loss"])
    assert fits.loc[(10, 0.01), "penalty_share"] == 0.01 * 2 / 2
    assert math.isnan(fits.loc[(10, 0.0), "penalty"])
    curves = read_table(tmp_path / "dreamer_curves-s10-11.parquet")
    assert curves["frames"].tolist() == [155] * 4
    assert curves["return"].isna().all()

    monkeypatch.setattr(client, "ask", measures)
    measure_dreamer.dreamer(SETTINGS, tmp_path, environment, weights, "cpu")
    for name in ("jacobians", "divergence", "prediction", "returns"):
        table = read_table(tmp_path / f"dreamer_{name}-s10-11.parquet")
        assert list(table) == list(tables.COLUMNS[f"dreamer_{name}"])
        values = table.select_dtypes("float").drop(columns=["lambda", "error_size", "strength"], errors="ignore")
        lost = (table["seed"] == 11) & (table["lambda"] == 0.01)  # the agent that diverged has rows without numbers
        assert values[lost].isna().all(axis=None)
        assert values[~lost].notna().all(axis=None)
    norms = read_table(tmp_path / "dreamer_jacobians-s10-11.parquet").set_index(["seed", "lambda"])
    assert norms.loc[(10, 0.01), "f_h"] == pytest.approx(0.01)
    returns = read_table(tmp_path / "dreamer_returns-s10-11.parquet")
    assert len(returns) == 4 * 2
    assert set(zip(returns["perturbation"], returns["strength"], strict=True)) == {("clean", 0.0), ("gravity", 0.5)}
    assert set(returns["random_return"].dropna()) == {10.0, 11.0}


def test_if_every_agent_diverged_nothing_is_asked(tmp_path, environment, monkeypatch):
    alone = SETTINGS.model_copy(update={"seeds": [11], "lambdas": [0.01]})
    monkeypatch.setattr(client, "ask", trains)
    train_dreamer.dreamer(alone, tmp_path, environment, tmp_path / "w" / "d.safetensors", "cpu")
    monkeypatch.setattr(client, "ask", lambda *_: pytest.fail("asked"))
    measure_dreamer.dreamer(alone, tmp_path, environment, tmp_path / "w" / "d.safetensors", "cpu")
    assert read_table(tmp_path / "dreamer_divergence-s11-11.parquet")["divergence"].isna().all()


def test_weights_of_something_else_are_a_mistake(tmp_path, environment):
    from jacnorm.training import snapshots
    from jacnorm.training.snapshots import Snapshot

    snapshots.save(tmp_path / "other.safetensors", [Snapshot({"depth": 3}, {"a": torch.zeros(1)})])
    with pytest.raises(UserError, match="does not hold agents of DreamerV3"):
        measure_dreamer.dreamer(SETTINGS, tmp_path, environment, tmp_path / "other.safetensors", "cpu")


def test_a_task_names_the_arm(tmp_path):
    settings = DreamerSettings(lambdas=[0.01], drift=[0.5], wrt=["z"], include_prior=False, power=1, n_proj=3)
    plain, drift = arms(settings)
    asked = client.kind(settings, "walker_walk", drift, "cpu")
    assert asked["penalty"] == {"weight": 0.01, "wrt": ["z"], "include_prior": False, "power": 1, "n_proj": 3}
    assert asked["error"] == {"kind": "drift", "size": 0.5}
    assert client.kind(settings, "walker_walk", plain, "cpu")["error"] == {"kind": "none", "size": 0.0}
