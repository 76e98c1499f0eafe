"""File locks (flock): one holder among threads, processes and machines that share a file system.

The kernel frees a lock when its holder dies, however it dies; the file itself stays. Object stores have no locks: a
writer there must expect a second one.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage import atomic
from storage.errors import StoreError
from storage.remote import is_local

_NO_LOCKS = (
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOLCK,
)  # Lustre without `flock`, FUSE without locks, NFS without lockd
# Mount options that keep locks on one machine: nfs(5), mount.lustre(8)
_OF_ONE_MACHINE = {
    "nfs": ("nolock", "local_lock=all", "local_lock=flock"),
    "nfs4": ("local_lock=all", "local_lock=flock"),
    "lustre": ("localflock",),
}
_UNTOLD = ("fuse", "beegfs", "9p", "virtiofs")  # whose mounts do not say whether locks reach other machines
_PAGE = "see 'Shared file systems' in docs/operations.md"


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the lock `path` for the block; waits for it. On object stores it holds nothing.

    UnwritableError where the file cannot be made, StoreError where the file system has no locks.
    """
    if not is_local(path):
        yield
        return
    with atomic.writing(path):
        place = Path(path.removeprefix("file://"))
        atomic.make_folder(place.parent)
        file = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise StoreError(f"{path}: its file system has no locks ({error.strerror}); {_PAGE}") from error
        yield
    finally:
        os.close(file)  # and with it the lock


def lock_fault(path: str, mounts: str = "/proc/self/mountinfo") -> str | None:
    """Why locks beside a file keep nobody out, as far as a lock that is tried and the mount tell.

    None where they work, or on an object store, which needs none. Writes nothing. `mounts` is proc_pid_mountinfo(5).
    """
    if not is_local(path):
        return None
    folder = Path(path.removeprefix("file://")).resolve().parent
    try:
        is_locked(path)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return f"{folder}: its file system has no locks ({error.strerror}); {_PAGE}"
    lines = [line.split() for line in Path(mounts).read_text().splitlines()] if Path(mounts).exists() else []
    above = [fields for fields in lines if folder.is_relative_to(fields[4].replace("\\040", " "))]
    if not above:
        return None
    fields = max(above, key=lambda fields: len(fields[4]))  # of two on one place the later one counts
    kind, _, options = fields[fields.index("-") + 1 :][:3]
    found = [
        option for option in _OF_ONE_MACHINE.get(kind, ()) if option in {*fields[5].split(","), *options.split(",")}
    ]
    if found:
        return f"{folder} is {kind} mounted with {found[0]}: locks hold on this machine alone; {_PAGE}"
    if kind.partition(".")[0] in _UNTOLD:
        return f"{folder} is {kind}, whose locks may hold on this machine alone; {_PAGE}"
    return None


@contextmanager
def locked_or_holder(path: Path, mode: int = 0o666, who: str = "") -> Iterator[str | None]:
    """Hold the lock `path` for the block, without waiting: None, or who has it: a process id, and its `who`.

    The file says who holds it. Symbolic links are not followed.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield file.read().strip() or "unknown"
            return
        file.truncate(0)
        file.write(f"{os.getpid()} ({who})" if who else str(os.getpid()))
        file.flush()
        yield None


def is_locked(path: str) -> bool:
    """Whether somebody holds the lock at this moment; False where there is no such file, or on an object store."""
    if not is_local(path):
        return False
    try:
        file = os.open(path.removeprefix("file://"), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
