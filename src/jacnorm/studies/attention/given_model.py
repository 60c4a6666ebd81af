"""A causal language model that the user names: read from a local folder or from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jacnorm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""
FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
"""What is fetched from the hub: configuration, weights and tokenizer at the top; no code and no pickle."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LEAST_KNOWN = 0.9
"""Least share of the embeddings that the tokenizer must know; embeddings are often padded by a few rows."""


@dataclass(frozen=True)
class GivenModel:
    """A model that was loaded, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str
    """Its id on the hub, or the last part of its folder's name."""

    def token_ids(self, text: str) -> Tensor:
        """The text as token numbers without special tokens, (n,), int64."""
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)  # or it would warn of the length
        return torch.tensor(encoded["input_ids"], dtype=torch.int64)

    def digest(self) -> str:
        """SHA-256 of the names, shapes and values of all parameters."""
        found = hashlib.sha256()
        for name, parameter in sorted(self.model.named_parameters()):
            values = parameter.detach().cpu().contiguous()
            found.update(f"{name} {tuple(values.shape)}\n".encode())
            found.update(values.numpy().data)
        return found.hexdigest()


def load_model(name_or_folder: str, *, device: torch.device | str = "cpu") -> GivenModel:
    """Load a causal language model and its tokenizer, in float32, in evaluation mode and with eager attention.

    name_or_folder: a local folder in the layout of transformers, else an id on the Hugging Face hub; without a network,
    the copy in its cache is taken. Weights are read from safetensors only, and no code that comes with a model is run.

    Raises UserError if there is no such folder or id; if it lacks a configuration, weights, parameters or a tokenizer;
    if the weights are pickles; if the model is not a decoder-only causal language model, or its attention cannot be
    exchanged; and if the tokenizer does not belong to the model.
    """
    folder, label = _folder(name_or_folder)
    config = _config(folder, label)
    _refuse_other_kinds(config, label)
    _find_weights(folder, label)
    tokenizer = _tokenizer(folder, label)
    with _quiet():
        model = _model(folder, label, config)
    _refuse_strange_tokenizer(model, tokenizer, label)
    return GivenModel(model.to(device).eval(), tokenizer, label)


def refuse_fused(kind: type[PreTrainedModel]) -> None:
    """Raise UserError for a class of models whose attention cannot be exchanged for a function of ours."""
    if not kind._supports_attention_backend:
        raise UserError(
            f"{kind.__name__} computes its attention within its own code (fused), where it cannot be exchanged for a "
            "function that shows the weights; choose a model such as GPT-2, GPT-NeoX or Llama"
        )


def _folder(name: str) -> tuple[Path, str]:
    """Where the files are, fetched if need be, and what to call the model."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder, folder.resolve().name
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f'model "{name}": there is no such folder; correct its name, or give an id on the hub')
    return _fetched(name), name


def _fetched(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    failures = (OSError, HTTPError, HFValidationError)
    unreachable = ""
    try:
        HfApi().model_info(name, timeout=TIMEOUT)  # one request, no retry: a download alone keeps trying for 23 s
    except failures as error:
        unreachable = _brief(error)
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=list(FILES), ignore_patterns=["*/*"], local_files_only=bool(unreachable)
            )
        )
    except failures as error:
        raise UserError(
            f'model "{name}" cannot be fetched from the Hugging Face hub ({unreachable or _brief(error)}), nor is it '
            "in its cache; connect this machine to the network, correct the id, or give a local folder"
        ) from None


def _config(folder: Path, label: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(f'model "{label}" has no config.json; give a folder written by save_pretrained')
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f'the configuration of model "{label}" cannot be used ({_brief(error)}); '
            "give a model that transformers knows without code of its own"
        ) from None


def _refuse_other_kinds(config: PreTrainedConfig, label: str) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    what = f'model "{label}" ({config.model_type})'
    remedy = "give a decoder-only causal language model, such as GPT-2"
    if config.is_encoder_decoder:
        raise UserError(f"{what} is an encoder with a decoder; {remedy}")
    reads_both_ways = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if reads_both_ways or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "is an encoder only" if reads_both_ways else "is not a causal language model"
        raise UserError(f"{what} {kind}; {remedy}")
    refuse_fused(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def _find_weights(folder: Path, label: str) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f'model "{label}" has its weights as pickles only ({", ".join(pickles)}), which can run code when they are '
            "read; convert them to safetensors (save_pretrained of transformers writes it)"
        )
    raise UserError(f'model "{label}" has no weights (*.safetensors); give a folder written by save_pretrained')


def _tokenizer(folder: Path, label: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises that very class
        raise UserError(
            f'the tokenizer of model "{label}" cannot be read ({_brief(error)}); put its files into the model\'s folder'
        ) from None
    return tokenizer


def _model(folder: Path, label: str, config: PreTrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # damaged files raise many kinds
        raise UserError(
            f'the weights of model "{label}" cannot be read ({_brief(error)}); replace its files by whole ones'
        ) from None
    strange = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if strange:
        raise UserError(
            f'the weights of model "{label}" do not hold {len(strange)} of its parameters in their size '
            f"({strange[0]}{', ...' * (len(strange) > 1)}), which would stay random; replace its files by whole ones"
        )
    return model


def _refuse_strange_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str) -> None:
    rows = len(model.get_input_embeddings().weight)
    known = max(tokenizer.get_vocab().values(), default=-1) + 1
    if not LEAST_KNOWN * rows <= known <= rows:
        raise UserError(
            f'the tokenizer of model "{label}" has {known} tokens, but the model has embeddings for {rows}; '
            "put the tokenizer that belongs to the model into its folder"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers: what matters is checked."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _brief(error: BaseException) -> str:
    lines: list[Any] = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
