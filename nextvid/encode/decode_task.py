"""What runs inside the sandbox: the views of some rows of one file, in one pass over it.

Imported by the sandbox's processes, so it holds no torch and no tables. A file is read only if its bytes still are the
media that the clips table speaks of: a file that changed between listing and encoding gives no row.

Axes: F frames, R pixels a side.

One look at a clip: crop in upright source pixels, antialiased bicubic resize to a square, flip.

Holds arithmetic on decoded frames only: which crop and flip a view has was decided in the clips table. The filter is
Pillow's BICUBIC, whose support grows with the reduction. Why this one: it is the reference of research video 3, against
which cv2's bicubic, not antialiased, has 26 dB, cv2 AREA, a box, 41 dB, swscale BICUBIC 55 dB. Its result depends
on the crop alone, not on decoder, ffmpeg version or memory stride, so that a view can be made again.

Axes: F frames, H W native pixels, R pixels a side of the view.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from nextvid.video.decode import placed
from nextvid.video.images import animation_times, load_image
from storage.digest import digest_file
from storage.errors import MediaError


class CropBox(NamedTuple):
    """A box in upright source pixels."""

    x: int
    y: int
    width: int
    height: int


Decoder = Literal["decord", "pyav", "pillow"]
View = UInt8[np.ndarray, "F R R 3"]

START_S = 60.0  # allowance of every task: a loaded machine, a cold disk
READ_BYTES_PER_S = 2e7  # our choice: a slow network file system
PER_VIDEO_SECOND_S = 2.0  # a second of 1080p costs 0.1 s (research video 8); a loaded machine takes ten times that


@dataclass(frozen=True)
class Look:
    """What one row asks of its file."""

    row_id: bytes
    times_us: tuple[int, ...]
    crop: CropBox
    flip: bool


@dataclass(frozen=True)
class Task:
    """Rows of one file, decoded in one pass."""

    path: Path  # a local file
    media_id: bytes
    decoder: Decoder
    resolution: int
    looks: tuple[Look, ...]

    def timeout_s(self, size_bytes: int) -> float:
        """Deadline: all bytes are read for their digest, and about the span of the times is decoded."""
        times = [time for look in self.looks for time in look.times_us]
        return START_S + size_bytes / READ_BYTES_PER_S + PER_VIDEO_SECOND_S * (max(times) - min(times)) / 1e6


def decode(task: Task) -> tuple[list[View], float]:
    """Runs inside the sandbox: the views of a task in the order of its looks, and the seconds they took.

    Each source frame is decoded once and resized for every look that wants it; native frames are not kept. Raises
    MediaError; `changed` where the file is not the media any more.
    """
    began = time.perf_counter()
    path = task.path
    try:
        same = digest_file(path) == task.media_id.hex()
    except OSError as error:
        raise MediaError("missing", f"{path}: {error}; list the dataset again") from None
    if not same:
        raise MediaError("changed", f"{path}: its bytes changed since it was listed; list the dataset again")
    if task.decoder == "pillow" and not animation_times(path):
        image = load_image(path)[None]
        out = [_view(path, image, look, task.resolution).repeat(len(look.times_us), axis=0) for look in task.looks]
    else:
        out = _decode_video(path, task, task.decoder)
    return out, time.perf_counter() - began


def _decode_video(path: Path, task: Task, decoder: Decoder) -> list[View]:
    side = task.resolution
    out = [np.empty((len(look.times_us), side, side, 3), np.uint8) for look in task.looks]
    places: dict[int, list[tuple[int, int]]] = {}
    for index, look in enumerate(task.looks):
        for frame, time_us in enumerate(look.times_us):
            places.setdefault(time_us, []).append((index, frame))
    for time_us, _, picture in placed(path, sorted(places), decoder):
        views: dict[int, np.ndarray] = {}
        for index, frame in places[time_us]:
            if index not in views:  # a fitted clip may ask for one time twice
                views[index] = _view(path, picture[None], task.looks[index], side)[0]
            out[index][frame] = views[index]
    return out


def _view(path: Path, frames: np.ndarray, look: Look, resolution: int) -> View:
    try:
        return view(frames, look.crop, look.flip, resolution)
    except ValueError as error:
        raise MediaError("crop_outside", f"{path}: {error}") from None


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
