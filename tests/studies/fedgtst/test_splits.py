"""Which samples each client holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jacnorm.errors import UserError
from jacnorm.studies.fedgtst.settings import BoundsSettings, FederatedSettings, TrainingSettings
from jacnorm.studies.fedgtst.splits import client_rows, clients, coverage, histogram

LABELS = torch.arange(4000) % 10


def settings(samples: int = 20, concentration: float = 0.5) -> TrainingSettings:
    return TrainingSettings(seeds=[10], client_samples=samples, concentration=concentration)


def sentence(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        clients(*arguments)
    return str(caught.value)


@given(st.sampled_from(["paper", "balanced", "dirichlet"]), st.integers(1, 30), st.integers(1, 25), st.integers(0, 99))
def test_every_client_has_as_many_samples_and_none_twice(split, number, samples, seed):
    rows = clients(settings(samples), number, split, seed, LABELS, 10)
    assert rows.shape == (number, samples)
    assert rows.dtype == torch.int64
    assert len(rows.unique()) == rows.numel()
    assert (rows.diff(dim=1) > 0).all()
    assert histogram(rows, LABELS, 10).sum(1).tolist() == [samples] * number
    assert torch.equal(rows, clients(settings(samples), number, split, seed, LABELS, 10))


@given(st.sampled_from(["paper", "balanced"]), st.integers(1, 30), st.integers(2, 25), st.integers(0, 99))
def test_two_classes_each_halved(split, number, samples, seed):
    counts = histogram(clients(settings(samples), number, split, seed, LABELS, 10), LABELS, 10)
    assert ((counts > 0).sum(1) == 2).all()
    halves = sorted({samples // 2, samples - samples // 2})
    assert counts[counts > 0].unique().tolist() == halves


@given(st.integers(1, 60), st.integers(2, 12), st.integers(0, 99))
def test_balanced_classes_have_as_many_clients(number, classes, seed):
    y = torch.arange(4000) % classes
    rows = clients(settings(2), number, "balanced", seed, y, classes)
    holders = (histogram(rows, y, classes) > 0).sum(0)
    assert holders.sum() == 2 * number
    assert holders.max() - holders.min() <= 1


def test_balanced_covers_ten_classes_with_ten_clients_in_pairs_that_vary():
    pairs = set()
    for seed in range(200):
        rows = clients(settings(), 10, "balanced", seed, LABELS, 10)
        assert coverage(rows, LABELS) == 10
        pairs |= {tuple(row.nonzero().flatten().tolist()) for row in histogram(rows, LABELS, 10)}
    assert len(pairs) == 45  # all of them


def test_independent_pairs_miss_as_many_classes_as_they_should():
    """10 * 0.8^10 = 1.074 classes are nobody's on average; the mean over 600 draws has a standard error below 0.04."""
    draws = torch.tensor(
        [10 - coverage(clients(settings(2), 10, "paper", seed, LABELS, 10), LABELS) for seed in range(600)]
    ).double()
    assert abs(draws.mean() - 10 * 0.8**10) < 4 * draws.std() / 600**0.5
    assert draws.std() / 600**0.5 < 0.04


def test_dirichlet_shares_have_the_variance_of_their_concentration():
    """A share has mean 1 / C and variance (C - 1) / (C^2 (C a + 1)), and n samples add (E q - E q^2) / n."""
    y = torch.arange(400_000) % 10
    for concentration in (0.1, 0.5, 5.0):
        rows = clients(settings(400, concentration), 500, "dirichlet", 10, y, 10)
        shares = histogram(rows, y, 10) / 400
        spread = 9 / (100 * (10 * concentration + 1))
        expected = spread + (0.1 - spread - 0.01) / 400
        assert abs(shares.double().var(correction=0) / expected - 1) < 0.1
        assert (shares.mean(0) - 0.1).abs().max() < 5 * (expected / 500) ** 0.5


@pytest.mark.parametrize("concentration", [1e-3, 0.5])
def test_dirichlet_can_use_every_sample(concentration):
    """Also where shares underflow to 0 and the classes that a client would have are used up."""
    y = torch.arange(1000) % 10
    rows = clients(settings(100, concentration), 10, "dirichlet", 10, y, 10)
    assert rows.flatten().sort().values.tolist() == list(range(1000))


