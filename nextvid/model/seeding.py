"""numpy's `default_rng` for many keys at once: the same generators, seeded in one pass over arrays.

numpy seeds one generator in 11 us, since it mixes the words of each key in Python objects; a step needs one for every
clip and strategy. Here the mixing of numpy's SeedSequence (O'Neill's seed_seq_fe, fixed by numpy's compatibility
policy, NEP 19) runs over all keys, and a generator takes 2 us.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import UInt32, UInt64
from numpy.random.bit_generator import ISeedSequence

# numpy/random/bit_generator.pyx
POOL = 4  # words of 32 bits
INIT_A, MULT_A = 0x43B0D7E5, 0x931E8875
INIT_B, MULT_B = 0x8B51F9DD, 0x58F38DED
MIX_LEFT, MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
SHIFT = np.uint32(16)
WORD = 1 << 32
STATE = 8  # words of 32 bits that seed PCG64


class _Mixed(ISeedSequence):
    """A seed sequence that is mixed already."""

    def __init__(self, state: UInt64[np.ndarray, "4"]) -> None:
        self._state = state

    def generate_state(self, n_words: int, dtype: object = np.uint32) -> np.ndarray:
        """What PCG64 asks for: four words of 64 bits."""
        assert (n_words, dtype) == (4, np.uint64), "PCG64 is seeded by four words of 64 bits"
        return self._state


def generators(key: Sequence[int], last: Sequence[int]) -> list[np.random.Generator]:
    """`np.random.default_rng([*key, number])` for each number of `last`; integers >= 0."""
    if max(last, default=0) >= WORD:  # two words; no training draws so many clips
        return [np.random.default_rng([*key, number]) for number in last]
    states = _states(key, np.array(last, np.uint32))
    # numpy's stubs know SeedSequence alone; its documentation takes every ISeedSequence
    return [np.random.Generator(np.random.PCG64(_Mixed(state))) for state in states]  # type: ignore[arg-type]


def _states(key: Sequence[int], last: UInt32[np.ndarray, " n"]) -> UInt64[np.ndarray, "n 4"]:
    """SeedSequence([*key, number]).generate_state(4, np.uint64) for each number."""
    # numbers in words of 32 bits, the low ones first; one word for 0
    words = [n >> shift & WORD - 1 for n in key for shift in range(0, max(1, n.bit_length()), 32)]
    entropy = np.empty((max(POOL, len(words) + 1), len(last)), np.uint32)
    entropy[: len(words)] = np.array(words, np.uint32)[:, None]
    entropy[len(words)], entropy[len(words) + 1 :] = last, 0
    used = POOL  # constants of the hash that are behind
    pool = _hashed(entropy[:POOL], _constants(INIT_A, MULT_A, 0, POOL))
    for source in range(POOL):
        others = [place for place in range(POOL) if place != source]
        pool[others] = _mixed(pool[others], _hashed(pool[source], _constants(INIT_A, MULT_A, used, POOL - 1)))
        used += POOL - 1
    for extra in entropy[POOL:]:
        pool = _mixed(pool, _hashed(extra, _constants(INIT_A, MULT_A, used, POOL)))
        used += POOL
    state = _hashed(np.concatenate([pool, pool]), _constants(INIT_B, MULT_B, 0, STATE))
    return np.ascontiguousarray(state.T).astype("<u4", copy=False).view("<u8")


@lru_cache(maxsize=64)
def _constants(first: int, factor: int, skipped: int, count: int) -> UInt32[np.ndarray, "count1 1"]:
    """The constants of the hash: each is the one before times `factor`; one more than the values that are hashed."""
    found = [first * pow(factor, skipped + place, WORD) % WORD for place in range(count + 1)]
    return np.array(found, np.uint32)[:, None]


def _hashed(values: UInt32[np.ndarray, "*k n"], constants: UInt32[np.ndarray, "k1 1"]) -> UInt32[np.ndarray, "k n"]:
    found = (values ^ constants[:-1]) * constants[1:]
    return found ^ (found >> SHIFT)


def _mixed(left: UInt32[np.ndarray, "k n"], right: UInt32[np.ndarray, "k n"]) -> UInt32[np.ndarray, "k n"]:
    found: UInt32[np.ndarray, "k n"] = MIX_LEFT * left - MIX_RIGHT * right
    return found ^ (found >> SHIFT)
