"""Tiny causal language models of several families with random weights, and a tokenizer, all without a network."""

from __future__ import annotations

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from jacnorm.studies.attention.language import learn_tokenizer

torch.set_num_threads(1)

VOCABULARY, CONTEXT = 270, 48
TEXT = "the quick brown fox jumps over the lazy dog; " * 40 + "hello, hello world\n" * 20
LARGE = {"initializer_range": 0.3}  # weights of attention far from uniform
NO_ENDS = {"bos_token_id": 0, "eos_token_id": 0}


def gpt2(**changes):
    """GPT-2: learnt positions, one matrix for queries, keys and values."""
    small = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**{**small, **LARGE, **NO_ENDS, **changes}))


def llama(**changes):
    """Llama: rotary positions, two heads share keys and values."""
    return LlamaForCausalLM(LlamaConfig(**{**sizes(), "num_key_value_heads": 2, **LARGE, **NO_ENDS, **changes}))


def gpt_neox(**changes):
    """GPT-NeoX: rotary positions in a part of the head, attention beside the MLP."""
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**sizes(), **LARGE, **NO_ENDS, **changes}))


def sizes():
    """Sizes by the names that most families share."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "vocab_size": VOCABULARY,
    }


FAMILIES = {
    "GPT-2": gpt2,
    "GPT-2, scaled by layer": lambda: gpt2(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "GPT-2, not scaled": lambda: gpt2(scale_attn_weights=False),
    "Llama": llama,
    "GPT-NeoX": gpt_neox,
}


def made(make, **changes):
    """A model with the same random weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(**changes)


def ids(*shape, seed=0):
    """Random token numbers."""
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def tokenizer(vocabulary=VOCABULARY):
    """A tokenizer as transformers knows it."""
    return PreTrainedTokenizerFast(tokenizer_object=learn_tokenizer(TEXT, vocabulary))


def saved(folder, model, its_tokenizer=None):
    """The folder that transformers makes of a model and its tokenizer."""
    model.save_pretrained(folder)
    (its_tokenizer or tokenizer()).save_pretrained(folder)
    return folder
