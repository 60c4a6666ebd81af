"""Training on the pendulum: stacks against agents alone, paired draws, killed jobs, explosions, own episodes."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch

from jacnorm.errors import UserError
from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.worldmodel import arms as kept
from jacnorm.studies.worldmodel import episodes as episode_files
from jacnorm.studies.worldmodel import rssm, train_pendulum
from jacnorm.studies.worldmodel.arms import arms
from jacnorm.studies.worldmodel.episodes import training_episodes
from jacnorm.studies.worldmodel.settings import PendulumSettings
from jacnorm.studies.worldmodel.tables import COLUMNS

torch.set_num_threads(1)

CPU = torch.device("cpu")
TINY = PendulumSettings(
    seeds=[10, 11], lambdas=[0.0, 0.05], f_only_lambdas=[0.05], zero_drift=[0.2], drift=[0.4], lengths=[8], batches=[6],
    episodes=6, test_episodes=2, episode_steps=12, deter=6, groups=2, classes=3, hidden=4, batch=3, length=5,
    updates=10, actor_updates=6, imagination=3, context=2, horizons=[1, 2],
)  # fmt: skip
SMALL = TINY.model_copy(update={"zero_drift": [], "drift": [], "lengths": [], "batches": []})


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


def train(folder, settings=SMALL):
    """Call the step as a rule does; its tables and its agents."""
    before = torch.get_deterministic_debug_mode()
    weights = folder / "pendulum.safetensors"
    try:
        files = ["--tables", str(folder), "--weights", str(weights), "--device", "cpu"]
        run({"pendulum": train_pendulum.pendulum}, [*files, *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)
    block = f"s{min(settings.seeds)}-{max(settings.seeds)}"
    fits, curves = (read_table(folder / f"pendulum_{name}-{block}.parquet") for name in ("fits", "curves"))
    return fits, curves, kept.load(weights)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        return folder, *train(folder)


def episodes(settings):
    return {seed: training_episodes(settings, seed) for seed in settings.seeds}


def models(settings, runs=None):
    runs = runs or next(train_pendulum.stacks(settings))
    return train_pendulum.ModelStack(settings, runs, episodes(settings), CPU)


def test_stacks_hold_every_agent_once_by_shape_with_equal_penalties_side_by_side():
    stacks = list(train_pendulum.stacks(TINY))
    everyone = [each for stack in stacks for each in stack]
    assert len(everyone) == len(set(everyone)) == 2 * len(arms(TINY))
    for stack in stacks:
        assert len(stack) <= train_pendulum.STACK_RUNS
        assert len({(each.arm.batch, each.arm.length) for each in stack}) == 1
        kinds = [(each.arm.weight > 0, each.arm.weight > 0 and each.arm.include_prior) for each in stack]
        assert sorted(kinds, reverse=True) == kinds


@pytest.fixture
def double():
    """Double precision: in single, Adam turns a gradient that is rounding alone into a step of its own size."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
def test_an_agent_trains_alone_as_in_its_stack():
    whole = models(TINY)
    for index in range(5):
        expected = whole.step(index)
    assert expected["loss"].dtype == torch.float64
    for i in (0, len(whole.runs) - 1):
        alone = models(TINY, [whole.runs[i]])
        for index in range(5):
            found = alone.step(index)
        for name, value in found.items():
            assert value.item() == pytest.approx(expected[name][i].item(), rel=1e-8, nan_ok=True), name
        for name, parameter in alone.parameters.items():
            assert torch.allclose(parameter[0], whole.parameters[name][i], rtol=0, atol=1e-7), name


def test_the_loss_is_put_together_from_its_parts():
    stack = models(TINY)
    found = stack.step(0)
    weights = torch.tensor([each.arm.weight for each in stack.runs])
    penalty = torch.where(weights > 0, weights * found["penalty"], 0.0)
    assert torch.allclose(found["loss"], found["model_loss"] + penalty)
    assert torch.allclose(found["penalty_share"], penalty / found["model_loss"])
    assert torch.equal(found["penalty"].isnan(), weights == 0)


