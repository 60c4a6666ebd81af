"""Operator norms against matrices written out entry by entry, and their products against norms known by construction.

The matrices are filled by index arithmetic, so the oracle uses no convolution.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jacnorm.nets.wide_resnet import EPSILON, StackedWideResNet
from jacnorm.studies.lipschitz.operator_norms import (
    convolution_norms,
    log_convolution_norms,
    log_norm_scales,
    log_rows,
    spectral_terms,
    two_thirds,
)

torch.set_num_threads(1)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def matrix(weights, stride, size):
    """The zero-padded convolution as a matrix (outputs H' W', inputs H W)."""
    outputs, inputs, kernel, _ = weights.shape
    pad, (height, width) = kernel // 2, size
    rows, columns = (-(-length // stride) for length in size)
    found = np.zeros((outputs, rows, columns, inputs, height, width))
    for row, column, down, right in itertools.product(range(rows), range(columns), range(kernel), range(kernel)):
        y, x = stride * row + down - pad, stride * column + right - pad
        if 0 <= y < height and 0 <= x < width:
            found[:, row, column, :, y, x] = weights[:, :, down, right].numpy()
    return found.reshape(outputs * rows * columns, -1)


def torus_norm(weights, size):
    """Norm of the circular convolution: the largest over frequencies of the transfer matrices' (Sedghi et al. 2019)."""
    transfer = np.fft.fft2(weights.numpy(), size, axes=(2, 3))
    return np.linalg.norm(transfer.transpose(2, 3, 0, 1), 2, axis=(2, 3)).max()


SHAPES = [
    (3, 4, 3, 1, (8, 8)),
    (3, 4, 3, 2, (8, 8)),
    (4, 3, 3, 2, (7, 9)),
    (3, 5, 1, 2, (8, 8)),
    (2, 3, 1, 1, (5, 7)),
    (1, 2, 3, 1, (6, 6)),
    (2, 1, 5, 1, (6, 6)),
    (3, 3, 3, 1, (1, 1)),
]


@pytest.mark.parametrize(("inputs", "outputs", "kernel", "stride", "size"), SHAPES)
def test_norms_are_those_of_the_explicit_matrices(inputs, outputs, kernel, stride, size):
    weights = draw(3, outputs, inputs, kernel, kernel)
    found = convolution_norms(weights, stride, size)
    assert found.converged.all()
    for number, each in enumerate(weights):
        expected = np.linalg.norm(matrix(each, stride, size), 2)
        assert found.lower[number].item() <= expected <= found.upper[number].item()
        assert found.value[number].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_torus_one_larger_gives_a_larger_norm_and_one_of_the_same_size_need_not(stride):
    # Padding needs one row that is zero, so the torus of the same size is another map, whose norm may be smaller.
    for seed in range(5):
        weights = draw(1, 4, 3, 3, 3, seed=seed)
        value = convolution_norms(weights, stride, (8, 8)).value.item()
        assert value <= torus_norm(weights[0], (9, 9)) * (1 + 1e-9)
    alternating = torch.tensor([[-1.0, 1.0, -1.0]]).double()
    alternating = (alternating.T @ alternating)[None, None, None]  # largest at the highest frequency, not on odd tori
    assert convolution_norms(alternating, 1, (7, 7)).value.item() > torus_norm(alternating[0, 0:1], (7, 7))


def test_a_map_has_the_same_norm_alone_and_among_others():
    weights = draw(6, 8, 8, 3, 3, dtype=torch.float32)
    together = convolution_norms(weights, 1, (8, 8))
    alone = convolution_norms(weights[4:5], 1, (8, 8))
    torch.testing.assert_close(together.value[4], alone.value[0], rtol=1e-6, atol=0)


def test_zero_weights_have_norm_zero():
    weights = torch.zeros(2, 8, 8, 3, 3)
    weights[1] = draw(8, 8, 3, 3, dtype=torch.float32)
    found = convolution_norms(weights, 1, (8, 8))
    assert found.value[0] == 0
    assert found.value[1] > 1


