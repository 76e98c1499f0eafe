"""What a player shows: display matrices that turn and mirror, pixels that are not square, sizes that change."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from av.video.stream import VideoStream
from PIL import Image

from nextvid.config.datasets import ShotConfig
from nextvid.video.display import TURNS, Display
from nextvid.video.images import load_image
from nextvid.video.probe import probe
from nextvid.video.shots import first_pass
from storage.errors import MediaError
from tests.nextvid.video.boxes import with_matrix
from tests.nextvid.video.film import barcode, frames_at, numbers, write_barcodes, write_film

WAYS = [(a, b, c, d) for a, b, c, d in TURNS] + [(-a, b, -c, d) for a, b, c, d in TURNS]


def corners(height: int, width: int) -> np.ndarray:
    """Red, green, blue and white from the top left, in the order of reading."""
    image = np.full((height, width, 3), 90, np.uint8)
    h, w = height // 3, width // 3
    image[:h, :w], image[:h, -w:], image[-h:, :w], image[-h:, -w:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3
    return image


def seen(image: np.ndarray) -> str:
    """The corners of a picture as letters."""
    height, width = image.shape[:2]
    places = [(y, x) for y in (height // 8, -height // 8) for x in (width // 8, -width // 8)]
    names = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W"}
    return "".join(names.get(tuple((image[y, x] > 127).astype(int).tolist()), "?") for y, x in places)


def stored_as(shown: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """The picture that this matrix turns into `shown`, pixel by pixel: the slow reference of `Display.upright`."""
    a, b, c, d = (int(value) for value in matrix)
    height, width = shown.shape[:2]
    size = (height, width) if a else (width, height)
    stored = np.empty((*size, 3), np.uint8)
    for y in range(size[0]):
        for x in range(size[1]):
            to_x, to_y = a * x + c * y, b * x + d * y
            stored[y, x] = shown[to_y % height, to_x % width]  # -1 is the last
    # a negative direction begins at the far edge: shift by one pixel
    return np.roll(stored, (0, 0), (0, 1))


@pytest.mark.parametrize("matrix", WAYS)
def test_turned_and_mirrored_as_players_do(tmp_path: Path, matrix: tuple[int, ...]) -> None:
    stored = stored_as(corners(96, 144), matrix)
    path = with_matrix(write_film(tmp_path / "a.mp4", [stored] * 24), matrix)
    facts = probe(path)
    assert (facts.width, facts.height) == (144, 96)
    assert facts.decoder == ("pyav" if matrix != (1, 0, 0, 1) else facts.decoder)
    assert seen(frames_at(path, [500_000], facts.decoder)[0][0]) == "RGBW"
    (shot,) = first_pass(path, facts, ShotConfig())
    assert seen(shot.preview) == "RGBW"
    assert (shot.crop_w, shot.crop_h) == (144, 96)


def test_a_slanted_matrix_has_a_reason(tmp_path: Path) -> None:
    slanted = (np.cos(0.3), np.sin(0.3), -np.sin(0.3), np.cos(0.3))
    path = with_matrix(write_barcodes(tmp_path / "a.mp4", 24), slanted)
    with pytest.raises(MediaError, match="no quarter turn") as caught:
        probe(path)
    assert caught.value.reason == "odd_angle"


def disc(width: int, height: int, stretch: float) -> np.ndarray:
    """A white disc on grey, `stretch` times as wide as high in stored pixels."""
    image = np.full((height, width, 3), 60, np.uint8)
    axes = (round(height / 3 * stretch), height // 3)
    cv2.ellipse(image, (width // 2, height // 2), axes, 0, 0, 360, (230, 230, 230), -1)
    return image


def roundness(image: np.ndarray) -> float:
    """Width over height of what is bright."""
    bright = image.mean(2) > 140
    return float(np.ptp(np.flatnonzero(bright.any(0))) / np.ptp(np.flatnonzero(bright.any(1))))


@pytest.mark.parametrize("aspect", [Fraction(64, 45), Fraction(8, 9), Fraction(1), Fraction(360, 359)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_disc_is_round(tmp_path: Path, aspect: Fraction, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 180, 144, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(disc(180, 144, float(1 / aspect)), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    facts = probe(path)
    square = abs(aspect - 1) < Fraction(1, 100)
    assert facts.sample_aspect == pytest.approx(1 if square else float(aspect))
    assert ("pixel_aspect" in facts.hazards) is not square
    image = frames_at(path, [facts.start_us + 300_000], facts.decoder)[0][0]
    assert image.shape[:2] == (facts.height, facts.width)
    assert roundness(image) == pytest.approx(1, abs=0.03)
    (shot,) = first_pass(path, facts, ShotConfig())
    assert roundness(shot.preview) == pytest.approx(1, abs=0.05)


def test_pixels_are_stretched_in_their_shorter_direction() -> None:
    assert Display(pixel_aspect=Fraction(64, 45)).size(720, 576) == (1024, 576)
    assert Display(turns=1, pixel_aspect=Fraction(8, 9)).size(720, 480) == (540, 720)


CODERS = {
    "vp8": ("libvpx", {"deadline": "realtime", "cpu-used": "8"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "h264": ("libx264", {"bf": "0", "preset": "ultrafast"}),
    "hevc": ("libx265", {"x265-params": "bframes=0:log-level=none", "preset": "ultrafast"}),
    "mpeg4": ("mpeg4", {}),
    "av1": ("libsvtav1", {"preset": "12"}),
}


def changing(path: Path, second: tuple[int, int]) -> Path:
    """40 barcodes of 192 x 128, then 40 of another size (width, height), in one stream of the codec in its name."""
    codec, options = CODERS[path.stem]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=dict(options))
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 192, 128, "yuv420p", 2_000_000
        coder: av.VideoCodecContext = stream.codec_context
        for number in range(80):
            if number == 40:
                container.mux(stream.encode(None))
                coder = av.CodecContext.create(codec, "w")  # type: ignore[assignment]  # a video codec by its name
                coder.width, coder.height, coder.pix_fmt = *second, "yuv420p"
                coder.time_base, coder.framerate, coder.bit_rate = Fraction(1, 10), Fraction(10), 4_000_000
                coder.options = dict(options)
            size = (192, 128) if number < 40 else second
            frame = av.VideoFrame.from_ndarray(barcode(number, *size), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            packets = stream.encode(frame) if number < 40 else coder.encode(frame)
            for packet in packets:
                packet.stream = stream
                container.mux(packet)
        for packet in coder.encode(None) if number >= 40 else []:
            packet.stream = stream
            container.mux(packet)
    return path


@pytest.mark.parametrize("name", ["vp8.webm", "vp9.webm", "h264.ts", "h264.flv", "hevc.ts", "mpeg4.ts", "av1.webm"])
def test_frames_of_another_size_are_scaled_to_the_first(tmp_path: Path, name: str) -> None:
    path = changing(tmp_path / name, (384, 256))
    facts = probe(path)
    assert "changing_size" in facts.hazards
    assert facts.reading == 2  # older versions cut the crops of the first size out of the second
    at = facts.start_us
    frames, _ = frames_at(path, [at + 100_000 * n for n in (0, 39, 40, 79)], facts.decoder)
    assert frames.shape == (4, 128, 192, 3)
    assert numbers(frames) == [0, 39, 40, 79]
    for place, n in enumerate((0, 39, 40, 79)):  # the size is the file's, not that of the frame where decoding begins
        assert np.array_equal(frames_at(path, [at + 100_000 * n], facts.decoder)[0][0], frames[place])
    assert {(shot.crop_w, shot.crop_h) for shot in first_pass(path, facts, ShotConfig())} == {(192, 128)}


def test_a_size_that_changes_between_key_pictures_is_the_files_too(tmp_path: Path) -> None:
    """As encoders of calls do where the network is slow; here the first picture already is a smaller one."""
    options = {"preset": "12", "g": "200", "svtav1-params": "resize-mode=2:pred-struct=1:rc=0"}
    path = write_barcodes(tmp_path / "a.mkv", 30, (192, 128), codec="libsvtav1", options=options, crf=None)
    with av.open(str(path)) as container:
        sizes = {(frame.width, frame.height) for frame in container.decode(video=0)}
    assert len(sizes) > 3
    facts = probe(path)
    assert (facts.width, facts.height) == (192, 128)
    times = [facts.start_us + round(n * 1e6 / 24) for n in range(30)]
    frames, _ = frames_at(path, times, facts.decoder)
    assert numbers(frames) == list(range(30))
    for n in (0, 7, 19):
        assert np.array_equal(frames_at(path, [times[n]], facts.decoder)[0][0], frames[n])


@pytest.mark.parametrize("name", ["vp9.webm", "h264.ts", "hevc.ts", "mpeg4.ts", "av1.webm"])
def test_one_size_is_no_change(tmp_path: Path, name: str) -> None:
    facts = probe(changing(tmp_path / name, (192, 128)))
    assert "changing_size" not in facts.hazards
    assert facts.reading == 1


def test_frames_of_another_shape_have_a_reason(tmp_path: Path) -> None:
    path = changing(tmp_path / "vp9.webm", (128, 192))
    with pytest.raises(MediaError, match="cut it there") as caught:
        first_pass(path, probe(path), ShotConfig())
    assert caught.value.reason == "changing_shape"


TRANSPARENT = {
    "vp9.webm": ("libvpx-vp9", "yuva420p", {"auto-alt-ref": "0", "crf": "5", "b": "0"}),
    "vp8.webm": ("libvpx", "yuva420p", {"auto-alt-ref": "0", "crf": "5", "b": "2M"}),
    "prores.mov": ("prores_ks", "yuva444p10le", {"profile": "4444"}),
    "animation.mov": ("qtrle", "argb", {}),
    "lossless.mkv": ("ffv1", "bgra", {}),
}
BY_PILLOW = ["gif", "webp", "png", "avif", "still.webp", "still.png", "still.avif", "still.tif"]


def half_transparent(number: int) -> np.ndarray:
    """A barcode in RGBA whose right half is hidden."""
    image = np.dstack([barcode(number, 192, 128), np.full((128, 192), 255, np.uint8)])
    image[:, 96:, 3] = 0
    return image


@pytest.mark.parametrize("name", [*TRANSPARENT, *BY_PILLOW])
def test_transparency_is_over_black_in_images_and_videos(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"a.{name}"
    images = [half_transparent(15 + 16 * n) for n in range(10)]  # the visible half is white above
    if name in TRANSPARENT:
        codec, pixel_format, options = TRANSPARENT[name]
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=10, options=options)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = 192, 128, pixel_format
            for number, image in enumerate(images):
                frame = av.VideoFrame.from_ndarray(image, format="rgba").reformat(format=pixel_format)
                frame.pts, frame.time_base = number, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    else:
        first, *rest = [Image.fromarray(image) for image in images[: 1 if "still" in name else None]]
        more: dict[str, Any] = {"save_all": True, "append_images": rest, "duration": 100} if rest else {}
        first.save(path, **more | ({"disposal": 2} if name == "gif" else {}))
    facts = probe(path)
    assert facts.kind == ("image" if "still" in name else "video")
    pictures = [load_image(path)] if facts.kind == "image" else [*frames_at(path, [0, 500_000], facts.decoder)[0]]
    pictures += [shot.preview for shot in first_pass(path, facts, ShotConfig())]
    for picture in pictures:
        height, width = picture.shape[:2]
        assert picture[height // 8, width // 16].min() > 200
        assert picture[:, 9 * width // 16 :].max() < 20
