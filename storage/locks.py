"""File locks (flock): one holder among threads, processes and machines that share a file system.

The kernel frees a lock when its holder dies, however it dies; the file itself stays. Object stores have no locks: a
writer there must expect a second one.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage import atomic
from storage.remote import is_local


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the lock `path` for the block; waits for it. On object stores it holds nothing.

    UnwritableError where the file cannot be made.
    """
    if not is_local(path):
        yield
        return
    with atomic.writing(path):
        place = Path(path.removeprefix("file://"))
        atomic.make_folder(place.parent)
        file = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)  # and with it the lock


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
