"""One linearisation of a batched function: pulls and pushes at fixed inputs, the primal computed once.

A *pull* is u -> J^T u (one backward pass), a *push* is v -> J v. Pulls run through the kept graph of the forward
pass. Pushes run one of three exact ways, which differ in cost only (docs/performance.md has the measurements):

- ``double backward``: the pull is linear in u, so its own kept graph, run backward, is the push. No primal is
  recomputed. Quickest for dense layers and attention (about one forward a push).
- ``linearize``: `torch.func.linearize` traces the tangent program once. Quickest for convolutions, whose double
  backward computes terms that a push throws away; tracing costs five to ten forwards, so it needs a few pushes to pay.
- ``jvp``: `torch.func.jvp` recomputes the primal each time. For functions that support neither of the others.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from jacnorm.jacobian.errors import DtypeError, NonFiniteValue, NotDifferentiable, ShapeError

Function = Callable[[Tensor], Tensor]

PUSHES_WORTH_TRACING = 8
"""From this many pushes on, `torch.func.linearize` repays its tracing on convolutions (measured on VGG11, ResNet18)."""


ROWS_AT_ONCE = 64
"""Rows in one vmapped pass: more hold more memory and are no quicker."""


class Linearisation:
    """The linear map J(x_b) of each sample b of a batch, as pulls and pushes on flat vectors.

    `f` maps (B, *input) to (B, *output); n and m are the numbers of entries of one input and one output.
    `expected_pushes` decides whether tracing the tangent program is worth its cost. `pulls` and `pushes` count the
    passes spent.

    Raises ShapeError, DtypeError, NonFiniteValue or NotDifferentiable for functions that have no Jacobian per sample.
    """

    def __init__(self, f: Function, x: Tensor, expected_pushes: int = 20, first_sample: int = 0) -> None:
        """Run `f` once and keep its graph. `first_sample` numbers the samples in messages."""
        self.f = f
        self.first_sample = first_sample
        self.pulls = 0
        self.pushes = 0
        self.push_method: str | None = None
        self._expected_pushes = expected_pushes
        self._push: Callable[[Tensor], Tensor] | None = None
        # Inference tensors cannot enter a graph; a clone made outside that mode is a normal tensor.
        with torch.inference_mode(False):
            self._x = x.detach().clone().requires_grad_()
        self._y = self._forward()
        self.samples, self.outputs = self._y.shape[0], self._y[0].numel()
        self.inputs = self._x[0].numel()
        self.dtype, self.device = self._x.dtype, self._x.device
        self.output_dtype = self._y.dtype
        self._node_names = _node_names(self._y)

    @property
    def primal(self) -> Tensor:
        """f(x), detached."""
        return self._y.detach()

    def pull(self, u: Tensor) -> Tensor:
        """J^T u: (B, m) -> (B, n)."""
        self.pulls += 1
        with torch.inference_mode(False):
            (g,) = torch.autograd.grad(self._y, self._x, self._cotangent(u), retain_graph=True, allow_unused=True)
        if g is None:
            raise NotDifferentiable(
                "the output does not depend on the input through differentiable operations: the gradient of the output "
                "with respect to x does not exist. Look for .detach(), .data, torch.no_grad or rounding inside f"
            )
        return g.reshape(self.samples, self.inputs)

    def push(self, v: Tensor) -> Tensor:
        """J v: (B, n) -> (B, m)."""
        self.pushes += 1
        v = v.reshape(self._x.shape)
        with torch.inference_mode(False):
            w = self._first_push(v) if self._push is None else self._push(v)
        return w.detach().reshape(self.samples, self.outputs)

    def rows(self) -> tuple[Tensor, str]:
        """J of every sample from m pulls, (B, m, n), and how the pulls were run."""
        u = torch.eye(self.outputs, dtype=self.output_dtype, device=self.device)
        return self._all(u, self.pull, self._vmapped_pull, "rows")

    def columns(self) -> tuple[Tensor, str]:
        """J of every sample from n pushes, (B, m, n), and how the pushes were run."""
        v = torch.eye(self.inputs, dtype=self.dtype, device=self.device)
        if self._push is None:
            self.push(v[:1].expand(self.samples, -1))
        stacked, how = self._all(v, self.push, self._vmapped_push, "columns")
        return stacked.mT, f"{how}, pushes by {self.push_method}"

    def only(self, samples: Tensor) -> Linearisation:
        """Return the linearisation of some of the samples, run again for those; counts start from zero."""
        return Linearisation(take(self.f, samples), self._x.detach()[samples], self._expected_pushes)

    def _all(
        self, basis: Tensor, one: Callable[[Tensor], Tensor], batched: Callable[[Tensor], Tensor | None], name: str
    ) -> tuple[Tensor, str]:
        """Apply a pass to every row of `basis`: vmapped, or one by one where that is the better way."""
        basis = basis[:, None].expand(-1, self.samples, -1)  # (q, B, width)
        # On a CPU, vmapped convolutions are no quicker than single ones and hold q times the memory.
        if not (self.device.type == "cpu" and self._has("Convolution")):
            groups = []
            for group in basis.split(ROWS_AT_ONCE):
                groups.append(batched(group))
                if groups[-1] is None:
                    break
            else:
                return torch.cat(groups).transpose(0, 1), f"{name} in vmapped passes"
        return torch.stack([one(vector) for vector in basis], 1), f"{name} one by one"

    def _vmapped_pull(self, u: Tensor) -> Tensor | None:
        def run() -> Tensor:
            cotangents = u.reshape(len(u), *self._y.shape)
            (g,) = torch.autograd.grad(self._y, self._x, cotangents, retain_graph=True, is_grads_batched=True)
            return g

        result = self._vmapped(run)
        self.pulls += 0 if result is None else len(u)
        return None if result is None else result.reshape(len(u), self.samples, self.inputs)

    def _vmapped_push(self, v: Tensor) -> Tensor | None:
        if self.push_method != "double backward":
            return None
        u, g = self._pullback

        def run() -> Tensor:
            tangents = v.reshape(len(v), *self._x.shape)
            (w,) = torch.autograd.grad(g, u, tangents, retain_graph=True, is_grads_batched=True)
            return w

        result = self._vmapped(run)
        self.pushes += 0 if result is None else len(v)
        return None if result is None else result.reshape(len(v), self.samples, self.outputs)

    @staticmethod
    def _vmapped(run: Callable[[], Tensor]) -> Tensor | None:
        """Run a vmapped pass; None if an operation of f has no vmapped gradient (the caller then goes one by one)."""
        try:
            with torch.inference_mode(False), _torch_hushed():
                return run().detach()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None

    def _forward(self) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            y = self.f(self._x)
        check_output(y, self._x, self.first_sample)
        return y

    def _has(self, operation: str) -> bool:
        return any(operation in name for name in self._node_names)

    def _cotangent(self, u: Tensor) -> Tensor:
        return u.to(self.output_dtype).reshape(self._y.shape)

    def _first_push(self, v: Tensor) -> Tensor:
        """Choose the way to push by what the graph of f holds, and by what works; return the push of `v`."""
        ways = {"double backward": self._by_double_backward, "linearize": self._by_linearize, "jvp": self._by_jvp}
        order = ["double backward", "linearize", "jvp"]
        if self._has("Convolution") and self._expected_pushes >= PUSHES_WORTH_TRACING:
            order = ["linearize", "double backward", "jvp"]
        elif self._has("Convolution") and self._expected_pushes == 1:
            order = ["jvp", "double backward", "linearize"]
        if self._has("ScaledDotProduct"):
            # Fused attention has neither a double backward nor a forward derivative; the plain kernel has both.
            self.f = _PlainAttention(self.f)
            self._y = self._forward()
            self._node_names = _node_names(self._y)
        failures = []
        for way in order:
            try:
                push = ways[way]()
                w = push(v)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                failures.append(f"{way}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
                continue
            self.push_method, self._push = way, push
            return w
        raise NotDifferentiable(
            "no push v -> J v could be built for this function, though pulls work; use method='rows', or write the "
            "custom operation with differentiable PyTorch operations. Tried " + "; ".join(failures)
        )

    def _by_double_backward(self) -> Callable[[Tensor], Tensor]:
        u = torch.zeros_like(self._y).requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self._y, self._x, u, create_graph=True)
        self._pullback = (u, g)

        def push(v: Tensor) -> Tensor:
            (w,) = torch.autograd.grad(g, u, v, retain_graph=True)
            return w

        return push

    def _by_linearize(self) -> Callable[[Tensor], Tensor]:
        with _torch_hushed():
            _, push = torch.func.linearize(self.f, self._x.detach())
        return push

    def _by_jvp(self) -> Callable[[Tensor], Tensor]:
        def push(v: Tensor) -> Tensor:
            with _torch_hushed():
                return torch.func.jvp(self.f, (self._x.detach(),), (v,))[1]

        return push


@contextlib.contextmanager
def _torch_hushed() -> Iterator[None]:
    """Hide what torch warns of about its own tracing; warnings of f itself were shown by the first forward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def take(f: Function, samples: Tensor | slice) -> Function:
    """Return the same function for some of the samples only.

    A function whose samples carry fixed context of their own (a partial network with skip connections around it) has a
    method `take`; any other function is the same for all samples.
    """
    return f.take(samples) if hasattr(f, "take") else f


