"""Scores against plain autograd on one network at a time, exact mask counts, and what each scaling restores."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jacnorm.nets import mlp
from jacnorm.studies.stability import pruning, theory

torch.set_num_threads(1)

WIDTHS = (5, 6, 7, 3)
RUNS = 3


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + run) for run in range(count)]


def stack(widths=WIDTHS, runs=RUNS, first=0, dtype=torch.float64):
    return mlp.init_gaussian(widths, 2.0, generators(runs, first), dtype)


def labelled_batch(inputs=WIDTHS[0], classes=WIDTHS[-1], size=8):
    generator = torch.Generator().manual_seed(77)
    x = torch.randn(size, inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (size,), generator=generator)


# --- scores --------------------------------------------------------------------------------------------------------
# The oracles below take one network, flatten its weights into one vector and use torch's dense derivatives of a loss
# written out by hand; they share with the code under test neither the stacking nor the double backward.


def loss_of(vector, shapes, x, labels, phi, temperature):
    hidden, used = x, 0
    for layer, (rows, columns) in enumerate(shapes):
        weight = vector[used : used + rows * columns].reshape(rows, columns)
        used += rows * columns
        hidden = hidden @ weight.T
        if layer < len(shapes) - 1:
            hidden = phi(hidden)
    scaled = hidden / temperature
    return (scaled.logsumexp(1) - scaled[torch.arange(len(labels)), labels]).mean()


def one_network(weights, run):
    shapes = [tuple(weight[run].shape) for weight in weights]
    return torch.cat([weight[run].flatten() for weight in weights]), shapes


PHI = {"relu": torch.relu, "tanh": torch.tanh, "linear": lambda z: z}


@pytest.mark.parametrize("activation", PHI)
def test_snip_scores_equal_the_definition(activation):
    weights, (x, labels) = stack(), labelled_batch()
    scores = pruning.snip_scores(weights, x, labels, activation)
    for run in range(RUNS):
        vector, shapes = one_network(weights, run)
        gradient = torch.autograd.functional.jacobian(
            lambda v, shapes=shapes: loss_of(v, shapes, x, labels, PHI[activation], 1.0), vector
        )
        found = torch.cat([score[run].flatten() for score in scores])
        torch.testing.assert_close(found, (vector * gradient).abs(), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("activation", PHI)
@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_scores_equal_the_dense_hessian_times_the_gradient(activation, temperature):
    weights, (x, labels) = stack(), labelled_batch()
    scores = pruning.grasp_scores(weights, x, labels, activation, temperature)
    for run in range(RUNS):
        vector, shapes = one_network(weights, run)

        def loss(v, shapes=shapes):
            return loss_of(v, shapes, x, labels, PHI[activation], temperature)

        gradient = torch.autograd.functional.jacobian(loss, vector)
        hessian = torch.autograd.functional.hessian(loss, vector)
        found = torch.cat([score[run].flatten() for score in scores])
        expected = vector * (hessian @ gradient)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12 * expected.abs().max().item())


def test_grasp_has_temperature_200_by_default_and_removes_what_raises_the_gradient_norm():
    weights, (x, labels) = stack(runs=1), labelled_batch()
    scores = pruning.grasp_scores(weights, x, labels, "tanh")
    assert all(
        torch.equal(a, b)
        for a, b in zip(scores, pruning.grasp_scores(weights, x, labels, "tanh", temperature=200.0), strict=True)
    )
    # First order: shrinking w by a factor 1 - h changes |g|^2 by -2 h w (Hg)_w.
    vector, shapes = one_network(weights, 0)
    flat = torch.cat([score[0].flatten() for score in scores])
    lowest = int(flat.argmin())

    def squared_gradient(v):
        return (
            torch.autograd.functional.jacobian(lambda u: loss_of(u, shapes, x, labels, torch.tanh, 200.0), v)
            .square()
            .sum()
        )

    shrunk = vector.clone()
    shrunk[lowest] *= 1 - 1e-5
    change = (squared_gradient(shrunk) - squared_gradient(vector)).item()
    assert flat[lowest] < 0 < change
    assert change == pytest.approx(-2e-5 * flat[lowest].item(), rel=1e-3)


def test_synflow_scores_equal_the_definition_and_sum_to_one_per_layer():
    weights = stack()
    scores = pruning.synflow_scores(weights)
    for run in range(RUNS):
        leaves = [weight[run].abs().requires_grad_() for weight in weights]
        flow = torch.ones(WIDTHS[0], dtype=torch.float64)
        for leaf in leaves:
            flow = leaf @ flow
        total = flow.sum()
        gradients = torch.autograd.grad(total, leaves)
        for layer, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            expected = (leaf * gradient).detach() / total.detach()
            torch.testing.assert_close(scores[layer][run], expected, rtol=1e-12, atol=1e-16)
            assert scores[layer][run].sum().item() == pytest.approx(1.0)


def test_synflow_scores_survive_a_depth_at_which_the_flow_overflows():
    # |W| has mean gain about sqrt(2n/pi) = 6.4 per layer: R passes 1e308 near layer 380.
    scores = pruning.synflow_scores(stack((64,) * 501, runs=1))
    assert all(torch.isfinite(score).all() for score in scores)
    assert all(score.sum().item() == pytest.approx(1.0) for score in scores)


def test_synflow_scores_of_a_disconnected_network_are_zero():
    weights = stack()
    weights[1][0] = 0
    scores = pruning.synflow_scores(weights)
    assert all((score[0] == 0).all() for score in scores)
    assert all(score[1].sum().item() == pytest.approx(1.0) for score in scores)


def test_magnitude_and_random_scores():
    weights = stack(dtype=torch.float32)
    assert all(torch.equal(s, w.abs()) for s, w in zip(pruning.magnitude_scores(weights), weights, strict=True))
    scores = pruning.random_scores(weights, generators(RUNS))
    assert [score.shape for score in scores] == [weight.shape for weight in weights]
    values = torch.cat([score.flatten() for score in scores])
    assert 0 <= values.min() < values.max() < 1
    assert values.unique().numel() == values.numel()


def test_scoring_leaves_the_callers_weights_alone():
    weights, (x, labels) = stack(), labelled_batch()
    before = [weight.clone() for weight in weights]
    for method in ("snip", "grasp", "synflow", "magnitude"):
        pruning.prune(method, weights, 0.5, x=x, labels=labels)
    with torch.no_grad():
        pruning.snip_scores(weights, x, labels)  # works inside no_grad too
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    assert not any(weight.requires_grad or weight.grad is not None for weight in weights)


# --- masks ---------------------------------------------------------------------------------------------------------


def count(mask):
    return mask.flatten(1).sum(1)


shapes_strategy = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


@settings(max_examples=60)
@given(
    shapes=shapes_strategy,
    sparsity=st.floats(0, 1, exclude_max=True),
    levels=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_masks_keep_exactly_the_rounded_count_of_the_highest_scores(shapes, sparsity, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    # Few levels make many ties, among them whole layers of equal scores.
    scores = [torch.randint(levels, (2, *shape), generator=generator).double() for shape in shapes]
    local = pruning.masks_from_scores(scores, sparsity, "local")
    for mask, score in zip(local, scores, strict=True):
        assert (count(mask) == round((1 - sparsity) * score[0].numel())).all()
        for run in range(2):
            kept, removed = score[run][mask[run]], score[run][~mask[run]]
            assert not (kept.numel() and removed.numel()) or kept.min() >= removed.max()
    together = pruning.masks_from_scores(scores, sparsity, "global")
    total = sum(score[0].numel() for score in scores)
    assert (sum(count(mask) for mask in together) == round((1 - sparsity) * total)).all()
    for run in range(2):
        kept = torch.cat([s[run][m[run]] for s, m in zip(scores, together, strict=True)])
        removed = torch.cat([s[run][~m[run]] for s, m in zip(scores, together, strict=True)])
        assert not (kept.numel() and removed.numel()) or kept.min() >= removed.max()


@settings(max_examples=40)
@given(
    low=st.floats(0, 1, exclude_max=True),
    high=st.floats(0, 1, exclude_max=True),
    levels=st.sampled_from([1, 3, 10**6]),
    scope=st.sampled_from(["local", "global"]),
)
def test_masks_are_nested_in_sparsity(low, high, levels, scope):
    low, high = min(low, high), max(low, high)
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randint(levels, (2, 6, 5), generator=generator).double() for _ in range(3)]
    larger = pruning.masks_from_scores(scores, low, scope)
    smaller = pruning.masks_from_scores(scores, high, scope)
    assert all(((~b) | a).all() for a, b in zip(larger, smaller, strict=True))


def test_ties_are_spread_and_repeatable_and_the_same_for_every_run():
    scores = [torch.zeros(2, 40, 50, dtype=torch.float64)]
    (mask,) = pruning.masks_from_scores(scores, 0.5)
    (again,) = pruning.masks_from_scores([scores[0][:1]], 0.5)
    assert torch.equal(mask[:1], again)
    assert torch.equal(mask[0], mask[1])
    # Half of each row of 50 on average: 4.5 standard deviations of a hypergeometric row are 16. In the order of
    # memory the first rows would be full and the last empty.
    assert (mask[0].sum(1) - 25).abs().max() <= 16


def test_global_masks_of_synflow_use_the_restored_layer_constants():
    weights = stack((4, 6, 3), runs=1)
    leaves = [weight[0].abs().requires_grad_() for weight in weights]
    flow = (leaves[1] @ (leaves[0] @ torch.ones(4, dtype=torch.float64))).sum()
    scores = [leaf.detach() * g for leaf, g in zip(leaves, torch.autograd.grad(flow, leaves), strict=True)]
    raw = torch.cat([score.flatten() for score in scores])
    threshold = raw.sort(descending=True).values[round(0.4 * 42) - 1]
    masks = pruning.prune("synflow", weights, 0.6, scope="global")
    for mask, score in zip(masks, scores, strict=True):
        assert torch.equal(mask[0], score >= threshold)


def test_iterative_synflow_follows_the_exponential_schedule_and_never_revives():
    weights = stack((6, 10, 10, 4), runs=2)
    rounds, sparsity = 12, 0.9
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    total = 6 * 10 + 100 + 40
    for step in range(1, rounds + 1):
        scores = pruning.synflow_scores([w * m for w, m in zip(weights, masks, strict=True)])
        # Removed weights score zero, so the definition itself never takes them back while live scores remain.
        flat = torch.cat([score.flatten(1) for score in scores], 1)
        keep = round((1 - sparsity) ** (step / rounds) * total)
        threshold = flat.sort(1, descending=True).values[:, keep - 1 : keep]
        assert (threshold > 0).all()
        masks = [score >= threshold.unsqueeze(2) for score in scores]
    found = pruning.synflow_masks(weights, sparsity, "global", rounds)
    assert all(torch.equal(a, b) for a, b in zip(found, masks, strict=True))
    assert (sum(count(mask) for mask in found) == round((1 - sparsity) * total)).all()


def test_iterative_synflow_revives_nothing_when_pruning_cuts_paths():
    # Local masks this sparse cut so many paths that live weights scoring zero are kept beside removed ones scoring
    # zero. Eight rounds to s begin with seven rounds to the density (1 - s)^(7/8).
    weights = stack((6, 10, 10, 4), runs=50)
    earlier = pruning.synflow_masks(weights, 1 - (1 - 0.9) ** (7 / 8), "local", rounds=7)
    final = pruning.synflow_masks(weights, 0.9, "local", rounds=8)
    cut = pruning.synflow_scores([w * m for w, m in zip(weights, earlier, strict=True)])
    assert any(((score == 0) & mask).any() for score, mask in zip(cut, final, strict=True))
    assert all((before | ~after).all() for before, after in zip(earlier, final, strict=True))


def test_iterative_synflow_avoids_the_layer_collapse_of_one_shot():
    # A wide layer among narrow ones has the smallest scores per weight; one shot empties it first.
    weights = stack((4, 100, 100, 4, 4, 3), runs=3)
    one_shot = pruning.prune("synflow", weights, 0.98, scope="global", rounds=1)
    assert any((count(mask) == 0).any() for mask in one_shot)
    iterative = pruning.prune("synflow", weights, 0.98, scope="global", rounds=100)
    assert all((count(mask) > 0).all() for mask in iterative)
    assert all(
        score.sum() > 0 for score in pruning.synflow_scores([w * m for w, m in zip(weights, iterative, strict=True)])
    )


@pytest.mark.parametrize("rounds", [1, 7])
@pytest.mark.parametrize("method", ["random", "magnitude", "snip", "grasp", "synflow"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_run_is_pruned_the_same_alone_and_stacked(method, scope, rounds):
    weights, (x, labels) = stack(), labelled_batch()
    together = pruning.prune(
        method, weights, 0.6, scope=scope, generators=generators(RUNS, 50), x=x, labels=labels, rounds=rounds
    )
    alone = pruning.prune(
        method,
        [weight[2:] for weight in weights],
        0.6,
        scope=scope,
        generators=generators(1, 52),
        x=x,
        labels=labels,
        rounds=rounds,
    )
    assert all(torch.equal(a[0], b[2]) for a, b in zip(alone, together, strict=True))
    assert not all(torch.equal(mask[0], mask[1]) for mask in together)


def test_sparsity_zero_keeps_everything():
    weights = stack()
    for scope in ("local", "global"):
        assert all(mask.all() for mask in pruning.prune("magnitude", weights, 0.0, scope=scope))
    assert all(mask.all() for mask in pruning.prune("synflow", weights, 0.0, rounds=5))


# --- scalings ------------------------------------------------------------------------------------------------------


def masked(weights, masks):
    return [weight * mask for weight, mask in zip(weights, masks, strict=True)]


def test_no_scaling_and_nominal_scalings():
    weights = stack(dtype=torch.float32)
    masks = pruning.prune("magnitude", weights, 0.75)
    for scaling, factor in (
        ("none", 1.0),
        ("inverse_sqrt_density", 2.0),
        ("alpha_mag", theory.alpha_mag(0.75)),
    ):
        result = pruning.rescale(weights, masks, scaling, sparsity=0.75)
        assert result.factors.shape == (RUNS, 3)
        assert torch.allclose(result.factors, torch.tensor(factor, dtype=torch.float64))
        for scaled, plain in zip(result.weights, masked(weights, masks), strict=True):
            assert scaled.dtype == torch.float32
            torch.testing.assert_close(scaled, plain * factor)


@settings(max_examples=30)
@given(
    sparsity=st.floats(0, 0.9), seed=st.integers(0, 1000), method=st.sampled_from(["magnitude", "random", "synflow"])
)
def test_frobenius_scaling_restores_each_layers_norm(sparsity, seed, method):
    weights = stack(first=seed)
    masks = pruning.prune(method, weights, sparsity, generators=generators(RUNS))
    result = pruning.rescale(weights, masks, "frobenius")
    for scaled, dense, mask in zip(result.weights, weights, masks, strict=True):
        assert torch.equal(scaled != 0, mask)
        torch.testing.assert_close(
            torch.linalg.matrix_norm(scaled), torch.linalg.matrix_norm(dense), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("activation", ["relu", "tanh", "linear"])
def test_activity_scaling_restores_the_mean_square_of_every_layer(activation):
    weights, (x, labels) = stack((5, 30, 30, 30, 4), runs=2), labelled_batch(classes=4)
    for method in ("random", "magnitude", "snip"):
        masks = pruning.prune(method, weights, 0.5, generators=generators(2), x=x, labels=labels, activation=activation)
        result = pruning.rescale(weights, masks, "activity", x=x, activation=activation)
        dense = mlp.forward(weights, x, activation)
        pruned = mlp.forward(result.weights, x, activation)
        for a, b in zip(dense, pruned, strict=True):
            torch.testing.assert_close(a.square().mean((1, 2)), b.square().mean((1, 2)), rtol=1e-10, atol=0)
        for layer, plain in enumerate(masked(weights, masks)):
            torch.testing.assert_close(
                result.weights[layer], plain * result.factors[:, layer].reshape(-1, 1, 1), rtol=1e-14, atol=0
            )


def test_activity_scaling_of_an_unpruned_network_is_one():
    weights, (x, _) = stack(), labelled_batch()
    masks = pruning.prune("magnitude", weights, 0.0)
    factors = pruning.rescale(weights, masks, "activity", x=x).factors
    assert torch.allclose(factors, torch.ones_like(factors), rtol=1e-12)


@pytest.mark.parametrize("scaling", ["frobenius", "activity"])
def test_an_empty_layer_has_factor_one_and_no_nan(scaling):
    weights, (x, _) = stack(), labelled_batch()
    masks = pruning.prune("magnitude", weights, 0.5)
    masks[1][0] = False
    result = pruning.rescale(weights, masks, scaling, x=x)
    assert result.factors[0, 1] == 1.0
    assert torch.isfinite(result.factors).all()
    assert (result.weights[1][0] == 0).all()


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_factors_of_a_large_gaussian_matrix_are_the_closed_forms(sparsity):
    weights = stack((1000, 1000), runs=1)
    for method, alpha, tolerance in (("magnitude", theory.alpha_mag, 0.01), ("random", theory.alpha_random, 0.02)):
        masks = pruning.prune(method, weights, sparsity, generators=generators(1, first=1))
        factor = pruning.rescale(weights, masks, "frobenius").factors.item()
        # Standard error of a mean of 10^4 or more squares is at most 1.4 %, halved by the root.
        assert factor == pytest.approx(alpha(sparsity), rel=tolerance)


def test_synflow_keeps_almost_the_second_moment_of_magnitude():
    weights = stack((128,) * 6, runs=2)
    masks = pruning.prune("synflow", weights, 0.9)
    factors = pruning.rescale(weights, masks, "frobenius").factors
    assert factors.mean().item() == pytest.approx(theory.alpha_mag(0.9), rel=0.05)


# --- the table of factors, reduced ---------------------------------------------------------------------------------


def log_jacobian_norm(weights, x):
    """Mean over runs and inputs of the log spectral norm, layer by layer with the scale taken out."""
    z = mlp.forward(weights, x, "relu")
    logs = []
    for sample in range(x.shape[0]):
        product, total = weights[0], 0.0
        for layer, weight in enumerate(weights[1:]):
            product = weight @ (mlp.derivative(z[layer][:, sample], "relu").unsqueeze(2) * product)
            size = torch.linalg.matrix_norm(product)
            product, total = product / size[:, None, None], total + size.log()
        logs.append(total + torch.linalg.matrix_norm(product, ord=2).log())
    return torch.stack(logs).mean().item()


@pytest.fixture(scope="module")
def deep_table():
    """Mean log-norm of digits nets (width 64, depth 20, sparsity 0.9) by method and scaling, and of the dense nets."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = torch.tensor(digits.data)
    features = (features - features.mean(0)) / features.std(0).clamp_min(1e-9)
    x, labels, probes = features[:128], torch.tensor(digits.target[:128]), features[1000:1004]
    weights = stack((64, *(64,) * 19, 10), runs=3, first=10)
    table = {"dense": log_jacobian_norm(weights, probes)}
    for method in ("random", "magnitude", "synflow", "snip", "grasp"):
        masks = pruning.prune(method, weights, 0.9, generators=generators(3, 90), x=x, labels=labels)
        for scaling in ("none", "inverse_sqrt_density", "frobenius", "activity"):
            scaled = pruning.rescale(weights, masks, scaling, sparsity=0.9, x=x).weights
            table[method, scaling] = log_jacobian_norm(scaled, probes)
    return table


