"""The penalty against derivatives taken one sample at a time, closed forms and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jacnorm.nets.wide_resnet import StackedWideResNet
from jacnorm.studies.lipschitz.margins import margins
from jacnorm.studies.lipschitz.regulariser import (
    StackedMLP,
    fixed_parameters,
    network,
    numbers_per_run,
    penalty,
    places,
    squared_norms,
)
from jacnorm.studies.lipschitz.settings import PairedSettings

torch.set_num_threads(1)

RUNS, BATCH, INPUTS, WIDTH, CLASSES = 3, 12, 6, 8, 4


def stack(normalisation, runs=RUNS, dtype=torch.float64):
    """A network with its parameters, running statistics that are not the first ones, a batch and its labels."""
    net = StackedMLP(runs, INPUTS, WIDTH, CLASSES, normalisation)
    streams = [torch.Generator().manual_seed(seed) for seed in range(runs)]
    parameters = {name: tensor.to(dtype) for name, tensor in net.initial(streams).items()}
    draw = torch.Generator().manual_seed(99)
    buffers = {
        name: (torch.rand(tensor.shape, generator=draw) + 0.5).to(dtype) for name, tensor in net.buffers().items()
    }
    x = torch.randn(runs, BATCH, INPUTS, generator=draw).to(dtype)
    return net, parameters, buffers, x, torch.randint(CLASSES, (runs, BATCH), generator=draw)


def passed(net, parameters, buffers, x, training=True):
    copies = {name: tensor.clone() for name, tensor in buffers.items()}
    return net(parameters, copies, x.clone().requires_grad_(), training=training)


def tail(layer, run, parameters, buffers, normalisation):
    """The margin of one sample as a function of the layer's normalisation output, written without stacks or batches."""

    def margin(h, label):
        if layer == 1:
            z = parameters["matrix2"][run] @ torch.relu(h)
            if normalisation == "layer":
                z = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt()
            elif normalisation == "batch":
                z = (z - buffers["mean2"][run]) / (buffers["variance2"][run] + 1e-5).sqrt()
            h = z
        logits = parameters["matrix3"][run] @ torch.relu(h)
        return logits[label] - max(logits[k] for k in range(CLASSES) if k != label)

    return margin


@pytest.mark.parametrize(("normalisation", "training"), [("layer", True), ("none", True), ("batch", False)])
def test_one_backward_pass_gives_each_sample_s_own_gradient_where_samples_do_not_mix(normalisation, training):
    net, parameters, buffers, x, labels = stack(normalisation)
    found = passed(net, parameters, buffers, x, training)
    norms = squared_norms(margins(found.logits, labels), found.normalised)
    assert norms.shape == (2, RUNS, BATCH)
    for layer in (1, 2):
        outputs = found.normalised[layer - 1].detach().unflatten(1, (RUNS, WIDTH))  # (B, R, width)
        for run in range(RUNS):
            margin = tail(layer, run, parameters, buffers, normalisation)
            for sample in range(BATCH):
                label = labels[run, sample].item()
                jacobian = torch.autograd.functional.jacobian(lambda h: margin(h, label), outputs[sample, run])  # noqa: B023
                assert norms[layer - 1, run, sample].item() == pytest.approx(jacobian.square().sum().item(), rel=1e-10)


def test_under_batch_norm_the_first_layer_also_holds_a_little_of_the_other_samples():
    """Each sample's own part is column i of row i of the Jacobian of all margins by all outputs, row by row."""
    net = StackedMLP(1, 64, 100, 10, "batch")
    draw = torch.Generator().manual_seed(1)
    parameters = {name: tensor.double() for name, tensor in net.initial([draw]).items()}
    buffers = {name: tensor.double() for name, tensor in net.buffers().items()}
    x = torch.randn(1, 50, 64, generator=draw, dtype=torch.float64)
    labels = torch.randint(10, (1, 50), generator=draw)
    found = passed(net, parameters, buffers, x)
    margin = margins(found.logits, labels)
    together = squared_norms(margin, found.normalised)[:, 0]  # (L, B)
    own = torch.zeros_like(together)
    for sample in range(50):
        gradients = torch.autograd.grad(margin[0, sample], found.normalised, retain_graph=True)
        own[:, sample] = torch.stack([gradient[sample].square().sum() for gradient in gradients])
    torch.testing.assert_close(together[1], own[1])  # nothing mixes after the last normalisation
    assert 0.005 < abs(together[0].mean() / own[0].mean() - 1) < 0.15


