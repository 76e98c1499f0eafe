"""Small videos whose every frame carries its number as eight black and white blocks, and how to read it back."""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream

from nextvid.video.decode import placed
from nextvid.video.probe import Decoder

BITS = 8
# mbtree=0: with it x264 made three different files of the same film, by what lay in memory (docs/log.md)
X264_VERYFAST = {"preset": "veryfast", "x264-params": "mbtree=0:log-level=none"}
X264_CLOSED = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=2:open-gop=0:mbtree=0:log-level=none"}
X264_OPEN = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=2:open-gop=1:mbtree=0:log-level=none"}
X264_FAST = {"g": "12", "preset": "ultrafast"}
X265_OPEN = {"x265-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3:open-gop=1:log-level=none"}


def barcode(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    """Upright RGB frame: the number above, a moving stripe pattern below."""
    image = np.zeros((height, width, 3), np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            image[: height // 2, bit * width // BITS : (bit + 1) * width // BITS] = 255
    x, y = np.meshgrid(np.arange(width), np.arange(height // 2, height))
    image[height // 2 :, :, 0] = 128 + 100 * np.sin((x + 3 * number) / 9)
    image[height // 2 :, :, 1] = 128 + 100 * np.sin((y + 2 * number) / 7)
    image[height // 2 :, :, 2] = 96
    return image


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers of barcode frames uint8 [T, H, W, 3]."""
    found = []
    for frame in frames:
        height, width = frame.shape[:2]
        value = 0
        for bit in range(BITS):
            middle = (2 * bit + 1) * width // (2 * BITS)
            block = frame[height // 8 : 3 * height // 8, middle - 1 : middle + 2]
            value |= int(block.mean() > 128) << bit
        found.append(value)
    return found


def clips_at(path: Path, times_us: Sequence[Sequence[int]], decoder: Decoder) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each list of times the frames uint8 [T, H, W, 3] and their own times int64 [T], in one pass over the file."""
    found = {
        time: (pts_us, picture)
        for time, pts_us, picture in placed(path, sorted({time for times in times_us for time in times}), decoder)
    }
    return [(np.stack([found[t][1] for t in times]), np.array([found[t][0] for t in times])) for times in times_us]


def frames_at(path: Path, times_us: Sequence[int], decoder: Decoder) -> tuple[np.ndarray, np.ndarray]:
    """Frames of one list of times, and their own times."""
    return clips_at(path, [times_us], decoder)[0]


def write_film(
    path: Path,
    images: Iterator[np.ndarray] | Sequence[np.ndarray] | np.ndarray,
    codec: str = "libx264",
    fps: int = 24,
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    pts_ms: Sequence[int] | None = None,
    rotation: int = 0,
    bframes: int | None = None,
    crf: str | None = "12",
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode upright RGB images; `rotation` (degrees counter-clockwise) is undone by the display matrix."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream: VideoStream | None = None
        for index, upright in enumerate(images):
            image = np.ascontiguousarray(np.rot90(upright, -rotation // 90))
            if stream is None:
                settings = dict(X264_CLOSED if codec == "libx264" and options is None else options or {})
                if crf is not None and codec in {"libx264", "libx265", "libvpx-vp9", "libsvtav1"}:
                    settings["crf"] = crf
                added = container.add_stream(codec, rate=fps, options=settings)
                assert isinstance(added, VideoStream)
                stream = added
                stream.width, stream.height, stream.pix_fmt = image.shape[1], image.shape[0], pix_fmt
                stream.codec_context.thread_count = 1
                if bframes is not None:
                    stream.codec_context.max_b_frames = bframes
                    stream.codec_context.gop_size = 12
                    stream.bit_rate = 2_000_000
                if pts_ms is not None:
                    stream.codec_context.time_base = Fraction(1, 1000)
                if rotation:
                    stream.set_display_rotation(rotation)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if pts_ms is not None:
                frame.pts, frame.time_base = pts_ms[index], Fraction(1, 1000)
            else:
                frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        assert stream is not None
        container.mux(stream.encode(None))
    return path


def write_barcodes(path: Path, count: int = 60, size: tuple[int, int] = (96, 64), **how: object) -> Path:
    """A film of `count` barcodes of `size` (width, height)."""
    encode: Callable[..., Path] = write_film
    return encode(path, (barcode(n, *size) for n in range(count)), **how)


def write_cut(source: Path, path: Path, first: int, fps: int = 24) -> Path:
    """The film from frame `first` on without encoding anew, as `ffmpeg -ss -c copy` cuts: an edit list hides the frames
    between the keyframe and the cut."""
    with (
        av.open(str(source)) as given,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as container,
    ):
        old = given.streams.video[0]
        new = container.add_stream_from_template(old)
        for packet in given.demux(old):
            if packet.pts is None or packet.dts is None or packet.time_base is None:
                continue
            back = round(Fraction(first, fps) / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - back, packet.dts - back, new
            container.mux(packet)
    return path
