"""The small GPT-2 and its tokenizer, the windows of text that are probed, and the file that keeps all of it.

A tokenizer is learnt from the first 95 % of a text; the model trains on the tokens of that part and windows are taken
from the rest. A model that is given brings its own tokenizer and is not trained, so its windows come from the whole
text. Letters: R runs (seeds), W windows of a seed, L tokens of a window.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jacnorm.errors import UserError
from jacnorm.files import load_tensors, save_tensors
from jacnorm.studies.attention.given_model import load_model
from jacnorm.studies.attention.settings import ProbingSettings
from jacnorm.training.seeds import RunId

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import GPT2LMHeadModel, PreTrainedModel

STUDY = "attention"
HELD_OUT = 0.05
"""Share of a text, at its end, that a trained model has not seen."""
END = "<|endoftext|>"
"""The one special token, number 0."""
STAGES = ("trained", "untrained")


@dataclass(frozen=True)
class Shape:
    """Sizes of a small GPT-2."""

    layers: int
    heads: int
    width: int
    context: int
    vocabulary: int

    @classmethod
    def of(cls, settings: ProbingSettings) -> Shape:
        """The sizes that the settings ask for."""
        return cls(settings.layers, settings.heads, settings.width, settings.context, settings.vocabulary)


@dataclass(frozen=True)
class Kept:
    """What training leaves for measuring, of one text."""

    data_set: str
    """Name of the text in the settings."""
    label: str
    """What a report calls the text, without a path."""
    digest: str
    """SHA-256 of the text."""
    seeds: list[int]
    windows: Tensor
    """Token numbers (R, W, L), int64, L the longest of the settings' lengths; a shorter window is the head of one."""
    tokenizer: str = ""
    """The tokenizer as the JSON text of `tokenizers`; "" if the model was given."""
    model: str = ""
    """Label of the given model; "" if models were trained."""
    model_digest: str = ""
    """`GivenModel.digest` of the given model."""
    shape: Shape | None = None
    """Sizes of the trained models."""
    parameters: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """By stage ("trained", "untrained") and name, (R, ...); nothing if the model was given."""


def models(
    kept: Kept, settings: ProbingSettings, run: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, PreTrainedModel]]:
    """What to probe with the windows of run number `run`, with its name for the tables, in evaluation mode.

    The trained model and, if settings.control, the one that it was before; or the given model, which is loaded once.
    Raises UserError if the given model is not the one whose windows were kept, or cannot be loaded; and if settings and
    weights disagree on whether a model is given.
    """
    if (settings.model is None) != (kept.shape is not None):
        raise UserError(
            f"the weights were kept for {kept.model or 'models that were trained'}, but the settings ask for another "
            "model; run the training step again"
        )
    if settings.model is not None:
        yield kept.model, _given(settings.model, str(device), kept.model_digest)
        return
    for stage in STAGES if settings.control else STAGES[:1]:
        model = gpt2(kept.shape).to(device).eval()
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, values in kept.parameters[stage].items():
                own[name].copy_(values[run])
        yield stage, model


@functools.lru_cache(maxsize=1)
def _given(name: str, device: str, digest: str) -> PreTrainedModel:
    given = load_model(name, device=device)
    if given.digest() != digest:
        raise UserError(
            f"the model {given.label} has changed since the windows of text were drawn for it; "
            "delete the weights file of the training step and run that step again"
        )
    return given.model


def save(path: Path, kept: Sequence[Kept]) -> None:
    """Write what is kept of each text, in the given order."""
    index, tensors = [], {}
    for number, each in enumerate(kept):
        tensors[f"{number}/windows"] = each.windows.to(torch.int32)
        for stage, parameters in each.parameters.items():
            tensors |= {f"{number}/{stage}/{name}": values for name, values in parameters.items()}
        index.append(
            {
                "data_set": each.data_set,
                "label": each.label,
                "digest": each.digest,
                "seeds": each.seeds,
                "tokenizer": each.tokenizer,
                "model": each.model,
                "model_digest": each.model_digest,
                "shape": None if each.shape is None else asdict(each.shape),
                "parameters": {stage: list(parameters) for stage, parameters in each.parameters.items()},
            }
        )
    save_tensors(path, tensors, {"texts": json.dumps(index, sort_keys=True)})


