"""A picture of what was stored: source, reconstruction, amplified difference and latent channels, clip under clip.

The clips are those whose rows made the round trip first (roundtrip.py).

Axes: F frames, R pixels a side, f latent frames, C channels, h w cells.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from nextvid.encode.decode_task import Frames
from nextvid.pictures import sheet_png

CLIPS = 4  # our choice: with 8 frames a clip the picture can still be read at a glance
FRAMES = 8
SIDE = 96  # pixels of a tile: 8 of them fit the 960 pixels that an event shows
GAIN = 4  # of the difference; grey is none
GAP = 6  # pixels between clips

SPREAD = 2.5  # deviations of a channel from its mean that grey values reach: 99 % of a Gaussian's


class Shown(NamedTuple):
    """One clip as it was stored; without a reconstruction where the target has no decoder."""

    source: Frames
    reconstruction: Frames | None
    latents: Float[np.ndarray, "f C h w"]


def preview_png(clips: Sequence[Shown]) -> bytes:
    """PNG with four rows a clip: source, reconstruction, GAIN times the difference, channels of its first frame."""
    assert clips, "nothing to show"
    strips = [_strips(clip) for clip in clips[:CLIPS]]
    width = max(strip.shape[1] for strip in strips)
    rows: list[np.ndarray] = []
    for strip in strips:
        rows.append(np.pad(strip, ((0, GAP), (0, width - strip.shape[1]), (0, 0)), constant_values=255))
    return sheet_png(Image.fromarray(np.concatenate(rows)[:-GAP]))


def channel_pictures(latents: Float[np.ndarray, "f C h w"]) -> UInt8[np.ndarray, "c h w 3"]:
    """The first latent frame's first FRAMES channels as grey pictures: mid grey is the clip's mean of the channel."""
    values = latents[:, :FRAMES].astype(np.float32)
    mean, std = values.mean(axis=(0, 2, 3)), values.std(axis=(0, 2, 3))
    scaled = (values[0] - mean[:, None, None]) / np.maximum(SPREAD * std, 1e-12)[:, None, None]
    grey = (127.5 * (scaled.clip(-1, 1) + 1)).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)


def _strips(clip: Shown) -> UInt8[np.ndarray, "h w 3"]:
    """Rows of up to FRAMES tiles: frames spread evenly over the clip, then channels."""
    shown = np.unique(np.linspace(0, len(clip.source) - 1, FRAMES).round().astype(int))
    rows = [[_tile(frame) for frame in clip.source[shown]]]
    if clip.reconstruction is not None:
        difference = (clip.reconstruction[shown].astype(np.int16) - clip.source[shown]) * GAIN + 128
        rows += [
            [_tile(frame) for frame in kind]
            for kind in (clip.reconstruction[shown], difference.clip(0, 255).astype(np.uint8))
        ]
    rows.append([_tile(channel, Image.Resampling.NEAREST) for channel in channel_pictures(clip.latents)])
    most = max(map(len, rows))
    white = np.full((SIDE, SIDE, 3), 255, np.uint8)
    return np.concatenate([np.concatenate(row + [white] * (most - len(row)), axis=1) for row in rows])


def _tile(
    frame: UInt8[np.ndarray, "R R 3"], how: Image.Resampling = Image.Resampling.BICUBIC
) -> UInt8[np.ndarray, "h w 3"]:
    return np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), how))
