"""What is wrong with a file or label of a dataset is a row with its reason or one error, and the rest goes on."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from nextvid.config.project import Project
from nextvid.corpus.clips import make_clips
from nextvid.corpus.manifest import with_value
from nextvid.corpus.media import make_media
from nextvid.corpus.shots import make_shots
from nextvid.corpus.sources import known_sources, list_dataset, make_sources, update_sources
from storage import tables
from storage.errors import CorpusError
from storage.schemas import Clips, Labels, Media
from tests.factories import write_project
from tests.nextvid.corpus.small_media import FPS, scene, write_film
from tests.nextvid.video.film import X264_FAST
from tests.nextvid.video.film import write_film as write_mkv

POLICY = {"frames": 4, "fps": 4}


def made(folder: Path, labels: dict[str, Any] | None = None) -> Project:
    """A project over `folder`/d, listed and probed."""
    dataset = {"uri": str(folder / "d"), "weight": 1.0, "clips": [POLICY], "quarantine_budget": 1.0}
    project = write_project(folder, {"d": dataset | ({"labels": labels} if labels else {})})
    update_sources(project)
    make_media(project, "d.000000")
    return project


def verdicts(project: Project) -> dict[str, tuple[str, str | None]]:
    media = tables.read_table(project.root.table("media", "d.000000"), Media)
    return {row["path"]: (row["status"], row["reason"]) for row in media.iter_rows(named=True)}


def film(path: Path, name: str = "dunes", seconds: int = 2) -> None:
    write_film(path, [scene(name, seconds * FPS)])


def test_names_with_newlines_and_odd_unicode_reach_the_clips(tmp_path: Path) -> None:
    names = [
        "line\nbreak.mp4",
        "tab\tquote\"'.mp4",
        "Å e\u0301 \u202e\u200b.mp4",
        "🎬 % #?.mp4",
        "-rf.mp4",
        " lead.mp4",
        "a,b;c.mp4",
        "zip::c.mp4",
    ]
    lines = "path,class\n"
    for number, name in enumerate(names):
        film(tmp_path / "d" / name, f"odd{number}")
        escaped = name.replace('"', '""')
        lines += f'"{escaped}",c{number}\n'
    (tmp_path / "labels.csv").write_text(lines, encoding="utf-8")
    project = made(tmp_path, {"layout": "csv", "file": "labels.csv", "targets": {"class": "class"}})
    assert verdicts(project) == dict.fromkeys(names, ("ok", None))
    make_shots(project, "d.000000")
    make_clips(project, "d.000000")
    clips = tables.read_table(project.root.table("clips", "d.000000"), Clips)
    assert {Path(uri).name for uri in clips["uri"]} == set(names)
    labels = tables.read_table(project.root.table("labels", "d.000000"), Labels)
    assert sorted(labels["value"]) == [f"c{number}" for number in range(len(names)) if names[number] != " lead.mp4"]


def test_a_name_that_is_no_text_is_a_row_with_its_reason(tmp_path: Path) -> None:
    film(tmp_path / "d" / "good.mp4")
    os.link(tmp_path / "d" / "good.mp4", os.fsencode(tmp_path / "d") + b"/caf\xe9.mp4")
    project = made(tmp_path)
    assert verdicts(project) == {"good.mp4": ("ok", None), "caf\\xe9.mp4": ("rejected", "bad_name")}


def test_links_out_of_the_dataset_are_rows_with_their_reason(tmp_path: Path) -> None:
    film(tmp_path / "d" / "real" / "good.mp4")
    film(tmp_path / "secret.mp4", "wall")
    (tmp_path / "d" / "inside.mp4").symlink_to(tmp_path / "d" / "real" / "good.mp4")
    (tmp_path / "d" / "outside.mp4").symlink_to(tmp_path / "secret.mp4")
    (tmp_path / "d" / "up.mp4").symlink_to("../secret.mp4")
    (tmp_path / "d" / "password.mp4").symlink_to("/etc/passwd")
    (tmp_path / "d" / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "d" / "nothing.mp4").symlink_to("nothing_here.mp4")
    project = made(tmp_path)
    assert verdicts(project) == {
        "inside.mp4": ("ok", None),
        "real/good.mp4": ("ok", None),
        "outside.mp4": ("rejected", "outside"),
        "up.mp4": ("rejected", "outside"),
        "password.mp4": ("rejected", "outside"),
        "loop.mp4": ("quarantined", "unreadable"),
        "nothing.mp4": ("quarantined", "missing"),
    }


def test_links_are_followed_to_the_folders_that_corpus_yaml_names(tmp_path: Path) -> None:
    """As in the cache of the Hugging Face Hub: names in `snapshots`, content in `blobs`."""
    blobs = tmp_path / "hub" / "blobs"
    film(blobs / "a.mp4", "wall")
    (blobs / "a.mp4").rename(blobs / "0a1b")
    snapshot = tmp_path / "hub" / "snapshots" / "main"
    (snapshot / "walk").mkdir(parents=True)
    (snapshot / "walk" / "a.mp4").symlink_to("../../../blobs/0a1b")
    dataset: dict[str, Any] = {"uri": "hub/snapshots/main", "quarantine_budget": 1.0, "clips": [POLICY], "weight": 1.0}
    project = write_project(tmp_path, {"d": dataset})
    update_sources(project)
    make_media(project, "d.000000")
    assert verdicts(project) == {"walk/a.mp4": ("rejected", "outside")}
    project = write_project(tmp_path, {"d": dataset | {"follow_links": ["hub/blobs"]}})
    make_media(project, "d.000000")
    assert verdicts(project) == {"walk/a.mp4": ("ok", None)}
    make_shots(project, "d.000000")
    assert make_clips(project, "d.000000").numbers["clips"] == 1


@pytest.mark.parametrize(("clock", "value"), [("first_frame", "late"), ("file", "early")])
def test_spans_count_from_the_first_frame_or_the_files_zero(tmp_path: Path, clock: str, value: str) -> None:
    """A recording whose first frame is at 2 s."""
    pts_ms = [2000 + 1000 * n // FPS for n in range(2 * FPS)]
    (tmp_path / "d").mkdir()
    write_mkv(tmp_path / "d" / "a.mkv", scene("dunes", 2 * FPS), fps=FPS, pts_ms=pts_ms, options=X264_FAST)
    (tmp_path / "labels.csv").write_text("path,class,start_s,end_s\na.mkv,late,0,2\na.mkv,early,2,4\n")
    labels = {"layout": "csv", "file": "labels.csv", "targets": {"class": "class"}, "clock": clock}
    project = made(tmp_path, labels)
    table = tables.read_table(project.root.table("labels", "d.000000"), Labels).filter(value=value)
    assert table.select("start_us", "end_us").row(0) == (2_000_000, 4_000_000), "on the clock of the frames' times"
    make_shots(project, "d.000000")
    make_clips(project, "d.000000")
    clips = tables.read_table(project.root.table("clips", "d.000000"), Clips)
    clips = clips.filter(status="ok").with_columns(batch=pl.lit("d.000000"))
    labelled = with_value(clips, tables.read_table(project.root.table("labels", "d.000000"), Labels), "class")
    assert set(labelled["label"]) == {value}


def test_a_dataset_may_itself_lie_behind_a_link(tmp_path: Path) -> None:
    film(tmp_path / "far" / "good.mp4")
    (tmp_path / "d").symlink_to(tmp_path / "far")
    assert verdicts(made(tmp_path)) == {"good.mp4": ("ok", None)}


def test_two_files_of_one_name_are_two_files_where_labels_go_by_path(tmp_path: Path) -> None:
    film(tmp_path / "d" / "a" / "x.mp4", "dunes")
    film(tmp_path / "d" / "b" / "x.mp4", "waves")
    project = made(tmp_path, {"layout": "folders"})
    assert verdicts(project) == {"a/x.mp4": ("ok", None), "b/x.mp4": ("ok", None)}
    labels = tables.read_table(project.root.table("labels", "d.000000"), Labels)
    assert sorted(labels["value"]) == ["a", "b"]


def test_two_files_of_one_name_are_rejected_where_labels_go_by_name_until_one_is_renamed(tmp_path: Path) -> None:
    film(tmp_path / "d" / "a" / "1.mp4", "dunes")
    film(tmp_path / "d" / "b" / "1.mp4", "waves")
    film(tmp_path / "d" / "2.mp4", "forest")
    (tmp_path / "t.json").write_text(json.dumps([{"id": "1", "template": "A"}, {"id": "2", "template": "B"}]))
    project = made(tmp_path, {"layout": "ssv2", "files": {"train": "t.json"}})
    assert verdicts(project) == {
        "a/1.mp4": ("rejected", "ambiguous_name"),
        "b/1.mp4": ("rejected", "ambiguous_name"),
        "2.mp4": ("ok", None),
    }
    (tmp_path / "d" / "b" / "1.mp4").rename(tmp_path / "d" / "b" / "3.mp4")
    update_sources(project)
    make_media(project, "d.000000")
    assert verdicts(project)["a/1.mp4"] == verdicts(project)["b/3.mp4"] == ("ok", None)


def test_spans_outside_of_the_video_are_named_and_label_nothing(tmp_path: Path) -> None:
    film(tmp_path / "d" / "a.mp4", seconds=2)
    (tmp_path / "l.csv").write_text("path,class,start_s,end_s\na.mp4,in,0,1\na.mp4,over,1,5\na.mp4,out,2,3\n")
    project = made(tmp_path, {"layout": "csv", "file": "l.csv", "targets": {"class": "class"}})
    said = tables.read_checks(project.root.checks("media", "d.000000"))
    assert said is not None
    (check,) = (check for check in said["checks"] if check["name"] == "spans_inside_video")
    assert not check["passed"]
    assert not check["blocking"]
    assert check["numbers"] == {"outside": 1, "labels": 3, "such_as": "a.mp4: 2000000 to 3000000 us"}
    assert said["passed"]
    make_shots(project, "d.000000")  # what is not blocking does not stop it


def test_labels_of_files_that_are_not_there_are_counted(tmp_path: Path) -> None:
    film(tmp_path / "d" / "a.mp4")
    film(tmp_path / "d" / "unlabelled.mp4", "waves")
    (tmp_path / "l.csv").write_text("path,class\na.mp4,run\ngone.mp4,run\nnever/was.mp4,sit\n")
    project = made(tmp_path, {"layout": "csv", "file": "l.csv", "targets": {"class": "class"}})
    numbers = make_sources(project).numbers
    assert numbers["labels_without_file"] == 2
    assert numbers["labels_without_file_such_as"] == "d: 'gone.mp4'"
    assert verdicts(project) == {"a.mp4": ("ok", None), "unlabelled.mp4": ("ok", None)}


def test_contradictory_labels_reject_their_file_alone(tmp_path: Path) -> None:
    film(tmp_path / "d" / "a.mp4")
    film(tmp_path / "d" / "b.mp4", "waves")
    (tmp_path / "l.csv").write_text("path,class\na.mp4,run\na.mp4,sit\nb.mp4,run\nb.mp4,run\n")
    project = made(tmp_path, {"layout": "csv", "file": "l.csv", "targets": {"class": "class"}})
    assert verdicts(project) == {"a.mp4": ("rejected", "contradictory"), "b.mp4": ("ok", None)}


@pytest.mark.parametrize("uri", ["missing", "no-such-protocol://bucket/videos", "memory://empty-bucket"])
def test_a_dataset_that_cannot_be_listed_is_one_error_and_the_others_are_listed(tmp_path: Path, uri: str) -> None:
    film(tmp_path / "d" / "a.mp4")
    datasets = {"bad": {"uri": uri}, "good": {"uri": "d"}, "worse": {"uri": "nowhere"}}
    project = write_project(tmp_path, datasets, protocols=["memory", "no-such-protocol"])
    with pytest.raises(CorpusError) as caught:
        update_sources(project)
    assert str(caught.value).count("dataset bad") == 1
    assert str(caught.value).count("dataset worse") == 1
    assert known_sources(project, "good")["path"].to_list() == ["a.mp4"]
    assert known_sources(project, "bad").is_empty()


def test_batches_are_bounded_and_folders_are_read_as_they_are_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(23):
        path = tmp_path / "d" / f"f{number % 5}" / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    project = write_project(tmp_path, {"d": {"uri": "d", "max_batch_videos": 10}})
    update_sources(project)
    sizes = known_sources(project, "d").group_by("batch").len().sort("batch")
    assert sizes["len"].to_list() == [10, 10, 3]

    from nextvid.corpus import sources

    reached: list[str] = []
    walk = sources._walk

    def counted(uri: str, top: str, empty: list[str], followed: Sequence[str]) -> Any:
        for info in walk(uri, top, empty, followed):
            reached.append(info["name"])
            yield info

    monkeypatch.setattr(sources, "_walk", counted)
    assert list_dataset(project, "d").files.height == 23
    assert len(reached) == 23
