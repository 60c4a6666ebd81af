"""Curvature of stacked runs against curvlinops, one network at a time, dense matrices and differences of gradients."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn

from jacnorm.jacobian.operators import gauss_newton, loss_hessian
from jacnorm.studies.sharpening.costs import costs, squares
from jacnorm.studies.sharpening.curvature import Curvature, top
from jacnorm.studies.sharpening.networks import build
from jacnorm.studies.sharpening.settings import NetworkSettings

torch.set_num_threads(1)

IMAGE, CLASSES, SAMPLES = (1, 4, 4), 3, 11
COSTS = ["square", "cross-entropy", "cross-entropy"]
SMOOTHING = [0.0, 0.0, 0.4]
SETTINGS = NetworkSettings(width=5, hidden_layers=2, channels=2)


def generators(runs):
    return [torch.Generator().manual_seed(run) for run in range(runs)]


def draw(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def doubled(tensors):
    return {name: each.double() for name, each in tensors.items()}


def problem(name="mlp", runs=3, samples=SAMPLES, image=IMAGE):
    network = build(SETTINGS, name, image, CLASSES)
    parameters, buffers = doubled(network.initial(generators(runs))), doubled(network.buffers(runs))
    x, y = draw(samples, *image), torch.arange(samples) % CLASSES
    return network, parameters, buffers, x, y, COSTS[:runs], torch.tensor(SMOOTHING[:runs], dtype=torch.float64)


def sequential(network, parameters, run):
    """The fully connected network of one run, as a module of PyTorch's own layers."""
    layers = [nn.Flatten()]
    for layer in range(1, network.layers + 1):
        linear = nn.Linear(*network.widths[layer - 1 : layer + 1]).double()
        linear.load_state_dict({kind: parameters[f"{kind}{layer}"][run] for kind in ("weight", "bias")})
        layers += [linear, nn.Tanh()] if layer < network.layers else [linear]
    return nn.Sequential(*layers)


def dense(product, size):
    """Matrices (R, p, p) of a product of stacks, column by column."""
    columns = [product(torch.eye(size, dtype=torch.float64)[i].expand(3, -1)) for i in range(size)]
    return torch.stack(columns, 2)


@pytest.fixture(scope="module")
def oracles():
    """Hessian and Gauss-Newton matrix of every run by curvlinops, which differentiates another way (forward mode)."""
    network, parameters, _, x, y, _, _ = problem()
    found = {"hessian": [], "gauss-newton": []}
    for run, (cost, smoothing) in enumerate(zip(COSTS, SMOOTHING, strict=True)):
        model = sequential(network, parameters, run)
        if cost == "square":
            # Its mean is over the K classes too, and without the half.
            loss, answers, factor = nn.MSELoss(), nn.functional.one_hot(y, CLASSES).double(), CLASSES / 2
        else:
            loss, answers, factor = nn.CrossEntropyLoss(label_smoothing=smoothing), y, 1.0
        eye = torch.eye(network.size, dtype=torch.float64)
        for which, build_operator in (("hessian", loss_hessian), ("gauss-newton", gauss_newton)):
            found[which].append(factor * (build_operator(model, loss, [(x, answers)]) @ eye))
    return {which: torch.stack(matrices) for which, matrices in found.items()}