def test_the_penalty_of_an_update_is_that_of_the_rollouts_transitions(monkeypatch):
    """By hand: states t = 0 .. T - 2, actions t + 1, nothing across a reset."""
    stack = models(SMALL)
    seen = {}
    original = train_pendulum.penalty

    def watched(f, prior, h, z, a, mask, projections, **options):
        value = original(f, prior, h, z, a, mask, projections, **options)
        seen[options["include_prior"]] = (h, z, a, mask)
        return value

    monkeypatch.setattr(train_pendulum, "penalty", watched)
    batch = stack._source.batch(0)
    batch.first[:, :, 2] = True
    monkeypatch.setattr(stack._source, "batch", lambda index: batch)
    states = rssm.observe(stack.parameters, batch.images, batch.actions, batch.first, batch.noise, 3)
    stack.step(0)
    h, z, a, mask = seen[True]
    assert torch.equal(h, states.h[:2, :, :-1].flatten(1, 2))
    assert torch.equal(z, states.z[:2, :, :-1].flatten(1, 2))
    assert torch.equal(a.squeeze(-1), batch.actions[:2, :, 1:].flatten(1, 2))
    assert torch.equal(mask, torch.tensor([True, False, True, True]).repeat(2, 3))
    assert set(seen) == {True, False}


def test_rewards_count_where_something_led_to_them():
    stack = models(SMALL)
    batch = stack._source.batch(0)
    states = rssm.observe(stack.parameters, batch.images, batch.actions, batch.first, batch.noise, 3)
    before = stack._model_losses(stack.parameters, batch, states)["reward_loss"]
    batch.rewards[batch.first] += 100
    assert torch.equal(stack._model_losses(stack.parameters, batch, states)["reward_loss"], before)
    batch.rewards[:, 0, 1] += 1
    assert (stack._model_losses(stack.parameters, batch, states)["reward_loss"] > before).all()


def test_small_divergences_cost_nothing_but_are_reported():
    stack = models(SMALL.model_copy(update={"free_nats": 1e3}))
    batch = stack._source.batch(0)
    states = rssm.observe(stack.parameters, batch.images, batch.actions, batch.first, batch.noise, 3)
    found = stack._model_losses(stack.parameters, batch, states)
    rest = found["image_loss"] + SMALL.reward_weight * found["reward_loss"]
    assert torch.allclose(found["model_loss"] - rest, torch.tensor(0.6e3))
    assert (found["kl"] > 0).all()
    assert (found["kl"] < 1e3).all()


def test_agents_of_a_seed_share_start_sequences_and_noise_and_seeds_do_not():
    stack = models(TINY)
    batch = stack._source.batch(4)
    of = {seed: [i for i, each in enumerate(stack.runs) if each.seed == seed] for seed in TINY.seeds}
    tensors = [batch.images, batch.actions, batch.noise, *stack.parameters.values()]
    for tensor in tensors:
        for rows in of.values():
            assert (tensor[rows] == tensor[rows[0]]).all()
    assert not torch.equal(batch.noise[of[10][0]], batch.noise[of[11][0]])
    assert not torch.equal(stack.parameters["prior.output"][of[10][0]], stack.parameters["prior.output"][of[11][0]])
    assert not torch.equal(stack._source.batch(5).noise, batch.noise)


def test_errors_have_the_moments_of_their_arm():
    settings = TINY.model_copy(update={"batch": 400, "length": 10, "groups": 8, "classes": 8})
    for runs in train_pendulum.stacks(settings):
        if runs[0].arm.error == "none":
            continue
        found = train_pendulum.Source(
            rssm.Sizes.of(settings), runs, episodes(settings), (400, 10), "test", CPU
        ).batch(0).error  # fmt: skip
        for i, each in enumerate(runs):
            means, variances = found[i].mean(-1), found[i].var(-1)  # of one sequence and step
            if each.arm.error == "none":
                assert not found[i].any()
            elif each.arm.error == "zero-drift":
                assert variances.mean().item() == pytest.approx(0.2, rel=0.02)
                assert found[i].mean().item() == pytest.approx(0.0, abs=0.01)
            else:
                assert means.mean().item() == pytest.approx(0.2, abs=0.01)
                assert variances.mean().item() == pytest.approx(0.2, rel=0.05)
                # U(0, u) has the variance u^2 / 12; the mean of 64 normal numbers adds a 64th of theirs.
                assert means.var().item() == pytest.approx(0.4**2 / 12 + 0.2 / 64, rel=0.06)
                assert means[0].std() > 0.05


def test_an_error_changes_its_own_arm_alone():
    stack = models(TINY.model_copy(update={"seeds": [10]}))
    found = stack.step(0)["model_loss"]
    plain = [i for i, each in enumerate(stack.runs) if each.arm.error == "none"]
    erring = [i for i, each in enumerate(stack.runs) if each.arm.error != "none"]
    assert torch.allclose(found[plain], found[plain[0]].expand(len(plain)))
    assert not torch.isclose(found[erring], found[plain[0]]).any()


