"""Margins against their definition, quantiles against PyTorch's."""

from __future__ import annotations

import pytest
import torch

from jacnorm.studies.lipschitz.margins import QUANTILES, margins, summary


@pytest.mark.parametrize("classes", [2, 5])
def test_a_margin_is_the_true_logit_minus_the_largest_other_one(classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20, classes, generator=generator)
    labels = torch.randint(classes, (3, 20), generator=generator)
    for run in range(3):
        for sample in range(20):
            row, label = logits[run, sample].tolist(), labels[run, sample].item()
            expected = row[label] - max(value for k, value in enumerate(row) if k != label)
            assert margins(logits, labels)[run, sample].item() == pytest.approx(expected, rel=1e-6)
    shared = margins(logits, labels[0])
    assert torch.equal(shared, margins(logits, labels[:1].expand(3, -1)))
    assert torch.equal(shared > 0, logits.argmax(2) == labels[0])


def test_a_tie_has_margin_zero():
    assert margins(torch.tensor([[[1.0, 1.0, 0.0]]]), torch.tensor([1])).item() == 0


def test_the_margin_can_be_differentiated_twice():
    logits = torch.randn(1, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0])
    (first,) = torch.autograd.grad((margins(logits.sin(), labels) ** 2).sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), logits)
    assert second.isfinite().all()
    assert torch.autograd.gradgradcheck(lambda z: margins(z.sin(), labels) ** 2, logits)


@pytest.mark.parametrize("samples", [1, 2, 37])
def test_the_smallest_and_the_quantiles(samples):
    values = torch.randn(2, samples, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = summary(values)
    assert list(found) == ["margin", *QUANTILES]
    assert torch.equal(found["margin"], values.min(1).values)
    for name, share in QUANTILES.items():
        torch.testing.assert_close(found[name], torch.quantile(values, share, dim=1))
