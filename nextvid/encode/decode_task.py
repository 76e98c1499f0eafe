"""What runs inside the sandbox: the frames of some rows of one file, cropped and resized, in one pass over the file.

The sandbox's processes import this module, so that it imports neither torch nor tables. A file is read only if its
bytes still have the digest that the clips table names: a file that changed since it was listed gives no row.

Pillow's BICUBIC resizes, because it widens its support with the reduction and so filters what a smaller picture cannot
hold. Against it we measured 26 dB for cv2's bicubic, which does not, 41 dB for cv2 AREA (a box) and 55 dB for
swscale's BICUBIC. Its result depends on the crop alone, not on decoder, ffmpeg version or memory stride, so that the
same frames can be made again.

Axes: F frames, H W native pixels, R pixels a side of the square result.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from nextvid.video.decode import placed
from nextvid.video.images import animation_times, load_image
from nextvid.video.probe import Decoder
from storage.digest import digest_file
from storage.errors import MediaError

Frames = UInt8[np.ndarray, "F R R 3"]

START_S = 60.0  # allowance of every task: a loaded machine, a cold disk
READ_BYTES_PER_S = 2e7  # our choice: a slow network file system
PER_VIDEO_SECOND_S = 2.0  # we measured 0.1 s for a second of 1080p; a loaded machine takes ten times that


class CropBox(NamedTuple):
    """A box in upright source pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class RequestedRow:
    """What one row shows of its file: a view of a clip."""

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
    rows: tuple[RequestedRow, ...]

    def timeout_s(self, size_bytes: int) -> float:
        """Deadline: all bytes are read for their digest, and about the span of the times is decoded."""
        times = [time for row in self.rows for time in row.times_us]
        return START_S + size_bytes / READ_BYTES_PER_S + PER_VIDEO_SECOND_S * (max(times) - min(times)) / 1e6


def decode(task: Task) -> tuple[list[Frames], float]:
    """The frames of each row of a task, and the seconds they took. Runs inside the sandbox.

    Each source frame is decoded once and resized for every row that shows it; native frames are not kept. Raises
    MediaError; its reason is `changed` where the file is not the listed one any more.
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
        out = [cropped(image, r.crop, r.flip, task.resolution).repeat(len(r.times_us), axis=0) for r in task.rows]
    else:
        out = _decode_video(task)
    return out, time.perf_counter() - began


def _decode_video(task: Task) -> list[Frames]:
    side = task.resolution
    out = [np.empty((len(row.times_us), side, side, 3), np.uint8) for row in task.rows]
    places: dict[int, list[tuple[int, int]]] = {}
    for index, row in enumerate(task.rows):
        for frame, time_us in enumerate(row.times_us):
            places.setdefault(time_us, []).append((index, frame))
    for time_us, _, picture in placed(task.path, sorted(places), task.decoder):
        shown: dict[int, Frames] = {}
        for index, frame in places[time_us]:
            if index not in shown:  # a clip stretched over few frames may ask for one time twice
                row = task.rows[index]
                shown[index] = cropped(picture[None], row.crop, row.flip, side)
            out[index][frame] = shown[index][0]
    return out


def cropped(frames: UInt8[np.ndarray, "F H W 3"], crop: CropBox, flip: bool, resolution: int) -> Frames:
    """Native frames cropped, stretched to a square as random resized crops are (docs/method.md 8), and flipped.

    The crop is cut before the resize, so that no pixel outside it enters. Raises MediaError where it leaves the frame.
    """
    height, width = frames.shape[1:3]
    if min(crop.x, crop.y) < 0 or crop.x + crop.width > width or crop.y + crop.height > height:
        raise MediaError("crop_outside", f"crop {tuple(crop)} leaves the frame of {width} x {height} pixels")
    cut = frames[:, crop.y : crop.y + crop.height, crop.x : crop.x + crop.width]
    out = np.empty((len(frames), resolution, resolution, 3), np.uint8)
    for frame, target in zip(cut, out, strict=True):
        image = Image.fromarray(np.ascontiguousarray(frame))
        target[:] = np.asarray(image.resize((resolution, resolution), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(out[:, :, ::-1]) if flip else out
