"""Wrong frames: none through the routed path; decord, unrouted, on a hazardous file fails the same check."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvid.video.decode import clips_at, frames_at, nearest, stream
from nextvid.video.probe import decord_installed, probe
from storage.errors import MediaError
from tests.nextvid.video.film import X264_OPEN, X265_OPEN, numbers, write_barcodes

FRAMES = 60


@dataclass(frozen=True)
class Case:
    file: str
    decoder: str
    hazards: frozenset[str] = frozenset()
    how: dict[str, object] = field(default_factory=dict)
    size: tuple[int, int] = (96, 64)


VFR_MS = np.cumsum([0, *([40] * 20), *([120] * 10), *([33] * 29)]).tolist()
LATE_MS = [5000 + 40 * i for i in range(FRAMES)]
CASES = {
    "closed gop": Case("a.mp4", "decord"),
    "closed gop in matroska": Case("b.mkv", "decord"),
    "odd size": Case("c.mp4", "decord", how={"pix_fmt": "yuv444p"}, size=(81, 61)),
    "vp9": Case("d.webm", "decord", how={"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}),
    "open gop": Case("e.mp4", "pyav", frozenset({"open_gop"}), {"options": X264_OPEN}),
    "hevc": Case("f.mp4", "pyav", frozenset({"codec_hevc", "open_gop"}), {"codec": "libx265", "options": X265_OPEN}),
    "av1": Case("g.mp4", "pyav", frozenset({"codec_av1"}), {"codec": "libsvtav1", "options": {"preset": "12"}}),
    "mpeg4": Case("h.mp4", "pyav", frozenset({"codec_mpeg4", "mpeg4_bframes"}), {"codec": "mpeg4", "bframes": 2}),
    "avi": Case("i.avi", "pyav", frozenset({"codec_mpeg4", "container_avi"}), {"codec": "mpeg4", "bframes": 2}),
    "transport stream": Case("j.ts", "pyav", frozenset({"container_mpegts"})),
    "flash": Case("k.flv", "pyav", frozenset({"container_flv"})),
    "variable rate": Case("l.mp4", "pyav", frozenset({"vfr"}), {"pts_ms": VFR_MS}),
    "late start": Case("m.mkv", "pyav", frozenset({"start_offset"}), {"pts_ms": LATE_MS}),
    "late start by edit list": Case("n.mp4", "pyav", frozenset({"start_offset"}), {"pts_ms": LATE_MS}),
    "turned left": Case("o.mp4", "pyav", frozenset({"rotation"}), {"rotation": 90}),
    "turned right": Case("p.mp4", "pyav", frozenset({"rotation"}), {"rotation": 270}),
    "upside down": Case("q.mp4", "pyav", frozenset({"rotation"}), {"rotation": 180}),
}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("films")
    return {name: write_barcodes(folder / case.file, FRAMES, case.size, **case.how) for name, case in CASES.items()}


def times_of(case: Case, start_us: int) -> np.ndarray:
    """When each frame is shown, from how the film was written."""
    written = case.how.get("pts_ms")
    if written is not None:
        return np.array(written, np.int64) * 1000
    return start_us + np.round(np.arange(FRAMES) * 1e6 / 24).astype(np.int64)


def wrong_frames(path: Path, case: Case, decoder: str, start_us: int) -> int:
    """Of 40 separate accesses in random order and one long one, how many frames are not the nearest to their time."""
    shown = times_of(case, start_us)
    wanted = np.random.default_rng(0).integers(shown[0], shown[-1], 40).tolist()
    wrong = 0
    for times in [*([t] for t in wanted), sorted(set(wanted))]:
        frames, _ = frames_at(path, times, decoder)  # type: ignore[arg-type]  # a literal by construction
        expected = [int(np.argmin(np.abs(shown - t))) for t in times]
        ties = [np.sort(np.abs(shown - t))[:2] for t in times]
        wrong += sum(
            a != b and abs(int(near[0] - near[1])) > 3000
            for a, b, near in zip(numbers(frames), expected, ties, strict=True)
        )
    return wrong


@pytest.mark.parametrize("name", CASES)
def test_no_wrong_frame_through_the_routed_path(films: dict[str, Path], name: str) -> None:
    case, path = CASES[name], films[name]
    facts = probe(path)
    assert case.hazards <= set(facts.hazards)
    assert facts.decoder == (case.decoder if decord_installed() else "pyav")
    assert (facts.width, facts.height) == case.size
    assert facts.frames == FRAMES
    assert wrong_frames(path, case, facts.decoder, facts.start_us) == 0


@pytest.mark.skipif(not decord_installed(), reason="decord has no wheel for this platform")
@pytest.mark.parametrize("name", ["open gop", "hevc", "mpeg4"])
def test_decord_unrouted_fails_the_same_check(films: dict[str, Path], name: str) -> None:
    facts = probe(films[name])
    assert wrong_frames(films[name], CASES[name], "decord", facts.start_us) > 0


@pytest.mark.skipif(not decord_installed(), reason="decord has no wheel for this platform")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.decoder == "decord"])
def test_both_decoders_agree_to_the_bit(films: dict[str, Path], name: str) -> None:
    times = list(range(0, 2_400_000, 125_000))  # 24 fps at 8 Hz: a tie between two frames never, a rounding often
    ours, our_times = frames_at(films[name], times, "pyav")
    theirs, their_times = frames_at(films[name], times, "decord")
    assert np.array_equal(ours, theirs)
    assert np.abs(our_times - their_times).max() <= 1


@pytest.mark.skipif(not decord_installed(), reason="decord has no wheel for this platform")
def test_rotation_turns_as_decord_turns(films: dict[str, Path]) -> None:
    for name in ("turned left", "turned right", "upside down"):
        ours, _ = frames_at(films[name], [0, 500_000], "pyav")
        theirs, _ = frames_at(films[name], [0, 500_000], "decord")
        assert ours.shape == theirs.shape
        assert np.abs(ours.astype(int) - theirs).mean() < 2


@pytest.mark.parametrize("name", ["closed gop", "open gop", "avi", "transport stream"])
def test_several_clips_in_one_pass_equal_one_by_one(films: dict[str, Path], name: str) -> None:
    facts = probe(films[name])
    start = facts.start_us
    lists = [[start, start + 250_000, start + 500_000], [start + 1_400_000], [start + 250_000, start + 250_000]]
    together = clips_at(films[name], lists, facts.decoder)  # type: ignore[arg-type]  # a video is never pillow's
    for times, (frames, pts) in zip(lists, together, strict=True):
        alone, alone_pts = frames_at(films[name], times, facts.decoder)  # type: ignore[arg-type]
        assert np.array_equal(frames, alone)
        assert np.array_equal(pts, alone_pts)


@pytest.mark.parametrize("name", ["closed.mp4", "open.mp4", "stream.ts", "film.avi"])
def test_jumps_over_a_long_film_land_on_the_frame(tmp_path: Path, name: str) -> None:
    how: dict[str, object] = {"options": X264_OPEN} if name == "open.mp4" else {}
    how |= {"codec": "mpeg4", "bframes": 2} if name == "film.avi" else {}
    path = write_barcodes(tmp_path / name, 250, (96, 64), fps=10, **how)
    facts = probe(path)
    wanted = [3, 81, 82, 140, 141, 142, 203, 249]
    frames, _ = frames_at(path, [facts.start_us + 100_000 * n for n in wanted], facts.decoder)  # type: ignore[arg-type]
    assert numbers(frames) == wanted
    for n in (249, 100, 0):
        assert numbers(frames_at(path, [facts.start_us + 100_000 * n], "pyav")[0]) == [n]


@pytest.mark.parametrize("decoder", ["pyav", "decord"] if decord_installed() else ["pyav"])
def test_a_time_without_a_frame_is_refused(films: dict[str, Path], decoder: str) -> None:
    with pytest.raises(MediaError) as caught:
        frames_at(films["closed gop"], [9_000_000], decoder)  # type: ignore[arg-type]
    assert caught.value.reason == "pts_mismatch"


def test_a_hole_in_the_times_is_refused(tmp_path: Path) -> None:
    times = [40 * i + (3000 if i >= 30 else 0) for i in range(FRAMES)]
    path = write_barcodes(tmp_path / "hole.mkv", FRAMES, pts_ms=times)
    with pytest.raises(MediaError, match="source frame"):
        frames_at(path, [2_500_000], "pyav")


@pytest.mark.parametrize("decoder", ["pyav", "decord"] if decord_installed() else ["pyav"])
def test_size_is_height_by_width_and_upright(films: dict[str, Path], decoder: str) -> None:
    frames, _ = frames_at(films["closed gop"], [0, 1_000_000], decoder, size=(32, 48))  # type: ignore[arg-type]
    assert frames.shape == (2, 32, 48, 3)
    assert numbers(frames) == [0, 24]
    turned, _ = frames_at(films["turned left"], [1_000_000], "pyav", size=(32, 48))
    assert numbers(turned) == [24]


@pytest.mark.parametrize("name", CASES)
def test_the_stream_shows_every_frame_at_its_time(films: dict[str, Path], name: str) -> None:
    facts = probe(films[name])
    times = np.array([time for time, _ in stream(films[name])])
    assert np.abs(times - times_of(CASES[name], facts.start_us)).max() <= 1000
    assert facts.start_us == times[0]
    assert abs(facts.start_us + facts.duration_us - times[-1] - 1e6 / facts.fps_hz) <= 2


@given(
    st.lists(st.integers(0, 10**7), min_size=1, max_size=30, unique=True), st.lists(st.integers(0, 10**7), min_size=1)
)
def test_nearest_is_the_nearest_and_the_earlier_of_ties(pts: list[int], times: list[int]) -> None:
    shown = np.array(sorted(pts), np.int64)
    for time, index in zip(times, nearest(shown, np.array(times, np.int64)), strict=True):
        best = np.abs(shown - time).min()
        assert abs(shown[index] - time) <= best + 1000
        earlier = [i for i in range(len(shown)) if abs(shown[i] - time) == best]
        assert index <= earlier[0]