def test_second_moment_scaling_suffices_for_data_free_masks(deep_table):
    depth, dense = 20, deep_table["dense"]
    # Unscaled, twenty layers of the slopes in closed form; a few nats of finite-width scatter at 64 units, d = 6.4.
    assert deep_table["random", "none"] - dense == pytest.approx(depth * theory.pruned_slope("random", 0.9), abs=3)
    for method in ("magnitude", "synflow"):
        unscaled = depth * theory.pruned_slope("magnitude", 0.9)
        wrong = depth * theory.pruned_slope("magnitude", 0.9, theory.alpha_random(0.9))
        assert deep_table[method, "none"] - dense == pytest.approx(unscaled, abs=2.5)
        assert deep_table[method, "inverse_sqrt_density"] - dense == pytest.approx(wrong, abs=2.5)
    for method in ("random", "magnitude", "synflow"):
        assert deep_table[method, "frobenius"] == pytest.approx(dense, abs=2.5)


def test_data_dependent_masks_explode_under_frobenius_scaling_and_not_under_activity(deep_table):
    for method in ("snip", "grasp"):
        assert deep_table[method, "frobenius"] > deep_table["dense"] + 5
        assert deep_table[method, "inverse_sqrt_density"] > deep_table[method, "frobenius"]
    for method in ("random", "magnitude", "synflow", "snip", "grasp"):
        assert deep_table[method, "activity"] == pytest.approx(deep_table["dense"], abs=2.5)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, math.nan])
