"""`..`, absolute paths and foreign protocols in whatever names a file: tables, records and configurations that travel.

Every path of the project is built by DataRoot, which refuses names that lead out; records with a valid seal are no
exception, since anybody can seal one again. URLs have protocols of an allow-list, and a refused one opens no
connection.
"""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nextvid.config.corpus import load_corpus
from nextvid.config.project import Project
from nextvid.corpus.draft import draft_corpus
from nextvid.corpus.sources import update_sources
from nextvid.features.make import find_files
from nextvid.making.publishing import read_latest
from nextvid.train.run import find_run
from nextvid.trainset.mask_plan import read_files
from nextvid.trainset.pull import pull
from nextvid.trainset.trainset import Trainset, make_trainset
from storage import atomic
from storage.errors import ConfigError, NExTVidError
from storage.records import publish_record
from storage.remote import PROTOCOLS, connect, refuse_protocol
from storage.root import DataRoot
from storage.shard_files import cited_parts
from storage.store import LatentStore
from tests.factories import FRAMES, Corpus, write_project, write_settings

HEX = "0" * 32
OUTSIDE = [
    "..",
    "../up",
    "/etc/passwd",
    "a/../../up",
    "a/b",
    "",
    ".",
    "a\0",
    "a\n",
    "films.000000/../../up",
    "A",
    "\u0430",
    "a\\..\\b",
    "%2e%2e",
]

