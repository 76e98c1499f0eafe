"""Image files to upright RGB arrays, and animated WebP, PNG and AVIF to frames with times.

Pillow reads them, with rules for EXIF rotation, palettes, CMYK, deep greys, bombs and truncation; transparency is laid
over black (display.py). HEIC needs pillow-heif, the optional dependency `nextvid[heif]`. The content of a file decides
what it is, not its name.
"""

import importlib.util
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from storage.errors import MediaError

MAX_PIXELS = 1 << 26  # 8192 x 8192: 200 MB as RGB; larger is refused unread
# What Pillow may open: no vector, document or sequence formats, whose decoders call other programs or run scripts.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "GIF")
# Brands of ISO/IEC 23008-12 (HEIF) with pictures coded as HEVC, as phones write them.
HEIC_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"})
HEAD_BYTES = 64  # the brands of every HEIF file that we met
SIDEWAYS = frozenset({5, 6, 7, 8})  # EXIF 2.3: orientations that swap width and height
FOURTEEN_BITS = (1 << 14) - 1  # sensors' values (10 to 14 bits) in a 16-bit file, a quarter as bright if taken for 16
DARKEST = 16  # the brightest float grey of 0..255, ours: below it is rather 0..1 with values beyond its end
SIXTEEN_BIT = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """The image, header read, pixels not. Raises MediaError; also for errors while the body reads pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bombs are refused by size below; odd EXIF tags do not matter
            with Image.open(path, formats=_formats(path)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise _too_large(path, f"{image.width} x {image.height} pixels")
                yield image
    except UnidentifiedImageError:
        raise MediaError("unknown_format", f"{path}: not an image we read") from None
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error)) from None
    except (MemoryError, MediaError):
        raise
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, OverflowError, RuntimeError) as error:
        raise MediaError("corrupt", f"{path}: {error}") from None


def head_of(path: Path) -> bytes:
    """The first bytes of a file, which say what it is. Raises MediaError."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except FileNotFoundError:
        raise MediaError("missing", f"{path}: no such file; list the dataset again") from None
    except PermissionError:
        raise MediaError("forbidden", f"{path}: no permission to read it; check its mode and owner") from None
    except OSError as error:
        raise MediaError("unreadable", f"{path}: {error}") from None


def _formats(path: Path) -> tuple[str, ...]:
    """What Pillow may take the file for. Raises MediaError `needs_heif` for HEIC without the package that reads it."""
    head = head_of(path)
    brands = {head[at : at + 4] for at in range(8, min(len(head), int.from_bytes(head[:4], "big")), 4)}
    if head[4:8] != b"ftyp" or brands & {b"avif", b"avis"} or brands.isdisjoint(HEIC_BRANDS):
        return FORMATS
    if importlib.util.find_spec("pillow_heif") is None:
        raise MediaError("needs_heif", f"{path}: HEIC is read with pillow-heif: pip install 'nextvid[heif]'")
    import pillow_heif

    pillow_heif.options.DECODE_THREADS = 1  # a worker has one core
    pillow_heif.register_heif_opener()
    return ("HEIF",)