def made(depth=10, runs=2, seed=1, image=(2, 8, 12), normalisation="batch"):
    """Networks with positive and negative gains, shifts and statistics that batch norm might have."""
    net = StackedWideResNet(runs, depth, 3, 4, 5, image, normalisation)
    parameters = net.initial([torch.Generator().manual_seed(seed + run) for run in range(runs)])
    buffers = net.buffers()
    for number, name in enumerate(net.norms):
        width = net.norms[name]
        if normalisation != "none":
            parameters[f"{name}.gain"] = draw(runs, width, seed=100 * seed + number, dtype=torch.float32)
        parameters[f"{name}.shift"] = draw(runs, width, seed=200 * seed + number, dtype=torch.float32)
        if normalisation == "batch":
            buffers[f"{name}.mean"] = draw(runs, width, seed=300 * seed + number, dtype=torch.float32)
            buffers[f"{name}.variance"] = draw(runs, width, seed=400 * seed + number, dtype=torch.float32).square()
    return net, parameters, buffers


def test_each_convolution_of_a_network_has_its_own_norm():
    net, parameters, _ = made(16)
    found = log_convolution_norms(net, parameters)
    assert list(sorted(found)) == sorted(each.name for each in net.convolutions)
    for each in net.convolutions:
        for run in range(2):
            weights = parameters[each.weight][run].double()
            expected = np.linalg.norm(matrix(weights, each.stride, each.size), 2)
            assert found[each.name][run].item() == pytest.approx(math.log(expected), abs=1e-3)


def test_a_frozen_batch_norm_stretches_by_its_largest_scale():
    net, parameters, buffers = made()
    found = log_norm_scales(net, parameters, buffers)
    for name, width in net.norms.items():
        for run in range(2):
            module = torch.nn.BatchNorm2d(width).eval()
            module.weight.data, module.bias.data = parameters[f"{name}.gain"][run], parameters[f"{name}.shift"][run]
            module.running_mean, module.running_var = buffers[f"{name}.mean"][run], buffers[f"{name}.variance"][run]
            jacobian = torch.func.jacrev(lambda x, module=module: module(x).flatten())(torch.zeros(1, width, 1, 1))
            expected = torch.linalg.matrix_norm(jacobian.flatten(1), 2).item()
            assert found[name][run].item() == pytest.approx(math.log(expected), abs=1e-5)


def test_without_norms_a_shift_stretches_nothing():
    net, parameters, _ = made(normalisation="none")
    assert all((scale == 0).all() for scale in log_norm_scales(net, parameters, {}).values())


def test_layer_norm_has_no_bound():
    net, parameters, _ = made(normalisation="layer")
    with pytest.raises(ValueError, match="layer norm divides by a deviation"):
        spectral_terms(net, parameters, {})


def test_row_norms_are_those_of_the_unrolled_matrix_up_to_its_border():
    net, parameters, _ = made()
    found = log_rows(net, parameters)
    assert found.keys() == {*(each.name for each in net.convolutions), "linear"}
    for each in net.convolutions:
        for run in range(2):
            unrolled = matrix(parameters[each.weight][run].double(), each.stride, each.size)
            norms = np.linalg.norm(unrolled, axis=1)
            value = found[each.name][run].exp().item()
            if each.kernel == 1:
                assert value == pytest.approx(norms.sum(), rel=1e-6)
            else:
                assert value > norms.sum()
                if min(each.output_size) < 3:
                    continue  # no interior position
                largest = norms.reshape(each.outputs, -1).max(1)
                assert value == pytest.approx(largest.sum() * math.prod(each.output_size), rel=1e-6)
    expected = parameters["linear.weight"].double().square().sum(2).sqrt().sum(1).log()
    torch.testing.assert_close(found["linear"], expected)


