"""Varied training clips: keyed, one draw for all frames, never a flipped video, and the operations do what they say."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvid.evaluate import augment
from nextvid.evaluate.augment import OPERATIONS, POLICY, Drawn, augmented, draw

SIDE = 32
ROWS = [bytes([n % 256, n // 256] * 8) for n in range(400)]
KINDS: tuple[Literal["video", "image"], ...] = ("video", "image")


def clip(frames: int = 4, seed: int = 0) -> np.ndarray:
    """Smooth frames that differ."""
    y, x = np.mgrid[:SIDE, :SIDE]
    waves = [128 + 100 * np.sin((x * (1 + c) + 2 * y + 5 * f + seed) / 9) for f in range(frames) for c in range(3)]
    return np.stack(waves).reshape(frames, 3, SIDE, SIDE).transpose(0, 2, 3, 1).round().astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 3), epoch=st.integers(0, 50), row=st.binary(min_size=16, max_size=16))
def test_the_key_decides(kind: Literal["video", "image"], seed: int, epoch: int, row: bytes) -> None:
    frames = clip()
    found = augmented(frames, kind, seed, epoch, row)
    assert found.shape == frames.shape
    assert found.dtype == np.uint8
    assert np.array_equal(found, augmented(frames, kind, seed, epoch, row))
    drawn = draw(kind, seed, epoch, row, SIDE, SIDE)
    assert len({drawn, draw(kind, seed + 1, epoch, row, SIDE, SIDE), draw(kind, seed, epoch + 1, row, SIDE, SIDE)}) == 3
    assert draw(kind, seed, epoch, bytes(reversed(row)) + b"x", SIDE, SIDE) != drawn


@pytest.mark.parametrize("kind", KINDS)
def test_a_still_stays_still(kind: Literal["video", "image"]) -> None:
    still = np.repeat(clip(1), 3, axis=0)
    for row in ROWS[:40]:
        found = augmented(still, kind, 0, 0, row)
        assert (found == found[:1]).all()


def test_none_changes_nothing() -> None:
    frames = clip()
    assert augmented(frames, "none", 0, 0, ROWS[0]) is frames


def test_shares_are_the_protocols() -> None:
    """Over 400 rows: 3 standard deviations of a share of .5 are .075, of .25 are .065."""
    videos, images = ([draw(kind, 0, 0, row, SIDE, SIDE) for row in ROWS] for kind in KINDS)
    assert not any(drawn.flip for drawn in videos)
    assert np.mean([drawn.flip for drawn in images]) == pytest.approx(0.5, abs=0.075)
    for drawn in (videos, images):
        assert np.mean([one.erased is not None for one in drawn]) == pytest.approx(0.25, abs=0.065)
        areas = [one.crop[2] * one.crop[3] / SIDE**2 for one in drawn]
        assert 0.07 < min(areas) < 0.15
        assert max(areas) > 0.85
        assert np.mean(areas) == pytest.approx(0.5, abs=0.06)  # large and long crops do not fit
    assert np.mean([len(drawn.operations) for drawn in videos]) == pytest.approx(2.0, abs=0.15)
    assert max(len(drawn.operations) for drawn in images) == 2
    used = {name for drawn in videos for name, _ in drawn.operations}
    assert used == set(OPERATIONS)
    assert {name for drawn in images for name, _ in drawn.operations} == {n for pair in POLICY for n, *_ in pair}


def test_the_policy_has_the_published_size() -> None:
    assert len(POLICY) == 25
    assert {name for pair in POLICY for name, _, _ in pair} <= set(OPERATIONS)


def test_magnitude_seven_is_what_it_is_in_every_operation() -> None:
    """Spread .5 around 7 of 10: the bounds are five of it."""
    arguments: dict[str, list[float]] = {}
    for row in ROWS:
        for name, argument in draw("video", 1, 0, row, SIDE, SIDE).operations:
            arguments.setdefault(name, []).append(argument)
    assert all(13.5 <= abs(degrees) <= 28.5 for degrees in arguments["rotate"])
    assert {np.sign(degrees) for degrees in arguments["rotate"]} == {-1, 1}
    assert set(arguments["posterize"]) <= {1, 2, 3}
    assert all(12 <= threshold <= 141 for threshold in arguments["solarize"])
    assert all(0.405 <= abs(factor - 1) <= 0.855 for factor in arguments["colour"])
    assert all(0.2 <= abs(share) <= 0.43 for share in arguments["translate_x"])


class TestApplied:
    def test_nothing_drawn_changes_nothing(self) -> None:
        frame = clip(1)[0]
        assert np.array_equal(augment._applied(frame, Drawn((), (0, 0, SIDE, SIDE), False, None, 0)), frame)

    def test_flip_and_erasing(self) -> None:
        frame = clip(1)[0]
        flipped = augment._applied(frame, Drawn((), (0, 0, SIDE, SIDE), True, (3, 5, 7, 2), 9))
        inside = np.zeros((SIDE, SIDE), bool)
        inside[5:7, 3:10] = True
        assert np.array_equal(flipped[~inside], frame[:, ::-1][~inside])
        assert flipped[inside].std() > 50

    def test_the_middle_of_the_side_is_resized_to_the_whole(self) -> None:
        frame = np.zeros((1, 32, 32, 3), np.uint8)
        frame[:, 8:24, 8:24] = 200
        assert (augment.middle(frame, 0.5)[:, 4:-4, 4:-4] == 200).all()
        assert (augment.middle(frame, 1.0) == frame).all()

    def test_a_crop_is_resized_to_the_whole(self) -> None:
        frame = np.zeros((SIDE, SIDE, 3), np.uint8)
        frame[8:16, 16:24] = 200
        assert (augment._applied(frame, Drawn((), (17, 9, 6, 6), False, None, 0)) == 200).all()

    @pytest.mark.parametrize(
        ("name", "argument", "value", "becomes"),
        [
            ("invert", 0.0, 10, 245),
            ("solarize", 128.0, 200, 55),
            ("solarize", 128.0, 100, 100),
            ("solarize_add", 77.0, 100, 177),
            ("solarize_add", 77.0, 130, 130),
            ("posterize", 2.0, 200, 192),
            ("brightness", 1.5, 100, 150),
            ("colour", 1.6, 100, 100),  # grey has none
        ],
    )
    def test_values(self, name: str, argument: float, value: int, becomes: int) -> None:
        frame = np.full((SIDE, SIDE, 3), value, np.uint8)
        drawn = Drawn(((name, argument),), (0, 0, SIDE, SIDE), False, None, 0)
        assert (augment._applied(frame, drawn) == becomes).all()

    @pytest.mark.parametrize(("name", "axis"), [("translate_x", 1), ("translate_y", 0)])
    def test_translation_takes_from_further_on(self, name: str, axis: int) -> None:
        frame = clip(1)[0]
        drawn = Drawn(((name, 0.25),), (0, 0, SIDE, SIDE), False, None, 0)
        found = np.moveaxis(augment._applied(frame, drawn), axis, 0)
        assert np.array_equal(found[: SIDE - 9], np.moveaxis(frame, axis, 0)[8 : SIDE - 1])
        assert (found[-7:] == 128).all()
