"""The benchmark's own parts: methods that agree with the reference, rows that are what they say, a page redrawn."""

import json

import pytest
import torch
from benchmarks.methods import BY_SAMPLE, DENSE, METHODS, reference
from benchmarks.models import mlp, resnet18, vgg11
from benchmarks.rows import FULL, QUICK
from benchmarks.table import BEGIN, END, markdown, write_docs
from torch import nn


@pytest.fixture(scope="module")
def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mlp([12, 20, 11], nn.Tanh, 1.0), torch.randn(3, 12)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_methods_measure_the_same_thing(name, tiny):
    model, x = tiny
    values, _, _ = METHODS[name](model, x)
    exact = reference(mlp_copy(model), x, dense=True)
    torch.testing.assert_close(values.double(), exact, rtol=2e-3, atol=0)


def test_reference_without_rows_is_the_one_with_rows(tiny):
    model, x = tiny
    both = [reference(mlp_copy(model), x, dense).double() for dense in (True, False)]
    torch.testing.assert_close(both[1], both[0], rtol=1e-6, atol=0)


def mlp_copy(model):
    copy = mlp([12, 20, 11], nn.Tanh, 1.0)
    copy.load_state_dict(model.state_dict())
    return copy


def test_rows_build_the_same_thing_twice_and_have_distinct_names():
    for rows in (FULL, QUICK):
        assert len({row.name for row in rows}) == len(rows)
    with torch.random.fork_rng():
        (first, x), (second, z) = QUICK[0].build(), QUICK[0].build()
    assert torch.equal(x, z)
    assert torch.equal(first(x), second(z))


@pytest.mark.parametrize(("make", "parameters"), [(vgg11, 9_228_362), (resnet18, 11_173_962)])
def test_convolutional_networks_have_the_published_sizes(make, parameters):
    """For CIFAR, ResNet18 has 11.17 million parameters and VGG11 (batch norm, one linear head) 9.23 million."""
    model = make().eval()
    assert abs(sum(p.numel() for p in model.parameters()) - parameters) < 5_000
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def report():
    answer = {
        "cpu_seconds": 0.5,
        "peak_bytes": 2**20,
        "scaled_up_by": 1,
        "pulls": 10,
        "pushes": 9,
        "largest_error": 1e-5,
        "floor_seconds": 0.4,
    }
    peer = {"cpu_seconds": 2.0, "peak_bytes": 2**21, "scaled_up_by": 4, "pulls": None, "pushes": None}
    return {
        "machine": {"processor": "abacus", "threads": 1, "memory_bytes": 2**30},
        "versions": {"torch": "2"},
        "quick": True,
        "rows": [
            {
                "name": "mlp",
                "words": "a model",
                "passes": {"forward": 0.01},
                "methods": {"jacnorm": answer, "SciPy svds": peer, "jacrev + svdvals": {"failure": "not run"}},
                "pairs": {"0.01, each sample": {"median": 12.0, "largest": 14, "converged": 3, "samples": 4}},
            }
        ],
    }


def test_page_is_redrawn_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    write_docs(json.loads(json.dumps(report())), page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "stale" not in text
    for words in (
        "| 1.0x | 1.25x |",
        "4.0x",
        "from 1/4 of the batch",
        "not run",
        "3 of 4",
        "| a model | 10 |",
        "abacus",
    ):
        assert words in text
    once = markdown(report())
    write_docs(report(), page)
    assert page.read_text().count(once) == 1


def test_page_without_markers_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="exactly once"):
        write_docs(report(), page)


def test_groups_of_methods_exist():
    assert set(METHODS) >= DENSE | BY_SAMPLE
