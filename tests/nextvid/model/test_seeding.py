"""Generators that are seeded together are numpy's own."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nextvid.model.seeding import generators

KEYS = st.lists(st.integers(0, 1 << 70), max_size=6)  # shorter and longer than numpy's pool of four words
LAST = st.lists(st.integers(0, (1 << 32) + 9), max_size=5)  # also numbers of two words


@given(KEYS, LAST)
def test_they_are_those_that_numpy_seeds_one_by_one(key: list[int], last: list[int]) -> None:
    found = [generator.bit_generator.state for generator in generators(key, last)]
    assert found == [np.random.default_rng([*key, number]).bit_generator.state for number in last]


@given(KEYS)
def test_they_go_on_apart(key: list[int]) -> None:
    first, second = generators(key, range(2))
    drawn = second.random(3)
    assert first.random() == np.random.default_rng([*key, 0]).random()
    assert np.array_equal(drawn, np.random.default_rng([*key, 1]).random(3))