def test_batches_of_another_size_see_as_many_sequences_in_all():
    assert [train_pendulum.updates(TINY, batch) for batch in (3, 6, 1, 1000)] == [10, 5, 30, 1]
    stacks = {(runs[0].arm.batch, runs[0].arm.length): runs for runs in train_pendulum.stacks(TINY)}
    assert models(TINY, stacks[6, 5]).updates == 5
    assert models(TINY, stacks[3, 8]).updates == 10
    assert models(TINY, stacks[3, 8])._source.batch(0).images.shape[1:3] == (3, 8)


def test_actors_learn_from_the_same_numbers_of_sequences_whatever_the_model_did():
    stacks = {(runs[0].arm.batch, runs[0].arm.length): runs for runs in train_pendulum.stacks(TINY)}
    given = []
    for shape in ((3, 5), (6, 5), (3, 8)):
        stack = train_pendulum.ActorStack(TINY, stacks[shape], {}, episodes(TINY), CPU)
        i = [each.seed for each in stack.runs].index(10)
        starts, draws = stack._draws(2)
        given.append((stack._source.batch(2).images[i], starts[i], draws.action[i], draws.latent[i]))
    for one in zip(*given, strict=True):
        assert torch.equal(one[0], one[1])
        assert torch.equal(one[0], one[2])


def test_actor_updates_leave_the_models_alone():
    world = models(SMALL)
    before = {name: each.clone() for name, each in world.parameters.items()}
    agents = train_pendulum.ActorStack(SMALL, world.runs, world.parameters, episodes(SMALL), CPU)
    start = {name: each.clone() for name, each in agents.parameters.items()}
    for index in range(2):
        metrics = agents.step(index)
    assert set(metrics) == {"loss", "return"}
    assert all(torch.equal(world.parameters[name], each) for name, each in before.items())
    assert any(not torch.equal(agents.parameters[name], each) for name, each in start.items())


def test_tables_and_agents_say_what_was_trained(trained):
    _, fits, curves, agents = trained
    assert list(fits.columns) == list(COLUMNS["pendulum_fits"])
    assert list(curves.columns) == list(COLUMNS["pendulum_curves"])
    assert [each.arm for each in agents] == arms(SMALL)
    assert len(fits) == 2 * len(arms(SMALL))
    assert (fits.diverged_at == -1).all()
    assert (fits.updates == 10).all()
    expected = {name: (2, *shape) for name, shape in rssm.shapes(rssm.Sizes.of(SMALL)).items()}
    for each in agents:
        assert {name: tuple(tensor.shape) for name, tensor in each.model.items()} == expected
        assert each.diverged_at.tolist() == [-1, -1]
    assert (fits.parameters == sum(math.prod(shape[1:]) for shape in expected.values())).all()
    assert (fits.penalty.isna() == (fits["lambda"] == 0)).all()
    assert ((fits.penalty_share > 0) == (fits["lambda"] > 0)).all()
    assert (curves.groupby(["seed", "lambda", "include_prior"])["update"].max() == 10).all()
    assert (curves.frames == 6 * 12).all()
    assert curves["return"].isna().all()


def test_numbers_of_the_tables_are_means_over_the_updates_they_name(trained):
    _, fits, curves, agents = trained
    settings = SMALL.model_copy(update={"updates": 40})
    stack = models(settings)
    history = [stack.step(index) for index in range(40)]
    loss = torch.stack([each["model_loss"] for each in history]).double()
    report = train_pendulum.FitReport(40, 0, (), (None,) * 6, {"model_loss": loss})
    rows = list(stack.fits(report, [-1] * 6))
    assert [row["model_loss"] for row in rows] == pytest.approx(loss[-4:].mean(0).tolist())
    drawn = list(stack.curves(report))
    assert [row["update"] for row in drawn[:20]] == list(range(2, 41, 2))
    assert drawn[1]["model_loss"] == pytest.approx(loss[2:4, 0].mean().item())
    tenth = models(SMALL)
    for index in range(10):
        last = tenth.step(index)
    assert fits.model_loss.tolist() == pytest.approx(last["model_loss"].tolist(), rel=1e-4)
    row = next(each for each in agents if each.arm == tenth.runs[0].arm)
    assert torch.equal(row.model["prior.output"][0], tenth.parameters["prior.output"][0])
    assert len(curves) == 6 * 10


