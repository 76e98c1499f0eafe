"""duplicates.py: the banded search against brute force, and connected components against their definition."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvid.trainset.duplicates import groups, near_pairs
from storage.errors import ConfigError


def altered(hashes: np.ndarray, bits: int, rng: np.random.Generator) -> np.ndarray:
    """A copy with exactly `bits` bits of each hash turned."""
    unpacked = np.unpackbits(hashes, axis=1)
    for row in unpacked:
        row[rng.choice(256, bits, replace=False)] ^= 1
    return np.packbits(unpacked, axis=1)


def brute_force(hashes: np.ndarray, distance: int) -> set[tuple[int, int]]:
    bits = np.unpackbits(hashes, axis=1).astype(int)
    apart = np.abs(bits[:, None] - bits[None]).sum(axis=-1)
    return {(i, j) for i in range(len(hashes)) for j in range(i + 1, len(hashes)) if apart[i, j] <= distance}


@given(st.integers(0, 2**32 - 1), st.integers(0, 31), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_pairs_of_distinct_hashes_are_those_of_brute_force(seed: int, distance: int, turned: list[int]) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (6, 32), dtype=np.uint8)
    hashes = np.unique(np.concatenate([base, *(altered(base, bits, rng) for bits in turned)]), axis=0)
    told: list[int] = []
    found = near_pairs(hashes, distance, threads=3, on_band=told.append)
    assert told == list(range(1, 17))
    assert np.array_equal(found, near_pairs(hashes, distance))
    assert found.dtype == np.int64
    assert {tuple(pair) for pair in found.tolist()} == brute_force(hashes, distance)
    assert len(found) == len({tuple(pair) for pair in found.tolist()})


@given(st.integers(0, 2**32 - 1), st.integers(0, 31))
def test_groups_with_equal_hashes_are_those_of_brute_force(seed: int, distance: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (4, 32), dtype=np.uint8)
    hashes = np.concatenate([base, base[[0, 0, 2]], altered(base, 20, rng), altered(base, 40, rng)])
    expected = groups(len(hashes), np.array(sorted(brute_force(hashes, distance)), np.int64).reshape(-1, 2))
    assert np.array_equal(groups(len(hashes), near_pairs(hashes, distance)), expected)


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_groups_are_the_connected_components(case: tuple[int, list[tuple[int, int]]]) -> None:
    n, pairs = case
    reach = np.eye(n, dtype=bool)
    for a, b in pairs:
        reach[a, b] = reach[b, a] = True
    for _ in range(n):
        reach = reach @ reach
    expected = [int(np.flatnonzero(row)[0]) for row in reach]
    assert groups(n, np.array(pairs, np.int64).reshape(-1, 2)).tolist() == expected


def test_thirty_one_bits_are_found_wherever_they_fall() -> None:
    rng = np.random.default_rng(1)
    base = rng.integers(0, 256, (400, 32), dtype=np.uint8)
    spread = np.unpackbits(base, axis=1)
    for row in spread:  # the hardest case: two bits in fifteen bands, one in the last
        for band in range(16):
            row[16 * band + rng.choice(16, 1 if band == 15 else 2, replace=False)] ^= 1
    hashes = np.concatenate([base, np.packbits(spread, axis=1)])
    assert near_pairs(hashes, 31).tolist() == [[i, 400 + i] for i in range(400)]
    assert len(near_pairs(hashes, 30)) == 0


def test_flat_frames_join_nothing() -> None:
    hashes = np.zeros((4, 32), np.uint8)
    quality = np.array([100, 49, 50, 0], np.int64)
    assert near_pairs(hashes, 31, quality, 50).tolist() == [[0, 2]]


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_hashes_have_no_pairs(n: int) -> None:
    assert near_pairs(np.zeros((n, 32), np.uint8), 31).shape == (0, 2)


@pytest.mark.parametrize("distance", [-1, 32])
def test_a_distance_the_search_would_miss_is_refused(distance: int) -> None:
    with pytest.raises(ConfigError, match="0 to 31"):
        near_pairs(np.zeros((2, 32), np.uint8), distance)


def test_a_still_picture_of_an_hour_makes_no_flood() -> None:
    rng = np.random.default_rng(2)
    still = np.repeat(rng.integers(0, 256, (1, 32), dtype=np.uint8), 20_000, axis=0)
    before = time.process_time()
    pairs = near_pairs(still, 31)
    assert len(pairs) == 19_999
    assert (groups(len(still), pairs) == 0).all()
    assert time.process_time() - before < 10
