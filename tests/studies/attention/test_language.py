"""Tokenizer, initial parameters, windows and the file that keeps them."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from tests.studies.attention.tiny_models import TEXT, gpt2, ids, made, saved
from transformers import GPT2Config, GPT2LMHeadModel

from jacnorm.errors import UserError
from jacnorm.files import read_metadata
from jacnorm.studies.attention import language
from jacnorm.studies.attention.language import END, Kept, Shape
from jacnorm.studies.attention.settings import ProbingSettings
from jacnorm.training.seeds import RunId

SHAPE = Shape(layers=2, heads=2, width=16, context=12, vocabulary=260)
SETTINGS = ProbingSettings(seeds=[10, 11], layers=2, heads=2, width=16, context=12, vocabulary=260, lengths=[6, 12])


def runs(*seeds):
    return [RunId("attention", "text", seed) for seed in seeds]


@pytest.mark.parametrize("text", [TEXT, "ends in lines\n\n\r\nwith\x0cfeeds\u2028 and é, 数, 🎈", " spaces  first"])
def test_tokens_give_the_text_back(text):
    tokenizer = language.learn_tokenizer(TEXT, 270)
    found = language.tokens(tokenizer, text)
    assert found.dtype == torch.int64
    assert tokenizer.decode(found.tolist()) == text
    assert found.min() > 0  # not the special token, which is number 0
    assert found.max() < 270
    assert tokenizer.token_to_id(END) == 0


def test_a_tokenizer_merges_what_is_frequent_and_is_the_same_each_time():
    learnt = [language.learn_tokenizer(TEXT, 290) for _ in range(2)]
    assert learnt[0].to_str() == learnt[1].to_str()
    assert len(language.tokens(learnt[0], TEXT)) < 0.7 * len(TEXT)
    assert learnt[0].get_vocab_size() == 290


def test_a_text_without_enough_pairs_is_refused():
    with pytest.raises(UserError, match=r"gives only 2\d\d of 5000 tokens \(vocabulary\): lower vocabulary"):
        language.learn_tokenizer(TEXT, 5000)


def test_the_last_twentieth_is_held_out():
    first, last = language.split("x" * 950 + "y" * 50)
    assert (first, last) == ("x" * 950, "y" * 50)
    assert language.split("") == ("", "")


def test_initial_parameters_have_the_spread_that_transformers_gives_gpt2():
    """At GPT-2's own width; transformers' own initialisation is the oracle."""
    shape = Shape(layers=2, heads=12, width=768, context=64, vocabulary=300)
    model = language.gpt2(shape)
    language.initialise(model, torch.Generator().manual_seed(1))
    config = GPT2Config(
        n_layer=2, n_head=12, n_embd=768, n_positions=64, vocab_size=300, bos_token_id=0, eos_token_id=0
    )
    expected = dict(made(lambda: GPT2LMHeadModel(config)).named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(expected)
    for name, parameter in model.named_parameters():
        other = expected[name]
        assert parameter.shape == other.shape
        if parameter.ndim == 1:
            assert torch.equal(parameter, other)
        else:
            assert parameter.std().item() == pytest.approx(other.std().item(), rel=0.02)
            assert abs(parameter.mean().item()) < 5 * other.std().item() / math.sqrt(parameter.numel())


def test_initial_parameters_keep_the_spread_of_products_at_other_widths():
    model = language.gpt2(Shape(layers=2, heads=4, width=192, context=64, vocabulary=300))
    language.initialise(model, torch.Generator().manual_seed(1))
    assert model.transformer.h[0].attn.c_attn.weight.std().item() == pytest.approx(0.04, rel=0.02)
    assert model.transformer.h[1].mlp.c_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_initial_parameters_are_the_generators():
    models = [language.gpt2(SHAPE) for _ in range(3)]
    state = torch.random.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        language.initialise(model, torch.Generator().manual_seed(seed))
    assert torch.equal(torch.random.get_rng_state(), state)
    first, same, other = (model.transformer.h[0].attn.c_attn.weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_model_is_a_gpt2_with_tied_embeddings_and_no_dropout():
    model = language.gpt2(SHAPE)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not [module for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.p]
    assert model.config._attn_implementation == "eager"
    assert language.gpt2(SHAPE, fused=True).config._attn_implementation == "sdpa"
    assert model.config.n_positions == 12


def test_the_quick_gelu_is_that_of_gpt2():
    quick = language.gpt2(SHAPE).transformer.h[0].mlp.act
    original = made(gpt2).transformer.h[0].mlp.act
    assert type(original) is not type(quick)
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    torch.testing.assert_close(quick(x), original(x), rtol=0, atol=1e-12)


def test_windows_are_of_the_text_and_do_not_overlap():
    numbers = torch.arange(1000)
    found = language.windows(numbers, 16, 20, runs(10, 11, 12), "a text")
    assert found.shape == (3, 20, 16)
    assert (found.diff(dim=2) == 1).all()
    for windows in found:
        assert len(windows.unique()) == 20 * 16
    assert not torch.equal(found[0], found[1])


def test_windows_of_a_seed_do_not_depend_on_other_seeds():
    numbers = ids(1000)
    together = language.windows(numbers, 16, 3, runs(10, 11), "a text")
    assert torch.equal(together[1:], language.windows(numbers, 16, 3, runs(11), "a text"))


def test_a_text_with_too_few_windows_is_refused():
    with pytest.raises(UserError) as caught:
        language.windows(torch.arange(47), 16, 3, runs(10), "my text")
    assert str(caught.value) == (
        "my text has 47 tokens, but 3 windows of 16 need 48: take a longer text, or lower windows or lengths"
    )
    assert language.windows(torch.arange(48), 16, 3, runs(10), "my text").shape == (1, 3, 16)


def parameters(seed):
    """Two runs' parameters, drawn."""
    models = [language.gpt2(SHAPE) for _ in range(2)]
    for number, model in enumerate(models):
        language.initialise(model, torch.Generator().manual_seed(seed + number))
    return {
        name: torch.stack([dict(model.named_parameters())[name].detach() for model in models])
        for name, _ in models[0].named_parameters()
    }


