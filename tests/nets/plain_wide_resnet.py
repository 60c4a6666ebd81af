"""The WideResNet written again as ordinary modules, one run at a time: an oracle that shares no code with the stack.

Modules are in the order of the forward pass, so parameters are matched by position in each kind of module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Shift(nn.Module):
    """A bias per channel, in place of a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.view(1, -1, 1, 1)


NORMS = {"batch": nn.BatchNorm2d, "layer": lambda width: nn.GroupNorm(1, width), "none": Shift}


class PlainBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, first_of_group: bool, norm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        if first_of_group:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        else:
            self.shortcut = None
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(h)
        return kept + self.second(torch.relu(self.norm2(self.first(h))))


class PlainWideResNet(nn.Module):
    def __init__(self, depth: int, stem: int, channels: int, classes: int, colours: int, normalisation: str) -> None:
        super().__init__()
        norm = NORMS[normalisation]
        self.stem, self.stem_norm = nn.Conv2d(colours, stem, 3, 1, 1, bias=False), norm(stem)
        self.groups, inputs = nn.ModuleList(), stem
        for number in range(3):
            outputs = channels * 2**number
            blocks = []
            for index in range((depth - 4) // 6):
                stride = 2 if number and not index else 1
                blocks.append(PlainBlock(inputs, outputs, stride, index == 0, norm))
                inputs = outputs
            self.groups.append(nn.Sequential(*blocks))
        self.norm, self.linear = norm(inputs), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem_norm(self.stem(x)))
        for group in self.groups:
            h = group(h)
        return self.linear(torch.relu(self.norm(h)).mean((2, 3)))

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """In the order in which they are applied: of a block the shortcut, the first, the second."""
        return [module for module in self.modules() if isinstance(module, nn.Conv2d)]

    @property
    def norms(self) -> list[nn.Module]:
        inner = [norm for group in self.groups for block in group for norm in (block.norm1, block.norm2)]
        return [self.stem_norm, *inner, self.norm]


def pairs(plain: PlainWideResNet, net) -> dict[str, nn.Parameter]:
    """Parameters of the plain network by the name that the stack gives them."""
    found = {}
    for convolution, module in zip(net.convolutions, plain.convolutions, strict=True):
        found[convolution.weight] = module.weight
    for name, module in zip(net.norms, plain.norms, strict=True):
        if not isinstance(module, Shift):
            found[f"{name}.gain"] = module.weight
        found[f"{name}.shift"] = module.bias
    return {**found, "linear.weight": plain.linear.weight, "linear.bias": plain.linear.bias}


def statistics(plain: PlainWideResNet, net) -> dict[str, Tensor]:
    """Running statistics of the plain network by the name that the stack gives them."""
    found = {}
    for name, module in zip(net.norms, plain.norms, strict=True):
        found[f"{name}.mean"], found[f"{name}.variance"] = module.running_mean, module.running_var
    return found


def plain_of(net, depth: int, parameters, buffers, run: int) -> PlainWideResNet:
    """Run number `run` of a stack as a plain network, in the dtype of the parameters."""
    plain = PlainWideResNet(
        depth, net.stem.outputs, net.groups[0][0].first.outputs, net.classes, net.image[0], net.normalisation
    ).to(parameters["linear.bias"].dtype)
    with torch.no_grad():
        for name, parameter in pairs(plain, net).items():
            parameter.copy_(parameters[name][run])
        for name, statistic in statistics(plain, net).items() if buffers else ():
            statistic.copy_(buffers[name][run])
    return plain
