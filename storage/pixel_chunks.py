"""Where the bytes of pixel rows come from: maps of local files, maps of local copies, or ranges of objects.

A row's chunk stands at an offset of its shard's file, both in its address. On an object store the shards of a set that
is read again and again are copied if all of them fit the cache beside what else is held there, each when its first row
is announced; else each row is one ranged request, as with latents (remote_reader.py). A chunk is compared with its
checksum before anybody sees it. Must not know what a chunk holds: pixel_reader.py decodes it.
"""

import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl

from storage import shard
from storage.cache import Cache, fits_beside
from storage.digest import crc32c
from storage.errors import DamagedError, is_damage
from storage.pixels import PixelPart, PixelStore
from storage.ranges import Range, Ranges
from storage.reader import batch_of
from storage.remote import is_local
from storage.remote_reader import AT_ONCE, cited
from storage.shard import INDEX_BYTES
from storage.verify import OTHER_BYTES, encode_again

# Where one row's chunk stands; which row it is, the trainset says, whose rows these addresses follow. Little-endian.
PIXEL_ADDRESS = np.dtype(
    [("batch", "<u4"), ("part", "<u2"), ("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")]
)
OPEN_MAPS = 512  # as storage/reader.py
_SUMMED = 1 << 20  # addresses whose sizes are added at a time, 28 MB of them

Key = tuple[int, int, int, int]  # frames, batch, part, shard
Mapped = tuple[mmap.mmap, int]  # a file's bytes and its inode


class Chunks(ABC):
    """Chunks by address; `batches` are the keys that the addresses' `batch` counts. Threads may share one."""

    def __init__(self, store: PixelStore, batches: Sequence[str]) -> None:
        self._store, self._batches = store, tuple(batches)

    @abstractmethod
    def chunk(self, frames: int, address: np.void) -> memoryview:
        """The bytes of one row; DamagedError where its file or they are not as committed."""

    @abstractmethod
    def will_need(self, frames: int, addresses: np.ndarray) -> None:
        """These rows are read soon."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held."""

    def damaged(self, frames: int, address: np.void, what: str) -> DamagedError:
        """The error that names file, row and remedy."""
        part, number, offset = self._part(frames, address), int(address["shard"]), int(address["offset"])
        row = _row_at(part, number, offset)
        return DamagedError(f"{part.shard_path(number)}, row {row}: {what}. Remedy: {encode_again(part, number)}")

    def _part(self, frames: int, address: np.void) -> PixelPart:
        return self._store.part(batch_of(address, self._batches), frames, int(address["part"]))


class MappedChunks(Chunks):
    """Views of mapped files."""

    def __init__(self, store: PixelStore, batches: Sequence[str], open_maps: int = OPEN_MAPS) -> None:
        super().__init__(store, batches)
        self._open_maps = open_maps
        self._maps: OrderedDict[Key, Mapped] = OrderedDict()
        self._guard = threading.Lock()

    def chunk(self, frames: int, address: np.void) -> memoryview:
        """A view, valid as long as it is held."""
        *_, offset, size_bytes, crc = address.item()
        memory, inode = mapped = self._mapped(frames, address)
        found = memoryview(memory)[offset : offset + size_bytes]
        if len(found) == size_bytes and crc32c(found) == crc:
            return found
        if self._is_stale(frames, address, inode):
            self._forget(_key(frames, address), mapped)
            return self.chunk(frames, address)
        what = OTHER_BYTES if len(found) == size_bytes else f"is short ({len(memory)} bytes)"
        raise self.damaged(frames, address, what)

    def will_need(self, frames: int, addresses: np.ndarray) -> None:
        """Tell the kernel."""
        for address in addresses:
            start, size_bytes = int(address["offset"]), int(address["size"])
            page = start - start % mmap.PAGESIZE
            memory, _ = self._mapped(frames, address)
            if start + size_bytes <= len(memory):  # else the read says so
                memory.madvise(mmap.MADV_WILLNEED, page, start + size_bytes - page)

    def close(self) -> None:
        """Forget all maps; who asks again maps again."""
        with self._guard:
            self._maps.clear()

    def _mapped(self, frames: int, address: np.void) -> Mapped:
        key = _key(frames, address)
        with self._guard:
            mapped = self._maps.get(key)
            if mapped is not None:
                self._maps.move_to_end(key)
                return mapped
        fresh = self._map(frames, address)  # outside the guard: it waits for the disk
        with self._guard:
            mapped = self._maps.setdefault(key, fresh)  # another thread may have been faster
            while len(self._maps) > self._open_maps:
                self._maps.popitem(last=False)  # unmapped once no thread decodes from it
            return mapped

    def _map(self, frames: int, address: np.void) -> Mapped:
        part, number = self._part(frames, address), int(address["shard"])
        if not part.committed(number):
            raise self.damaged(frames, address, "is not committed")
        try:
            with self._open(part, number) as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), os.fstat(file.fileno()).st_ino
        except (OSError, ValueError) as error:  # a plain ValueError: the file is empty
            if not is_damage(error):
                raise
            raise self.damaged(frames, address, f"cannot be read ({error})") from error

    def _open(self, part: PixelPart, number: int) -> BinaryIO:
        """The file of a committed shard, on this machine."""
        return Path(part.shard_path(number)).open("rb")

    def _is_stale(self, frames: int, address: np.void, inode: int) -> bool:
        """As RowReader's."""
        return False

    def _forget(self, key: Key, mapped: Mapped) -> None:
        with self._guard:
            if self._maps.get(key) is mapped:
                del self._maps[key]