@pytest.mark.parametrize("normalisation", ["batch", "layer", "none"])
def test_a_batch_that_is_given_twice_keeps_the_paper_s_penalty_and_quarters_the_released_one(normalisation):
    net, parameters, buffers, x, labels = stack(normalisation)
    once = passed(net, parameters, buffers, x)
    twice = passed(net, parameters, buffers, torch.cat([x, x], dim=1))
    doubled = torch.cat([labels, labels], dim=1)
    threshold = squared_norms(margins(once.logits, labels), once.normalised).median().item() * (1 + 1e-6)
    paper = [penalty(*each, threshold=threshold, variant="paper") for each in ((once, labels), (twice, doubled))]
    torch.testing.assert_close(paper[0].value, paper[1].value)
    torch.testing.assert_close(paper[0].share, paper[1].share)
    assert paper[0].share.mean().item() == pytest.approx(0.5, abs=0.2)
    released = [penalty(*each, threshold=1e-9, variant="released") for each in ((once, labels), (twice, doubled))]
    torch.testing.assert_close(released[0].value, released[1].value * 4)
    whole = penalty(once, labels, threshold=1e-9, variant="paper")
    torch.testing.assert_close(released[0].value * BATCH**2, whole.value)


def by_hand(norms, threshold, variant):
    """Both variants from the norms (L, R, B) with loops."""
    layers, runs, batch = norms.shape
    values = torch.zeros(runs, dtype=norms.dtype)
    for run in range(runs):
        for layer in range(layers):
            each = norms[layer, run].tolist()
            if variant == "paper":
                values[run] += sum(j for j in each if j >= threshold) / batch
            else:
                above = [j / batch**2 for j in each if j / batch**2 > threshold]
                values[run] += sum(above) / len(above) if above else 0.0
    return values


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
def test_both_variants_against_loops(variant, quantile):
    net, parameters, buffers, x, labels = stack("layer")
    found = passed(net, parameters, buffers, x)
    norms = squared_norms(margins(found.logits, labels), found.normalised).detach()
    norms = norms / (BATCH**2 if variant == "released" else 1)
    threshold = torch.quantile(norms, quantile).item()  # at 0 and 1 a norm itself: >= against >
    expected = by_hand(norms * (BATCH**2 if variant == "released" else 1), threshold, variant)
    penalised = penalty(found, labels, threshold=threshold, variant=variant)
    torch.testing.assert_close(penalised.value.detach(), expected)
    above = norms >= threshold if variant == "paper" else norms > threshold
    torch.testing.assert_close(penalised.share, above.double().mean((0, 2)))


def test_norms_at_the_threshold_count_in_the_paper_and_do_not_as_released():
    net, parameters, buffers, x, labels = stack("none", runs=1)
    found = passed(net, parameters, buffers, x)
    largest = squared_norms(margins(found.logits, labels), found.normalised).max().item()
    paper = penalty(found, labels, threshold=largest, variant="paper")
    released = penalty(found, labels, threshold=largest / BATCH**2, variant="released")
    assert paper.share.item() == pytest.approx(1 / (2 * BATCH))
    assert released.share.item() == 0.0
    assert released.value.item() == 0.0


def test_closed_form_of_a_network_whose_rectifiers_are_all_open():
    net = StackedMLP(1, 2, 2, 2, "none")
    w1, w2 = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([[1.0, 1.0], [2.0, 3.0]])
    w3 = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    parameters = {"matrix1": w1[None], "matrix2": w2[None], "matrix3": w3[None]}
    found = passed(net, parameters, {}, torch.tensor([[[1.0, 1.0], [0.5, 2.0]]]))
    # u = w3[y] - w3[wrong] = (1, -2) or its negative; |u|^2 = 5, |W2' u|^2 = |(1 - 4, 1 - 6)|^2 = 9 + 25
    labels = torch.tensor([[0, 1]])
    norms = squared_norms(margins(found.logits, labels), found.normalised)
    torch.testing.assert_close(norms[:, 0], torch.tensor([[34.0, 34.0], [5.0, 5.0]]))
    assert penalty(found, labels, threshold=0.1, variant="paper").value.item() == pytest.approx(39.0)
    assert penalty(found, labels, threshold=10.0, variant="paper").value.item() == pytest.approx(34.0)
    assert penalty(found, labels, threshold=1.0, variant="released").value.item() == pytest.approx((34 + 5) / 4)
    assert penalty(found, labels, threshold=2.0, variant="released").value.item() == pytest.approx(34 / 4)


