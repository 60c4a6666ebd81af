"""Stacked WideResNets against the same networks written as ordinary modules, and against sizes computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tests.nets.plain_wide_resnet import pairs, plain_of, statistics

from jacnorm.nets.wide_resnet import Convolution, Pass, StackedWideResNet, per_run

torch.set_num_threads(1)

RUNS, BATCH, CLASSES, IMAGE = 3, 5, 4, (2, 6, 10)
NORMALISATIONS = ["batch", "layer", "none"]


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + number) for number in range(count)]


def made(normalisation, depth=16, runs=RUNS, image=IMAGE):
    """A stack in float64 whose parameters are all away from their initial values."""
    net = StackedWideResNet(runs, depth, 3, 4, CLASSES, image, normalisation)
    noise = torch.Generator().manual_seed(7)
    parameters = {
        name: tensor.double() + 0.2 * torch.randn(tensor.shape, generator=noise, dtype=torch.float64)
        for name, tensor in net.initial(generators(runs)).items()
    }
    return net, parameters, {name: tensor.double() for name, tensor in net.buffers().items()}


def images(runs=RUNS, batch=BATCH, image=IMAGE, seed=3):
    return torch.randn(runs, batch, *image, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(runs=RUNS):
    return torch.arange(runs * BATCH).view(runs, BATCH) % CLASSES


def loss_of(logits, target):
    return torch.nn.functional.cross_entropy(logits, target, reduction="sum")


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("depth", [10, 16])
def test_each_run_is_the_plain_network_in_training_and_evaluation(normalisation, depth):
    net, parameters, buffers = made(normalisation, depth)
    x, target = images(), labels()
    plain = [plain_of(net, depth, parameters, buffers, run) for run in range(RUNS)]
    leaves = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
    logits = net(leaves, buffers, x, training=True).logits
    gradients = torch.autograd.grad(loss_of(logits.flatten(0, 1), target.flatten()), list(leaves.values()))
    evaluated = net(parameters, buffers, x, training=False).logits
    for run, module in enumerate(plain):
        expected = module.train()(x[run])
        torch.testing.assert_close(logits[run], expected)
        loss_of(expected, target[run]).backward()
        own = {name: parameter.grad for name, parameter in pairs(module, net).items()}
        assert own.keys() == leaves.keys()
        for name, gradient in zip(leaves, gradients, strict=True):
            torch.testing.assert_close(gradient[run], own[name], msg=name)
        if normalisation == "batch":
            expected_statistics = statistics(module, net)
            assert expected_statistics.keys() == buffers.keys()
            for name, statistic in expected_statistics.items():
                torch.testing.assert_close(buffers[name][run], statistic, msg=name)
        torch.testing.assert_close(evaluated[run], module.eval()(x[run]))


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_a_run_computes_the_same_alone_and_stacked(normalisation):
    net, parameters, buffers = made(normalisation)
    x = images()
    together = net(parameters, buffers, x, training=True)
    for run in range(RUNS):
        single = StackedWideResNet(1, 16, 3, 4, CLASSES, IMAGE, normalisation)
        statistics_alone = {name: tensor.double() for name, tensor in single.buffers().items()}
        own = {name: tensor[run : run + 1] for name, tensor in parameters.items()}
        alone = single(own, statistics_alone, x[run : run + 1], training=True)
        torch.testing.assert_close(alone.logits[0], together.logits[run])
        for name in ("normalised", "groups", "blocks"):
            for one, all_ in zip(getattr(alone, name), getattr(together, name), strict=True):
                torch.testing.assert_close(one, per_run(all_, RUNS)[run])
        for name, statistic in statistics_alone.items():
            torch.testing.assert_close(statistic[0], buffers[name][run])


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_second_derivatives_are_those_of_the_plain_network(normalisation):
    net, parameters, buffers = made(normalisation, 10)
    x = images()
    leaves = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
    passed = net(leaves, buffers, x, training=True)
    inner = torch.autograd.grad(passed.logits[:, :, 0].square().sum(), passed.normalised[2], create_graph=True)[0]
    second = torch.autograd.grad(inner.square().sum(), leaves["group1.block1.second.weight"])[0]
    for run in range(RUNS):
        plain = plain_of(net, 10, parameters, net.buffers(), run).train()
        seen = []
        hook = plain.groups[0][0].norm2.register_forward_hook(
            lambda module, taken, given, seen=seen: seen.append(given)
        )
        output = plain(x[run])
        hook.remove()
        own = torch.autograd.grad(output[:, 0].square().sum(), seen[0], create_graph=True)[0]
        expected = torch.autograd.grad(own.square().sum(), plain.groups[0][0].second.weight)[0]
        torch.testing.assert_close(second[run], expected)


@pytest.mark.parametrize(
    ("depth", "millions", "billions"),
    [(16, 17.12, 2.41), (22, 26.8, 3.83), (28, 36.5, 5.24), (34, 46.2, 6.66), (40, 55.8, 8.07)],
)
def test_parameters_multiply_adds_and_norms_of_the_published_widths(depth, millions, billions):
    net = StackedWideResNet(1, depth, 16, 160, 10, (3, 32, 32))
    parameters = sum(math.prod(shape) for shape in net.shapes().values())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.5 * 10 ** -(2 if depth == 16 else 1))
    products = sum(c.inputs * c.outputs * c.kernel**2 * math.prod(c.output_size) for c in net.convolutions)
    assert (products + 640 * 10) / 1e9 == pytest.approx(billions, abs=0.005)
    assert len(net.norms) == depth - 2  # 14 for 16 layers
    assert len(net.convolutions) == depth  # stem, two in each of 3 n blocks, three shortcuts: 6 n + 4


def test_a_pass_holds_the_places_that_its_names_say():
    net, parameters, buffers = made("batch")
    passed = net(parameters, buffers, images(), training=False)
    assert [len(found) for found in (passed.normalised, passed.groups, passed.blocks)] == [14, 3, 6]
    assert all(group is passed.blocks[2 * number + 1] for number, group in enumerate(passed.groups))
    assert [tuple(group.shape) for group in passed.groups] == [(5, 12, 6, 10), (5, 24, 3, 5), (5, 48, 2, 3)]
    assert [layer.name for layer in passed.layers] == [*(each.name for each in net.convolutions), "linear"]
    for convolution, layer in zip(net.convolutions, passed.layers[:-1], strict=True):
        assert layer.input.shape[2:] == convolution.size
        assert layer.output.shape[2:] == convolution.output_size
        for run in range(RUNS):
            expected = torch.nn.functional.conv2d(
                per_run(layer.input, RUNS)[run],
                parameters[convolution.weight][run],
                stride=convolution.stride,
                padding=convolution.kernel // 2,
            )
            torch.testing.assert_close(per_run(layer.output, RUNS)[run], expected)
    pooled = per_run(torch.relu(passed.normalised[-1]), RUNS).mean((3, 4))
    torch.testing.assert_close(passed.layers[-1].input, pooled)
    assert passed.layers[-1].output is passed.logits
    assert Pass(passed.logits, [], [], []).layers == ()


def test_initial_weights_have_the_stated_deviations():
    net = StackedWideResNet(1, 10, 16, 32, 10, (3, 8, 8))
    initial = net.initial(generators(1))
    for convolution in net.convolutions:
        deviation = math.sqrt(2 / (convolution.kernel**2 * convolution.outputs))
        weights = initial[convolution.weight]
        assert weights.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * weights.numel()))
    assert initial["linear.weight"].abs().max() <= 1 / math.sqrt(128)
    assert initial["linear.weight"].std().item() == pytest.approx(1 / math.sqrt(3 * 128), rel=0.05)
    for name, tensor in initial.items():
        if name.endswith((".gain", ".shift", ".bias")):
            assert (tensor == (1 if name.endswith(".gain") else 0)).all()
    buffers = net.buffers()
    assert all((tensor == (0 if name.endswith(".mean") else 1)).all() for name, tensor in buffers.items())
    assert len(buffers) == 2 * len(net.norms)


def test_without_norms_blocks_start_as_their_shortcuts():
    net = StackedWideResNet(2, 22, 3, 4, CLASSES, IMAGE, "none")
    initial, plain = net.initial(generators(2)), StackedWideResNet(2, 22, 3, 4, CLASSES, IMAGE).initial(generators(2))
    assert net.buffers() == {}
    assert not any(name.endswith(".gain") for name in initial)
    for block in net.blocks:  # nine of them
        assert torch.equal(initial[block.first.weight], plain[block.first.weight] / 3)
        assert not initial[block.second.weight].any()
    passed = net(initial, {}, images(2).float(), training=True)
    shortcuts = [layer.output for layer in passed.layers if layer.name.endswith("shortcut")]
    for group, shortcut in zip(passed.groups, shortcuts, strict=True):
        assert torch.equal(group, shortcut)  # the other blocks are the identity


def test_a_runs_weights_depend_on_its_own_generator_only():
    stacked = StackedWideResNet(3, 10, 3, 4, CLASSES, IMAGE).initial(generators(3, first=5))
    alone = StackedWideResNet(1, 10, 3, 4, CLASSES, IMAGE).initial(generators(1, first=6))
    for name, tensor in alone.items():
        assert torch.equal(stacked[name][1], tensor[0])


def test_statistics_move_by_the_momentum_asked_for():
    net, parameters, buffers = made("batch", 10)
    x = images()
    before = {name: tensor.clone() for name, tensor in buffers.items()}
    passed = net(parameters, buffers, x, training=True, momentum=1.0)
    stem = per_run(passed.layers[0].output, RUNS)  # (R, B, C, H, W)
    torch.testing.assert_close(buffers["stem.norm.mean"], stem.mean((1, 3, 4)))
    torch.testing.assert_close(buffers["stem.norm.variance"], stem.var((1, 3, 4)))
    whole = {name: tensor.clone() for name, tensor in buffers.items()}
    buffers = {name: tensor.clone() for name, tensor in before.items()}
    net(parameters, buffers, x, training=True)
    for name, tensor in buffers.items():
        torch.testing.assert_close(tensor, 0.9 * before[name] + 0.1 * whole[name])
    kept = {name: tensor.clone() for name, tensor in buffers.items()}
    net(parameters, buffers, x, training=False)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in buffers.items())


@pytest.mark.parametrize(("length", "stride", "expected"), [(8, 1, 8), (8, 2, 4), (7, 2, 4), (1, 2, 1)])
def test_output_sizes(length, stride, expected):
    for kernel in (1, 3):
        found = Convolution("c", 1, 1, kernel, stride, (length, length))
        y = torch.nn.functional.conv2d(
            torch.zeros(1, 1, length, length), torch.zeros(1, 1, kernel, kernel), stride=stride, padding=kernel // 2
        )
        assert found.output_size == tuple(y.shape[2:]) == (expected, expected)


@pytest.mark.parametrize("depth", [4, 9, 12, 18])
def test_impossible_depths_are_refused(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}; a WideResNet has 10, 16"):
        StackedWideResNet(1, depth, 3, 4, CLASSES, IMAGE)


@pytest.mark.parametrize("change", [{"runs": 0}, {"stem": 0}, {"channels": -1}, {"classes": 0}, {"image": (1, 0, 8)}])
def test_impossible_sizes_are_refused(change):
    sizes = {"runs": 1, "depth": 10, "stem": 3, "channels": 4, "classes": 4, "image": IMAGE, **change}
    with pytest.raises(ValueError, match="must be at least 1"):
        StackedWideResNet(**sizes)


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="'group'; it must be one of batch, layer, none"):
        StackedWideResNet(1, 10, 3, 4, CLASSES, IMAGE, "group")


def test_each_run_needs_a_generator():
    with pytest.raises(ValueError, match="2 generators for 3 runs"):
        StackedWideResNet(3, 10, 3, 4, CLASSES, IMAGE).initial(generators(2))


@pytest.mark.parametrize("shape", [(5, *IMAGE), (2, 5, *IMAGE), (3, 5, 2, 10, 6)])
def test_inputs_of_a_wrong_shape_are_refused(shape):
    net, parameters, buffers = made("batch", 10)
    with pytest.raises(ValueError, match="this stack expects"):
        net(parameters, buffers, torch.zeros(shape, dtype=torch.float64), training=False)
