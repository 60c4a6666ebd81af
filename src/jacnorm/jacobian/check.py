"""Checks of the instrument: determinism, one sample at a time, the adjoint identity; and a second opinion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jacnorm.jacobian.errors import (
    AdjointMismatch,
    CoupledSamples,
    DtypeError,
    NonDeterministicModel,
    NotDifferentiable,
)
from jacnorm.jacobian.linearise import Function, Linearisation, check_output, take

CHECKED_SAMPLES = 2
"""The checks run on the first two samples, so they cost a fraction of one pass over a large batch."""


@dataclass(frozen=True)
class Probe:
    """One forward pass over two samples: f restricted to them, their inputs and outputs, and what a sample costs.

    outputs, inputs: entries of one sample; graph_bytes: memory that the graph of one sample holds.
    """

    f: Function
    x: Tensor
    y: Tensor
    outputs: int
    inputs: int
    graph_bytes: int


def probe(f: Function, x: Tensor) -> Probe:
    """Run f on the first two samples; one alone is paired with a perturbed copy.

    Raises what `check_output` does, and DtypeError for outputs in half precision.
    """
    f, x = take(f, slice(0, CHECKED_SAMPLES)), x[:CHECKED_SAMPLES].detach()
    if len(x) == 1:
        f = take(f, torch.tensor([0, 0], device=x.device))
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x)
        x = torch.cat([x, x + 0.1 * (x.std(correction=0) + 0.1) * noise])
    storages: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not base.is_leaf:  # parameters, views of them and the input are there anyway
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would tie the graph into a cycle

    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            y = f(leaf)
    check_output(y, leaf)
    if torch.finfo(y.dtype).bits < 32:
        raise DtypeError(
            f"f returned {y.dtype} for an input in {x.dtype}: it computes in half precision, whose rounding is too "
            "coarse for an interval. Leave autocast, or cast the model and the input to float32"
        )
    each = sum(storages.values()) // len(x)
    return Probe(f, x, y.detach(), y[0].numel(), x[0].numel(), each)


def check_instrument(first: Probe) -> None:
    """Refuse functions whose Jacobians per sample do not exist or would be measured wrongly.

    On two samples: two forward passes agree; the pull of one sample reaches no other and the push of one sample
    neither, so no output depends on another sample's input in either direction; and <u, J v> = <J^T u, v> for random
    u, v. Costs a forward, a pull and a push of two samples; `check_company` looks at all samples.

    Raises NonDeterministicModel, CoupledSamples, AdjointMismatch, and what `Linearisation` raises.
    """
    lin = Linearisation(first.f, first.x, expected_pushes=1)
    _check_determinism(first.y, lin.primal)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(lin.samples, lin.outputs, generator=generator, dtype=torch.float64).to(first.x)
    v = torch.randn(lin.samples, lin.inputs, generator=generator, dtype=torch.float64).to(first.x)
    u[1:], v[1:] = 0, 0
    pulled = lin.pull(u)
    _check_coupling(pulled)
    try:
        pushed = lin.push(v)
    except NotDifferentiable:
        return  # rows need no push; a method that does will say so itself
    _check_coupling(pushed)
    _check_adjoint(u, v, pulled, pushed)


@torch.no_grad()
def check_company(f: Function, x: Tensor, y: Tensor) -> None:
    """Refuse functions whose output for a sample depends on which other samples are in the batch.

    y = f(x), (B, ...): every second sample is run again without the others, and its output has to stay, up to the
    rounding of another batch size. This sees coupling anywhere in the batch, also through statistics that are detached
    from the graph. Costs half a forward. Raises CoupledSamples.
    """
    if len(x) < 2:
        return
    rows = torch.arange(1, len(x), 2, device=x.device)
    apart = (take(f, rows)(x[rows]) - y[rows]).abs().amax()
    scale = y.abs().amax()
    if bool(apart > torch.finfo(y.dtype).eps ** 0.5 * scale):
        raise CoupledSamples(
            f"the output of a sample changes by {float(apart / scale):.1e} of the largest output when other samples "
            "leave the batch, so there is no Jacobian per sample. Batch norm in train mode does this: call "
            "model.eval(), or make f treat samples independently"
        )


def _check_determinism(first: Tensor, again: Tensor) -> None:
    scale = first.abs().max()
    apart = (first - again).abs().max()
    # Atomic additions on a GPU reorder sums, so bitwise equality would refuse sound models there.
    if bool(apart > 100 * torch.finfo(first.dtype).eps * scale):
        raise NonDeterministicModel(
            f"two forward passes over the same input differ by {float(apart / scale):.1e} of the largest output: the "
            "function draws random numbers (dropout, augmentation, noise) or changes state. Call model.eval() or fix "
            "its noise"
        )


def _check_coupling(reached: Tensor) -> None:
    odd = reached[1:].abs().amax()
    if bool(odd > 0):
        share = float(odd / reached.abs().amax())
        raise CoupledSamples(
            f"the output of one sample depends on another sample ({share:.1e} of the largest derivative), so "
            "there is no Jacobian per sample. Batch norm in train mode does this: call model.eval(), or make f "
            "treat samples independently"
        )


def _check_adjoint(u: Tensor, v: Tensor, pulled: Tensor, pushed: Tensor) -> None:
    tolerance = 1e3 * torch.finfo(pulled.dtype).eps
    u, v, pulled, pushed = (t.double() for t in (u, v, pulled, pushed))
    left, right = (u * pushed).sum(1), (pulled * v).sum(1)
    scale = u.norm(dim=1) * pushed.norm(dim=1) + pulled.norm(dim=1) * v.norm(dim=1)
    apart = (left - right).abs()
    if bool((apart > tolerance * scale).any()):
        sample = int((apart > tolerance * scale).nonzero()[0])
        raise AdjointMismatch(
            f"<u, J v> = {float(left[sample]):.6g} but <J^T u, v> = {float(right[sample]):.6g} in sample "
            f"{sample}: pull and push are not adjoint. A custom backward inside f is wrong, an operation "
            "breaks its gradient (.data, detach), or f computes in half precision (autocast), too coarse to measure"
        )
