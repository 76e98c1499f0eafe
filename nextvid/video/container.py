"""An opened video file: allowed containers, its one stream, frames with true times.

All of PyAV's demuxing and decoding is here. Containers are an allow-list, so that playlists and network protocols never
reach FFmpeg. Error detection caught 7 of 9 silently damaged files and flagged none of 5 clean ones (our measurement).
Times are the file's own timestamps in integer microseconds; a file covers start_us to start_us + duration_us.

Of several video streams the first is read, in every container; covers and thumbnails are none. FFmpeg's own choice goes
by flags, frames and rates, which containers have or lack.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Bool, Int64, UInt8

from nextvid.video.display import DISPLAYED_AS_STORED, Display, over_black
from nextvid.video.entry_points import is_entry_point, must_begin_at_entry
from nextvid.video.images import MAX_PIXELS, head_of
from storage.errors import MediaError

# libavformat's demuxers of VIDEO_EXTENSIONS; everything else (hls, concat, sdp, image sequences, lavfi) is refused.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,h264,hevc,m4v,ivf"
ERROR_DETECTION = "crccheck+bitstream+buffer"  # our measurement: module docstring
STRICT = "+explode"  # every flaw is an error; after a seek into an open GOP missing references are no flaw of the file
MICROSECONDS = 1_000_000
# FFmpeg's own decoders of VP8 and VP9 leave out the transparency that WebM has beside the pictures.
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails  # streams that are no video
EDIT_GAP = 1.5  # our choice: in median gaps; the delay is one or more whole ones
BACK_OFF_US = 1_000_000  # first step of an earlier seek, doubled each time; keyframes are at most some seconds apart


@dataclass(frozen=True)
class Video:
    """An opened file, the stream of it that is read, and that stream's decoder."""

    container: InputContainer
    stream: VideoStream
    decoder: VideoCodecContext
    time_base: Fraction  # seconds a tick of the stream's timestamps
    codec: str
    stored_size: tuple[int, int]  # (width, height) of frames by the header; the codec's own is that of the last frame

    @property
    def family(self) -> str:
        """Short name of the container: mp4, matroska, avi, mpegts, ... ."""
        name = self.container.format.name
        return {"mov,mp4,m4a,3gp,3g2,mj2": "mp4", "matroska,webm": "matroska"}.get(name, name.split(",")[0])

    @property
    def seekable(self) -> bool:
        """Whether frames have the same times wherever decoding begins.

        In AVI they are counted from the start, and an MPEG program stream has times for some pictures only: those of
        the first ones after a seek are guesses (7 of 100 seeks into such files gave a time twice, our measurement).
        """
        return self.family not in {"avi", "mpeg"}


def micros(value: int, time_base: Fraction) -> int:
    """A timestamp in microseconds, rounded half to even."""
    return round(Fraction(value * time_base.numerator * MICROSECONDS, time_base.denominator))


def too_large(path: Path, width: int, height: int) -> MediaError:
    """The error of a video whose frames have too many pixels."""
    return MediaError("too_large", f"{path}: {width} x {height} pixels a frame; at most {MAX_PIXELS} are decoded")


@contextmanager
def opened(path: Path, *, strict: bool) -> Iterator[Video]:
    """The file with its video stream, single-threaded, without network; every FFmpeg error as MediaError.

    `strict` is for passes from the start, which decide whether a file is sound; seeking needs it off.
    """
    # `max_pixels`: to learn a stream's format FFmpeg decodes a picture of it already here
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS, "max_pixels": str(MAX_PIXELS)}
    try:
        container = av.open(f"file:{path.absolute()}", options=options)
    except FileNotFoundError:
        raise MediaError("missing", f"{path}: no such file; list the dataset again") from None
    except PermissionError:
        raise MediaError("forbidden", f"{path}: no permission to read it; check its mode and owner") from None
    except (av.FFmpegError, ValueError, OverflowError, UnicodeError) as error:
        raise _unread(path, "unknown_format", f"not a video container we read: {error}") from None
    try:
        stream = next((s for s in container.streams.video if s.codec_context and not s.disposition & PICTURES), None)
        if len(container.streams) == 0:
            raise _unread(path, "no_video", "holds no stream")
        if stream is None or stream.time_base is None:
            raise MediaError("no_video", f"{path}: holds no video stream that can be decoded")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise too_large(path, width, height)
        decoder, codec = stream.codec_context, stream.codec_context.codec.canonical_name
        if codec in WITH_ALPHA and stream.metadata.get("alpha_mode") == "1":
            other = VideoCodecContext.create(WITH_ALPHA[codec], "r")
            assert isinstance(other, VideoCodecContext)
            decoder = other
            decoder.extradata = stream.codec_context.extradata
        decoder.thread_type = "NONE"
        decoder.thread_count = 1  # a worker has one core
        decoder.options = {
            "err_detect": ERROR_DETECTION + (STRICT if strict else ""),
            "max_pixels": str(MAX_PIXELS),
        }
        yield Video(container, stream, decoder, stream.time_base, codec, (width, height))
    except MemoryError:
        raise
    except (av.FFmpegError, OverflowError, UnicodeError) as error:
        raise MediaError("corrupt", f"{path}: {error}") from None
    finally:
        container.close()


def _unread(path: Path, reason: str, why: str) -> MediaError:
    """Why nothing is found in a file: MP4 and MOV that were cut off lack their index, which often stands at the end."""
    if head_of(path)[4:8] != b"ftyp":
        return MediaError(reason, f"{path}: {why}")
    return MediaError(
        "no_index",
        f"{path}: begins as MP4 or MOV, but its index is not there or damaged: cut off? Fetch it again, "
        "or record it again",
    )


