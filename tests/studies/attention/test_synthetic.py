"""Rows with known geometry have the geometry that they are said to have."""

from __future__ import annotations

import pytest
import torch

from jacnorm.studies.attention.settings import SyntheticSettings
from jacnorm.studies.attention.synthetic import draw
from jacnorm.training.seeds import RunId

torch.set_num_threads(1)
RUN = RunId("attention", "test", 3)


@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.8])
def test_vectors_have_length_one_and_the_mean_cosine(cosine):
    x = draw(SyntheticSettings(cosine=cosine, dimension=256, heads=4, lengths=[200]), RUN).vectors
    assert x.shape == (4, 200, 256)
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(4, 200, dtype=torch.float64))
    cosines = x @ x.mT
    off = cosines[:, ~torch.eye(200, dtype=torch.bool)]
    torch.testing.assert_close(off.mean(1), torch.full((4,), cosine, dtype=torch.float64), atol=0.02, rtol=0)
    centres = x.mean(1)  # each head has its own
    if cosine:
        between = torch.nn.functional.cosine_similarity(centres[0], centres[1], dim=0)
        assert abs(between) < 0.3


def test_the_spread_of_logits_differs_between_heads_as_asked():
    logits = draw(SyntheticSettings(spread=2.0, heads=400, lengths=[100], dimension=2), RUN).logits
    assert logits.shape == (400, 1, 100)
    spreads = logits.flatten(1).std(1)
    assert spreads.mean().item() == pytest.approx(2.0, abs=0.1)
    assert spreads.quantile(0.02).item() == pytest.approx(1.02, abs=0.15)  # uniform on [1, 3]
    assert spreads.quantile(0.98).item() == pytest.approx(2.96, abs=0.35)


def test_rows_depend_on_the_seed_alone():
    settings = SyntheticSettings(heads=2, lengths=[16], dimension=3)
    first, again = draw(settings, RUN), draw(settings, RUN)
    other = draw(settings, RunId("attention", "test", 4))
    assert torch.equal(first.vectors, again.vectors)
    assert torch.equal(first.logits, again.logits)
    assert not torch.equal(first.logits, other.logits)