def check_input(x: Tensor) -> None:
    """Refuse inputs that have no Jacobian per sample. Raises ShapeError, DtypeError or NonFiniteValue."""
    if not isinstance(x, Tensor):
        raise DtypeError(f"x must be a torch tensor of shape (B, *input), not {type(x).__name__}")
    if x.is_complex() or not x.is_floating_point():
        raise DtypeError(
            f"x has dtype {x.dtype}, in which no derivative exists; pass a real floating tensor (for token ids, "
            "measure from the embeddings on)"
        )
    if x.ndim == 0 or x.numel() == 0:
        raise ShapeError(f"x must have shape (B, *input) with at least one sample and one entry, not {tuple(x.shape)}")
    refuse_non_finite(x, "x")


def check_output(y: Tensor, x: Tensor, first_sample: int = 0) -> None:
    """Refuse outputs that have no Jacobian per sample. Raises the errors that `Linearisation` names."""
    if not isinstance(y, Tensor):
        raise ShapeError(f"f must return one tensor of shape (B, *output), not {type(y).__name__}")
    if y.ndim == 0 or y.shape[0] != x.shape[0] or y.numel() == 0:
        raise ShapeError(
            f"f must map a batch (B, *input) to (B, *output) with the same B, but mapped {tuple(x.shape)} to "
            f"{tuple(y.shape)}"
        )
    if y.is_complex() or not y.is_floating_point():
        raise DtypeError(f"f returned dtype {y.dtype}, in which no derivative exists; return a real floating tensor")
    if not y.requires_grad:
        raise NotDifferentiable(
            "the output does not depend on the input through differentiable operations; look for .detach(), .data, "
            "argmax or torch.no_grad inside f"
        )
    refuse_non_finite(y, "f(x)", first_sample)