def test_a_killed_job_ends_with_the_same_bits(trained, tmp_path, monkeypatch):
    reference, kills = trained[0], [("ModelStack", 4), ("ActorStack", 3)]
    originals = {name: getattr(train_pendulum, name).step for name, _ in kills}

    def killed(name):
        def step(self, index):
            if kills and kills[0] == (name, index):
                kills.pop(0)
                os.kill(os.getpid(), signal.SIGTERM)
            return originals[name](self, index)

        return step

    for name in originals:
        monkeypatch.setattr(getattr(train_pendulum, name), "step", killed(name))
    while kills:
        with pytest.raises(SystemExit, match="143"):
            train(tmp_path)
        assert list(tmp_path.glob("*.checkpoint.safetensors"))
    train(tmp_path)
    for name in ("pendulum.safetensors", "pendulum_fits-s10-11.parquet", "pendulum_curves-s10-11.parquet"):
        assert (tmp_path / name).read_bytes() == (reference / name).read_bytes()
    assert not list(tmp_path.glob("*checkpoint*"))


def test_a_loss_that_explodes_is_recorded_and_leaves_the_others_alone(trained, tmp_path):
    fits, _, agents = train(tmp_path, SMALL.model_copy(update={"lambdas": [0.0, 3e38]}))
    lost = fits[fits["lambda"] > 1]
    assert len(lost) == 2
    assert (lost.diverged_at == 0).all()
    assert lost[["model_loss", "image_loss", "reward_loss", "kl", "penalty", "penalty_share"]].isna().all(axis=None)
    others, expected = fits[fits["lambda"] < 1], trained[1]
    expected = expected[(expected["lambda"] == 0) | ~expected.include_prior]
    columns = ["seed", "lambda", "model_loss", "kl", "diverged_at"]
    assert others[columns].to_numpy().tolist() == expected[columns].to_numpy().tolist()
    assert [each.diverged_at.tolist() for each in agents] == [[-1, -1], [0, 0], [-1, -1]]
    for each in agents:
        if each.arm.weight < 1:
            assert all(tensor.isfinite().all() for tensor in (*each.model.values(), *each.actor.values()))


def test_updates_are_counted_on_into_the_actors():
    def report(*diverged):
        return train_pendulum.FitReport(10, 0, (), diverged, {})

    assert train_pendulum.lost_at(report(None, 3, None, 4), report(None, 0, 2, None)) == [-1, 3, 12, 4]


def test_own_episodes_with_a_marked_reset_inside_are_learnt_from(tmp_path):
    found = episode_files.generate(TINY, 3, 8, "own")
    found.first[:, 6], found.action[:, 6], found.reward[:, 6] = True, 0.0, 0.0
    episode_files.save(tmp_path / "own.safetensors", found)
    settings = SMALL.model_copy(update={"episodes_path": str(tmp_path / "own.safetensors")})
    fits, _, _ = train(tmp_path, settings)
    assert (fits.diverged_at == -1).all()
    assert fits.model_loss.notna().all()


def test_other_own_episodes_at_the_same_path_are_other_work(tmp_path):
    settings = SMALL.model_copy(update={"episodes_path": str(tmp_path / "own.safetensors")})
    digests = set()
    for seed in (3, 4):
        episode_files.save(tmp_path / "own.safetensors", episode_files.generate(TINY, seed, 8, "own"))
        digests.add(train_pendulum._digest(settings, episodes(settings)))
    assert len(digests) == 2
    assert train_pendulum._digest(SMALL, {}) == ""


def test_a_cut_file_of_episodes_is_one_sentence(tmp_path):
    path = tmp_path / "own.safetensors"
    episode_files.save(path, episode_files.generate(TINY, 3, 8, "own"))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises((UserError, SystemExit)):
        train(tmp_path, SMALL.model_copy(update={"episodes_path": str(path)}))


def test_the_world_model_learns_to_draw_the_pendulum():
    settings = PendulumSettings(
        seeds=[0], lambdas=[0.0], f_only_lambdas=[], episodes=20, batch=8, length=10, updates=120, learning_rate=3e-3
    )
    stack = models(settings)
    losses = [stack.step(index)["image_loss"].item() for index in range(120)]
    images = training_episodes(settings, 0).image.float() / 255
    constant = (images - images.mean((0, 1))).square().sum((-2, -1)).mean().item()
    assert sum(losses[-10:]) / 10 < 0.6 * constant
