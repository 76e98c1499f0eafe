"""Times in, frames and their true times out; never frame indices.

Holds the choice of the frame for a time, the contract that the frame is near enough, and both decoders behind it. Holds
no routing (probe.py says which decoder a file gets) and no scores. The frame of a time is the nearest; of two equally
near (within a millisecond, the tick of Matroska) the earlier, so that both decoders agree: 30 fps sampled at 4 Hz meets
such ties.
"""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from av.video.frame import VideoFrame
from jaxtyping import Int64, UInt8

from nextvid.video.container import MICROSECONDS, Scaler, decoded, family, micros, opened, upright_size
from nextvid.video.images import animation, animation_times
from storage.errors import MediaError

Frames = UInt8[np.ndarray, "T H W 3"]
Times = Int64[np.ndarray, "T"]
Placed = tuple[int, int, UInt8[np.ndarray, "H W 3"]]  # (wanted time, actual time, frame)

TIE_US = 1_000  # Matroska's tick; decord's float32 seconds are better than this up to 4 hours
JUMP_US = 5_000_000  # research video 7: GOPs of web video last 5 s; decoding over a shorter gap is cheaper than a seek
DECORD_BATCH = 16  # frames a get_batch: bounds memory


def frames_at(
    path: Path,
    times_us: Sequence[int],
    decoder: Literal["decord", "pyav", "pillow"],
    size: tuple[int, int] | None = None,
) -> tuple[Frames, Times]:
    """Upright RGB frames uint8 [T, H, W, 3] nearest to the times, and their own times int64 [T] in microseconds.

    `size` is (height, width); None keeps the source's. Every frame is within one source frame of its time, else
    MediaError `pts_mismatch`.
    """
    return clips_at(path, [times_us], decoder, size)[0]


def clips_at(
    path: Path,
    times_us: Sequence[Sequence[int]],
    decoder: Literal["decord", "pyav", "pillow"],
    size: tuple[int, int] | None = None,
) -> list[tuple[Frames, Times]]:
    """As `frames_at` for several lists of times of one file, each source frame decoded once: 1.5 to 4 times cheaper."""
    wanted = sorted({time for times in times_us for time in times})
    assert wanted, "no times were asked for"
    pictures: list[UInt8[np.ndarray, "H W 3"]] = []
    found: dict[int, tuple[int, int]] = {}
    for time, pts_us, picture in placed(path, wanted, decoder, size):
        if not pictures or picture is not pictures[-1]:
            pictures.append(picture)
        found[time] = (len(pictures) - 1, pts_us)
    shapes = {picture.shape for picture in pictures}
    if len(shapes) > 1:
        raise MediaError("changing_size", f"{path}: the frame size changes within the file: {sorted(shapes)}")
    return [
        (np.stack([pictures[found[t][0]] for t in times]), np.array([found[t][1] for t in times], np.int64))
        for times in times_us
    ]


def placed(
    path: Path,
    times_us: Sequence[int],
    decoder: Literal["decord", "pyav", "pillow"],
    size: tuple[int, int] | None = None,
) -> Iterator[Placed]:
    """(wanted time, actual time, upright frame) in ascending order of `times_us`, one frame in memory at a time.

    Consecutive times that fall on one source frame get the same array object. Raises MediaError.
    """
    assert all(a < b for a, b in itertools.pairwise(times_us)), "times must ascend"
    match decoder:
        case "decord":
            return _by_decord(path, times_us, size)
        case "pyav":
            return _by_pyav(path, times_us, size)
        case "pillow":
            return _by_pillow(path, times_us, size)


def stream(path: Path) -> Iterator[tuple[int, VideoFrame]]:
    """Every frame of a file in order with its time, through PyAV; not yet upright (see `container.Scaler`).

    An animated WebP comes through Pillow. Raises MediaError `corrupt` or `bad_times` where the file stops being
    trustworthy.
    """
    if path.suffix.lower() == ".webp":
        for time_us, image in animation(path):
            yield time_us, VideoFrame.from_ndarray(image, format="rgb24")
        return
    with opened(path, strict=True) as (container, video):
        yield from decoded(container, video)


def nearest(pts_us: Int64[np.ndarray, "n"], times_us: Int64[np.ndarray, "T"]) -> Int64[np.ndarray, "T"]:
    """Index of the frame of each time: the nearest, of two within a tie the earlier. `pts_us` ascends."""
    after = np.searchsorted(pts_us, times_us).clip(0, len(pts_us) - 1)
    before = (after - 1).clip(0)
    later = np.abs(pts_us[after] - times_us) + TIE_US < np.abs(pts_us[before] - times_us)
    return np.where(later, after, before)


def _by_pyav(path: Path, times_us: Sequence[int], size: tuple[int, int] | None) -> Iterator[Placed]:
    with opened(path, strict=False) as (container, video):
        rate = video.average_rate
        clock = _Clock(path, round(MICROSECONDS / rate) if rate else 0)
        frames = decoded(container, video, times_us[0])
        jumps = family(container) != "avi"  # its times are counted from the start
        pictures = _Pictures(size)
        waiting = list(reversed(times_us))
        before: tuple[int, VideoFrame] | None = None
        sought = times_us[0]
        image: tuple[VideoFrame, UInt8[np.ndarray, "H W 3"]] | None = None
        while waiting:
            current = next(frames, None)
            if current is None and before is None:
                raise MediaError("empty", f"{path}: no frame at or after {sought} us")
            clock.see(before, current)
            while waiting and (current is None or current[0] >= waiting[-1]):
                pts_us, frame = clock.choose(before, current, waiting[-1])
                if image is None or image[0] is not frame:
                    image = (frame, pictures.of(frame))
                yield waiting.pop(), pts_us, image[1]
            before = current
            far = jumps and waiting and current is not None and waiting[-1] - current[0] > JUMP_US
            if far and sought != waiting[-1]:
                sought, before = waiting[-1], None
                frames = decoded(container, video, sought)


