"""The written corpus: complete or absent, repeated by nobody, and true to its tables."""

import csv
import hashlib
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from scenedetect import ContentDetector, FrameTimecode

from examples.demo import files, plan, write_corpus
from examples.demo.reconstruction import psnr_db
from examples.demo.scenes import Frames
from nextvid.config.corpus import load_corpus
from nextvid.video.pdq import pdq_hash
from storage.errors import CorpusError

DEMO = Path(write_corpus.__file__).parent
Row = dict[str, str]


def table(corpus: Path, name: str) -> list[Row]:
    with (corpus / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def made(corpus: Path, kind: str) -> list[Row]:
    return [row for row in table(corpus, "truth_made.csv") if row["kind"] == kind]


def hashed(frame: np.ndarray) -> tuple[bytes, int]:
    return pdq_hash(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))


def distance(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


def cuts_found(frames: Frames) -> list[int]:
    detector = ContentDetector(threshold=27.0, min_scene_len=2)
    return [
        cut.frame_num
        for n, frame in enumerate(frames)
        for cut in detector.process_frame(FrameTimecode(n, 8.0), np.ascontiguousarray(frame[..., ::-1]))
    ]


def test_every_named_file_is_there_and_every_file_is_named_or_broken(corpus: Path) -> None:
    for kind in ("videos", "images"):
        there = {path.name for path in (corpus / kind).iterdir()}
        broken = {Path(row["path"]).name for row in made(corpus, "broken") if row["path"].startswith(kind)}
        labelled = {row["path"] for row in table(corpus, f"{kind}.csv")}
        assert there == labelled | broken
        assert broken
        assert not labelled & broken


def test_decoded_frames_are_those_of_the_plan(corpus: Path) -> None:
    for video in plan.plan_videos(0, 12)[:4]:
        decoded = files.read_video(corpus / "videos" / f"{video.name}.{video.ending}")
        assert psnr_db(plan.render_video(video), decoded).mean() > 26


def test_cuts_are_where_the_table_says(corpus: Path) -> None:
    truth = table(corpus, "truth_transitions.csv")
    names = sorted({row["path"] for row in truth})
    checked = 0
    for name in names:
        mine = [(round(float(row["time_s"]) * 8), row["kind"]) for row in truth if row["path"] == name]
        found = cuts_found(files.read_video(corpus / "videos" / name))
        assert {frame for frame, kind in mine if kind == "cut"} <= set(found)
        blends = {frame - n for frame, kind in mine if kind == "dissolve" for n in range(plan.DISSOLVE_FRAMES + 1)}
        assert set(found) - blends <= {frame for frame, kind in mine if kind == "cut"}
        checked += len(found)
    assert checked > 30


def test_labels_are_those_of_the_shots_and_stills_have_none(corpus: Path) -> None:
    rows = table(corpus, "videos.csv")
    for video in plan.plan_videos(0, 12):
        mine = [row for row in rows if row["path"] == f"{video.name}.{video.ending}"]
        wanted = [span for span in plan.spans(video) if span.part.motion is not None]
        assert [(float(row["start_s"]), float(row["end_s"])) for row in mine] == [(s.start_s, s.end_s) for s in wanted]
        assert [row["motion"] for row in mine] == [span.part.motion for span in wanted]
        assert [row["shape"] for row in mine] == [f"digit_{span.part.shape}" for span in wanted]
        assert {row["split"] for row in mine} == {video.split}


def test_still_shots_do_not_move_in_the_file_and_others_do(corpus: Path) -> None:
    truth = table(corpus, "truth_transitions.csv")
    with_still = {row["path"] for row in truth if row["kind"] == "still"}
    for row in truth:
        start = round(float(row["time_s"]) * 8)
        shot = files.read_video(corpus / "videos" / row["path"]).astype(float)[start : start + plan.SHOT_FRAMES : 2]
        change = np.median(np.abs(np.diff(shot.mean(axis=3), axis=0)).mean(axis=(1, 2)))
        if row["kind"] == "still":
            assert change < 0.05  # a frozen frame
        elif row["path"] not in with_still:
            assert change > 0.3


def test_copies_are_equal_in_bytes_and_recoded_files_only_to_the_eye(corpus: Path) -> None:
    for row in made(corpus, "copy"):
        assert (corpus / row["path"]).read_bytes() == (corpus / row["of"]).read_bytes()
    pairs = [row for kind in ("recoded", "leak") for row in made(corpus, kind) if row["path"].startswith("videos")]
    assert len(pairs) == 2
    for row in pairs:
        new, old = (files.read_video(corpus / row[column]) for column in ("path", "of"))
        assert len(new) == len(old)
        distances = [distance(hashed(new[n])[0], hashed(old[n])[0]) for n in range(4, 60, 8)]
        assert np.median(distances) <= 31  # the distance of duplicates
        assert (corpus / row["path"]).read_bytes() != (corpus / row["of"]).read_bytes()


def test_a_leak_is_a_test_video_that_the_labels_call_train(corpus: Path) -> None:
    splits = {row["path"]: row["split"] for row in table(corpus, "videos.csv")}
    for row in made(corpus, "leak"):
        assert splits[Path(row["of"]).name] == "test"
        assert splits[Path(row["path"]).name] == "train"
    for kind in ("copy", "recoded"):
        for row in made(corpus, kind):
            if row["path"].startswith("videos"):
                assert splits[Path(row["of"]).name] == splits[Path(row["path"]).name] == "train"


def test_unrelated_scenes_are_no_near_duplicates() -> None:
    videos = plan.plan_videos(0, 12)
    frames = [plan.render_video(video)[at] for video in videos for at in (8, 80)]
    hashes = [hashed(frame) for frame in frames]
    assert min(quality for _, quality in hashes) >= 50  # below, hashes join nothing (curation.duplicates)
    pairs = [(a, b) for a in range(len(hashes)) for b in range(a)]
    assert min(distance(hashes[a][0], hashes[b][0]) for a, b in pairs) > 31


def test_asked_again_nothing_is_written(corpus: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    summary = write_corpus.write_corpus(corpus, videos=12, images=8)
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before
    assert (summary.videos, summary.labelled_shots, summary.copies, summary.broken) == (12, 60, 2, 3)
    assert summary.files == sum(len(list((corpus / kind).iterdir())) for kind in ("videos", "images"))
    assert summary.cuts + summary.dissolves == 48 + summary.stills


def test_script_runs_as_a_file_and_finds_the_corpus(corpus: Path) -> None:
    command = [sys.executable, str(DEMO / "write_corpus.py"), str(corpus), "--videos", "12", "--images", "8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=corpus, timeout=240)
    assert done.returncode == 0, done.stderr
    assert '"labelled_shots": 60' in done.stdout
    done = subprocess.run([*command, "--seed", "9"], capture_output=True, text=True, cwd=corpus, timeout=240)
    assert done.returncode == 1
    assert f"holds version {plan.VERSION}, seed 0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("change", [{"seed": 1}, {"videos": 13}, {"images": 9}])
def test_another_corpus_is_refused_with_what_stands_there(corpus: Path, change: dict[str, int]) -> None:
    with pytest.raises(CorpusError, match=f"holds version {plan.VERSION}, seed 0, 12 videos, 8 images"):
        write_corpus.write_corpus(corpus, **{"videos": 12, "images": 8, **change})


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CorpusError, match="no demo corpus"):
        write_corpus.write_corpus(tmp_path, videos=12, images=8)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_too_small_a_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="at least 8"):
        write_corpus.write_corpus(tmp_path / "corpus", videos=3)


def test_a_failure_leaves_neither_folder_nor_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, seed: int, video_count: int, image_count: int) -> None:
        (folder / "videos" / "half.mp4").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(write_corpus, "_fill", fail)
    with pytest.raises(OSError, match="disk full"):
        write_corpus.write_corpus(tmp_path / "corpus", videos=12, images=8)
    assert list(tmp_path.iterdir()) == []


