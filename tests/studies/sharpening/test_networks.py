"""Networks of stacked parameters against PyTorch's own layers on the weights of one run.

`torch.nn` modules run one network at a time and know nothing of stacks, vmap or this study's parameter names.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from jacnorm.errors import UserError
from jacnorm.studies.sharpening.networks import Mlp, build
from jacnorm.studies.sharpening.settings import DescentSettings

SETTINGS = DescentSettings(width=7, hidden_layers=2, channels=3)
SMALL, LARGE = (2, 8, 8), (3, 32, 32)
IMAGES = {"mlp": SMALL, "cnn": SMALL, "vgg11": LARGE, "vgg11-bn": LARGE, "resnet18": LARGE}
WITH_NORM = ("vgg11-bn", "resnet18")
ACTIVATIONS = ("tanh", "relu", "gelu")


def generators(runs, first=0):
    return [torch.Generator().manual_seed(first + run) for run in range(runs)]


def draw(*shape, seed=5, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one(stack, run):
    return {name: tensor[run : run + 1].clone() for name, tensor in stack.items()}


def double(stack):
    return {name: tensor.double() for name, tensor in stack.items()}


def mlp(**changes):
    return build(SETTINGS, "mlp", SMALL, 4, **changes)


# ---------------------------------------------------------------------------------------------- one run and many


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("network", IMAGES)
def test_a_run_computes_the_same_alone_and_in_a_stack(network, shared):
    image = IMAGES[network]
    net = build(SETTINGS, network, image, 4)
    parameters, buffers = net.initial(generators(3)), net.buffers(3)
    x = draw(5, *image) if shared else draw(3, 5, *image)
    for training in (False, True) if net.has_batch_norm else (False,):
        together = net(parameters, buffers, x, training=training)  # (R, B, K)
        assert together.shape == (3, 5, 4)
        fresh = net.buffers(3)
        own = one(fresh, 1)
        alone = net(one(parameters, 1), own, x if shared else x[1:2], training=training)
        torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-5)
        for name, statistics in own.items():
            torch.testing.assert_close(statistics[0], buffers[name][1] if training else fresh[name][1])


@pytest.mark.parametrize("network", IMAGES)
def test_initial_parameters_depend_on_the_runs_own_generator_only(network):
    net = build(SETTINGS, network, IMAGES[network], 4)
    stack, alone = net.initial(generators(2)), net.initial(generators(1, first=1))
    assert all(torch.equal(stack[name][1:], alone[name]) for name in stack)
    assert {name: tensor.shape[1:] for name, tensor in stack.items()} == net.shapes
    assert sum(tensor[0].numel() for tensor in stack.values()) == net.size


def test_a_shared_batch_of_wide_samples_gives_what_a_batch_of_each_run_gives():
    net = build(SETTINGS, "mlp", LARGE, 4)
    parameters, x = double(net.initial(generators(3))), draw(5, *LARGE, dtype=torch.float64)
    torch.testing.assert_close(net(parameters, {}, x), net(parameters, {}, x.expand(3, *x.shape)))


# ---------------------------------------------------------------------------------------------- the mlp


@pytest.mark.parametrize("hidden", [0, 1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_mlp_is_a_sequence_of_linear_layers(activation, hidden):
    net = Mlp(SMALL, 4, width=7, hidden_layers=hidden, activation=activation)
    parameters, x = net.initial(generators(2)), draw(5, *SMALL)
    found = net.preactivations(parameters, x)
    kinds = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}
    h = x.flatten(1)
    for layer in range(1, hidden + 2):
        linear = nn.Linear(h.shape[1], 7 if layer <= hidden else 4)
        with torch.no_grad():
            linear.weight.copy_(parameters[f"weight{layer}"][1])
            linear.bias.copy_(parameters[f"bias{layer}"][1])
            z = linear(h)
        torch.testing.assert_close(found[layer - 1][1], z)
        h = kinds[activation]()(z)
    assert net.layers == len(found) == hidden + 1
    assert torch.equal(net(parameters, {}, x), found[-1])


def test_the_smoke_mlp_has_8970_parameters():
    # (64 + 1) 64 + (64 + 1) 64 + (64 + 1) 10.
    assert build(DescentSettings(), "mlp", (1, 8, 8), 10).size == 8970


def test_the_ntk_parametrisation_divides_weights_by_the_root_of_the_fan_in():
    ntk, standard = mlp(parametrisation="ntk"), mlp()
    parameters, x = double(ntk.initial(generators(2))), draw(5, *SMALL, dtype=torch.float64)
    scaled = {
        name: tensor / math.sqrt(tensor.shape[2]) if name.startswith("weight") else tensor
        for name, tensor in parameters.items()
    }
    torch.testing.assert_close(ntk(parameters, {}, x), standard(scaled, {}, x))
    assert [ntk.factor(layer) for layer in (1, 2, 3)] == [1 / math.sqrt(128), 1 / math.sqrt(7), 1 / math.sqrt(7)]
    assert [standard.factor(layer) for layer in (1, 2, 3)] == [1, 1, 1]


def test_ntk_weights_are_standard_normal_and_biases_zero():
    net = build(SETTINGS, "mlp", LARGE, 4, parametrisation="ntk")
    parameters = net.initial(generators(4))
    weights = parameters["weight1"]  # 86,016 numbers: five standard errors of their mean are 0.017
    assert abs(weights.mean().item()) < 0.017
    assert abs(weights.var().item() - 1) < 5 * math.sqrt(2 / weights.numel())
    assert all(tensor.eq(0).all() for name, tensor in parameters.items() if name.startswith("bias"))


@given(z=st.floats(-6, 6), activation=st.sampled_from(ACTIVATIONS))
def test_derivatives_of_activations_are_those_of_autograd(z, activation):
    net = mlp(activation=activation)
    point = torch.tensor([z], dtype=torch.float64, requires_grad=True)
    [slope] = torch.autograd.grad(net.activate(point).sum(), point)
    torch.testing.assert_close(net.derivative(point.detach()), slope, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------- initial values


@pytest.mark.parametrize("network", ["mlp", "cnn", "vgg11", "resnet18"])
def test_initial_values_have_pytorchs_bounds(network):
    net = build(DescentSettings(width=40, channels=40), network, IMAGES[network], 4)
    parameters = net.initial(generators(1))
    checked = 0
    for name, tensor in parameters.items():
        weight = parameters[name.replace("bias", "weight")]
        if weight.ndim == 2 or (network == "vgg11" and weight.ndim == 5):
            continue  # gains and shifts of batch norm and VGG's convolutions have tests of their own
        bound = 1 / math.sqrt(weight[0, 0].numel())
        assert tensor.abs().max() <= bound
        if tensor.numel() > 1000:
            checked += 1
            assert tensor.abs().max() > 0.99 * bound
            assert abs(tensor.var().item() / (bound**2 / 3) - 1) < 0.1
    assert checked > 0


def test_convolutions_of_vgg_are_normal_by_their_outputs():
    parameters = build(SETTINGS, "vgg11", LARGE, 10).initial(generators(1))
    for name, tensor in parameters.items():
        if tensor.ndim == 5:
            expected = math.sqrt(2 / (9 * tensor.shape[1]))
            # Five standard errors of a standard deviation from n normal numbers.
            assert abs(tensor.std().item() / expected - 1) < 5 / math.sqrt(2 * tensor.numel())
            assert parameters[name.replace("weight", "bias")].eq(0).all()


@pytest.mark.parametrize("network", WITH_NORM)
def test_batch_norm_starts_with_gain_one_and_shift_zero(network):
    net = build(SETTINGS, network, LARGE, 10)
    assert net.has_batch_norm
    parameters, buffers = net.initial(generators(1)), net.buffers(2)
    norms = [name.removesuffix(".mean") for name in buffers if name.endswith(".mean")]
    assert len(norms) == (8 if network == "vgg11-bn" else 20)
    for norm in norms:
        assert parameters[f"{norm}.weight"].eq(1).all()
        assert parameters[f"{norm}.bias"].eq(0).all()
        assert buffers[f"{norm}.mean"].eq(0).all()
        assert buffers[f"{norm}.variance"].eq(1).all()
        assert buffers[f"{norm}.mean"].shape == (2, *parameters[f"{norm}.bias"].shape[1:])


@pytest.mark.parametrize("network", ["mlp", "cnn", "vgg11"])
def test_without_batch_norm_there_are_no_running_statistics(network):
    net = build(SETTINGS, network, IMAGES[network], 4)
    assert not net.has_batch_norm
    assert net.buffers(3) == {}


# ---------------------------------------------------------------------------------------------- convolutional networks


class Ours:
    """Hands out one run's parameters in the order in which a network of `torch.nn` takes them."""

    def __init__(self, net, run=1, runs=2):
        self.parameters, self.buffers = net.initial(generators(runs)), net.buffers(runs)
        for name in self.buffers:
            # Running statistics that differ between channels and runs, so that a mixed-up one shows.
            self.buffers[name] = draw(*self.buffers[name].shape, seed=len(name)).abs() + 0.5
        self.run = run

    def into(self, module):
        """`module` in evaluation mode with the run's numbers; order of registration stands in for names."""
        ours = itertools.chain(self.parameters.values())
        statistics = iter(self.buffers.values())
        with torch.no_grad():
            for theirs in module.parameters():
                theirs.copy_(next(ours)[self.run])
            for name, theirs in module.named_buffers():
                if not name.endswith("num_batches_tracked"):
                    theirs.copy_(next(statistics)[self.run])
        assert next(ours, None) is None
        assert next(statistics, None) is None
        return module.eval()


