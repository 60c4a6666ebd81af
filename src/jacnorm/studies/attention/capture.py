r"""Probe the attention of any decoder-only causal language model of transformers, layer by layer.

For each head, query m and key n <= m: l_{m,n} = scaling q_m^T k_n and weights = softmax(l_m) over the keys that are
visible to m, which are those up to m itself. Queries and keys are taken where the model multiplies them: after rotary
embedding, and with the keys and values of grouped heads repeated.

transformers calls a function that is registered by name in place of the model's own attention. Ours computes the eager
softmax, hands it to the consumer and keeps nothing, so one layer is in memory at a time. Whether that is what the model
itself computes is checked once for each model. Letters: B windows, L tokens, H heads, d width, d_h width of a head.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jacnorm.errors import UserError
from jacnorm.studies.attention.given_model import refuse_fused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FUNCTION = "jacnorm_capture"
"""Name of our attention function among those of transformers."""
CHECKED_TOKENS = 16
"""Tokens of the window on which a model is checked."""
TOLERANCE = 1e-5
"""How far our weights may be from the model's own; its logits as well, relative to the largest."""
_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class Layer:
    """One layer of a forward pass. Tensors have no gradient and belong to the pass: copy what is to be kept."""

    index: int
    """Number of the layer, from 0."""
    queries: Tensor
    """(B, H, L, d_h)."""
    keys: Tensor
    """(B, H, L, d_h)."""
    values: Tensor
    """(B, H, L, d_v), with d_v = d_h in most models."""
    weights: Tensor
    """Softmax over visible keys, (B, H, L, L); exactly 0 where the key comes after the query."""
    scaling: float
    """What the model multiplies q^T k with, 1 / sqrt(d_h) in most models."""
    inputs: Tensor
    """Input of the layer, (B, L, d); of layer 0 the embedding of the tokens, with position if the model adds it."""


Consume = Callable[[Layer], None]


def capture(model: PreTrainedModel, token_ids: Tensor, consume: Consume) -> None:
    """One forward pass in evaluation mode and without autograd; `consume` gets each layer as the pass reaches it.

    token_ids: (L,) or (B, L), int64. The logits of the model are not computed. Afterwards the model is as it was:
    mode, attention function, hooks. The first call for a model also checks, on its first tokens, that our weights are
    the model's own within 1e-5 (`check`).

    Raises UserError if the window is longer than the model's context, a token is not in its vocabulary, or the
    attention of the model is not a causal softmax that is computed by a function which can be exchanged.
    """
    token_ids = _batched(model, token_ids)
    if model not in _checked:
        check(model, token_ids[:1, :CHECKED_TOKENS])
        _checked.add(model)
    _run(model, model.base_model, token_ids, consume)


def check(model: PreTrainedModel, token_ids: Tensor) -> None:
    """Compare with the model's own eager attention, output_attentions=True: weights within 1e-5, logits as well.

    token_ids: (B, L). Raises UserError as `capture`.
    """
    name = type(model).__name__
    refuse_fused(type(model))
    captured: list[Tensor] = []
    ours = _run(model, model, token_ids, lambda layer: captured.append(layer.weights))
    with _as(model, "eager"):
        own = model(input_ids=token_ids, use_cache=False, output_attentions=True)
    if not own.attentions or len(own.attentions) != len(captured):
        raise UserError(
            f"{name} returns the weights of {len(own.attentions or ())} layers and shows us those of {len(captured)}; "
            "choose a model all of whose layers have attention"
        )
    worst = max((a - b).abs().max().item() for a, b in zip(captured, own.attentions, strict=True))
    if not worst <= TOLERANCE:
        raise UserError(
            f"the attention of {name} is not a plain softmax of scaled products of queries and keys: its own weights "
            f"differ from that by {worst:.2g}; choose a model without biases, caps or sinks in its attention"
        )
    error = (ours.logits - own.logits).abs().max().item() / own.logits.abs().max().item()
    if not error <= TOLERANCE:
        raise UserError(
            f"with our attention function the logits of {name} change by {error:.2g} of the largest, so it does more "
            "than a plain softmax; choose another model"
        )


def embeddings(model: PreTrainedModel) -> Tensor:
    """Vectors of the tokens of the vocabulary without position (wte), (V, d), without gradient."""
    return model.get_input_embeddings().weight.detach()


