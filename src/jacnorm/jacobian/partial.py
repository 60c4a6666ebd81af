"""Jacobians between named layers of a module: from the output of one layer to the output of another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from jacnorm.jacobian.errors import UnknownLayer
from jacnorm.jacobian.linearise import check_input, in_dtype, left_as_found
from jacnorm.jacobian.measure import full_precision
from jacnorm.jacobian.results import Measurement
from jacnorm.jacobian.spectral import spectral_norm

Ends = tuple[str | None, str | None]


def partial_jacobians(
    model: nn.Module,
    x: Tensor,
    ends: Iterable[Ends],
    *,
    measure: Callable[..., Measurement | Tensor] = spectral_norm,
    **options,
) -> dict[Ends, Measurement | Tensor]:
    r"""Measure J_{k->l} = d h_l / d h_k for pairs of layers of a module, at the hidden states that `x` gives.

    h_k is the output of the submodule named k (as in `model.named_modules()`); None as k is the input x, None as l the
    output of the model. With skip connections around layer k, J_{k->l} is the derivative with every other path held
    fixed. Any measurement of this package can be taken, with its options: `spectral_norm`, `frobenius_norm`,
    `singular_values`, `log_volume`, `condition_number`, or `jacobian` itself.

    Cost: that of `measure`, with a forward pass of `model` up to layer l; passes run through the layers between k and
    l. Raises UnknownLayer for a name that is not in the module, does not run exactly once, returns no tensor, or runs
    before k.

    >>> model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
    >>> norms = partial_jacobians(model, torch.zeros(1, 4), [(None, "1"), ("1", None)])
    >>> bool(torch.isclose(norms["1", None].value[0], torch.linalg.matrix_norm(model[2].weight, 2).double()))
    True
    """
    check_input(x)
    ends = list(ends)
    names = {name for pair in ends for name in pair if name is not None}
    modules = dict(model.named_modules())
    for name in sorted(names):
        if name not in modules:
            raise UnknownLayer(f"the model has no layer {name!r}; its layers are {', '.join(n for n in modules if n)}")
    with left_as_found(model), torch.inference_mode(False), torch.no_grad():
        f, x = full_precision(model, x.clone())
        hidden = _outputs_of(model, f, x, names)
    return {
        (start, end): measure(Between(model, f, x, start, end), x if start is None else hidden[start], **options)
        for start, end in ends
    }


class Between:
    """The part of `model` from layer k to layer l as a function of h_k, everything else held at what `x` gives."""

    def __init__(
        self, module: nn.Module, f: Callable[[Tensor], Tensor], x: Tensor, start: str | None, end: str | None
    ) -> None:
        """`f` runs `module` (perhaps in another dtype); `x` (B, *input) are the samples."""
        self.module, self.f, self.x, self.start, self.end = module, f, x, start, end

    def take(self, samples: Tensor | slice) -> Between:
        """Return the same part for some of the samples."""
        return Between(self.module, self.f, self.x[samples], self.start, self.end)

    def in_dtype(self, dtype: torch.dtype) -> Between:
        """Return the same part with parameters, buffers and samples cast to `dtype`."""
        return Between(self.module, *in_dtype(self.module, self.x, dtype), self.start, self.end)

    def __call__(self, h: Tensor) -> Tensor:
        """Map h_k (B, ...) to h_l (B, ...)."""
        modules = dict(self.module.named_modules())
        used = self.start is None
        reached: list[Tensor] = []

        def replace(_module: nn.Module, _inputs: tuple, _output: object) -> Tensor:
            nonlocal used
            used = True
            return h

        def stop(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            reached.append(output)
            raise _ReachedError

        hooks = [modules[self.start].register_forward_hook(replace)] if self.start is not None else []
        hooks += [modules[self.end].register_forward_hook(stop)] if self.end is not None else []
        try:
            with contextlib.suppress(_ReachedError):
                reached.append(self.f(h if self.start is None else self.x))
        finally:
            for hook in hooks:
                hook.remove()
        if not used:
            raise UnknownLayer(
                f"layer {self.end!r} runs before layer {self.start!r}, so no Jacobian leads from {self.start!r} to it"
            )
        return reached[0]


class _ReachedError(Exception):
    """Layer l has run; the rest of the forward pass is not needed."""


def _outputs_of(model: nn.Module, f: Callable[[Tensor], Tensor], x: Tensor, names: set[str]) -> dict[str, Tensor]:
    """Return the outputs of the named layers in one forward pass."""
    outputs: dict[str, list[object]] = {name: [] for name in names}
    modules = dict(model.named_modules())
    with _hooks((modules[name], outputs[name]) for name in names):
        f(x)
    for name, seen in outputs.items():
        if len(seen) != 1:
            raise UnknownLayer(
                f"layer {name!r} ran {len(seen)} times in one forward pass; name one that runs exactly once"
            )
        if not isinstance(seen[0], Tensor):
            raise UnknownLayer(f"layer {name!r} returned {type(seen[0]).__name__}; name one that returns a tensor")
    return {name: seen[0].detach().clone() for name, seen in outputs.items()}


@contextlib.contextmanager
def _hooks(targets: Iterator[tuple[nn.Module, list[object]]]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output)) for module, seen in targets
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