def test_domains_are_one_client_each():
    domains = torch.arange(3).repeat_interleave(torch.tensor([50, 20, 90]))
    y = torch.arange(160) % 7
    rows = clients(settings(20), 3, "domains", 10, y, 7, domains)
    assert domains[rows].tolist() == [[number] * 20 for number in range(3)]
    assert len(rows.unique()) == 60
    assert not torch.equal(rows[0], clients(settings(20), 3, "domains", 11, y, 7, domains)[0])


def test_seeds_differ_and_classes_do_not_depend_on_the_number_of_samples():
    few, many = (clients(settings(n), 10, "paper", 10, LABELS, 10) for n in (4, 40))
    assert torch.equal(histogram(few, LABELS, 10) > 0, histogram(many, LABELS, 10) > 0)
    other = clients(settings(40), 10, "paper", 11, LABELS, 10)
    assert not torch.equal(histogram(other, LABELS, 10), histogram(many, LABELS, 10))


def test_bounds_take_the_same_splits():
    own = BoundsSettings(client_samples=20)
    assert torch.equal(
        clients(own, 10, "balanced", 10, LABELS, 10), clients(settings(), 10, "balanced", 10, LABELS, 10)
    )


def test_rows_of_the_table():
    y = torch.tensor([0, 1, 1, 2])
    rows = list(client_rows(10, "digits", "paper", torch.tensor([[0, 1], [1, 2]]), y, 3))
    assert [(row["client"], row["label"], row["samples"]) for row in rows] == [
        *((0, 0, 1), (0, 1, 1), (0, 2, 0)),
        *((1, 0, 0), (1, 1, 2), (1, 2, 0)),
    ]
    shared = {"seed": 10, "source": "digits", "clients": 2, "split": "paper"}
    assert all(row.items() >= shared.items() for row in rows)


def test_too_few_samples():
    y = torch.arange(100) % 10
    message = sentence(settings(20), 10, "balanced", 10, y, 10)
    assert message == (
        'client_samples is 20, so class 0, which 2 of 10 clients hold in the split "balanced", needs 20 samples, but '
        "has 10; set client_samples to at most 10"
    )
    assert clients(settings(10), 10, "balanced", 10, y, 10).shape == (10, 10)
    assert sentence(settings(2), 60, "balanced", 10, y, 10).endswith("needs 12 samples, but has 10; take fewer clients")
    assert sentence(settings(20), 10, "dirichlet", 10, y, 10) == (
        "client_samples is 20, so 10 clients need 200 samples, but there are 100; set client_samples to at most 10"
    )
    assert sentence(settings(2), 101, "dirichlet", 10, y, 10).endswith("but there are 100; take fewer clients")
    domains = torch.tensor([0] * 80 + [1] * 20)
    assert sentence(settings(30), 2, "domains", 10, y, 10, domains) == (
        "client_samples is 30, but domain 1 has 20 training samples; set client_samples to at most 20"
    )


def test_the_advice_is_the_largest_number_that_works():
    for seed in range(10):
        y = torch.arange(400) % 10
        most = int(sentence(settings(200), 10, "paper", seed, y, 10).rsplit(" ", 1)[1])
        assert clients(settings(most), 10, "paper", seed, y, 10).shape == (10, most)
        with pytest.raises(UserError):
            clients(settings(most + 2), 10, "paper", seed, y, 10)


def test_splits_that_do_not_fit_the_data():
    assert sentence(settings(), 5, "domains", 10, LABELS, 10) == (
        'the split "domains" needs the domain of each sample; use it with DomainNet only'
    )
    assert sentence(settings(), 5, "domains", 10, LABELS, 10, LABELS % 4) == (
        'the split "domains" has one client per domain: set clients to 4, not 5'
    )
    assert sentence(settings(), 5, "paper", 10, LABELS * 0, 1) == (
        'the split "paper" gives each client two classes, but there is 1; use dirichlet'
    )


def test_a_total_is_divided_equally_among_any_number_of_clients():
    settings = FederatedSettings(seeds=[10], total_samples=100, clients=[5, 10])
    y = torch.arange(10).repeat(20)
    assert clients(settings, 5, "balanced", 10, y, 10).shape == (5, 20)
    assert clients(settings, 10, "dirichlet", 10, y, 10).shape == (10, 10)


def test_a_total_too_small_for_a_sample_each_is_one_sentence():
    settings = FederatedSettings(seeds=[10], total_samples=4, clients=[5])
    with pytest.raises(UserError, match=r"^total_samples is too small for 5 clients; take at least 5$"):
        clients(settings, 5, "balanced", 10, torch.arange(10).repeat(20), 10)