def load_image(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """The first frame as upright RGB, uint8 [H, W, 3]. Raises MediaError."""
    with open_image(path) as image:
        sixteen_bits = ";16" in repr(getattr(image, "tile", ""))  # colours, of which Pillow keeps the upper byte alone
        image.load()
        pixels = np.array(_rgb(ImageOps.exif_transpose(image)), dtype=np.uint8)
        if sixteen_bits and 0 < pixels.max() <= FOURTEEN_BITS >> 8:
            raise MediaError(
                "unscaled_grey", f"{path}: at most 14 bits in 16, too dark: store them in all of 8 or 16 bits"
            )
        return pixels


def animation_times(path: Path) -> list[int]:
    """When the frames of an animated WebP, PNG or AVIF begin, and when the last ends, in us; empty for anything else.

    The content decides, not the name. Read from headers, nothing is decoded (WebP:
    developers.google.com/speed/webp/docs/riff_container; PNG: w3.org/TR/png-3, fcTL; AVIF: brand `avis`). Raises
    MediaError for frames that last no time.
    """
    head = head_of(path)
    try:
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            lasts_us = list(_webp_delays(path))
        elif head[:8] == b"\x89PNG\r\n\x1a\n":
            lasts_us = list(_png_delays(path))
        elif head[4:12] == b"ftypavis":
            lasts_us = list(_avif_delays(path))
        else:
            return []
    except av.FFmpegError as error:  # before OSError: some are both
        raise MediaError("corrupt", f"{path}: {error}") from None
    except OSError as error:
        raise MediaError("unreadable", f"{path}: {error}") from None
    if len(lasts_us) < 2:
        return []
    if 0 in lasts_us:
        raise MediaError("bad_times", f"{path}: frame {lasts_us.index(0) + 1} of the animation lasts no time")
    return [0, *itertools.accumulate(lasts_us)]


def _webp_delays(path: Path) -> Iterator[int]:
    with path.open("rb") as file:
        file.seek(12)
        while len(chunk := file.read(8)) == 8:
            size = int.from_bytes(chunk[4:], "little")
            body = file.read(16) if chunk[:4] == b"ANMF" else b""
            if chunk[:4] == b"ANMF":
                yield 1000 * int.from_bytes(body[12:15], "little") if len(body) == 16 else 0
            file.seek(size + size % 2 - len(body), 1)


def _png_delays(path: Path) -> Iterator[int]:
    with path.open("rb") as file:
        file.seek(8)
        while len(chunk := file.read(8)) == 8 and chunk[4:] != b"IEND":
            size = int.from_bytes(chunk[:4], "big")
            body = file.read(26) if chunk[4:] == b"fcTL" else b""
            if len(body) == 26:
                numerator, denominator = int.from_bytes(body[20:22], "big"), int.from_bytes(body[22:24], "big")
                yield round(1e6 * numerator / (denominator or 100))  # 0 means hundredths
            file.seek(size + 4 - len(body), 1)


def _avif_delays(path: Path) -> Iterator[int]:
    """Of its track of pictures; beside it are a first picture alone, and transparency in a track of its own."""
    with av.open(f"file:{path.absolute()}", options={"protocol_whitelist": "file", "format_whitelist": "mov"}) as file:
        track = next((stream for stream in file.streams.video if stream.frames > 1), None)
        for packet in file.demux(track) if track is not None else ():
            if packet.size:
                yield round(1e6 * (packet.duration or 0) * float(packet.time_base or 0))


def animation(path: Path) -> Iterator[tuple[int, UInt8[np.ndarray, "H W 3"]]]:
    """Frames of an animated WebP, PNG or AVIF as (time_us, RGB), one in memory at a time. Raises MediaError."""
    times = animation_times(path)
    with open_image(path) as image:
        apart = int(bool(image.info.get("default_image")))  # PNG: a picture for programs that show no animations
        frames = getattr(image, "n_frames", 1) - apart
        if frames != len(times) - 1:
            raise MediaError("corrupt", f"{path}: {frames} frames decode, {len(times) - 1} are declared")
        for number in range(frames):
            image.seek(number + apart)
            image.load()
            yield times[number], np.array(_rgb(image), dtype=np.uint8)


def upright_image_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after EXIF rotation, from the header."""
    if image.format == "TIFF":
        return image.size  # Pillow turns TIFF itself, and gives the size after that
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    return (image.height, image.width) if orientation in SIDEWAYS else (image.width, image.height)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BIT or image.mode == "I":
        values = np.asarray(image).astype(np.int64)  # mode I is what Pillow makes of some 16-bit files
        if not FOURTEEN_BITS < values.max() < 1 << 16 and values.any():
            raise MediaError(
                "unscaled_grey",
                f"greys are from {values.min()} to {values.max()}: store them in all of 8 or 16 bits",
            )
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        greys = np.asarray(image)
        of_unit, of_byte = greys.max() <= 1, DARKEST <= greys.max() <= 255
        if not (np.isfinite(greys).all() and greys.min() >= 0 and (of_unit or of_byte)):
            raise MediaError("unscaled_grey", "float greys are in neither 0..1 nor 0..255: store them in 8 or 16 bits")
        return Image.fromarray((greys * (255 if of_unit else 1)).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer).convert("RGB")
    return image.convert("RGB")


def _too_large(path: Path, what: str) -> MediaError:
    return MediaError("too_large", f"{path}: {what}; at most {MAX_PIXELS} are decoded")
