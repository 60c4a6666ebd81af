"""Rounds: the batched engine against the plain one, alone against together, dropped clients, ends, resuming."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from tests.studies.fedgtst.tiny import METHODS, after, data, federation, settings

from jacnorm.studies.fedgtst import draws
from jacnorm.studies.fedgtst.engine import BatchedEngine, Data
from jacnorm.studies.fedgtst.loop import LoopEngine
from jacnorm.studies.fedgtst.strategies import DIVERGED, GOING_ON, UNSTABLE, payload_bytes

torch.set_num_threads(1)


def assert_same(one, two, *, tolerance=0.0):
    assert set(one) == set(two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("method", METHODS)
def test_both_engines_agree_over_three_rounds(method):
    chosen = settings(participation=0.75)
    batched = after(*federation(method, chosen), 3)
    plain = after(*federation(method, chosen, kind=LoopEngine), 3)
    assert_same(batched[0], plain[0], tolerance=1e-5)
    assert_same(batched[1], plain[1], tolerance=1e-5)
    for ours, theirs in zip(batched[2], plain[2], strict=True):
        assert torch.equal(ours.participants, theirs.participants)
        for name in ("loss", "guide", "norms"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-6, equal_nan=True)
        assert (ours.bytes_down, ours.bytes_up, ours.weight_bytes) == (
            theirs.bytes_down,
            theirs.bytes_up,
            theirs.weight_bytes,
        )
    start = federation(method, chosen)[1]
    assert not torch.equal(start["weights.dense1.weight"], batched[0]["weights.dense1.weight"])


@pytest.mark.parametrize("method", ["fedgtst", "fedsr", "scaffold"])
def test_a_run_alone_is_the_run_among_others(method):
    both, memories, reports = after(*federation(method, coefficients=[0.01, 0.03]), 2)
    whole = data()
    alone = Data(whole.x, whole.y, whole.index[1:])
    one, memory, report = after(*federation(method, given=alone, coefficients=[0.03], seeds=[11]), 2)
    assert_same({name: tensor[1:] for name, tensor in both.items()}, one, tolerance=1e-5)
    assert_same({name: tensor[1:] for name, tensor in memories.items()}, memory, tolerance=1e-5)
    assert torch.equal(reports[1].participants[1:], report[1].participants)


@pytest.mark.parametrize("method", ["fedgtst", "scaffold"])
def test_chunks_change_rounding_only(method):
    assert_same(after(*federation(method, chunk=3), 2)[0], after(*federation(method, chunk=8), 2)[0], tolerance=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_round_is_a_pure_function_of_state_and_number(method):
    engine, servers, memories = federation(method, settings(participation=0.5))
    kept = {name: tensor.clone() for name, tensor in (servers | memories).items()}
    whole = after(engine, servers, memories, 3)
    assert_same(servers | memories, kept)
    half = after(engine, servers, memories, 1)
    resumed = after(federation(method, settings(participation=0.5))[0], *half[:2], 2, first=1)
    assert_same(whole[0], resumed[0])
    assert_same(whole[1], resumed[1])


def test_participants_and_reports_are_those_drawn():
    chosen = settings(participation=0.5)
    _, memories, reports = after(*federation("scaffold", chosen, seeds=[10, 11, 12], given=data(3, 6)), 2)
    for index, report in enumerate(reports):
        for run, seed in enumerate((10, 11, 12)):
            assert torch.equal(report.participants[run], draws.participants(chosen, 6, "tiny", seed, index))
        assert report.answered.all()
        assert report.dropped.tolist() == [0, 0, 0]
        assert report.guide.isnan().all()
        assert report.norms.isnan().all()
        assert report.loss.isfinite().all()
    for run in range(3):  # who never took part has learnt nothing to keep
        seen = {client for report in reports for client in report.participants[run].tolist()}
        moved = memories["read_out.bias"][run].abs().sum(1) > 0
        assert set(moved.nonzero().flatten().tolist()) == seen


def test_the_first_guide_is_that_of_all_clients():
    engine, servers, _ = federation("fedgtst", settings(participation=0.25))
    for run in range(2):
        weights = {name[8:]: tensor[run] for name, tensor in servers.items() if name.startswith("weights.")}
        norms = [engine.one.norm(weights, *engine.data.of(run, client)).item() for client in range(4)]
        assert servers["guide"][run].item() == pytest.approx(max(norms), rel=1e-5)


def test_extra_clients_train_twice_and_only_they(monkeypatch):
    chosen = settings(extra_share=0.5)
    engine, servers, memories = federation("fedgtst", chosen)
    _, _, report = engine.round(servers, memories, 0)
    without, same, none = federation("fedgtst", settings(extra_share=0))
    _, _, plain = without.round(same, none, 0)
    extra = torch.stack([draws.extra(chosen, 4, "tiny", seed, 0) for seed in (10, 11)])
    assert extra.sum(1).tolist() == [2, 2]
    assert torch.equal(report.norms[~extra], plain.norms[~extra])
    assert (report.norms[extra] >= plain.norms[extra]).all()
    assert (report.norms[extra] > plain.norms[extra]).any()


def with_bad_client(*bad, runs=2):
    """Clients of the given numbers see infinite pixels, in run 0 only; all clients' samples are their own."""
    base = data(runs)
    x = torch.cat([base.x, torch.full((1, 3, 8, 8), math.inf)])
    y, index = torch.cat([base.y, base.y[:1]]), base.index.clone()
    for client in bad:
        index[0, client, 0] = len(base.x)
    return Data(x, y, index)


