"""Datasets of tar and parquet files: their members are files like others, up to the latents and their withdrawal."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import numpy as np
import polars as pl
import pytest

from nextvid.config.project import Project
from nextvid.corpus import members
from nextvid.corpus.media import make_media
from nextvid.corpus.sources import known_sources, list_dataset, update_sources
from nextvid.encode.frames import Decoding
from nextvid.lineage.withdraw import withdraw
from storage import remote, tables
from storage.digest import digest_bytes
from storage.errors import CorpusError
from storage.schemas import Clips, Media
from tests.factories import edit_project, make_corpus, write_project
from tests.nextvid.corpus.archives import write_parquet, write_tar
from tests.nextvid.corpus.small_media import FPS, scene, write_film, write_picture

BATCH = "d.000000"


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, bytes]:
    for name in ("a", "b", "c"):
        write_picture(tmp_path / "plain" / f"{name}.jpg", name)
    return {path.name: path.read_bytes() for path in sorted((tmp_path / "plain").iterdir())}


def media_of(project: Project, batch: str = BATCH) -> dict[str, dict[str, Any]]:
    assert make_media(project, batch).checks[0].passed
    table = tables.read_table(project.root.table("media", batch), Media)
    return {row["path"]: row for row in table.sort("revision").iter_rows(named=True)}


def test_members_are_listed_once_and_again_when_their_archive_changes(
    tmp_path: Path, pictures: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = write_tar(tmp_path / "d" / "x" / "0.tar", [*pictures.items(), ("a.json", b"{}")])
    (tmp_path / "d" / "own.jpg").write_bytes(pictures["a.jpg"])
    project = write_project(tmp_path, {"d": {"uri": "d"}})
    assert list_dataset(project, "d").ignored == {".tar": 1}, "unless the dataset says so"
    project = edit_project(project.path, lambda said: said["datasets"]["d"].update(tar=True))
    assert update_sources(project, settle=True) == [], "a tar file may still be written"
    assert [change.added for change in update_sources(project, settle=True)] == [4]
    listing = list_dataset(project, "d")
    paths = ["own.jpg", "x/0.tar!/a.jpg", "x/0.tar!/b.jpg", "x/0.tar!/c.jpg"]
    assert listing.files["path"].to_list() == paths
    assert listing.files["uri"].to_list() == [str(tmp_path / "d" / path) for path in paths]
    assert listing.ignored == {".json": 1}
    with monkeypatch.context() as patch:
        patch.setattr(members, "index", lambda *_: pytest.fail("it is as it was"))
        assert update_sources(project) == []
    write_tar(tar, list(pictures.items())[:2])
    (change,) = update_sources(project)
    assert (change.changed, change.gone) == (2, 1)
    media = media_of(project)
    assert {row["media_id"] for row in media.values() if row["status"] == "ok"} == {
        media["own.jpg"]["media_id"],
        media["x/0.tar!/b.jpg"]["media_id"],
    }
    shutil.rmtree(tar.parent)
    assert [change.gone for change in update_sources(project)] == [2]


def test_what_is_wrong_with_an_archive_is_a_row_and_nothing_is_gone(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    tar = write_tar(tmp_path / "d" / "0.tar", [*pictures.items(), ("b.jpg", pictures["a.jpg"])])
    project = write_project(tmp_path, {"d": {"uri": "d", "tar": True, "quarantine_budget": 1.0}})
    update_sources(project)
    media = media_of(project)
    assert media["0.tar!/b.jpg"]["reason"] == "doubled_member"
    assert [media[f"0.tar!/{name}.jpg"]["status"] for name in "abc"] == ["ok", "rejected", "ok"]
    write_tar(tar, list(pictures.items()))
    os.truncate(tar, 512 + len(pictures["a.jpg"]) + 1024)
    update_sources(project)
    media = media_of(project)
    assert (media["0.tar"]["status"], media["0.tar"]["reason"]) == ("quarantined", "damaged_archive")
    assert "it is cut off within b.jpg; what can be read before is listed" in media["0.tar"]["error"]
    assert known_sources(project, "d")["gone_at"].null_count() == known_sources(project, "d").height
    write_tar(tar, list(pictures.items()))
    update_sources(project)
    media = media_of(project)
    assert [media[f"0.tar!/{name}.jpg"]["status"] for name in "abc"] == ["ok"] * 3
    present = known_sources(project, "d").filter(pl.col("gone_at").is_null())
    assert "0.tar" not in present["path"].to_list()
    (tmp_path / "outside").mkdir()
    shutil.move(tar, tmp_path / "outside" / "0.tar")
    tar.symlink_to(tmp_path / "outside" / "0.tar")
    os.utime(tar)
    update_sources(project)
    assert media_of(project)["0.tar!/a.jpg"]["reason"] == "outside"


def test_an_archive_of_an_object_store_is_copied_once_a_stage(
    tmp_path: Path, pictures: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, copied = fsspec.filesystem("memory"), list[str]()
    real = remote.get_file

    def counted(uri: str, local: str) -> None:
        copied.append(uri)
        real(uri, local)

    monkeypatch.setattr(remote, "get_file", counted)
    try:
        fs.pipe_file("/archived/0.tar", write_tar(tmp_path / "0.tar", list(pictures.items())).read_bytes())
        parquet = write_parquet(tmp_path / "1.parquet", list(pictures.items()))
        fs.pipe_file("/archived/1.parquet", parquet.read_bytes())
        dataset = {"uri": "memory://archived", "tar": True, "parquet_column": "image"}
        project = write_project(tmp_path, {"d": dataset})
        update_sources(project)
        media = media_of(project)
    finally:
        fs.rm("/archived", recursive=True)
    assert len(media) == 6
    assert {row["status"] for row in media.values()} == {"ok"}
    assert media["1.parquet!/image/0000002/c.jpg"]["media_id"] == media["0.tar!/c.jpg"]["media_id"]
    assert sorted(copied) == ["memory://archived/0.tar", "memory://archived/1.parquet"]


def test_a_data_set_of_the_hub_is_a_folder(
    tmp_path: Path, pictures: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a server that answers what the Hub's client asks: repository, tree, content."""
    parquet = write_parquet(tmp_path / "x.parquet", list(pictures.items())[:2]).read_bytes()
    files = {"data/x.parquet": parquet, "data/c.jpg": pictures["c.jpg"], "README.md": b"a card"}
    with hub(files) as endpoint:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": endpoint})
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # this server is on this machine
        project = write_project(tmp_path, {"d": {"uri": "hf://datasets/me/pets", "parquet_column": "image"}})
        update_sources(project)
        media = media_of(project)
        inside = [f"data/x.parquet!/image/{row:07d}/{name}.jpg" for row, name in enumerate("ab")]
        assert {path: row["status"] for path, row in media.items()} == dict.fromkeys(["data/c.jpg", *inside], "ok")
        assert media["data/c.jpg"]["uri"] == "hf://datasets/me/pets/data/c.jpg"
        files["data/c.jpg"] = pictures["a.jpg"]
        assert [change.changed for change in update_sources(project)] == [1], "listings are not remembered"


