"""PDQ, a perceptual hash of pictures: a picture and a copy that was scaled or encoded again differ in few of 256 bits.

The algorithm and its constants are those of github.com/facebook/ThreatExchange, pdq/cpp: two passes of a box filter, a
pick of 64 x 64 values, the 16 x 16 lowest waves of their cosine transform, one bit for each wave above the median. In a
flat or symmetric picture the waves differ by rounding alone: sums are taken in the float32 order of that code, so that
every bit is equal to its bit (docs/decisions/0034).
"""

import functools
import math

import numpy as np
from jaxtyping import Float32, Int, UInt8

SIDE = 64  # the cosine transform takes 64 x 64 values
WAVES = 16  # it keeps waves 1 to 16 of each axis; wave 0 is the mean
SMALLEST_SIDE = 5  # MIN_HASHABLE_DIM of the public code
TENT_SIDE = 256  # up to here a box holds one pixel or two, and the filter is exact in integers
GRADIENTS_PER_POINT = 90  # of the quality; pdqImageDomainQualityMetric of the public code

# As dct_matrix_64 of the public code: rounded to float32 once. By math.cos, since numpy's may differ from CPU to CPU.
_COSINES = np.array(
    [
        [
            float(np.float32(math.sqrt(2 / SIDE))) * math.cos(math.pi / 2 / SIDE * wave * (2 * at + 1))
            for wave in range(1, WAVES + 1)
        ]
        for at in range(SIDE)
    ],
    dtype=np.float32,
)


def pdq_hash(luma: UInt8[np.ndarray, "h w"]) -> tuple[bytes, int]:
    """The hash (32 bytes, the highest wave's bit first) and its quality (0 to 100; below 50 a hash tells little).

    A picture under 5 pixels on a side has a hash of zeros and quality 0.
    """
    if min(luma.shape) < SMALLEST_SIDE:
        return bytes(WAVES * WAVES // 8), 0
    reduced = _reduced(luma)
    waves = _cosine_transform(_cosine_transform(reduced).T).T
    median = np.sort(waves, axis=None)[waves.size // 2 - 1]  # the lower of the two in the middle
    steps = (reduced[1:] - reduced[:-1], reduced[:, 1:] - reduced[:, :-1])  # each in whole hundredths of the grey scale
    gradients = sum(int(np.abs((step * np.float32(100) / np.float32(255)).astype(np.int32)).sum()) for step in steps)
    quality = min(gradients // GRADIENTS_PER_POINT, 100)
    return np.packbits((waves > median).ravel()[::-1]).tobytes(), quality


def _reduced(luma: UInt8[np.ndarray, "h w"]) -> Float32[np.ndarray, "64 64"]:
    """The picture at 64 x 64, each value a mean of its neighbourhood."""
    if luma.shape == (SIDE, SIDE):
        return luma.astype(np.float32)
    if max(luma.shape) <= TENT_SIDE:
        return _tent(_tent(luma.astype(np.int16)).T).T.astype(np.float32) / np.float32(16)  # sums are below 16 x 256
    picture = luma.astype(np.float32)
    for _ in range(2):
        picture = _box(np.ascontiguousarray(_box(np.ascontiguousarray(picture.T)).T))
    return picture[np.ix_(_picks(len(picture)), _picks(picture.shape[1]))]


def _tent(lines: Int[np.ndarray, "n m"]) -> Int[np.ndarray, "64 m"]:
    """Four times what two passes of `_box` leave of the picked lines, where the box holds one line or two."""
    first, middle, last = (lines.take(taps, axis=0) for taps in _taps(len(lines)))
    return first + last + 2 * middle


@functools.cache
def _taps(count: int) -> tuple[Int[np.ndarray, "64"], ...]:
    """First, middle and last line of the tent around each picked one."""
    picks, step = _picks(count), _window(count) - 1
    return tuple(np.minimum(picks + n * step, count - 1) for n in range(3))


def _box(lines: Float32[np.ndarray, "n m"]) -> Float32[np.ndarray, "n m"]:
    """The mean of a window around each line, shorter at the ends: one running sum that adds before it subtracts."""
    count, window = len(lines), _window(len(lines))
    ahead = window // 2  # lines of the window that follow its middle
    means, total = np.empty_like(lines), np.zeros_like(lines[0])
    for newest in range(count + ahead):
        if newest < count:
            total += lines[newest]
        if newest >= window:
            total -= lines[newest - window]
        if newest >= ahead:
            inside = min(newest + 1, count) - max(newest + 1 - window, 0)
            np.divide(total, np.float32(inside), out=means[newest - ahead])
    return means


def _window(count: int) -> int:
    """Lines in the box: half of what one of the 64 picked lines stands for, rounded up."""
    return -(-count // (2 * SIDE))


def _picks(count: int) -> Int[np.ndarray, "64"]:
    """The line in the middle of each 64th part."""
    return (2 * np.arange(SIDE) + 1) * count // (2 * SIDE)


def _cosine_transform(lines: Float32[np.ndarray, "64 m"]) -> Float32[np.ndarray, "16 m"]:
    """The lowest waves along the first axis. A sum over the first of three axes goes line by line, in order."""
    return np.add.reduce(_COSINES[:, :, None] * np.ascontiguousarray(lines)[:, None, :], axis=0)
