"""Many runs at once: parameters stacked along a first axis of R runs, advanced together by `torch.func`.

R small networks cost little more than one when Python and kernel launches are the price, which at the widths of a
laptop they are. Each run's arithmetic is that of the run alone; only rounding differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from jacnorm.errors import UserError

Stack = dict[str, torch.Tensor]
"""Parameters by name, each of shape (R, *shape of one run's parameter)."""

Rate = float | Sequence[float] | torch.Tensor
"""One number for all runs, or one for each."""


def stack_parameters(modules: Sequence[nn.Module]) -> Stack:
    """Copy the parameters of R modules of one architecture into stacks of shape (R, ...), without gradients.

    Raises UserError if the modules differ in their parameters' names or shapes, or have buffers that hold numbers
    (running statistics belong to a run as well and would be lost here).
    """
    if not modules:
        raise UserError("there are no modules to stack: give at least one")
    first = {name: parameter.shape for name, parameter in modules[0].named_parameters()}
    for number, module in enumerate(modules):
        if {name: parameter.shape for name, parameter in module.named_parameters()} != first:
            raise UserError(f"module {number} has other parameters than module 0, so they cannot be stacked")
        buffers = [name for name, _ in module.named_buffers()]
        if buffers:
            raise UserError(f"module {number} has buffers ({', '.join(buffers)}), which cannot be stacked")
    tables = [dict(module.named_parameters()) for module in modules]
    return {name: torch.stack([table[name].detach() for table in tables]) for name in first}


def unstack(stack: Mapping[str, torch.Tensor], run: int) -> Stack:
    """One run's parameters, as copies that `nn.Module.load_state_dict` takes."""
    return {name: tensor[run].clone() for name, tensor in stack.items()}


def forward(module: nn.Module) -> Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]:
    """A function of (parameters of one run, x) that computes what `module` does; its own parameters are not used.

    Map it over runs with `torch.func.vmap`, or pass a loss made from it to `losses_and_gradients`.
    """
    skeleton = copy.deepcopy(module).to("meta")

    def apply(parameters: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(skeleton, dict(parameters), (x,))

    return apply


def losses_and_gradients(
    loss: Callable[..., torch.Tensor], stack: Mapping[str, torch.Tensor], *batch: torch.Tensor
) -> tuple[torch.Tensor, Stack]:
    """Each run's loss, shape (R,), and its gradient by the run's own parameters, shapes (R, ...).

    loss: a function of (parameters of one run, *one run's batch) with a scalar result. batch: tensors of shape
    (R, ...), each run's own data. A NaN in one run stays in that run.
    """
    return gradients(lambda leaves: torch.func.vmap(loss)(leaves, *batch), stack)


def gradients(losses: Callable[[Stack], torch.Tensor], stack: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, Stack]:
    """As `losses_and_gradients`, for a function of the whole stack that returns all losses, shape (R,).

    For forward passes written by hand over the stack: `torch.bmm` layer by layer took two thirds of the time of `vmap`
    (8 nets of 10 layers of 64 units, one CPU thread). No run's loss may depend on another run's parameters.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in stack.items()}
    values = losses(leaves)  # (R,)
    # Runs are independent, so the gradient of the sum holds each run's own gradient.
    found = torch.autograd.grad(values.sum(), list(leaves.values()))
    return values.detach(), dict(zip(leaves, found, strict=True))


class _StackedOptimiser:
    """What optimisers of R stacked runs share: rates of each run, and runs that are left alone."""

    def __init__(self, stack: Mapping[str, torch.Tensor], **rates: Rate) -> None:
        self.stack = dict(stack)
        sizes = {len(tensor) for tensor in self.stack.values()}
        if len(sizes) != 1:
            raise ValueError(f"stacked parameters must agree on the number of runs; they have {sorted(sizes)}")
        self.runs = sizes.pop()
        self._columns: dict[tuple[str, int, torch.dtype, torch.device], torch.Tensor] = {}
        self._rates = {name: self._per_run(name, value) for name, value in rates.items()}
        self._frozen: torch.Tensor | None = None

    @property
    def lr(self) -> torch.Tensor:
        """The learning rate of each run, shape (R,), float64 on the CPU."""
        return self._rates["lr"]

    @lr.setter
    def lr(self, value: Rate) -> None:
        self._rates["lr"] = self._per_run("lr", value)
        self._columns = {key: column for key, column in self._columns.items() if key[0] != "lr"}

    def _per_run(self, name: str, value: Rate) -> torch.Tensor:
        values = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
        if values.ndim > 1 or (values.ndim == 1 and len(values) != self.runs):
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}; give one number or one for each of {self.runs} runs"
            )
        if not (values.isfinite() & (values >= 0)).all():
            raise UserError(f"{name} is {value}: it must be a finite number >= 0")
        return values.expand(self.runs).clone()

    def _column(self, rate: str, p: torch.Tensor) -> torch.Tensor:
        """A rate beside `p`: its dtype and device, shape (R, 1, ..., 1); kept, so that a GPU gets it once."""
        key = (rate, p.ndim, p.dtype, p.device)
        if key not in self._columns:
            self._columns[key] = self._rates[rate].to(p).view(-1, *[1] * (p.ndim - 1))
        return self._columns[key]

    def freeze(self, runs: torch.Tensor) -> None:
        """From now on leave the parameters of runs where `runs` (shape (R,), bool) is true as they are."""
        self._frozen = runs.clone()

    def _moving(self, d: torch.Tensor) -> torch.Tensor:
        """The update `d` of shape (R, ...) with zeros for frozen runs."""
        if self._frozen is None:
            return d
        # Not by a learning rate of 0, for 0 * NaN is NaN.
        return d.masked_fill(self._frozen.to(d.device).view(-1, *[1] * (d.ndim - 1)), 0.0)


class StackedSGD(_StackedOptimiser):
    """`torch.optim.SGD` for R stacked runs, each with its own learning rate, momentum and weight decay if wanted.

    For each run: d = g + weight_decay * p; b = momentum * b + d; p = p - lr * b (nesterov: lr * (d + momentum * b)).

    lr, momentum, weight_decay: one number for all runs, or R numbers (in a list, or a float64 tensor: a float32 one
    has already rounded 0.1). `lr` may be changed between steps (a schedule). masks: for parameters that are pruned,
    bool of the stack's shape, True where a weight lives; others are set to zero at once and stay zero, and have no part
    in momentum. The stack is changed in place.
    Raises UserError for impossible values, ValueError for shapes that do not fit.
    """

    def __init__(
        self,
        stack: Mapping[str, torch.Tensor],
        lr: Rate,
        *,
        momentum: Rate = 0.0,
        weight_decay: Rate = 0.0,
        nesterov: bool = False,
        masks: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(stack, lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and not (self._rates["momentum"] > 0).all():
            raise UserError("nesterov needs a momentum above 0")
        self._nesterov = nesterov
        self._pruned: Stack = {}
        for name, mask in (masks or {}).items():
            if name not in self.stack or mask.shape != self.stack[name].shape or mask.dtype != torch.bool:
                raise ValueError(f'mask "{name}" must be bool, with the name and shape of a stacked parameter')
            self._pruned[name] = ~mask
            self.stack[name].masked_fill_(self._pruned[name], 0.0)
        with_momentum, self._decays = (bool(self._rates[name].any()) for name in ("momentum", "weight_decay"))
        self._buffers = {name: torch.zeros_like(tensor) for name, tensor in self.stack.items() if with_momentum}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Update the stack with gradients of the same names and shapes."""
        for name, p in self.stack.items():
            d = gradients[name]
            if self._decays:
                d = d + self._column("weight_decay", p) * p
            if name in self._pruned:
                d = d.masked_fill(self._pruned[name], 0.0)
            if name in self._buffers:
                momentum = self._column("momentum", p)
                b = self._buffers[name].mul_(momentum).add_(d)
                d = d + momentum * b if self._nesterov else b
            p.addcmul_(self._column("lr", p), self._moving(d), value=-1.0)

    def state(self) -> Stack:
        """What `step` changes besides the stack: momentum buffers by parameter name (empty without momentum)."""
        return dict(self._buffers)

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned earlier."""
        for name, buffer in self._buffers.items():
            buffer.copy_(state[name])


class StackedAdam(_StackedOptimiser):
    """`torch.optim.Adam` (Kingma and Ba 2015, algorithm 1) for R stacked runs, each with its own learning rate.

    For each run at step t: m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
    p = p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps). The stack is changed in place.

    lr: one number for all runs, or R numbers; it may be changed between steps. Raises UserError for impossible values,
    ValueError for shapes that do not fit.
    """

    def __init__(
        self,
        stack: Mapping[str, torch.Tensor],
        lr: Rate,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(stack, lr=lr)
        if not all(0 <= beta < 1 for beta in betas) or not eps > 0:
            raise UserError(f"betas are {betas} and eps is {eps}: betas must lie in [0, 1), eps above 0")
        self._betas, self._eps = betas, eps
        self._steps = torch.zeros((), dtype=torch.int64)
        self._first = {name: torch.zeros_like(tensor) for name, tensor in self.stack.items()}
        self._second = {name: torch.zeros_like(tensor) for name, tensor in self.stack.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Update the stack with gradients of the same names and shapes."""
        self._steps += 1
        (b1, b2), t = self._betas, self._steps.item()
        for name, p in self.stack.items():
            g = gradients[name]
            m = self._first[name].lerp_(g, 1 - b1)
            v = self._second[name].mul_(b2).addcmul_(g, g, value=1 - b2)
            d = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt_() + self._eps)
            p.addcmul_(self._column("lr", p), self._moving(d), value=-1.0)

    def state(self) -> Stack:
        """What `step` changes besides the stack: both moments by parameter name, and the number of steps."""
        moments = {"first": self._first, "second": self._second}
        named = {f"{moment}/{name}": tensor for moment, each in moments.items() for name, tensor in each.items()}
        return {"steps": self._steps, **named}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned earlier."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


class StackedAdamW(StackedAdam):
    """`torch.optim.AdamW` (Loshchilov and Hutter 2019): `StackedAdam` after p = p - lr * weight_decay * p.

    weight_decay: one number for all runs, or R numbers.
    """

    def __init__(
        self,
        stack: Mapping[str, torch.Tensor],
        lr: Rate,
        *,
        weight_decay: Rate = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(stack, lr, betas=betas, eps=eps)
        self._rates["weight_decay"] = self._per_run("weight_decay", weight_decay)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Update the stack with gradients of the same names and shapes."""
        if self._rates["weight_decay"].any():
            for p in self.stack.values():
                p.addcmul_(self._column("lr", p), self._moving(self._column("weight_decay", p) * p), value=-1.0)
        super().step(gradients)
