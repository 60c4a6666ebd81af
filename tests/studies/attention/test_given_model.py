"""Models from folders and from the hub: what is loaded, and one sentence for everything that cannot be."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.studies.attention.tiny_models import FAMILIES, TEXT, VOCABULARY, gpt2, made, saved, tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from jacnorm.errors import UserError
from jacnorm.studies.attention import given_model
from jacnorm.studies.attention.given_model import FILES, load_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a small GPT-2."""
    return saved(tmp_path_factory.mktemp("models") / "small", made(gpt2))


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(whole, tmp_path / "copy")


def refused(name):
    with pytest.raises(UserError) as caught:
        load_model(str(name))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_model_that_was_saved(family, tmp_path):
    model = made(FAMILIES[family])
    given = load_model(str(saved(tmp_path / "mine", model)))
    assert given.label == "mine"
    assert not given.model.training
    assert given.model.config._attn_implementation == "eager"
    expected = model.state_dict()
    for name, values in given.model.state_dict().items():
        assert values.dtype == torch.float32
        assert torch.equal(values, expected[name])


def test_tokens_are_those_of_the_tokenizer_without_special_ones(whole):
    given = load_model(str(whole))
    token_ids = given.token_ids(TEXT)
    assert token_ids.dtype == torch.int64
    assert token_ids.tolist() == tokenizer()._tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert given.tokenizer.decode(token_ids) == TEXT


def test_half_precision_weights_are_read_as_float32(tmp_path):
    model = made(gpt2).to(torch.bfloat16)
    given = load_model(str(saved(tmp_path / "half", model)))
    assert all(parameter.dtype == torch.float32 for parameter in given.model.parameters())


def test_the_digest_is_of_the_parameters_and_nothing_else(whole, folder):
    first = load_model(str(whole)).digest()
    assert load_model(str(folder)).digest() == first
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.2.mlp.c_fc.bias"][0] += 1e-6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert load_model(str(folder)).digest() != first
    assert len(first) == 64


def test_a_relative_folder_is_named_after_itself(whole, monkeypatch):
    monkeypatch.chdir(whole)
    assert load_model(".").label == "small"


@pytest.mark.parametrize("name", ["./none", "/no/such/folder", "~/no/such/folder", "no/such/folder"])
def test_a_folder_that_does_not_exist(name):
    assert refused(name) == (f'model "{name}": there is no such folder; correct its name, or give an id on the hub')


def test_a_folder_without_configuration(folder):
    (folder / "config.json").unlink()
    assert refused(folder) == 'model "copy" has no config.json; give a folder written by save_pretrained'


@pytest.mark.parametrize(
    "text", ["{", '{"model_type": "zork"}', '{"model_type": "zork", "auto_map": {"AutoConfig": "code.Configuration"}}']
)
def test_a_configuration_that_is_damaged_unknown_or_wants_code_of_its_own(folder, text):
    (folder / "config.json").write_text(text)
    (folder / "code.py").write_text("raise SystemExit('code was run')")
    message = refused(folder)
    assert message.startswith('the configuration of model "copy" cannot be used (')
    assert message.endswith("; give a model that transformers knows without code of its own")


def test_code_that_comes_with_a_known_model_is_not_run(folder):
    configuration = json.loads((folder / "config.json").read_text())
    configuration["auto_map"] = {"AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(configuration))
    (folder / "code.py").write_text("raise SystemExit('code was run')")
    assert type(load_model(str(folder)).model).__name__ == "GPT2LMHeadModel"


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert refused(folder) == ('model "copy" has no weights (*.safetensors); give a folder written by save_pretrained')


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refused(folder).startswith('model "copy" has its weights as pickles only (pytorch_model.bin), which can run')


def test_damaged_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert refused(folder).startswith('the weights of model "copy" cannot be read (')


@pytest.mark.parametrize(
    "change", [lambda weights, name: weights.pop(name), lambda w, name: w.update({name: w[name][:3]})]
)
def test_parameters_that_are_missing_or_of_another_size_do_not_stay_random(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights, "transformer.h.1.attn.c_attn.bias")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert refused(folder) == (
        'the weights of model "copy" do not hold 1 of its parameters in their size '
        "(transformer.h.1.attn.c_attn.bias), which would stay random; replace its files by whole ones"
    )


def test_a_tokenizer_of_another_model(tmp_path):
    large = saved(tmp_path / "large", made(gpt2), tokenizer(VOCABULARY + 5))
    assert refused(large) == (
        'the tokenizer of model "large" has 275 tokens, but the model has embeddings for 270; '
        "put the tokenizer that belongs to the model into its folder"
    )
    small = saved(tmp_path / "wide", made(gpt2, vocab_size=301))
    assert refused(small).startswith(
        'the tokenizer of model "wide" has 270 tokens, but the model has embeddings for 301'
    )
    assert load_model(str(saved(tmp_path / "padded", made(gpt2, vocab_size=300))))


def test_a_folder_without_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert refused(folder).startswith('the tokenizer of model "copy" has ')


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert refused(folder).startswith('the tokenizer of model "copy" cannot be read (')


KINDS = {
    "is an encoder only": lambda: BertForMaskedLM(
        BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=VOCABULARY
        )
    ),
    "is an encoder with a decoder": lambda: T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCABULARY)
    ),
    "is not a causal language model": lambda: ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ),
}


@pytest.mark.parametrize("words", KINDS)
def test_other_kinds_of_models(words, tmp_path):
    folder = saved(tmp_path / "other", made(KINDS[words]))
    message = refused(folder)
    assert words in message
    assert message.endswith("; give a decoder-only causal language model, such as GPT-2")


def test_fused_attention(tmp_path):
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    assert refused(saved(tmp_path / "bloom", made(lambda: BloomForCausalLM(config)))).startswith(
        "BloomForCausalLM comp"
    )


class Hub:
    """Stands for the hub: reachable or not, with one model or none, and a cache or none."""

    def __init__(self, monkeypatch, *, reachable, folder=None):
        self.asked = []
        self.folder, self.reachable = folder, reachable
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=self.model_info))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, name, *, timeout):
        assert timeout == given_model.TIMEOUT
        if not self.reachable:
            raise ConnectionError("no route to the hub.\nmore")

    def snapshot_download(self, name, *, allow_patterns, ignore_patterns, local_files_only):
        self.asked.append((name, allow_patterns, ignore_patterns, local_files_only))
        if self.folder is None:
            raise FileNotFoundError("nothing here")
        return str(self.folder)


@pytest.mark.parametrize("reachable", [True, False])
def test_an_id_is_fetched_from_the_hub_or_its_cache(whole, monkeypatch, reachable):
    hub = Hub(monkeypatch, reachable=reachable, folder=whole)
    given = load_model("somebody/small")
    assert given.label == "somebody/small"
    assert hub.asked == [("somebody/small", list(FILES), ["*/*"], not reachable)]


@pytest.mark.parametrize(
    ("reachable", "why"),
    [(False, "ConnectionError: no route to the hub"), (True, "FileNotFoundError: nothing here")],
)
def test_an_id_that_cannot_be_fetched(monkeypatch, reachable, why):
    Hub(monkeypatch, reachable=reachable)
    assert refused("somebody/small") == (
        f'model "somebody/small" cannot be fetched from the Hugging Face hub ({why}), nor is it in its cache; '
        "connect this machine to the network, correct the id, or give a local folder"
    )


def test_an_id_that_is_none():
    assert refused("so mebody/small").startswith(
        'model "so mebody/small" cannot be fetched from the Hugging Face hub (HF'
    )
