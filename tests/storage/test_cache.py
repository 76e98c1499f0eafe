"""storage/cache.py and its index: whole copies in a bounded folder that processes share, none removed while it is used.

fsspec's memory file system is the bucket.
"""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import atomic, remote
from storage.cache import Cache, open_rows, refuse_too_small
from storage.cache_index import _OLDEST
from storage.digest import crc32c
from storage.errors import ConfigError, DamagedError, StoreError, UnwritableError
from storage.root import DataRoot
from tests.factories import flip
from tests.storage.stores import copies, in_threads


def bucket(folder: Path, cache_bytes: int, count: int) -> tuple[DataRoot, dict[str, int]]:
    """A root and `count` files of 1000 bytes in it."""
    root = DataRoot.open(f"memory://{folder.name}", str(folder / "runs"), str(folder / "cache"), cache_bytes)
    paths = [f"{root.url}/file{number}" for number in range(count)]
    for number, path in enumerate(paths):
        atomic.publish_bytes(path, bytes([number]) * 1000)
    return root, dict.fromkeys(paths, 1000)


def held(root: DataRoot) -> set[str]:
    return {path.name for path in copies(Path(root.cache_folder))}


def test_a_copy_is_whole_and_made_once(tmp_path: Path) -> None:
    root, files = bucket(tmp_path, 5000, 2)
    cache = Cache(root, files)
    for number, path in enumerate(files):
        assert cache.local(path, 1000).read_bytes() == bytes([number]) * 1000
    copy = cache.local(next(iter(files)), 1000)
    before = copy.stat().st_ino
    assert cache.local(next(iter(files)), 1000).stat().st_ino == before
    copy.write_bytes(b"cut")  # a copy of another size is no copy
    assert cache.local(next(iter(files)), 1000).read_bytes() == bytes(1000)


def test_others_copies_go_oldest_first(tmp_path: Path) -> None:
    root, files = bucket(tmp_path, 3500, 6)
    paths = list(files)
    others = Cache(root, dict.fromkeys(paths[:3], 1000))
    for age, path in enumerate(paths[:3]):
        os.utime(others.local(path, 1000), (1000 + age, 1000 + age))
    others.local(paths[0], 1000)  # used again
    ours = Cache(root, dict.fromkeys(paths[3:], 1000))
    assert ours.hold()
    ours.local(paths[3], 1000)
    assert held(root) == {"file0", "file2", "file3"}
    ours.local(paths[4], 1000)
    ours.local(paths[5], 1000)
    assert held(root) == {"file3", "file4", "file5"}
    with pytest.raises(StoreError, match=r"is full.*Raise cache.size_gb"):
        ours.local(paths[0], 1000)  # our own are never given up
    assert held(root) == {"file3", "file4", "file5"}


def test_two_roots_share_a_folder(tmp_path: Path) -> None:
    root, files = bucket(tmp_path, 5000, 1)
    other = DataRoot.open(f"{root.url}/other", root.runs_url, root.cache_folder, 5000)
    atomic.publish_bytes(f"{other.url}/file0", b"o" * 1000)
    assert Cache(root, files).local(f"{root.url}/file0", 1000).read_bytes() == bytes(1000)
    assert Cache(other, files).local(f"{other.url}/file0", 1000).read_bytes() == b"o" * 1000


