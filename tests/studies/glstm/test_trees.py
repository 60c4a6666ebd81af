"""Jacobians of trees and stars: closed forms without an activation, and PyTorch Geometric with autograd for the others.

The reference computes messages along edges, one run at a time; the module multiplies by one matrix for all runs.
"""

from __future__ import annotations

import math

import pytest
import torch

from jacnorm.studies.glstm.trees import ACTIVATIONS, Tree, draw_weights, leaf_norms

torch.set_num_threads(1)

# PyTorch Geometric compiles a function of its own when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(tree, runs=3, width=4):
    weights = torch.stack([draw_weights(tree.depth, width, stream(seed)) for seed in range(runs)])
    return weights, torch.randn(runs, tree.nodes, width, generator=stream(99), dtype=torch.float64)


def test_a_binary_tree_and_a_star_have_their_leaves_last():
    tree, star = Tree.of("deep", 2), Tree.of("shallow", 2)
    assert (tree.nodes, tree.leaves, tree.depth) == (7, 4, 2)
    assert tree.edges.tolist() == [[1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 2, 2]]
    assert (star.nodes, star.leaves, star.depth) == (5, 4, 1)
    assert star.edges.tolist() == [[1, 2, 3, 4], [0, 0, 0, 0]]


def test_the_smallest_tree_is_the_smallest_star():
    assert torch.equal(Tree.of("deep", 1).edges, Tree.of("shallow", 1).edges)


def test_the_operator_of_a_star_by_hand():
    third, mixed = 1 / 3, 3**-0.5
    expected = [[third, mixed, mixed], [0, 1, 0], [0, 0, 1]]
    assert Tree.of("shallow", 1).propagation().tolist() == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("exponent", [1, 3])
def test_a_star_weighs_its_leaves_by_their_number_whatever_the_activation(exponent, activation):
    star = Tree.of("shallow", exponent)
    weights, x = drawn(star)
    expected = weights[:, 0].abs().sum((1, 2), keepdim=True)[:, 0] / math.sqrt(star.leaves + 1)  # (R, 1)
    torch.testing.assert_close(leaf_norms(star, weights, x, activation), expected.expand(-1, star.leaves))


@pytest.mark.parametrize("exponent", [1, 2, 5])
def test_without_activation_a_tree_is_a_product_of_weights(exponent):
    tree = Tree.of("deep", exponent)
    weights, x = drawn(tree)
    product = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    for layer in range(exponent):
        product = weights[:, layer] @ product
    # A leaf has degree 1, every other node 3: one step of 3^(-1/2), then steps of 1/3.
    expected = product.abs().sum((1, 2)) * 3**-0.5 * 3.0 ** -(exponent - 1)
    torch.testing.assert_close(leaf_norms(tree, weights, x, "identity"), expected[:, None].expand(-1, tree.leaves))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_agrees_with_pytorch_geometric_and_autograd(activation):
    from torch_geometric.nn import GCNConv

    tree = Tree.of("deep", 3)
    weights, x = drawn(tree, runs=2)
    found = leaf_norms(tree, weights, x, activation)
    for run in range(2):
        convolutions = [GCNConv(4, 4).double() for _ in range(3)]
        for convolution, weight in zip(convolutions, weights[run], strict=True):
            convolution.lin.weight.data = weight

        def root(h, convolutions=convolutions):
            for layer, convolution in enumerate(convolutions):
                h = convolution(h if layer == 0 else ACTIVATIONS[activation](h), tree.edges)
            return h[0]

        jacobian = torch.autograd.functional.jacobian(root, x[run])  # (d, V, d)
        expected = [jacobian[:, leaf].abs().sum().item() for leaf in range(7, 15)]
        assert found[run].tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("width", [4, 9])
def test_weights_are_uniform_with_the_variance_of_glorot(width):
    weights = draw_weights(400, width, stream())
    bound = (3 / width) ** 0.5
    assert weights.abs().max() <= bound
    count = weights.numel()
    assert weights.mean().item() == pytest.approx(0.0, abs=4 * (1 / width / count) ** 0.5)  # four standard errors
    # |W| is uniform on [0, bound], so its mean is bound/2: hence E norm = d^2/2 sqrt(3/d) / sqrt(n + 1) for a star.
    assert weights.abs().mean().item() == pytest.approx(bound / 2, abs=4 * bound / (12 * count) ** 0.5)
