"""Media to clips over real files: labelled videos and pictures, odd but good ones, and broken ones."""

import shutil
from pathlib import Path

import polars as pl
import pytest

from nextvid.config.project import Project
from nextvid.corpus.manifest import with_value
from nextvid.corpus.sources import known_sources
from nextvid.video.probe import kind_of
from storage import tables
from storage.schemas import Clips, Labels, Media, Shots
from tests.factories import make_corpus, write_project

pytestmark = pytest.mark.realdata

SMALLEST = 8  # of the assorted files, by size: the first pass over all of them takes 10 s
POLICY = {"frames": 8, "fps": 4, "crop": "whole"}


@pytest.fixture(scope="module")
def project(real_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("real")
    few = folder / "assorted"
    few.mkdir()
    videos = [path for path in (real_media / "assorted").iterdir() if kind_of(path.name) == "video"]
    for path in sorted(videos, key=lambda path: path.stat().st_size)[:SMALLEST]:
        shutil.copy(path, few)
    labels = {"layout": "csv", "path_base": str(real_media), "split_column": "split"}
    weizmann = labels | {
        "file": str(real_media / "weizmann4_mp4.csv"),
        "targets": {"action": "label"},
        "group_column": "group",
    }
    clothing = labels | {"file": str(real_media / "clothing10.csv"), "targets": {"garment": "label"}}
    project = write_project(
        folder,
        {
            "weizmann": {
                "uri": str(real_media / "videos" / "weizmann4_mp4"),
                "weight": 0.9,
                "clips": [POLICY],
                "labels": weizmann,
            },
            "clothing": {"uri": str(real_media / "images" / "clothing10" / "dress"), "labels": clothing},
            "assorted": {"uri": str(few), "weight": 0.1, "clips": [POLICY]},
            "broken": {"uri": str(real_media / "broken"), "quarantine_budget": 1.0},
        },
        benchmarks={
            "actions": {"datasets": ["weizmann"], "target": "action", "policy": POLICY},
            "garments": {"datasets": ["clothing"], "target": "garment", "policy": {"frames": 1}},
        },
    )
    for name, outcome in make_corpus(project).items():
        assert outcome.passed, (name, outcome.checks)
    return project


def table(project: Project, dataset: str) -> pl.DataFrame:
    batches = [batch for batch in project.root.batches("media") if batch.startswith(f"{dataset}.")]
    return tables.read_tables(project.root, "media", batches, Media)


def test_every_listed_file_is_a_row_with_a_verdict(project: Project) -> None:
    for dataset in project.corpus.datasets:
        media = table(project, dataset)
        assert sorted(media["uri"]) == sorted(known_sources(project, dataset)["uri"])
        for row in media.filter(pl.col("status") != "ok").iter_rows(named=True):
            assert (row["status"], bool(row["reason"]), Path(row["path"]).name in row["error"]) == (
                "quarantined",
                True,
                True,
            )


def test_good_files_are_good_and_damage_made_on_purpose_is_found(project: Project) -> None:
    for dataset in ("weizmann", "clothing", "assorted"):
        assert table(project, dataset)["status"].unique().to_list() == ["ok"], dataset
    broken = table(project, "broken")
    known = dict(broken.select("path", "reason").iter_rows())
    for name in ("made/empty.mp4", "made/random.mp4", "made/jpeg_named.mp4", "made/empty.jpg"):
        assert known[name] is not None, name
    assert known["androidx/sample_audio_only_15s.mp4"] == "no_video"


def benchmark_clips(project: Project, benchmark: str, target: str) -> pl.DataFrame:
    found = []
    for batch in project.root.batches("clips"):
        clips = tables.read_table(project.root.table("clips", batch), Clips)
        labels = tables.read_table(project.root.table("labels", batch), Labels)
        found.append(with_value(clips.filter(pl.col("uses").list.contains(benchmark)), labels, target))
    return pl.concat(found)


def test_the_actions_are_labelled_split_by_person_and_found_again(project: Project) -> None:
    found = benchmark_clips(project, "actions", "action")
    assert found.select("media_id").n_unique() == 36
    assert found.group_by("label").agg(pl.col("media_id").n_unique()).sort("label").rows() == [
        ("bend", 9),
        ("jack", 9),
        ("wave1", 9),
        ("wave2", 9),
    ]
    groups = found.group_by("split").agg(pl.col("group").unique().sort())
    assert dict(groups.select(pl.col("split").cast(pl.String), "group").iter_rows())["test"] == ["p2", "p5", "p8"]
    garments = benchmark_clips(project, "garments", "garment")
    assert garments["label"].unique().to_list() == ["dress"]
    assert sorted(garments["split"].unique()) == ["test", "train", "val"]


def test_each_shot_gives_clips_inside_itself_or_a_reason(project: Project) -> None:
    for batch in project.root.batches("shots"):
        shots = tables.read_table(project.root.table("shots", batch), Shots)
        clips = tables.read_table(project.root.table("clips", batch), Clips)
        good = shots.filter(pl.col("status") == "ok")
        assert set(good["shot_id"]) == set(clips["shot_id"])
        inside = clips.filter(pl.col("status") == "ok").join(good, on="shot_id", suffix="_shot")
        first, last = pl.col("times_us").list.first(), pl.col("times_us").list.last()
        assert inside.filter((first < pl.col("start_us")) | (last > pl.col("end_us"))).is_empty()
        assert clips.filter((pl.col("status") != "ok") & pl.col("reason").is_null()).is_empty()
