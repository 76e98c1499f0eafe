"""How a stored frame becomes what a player shows: turned, mirrored, with square pixels, transparency over black.

Everything behind the decoder works in display pixels: sizes, crops, views, previews and hashes. A file has a display
matrix, which turns and may mirror (phones, editors), and the shape of a pixel (DVDs, DV and HDV cameras store pictures
of 16:9 with fewer, wider pixels). Transparency is laid over black, the colour of letterbox bars, so that a cut-out adds
no pattern of its own: in images and in videos alike.
"""

import functools
import math
import struct
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.sidedata.sidedata import SideData
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import UInt8

from storage.errors import MediaError

Picture = UInt8[np.ndarray, "H W ..."]

# (x, y) -> (a x + c y, b x + d y), x to the right and y down, of k quarter turns counter-clockwise and then a mirror
TURNS = {(1, 0, 0, 1): 0, (0, -1, 1, 0): 1, (-1, 0, 0, -1): 2, (0, 1, -1, 0): 3}
SLANT = 0.01  # ours: half a degree, below which a matrix is one of those
SQUARE = Fraction(1, 100)  # ours: pixels within 1 % of square are square (359:360 makes 1278 lines of 1280)
OPAQUE = 255  # alpha of a pixel that hides all behind it
WIDEST = 4  # ours: the widest in use are 2:1 (anamorphic film)


@dataclass(frozen=True)
class Display:
    """What to do with the stored frames of a file."""

    turns: int = 0  # quarter turns counter-clockwise, as np.rot90
    mirrored: bool = False  # left and right exchanged, after turning
    pixel_aspect: Fraction = Fraction(1)  # width of a stored pixel over its height

    @classmethod
    def of(cls, frame: VideoFrame, stream: VideoStream) -> "Display":
        """Raises MediaError `odd_angle` for a matrix that is no quarter turn, `odd_pixels` for impossible pixels."""
        aspect = stream.sample_aspect_ratio or Fraction(1)
        if abs(aspect - 1) <= SQUARE:
            aspect = Fraction(1)
        if not Fraction(1, WIDEST) <= aspect <= WIDEST:
            raise MediaError("odd_pixels", f"a pixel is {aspect.numerator}:{aspect.denominator} wide; remux the file")
        stored = frame.side_data.get("DISPLAYMATRIX")
        if not isinstance(stored, SideData):
            return cls(pixel_aspect=aspect)
        a, b, _, c, d = (value / 65536 for value in struct.unpack("=5i", memoryview(stored)[:20]))
        scale = math.hypot(a, b)
        found = [round(value / scale) if scale else 0 for value in (a, b, c, d)]
        straight = all(
            abs(value - scale * unit) <= SLANT * scale for value, unit in zip((a, b, c, d), found, strict=True)
        )
        for mirrored in (False, True):
            way = (-found[0] if mirrored else found[0], found[1], -found[2] if mirrored else found[2], found[3])
            if straight and way in TURNS:
                return cls(TURNS[way], mirrored, aspect)
        raise MediaError("odd_angle", f"its display matrix ({a:.3f} {b:.3f}; {c:.3f} {d:.3f}) is no quarter turn")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in display pixels of a stored frame; a pixel is stretched in its shorter direction."""
        wide, high = max(self.pixel_aspect, Fraction(1)), max(1 / self.pixel_aspect, Fraction(1))
        shown = (round(width * wide), round(height * high))
        return (shown[1], shown[0]) if self.turns % 2 else shown

    def upright(self, image: Picture) -> Picture:
        """A picture of square pixels as it is shown."""
        turned = np.rot90(image, self.turns) if self.turns else image
        return np.ascontiguousarray(turned[:, ::-1] if self.mirrored else turned)


DISPLAYED_AS_STORED = Display()


def over_black(frame: VideoFrame) -> VideoFrame:
    """The frame with its transparency laid over black, as RGB; a frame without any as it is."""
    if not has_alpha(frame.format.name):
        return frame
    rgba = frame.to_ndarray(format="rgba")
    alpha = rgba[..., 3:]
    if alpha.min() == OPAQUE:
        return frame
    return VideoFrame.from_ndarray((rgba[..., :3] * (alpha / OPAQUE)).round().astype(np.uint8), format="rgb24")


@functools.cache
def has_alpha(pixel_format: str) -> bool:
    """Whether pictures of one of FFmpeg's pixel formats may be transparent."""
    found = VideoFormat(pixel_format)
    return found.has_palette or any(component.is_alpha for component in found.components)
