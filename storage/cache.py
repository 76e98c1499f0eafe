"""Local copies of what never changes in an object store: whole shards and row files, in a folder of bounded size.

A copy takes its name only when it is whole: its length and, for a shard, index and checksums were compared with the
commit. A copy that proves wrong later is copied again, once: this disk changed it. Room is made by removing the copies
of other runs, least recently used first; copies held in this process are never removed, so that latents and pixels of a
run share the bound. Any number of processes share a folder. When a set is copied at all: shard_files.py.
"""

import errno
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from weakref import WeakSet

import numpy as np

from storage import atomic, listing, remote
from storage.digest import crc32c, digest
from storage.errors import ConfigError, StoreError, UnwritableError, UpstreamError
from storage.locks import locked
from storage.remote import is_local
from storage.root import DataRoot

LEFTOVER_AGE_S = 3600.0  # our choice: a download of a shard (67 MB) that took longer has died
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
_LOCKS = 64  # our choice: so many copies are made at once by all processes of a machine


def fits(root: DataRoot, needed: Mapping[str, int]) -> bool:
    """Whether files (path: size in bytes) fit the cache's bound; ConfigError for a bound that holds none of them.

    Room that other openers of this process need is not counted as free. A bound of 0 switches the cache off.
    """
    largest = max(needed.values(), default=0)
    if 0 < root.cache_bytes < largest:
        raise ConfigError(
            f"cache.size_gb: {root.cache_bytes / 1e9:g} GB hold no shard of {largest / 1e9:g} GB. Raise it to the size "
            f"of the set ({sum(needed.values()) / 1e9:g} GB), or set 0 to read rows from the object store"
        )
    return fits_beside(root, needed)


def fits_beside(root: DataRoot, needed: Mapping[str, int]) -> bool:
    """Whether files fit beside what other openers of this process need."""
    places = {place_of(root, path) for path in needed}
    top = Path(root.cache_folder)
    others = {place: size for place, size in _needed_now().items() if place not in places and top in place.parents}
    return sum(needed.values()) + sum(others.values()) <= root.cache_bytes


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

    def fault(data: bytes) -> str | None:
        return None if crc is None or crc32c(data) == crc else "its bytes differ from their checksum"

    if fits_beside(root, {path: size_bytes}):
        cache = Cache(root, {path: size_bytes}, version="" if crc is None else f".{crc:08x}")
        place = cache.local(path, size_bytes, fault)
        while crc is not None and not _as_copied(place, crc) and cache.distrust(path, place.stat().st_ino):
            place = cache.local(path, size_bytes, fault)
        return np.load(place, mmap_mode="r", allow_pickle=False)
    return np.load(io.BytesIO(remote.read_exactly(path, size_bytes, fault=fault)), allow_pickle=False)


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
        self.needed = {self._place(path): size_bytes for path, size_bytes in needed.items()}

    def hold(self) -> None:
        """Keep other openers of this process from removing what this one needs, and from counting on its room."""
        with _held_guard:
            _held.add(self)

    def release(self) -> None:
        """Undo `hold`; a cache that is garbage collected is released by itself."""
        with _held_guard:
            _held.discard(self)

    def local(self, path: str, size_bytes: int, fault: Callable[[bytes], str | None] | None = None) -> Path:
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

    def open(self, path: str, fault: Callable[[bytes], str | None]) -> BinaryIO:
        """The copy of a shard, opened; the opener of this cache or a listing says its size. Raises as `local`."""
        size_bytes = self.needed.get(self._place(path)) or listing.size_bytes(path)
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
        return True

    def _fetch(self, path: str, place: Path, size_bytes: int, fault: Callable[[bytes], str | None] | None) -> None:
        with ExitStack() as naming, atomic.staged_file(str(place)) as temporary:
            self._reserve(temporary, size_bytes)
            try:
                data = remote.read_exactly(path, size_bytes, fault=fault)
            except FileNotFoundError as error:
                raise UpstreamError(f"{path} does not exist") from error
            with temporary.open("r+b") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # here, so that the lock is held for a rename only
            naming.enter_context(self._lock("room"))  # a process that adds up sizes would miss a file renamed meanwhile

    def _reserve(self, temporary: Path, size_bytes: int) -> None:
        """Create a file of this size within the bound; waits for copies that others are making, which end as files."""
        for _ in range(round(PATIENCE_S / _LOOK_S)):
            with self._lock("room"):
                over, in_the_making = self._make_room(size_bytes)
                if over <= 0:
                    with temporary.open("xb") as file:
                        os.posix_fallocate(file.fileno(), 0, size_bytes)  # others count it, and a full disk says so now
                    return
            if not in_the_making:
                break
            time.sleep(_LOOK_S)
        raise StoreError(
            f"{self._top} is full: {self._root.cache_bytes / 1e9:g} GB are in use. Raise cache.size_gb, or name "
            "another cache.folder"
        )

    def _make_room(self, size_bytes: int) -> tuple[int, int]:
        """Remove copies that no opener here needs until so many bytes fit; (bytes that do not, temporaries)."""
        atomic.remove_leftovers(str(self._top), LEFTOVER_AGE_S)
        found, kept = [], self.needed | _needed_now()
        for path in self._top.glob("*/**/*"):
            with suppress(FileNotFoundError):  # a copy was given up
                found += [(path, path.stat())] if path.is_file() else []
        over = sum(stat.st_size for _, stat in found) + size_bytes - self._root.cache_bytes
        for path, stat in sorted(found, key=lambda entry: entry[1].st_mtime_ns):
            if over > 0 and path not in kept and path.suffix != atomic.SUFFIX:
                path.unlink(missing_ok=True)  # a process that has it mapped keeps the bytes
                over -= stat.st_size
        return over, sum(path.suffix == atomic.SUFFIX for path, _ in found)

    def _place(self, path: str) -> Path:
        place = place_of(self._root, path)
        return place.with_name(place.name + self._version)

    def _copying(self, path: str) -> AbstractContextManager[None]:
        return self._lock(f"copy.{int(digest(path)[:4], 16) % _LOCKS:02d}")

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

    def _lock(self, name: str) -> AbstractContextManager[None]:
        """Exclusive among threads and processes of this machine."""
        return locked(str(self._top / f"{name}.lock"))


_held: WeakSet[Cache] = WeakSet()
_held_guard = threading.Lock()


def _needed_now() -> dict[Path, int]:
    """Every copy that is held for an opener of this process, made or not, and its size in bytes."""
    with _held_guard:
        return {place: size_bytes for cache in _held for place, size_bytes in cache.needed.items()}


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
