"""The first pass on spliced films: recall of cuts, dissolves and fades; times, coverage, sampling and holes."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextvid.config.datasets import ShotConfig
from nextvid.video.decode import stream
from nextvid.video.probe import MediaFacts, probe
from nextvid.video.shots import ShotFacts, first_pass, image_shot
from storage.errors import MediaError
from tests.nextvid.video.film import frames_at, write_barcodes, write_film
from tests.nextvid.video.splices import FPS, Join, covered, found, recall, scene, spliced


def check(path: Path, joins: list[Join], least: dict[str, float], extra: int) -> list[ShotFacts]:
    facts = probe(path)
    shots = first_pass(path, facts, ShotConfig())
    seen = found(shots, facts.start_us)
    for kind, share in least.items():
        assert recall(joins, seen, kind) >= share, f"{kind}: {recall(joins, seen, kind):.2f} of {joins}; seen {seen}"
    false = [s for s in seen if not any(s[1] <= last + 4 and first - 4 <= s[2] for _, first, last in joins)]
    assert len(false) <= extra, f"not there: {false}"
    assert all(covered(join, seen) for join in joins if recall([join], seen, join[0]) and join[0] == "hard")
    return shots


@pytest.fixture(scope="module")
def splice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Join]]:
    kinds = ["hard", "dissolve", "fade"] * 8
    images, joins = spliced([scene(seed, 45) for seed in range(25)], kinds)
    return write_film(tmp_path_factory.mktemp("splice") / "a.mp4", images, fps=FPS), joins


def test_made_scenes_are_told_apart(splice: tuple[Path, list[Join]]) -> None:
    shots = check(splice[0], splice[1], {"hard": 1.0, "dissolve": 1.0, "fade": 1.0}, extra=0)
    kinds = {shot.cut_out for shot in shots}
    assert kinds == {"hard", "dissolve", "fade", "edge"}
    assert shots[0].cut_in == shots[-1].cut_out == "edge"
    assert shots[0].score == 0.0
    assert all(shot.score > 5 for shot in shots[1:])


def test_transitions_found_are_covered_after_the_trim(splice: tuple[Path, list[Join]]) -> None:
    facts = probe(splice[0])
    seen = found(first_pass(splice[0], facts, ShotConfig()), facts.start_us)
    soft = [join for join in splice[1] if join[0] != "hard" and recall([join], seen, join[0])]
    assert sum(covered(join, seen) for join in soft) >= 0.95 * len(soft)


def test_shots_are_ordered_inside_the_file_and_start_on_frames(splice: tuple[Path, list[Join]]) -> None:
    facts = probe(splice[0])
    shots = first_pass(splice[0], facts, ShotConfig())
    times = {time for time, _ in stream(splice[0])}
    assert shots[0].start_us == facts.start_us
    assert shots[-1].end_us == facts.start_us + facts.duration_us
    for shot in shots:
        assert shot.start_us < shot.end_us
        assert shot.start_us in times
        assert all(shot.start_us <= t < shot.end_us and t in times for t in shot.hash_times_us)
        assert len(shot.hashes) == len(shot.hash_quality) == len(shot.hash_times_us) > 0
        assert {len(h) for h in shot.hashes} == {32}
        assert max(shot.preview.shape[:2]) <= 160
        assert shot.preview.shape[2] == 3
    assert all(a.end_us <= b.start_us for a, b in itertools.pairwise(shots))
    assert all(a.end_us == b.start_us for a, b in itertools.pairwise(shots) if a.cut_out == "hard")


def test_a_pan_is_one_shot(tmp_path: Path) -> None:
    path = write_film(tmp_path / "a.mp4", scene(3, 75), fps=FPS)
    (shot,) = first_pass(path, probe(path), ShotConfig())
    assert (shot.start_us, shot.end_us, shot.cut_in, shot.cut_out) == (0, 3_000_000, "edge", "edge")
    assert shot.motion_mean > 1
    assert shot.freeze_share == 0
    assert len(shot.hashes) in {3, 4}  # one a second and the middle


def test_the_preview_is_the_middle_frame(tmp_path: Path) -> None:
    path = write_film(tmp_path / "a.mp4", scene(3, 75), fps=FPS)
    (shot,) = first_pass(path, probe(path), ShotConfig())
    middle = min(shot.hash_times_us, key=lambda t: abs(t - 1_500_000))
    assert abs(middle - 1_500_000) <= 125_000
    frames, _ = frames_at(path, [middle], "pyav")
    assert np.abs(frames[0].astype(int) - shot.preview).mean() < 4


def test_a_rotated_film_has_the_scores_of_the_upright_one(tmp_path: Path) -> None:
    images = scene(5, 50)
    for image in images:
        image[:20] = image[-20:] = 0
    plain = write_film(tmp_path / "a.mp4", images, fps=FPS)
    turned = write_film(tmp_path / "b.mp4", images, fps=FPS, rotation=90)
    (a,), (b,) = (first_pass(path, probe(path), ShotConfig()) for path in (plain, turned))
    assert (a.crop_x, a.crop_y, a.crop_w, a.crop_h) == (b.crop_x, b.crop_y, b.crop_w, b.crop_h)
    assert 20 <= a.crop_y <= 22
    assert a.preview.shape == b.preview.shape
    assert np.abs(a.preview.astype(int) - b.preview).mean() < 4
    assert b.motion_mean == pytest.approx(a.motion_mean, rel=0.1)


def test_a_hole_in_the_times_ends_a_shot(tmp_path: Path) -> None:
    times = [40 * i + (3000 if i >= 30 else 0) for i in range(60)]
    path = write_barcodes(tmp_path / "hole.mkv", 60, pts_ms=times)
    shots = first_pass(path, probe(path), ShotConfig())
    assert any(1_190_000 <= shot.end_us <= 1_260_000 for shot in shots)
    assert not any(shot.start_us < 2_000_000 < shot.end_us for shot in shots)


def test_a_file_that_decodes_short_is_refused(tmp_path: Path) -> None:
    path = write_barcodes(tmp_path / "a.mp4", 30)
    facts = probe(path)
    with pytest.raises(MediaError) as caught:
        first_pass(path, MediaFacts(**{**facts.__dict__, "frames": 60}), ShotConfig())
    assert caught.value.reason == "short"


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = write_film(tmp_path / "a.mp4", scene(1, 75), fps=FPS)
    facts = probe(path)
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + len(data) // 3
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)
    with pytest.raises(MediaError) as caught:
        first_pass(path, facts, ShotConfig())
    assert caught.value.reason == "corrupt"


def test_an_image_is_one_shot(tmp_path: Path) -> None:
    Image.fromarray(scene(2, 1)[0]).save(tmp_path / "a.png")
    shot = image_shot(tmp_path / "a.png", probe(tmp_path / "a.png"), ShotConfig())
    assert (shot.start_us, shot.end_us, shot.cut_in, shot.cut_out) == (0, 0, "edge", "edge")
    assert (shot.crop_x, shot.crop_y, shot.crop_w, shot.crop_h) == (0, 0, 128, 96)
    assert len(shot.hashes) == 1
    assert shot.preview.shape == (96, 128, 3)
    assert shot.motion_mean == shot.freeze_share == 0.0


def test_pictures_are_thinned_without_changing_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_film(tmp_path / "a.mp4", scene(3, 150), fps=FPS)
    (dense,) = first_pass(path, probe(path), ShotConfig())
    monkeypatch.setattr("nextvid.video.shots.DENSE_PICTURES", 4)
    (thin,) = first_pass(path, probe(path), ShotConfig())
    assert set(thin.hash_times_us) <= set(dense.hash_times_us)
    assert len(thin.hashes) >= 5
