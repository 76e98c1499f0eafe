"""Locks: one holder among threads, processes and machines that share a file system.

The kernel frees a lock (flock) when its holder dies, however it dies; the file itself stays. Where the file system has
no locks, or keeps them on one machine, `<lock>.owner` is created exclusively and removed at the end, and its holder
touches it meanwhile: one that nobody touched for LEASE_S is of a dead holder (docs/decisions/0060). Object stores have
neither: a writer there must expect a second one.
"""

import errno
import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from storage import atomic
from storage.errors import ConflictError, StoreError
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
LEASE_S = 120.0  # our choice: longer than clocks of machines differ, and than a busy server answers
_RENEWED_S = 10.0  # our choice: twelve chances
_LOOK_S = 0.2  # our choice: between two looks at a lease that another has


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the lock `path` for the block; waits for it. On object stores it holds nothing.

    UnwritableError where the file cannot be made, StoreError where the lease was lost meanwhile.
    """
    if not is_local(path):
        yield
        return
    place = Path(path.removeprefix("file://"))
    with atomic.writing(path):
        atomic.make_folder(place.parent)
        file = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
    with ExitStack() as held:
        held.callback(os.close, file)  # and with it the lock
        if not (_flock(file, fcntl.LOCK_EX) and _mount(place.parent)[1] is None):
            held.enter_context(_owned(place, str(os.getpid()), waits=True))
        yield


def lock_fault(path: str, mounts: str = "/proc/self/mountinfo") -> str | None:
    """Why locks beside a file keep nobody out, as far as a lock that is tried and the mount tell.

    None where they work, or on an object store, which needs none. Writes nothing. `mounts` is proc_pid_mountinfo(5).
    """
    if not is_local(path):
        return None
    place = Path(path.removeprefix("file://")).resolve()
    turns = f"writers take turns by files named `*.owner`; {_PAGE}"
    with suppress(OSError), place.open("rb") as file:  # such as one that another holds
        if not _flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB):
            return f"{place.parent}: its file system has no locks: {turns}"
    kind, option = _mount(place.parent, mounts)
    if option is not None:
        return f"{place.parent} is {kind} mounted with {option}, so locks hold on this machine alone: {turns}"
    if kind.partition(".")[0] in _UNTOLD:
        return f"{place.parent} is {kind}, whose locks may hold on this machine alone; {_PAGE}"
    return None


@contextmanager
def locked_or_holder(path: Path, mode: int = 0o666, who: str = "") -> Iterator[str | None]:
    """Hold the lock `path` for the block, without waiting: None, or who has it: a process id, and its `who`.

    The file says who holds it. Symbolic links are not followed.
    """
    about = f"{os.getpid()} ({who})" if who else str(os.getpid())
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode), "r+") as file, ExitStack() as held:
        try:
            reaches = _flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB) and _mount(path.parent)[1] is None
        except BlockingIOError:
            yield file.read().strip() or "unknown"
            return
        holder = None if reaches else held.enter_context(_owned(path, about, waits=False))
        if holder is None:
            file.truncate(0)
            file.write(about)
            file.flush()
        yield holder


def is_locked(path: str) -> bool:
    """Whether somebody holds the lock at this moment; False where there is no such file, or on an object store."""
    if not is_local(path):
        return False
    place = Path(path.removeprefix("file://"))
    try:
        with place.open("rb") as file:
            _flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        return time.time() - _owner(place).stat().st_mtime <= LEASE_S
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False


def _flock(file: int, operation: int) -> bool:
    """flock(2); False where the file system has no locks."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@lru_cache(maxsize=1024)
def _mount(folder: Path, mounts: str = "/proc/self/mountinfo") -> tuple[str, str | None]:
    """The kind of file system that a folder is on, and the option of its mount that keeps locks on one machine."""
    found, folder = Path(mounts), folder.resolve()
    lines = [line.split() for line in found.read_text().splitlines()] if found.exists() else []
    above = [fields for fields in lines if folder.is_relative_to(fields[4].replace("\\040", " "))]
    if not above:
        return "", None
    fields = max(reversed(above), key=lambda fields: len(fields[4]))  # of two on one place the later one counts
    kind, _, options = fields[fields.index("-") + 1 :][:3]
    given = {*fields[5].split(","), *options.split(",")}
    return kind, next((option for option in _OF_ONE_MACHINE.get(kind, ()) if option in given), None)


def _owner(lock: Path) -> Path:
    return lock.with_name(f"{lock.name}.owner")


@contextmanager
def _owned(lock: Path, who: str, waits: bool) -> Iterator[str | None]:
    """Hold the owner file of a lock for the block: None, or, where it is not to be waited for, who has it."""
    owner, token, process = _owner(lock), secrets.token_hex(8), os.getpid()
    while (holder := _holder(owner, token, f"{who} on {socket.gethostname()}")) is not None:
        if not waits:
            yield holder
            return
        time.sleep(_LOOK_S)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(_RENEWED_S):
            with suppress(OSError):  # a server that does not answer for a moment, or a lost lease: reported at the end
                os.utime(owner)

    renewing = threading.Thread(target=renew, name="lease", daemon=True)
    renewing.start()
    try:
        yield None
    finally:
        ended.set()
        if os.getpid() == process:  # not in a fork
            renewing.join()
            if not _removed(owner, token):
                raise StoreError(
                    f"{lock}: this process was stopped or cut off for more than {LEASE_S:.0f} s, and another took its "
                    "turn meanwhile. Run 'nextvid verify', then this command again"
                )


def _holder(owner: Path, token: str, who: str) -> str | None:
    """Create the owner file; else who has it. One of a dead holder is removed first."""
    while True:
        with suppress(ConflictError):
            atomic.create_exclusively(str(owner), f"{token} {who}".encode())
            return None
        with suppress(FileNotFoundError), owner.open() as file:  # else its holder ended meanwhile
            renewed_s, (of, _, holder) = os.fstat(file.fileno()).st_mtime, file.read().partition(" ")
            if time.time() - renewed_s <= LEASE_S or not _removed(owner, of):
                return holder


def _removed(owner: Path, token: str) -> bool:
    """Remove the owner file of this token, and whether it was there.

    Only who creates `<owner>.<token>` exclusively may, so that nobody removes the file of a later owner.
    """
    claim = owner.with_name(f"{owner.name}.{token}")
    try:
        atomic.create_exclusively(str(claim), b"")
    except ConflictError as error:
        with suppress(FileNotFoundError):
            if time.time() - claim.stat().st_mtime > LEASE_S:
                raise StoreError(
                    f"{claim} was left by a process that died while it took over a lock: remove it, and {owner}"
                ) from error
        return False
    try:
        with suppress(FileNotFoundError):
            if owner.read_text().partition(" ")[0] == token:
                owner.unlink()
                return True
        return False
    finally:
        claim.unlink()