@pytest.mark.parametrize("chunk", [SAMPLES, 4])
def test_products_are_those_of_curvlinops(oracles, chunk):
    """Chunks of 4 leave a last one of 3."""
    network, *rest = problem()
    curvature = Curvature(network, *rest, chunk)
    for which, product in (
        ("hessian", curvature.hessian_product),
        ("gauss-newton", curvature.gauss_newton_product),
    ):
        torch.testing.assert_close(dense(product, network.size), oracles[which], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk", [SAMPLES, 4])
@pytest.mark.parametrize("which", ["hessian", "gauss-newton"])
def test_top_eigenvalues_are_those_of_arpack_on_the_dense_matrix(oracles, which, chunk):
    result = top(Curvature(*problem(), chunk), which, rtol=1e-7)
    assert bool(result.converged.all())
    for run, matrix in enumerate(oracles[which].numpy()):
        ((value,), _) = scipy.sparse.linalg.eigsh(matrix, 1, which="LA", v0=np.ones(len(matrix)))
        assert result.values[run].item() == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize("chunk", [SAMPLES, 3])
def test_loss_and_gradient(chunk):
    network, parameters, buffers, x, y, cost, smoothing = problem()
    curvature = Curvature(network, parameters, buffers, x, y, cost, smoothing, chunk)
    for run in range(3):
        model = sequential(network, parameters, run)
        if cost[run] == "square":
            loss = (model(x) - nn.functional.one_hot(y, CLASSES)).square().sum(1).mean() / 2
        else:
            loss = nn.functional.cross_entropy(model(x), y, label_smoothing=float(smoothing[run]))
        gradient = torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))])
        torch.testing.assert_close(curvature.loss[run], loss.detach())
        torch.testing.assert_close(curvature.gradient[run], gradient)
    assert not curvature.gradient.requires_grad
    assert not any(each.requires_grad for each in parameters.values())


@pytest.mark.parametrize("chunk", [SAMPLES, 3])
def test_norms_of_cost_hessians_of_every_sample(chunk):
    network, parameters, buffers, x, y, cost, smoothing = problem()
    found = Curvature(network, parameters, buffers, x, y, cost, smoothing, chunk).cost_hessian_norms()
    p = torch.softmax(network(parameters, buffers, x), 2)
    expected = torch.linalg.eigvalsh(torch.diag_embed(p) - p.unsqueeze(3) * p.unsqueeze(2))[..., -1]
    torch.testing.assert_close(found[1:], expected[1:])
    assert torch.equal(found[0], torch.ones(SAMPLES, dtype=torch.float64))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_samples_of_each_run_its_own(name):
    network, parameters, buffers, x, y, cost, smoothing = problem(name)
    order = torch.stack([torch.roll(torch.arange(SAMPLES), run) for run in range(3)])
    v = draw(3, network.size)
    shared = Curvature(network, parameters, buffers, x, y, cost, smoothing, 4)
    own = Curvature(network, parameters, buffers, x[order], y[order], cost, smoothing, 5)
    torch.testing.assert_close(own.hessian_product(v), shared.hessian_product(v))
    torch.testing.assert_close(own.gauss_newton_product(v), shared.gauss_newton_product(v))
    some = torch.tensor([0, 2])
    torch.testing.assert_close(own.narrow(some).hessian_product(v[some]), shared.hessian_product(v)[some])


@pytest.mark.parametrize(("name", "samples", "image"), [("cnn", SAMPLES, IMAGE), ("resnet18", 3, (1, 8, 8))])
def test_hessian_products_are_differences_of_gradients(name, samples, image):
    """Convolutions and batch norm in evaluation mode; the gradient itself is checked by differences of the cost."""
    network, parameters, buffers, x, y, cost, smoothing = problem(name, 2, samples, image)
    buffers = {key: each + 0.3 * draw(*each.shape).abs() for key, each in buffers.items()}
    kept = {key: each.clone() for key, each in buffers.items()}
    v, step = draw(2, network.size), 1e-6
    v /= v.norm(dim=1, keepdim=True)
    curvature = Curvature(network, parameters, buffers, x, y, cost, smoothing, samples)

    def moved(distance):
        parts = v.split([each[0].numel() for each in parameters.values()], 1)
        return {
            key: each + distance * part.reshape(each.shape)
            for (key, each), part in zip(parameters.items(), parts, strict=True)
        }

    up, down = (Curvature(network, moved(side), buffers, x, y, cost, smoothing, samples) for side in (step, -step))
    slope = (up.loss - down.loss) / (2 * step)
    torch.testing.assert_close((curvature.gradient * v).sum(1), slope, rtol=1e-6, atol=1e-8)
    product = curvature.hessian_product(v)
    difference = (up.gradient - down.gradient) / (2 * step)
    assert bool(((product - difference).norm(dim=1) <= 1e-5 * product.norm(dim=1)).all())
    assert all(torch.equal(kept[key], each) for key, each in buffers.items())


