"""storage/seal.py: a sealed part says what its commits say, whatever changes them, and costs a few requests."""

import json
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import atomic, listing, tables
from storage.errors import DamagedError, StoreError, TableError
from storage.part import Part
from storage.root import DataRoot
from storage.schemas import Commits
from storage.seal import VERSION, read_seal, seal_part
from storage.shard import ROWS_PER_SHARD, row_format
from storage.store import LatentStore, PixelStore, Store
from tests.factories import commits, flip, unchanged
from tests.forked import Forks, parent_of
from tests.storage.pixel_stores import pixel_store
from tests.storage.read_only import read_only
from tests.storage.stores import BATCH, FRAMES, full_store, ids, new_store, write

CALLS = ("ls", "info", "cat_file", "find", "pipe_file", "put_file")


def by_commits(store: Store[Any], batch: str = BATCH) -> pl.DataFrame:
    """The slow reference: every commit of a batch, one after the other, whatever is sealed."""
    found = [part.commit(number) for part in store.parts_of(batch) for number in part.committed_shards()]
    return pl.concat([row_format(store.spec, 1).schema.create_empty(), *found])


def same(store: Store[Any]) -> bool:
    """Whether the store reads what the reference does."""
    wanted = by_commits(store)
    return store.commits(BATCH).select(wanted.columns).equals(wanted)


@pytest.fixture
def sealed(data_root: DataRoot) -> tuple[LatentStore, Part[Any]]:
    """A part of two shards, sealed, and its commits hidden from whoever does not ask for them by name."""
    store, part = full_store(data_root, ROWS_PER_SHARD + 5, failed=ids(2))
    store.seal(BATCH)
    assert read_seal(part) is not None
    return store, part


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each call of fsspec's memory file system, the bucket here, was made."""
    found: Counter[str] = Counter()

    def counted(name: str) -> None:
        real = getattr(MemoryFileSystem, name)

        def call(self: MemoryFileSystem, *args: Any, **named: Any) -> Any:
            found[name] += 1
            return real(self, *args, **named)

        monkeypatch.setattr(MemoryFileSystem, name, call)

    for name in CALLS:
        counted(name)
    return found


class TestReading:
    @settings(max_examples=6)
    @given(rows=st.sampled_from([1, ROWS_PER_SHARD, ROWS_PER_SHARD + 3]), failing=st.sets(st.integers(0, 258)))
    def test_a_sealed_part_reads_as_its_commits(
        self, tmp_path_factory: pytest.TempPathFactory, rows: int, failing: set[int]
    ) -> None:
        root = DataRoot.open(str(tmp_path_factory.mktemp("seal")))
        failed = [ids(259)[n] for n in failing]
        for store, _ in (full_store(root, rows, failed), pixel_store(root, min(rows, 5), failed)):
            before = store.commits(BATCH)
            store.seal(BATCH)
            assert store.commits(BATCH).equals(before)
            assert store.commits(BATCH, FRAMES, ["crc32c"]).equals(
                before.select("row_id", "slot", "status", "crc32c", "batch", "frames", "part", "shard")
            )
            assert same(store)
            assert store.verify() == []

    def test_of_a_sealed_part_no_commit_is_read(self, sealed: tuple[LatentStore, Part[Any]]) -> None:
        store, part = sealed
        before = store.commits(BATCH)
        for number in range(part.shards):
            flip(part.commit_path(number), 90)
        assert store.commits(BATCH).equals(before)
        assert store.unfinished(BATCH, FRAMES) is None
        assert {problem.file for problem in store.verify()} == {part.commit_path(0), part.commit_path(1)}

    def test_sealing_again_writes_nothing(self, sealed: tuple[LatentStore, Part[Any]]) -> None:
        store, part = sealed
        with unchanged(part.path):
            store.seal(BATCH)

    def test_an_open_part_is_not_sealed(self, data_root: DataRoot) -> None:
        store = new_store(data_root)
        part = store.plan_part(BATCH, FRAMES, ids(ROWS_PER_SHARD + 5))
        write(part, 1)
        assert not seal_part(part)
        assert read_seal(part) is None
        write(part, 0)
        assert seal_part(part)

    def test_where_nothing_may_be_written_commits_are_read(self, data_root: DataRoot) -> None:
        store, part = full_store(data_root, 5)
        with read_only(data_root.url) as refused:
            assert not seal_part(part)
            assert refused
            assert same(store)

    @pytest.mark.parametrize("shards", [2, 300])
    def test_requests_of_a_bucket_do_not_grow_with_shards(
        self, tmp_path: Path, calls: Counter[str], shards: int
    ) -> None:
        """Nine for the rows of two parts; planning reads no table."""
        store = new_store(DataRoot.open(f"memory://{tmp_path.name}", str(tmp_path / "runs")))
        for count, first in ((shards, 0), (1, 10**6)):
            part = store.plan_part(BATCH, FRAMES, ids(count * ROWS_PER_SHARD, first))
            pieces = {part.commit_path(n): commits(part.rows_of(n), crc32c=n) for n in range(part.shards)}
            tables.write_many(pieces, Commits)
        calls.clear()
        assert store.commits(BATCH).height == (shards + 1) * ROWS_PER_SHARD
        assert calls["cat_file"] > shards  # not sealed yet
        store.seal(BATCH)
        calls.clear()
        assert store.commits(BATCH)["shard"].n_unique() == shards
        assert calls == {"ls": 5, "cat_file": 4}  # the batch, its parts twice, commits of each; two files of each part
        calls.clear()
        assert len(store.seals(BATCH)) == 2
        assert calls == {"ls": 5, "cat_file": 2}
        calls.clear()
        assert store.unfinished(BATCH, FRAMES) is None
        store.seal(BATCH)
        assert calls["cat_file"] == 4
        assert sum(calls.values()) <= 20


