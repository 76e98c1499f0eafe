"""Local copies of what never changes in an object store: whole shards and row files, in a folder of bounded size.

A copy takes its name only when it is whole: its length and, for a shard, index and checksums were compared with the
commit. A copy that proves wrong later is copied again, once: this disk changed it. Room is made by removing copies that
no process of this machine holds, least recently used first (cache_index.py); nothing else in the folder is touched. A
set is held only where it fits beside what others hold, so two runs never copy each other's shards again. When a set is
copied at all: shard_files.py.
"""

import errno
import io
import os
import secrets
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from storage import atomic, listing, remote
from storage.cache_index import Index
from storage.digest import crc32c, digest
from storage.errors import ConfigError, DamagedError, StoreError, UnwritableError, UpstreamError
from storage.locks import locked
from storage.remote import is_local
from storage.root import DataRoot

PATIENCE_S = 60.0  # our choice: copies in the making, 67 MB each, are files by then
_LOOK_S = 0.1
# errors of a disk that can keep no copy; others pass through
_KEEPS_NONE = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ENOENT,
    errno.ENOTDIR,
}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
Fault = Callable[[bytes | memoryview], str | None]  # what is wrong with the bytes of a file
_LOCKS = 64  # our choice: so many copies are made at once by all processes of a machine


def refuse_too_small(root: DataRoot, needed: Mapping[str, int]) -> None:
    """ConfigError for a bound that holds not one of these files (path: size in bytes); 0 switches the cache off."""
    largest = max(needed.values(), default=0)
    if 0 < root.cache_bytes < largest:
        raise ConfigError(
            f"cache.size_gb: {root.cache_bytes / 1e9:g} GB hold no shard of {largest / 1e9:g} GB. Raise it to the size "
            f"of the set ({sum(needed.values()) / 1e9:g} GB), or set 0 to read rows from the object store"
        )


def open_rows(root: DataRoot, path: str, crc: int | None = None) -> np.ndarray:
    """An array of a .npy file, memory-mapped; of an object store from a local copy, or in memory without a cache.

    `crc` is the checksum of the file's bytes, where it is known: what comes over the network is compared with it, and a
    file that was made again has a copy of its own. A copy is compared once a process. Raises UpstreamError where an
    object is missing, OSError or ValueError where a file is or is no array.
    """
    if is_local(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)
    size_bytes = listing.size_bytes(path)
    if size_bytes is None:
        raise UpstreamError(f"{path} does not exist")

    def fault(data: bytes | memoryview) -> str | None:
        return None if crc is None or crc32c(data) == crc else "its bytes differ from their checksum"

    cache = Cache(root, {path: size_bytes}, version="" if crc is None else f".{crc:08x}")
    if cache.hold():
        place = cache.local(path, size_bytes, fault)
        while crc is not None and not _as_copied(place, crc) and cache.distrust(path, place.stat().st_ino):
            place = cache.local(path, size_bytes, fault)
        rows: np.ndarray = np.load(place, mmap_mode="r", allow_pickle=False)
        weakref.finalize(rows, cache.release)
        return rows
    data = b"".join(remote.read_pieces(path, size_bytes))
    if fault(data) is not None:
        data = remote.read_exactly(path, size_bytes, fault=fault)
    return np.load(io.BytesIO(data), allow_pickle=False)


def place_of(root: DataRoot, path: str) -> Path:
    """Where the copy of a file is, once it is made."""
    return Path(root.cache_folder) / digest(["cache of", root.url]) / path.removeprefix(root.url).lstrip("/")


