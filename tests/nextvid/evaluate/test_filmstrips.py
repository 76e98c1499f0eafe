"""Film strips: where tiles stand, what is hidden, and PSNR against its definition."""

import io

import numpy as np
from PIL import Image

from nextvid.evaluate.samples import CLIP_GAP, GAP, HIDDEN, LABELS, SIDE, Strip, filmstrips, hide


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def flat(value: int, frames: int = 3) -> np.ndarray:
    return np.full((frames, 16, 16, 3), value, np.uint8)


def test_each_frame_stands_in_its_place() -> None:
    one = [Strip("a", flat(40)), Strip("b", None)]
    sheet = picture(filmstrips([one, [Strip("c", flat(90)), Strip("d", flat(120))]]))
    assert sheet.shape == (4 * (SIDE + GAP) + CLIP_GAP, LABELS + 3 * (SIDE + GAP), 3)
    middle = LABELS + SIDE + GAP + SIDE // 2
    assert (sheet[SIDE // 2, middle] == 40).all()
    assert (sheet[SIDE + GAP + SIDE // 2, LABELS:] == 255).all()  # the empty strip
    below = 2 * (SIDE + GAP) + CLIP_GAP
    assert (sheet[below + SIDE // 2, middle] == 90).all()
    assert (sheet[below + SIDE + GAP + SIDE // 2, middle] == 120).all()


def test_long_clips_are_thinned_evenly_to_both_ends() -> None:
    frames = np.concatenate([flat(10 * n, 1) for n in range(16)])
    sheet = picture(filmstrips([[Strip("long", frames)]]))
    shown = [sheet[SIDE // 2, LABELS + column * (SIDE + GAP) + 5, 0] for column in range(8)]
    assert shown[0] == 0
    assert shown[-1] == 150
    assert shown == sorted(set(shown))


def test_hidden_cells_are_dark_and_visible_ones_untouched() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    visible = np.zeros(4 * 4, bool)
    visible[1] = True  # first row, second column
    masked = hide(frames, visible, (4, 4))
    np.testing.assert_array_equal(masked[:, :4, 4:8], frames[:, :4, 4:8])
    assert (masked[:, 4:] == HIDDEN).all()
    assert (masked[:, :4, :4] == HIDDEN).all()