def sequence(*layers):
    return nn.Sequential(*layers)


def vgg(norm):
    layers, inputs = [], 3
    for block in ([64], [128], [256, 256], [512, 512], [512, 512]):
        for outputs in block:
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1),
                *([nn.BatchNorm2d(outputs)] if norm else []),
                nn.ReLU(),
            ]
            inputs = outputs
        layers.append(nn.MaxPool2d(2, 2))
    head = [nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return sequence(*layers, nn.Flatten(), *head)


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.branch = sequence(
            *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.skip = sequence()
        if inputs != outputs:
            self.skip = sequence(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return functional.relu(self.branch(x) + self.skip(x))


def resnet():
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [Residual(a, b, s) if first else Residual(b, b, 1) for a, b, s in stages for first in (True, False)]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return sequence(*stem, *blocks, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))


@pytest.mark.parametrize(
    ("network", "size", "theirs"),
    [
        ("vgg11", 9_750_922, lambda: vgg(False)),
        ("vgg11-bn", 9_756_426, lambda: vgg(True)),
        ("resnet18", 11_173_962, resnet),
    ],
)
def test_large_networks_are_those_of_torch(network, size, theirs):
    net = build(SETTINGS, network, LARGE, 10)
    assert net.size == size
    ours, x = Ours(net), draw(2, *LARGE)
    with torch.no_grad():
        torch.testing.assert_close(
            net(ours.parameters, ours.buffers, x)[1], ours.into(theirs())(x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_cnn_is_that_of_torch(activation):
    net = build(SETTINGS, "cnn", SMALL, 4, activation=activation, channels=5)
    kind = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}[activation]
    layers = [nn.Conv2d(2, 5, 3, padding=1), kind(), nn.AvgPool2d(2), nn.Conv2d(5, 5, 3, padding=1), kind()]
    ours, x = Ours(net), draw(3, *SMALL)
    theirs = ours.into(sequence(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(20, 4)))
    torch.testing.assert_close(net(ours.parameters, {}, x)[1], theirs(x))


@pytest.mark.parametrize("momentum", [0.1, 1.0])
@pytest.mark.parametrize("network", WITH_NORM)
def test_training_moves_running_statistics_as_torch_does(network, momentum):
    net = build(SETTINGS, network, LARGE, 10)
    ours, x = Ours(net), draw(2, *LARGE)
    theirs = ours.into(vgg(True) if network == "vgg11-bn" else resnet()).train()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    with torch.no_grad():
        logits = net(ours.parameters, ours.buffers, x, training=True, momentum=momentum)
        torch.testing.assert_close(logits[1], theirs(x), rtol=1e-3, atol=1e-4)
    expected = [each for name, each in theirs.named_buffers() if not name.endswith("num_batches_tracked")]
    for found, wanted in zip(ours.buffers.values(), expected, strict=True):
        torch.testing.assert_close(found[1], wanted, rtol=1e-3, atol=1e-4)


def test_evaluation_leaves_running_statistics_alone_and_separates_samples():
    net = build(SETTINGS, "vgg11-bn", LARGE, 10)
    parameters, buffers, x = net.initial(generators(1)), net.buffers(1), draw(3, *LARGE)
    before = {name: tensor.clone() for name, tensor in buffers.items()}
    net(parameters, buffers, x, training=True, momentum=0.0)
    logits = net(parameters, buffers, x)
    assert all(torch.equal(buffers[name], before[name]) for name in before)
    torch.testing.assert_close(logits[:, :1], net(parameters, buffers, x[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_second_derivatives_are_differences_of_gradients(network, shared):
    net = build(SETTINGS, network, SMALL, 4)
    parameters = double(net.initial(generators(2)))
    x = draw(*(() if shared else (2,)), 3, *SMALL, dtype=torch.float64)
    direction = {name: draw(*tensor.shape, seed=8, dtype=torch.float64) for name, tensor in parameters.items()}

    def gradient(at, **options):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in at.items()}
        loss = net(leaves, {}, x).square().sum()
        return list(leaves.values()), torch.autograd.grad(loss, list(leaves.values()), **options)

    leaves, found = gradient(parameters, create_graph=True)
    products = torch.autograd.grad(found, leaves, list(direction.values()))
    step = 1e-5
    ahead, behind = (
        gradient({name: tensor + sign * step * direction[name] for name, tensor in parameters.items()})[1]
        for sign in (1, -1)
    )
    for product, after, before in zip(products, ahead, behind, strict=True):
        torch.testing.assert_close(product, (after - before) / (2 * step), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("shape", [(5, 2, 8, 7), (4, 5, 2, 8, 8), (2, 8, 8), (5, 128), (1, 1, 1, 2, 8, 8)])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_inputs_of_another_shape_are_refused(network, shape):
    net = build(SETTINGS, network, SMALL, 4)
    with pytest.raises(ValueError, match=r"this stack expects \(B, \*\(2, 8, 8\)\) or \(3, B, "):
        net(net.initial(generators(3)), {}, torch.zeros(shape))


def test_no_generator_is_refused():
    with pytest.raises(ValueError, match=r"give one torch\.Generator per run"):
        mlp().initial([])


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="network is 'vgg13'; it must be one of mlp, cnn, vgg11, vgg11-bn, resnet18"):
        build(SETTINGS, "vgg13", LARGE, 10)


@pytest.mark.parametrize(("network", "image"), [("vgg11", (1, 8, 8)), ("vgg11-bn", (3, 32, 31)), ("cnn", (1, 3, 8))])
def test_images_that_are_too_small_are_one_sentence(network, image):
    with pytest.raises(UserError, match=rf"^networks names {network}, which halves its images \d times, but they have"):
        build(SETTINGS, network, image, 10)


def test_vgg_takes_larger_images():
    net = build(SETTINGS, "vgg11", (1, 64, 32), 10)
    assert net(net.initial(generators(1)), {}, torch.zeros(1, 1, 64, 32)).shape == (1, 1, 10)
