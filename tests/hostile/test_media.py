"""Media files that are none: playlists, bombs, pipes, devices, links, files that grow, archives that lie.

Each is a row with its reason, or is left out; no process waits for ever, opens another file or a connection, or takes
memory for what a header merely claims.
"""

import os
import pickle
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from nextvid.corpus.media import make_media
from nextvid.corpus.sources import list_folder, make_sources, update_sources
from nextvid.features.make import find_files
from nextvid.video.archives import index
from nextvid.video.images import MAX_PIXELS
from nextvid.video.probe import inspect_file, probe
from storage import tables
from storage.errors import CorpusError, MediaError
from storage.schemas import Media
from tests.factories import write_project
from tests.hostile.conftest import Measured
from tests.nextvid.video.film import write_barcodes

SIDE = 60_000


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(20_000_000), 9)  # a few of them; 20 kB
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gif(width: int, height: int, frames: int = 1) -> bytes:
    size = struct.pack("<HH", width, height)
    codes = b"\x02\x02\x44\x01\x00"
    picture = b"\x2c" + struct.pack("<HH", 0, 0) + size + b"\x00" + codes
    control = b"\x21\xf9\x04\x04\x0a\x00\x00\x00"
    return b"GIF89a" + size + b"\x80\x00\x00" + b"\x00\x00\x00\xff\xff\xff" + (control + picture) * frames + b"\x3b"


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head + bytes(1000)


def jpeg(width: int, height: int, folder: Path) -> bytes:
    """A small JPEG whose header claims another size."""
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "small.jpg")
    data = (folder / "small.jpg").read_bytes()
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def bombs(folder: Path) -> list[Path]:
    data = {
        "a.png": png(SIDE, SIDE),
        "wide.png": png((1 << 31) - 1, 1),
        "a.gif": gif(30_000, 30_000),
        "moves.gif": gif(30_000, 30_000, 50),
        "a.mp4": gif(65_535, 65_535),
        "a.bmp": bmp(30_000, 30_000),
        "a.jpg": jpeg(65_500, 65_500, folder),
    }
    for name, content in data.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in data]


def test_bombs_are_refused_before_they_take_memory(tmp_path: Path, measured: Measured) -> None:
    """Each claims 0.9 to 4 gigapixels; what is decoded at most takes 200 MB as RGB."""
    files = bombs(tmp_path)
    assert all(path.stat().st_size < 100_000 for path in files)
    code = """
import sys
from pathlib import Path
from nextvid.video.probe import probe
from storage.errors import MediaError
for name in sys.argv[1:]:
    try:
        print(name, probe(Path(name)))
    except MediaError as error:
        print(error.reason)
"""
    ended = measured("-c", code, *map(str, files))
    assert ended.code == 0, ended.err
    assert ended.out.split() == ["too_large"] * len(files)
    assert ended.peak_bytes < 700_000_000


def test_the_largest_picture_that_is_taken(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5)
    (tmp_path / "a.gif").write_bytes(gif(side + 1, side))
    with pytest.raises(MediaError) as caught:
        probe(tmp_path / "a.gif")
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize(
    "name", ["list.m3u8", "list.mp4", "list.ts", "concat.mp4", "session.mp4", "frames.mp4", "x.mkv"]
)
def test_playlists_and_protocols_are_refused_whatever_they_are_called(tmp_path: Path, name: str) -> None:
    secret = write_barcodes(tmp_path / "secret.mp4", 12)
    texts = {
        "list": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile {secret}\n",
        "session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9999 RTP/AVP 96\n",
        "frames": f"<?xml version='1.0'?><MPD><Period><BaseURL>http://127.0.0.1:9/{secret}</BaseURL></Period></MPD>",
        "x": f"[playlist]\nFile1={secret}\nNumberOfEntries=1\n",
    }
    path = tmp_path / name
    path.write_text(texts[name.split(".")[0]])
    with pytest.raises(MediaError) as caught:
        probe(path)
    assert caught.value.reason == "unknown_format"


def test_a_url_as_a_name_opens_a_file_and_never_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("http://127.0.0.1:9/a.mp4", "tcp://127.0.0.1:9", "concat:a.mp4|b.mp4", "pipe:0", "data:video/mp4,x"):
        with pytest.raises(MediaError) as caught:
            probe(Path(name + ".mp4"))
        assert caught.value.reason == "missing"
    folder = tmp_path / "http:" / "127.0.0.1:9"
    folder.mkdir(parents=True)
    write_barcodes(tmp_path / "a.mp4", 12).rename(folder / "a.mp4")
    assert probe(Path("http://127.0.0.1:9/a.mp4")).frames == 12


