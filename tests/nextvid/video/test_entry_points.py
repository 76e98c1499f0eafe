"""Where decoding may begin: tables of sync samples that lie, recovery points, edits; alone and in any company."""

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from nextvid.config.datasets import ShotConfig
from nextvid.video.container import opened
from nextvid.video.decode import stream as frames_of
from nextvid.video.entry_points import _is_whole_h264, _units, is_entry_point
from nextvid.video.probe import decord_installed, is_missing, probe
from nextvid.video.shots import first_pass
from storage.errors import MediaError
from tests.nextvid.video.boxes import all_sync_fragments, with_edits, with_sync_samples, without_sync_table
from tests.nextvid.video.film import X265_OPEN, clips_at, frames_at, numbers, write_barcodes

FPS, COUNT = 10, 120
X264 = "keyint=30:min-keyint=30:scenecut=0:mbtree=0:log-level=none"
REFRESH = f"{X264}:intra-refresh=1"


def film(path: Path, params: str, container: dict[str, str] | None = None) -> Path:
    return write_barcodes(path, COUNT, fps=FPS, options={"x264-params": params}, container_options=container)


def fragmented(path: Path) -> Path:
    return all_sync_fragments(
        film(path, f"{X264}:bframes=0", {"movflags": "frag_keyframe+empty_moov+default_base_moof"})
    )


def flagged(film: Path, path: Path, keys: Callable[[int], bool], **how: str) -> Path:
    """The film with the key flags of a writer that does not know its codec; a packet's number from 0 decides."""
    with av.open(str(film)) as source, av.open(str(path), "w", options=how) as target:
        stream = source.streams.video[0]
        copied = target.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
            packet.is_keyframe = keys(number)
            packet.stream = copied
            target.mux(packet)
    return path


def every(number: int) -> bool:
    return True


def wrong(number: int) -> bool:
    return number == 0 or number % 30 == 17


FILMS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "no sync table": ("a.mp4", lambda path: without_sync_table(film(path, f"{X264}:bframes=0"))),
    "no sync table, b-frames": ("b.mp4", lambda path: without_sync_table(film(path, f"{X264}:bframes=2"))),
    "lying sync table": ("c.mp4", lambda path: with_sync_samples(film(path, f"{X264}:bframes=2"), [1, 26, 51, 76])),
    "all-sync fragments": ("d.mp4", fragmented),
    "all-sync fragments, b-frames": (
        "d2.mp4",
        lambda path: flagged(
            film(path.with_name("d2.mkv"), f"{X264}:bframes=2"),
            path,
            every,
            movflags="frag_keyframe+empty_moov+default_base_moof",
            frag_duration="1000000",
        ),
    ),
    "every tag a key in flash": (
        "d3.flv",
        lambda path: flagged(film(path.with_suffix(".mkv"), f"{X264}:bframes=2"), path, every),
    ),
    "refresh in mp4": ("e.mp4", lambda path: film(path, f"{REFRESH}:bframes=0")),
    "refresh in matroska": ("f.mkv", lambda path: film(path, f"{REFRESH}:bframes=0")),
    "refresh with b-frames": ("g.mp4", lambda path: film(path, f"{REFRESH}:bframes=2")),
    "refresh in a transport stream": ("h.ts", lambda path: film(path, f"{REFRESH}:bframes=0")),
    "refresh in flash": ("i.flv", lambda path: film(path, f"{REFRESH}:bframes=0")),
}
HAZARDS = {name: "no_idr" if name.startswith("refresh") else "decord_index" for name in FILMS}
HAZARDS |= {"all-sync fragments, b-frames": "start_offset", "every tag a key in flash": "container_flv"}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("films")
    return {name: make(folder / file) for name, (file, make) in FILMS.items()}


@pytest.mark.parametrize("name", FILMS)
def test_no_picture_is_wrong_alone_or_in_company(films: dict[str, Path], name: str) -> None:
    facts = probe(films[name])
    times = [facts.start_us + 100_000 * n for n in range(COUNT)]
    together = frames_at(films[name], times, facts.decoder)[0]
    assert numbers(together) == list(range(COUNT))
    for n in (*range(0, COUNT, 7), COUNT - 1):  # before, at and behind each entry point of the file and each lie
        alone = frames_at(films[name], [times[n]], facts.decoder)[0]
        assert np.array_equal(alone[0], together[n]), n
    few = clips_at(films[name], [[times[3], times[70]], [times[71], times[119]]], facts.decoder)
    assert [numbers(frames) for frames, _ in few] == [[3, 70], [71, 119]]


