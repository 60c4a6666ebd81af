"""What is drawn: counts, pairing of methods, independence of purposes."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from jacnorm.studies.fedgtst import draws
from jacnorm.studies.fedgtst.networks import build
from jacnorm.studies.fedgtst.settings import EnginesSettings


@given(
    clients=st.integers(1, 60),
    share=st.floats(0.01, 1),
    extra=st.floats(0, 1),
    seed=st.integers(0, 99),
    index=st.integers(0, 9),
)
@examples(max_examples=60, deadline=None)
def test_participants_are_distinct_and_as_many_as_their_share(clients, share, extra, seed, index):
    settings = EnginesSettings(participation=share, extra_share=extra)
    chosen = draws.participants(settings, clients, "cell", seed, index)
    k = max(1, round(share * clients))
    assert len(chosen) == len(set(chosen.tolist())) == k
    assert chosen.tolist() == sorted(chosen.tolist())
    assert 0 <= chosen.min() <= chosen.max() < clients
    also = draws.extra(settings, clients, "cell", seed, index)
    assert also.shape == (k,)
    assert also.sum() == (0 if extra == 0 else min(k, max(1, round(extra * clients))))


def test_other_settings_of_a_method_leave_the_streams_as_they_are():
    one = EnginesSettings(participation=0.5)
    other = EnginesSettings(participation=0.5, extra_share=0, optimiser="adam", guide_at="batch_mean", schedule="decay")
    for index in range(3):
        a, _, mine = draws.round_draws(one, 10, "cell", 10, index, 20)
        b, _, theirs = draws.round_draws(other, 10, "cell", 10, index, 20, width=4)
        assert torch.equal(a, b)
        assert set(theirs) - set(mine) == {"noise"}
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert "method" not in {
        name for f in vars(draws).values() if inspect.isfunction(f) for name in inspect.signature(f).parameters
    }


def test_a_client_draws_alone_what_it_draws_in_the_round():
    settings = EnginesSettings(participation=0.4, local_epochs=2)
    chosen, _, together = draws.round_draws(settings, 10, "cell", 11, 5, 12, width=3)
    assert together["order"].shape == together["order_extra"].shape == (4, 2, 12)
    assert together["noise"].shape == (4, 2, 12, 3)
    for place, client in enumerate(chosen.tolist()):
        alone = draws.client_draws(settings, "cell", 11, 5, client, 12, 3)
        assert all(torch.equal(alone[name], together[name][place]) for name in alone)
    orders = torch.cat([together["order"], together["order_extra"]]).view(-1, 12)
    assert (orders.sort(1).values == torch.arange(12)).all()
    assert len({tuple(order) for order in orders.tolist()}) == len(orders)


@pytest.mark.parametrize("change", [{"cell": "other"}, {"seed": 12}, {"index": 6}])
def test_cell_seed_and_round_change_everything_drawn(change):
    settings = EnginesSettings(participation=0.2, extra_share=0.05)
    base = {"cell": "cell", "seed": 11, "index": 5}
    one = draws.round_draws(settings, 60, **base, samples=40, width=2)
    two = draws.round_draws(settings, 60, **base | change, samples=40, width=2)
    assert not torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])
    assert not any(torch.equal(one[2][name], two[2][name]) for name in one[2])


def test_initial_weights_are_one_start_per_seed():
    network = build("lenet", (3, 8, 8), 10)
    one, again, other = (draws.initial_weights(network, "cell", seed) for seed in (10, 10, 11))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
