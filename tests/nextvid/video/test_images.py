"""Images: every mode becomes upright RGB; bombs and truncation are refused."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from nextvid.config.datasets import ClipPolicy, ShotConfig
from nextvid.corpus.cutting import ShotScores, clips_of
from nextvid.video.decode import stream
from nextvid.video.images import animation, animation_times, load_image
from nextvid.video.probe import probe
from nextvid.video.shots import first_pass
from storage.errors import MediaError
from tests.nextvid.video.film import barcode, frames_at, numbers

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


def animated(path: Path, lasts_ms: list[int], alpha: bool = False) -> Path:
    """Barcode frames 0, 1, 2, ..., as an animation."""
    images = [Image.fromarray(barcode(n)) for n in range(len(lasts_ms))]
    if alpha:
        images = [image.convert("RGBA") for image in images]
    how: dict[str, object] = {"lossless": True, "minimize_size": False} if path.suffix == ".webp" else {}
    return saved(images[0], path, save_all=True, append_images=images[1:], duration=lasts_ms, **how)


@pytest.mark.parametrize("extension", ["webp", "gif", "avif"])
def test_animations_are_videos(tmp_path: Path, extension: str) -> None:
    path = animated(tmp_path / f"a.{extension}", [100] * 30)
    facts = probe(path)
    assert (facts.kind, facts.frames, facts.width, facts.height) == ("video", 30, 96, 64)
    assert facts.fps_hz == pytest.approx(10)
    assert facts.duration_us == 3_000_000
    frames, times = frames_at(path, [0, 500_000, 2_900_000], facts.decoder)
    assert numbers(frames) == [0, 5, 29]
    assert times.tolist() == [0, 500_000, 2_900_000]
    (shot,) = first_pass(path, facts, ShotConfig())
    assert (shot.start_us, shot.end_us) == (0, 3_000_000)
    clips = clips_of("00" * 16, ShotScores.of(shot.__dict__), ClipPolicy(frames=8, fps=4), 0.25, facts.fps_hz)
    assert [len(times) for times in clips] == [8]


def test_an_animation_of_uneven_frames_keeps_their_times(tmp_path: Path) -> None:
    path = animated(tmp_path / "a.webp", [100, 400, 100, 1000, 100], alpha=True)
    facts = probe(path)
    assert facts.hazards == ("vfr",)
    assert [time for time, _ in stream(path)] == [0, 100_000, 500_000, 600_000, 1_600_000]
    assert numbers(frames_at(path, [120_000, 590_000, 1_000_000], "pillow")[0]) == [1, 3, 3]
    with pytest.raises(MediaError) as caught:
        frames_at(path, [9_000_000], "pillow")
    assert caught.value.reason == "pts_mismatch"


def test_a_still_webp_is_an_image(tmp_path: Path) -> None:
    path = saved(Image.fromarray(barcode(3)), tmp_path / "a.webp")
    assert probe(path).kind == "image"
    assert animation_times(path) == []
    with pytest.raises(MediaError):
        frames_at(path, [0], "pillow")


def test_a_damaged_animation_is_refused(tmp_path: Path) -> None:
    whole = animated(tmp_path / "a.webp", [100] * 12).read_bytes()
    for share in (0.3, 0.7):
        path = tmp_path / "b.webp"
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(MediaError):
            list(animation(path))
    at = whole.index(b"ANMF") + 8 + 12
    path.write_bytes(whole[:at] + bytes(3) + whole[at + 3 :])
    with pytest.raises(MediaError) as caught:
        probe(path)
    assert caught.value.reason == "bad_times"


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "bmp", "tif", "avif"])
def test_an_image_is_one_clip_of_one_frame(tmp_path: Path, extension: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / f"a.{extension}")
    facts = probe(path)
    (shot,) = first_pass(path, facts, ShotConfig())
    policy = ClipPolicy(frames=16, fps=4, clips_per_shot=4, starts="random")
    assert clips_of("00" * 16, ShotScores.of(shot.__dict__), policy, 0.25, facts.fps_hz or 1.0) == [[0]]


@pytest.mark.parametrize("extension", ["gif", "webp", "tif", "bmp"])
def test_bombs_of_other_formats_are_refused(tmp_path: Path, extension: str) -> None:
    """Headers that promise 60,000 x 60,000 pixels over a few bytes."""
    side = 60_000
    small = saved(Image.fromarray(np.zeros((8, 8, 3), np.uint8)), tmp_path / f"s.{extension}").read_bytes()
    match extension:
        case "gif":
            data = small[:6] + struct.pack("<HH", side, side) + small[10:]
        case "bmp":
            data = small[:18] + struct.pack("<ii", side, side) + small[26:]
        case "webp":  # an extended header with a canvas of its own
            canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + 2 * (side - 1).to_bytes(3, "little")
            data = small[:4] + struct.pack("<I", len(small) - 8 + len(canvas)) + b"WEBP" + canvas + small[12:]
        case _:
            data = small.replace(struct.pack("<HHII", 256, 4, 1, 8), struct.pack("<HHII", 256, 4, 1, side))
            data = data.replace(struct.pack("<HHII", 257, 4, 1, 8), struct.pack("<HHII", 257, 4, 1, side))
            data = data.replace(struct.pack("<HHIHH", 256, 3, 1, 8, 0), struct.pack("<HHII", 256, 4, 1, side))
            data = data.replace(struct.pack("<HHIHH", 257, 3, 1, 8, 0), struct.pack("<HHII", 257, 4, 1, side))
    path = tmp_path / f"a.{extension}"
    path.write_bytes(data)
    assert data != small
    with pytest.raises(MediaError) as caught:
        probe(path)
    assert caught.value.reason in {"too_large", "corrupt", "unknown_format"}


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_once(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20), (9, 9, 9)).save(tmp_path / "a.tif", exif=exif)
    facts, image = probe(tmp_path / "a.tif"), load_image(tmp_path / "a.tif")
    assert image.shape[:2] == (facts.height, facts.width) == ((40, 20) if orientation > 4 else (20, 40))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.tif", np.linspace(-3, 900, 64 * 64, dtype=np.float32)),
        ("c.tif", np.full(64 * 64, np.nan, np.float32)),
        ("d.tif", np.linspace(0, 1.02, 64 * 64, dtype=np.float32)),
        ("a.png", np.linspace(0, 4095, 64 * 64).astype(np.uint16)),
        ("b.png", np.linspace(0, 16383, 64 * 64).astype(np.uint16)),
        ("b.tif", np.linspace(0, 1 << 20, 64 * 64).astype(np.int32)),
    ],
    ids=["floats", "no numbers", "a little over 1", "12 bits in 16", "14 bits in 16", "32 bits"],
)
def test_greys_of_no_known_range_have_a_reason(tmp_path: Path, name: str, values: np.ndarray) -> None:
    Image.fromarray(values.reshape(64, 64)).save(tmp_path / name)
    with pytest.raises(MediaError, match="8 or 16 bits") as caught:
        load_image(tmp_path / name)
    assert caught.value.reason == "unscaled_grey"


@pytest.mark.parametrize("bits", [12, 14])
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_colours_of_fewer_bits_in_16_have_a_reason_and_all_16_are_read(tmp_path: Path, name: str, bits: int) -> None:
    colours = np.linspace(0, 255, 32 * 32 * 3).round().astype(np.uint16).reshape(32, 32, 3)
    cv2.imwrite(str(tmp_path / name), colours << bits - 8)
    with pytest.raises(MediaError) as caught:
        load_image(tmp_path / name)
    assert caught.value.reason == "unscaled_grey"
    cv2.imwrite(str(tmp_path / name), colours * 257)
    assert np.array_equal(load_image(tmp_path / name)[..., ::-1], colours)
    cv2.imwrite(str(tmp_path / name), colours * 0)
    assert not load_image(tmp_path / name).any()


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_greys_are_scaled(tmp_path: Path, top: float) -> None:
    Image.fromarray(np.linspace(0, top, 64 * 64, dtype=np.float32).reshape(64, 64)).save(tmp_path / "a.tif")
    image = load_image(tmp_path / "a.tif")
    assert np.array_equal(image[..., 0].ravel(), np.linspace(0, 255, 64 * 64).round().astype(np.uint8))


@pytest.mark.parametrize("default_image", [False, True])
def test_an_animated_png_is_a_video_whatever_its_name(tmp_path: Path, default_image: bool) -> None:
    frames = [Image.fromarray(barcode(n)) for n in range(12)]
    still = [Image.new("RGB", frames[0].size)] if default_image else []
    first, *rest = still + frames
    path = tmp_path / "a.png"
    first.save(path, save_all=True, append_images=rest, duration=100, default_image=default_image)
    facts = probe(path)
    assert (facts.kind, facts.container, facts.frames, facts.fps_hz) == ("video", "png", 12, 10.0)
    path = path.rename(tmp_path / "named.jpg")
    assert probe(path) == facts
    assert numbers(frames_at(path, [0, 500_000, 1_100_000], facts.decoder)[0]) == [0, 5, 11]
    (shot,) = first_pass(path, facts, ShotConfig())
    assert (shot.start_us, shot.end_us) == (0, 1_200_000)


@pytest.mark.parametrize("name", ["gif.png", "webp.gif", "avif.jpg", "webp.mp4", "png.webm", "gif.avif"])
def test_animations_are_videos_under_any_name(tmp_path: Path, name: str) -> None:
    content, other = name.split(".")
    path = animated(tmp_path / f"a.{content}", [100] * 12)
    facts = probe(path)
    misnamed = path.rename(tmp_path / f"b.{other}")
    assert probe(misnamed) == facts
    assert facts.kind == "video"
    assert numbers(frames_at(misnamed, [0, 500_000, 1_100_000], facts.decoder)[0]) == [0, 5, 11]
    assert len(first_pass(misnamed, facts, ShotConfig())) == 1


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPEG"])
def test_every_name_of_jpeg_is_read(tmp_path: Path, suffix: str) -> None:
    path = saved(Image.fromarray(barcode(5)), tmp_path / "a.jpg", quality=95).rename(tmp_path / f"a.{suffix}")
    assert probe(path).kind == "image"
    assert numbers(load_image(path)[None]) == [5]


def heic(path: Path, brand: bytes = b"heic") -> Path:
    """The beginning of a HEIC file."""
    path.write_bytes(b"\0\0\0\x1cftyp" + brand + b"\0\0\0\0mif1heicmiaf")
    return path


@pytest.mark.parametrize(
    ("suffix", "brand"), [("heic", b"heic"), ("HEIF", b"mif1"), ("hif", b"heix"), ("jpg", b"heic")]
)
def test_heic_without_its_package_has_a_reason_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, brand: bytes
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MediaError, match=r"pip install 'nextvid\[heif\]'") as caught:
        probe(heic(tmp_path / f"a.{suffix}", brand))
    assert caught.value.reason == "needs_heif"


def test_heic_is_read_with_its_package(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    path = saved(Image.fromarray(barcode(9)), tmp_path / "a.heic", quality=95)
    facts = probe(path)
    assert (facts.kind, facts.codec, facts.width, facts.height) == ("image", "heif", 96, 64)
    assert numbers(load_image(path)[None]) == [9]
    with pytest.raises(MediaError) as caught:
        load_image(heic(tmp_path / "cut.heic"))
    assert caught.value.reason in ("unknown_format", "corrupt")