def test_sparsity_outside_zero_to_one_is_refused(sparsity):
    weights = stack()
    for call in (
        lambda: pruning.prune("magnitude", weights, sparsity),
        lambda: pruning.synflow_masks(weights, sparsity),
        lambda: pruning.masks_from_scores(weights, sparsity),
        lambda: pruning.rescale(weights, weights, "alpha_mag", sparsity=sparsity),
    ):
        with pytest.raises(ValueError, match="fraction of weights removed"):
            call()


def test_what_a_method_needs_is_asked_for():
    weights, (x, labels) = stack(), labelled_batch()
    with pytest.raises(ValueError, match="needs generators"):
        pruning.prune("random", weights, 0.5)
    with pytest.raises(ValueError, match="2 generators for 3 runs"):
        pruning.prune("random", weights, 0.5, generators=generators(2))
    for method, batch in itertools.product(("snip", "grasp"), ({"x": x}, {"labels": labels})):
        with pytest.raises(ValueError, match=f'"{method}" needs a batch'):
            pruning.prune(method, weights, 0.5, **batch)
    for scaling in ("inverse_sqrt_density", "alpha_mag"):
        with pytest.raises(ValueError, match="needs the sparsity"):
            pruning.rescale(weights, weights, scaling)
    with pytest.raises(ValueError, match="needs a batch x"):
        pruning.rescale(weights, weights, "activity")


def test_unknown_names_and_values_are_refused():
    weights, (x, labels) = stack(), labelled_batch()
    with pytest.raises(ValueError, match="one of random, magnitude, snip, grasp, synflow"):
        pruning.prune("obd", weights, 0.5)
    with pytest.raises(ValueError, match="scaling is 'spectral'"):
        pruning.rescale(weights, weights, "spectral")
    with pytest.raises(ValueError, match="scope is 'row'"):
        pruning.masks_from_scores(weights, 0.5, "row")
    with pytest.raises(ValueError, match="rounds is 0"):
        pruning.synflow_masks(weights, 0.5, rounds=0)
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        pruning.grasp_scores(weights, x, labels, temperature=0.0)
    weights[1][0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="layer 2 contain NaN"):
        pruning.masks_from_scores(weights, 0.5)