PLACES: dict[str, Callable[[DataRoot, str], str]] = {
    "cap": lambda root, name: root.cap(name),
    "table": lambda root, name: root.table("clips", name),
    "checks": lambda root, name: root.checks("clips", name),
    "preview": lambda root, name: root.preview("clips", name),
    "pictures": lambda root, name: root.pictures(name),
    "store": lambda root, name: root.spec_folder(name),
    "latents' checks": lambda root, name: root.latents_checks(HEX, name),
    "part": lambda root, name: root.part(HEX, name, 4, 0),
    "part of a spec": lambda root, name: root.part(name, "films.000000", 4, 0),
    "trainset": lambda root, name: root.pointed("trainset", name),
    "mask plan": lambda root, name: root.pointed("mask_plan", name),
    "recipe": lambda root, name: root.recipe_folder(name),
    "run": lambda root, name: root.run("demo", name),
    "score": lambda root, name: root.probe("demo", HEX, 1, name, HEX),
    "encoder's score": lambda root, name: root.encoder_probe(name, HEX, "b", HEX),
    "samples": lambda root, name: root.samples("demo", name),
    "report": lambda root, name: root.report("demo", HEX, name),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_no_name_leads_out_of_a_root(tmp_path: Path, place: Callable[[DataRoot, str], str]) -> None:
    root = DataRoot.open(str(tmp_path / "root"))
    for name in OUTSIDE:
        with pytest.raises(ConfigError):
            place(root, name)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a small trainset, not to be changed."""
    made = Corpus(tmp_path_factory.mktemp("frozen"))
    films = made.rows("films.000000", 6)
    made.clips("films.000000", films)
    made.encode("films.000000", films)
    made.duplicates()
    make_trainset(made.project)
    return made.project


RECORDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a batch above": lambda r: r.update(batches=["../../up"]),
    "an absolute batch": lambda r: r.update(batches=["/etc"]),
    "a batch as a number": lambda r: r.update(batches=[7]),
    "no batch": lambda r: r.update(batches=[]),
    "a file above": lambda r: r["files"].update({"../secret": 0}),
    "an absolute file": lambda r: r["files"].update({"/etc/passwd": 0}),
    "files as a list": lambda r: r.update(files=["/etc/passwd"]),
    "a length above": lambda r: r.update(offsets={"f../../up": {"films": [0, 6]}}),
    "rows beyond the end": lambda r: r.update(offsets={f"f{FRAMES}": {"films": [0, 1 << 40]}}),
    "another digest": lambda r: r.update(digest="../../up"),
    "a spec that is none": lambda r: r.update(spec={"autoencoder": "../../up"}),
    "no spec": lambda r: r.pop("spec"),
}


@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS)
def test_a_trainset_from_elsewhere(frozen: Project, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Opened, checked, read and pulled; nothing is written beside the root that pulls."""
    source = DataRoot.open(str(tmp_path / "source" / "root"))
    digest = read_latest(frozen.root, "trainset")
    assert digest is not None
    copy_tree(Path(frozen.root.url), Path(source.url))
    (Path(source.pointed("trainset", digest)).parent / "secret").write_text("secret")
    path = f"{source.pointed('trainset', digest)}/trainset.json"
    record = json.loads(Path(path).read_text())
    del record["seal"]
    change(record)
    publish_record(path, record)
    other = write_project(tmp_path / "other", {"films": {"uri": "films"}})
    before = {file for file in tmp_path.rglob("*") if not file.is_relative_to(other.root.url)}
    with pytest.raises(NExTVidError):
        read_whole(source, digest)
    with pytest.raises(NExTVidError):
        pull(other, digest, source.url)
    assert {file for file in tmp_path.rglob("*") if not file.is_relative_to(other.root.url)} == before
    assert not Path("/up").exists()


def read_whole(root: DataRoot, digest: str) -> None:
    opened = Trainset.open(root, digest)
    opened.check()
    rows = {frames: opened.rows(frames) for frames in opened.lengths}
    list(cited_parts(LatentStore(root, opened.spec), opened.batches, rows))


def copy_tree(source: Path, target: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file():
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())


@pytest.mark.parametrize("name", ["../../up", "/etc", HEX + "/..", 7, None, ["a"], {"a": 1}])
def test_pointers(frozen: Project, tmp_path: Path, name: object) -> None:
    root = DataRoot.open(str(tmp_path / "root"))
    for noun in ("trainset", "duplicates", "latent_stats"):
        atomic.publish_json(root.latest(noun), {"digest": name})
    with pytest.raises(NExTVidError):
        Trainset.open(root)
    project = write_project(tmp_path, {"films": {"uri": "films"}})
    atomic.publish_json(project.root.latest_run("demo"), {"run": name})
    with pytest.raises(NExTVidError):
        find_run(project, "demo")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret"])
def test_files_of_a_mask_plan(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(NExTVidError):
        list(read_files(str(tmp_path / "plan"), {"files": {name: HEX}}))


URLS = [
    "simplecache::s3://bucket/a", "filecache::http://127.0.0.1:9/a", "blockcache::s3://bucket/a", "zip://a::s3://bucket/b",
    "zip://a.zip", "tar://a.tar", "libarchive://a", "github://owner:repo@main/x", "github://owner/x", "git://repo",
    "gist://x", "ftp://127.0.0.1:9/a", "sftp://127.0.0.1/a", "ssh://127.0.0.1/a", "smb://127.0.0.1/a", "webhdfs://h/a",
    "hdfs://h/a", "dask://a", "reference://a", "dir://a", "jupyter://a", "dbfs://a", "local:///etc", "FILE:///etc",
    "File:///etc", "file://127.0.0.1/etc", "file://localhost/etc", "file://etc/passwd", "S3://bucket", "data://x",
    "asyncwrapper://x", "generic://x", "s3::http://127.0.0.1:9/a", "://a", "javascript://a", "\x1b[31m://a", " s3://a",
]  # fmt: skip


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Every address that somebody wants to reach, which is none."""
    asked: list[object] = []

    def refuse(_: object, address: object) -> None:
        asked.append(address)
        raise OSError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: refuse(None, address))
    yield asked
    assert asked == []


@pytest.mark.parametrize("url", URLS)
def test_protocols_that_were_not_meant(tmp_path: Path, url: str, offline: list[object]) -> None:
    uri, file = {"uri": url}, {"layout": "csv", "file": url, "targets": {"class": "c"}}
    for datasets, more in (
        ({"d": uri}, {}),
        ({"d": {"uri": "d", "labels": file}}, {}),
        ({"d": {"uri": "d", "labels": file | {"file": "a.csv", "path_base": url}}}, {}),
        ({"d": {"uri": "d"}}, {"root": url}),
        ({"d": {"uri": "d"}}, {"runs_root": url}),
        ({"d": {"uri": "d"}}, {"encoding": {"autoencoder": url}}),
        ({"d": {"uri": "d"}}, {"encoders": {"e": {"family": "dinov2", "folder": url}}}),
    ):
        path = write_settings(tmp_path, datasets, **more)
        with pytest.raises(ConfigError, match=r"protocol|machine"):
            load_corpus(path)
    project = write_project(tmp_path / "other", {"d": {"uri": "d"}})
    for call in (
        lambda: find_files([url]),
        lambda: draft_corpus(url, str(tmp_path / "new.yaml")),
        lambda: pull(project, HEX, url),
    ):
        with pytest.raises(ConfigError, match=r"protocol|machine"):
            call()
    assert not (tmp_path / "new.yaml").exists()


def test_a_protocol_that_corpus_yaml_names_is_meant(tmp_path: Path) -> None:
    path = write_settings(tmp_path, {"d": {"uri": "sftp://host/a"}}, protocols=["sftp"])
    assert load_corpus(path).datasets["d"].uri == "sftp://host/a"
    for protocol in PROTOCOLS:
        refuse_protocol(f"{protocol}://bucket/a", "here")
    for place in ("/a/zip::b", "a/simplecache::b.mp4", "file:///a"):
        refuse_protocol(place, "here")


@pytest.mark.parametrize("url", ["github://a", "reference://a", "simplecache::s3://b/a", "nothing://a"])
def test_a_client_that_needs_more_is_one_error(url: str, offline: list[object]) -> None:
    with pytest.raises(ConfigError):
        connect(url)


def test_what_is_made_below_a_dataset_is_no_source(tmp_path: Path) -> None:
    project = write_project(tmp_path, {"d": {"uri": "."}}, root="made")
    for number in range(3):
        (tmp_path / "made" / "shots").mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / "shots" / f"{number}.png").write_bytes(b"x")
        update_sources(project)
    assert project.root.batches() == []