def refuse_non_finite(values: Tensor, name: str, first_sample: int = 0, samples: Tensor | None = None) -> None:
    """Raise NonFiniteValue naming the first sample of `values` (B, ...) that holds NaN or infinity.

    The samples are numbered from `first_sample`, or are those of `samples` (B,) counted from it.
    """
    finite = torch.isfinite(values.detach()).reshape(len(values), -1).all(1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        bad = bad if samples is None else int(samples[bad])
        raise NonFiniteValue(f"{name} holds NaN or infinity, first in sample {first_sample + bad}")


class _PlainAttention:
    def __init__(self, f: Function) -> None:
        self.f = f

    def __call__(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self.f(x)

    def take(self, samples: Tensor | slice) -> Function:
        return _PlainAttention(take(self.f, samples))


def _node_names(y: Tensor) -> set[str]:
    names, seen, stack = set(), set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name())
        stack.extend(next_node for next_node, _ in node.next_functions)
    return names


@contextlib.contextmanager
def left_as_found(f: Function) -> Iterator[None]:
    """Restore buffers of the modules behind `f` and the state of the global random generators afterwards.

    Batch norm in train mode updates its running statistics in the forward pass, and dropout draws random numbers; a
    measurement must leave neither trace. Parameters, modes and ``.grad`` are never written in the first place.
    """
    buffers = [(buffer, buffer.detach().clone()) for module in modules_behind(f) for buffer in module.buffers()]
    devices = sorted({buffer.device.index for buffer, _ in buffers if buffer.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


def modules_behind(f: Function) -> list[torch.nn.Module]:
    """Modules that a callable is, is bound to, wraps (functools.partial) or closes over."""
    found: list[torch.nn.Module] = []
    stack: list[object] = [f]
    seen: set[int] = set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.nn.Module):
            found.append(item)
            continue
        stack += [getattr(item, name, None) for name in ("__self__", "func", "module")]
        stack += list(getattr(item, "args", ()) or ()) if hasattr(item, "func") else []
        for cell in getattr(item, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                stack.append(cell.cell_contents)
    return found


def in_dtype(f: Function, x: Tensor, dtype: torch.dtype) -> tuple[Function, Tensor]:
    """Return the same function computed in another dtype: parameters and buffers of a module are cast copies.

    Any other callable is called with the cast input. Raises DtypeError if the result does not come out in `dtype`.
    """
    x = x.to(dtype)
    if hasattr(f, "in_dtype"):
        f = f.in_dtype(dtype)
    elif isinstance(f, torch.nn.Module):
        tensors = dict(f.named_parameters(remove_duplicate=False)) | dict(f.named_buffers(remove_duplicate=False))
        cast = {name: t.detach().to(dtype) if t.is_floating_point() else t.detach() for name, t in tensors.items()}
        module = f
        f = lambda z: torch.func.functional_call(module, cast, (z,))  # noqa: E731
    try:
        with torch.no_grad():
            y = take(f, slice(0, 1))(x[:1])
    except RuntimeError as error:
        raise DtypeError(
            f"f cannot be computed in {dtype} ({str(error).splitlines()[0]}); pass a torch.nn.Module, whose parameters "
            f"can be cast, or a function and input already in {dtype}"
        ) from None
    if isinstance(y, Tensor) and y.is_floating_point() and y.dtype != dtype:
        raise DtypeError(f"f was given {dtype} but returned {y.dtype}; remove the casts inside f or its autocast")
    return f, x
