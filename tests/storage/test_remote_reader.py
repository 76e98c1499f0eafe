"""Latents on an object store: equal to the store's rows, bounded, nothing damaged comes out of them.

fsspec's memory file system stands for the bucket; what fails, answers too little or lies is put in front of it.
"""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from storage import atomic, remote
from storage.errors import ConfigError, DamagedError, StoreError
from storage.reader import RowReader, addresses, open_reader, row_id
from storage.root import DataRoot
from storage.shard import ROWS_PER_SHARD, shard_bytes
from storage.store import LatentStore
from tests.storage.stores import BATCH, FRAMES, Way, copies, ids, in_threads, new_store, read_each, values, write

ROW_BYTES = FRAMES * 2 * 2 * 3 * 2
SHARD_BYTES = shard_bytes(ROWS_PER_SHARD, ROW_BYTES)
BATCHES = ["images.000000", BATCH]


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS_S", (0.0,) * len(remote.WAITS_S))


def filled(folder: Path, cache_bytes: int = 10**9) -> tuple[LatentStore, dict[int, np.ndarray]]:
    """Two parts of clips, 300 and 7 rows of which some failed, and one of images; addresses by frames."""
    root = DataRoot.open(f"memory://{folder.name}", str(folder / "runs"), str(folder / "cache"), cache_bytes)
    store = new_store(root)
    for count, first in ((300, 0), (7, 1000)):
        part = store.plan_part(BATCH, FRAMES, ids(count, first))
        for shard in range(part.shards):
            write(part, shard, failed=ids(2, first))
    write(store.plan_part(BATCHES[0], 1, ids(3, 5000)), 0)
    return store, {
        FRAMES: addresses(store.commits(BATCH), BATCHES),
        1: addresses(store.commits(BATCHES[0]), BATCHES),
    }


def opened(store: LatentStore, stored: dict[int, np.ndarray], way: Way) -> RowReader:
    return open_reader(store.root, store.spec, BATCHES, stored if way == "copies" else None)


def wanted(found: np.ndarray, frames: int = FRAMES) -> np.ndarray:
    ids = [row_id(address) for address in found]
    return values(ids, frames).astype(np.float16) if ids else np.empty((0, frames, 2, 2, 3), np.float16)


@pytest.fixture(params=["copies", "ranges"])
def way(request: pytest.FixtureRequest) -> Way:
    found: Way = request.param
    return found


@pytest.fixture(scope="module")
def store_and_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[LatentStore, dict[int, np.ndarray]]:
    return filled(tmp_path_factory.mktemp("store"))


@given(picked=st.lists(st.integers(0, 302), max_size=20), announced=st.booleans())
def test_rows_are_those_of_the_store(
    store_and_rows: tuple[LatentStore, dict[int, np.ndarray]],
    way: Way,
    picked: list[int],
    announced: bool,
) -> None:
    store, stored = store_and_rows
    reader, some = opened(store, stored, way), stored[FRAMES][picked]
    if announced:
        reader.will_need(FRAMES, some)
        reader.will_need(1, stored[1])
    np.testing.assert_array_equal(read_each(reader, some), wanted(some))
    np.testing.assert_array_equal(read_each(reader, stored[1][2:], 1), wanted(stored[1][2:], 1))
    reader.close()


def test_ranged_rows_at_once(tmp_path: Path) -> None:
    store, stored = filled(tmp_path)
    reader, some = RowReader(store.root, store.spec, BATCHES), stored[FRAMES][[5, 5, 300, 0]]
    found = reader.rows(FRAMES, some)
    np.testing.assert_array_equal(np.stack(found), wanted(some))
    assert all(row.flags.writeable for row in found)  # torch takes no others without a warning
    reader.close()


@pytest.mark.parametrize(("storage", "bound"), [("float16", 3e-3), ("int8", 5e-2)])
def test_every_storage_option_is_as_from_a_file_system(tmp_path: Path, way: Way, storage: str, bound: float) -> None:
    found = []
    for url in (f"memory://{tmp_path.name}", str(tmp_path / "root")):
        root = DataRoot.open(url, str(tmp_path / "runs"), str(tmp_path / "cache"), 10**9)
        store = new_store(root, storage=storage)
        write(store.plan_part(BATCH, FRAMES, ids(5)), 0)
        rows = addresses(store.commits(BATCH), BATCHES)
        reader = open_reader(root, store.spec, BATCHES, {FRAMES: rows} if way == "copies" else None)
        reader.will_need(FRAMES, rows)
        found.append(read_each(reader, rows))
        reader.close()
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - values(ids(5))).max() < bound