class TestChanges:
    def test_a_repaired_shard_opens_the_part(self, sealed: tuple[LatentStore, Part[Any]]) -> None:
        """As `verify` tells a person to: the commit is removed by hand, the shard is written again."""
        store, part = sealed
        Path(part.commit_path(1)).unlink()
        assert read_seal(part) is None
        assert store.commits(BATCH).height == ROWS_PER_SHARD
        assert store.unfinished(BATCH, FRAMES) is not None
        write(part, 1, failed=ids(5, ROWS_PER_SHARD))
        assert read_seal(part) is None
        assert same(store)
        store.seal(BATCH)
        assert same(store)
        assert store.commits(BATCH).filter(status="ok").height == ROWS_PER_SHARD - 2

    def test_a_swept_shard_opens_the_part(self, sealed: tuple[LatentStore, Part[Any]]) -> None:
        store, part = sealed
        part.discard(1)
        assert read_seal(part) is None
        store.seal(BATCH)
        assert same(store)
        assert store.commits(BATCH).filter(reason="swept").height == 5

    def test_a_withdrawal_changes_no_commit_and_no_seal(self, sealed: tuple[LatentStore, Part[Any]]) -> None:
        _, part = sealed
        before = read_seal(part)
        part.erase([3])
        assert read_seal(part) == before is not None

    def test_new_rows_are_a_new_part(self, sealed: tuple[LatentStore, Part[Any]]) -> None:
        store, part = sealed
        write(store.plan_part(BATCH, FRAMES, ids(3, first=900)), 0)
        assert read_seal(part) is not None
        assert same(store)

    def test_a_seal_that_was_overtaken_in_a_bucket_does_not_count(self, tmp_path: Path) -> None:
        """Without locks a maker may seal commits that a sweep replaces at the same moment: their sizes differ."""
        store, part = full_store(DataRoot.open(f"memory://{tmp_path.name}", str(tmp_path / "runs")), 5)
        store.seal(BATCH)
        stale = {path: atomic.read_bytes(path) for path in (part.seal_path, part.sealed_path)}
        part.discard(0)
        for path, data in stale.items():
            atomic.publish_bytes(path, data)
        assert read_seal(part) is None
        assert same(store)
        store.seal(BATCH)
        assert read_seal(part) is not None
        assert same(store)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with parent_of(Path(__file__).resolve().parents[2], ["zarr", "tests.storage.writers"]) as found:
        yield found


