"""Captured attention against transformers' own outputs, hooks and caches, over several families of models.

Independent oracles: attentions and hidden states that the model itself returns in eager mode, keys and values from its
cache, and GPT-2's projections from a hook; none of them passes through our attention function.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.studies.attention.tiny_models import (
    CONTEXT,
    FAMILIES,
    VOCABULARY,
    gpt2,
    gpt_neox,
    ids,
    llama,
    made,
    sizes,
)
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from jacnorm.errors import UserError
from jacnorm.studies.attention import capture as module
from jacnorm.studies.attention.capture import FUNCTION, capture, context, embeddings

TOKENS = ids(2, 32)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return made(FAMILIES[request.param]).eval()


def layers_of(model, tokens=TOKENS):
    found = []
    capture(model, tokens, found.append)
    return found


def own(model, tokens=TOKENS, **options):
    """What the model itself says in eager mode."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(input_ids=tokens, **options)
    model.set_attn_implementation(before)
    return output


def test_weights_and_inputs_are_those_that_the_model_returns(model):
    layers = layers_of(model)
    expected = own(model, output_attentions=True, output_hidden_states=True)
    assert [layer.index for layer in layers] == [0, 1, 2]
    for layer, weights, inputs in zip(layers, expected.attentions, expected.hidden_states, strict=False):
        torch.testing.assert_close(layer.weights, weights, rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.inputs, inputs, rtol=0, atol=1e-5)


def test_weights_are_the_softmax_of_scaled_products_over_visible_keys(model):
    for layer in layers_of(model):
        assert not layer.weights.triu(1).any()
        logits = layer.scaling * layer.queries.double() @ layer.keys.double().mT
        future = torch.ones(32, 32, dtype=torch.bool).triu(1)
        expected = logits.masked_fill(future, -torch.inf).softmax(-1)
        torch.testing.assert_close(layer.weights.double(), expected, rtol=0, atol=1e-5)


def test_weights_are_far_from_uniform(model):
    """Else the comparisons above would not tell much."""
    assert all(layer.weights[:, :, -1].amax(-1).mean() > 5 / 32 for layer in layers_of(model))


def test_keys_and_values_are_those_of_the_cache(model):
    cache = own(model, use_cache=True).past_key_values
    for layer, cached in zip(layers_of(model), cache.layers, strict=True):
        for found, stored in ((layer.keys, cached.keys), (layer.values, cached.values)):
            repeats = found.shape[1] // stored.shape[1]
            for head in range(found.shape[1]):
                torch.testing.assert_close(found[:, head], stored[:, head // repeats], rtol=0, atol=1e-5)


def test_queries_are_the_projections_of_gpt2():
    model = made(gpt2).eval()
    seen = []
    hooks = [block.attn.c_attn.register_forward_hook(lambda *a: seen.append(a[2])) for block in model.transformer.h]
    own(model)
    for hook in hooks:
        hook.remove()
    for layer, projected in zip(layers_of(model), seen, strict=True):
        queries = projected[..., :32].unflatten(-1, (4, 8)).transpose(1, 2)  # (B, H, L, d_h)
        torch.testing.assert_close(layer.queries, queries, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "scalings"),
    [
        ({}, [8**-0.5] * 3),
        ({"scale_attn_weights": False}, [1.0] * 3),
        ({"scale_attn_by_inverse_layer_idx": True}, [8**-0.5, 8**-0.5 / 2, 8**-0.5 / 3]),
    ],
)
def test_scaling_is_that_of_the_model(changes, scalings):
    assert [layer.scaling for layer in layers_of(made(gpt2, **changes))] == pytest.approx(scalings)


def test_a_later_token_changes_no_earlier_row(model):
    """Without a registered mask, it would: none is built for an unknown attention function."""
    changed = TOKENS.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % VOCABULARY
    for before, after in zip(layers_of(model), layers_of(model, changed), strict=True):
        torch.testing.assert_close(before.weights[:, :, :20], after.weights[:, :, :20], rtol=0, atol=1e-6)
        assert (before.weights[:, :, 20:] - after.weights[:, :, 20:]).abs().max() > 1e-3


def test_windows_of_a_batch_are_windows_alone(model):
    together = layers_of(model)
    for number in range(2):
        for one, both in zip(layers_of(model, TOKENS[number]), together, strict=True):
            for name in ("queries", "keys", "values", "weights", "inputs"):
                torch.testing.assert_close(getattr(one, name)[0], getattr(both, name)[number], rtol=1e-4, atol=1e-5)


def test_the_first_inputs_are_the_embeddings(model):
    layer = layers_of(model)[0]
    words = embeddings(model)
    assert words.shape == (VOCABULARY, 32)
    assert not words.requires_grad
    if model.config.model_type == "gpt2":
        positions = model.transformer.wpe.weight[:32]
        torch.testing.assert_close(layer.inputs, words[TOKENS] + positions, rtol=0, atol=1e-6)
    else:
        assert torch.equal(layer.inputs, words[TOKENS])


def test_context_is_what_the_configuration_says(model):
    assert context(model) == CONTEXT


def test_context_may_be_unknown():
    model = made(lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)))
    assert context(model) is None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("raises", [False, True])
