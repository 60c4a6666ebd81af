"""Training against plain PyTorch and transformers' own loss, what is kept, and a killed job ends with the same bits."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
from tests.studies.attention.tiny_models import CONTEXT, gpt2, ids, made, saved
from tokenizers import Tokenizer

from jacnorm.data.prepare import prepare
from jacnorm.data.read import read_text
from jacnorm.errors import UserError
from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.attention import language, train_language
from jacnorm.studies.attention.settings import ProbingSettings
from jacnorm.studies.attention.tables import COLUMNS
from jacnorm.studies.attention.train_language import (
    Learner,
    corpus_of,
    mean_loss,
    next_token_loss,
    one_cycle,
    sequences,
)
from jacnorm.training.batches import batch_indices
from jacnorm.training.loop import RunId

torch.set_num_threads(1)

CPU = torch.device("cpu")
TINY = ProbingSettings(
    seeds=[10, 11],
    data_sets=["text"],
    layers=2,
    heads=2,
    width=16,
    context=12,
    vocabulary=270,
    steps=30,
    batch=4,
    windows=2,
    lengths=[6, 12],
)
RUN = RunId("attention", "text", 10)


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A prepared text of a thousand different sentences."""
    folder = tmp_path_factory.mktemp("data")
    words = ["the quick fox", "a lazy dog", "one red hen", "no old cat", "my hat"]
    verbs = ["jumps over", "looks at", "runs to", "eats"]
    lines = [f"{words[i % 5]} {verbs[i // 5 % 4]} {words[i * 7 % 3]}; {i}.\n" for i in range(500)]
    (folder / "own.txt").write_text("".join(lines), encoding="utf-8")
    prepare("text", folder / "text.safetensors", text_path=folder / "own.txt")
    return folder / "text.safetensors"


@pytest.fixture(scope="module")
def corpus(text):
    return corpus_of(TINY, read_text(text))