@pytest.mark.skipif(not decord_installed(), reason="decord has no wheel for this platform")
@pytest.mark.parametrize("name", FILMS)
def test_such_a_file_is_not_given_to_decord(films: dict[str, Path], name: str) -> None:
    facts = probe(films[name])
    assert facts.decoder == "pyav"
    assert HAZARDS[name] in facts.hazards


@pytest.mark.parametrize("name", FILMS)
def test_only_whole_pictures_are_entry_points(films: dict[str, Path], name: str) -> None:
    with opened(films[name], strict=True) as video:
        packets = [packet for packet in video.container.demux(video.stream) if packet.size]
        found = [number for number, packet in enumerate(packets) if is_entry_point(packet, video.stream)]
    assert found == ([0] if name.startswith("refresh") else [0, 30, 60, 90])


CODECS: dict[str, tuple[str, str, dict[str, str]]] = {  # name -> suffix, codec, its options
    "mpeg4": (".mp4", "mpeg4", {"g": "30", "bf": "2", "sc_threshold": "1000000000"}),
    "mpeg2": (".ts", "mpeg2video", {"g": "30", "bf": "2", "sc_threshold": "1000000000", "flags": "+cgop"}),
    "mpeg1": (".mkv", "mpeg1video", {"g": "30", "sc_threshold": "1000000000"}),
    "vp8": (".mkv", "libvpx", {"g": "30", "deadline": "realtime", "auto-alt-ref": "0"}),
    "vp9": (".mp4", "libvpx-vp9", {"g": "30", "deadline": "realtime", "cpu-used": "8"}),
    "vp9 of 4:4:4": (".mkv", "libvpx-vp9", {"g": "30", "deadline": "realtime", "cpu-used": "8"}),
    "av1": (".mp4", "libsvtav1", {"g": "30", "preset": "12"}),
}


def written(folder: Path, name: str) -> Path:
    suffix, codec, options = CODECS[name]
    pix_fmt = "yuv444p" if "4:4:4" in name else "yuv420p"
    return write_barcodes(
        folder / f"{codec}{suffix}", COUNT, codec=codec, fps=25, options=options, pix_fmt=pix_fmt, crf="30"
    )


@pytest.mark.parametrize("name", CODECS)
def test_bits_agree_with_the_flags_of_an_honest_writer(tmp_path: Path, name: str) -> None:
    with av.open(str(written(tmp_path, name))) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        flags = [packet.is_keyframe for packet in packets]
        for packet in packets:
            packet.is_keyframe = True
        assert [is_entry_point(packet, stream) for packet in packets] == flags
    assert sum(flags) > 1


@pytest.mark.parametrize("keys", [every, wrong])
@pytest.mark.parametrize("name", ["mpeg4", "vp9"])
def test_flags_of_other_codecs_are_not_believed(tmp_path: Path, name: str, keys: Callable[[int], bool]) -> None:
    path = flagged(written(tmp_path, name), tmp_path / "flagged.mp4", keys)
    facts = probe(path)
    times = [facts.start_us + 40_000 * n for n in range(COUNT)]
    together = frames_at(path, times, facts.decoder)[0]
    assert numbers(together) == list(range(COUNT))
    for n in range(0, COUNT, 6):
        assert np.array_equal(frames_at(path, [times[n]], facts.decoder)[0][0], together[n]), n


def test_cues_that_name_other_packets_are_not_believed(tmp_path: Path) -> None:
    path = flagged(written(tmp_path, "vp9"), tmp_path / "cues.mkv", wrong)
    facts = probe(path)
    assert (facts.decoder, facts.hazards) == ("pyav", ("decord_index",) if decord_installed() else ())
    times = [40_000 * n for n in range(COUNT)]
    assert numbers(frames_at(path, times, "pyav")[0]) == list(range(COUNT))
    assert [numbers(frames_at(path, [time], "pyav")[0]) for time in times[::9]] == [[n] for n in range(0, COUNT, 9)]