def test_terms_of_a_network_whose_norms_are_known():
    """Every convolution is a 1 x 1 one of norm 3 in the middle of its kernel, every norm a scale 1/2, the read-out 5.

    Stem 3/2, blocks 1/2 (3 + 3 * 1/2 * 3) = 15/4 each, head 1/2 * 1/sqrt(2 * 3) * 5.
    """
    net = StackedWideResNet(1, 10, 2, 2, 3, (2, 8, 12))
    parameters, buffers = net.initial([torch.Generator()]), net.buffers()
    for each in net.convolutions:
        weights = torch.zeros(1, each.outputs, each.inputs, each.kernel, each.kernel)
        weights[0, : each.inputs, :, each.kernel // 2, each.kernel // 2] = (
            3 * torch.eye(each.outputs)[: each.inputs, : each.inputs]
        )
        parameters[each.weight] = weights
    for name in net.norms:
        parameters[f"{name}.gain"] *= -0.5
        buffers[f"{name}.variance"] -= EPSILON
    parameters["linear.weight"] = 5 * torch.eye(8)[None, :3]
    found = spectral_terms(net, parameters, buffers)
    head = 0.5 * 5 / math.sqrt(6)
    total = 1.5 * 3.75**3 * head
    assert found.unweighted.item() == pytest.approx(math.log(total), abs=1e-5)
    # Layer by layer: the product of all other stages, of the rest of its own path, and its row norms by hand:
    # output positions times 3 for each of the rows that are not zero, as many as there are input channels.
    terms = [total / 1.5 * 0.5 * (96 * 2 * 3)]
    for positions, inputs, outputs in ((96, 2, 2), (24, 2, 4), (6, 4, 8)):
        rest = total / 3.75
        terms += [
            rest * 0.5 * (positions * inputs * 3),  # shortcut
            rest * 0.5 * 0.5 * 3 * (positions * inputs * 3),  # first: then norm2 and second
            rest * 0.5 * 3 * 0.5 * (positions * outputs * 3),  # second, whose matrix is square
        ]
    terms.append(total / head * (head / 5) * 15)
    assert found.weighted.item() == pytest.approx(1.5 * math.log(sum(t ** (2 / 3) for t in terms)), abs=1e-5)


def test_an_identity_shortcut_adds_one():
    net, parameters, buffers = made(16, runs=1, seed=5)
    found = spectral_terms(net, parameters, buffers).unweighted
    scale, norm = log_norm_scales(net, parameters, buffers), log_convolution_norms(net, parameters)
    expected = norm["stem"].exp() * scale["stem.norm"].exp()
    for group, inner in itertools.product((1, 2, 3), (1, 2)):
        name = f"group{group}.block{inner}"
        before, between = scale[f"{name}.norm1"].exp(), scale[f"{name}.norm2"].exp()
        branch = before * norm[f"{name}.first"].exp() * between * norm[f"{name}.second"].exp()
        expected = expected * (branch + (before * norm[f"{name}.shortcut"].exp() if inner == 1 else 1.0))
    linear = torch.linalg.svdvals(parameters["linear.weight"][0].double())[0]
    expected = expected * scale["norm"].exp() * linear / math.sqrt(2 * 3)
    torch.testing.assert_close(found, expected.log(), rtol=1e-6, atol=1e-6)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 10.0))
def test_no_pair_of_inputs_is_stretched_by_more_than_the_product(seed, scale):
    net, parameters, buffers = made(seed=seed % 97)
    product = spectral_terms(net, parameters, buffers).unweighted.exp()
    x = draw(2, 4, 2, 8, 12, seed=seed, dtype=torch.float32)
    moved = x + scale * draw(2, 4, 2, 8, 12, seed=seed + 1, dtype=torch.float32)
    with torch.no_grad():
        outputs = [net(parameters, buffers, each, training=False).logits.double() for each in (x, moved)]
    stretch = (outputs[1] - outputs[0]).norm(dim=2) / (moved - x).double().flatten(2).norm(dim=2)
    assert (stretch <= product[:, None] * 1.001).all()


def test_two_thirds():
    assert two_thirds(torch.tensor([8.0, 27.0]).log()).item() == pytest.approx(math.log(13**1.5))
    assert two_thirds(torch.tensor([[-torch.inf, 2.0]])).item() == pytest.approx(2.0)
