"""The graphs of associative recall: what they hold, and on what they depend."""

from __future__ import annotations

import pytest
import torch

from jacnorm.errors import UserError
from jacnorm.studies.glstm.networks import Cell, planned
from jacnorm.studies.glstm.recall import Graphs, check_vocabulary, draw, split, stacked
from jacnorm.studies.glstm.settings import RecallSettings

SEEDS = [10, 11, 12]


def test_values_and_questions_are_uniform():
    graphs = draw("nar", 5, 20_000, torch.Generator().manual_seed(0))
    assert graphs.values.shape == (20_000, 5)
    assert graphs.neighbours == 5
    for drawn in (graphs.values, graphs.asked):
        counts = torch.bincount(drawn.flatten(), minlength=5).double()
        assert len(counts) == 5
        expected = drawn.numel() / 5
        assert ((counts - expected) ** 2 / expected).sum() < 23.5  # chi-squared, 4 degrees of freedom, 1e-4


def test_vectors_are_normal():
    graphs = draw("narr", 3, 4000, torch.Generator().manual_seed(0))
    assert graphs.values.shape == (4000, 3, 16)
    deviations = 4 / graphs.values.numel() ** 0.5
    assert graphs.values.mean().abs() < deviations
    assert (graphs.values.square().mean() - 1).abs() < 1.5 * deviations


@pytest.mark.parametrize("task", ["nar", "narr"])
def test_the_target_is_the_value_asked_for(task):
    graphs = split(task, 4, 6, SEEDS, "train")
    assert graphs.values.shape[:3] == (3, 6, 4)
    for run in range(3):
        for graph in range(6):
            expected = graphs.values[run, graph, graphs.asked[run, graph]]
            assert torch.equal(graphs.targets[run, graph], expected)
    one = Graphs(graphs.values[0], graphs.asked[0])
    assert one.neighbours == 4
    assert torch.equal(one.targets, graphs.targets[0])


def test_each_run_takes_its_own_rows():
    graphs = split("nar", 4, 6, SEEDS, "train")
    rows = torch.tensor([[0, 5], [3, 3], [2, 1]])
    taken = graphs.take(rows)
    for run in range(3):
        assert torch.equal(taken.values[run], graphs.values[run, rows[run]])
        assert torch.equal(taken.asked[run], graphs.asked[run, rows[run]])
    part = graphs.part(2, 3)
    assert torch.equal(part.values, graphs.values[:, 2:5])
    assert torch.equal(graphs.first(2).asked, graphs.asked[:, :2])


def test_a_seed_has_its_graphs_alone_or_with_others_and_for_each_purpose():
    together = split("nar", 8, 10, SEEDS, "train")
    alone = split("nar", 8, 10, [11], "train")
    assert torch.equal(together.values[1], alone.values[0])
    assert torch.equal(together.asked[1], alone.asked[0])
    assert not torch.equal(together.values[0], together.values[1])
    assert not torch.equal(split("nar", 8, 10, [11], "test").values, alone.values)
    again = stacked([Graphs(together.values[run], together.asked[run]) for run in range(3)])
    assert torch.equal(again.values, together.values)


def test_more_neighbours_than_keys_are_refused():
    check_vocabulary(8, 8)
    with pytest.raises(UserError, match=r"graphs have 9 neighbours .* only 8 keys: train one with neighbours 9"):
        check_vocabulary(9, 8)


def test_networks_planned_by_the_settings():
    settings = RecallSettings(
        neighbours=[8, 4],
        memories=[8],
        further_memories=[8, 16],
        further_neighbours=[16],
        one_hop_memories=[8],
        one_hop_neighbours=[4],
        baselines=["gcn", "gatv2"],
        widths=[64, 128],
        baselines_k_hop=True,
        depths=[2, 3],
        depth_neighbours=[8, 16],
        fresh_controls=[16],
    )
    found = planned(settings)
    assert found[Cell("glstm", 8, True)] == [4, 8, 16]
    assert found[Cell("glstm", 16, True)] == [16]
    assert found[Cell("glstm", 8, False)] == [4]
    assert found[Cell("gcn", 64, False)] == [4, 8, 16]  # depth 2 is that of the main sweep
    assert found[Cell("gcn", 64, False, 3)] == [8, 16]
    assert found[Cell("gatv2", 128, True)] == [4, 8]
    assert found[Cell("gcn", 128, False, 2, "fresh")] == [16]
    assert len(found) == 3 + 2 * 2 * 2 + 1 + 1
    assert all(cell.data == "fresh" for cell in planned(settings.model_copy(update={"data": "fresh"})))
    nothing = settings.model_copy(update={"widths": [], "one_hop_neighbours": []})
    assert {cell.model for cell in planned(nothing)} == {"glstm"}
    assert all(cell.k_hop for cell in planned(nothing))
