"""The functional networks against torch's own modules, which know nothing of convolutions as matrix products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jacnorm.errors import UserError
from jacnorm.studies.fedgtst.networks import build

torch.set_num_threads(1)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def weights_of(module, network, layers):
    """The module's parameters under the network's names; layers: names in the module's order of parameters."""
    found = dict(zip(layers, module.parameters(), strict=True))
    assert {name: tuple(p.shape) for name, p in found.items()} == network.shapes
    return {name: found[name].detach() for name in network.shapes}


def module_for(side):
    if side == 8:
        body = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        body += [nn.Conv2d(6, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(64, 84), nn.ReLU(), nn.Linear(84, 10))
    after = {28: 5, 32: 5, 64: 13}[side]
    body = [nn.Conv2d(3, 6, 5, padding=2 if side == 28 else 0), nn.ReLU(), nn.MaxPool2d(2)]
    body += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    body += [nn.Linear(16 * after**2, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*body)


@pytest.mark.parametrize(("side", "size"), [(8, 7_358), (28, 62_006), (32, 62_006), (64, 16 * 169 * 120 + 14_006)])
def test_lenet_is_the_network_of_layers(side, size):
    network = build("lenet", (3, side, side), 10)
    module = module_for(side)
    assert network.size == size == sum(p.numel() for p in module.parameters())
    weights = weights_of(module, network, list(network.shapes))
    x = torch.randn(5, 3, side, side, generator=stream())
    torch.testing.assert_close(network.logits(weights, x), module(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network.features(weights, x), module[:-1](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [8, 28])
def test_lenet_has_the_gradients_of_the_layers_though_the_background_ties(side):
    # In float64, for in float32 rounding may decide a near tie otherwise.
    network, module = build("lenet", (3, side, side), 10), module_for(side).double()
    weights = weights_of(module, network, list(network.shapes))
    x = torch.randn(4, 3, side, side, generator=stream(), dtype=torch.float64)
    x[:, :, : side // 2] = -0.5  # pools over equal pixels, as a digit's background gives them
    y = torch.tensor([0, 3, 9, 3])
    nn.functional.cross_entropy(module(x), y).backward()
    found = torch.func.grad(lambda w: nn.functional.cross_entropy(network.logits(w, x), y))(weights)
    for g, p in zip(found.values(), module.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-12, atol=1e-14)


class Block(nn.Module):
    def __init__(self, inputs, channels, stride):
        super().__init__()
        self.first = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(32, channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(32, channels)
        if stride == 2:
            self.shortcut = nn.Conv2d(inputs, channels, 1, 2, bias=False)
            self.shortcut_norm = nn.GroupNorm(32, channels)

    def forward(self, x):
        z = self.second_norm(self.second(self.first_norm(self.first(x)).relu()))
        return (z + (self.shortcut_norm(self.shortcut(x)) if hasattr(self, "shortcut") else x)).relu()


class ResNet18(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.GroupNorm(32, 64)
        inputs = 64
        for stage, channels in enumerate((64, 128, 256, 512), 1):
            for letter in "ab":
                stride = 2 if stage > 1 and letter == "a" else 1
                self.add_module(f"block{stage}{letter}", Block(inputs, channels, stride))
                inputs = channels
        self.read_out = nn.Linear(512, classes)

    def forward(self, x):
        x = self.stem_norm(self.stem(x)).relu()
        for name, block in self.named_children():
            x = block(x) if name.startswith("block") else x
        return self.read_out(x.mean((2, 3)))


def test_resnet18_is_the_network_of_layers():
    network, module = build("resnet18", (3, 16, 16), 7), ResNet18(7)
    names = [name for name, _ in module.named_parameters()]
    weights = weights_of(module, network, names)
    x = torch.randn(3, 3, 16, 16, generator=stream())
    torch.testing.assert_close(network.logits(weights, x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "side"), [("lenet", 8), ("lenet", 28), ("resnet18", 8)])
@pytest.mark.parametrize("probabilistic", [False, True])
def test_networks_are_mapped_and_differentiated_twice(name, side, probabilistic):
    network = build(name, (3, side, side), 4, probabilistic=probabilistic)
    each = [network.parameters(stream(seed)) for seed in range(2)]
    stack = {n: torch.stack([one[n] for one in each]) for n in each[0]}
    x = torch.randn(2, 3, 3, side, side, generator=stream())
    y = torch.tensor([[0, 1, 2], [3, 2, 2]])

    def penalised(w, x, y):
        def loss(w):
            return nn.functional.cross_entropy(network.logits(w, x), y)

        return loss(w) + sum(g.square().sum() for g in torch.func.grad(loss)(w).values())

    mapped = torch.func.vmap(torch.func.grad(penalised))(stack, x, y)
    for run, one in enumerate(each):
        alone = torch.func.grad(penalised)(one, x[run], y[run])
        for n, g in alone.items():
            torch.testing.assert_close(mapped[n][run], g, rtol=1e-3, atol=1e-4 * float(g.abs().max() + 1e-6))


@pytest.mark.parametrize(("name", "side"), [("lenet", 8), ("lenet", 32), ("resnet18", 8)])
def test_random_features_have_a_mean_that_is_not_cut_off_and_a_positive_deviation(name, side):
    network = build(name, (3, side, side), 4, probabilistic=True)
    weights = network.parameters(stream())
    x = torch.randn(6, 3, side, side, generator=stream())
    mean, deviation = network.distribution(weights, x)
    assert mean.shape == deviation.shape == (6, network.feature_width)
    assert (mean < 0).any()
    assert (deviation > 0).all()
    assert torch.equal(network.features(weights, x), mean)
    noise = torch.randn(6, network.feature_width, generator=stream(1))
    sampled = network.logits(weights, x, noise)
    torch.testing.assert_close(sampled, network.read_out(weights, mean + deviation * noise))
    torch.testing.assert_close(network.logits(weights, x, torch.zeros_like(noise)), network.logits(weights, x))


def test_weights_start_as_torch_starts_them():
    network = build("lenet", (3, 32, 32), 10)
    weights = network.parameters(stream())
    assert list(weights) == list(network.shapes)
    for name, fan_in in {"convolution1": 75, "convolution2": 150, "dense1": 400, "read_out": 84}.items():
        for part in ("weight", "bias"):
            assert weights[f"{name}.{part}"].abs().max() <= fan_in**-0.5
        assert weights[f"{name}.weight"].abs().max() > 0.95 * fan_in**-0.5
    again = network.parameters(stream())
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert network.head_names == ("read_out.weight", "read_out.bias")
    norms = build("resnet18", (3, 8, 8), 2).parameters(stream())
    assert norms["stem_norm.weight"].eq(1).all()
    assert norms["stem_norm.bias"].eq(0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vgg", (3, 8, 8), 10), 'network "vgg" is unknown: choose one of lenet, resnet18'),
        (("lenet", (1, 8, 8), 10), r"network lenet takes square images of 3 channels, not of shape \(1, 8, 8\)"),
        (("resnet18", (3, 8, 16), 10), "takes square images"),
        (("lenet", (3, 16, 16), 10), "lenet takes images of 8, 28, 32 or 64 pixels a side, not 16"),
        (("resnet18", (3, 4, 4), 10), "resnet18 takes images of at least 8 pixels a side, not 4"),
    ],
)
def test_impossible_networks_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        build(*arguments)
