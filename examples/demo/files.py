"""Write the demo's files: videos as H.264, VP9 and MPEG-4, images as JPEG and PNG, and broken files of both.

Encoders use one thread and containers have no random identifiers, so with the same libraries equal frames give equal
bytes. Qualities are our choice: digits stay sharp, and the frames have a real codec's noise.
"""

from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np
from av.video.stream import VideoStream
from PIL import Image

from examples.demo.scenes import SOURCE_FPS, Frames

Quality = Literal["first", "copy"]
_CRF = {"first": "18", "copy": "27"}  # x264: visually lossless, and a visible re-encoding
_CRF_VP9 = {"first": "20", "copy": "34"}  # of 63
_JPEG = {"first": 92, "copy": 60}
BROKEN = ("empty.mp4", "text.mp4", "no_index.mp4", "noise.webm", "header.mkv")  # kinds of broken videos, in order
BROKEN_IMAGES = ("cut.jpg", "text.png")


def write_video(path: Path, frames: Frames, quality: Quality = "first", b_frames: int = 0) -> None:
    """Encode frames [n, h, w, c] at SOURCE_FPS; the ending names container and codec.

    `b_frames` is for H.264: with some, an MP4 gets an edit list, as files from cameras and editors have.
    """
    codec, options = _codec(path.suffix, quality, b_frames)
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=SOURCE_FPS, options=options)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, SOURCE_FPS)
        for n, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = n, Fraction(1, SOURCE_FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_video(path: Path) -> Frames:
    """All frames [n, h, w, c] of a video in order, by PyAV on one thread."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_image(path: Path, frame: Frames, side: int, quality: Quality = "first") -> None:
    """Write one frame [h, w, c] as JPEG or PNG of `side` pixels."""
    if side != frame.shape[0]:
        frame = np.asarray(cv2.resize(frame, (side, side), interpolation=cv2.INTER_CUBIC), np.uint8)
    if path.suffix == ".png":
        Image.fromarray(frame).save(path)
    else:
        Image.fromarray(frame).save(path, quality=_JPEG[quality])


def read_image(path: Path) -> Frames:
    """One picture [h, w, c]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.uint8)


def write_broken(folder: Path, number: int, sound: Path) -> Path:
    """Write the broken video of kind `number` (modulo the kinds) made from a sound MP4; returns its path."""
    kind = BROKEN[number % len(BROKEN)]
    path = folder / f"broken_{number:02d}_{kind}"
    match kind:
        case "empty.mp4":
            content = b""
        case "text.mp4":
            content = b"This is not a video.\n" * 40
        case "no_index.mp4":  # an interrupted upload: the index is at the end of the file
            content = sound.read_bytes()[: sound.stat().st_size // 2]
        case "noise.webm":
            content = np.random.default_rng(number).bytes(20_000)
        case _:
            content = b"\x1a\x45\xdf\xa3" + bytes(5_000)  # Matroska's first four bytes and nothing behind them
    path.write_bytes(content)
    return path


def write_broken_image(folder: Path, number: int, sound: Path) -> Path:
    """Write a broken image: half of a sound JPEG's first bytes, or text under an image's name; returns its path."""
    kind = BROKEN_IMAGES[number % len(BROKEN_IMAGES)]
    path = folder / f"broken_{number:02d}_{kind}"
    path.write_bytes(sound.read_bytes()[:300] if kind == "cut.jpg" else b"This is not an image.\n")
    return path


def _codec(ending: str, quality: Quality, b_frames: int) -> tuple[str, dict[str, str]]:
    match ending:
        case ".webm":
            speed = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}
            return "libvpx-vp9", {"crf": _CRF_VP9[quality], "b": "0", **speed}
        case ".avi":
            return "mpeg4", {"qscale": "3" if quality == "first" else "8", "flags": "+qscale"}
        case _:
            # no mbtree: with it and B frames, x264 wrote three different files of the same frames in 40 tries
            quiet = {"x264-params": "mbtree=0"}
            return "libx264", {"crf": _CRF[quality], "preset": "veryfast", "bf": str(b_frames), **quiet}
