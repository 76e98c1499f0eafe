"""Near-duplicates among perceptual hashes: pairs of 256-bit PDQ hashes that are near, and the groups they form.

With 16 bands of 16 bits, two hashes at most 31 bits apart agree in some band up to one bit (31 < 2 x 16), so looking
up each band and its 16 one-bit neighbours finds every pair. Flat frames hash to noise: those below a quality floor
are in no pair.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64, UInt8
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from storage.errors import ConfigError

HASH_BYTES = 32  # PDQ: 256 bits
BANDS = 16
MAX_DISTANCE = 2 * BANDS - 1  # up to here the search is exact
CHUNK = 1 << 22  # candidate pairs compared at once: 4 M x 32 bytes


def near_pairs(
    hashes: UInt8[np.ndarray, "N 32"],
    distance: int,
    quality: Int64[np.ndarray, "N"] | None = None,
    quality_min: int = 0,
) -> Int64[np.ndarray, "M 2"]:
    """Pairs (i, j), i < j, of hashes at most `distance` bits apart, sorted, each once.

    Equal hashes are paired with the first of them only, and only the first is compared with others: the groups are the
    same, and a still picture of an hour does not make millions of pairs. Raises ConfigError above 31 bits.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ConfigError(f"duplicates.distance is {distance}; the search is exact from 0 to {MAX_DISTANCE} bits")
    assert hashes.shape == (len(hashes), HASH_BYTES), "hashes are [N, 32] bytes"
    usable = np.arange(len(hashes)) if quality is None else np.flatnonzero(quality >= quality_min)
    words = np.ascontiguousarray(hashes[usable])
    if len(words) < 2:
        return np.empty((0, 2), np.int64)
    rows = words.view(f"V{HASH_BYTES}").ravel()
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    every = np.arange(len(words))
    copies = np.stack([first[inverse], every], axis=1)[first[inverse] != every]
    near = first[_distinct_pairs(words[first], distance)]
    pairs = usable[np.sort(np.concatenate([copies, near]), axis=1)].astype(np.int64)
    ordered: Int64[np.ndarray, "M 2"] = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return ordered


def groups(n: int, pairs: Int64[np.ndarray, "M 2"]) -> Int64[np.ndarray, "n"]:
    """For each of n items the smallest member of its group: the connected components of `pairs`."""
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    _, component = connected_components(graph, directed=False)
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    smallest: Int64[np.ndarray, n] = first[inverse]
    return smallest


def _distinct_pairs(words: UInt8[np.ndarray, "n 32"], distance: int) -> Int64[np.ndarray, "M 2"]:
    """Pairs of positions among distinct hashes."""
    bits = words.view(np.uint64)
    bands = words.view(np.uint16)
    found = [np.empty((0, 2), np.int64)]
    for band in range(BANDS):
        for left, right in _candidates(bands[:, band], probe=distance >= BANDS):
            near = np.bitwise_count(bits[left] ^ bits[right]).sum(axis=1, dtype=np.int64) <= distance
            found.append(np.stack([left[near], right[near]], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _candidates(keys: np.ndarray, *, probe: bool) -> Iterator[tuple[Int64[np.ndarray, "m"], Int64[np.ndarray, "m"]]]:
    """Positions left < right whose 16-bit keys are equal or, with `probe`, one bit apart; in bounded pieces."""
    order = np.argsort(keys, kind="stable")
    table = keys[order]
    for flip in [0, *(1 << bit for bit in range(16))] if probe else [0]:
        wanted = keys ^ np.uint16(flip)
        start = np.searchsorted(table, wanted, "left")
        count = np.searchsorted(table, wanted, "right") - start
        for lefts in _pieces(count):
            sizes = count[lefts]
            left = np.repeat(lefts, sizes)
            within = np.arange(len(left)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            right = order[np.repeat(start[lefts], sizes) + within]
            ahead = left < right
            yield left[ahead], right[ahead]


def _pieces(count: Int64[np.ndarray, "n"]) -> Iterator[Int64[np.ndarray, "k"]]:
    """Positions with candidates, split so that each piece has about CHUNK candidates."""
    present = np.flatnonzero(count)
    if len(present) == 0:
        return
    total = np.cumsum(count[present])
    cuts = np.searchsorted(total, np.arange(CHUNK, total[-1], CHUNK))
    yield from (piece for piece in np.split(present, cuts) if len(piece))
