"""storage/locks.py: what is told and done where a file system has no locks, or has them for one machine alone."""

import errno
import fcntl
import os
import time
from pathlib import Path

import pytest

from storage import locks
from storage.errors import StoreError
from storage.locks import LEASE_S, is_locked, lock_fault, locked, locked_or_holder
from tests.storage.stores import in_threads

LINE = "36 25 0:33 / {place} rw,relatime shared:1 - {kind} server:/export rw,{options}\n"


@pytest.fixture
def accepted(tmp_path: Path) -> Path:
    path = tmp_path / "root" / "accepted.json"
    path.parent.mkdir()
    path.write_text("{}")
    return path


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    code = getattr(request, "param", errno.ENOSYS)

    def refuses(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuses)
    monkeypatch.setattr(locks, "_LOOK_S", 0.001)


@pytest.fixture
def of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """flock that keeps out nobody, on a mount that says so."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(locks, "_mount", lambda *_: ("lustre", "localflock"))
    monkeypatch.setattr(locks, "_LOOK_S", 0.001)


@pytest.mark.parametrize("no_locks", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK], indirect=True)
def test_a_file_system_without_locks_is_told(accepted: Path, no_locks: None) -> None:
    assert "has no locks: writers take turns by files named `*.owner`; see" in str(lock_fault(str(accepted)))


@pytest.mark.parametrize("without", ["no_locks", "of_one_machine"])
def test_one_owner_at_a_time_without_locks(tmp_path: Path, request: pytest.FixtureRequest, without: str) -> None:
    request.getfixturevalue(without)
    lock, inside, most = tmp_path / "part" / "lock", list[int](), list[int]()

    def turn(number: int) -> None:
        for _ in range(5):
            with locked(str(lock)):
                inside.append(number)
                most.append(len(inside))
                time.sleep(0.0005)
                assert is_locked(str(lock))
                inside.pop()

    in_threads(turn, 6)
    assert most == [1] * 30
    assert not is_locked(str(lock))
    assert [path.name for path in lock.parent.iterdir()] == ["lock"]


def test_a_holder_is_named_without_locks(tmp_path: Path, no_locks: None) -> None:
    lock = tmp_path / "lock"
    with locked_or_holder(lock, who="pretrain") as first, locked_or_holder(lock) as second:
        assert first is None
        assert str(second).startswith(f"{os.getpid()} (pretrain) on ")
    with locked_or_holder(lock) as holder:
        assert holder is None


def long_ago(path: Path) -> None:
    os.utime(path, (time.time() - 2 * LEASE_S,) * 2)


def test_a_dead_owner_is_followed_by_one(tmp_path: Path, no_locks: None) -> None:
    lock, owner = tmp_path / "lock", tmp_path / "lock.owner"
    owner.write_text("0123 4711 on another machine")
    assert not is_locked(str(lock))
    lock.touch()
    assert is_locked(str(lock))
    long_ago(owner)
    assert not is_locked(str(lock))
    inside: list[int] = []

    def turn(number: int) -> None:
        with locked(str(lock)):
            inside.append(number)
            assert len(inside) == 1
            inside.pop()

    in_threads(turn, 6)
    assert not owner.exists()


def test_an_owner_that_works_long_stays_owner(tmp_path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_RENEWED_S", 0.001)
    lock, until = tmp_path / "lock", time.monotonic() + 60
    with locked(str(lock)):
        long_ago(tmp_path / "lock.owner")
        while not is_locked(str(lock)):
            assert time.monotonic() < until, "nobody renews it"
            time.sleep(0.001)


def test_a_lost_lease_is_told_and_the_next_owner_stays(tmp_path: Path, no_locks: None) -> None:
    lock = tmp_path / "lock"
    slow, other = locked(str(lock)), locked_or_holder(lock)
    slow.__enter__()
    long_ago(tmp_path / "lock.owner")
    assert other.__enter__() is None
    with pytest.raises(StoreError, match="another took its turn meanwhile"):
        slow.__exit__(None, None, None)
    assert is_locked(str(lock))
    other.__exit__(None, None, None)
    assert not is_locked(str(lock))


def test_a_claim_that_was_left_is_named(tmp_path: Path, no_locks: None) -> None:
    for name in ("lock.owner", "lock.owner.0123"):
        (tmp_path / name).write_text("0123 4711 on another machine")
        long_ago(tmp_path / name)
    with (
        pytest.raises(StoreError, match=r"lock\.owner\.0123 was left .*remove it, and"),
        locked(str(tmp_path / "lock")),
    ):
        raise AssertionError("nobody may think that it is locked")


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("ext4", "errors=remount-ro", None),
        ("nfs4", "vers=4.2,local_lock=none", None),
        ("nfs4", "vers=4.2,local_lock=flock", "mounted with local_lock=flock, so locks hold on this machine alone"),
        ("nfs", "vers=3,nolock", "mounted with nolock"),
        ("lustre", "flock", None),
        ("lustre", "localflock", "mounted with localflock"),
        ("fuse.gcsfuse", "user_id=0", "is fuse.gcsfuse, whose locks may hold on this machine alone"),
        ("beegfs", "cfgFile=/etc/beegfs", "whose locks may hold"),
    ],
)
def test_how_the_root_is_mounted(accepted: Path, tmp_path: Path, kind: str, options: str, told: str | None) -> None:
    mounts = tmp_path / "mountinfo"
    above = LINE.format(place="/", kind="lustre", options="localflock")  # the nearest mount counts
    mounts.write_text(above + LINE.format(place=accepted.parent.resolve(), kind=kind, options=options))
    found = lock_fault(str(accepted), str(mounts))
    assert found is None if told is None else told in str(found)


def test_buckets_need_no_locks() -> None:
    assert lock_fault("s3://bucket/root/accepted.json") is None
