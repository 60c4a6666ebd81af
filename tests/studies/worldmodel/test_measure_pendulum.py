"""The measuring step: rows of its tables, agents that diverged or are of other settings, arms and seeds alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.studies.worldmodel.agents_at_random import agents, small

from jacnorm.errors import UserError
from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.worldmodel import arms as kept_agents
from jacnorm.studies.worldmodel import measure_pendulum, rssm
from jacnorm.studies.worldmodel.held_out import HeldOut, rollouts
from jacnorm.studies.worldmodel.measure_pendulum import TABLES, image_condition, pendulum, trained_agents
from jacnorm.studies.worldmodel.perturbations import Condition, conditions
from jacnorm.studies.worldmodel.tables import COLUMNS
from jacnorm.studies.worldmodel.transition_norms import NORMS, norms
from jacnorm.studies.worldmodel.trials import Trials

torch.set_num_threads(1)

CPU = torch.device("cpu")
SETTINGS = small(lambdas=[0.0, 0.01], f_only_lambdas=[], gravities=[0.5])
ARM = ["lambda", "wrt", "include_prior", "power", "error", "error_size", "batch", "length"]


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


def measured(folder, settings, given):
    """Call the step as a rule does, on these agents; its tables."""
    weights = folder / "weights.safetensors"
    kept_agents.save(weights, given)
    before = torch.get_deterministic_debug_mode()
    try:
        words = ["--tables", str(folder), "--weights", str(weights), "--device", "cpu"]
        run({"pendulum": pendulum}, [*words, *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)
    block = f"s{min(settings.seeds)}-{max(settings.seeds)}"
    return {name: read_table(folder / f"pendulum_{name}-{block}.parquet") for name in TABLES}


def test_tables_hold_each_arm_and_seed(tmp_path):
    given = agents(SETTINGS)
    tables = measured(tmp_path, SETTINGS, given)
    counts = {"jacobians": 1, "divergence": 3, "prediction": 3, "returns": 5}
    for name, count in counts.items():
        table = tables[name]
        assert list(table.columns) == list(COLUMNS[f"pendulum_{name}"])
        assert len(table) == 2 * 2 * count, name
        assert np.isfinite(table.select_dtypes("float")).all(axis=None), name
        assert set(table.seed) == {10, 11}
        assert set(table.agent) == {"rssm"}
        assert set(table.task) == {"pendulum"}
        assert table.groupby(ARM).ngroups == 2
    played = tables["returns"].groupby(["perturbation", "strength"], sort=False).ngroups
    assert played == 5
    assert (tables["jacobians"].transitions == 10).all()
    frames = tables["frames"]
    assert list(frames.columns) == list(COLUMNS["pendulum_frames"])
    assert len(frames) == 2 * 3 * 4 * 256
    assert set(frames.seed) == {10}
    assert frames.intensity.between(0, 1).all()


def test_a_row_is_that_of_its_arm_seed_horizon_and_condition(tmp_path):
    given = agents(SETTINGS)
    tables = {
        name: table[(table["lambda"] == 0.01) & (table.seed == 11)]
        for name, table in measured(tmp_path, SETTINGS, given).items()
    }
    model, actor = given[1].model, given[1].actor
    held_out = HeldOut.of(SETTINGS, CPU)
    states = held_out.states(model, 3)
    own = {name: tensor[1:] for name, tensor in model.items()}
    expected = norms(own, *(each[1] for each in held_out.starts(states)), 3)
    for name in NORMS:
        assert tables["jacobians"][name].item() == pytest.approx(expected[name].mean().item()), name
    rolled = rollouts(model, held_out, states, SETTINGS)
    assert tables["divergence"].horizon.tolist() == tables["prediction"].horizon.tolist() == [1, 3, 8]
    assert tables["divergence"].divergence.tolist() == pytest.approx(rolled.divergence[1].tolist())
    for name in ("image_error", "reward_error"):
        assert tables["prediction"][name].tolist() == pytest.approx(getattr(rolled, name)[1].tolist())
    trials = Trials.of(SETTINGS, CPU)
    for condition in conditions(SETTINGS):
        row = tables["returns"].query(
            f"perturbation == '{condition.perturbation}' and strength == {condition.strength}"
        )
        found = trials.returns(model, actor, condition)[1].mean().item()
        assert row["return"].item() == pytest.approx(found)
        assert row.random_return.item() == pytest.approx(trials.random_returns(condition)[1].mean().item())
    by_gravity = tables["returns"].groupby("perturbation").random_return.first()
    assert by_gravity["gauss"] == by_gravity["clean"] != by_gravity["gravity"]


def test_frames_show_what_was_there_and_what_is_predicted(tmp_path):
    given = agents(SETTINGS)
    frames = measured(tmp_path, SETTINGS, given)["frames"]
    frames = frames[frames["lambda"] == 0.01]
    strip = {
        key: part.sort_values(["row", "column"]).intensity.to_numpy().reshape(16, 16)
        for key, part in frames.groupby(["kind", "step"])
    }
    held_out = HeldOut.of(SETTINGS, CPU)
    for step in (0, 1, 3, 8):  # four observations are the context
        assert strip["true", step] == pytest.approx(held_out.images[0, 0, 3 + step].numpy())
    states = held_out.states(given[1].model, 3)
    seen = rssm.decode(given[1].model, states.h[:, :, 3], states.z[:, :, 3])[0, 0].clamp(0, 1)
    assert strip["clean", 0] == pytest.approx(seen.numpy(), abs=1e-5)


def test_perturbed_frames_follow_perturbed_observations(tmp_path, monkeypatch):
    """With a perturbation that turns every image into its negative, filtered here step by step."""
    given, asked = agents(SETTINGS), []

    def negative(images, condition, settings, noise):
        if settings == SETTINGS and images.shape == (4, 16, 16):
            asked.append((images, condition, noise.normal))
        return 1 - images

    monkeypatch.setattr(measure_pendulum, "perturb", negative)
    frames = measured(tmp_path, SETTINGS, given)["frames"]
    held_out, model = HeldOut.of(SETTINGS, CPU), given[1].model
    for images, condition, normal in asked:
        assert torch.equal(images, held_out.images[0, 0, :4])
        assert condition == Condition("gauss", 0.15)
        assert torch.equal(normal, asked[0][2])
        assert normal.std() > 0.9
    assert len(asked) == 2  # arms, with one noise
    one = {name: tensor[:1] for name, tensor in model.items()}
    h, z = torch.zeros(1, 1, 6), torch.zeros(1, 1, 6)
    for t in range(4):
        embedded = rssm.encode(one, 1 - held_out.images[:1, :1, t])
        a, first, noise = (each[:1, :1, t] for each in (held_out.actions, held_out.first, held_out.noise))
        h, z = rssm.observe_step(one, h, z, a.unsqueeze(-1), first, embedded, noise, 3)
    expected = rssm.decode(one, h, z)[0, 0].clamp(0, 1).flatten()
    rows = frames[(frames["lambda"] == 0.01) & (frames.step == 0)].sort_values(["row", "column"])
    assert rows[rows.kind == "perturbed"].intensity.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_arms_and_seeds_are_measured_alike_on_their_own(tmp_path):
    given = agents(SETTINGS)
    together = measured(tmp_path / "together", SETTINGS, given)
    one_arm = measured(tmp_path / "arm", SETTINGS.model_copy(update={"lambdas": [0.01]}), given[1:])
    for name, table in together.items():
        rows = table[table["lambda"] == 0.01].reset_index(drop=True)
        assert rows.equals(one_arm[name]), name  # bit for bit
    parts = [({name: each[1:] for name, each in part.items()}) for part in (given[0].model, given[0].actor)]
    alone = [replace(given[0], model=parts[0], actor=parts[1], diverged_at=given[0].diverged_at[1:])]
    one_seed = measured(tmp_path / "seed", SETTINGS.model_copy(update={"lambdas": [0.0], "seeds": [11]}), alone)
    for name in ("jacobians", "divergence", "prediction", "returns"):
        table = together[name]
        rows = table[(table["lambda"] == 0.0) & (table.seed == 11)].select_dtypes("float").to_numpy()
        assert one_seed[name].select_dtypes("float").to_numpy() == pytest.approx(rows, rel=1e-4), name


def test_agents_that_diverged_have_rows_of_nan(tmp_path):
    given = agents(SETTINGS)
    given[0].diverged_at[1] = 5  # its numbers may well be finite, but say nothing
    given[1].model["prior.output"][0, 0, 0] = torch.inf  # the last update did this, which no loss saw
    given[1].actor["actor.output"][0, 0, 0] = torch.nan
    tables = measured(tmp_path, SETTINGS, given)
    found = {
        "jacobians": list(NORMS),
        "divergence": ["divergence"],
        "prediction": ["image_error", "reward_error"],
        "returns": ["return"],
    }
    for name, columns in found.items():
        table = tables[name]
        lost = ((table["lambda"] == 0.0) & (table.seed == 11)) | ((table["lambda"] == 0.01) & (table.seed == 10))
        assert table.loc[lost, columns].isna().all(axis=None), name
        assert np.isfinite(table.loc[~lost, columns]).all(axis=None), name
    assert tables["returns"].random_return.notna().all()
    frames = tables["frames"]
    lost = (frames["lambda"] == 0.01) & (frames.kind != "true")
    assert frames[lost].intensity.isna().all()
    assert frames[~lost].intensity.notna().all()


def test_frames_take_an_episode_without_a_reset(tmp_path, monkeypatch):
    original = HeldOut.of

    def with_reset(settings, device):
        found = original(settings, device)
        found.first[0, 0, 6] = True
        return found

    monkeypatch.setattr(HeldOut, "of", with_reset)
    frames = measured(tmp_path, SETTINGS, agents(SETTINGS))["frames"]
    shown = frames[(frames.kind == "true") & (frames.step == 0) & (frames["lambda"] == 0.0)].intensity
    assert shown.tolist() == pytest.approx(original(SETTINGS, CPU).images[0, 1, 3].flatten().tolist())


def test_without_perturbed_images_there_are_no_such_frames(tmp_path):
    settings = SETTINGS.model_copy(update={"gauss": [], "masks": [], "rotations": []})
    assert image_condition(settings) is None
    assert image_condition(SETTINGS) == Condition("gauss", 0.15)
    assert image_condition(SETTINGS.model_copy(update={"gauss": []})) == Condition("mask", 0.5)
    assert set(measured(tmp_path, settings, agents(settings))["frames"].kind) == {"true", "clean"}


@pytest.mark.parametrize("change", [{"deter": 7}, {"seeds": [10]}, {"lambdas": [0.0, 0.02]}, {"length": 5}])
def test_agents_of_other_settings_are_refused(change, tmp_path):
    kept_agents.save(tmp_path / "w.safetensors", agents(SETTINGS))
    assert len(trained_agents(SETTINGS, tmp_path / "w.safetensors")) == 2
    with pytest.raises(UserError, match=r"w\.safetensors holds agents of other settings; run the training step again"):
        trained_agents(SETTINGS.model_copy(update=change), tmp_path / "w.safetensors")