def train(folder, text, settings=TINY):
    """Call the step as a rule does; its table and what it keeps."""
    before = torch.get_deterministic_debug_mode()
    files = ["--tables", str(folder), "--data", str(text), "--weights", str(folder / "probing.safetensors")]
    try:
        run({"probing": train_language.probing}, ["--device", "cpu", *files, *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)
    block = f"s{min(settings.seeds)}-{max(settings.seeds)}"
    (kept,) = language.load(folder / "probing.safetensors")
    return read_table(folder / f"language_fits-{block}.parquet"), kept


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        return folder, *train(folder, text)


def test_the_table_and_the_kept_weights_say_what_was_trained(trained, text, corpus):
    folder, fits, kept = trained
    prepared = read_text(text)
    assert list(fits.columns) == list(COLUMNS["language_fits"])
    assert fits.seed.tolist() == kept.seeds == [10, 11]
    assert set(fits.data_set) == {"text"}
    assert set(fits.model) == {"trained"}
    assert set(fits.steps) == {30}
    assert set(fits.diverged_at) == {-1}
    assert set(fits.training_tokens) == {corpus.training_tokens}
    assert (kept.data_set, kept.label, kept.digest) == ("text", prepared.label, prepared.digest)
    assert (kept.model, kept.model_digest) == ("", "")
    assert str(folder) not in (folder / "probing.safetensors").read_bytes().decode("latin-1")
    assert not list(folder.glob("*checkpoint*"))


def test_windows_are_of_the_part_that_was_held_out(trained, text, corpus):
    _, _, kept = trained
    assert kept.windows.shape == (2, 2, 12)
    assert kept.tokenizer == corpus.tokenizer
    places = corpus.held_out[: len(corpus.held_out) // 12 * 12].view(-1, 12)
    assert all((places == window).all(1).any() for window in kept.windows.flatten(0, 1))
    tokenizer = Tokenizer.from_str(kept.tokenizer)
    first, last = language.split(read_text(text).text)
    assert tokenizer.decode(corpus.held_out.tolist()) == last
    seen = torch.cat([corpus.sequences[:, :-1].flatten(), corpus.sequences[-1, -1:]])
    assert first.startswith(tokenizer.decode(seen.tolist()))
    assert corpus.training_tokens - 12 < len(seen) <= corpus.training_tokens


def test_kept_models_have_the_losses_of_the_table(trained, corpus):
    _, fits, kept = trained
    held_out = sequences(corpus.held_out, TINY.context)
    for number, loss in enumerate(fits.validation_loss):
        found = {name: mean_loss(model, held_out) for name, model in language.models(kept, TINY, number)}
        assert found["trained"] == pytest.approx(loss, rel=1e-5)
        assert found["untrained"] == pytest.approx(math.log(270), abs=0.2)
        assert loss < found["untrained"] - 0.5
    assert (fits.train_loss - fits.validation_loss).abs().max() < 0.5


def test_the_train_loss_is_the_mean_of_the_last_tenth(corpus, trained):
    _, fits, _ = trained
    learner = Learner(TINY, RunId("attention", f"text {language.Shape.of(TINY)}", 10), corpus.sequences, CPU)
    losses = [learner.step(index)["loss"].item() for index in range(30)]
    assert fits.train_loss[0] == pytest.approx(sum(losses[-3:]) / 3, rel=1e-6)


def test_a_seed_alone_has_the_same_bits(trained, tmp_path, text):
    _, fits, kept = trained
    alone_fits, alone = train(tmp_path, text, TINY.model_copy(update={"seeds": [11]}))
    assert alone_fits.iloc[0].to_dict() == fits.iloc[1].to_dict()
    assert torch.equal(alone.windows[0], kept.windows[1])
    for stage, tensors in kept.parameters.items():
        for name, values in tensors.items():
            assert torch.equal(alone.parameters[stage][name][0], values[1])


def test_training_is_an_ordinary_pytorch_loop(corpus):
    """Plain AdamW, PyTorch's own OneCycleLR, transformers' own loss, eager attention and a second model."""
    learner = Learner(TINY, RUN, corpus.sequences, CPU)
    model = language.gpt2(language.Shape.of(TINY))
    language.initialise(model, RUN.generator("weights"))
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=TINY.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, foreach=False
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, TINY.learning_rate, total_steps=30, pct_start=0.1, cycle_momentum=False
    )
    for index in range(30):
        loss = learner.step(index)["loss"].item()
        rows = batch_indices(index, [RUN], len(corpus.sequences), 4, drop_last=True)[0]
        batch = corpus.sequences[rows]
        logits = model(input_ids=batch[:, :-1]).logits.log_softmax(-1)
        expected = -logits.gather(2, batch[:, 1:, None]).mean()
        optimiser.zero_grad()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        assert loss == pytest.approx(expected.item(), rel=1e-3)
    own = dict(model.named_parameters())
    for name, values in learner.parameters().items():
        torch.testing.assert_close(values, own[name].detach(), rtol=1e-2, atol=2e-3)


def test_the_loss_is_that_of_transformers():
    model, tokens = made(gpt2).eval(), ids(3, 20)
    with torch.no_grad():
        expected = model(input_ids=tokens, labels=tokens).loss
        torch.testing.assert_close(next_token_loss(model, tokens), expected)
    assert mean_loss(model, tokens, batch=2) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("steps", [5, 9, 10, 15, 30, 150, 301])
def test_the_step_size_is_one_cycle_of_pytorch(steps):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    try:
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, 1.0, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
    except ZeroDivisionError:  # PyTorch's own, if the first step is already the largest
        assert one_cycle(0, steps) == 1.0
        return
    for index in range(steps):
        assert one_cycle(index, steps) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9, abs=1e-12)
        optimiser.step()
        if index < steps - 1:
            schedule.step()


def test_sequences_predict_each_token_once():
    found = sequences(torch.arange(23), 5)
    assert found.tolist() == [[*range(i, i + 6)] for i in (0, 5, 10, 15)]