@pytest.mark.parametrize("what", ["seal_and_sweep_until", "repair_until"])
def test_kill_at_each_step(tmp_path: Path, forks: Forks, what: str) -> None:
    """SIGKILL at every call that gives or takes a name: readers see the commits, and the next maker ends the work."""
    whole, part = full_store(DataRoot.open(str(tmp_path / "whole")), 5)
    if what == "repair_until":
        whole.seal(BATCH)
        Path(part.commit_path(0)).unlink()
    kills = 0
    for nth in range(1, 100):
        root = DataRoot.open(str(tmp_path / "root"))
        shutil.copytree(whole.root.url, root.url)
        store = LatentStore(root, whole.spec)
        more = [str(tmp_path / "said")] if what == "repair_until" else []
        forks.start("tests.storage.writers", what, root.url, *more, nth)
        ended = forks.ended()
        kills += ended == -signal.SIGKILL
        assert same(store), f"after call {nth}"
        forks.call("tests.storage.writers", what, root.url, *more, 0)
        (part,) = store.parts_of(BATCH)
        assert read_seal(part) is not None
        assert same(store), f"sealed after call {nth}"
        assert store.verify() == []
        shutil.rmtree(root.url)
        if ended == 0:
            break
    assert kills > 5


class TestBadSeals:
    def test_whose_commits_a_listing_does_not_show(
        self, sealed: tuple[LatentStore, Part[Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, _ = sealed
        real = listing.sizes
        monkeypatch.setattr(listing, "sizes", lambda *where: dict([*real(*where).items()][1:]))
        with pytest.raises(
            StoreError, match=r"000000\.parquet is there, and its folder was listed without it: .*run again"
        ):
            store.commits(BATCH)

    def test_of_a_newer_version(self, sealed: tuple[LatentStore, Part[Any]]) -> None:
        store, part = sealed
        record = json.loads(Path(part.seal_path).read_text())
        Path(part.seal_path).write_text(json.dumps({**record, "version": VERSION + 1, "columns": ["x"]}))
        with pytest.raises(
            StoreError, match=r"sealed\.json was written by a newer version of nextvid .*update nextvid"
        ):
            store.commits(BATCH)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', "null", '{"version": "x"}'])
    def test_that_is_none(self, sealed: tuple[LatentStore, Part[Any]], text: str) -> None:
        store, part = sealed
        Path(part.seal_path).write_text(text)
        with pytest.raises(DamagedError, match=r"sealed\.json"):
            store.commits(BATCH)
        (problem,) = store.verify()
        assert problem.file == part.seal_path
        atomic.remove_tree(part.seal_path)
        assert same(store)

    @pytest.mark.parametrize("field", ["shards", "rows", "commits_bytes", "crc32c", "size_bytes"])
    def test_that_was_edited(self, sealed: tuple[LatentStore, Part[Any]], field: str) -> None:
        store, part = sealed
        record = json.loads(Path(part.seal_path).read_text())
        Path(part.seal_path).write_text(json.dumps({**record, field: record[field] - 1}))
        with pytest.raises(DamagedError, match="was changed"):
            store.commits(BATCH)

    def test_whose_table_is_damaged(self, sealed: tuple[LatentStore, Part[Any]]) -> None:
        store, part = sealed
        flip(part.sealed_path, 90)
        with pytest.raises(TableError, match="checksum"):
            store.commits(BATCH)
        (problem,) = store.verify()
        assert problem.file == part.sealed_path
        atomic.remove_tree(part.sealed_path)
        assert same(store)
        store.seal(BATCH)
        assert store.verify() == []

    def test_whose_table_is_another(self, sealed: tuple[LatentStore, Part[Any]]) -> None:
        """Two makers with two versions of polars may write two files of the same rows: the commits are read."""
        store, part = sealed
        changed = part.commits().with_columns(psnr_db=pl.lit(1.0, pl.Float32))
        tables.write_table(part.sealed_path, changed, Commits)
        assert same(store)
        (problem,) = store.verify()
        assert problem.file == part.sealed_path

    def test_that_says_other_than_the_commits(self, sealed: tuple[LatentStore, Part[Any]]) -> None:
        """Only verify can tell: a commit was exchanged by hand for another of the same rows."""
        store, part = sealed
        tables.write_table(part.commit_path(1), part.commit(1).with_columns(reason=pl.lit("other")), Commits)
        (problem,) = store.verify()
        assert problem.file == part.sealed_path
        assert "differs from the commits" in str(problem)


def test_a_pixel_store_is_sealed_too(data_root: DataRoot) -> None:
    store, part = pixel_store(data_root, 5)
    assert isinstance(store, PixelStore)
    store.seal(BATCH)
    assert read_seal(part) is not None
    assert store.seals(BATCH) == [(part.sealed_path, tables.seal(part.sealed_path))]