@pytest.mark.parametrize("kind", [BatchedEngine, LoopEngine])
@pytest.mark.parametrize("method", ["fedavg", "fedgtst", "scaffold", "fediir"])
def test_a_client_without_a_finite_answer_is_dropped_and_named(method, kind, caplog):
    with caplog.at_level(logging.WARNING):
        servers, _, reports = after(*federation(method, given=with_bad_client(2), kind=kind), 2)
    for report in reports:
        assert report.answered.tolist() == [[True, True, False, True], [True] * 4]
        assert report.dropped.tolist() == [1, 0]
        assert report.outcome.tolist() == [GOING_ON, GOING_ON]
        assert report.loss.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in servers.values())
    lines = [record.message for record in caplog.records]
    assert any(", tiny, seed 10, round 1: client 2 is dropped: its answer is not finite" in line for line in lines)
    assert all("client 2" in line and "seed 10" in line for line in lines)


def test_a_run_with_too_few_answers_ends_and_stays(caplog):
    engine, servers, memories = federation("fedgtst", given=with_bad_client(0, 1, 3))
    with caplog.at_level(logging.WARNING):
        first = engine.round(servers, memories, 0)
    assert first[2].outcome.tolist() == [DIVERGED, GOING_ON]
    assert "seed 10, round 0: diverged: only 1 of 4 clients answered" in caplog.text
    second = engine.round(*first[:2], 1)
    for name in set(servers) - {"outcome"}:
        assert torch.equal(second[0][name][0], servers[name][0])
    assert second[2].participants[0].tolist() == [-1] * 4
    assert second[2].dropped.tolist() == [0, 0]
    assert second[2].loss[0].isnan()
    assert second[2].loss[1].isfinite()
    assert second[2].outcome.tolist() == [DIVERGED, GOING_ON]
    alone = after(*federation("fedgtst", given=data()), 2)[0]
    assert_same(
        {name: tensor[1] for name, tensor in second[0].items()},
        {name: tensor[1] for name, tensor in alone.items()},
        tolerance=1e-5,
    )


def test_a_run_whose_guide_runs_away_ends_with_its_last_weights(caplog):
    engine, servers, memories = federation(
        "fedgtst", settings(runaway=1.001, learning_rate=1.0), coefficients=[0.2, 0.2]
    )
    with caplog.at_level(logging.WARNING):
        servers, memories, reports = after(engine, servers, memories, 6)
    ended = [report.outcome.tolist() for report in reports]
    assert ended[-1] == [UNSTABLE, UNSTABLE]
    when = [next(i for i, each in enumerate(ended) if each[run] == UNSTABLE) for run in range(2)]
    for run, index in enumerate(when):
        assert reports[index].guide[run] > 1.001 * servers["first_guide"][run]
        assert reports[index].guide[run] == servers["guide"][run]
    assert "unstable: the guide" in caplog.text
    nothing = engine.round(servers, memories, 6)  # all have ended
    assert_same(nothing[0], servers)
    assert nothing[2].loss.isnan().all()
    assert nothing[2].outcome.tolist() == [UNSTABLE, UNSTABLE]
    assert nothing[2].bytes_down == nothing[2].bytes_up == 0


def test_bytes_of_a_round_count_the_exchange_before_training():
    sizes = {method: federation(method)[0:3] for method in ("fedavg", "fedgtst", "fediir")}
    reports = {method: engine.round(*state, 0)[2] for method, (engine, *state) in sizes.items()}
    weights = 4 * 7_358
    assert [report.weight_bytes for report in reports.values()] == [weights] * 3
    assert (reports["fedavg"].bytes_down, reports["fedavg"].bytes_up) == (weights, weights)
    assert (reports["fedgtst"].bytes_down, reports["fedgtst"].bytes_up) == (weights + 8, weights + 8)
    head = 4 * 850
    assert (reports["fediir"].bytes_down, reports["fediir"].bytes_up) == (2 * weights + head, weights + head)
    assert payload_bytes({"a": torch.zeros(3, dtype=torch.float64), "metrics.loss": torch.zeros(1)}) == 24


def test_engines_of_unequal_parts_are_refused():
    engine, _, _ = federation("fedgtst")
    other, _, _ = federation("fedavg")
    with pytest.raises(ValueError, match="2 strategies, 1 seeds and 2 splits"):
        BatchedEngine(engine.strategies, [10], "tiny", data())
    with pytest.raises(ValueError, match="share one method, not fedavg, fedgtst"):
        BatchedEngine([engine.one, other.one], [10, 11], "tiny", data())
    changed, _, _ = federation("fedgtst", settings(batch=5))
    with pytest.raises(ValueError, match="share their settings"):
        BatchedEngine([engine.one, changed.one], [10, 11], "tiny", data())