@contextmanager
def hub(files: dict[str, bytes]) -> Iterator[str]:
    """The Hub, of one data set."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0].removeprefix("/api").removeprefix("/datasets/me/pets")
            what, _, rest = path.removeprefix("/").partition("/main")
            match what:
                case "tree":
                    self.answer(json.dumps(tree(unquote(rest).strip("/"))).encode(), "application/json")
                case "resolve":
                    self.answer(files[rest.strip("/")], "application/octet-stream")
                case _:
                    self.answer(json.dumps({"id": "me/pets", "sha": "0" * 40}).encode(), "application/json")

        def answer(self, data: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    def tree(folder: str) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        here = {name.removeprefix(prefix): data for name, data in files.items() if name.startswith(prefix)}
        folders = {name.split("/")[0] for name in here if "/" in name}
        return [{"type": "directory", "path": prefix + name, "oid": "0" * 40} for name in folders] + [
            {"type": "file", "path": prefix + name, "size": len(data), "oid": digest_bytes(data)}
            for name, data in here.items()
            if "/" not in name
        ]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_column_that_is_not_there_stops_the_dataset_by_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d" / "x.parquet", [("a.jpg", b"1")])
    project = write_project(tmp_path, {"d": {"uri": "d", "parquet_column": "video"}})
    with pytest.raises(
        CorpusError, match=r"dataset d: .*x.parquet has no column 'video' of files.*; it has image, label"
    ):
        list_dataset(project, "d")


def test_clips_of_members_are_those_of_the_files_and_are_withdrawn_like_them(tmp_path: Path) -> None:
    """A film and a picture by themselves, and in a tar and a parquet file: the same row ids and the same frames."""
    write_film(tmp_path / "plain" / "film.mp4", [scene("film", 2 * FPS)])
    write_picture(tmp_path / "plain" / "still.jpg", "still")
    film, still = ((tmp_path / "plain" / name).read_bytes() for name in ("film.mp4", "still.jpg"))
    write_tar(tmp_path / "packed" / "0.tar", [("film.mp4", film)])
    write_parquet(tmp_path / "packed" / "1.parquet", [(None, still)])
    clips: list[Any] = [{"frames": 4, "fps": 4}, {"frames": 1}]
    datasets: dict[str, Any] = {name: {"uri": name, "weight": 1.0, "clips": clips} for name in ("plain", "packed")}
    datasets["packed"] |= {"tar": True, "parquet_column": "image"}
    filters = dict.fromkeys(("motion_min", "motion_max", "luma_min", "luma_max", "blur_min", "freeze_max"))
    project = write_project(tmp_path, datasets, curation={"filters": filters})
    assert all(outcome.passed for outcome in make_corpus(project).values())

    def rows(status: str) -> pl.DataFrame:
        return tables.read_tables(project.root, "clips", None, Clips).filter(status=status).sort("row_id")

    good = {dataset: rows("ok").filter(dataset=dataset) for dataset in datasets}
    assert good["plain"]["row_id"].to_list() == good["packed"]["row_id"].to_list()
    assert set(good["plain"]["kind"]) == {"video", "image"}
    with Decoding(1) as decoding:
        plain, packed = (decoding.start(good[dataset], 64).collect() for dataset in ("plain", "packed"))
    assert plain.keys() == packed.keys() == set(good["plain"]["row_id"])
    for row, decoded in plain.items():
        np.testing.assert_array_equal(decoded.frames, packed[row].frames)
    uri = str(tmp_path / "packed" / "0.tar!/film.mp4")
    assert withdraw(project, uri, yes=True).rows == good["plain"].filter(kind="video").height
    make_corpus(project)
    assert set(rows("rejected")["uri"]) == {uri, str(tmp_path / "plain" / "film.mp4")}, "and its copy"
    assert set(rows("rejected")["reason"]) == {"withdrawn"}


def test_licences_come_from_a_column_and_those_that_are_not_named_are_rejected(
    tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    lines = ["path,terms", "a.jpg,CC0-1.0", "b.jpg,", "c.jpg,to be asked"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    labels = {"layout": "csv", "file": "list.csv", "licence_column": "terms"}
    project = write_project(tmp_path, {"d": {"uri": "plain", "licence": "CC-BY-4.0", "labels": labels}})
    before = project.corpus.curation_digest("d")
    update_sources(project)
    found = media_of(project)
    assert {path: row["licence"] for path, row in found.items()} == {
        "a.jpg": "CC0-1.0", "b.jpg": "CC-BY-4.0", "c.jpg": "to be asked",
    }  # fmt: skip
    assert {row["status"] for row in found.values()} == {"ok"}
    named = ["CC0-1.0", "CC-BY-4.0"]
    project = edit_project(project.path, lambda said: said["datasets"]["d"].update(licences=named))
    assert project.corpus.curation_digest("d") != before, "so that batches are made again"
    found = media_of(project)
    assert [found[f"{name}.jpg"]["reason"] for name in "abc"] == [None, None, "licence"]
    assert "its licence is 'to be asked'" in found["c.jpg"]["error"]
    project = edit_project(project.path, lambda said: said["datasets"]["d"].pop("licences"))
    assert media_of(project)["c.jpg"]["status"] == "ok"
    (tmp_path / "list.csv").write_text("\n".join(lines[:1]))
    assert {row["licence"] for row in media_of(project).values()} == {"CC-BY-4.0"}