def test_threads_share_a_reader(tmp_path: Path, way: Way) -> None:
    store, stored = filled(tmp_path)
    reader = opened(store, stored, way)

    def read(seed: int) -> None:
        some = np.random.default_rng(seed).choice(stored[FRAMES], 60)
        reader.will_need(FRAMES, some)
        np.testing.assert_array_equal(read_each(reader, some), wanted(some))

    in_threads(read)
    reader.close()


def test_a_fork_is_told_to_open_a_reader_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, stored = filled(tmp_path)
    reader, parent = opened(store, stored, "ranges"), os.getpid()
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: parent + 1)
        for call in (reader.rows, reader.will_need):
            with pytest.raises(StoreError, match=rf"opened by process {parent}, of which this one is a fork: open"):
                call(FRAMES, stored[FRAMES][:2])
        reader.close()
    np.testing.assert_array_equal(read_each(reader, stored[FRAMES][:2]), wanted(stored[FRAMES][:2]))
    reader.close()


def test_which_reader_a_set_gets(tmp_path: Path) -> None:
    """The whole set in the cache if it fits, else rows; nothing in between; a cache that holds no shard is an error."""
    store, stored = filled(tmp_path)
    caches = itertools.count()
    whole = SHARD_BYTES + shard_bytes(44, ROW_BYTES) + shard_bytes(7, ROW_BYTES) + shard_bytes(3, ROW_BYTES // FRAMES)

    def way(cache_bytes: int, rows: dict[int, np.ndarray] | None = stored) -> Way:
        cache = tmp_path / f"cache{next(caches)}"
        root = DataRoot.open(store.root.url, store.root.runs_url, str(cache), cache_bytes)
        reader = open_reader(root, store.spec, BATCHES, rows)
        reader.will_need(FRAMES, stored[FRAMES][:1])
        reader.close()
        return "copies" if copies(cache) else "ranges"

    assert way(whole) == "copies"
    assert way(whole - 1) == "ranges"
    assert way(0) == "ranges"
    assert way(10**9, None) == "ranges"
    assert way(10**9, {FRAMES: stored[FRAMES][:0]}) == "copies"
    with pytest.raises(ConfigError, match=r"cache.size_gb.*hold no shard.*set 0"):
        way(SHARD_BYTES - 1)


def test_a_second_reader_asks_for_no_shard_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, stored = filled(tmp_path)
    first = opened(store, stored, "copies")
    first.will_need(FRAMES, stored[FRAMES])
    read: list[str] = []
    real = remote.read

    def spied(path: str, start: int | None = None, end: int | None = None) -> bytes:
        read.append(path)
        return real(path, start, end)

    monkeypatch.setattr(remote, "read", spied)
    second = opened(store, stored, "copies")
    second.will_need(FRAMES, stored[FRAMES])
    assert [path for path in read if "/latent/c." in path] == []
    assert sorted(path.stat().st_size for path in copies(tmp_path / "cache")) == [
        shard_bytes(n, ROW_BYTES) for n in (7, 44, 256)
    ]


def lying(monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes], times: int) -> list[int]:
    """Answers with rows' bytes are changed so many times."""
    real, left = MemoryFileSystem.cat_file, [times]

    def cat_file(self: MemoryFileSystem, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        data = bytes(real(self, path, start=start, end=end, **kwargs))
        if "/c." in path and left[0] > 0:
            left[0] -= 1
            return change(data)
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return left


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-7],
    "empty": lambda data: b"",
    "too long": lambda data: data + b"x",
    "altered": lambda data: flipped(data, 7 * ROW_BYTES if len(data) > ROW_BYTES else 0),  # in row 7 either way
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_answer_that_lies_is_asked_for_again(
    tmp_path: Path, way: Way, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]
) -> None:
    store, stored = filled(tmp_path)
    reader = opened(store, stored, way)
    left = lying(monkeypatch, change, 3)
    out = np.empty((FRAMES, 2, 2, 3), np.float16)
    reader.read_into(FRAMES, stored[FRAMES][5], out)  # slot 7: two rows failed
    np.testing.assert_array_equal(out, wanted(stored[FRAMES][5:6])[0])
    assert left == [0]
    reader.close()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_and_told_in_the_end(
    tmp_path: Path, way: Way, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]
) -> None:
    store, stored = filled(tmp_path)
    reader, part = opened(store, stored, way), store.part(BATCH, FRAMES, 0)
    lying(monkeypatch, change, 1000)
    out = np.full((FRAMES, 2, 2, 3), 7, np.float16)
    with pytest.raises(DamagedError, match=f"in {len(remote.WAITS_S) + 1} tries") as caught:
        reader.read_into(FRAMES, stored[FRAMES][5], out)
    assert (out == 7).all()
    message = str(caught.value)
    assert part.shard_path(0) in message
    assert row_id(stored[FRAMES][5]).hex() in message
    assert f"remove {part.commit_path(0)}" in message
    assert copies(tmp_path / "cache") == []  # what failed its check has no name in the cache
    reader.close()


