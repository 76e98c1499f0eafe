"""A project on S3 from sources to a few training steps, equal row for row to the same project on a file system."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from nextvid.config.project import Project
from nextvid.corpus.sources import known_sources, update_sources
from nextvid.lineage.sweep import sweep
from nextvid.lineage.trace import trace
from nextvid.lineage.withdraw import withdraw
from nextvid.make import Request, make
from nextvid.trainset.pull import pull
from nextvid.trainset.trainset import Trainset
from storage import atomic, listing, remote
from storage.errors import CorpusError, NExTVidError, RefusedError
from storage.store import LatentStore, PixelStore, every_store
from tests.factories import SIDE, write_project
from tests.nextvid.encode.small_corpus import texture, write_video
from tests.nextvid.tiny_project import FRAMES, OVERRIDES, train_steps
from tests.nextvid.train.corpus import loading, make_project
from tests.nextvid.train.tiny import latents_of, tiny_recipe
from tests.services.s3.proxy import Asked, Fault, Proxy

pytestmark = pytest.mark.services

PIXELS = (*OVERRIDES, "model.encoder.input=pixels", "model.patch=8")
FILMS, STILLS = 4, 16  # statistics want a thousand values a channel


def write_files(folder: Path) -> None:
    """A few moving textures and pictures."""
    for name in ("films", "stills"):
        (folder / name).mkdir(parents=True)
    for number in range(FILMS):
        write_video(folder / "films" / f"{number}.mp4", texture(number))
    for number in range(STILLS):
        Image.fromarray(texture(50 + number, 1)[0]).save(folder / "stills" / f"{number}.png")


def upload(folder: Path, url: str, names: Sequence[str] = ("films", "stills")) -> None:
    for name in names:
        for path in sorted((folder / name).iterdir()):
            atomic.publish_bytes(f"{url}/{name}/{path.name}", path.read_bytes())


def project_of(folder: Path, files: str, root: str, autoencoder: Path, cache_gb: float = 1.0) -> Project:
    clips = [{"frames": FRAMES, "fps": 4, "crop": "random", "views": 2}]
    encoding = {"autoencoder": str(autoencoder), "resolution": SIDE, "pixels": {"quality": 90}}
    return write_project(
        folder,
        {
            "films": {"uri": f"{files}/films", "weight": 0.9, "clips": clips, "split": {"test": 0}},
            "stills": {"uri": f"{files}/stills", "weight": 0.1, "clips": [{"frames": 1}], "split": {"test": 0}},
        },
        root=root,
        runs_root=str(folder / "runs"),
        cache={"folder": str(folder / "cache"), "size_gb": cache_gb},
        encoding=encoding,
        execution={"batch_frames": 16, "device": "cpu"},
    )


def trained(project: Project, overrides: Sequence[str] = OVERRIDES) -> list[float]:
    """Losses of a few steps from the project's trainset, after its mask plan."""
    folder = train_steps(project, overrides)
    lines = (json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def copies(folder: Path) -> list[Path]:
    """The copies in a project's cache."""
    kept = (path for path in (folder / "cache").rglob("*") if path.is_file())
    return [path for path in kept if path.suffix not in (".lock", ".sqlite")]


def rows(project: Project, noun: str, batch: str) -> pl.DataFrame:
    """A table without what differs by place and time."""
    table = pl.read_parquet(atomic.read_bytes(f"{project.root.url}/{noun}/{batch}.parquet"))
    return table.drop([name for name in ("uri", "error") if name in table.columns])


def test_from_sources_to_training(bucket: str, repository: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)  # as many as the trainer's process has beside others; two that spin for two cores stall
    write_files(tmp_path / "files")
    autoencoder = repository / "examples" / "demo" / "autoencoder"
    upload(tmp_path / "files", f"{bucket}/files")
    local = project_of(tmp_path / "local", str(tmp_path / "files"), str(tmp_path / "root"), autoencoder)
    remote_one = project_of(tmp_path / "s3", f"{bucket}/files", f"{bucket}/corpus", autoencoder)
    for project in (local, remote_one):
        outcomes = list(make(project, Request("trainset")))
        assert all(outcome.passed for outcome in outcomes)
    for noun in ("media", "shots", "clips"):
        for batch in ("films.000000", "stills.000000"):
            assert rows(remote_one, noun, batch).equals(rows(local, noun, batch)), (noun, batch)
    here, there = Trainset.open(local.root), Trainset.open(remote_one.root)
    assert there.digest == here.digest
    assert there.lengths == here.lengths == (1, FRAMES)
    for frames in here.lengths:
        np.testing.assert_array_equal(there.rows(frames), here.rows(frames))
        assert isinstance(there.rows(frames), np.memmap)
    stores = every_store(remote_one.root)
    assert [type(store) for store in stores] == [LatentStore, PixelStore]
    assert [store.verify() for store in stores] == [[], []]
    losses, of_pixels = trained(local), trained(local, PIXELS)
    assert len(losses) == len(of_pixels) == 5
    assert losses != of_pixels
    assert trained(remote_one) == losses  # from whole shards in the cache
    assert len(copies(tmp_path / "s3")) == 4  # a shard and a row file of each length
    assert trained(remote_one, PIXELS) == of_pixels  # pixels in, latents out
    assert len(copies(tmp_path / "s3")) == 8
    ranged = project_of(tmp_path / "ranged", f"{bucket}/files", f"{bucket}/corpus", autoencoder, 0)
    assert trained(ranged) == losses  # from ranges
    assert trained(ranged, PIXELS) == of_pixels
    assert not (tmp_path / "ranged" / "cache").exists()
    here_files, there_files = (
        {path.removeprefix(root) for path in listing.files_below(root) if "/duplicates/" not in path}  # digest of URIs
        for root in (local.root.url, remote_one.root.url)
    )
    assert there_files - {f"/{remote.EXCLUSIVE}"} == {path for path in here_files if not path.endswith("/lock")}
    assert all(outcome.made is False for outcome in make(remote_one, Request("trainset")))  # nothing new makes nothing
    _withdraw_and_sweep(remote_one, f"{bucket}/files/films/0.mp4")


def _withdraw_and_sweep(project: Project, uri: str) -> None:
    """The one change in place, and the one deletion, on a bucket too."""
    assert trace(project, uri).kind == "file"
    withdrawal = withdraw(project, uri, yes=True)
    assert withdrawal.stored == 4  # two views, latents and pixels
    assert [store.verify() for store in every_store(project.root)] == [[], []]
    for overrides in (OVERRIDES, PIXELS):
        with pytest.raises(RefusedError, match="withdrawn"):
            trained(project, overrides)
    assert sweep(project, yes=True).deleted == ()


def test_a_trainset_is_pulled_from_a_bucket_and_into_one(
    bucket: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder into a bucket, from there into another, and into a folder: each trains as the first."""
    before = make_project(tmp_path / "source")
    trainset, publish = Trainset.open(before.root).digest, atomic.publish_bytes
    with loading(before, tiny_recipe()) as loader:
        wanted = [latents_of(batch).clone() for batch in loader.batches(0)]
    for root in (f"{bucket}/pulled/1", f"{bucket}/pulled/2", str(tmp_path / "root")):
        folder = tmp_path / root.rpartition("/")[2]
        clips = {"weight": 1.0, "clips": [{"frames": FRAMES, "fps": 4}]}
        encoding = {"autoencoder": "none", "resolution": SIDE}
        project = write_project(
            folder, {"films": {"uri": "films"} | clips}, root=root, runs_root=str(folder / "runs"), encoding=encoding
        )
        with monkeypatch.context() as stopped:
            stopped.setattr(atomic, "publish_bytes", lambda path, data: _second_shard_stops(path, data, publish))
            with pytest.raises(KeyboardInterrupt):
                pull(project, trainset, before.root.url)
        assert pull(project, trainset, before.root.url).shards == 3
        assert [store.verify() for store in every_store(project.root)] == [[]]
        proxy.clear()
        assert pull(project, trainset, before.root.url).copied == 0
        assert not [asked for asked in proxy.asked if "/c." in asked.path and asked.method == "GET"]
        with loading(project, tiny_recipe()) as loader:
            assert all(latents_of(batch).equal(one) for batch, one in zip(loader.batches(0), wanted, strict=True))
        before = project


def _second_shard_stops(path: str, data: bytes, publish: Callable[[str, bytes], None]) -> None:
    if "/c." in path and "/pictures.000000/" in path:
        raise KeyboardInterrupt
    publish(path, data)


def listed(project: Project) -> pl.DataFrame:
    return known_sources(project, "films")


@pytest.fixture
def found(bucket: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Files on S3 that were listed once; the root is local."""
    monkeypatch.setattr(remote, "WAITS_S", (0.01,) * len(remote.WAITS_S))
    (tmp_path / "autoencoder").mkdir()
    project = project_of(tmp_path / "p", f"{bucket}/files", str(tmp_path / "root"), tmp_path / "autoencoder")
    for number in range(5):
        atomic.publish_bytes(f"{bucket}/files/films/{number}.mp4", b"film" * (number + 1))
    atomic.publish_bytes(f"{bucket}/files/films/deep/er/9.mp4", b"film")
    atomic.publish_bytes(f"{bucket}/files/stills/0.png", b"still")
    update_sources(project)
    proxy.clear()
    return project


def test_files_on_s3_are_found_and_followed(found: Project, bucket: str) -> None:
    known = listed(found)
    assert known["path"].to_list() == ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "4.mp4", "deep/er/9.mp4"]
    assert known["size_bytes"].to_list() == [4, 8, 12, 16, 20, 4]
    assert known["fingerprint"].str.starts_with("ETag").all()
    assert update_sources(found) == []
    atomic.publish_bytes(f"{bucket}/files/films/1.mp4", b"filX" * 2)  # same size, other bytes
    atomic.publish_bytes(f"{bucket}/files/films/new.mp4", b"new")
    atomic.remove_tree(f"{bucket}/files/films/0.mp4")
    (change,) = update_sources(found)
    assert (change.batch, change.added, change.changed, change.gone) == ("films.000000", 1, 1, 1)


def test_keys_that_no_path_has_are_listed_as_they_are(found: Project, bucket: str) -> None:
    keys = ("a//b.mp4", "a///c.mp4", "/top.mp4", "a::b.mp4", "zip::d/e.mp4", "a?b.mp4", "50% #1 [x]*.mp4")
    fs, _ = remote.connect(bucket)
    for key in (*keys, "marker.mp4/"):
        fs.pipe_file(f"{bucket.removeprefix('s3://')}/files/films/{key}", b"film")
    update_sources(found)
    known = listed(found)
    assert set(keys) < set(known["path"])
    assert "marker.mp4/" not in known["path"].to_list()
    for key in keys:
        remote.get_file(f"{bucket}/files/films/{key}", os.devnull)
    assert update_sources(found) == []


def test_a_file_joins_when_it_held_still(found: Project, bucket: str) -> None:
    atomic.publish_bytes(f"{bucket}/files/films/new.mp4", b"half")
    assert update_sources(found, settle=True) == []
    atomic.publish_bytes(f"{bucket}/files/films/new.mp4", b"half and half")
    assert update_sources(found, settle=True) == []
    (change,) = update_sources(found, settle=True)
    assert change.added == 1


def a_listing(asked: Asked) -> bool:
    return asked.method == "GET" and "list-type=2" in asked.path


def deeper(asked: Asked) -> bool:
    return a_listing(asked) and "deep%2Fer" in asked.path


FAILURES = {
    "credentials gone": Fault(a_listing, status=403, code="AccessDenied"),
    "key revoked": Fault(a_listing, status=403, code="InvalidAccessKeyId"),
    "bucket gone": Fault(lambda _: True, status=404, code="NoSuchBucket"),
    "server error": Fault(a_listing, status=500),
    "reset": Fault(a_listing, reset=True),
    "a folder below fails": Fault(deeper, status=403, code="AccessDenied"),
    "cut answer": Fault(a_listing, cut=100),
    "not XML": Fault(a_listing, change=lambda data: data[: len(data) // 2]),
    "empty where files were": Fault(a_listing, change=lambda data: b"<ListBucketResult></ListBucketResult>"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_listing_that_fails_deletes_nothing(found: Project, proxy: Proxy, failure: Fault) -> None:
    before = listed(found)
    proxy.faults.append(failure)
    with pytest.raises(CorpusError, match="films") as caught:
        update_sources(found)
    assert isinstance(caught.value, NExTVidError)
    assert "not-a-secret" not in str(caught.value)
    proxy.clear()
    assert listed(found).equals(before)
    assert listed(found)["gone_at"].null_count() == before.height
    assert update_sources(found) == []


def test_the_second_page_of_a_listing_counts(found: Project, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of two: all are read, and a later one that fails is a failure of the whole."""
    from s3fs import S3FileSystem

    real = S3FileSystem._call_s3

    async def call_s3(self: S3FileSystem, method: str, *args: object, **kwargs: object) -> object:
        pages = {"MaxKeys": 2} if method == "list_objects_v2" else {}
        return await real(self, method, *args, **kwargs, **pages)

    monkeypatch.setattr(S3FileSystem, "_call_s3", call_s3)
    assert update_sources(found) == []
    assert sum("continuation-token" in asked.path for asked in proxy.asked) >= 2
    proxy.faults.append(Fault(lambda asked: "continuation-token" in asked.path, status=403, code="AccessDenied"))
    with pytest.raises(CorpusError, match="films"):
        update_sources(found)
