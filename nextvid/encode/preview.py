"""A picture of what was stored: source frames, their reconstruction, and the difference, one clip under the other.

Holds pixels only; which clips are shown is decided by the round trip (nextvid/encode/latents.py).

Axes: F frames, R pixels a side.
"""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

CLIPS = 4  # our choice: with 8 frames a clip the picture is still read at a glance
FRAMES = 8
SIDE = 96  # pixels of a tile: 8 of them fit the 960 pixels that an event shows
GAIN = 4  # of the difference; grey is none
GAP = 6  # pixels between clips

Frames = UInt8[np.ndarray, "F R R 3"]


def preview_png(pairs: Sequence[tuple[Frames, Frames]]) -> bytes:
    """PNG of (source, reconstruction) pairs: three rows a clip, source | reconstruction | GAIN times the difference."""
    assert pairs, "nothing to show"
    strips = [_strips(*pair) for pair in pairs[:CLIPS]]
    width = max(strip.shape[1] for strip in strips)
    rows: list[np.ndarray] = []
    for strip in strips:
        rows.append(np.pad(strip, ((0, GAP), (0, width - strip.shape[1]), (0, 0)), constant_values=255))
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows)[:-GAP]).save(buffer, format="PNG")
    return buffer.getvalue()


def _strips(source: Frames, reconstruction: Frames) -> UInt8[np.ndarray, "h w 3"]:
    """Three rows of up to FRAMES tiles, spread evenly over the clip."""
    shown = np.unique(np.linspace(0, len(source) - 1, FRAMES).round().astype(int))
    difference = (reconstruction[shown].astype(np.int16) - source[shown]) * GAIN + 128
    kinds = (source[shown], reconstruction[shown], difference.clip(0, 255).astype(np.uint8))
    return np.concatenate([np.concatenate([_tile(frame) for frame in kind], axis=1) for kind in kinds])


def _tile(frame: UInt8[np.ndarray, "R R 3"]) -> UInt8[np.ndarray, "h w 3"]:
    return np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
