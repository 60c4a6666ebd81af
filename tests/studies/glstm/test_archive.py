"""The published archive's format, written by `torch.save` as its generator writes it, and everything that may be wrong.

The tiny archives (`archives`) hold labels of networkx, so that the reader's own labels are not their oracle.
"""

from __future__ import annotations

import logging
import os
import pickle

import pytest
import torch
from tests.studies.glstm.archives import content, saved

from jacnorm.errors import UserError
from jacnorm.studies.glstm.archive import read
from jacnorm.studies.glstm.pna_graphs import distances, labels

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("order", "columns"),
    [
        (
            ("sssp", "eccentricity", "laplacian"),
            {"sssp": "eccentricity", "eccentricity": "laplacian", "laplacian": "sssp", "diameter": "diameter"},
        ),
        (
            ("eccentricity", "laplacian", "sssp"),
            {"sssp": "sssp", "eccentricity": "eccentricity", "laplacian": "laplacian", "diameter": "diameter"},
        ),
    ],
)
def test_columns_are_named_after_what_they_are(tmp_path, order, columns, caplog):
    parts = content(order)
    with caplog.at_level(logging.INFO, logger="jacnorm"):
        logging.getLogger("jacnorm").propagate = True
        found = read(saved(tmp_path, parts))
    assert found.columns == columns
    for column, name in enumerate(order):
        users = ("eccentricity", "laplacian", "sssp")[column]
        said = "as its users call it" if users == name else f"which its users call {users}"
        assert f"pna_dataset_25-35.pkl: column {column} of the node labels is {name}, {said}" in caplog.text
    # the simpler signs of the two orders: a 0 at the source, and numbers that are no distances
    values = torch.cat([block.flatten(0, 1) for block in parts[2]["train"]])
    sources = torch.cat([block[..., 0].flatten() for block in parts[1]["train"]]).bool()
    assert (not values[sources, 0].any()) is (order[0] == "sssp")
    assert bool((values[:, 2] % 1).any()) is (order[2] == "laplacian")


@pytest.mark.parametrize("zipped", [True, False])
def test_graphs_and_labels_come_through(tmp_path, zipped):
    """In either format of torch.save; the archive is from the time of the older one."""
    parts = content()
    found = read(saved(tmp_path, parts, zipped))
    assert list(found.graphs) == ["train", "validation", "test"]
    assert len(found.digest) == 64
    train = found.graphs["train"]
    assert train.nodes.tolist() == [6, 6, 6, 7, 7, 7, 8, 8, 8]
    assert {graphs.values.shape[1] for graphs in found.graphs.values()} == {8}
    sssp = labels("sssp", train, distances(train.adjacency))
    for number, nodes in enumerate([6, 7, 8]):
        given = parts[2]["train"][number][..., 0]
        assert torch.equal(sssp[3 * number : 3 * number + 3, :nodes], given)
        assert torch.equal(train.values[3 * number : 3 * number + 3, :nodes], parts[1]["train"][number][..., 1])


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def broken(change):
    parts = content()
    change(parts)
    return parts


def _set(parts, part, split, value):
    parts[part][split] = value


WRONG = [
    (lambda p: _set(p, 2, "val", [b[:, :, :2] for b in p[2]["val"]]), r"block 0 of split val has tensors of shapes"),
    (lambda p: _set(p, 0, "val", [b[0] for b in p[0]["val"]]), r"block 0 of split val has tensors of shapes"),
    (lambda p: _set(p, 2, "test", p[2]["test"] * 2), "the parts of split test differ in their number of tensors"),
    (lambda p: _set(p, 1, "train", "none"), "its features of split train are no list of tensors"),
    (lambda p: p[3].pop("val"), "its graph labels lack a split of train, val, test"),
    (lambda p: p[0]["train"][0].mul_(2), "not symmetric with entries 0 and 1"),
    (lambda p: p[0]["train"][0][0, 0, 1].zero_(), "not symmetric with entries 0 and 1"),
    (lambda p: p[0]["train"][0][0, 0, 0].fill_(1), "has nodes with an edge to themselves"),
    (lambda p: p[1]["train"][0][0, :, 0].fill_(1), "does not mark exactly one source"),
    (lambda p: p[2]["test"][0][0, 0, 1].add_(1), "column 1 of the node labels .there called laplacian. is no label"),
    (lambda p: p[2]["test"][0][0, 0, 1].fill_(torch.nan), "column 1 of the node labels .there called laplacian."),
    (lambda p: [b[..., 1].copy_(b[..., 0]) for split in p[2].values() for b in split], "column 1 .* is no label"),
    (lambda p: p[3]["val"][0][:, 1].add_(3), "the diameter, differs from the graphs' diameters by 3"),
    (lambda p: [p[0]["val"][0][0, 0].zero_(), p[0]["val"][0][0, :, 0].zero_()],
     "graph 0 of split validation of .*pkl has a node without an edge"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), WRONG)
def test_an_unexpected_archive_is_refused_in_a_sentence(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        read(saved(tmp_path, broken(change)))


@pytest.mark.parametrize(
    ("thing", "words"), [([1, 2, 3], "a list of 3"), (torch.zeros(4), "a Tensor"), ({"adj": 1}, "a dict of 1")]
)
def test_something_else_in_the_file_is_refused(tmp_path, thing, words):
    with pytest.raises(UserError, match=f"holds {words}, not the four parts"):
        read(saved(tmp_path, thing))


def test_a_pickle_that_could_run_code_is_not_loaded(tmp_path):
    mark = tmp_path / "it ran"
    path = saved(tmp_path, [Evil(mark)] * 4)
    with pytest.raises(UserError, match="something besides tensors and plain containers, which could run code"):
        read(path)
    path.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(UserError, match="something besides tensors and plain containers"):
        read(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()  # the check can fail


def test_missing_and_damaged_files_are_told(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pkl does not exist; correct its name"):
        read(tmp_path / "nowhere.pkl")
    path = saved(tmp_path, content())
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"cannot be read \(.*\); fetch it anew|is no file of torch.save"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be read \(.*\); fetch it anew|is no file of torch.save"):
        read(path)
