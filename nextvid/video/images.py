"""Image files to upright RGB arrays, and animated WebP, which FFmpeg does not read, to frames with times.

Holds what Pillow needs to be told: EXIF rotation, palettes, alpha, CMYK, 16 bits, bombs, truncation. Holds no scores
and no choice of frames (decode.py). Alpha is laid over black, the colour of letterbox bars, so that a cut-out adds no
pattern of its own.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from storage.errors import MediaError

MAX_PIXELS = 1 << 26  # 8192 x 8192: 200 MB as RGB; larger is refused unread
# What Pillow may open: no vector, document or sequence formats, whose decoders call other programs or run scripts.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "GIF")
SIDEWAYS = frozenset({5, 6, 7, 8})  # EXIF 2.3: orientations that swap width and height
SIXTEEN_BIT = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """The image, header read, pixels not. Raises MediaError; also for errors while the body reads pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bombs are refused by size below; odd EXIF tags do not matter
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise _too_large(path, f"{image.width} x {image.height} pixels")
                yield image
    except FileNotFoundError:
        raise MediaError("missing", f"{path}: no such file; list the dataset again") from None
    except PermissionError:
        raise MediaError("forbidden", f"{path}: no permission to read it; check its mode and owner") from None
    except UnidentifiedImageError:
        raise MediaError("unknown_format", f"{path}: not an image we read") from None
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error)) from None
    except (MemoryError, MediaError):
        raise
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, OverflowError, RuntimeError) as error:
        raise MediaError("corrupt", f"{path}: {error}") from None


def load_image(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """The first frame as upright RGB, uint8 [H, W, 3]. Raises MediaError."""
    with open_image(path) as image:
        image.load()
        return np.array(_rgb(ImageOps.exif_transpose(image)), dtype=np.uint8)


def animation_times(path: Path) -> list[int]:
    """When the frames of an animated WebP begin, and when the last ends, in microseconds; empty for anything else.

    Read from the headers of the container's chunks (developers.google.com/speed/webp/docs/riff_container), nothing is
    decoded. Raises MediaError for a damaged one, and for frames that last no time.
    """
    times = [0]
    try:
        with path.open("rb") as file:
            head = file.read(12)
            if head[:4] != b"RIFF" or head[8:] != b"WEBP":
                return []
            while len(chunk := file.read(8)) == 8:
                size = int.from_bytes(chunk[4:], "little")
                body = file.read(16) if chunk[:4] == b"ANMF" else b""
                if chunk[:4] == b"ANMF":
                    lasts_ms = int.from_bytes(body[12:15], "little")
                    if len(body) < 16 or lasts_ms == 0:
                        raise MediaError("bad_times", f"{path}: frame {len(times)} of the animation lasts no time")
                    times.append(times[-1] + 1000 * lasts_ms)
                file.seek(size + size % 2 - len(body), 1)
    except OSError as error:
        raise MediaError("unreadable", f"{path}: {error}") from None
    return times if len(times) > 2 else []


def animation(path: Path) -> Iterator[tuple[int, UInt8[np.ndarray, "H W 3"]]]:
    """Frames of an animated WebP as (time_us, RGB), one in memory at a time. Raises MediaError."""
    times = animation_times(path)
    with open_image(path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames != len(times) - 1:
            raise MediaError("corrupt", f"{path}: {frames} frames decode, {len(times) - 1} are declared")
        for number in range(frames):
            image.seek(number)
            image.load()
            yield times[number], np.array(_rgb(image), dtype=np.uint8)


def upright_image_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after EXIF rotation, from the header."""
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    return (image.height, image.width) if orientation in SIDEWAYS else (image.width, image.height)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BIT or image.mode == "I":
        values = np.asarray(image).astype(np.int64)  # mode I is what Pillow makes of some 16-bit files
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer).convert("RGB")
    return image.convert("RGB")


def _too_large(path: Path, what: str) -> MediaError:
    return MediaError("too_large", f"{path}: {what}; at most {MAX_PIXELS} are decoded")
