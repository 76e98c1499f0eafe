"""Views: the crop is the source's, nothing outside it enters, reductions are antialiased, flips mirror."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nextvid.encode.decode_task import CropBox, cropped


def _noise(height: int, width: int, frames: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def _slow(row: np.ndarray, out: int) -> np.ndarray:
    """Antialiased cubic convolution (a = -0.5) of one line, straight from its definition."""
    scale = len(row) / out
    width = max(scale, 1.0)

    def kernel(t: float) -> float:
        t = abs(t)
        if t < 1:
            return 1.5 * t**3 - 2.5 * t**2 + 1
        return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0

    result = []
    for i in range(out):
        centre = (i + 0.5) * scale
        weights = np.array([kernel((x + 0.5 - centre) / width) for x in range(len(row))])
        result.append((weights / weights.sum()) @ row)
    return np.array(result)


@pytest.mark.parametrize(("source", "out"), [(64, 64), (96, 64), (200, 64), (20, 64)])
def test_resize_is_the_antialiased_cubic_filter(source: int, out: int) -> None:
    line = np.random.default_rng(1).integers(60, 190, source)
    frames = np.broadcast_to(line[None, None, :, None], (1, source, source, 3)).astype(np.uint8)
    got = cropped(np.ascontiguousarray(frames), CropBox(0, 0, source, source), False, out)[0, 5, :, 0]
    np.testing.assert_allclose(got, _slow(line.astype(float), out).clip(0, 255), atol=1.01)


@given(
    box=st.tuples(st.integers(0, 30), st.integers(0, 20), st.integers(1, 34), st.integers(1, 28)),
    flip=st.booleans(),
    resolution=st.sampled_from([8, 24]),
)
def test_nothing_outside_the_crop_enters(box: tuple[int, int, int, int], flip: bool, resolution: int) -> None:
    frames = _noise(48, 64)
    crop = CropBox(*box)
    other = _noise(48, 64, seed=9)
    inside = (slice(None), slice(crop.y, crop.y + crop.height), slice(crop.x, crop.x + crop.width))
    other[inside] = frames[inside]
    np.testing.assert_array_equal(cropped(frames, crop, flip, resolution), cropped(other, crop, flip, resolution))


def test_crop_of_the_size_asked_for_is_copied() -> None:
    frames = _noise(40, 50)
    np.testing.assert_array_equal(cropped(frames, CropBox(3, 5, 32, 32), False, 32), frames[:, 5:37, 3:35])


def test_flip_mirrors_the_view() -> None:
    frames = _noise(40, 50)
    crop = CropBox(1, 2, 45, 33)
    flipped = cropped(frames, crop, True, 16)
    np.testing.assert_array_equal(flipped[:, :, ::-1], cropped(frames, crop, False, 16))
    assert flipped.flags.c_contiguous


def test_fine_stripes_become_grey() -> None:
    """Without antialiasing, every fourth column of a stripe pattern would be black or white."""
    frames = np.zeros((1, 128, 128, 3), np.uint8)
    frames[:, :, ::2] = 255
    out = cropped(frames, CropBox(0, 0, 128, 128), False, 32)
    assert np.abs(out[:, :, 2:-2].astype(int) - 128).max() <= 2


@pytest.mark.parametrize("box", [(0, 0, 51, 10), (-1, 0, 5, 5), (45, 0, 10, 10), (0, 39, 4, 4)])
def test_crop_outside_the_frame_is_refused(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="leaves the frame of 50 x 40"):
        cropped(_noise(40, 50), CropBox(*box), False, 16)


def test_mode_and_size_match_pillow_on_a_whole_frame() -> None:
    frames = _noise(90, 120)
    wanted = np.asarray(Image.fromarray(frames[0]).resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(cropped(frames, CropBox(0, 0, 120, 90), False, 64)[0], wanted)
