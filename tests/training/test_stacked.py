"""Stacked runs against the same runs one by one in plain PyTorch: the oracle shares no code with the stacking."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jacnorm.errors import UserError
from jacnorm.training.stacked import (
    StackedAdam,
    StackedAdamW,
    StackedSGD,
    forward,
    gradients,
    losses_and_gradients,
    stack_parameters,
    unstack,
)

RATES = (0.02, 0.1, 0.3)
TOLERANCE = {"rtol": 1e-12, "atol": 1e-13}


def modules(seed: int = 0) -> list[nn.Module]:
    generator = torch.Generator().manual_seed(seed)
    nets = []
    for _ in RATES:
        net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 2))
        for parameter in net.double().parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        nets.append(net)
    return nets


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (len(RATES), 7, 2, 4)
    return [
        (
            torch.randn(shape, dtype=torch.float64, generator=generator),
            torch.randint(2, shape[:2], generator=generator),
        )
        for _ in range(steps)
    ]


def loss_of(net: nn.Module):
    apply = forward(net)
    return lambda parameters, x, y: nn.functional.cross_entropy(apply(parameters, x), y)


def masks_for(net: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.rand(len(RATES), *parameter.shape, generator=generator) < 0.5
        for name, parameter in net.named_parameters()
        if name.endswith("weight")
    }


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("momentum", "nesterov", "decay"),
    [(0.0, False, 0.0), (0.9, False, 0.0), (0.9, False, 0.01), (0.8, True, 0.01), (0.0, False, 0.1)],
)
def test_each_run_moves_as_under_torch_sgd_alone(momentum, nesterov, decay, masked):
    alone, stack = modules(), stack_parameters(modules())
    masks = masks_for(alone[0]) if masked else {}
    optimiser = StackedSGD(stack, RATES, momentum=momentum, weight_decay=decay, nesterov=nesterov, masks=masks)
    peers = [
        torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum, weight_decay=decay, nesterov=nesterov)
        for net, rate in zip(alone, RATES, strict=True)
    ]
    with torch.no_grad():
        for run, net in enumerate(alone):
            for name, mask in masks.items():
                net.get_parameter(name).mul_(mask[run])
    start = {name: tensor.clone() for name, tensor in stack.items()}
    for number, (x, y) in enumerate(batches(12)):
        if number == 6:  # a schedule
            optimiser.lr = optimiser.lr / 2
            for peer in peers:
                peer.param_groups[0]["lr"] /= 2
        losses, slopes = losses_and_gradients(loss_of(alone[0]), stack, x, y)
        optimiser.step(slopes)
        for run, (net, peer) in enumerate(zip(alone, peers, strict=True)):
            peer.zero_grad()
            loss = nn.functional.cross_entropy(net(x[run]), y[run])
            loss.backward()
            for name, mask in masks.items():
                net.get_parameter(name).grad.mul_(mask[run])
            peer.step()
            torch.testing.assert_close(losses[run], loss.detach(), **TOLERANCE)
    for run, net in enumerate(alone):
        torch.testing.assert_close(unstack(stack, run), dict(net.state_dict()), **TOLERANCE)
    assert all((stack[name] - start[name]).abs().flatten(1).amax(1).min() > 1e-3 for name in stack)
    for name, mask in masks.items():
        assert not stack[name][~mask].any()


def test_momentum_and_decay_of_each_run():
    stack = stack_parameters(modules())
    momentum, decay = (0.0, 0.5, 0.9), torch.tensor([0.1, 0.0, 0.01], dtype=torch.float64)
    optimiser = StackedSGD(stack, 0.1, momentum=momentum, weight_decay=decay)
    for _ in range(4):
        optimiser.step({name: torch.ones_like(tensor) for name, tensor in stack.items()})
    for run, net in enumerate(modules()):
        peer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=momentum[run], weight_decay=decay[run].item())
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        for _ in range(4):
            peer.step()
        torch.testing.assert_close(unstack(stack, run), dict(net.state_dict()), **TOLERANCE)


def test_a_run_does_not_depend_on_its_neighbours():
    stack, (x, y) = stack_parameters(modules()), batches(1)[0]
    _, before = losses_and_gradients(loss_of(modules()[0]), stack, x, y)
    stack["0.weight"][1] = torch.nan
    losses, after = losses_and_gradients(loss_of(modules()[0]), stack, x, y)
    assert losses.isfinite().tolist() == [True, False, True]
    for name in stack:
        assert torch.equal(before[name][[0, 2]], after[name][[0, 2]])


def test_losses_of_the_whole_stack_written_by_hand():
    generator = torch.Generator().manual_seed(3)
    stack = {"w": torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)}
    x = torch.randn(3, 6, 5, dtype=torch.float64, generator=generator)
    values, slopes = gradients(lambda leaves: (x @ leaves["w"].mT).square().mean((1, 2)), stack)
    for run in range(3):
        torch.testing.assert_close(values[run], (x[run] @ stack["w"][run].T).square().mean(), **TOLERANCE)
        by_hand = 2 * (x[run] @ stack["w"][run].T).T @ x[run] / (6 * 4)
        torch.testing.assert_close(slopes["w"][run], by_hand, **TOLERANCE)
    assert not values.requires_grad


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
@pytest.mark.parametrize("decays", [None, (0.0, 0.3, 0.01), (0.0, 0.0, 0.0)])
def test_each_run_moves_as_under_torch_adam_alone(betas, decays):
    alone, stack = modules(), stack_parameters(modules())
    if decays is None:
        optimiser = StackedAdam(stack, RATES, betas=betas, eps=1e-6)
    else:
        optimiser = StackedAdamW(stack, RATES, weight_decay=decays, betas=betas, eps=1e-6)
    peers = [
        torch.optim.AdamW(net.parameters(), lr=rate, betas=betas, eps=1e-6, weight_decay=decay)
        for net, rate, decay in zip(alone, RATES, decays or [0.0] * 3, strict=True)
    ]
    for x, y in batches(6):
        _, slopes = losses_and_gradients(loss_of(alone[0]), stack, x, y)
        optimiser.step(slopes)
        for run, (net, peer) in enumerate(zip(alone, peers, strict=True)):
            peer.zero_grad()
            nn.functional.cross_entropy(net(x[run]), y[run]).backward()
            peer.step()
    for run, net in enumerate(alone):
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(stack[name][run], parameter.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1)])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(UserError, match=r"betas are .*: betas must lie in \[0, 1\), eps above 0"):
        StackedAdam({"w": torch.ones(2, 3)}, 0.1, betas=betas)


OPTIMISERS = {
    "plain": lambda stack: StackedSGD(stack, 0.1),
    "momentum": lambda stack: StackedSGD(stack, 0.1, momentum=0.9),
    "adam": lambda stack: StackedAdam(stack, 0.1),
    "adamw": lambda stack: StackedAdamW(stack, 0.1, weight_decay=0.3),
}


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_frozen_runs_stay_as_they_are(kind):
    stack, other = stack_parameters(modules()), stack_parameters(modules())
    frozen, free = OPTIMISERS[kind](stack), OPTIMISERS[kind](other)
    slopes = {name: torch.ones_like(tensor) for name, tensor in stack.items()}
    for optimiser in (frozen, free):
        optimiser.step(slopes)
    kept = unstack(stack, 1)
    frozen.freeze(torch.tensor([False, True, False]))
    for tensor in slopes.values():
        tensor[1] = torch.nan
    for optimiser in (frozen, free):
        optimiser.step(slopes)
    torch.testing.assert_close(unstack(stack, 1), kept, rtol=0, atol=0)
    for run in (0, 2):
        torch.testing.assert_close(unstack(stack, run), unstack(other, run), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_optimiser_state_comes_back(kind):
    slopes = {name: torch.ones_like(tensor) for name, tensor in stack_parameters(modules()).items()}
    one, two = stack_parameters(modules()), stack_parameters(modules())
    first = OPTIMISERS[kind](one)
    first.step(slopes)
    second = OPTIMISERS[kind](two)
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    for name, tensor in one.items():
        two[name].copy_(tensor)
    for optimiser in (first, second):
        optimiser.step(slopes)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert StackedSGD(one, 0.1).state() == {}


def test_forward_and_unstack_are_the_module():
    nets, (x, _) = modules(), batches(1)[0]
    stack = stack_parameters(nets)
    stack["3.bias"] += 1.0  # the stack is a copy, and the module's own parameters are not used
    twin = modules(seed=5)[0]
    twin.load_state_dict(unstack(stack, 2))
    torch.testing.assert_close(forward(nets[0])(unstack(stack, 2), x[2]), twin(x[2]), **TOLERANCE)
    assert not torch.equal(nets[2](x[2]), twin(x[2]))


def test_modules_that_cannot_be_stacked_are_refused():
    with pytest.raises(UserError, match="no modules to stack"):
        stack_parameters([])
    with pytest.raises(UserError, match="module 1 has other parameters than module 0"):
        stack_parameters([nn.Linear(2, 3), nn.Linear(3, 2)])
    with pytest.raises(UserError, match=r"module 0 has buffers \(running_mean"):
        stack_parameters([nn.BatchNorm1d(3)])


@pytest.mark.parametrize("rate", ["lr", "momentum", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), torch.tensor([0.1, -0.1])])
def test_impossible_rates_are_refused(rate, value):
    with pytest.raises(UserError, match=f"^{rate} is .*finite number >= 0"):
        StackedSGD({"w": torch.ones(2, 3)}, **{"lr": 0.1, rate: value})


def test_impossible_combinations_are_refused():
    stack = {"w": torch.ones(2, 3)}
    with pytest.raises(UserError, match="nesterov needs a momentum above 0"):
        StackedSGD(stack, 0.1, nesterov=True)
    with pytest.raises(ValueError, match="give one number or one for each of 2 runs"):
        StackedSGD(stack, torch.ones(3))
    with pytest.raises(ValueError, match="must agree on the number of runs"):
        StackedSGD({"w": torch.ones(2, 3), "v": torch.ones(3, 3)}, 0.1)
    for name, mask in [("v", torch.ones(2, 3).bool()), ("w", torch.ones(3).bool()), ("w", torch.ones(2, 3))]:
        with pytest.raises(ValueError, match=f'mask "{name}" must be bool'):
            StackedSGD(stack, 0.1, masks={name: mask})