def test_a_program_stream_gives_the_same_frames_wherever_reading_begins(tmp_path: Path) -> None:
    """Only some of its pictures have times: behind a seek the decoder would guess the others, and not always right."""
    path = write_barcodes(tmp_path / "a.mpg", COUNT, codec="mpeg2video", fps=25, options={"g": "15", "bf": "2"})
    facts = probe(path)
    times = [facts.start_us + 40_000 * n for n in range(COUNT)]
    assert numbers(frames_at(path, times, facts.decoder)[0]) == list(range(COUNT))
    for n in range(COUNT):
        assert numbers(frames_at(path, [times[n]], facts.decoder)[0]) == [n]


def test_frames_at_the_end_of_the_first_of_two_edits(tmp_path: Path) -> None:
    path = with_edits(film(tmp_path / "a.mp4", f"{X264}:bframes=0"), [(0, 2), (5, 2)])
    facts = probe(path)
    expected = [*range(20), *range(50, 70)]
    times = [100_000 * n for n in range(len(expected))]
    assert (facts.frames, facts.duration_us, facts.decoder) == (40, 4_000_000, "pyav")
    assert numbers(frames_at(path, times, "pyav")[0]) == expected
    for n in range(len(expected)):
        assert numbers(frames_at(path, [times[n]], "pyav")[0]) == [expected[n]]


@pytest.mark.parametrize(
    ("edits", "late"),
    [([(0, 1), (3, 3)], False), ([(0.7, 0.6), (2.9, 1.1)], True), ([(0.5, 1), (3, 1), (5, 2)], True)],
)
def test_later_edits_of_reordered_pictures_are_placed_right_or_have_a_reason(
    tmp_path: Path, edits: list[tuple[float, float]], late: bool
) -> None:
    """FFmpeg shows some of them one or two pictures late."""
    path = with_edits(film(tmp_path / "a.mp4", f"{X264}:bframes=2:b-pyramid=none"), edits)
    if late:
        with pytest.raises(MediaError, match="write the file again without edits") as caught:
            probe(path)
        assert caught.value.reason == "edits"
        edits = edits[:1]
        with_edits(film(path, f"{X264}:bframes=2:b-pyramid=none"), edits)
    expected = [round(10 * begin) + n for begin, length in edits for n in range(round(10 * length))]
    times = [100_000 * n for n in range(len(expected))]
    assert numbers(frames_at(path, times, probe(path).decoder)[0]) == expected