def context(model: PreTrainedModel) -> int | None:
    """Longest window that the model can read; None if nothing in its configuration says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _batched(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """The windows as (B, L) on the model's device, checked."""
    if token_ids.ndim not in (1, 2) or not token_ids.numel():
        raise UserError(f"token_ids has shape {tuple(token_ids.shape)}; give a window (L,) or several (B, L)")
    if token_ids.ndim == 1:
        token_ids = token_ids[None]
    longest, vocabulary = context(model), len(embeddings(model))
    if longest is not None and token_ids.shape[1] > longest:
        raise UserError(
            f"a window of {token_ids.shape[1]} tokens is longer than the {longest} that {type(model).__name__} can "
            "read; shorten lengths"
        )
    unknown = token_ids[(token_ids < 0) | (token_ids >= vocabulary)]
    if len(unknown):
        raise UserError(
            f"token {int(unknown[0])} is not in the vocabulary of {vocabulary} tokens of {type(model).__name__}; "
            "use the tokenizer that belongs to the model"
        )
    return token_ids.to(embeddings(model).device)


def _run(model: PreTrainedModel, part: nn.Module, token_ids: Tensor, consume: Consume) -> Any:
    """Output of the model, or of a part of it, on (B, L) with our attention function in place."""
    _register()
    watch = _Watch(model, consume)
    token = _active.set(watch)
    try:
        with _as(model, FUNCTION), watch:
            output = part(input_ids=token_ids, use_cache=False)
    finally:
        _active.reset(token)
    expected = model.config.get_text_config().num_hidden_layers
    if watch.layers != expected:
        raise UserError(
            f"{watch.layers} of the {expected} layers of {type(model).__name__} let their attention be captured; "
            "choose a model all of whose layers have attention and call it through transformers' AttentionInterface"
        )
    return output


@contextlib.contextmanager
def _as(model: PreTrainedModel, function: str) -> Iterator[None]:
    """Evaluation mode, no autograd and the attention function of this name for a while."""
    training = [module for module in model.modules() if module.training]
    before = model.config._attn_implementation
    model.set_attn_implementation(function)
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation(before)
        for module in training:
            module.training = True


class _Watch:
    """What a pass in progress hands over: remembers inputs of layers, numbers the layers, checks their masks."""

    def __init__(self, model: PreTrainedModel, consume: Consume) -> None:
        self.layers = 0
        self._consume, self._model = consume, type(model).__name__
        self._mask: Tensor | None = None
        self._inputs: Tensor | None = None
        # A layer is an element of the outermost list of modules: GPT-2's h, Llama's layers.
        lists = (module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
        self._blocks = list(next(lists, ()))
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        self._hooks = [block.register_forward_pre_hook(self._note, with_kwargs=True) for block in self._blocks]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, _block: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._inputs = arguments[0] if arguments else options["hidden_states"]

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None
    ) -> tuple[Tensor, Tensor]:
        """Attend, and hand the layer over. Returns (B, L, H, d_v) and the weights (B, H, L, L)."""
        groups = queries.shape[1] // keys.shape[1]
        if groups > 1:
            keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))  # (B, H, L, d_h)
        scaling = queries.shape[-1] ** -0.5 if scaling is None else scaling
        mask = self._check(mask, queries.shape[-2], keys.shape[-2])
        if self._inputs is None:
            raise UserError(f"{self._model} has no list of layers whose inputs could be seen; choose another model")
        logits = torch.matmul(queries, keys.transpose(-1, -2)).mul_(scaling).add_(mask)  # (B, H, L, L)
        weights = torch.softmax(logits, dim=-1)
        self._consume(Layer(self.layers, queries, keys, values, weights, scaling, self._inputs))
        self.layers += 1
        return torch.matmul(weights, values).transpose(1, 2), weights

    def _check(self, mask: Tensor | None, queries: int, keys: int) -> Tensor:
        """The mask, if it is the plain causal one; the layers of most models share it."""
        if mask is not None and mask is self._mask:
            return mask
        causal = torch.ones(queries, keys, dtype=torch.bool).tril()
        if mask is None or not ((mask == 0) == causal.to(mask.device)).all():
            raise UserError(
                f"in layer {self.layers + 1} of {self._model} a token does not see exactly itself and all tokens "
                "before it; choose a causal language model, and lengths within its sliding window if it has one"
            )
        self._mask = mask
        return mask


_active: ContextVar[_Watch] = ContextVar("pass in progress")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The attention function that transformers calls."""
    return _active.get().attend(query, key, value, attention_mask, scaling)


def _register() -> None:
    """Make our function known, and its mask: without the second, transformers builds none and later tokens leak in."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(FUNCTION, _attend)
    AttentionMaskInterface.register(FUNCTION, eager_mask)