def test_the_model_is_left_as_it_was(implementation, raises):
    model = made(llama)
    model.set_attn_implementation(implementation)
    model.train()
    model.model.layers[1].eval()
    modes = [each.training for each in model.modules()]
    weights = {name: values.clone() for name, values in model.state_dict().items()}

    def consume(layer):
        assert not model.training
        assert not layer.weights.requires_grad
        assert not torch.is_grad_enabled()
        if raises and layer.index == 1:
            raise RuntimeError("enough")

    if raises:
        with pytest.raises(RuntimeError, match="enough"):
            capture(model, TOKENS, consume)
    else:
        capture(model, TOKENS, consume)
    assert [each.training for each in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    assert not any(each._forward_pre_hooks for each in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(values, weights[name]) for name, values in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_one_layer_is_in_memory_at_a_time():
    weights, alive = [], []

    def consume(layer):
        alive.append(sum(each() is not None for each in weights))
        weights.append(weakref.ref(layer.weights))

    model = made(gpt2)
    capture(model, TOKENS, lambda _: None)  # with the check, which may keep all layers of its short window
    capture(model, TOKENS, consume)
    assert alive == [0, 0, 0]


def test_a_model_is_checked_once_and_on_few_tokens():
    model = made(gpt2)
    lengths = []
    model.transformer.wte.register_forward_hook(lambda _module, arguments, _: lengths.append(arguments[0].shape[1]))
    layers_of(model)
    layers_of(model)
    assert lengths == [16, 16, 32, 32]


@given(
    groups=st.sampled_from([1, 2, 4]),
    length=st.integers(1, CONTEXT),
    windows=st.integers(1, 3),
    make=st.sampled_from([llama, gpt_neox]),
)
@hypothesis_settings(deadline=None, max_examples=15)
def test_rows_sum_to_one_and_agree_with_the_model_in_every_shape(groups, length, windows, make):
    model = made(make, **({"num_key_value_heads": groups} if make is llama else {})).eval()
    tokens = ids(windows, length, seed=length)
    expected = own(model, tokens, output_attentions=True).attentions
    for layer, weights in zip(layers_of(model, tokens), expected, strict=True):
        assert layer.queries.shape == layer.keys.shape == layer.values.shape == (windows, 4, length, 8)
        torch.testing.assert_close(layer.weights, weights, rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.weights.sum(-1), torch.ones(windows, 4, length), rtol=0, atol=1e-5)


def refused(model, tokens=TOKENS):
    with pytest.raises(UserError) as caught:
        capture(model, tokens, lambda _: None)
    return str(caught.value)


def test_a_window_beyond_the_context_is_refused():
    message = refused(made(gpt2), ids(CONTEXT + 1))
    assert message == "a window of 49 tokens is longer than the 48 that GPT2LMHeadModel can read; shorten lengths"


def test_a_token_without_embedding_is_refused():
    message = refused(made(gpt2), torch.tensor([1, VOCABULARY]))
    assert message == (
        "token 270 is not in the vocabulary of 270 tokens of GPT2LMHeadModel; "
        "use the tokenizer that belongs to the model"
    )
    assert refused(made(gpt2), torch.tensor([1, -1])).startswith("token -1 is not in the vocabulary")


@pytest.mark.parametrize("shape", [(), (0,), (1, 0), (1, 2, 3)])
def test_tokens_of_another_shape_are_refused(shape):
    assert refused(made(gpt2), torch.zeros(shape, dtype=torch.int64)).startswith(f"token_ids has shape {shape}")


def test_fused_attention_is_refused():
    model = made(lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)))
    assert refused(model).startswith("BloomForCausalLM computes its attention within its own code (fused)")


def test_capped_logits_are_refused():
    small = {**sizes(), "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5}
    config = Gemma2Config(**small, attn_logit_softcapping=0.01, sliding_window=64)
    message = refused(made(lambda: Gemma2ForCausalLM(config)))
    assert message.startswith("the attention of Gemma2ForCausalLM is not a plain softmax of scaled products")


def test_an_encoder_is_refused():
    config = BertConfig(**{**sizes(), "is_decoder": False})
    message = refused(made(lambda: BertLMHeadModel(config)))
    assert message.startswith("in layer 1 of BertLMHeadModel a token does not see exactly itself and all tokens before")


def test_a_sliding_window_shorter_than_the_text_is_refused():
    config = MistralConfig(**sizes(), num_key_value_heads=2, sliding_window=20)
    model = made(lambda: MistralForCausalLM(config)).eval()
    assert len(layers_of(model, TOKENS[:, :20])) == 3
    assert "choose a causal language model, and lengths within its sliding window" in refused(model)


def test_layers_without_attention_are_refused():
    model = made(gpt2)
    model.config.n_layer = 5
    assert refused(model).startswith("3 of the 5 layers of GPT2LMHeadModel let their attention be captured")


def test_a_model_without_a_list_of_layers_is_refused():
    model = made(gpt2)
    model.transformer.h = torch.nn.Sequential(*model.transformer.h)
    assert refused(model).startswith("GPT2LMHeadModel has no list of layers whose inputs could be seen")


def test_a_model_that_returns_no_attention_is_refused(monkeypatch):
    model = made(gpt2)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda output_attentions=False, **options: forward(**options))
    assert refused(model).startswith("GPT2LMHeadModel returns the weights of 0 layers and shows us those of 3")


def test_a_model_whose_logits_change_is_refused(monkeypatch):
    model = made(gpt2, n_layer=1)  # whose weights do not depend on the output of attention
    attend = module._Watch.attend

    def wrong(*arguments):
        output, weights = attend(*arguments)
        return 1.001 * output, weights

    monkeypatch.setattr(module._Watch, "attend", wrong)
    assert refused(model).startswith("with our attention function the logits of GPT2LMHeadModel change by")


def test_a_refused_model_is_checked_again():
    model = made(gpt2)
    model.config.n_layer = 5
    refused(model)
    model.config.n_layer = 3
    assert len(layers_of(model)) == 3


def test_our_function_is_known_to_transformers():
    layers_of(made(gpt2))
    from transformers import AttentionInterface, AttentionMaskInterface

    assert FUNCTION in AttentionInterface()
    assert FUNCTION in AttentionMaskInterface()
