"""storage/locks.py: what is said where a file system has no locks, or has them for one machine alone."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from storage.errors import StoreError
from storage.locks import lock_fault, locked

LINE = "36 25 0:33 / {place} rw,relatime shared:1 - {kind} server:/export rw,{options}\n"


@pytest.fixture
def accepted(tmp_path: Path) -> Path:
    path = tmp_path / "root" / "accepted.json"
    path.parent.mkdir()
    path.write_text("{}")
    return path


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_told(accepted: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuses(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuses)
    with pytest.raises(StoreError, match=r"has no locks .*docs/operations\.md"), locked(str(accepted.parent / "lock")):
        raise AssertionError("nobody may think that it is locked")
    assert "has no locks" in str(lock_fault(str(accepted)))


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("ext4", "errors=remount-ro", None),
        ("nfs4", "vers=4.2,local_lock=none", None),
        ("nfs4", "vers=4.2,local_lock=flock", "mounted with local_lock=flock: locks hold on this machine alone"),
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
