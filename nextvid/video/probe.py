"""Facts about a media file from one demux: container, codec, size, rate, times, hazards and the decoder to use.

It decodes no more than the first frame, the only place where PyAV shows the display matrix. Hazards are what makes
decord return wrong frames without an error; a file that has one goes to PyAV, and so does one whose index decord sees
differently (docs/decisions/0035).
"""

import importlib.util
import posixpath
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from jaxtyping import Bool, Int64

from nextvid.video.container import Video, micros, misplaced_edit, opened, too_large
from nextvid.video.decode import decord_reader
from nextvid.video.display import Display, has_alpha
from nextvid.video.entry_points import (
    BEGIN_AT_ENTRY,
    TELL_OF_LOSS,
    ReferencePictures,
    is_entry_point,
    must_begin_at_entry,
    size_header,
)
from nextvid.video.images import MAX_PIXELS, animation_times, head_of, open_image, upright_image_size
from storage.digest import digest_file
from storage.errors import MediaError

Decoder = Literal["decord", "pyav", "pillow"]

# fmt: off
VIDEO_EXTENSIONS = frozenset({
    ".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".ps",
    ".vob", ".flv", ".f4v", ".wmv", ".asf", ".ogv", ".gif", ".ivf", ".h264", ".264", ".hevc", ".h265",
})
IMAGE_EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".hif",
})
# fmt: on

# What decord may read when no hazard is set: 0 wrong frames with closed groups (tests/nextvid/video/test_decode.py).
DECORD_READS = frozenset({("mp4", "h264"), ("matroska", "h264"), ("matroska", "vp9")})
HAZARD_CONTAINERS = frozenset({"avi", "mpegts", "mpeg", "flv"})  # wrong frames without an error in our tests
HAZARD_CODECS = frozenset({"hevc", "av1", "mpeg4"})  # likewise
LOST_US, LOST_SHARE = 150_000, 0.02  # our choice: our 22 clean Matroska files of one stream lack none
HOLE_S = Fraction(1, 2)  # our choice: no frame for this long, where several were due, is a hole and not motion
HOLE_FRAMES = 2.5  # our choice: so that slow sequences (1 fps) have no holes
MAX_ASPECT = 1000  # parts of a pixel's aspect as a fraction; MPEG-4 and H.264 have 1:1 to 160:99
UNEVEN = 0.1  # ours: share of a picture's time by which times of a constant rate may be off, beside a tick
LOST_MOST = 0.05  # our choice: share of holes above which a rate varies on purpose
TIE_S = 1e-3  # Matroska's tick
VFR_RATIO = 1.5  # our choice: longest over median frame gap
# Files that gave other pictures at the same times and crops before version 5 of `media` (docs/decisions/0040).
READ_ANEW = frozenset({
    "alpha", "changing_size", "container_mpeg", "decord_index", "late_key", "no_idr", "pixel_aspect", "several_streams",
})  # fmt: skip
HOLDS_HZ, PAUSES_HZ = 2, 5  # below these rates a picture may stay for PAUSE_US (decode.py): always, with variable gaps


