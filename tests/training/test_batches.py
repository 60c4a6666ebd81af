from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jacnorm.errors import UserError
from jacnorm.training.batches import batch_indices, epoch_order, steps_per_epoch
from jacnorm.training.seeds import RunId

RUNS = (RunId("s", "a", 10), RunId("s", "a", 11), RunId("s", "b", 10))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 45), st.integers(0, 3), st.booleans())
def test_each_epoch_visits_every_sample_once(n, batch, epoch, drop_last):
    if drop_last and batch > n:
        return
    length = steps_per_epoch(n, batch, drop_last=drop_last)
    batches = [batch_indices(epoch * length + k, RUNS, n, batch, drop_last=drop_last) for k in range(length)]
    assert all(each.shape[1] == batch for each in batches[: None if drop_last else -1])
    seen = torch.cat(batches, dim=1)
    assert seen.shape == (len(RUNS), n - n % batch if drop_last else n)
    for row, run in zip(seen, RUNS, strict=True):
        assert len(set(row.tolist())) == len(row)
        assert torch.equal(row, epoch_order(run.study, run.cell, run.seed, epoch, n)[: len(row)])


def test_orders_differ_between_runs_and_epochs_and_not_between_calls():
    orders = [epoch_order(run.study, run.cell, run.seed, epoch, 30) for run in RUNS for epoch in range(3)]
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    assert torch.equal(batch_indices(4, RUNS, 30, 8), batch_indices(4, RUNS, 30, 8))
    assert torch.equal(batch_indices(4, RUNS, 30, 8)[1:2], batch_indices(4, RUNS[1:2], 30, 8))


def test_a_batch_belongs_to_its_caller():
    batch_indices(0, RUNS, 30, 8).zero_()
    assert batch_indices(0, RUNS, 30, 8).any()


@pytest.mark.parametrize(("n", "batch", "drop_last"), [(0, 4, False), (4, 0, False), (4, 5, True)])
def test_epochs_without_a_batch_are_refused(n, batch, drop_last):
    with pytest.raises(UserError, match="cannot be split into whole batches"):
        steps_per_epoch(n, batch, drop_last=drop_last)