def test_the_bound_holds_while_threads_copy(tmp_path: Path) -> None:
    root, files = bucket(tmp_path, 4000, 12)
    sizes: list[int] = []

    paths = list(files)

    def copy(number: int) -> None:
        cache = Cache(root, {paths[number]: 1000})
        cache.local(paths[number], 1000)
        # what two listings have was there between them: one alone may see a file and, after its removal, the next
        sizes.append(len(held(root) & held(root)))

    in_threads(copy, 12)
    assert len(sizes) == 12  # each waited for room
    assert max(sizes) <= 4


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, files = bucket(tmp_path, 5000, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Cache(root, files).local(next(iter(files)), 1000)
    assert held(root) == set()


def test_a_full_disk_under_the_index_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, files = bucket(tmp_path, 5000, 1)

    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(sqlite3, "connect", full)
    with pytest.raises(UnwritableError, match=r"index\.sqlite"):
        Cache(root, files).hold()


def test_what_fits(tmp_path: Path) -> None:
    def holds(cache_bytes: int, needed: dict[str, int]) -> bool:
        root = DataRoot.open("memory://x", str(tmp_path), str(tmp_path / "cache"), cache_bytes)
        refuse_too_small(root, needed)
        return Cache(root, {f"{root.url}/{name}": size_bytes for name, size_bytes in needed.items()}).hold()

    assert holds(30, {"a": 10, "b": 20})
    assert not holds(29, {"a": 10, "b": 20})
    assert not holds(0, {"a": 10})
    assert holds(0, {})
    with pytest.raises(ConfigError, match=r"cache\.size_gb"):
        holds(19, {"a": 10, "b": 20})


HOLDER = """
import os, sys
from storage.cache import Cache
from storage.root import DataRoot
url, folder = sys.argv[1:]
cache = Cache(DataRoot.open(url, "/nowhere", folder, 3500), {f"{url}/file{n}": 1000 for n in (0, 1)})
held = cache.hold()
if os.fork() == 0:
    cache.release()  # of a lease that is the parent's
    os._exit(0)
os.wait()
print(held, flush=True)
sys.stdin.read()
"""


def test_another_process_keeps_its_copies_until_it_dies(tmp_path: Path, repository: Path) -> None:
    """Two runs on a machine whose sets do not fit together: the second reads row by row, and refetches nothing."""
    root, files = bucket(tmp_path, 3500, 6)
    paths = list(files)
    for path in paths[:2]:
        Cache(root, {}).local(path, 1000)
    command = [sys.executable, "-c", HOLDER, root.url, root.cache_folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=repository) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"True\n"
        ours = Cache(root, dict.fromkeys(paths[2:4], 1000))
        assert not ours.hold()
        same = Cache(root, dict.fromkeys(paths[:2], 1000))
        assert same.hold()  # ranks of one run need the same
        same.release()
        for path in paths[2:]:
            Cache(root, {}).local(path, 1000)  # one after the other in the room that is left
        assert {"file0", "file1"} < held(root)
        other.kill()
    assert ours.hold()
    for path in paths[2:4]:
        ours.local(path, 1000)
    assert len(held(root) & {"file0", "file1"}) <= 1
    assert {"file2", "file3"} <= held(root)


def test_copies_whose_maker_was_killed_take_no_room(tmp_path: Path) -> None:
    root, files = bucket(tmp_path, 2500, 4)
    paths, cache = list(files), Cache(root, {})
    for path in paths[:2]:
        cache._index.reserve(cache._name(cache._place(path)), 1000)  # and no more
    left = cache._place(paths[0]).with_name(f".file0.abc{atomic.SUFFIX}")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    cache._place(paths[1]).write_bytes(bytes(1000))  # killed after its name was given
    cache.local(paths[2], 1000)
    assert held(root) == {"file1", "file2"}
    cache.local(paths[3], 1000)
    assert len(held(root)) == 2


def test_a_copy_costs_the_same_beside_10_000(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No walk: the folder is not listed, and as many files are looked at as are removed."""
    root, files = bucket(tmp_path, 10_000_000, 3)
    paths, cache = list(files), Cache(root, {})
    cache.local(paths[0], 1000)
    os.utime(cache._place(paths[0]), (1000, 1000))
    with sqlite3.connect(tmp_path / "cache" / "index.sqlite") as db:
        rows = [(f"other/{number}", 1000, 2_000_000_000_000 + number) for number in range(9_999)]
        db.executemany("INSERT INTO copies VALUES (?, ?, 'there', ?, 0)", rows)
    looked: list[object] = []

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            looked.append(given)
            return real(*given, **options)

        return call

    for name in ("scandir", "listdir", "stat"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    for path in paths[1:]:
        cache.local(path, 1000)
    monkeypatch.undo()
    assert held(root) >= {"file1", "file2"}
    assert len(looked) < 40
    plan = sqlite3.connect(tmp_path / "cache" / "index.sqlite").execute("EXPLAIN QUERY PLAN " + _OLDEST).fetchall()
    assert "USING INDEX removable" in plan[0][3]


def test_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    """Files of others are neither counted nor removed; an index that is none is refused with the remedy."""
    root, files = bucket(tmp_path, 1500, 2)
    folder = Path(root.cache_folder)
    (folder / "films").mkdir(parents=True)
    (folder / "films" / "one.mp4").write_bytes(bytes(5000))
    for path in files:
        Cache(root, {}).local(path, 1000)
    assert held(root) == {"one.mp4", "file1"}
    index = folder / "index.sqlite"
    for content, told in ((b"no index" * 200, "remove it, it is made again"), (b"", "")):
        index.write_bytes(content)
        if told:
            with pytest.raises(ConfigError, match=told):
                Cache(root, {}).local(next(iter(files)), 1000)
    Cache(root, {}).local(next(iter(files)), 1000)  # the copy that was there is counted again
    assert held(root) == {"one.mp4", "file0"}
    with sqlite3.connect(index) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match=r"newer version of nextvid: name another cache\.folder"):
        Cache(root, files).local(list(files)[1], 1000)


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
def test_row_files(tmp_path: Path, cache_bytes: int) -> None:
    root, _ = bucket(tmp_path, cache_bytes, 0)
    array = np.arange(12, dtype="<u4").reshape(3, 4)
    np.save(tmp_path / "rows.npy", array)
    with atomic.staged_file(f"{root.url}/rows.npy") as temporary:
        temporary.write_bytes((tmp_path / "rows.npy").read_bytes())
    for path in (f"{root.url}/rows.npy", str(tmp_path / "rows.npy")):
        np.testing.assert_array_equal(open_rows(root, path), array)
    assert isinstance(open_rows(root, f"{root.url}/rows.npy"), np.memmap) == (cache_bytes > 0)
    with pytest.raises(ValueError, match="does not exist"):
        open_rows(root, f"{root.url}/none.npy")
    atomic.publish_bytes(f"{root.url}/rows.npy", b"no array")
    with pytest.raises(ValueError):
        open_rows(root, f"{root.url}/rows.npy")


def test_row_files_are_fetched_in_pieces_once_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, _ = bucket(tmp_path, 10**6, 0)
    monkeypatch.setattr(remote, "PIECE_BYTES", 1000)
    array = np.arange(2500, dtype="<u4")
    np.save(tmp_path / "rows.npy", array)
    data, path = (tmp_path / "rows.npy").read_bytes(), f"{root.url}/rows.npy"
    atomic.publish_bytes(path, data)
    real, starts = remote.read, list[int | None]()

    def read(path: str, start: int | None = None, end: int | None = None) -> bytes:
        starts.append(start)
        if start == 6000 and starts.count(6000) == 1:
            raise KeyboardInterrupt
        return real(path, start, end)

    monkeypatch.setattr(remote, "read", read)
    with pytest.raises(KeyboardInterrupt):
        open_rows(root, path, crc32c(data))
    before = len(starts)
    for _ in range(2):
        np.testing.assert_array_equal(open_rows(root, path, crc32c(data)), array)
        assert sorted(start or 0 for start in starts[before:]) == [6000, 7000, 8000, 9000, 10000]
    (copy,) = copies(Path(root.cache_folder))
    copy.rename(copy.with_name(f".{copy.name}.pieces{atomic.SUFFIX}"))
    flip(next(copy.parent.glob(".*")), 200)  # this disk changed it: all is fetched again
    np.testing.assert_array_equal(open_rows(root, path, crc32c(data)), array)
    whole = DataRoot.open(root.url, root.runs_url, root.cache_folder, 0)
    np.testing.assert_array_equal(open_rows(whole, path, crc32c(data)), array)
    with pytest.raises(DamagedError, match="differ from their checksum"):
        open_rows(root, path, crc32c(data) ^ 1)
