"""The theorems against their printed sums, closed forms for two matrices, and the exact synthetic networks.

The printed sums are written out below with the paper's own indices, loop by loop; the module rearranges them.
"""

from __future__ import annotations

import math

import pytest
import torch

from jacnorm.studies.lipschitz import bounds
from jacnorm.studies.lipschitz.bounds import DataNorms, LayerNorms

CURVATURE = 0.77


def random_norms(r, seed=0, runs=2, scale=1.0, margin=0.3):
    """Norms without any relation among them: the formulas do not need one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    places = 2 * r
    sigma = draw(runs, places, places).tril()
    sigma.diagonal(dim1=1, dim2=2).zero_()
    sigma = sigma.masked_fill(~torch.ones(places, places, dtype=torch.bool).tril(), math.nan)  # never to be read
    layers = LayerNorms(sigma[:, -1, 1::2], *(draw(runs, r) for _ in range(4)))
    margins = torch.tensor([margin, 2 * margin], dtype=torch.float64)[:runs]
    return DataNorms(layers, sigma, draw(runs, r - 1), margins)


class Printed:
    """Theorems 1.1, 7.1 and F.1 as printed, for one network, with j, j', j'', i and i' counted from 1."""

    def __init__(self, norms, run):
        self.norms, self.run = norms, run
        self.r = norms.layers.rows.shape[1]
        self.gamma = norms.margin[run].item()

    def sigma(self, later, earlier):
        """sigma_{j' <- j}; 1 for j' = j - 1."""
        return 1.0 if later == earlier - 1 else math.exp(self.norms.interlayer[self.run, later, earlier - 1].item())

    def t(self, i):
        return math.exp(self.norms.layers.hidden[self.run, i].item())

    def a(self, i):
        return math.exp(self.norms.layers.rows[self.run, i - 1].item())

    def b(self, i):
        return math.exp(self.norms.layers.entries[self.run, i - 1].item())

    def h1(self, i):
        return self.sigma(2 * self.r - 1, 2 * i) / self.gamma

    def h2(self, i):
        return sum(self.sigma(2 * k, 2 * i) / self.t(k) for k in range(i, self.r))

    def h3(self, i):
        total = 0.0
        for later in range(1, 2 * self.r):
            for earlier in range(1, later + 1):
                for middle in range(max(2 * i, earlier), later + 1):
                    if middle % 2 == 0:
                        numerator = (
                            self.sigma(later, middle + 1)
                            * self.sigma(middle - 1, 2 * i)
                            * self.sigma(middle - 1, earlier)
                        )
                        total += CURVATURE * numerator / self.sigma(later, earlier)
        return total

    def relu(self, i):
        smallest = self.norms.preactivation[self.run].exp().tolist()
        return sum(self.sigma(2 * k - 1, 2 * i) / smallest[k - 1] for k in range(i, self.r))

    def jac(self, i):
        return sum(
            self.sigma(later, 2 * i) * self.sigma(2 * i - 2, earlier) / self.sigma(later, earlier)
            for earlier in range(1, 2 * i)
            for later in range(2 * i - 1, 2 * self.r)
        )

    def first_term(self, hid, jac=None):
        layers = range(1, self.r + 1)
        total = sum((hid(i) * self.a(i) * self.t(i - 1)) ** (2 / 3) for i in layers)
        if jac is not None:
            total += sum((jac(i) * self.b(i)) ** (2 / 3) for i in layers)
        return total**1.5

    def simplified(self):
        pairs = [(later, earlier) for later in range(1, 2 * self.r) for earlier in range(1, later + 1)]
        s = max(1.0, *(self.sigma(*pair) for pair in pairs))
        t = max(1.0, *(self.t(i) for i in range(self.r)))
        layers = range(1, self.r + 1)
        a, b = ((1 + sum(f(i) ** (2 / 3) for i in layers)) ** 1.5 for f in (self.a, self.b))
        return (s / self.gamma + self.r**3 * s**2) * t * a + self.r**2 * s * b


@pytest.mark.parametrize("r", [2, 3, 5])
def test_theorem_7_1_is_its_printed_sums(r):
    norms = random_norms(r)
    kappas = bounds.smooth_kappas(norms, CURVATURE)
    found = bounds.bound(norms, kappas)
    for run in range(2):
        printed = Printed(norms, run)
        for i in range(1, r + 1):
            assert kappas.h1[run, i - 1].exp().item() == pytest.approx(printed.h1(i))
            assert kappas.h2[run, i - 1].exp().item() == pytest.approx(printed.h2(i))
            assert kappas.h3[run, i - 1].exp().item() == pytest.approx(printed.h3(i))
            assert kappas.jac[run, i - 1].exp().item() == pytest.approx(printed.jac(i))
            whole = printed.h1(i) + printed.h2(i) + printed.h3(i)
            assert kappas.hid[run, i - 1].exp().item() == pytest.approx(whole)
        for part in ("h1", "h2", "h3"):
            assert getattr(found, part)[run].exp().item() == pytest.approx(printed.first_term(getattr(printed, part)))
        total = printed.first_term(lambda i, p=printed: p.h1(i) + p.h2(i) + p.h3(i), printed.jac)
        assert found.total[run].exp().item() == pytest.approx(total)
        only_jac = sum((printed.jac(i) * printed.b(i)) ** (2 / 3) for i in range(1, r + 1)) ** 1.5
        assert found.jac[run].exp().item() == pytest.approx(only_jac)


@pytest.mark.parametrize("r", [2, 4])
def test_theorem_f_1_is_its_printed_sums(r):
    norms = random_norms(r, seed=1)
    kappas = bounds.relu_kappas(norms)
    smooth = bounds.smooth_kappas(norms, CURVATURE)
    for run in range(2):
        printed = Printed(norms, run)
        for i in range(1, r + 1):
            assert kappas.h3[run, i - 1].exp().item() == pytest.approx(printed.relu(i))
    for part in ("h1", "h2", "jac"):
        assert torch.equal(getattr(kappas, part), getattr(smooth, part))
    total = printed.first_term(lambda i: printed.h1(i) + printed.h2(i) + printed.relu(i), printed.jac)
    assert bounds.bound(norms, kappas).total[1].exp().item() == pytest.approx(total)


@pytest.mark.parametrize("r", [2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_theorem_1_1_is_its_printed_formula(r, seed):
    norms = random_norms(r, seed, scale=0.5)
    for run in range(2):
        assert bounds.simplified(norms)[run].exp().item() == pytest.approx(Printed(norms, run).simplified())


def test_in_theorem_1_1_norms_count_as_one_at_least():
    small = random_norms(3)
    small = DataNorms(
        LayerNorms(*(torch.full((2, 3), -2.0, dtype=torch.float64) for _ in range(5))),
        small.interlayer.clamp(max=-1.0),
        small.preactivation,
        small.margin,
    )
    weight = (1 + 3 * math.exp(-4 / 3)) ** 1.5
    expected = (1 / 0.3 + 27) * weight + 9 * weight
    assert bounds.simplified(small)[0].exp().item() == pytest.approx(expected)


def test_closed_forms_for_two_matrices():
    norms = random_norms(2, seed=3)
    s = {(later, earlier): math.exp(norms.interlayer[0, later, earlier - 1].item())
         for later in range(1, 4) for earlier in range(1, later + 1)}  # fmt: skip
    gamma, t1 = 0.3, norms.layers.hidden[0, 1].exp().item()
    kappas = bounds.smooth_kappas(norms, CURVATURE)
    jac = [
        1 / s[1, 1] + s[2, 2] / s[2, 1] + s[3, 2] / s[3, 1],
        s[2, 1] / s[3, 1] + s[2, 2] / s[3, 2] + 1 / s[3, 3],
    ]
    curved = s[1, 1] / s[2, 1] + s[3, 3] * s[1, 1] / s[3, 1] + 1 / s[2, 2] + s[3, 3] / s[3, 2]
    hid = [s[3, 2] / gamma + s[2, 2] / t1 + CURVATURE * curved, 1 / gamma]
    assert kappas.jac[0].exp().tolist() == pytest.approx(jac)
    assert kappas.hid[0].exp().tolist() == pytest.approx(hid)
    assert kappas.h2[0, 1] == kappas.h3[0, 1] == -math.inf


def test_the_leading_terms_are_their_printed_formulas():
    norms = random_norms(4, seed=5)
    found = bounds.leading(norms.layers)
    spectral_bound = bounds.spectral_bound(norms)
    layers = {name: getattr(norms.layers, name).exp() for name in ("jacobian", "hidden", "spectral", "rows")}
    for run in range(2):
        each = {name: value[run].tolist() for name, value in layers.items()}
        terms = [j * h for j, h in zip(each["jacobian"], each["hidden"], strict=True)]
        product = each["hidden"][0] * math.prod(each["spectral"])
        ours = sum((term * a) ** (2 / 3) for term, a in zip(terms, each["rows"], strict=True)) ** 1.5
        ratio = sum((a / w) ** (2 / 3) for a, w in zip(each["rows"], each["spectral"], strict=True)) ** 1.5
        expected = [ours, product * ratio, sum(terms), product, max(terms)]
        values = [getattr(found, name)[run].exp().item() for name in bounds.Leading.__dataclass_fields__]
        assert values == pytest.approx(expected)
        assert spectral_bound[run].exp().item() == pytest.approx(product * ratio / norms.margin[run].item())


def test_the_leading_part_of_the_theorem_is_the_leading_term_over_the_margin():
    norms = random_norms(4, seed=6)
    h1 = bounds.bound(norms, bounds.smooth_kappas(norms, CURVATURE)).h1
    torch.testing.assert_close(h1, bounds.leading(norms.layers).ours_weighted - norms.margin.log())


@pytest.mark.parametrize("margin", [0.0, -2.0])
@pytest.mark.parametrize("kind", ["smooth", "relu"])
def test_without_a_positive_margin_bounds_are_infinite_and_the_other_parts_are_not(kind, margin):
    norms = random_norms(3)
    norms = DataNorms(norms.layers, norms.interlayer, norms.preactivation, torch.tensor([margin, 0.5]).double())
    kappas = bounds.relu_kappas(norms) if kind == "relu" else bounds.smooth_kappas(norms, CURVATURE)
    found = bounds.bound(norms, kappas)
    infinite = [found.h1, found.total, bounds.simplified(norms), bounds.spectral_bound(norms)]
    assert [value[0].item() for value in infinite] == [math.inf] * 4
    assert all(math.isfinite(value[1].item()) for value in infinite)
    for part in (found.h2, found.h3, found.jac):
        assert part.isfinite().all()


def test_a_pre_activation_of_zero_makes_the_bound_for_relu_infinite():
    norms = random_norms(3)
    norms.preactivation[0, 1] = -math.inf
    norms.interlayer[0, 3, 1] = -math.inf  # and a Jacobian of zero before it must not turn that into NaN
    found = bounds.bound(norms, bounds.relu_kappas(norms))
    assert found.h3[0] == found.total[0] == math.inf
    assert found.total[1].isfinite()
    assert found.h1.isfinite().all()


def test_vanishing_norms_in_denominators_are_replaced_by_the_guard():
    norms = random_norms(2)
    norms.interlayer[0, 3, 0] = -math.inf  # sigma_{3 <- 1}
    norms.layers.hidden[0, 1] = -math.inf  # t_1
    kappas = bounds.smooth_kappas(norms, CURVATURE)
    s = norms.interlayer[0].exp()
    jac = 1 / s[1, 0] + s[2, 1] / s[2, 0] + s[3, 1] / 1e-12
    assert kappas.jac[0, 0].exp().item() == pytest.approx(jac.item())
    assert kappas.h2[0, 0].exp().item() == pytest.approx(s[2, 1].item() * 1e12)
    found = bounds.bound(norms, kappas)
    for part in bounds.Bound.__dataclass_fields__:
        assert not getattr(found, part).isnan().any()


def test_a_dead_network_gives_numbers():
    norms = random_norms(3)
    norms.interlayer[:] = torch.where(torch.eye(6, dtype=torch.bool), 0.0, -math.inf)
    norms.layers.hidden[:, 1:] = -math.inf
    for kappas in (bounds.smooth_kappas(norms, CURVATURE), bounds.smooth_kappas(norms, 0.0)):
        assert bounds.bound(norms, kappas).total.isfinite().all()
    assert bounds.bound(norms, bounds.smooth_kappas(norms, 0.0)).h3.isneginf().all()


def test_networks_of_a_stack_do_not_meet():
    norms = random_norms(3)
    first = DataNorms(
        LayerNorms(*(getattr(norms.layers, name)[:1] for name in LayerNorms.__dataclass_fields__)),
        norms.interlayer[:1],
        norms.preactivation[:1],
        norms.margin[:1],
    )
    for kappas in (bounds.relu_kappas, lambda n: bounds.smooth_kappas(n, CURVATURE)):
        both, alone = bounds.bound(norms, kappas(norms)), bounds.bound(first, kappas(first))
        assert both.total[0] == alone.total[0]
    assert bounds.simplified(norms)[0] == bounds.simplified(first)[0]