def load(path: Path) -> list[Kept]:
    """Read what `save` wrote. Raises UserError if the file is missing, damaged or holds something else."""
    tensors, metadata = load_tensors(path)
    try:
        return [_loaded(number, entry, tensors) for number, entry in enumerate(json.loads(metadata["texts"]))]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} does not hold the weights of this study's training step; delete it and run that step again"
        ) from None


def _loaded(number: int, entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> Kept:
    shape = entry.pop("shape")
    stages = entry.pop("parameters")
    return Kept(
        **entry,
        windows=tensors[f"{number}/windows"].long(),
        shape=None if shape is None else Shape(**shape),
        parameters={
            stage: {name: tensors[f"{number}/{stage}/{name}"] for name in names} for stage, names in stages.items()
        },
    )


def gpt2(shape: Shape, *, fused: bool = False) -> GPT2LMHeadModel:
    """A GPT-2 without dropout whose parameters are still to be filled in, on the CPU.

    Radford et al. 2019, as transformers builds it; GELU by the tanh formula. fused: attention in one fused operation,
    which is quicker to train through but shows no weights; else eager.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        activation_function="gelu_pytorch_tanh",  # gelu_new, GPT-2's own, is the same function in five operations
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        attn_implementation="sdpa" if fused else "eager",
    )
    with torch.device("meta"):  # which draws no initial weights: they are ours to draw
        model = GPT2LMHeadModel(config)
    model.to_empty(device="cpu").tie_weights()
    return model


@torch.no_grad()
def initialise(model: GPT2LMHeadModel, generator: torch.Generator) -> None:
    """Draw initial parameters as GPT-2 does: matrices and embeddings N(0, s^2), biases 0, factors of layer norm 1.

    s = 0.02 sqrt(768 / width): GPT-2's own 0.02 at its width of 768, and the same spread of products at others. At
    width 64, 0.02 itself left the loss 0.3 nat higher after 300 updates. The matrices that write to the residual stream
    (c_proj) have s / sqrt(2 layers) (Radford et al. 2019, Sec. 2.3).
    """
    deviation = 0.02 * math.sqrt(768 / model.config.n_embd)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            shrink = math.sqrt(2 * model.config.n_layer) if name.endswith("c_proj.weight") else 1.0
            parameter.normal_(0.0, deviation / shrink, generator=generator)


def split(text: str) -> tuple[str, str]:
    """The part to learn from, and the last 5 % of the characters."""
    cut = len(text) - round(HELD_OUT * len(text))
    return text[:cut], text[cut:]


def learn_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016, over bytes as GPT-2 has it), with the special token `END`.

    Raises UserError if the text has too few pairs to merge for so large a vocabulary.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread per process
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    found = tokenizer.get_vocab_size()
    if found != vocabulary:
        raise UserError(
            f"the text gives only {found} of {vocabulary} tokens (vocabulary): lower vocabulary, or take a longer text"
        )
    return tokenizer


def tokens(tokenizer: Tokenizer, text: str) -> Tensor:
    """The text as token numbers, (n,), int64, line by line."""
    encoded = tokenizer.encode_batch_fast(text.splitlines(keepends=True), add_special_tokens=False)
    return torch.tensor([number for line in encoded for number in line.ids], dtype=torch.int64)


def windows(token_ids: Tensor, length: int, count: int, runs: Sequence[RunId], what: str) -> Tensor:
    """`count` windows of each run, (R, count, length): random ones of those that divide the tokens, no two alike.

    what: what the tokens are of, for the message. Raises UserError if the tokens are too few.
    """
    places = len(token_ids) // length
    if places < count:
        raise UserError(
            f"{what} has {len(token_ids)} tokens, but {count} windows of {length} need {count * length}: take a longer "
            "text, or lower windows or lengths"
        )
    divided = token_ids[: places * length].view(places, length)
    order = [torch.randperm(places, generator=run.generator("windows"))[:count] for run in runs]
    return torch.stack([divided[chosen] for chosen in order])  # (R, count, length)
