"""`media` and `labels`: every file a row, failures tried again, verdicts that fall when their cause does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pytest

from nextvid.config.project import Project
from nextvid.corpus.media import make_media
from nextvid.corpus.sources import update_sources
from storage import tables
from storage.digest import digest_file
from storage.errors import UpstreamError
from storage.schemas import Labels, Media
from tests.factories import unchanged, write_project
from tests.nextvid.corpus.conftest import Made, films_of
from tests.nextvid.corpus.small_media import FPS, scene, write_film, write_picture

FILMS = "films.000000"


def media_of(project: Project, batch: str) -> dict[str, dict[str, Any]]:
    table = tables.read_table(project.root.table("media", batch), Media)
    return {row["path"]: row for row in table.iter_rows(named=True)}


def labels_of(project: Project, batch: str) -> pl.DataFrame:
    return tables.read_table(project.root.table("labels", batch), Labels)


def test_every_file_is_a_row_with_its_identity_and_facts(small_corpus: Made) -> None:
    rows = media_of(small_corpus.project, FILMS)
    assert sorted(rows) == ["broken.mp4", "copy_of_three.mp4", "one.mp4", "still.mp4", "three.mp4", "two.mp4"]
    one = rows["one.mp4"]
    assert one["media_id"].hex() == digest_file(small_corpus.folder / "films" / "one.mp4")
    assert (one["status"], one["width"], one["height"], one["frames"], one["fps_hz"]) == ("ok", 64, 64, 32, 8.0)
    assert one["duration_us"] == 4_000_000
    assert rows["copy_of_three.mp4"]["media_id"] == rows["three.mp4"]["media_id"]


def test_a_file_that_cannot_be_read_is_quarantined_with_reason_and_identity(small_corpus: Made) -> None:
    broken = media_of(small_corpus.project, FILMS)["broken.mp4"]
    assert (broken["status"], broken["reason"]) == ("quarantined", "unknown_format")
    assert "broken.mp4" in broken["error"]
    assert broken["media_id"].hex() == digest_file(small_corpus.folder / "films" / "broken.mp4")
    outcome = small_corpus.outcomes[f"media {FILMS}"]
    assert (outcome.made, outcome.rows, outcome.quarantined, outcome.passed) == (True, 6, 1, True)


def test_labels_are_joined_by_media_and_copies_share_theirs(small_corpus: Made) -> None:
    rows, labels = media_of(small_corpus.project, FILMS), labels_of(small_corpus.project, FILMS)
    three = labels.filter(pl.col("media_id") == rows["three.mp4"]["media_id"])
    assert sorted(three.select("target", "value").iter_rows()) == [
        ("action", "jump"),
        ("group", "cleo"),
        ("split", "train"),
    ]
    one = labels.filter((pl.col("media_id") == rows["one.mp4"]["media_id"]) & (pl.col("target") == "action"))
    assert list(one.select("start_us", "end_us", "value").iter_rows()) == [
        (0, 2_000_000, "walk"),
        (2_000_000, 4_000_000, "jump"),
    ]


def test_making_it_again_reads_and_writes_nothing_but_the_quarantined(
    own_copy: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = own_copy()
    with unchanged(project.root.url):
        again = make_media(project, FILMS)
        assert (again.made, again.rows, again.numbers["read"]) == (False, 6, 1)
        assert make_media(project, "stills.000000").numbers["read"] == 0


def test_withdrawn_media_are_rejected_and_come_back(own_copy: Callable[..., Project]) -> None:
    project = own_copy()
    three = media_of(project, FILMS)["three.mp4"]["media_id"]
    mark = Path(project.root.withdrawn(), f"{three.hex()}.json")
    mark.parent.mkdir()
    mark.write_text("{}")
    assert make_media(project, FILMS).made
    rows = media_of(project, FILMS)
    assert {rows[name]["reason"] for name in ("three.mp4", "copy_of_three.mp4")} == {"withdrawn"}
    assert rows["one.mp4"]["status"] == "ok"
    mark.unlink()
    assert make_media(project, FILMS).numbers["read"] == 1
    assert media_of(project, FILMS)["three.mp4"]["status"] == "ok"


def test_a_changed_label_file_rewrites_labels_and_reads_no_file(
    own_copy: Callable[..., Project], small_files: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "other.csv"
    text = (small_files / "labels.csv").read_text()
    changed.write_text(text + "copy_of_three.mp4,sit,train,cleo,,\n")
    films = films_of(small_files)
    films["labels"]["file"] = str(changed)
    project = own_copy(datasets={"films": films}, benchmarks={})
    outcome = make_media(project, FILMS)
    assert (outcome.made, outcome.numbers["read"]) == (True, 1)
    rows = media_of(project, FILMS)
    for name in ("three.mp4", "copy_of_three.mp4"):  # one media with two values
        assert (rows[name]["status"], rows[name]["reason"]) == ("rejected", "contradictory")
        assert "action is jump and sit" in rows[name]["error"]
    assert outcome.passed, "rejected files do not count against the quarantine budget"
    changed.write_text(text.replace("two.mp4,walk", "two.mp4,jump"))
    assert make_media(project, FILMS).numbers["read"] == 1
    assert media_of(project, FILMS)["three.mp4"]["status"] == "ok"
    two = media_of(project, FILMS)["two.mp4"]["media_id"]
    values = labels_of(project, FILMS).filter((pl.col("media_id") == two) & (pl.col("target") == "action"))["value"]
    assert values.to_list() == ["jump"]


def test_only_broken_files_fail_the_budget_and_crash_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(b"no picture")
    (folder / "empty.jpg").touch()
    project = write_project(tmp_path, {"d": {"uri": "d", "quarantine_budget": 0.5}})
    update_sources(project)
    outcome = make_media(project, "d.000000")
    assert (outcome.rows, outcome.quarantined, outcome.passed) == (3, 3, False)
    with pytest.raises(UpstreamError, match="quarantined_within_budget"):
        tables.require_checks(project.root.checks("media", "d.000000"), "media")
    for name in ("a.jpg", "b.jpg", "empty.jpg"):
        write_picture(folder / name, name)
    update_sources(project)
    outcome = make_media(project, "d.000000")
    assert (outcome.rows, outcome.quarantined, outcome.passed) == (6, 3, True), "mended files weigh no more"


def test_files_that_change_or_go_between_listing_and_reading(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    for name in ("kept.jpg", "grows.jpg", "goes.jpg", "goes_later.jpg"):
        write_picture(folder / name, name)
    project = write_project(tmp_path, {"d": {"uri": "d", "quarantine_budget": 1.0}})
    update_sources(project)
    with (folder / "grows.jpg").open("ab") as file:
        file.write(b"more")
    (folder / "goes.jpg").unlink()
    make_media(project, "d.000000")
    rows = media_of(project, "d.000000")
    assert (rows["grows.jpg"]["status"], rows["grows.jpg"]["reason"]) == ("quarantined", "changed")
    assert (rows["goes.jpg"]["status"], rows["goes.jpg"]["reason"]) == ("quarantined", "missing")
    write_picture(folder / "kept.jpg", "another")
    (folder / "goes_later.jpg").unlink()
    update_sources(project)
    make_media(project, "d.000000")
    table = tables.read_table(project.root.table("media", "d.000000"), Media)
    states = {(row["path"], row["revision"]): row["status"] for row in table.iter_rows(named=True)}
    assert states[("goes_later.jpg", 0)] == "ok", "what was read stays, though the file went"
    assert states[("kept.jpg", 0)] == states[("kept.jpg", 1)] == states[("grows.jpg", 1)] == "ok"
    assert table.filter(pl.col("path") == "kept.jpg")["media_id"].n_unique() == 2


def test_revisions_that_nobody_read_are_rows_too(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    for name in ("a.jpg", "b.jpg"):
        write_picture(folder / name, name)
    project = write_project(tmp_path, {"d": {"uri": "d"}})
    update_sources(project)
    write_picture(folder / "a.jpg", "newer, and larger", quality=100)
    shutil.move(folder / "b.jpg", tmp_path / "b.jpg")
    update_sources(project)
    assert make_media(project, "d.000000").passed
    table = tables.read_table(project.root.table("media", "d.000000"), Media)
    assert {(r["path"], r["revision"], r["status"], r["reason"]) for r in table.iter_rows(named=True)} == {
        ("a.jpg", 0, "rejected", "replaced"),
        ("a.jpg", 1, "ok", None),
        ("b.jpg", 0, "rejected", "gone"),
    }
    shutil.move(tmp_path / "b.jpg", folder / "b.jpg")
    update_sources(project)
    make_media(project, "d.000000")
    assert media_of(project, "d.000000")["b.jpg"]["status"] == "ok", "a file that is back is read"


def test_files_of_object_stores_are_read_through_a_copy(tmp_path: Path) -> None:
    write_picture(tmp_path / "p.jpg", "remote")
    fs = fsspec.filesystem("memory")
    fs.pipe({"/media/p.jpg": (tmp_path / "p.jpg").read_bytes(), "/media/q.jpg": b"later gone"})
    try:
        project = write_project(tmp_path, {"d": {"uri": "memory://media", "quarantine_budget": 1.0}})
        update_sources(project)
        fs.rm("/media/q.jpg")
        make_media(project, "d.000000")
        rows = media_of(project, "d.000000")
        assert (rows["p.jpg"]["status"], rows["p.jpg"]["width"]) == ("ok", 64)
        assert (rows["q.jpg"]["status"], rows["q.jpg"]["reason"]) == ("quarantined", "unreachable")
    finally:
        fs.rm("/media", recursive=True)


def test_files_with_odd_keys_are_read_and_errors_name_the_uri(tmp_path: Path) -> None:
    write_picture(tmp_path / "p.jpg", "remote")
    write_film(tmp_path / "f.mp4", [scene("dunes", FPS)])
    picture, video = (tmp_path / "p.jpg").read_bytes(), (tmp_path / "f.mp4").read_bytes()
    fs = fsspec.filesystem("memory")
    fs.pipe({"/odd/a//p.jpg": picture, "/odd/a/no.mp4": b"no film" * 50, "/odd/cut.mp4": video[:-999]})
    try:
        project = write_project(tmp_path, {"d": {"uri": "memory://odd", "quarantine_budget": 1.0}})
        update_sources(project)
        rows: dict[str, Any] = {}
        for batch in project.root.batches():
            make_media(project, batch)
            rows |= media_of(project, batch)
        assert {path: row["status"] for path, row in rows.items()} == {
            "a//p.jpg": "ok",
            "a/no.mp4": "quarantined",
            "cut.mp4": "quarantined",
        }
        for path in ("a/no.mp4", "cut.mp4"):
            assert f"memory://odd/{path}" in rows[path]["error"]
            assert "nextvid-" not in rows[path]["error"], "the temporary copy is nothing that a person can look at"
    finally:
        fs.rm("/odd", recursive=True)


def test_an_unknown_batch_is_an_upstream_error(small_corpus: Made) -> None:
    with pytest.raises(UpstreamError, match="does not exist"):
        make_media(small_corpus.project, "films.000077")


def test_a_damaged_table_is_made_again(own_copy: Callable[..., Project]) -> None:
    project = own_copy()
    path = Path(project.root.table("media", "stills.000000"))
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    outcome = make_media(project, "stills.000000")
    assert (outcome.made, outcome.numbers["read"]) == (True, 4)
    assert path.read_bytes() == good


def test_checks_are_files(small_corpus: Made) -> None:
    said = json.loads(Path(small_corpus.project.root.checks("media", FILMS)).read_text())
    assert said["passed"]
    assert {check["name"]: check["passed"] for check in said["checks"]} == {
        "rows_are_files_listed": True,
        "quarantined_within_budget": True,
        "labels_name_files": True,
        "labels_meet_files": True,
        "spans_inside_video": True,
    }
