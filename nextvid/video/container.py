"""An opened video file: allowed containers, packets, frames with true times, scaling to what is shown.

All of PyAV's demuxing and decoding is here. Containers are an allow-list, so that playlists and network protocols never
reach FFmpeg. Error detection caught 7 of 9 silently damaged files and flagged none of 5 clean ones (our measurement).
Times are the file's own timestamps in integer microseconds; a file covers start_us to start_us + duration_us.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8

from nextvid.video.display import DISPLAYED_AS_STORED, Display
from nextvid.video.entry_points import is_entry_point, must_begin_at_entry
from storage.errors import MediaError

# libavformat's demuxers of VIDEO_EXTENSIONS; everything else (hls, concat, sdp, image sequences, lavfi) is refused.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,h264,hevc,m4v,ivf"
ERROR_DETECTION = "crccheck+bitstream+buffer"  # our measurement: module docstring
STRICT = "+explode"  # every flaw is an error; after a seek into an open GOP missing references are no flaw of the file
MICROSECONDS = 1_000_000
BACK_OFF_US = 1_000_000  # first step of an earlier seek, doubled each time; keyframes are at most some seconds apart


def micros(value: int, time_base: Fraction) -> int:
    """A timestamp in microseconds, rounded half to even."""
    return round(Fraction(value * time_base.numerator * MICROSECONDS, time_base.denominator))


@contextmanager
def opened(path: Path, *, strict: bool) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its best video stream, single-threaded, without network; every FFmpeg error as MediaError.

    `strict` is for passes from the start, which decide whether a file is sound; seeking needs it off.
    """
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    try:
        container = av.open(f"file:{path.absolute()}", options=options)
    except FileNotFoundError:
        raise MediaError("missing", f"{path}: no such file; list the dataset again") from None
    except PermissionError:
        raise MediaError("forbidden", f"{path}: no permission to read it; check its mode and owner") from None
    except (av.FFmpegError, ValueError, OverflowError, UnicodeError) as error:
        raise MediaError("unknown_format", f"{path}: not a video container we read: {error}") from None
    try:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or stream.time_base is None or stream.codec_context is None:
            raise MediaError("no_video", f"{path}: holds no video stream that can be decoded")
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1  # a worker has one core
        stream.codec_context.options = {"err_detect": ERROR_DETECTION + (STRICT if strict else "")}
        yield container, stream
    except MemoryError:
        raise
    except (av.FFmpegError, OverflowError, UnicodeError) as error:
        raise MediaError("corrupt", f"{path}: {error}") from None
    finally:
        container.close()


def family(container: InputContainer) -> str:
    """Short name of the container: mp4, matroska, avi, mpegts, ... ."""
    name = container.format.name
    return {"mov,mp4,m4a,3gp,3g2,mj2": "mp4", "matroska,webm": "matroska"}.get(name, name.split(",")[0])


def seekable(container: InputContainer) -> bool:
    """Whether frames have the same times wherever decoding begins.

    In AVI they are counted from the start, and an MPEG program stream has times for some pictures only: those of the
    first ones after a seek are guesses (7 of 100 seeks into such files gave a time twice, our measurement).
    """
    return family(container) not in {"avi", "mpeg"}