def test_gauss_newton_of_a_convolutional_network_is_its_definition():
    network, parameters, buffers, x, y, cost, smoothing = problem("cnn")
    v = draw(3, network.size)
    found = Curvature(network, parameters, buffers, x, y, cost, smoothing, 6).gauss_newton_product(v)
    leaves = {name: each.requires_grad_() for name, each in parameters.items()}
    logits = network(leaves, buffers, x)  # (3, N, K)
    for run in range(3):
        rows = [
            torch.cat([g[run].flatten() for g in torch.autograd.grad(z, list(leaves.values()), retain_graph=True)])
            for z in logits[run].flatten()
        ]
        j = torch.stack(rows).unflatten(0, logits.shape[1:])  # (N, K, p)

        def one(z, run=run):
            return costs(z[None], y, squares(cost)[run : run + 1], smoothing[run : run + 1]).sum()

        # Twice reverse mode, of the cost itself: apart from the closed form of its Hessian.
        hessian = torch.func.jacrev(torch.func.jacrev(one))(logits[run].detach())  # (N, K, N, K)
        expected = torch.einsum("ikp,ikjl,jlq,q->p", j, hessian, j, v[run]) / SAMPLES
        torch.testing.assert_close(found[run], expected)


def test_narrowing_and_company_leave_a_run_as_it_is():
    network, parameters, buffers, x, y, cost, smoothing = problem()
    together = top(Curvature(network, parameters, buffers, x, y, cost, smoothing, SAMPLES), "hessian", rtol=1e-5)
    assert len(set(together.products.tolist())) > 1
    for run in range(3):
        own = {name: each[run : run + 1] for name, each in parameters.items()}
        alone = Curvature(network, own, buffers, x, y, cost[run : run + 1], smoothing[run : run + 1], SAMPLES)
        result = top(alone, "hessian", rtol=1e-5)
        torch.testing.assert_close(result.values[0], together.values[run], rtol=1e-9, atol=0)
        assert result.products == together.products[run]


def test_a_start_from_the_other_matrix_saves_products():
    curvature = Curvature(*problem(), SAMPLES)
    hessian = top(curvature, "gauss-newton")
    cold, warm = top(curvature, "hessian"), top(curvature, "hessian", hessian.vectors)
    torch.testing.assert_close(warm.values, cold.values, rtol=1e-4, atol=0)
    assert warm.products.sum() < cold.products.sum()


def test_a_run_that_overflowed_spoils_no_other():
    network, parameters, buffers, x, y, cost, smoothing = problem()
    fine = top(Curvature(network, parameters, buffers, x, y, cost, smoothing, SAMPLES), "hessian")
    parameters["weight3"][0] *= 1e300
    spoilt = top(Curvature(network, parameters, buffers, x, y, cost, smoothing, SAMPLES), "hessian")
    assert spoilt.values.isnan().tolist() == [True, False, False]
    torch.testing.assert_close(spoilt.values[1:], fine.values[1:])


def test_refusals():
    network, parameters, buffers, x, y, _, smoothing = problem()
    with pytest.raises(ValueError, match="it must be one of square, cross-entropy"):
        Curvature(network, parameters, buffers, x, y, ["hinge"] * 3, smoothing, 5)
    with pytest.raises(ValueError, match="smoothing 0"):
        Curvature(network, parameters, buffers, x, y, ["square"] * 3, smoothing, SAMPLES)
    with pytest.raises(ValueError, match="it must be one of hessian, gauss-newton"):
        top(Curvature(*problem(), SAMPLES), "fisher")