def test_a_job_that_is_killed_again_and_again_ends_with_the_same_bits(trained, tmp_path, text, monkeypatch):
    reference, _, _ = trained
    original = Learner.step
    kills = [(10, 7), (10, 29), (11, 3)]

    def killed(self, index):
        if kills and (self.run.seed, index) == kills[0]:
            kills.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index)

    monkeypatch.setattr(Learner, "step", killed)
    while kills:
        with pytest.raises(SystemExit, match="143"):
            train(tmp_path, text)
        assert list(tmp_path.glob("*.checkpoint.safetensors"))
    train(tmp_path, text)
    for name in ("probing.safetensors", "language_fits-s10-11.parquet"):
        assert (tmp_path / name).read_bytes() == (reference / name).read_bytes()
    assert not list(tmp_path.glob("*checkpoint*"))


def test_a_run_that_diverges_is_recorded_and_stops_changing(tmp_path, text):
    settings = TINY.model_copy(update={"learning_rate": 1e38, "steps": 60, "seeds": [10]})
    fits, kept = train(tmp_path, text, settings)
    (row,) = fits.itertuples()
    assert 0 < row.diverged_at < 25
    assert math.isnan(row.train_loss)
    assert math.isnan(row.validation_loss)
    assert all(values.isfinite().all() for values in kept.parameters["untrained"].values())


def test_a_frozen_learner_stays_as_it_is(corpus):
    learner = Learner(TINY, RUN, corpus.sequences, CPU)
    learner.step(0)
    before = learner.parameters()
    learner.freeze(torch.tensor([True]))
    assert math.isnan(learner.step(1)["loss"].item())
    assert all(torch.equal(values, before[name]) for name, values in learner.parameters().items())
    learner.freeze(torch.tensor([False]))
    assert math.isfinite(learner.step(1)["loss"].item())


def test_gradients_are_clipped(corpus):
    learner = Learner(TINY.model_copy(update={"clip": 1e-3}), RUN, corpus.sequences, CPU)
    learner.step(0)
    squares = sum(parameter.grad.square().sum() for parameter in learner.model.parameters())
    assert squares.sqrt().item() == pytest.approx(1e-3, rel=1e-3)


def test_a_text_shorter_than_the_context_is_refused(text):
    settings = TINY.model_copy(update={"context": 4000, "lengths": [10]})
    with pytest.raises(UserError) as caught:
        corpus_of(settings, read_text(text))
    message = str(caught.value)
    assert message.startswith("user's text is too short: it gives ")
    assert message.endswith(
        "but batch times context needs 16001, and context 4001 held out; take a longer text, or lower context"
    )


def test_a_text_with_too_few_windows_is_refused(text, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path, text, TINY.model_copy(update={"windows": 500}))
    assert "the last 5 % of user's text has " in capsys.readouterr().err


@pytest.fixture(scope="module")
def given_folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "mine", made(gpt2))


def test_of_a_given_model_windows_are_kept_and_nothing_is_trained(given_folder, text, tmp_path):
    settings = TINY.model_copy(update={"model": str(given_folder), "lengths": [CONTEXT]})
    fits, kept = train(tmp_path, text, settings)
    assert set(fits.model) == {"mine"}
    assert set(fits.steps) == set(fits.training_tokens) == {0}
    assert fits.train_loss.isna().all()
    assert kept.windows.shape == (2, 2, CONTEXT)
    assert kept.parameters == {}
    assert kept.shape is None
    assert kept.tokenizer == ""
    assert kept.model == "mine"
    given = train_language.load_model(str(given_folder))
    assert kept.model_digest == given.digest()
    all_ids = given.token_ids(read_text(text).text)
    places = all_ids[: len(all_ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    for number, windows in enumerate(kept.windows):
        assert all((places == window).all(1).any() for window in windows)
        with torch.no_grad():
            expected = given.model(input_ids=windows, labels=windows).loss.item()
        assert fits.validation_loss[number] == pytest.approx(expected, rel=1e-5)
        ((label, model),) = language.models(kept, settings, number)
        assert label == "mine"
        assert model(input_ids=windows[:1]).logits.shape == (1, CONTEXT, 270)
    for file in tmp_path.iterdir():
        assert str(given_folder).encode() not in file.read_bytes()


def test_lengths_beyond_the_context_of_a_given_model_are_refused(given_folder, text, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path, text, TINY.model_copy(update={"model": str(given_folder), "lengths": [CONTEXT + 1]}))
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("ERROR: lengths asks for 49 tokens, but model mine reads at most 48; lower lengths")
    )
