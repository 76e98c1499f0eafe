"""Scores against pictures whose motion, bars, light and blur are known."""

from dataclasses import replace

import av
import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvid.video.display import DISPLAYED_AS_STORED
from nextvid.video.planes import PlaneReader
from nextvid.video.quality import (
    GREY_SIDE,
    Box,
    Sample,
    Sampler,
    _bars,
    _bars_by_lines,
    crop_box,
    perceptual_hash,
    scores,
)

RNG = np.random.default_rng(0)
TEXTURE = cv2.GaussianBlur(RNG.integers(0, 255, (400, 600, 3), dtype=np.uint8), (0, 0), 3)
TEXTURE = cv2.normalize(TEXTURE, None, 0, 255, cv2.NORM_MINMAX)


def measured(images: list[np.ndarray], step_us: int = 250_000) -> list[Sample]:
    frames = [av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24") for image in images]
    read = PlaneReader(GREY_SIDE)
    planes = [read(frame) for frame in frames]
    sampler = Sampler(DISPLAYED_AS_STORED)
    return [sampler.measure(n * step_us, sampler.grey(one), one.thumbnail(80, 45))[0] for n, one in enumerate(planes)]


def panned(pixels: int, count: int = 5) -> list[np.ndarray]:
    return [TEXTURE[50:290, 50 + n * pixels : 50 + n * pixels + 320] for n in range(count)]


@pytest.mark.parametrize("pixels", [2, 4, 8])
@pytest.mark.parametrize("step_us", [250_000, 500_000])
def test_motion_is_percent_of_the_diagonal_per_quarter_second(pixels: int, step_us: int) -> None:
    result = scores(measured(panned(pixels), step_us), 12.0)
    expected = 100 * pixels / float(np.hypot(240, 320)) * 250_000 / step_us
    assert result.motion_mean == pytest.approx(expected, rel=0.2)
    assert result.motion_p90 >= result.motion_mean


def test_still_pictures_are_frozen_and_moving_ones_are_not() -> None:
    assert scores(measured(panned(0)), 12.0).freeze_share == 1.0
    assert scores(measured(panned(4)), 12.0).freeze_share == 0.0
    assert scores(measured(panned(0)), 12.0).motion_mean < 0.01


def test_what_happened_before_the_shot_does_not_count() -> None:
    samples = measured([255 - TEXTURE[50:290, 50:370], *panned(0)])
    assert scores(samples[1:], 12.0).freeze_share == 1.0
    assert scores(samples[1:], 12.0).motion_mean < 0.01


def test_light_and_black() -> None:
    dark, bright = np.zeros((240, 320, 3), np.uint8), np.full((240, 320, 3), 200, np.uint8)
    result = scores(measured([dark, bright, bright, dark]), 12.0)
    assert result.luma_mean == pytest.approx(100, abs=1)
    assert result.luma_std == pytest.approx(0, abs=0.1)
    assert result.black_share == 0.5


def test_blurring_lowers_the_blur_score() -> None:
    sharp = panned(0, 1)[0]
    values = [scores(measured([cv2.GaussianBlur(sharp, (0, 0), s) if s else sharp]), 12.0).blur for s in (0, 2, 8)]
    assert values[0] > 2 * values[1] > 4 * values[2]


@pytest.mark.parametrize(
    ("top", "bottom", "left", "right"), [(0, 0, 0, 0), (60, 60, 0, 0), (0, 0, 80, 80), (30, 50, 20, 0)]
)
@pytest.mark.parametrize("scale", [1, 3])
def test_the_crop_box_leaves_the_picture(top: int, bottom: int, left: int, right: int, scale: int) -> None:
    top, bottom, left, right = (scale * side for side in (top, bottom, left, right))
    images = []
    for image in panned(4):
        large = cv2.resize(image, None, fx=2 * scale, fy=2 * scale)
        large = np.maximum(large, 40)
        height, width = large.shape[:2]
        large[:top] = large[height - bottom :] = 16
        large[:, :left] = large[:, width - right :] = 16
        images.append(large)
    height, width = images[0].shape[:2]
    box = crop_box(measured(images), width, height)
    slack = 2 * height / 256 + 1  # a line of the measured picture, twice
    for found, true in (
        (box.y, top),
        (height - box.y - box.h, bottom),
        (box.x, left),
        (width - box.x - box.w, right),
    ):
        assert true <= found <= true + slack if true else found == 0


def test_bars_must_stand_in_nine_of_ten_frames_and_dark_frames_say_nothing() -> None:
    with_bars = Sample(0, 100, 10, 10, None, None, (0.1, 0.1, 0.0, 0.0))
    without, dark = replace(with_bars, bars=(0.0, 0.0, 0.0, 0.0)), replace(with_bars, bars=None)
    whole, inner = Box(0, 0, 100, 100), Box(0, 10, 100, 80)
    assert crop_box([with_bars] * 19 + [without], 100, 100) == inner
    assert crop_box([with_bars] * 8 + [without] * 2, 100, 100) == whole
    assert crop_box([with_bars] * 8 + [dark] * 20, 100, 100) == inner
    assert crop_box([dark], 100, 100) == whole


def test_the_hash_is_of_what_the_box_shows() -> None:
    picture = cv2.resize(cv2.cvtColor(TEXTURE, cv2.COLOR_RGB2GRAY), (160, 90), interpolation=cv2.INTER_AREA)
    barred = np.zeros((120, 160), np.uint8)
    barred[15:105] = picture
    plain, quality = perceptual_hash(picture, Box(0, 0, 1600, 900), 1600, 900)
    boxed, _ = perceptual_hash(barred, Box(0, 150, 1600, 900), 1600, 1200)
    naive, _ = perceptual_hash(barred, Box(0, 0, 1600, 1200), 1600, 1200)
    bits = [np.unpackbits(np.frombuffer(h, np.uint8)) for h in (plain, boxed, naive)]
    assert len(plain) == 32
    assert quality > 50
    assert (bits[0] != bits[1]).sum() <= 2
    assert (bits[0] != bits[2]).sum() > 31
    assert perceptual_hash(np.full((90, 160), 99, np.uint8), Box(0, 0, 160, 90), 160, 90)[1] < 50


@given(
    st.lists(st.integers(0, 20), min_size=4, max_size=4), st.sampled_from([0, 16, 23, 24, 25, 26, 90]), st.booleans()
)
def test_edges_tell_whether_lines_need_to_be_looked_at(sides: list[int], level: int, rough: bool) -> None:
    picture = np.full((40, 50), 24 if level > 24 else 90, np.uint8)
    top, bottom, left, right = sides
    for bar in (picture[:top], picture[40 - bottom :], picture[:, :left], picture[:, 50 - right :]):
        bar[:] = level
        bar[:, ::2] += np.uint8(20 * rough)
    assert _bars(picture) == _bars_by_lines(picture)