@pytest.mark.parametrize("what", ["shard", "swept"])
def test_a_shard_that_is_gone_is_told(tmp_path: Path, way: Way, what: str) -> None:
    store, stored = filled(tmp_path)
    reader, part = opened(store, stored, way), store.part(BATCH, FRAMES, 0)
    if what == "shard":
        atomic.remove_tree(part.shard_path(0))
    else:
        part.discard(0)
    with pytest.raises(DamagedError, match="Remedy: remove"):
        reader.read_into(FRAMES, stored[FRAMES][7], np.empty((FRAMES, 2, 2, 3), np.float16))
    reader.close()


def test_withdrawn_rows_do_not_hinder_a_copy(tmp_path: Path, way: Way) -> None:
    store, stored = filled(tmp_path)
    slot = int(stored[FRAMES][7]["slot"])
    store.part(BATCH, FRAMES, 0).erase([slot])
    reader, out = opened(store, stored, way), np.empty((FRAMES, 2, 2, 3), np.float16)
    reader.read_into(FRAMES, stored[FRAMES][8], out)
    with pytest.raises(DamagedError, match="withdrawn"):
        reader.read_into(FRAMES, stored[FRAMES][7], out)
    reader.close()


def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every question that is asked of the object store from now on, but for rows announced together."""
    found: list[str] = []
    real = remote.ask

    def spied(path: str, question: Callable[..., Any]) -> Any:
        found.append(path)
        return real(path, question)

    monkeypatch.setattr(remote, "ask", spied)
    return found


def test_verified_copies_ask_the_server_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, stored = filled(tmp_path)
    first = opened(store, stored, "copies")
    first.will_need(FRAMES, stored[FRAMES])
    reader = RowReader(store.root, store.spec, BATCHES, stored, ahead_rows=1)  # maps again and again
    questions = asked(monkeypatch)
    np.testing.assert_array_equal(read_each(reader, stored[FRAMES][::-20]), wanted(stored[FRAMES][::-20]))
    assert questions == []
    reader.close()


def ranges_read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Ranges of shards that are read from now on, one for each request."""
    real, found = MemoryFileSystem.cat_file, list[Any]()

    def cat_file(self: MemoryFileSystem, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        found.extend([(path, start)] if "/c." in path else [])
        return bytes(real(self, path, start=start, end=end, **kwargs))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return found


@pytest.mark.parametrize("ahead", [1, 10])
def test_a_row_announced_ahead_is_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """As the loader does: so many batches are announced before the first of them is read, however large they are."""
    store, stored = filled(tmp_path)
    reader, rows = RowReader(store.root, store.spec, BATCHES, ahead_rows=(ahead + 1) * 30), stored[FRAMES][:300]
    shares, requests = np.split(rows, 10), ranges_read(monkeypatch)
    for number, share in enumerate([*shares, *[rows[:0]] * ahead]):
        reader.will_need(FRAMES, share)
        if number >= ahead:
            one = shares[number - ahead]
            np.testing.assert_array_equal(np.stack(reader.rows(FRAMES, one)), wanted(one))
    reader.close()
    assert len(requests) == len(set(requests)) == len(rows)


def test_what_is_announced_and_never_read_is_dropped(tmp_path: Path) -> None:
    store, stored = filled(tmp_path)
    reader = RowReader(store.root, store.spec, BATCHES, ahead_rows=20)
    ranges = reader._files.ranges
    assert ranges is not None
    for first in range(0, 300, 10):
        reader.will_need(FRAMES, stored[FRAMES][first : first + 10])
        assert len(ranges._ahead) <= 20
    np.testing.assert_array_equal(np.stack(reader.rows(FRAMES, stored[FRAMES][:3])), wanted(stored[FRAMES][:3]))
    reader.close()


def test_a_bucket_whose_listings_are_not_of_this_moment(tmp_path: Path) -> None:
    """Neither an old size nor a file that is left out is taken for damage, whose remedy removes files."""
    store, stored = filled(tmp_path)
    part = store.part(BATCH, FRAMES, 0)
    reader = opened(store, stored, "copies")
    cache = reader._files.cache
    assert cache is not None
    cache._needed[cache._place(part.shard_path(0))] -= 100
    with pytest.raises(StoreError, match=r"listings are not of this moment\. Nothing is damaged") as caught:
        reader.rows(FRAMES, stored[FRAMES][:1])
    assert not isinstance(caught.value, DamagedError)
    del cache._needed[cache._place(part.shard_path(0))]
    np.testing.assert_array_equal(np.stack(reader.rows(FRAMES, stored[FRAMES][:3])), wanted(stored[FRAMES][:3]))
    reader.close()
