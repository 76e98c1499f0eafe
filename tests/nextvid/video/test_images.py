"""Images: every mode becomes upright RGB; bombs and truncation are refused."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextvid.video.images import load_image
from storage.errors import MediaError

GRADIENT = np.linspace(0, 255, 32 * 24, dtype=np.uint8).reshape(24, 32)


def saved(image: Image.Image, path: Path, **how: object) -> Path:
    image.save(path, **how)  # type: ignore[arg-type]  # each format has its own options
    return path


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1", "CMYK", "I;16", "F"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(GRADIENT.astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(GRADIENT.astype(np.float32))
    else:
        image = Image.fromarray(GRADIENT).convert(mode)
    result = load_image(saved(image, tmp_path / ("a.tif" if mode in {"CMYK", "F"} else "a.png")))
    assert result.shape == (24, 32, 3)
    assert result.dtype == np.uint8
    if mode != "1":
        assert np.abs(result.astype(int) - GRADIENT[..., None]).max() <= 6  # a palette of 216 web colours apart


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8, 0] = 255  # one red corner: top left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_image(path), upright)


def test_transparency_lies_over_black(tmp_path: Path) -> None:
    image = np.full((8, 8, 4), 200, np.uint8)
    image[:4, :, 3] = 0
    image[4:, :, 3] = 255
    result = load_image(saved(Image.fromarray(image), tmp_path / "a.png"))
    assert result[:4].max() == 0
    assert result[4:].min() == 200


def test_a_bomb_is_refused_before_its_pixels_are_read(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1 << 20) + b"IDAT")
    with pytest.raises(MediaError) as caught:
        load_image(tmp_path / "a.png")
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "bmp", "tif"])
def test_a_truncated_image_is_refused(tmp_path: Path, extension: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(noise), tmp_path / f"a.{extension}").read_bytes()
    (tmp_path / f"b.{extension}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError):
        load_image(tmp_path / f"b.{extension}")


def test_a_postscript_file_is_never_interpreted(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    with pytest.raises(MediaError) as caught:
        load_image(tmp_path / "a.jpg")
    assert caught.value.reason == "unknown_format"