class Cache:
    """Copies below `root.cache_folder`. `needed` (path: size in bytes) are the files that one opener keeps.

    `version` ends the names of its copies: for files that may be made again with other bytes.
    """

    def __init__(self, root: DataRoot, needed: Mapping[str, int], version: str = "") -> None:
        self._root, self._version = root, version
        self._top = Path(root.cache_folder)
        self._distrusted: set[str] = set()
        self._needed = {self._place(path): size_bytes for path, size_bytes in needed.items()}
        self._index = Index(self._top, root.cache_bytes, self._lock_path)
        self._lease: tuple[str, int, weakref.finalize[..., Cache]] | None = None  # holder, process, how it ends

    def hold(self) -> bool:
        """Keep what this opener needs from being removed by anybody on this machine, until it is released.

        False, and nothing kept, where it does not fit beside what others keep. In a folder that may only be read
        nothing is kept, since nothing is removed.
        """
        if sum(self._needed.values()) > self._root.cache_bytes:
            return False
        if not self._needed or (self._top.is_dir() and not os.access(self._top, os.W_OK)):
            return True
        with self._naming_the_folder(), ExitStack() as lease:
            holder = f"lease.{secrets.token_hex(6)}.lock"
            lease.callback((self._top / holder).unlink, missing_ok=True)
            lease.enter_context(locked(str(self._top / holder)))
            if not self._index.lease(holder, {self._name(place): size for place, size in self._needed.items()}):
                return False
            ends = weakref.finalize(self, _end, lease.pop_all(), os.getpid())
            self._lease = holder, os.getpid(), ends
        return True

    def release(self) -> None:
        """Undo `hold`; for a cache that is garbage collected, or whose process ends, the system does."""
        if self._lease is None:
            return
        holder, process, ends = self._lease
        self._lease = None
        if os.getpid() == process:
            with suppress(UnwritableError, ConfigError):  # the folder is gone, and with it the lease
                self._index.release(holder)
        ends()

    def local(self, path: str, size_bytes: int, fault: Fault | None = None) -> Path:
        """The copy of an object of this size, made now if there is none.

        UpstreamError where there is no object; DamagedError where it is short, or `fault` says what is wrong with its
        bytes, in every try; UnwritableError where the folder keeps no copy.
        """
        place = self._place(path)
        with self._naming_the_folder():
            if _is_copied(place, size_bytes):
                return place
            with self._copying(path):
                if not _is_copied(place, size_bytes):
                    self._fetch(path, place, size_bytes, fault)
        return place

    def open(self, path: str, fault: Fault) -> BinaryIO:
        """The copy of a shard, opened; the opener of this cache or a listing says its size. Raises as `local`."""
        size_bytes = self._needed.get(self._place(path)) or listing.size_bytes(path)
        if size_bytes is None:
            raise UpstreamError(f"{path} does not exist")
        with suppress(FileNotFoundError):  # others may make room between the two
            return self.local(path, size_bytes, fault).open("rb")
        with self._naming_the_folder():
            return self.local(path, size_bytes, fault).open("rb")

    def distrust(self, path: str, inode: int) -> bool:
        """Give up a copy that proved wrong, and return whether to read again: no, if it was copied again before.

        `inode` is that of the file with the wrong bytes: the copy may be another file by now.
        """
        place = self._place(path)
        with self._naming_the_folder(), self._copying(path):
            try:
                if place.stat().st_ino != inode:
                    return True
            except FileNotFoundError:
                return True
            if path in self._distrusted:
                return False
            self._distrusted.add(path)
            place.unlink()
            self._index.gone(self._name(place))
        return True

    def _fetch(self, path: str, place: Path, size_bytes: int, fault: Fault | None) -> None:
        """Make a copy. The caller holds its lock."""
        self._reserve(self._name(place), size_bytes)
        if size_bytes > remote.PIECE_BYTES:
            self._fetch_pieces(path, place, size_bytes, fault)
        else:
            try:
                with atomic.staged_file(str(place)) as temporary, temporary.open("xb") as file:
                    os.posix_fallocate(file.fileno(), 0, size_bytes)  # a full disk says so now
                    file.write(self._read(path, size_bytes, fault))
            except BaseException:
                with suppress(UnwritableError, ConfigError):  # the first error says more
                    self._index.gone(self._name(place))
                raise
        self._index.made(self._name(place))

    def _fetch_pieces(self, path: str, place: Path, size_bytes: int, fault: Fault | None) -> None:
        """Make a large copy piece by piece. Stopped at any point, the next process goes on where this one was.

        What is there keeps its room in the index, until that is needed for others.
        """
        temporary = place.with_name(f".{place.name}.pieces{atomic.SUFFIX}")
        atomic.make_folder(place.parent)
        while True:
            with temporary.open("ab") as file:
                there = file.tell() // remote.PIECE_BYTES * remote.PIECE_BYTES
                file.truncate(there)
                try:
                    for piece in remote.read_pieces(path, size_bytes, there):
                        file.write(piece)
                except FileNotFoundError as error:
                    raise UpstreamError(f"{path} does not exist") from error
            wrong = fault(np.memmap(temporary, np.uint8, "r").data) if fault else None
            if wrong is None:
                atomic.publish_file(temporary, place)
                return
            temporary.unlink()
            if there == 0:  # else this disk may have changed what was there
                raise DamagedError(f"{path}: {wrong}")

    def _read(self, path: str, size_bytes: int, fault: Fault | None) -> bytes:
        try:
            return remote.read_exactly(path, size_bytes, fault=fault)
        except FileNotFoundError as error:
            raise UpstreamError(f"{path} does not exist") from error
        except DamagedError as error:
            if (found := listing.size_bytes(path)) in (None, size_bytes):
                raise
            raise listing.untrue(f"{path} has {found} bytes and was listed with {size_bytes}") from error

    def _reserve(self, name: str, size_bytes: int) -> None:
        """Count a file of this size within the bound; waits for copies that others are making, which end as files."""
        for _ in range(round(PATIENCE_S / _LOOK_S)):
            has_room, some_end = self._index.reserve(name, size_bytes)
            if has_room:
                return
            if not some_end:
                break
            time.sleep(_LOOK_S)
        raise StoreError(
            f"{self._top} is full: {self._root.cache_bytes / 1e9:g} GB are in use. Raise cache.size_gb, or name "
            "another cache.folder"
        )

    def _name(self, place: Path) -> str:
        """Of a copy in the index."""
        return str(place.relative_to(self._top))

    def _place(self, path: str) -> Path:
        place = place_of(self._root, path)
        return place.with_name(place.name + self._version)

    def _copying(self, path: str) -> AbstractContextManager[None]:
        """Exclusive among threads and processes of this machine."""
        return locked(str(self._lock_path(self._name(self._place(path)))))

    def _lock_path(self, name: str) -> Path:
        return self._top / f"copy.{int(digest(name)[:4], 16) % _LOCKS:02d}.lock"

    @contextmanager
    def _naming_the_folder(self) -> Iterator[None]:
        """An error of the cache's disk is reported as such, not as one of the object store."""
        try:
            yield
        except OSError as error:
            cause = error.__cause__ if isinstance(error, UnwritableError) else error
            if not isinstance(cause, OSError) or cause.errno not in _KEEPS_NONE:
                raise
            raise UnwritableError(
                f"cache.folder {self._top} keeps no copies ({cause}). Make room there and let this user write, name "
                "another cache.folder, or set cache.size_gb to 0 to read from the object store"
            ) from error


def _end(lease: ExitStack, process: int) -> None:
    """Let go of the lock, not of one that this process has from its parent."""
    if os.getpid() == process:
        lease.close()


def _is_copied(place: Path, size_bytes: int) -> bool:
    try:
        if place.stat().st_size != size_bytes:
            return False
        os.utime(place)  # used now
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in _READ_ONLY:  # there it may be read all the same
            raise
    return True


_compared: set[tuple[int, int, int]] = set()  # device, inode and checksum of copies that this process has compared


def _as_copied(place: Path, crc: int) -> bool:
    with place.open("rb") as file:
        found = os.fstat(file.fileno())
        key = (found.st_dev, found.st_ino, crc)
        if key not in _compared and crc32c(np.memmap(file, np.uint8, "r")) == crc:
            _compared.add(key)
        return key in _compared
