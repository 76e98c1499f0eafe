"""Listings: what joins, what waits, what is an error; and that two writers never disagree."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pytest

from nextvid.config.accepted import accept, accepted
from nextvid.config.project import Project
from nextvid.corpus import assignment
from nextvid.corpus.sources import batch_fingerprint, known_sources, list_dataset, update_sources
from storage import tables
from storage.errors import ConflictError, CorpusError
from storage.schemas import Sources
from tests.factories import write_project
from tests.storage.stores import in_threads


def write(folder: Path, *names: str, text: str = "x") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    write(tmp_path / "d", "b.mp4", "a/c.MOV", "p.jpg", "notes.txt", ".hidden.mp4", ".cache/x.mp4")
    return write_project(tmp_path, {"d": {"uri": "d", "max_batch_videos": 2}})


def held_by(project: Project) -> dict[str, tuple[str, int, bool]]:
    rows = known_sources(project, "d")
    return {
        row["path"]: (row["batch"], row["revision"], row["gone_at"] is not None) for row in rows.iter_rows(named=True)
    }


def test_a_listing_holds_media_only(project: Project, tmp_path: Path) -> None:
    listing = list_dataset(project, "d")
    assert listing.files["path"].to_list() == ["a/c.MOV", "b.mp4", "p.jpg"]
    assert listing.files["kind"].to_list() == ["video", "video", "image"]
    assert listing.files["uri"].to_list() == [str(tmp_path / "d" / name) for name in listing.files["path"]]
    assert listing.files["size_bytes"].to_list() == [1, 1, 1]
    assert listing.ignored == {".txt": 1, "hidden": 2}


def test_new_changed_gone_and_returned_files(project: Project, tmp_path: Path) -> None:
    update_sources(project)
    assert held_by(project) == {
        "a/c.MOV": ("d.000001", 0, False),
        "b.mp4": ("d.000001", 0, False),
        "p.jpg": ("d.000000", 0, False),
    }
    write(tmp_path / "d", "a.mp4")
    write(tmp_path / "d", "b.mp4", text="longer")
    (tmp_path / "d" / "p.jpg").rename(tmp_path / "kept")
    assert [c.batch for c in update_sources(project)] == ["d.000000", "d.000001", "d.000002"]
    assert held_by(project)["a.mp4"] == ("d.000002", 0, False)
    assert held_by(project)["b.mp4"] == ("d.000001", 1, False), "the newest revision, in the batch it was in"
    assert held_by(project)["p.jpg"] == ("d.000000", 0, True)
    (tmp_path / "kept").rename(tmp_path / "d" / "p.jpg")
    update_sources(project)
    assert held_by(project)["p.jpg"] == ("d.000000", 0, False)


def test_listing_again_writes_nothing(project: Project) -> None:
    update_sources(project)
    folder = Path(project.root.folder("sources"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    assert update_sources(project) == []
    assert {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()
    } == before


def test_the_same_size_with_another_time_is_another_revision(project: Project, tmp_path: Path) -> None:
    update_sources(project)
    os.utime(tmp_path / "d" / "b.mp4", (1_000, 1_000))
    assert [change.changed for change in update_sources(project)] == [1]


def test_a_file_joins_when_it_held_still_over_two_listings(project: Project, tmp_path: Path) -> None:
    assert update_sources(project, settle=True) == []
    write(tmp_path / "d", "b.mp4", text="it grows")
    assert sum(change.added for change in update_sources(project, settle=True)) == 2
    assert "b.mp4" not in held_by(project)
    assert sum(change.added for change in update_sources(project, settle=True)) == 1
    write(tmp_path / "d", "b.mp4", text="and is written to again")
    assert update_sources(project, settle=True) == [], "a known file that changes waits too, and is not gone meanwhile"
    assert [change.changed for change in update_sources(project, settle=True)] == [1]
    assert not any(gone for _, _, gone in held_by(project).values())


def test_a_missing_folder_is_an_error_and_changes_nothing(project: Project, tmp_path: Path) -> None:
    update_sources(project)
    before = known_sources(project, "d")
    (tmp_path / "d").rename(tmp_path / "elsewhere")
    with pytest.raises(CorpusError, match="is not a folder"):
        update_sources(project)
    (tmp_path / "d").mkdir()
    with pytest.raises(CorpusError, match="holds none of its 3 files"):
        update_sources(project)
    assert known_sources(project, "d").equals(before)


def test_an_empty_mount_point_below_is_an_error_too(project: Project, tmp_path: Path) -> None:
    """`a` held one file; an empty folder in its place is a disk that is not mounted, no folder at all a deletion."""
    update_sources(project)
    before = known_sources(project, "d")
    (tmp_path / "d" / "a").rename(tmp_path / "unmounted")
    (tmp_path / "d" / "a").mkdir()
    (tmp_path / "d" / "never_held_anything").mkdir()
    with pytest.raises(CorpusError, match=r"d/a is empty, or a link that is not followed, where 1 files were"):
        update_sources(project)
    assert known_sources(project, "d").equals(before)
    (tmp_path / "d" / "a").rmdir()
    assert [change.gone for change in update_sources(project)] == [1]
    (tmp_path / "unmounted").rename(tmp_path / "d" / "a")
    update_sources(project)
    assert not any(gone for _, _, gone in held_by(project).values())


def test_a_listing_that_fails_halfway_is_an_error(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    update_sources(project)
    before = known_sources(project, "d")
    fs = fsspec.filesystem("file")
    ls = type(fs).ls

    def failing(self: Any, path: str, **more: Any) -> Any:
        if path.rstrip("/").endswith("/a"):
            raise PermissionError(path)
        return ls(self, path, **more)

    monkeypatch.setattr(type(fs), "ls", failing)
    with pytest.raises(CorpusError, match="failed"):
        update_sources(project)
    monkeypatch.undo()
    assert known_sources(project, "d").equals(before)


def test_links_to_files_are_files_and_links_to_folders_are_counted(project: Project, tmp_path: Path) -> None:
    write(tmp_path, "outside.mp4", text="far")
    (tmp_path / "d" / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (tmp_path / "d" / "nowhere.mp4").symlink_to(tmp_path / "missing.mp4")
    files = {row["path"]: row for row in list_dataset(project, "d").files.iter_rows(named=True)}
    assert files["link.mp4"]["size_bytes"] == 3
    assert files["nowhere.mp4"]["fingerprint"] == "broken link"
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    listing = list_dataset(project, "d")
    assert listing.ignored["link to a folder"] == 1
    assert listing.files["path"].to_list() == sorted(files)


def test_links_to_folders_are_followed_where_corpus_yaml_says_so(tmp_path: Path) -> None:
    write(tmp_path / "disk", "one/a.mp4", "two/b.mp4")
    (tmp_path / "disk" / "one" / "round").symlink_to(tmp_path / "disk" / "one")
    write(tmp_path / "d", "c.mp4")
    (tmp_path / "d" / "one").symlink_to(tmp_path / "disk" / "one")
    project = write_project(tmp_path, {"d": {"uri": "d", "follow_links": ["disk"]}})
    listing = list_dataset(project, "d")
    assert listing.files["path"].to_list() == ["c.mp4", "one/a.mp4"]
    assert listing.ignored == {"link to a folder": 1}, "a circle ends"
    update_sources(project)
    project = write_project(tmp_path, {"d": {"uri": "d"}})
    with pytest.raises(CorpusError, match="name its target in 'follow_links'"):
        update_sources(project)
    assert known_sources(project, "d")["gone_at"].null_count() == 2, "nothing counts as gone"


def test_an_empty_dataset_has_no_batch(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    project = write_project(tmp_path, {"d": {"uri": "d"}})
    assert update_sources(project) == []
    assert project.root.batches() == []


def test_object_stores_are_listed_by_url(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe({"/shelf/a/one.mp4": b"12", "/shelf/two.jpg": b"3", "/shelf/readme.md": b""})
    try:
        project = write_project(tmp_path, {"d": {"uri": "memory://shelf"}})
        update_sources(project)
        rows = known_sources(project, "d")
        assert rows["uri"].to_list() == ["memory://shelf/a/one.mp4", "memory://shelf/two.jpg"]
        assert rows["size_bytes"].to_list() == [2, 1]
        assert update_sources(project) == []
        fs.pipe("/shelf/two.jpg", b"4")
        assert [change.changed for change in update_sources(project)] == [1]
    finally:
        fs.rm("/shelf", recursive=True)


def test_keys_that_no_path_has_are_listed_as_they_are(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    keys = ["a//b.mp4", "a///c.mp4", "a/n.mp4", "/top.mp4", "a::b.mp4", "zip::d/e.mp4"]
    fs.pipe({f"/odd/{key}": b"1" for key in keys})
    try:
        project = write_project(tmp_path, {"d": {"uri": "memory://odd"}})
        update_sources(project)
        rows = known_sources(project, "d")
        assert set(rows["path"]) == set(keys)
        assert set(rows["uri"]) == {f"memory://odd/{key}" for key in keys}
        assert update_sources(project) == []
    finally:
        fs.rm("/odd", recursive=True)


def test_of_two_writers_the_loser_lists_again(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = assignment.publish_change
    tries: list[int] = []

    def overtaken(root: Any, read: int, changed: pl.DataFrame) -> None:
        tries.append(read)
        if len(tries) == 1:
            monkeypatch.setattr(assignment, "publish_change", publish)
            update_sources(project)  # somebody else, between our reading and our writing
            write(tmp_path / "d", "later.mp4")
            monkeypatch.setattr(assignment, "publish_change", overtaken)
        publish(root, read, changed)

    monkeypatch.setattr(assignment, "publish_change", overtaken)
    update_sources(project)
    assert tries == [0, 1]
    assert set(held_by(project)) == {"a/c.MOV", "b.mp4", "p.jpg", "later.mp4"}


def test_many_writers_at_once_put_each_file_into_one_batch(tmp_path: Path) -> None:
    write(tmp_path / "d", *(f"{n:02d}.mp4" for n in range(20)))
    project = write_project(tmp_path, {"d": {"uri": "d", "max_batch_videos": 4}})

    def work(number: int) -> None:
        for step in range(3):
            write(tmp_path / "d", f"w{number}{step}.mp4")
            update_sources(project)

    in_threads(work, 3)
    update_sources(project)
    rows = known_sources(project, "d")
    assert rows.height == rows["uri"].n_unique() == 29
    assert all(count <= 4 for count in rows.group_by("batch").len()["len"])


def test_a_writer_that_died_after_its_claim_is_finished_by_the_next(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_sources(project)
    write(tmp_path / "d", "new.mp4")

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(assignment, "_apply", dies)
    with pytest.raises(KeyboardInterrupt):
        assignment.publish_change(
            project.root, 1, known_sources(project, "d").with_columns(size_bytes=pl.lit(7, pl.Int64))
        )
    monkeypatch.undo()
    assert 7 not in known_sources(project, "d")["size_bytes"].to_list()
    assert assignment.catch_up(project.root) == 2
    assert known_sources(project, "d")["size_bytes"].unique().to_list() == [7]
    with pytest.raises(ConflictError):
        assignment.publish_change(project.root, 1, known_sources(project, "d"))


def test_older_changes_are_emptied_and_their_numbers_stay(project: Project, tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "d", f"n{number}.mp4")
        update_sources(project)
    changes = sorted((tmp_path / "root" / "sources" / "changes").iterdir())
    assert [path.name for path in changes] == [f"{n:09d}.parquet" for n in (1, 2, 3)]
    assert [path.stat().st_size > 0 for path in changes] == [False, False, True]


def test_a_fingerprint_changes_with_the_listing_and_the_label_file(tmp_path: Path) -> None:
    write(tmp_path / "d", "a.mp4")
    write(tmp_path, "labels.csv", text="path,kind\na.mp4,x\n")
    labels = {"layout": "csv", "file": "labels.csv", "targets": {"kind": "kind"}}
    project = write_project(tmp_path, {"d": {"uri": "d", "labels": labels}})
    update_sources(project)
    seen = [batch_fingerprint(project, "d.000000")]
    assert batch_fingerprint(project, "d.000000") == seen[0]
    write(tmp_path, "labels.csv", text="path,kind\na.mp4,y\n")
    seen.append(batch_fingerprint(project, "d.000000"))
    write(tmp_path / "d", "b.mp4")
    update_sources(project)
    seen.append(batch_fingerprint(project, "d.000000"))
    (tmp_path / "d" / "b.mp4").unlink()
    update_sources(project)
    seen.append(batch_fingerprint(project, "d.000000"))
    assert len(set(seen)) == 4


def test_acceptance_is_kept_beside_the_data(own_copy: Callable[..., Project]) -> None:
    project = own_copy()
    assert accepted(project.root) is None
    given = accept(project.root, project.asked, "ab" * 16, {})
    assert accepted(project.root) == given
    assert (given.encoding, given.curation) == ("ab" * 16, project.corpus.curation_digest())
    Path(project.root.accepted()).write_text('{"encoding": 1}')
    with pytest.raises(CorpusError, match="damaged or from an older version"):
        accepted(project.root)


def test_tables_of_sources_keep_their_schema(project: Project) -> None:
    update_sources(project)
    for batch in project.root.batches():
        Sources.validate(tables.read_table(project.root.table("sources", batch), Sources))


def test_what_is_made_within_a_datasets_folder_is_no_source(tmp_path: Path) -> None:
    write(tmp_path, "d/b.mp4", "d/made/previews/x.jpg", "d/made2/c.mp4")
    project = write_project(tmp_path, {"d": {"uri": "d"}}, root=str(tmp_path / "d" / "made"))
    assert list_dataset(project, "d").files["path"].to_list() == ["b.mp4", "made2/c.mp4"]