def decoded(video: Video, from_us: int | None = None) -> Iterator[tuple[int, VideoFrame]]:
    """Frames in presentation order with their times, from the start or from an entry point at or before `from_us`.

    A naive seek may land behind the requested time (1 of 192 did) or where decoding cannot begin, hence the back-off.
    For the start the file is opened again, since a seek follows an index that may begin late. Pictures that lead their
    key picture cannot be decoded after a seek and are dropped. AVI stores no presentation times: its frames get the
    packets' times in order. Raises MediaError `corrupt` or `bad_times`.
    """
    if video.family == "avi":
        yield from _checked(_avi_frames(video))
        return
    if from_us is None:
        yield from _checked(_frames(video, None))
        return
    first_us = micros(video.stream.start_time or 0, video.time_base)
    target_us, step_us = from_us, BACK_OFF_US
    while video.seekable and target_us > first_us:
        ticks = int(Fraction(target_us, MICROSECONDS) / video.time_base)
        video.container.seek(ticks, stream=video.stream, backward=True)
        video.decoder.flush_buffers()
        frames = _frames(video, from_us)
        if first := next(frames, None):
            yield first
            yield from _checked(frames, first[0])
            return
        target_us, step_us = target_us - step_us, step_us * 2
    with opened(Path(video.container.name.removeprefix("file:")), strict=False) as again:
        yield from _checked(_frames(again, None))


def misplaced_edit(
    pts: Int64[np.ndarray, "n"], dts: Int64[np.ndarray, "n"], hidden: Bool[np.ndarray, "n"]
) -> int | None:
    """When the first edit begins that does not follow the one before, of MP4 packets in decode order; None without one.

    FFmpeg's demuxer takes the delay of reordered pictures off the first edit's times alone: the others come late.
    """
    shown = pts[~hidden]
    if (np.diff(shown) > 0).all():
        return None
    most = EDIT_GAP * float(np.median(np.diff(np.unique(shown))))
    for start in np.flatnonzero(np.diff(dts) < 0) + 1:
        before, after = pts[:start][~hidden[:start]], pts[start:][~hidden[start:]]
        if len(before) and len(after) and not 0 < after.min() - before.max() <= most:
            return int(after.min())
    return None


class Scaler:
    """Frames scaled to `width` x `height` as they are shown, as uint8 [height, width] or [height, width, 3].

    Keeps swscale's tables between frames, which a frame's own `reformat` would rebuild each time.
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
            over_black(frame),
            width=width,
            height=height,
            format=self.pixel_format,
            interpolation=self.filter_name,
            threads=1,
        )
        return self.display.upright(scaled.to_ndarray())


def _frames(video: Video, wanted_us: int | None) -> Iterator[tuple[int, VideoFrame]]:
    """Frames from the container's position on; nothing where the first that can be shown is behind `wanted_us`.

    Packets decide that, before anything is decoded: the first entry point, and the first packet from there on that is
    not hidden by an edit list (after a seek towards the end of one edit that may be the beginning of the next).
    """
    anchor: int | None = None
    judged = wanted_us is None
    for packet in video.container.demux(video.stream):
        if anchor is None and packet.pts is not None:
            if (wanted_us is not None or must_begin_at_entry(video.stream)) and not is_entry_point(
                packet, video.stream
            ):
                continue
            anchor = packet.pts
        if not judged and packet.pts is not None and not packet.is_discard:
            judged = True
            if wanted_us is not None and micros(packet.pts, video.time_base) > wanted_us:
                return
        try:
            frames = video.decoder.decode(packet)
        except (av.InvalidDataError, av.PatchWelcomeError) as error:
            if packet.pts is not None and anchor is not None and packet.pts < anchor:
                continue  # leads its keyframe: refers to pictures before the seek point
            raise MediaError(
                "corrupt", f"{video.container.name}: damaged near {packet.pts} x {video.time_base} s: {error}"
            ) from None
        for frame in frames:
            if frame.pts is None:
                raise MediaError("bad_times", f"{video.container.name}: a frame has no timestamp")
            if anchor is None or frame.pts >= anchor:
                yield micros(frame.pts, video.time_base), frame


def _avi_frames(video: Video) -> Iterator[tuple[int, VideoFrame]]:
    waiting: list[int] = []
    begun = not must_begin_at_entry(video.stream)
    for packet in video.container.demux(video.stream):
        begun = begun or is_entry_point(packet, video.stream)
        if not begun:
            continue
        if packet.dts is not None and packet.size:
            waiting.append(packet.dts)
        try:
            frames = video.decoder.decode(packet)
        except (av.InvalidDataError, av.PatchWelcomeError) as error:
            raise MediaError("corrupt", f"{video.container.name}: damaged near packet {packet.dts}: {error}") from None
        for frame in frames:
            if not waiting:
                raise MediaError("bad_times", f"{video.container.name}: more frames than packets; remux the file")
            frame.pts = waiting.pop(0)
            yield micros(frame.pts, video.time_base), frame


def _checked(frames: Iterator[tuple[int, VideoFrame]], last_us: int | None = None) -> Iterator[tuple[int, VideoFrame]]:
    for pts_us, frame in frames:
        if frame.is_corrupt:
            raise MediaError("corrupt", f"the frame at {pts_us} us is damaged")
        if last_us is not None and pts_us <= last_us:
            raise MediaError(
                "bad_times", f"the frame at {pts_us} us follows one at {last_us} us: joined or damaged; cut it there"
            )
        last_us = pts_us
        yield pts_us, frame
