"""The methods client by client, against plain training written with torch's modules, optimisers and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from tests.studies.fedgtst.tiny import COEFFICIENTS, METHODS, SAMPLES, data, settings
from torch import nn

from jacnorm.errors import UserError
from jacnorm.studies.fedgtst import algorithm, draws
from jacnorm.studies.fedgtst.networks import build
from jacnorm.studies.fedgtst.strategies import (
    DIVERGED,
    GOING_ON,
    UNSTABLE,
    part,
    payload_bytes,
    prefixed,
    strategy,
)

torch.set_num_threads(1)


def given(method, coefficient=None, **changes):
    """Strategy, initial weights, one client's samples and its draws of round 0."""
    chosen = settings(**changes)
    network = build("lenet", (3, 8, 8), 10, probabilistic=method == "fedsr")
    made = strategy(method, COEFFICIENTS[method] if coefficient is None else coefficient, chosen, network)
    weights = draws.initial_weights(network, "tiny", 10)
    drawn = draws.client_draws(chosen, "tiny", 10, 0, 0, SAMPLES, made.noise_width) | made.draws(0)
    return made, weights, data().of(0, 0), drawn


def module():
    body = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    body += [nn.Conv2d(6, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(64, 84), nn.ReLU(), nn.Linear(84, 10))


def trained_plainly(weights, x, y, order, *, optimiser, rate=0.1, batch=8, xi=0.0, guide=0.0):
    """What a client does, with torch's modules; returns its module and the losses of its batches."""
    network, losses = module(), []
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), weights.values(), strict=True):
            parameter.copy_(value)
    stepping = optimiser(network.parameters(), lr=rate)
    for epoch in order:
        for chosen in epoch.split(batch):
            loss = nn.functional.cross_entropy(network(x[chosen]), y[chosen])
            losses.append((loss.item(), len(chosen)))
            if xi:
                gradient = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
                norm = torch.cat([g.flatten() for g in gradient]).norm()
                loss = loss + xi * (norm - guide) ** 2
            stepping.zero_grad()
            loss.backward()
            stepping.step()
    return network, losses


def norm_of(network, x, y):
    gradient = torch.autograd.grad(nn.functional.cross_entropy(network(x), y), list(network.parameters()))
    return torch.cat([g.flatten() for g in gradient]).norm().item()


