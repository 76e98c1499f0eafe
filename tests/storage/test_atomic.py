"""storage/atomic.py: a name holds its old bytes or its new ones, whatever happens in between."""

import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import atomic
from storage.errors import (
    ConfigError,
    ConflictError,
    DamagedError,
    StoreError,
    UnwritableError,
    UpstreamError,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def fail_halfway(path: Path) -> None:
    path.write_bytes(b"half")
    raise RuntimeError


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def test_publish_makes_folders_and_replaces(place: str) -> None:
    path = f"{place}/a/b/table.bin"
    assert not atomic.exists(path)
    atomic.publish_bytes(path, b"old")
    atomic.publish_bytes(path, b"newer")
    assert atomic.read_bytes(path) == b"newer"
    assert atomic.exists(path)


def test_create_keeps_the_winner(place: str) -> None:
    path = f"{place}/commit"
    atomic.create_exclusively(path, b"first")
    with pytest.raises(ConflictError, match="somebody else"):
        atomic.create_exclusively(path, b"second")
    assert atomic.read_bytes(path) == b"first"


def test_conflict_is_a_file_exists_error_too(place: str) -> None:
    atomic.create_exclusively(f"{place}/x", b"")
    with pytest.raises(FileExistsError):
        atomic.create_exclusively(f"{place}/x", b"")


def test_json_round_trip_and_strictness(place: str) -> None:
    path = f"{place}/latest.json"
    atomic.publish_json(path, {"digest": "ab", "n": [1, 2.5, None]})
    assert atomic.read_json(path) == {"digest": "ab", "n": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.publish_json(path, {"loss": float("nan")})
    assert atomic.read_json(path)["digest"] == "ab"


def test_read_json_says_what_is_wrong(place: str) -> None:
    with pytest.raises(UpstreamError, match="does not exist"):
        atomic.read_json(f"{place}/none.json")
    atomic.publish_bytes(f"{place}/torn.json", b'{"a": 1')
    with pytest.raises(DamagedError, match=r"torn\.json is not JSON"):
        atomic.read_json(f"{place}/torn.json")


def test_staged_file_on_both(place: str) -> None:
    with atomic.staged_file(f"{place}/big") as temporary:
        temporary.write_bytes(b"one")
    with pytest.raises(ConflictError), atomic.staged_file(f"{place}/big", exclusive=True) as temporary:
        temporary.write_bytes(b"two")
    assert atomic.read_bytes(f"{place}/big") == b"one"
    with atomic.staged_file(f"{place}/new", exclusive=True) as temporary:
        temporary.write_bytes(b"two")
    assert atomic.read_bytes(f"{place}/new") == b"two"


def test_an_error_inside_publishes_nothing(place: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic.staged_file(f"{place}/big") as temporary:
        fail_halfway(temporary)
    assert not atomic.exists(f"{place}/big")
    assert names(tmp_path) == []


def test_staged_folder_appears_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "trainset" / "ab"
    with atomic.staged_folder(str(path)) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "rows.npy").write_bytes(b"x")
        assert not path.exists()
    assert (path / "deep" / "rows.npy").read_bytes() == b"x"
    with pytest.raises(RuntimeError), atomic.staged_folder(str(tmp_path / "other")) as folder:
        fail_halfway(folder / "half")
    assert names(tmp_path) == ["trainset"]
    assert names(tmp_path / "trainset") == ["ab"]


def test_staged_folder_refuses_a_taken_name(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConflictError), atomic.staged_folder(str(tmp_path / "taken")):
        pytest.fail("the block ran")

    def lose(path: Path) -> None:
        with atomic.staged_folder(str(path)) as folder:
            (folder / "loser").write_bytes(b"")
            path.mkdir()
            (path / "winner").write_bytes(b"")

    with pytest.raises(ConflictError, match="meantime"):
        lose(tmp_path / "race")
    assert names(tmp_path / "race") == ["winner"]
    assert names(tmp_path) == ["race", "taken"]
    with pytest.raises(ConfigError, match="object store"), atomic.staged_folder("memory://run"):
        pytest.fail("the block ran")


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("act", [atomic.publish_bytes, atomic.create_exclusively])
def test_a_full_disk_leaves_the_old_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, act: Callable[[str, bytes], None]
) -> None:
    atomic.publish_bytes(str(tmp_path / "table"), b"old")
    target = tmp_path / ("table" if act is atomic.publish_bytes else "fresh")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UnwritableError, match=f"{target} cannot be written: its disk is full .* are free at") as caught:
        act(str(target), b"new" * 1000)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "table").read_bytes() == b"old"
    assert names(tmp_path) == ["table"]


def test_a_disk_that_fills_after_some_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    sizes: list[int] = []

    def short(file: int, data: memoryview) -> int:
        if sum(sizes) >= 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        sizes.append(real(file, data[:5]))
        return sizes[-1]

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(UnwritableError, match="disk is full"):
        atomic.publish_bytes(str(tmp_path / "table"), b"0123456789abcdef")
    assert sizes == [5, 5]
    assert names(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:3]))
    atomic.publish_bytes(str(tmp_path / "table"), b"0123456789abcdef")
    assert (tmp_path / "table").read_bytes() == b"0123456789abcdef"


def test_order_of_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are on the disk before the name, the name before the call returns."""
    happened: list[str] = []
    fsync, replace = os.fsync, os.replace

    def saw_fsync(file: int) -> None:
        happened.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "bytes")
        fsync(file)

    def saw_replace(source: Path, target: Path) -> None:
        happened.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", saw_fsync)
    monkeypatch.setattr(os, "replace", saw_replace)
    atomic.publish_bytes(str(tmp_path / "table"), b"x")
    assert happened == ["bytes", "name", "folder"]


def test_file_systems_without_hard_links_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuses)
    with pytest.raises(StoreError, match="without hard links"):
        atomic.create_exclusively(str(tmp_path / "x"), b"x")
    assert names(tmp_path) == []


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic.publish_bytes(str(tmp_path / "x"), b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_sweep_takes_old_litter_only(tmp_path: Path) -> None:
    old, fresh, kept = (tmp_path / name for name in (".a.123.partial", "deep/.b.456.partial", "c.parquet"))
    fresh.mkdir(parents=True)
    (fresh / "being-written").write_bytes(b"")
    for path in (old, kept):
        path.write_bytes(b"")
        os.utime(path, (time.time() - 7200,) * 2)
    os.utime(fresh, (time.time() - 7200,) * 2)  # its file is fresh
    assert atomic.remove_leftovers(str(tmp_path), older_than_s=3600) == [str(old)]
    assert names(tmp_path) == ["c.parquet", "deep"]
    assert atomic.remove_leftovers(str(tmp_path), older_than_s=0) == [str(fresh)]
    assert atomic.remove_leftovers("memory://x", older_than_s=0) == []


def test_remove_tree(place: str) -> None:
    atomic.publish_bytes(f"{place}/run/a/b", b"x")
    atomic.remove_tree(f"{place}/run")
    atomic.remove_tree(f"{place}/run")
    assert not atomic.exists(f"{place}/run/a/b")