def test_equal_seeds_give_equal_files(corpus: Path, tmp_path: Path) -> None:
    video = plan.plan_videos(0, 12)[7]
    write_corpus._write_video(tmp_path, video)
    name = f"{video.name}.{video.ending}"
    digests = [hashlib.sha256((folder / name).read_bytes()).digest() for folder in (tmp_path, corpus / "videos")]
    assert digests[0] == digests[1]


def test_corpus_yaml_names_what_the_writer_writes() -> None:
    project = load_corpus(DEMO / "corpus.yaml")
    videos, images = project.datasets["demo_videos"], project.datasets["demo_images"]
    assert Path(videos.uri).name == "videos"
    assert videos.labels.file == str(Path(videos.uri).parent / "videos.csv")
    assert images.labels.file == str(Path(images.uri).parent / "images.csv")
    assert set(videos.labels.targets.values()) | {"path", "start_s", "end_s", "split"} == set(
        write_corpus.VIDEO_COLUMNS
    )
    files_of_all = write_corpus.VIDEOS * (1 + 1 / plan.COPY_EVERY + 1 / plan.RECODE_EVERY) + 2 + 6
    batches = -(-files_of_all // videos.max_batch_videos) + -(-(write_corpus.IMAGES + 4) // images.max_batch_images)
    assert batches <= 6
    assert project.weights() == {"demo_videos": 0.95, "demo_images": 0.05}
    assert {name: b.target for name, b in project.benchmarks.items()} == {"motion": "motion", "shape": "shape"}
    policies = [*videos.clips, *(b.policy for b in project.benchmarks.values())]
    assert {(p.frames, p.fps, p.crop, p.flip, p.pad) for p in policies} == {(8, 4.0, "whole", False, "skip")}