class _Clock:
    """How long a source frame lasts, learnt while decoding, and the contract that rests on it."""

    def __init__(self, path: Path, nominal_us: int) -> None:
        self.path = path
        self.nominal_us = nominal_us
        self.gaps_us: list[int] = []

    def see(self, before: tuple[int, VideoFrame] | None, current: tuple[int, VideoFrame] | None) -> None:
        if before and current and len(self.gaps_us) < 64:  # 64 gaps give a steady median
            self.gaps_us.append(current[0] - before[0])

    def choose(
        self, before: tuple[int, VideoFrame] | None, current: tuple[int, VideoFrame] | None, time_us: int
    ) -> tuple[int, VideoFrame]:
        near = [pair for pair in (before, current) if pair is not None]
        index = nearest(np.array([pts for pts, _ in near], np.int64), np.array([time_us], np.int64))[0]
        pts_us, frame = near[int(index)]
        lasts = [_duration_us(frame) for _, frame in near]  # variable rates: a frame says how long it stays
        typical = int(statistics.median(self.gaps_us)) if self.gaps_us else 0
        _check(self.path, time_us, pts_us, max(self.nominal_us, typical, *lasts))
        return pts_us, frame


def _duration_us(frame: VideoFrame) -> int:
    return micros(frame.duration, frame.time_base) if frame.duration and frame.time_base else 0


def _check(path: Path, time_us: int, pts_us: int, frame_us: int) -> None:
    if abs(pts_us - time_us) > frame_us + TIE_US:
        raise MediaError(
            "pts_mismatch",
            f"{path}: the frame nearest to {time_us} us is at {pts_us} us, over one source frame ({frame_us} us) away",
        )


class _Pictures:
    """RGB arrays of one size, through swscale's bicubic filter: the best of those measured (research: video, 3)."""

    def __init__(self, size: tuple[int, int] | None) -> None:
        self.size = size
        self.scaler: Scaler | None = None

    def of(self, frame: VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
        width, height = upright_size(frame) if self.size is None else (self.size[1], self.size[0])
        if self.scaler is None or (self.scaler.width, self.scaler.height) != (width, height):
            self.scaler = Scaler(width, height, "rgb24", "BICUBIC")
        return self.scaler(frame)


def _by_pillow(path: Path, times_us: Sequence[int], size: tuple[int, int] | None) -> Iterator[Placed]:
    starts = np.array(animation_times(path), np.int64)
    if not len(starts):
        raise MediaError("unknown_format", f"{path}: no animation; list the dataset again")
    indices = nearest(starts[:-1], np.array(times_us, np.int64))
    for time_us, index in zip(times_us, indices, strict=True):
        _check(path, time_us, int(starts[index]), int(starts[index + 1] - starts[index]))
    pictures = _Pictures(size)
    for index, (pts_us, image) in enumerate(animation(path)):
        places = np.flatnonzero(indices == index)
        if not len(places):
            continue
        picture = image if size is None else pictures.of(VideoFrame.from_ndarray(image, format="rgb24"))
        for place in places:
            yield times_us[int(place)], pts_us, picture


def _by_decord(path: Path, times_us: Sequence[int], size: tuple[int, int] | None) -> Iterator[Placed]:
    import decord  # no wheel on some platforms; and its FFmpeg should not load where PyAV does the work

    decord.logging.set_level(decord.logging.QUIET)
    errors = (decord.DECORDError, RuntimeError, IndexError, ValueError, OSError)
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        starts_s = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
    except errors as error:
        raise MediaError("undecodable", f"{path}: decord: {error}") from None
    seconds = np.asarray(starts_s, np.float64)
    pts_us = np.rint(np.nan_to_num(seconds, posinf=0.0, neginf=0.0) * MICROSECONDS).astype(np.int64)
    if not len(pts_us) or not np.isfinite(seconds).all() or (np.diff(pts_us) <= 0).any():
        raise MediaError("bad_times", f"{path}: decord: timestamps do not ascend")
    gap_us = int(np.median(np.diff(pts_us))) if len(pts_us) > 1 else 0  # Matroska may declare 1000 fps
    frame_us = max(gap_us, round(MICROSECONDS / reader.get_avg_fps()))
    indices = nearest(pts_us, np.array(times_us, np.int64))
    for time_us, index in zip(times_us, indices, strict=True):
        _check(path, time_us, int(pts_us[index]), frame_us)
    pictures = _Pictures(size)
    distinct = np.unique(indices)
    for at in range(0, len(distinct), DECORD_BATCH):
        some = distinct[at : at + DECORD_BATCH]
        try:
            batch = reader.get_batch(some.tolist()).asnumpy()
        except errors as error:
            raise MediaError("corrupt", f"{path}: decord: {error}") from None
        for index, image in zip(some, batch, strict=True):
            picture = image if size is None else pictures.of(VideoFrame.from_ndarray(image, format="rgb24"))
            for place in np.flatnonzero(indices == index):
                yield times_us[int(place)], int(pts_us[index]), picture
