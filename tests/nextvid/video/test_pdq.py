"""PDQ: bit for bit what the public C++ code gives, in pictures whose waves differ by rounding alone too."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextvid.video.pdq import TENT_SIDE, pdq_hash

# Hashes and qualities by the package pdqhash 0.2.8, which wraps the C++ code of facebook/ThreatExchange.
VECTORS = Path(__file__).with_name("pdq_vectors.csv")


def drawn(kind: str, height: int, width: int) -> np.ndarray:
    """A grey picture from whole numbers alone, so that no release of a library can change it."""
    down, across = np.arange(height)[:, None], np.arange(width)[None, :]
    match kind:
        case "flat":
            values = 99 + 0 * (down + across)
        case "ramp":
            values = across * 255 // width + 0 * down
        case "slope":
            values = 3 * down + 2 * across
        case "squares":
            values = (down // 9 + across // 13) % 2 * 255
        case "rings":
            values = ((2 * down - height) ** 2 + (2 * across - width) ** 2) // 64
        case "hills":
            values = np.abs((down * 7 + across * 3) % 510 - 255) // 2 + np.abs((down * 2 - across * 5) % 254 - 127)
        case "noise":
            mixed = (down * 7919 + across * 104729 + 12345) % 65537
            values = mixed * mixed % 65537 // 7
        case _:
            raise AssertionError(kind)
    return (values % 256).astype(np.uint8)


with VECTORS.open(encoding="utf-8", newline="") as _file:
    ROWS = list(csv.DictReader(_file))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['picture']} {row['height']}x{row['width']}")
def test_hash_and_quality_are_those_of_the_public_code(row: dict[str, str]) -> None:
    found, quality = pdq_hash(drawn(row["picture"], int(row["height"]), int(row["width"])))
    assert (found.hex(), quality) == (row["hash"], int(row["quality"]))


def slow_box(line: list[np.float32]) -> list[np.float32]:
    """The four phases of the public code's box filter: sum up, grow, move along, shrink."""
    window = (len(line) + 127) // 128
    half = (window + 2) // 2
    total, size, left, right, means = np.float32(0), 0, 0, 0, []
    for phase, steps in enumerate((half - 1, window - half + 1, len(line) - window, half - 1)):
        for _ in range(steps):
            if phase < 3:
                total, size, right = total + line[right], size + 1, right + 1
            if phase >= 2:
                total, size, left = total - line[left], size - 1, left + 1
            if phase > 0:
                means.append(total / np.float32(size))
    return means


def slow_pdq(luma: np.ndarray) -> tuple[bytes, int]:
    """The public code in its own order, one float32 after the other."""
    rows = [[np.float32(value) for value in row] for row in luma.tolist()]
    if luma.shape != (64, 64):
        for _ in range(2):
            rows = [slow_box(row) for row in rows]
            columns = [slow_box([row[x] for row in rows]) for x in range(luma.shape[1])]
            rows = [[column[y] for column in columns] for y in range(luma.shape[0])]
    high, wide = luma.shape
    small = [[rows[int((y + 0.5) * high / 64)][int((x + 0.5) * wide / 64)] for x in range(64)] for y in range(64)]
    steps = [small[y + 1][x] - small[y][x] for y in range(63) for x in range(64)]
    steps += [small[y][x + 1] - small[y][x] for y in range(64) for x in range(63)]
    quality = sum(abs(int(step * np.float32(100) / np.float32(255))) for step in steps) // 90
    scale = float(np.float32(math.sqrt(2 / 64)))
    cosines = [
        [np.float32(scale * math.cos(math.pi / 2 / 64 * (i + 1) * (2 * j + 1))) for j in range(64)] for i in range(16)
    ]

    def product(one: list[np.float32], other: list[np.float32]) -> np.float32:
        total = np.float32(0)
        for a, b in zip(one, other, strict=True):
            total = total + a * b
        return total

    halfway = [[product(wave, [row[x] for row in small]) for x in range(64)] for wave in cosines]
    waves = [product(row, wave) for row in halfway for wave in cosines]
    median = sorted(waves)[127]
    bits = sum(1 << at for at, value in enumerate(waves) if value > median)
    return bits.to_bytes(32), min(quality, 100)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    contrast=st.sampled_from([0, 1, 15, 255]),
    shape=st.sampled_from(
        [(5, 5), (9, 160), (64, 64), (64, 65), (129, 7), (13, TENT_SIDE), (5, TENT_SIDE + 1), (400, 6)]
    ),
)
def test_fast_and_slow_agree(seed: int, contrast: int, shape: tuple[int, int]) -> None:
    luma = np.random.default_rng(seed).integers(0, contrast + 1, shape, dtype=np.uint8)
    assert pdq_hash(luma) == slow_pdq(luma)


@pytest.mark.parametrize("shape", [(4, 90), (90, 1)])
def test_a_strip_has_no_hash(shape: tuple[int, int]) -> None:
    assert pdq_hash(drawn("noise", *shape)) == (bytes(32), 0)


def test_a_copy_at_half_the_size_is_near_and_another_picture_is_not() -> None:
    picture = drawn("hills", 90, 160)
    half = picture.reshape(45, 2, 80, 2).mean(axis=(1, 3)).astype(np.uint8)

    def bits_apart(one: np.ndarray, other: np.ndarray) -> int:
        return (int.from_bytes(pdq_hash(one)[0]) ^ int.from_bytes(pdq_hash(other)[0])).bit_count()

    assert bits_apart(picture, half) <= 31
    assert bits_apart(picture, drawn("noise", 90, 160)) > 31