class Payload:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize(
    "content",
    ["pickle", "script", "svg", "postscript", "pdf", "python", "zip"],
)
def test_programs_named_like_media_are_rows(tmp_path: Path, content: str) -> None:
    data = {
        "pickle": pickle.dumps(Payload(tmp_path / "owned")),
        "script": b"#!/bin/sh\nmkdir owned\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://127.0.0.1:9/x.png'/></svg>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(owned) (w) file\n",
        "pdf": b"%PDF-1.4\n1 0 obj<</OpenAction<</S/Launch/F(mkdir owned)>>>>endobj\n",
        "python": b"import os\nos.mkdir('owned')\n",
        "zip": b"PK\x03\x04" + bytes(100),
    }[content]
    for name in ("a.png", "a.mp4", "a.gif", "a.heic"):
        (tmp_path / name).write_bytes(data)
        found = inspect_file(tmp_path / name)
        assert found.facts is None
        assert found.reason == "unknown_format"
    assert not (tmp_path / "owned").exists()


def test_pipes_devices_and_folders_are_no_files(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    (folder / "folder.mp4").mkdir(parents=True)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "zero.mp4").symlink_to("/dev/zero")
    (folder / "input.mp4").symlink_to("/dev/stdin")
    (folder / "self.png").symlink_to("/proc/self/mem")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    write_barcodes(folder / "good.mp4", 12)
    project = write_project(tmp_path, {"d": {"uri": "d", "quarantine_budget": 1.0}})
    make_sources(project)
    for batch in project.root.batches():
        make_media(project, batch)
    media = tables.read_tables(project.root, "media", None, Media)
    assert dict(media.select("path", "reason").iter_rows()) == {"good.mp4": None, "self.png": "outside"}
    assert {row[1] for row in list_folder(str(folder))[0]} == {"good.mp4", "self.png"}


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_file_that_became_endless_after_it_was_listed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.mp4"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(MediaError) as caught:
        inspect_file(path)
    assert caught.value.reason == "unreadable"
    assert find_files([str(path)]).height == 1, "a row with its reason, as of any file that is named"


def test_a_file_that_grows_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write_barcodes(tmp_path / "d" / "a.mp4", 12)
    project = write_project(tmp_path, {"d": {"uri": "d", "quarantine_budget": 1.0}})
    update_sources(project)
    with (tmp_path / "d" / "a.mp4").open("ab") as file:
        file.write(bytes(100))
    make_media(project, "d.000000")
    media = tables.read_table(project.root.table("media", "d.000000"), Media)
    assert media["reason"].to_list() == ["changed"]


def test_archives_that_lie(tmp_path: Path) -> None:
    """Names that lead out of the archive, links, devices and sizes beyond its end: nothing is written or followed."""
    film = write_barcodes(tmp_path / "a.mp4", 12)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("good.mp4", "../up.mp4", "a/../../up.mp4", ".hidden.mp4"):
            tar.add(film, name)
        for name, kind in (("link.mp4", tarfile.SYMTYPE), ("hard.mp4", tarfile.LNKTYPE), ("pipe.mp4", tarfile.FIFOTYPE),
                           ("device.mp4", tarfile.CHRTYPE)):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert list(index(tmp_path / "x.tar", None).sizes_bytes) == ["good.mp4"]
    with tarfile.open(tmp_path / "huge.tar", "w") as tar:
        member = tarfile.TarInfo("huge.mp4")
        member.size = 1 << 50
        tar.addfile(member, None)
    found = index(tmp_path / "huge.tar", None)
    assert (dict(found.sizes_bytes), found.damage) == ({}, "it is cut off within huge.mp4")
    shutil.copy(film, tmp_path / "film.tar")
    assert index(tmp_path / "film.tar", None).damage


def test_a_table_of_more_rows_than_bytes(tmp_path: Path) -> None:
    """One picture a billion times takes a megabyte; its names alone would take a hundred gigabytes."""
    frame = pl.LazyFrame({"image": [b"\xff\xd8\xff"]}).select(pl.col("image").repeat_by(3_000_000).explode())
    frame.sink_parquet(tmp_path / "x.parquet", row_group_size=1_000_000)
    assert (tmp_path / "x.parquet").stat().st_size < 3_000_000
    damage = index(tmp_path / "x.parquet", "image").damage
    assert damage
    assert "rows" in damage
    with pytest.raises(CorpusError):
        index(tmp_path / "x.parquet", "other")
