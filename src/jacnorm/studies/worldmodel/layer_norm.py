"""LayerNorm that is cheap to differentiate twice, as a penalty on a Jacobian needs.

y = (x - m) r over the last axis of n entries, with the mean m and r = (variance + epsilon)^(-1/2). With
P(g) = g - mean(g) - y mean(g y), the vector-Jacobian product is d = r P(g). It is linear in g, and P is symmetric, so
the derivative of <w, d> is r P(w) by g and

    -r (b r P(w) + a d + y mean(w d)),    a = mean(w y), b = mean(g y), by x.

PyTorch's own second derivative of its LayerNorm is put together from some forty passes over memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def layer_norm(x: Tensor, epsilon: float) -> Tensor:
    """Y of x (..., n), without scale and offset; twice differentiable."""
    y: Tensor = _Norm.apply(x, epsilon)  # type: ignore[no-untyped-call]
    return y


class _Norm(Function):
    """y as a function of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, epsilon: float) -> Tensor:
        y, mean, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, epsilon)
        ctx.save_for_backward(x, mean, scale)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Pull.apply(g, *ctx.saved_tensors), None  # type: ignore[no-untyped-call]


class _Pull(Function):
    """d as a function of g and x."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        d = _pull(g, x, mean, scale)
        ctx.save_for_backward(g, x, mean, scale, d)
        return d

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        g, x, mean, scale, d = ctx.saved_tensors
        by_g = _pull(w, x, mean, scale)
        if not ctx.needs_input_grad[1]:
            return by_g, None, None, None
        y = (x - mean).mul_(scale)
        a, b, c = ((one * other).mean(-1, keepdim=True).mul_(scale).neg_() for one, other in ((w, y), (g, y), (w, d)))
        by_x = (by_g * b).addcmul_(d, a).addcmul_(y, c)
        return by_g, by_x, None, None


def _pull(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """D = r P(g)."""
    found: Tensor = torch.ops.aten.native_layer_norm_backward(
        g, x, x.shape[-1:], mean, scale, None, None, [True, False, False]
    )[0]
    return found
