"""Tangent kernel in closed form against the autograd Jacobian by the parameters, and its first layer's absence."""

from __future__ import annotations

import pytest
import torch

from jacnorm.studies.sharpening.kernel import kernel_tops, layer_blocks
from jacnorm.studies.sharpening.networks import Mlp

torch.set_num_threads(1)

IMAGE, CLASSES, SAMPLES, RUNS = (2, 3, 2), 4, 6, 2
CASES = [(activation, form) for activation in ("tanh", "relu", "gelu") for form in ("standard", "ntk")]


def problem(activation="tanh", parametrisation="standard", hidden_layers=2, shared=True):
    network = Mlp(
        IMAGE, CLASSES, width=7, hidden_layers=hidden_layers, activation=activation, parametrisation=parametrisation
    )
    generators = [torch.Generator().manual_seed(run) for run in range(RUNS)]
    parameters = {name: each.double() for name, each in network.initial(generators).items()}
    shape = (SAMPLES, *IMAGE) if shared else (RUNS, SAMPLES, *IMAGE)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return network, parameters, x


def autograd_kernels(network, parameters, x):
    """K_1, ..., K_L, (R, mK, mK) each, from the Jacobian of all logits by the parameters of each layer, row by row."""
    leaves = {name: each.clone().requires_grad_() for name, each in parameters.items()}
    logits = network(leaves, {}, x)  # (R, m, K)
    runs = []
    for run in range(RUNS):
        rows = [torch.autograd.grad(z, list(leaves.values()), retain_graph=True) for z in logits[run].flatten()]
        pieces = [torch.stack([row[i][run].flatten() for row in rows]) for i in range(len(leaves))]
        runs.append([sum(j @ j.mT for j in pieces[i : i + 2]) for i in range(0, len(pieces), 2)])  # weight and bias
    return [torch.stack(layer) for layer in zip(*runs, strict=True)]


def closed_kernels(blocks):
    """The matrices whose factors `layer_blocks` gives, written out."""
    found = []
    for block in blocks:
        if block.backward is None:
            products = torch.eye(CLASSES, dtype=torch.float64).expand(RUNS, SAMPLES, SAMPLES, -1, -1)
        else:
            products = torch.einsum("rikn,rjln->rijkl", block.backward, block.backward)
        matrix = block.inner[..., None, None] * products  # (R, m, m, K, K)
        found.append(matrix.transpose(2, 3).reshape(RUNS, SAMPLES * CLASSES, -1))
    return found


@pytest.mark.parametrize(("activation", "parametrisation"), CASES)
def test_c15a_the_layers_kernels_are_those_of_autograd(activation, parametrisation):
    network, parameters, x = problem(activation, parametrisation)
    expected = autograd_kernels(network, parameters, x)
    blocks = layer_blocks(network, parameters, x)
    assert len(blocks) == len(expected) == 3
    for found, matrix in zip(closed_kernels(blocks), expected, strict=True):
        assert bool(((found - matrix).abs() <= 1e-12 * matrix.abs().amax()).all())
    whole, matrix = sum(closed_kernels(blocks)), sum(expected)
    assert bool((torch.linalg.matrix_norm(whole - matrix) <= 1e-8 * torch.linalg.matrix_norm(matrix)).all())


@pytest.mark.parametrize(("activation", "parametrisation"), CASES)
def test_c15b_the_first_layers_jacobian_is_absent(activation, parametrisation):
    """Inputs divided by a and W_1 multiplied by a: the Jacobian by the inputs grows a-fold, the kernel does not see it.

    Layer 1's own part changes, through its inputs alone, for its B_1 stays.
    """
    a = 3.0
    network, parameters, x = problem(activation, parametrisation)
    scaled = {**parameters, "weight1": a * parameters["weight1"]}
    torch.testing.assert_close(network(scaled, {}, x / a), network(parameters, {}, x), rtol=1e-12, atol=1e-13)
    before, after = layer_blocks(network, parameters, x), layer_blocks(network, scaled, x / a)
    for one, other in zip(closed_kernels(before)[1:], closed_kernels(after)[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((after[0].inner - 1) * a**2, before[0].inner - 1)
    torch.testing.assert_close(after[0].backward, before[0].backward)

    def jacobian(weights, inputs):
        leaf = inputs.expand(RUNS, *inputs.shape).clone().requires_grad_()
        logits = network(weights, {}, leaf)
        rows = [torch.autograd.grad(logits[..., k].sum(), leaf, retain_graph=True)[0] for k in range(CLASSES)]
        return torch.stack(rows, 2).flatten(3)  # (R, m, K, n_0)

    norms = [torch.linalg.matrix_norm(jacobian(*each), 2) for each in ((parameters, x), (scaled, x / a))]
    torch.testing.assert_close(norms[1], a * norms[0])
    # B_1 and the weights give that Jacobian too.
    chained = network.factor(1) * torch.einsum("rmkn,rnd->rmkd", before[0].backward, parameters["weight1"])
    torch.testing.assert_close(chained, jacobian(parameters, x))


@pytest.mark.parametrize("hidden_layers", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("parametrisation", ["standard", "ntk"])
def test_tops_are_those_of_the_dense_matrices(parametrisation, shared, hidden_layers):
    network, parameters, x = problem("gelu", parametrisation, hidden_layers, shared)
    whole, layers = kernel_tops(network, parameters, x, rtol=1e-9)
    matrices = autograd_kernels(network, parameters, x)
    expected = torch.stack([torch.linalg.eigvalsh(matrix)[:, -1] for matrix in matrices], 1) / SAMPLES
    torch.testing.assert_close(layers, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(whole, torch.linalg.eigvalsh(sum(matrices))[:, -1] / SAMPLES, rtol=1e-9, atol=0)


def test_a_run_does_not_depend_on_its_company_and_spoils_no_other():
    network, parameters, x = problem()
    together = kernel_tops(network, parameters, x)
    alone = kernel_tops(network, {name: each[1:] for name, each in parameters.items()}, x)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one[0], other[1], rtol=1e-9, atol=0)
    parameters["weight2"][0] = torch.inf
    whole, layers = kernel_tops(network, parameters, x)
    assert bool(whole[0].isnan())
    assert bool(layers[0, 0].isnan())
    torch.testing.assert_close(whole[1], together[0][1])
    torch.testing.assert_close(layers[1], together[1][1])
