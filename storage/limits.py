"""An error of any library, as one of ours: a full disk, memory or open files used up, each with place and remedy.

Python, polars, safetensors, SQLite and torch each have words of their own for the same few answers of the system. A
command and a Dagster step end by `explained`; what publishes files says earlier which file it was (atomic.py).
"""

import errno
import os
import re
import resource
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from storage.errors import MachineError, NExTVidError, UnwritableError

GO_ON = "and run again; everything written before is complete"
ROOM = {
    errno.ENOSPC: "its disk is full",
    errno.EDQUOT: "the disk quota of this user is used up",
    errno.EFBIG: "no file may be so large there ('ulimit -f', or the file system)",
}
FILES = {errno.EMFILE, errno.ENFILE}
# of a process that ended by signal 9, or of which only the end is known
KILLED = "if nobody killed it, the system did for want of memory ('dmesg' says so): give more, or do less at once"
ENOUGH_FILES = 1024  # our measurement: `make report` had 130 open at most on two cores; a system's usual limit
# What libraries write in the place of an error code; before it Rust's "os error 28"
_WORDS = {
    r"No space left on device|database or disk is full|PytorchStreamWriter failed writing": errno.ENOSPC,
    r"Disk quota exceeded": errno.EDQUOT,
    r"File too large": errno.EFBIG,
    r"Read-only file system|readonly database": errno.EROFS,
    r"Too many open files|received \d+ items of ancdata": errno.EMFILE,
    r"[Cc]an(no|')t allocate memory|Unable to allocate|Insufficient memory|out of memory"
    r"|failed to map segment from shared object": errno.ENOMEM,
    r"can't start new thread|Resource temporarily unavailable": errno.EAGAIN,
}
_NUMBER = re.compile(r"os error (\d+)")


def explained(error: BaseException) -> NExTVidError | None:
    """The error that a user is shown: a limit of the machine that is behind it, itself if it is ours; else None."""
    if (met := limit_met(error)) is not None:
        return met
    if isinstance(error, NExTVidError):
        return error
    if not isinstance(error, OSError):
        return None
    remedy = "what was written before is complete: run the command again"
    if error.errno in (errno.EACCES, errno.EPERM):
        remedy = "let this user read and write it, or name another path"
    return MachineError(f"{error}; {remedy}")


def limit_met(error: BaseException, path: str | None = None) -> UnwritableError | MachineError | None:
    """The limit of this machine that an error, or what caused it, reports; None where it reports none.

    `path` is what was being written; else the file that the error names.
    """
    for found in causes(error):
        if isinstance(found, (UnwritableError, MachineError)):
            return found
        named = path or (str(found.filename) if isinstance(found, OSError) and found.filename is not None else None)
        match code := code_of(found):
            case _ if code in ROOM:
                full = UnwritableError(_no_room(code, named))
                full.errno = code
                return full
            case errno.EROFS if found is error:
                where = "a file" if named is None else named
                return UnwritableError(
                    f"{where} cannot be written: it is on a read-only file system. Name another folder, {GO_ON}"
                )
            case _ if code in FILES:
                soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                return MachineError(
                    f"too many files are open{'' if named is None else f' to open {named}'}: this process may have "
                    f"{soft}. Raise the limit (now {hard} at most) with 'ulimit -n {max(ENOUGH_FILES, 2 * soft)}', "
                    f"{GO_ON}"
                )
            case errno.ENOMEM:
                return MachineError(_no_memory(found))
            case errno.EAGAIN if not isinstance(found, OSError) or found.filename is None:
                if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
                    return MachineError(_no_memory(found))  # for the stack of a thread
                return MachineError(
                    "this user may start no more processes or threads: end others, raise the limit with 'ulimit -u' or "
                    f"set NEXTVID_CORES to fewer, {GO_ON}"
                )
    return None


def code_of(error: BaseException) -> int | None:
    """Number (errno.h) of the system's answer that an error reports, by its own number or in its words."""
    if isinstance(error, NExTVidError):
        return None  # in our words, which quote others
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return errno.ENOSPC
    said = str(error)
    if found := _NUMBER.search(said):
        return int(found[1])
    return next((code for words, code in _WORDS.items() if re.search(words, said)), None)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised for or while; `raise ... from None` hides that from people alone."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _no_room(code: int | None, named: str | None) -> str:
    assert code is not None
    if named is None:
        return f"a file cannot be written: {ROOM[code]}. Make room there, {GO_ON}"
    place = Path(named.removeprefix("file://")).absolute()
    folder = next(above for above in place.parents if above.exists() or above == above.parent)
    disk = os.statvfs(folder)
    left = f"{disk.f_bavail * disk.f_frsize / 1e6:,.1f} of {disk.f_blocks * disk.f_frsize / 1e6:,.1f} MB are free"
    if code == errno.ENOSPC and disk.f_files and not disk.f_favail:
        left += " but no more files fit (inodes)"
    other = "name another folder"
    if place.is_relative_to(tempfile.gettempdir()):
        other = "set TMPDIR to a folder with more"
    return f"{named} cannot be written: {ROOM[code]} ({left} at {folder}). Make room there, or {other}, {GO_ON}"


def _no_memory(error: BaseException) -> str:
    if "CUDA" in str(error):
        return f"the memory of the GPU is used up: set `how.micro_batch` or `--batch` to less, {GO_ON}"
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    bound = "" if soft == resource.RLIM_INFINITY else f" ('ulimit -v' allows {soft / 1e6:,.0f} MB)"
    return (
        f"memory is used up{bound}: end other programs, give this one more, or let it do less at once "
        f"(NEXTVID_CORES=1, `execution.cores` in corpus.yaml), {GO_ON}"
    )