def sei(*messages: tuple[int, bytes]) -> bytes:
    """A unit with SEI messages: type, size, payload, each number as 255s and a rest."""

    def number(value: int) -> bytes:
        return b"\xff" * (value // 255) + bytes([value % 255])

    return b"\x06" + b"".join(number(kind) + number(len(body)) + body for kind, body in messages) + b"\x80"


@pytest.mark.parametrize(
    ("unit", "whole"),
    [
        (b"\x65\x88", True),  # a slice of an IDR picture
        (b"\x41\x9a", False),  # a slice of another
        (sei((6, b"\xc4")), True),  # a recovery point of 0 frames
        (sei((6, b"\x04\x3f")), False),  # of 30
        (sei((5, b"x" * 300), (6, b"\xc4")), True),  # behind a long message
        (sei((5, b"\x00\x00\x03\x01" * 4)), False),
        (sei(), False),
        (b"\x06", False),
        (b"\x06\x06", False),
        (b"\x06\xff\xff", False),
    ],
)
def test_units_of_h264(unit: bytes, whole: bool) -> None:
    assert _is_whole_h264(unit) is whole


def test_units_behind_lengths_and_behind_start_codes() -> None:
    units = [b"\x67\x01", b"\x68\x02\x03", b"\x65" + b"\xaa" * 300]
    assert list(_units(b"".join(len(unit).to_bytes(4, "big") + unit for unit in units), 4)) == units
    assert list(_units(b"".join(b"\0\0\0\1" + unit for unit in units), 0)) == units
    assert list(_units(b"\0\0\0\5\x65", 4)) == [b"\x65"]  # cut short
    assert list(_units(b"\0\0\0\x07\x6e\xc0\0\0\1\x65\xaa", 4)) == [b"\x6e\xc0", b"\x65\xaa"]  # both at once
    assert list(_units(b"", 0)) == list(_units(b"", 4)) == []


RECORDERS = {"mpeg2": "mpeg2video", "mpeg4": "mpeg4", "vp9": "libvpx-vp9", "wmv2": "wmv2", "flv1": "flv"}
RECORDINGS = "h264.mp4 h264.ts h264.mkv h264.avi mpeg2.ts mpeg2.mpg mpeg4.mkv vp9.webm wmv2.wmv flv1.flv"


@pytest.mark.parametrize("name", RECORDINGS.split())
def test_a_recording_that_begins_within_a_group_is_read_from_its_first_whole_picture(tmp_path: Path, name: str) -> None:
    if name.startswith("h264"):
        fps, whole = 10, film(tmp_path / "whole.mp4", f"{X264}:bframes=2")
    else:
        codec, fps, whole = RECORDERS[name.split(".")[0]], 25, tmp_path / f"whole{Path(name).suffix}"
        options = {"g": "30"} | ({"cpu-used": "8", "b": "1M"} if codec == "libvpx-vp9" else {"qmax": "4"})
        options |= {"bf": "2"} if codec == "mpeg2video" else {}
        write_barcodes(whole, COUNT, codec=codec, fps=fps, options=options, crf=None)
    path = without(whole, tmp_path / name, range(17))
    facts = probe(path)
    assert facts.decoder == "pyav"
    assert "late_key" in facts.hazards
    found = [numbers(frame.to_ndarray(format="rgb24")[None])[0] for _, frame in frames_of(path)]
    first = found[0]
    assert first in range(20, 36), "the second group's first whole picture"
    assert found == list(range(first, 120))
    assert facts.frames == len(found)
    times = [facts.start_us + round(1e6 * n / fps) for n in range(len(found))]
    assert numbers(frames_at(path, times, facts.decoder)[0]) == found
    assert numbers(frames_at(path, times[40:41], facts.decoder)[0]) == [first + 40]


def test_pictures_that_lead_the_first_key_picture_are_no_part_of_the_file(tmp_path: Path) -> None:
    """They refer to pictures before it, so that they cannot be decoded: the file begins with the key picture."""
    whole = write_barcodes(tmp_path / "whole.mkv", COUNT, codec="libx265", fps=FPS, options=X265_OPEN)
    with av.open(str(whole)) as given:
        keys = [number for number, packet in enumerate(given.demux(given.streams.video[0])) if packet.is_keyframe]
    path = without(whole, tmp_path / "a.ts", range(keys[1]))
    facts = probe(path)
    found = [(time_us, numbers(frame.to_ndarray(format="rgb24")[None])[0]) for time_us, frame in frames_of(path)]
    assert "open_gop" in facts.hazards
    assert (facts.start_us, facts.frames) == (found[0][0], len(found))
    assert [number for _, number in found] == list(range(found[0][1], COUNT))


def test_streams_that_cannot_be_placed_in_time_or_begun_say_so(tmp_path: Path) -> None:
    raw = film(tmp_path / "a.h264", f"{X264}:bframes=0")
    with pytest.raises(MediaError, match="remux") as caught:
        probe(raw)
    assert caught.value.reason == "no_times"
    refresh = film(tmp_path / "whole.mp4", f"{REFRESH}:bframes=0")
    path = tmp_path / "a.mkv"
    with av.open(str(refresh)) as given, av.open(str(path), "w") as container:
        old = given.streams.video[0]
        new = container.add_stream_from_template(old)
        for packet in list(given.demux(old))[5:]:
            if packet.size:
                packet.stream = new
                container.mux(packet)
    with pytest.raises(MediaError, match="without another") as caught:
        probe(path)
    assert caught.value.reason == "no_key"


def without(whole: Path, path: Path, lost: range) -> Path:
    """The film without some of its packets, in decode order."""
    with av.open(str(whole)) as given, av.open(str(path), "w") as container:
        old = given.streams.video[0]
        new = container.add_stream_from_template(old)
        for number, packet in enumerate(given.demux(old)):
            if packet.size and number not in lost:
                packet.stream = new
                container.mux(packet)
    return path


def numbers_and_places(path: Path, start_us: int) -> list[tuple[int, int]]:
    """(tenths of a second since the start, number) of every frame."""
    frames = ((time_us, frame.to_ndarray(format="rgb24")) for time_us, frame in frames_of(path))
    return [(round((time_us - start_us) / 100_000), numbers(image[None])[0]) for time_us, image in frames]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("lost", [range(40, 50), range(41, 43), range(55, 65), range(20, 30)])
@pytest.mark.parametrize("bframes", [0, 2])
def test_lost_packets_within_a_group_have_a_reason(tmp_path: Path, suffix: str, lost: range, bframes: int) -> None:
    whole = film(tmp_path / "whole.mkv", f"{X264}:bframes={bframes}")
    path = without(whole, tmp_path / f"a.{suffix}", lost)
    if lost.stop == 30:  # up to the next entry point: a pause, and all that is left is whole
        shown = numbers_and_places(path, probe(path).start_us)
        assert len(shown) == COUNT - len(lost)
        assert all(place == number for place, number in shown)
        return
    with pytest.raises(MediaError, match="pictures are missing before") as caught:
        probe(path)
    assert caught.value.reason == "corrupt"


@pytest.mark.parametrize("params", ["bframes=0", "bframes=2:b-pyramid=none", "bframes=3", "bframes=0:ref=4"])
def test_without_any_one_packet_a_film_is_refused_or_right(tmp_path: Path, params: str) -> None:
    whole = film(tmp_path / "whole.mkv", f"{X264}:{params}")
    refused = 0
    for lost in range(1, 30):
        path = without(whole, tmp_path / f"{lost}.mkv", range(lost, lost + 1))
        try:
            facts = probe(path)
        except MediaError:
            refused += 1
            continue
        assert all(place == number for place, number in numbers_and_places(path, facts.start_us)), lost
    assert refused > 5


@pytest.mark.parametrize("lost", [range(0), range(28, 30), range(45, 55), range(36, 37), range(30, 36)])
@pytest.mark.parametrize("name", ["vp8.webm", "vp9.webm", "mpeg4.avi"])
def test_behind_a_lost_packet_nothing_is_shown_up_to_the_next_key_picture(
    tmp_path: Path, name: str, lost: range
) -> None:
    codec = {"vp8": "libvpx", "vp9": "libvpx-vp9", "mpeg4": "mpeg4"}[name.split(".")[0]]
    options = {"g": "12"} | ({"deadline": "realtime", "cpu-used": "8"} if codec != "mpeg4" else {})
    whole = write_barcodes(tmp_path / f"whole.{name}", 72, codec=codec, fps=10, options=options, crf=None)
    path = without(whole, tmp_path / name, lost)
    facts = probe(path)
    needed = len(lost) > 0 and lost.stop % 12 != 0  # by pictures that are left
    assert ("lost_pictures" in facts.hazards) == needed
    shots = first_pass(path, facts, ShotConfig())
    gap_s = (lost.start / 10, -(-lost.stop // 12) * 1.2)
    inside = [(shot.start_us / 1e6, shot.end_us / 1e6) for shot in shots]
    assert sum(end - start for start, end in inside) > 4
    if needed:
        assert all(end <= gap_s[0] + 0.01 or start >= gap_s[1] - 0.01 for start, end in inside), inside
    shown = [pair for pair in numbers_and_places(path, 0) if any(s <= pair[0] / 10 + 0.01 < e for s, e in inside)]
    assert all(place == number for place, number in shown), shown


def test_a_rate_that_varies_and_pauses_tell_of_no_loss() -> None:
    steady, rng = np.arange(100) * 33_333 // 1000 * 1000, np.random.default_rng(0)
    keys = steady[::25]
    assert not is_missing(steady, keys, "mp4").any()
    hole = np.delete(steady, [40, 41])
    assert np.flatnonzero(is_missing(hole, keys, "mp4")).tolist() == [40]
    assert not is_missing(np.delete(steady, range(10, 25)), keys, "mp4").any(), "it ends at an entry point"
    assert not is_missing(np.sort(hole + rng.integers(-9000, 9000, len(hole))), keys, "mp4").any(), "it varies"
    assert not is_missing(np.delete(steady, np.s_[3::7]), keys, "mp4").any(), "pictures are left out on purpose"
    assert not is_missing(np.delete(steady, [1, 2]), keys, "avi").any(), "the delay of B-pictures"
    assert not is_missing(steady[:2], keys, "mp4").any()
