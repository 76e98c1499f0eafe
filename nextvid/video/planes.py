"""Small pictures of a decoded frame, read from its YUV planes in place: thumbnails, grey pictures, previews.

Detectors and scores look at these. Four interpolated samples a pixel, averaged, cost less than half of swscale's area
filter for a thumbnail (docs/performance.md); swscale is the reference that tests compare with, and reads every pixel
format other than the six below. Frames for encoding go through container.Scaler, which filters better.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

from nextvid.video.display import over_black

# Eight bits, one plane a channel: 4:2:0, 4:2:2 and 4:4:4, in video and in full range.
PLANAR = frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"})
FULL_RANGE = 2  # AVCOL_RANGE_JPEG of libavutil
LUMA_RANGE = np.clip((np.arange(256) - 16) * 255 / 219, 0, 255).round().astype(np.uint8)  # ITU-R BT.601: 16 to 235
CHROMA_RANGE = np.clip((np.arange(256) - 128) * 255 / 224 + 128, 0, 255).round().astype(np.uint8)  # 16 to 240

Plane = UInt8[np.ndarray, "h w"]


@dataclass(frozen=True)
class Planes:
    """A frame's Y, Cb and Cr as it stores them: not upright, in its own range. Views: valid while the frame lives."""

    y: Plane
    cb: Plane
    cr: Plane
    full_range: bool

    def thumbnail(self, width: int, height: int) -> UInt8[np.ndarray, "h3 w"]:
        """Y, Cb and Cr in full range, each width x height, one below the other."""
        out = np.empty((3 * height, width), np.uint8)
        out[:height] = _reduced(self.y, width, height)
        for index, plane in enumerate((self.cb, self.cr), 1):  # their detail is half as fine and tells little
            at = out[index * height : (index + 1) * height]
            cv2.resize(plane, (width, height), dst=at, interpolation=cv2.INTER_LINEAR)
        if not self.full_range:
            cv2.LUT(out[:height], LUMA_RANGE, dst=out[:height])
            cv2.LUT(out[height:], CHROMA_RANGE, dst=out[height:])
        return out

    def grey(self, width: int, height: int) -> Plane:
        """Y in full range, reduced to width x height."""
        scaled = _reduced(self.y, width, height)
        return scaled if self.full_range else in_full_range(scaled)


def in_full_range(luma: Plane) -> Plane:
    """LUMA_RANGE by arithmetic, faster for a large picture."""
    return cv2.convertScaleAbs(cv2.subtract(luma, 16), alpha=255 / 219)


class PlaneReader:
    """Frames of one file as planes; of a pixel format that has none, `side` pixels of the shorter side are kept."""

    def __init__(self, side: int) -> None:
        self.side = side
        self._scaler = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> Planes:
        if frame.format.name not in PLANAR:
            frame = over_black(frame)
            shrink = min(1.0, self.side / min(frame.width, frame.height))
            width, height = (max(2, round(side * shrink)) for side in (frame.width, frame.height))
            frame = self._scaler.reformat(
                frame, width=width, height=height, format="yuv444p", interpolation="AREA", threads=1
            )
        full = frame.format.name.startswith("yuvj") or frame.color_range == FULL_RANGE
        y, cb, cr = (
            np.ndarray((plane.height, plane.width), np.uint8, memoryview(plane), strides=(plane.line_size, 1))
            for plane in frame.planes
        )
        return Planes(y, cb, cr, full)


@dataclass(frozen=True)
class Look:
    """A small upright picture: Y in full range and, coarser, its chroma; half the bytes of RGB."""

    luma: Plane
    chroma: UInt8[np.ndarray, "2 hc wc"]

    def rgb(self) -> UInt8[np.ndarray, "h w 3"]:
        """The picture in colour, by BT.601."""
        height, width = self.luma.shape
        cb, cr = (cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR) for plane in self.chroma)
        rgb: UInt8[np.ndarray, "h w 3"] = cv2.cvtColor(cv2.merge([self.luma, cr, cb]), cv2.COLOR_YCrCb2RGB)
        return rgb


def _reduced(plane: Plane, width: int, height: int) -> Plane:
    if plane.shape == (height, width):
        return plane.copy()
    twice = cv2.resize(plane, (2 * width, 2 * height), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(twice, (width, height), interpolation=cv2.INTER_AREA)