@pytest.fixture(scope="module")
def kept():
    stages = {"trained": parameters(1), "untrained": parameters(5)}
    return Kept("text", "user's text", "ab" * 32, [10, 11], ids(2, 3, 12) % 260, "{}", shape=SHAPE, parameters=stages)


def assert_same(one, other):
    for name in ("data_set", "label", "digest", "seeds", "tokenizer", "model", "model_digest", "shape"):
        assert getattr(one, name) == getattr(other, name)
    assert torch.equal(one.windows, other.windows)
    assert one.windows.dtype == other.windows.dtype == torch.int64
    assert list(one.parameters) == list(other.parameters)
    for stage, tensors in one.parameters.items():
        assert list(tensors) == list(other.parameters[stage])
        assert all(torch.equal(values, other.parameters[stage][name]) for name, values in tensors.items())


def test_what_is_kept_is_read_back(kept, tmp_path):
    other = Kept("python_docs", "docs", "cd" * 32, [10, 11], ids(2, 1, 6), model="gpt2", model_digest="ef" * 32)
    language.save(tmp_path / "w.safetensors", [kept, other])
    found = language.load(tmp_path / "w.safetensors")
    assert len(found) == 2
    assert_same(found[0], kept)
    assert_same(found[1], other)


def test_the_same_is_kept_in_the_same_bytes(kept, tmp_path):
    for name in "ab":
        language.save(tmp_path / name, [kept])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert list(read_metadata(tmp_path / "a")) == ["texts"]


def test_another_file_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not hold the weights of this study's training step; delete it and run"):
        language.load(tmp_path / "other.safetensors")


def test_models_are_the_trained_one_and_the_control(kept):
    found = dict(language.models(kept, SETTINGS, 1))
    assert list(found) == ["trained", "untrained"]
    for stage, model in found.items():
        assert not model.training
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, kept.parameters[stage][name][1])
    without = SETTINGS.model_copy(update={"control": False})
    assert [name for name, _ in language.models(kept, without, 0)] == ["trained"]


def test_a_given_model_is_loaded_once_and_must_be_the_same(tmp_path):
    folder = saved(tmp_path / "mine", made(gpt2))
    settings = SETTINGS.model_copy(update={"model": str(folder)})
    digest = language.load_model(str(folder)).digest()
    kept = Kept("text", "user's text", "ab" * 32, [10, 11], ids(2, 1, 6), model="mine", model_digest=digest)
    ((label, model),) = language.models(kept, settings, 0)
    assert label == "mine"
    ((_, again),) = language.models(kept, settings, 1)
    assert again is model
    saved(folder, made(gpt2, n_head=2, initializer_range=0.1))
    changed = Kept("text", "user's text", "ab" * 32, [10, 11], ids(2, 1, 6), model="mine", model_digest="ef" * 32)
    with pytest.raises(UserError, match="the model mine has changed since the windows of text were drawn for it; dele"):
        list(language.models(changed, settings, 0))


@pytest.mark.parametrize("given", [True, False])
def test_weights_and_settings_agree_on_whether_a_model_is_given(given, kept):
    settings = SETTINGS if given else SETTINGS.model_copy(update={"model": "gpt2"})
    other = Kept("text", "user's text", "ab" * 32, [10, 11], ids(2, 1, 6), model="mine", model_digest="ef" * 32)
    words = "mine" if given else "models that were trained"
    with pytest.raises(UserError, match=f"the weights were kept for {words}, but the settings ask for another model; "):
        list(language.models(other if given else kept, settings, 0))