@dataclass(frozen=True)
class MediaFacts:
    """What the `media` table says of a file. Sizes are in display pixels, which are upright and square.

    `rotation` is in degrees counter-clockwise, `mirrored` exchanges left and right after it, `sample_aspect` is the
    width of a stored pixel over its height.
    """

    kind: Literal["video", "image"]
    container: str
    codec: str
    pix_fmt: str
    width: int
    height: int
    rotation: int
    mirrored: bool
    sample_aspect: float
    fps_hz: float  # 0.0 for an image
    frames: int | None  # packets shown; None where frames hide in the packets (vp8 and its alternate references)
    duration_us: int
    start_us: int
    hazards: tuple[str, ...]
    decoder: Decoder

    @property
    def display(self) -> Display:
        """How stored frames become what is shown."""
        return Display(self.rotation // 90, self.mirrored, Fraction(self.sample_aspect).limit_denominator(MAX_ASPECT))

    @property
    def reading(self) -> int:
        """Number of the rules by which its pictures are read, a part of its row ids.

        2 for kinds of files that older rules read wrongly, though not every one; 1 for others, whose ids stay.
        """
        if self.kind == "image":
            return 2 if self.pix_fmt == "F" else 1
        slow = self.fps_hz < (PAUSES_HZ if "vfr" in self.hazards else HOLDS_HZ)
        transparent = self.decoder != "pillow" and has_alpha(self.pix_fmt)
        return 2 if self.mirrored or slow or transparent or READ_ANEW.intersection(self.hazards) else 1


@dataclass(frozen=True)
class Inspection:
    """A file's id in hex, its size, and its facts or the reason why there are none."""

    media: str
    size_bytes: int
    facts: MediaFacts | None
    reason: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Packets:
    """Every video packet in decode order: arrays of length n, times in `time_base`."""

    pts: Int64[np.ndarray, "n"]
    key: Bool[np.ndarray, "n"]
    entry: Bool[np.ndarray, "n"]  # where decoding may begin: key, and by its bits a whole picture
    discard: Bool[np.ndarray, "n"]
    late: int  # packets before the first entry point, left out here: a recording that begins within a group
    sizes: int  # different ones that entry points declare

    @property
    def shown(self) -> Int64[np.ndarray, "m"]:
        """When frames are shown, ascending: neither hidden by an edit list nor leading the first entry point."""
        return np.unique(self.pts[~self.discard & (self.pts >= self.pts[0])])


def kind_of(uri: str) -> Literal["video", "image"] | None:
    """Kind by extension; None for anything that is not media."""
    path = uri.split("?")[0] if "://" in uri else uri  # a query is part of a URL, and of a file's name a mark like any
    suffix = posixpath.splitext(path.rstrip("/"))[1].lower()  # a listing asks once a file
    if suffix in VIDEO_EXTENSIONS:
        return "video"
    return "image" if suffix in IMAGE_EXTENSIONS else None


def inspect_file(path: Path) -> Inspection:
    """Digest and probe a local file. Raises MediaError only where not even its bytes can be read."""
    media, size_bytes = identify(path)
    try:
        return Inspection(media, size_bytes, probe(path))
    except MediaError as error:
        return Inspection(media, size_bytes, None, error.reason, str(error))


def identify(path: Path) -> tuple[str, int]:
    """A file's id in hex and its size in bytes. Raises MediaError."""
    try:
        if path.exists() and not path.is_file():  # it was one when it was listed
            raise MediaError("unreadable", f"{path}: a pipe, device or folder, which may never end")
        return digest_file(path), path.stat().st_size
    except FileNotFoundError:
        raise MediaError("missing", f"{path}: no such file; list the dataset again") from None
    except OSError as error:
        raise MediaError("unreadable", f"{path}: {error}") from None


def probe(path: Path) -> MediaFacts:
    """Facts of the file at `path`. Raises MediaError, also where its content is not of its extension's kind.

    What may move is a video by its content, whatever its name: GIF, animated WebP, PNG and AVIF.
    """
    if (head := head_of(path)).startswith(b"GIF8"):
        width, height = (int.from_bytes(head[at : at + 2], "little") for at in (6, 8))  # GIF89a, 18
        if width * height > MAX_PIXELS:  # FFmpeg, which is told so too, calls it corrupt
            raise too_large(path, width, height)
        return _probe_video(path)
    return _probe_image(path) if kind_of(path.name) == "image" or animation_times(path) else _probe_video(path)


def decord_installed() -> bool:
    """Whether decord can be imported; it has no wheel on some platforms."""
    return importlib.util.find_spec("decord") is not None


def _probe_image(path: Path) -> MediaFacts:
    with open_image(path) as image:
        width, height = upright_image_size(image)
        name = (image.format or "unknown").lower()
        if times := animation_times(path):  # a video, whatever its extension suggests
            gaps = np.diff(np.array(times))
            hazards = ("vfr",) if gaps.max() > VFR_RATIO * np.median(gaps) else ()
            rate, count = 1e6 * len(gaps) / times[-1], len(gaps)
            return MediaFacts(
                "video", name, name, "rgb24", *image.size, 0, False, 1.0, rate, count, times[-1], 0, hazards, "pillow"
            )
        return MediaFacts("image", name, name, image.mode, width, height, 0, False, 1.0, 0.0, 1, 0, 0, (), "pillow")


def _probe_video(path: Path) -> MediaFacts:
    with opened(path, strict=True) as video:
        container, name, codec, base = video.container, video.family, video.codec, video.time_base
        frame, packets = _demux(path, video)
        display = Display.of(frame, video.stream)
        hazards = _hazards(video, packets, display)
        shown = packets.shown
        rate = _rate(shown, base, video.stream.average_rate)
        start_us, last_us = micros(int(shown[0]), base), micros(int(shown[-1]), base)
        if name == "matroska" and len(container.streams) == 1 and container.duration:
            # its demuxer ends without an error where it meets damage; the duration in the header knows better
            declared_us, end_us = container.duration, last_us + round(1e6 / rate)
            if declared_us - end_us > LOST_US + LOST_SHARE * declared_us:
                raise MediaError(
                    "short", f"{path}: {declared_us} us are declared, packets end at {end_us} us; fetch the file again"
                )
        width, height = display.size(*video.stored_size)
        pix_fmt = frame.format.name
        plain = (name, codec) in DECORD_READS and not hazards and decord_installed()
        if plain and not _decord_agrees(path, video, packets):
            hazards, plain = ("decord_index",), False
    if width * height > MAX_PIXELS:
        raise too_large(path, width, height)
    return MediaFacts(
        kind="video",
        container=name,
        codec=codec,
        pix_fmt=pix_fmt,
        width=width,
        height=height,
        rotation=90 * display.turns,
        mirrored=display.mirrored,
        sample_aspect=float(display.pixel_aspect),
        fps_hz=float(rate),
        frames=None if codec == "vp8" else len(shown),
        duration_us=last_us - start_us + round(1_000_000 / rate),
        start_us=start_us,
        hazards=hazards,
        decoder="decord" if plain else "pyav",
    )


def _demux(path: Path, video: Video) -> tuple[av.VideoFrame, Packets]:
    frame: av.VideoFrame | None = None
    pts: list[int] = []
    key: list[bool] = []
    entry: list[bool] = []
    discard: list[bool] = []
    dts: list[int] = []
    late = untimed = 0
    sizes: set[bytes] = set()
    pictures = ReferencePictures(video.stream) if video.codec == "h264" else None
    waiting, by_dts = must_begin_at_entry(video.stream), video.family == "avi"
    for packet in video.container.demux(video.stream):
        begins = lost = False
        if packet.size:
            begins, lost = pictures.judge(packet) if pictures else (is_entry_point(packet, video.stream), False)
        if waiting and not begins:
            late += packet.size > 0
            continue
        waiting = False
        if frame is None:
            frame = next(iter(video.decoder.decode(packet)), None)
        time = packet.dts if by_dts else packet.pts
        if time is None or packet.size == 0:
            untimed += packet.size > 0
            continue
        if packet.is_corrupt:
            raise MediaError(
                "truncated",
                f"{path}: a packet near {time} x {video.time_base} s is incomplete: cut off, joined or lost",
            )
        if lost:
            raise MediaError(
                "corrupt",
                f"{path}: pictures are missing before {time} x {video.time_base} s, and others refer to them; fetch or "
                "record it again, or cut it there",
            )
        pts.append(time)
        key.append(packet.is_keyframe)
        entry.append(begins)
        if begins and (declared := size_header(packet, video.stream)):
            sizes.add(declared)
        discard.append(packet.is_discard)
        dts.append(time if packet.dts is None else packet.dts)
    if untimed and not pts:
        raise MediaError("no_times", f"{path}: a raw stream without times; remux it, for instance to MP4")
    if late and not pts:
        raise MediaError("no_key", f"{path}: none of its {late} pictures can be decoded without another")
    if frame is None or all(discard):
        raise MediaError("empty", f"{path}: no frame can be decoded from it")
    hidden = np.array(discard)
    if video.family == "mp4" and (at := misplaced_edit(np.array(pts, np.int64), np.array(dts, np.int64), hidden)):
        raise MediaError(
            "edits", f"{path}: an edit begins late, at {at} x {video.time_base} s; write the file again without edits"
        )
    count = len(pictures.sizes) if pictures else len(sizes)
    return frame, Packets(np.array(pts, np.int64), np.array(key), np.array(entry), hidden, late, count)


def _hazards(video: Video, packets: Packets, display: Display) -> tuple[str, ...]:
    """Names of what decord is known to get wrong in this file, sorted."""
    found = set()
    if video.family in HAZARD_CONTAINERS:
        found.add(f"container_{video.family}")
    if video.codec in HAZARD_CODECS:
        found.add(f"codec_{video.codec}")
    if len(video.container.streams.video) > 1:
        found.add("several_streams")  # decord may choose another
    if video.decoder is not video.stream.codec_context:
        found.add("alpha")
    pts, declared = packets.pts, video.stream.frames
    group = np.maximum.accumulate(np.where(packets.key, np.arange(len(pts)), -1))  # the key packet before each
    if (pts < pts[group])[group >= 0].any():  # shown before the key packet that it follows
        found.add("open_gop")
    if (packets.key & ~packets.entry).any():
        found.add("no_idr")
    if video.codec == "mpeg4" and bool((np.diff(pts) < 0).any()):
        found.add("mpeg4_bframes")
    if packets.discard.any() or pts.min() < 0 or (declared > 0 and declared != len(pts)):
        found.add("edit_list")
    shown = packets.shown
    gaps = np.diff(shown)
    if gaps.size and gaps.max() > VFR_RATIO * np.median(gaps):
        found.add("vfr")
    if (
        video.codec in BEGIN_AT_ENTRY - TELL_OF_LOSS
        and is_missing(shown, packets.pts[packets.entry], video.family).any()
    ):
        found.add("lost_pictures")
    if shown[0] != 0:
        found.add("start_offset")
    if packets.late:
        found.add("late_key")
    if packets.sizes > 1:
        found.add("changing_size")
    if display.turns or display.mirrored:
        found.add("rotation")
    if display.pixel_aspect != 1:
        found.add("pixel_aspect")
    return tuple(sorted(found))


def is_missing(times: Int64[np.ndarray, "n"], entries: Int64[np.ndarray, "m"], container: str) -> Bool[np.ndarray, "n"]:
    """Before which pictures others seem to be lost: a hole of whole pictures in an otherwise constant rate.

    Behind it is no entry point, so that what is lost may be seen until the next one. A rate that varies tells nothing:
    cameras and screen recorders leave out what they like.
    """
    missing = np.zeros(len(times), bool)
    gaps = np.diff(times)
    if len(gaps) < 2:
        return missing
    rate = float(np.mean(gaps[gaps <= VFR_RATIO * np.median(gaps)]))  # ticks may be coarse
    whole = np.round(gaps / rate)
    holes = whole >= 2
    even = np.abs(gaps - whole * rate) <= max(1.0, UNEVEN * rate)
    if even.all() and holes.mean() <= LOST_MOST:
        missing[1:] = holes & ~np.isin(times[1:], entries)
    if container == "avi":  # which counts chunks: encoders of B-pictures leave out some behind the first one
        missing[1] = False
    return missing


def _decord_agrees(path: Path, video: Video, packets: Packets) -> bool:
    """Whether decord, whose FFmpeg is of 2018, sees the same pictures at the same times and seeks to entry points only.

    It takes the container's word for where decoding may begin: a table of sync samples that is missing or wrong, or
    fragments that call every sample one, make it hand out foreign pictures without an error. Matroska's cues, by which
    it seeks, may name other packets than those flagged as key.
    """
    cues = [entry.timestamp for entry in video.stream.index_entries if entry.is_keyframe]
    if video.family == "matroska" and not np.isin(cues, packets.pts[packets.entry]).all():
        return False
    try:
        reader, starts_s = decord_reader(path)
    except MediaError:
        return False
    keys = np.array(reader.get_key_indices(), np.int64)
    times_s = np.sort(packets.pts) * float(video.time_base)
    if len(times_s) != len(starts_s) or not np.allclose(starts_s, times_s, rtol=1e-6, atol=TIE_S):
        return False
    entries = np.flatnonzero(np.isin(np.sort(packets.pts), packets.pts[packets.entry]))
    return bool(np.isin(keys, entries).all())


def _rate(shown: Int64[np.ndarray, "n"], base: Fraction, declared: Fraction | None) -> Fraction:
    """Frames a second: the declared rate where the median gap agrees within a tick or 1 %, else the counted one.

    Pauses do not count: a camera that records on motion has the rate of its recordings.
    """
    if len(shown) < 2:
        return declared or Fraction(1)
    gaps = np.diff(shown)
    gap = Fraction(float(np.median(gaps))) * base
    if declared and abs(1 / declared - gap) <= max(min(base, gap / 3), gap / 100):
        return declared
    run = gaps[gaps <= max(HOLE_S / base, HOLE_FRAMES * float(np.median(gaps)))]
    return Fraction(len(run)) / (int(run.sum()) * base)
