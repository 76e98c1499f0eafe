"""MP4 files whose tables were changed after they were written, as recorders and editors write them."""

import struct
from collections.abc import Sequence
from pathlib import Path


def box(data: bytes | bytearray, *names: bytes) -> tuple[int, int]:
    """Begin and end of a box, by the names that lead to it from the top level."""
    begin, end = 0, len(data)
    for name in names:
        at = begin
        while data[at + 4 : at + 8] != name:
            at += struct.unpack(">I", data[at : at + 4])[0]
            assert at < end, f"no box {name!r}"
        begin, end = at + 8, at + struct.unpack(">I", data[at : at + 4])[0]
    return begin - 8, end


TABLE = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


def without_sync_table(path: Path) -> Path:
    """The file without `stss`, which then says that every sample is a key picture."""
    data = bytearray(path.read_bytes())
    begin, _ = box(data, *TABLE, b"stss")
    data[begin + 4 : begin + 8] = b"free"
    path.write_bytes(data)
    return path


def with_sync_samples(path: Path, numbers: Sequence[int]) -> Path:
    """The file whose `stss` names other samples (from 1), as many as before."""
    data = bytearray(path.read_bytes())
    begin, end = box(data, *TABLE, b"stss")
    assert end - begin == 16 + 4 * len(numbers)
    data[begin + 16 : end] = struct.pack(f">{len(numbers)}I", *numbers)
    path.write_bytes(data)
    return path


def all_sync_fragments(path: Path) -> Path:
    """The fragmented file whose samples all carry the flags of a key picture."""
    data = bytearray(path.read_bytes())
    at = 0
    while at < len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        if data[at + 4 : at + 8] == b"moof":
            for name in (b"trun", b"tfhd"):
                begin = data.index(name, at, at + size) - 4
                flags = struct.unpack(">I", data[begin + 8 : begin + 12])[0] & 0xFFFFFF
                if name == b"tfhd" and flags & 0x20:  # default sample flags stand last
                    end = begin + struct.unpack(">I", data[begin : begin + 4])[0]
                    data[end - 4 : end] = struct.pack(">I", 0x02000000)
                if name == b"trun" and flags & 0x400:
                    count = struct.unpack(">I", data[begin + 12 : begin + 16])[0]
                    entry = begin + 16 + 4 * bool(flags & 1) + 4 * bool(flags & 4)
                    for _ in range(count):
                        place = entry + 4 * bool(flags & 0x100) + 4 * bool(flags & 0x200)
                        data[place : place + 4] = struct.pack(">I", 0x02000000)
                        entry += 4 * sum(bool(flags & bit) for bit in (0x100, 0x200, 0x400, 0x800))
        at += size
    path.write_bytes(data)
    return path


def with_edits(path: Path, edits_s: Sequence[tuple[float, float]]) -> Path:
    """The file that shows only these spans of its media, each a begin and a length in seconds, one after the other."""
    data = bytearray(path.read_bytes())
    movie, _ = box(data, b"moov", b"mvhd")
    media, _ = box(data, b"moov", b"trak", b"mdia", b"mdhd")
    movie_hz, media_hz = (struct.unpack(">I", data[at + 20 : at + 24])[0] for at in (movie, media))
    shift, _ = _first_composition(data)
    entries = b"".join(
        struct.pack(">IIHH", round(length * movie_hz), round(begin * media_hz) + shift, 1, 0)
        for begin, length in edits_s
    )
    elst = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits_s)) + entries
    edts = struct.pack(">I4s", 8 + len(elst), b"edts") + elst
    begin, end = box(data, b"moov", b"trak", b"edts")
    for names in ((b"moov", b"trak"), (b"moov",)):
        at, _ = box(data, *names)
        size = struct.unpack(">I", data[at : at + 4])[0] + len(edts) - (end - begin)
        data[at : at + 4] = struct.pack(">I", size)
    moov, _ = box(data, b"moov")
    assert moov > box(data, b"mdat")[0], "offsets of samples stay only where the media comes first"
    data[begin:end] = edts
    path.write_bytes(data)
    return path


def _first_composition(data: bytes | bytearray) -> tuple[int, int]:
    """Media time of the first picture, which B-frames delay: where the file's own edit begins, and its length."""
    begin, _ = box(data, b"moov", b"trak", b"edts", b"elst")
    length, media_time = struct.unpack(">Ii", data[begin + 16 : begin + 24])
    return media_time, length


def with_matrix(path: Path, matrix: Sequence[float]) -> Path:
    """The file with another display matrix: a, b, c, d of (x, y) -> (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    begin, _ = box(data, b"moov", b"trak", b"tkhd")
    a, b, c, d = (round(value * 65536) for value in matrix)
    at = begin + 8 + 4 + 36  # version and flags, then nine words of a version 0 header
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path
