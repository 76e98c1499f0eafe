"""The order of training: draw g -> (dataset, row) and mask entry, as pure functions of (seed, g) in integers.

Draws come in blocks of 1024. After every whole block each dataset has had its share of all draws, rounded (exact
quotas); within a block their order is shuffled; a dataset's draws walk through a keyed permutation of its rows, a new
one each pass, so that no row comes twice before all came once. Memory is O(1), resume is one integer, and neither ranks
nor workers are known here (design, section 5, Order). A dataset's permutations hang on its name, seed and size alone.
`at` is the plain reference, `range` the vectorised one.
"""

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np
from einops import rearrange
from jaxtyping import Int64, UInt64

from storage.errors import ConfigError

BLOCK = 1024  # draws; design, section 5. 2.5 us a draw (research: store, G)
_ROUNDS = 8  # Feistel rounds; 4 are a pseudo-random permutation (Luby and Rackoff 1988), the rest is for tiny halves
_MASK = (1 << 64) - 1
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64 (Steele, Lea, Flood 2014)

Keys = tuple[int, ...]


class Draws:
    """Which row each draw takes. `datasets` are sorted by name; indices count in it."""

    def __init__(self, seed: int, weights: Mapping[str, float], sizes: Mapping[str, int]) -> None:
        """Weights are relative, as written in decimals; sizes are rows. ConfigError unless both are positive."""
        if not weights or set(weights) != set(sizes):
            raise ConfigError(f"weights name {sorted(weights)}, sizes {sorted(sizes)}: they must be the same datasets")
        for name in weights:
            if not 0 < weights[name] < float("inf") or sizes[name] < 1:
                raise ConfigError(
                    f"dataset '{name}': weight {weights[name]} and {sizes[name]} rows, both must be positive"
                )
        self.seed = seed
        self.datasets = tuple(sorted(weights))
        self._sizes = tuple(int(sizes[name]) for name in self.datasets)
        exact = [Fraction(repr(float(weights[name]))) for name in self.datasets]
        whole = lcm(*(weight.denominator for weight in exact))
        self._weights = tuple(int(weight * whole) for weight in exact)

    def at(self, g: int) -> tuple[int, int]:
        """Dataset index and row within the dataset of draw `g` >= 0; the reference."""
        assert g >= 0, g
        block, position = divmod(g, BLOCK)
        before, after, keys = self._quotas(block), self._quotas(block + 1), self._block_keys(block)
        dealt = [dataset for dataset in range(len(before)) for _ in range(after[dataset] - before[dataset])]
        shuffled = [dealt[permute(earlier, BLOCK, keys)] for earlier in range(position + 1)]
        dataset = shuffled[-1]
        taken, place = divmod(before[dataset] + shuffled[:-1].count(dataset), self._sizes[dataset])
        return dataset, permute(place, self._sizes[dataset], self._pass_keys(dataset, taken))

    def range(self, start: int, count: int) -> tuple[Int64[np.ndarray, "count"], Int64[np.ndarray, "count"]]:
        """Dataset indices and rows of draws `start` to `start + count - 1`."""
        assert start >= 0, start
        blocks = range(start // BLOCK, -(-(start + count) // BLOCK))
        if count == 0:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        quotas = np.array([self._quotas(block) for block in [*blocks, blocks.stop]], dtype=np.int64)
        sizes = np.diff(quotas, axis=0)
        ends = np.cumsum(sizes, axis=1)  # [block, dataset]: a block's draws before the shuffle, dataset after dataset
        keys = np.array([self._block_keys(block) for block in blocks], dtype=np.uint64)
        places = np.tile(np.arange(BLOCK, dtype=np.uint64), len(blocks))
        slots = permute_many(places, np.full(len(places), BLOCK), keys.repeat(BLOCK, axis=0)).astype(np.int64)
        datasets = (rearrange(slots, "(b p) -> b p 1", p=BLOCK) >= rearrange(ends, "b d -> b 1 d")).sum(axis=2)
        ranks = np.empty_like(datasets)  # among the block's draws in order of dataset, then position
        np.put_along_axis(ranks, np.argsort(datasets, axis=1, kind="stable"), np.arange(BLOCK)[None], axis=1)
        numbers = np.take_along_axis(quotas[:-1] - ends + sizes, datasets, axis=1) + ranks
        asked = slice(start - blocks.start * BLOCK, start - blocks.start * BLOCK + count)
        return datasets.ravel()[asked], self._rows(datasets.ravel()[asked], numbers.ravel()[asked])

    def _rows(self, datasets: Int64[np.ndarray, "n"], numbers: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Rows of the n-th draws of their datasets."""
        sizes = np.array(self._sizes)[datasets]
        passes, places = np.divmod(numbers, sizes)
        which, inverse = np.unique(np.stack((datasets, passes)), axis=1, return_inverse=True)
        keys = np.array([self._pass_keys(dataset, taken) for dataset, taken in which.T.tolist()], dtype=np.uint64)
        return permute_many(places.astype(np.uint64), sizes, keys[inverse]).astype(np.int64)

    def _quotas(self, block: int) -> list[int]:
        """Draws of each dataset in the blocks before `block`: its share of what the datasets before it left, rounded.

        Each count grows by at most one a draw and they add up, so that no block's quota is negative and none is lost.
        """
        left, weight_left, quotas = block * BLOCK, sum(self._weights), []
        for weight in self._weights:
            share = (2 * left * weight + weight_left) // (2 * weight_left)  # rounded half up
            quotas.append(share)
            left -= share
            weight_left -= weight
        return quotas

    def _block_keys(self, block: int) -> Keys:
        return round_keys("block", self.seed, block)

    def _pass_keys(self, dataset: int, taken: int) -> Keys:
        return round_keys("pass", self.seed, self.datasets[dataset], taken)


def mask_entry(seed: int, strategy: int, g: int, entries: int) -> int:
    """Mask entry of draw `g` for a strategy: each of the `entries` once, in keyed order, then all again in another."""
    assert g >= 0, g
    taken, place = divmod(g, entries)
    return permute(place, entries, round_keys("mask", seed, strategy, taken))


@lru_cache(maxsize=4096)
def round_keys(*what: str | int) -> Keys:
    """Keys of a permutation, from a purpose and what it belongs to."""
    text = "\x1f".join(str(item) for item in what).encode()
    data = hashlib.blake2b(text, digest_size=64, person=b"nextvid draws").digest()
    return tuple(int.from_bytes(data[8 * n : 8 * n + 8], "little") for n in range(_ROUNDS))


def permute(place: int, size: int, keys: Sequence[int]) -> int:
    """Where a keyed permutation of range(size) puts `place`: a Feistel network on enough bits, walked until inside."""
    assert 0 <= place < size, (place, size)
    left_bits, right_bits = _halves(size)
    while True:
        left, right = place >> right_bits, place & ((1 << right_bits) - 1)
        for n, key in enumerate(keys):
            if n % 2 == 0:
                left ^= _mixed(right + key) & ((1 << left_bits) - 1)
            else:
                right ^= _mixed(left + key) & ((1 << right_bits) - 1)
        place = left << right_bits | right
        if place < size:
            return place


def permute_many(
    places: UInt64[np.ndarray, "n"], sizes: Int64[np.ndarray, "n"], keys: UInt64[np.ndarray, "n rounds"]
) -> UInt64[np.ndarray, "n"]:
    """`permute` of each place, each with its own size and keys."""
    known, inverse = np.unique(sizes, return_inverse=True)
    halves = np.array([_halves(size) for size in known.tolist()], dtype=np.uint64)[inverse]
    one, out, outside = np.uint64(1), places.copy(), np.arange(len(places))
    while outside.size:
        shift = halves[outside, 1]
        left_mask, right_mask = (one << halves[outside, 0]) - one, (one << shift) - one
        left, right = out[outside] >> shift, out[outside] & right_mask
        for n in range(keys.shape[1]):
            if n % 2 == 0:
                left ^= _mixed_many(right + keys[outside, n]) & left_mask
            else:
                right ^= _mixed_many(left + keys[outside, n]) & right_mask
        out[outside] = left << shift | right
        outside = outside[out[outside] >= sizes[outside].astype(np.uint64)]
    return out


def _halves(size: int) -> tuple[int, int]:
    """Bits of the two halves that together count to `size` at least, at most to twice that."""
    bits = max(2, (size - 1).bit_length())
    return bits // 2, bits - bits // 2


def _mixed(value: int) -> int:
    value &= _MASK
    value = (value ^ value >> 30) * _MIX[0] & _MASK
    value = (value ^ value >> 27) * _MIX[1] & _MASK
    return value ^ value >> 31


def _mixed_many(value: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    value = (value ^ value >> np.uint64(30)) * np.uint64(_MIX[0])
    value = (value ^ value >> np.uint64(27)) * np.uint64(_MIX[1])
    value ^= value >> np.uint64(31)
    return value
