"""Small pictures read from planes against swscale's, in every pixel format, range and orientation."""

import av
import cv2
import numpy as np
import pytest

from nextvid.video.container import Scaler
from nextvid.video.planes import LUMA_RANGE, PLANAR, PlaneReader, in_full_range
from tests.nextvid.video.splices import scene

IMAGE = scene(4, 1, 320, 240)[0]


def frame_in(pixel_format: str, image: np.ndarray = IMAGE) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(format=pixel_format)


def reference(frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
    """Full-range Y, Cb and Cr through swscale's area filter, one below the other."""
    rgb = Scaler(width, height, "rgb24", "AREA")(frame)
    y, cr, cb = cv2.split(cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb))
    return np.concatenate([y, cb, cr])


@pytest.mark.parametrize("pixel_format", [*sorted(PLANAR), "yuv420p10le", "nv12", "rgb24", "gray", "yuva420p", "bgra"])
def test_a_thumbnail_is_what_swscale_makes_in_full_range(pixel_format: str) -> None:
    frame = frame_in(pixel_format)
    thumb = PlaneReader(256)(frame).thumbnail(80, 45)
    wanted = reference(frame, 80, 45)
    assert thumb.shape == (135, 80)
    assert thumb.dtype == np.uint8
    assert np.abs(thumb.astype(int) - wanted).mean() < 2.5
    assert np.corrcoef(thumb[:45].ravel(), wanted[:45].ravel())[0, 1] > 0.99


@pytest.mark.parametrize("size", [(320, 240), (321, 241), (66, 50), (240, 320), (1920, 1080)])
def test_odd_and_extreme_sizes(size: tuple[int, int]) -> None:
    frame = frame_in("yuv420p", scene(7, 1, *size)[0])
    planes = PlaneReader(256)(frame)
    assert planes.y.shape == (size[1], size[0])
    assert np.abs(planes.thumbnail(80, 45).astype(int) - reference(frame, 80, 45)).mean() < 2.5
    grey = planes.grey(64, 48)
    assert (
        np.abs(grey.astype(int) - Scaler(64, 48, "gray", "AREA")(frame)).mean() < 20
    )  # swscale's grey is in 16 to 235
    assert np.abs(grey.astype(int) - reference(frame, 64, 48)[:48]).mean() < 2.5


def test_planes_are_views_and_pictures_are_copies() -> None:
    frame = frame_in("yuv420p")
    planes = PlaneReader(256)(frame)
    assert planes.y.base is not None
    same = planes.grey(320, 240)
    assert not np.shares_memory(same, planes.y)


def test_what_has_no_planes_is_reduced_to_the_side_that_is_needed() -> None:
    planes = PlaneReader(64)(frame_in("rgb24"))
    assert planes.y.shape == (64, 85)
    assert PlaneReader(1000)(frame_in("rgb24")).y.shape == (240, 320)


def test_ranges_meet_in_black_and_white() -> None:
    for value in (0, 255):
        flat = np.full((48, 64, 3), value, np.uint8)
        for pixel_format in ("yuv420p", "yuvj420p", "yuv420p10le"):
            thumb = PlaneReader(256)(frame_in(pixel_format, flat)).thumbnail(8, 6)
            assert np.abs(thumb[:6].astype(int) - value).max() <= 1
            assert np.abs(thumb[6:].astype(int) - 128).max() <= 1


def test_arithmetic_is_the_table_of_the_range() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(in_full_range(every), LUMA_RANGE[every])
