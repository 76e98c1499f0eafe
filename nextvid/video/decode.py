"""Frames of a video at given times, with their true times; frame indices are never used.

The frame of a time is the nearest; of two equally near (within a millisecond, the tick of Matroska) the earlier, so
that both decoders agree: 30 fps sampled at 4 Hz meets such ties. A frame that is not near enough is an error. The
probe decides which decoder a file gets (probe.py).
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from av.video.frame import VideoFrame
from jaxtyping import Float64, Int64, UInt8

from nextvid.video.container import MICROSECONDS, Scaler, decoded, micros, opened
from nextvid.video.display import Display
from nextvid.video.images import animation, animation_times
from storage.errors import MediaError

Placed = tuple[int, int, UInt8[np.ndarray, "H W 3"]]  # (wanted time, actual time, frame)

PAUSE_US = 500_000  # our choice: without a frame for longer the picture before stays, as slides do
TIE_US = 1_000  # Matroska's tick; decord's float32 seconds are better than this up to 4 hours
JUMP_US = 5_000_000  # our measurement: GOPs of web video last 5 s; decoding over a shorter gap is cheaper than a seek
DECORD_ERRORS = (RuntimeError, IndexError, ValueError, OSError)  # of its bindings, beside its own
DECORD_BATCH = 16  # frames a get_batch: bounds memory


def placed(
    path: Path,
    times_us: Sequence[int],
    decoder: Literal["decord", "pyav", "pillow"],
) -> Iterator[Placed]:
    """(wanted time, actual time, upright frame) in ascending order of `times_us`, one frame in memory at a time.

    Consecutive times that fall on one source frame get the same array object. Raises MediaError.
    """
    assert all(a < b for a, b in itertools.pairwise(times_us)), "times must ascend"
    match decoder:
        case "decord":
            return _by_decord(path, times_us)
        case "pyav":
            return _by_pyav(path, times_us)
        case "pillow":
            return _by_pillow(path, times_us)


def stream(path: Path) -> Iterator[tuple[int, VideoFrame]]:
    """Every frame of a file in order with its time, through PyAV; not yet upright (see `container.Scaler`).

    Animated WebP, PNG and AVIF come through Pillow. Raises MediaError `corrupt` or `bad_times` where the file stops
    being trustworthy.
    """
    if animation_times(path):
        for time_us, image in animation(path):
            yield time_us, VideoFrame.from_ndarray(image, format="rgb24")
        return
    with opened(path, strict=True) as video:
        yield from decoded(video)


def nearest(pts_us: Int64[np.ndarray, "n"], times_us: Int64[np.ndarray, "T"]) -> Int64[np.ndarray, "T"]:
    """Index of the frame of each time: the nearest, of two within a tie the earlier. `pts_us` ascends.

    In a pause the frame before it is shown until the next one begins, so that no picture of the future is handed out.
    """
    after = np.searchsorted(pts_us, times_us).clip(0, len(pts_us) - 1)
    before = (after - 1).clip(0)
    ahead_us, behind_us = pts_us[after] - times_us, np.abs(pts_us[before] - times_us)
    pause = pts_us[after] - pts_us[before] > PAUSE_US
    later = np.where(pause, ahead_us <= TIE_US, np.abs(ahead_us) + TIE_US < behind_us)
    return np.where(later, after, before)


def _by_pyav(path: Path, times_us: Sequence[int]) -> Iterator[Placed]:
    with opened(path, strict=False) as video:
        rate = video.stream.average_rate
        nominal_us = round(MICROSECONDS / rate) if rate else 0
        frames = decoded(video, times_us[0])
        scale: Scaler | None = None
        waiting = list(reversed(times_us))
        before: tuple[int, VideoFrame] | None = None
        sought = times_us[0]
        image: tuple[VideoFrame, UInt8[np.ndarray, "H W 3"]] | None = None
        while waiting:
            current = next(frames, None)
            if current is None and before is None:
                raise MediaError("empty", f"{path}: no frame at or after {sought} us")
            while waiting and (current is None or current[0] >= waiting[-1]):
                near = [pair for pair in (before, current) if pair is not None]
                pts_us, frame = _chosen(path, near, waiting[-1], nominal_us)
                if scale is None:
                    display = Display.of(frame, video.stream)
                    scale = Scaler(*display.size(*video.stored_size), "rgb24", "BICUBIC", display)
                if image is None or image[0] is not frame:
                    image = (frame, scale(frame))
                yield waiting.pop(), pts_us, image[1]
            before = current
            far = video.seekable and waiting and current is not None and waiting[-1] - current[0] > JUMP_US
            if far and sought != waiting[-1]:
                sought, before = waiting[-1], None
                frames = decoded(video, sought)


def _chosen(
    path: Path, near: Sequence[tuple[int, VideoFrame]], time_us: int, nominal_us: int
) -> tuple[int, VideoFrame]:
    """The frame of a time among the last before it and the first after it, as far as the file has both.

    Between two frames of one run that is all there is to say. At an end, and in a pause, the frame must be within the
    time that it lasts, as it says itself or as the rate says.
    """
    index = nearest(np.array([pts for pts, _ in near], np.int64), np.array([time_us], np.int64))[0]
    pts_us, frame = near[int(index)]
    inside = len(near) == 2 and near[0][0] <= time_us and near[1][0] - near[0][0] <= PAUSE_US
    if not inside:
        lasts_us = [micros(f.duration, f.time_base) for _, f in near if f.duration and f.time_base]
        _check(path, time_us, pts_us, max(nominal_us, *lasts_us, 0))
    return pts_us, frame


def _check(path: Path, time_us: int, pts_us: int, frame_us: int) -> None:
    if abs(pts_us - time_us) > frame_us + TIE_US:
        raise MediaError(
            "pts_mismatch",
            f"{path}: the frame nearest to {time_us} us is at {pts_us} us, over one source frame ({frame_us} us) away",
        )


def _by_pillow(path: Path, times_us: Sequence[int]) -> Iterator[Placed]:
    starts = np.array(animation_times(path), np.int64)
    if not len(starts):
        raise MediaError("unknown_format", f"{path}: no animation; list the dataset again")
    indices = nearest(starts[:-1], np.array(times_us, np.int64))
    for time_us, index in zip(times_us, indices, strict=True):
        _check(path, time_us, int(starts[index]), int(starts[index + 1] - starts[index]))
    for index, (pts_us, image) in enumerate(animation(path)):
        places = np.flatnonzero(indices == index)
        if not len(places):
            continue
        for place in places:
            yield times_us[int(place)], pts_us, image


def decord_reader(path: Path) -> tuple[Any, Float64[np.ndarray, "n"]]:
    """A file opened by decord, and the time of each of its frames in seconds. Raises MediaError `undecodable`."""
    import decord  # no wheel on some platforms

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        return reader, np.asarray(reader.get_frame_timestamp(np.arange(len(reader)))[:, 0], np.float64)
    except (decord.DECORDError, *DECORD_ERRORS) as error:
        raise MediaError("undecodable", f"{path}: decord: {error}") from None


def _by_decord(path: Path, times_us: Sequence[int]) -> Iterator[Placed]:
    import decord

    reader, seconds = decord_reader(path)
    pts_us = np.rint(np.nan_to_num(seconds, posinf=0.0, neginf=0.0) * MICROSECONDS).astype(np.int64)
    if not len(pts_us) or not np.isfinite(seconds).all() or (np.diff(pts_us) <= 0).any():
        raise MediaError("bad_times", f"{path}: decord: timestamps do not ascend")
    gap_us = int(np.median(np.diff(pts_us))) if len(pts_us) > 1 else 0  # Matroska may declare 1000 fps
    frame_us = max(gap_us, round(MICROSECONDS / reader.get_avg_fps()))
    indices = nearest(pts_us, np.array(times_us, np.int64))
    for time_us, index in zip(times_us, indices, strict=True):
        _check(path, time_us, int(pts_us[index]), frame_us)
    distinct = np.unique(indices)
    for at in range(0, len(distinct), DECORD_BATCH):
        some = distinct[at : at + DECORD_BATCH]
        try:
            batch = reader.get_batch(some.tolist()).asnumpy()
        except (decord.DECORDError, *DECORD_ERRORS) as error:
            raise MediaError("corrupt", f"{path}: decord: {error}") from None
        for index, image in zip(some, batch, strict=True):
            for place in np.flatnonzero(indices == index):
                yield times_us[int(place)], int(pts_us[index]), image
