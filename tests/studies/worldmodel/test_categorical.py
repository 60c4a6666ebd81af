"""Groups of logits against PyTorch's own softmax and distributions, which share no code with them."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, Independent, kl_divergence

from jacnorm.studies.worldmodel.categorical import divergence, gumbel, probabilities, sampled

torch.set_num_threads(1)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_probabilities_are_a_softmax_in_each_group_and_twice_differentiable():
    logits = random(2, 5, 12).requires_grad_()
    expected = logits.unflatten(-1, (4, 3)).softmax(-1).flatten(-2)
    assert torch.allclose(probabilities(logits, 3), expected, atol=1e-14)
    small = random(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: probabilities(x, 3), small)
    assert torch.autograd.gradgradcheck(lambda x: probabilities(x, 3), small)


def test_large_logits_neither_overflow_nor_vanish():
    logits = torch.tensor([[1e4, 0.0, -1e4, -1e4, -1e4, -1e4]])
    assert probabilities(logits, 3).tolist() == [[1.0, 0.0, 0.0, *[pytest.approx(1 / 3)] * 3]]
    assert divergence(logits, logits, 3).tolist() == [0.0]


def test_divergence_is_that_of_independent_categoricals_with_its_gradients():
    q, p = random(4, 10).requires_grad_(), random(4, 10, seed=1).requires_grad_()
    first, second = (Independent(Categorical(logits=each.unflatten(-1, (2, 5))), 1) for each in (q, p))
    expected = kl_divergence(first, second)
    found = divergence(q, p, 5)
    assert torch.allclose(found, expected, atol=1e-13)
    for one, other in zip(*(torch.autograd.grad(each.sum(), (q, p)) for each in (found, expected)), strict=True):
        assert torch.allclose(one, other, atol=1e-13)


def test_a_sample_is_one_hot_at_the_largest_noisy_logit_and_has_the_gradient_of_the_probabilities():
    logits, noise = random(3, 8).requires_grad_(), random(3, 8, seed=1)
    found = sampled(logits, noise, 4)
    expected = torch.nn.functional.one_hot((logits + noise).unflatten(-1, (2, 4)).argmax(-1), 4)
    assert torch.equal(found.unflatten(-1, (2, 4)), expected.double())
    weights = random(3, 8, seed=2)
    gradient, soft = (
        torch.autograd.grad((weights * each).sum(), logits)[0] for each in (found, probabilities(logits, 4))
    )
    assert torch.equal(gradient, soft)
    with torch.no_grad():
        assert torch.equal(sampled(logits, noise, 4), found)


def test_gumbel_noise_makes_samples_follow_the_probabilities():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    counts = sampled(logits.expand(20_000, 4), gumbel((20_000, 4), torch.Generator().manual_seed(3)), 4).mean(0)
    expected = logits.softmax(0)
    assert ((counts - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt()).all()