def decoded(
    container: InputContainer, stream: VideoStream, from_us: int | None = None
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames in presentation order with their times, from the start or from an entry point at or before `from_us`.

    A naive seek may land behind the requested time (1 of 192 did) or where decoding cannot begin, hence the back-off.
    For the start the file is opened again, since a seek follows an index that may begin late. Pictures that lead their
    key picture cannot be decoded after a seek and are dropped. AVI stores no presentation times: its frames get the
    packets' times in order. Raises MediaError `corrupt` or `bad_times`.
    """
    if family(container) == "avi":
        yield from _checked(_avi_frames(container, stream))
        return
    if from_us is None:
        yield from _checked(_frames(container, stream, None))
        return
    base = stream.time_base
    assert base is not None, "opened() refuses streams without a time base"
    first_us = micros(stream.start_time or 0, base)
    target_us, step_us = from_us, BACK_OFF_US
    while seekable(container) and target_us > first_us:
        container.seek(int(Fraction(target_us, MICROSECONDS) / base), stream=stream, backward=True)
        frames = _frames(container, stream, from_us)
        if first := next(frames, None):
            yield first
            yield from _checked(frames, first[0])
            return
        target_us, step_us = target_us - step_us, step_us * 2
    with opened(Path(container.name.removeprefix("file:")), strict=False) as (again, video):
        yield from _checked(_frames(again, video, None))


class Scaler:
    """Frames scaled to `width` x `height` as they are shown, as uint8 [height, width] or [height, width, 3].

    Keeps swscale's tables between frames, which a frame's own `reformat` would build anew each time.
    """

    def __init__(
        self, width: int, height: int, pixel_format: str, filter_name: str, display: Display = DISPLAYED_AS_STORED
    ) -> None:
        self.width, self.height, self.display = width, height, display
        self.pixel_format, self.filter_name = pixel_format, filter_name
        self._scaler = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> UInt8[np.ndarray, "..."]:
        width, height = (self.height, self.width) if self.display.turns % 2 else (self.width, self.height)
        scaled = self._scaler.reformat(
            frame, width=width, height=height, format=self.pixel_format, interpolation=self.filter_name, threads=1
        )
        return self.display.upright(scaled.to_ndarray())


def _frames(container: InputContainer, stream: VideoStream, wanted_us: int | None) -> Iterator[tuple[int, VideoFrame]]:
    """Frames from the container's position on; nothing where the first that can be shown lies behind `wanted_us`.

    Packets decide that, before anything is decoded: the first entry point, and the first packet from there on that is
    not hidden by an edit list (after a seek towards the end of one edit that may be the beginning of the next).
    """
    base = stream.time_base
    assert base is not None, "opened() refuses streams without a time base"
    anchor: int | None = None
    judged = wanted_us is None
    for packet in container.demux(stream):
        if anchor is None and packet.pts is not None:
            if (wanted_us is not None or must_begin_at_entry(stream)) and not is_entry_point(packet, stream):
                continue
            anchor = packet.pts
        if not judged and packet.pts is not None and not packet.is_discard:
            judged = True
            if wanted_us is not None and micros(packet.pts, base) > wanted_us:
                return
        try:
            frames = stream.decode(packet)
        except (av.InvalidDataError, av.PatchWelcomeError) as error:
            if packet.pts is not None and anchor is not None and packet.pts < anchor:
                continue  # leads its keyframe: refers to pictures before the seek point
            raise MediaError("corrupt", f"{container.name}: damaged near {packet.pts} x {base} s: {error}") from None
        for frame in frames:
            if frame.pts is None:
                raise MediaError("bad_times", f"{container.name}: a frame has no timestamp")
            if anchor is None or frame.pts >= anchor:
                yield micros(frame.pts, base), frame


def _avi_frames(container: InputContainer, stream: VideoStream) -> Iterator[tuple[int, VideoFrame]]:
    base = stream.time_base
    assert base is not None, "opened() refuses streams without a time base"
    waiting: list[int] = []
    for packet in container.demux(stream):
        if packet.dts is not None and packet.size:
            waiting.append(packet.dts)
        try:
            frames = stream.decode(packet)
        except (av.InvalidDataError, av.PatchWelcomeError) as error:
            raise MediaError("corrupt", f"{container.name}: damaged near packet {packet.dts}: {error}") from None
        for frame in frames:
            if not waiting:
                raise MediaError("bad_times", f"{container.name}: more frames than packets; remux the file")
            frame.pts = waiting.pop(0)
            yield micros(frame.pts, base), frame


def _checked(frames: Iterator[tuple[int, VideoFrame]], last_us: int | None = None) -> Iterator[tuple[int, VideoFrame]]:
    for pts_us, frame in frames:
        if frame.is_corrupt:
            raise MediaError("corrupt", f"the frame at {pts_us} us is damaged")
        if last_us is not None and pts_us <= last_us:
            raise MediaError("bad_times", f"the frame at {pts_us} us follows one at {last_us} us; remux the file")
        last_us = pts_us
        yield pts_us, frame
