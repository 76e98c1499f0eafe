"""Facts and refusals: kinds by extension, wrong extensions, playlists, damaged and empty files."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image

from nextvid.video import probe as module
from nextvid.video.decode import stream as frames_of
from nextvid.video.probe import READ_ANEW, MediaFacts, kind_of, probe
from storage.errors import MediaError
from tests.nextvid.video.film import X264_VERYFAST, barcode, frames_at, numbers, write_barcodes


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("a.MP4", "video"),
        ("s3://bucket/b.webm", "video"),
        ("https://host/c.mkv?version=2", "video"),
        ("d.gif", "video"),
        ("e.JPEG", "image"),
        ("f.webp", "image"),
        ("notes.txt", None),
        ("mp4", None),
    ],
)
def test_kind_is_by_extension(uri: str, kind: str | None) -> None:
    assert kind_of(uri) == kind


def test_facts_of_a_plain_film(tmp_path: Path) -> None:
    facts = probe(write_barcodes(tmp_path / "a.mp4", 48))
    assert (facts.kind, facts.container, facts.codec, facts.pix_fmt) == ("video", "mp4", "h264", "yuv420p")
    assert (facts.width, facts.height, facts.rotation, facts.frames) == (96, 64, 0, 48)
    assert (facts.fps_hz, facts.duration_us, facts.start_us, facts.hazards) == (24.0, 2_000_000, 0, ())


def test_without_decord_everything_is_pyavs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "decord_installed", lambda: False)
    assert probe(write_barcodes(tmp_path / "a.mp4", 12)).decoder == "pyav"


def test_facts_of_an_image_turned_by_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    facts = probe(tmp_path / "a.jpg")
    assert (facts.kind, facts.width, facts.height, facts.decoder) == ("image", 20, 40, "pillow")
    assert (facts.frames, facts.duration_us, facts.fps_hz) == (1, 0, 0.0)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{film}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{film}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "<html><body>not found</body></html>",
        "",
    ],
    ids=["hls", "concat", "sdp", "html", "empty"],
)
@pytest.mark.parametrize("extension", [".mp4", ".ts", ".m3u8"])
def test_playlists_and_pages_are_refused(tmp_path: Path, text: str, extension: str) -> None:
    film = write_barcodes(tmp_path / "film.mp4", 12)
    path = tmp_path / f"x{extension}"
    path.write_text(text.format(film=film))
    with pytest.raises(MediaError) as caught:
        probe(path)
    assert caught.value.reason == "unknown_format"


def test_wrong_extensions_are_refused(tmp_path: Path) -> None:
    film = write_barcodes(tmp_path / "film.mp4", 12)
    (tmp_path / "film.jpg").write_bytes(film.read_bytes())
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    (tmp_path / "image.mp4").write_bytes((tmp_path / "image.png").read_bytes())
    for name in ("film.jpg", "image.mp4"):
        with pytest.raises(MediaError) as caught:
            probe(tmp_path / name)
        assert caught.value.reason == "unknown_format"


def test_a_container_under_another_containers_name_is_read_for_what_it_is(tmp_path: Path) -> None:
    film = write_barcodes(tmp_path / "film.mkv", 12)
    (tmp_path / "film.mp4").write_bytes(film.read_bytes())
    assert probe(tmp_path / "film.mp4").container == "matroska"


def test_a_colon_in_a_name_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_barcodes(tmp_path / "a.mp4", 12).rename(tmp_path / "concat:a.mp4")
    monkeypatch.chdir(tmp_path)
    assert probe(Path("concat:a.mp4")).frames == 12


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_truncated_films_are_refused(tmp_path: Path, share: float) -> None:
    for name in ("a.mp4", "a.mkv"):
        whole = write_barcodes(tmp_path / name, 48).read_bytes()
        path = tmp_path / f"cut_{name}"
        path.write_bytes(whole[: int(len(whole) * share)])
        if name == "a.mp4" or share < 0.9:  # the index of an MP4 stands at the end; Matroska declares how long it lasts
            with pytest.raises(MediaError, match="cut off" if name == "a.mp4" else None):
                probe(path)
        else:  # the last frames alone are lost
            assert 0 < (probe(path).frames or 0) < 48


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.jpg"):
        with pytest.raises(MediaError) as caught:
            probe(tmp_path / name)
        assert caught.value.reason == "missing"


def test_a_folder_is_refused(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.jpg"):
        (tmp_path / name).mkdir()
        with pytest.raises(MediaError):
            probe(tmp_path / name)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "avi", "ts"])
def test_of_two_video_streams_the_first_is_read(tmp_path: Path, suffix: str) -> None:
    """The second is larger, longer, faster and flagged as the default: what FFmpeg's own choice goes by."""
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        streams = []
        for (width, height), rate, flag in (((96, 64), 10, Disposition(0)), ((192, 128), 20, Disposition.default)):
            stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "10"})
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt, stream.disposition = width, height, "yuv420p", flag
            streams.append((stream, rate))
        for number in range(60):
            for index, (stream, rate) in enumerate(streams):
                if number < 30 * (index + 1):
                    image = barcode(number + 100 * index, stream.width, stream.height)
                    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                    frame.pts, frame.time_base = number, Fraction(1, rate)
                    container.mux(stream.encode(frame))
        for stream, _ in streams:
            container.mux(stream.encode(None))
    facts = probe(path)
    assert (facts.width, facts.height, facts.frames, facts.decoder) == (96, 64, 30, "pyav")
    assert "several_streams" in facts.hazards
    assert numbers(frames_at(path, [facts.start_us, facts.start_us + 2_000_000], "pyav")[0]) == [0, 20]
    assert sum(1 for _ in frames_of(path)) == 30


@pytest.mark.parametrize("suffix", ["ivf", "m4v", "mov", "f4v"])
def test_seldom_names_of_videos_are_read(tmp_path: Path, suffix: str) -> None:
    codec, options = ("libvpx", {"b": "2M"}) if suffix == "ivf" else ("libx264", X264_VERYFAST)
    path = write_barcodes(tmp_path / f"a.{suffix}", 24, codec=codec, options=options)
    facts = probe(path)
    assert (facts.kind, facts.width, facts.height) == ("video", 96, 64)
    assert numbers(frames_at(path, [facts.start_us + 500_000], facts.decoder)[0]) == [12]


PLAIN = MediaFacts(
    "video", "mp4", "h264", "yuv420p", 96, 64, 0, False, 1.0, 24.0, 48, 2_000_000, 0, ("open_gop", "rotation"), "pyav"
)


@pytest.mark.parametrize(
    ("changed", "reading"),
    [
        ({}, 1),
        *(({"hazards": (name,)}, 2) for name in READ_ANEW),
        ({"mirrored": True}, 2),
        ({"pix_fmt": "yuva420p"}, 2),
        ({"pix_fmt": "rgb24", "decoder": "pillow"}, 1),
        ({"hazards": ("vfr",)}, 1),
        ({"hazards": ("vfr",), "fps_hz": 4.0}, 2),
        ({"fps_hz": 2.0}, 1),
        ({"fps_hz": 1.0}, 2),
        ({"kind": "image", "decoder": "pillow", "pix_fmt": "RGBA", "fps_hz": 0.0}, 1),
        ({"kind": "image", "decoder": "pillow", "pix_fmt": "F", "fps_hz": 0.0}, 2),
    ],
)
def test_files_that_were_read_otherwise_have_another_reading(changed: dict[str, Any], reading: int) -> None:
    assert replace(PLAIN, **changed).reading == reading