@pytest.mark.parametrize("normalisation", ["batch", "layer", "none"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_gradient_is_that_of_finite_differences_with_the_mask_held(normalisation, variant):
    net, parameters, buffers, x, labels = stack(normalisation)
    first = passed(net, parameters, buffers, x)
    norms = squared_norms(margins(first.logits, labels), first.normalised).flatten().sort().values
    middle = len(norms) // 2
    threshold = (norms[middle - 1] + norms[middle]).item() / 2  # half of them count, none changes sides nearby
    threshold /= BATCH**2 if variant == "released" else 1

    def value(parameters):
        return penalty(passed(net, parameters, buffers, x), labels, threshold=threshold, variant=variant).value.sum()

    leaves = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
    gradients = dict(
        zip(leaves, torch.autograd.grad(value(leaves), list(leaves.values()), allow_unused=True), strict=True)
    )
    draw = torch.Generator().manual_seed(7)
    for name, gradient in gradients.items():
        if gradient is None:  # the first matrix, if nothing after it depends on its scale or sign: piecewise constant
            gradient = torch.zeros_like(leaves[name])
        way = torch.randn(gradient.shape, generator=draw, dtype=torch.float64)
        step = 1e-6
        ends = [
            value({**leaves, name: (leaves[name] + sign * step * way).detach().requires_grad_()}).item()
            for sign in (1, -1)
        ]
        expected = (ends[0] - ends[1]) / (2 * step)
        assert (gradient * way).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_nothing_above_the_threshold_is_no_gradient_and_nothing_infinite():
    net, parameters, buffers, x, labels = stack("batch")
    leaves = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
    for variant in ("paper", "released"):
        found = penalty(passed(net, leaves, buffers, x), labels, threshold=1e9, variant=variant)
        assert (found.value == 0).all()
        assert (found.share == 0).all()
        for gradient in torch.autograd.grad(found.value.sum(), list(leaves.values())):
            assert (gradient == 0).all()


def test_without_a_graph_the_value_is_the_same_and_cannot_be_differentiated():
    net, parameters, buffers, x, labels = stack("layer")
    leaves = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
    found = passed(net, leaves, buffers, x)
    with_graph = penalty(found, labels, threshold=0.1, variant="paper")
    without = penalty(found, labels, threshold=0.1, variant="paper", create_graph=False)
    torch.testing.assert_close(with_graph.value.detach(), without.value)
    assert with_graph.value.requires_grad
    assert not without.value.requires_grad
    torch.autograd.grad(found.logits.sum(), list(leaves.values()))  # the graph of the network is still there


def test_runs_do_not_see_one_another():
    net, parameters, buffers, x, labels = stack("batch")
    together = penalty(passed(net, parameters, buffers, x), labels, threshold=0.1, variant="paper")
    for run in range(RUNS):
        alone = StackedMLP(1, INPUTS, WIDTH, CLASSES, "batch")
        one = penalty(
            passed(
                alone,
                {name: tensor[run : run + 1] for name, tensor in parameters.items()},
                {name: tensor[run : run + 1] for name, tensor in buffers.items()},
                x[run : run + 1],
            ),
            labels[run : run + 1],
            threshold=0.1,
            variant="paper",
        )
        torch.testing.assert_close(one.value[0], together.value[run])


# --- the networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalisation", ["batch", "layer", "none"])
def test_the_mlp_is_an_ordinary_one_in_training_and_in_evaluation(normalisation):
    net, parameters, _, x, _ = stack(normalisation, dtype=torch.float32)
    buffers = net.buffers()
    layers = {
        "batch": lambda: nn.BatchNorm1d(WIDTH, affine=False),
        "layer": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
        "none": nn.Identity,
    }[normalisation]
    models = []
    for run in range(RUNS):
        linear = [nn.Linear(*sizes, bias=False) for sizes in ((INPUTS, WIDTH), (WIDTH, WIDTH), (WIDTH, CLASSES))]
        for number, each in enumerate(linear, start=1):
            each.weight = nn.Parameter(parameters[f"matrix{number}"][run])
        models.append(nn.Sequential(linear[0], layers(), nn.ReLU(), linear[1], layers(), nn.ReLU(), linear[2]))
    for training in (True, True, False):
        found = net(parameters, buffers, x, training=training)
        x = x * 1.5 + 0.3
        for run, model in enumerate(models):
            expected = model.train(training)((x[run] - 0.3) / 1.5)
            torch.testing.assert_close(found.logits[run], expected, rtol=1e-4, atol=1e-5)
    for run, model in enumerate(models):
        if normalisation == "batch":
            torch.testing.assert_close(buffers["mean1"][run], model[1].running_mean)
            torch.testing.assert_close(buffers["variance2"][run], model[4].running_var)
    assert bool(buffers) == (normalisation == "batch")


def test_images_are_flattened_and_weights_have_variance_two_over_fan_in():
    net = StackedMLP(2, 64, 100, 10, "batch")
    parameters = net.initial([torch.Generator().manual_seed(seed) for seed in (0, 1)])
    assert {name: tuple(tensor.shape) for name, tensor in parameters.items()} == {
        "matrix1": (2, 100, 64),
        "matrix2": (2, 100, 100),
        "matrix3": (2, 10, 100),
    }
    assert parameters["matrix2"].var().item() == pytest.approx(2 / 100, rel=0.03)
    images = torch.randn(2, 5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    flat = net(parameters, net.buffers(), images.flatten(2), training=False)
    assert torch.equal(net(parameters, net.buffers(), images, training=False).logits, flat.logits)


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="normalisation is 'group'; it must be batch, layer or none"):
        StackedMLP(1, 2, 3, 4, "group")


def test_places_of_a_wide_resnet_14_norms_in_the_paper_and_19_tensors_as_released():
    net = StackedWideResNet(1, 16, 2, 2, 3, (1, 8, 8), "layer")
    draw = torch.Generator().manual_seed(0)
    found = net(net.initial([draw]), {}, torch.randn(1, 4, 1, 8, 8, generator=draw), training=True)
    paper, released = places(found, "paper"), places(found, "released")
    assert len(paper) == 14
    assert len(released) == 19
    assert all(any(each is norm for norm in found.normalised[:-1]) for each in released[:13])
    assert not any(each is found.normalised[-1] for each in released)
    assert all(each is block for each, block in zip(released[13:], found.blocks, strict=True))
    mlp = passed(*stack("layer")[:4])
    assert len(places(mlp, "paper")) == len(places(mlp, "released")) == 2


def test_the_released_code_leaves_gains_and_shifts_of_layer_norms_as_they_are():
    net = StackedWideResNet(1, 10, 2, 2, 3, (1, 8, 8), "layer")
    parameters = net.initial([torch.Generator().manual_seed(0)])
    fixed = fixed_parameters(parameters, "layer", "released")
    assert {name.rpartition(".")[0] for name in fixed} == set(net.norms)
    assert len(fixed) == 2 * len(net.norms)
    assert fixed_parameters(parameters, "batch", "released") == set()
    assert fixed_parameters(parameters, "layer", "paper") == set()


@pytest.mark.parametrize("normalisation", ["batch", "layer"])
def test_the_penalty_of_a_wide_resnet_can_be_differentiated_by_every_parameter_of_its_convolutions(normalisation):
    """Against finite differences along one direction through all of them."""
    runs = 2
    net = StackedWideResNet(runs, 10, 2, 2, 3, (1, 8, 8), normalisation)
    parameters = {
        name: tensor.double()
        for name, tensor in net.initial([torch.Generator().manual_seed(s) for s in (0, 1)]).items()
    }
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(runs, 6, 1, 8, 8, generator=draw, dtype=torch.float64)
    labels = torch.randint(3, (runs, 6), generator=draw)

    def value(parameters):
        buffers = {name: tensor.double() for name, tensor in net.buffers().items()}
        found = net(parameters, buffers, x.clone().requires_grad_(), training=True)
        return penalty(found, labels, threshold=1e-12, variant="paper").value.sum()

    leaves = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
    whole = value(leaves)
    gradients = dict(zip(leaves, torch.autograd.grad(whole, list(leaves.values()), allow_unused=True), strict=True))
    names = [name for name in leaves if name.endswith("weight")]
    ways = {name: torch.randn(leaves[name].shape, generator=draw, dtype=torch.float64) for name in names}
    step = 1e-6
    ends = [
        value({n: (t + sign * step * ways[n] if n in ways else t).detach() for n, t in leaves.items()}).item()
        for sign in (1, -1)
    ]
    found = sum((gradients[name] * way).sum().item() for name, way in ways.items())
    assert found == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


def test_the_settings_choose_the_network_and_its_size():
    settings = PairedSettings(width=7, batch=10, depth=10, stem=4, channels=6)
    assert isinstance(network(settings, 2, 10, (1, 8, 8), "batch"), StackedMLP)
    assert numbers_per_run(settings, (1, 8, 8), 10) == 7 * 64 + 7 * 7 + 10 * 7 + 10 * 7
    wide = settings.model_copy(update={"network": "wrn"})
    assert isinstance(network(wide, 2, 10, (1, 8, 8), "batch"), StackedWideResNet)
    weights = network(wide, 1, 10, (1, 8, 8), "layer").initial([torch.Generator().manual_seed(0)])
    expected = sum(tensor.numel() for tensor in weights.values()) + 10 * 6 * 8 * 8
    assert numbers_per_run(wide, (1, 8, 8), 10) == expected
