"""The preview: what each row of tiles shows, also for targets without a decoder."""

import io

import numpy as np
from PIL import Image

from nextvid.encode.preview import CLIPS, FRAMES, GAIN, GAP, SIDE, Shown, channel_pictures, preview_png
from tests.nextvid.encode.small_corpus import texture


def clip(frames: int = 10, channels: int = 5, decoder: bool = True) -> Shown:
    source = texture(0, frames, SIDE)
    latents = np.random.default_rng(0).standard_normal((frames, channels, 4, 4)).astype(np.float16)
    return Shown(source, (source.astype(int) + 3).clip(0, 255).astype(np.uint8) if decoder else None, latents)


def picture(*clips: Shown) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(preview_png(clips))))


def test_rows_are_source_reconstruction_difference_and_channels() -> None:
    shown = clip()
    found = picture(shown)
    assert found.shape == (4 * SIDE, FRAMES * SIDE, 3)
    first, last = found[:, :SIDE], found[:, -SIDE:]
    np.testing.assert_array_equal(first[:SIDE], shown.source[0])
    np.testing.assert_array_equal(last[:SIDE], shown.source[-1])
    assert shown.reconstruction is not None
    np.testing.assert_array_equal(first[SIDE : 2 * SIDE], shown.reconstruction[0])
    inside = shown.source[0] < 250
    assert (first[2 * SIDE : 3 * SIDE][inside] == 128 + 3 * GAIN).all()
    assert (last[3 * SIDE :] == 255).all()  # five channels, eight places


def test_channels_are_grey_around_their_own_mean() -> None:
    latents = np.zeros((2, 3, 4, 4), np.float32)
    latents[:, 1] = np.random.default_rng(1).standard_normal((2, 4, 4)) + 100
    latents[0, 2, 0, 0] = 5.0
    found = channel_pictures(latents)
    assert found.shape == (3, 4, 4, 3)
    assert np.abs(found[0].astype(int) - 128).max() <= 1  # nothing varies
    assert found[1].min() < 100 < 155 < found[1].max()
    assert found[2, 0, 0, 0] == 255
    np.testing.assert_array_equal(found[..., 0], found[..., 2])


def test_without_a_decoder_there_are_source_and_channels() -> None:
    assert picture(clip(decoder=False)).shape == (2 * SIDE, FRAMES * SIDE, 3)


def test_clips_stand_below_each_other_and_one_frame_is_enough() -> None:
    one = clip(frames=1, channels=2)
    found = picture(one, clip())
    assert found.shape == (8 * SIDE + GAP, FRAMES * SIDE, 3)
    assert picture(*[one] * 9).shape[0] == CLIPS * (4 * SIDE + GAP) - GAP
