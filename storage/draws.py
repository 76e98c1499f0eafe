"""The order of training: draw g -> (dataset, row) and mask entry, as pure functions of (seed, g) in integers.

Draws come in blocks of 1024. After every whole block each dataset has had its share of all draws, rounded (exact
quotas); within a block their order is shuffled; a dataset's draws walk through a keyed permutation of its rows, a new
one each pass, so that no row comes twice before all came once. Memory is O(1), resume is one integer, and neither ranks
nor workers are known here. A dataset's permutations depend on its name, seed and size alone.
`at` is the plain reference, `range` the vectorised one.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np
from jaxtyping import Int64, UInt64

from storage.errors import ConfigError

BLOCK = 1024  # draws, our choice: quotas are exact after each of the paper's batches of 3072; 2.5 us a draw
_BLOCKS_KEPT = 4  # of 16 KB: a step's draws are in one block or two, also where two stages meet
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
        self._block = lru_cache(maxsize=_BLOCKS_KEPT)(self._dealt)

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
        if count == 0:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        stop = start + count
        found = [
            self._block(block)[:, max(start - block * BLOCK, 0) : stop - block * BLOCK]
            for block in range(start // BLOCK, -(-stop // BLOCK))
        ]
        datasets, rows = np.concatenate(found, axis=1)
        return datasets, rows

    def _dealt(self, block: int) -> Int64[np.ndarray, "2 p"]:
        """Dataset indices and rows of a whole block."""
        before = np.array(self._quotas(block), dtype=np.int64)
        sizes = np.array(self._quotas(block + 1), dtype=np.int64) - before
        ends = np.cumsum(sizes)  # of each dataset's draws, before the shuffle: dataset after dataset
        slots = permute_all(np.arange(BLOCK, dtype=np.uint64), BLOCK, self._block_keys(block)).astype(np.int64)
        datasets = np.searchsorted(ends, slots, side="right")
        numbers, rows = np.empty(BLOCK, dtype=np.int64), np.empty(BLOCK, dtype=np.int64)
        by_dataset = np.argsort(datasets, kind="stable")  # a dataset's draws are numbered by position
        numbers[by_dataset] = (before - ends + sizes).repeat(sizes) + np.arange(BLOCK)
        for dataset in np.flatnonzero(sizes).tolist():
            mine = datasets == dataset
            rows[mine] = self._rows(dataset, numbers[mine])
        found = np.stack((datasets, rows))
        found.flags.writeable = False  # kept for the next ranges of this block
        return found

    def _rows(self, dataset: int, numbers: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Rows of a dataset's draws by their number among its own, ascending."""
        size = self._sizes[dataset]
        return _walked(numbers, size, lambda taken: self._pass_keys(dataset, taken))

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


def most_drawn(weights: Mapping[str, float], start: int, stop: int) -> dict[str, int]:
    """How many of the draws `start` to `stop - 1` a dataset has at most: exactly so many of the blocks they are in."""
    draws = Draws(0, weights, dict.fromkeys(weights, 1))
    before, after = draws._quotas(start // BLOCK), draws._quotas(-(-stop // BLOCK))
    return dict(zip(draws.datasets, np.subtract(after, before).tolist(), strict=True))


def mask_entry(seed: int, strategy: int, g: int, entries: int) -> int:
    """Mask entry of draw `g` for a strategy: each of the `entries` once, in keyed order, then all again in another."""
    assert g >= 0, g
    taken, place = divmod(g, entries)
    return permute(place, entries, round_keys("mask", seed, strategy, taken))


def mask_entries(seed: int, strategy: int, start: int, count: int, entries: int) -> Int64[np.ndarray, "count"]:
    """`mask_entry` of draws `start` to `start + count - 1`."""
    assert start >= 0, start
    blocks = range(start // BLOCK, max(-(-(start + count) // BLOCK), start // BLOCK + 1))
    found = np.concatenate([_entries_of_block(seed, strategy, block, entries) for block in blocks])
    first = start - blocks.start * BLOCK
    return found[first : first + count]


@lru_cache(maxsize=16)  # a few strategies' blocks
def _entries_of_block(seed: int, strategy: int, block: int, entries: int) -> Int64[np.ndarray, "p"]:
    draws = np.arange(block * BLOCK, (block + 1) * BLOCK)
    return _walked(draws, entries, lambda taken: round_keys("mask", seed, strategy, taken))


def _walked(numbers: Int64[np.ndarray, "n"], size: int, keys: Callable[[int], Keys]) -> Int64[np.ndarray, "n"]:
    """Places of ascending numbers that walk through range(size) pass after pass, each pass in its own order."""
    passes, places = np.divmod(numbers, size)
    edges = np.flatnonzero(np.diff(passes)) + 1
    firsts = np.concatenate(([0], edges))
    parts = np.split(places.astype(np.uint64), edges)
    found = [permute_all(part, size, keys(taken)) for part, taken in zip(parts, passes[firsts].tolist(), strict=True)]
    return np.concatenate(found).astype(np.int64)


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


def permute_all(places: UInt64[np.ndarray, "n"], size: int, keys: Sequence[int]) -> UInt64[np.ndarray, "n"]:
    """`permute` of each place."""
    left_bits, right_bits = (np.uint64(bits) for bits in _halves(size))
    one, out, outside = np.uint64(1), places.copy(), np.arange(len(places))
    left_mask, right_mask = (one << left_bits) - one, (one << right_bits) - one
    table = np.array(keys, dtype=np.uint64)
    while outside.size:
        left, right = out[outside] >> right_bits, out[outside] & right_mask
        for n, key in enumerate(table):
            if n % 2 == 0:
                left ^= _mixed_many(right + key) & left_mask
            else:
                right ^= _mixed_many(left + key) & right_mask
        out[outside] = left << right_bits | right
        outside = outside[out[outside] >= size]
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
