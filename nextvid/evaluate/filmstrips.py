"""Film strips as PNG: clips under each other, each as labelled rows of frames.

Holds layout and drawing; which frames are shown, and what masked input looks like, is decided by the caller.

Axes: F frames, R pixels a side, S cells.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

SIDE = 84  # pixels of a tile: 8 of them and the labels fit 860, the width of the report's column
LABELS = 116
GAP = 2
CLIP_GAP = 18
FONT_SIZE = 11
MOST_FRAMES = 8
BACKGROUND, INK = (255, 255, 255), (60, 64, 72)
HIDDEN = (28, 30, 36)

Frames = UInt8[np.ndarray, "F R R 3"]


@dataclass(frozen=True)
class Strip:
    """One row of frames. None leaves the row empty, with its label saying why."""

    label: str
    frames: Frames | None


def filmstrips(clips: Sequence[Sequence[Strip]]) -> bytes:
    """PNG of all clips; at most 8 frames of each, spread evenly."""
    assert clips, "nothing to show"
    longest = max((len(s.frames) for strips in clips for s in strips if s.frames is not None), default=1)
    shown = np.unique(np.linspace(0, longest - 1, min(MOST_FRAMES, longest)).round().astype(int))
    width = LABELS + len(shown) * (SIDE + GAP)
    heights = [len(strips) * (SIDE + GAP) + CLIP_GAP for strips in clips]
    sheet = Image.new("RGB", (width, sum(heights) - CLIP_GAP), BACKGROUND)
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    top = 0
    for strips, height in zip(clips, heights, strict=True):
        for row, strip in enumerate(strips):
            y = top + row * (SIDE + GAP)
            ink.multiline_text((4, y + SIDE // 2 - 8), strip.label, INK, font)
            if strip.frames is not None:
                for column, frame in enumerate(strip.frames[shown[shown < len(strip.frames)]]):
                    tile = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                    sheet.paste(tile, (LABELS + column * (SIDE + GAP), y))
        top += height
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def hide(frames: Frames, visible: Bool[np.ndarray, " S"], grid: tuple[int, int]) -> Frames:
    """Frames with the cells that are not visible painted dark."""
    rows, columns = (np.arange(frames.shape[axis]) * grid[axis - 1] // frames.shape[axis] for axis in (1, 2))
    shown = visible.reshape(grid)[np.ix_(rows, columns)]
    masked: np.ndarray = np.where(shown[None, :, :, None], frames, np.array(HIDDEN, np.uint8))
    return masked