class CopiedChunks(MappedChunks):
    """Views of local copies of shards. `needed`: path and size of those that it may meet."""

    def __init__(self, store: PixelStore, batches: Sequence[str], needed: Mapping[str, int]) -> None:
        super().__init__(store, batches)
        self._cache = Cache(store.root, needed)
        self._cache.hold()

    def will_need(self, frames: int, addresses: np.ndarray) -> None:
        """Copy the shards of these rows that are not here yet, several at a time, then tell the kernel."""
        first = np.unique(addresses[["batch", "part", "shard"]], return_index=True)[1]
        new = [address for address in addresses[first] if _key(frames, address) not in self._maps]
        if len(new) > 1:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(partial(self._mapped, frames), new))
        super().will_need(frames, addresses)

    def close(self) -> None:
        """Forget all maps; others may have the room of these copies."""
        self._cache.release()
        super().close()

    def _open(self, part: PixelPart, number: int) -> BinaryIO:
        return self._cache.open(part.shard_path(number), partial(_fault, part, number))

    def _is_stale(self, frames: int, address: np.void, inode: int) -> bool:
        return self._cache.distrust(self._part(frames, address).shard_path(int(address["shard"])), inode)


class RangedChunks(Chunks):
    """One ranged request a row, ahead of its use where it was announced."""

    def __init__(self, store: PixelStore, batches: Sequence[str]) -> None:
        super().__init__(store, batches)
        self._ranges = Ranges()

    def chunk(self, frames: int, address: np.void) -> memoryview:
        """Bytes of their own."""
        wanted, crc = self._range(frames, address), int(address["crc"])
        return memoryview(self._ranges.read(wanted, crc, partial(self.damaged, frames, address)))

    def will_need(self, frames: int, addresses: np.ndarray) -> None:
        """Ask for these rows now; waits for nothing."""
        self._ranges.announce(self._range(frames, address) for address in addresses)

    def close(self) -> None:
        """Drop what was announced, wait for what is under way."""
        self._ranges.close()

    def _range(self, frames: int, address: np.void) -> Range:
        path = self._part(frames, address).shard_path(int(address["shard"]))
        return path, int(address["offset"]), int(address["size"])


def open_chunks(store: PixelStore, batches: Sequence[str], stored: Mapping[int, np.ndarray] | None = None) -> Chunks:
    """The chunks of a store, wherever it is. `stored`, PIXEL_ADDRESS [n] by frames, are all rows that will be read
    again and again; without it rows are read once, so that copies of shards do not pay.
    """
    root = store.root
    if is_local(root.url):
        return MappedChunks(store, batches)
    if stored is None or root.cache_bytes == 0 or _exceed(stored, root.cache_bytes):
        return RangedChunks(store, batches)
    needed = cited(store, batches, stored)
    # not `fits`: a bound that holds shards of latents and none of pixels is no mistake
    return CopiedChunks(store, batches, needed) if fits_beside(root, needed) else RangedChunks(store, batches)


def _exceed(stored: Mapping[int, np.ndarray], bound_bytes: int) -> bool:
    """Whether these rows take more than so many bytes; looks at no more addresses than it takes to know."""
    total = 0
    for rows in stored.values():
        for first in range(0, len(rows), _SUMMED):
            total += int(rows["size"][first : first + _SUMMED].sum(dtype=np.int64))
            if total > bound_bytes:
                return True
    return False


def _key(frames: int, address: np.void) -> Key:
    return frames, int(address["batch"]), int(address["part"]), int(address["shard"])


def _row_at(part: PixelPart, number: int, offset: int) -> str:
    """The row whose chunk stands at an offset, by the commit; for messages, so it never fails."""
    try:
        return bytes(part.commit(number).row(by_predicate=pl.col("offset") == offset, named=True)["row_id"]).hex()
    except (ValueError, pl.exceptions.PolarsError):
        return f"at byte {offset}"


def _fault(part: PixelPart, number: int, data: bytes) -> str | None:
    """What is wrong with the bytes of a committed shard; withdrawn rows are zeros and nobody's to read."""
    places = part.commit(number).select("row_id", "offset", "size_bytes", "crc32c").rows()
    index = shard.index_of([None if offset is None else (offset, size) for _, offset, size, _ in places])
    if data[-INDEX_BYTES:] != index:
        return f"it is short or its index was changed ({len(data)} bytes)"
    for name, offset, size_bytes, crc in places:
        row = memoryview(data)[offset : offset + size_bytes] if offset is not None else b""
        if offset is not None and crc32c(row) != crc and any(row):
            return f"row {name.hex()} differs from its checksum"
    return None
