from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jacnorm.errors import UserError
from jacnorm.training.seeds import RunId, derive, generator, numpy_generator

TUPLES = st.tuples(st.text(), st.text(), st.integers(0, 2**40), st.text())


def test_derived_numbers_are_fixed_for_ever():
    # SHA-256 of ["stability","n=64",10,"init"], first 8 bytes, halved; by the program sha256sum.
    assert derive("stability", "n=64", 10, "init") == 0x6316CD53722DA03B >> 1


@given(TUPLES, TUPLES)
def test_different_tuples_give_different_numbers_of_63_bits(one, other):
    assert (derive(*one) == derive(*other)) == (one == other)
    assert 0 <= derive(*one) < 2**63


def test_parts_do_not_run_into_each_other():
    assert derive("a", "b", 1, "c") != derive("a", "b1", 1, "c") != derive("ab", "", 1, "c")


@pytest.mark.parametrize("seed", [-1, 1.0, True, "1", None])
def test_impossible_seeds_are_refused(seed):
    with pytest.raises(UserError, match="whole number >= 0"):
        derive("study", "cell", seed, "init")


def test_generators_depend_on_their_tuple_only():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = torch.rand(5, generator=generator("s", "c", 3, "init"))
    torch.rand(7, generator=generator("s", "c", 3, "mask"))
    assert torch.equal(first, torch.rand(5, generator=RunId("s", "c", 3).generator("init")))
    assert not torch.equal(first, torch.rand(5, generator=generator("s", "c", 4, "init")))
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone


def test_numpy_generators_depend_on_their_tuple_only():
    first = numpy_generator("s", "c", 3, "init").random(5)
    assert np.array_equal(first, numpy_generator("s", "c", 3, "init").random(5))
    assert not np.array_equal(first, numpy_generator("s", "c", 3, "mask").random(5))
    expected = np.random.Generator(np.random.PCG64(derive("s", "c", 3, "init"))).random(5)
    assert np.array_equal(first, expected)


def test_a_run_names_itself():
    assert str(RunId("stability", "n=64", 10)) == 'study "stability", cell "n=64", seed 10'
