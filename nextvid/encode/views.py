"""One look at a clip: crop in upright source pixels, antialiased bicubic resize to a square, flip.

Holds arithmetic on decoded frames only: which crop and flip a view has was decided in the clips table. The filter is
Pillow's BICUBIC, whose support grows with the reduction. Why this one: it is the reference of research video 3, against
which cv2's bicubic, not antialiased, has 26 dB, cv2 AREA, a box, 41 dB, swscale BICUBIC 55 dB. Its result depends
on the crop alone, not on decoder, ffmpeg version or memory stride, so that a view can be made again.

Axes: F frames, H W native pixels, R pixels a side of the view.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image


class CropBox(NamedTuple):
    """A box in upright source pixels."""

    x: int
    y: int
    width: int
    height: int


def view(
    frames: UInt8[np.ndarray, "F H W 3"], crop: CropBox, flip: bool, resolution: int
) -> UInt8[np.ndarray, "F R R 3"]:
    """The view of native frames; the crop is stretched to a square, as random resized crops are (method.md 8).

    The crop is cut before the resize, so that no pixel outside it enters. Raises ValueError where it leaves the frame.
    """
    height, width = frames.shape[1:3]
    if min(crop.x, crop.y) < 0 or crop.x + crop.width > width or crop.y + crop.height > height:
        raise ValueError(f"crop {tuple(crop)} leaves the frame of {width} x {height} pixels")
    cut = frames[:, crop.y : crop.y + crop.height, crop.x : crop.x + crop.width]
    out = np.empty((len(frames), resolution, resolution, 3), np.uint8)
    for frame, target in zip(cut, out, strict=True):
        image = Image.fromarray(np.ascontiguousarray(frame))
        target[:] = np.asarray(image.resize((resolution, resolution), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(out[:, :, ::-1]) if flip else out