def assert_weights(reply, network, *, rtol=1e-4, atol=1e-5):
    for found, expected in zip(part("weights", reply).values(), network.parameters(), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("name", "optimiser"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_fedavg_trains_as_torch_does(name, optimiser):
    rate = 0.1 if name == "sgd" else 0.001
    made, weights, (x, y), drawn = given("fedavg", optimiser=name, learning_rate=rate, local_epochs=2)
    reply, memory = made.client(made.broadcast(made.start(weights, 4)), {}, x, y, drawn)
    network, losses = trained_plainly(weights, x, y, drawn["order"], optimiser=optimiser, rate=rate)
    assert_weights(reply, network)
    assert memory == {}
    mean = sum(loss * size for loss, size in losses) / (2 * SAMPLES)
    assert reply["metrics.loss"].item() == pytest.approx(mean, rel=1e-5)


def test_fedgtst_trains_on_its_objective_and_sends_its_norm():
    made, weights, (x, y), drawn = given("fedgtst", 0.02)
    server = {**made.start(weights, 4), "guide": torch.tensor(1.5, dtype=torch.float64)}
    reply, _ = made.client(made.broadcast(server), {}, x, y, drawn)
    penalised, losses = trained_plainly(weights, x, y, drawn["order"], optimiser=torch.optim.SGD, xi=0.02, guide=1.5)
    assert_weights(reply, penalised)
    assert reply["norm"].item() == pytest.approx(norm_of(penalised, x, y), rel=1e-4)
    assert reply["norm"].dtype == torch.float64
    assert reply["metrics.loss"].item() == pytest.approx(sum(a * n for a, n in losses) / SAMPLES, rel=1e-5)
    # An extra client sends the larger of its two norms, and the penalised weights all the same.
    plain, _ = trained_plainly(weights, x, y, drawn["order_extra"], optimiser=torch.optim.SGD)
    extra, _ = made.client(made.broadcast(server), {}, x, y, drawn, extra=True)
    assert extra["norm"].item() == pytest.approx(max(norm_of(plain, x, y), norm_of(penalised, x, y)), rel=1e-4)
    assert norm_of(plain, x, y) != pytest.approx(norm_of(penalised, x, y), rel=1e-3)
    assert_weights(extra, penalised)
    assert made.extra_norm(made.broadcast(server), x, y, drawn).item() == pytest.approx(norm_of(plain, x, y), rel=1e-4)


def test_without_penalty_fedgtst_is_fedavg():
    made, weights, (x, y), drawn = given("fedgtst", 0.0)
    server = {**made.start(weights, 4), "guide": torch.tensor(9.0, dtype=torch.float64)}
    reply, _ = made.client(made.broadcast(server), {}, x, y, drawn)
    average, _, _, _ = given("fedavg")
    expected, _ = average.client(average.broadcast(average.start(weights, 4)), {}, x, y, drawn)
    for name in part("weights", expected):
        torch.testing.assert_close(reply[f"weights.{name}"], expected[f"weights.{name}"], rtol=1e-6, atol=1e-7)


def test_where_the_norm_is_taken():
    sent = {}
    for place in ("local_end", "global_start", "batch_mean"):
        made, weights, (x, y), drawn = given("fedgtst", guide_at=place)
        server = {**made.start(weights, 4), "guide": torch.tensor(1.5, dtype=torch.float64)}
        sent[place] = made.client(made.broadcast(server), {}, x, y, drawn)[0]["norm"].item()
        assert made.extra_training == (place != "global_start")
    network, _ = trained_plainly(weights, x, y, [], optimiser=torch.optim.SGD)
    assert sent["global_start"] == pytest.approx(norm_of(network, x, y), rel=1e-5)
    assert len({round(norm, 6) for norm in sent.values()}) == 3
    by_step, start = [], weights
    for chosen in drawn["order"][0].split(8):  # the mean over batches, of the gradients on the way
        own = trained_plainly(start, x, y, [], optimiser=torch.optim.SGD)[0]
        by_step.append(norm_of(own, x[chosen], y[chosen]) * len(chosen))
        network, _ = trained_plainly(start, x, y, [chosen], optimiser=torch.optim.SGD, xi=0.02, guide=1.5)
        start = {name: p.detach() for name, p in zip(weights, network.parameters(), strict=True)}
    assert sent["batch_mean"] == pytest.approx(sum(by_step) / SAMPLES, rel=1e-4)
    assert not given("fedgtst", extra_share=0)[0].extra_training
    assert not given("fedavg")[0].extra_training


def test_the_guide_is_the_largest_norm_or_their_mean():
    replies = {"norm": torch.tensor([1.0, 4.0, 2.0, 77.0], dtype=torch.float64)}
    answered = torch.tensor([True, True, True, False])
    for method, guide in (("fedgtst", 4.0), ("fedgtst-mean", 7 / 3)):
        made, weights, (x, y), _ = given(method)
        server = made.start(weights, 4)
        assert server["guide"].isnan()
        server = made.take_survey(server, replies, answered)
        assert server["guide"].item() == server["first_guide"].item() == pytest.approx(guide)
        own = {name: w.expand(4, *w.shape) for name, w in part("weights", server).items()}
        after = made.aggregate(server, prefixed("weights", own) | {"norm": 2 * replies["norm"]}, 4, answered)
        assert after["guide"].item() == pytest.approx(2 * guide)
        assert after["first_guide"].item() == pytest.approx(guide)
    network, _ = trained_plainly(weights, x, y, [], optimiser=torch.optim.SGD)
    asked = made.survey(made.survey_message(server), x, y)
    assert asked["norm"].item() == pytest.approx(norm_of(network, x, y), rel=1e-5)


def test_weights_are_averaged_without_weights_over_those_that_answered():
    made, weights, _, _ = given("fedavg")
    server = made.start(weights, 4)
    factors = torch.tensor([1.0, 2.0, math.nan, 6.0])
    replies = {f"weights.{name}": factors.view(-1, *[1] * w.ndim) * w for name, w in weights.items()} | {
        "metrics.loss": torch.zeros(4)
    }
    after = made.aggregate(server, replies, 4, torch.tensor([True, True, False, True]))
    for name, w in weights.items():
        torch.testing.assert_close(after[f"weights.{name}"], 3 * w)
    assert after["outcome"] == GOING_ON
    assert set(after) == set(server)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_answers_leave_the_server_as_it_is(method):
    made, weights, (x, y), drawn = given(method, minimum_clients=0.5)
    server = made.start(weights, 5)
    reply, _ = made.client(made.broadcast(server), made.memory(), x, y, drawn)
    replies = {name: torch.stack([tensor, tensor + 1]) for name, tensor in reply.items()}
    both = torch.tensor([True, True])
    assert made.aggregate(server, replies, 5, both)["outcome"] == DIVERGED  # 2 of 5 where 3 must answer
    ended = made.aggregate(server, replies, 4, torch.tensor([True, False]))
    assert ended["outcome"] == DIVERGED
    for name in set(server) - {"outcome"}:
        torch.testing.assert_close(ended[name], server[name], rtol=0, atol=0, equal_nan=True)
    assert made.aggregate(server, replies, 4, both)["outcome"] != DIVERGED


def test_a_guide_that_runs_away_makes_a_run_unstable():
    made, weights, _, _ = given("fedgtst", runaway=10)
    first = torch.ones(2, dtype=torch.float64)
    both = torch.tensor([True, True])
    server = made.take_survey(made.start(weights, 2), {"norm": first}, both)
    own = prefixed("weights", {name: torch.stack([w, w]) for name, w in weights.items()})
    assert made.aggregate(server, own | {"norm": 10 * first}, 2, both)["outcome"] == GOING_ON
    after = made.aggregate(server, own | {"norm": 10.1 * first}, 2, both)
    assert after["outcome"] == UNSTABLE
    assert after["guide"] == 10.1
    assert made.aggregate(after, own | {"norm": first}, 2, both)["outcome"] == UNSTABLE


def test_fediir_keeps_a_moving_average_of_head_gradients():
    made, weights, (x, y), drawn = given("fediir", 0.5)
    server = made.start(weights, 2)
    network, _ = trained_plainly(weights, x, y, [], optimiser=torch.optim.SGD)
    head = torch.autograd.grad(nn.functional.cross_entropy(network(x), y), list(network.parameters())[-2:])
    reply = made.survey(made.survey_message(server), x, y)
    assert list(reply) == ["head.read_out.weight", "head.read_out.bias"]
    for found, expected in zip(reply.values(), head, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    replies = {name: torch.stack([g, 3 * g, g * math.nan]) for name, g in reply.items()}
    server = made.take_survey(server, replies, torch.tensor([True, True, False]))
    torch.testing.assert_close(server["mean_head.read_out.bias"], 0.05 * 2 * reply["head.read_out.bias"])
    again = made.take_survey(server, replies, torch.tensor([True, False, False]))
    expected = (0.95 * 0.1 + 0.05) * reply["head.read_out.bias"]
    torch.testing.assert_close(again["mean_head.read_out.bias"], expected)
    unanswered = made.take_survey(server, replies, torch.zeros(3, dtype=torch.bool))
    assert torch.equal(unanswered["mean_head.read_out.bias"], server["mean_head.read_out.bias"])
    # One step of the client, by autograd through the penalty on the head's gradient.
    drawn = {**drawn, "order": torch.arange(8)[None]}
    reply, _ = made.client(made.broadcast(server), {}, x, y, drawn)
    loss = nn.functional.cross_entropy(network(x[:8]), y[:8])
    own = torch.autograd.grad(loss, list(network.parameters())[-2:], create_graph=True)
    means = [server["mean_head.read_out.weight"], server["mean_head.read_out.bias"]]
    objective = loss + 0.5 * sum((g - m).square().sum() for g, m in zip(own, means, strict=True))
    gradient = torch.autograd.grad(objective, list(network.parameters()))
    for name, g in zip(weights, gradient, strict=True):
        torch.testing.assert_close(reply[f"weights.{name}"], weights[name] - 0.1 * g, rtol=1e-4, atol=1e-6)


def test_scaffold_moves_its_variates_as_published():
    made, weights, (x, y), drawn = given("scaffold")
    stream = torch.Generator().manual_seed(1)
    own = {name: 0.1 * torch.randn(w.shape, generator=stream) for name, w in weights.items()}
    common = {name: 0.1 * torch.randn(w.shape, generator=stream) for name, w in weights.items()}
    server = made.start(weights, 4) | prefixed("control", common)
    reply, new = made.client(made.broadcast(server), own, x, y, drawn)
    steps = -(-SAMPLES // 8)
    for name, w in weights.items():  # option II: c_k - c + (w - y) / (T rate)
        published = own[name] - common[name] + (w - reply[f"weights.{name}"]) / (steps * 0.1)
        torch.testing.assert_close(new[name], published, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(reply[f"control.{name}"], new[name] - own[name])
    replies = {name: torch.stack([tensor, tensor]) for name, tensor in reply.items()}
    after = made.aggregate(server, replies, 2, torch.tensor([True, True]))
    for name in weights:
        torch.testing.assert_close(after[f"control.{name}"], common[name] + 0.5 * reply[f"control.{name}"])


def test_scaffold_without_variates_is_fedavg():
    made, weights, (x, y), drawn = given("scaffold")
    reply, _ = made.client(made.broadcast(made.start(weights, 4)), made.memory(), x, y, drawn)
    network, _ = trained_plainly(weights, x, y, drawn["order"], optimiser=torch.optim.SGD)
    assert_weights(reply, network)


def test_fedsr_learns_its_references_and_keeps_them():
    made, weights, (x, y), drawn = given("fedsr", 1.0)
    memory = made.memory()
    reply, new = made.client(made.broadcast(made.start(weights, 4)), memory, x, y, drawn)
    assert set(new) == set(memory) == {"r_mu", "r_sigma", "scale"}
    assert not any(torch.equal(new[name], memory[name]) for name in memory)
    assert {name.split(".")[0] for name in reply} == {"weights", "metrics"}
    # The first step, by plain autograd.
    first = {**drawn, "order": drawn["order"][:, :8]}
    reply, new = made.client(made.broadcast(made.start(weights, 4)), memory, x, y, first)
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    kept = {name: w.clone().requires_grad_() for name, w in memory.items()}
    chosen = drawn["order"][0, :8]
    mean, deviation = made.network.distribution(leaves, x[chosen])
    z = mean + deviation * drawn["noise"][0, :8]
    loss = nn.functional.cross_entropy(made.network.read_out(leaves, z), y[chosen])
    assert reply["metrics.loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    whole = algorithm.fedsr_objective(loss, z, mean, deviation, y[chosen], kept, torch.tensor(1.0))
    gradient = torch.autograd.grad(whole, [*leaves.values(), *kept.values()])
    found = [*part("weights", reply).values(), *new.values()]
    for before, g, now in zip([*weights.values(), *memory.values()], gradient, found, strict=True):
        torch.testing.assert_close(now, before - 0.1 * g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["fedsr", "scaffold"])
def test_a_client_whose_answer_is_not_finite_keeps_its_memory(method):
    made, weights, (x, y), drawn = given(method)
    memory = made.memory()
    reply, kept = made.client(made.broadcast(made.start(weights, 4)), memory, x * math.nan, y, drawn)
    assert reply["metrics.loss"].isnan()
    assert all(torch.equal(kept[name], memory[name]) for name in memory)


def test_fedgtst_sends_one_double_each_way_beside_the_weights():
    sizes = {}
    for method in METHODS:
        made, weights, (x, y), drawn = given(method)
        message = made.broadcast(made.start(weights, 4))
        reply, _ = made.client(message, made.memory(), x, y, drawn)
        sizes[method] = payload_bytes(message), payload_bytes(reply)
    assert sizes["fedavg"] == (4 * 7_358, 4 * 7_358)
    assert sizes["fedgtst"] == sizes["fedgtst-mean"] == (4 * 7_358 + 8, 4 * 7_358 + 8)
    assert sizes["scaffold"] == (8 * 7_358, 8 * 7_358)
    assert sizes["fediir"] == (4 * 7_358 + 4 * 850, 4 * 7_358)
    assert sizes["fedsr"] == (4 * (7_358 + 84 * 65),) * 2


def test_coefficient_and_rate_follow_their_schedules():
    made, *_ = given("fedgtst", 0.02, schedule="warmup", schedule_rounds=4, decay_rounds=2)
    known = [made.draws(index) for index in range(5)]
    assert [float(each["coefficient"]) for each in known] == pytest.approx([0, 0.005, 0.01, 0.015, 0.02])
    assert [float(each["rate"]) for each in known] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


def test_what_a_method_does_not_do_is_refused():
    made, weights, (x, y), drawn = given("fedavg")
    server = made.start(weights, 4)
    with pytest.raises(ValueError, match="fedavg does not ask its clients"):
        made.survey(server, x, y)
    with pytest.raises(ValueError, match="fedavg does not ask its clients"):
        made.take_survey(server, {}, torch.ones(1, dtype=torch.bool))
    with pytest.raises(ValueError, match="fedavg has no extra training"):
        made.extra_norm(server, x, y, drawn)
    with pytest.raises(UserError, match='method "fedprox" is unknown: choose one of fedavg, fedsr'):
        strategy("fedprox", 0.0, settings(), made.network)
    with pytest.raises(ValueError, match="fedsr needs a network with probabilistic=True"):
        strategy("fedsr", 1.0, settings(), made.network)
