"""The bytes of committed rows, wherever their store is: maps of its files, maps of local copies, or ranges of objects.

Of a store on an object store, the shards that rows read again and again are in are copied, each when its first row is
announced, if all of them fit the cache beside what else is held there; else each row is one ranged request. Nothing in
between. The readers (reader.py) say where in a shard a row is and compare it with its checksum.

Ranges are requested ahead of their use, a group at once; a reader of one waits for its answer, and asks again, alone
and a bounded number of times, where none came or its bytes are wrong.
"""

import ctypes
import io
import mmap
import os
import struct
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import UInt8

from storage import atomic, remote, shard
from storage.cache import Cache
from storage.digest import crc32c
from storage.errors import DamagedError, StoreError, is_damage
from storage.part import OTHER_BYTES, Part, S
from storage.remote import is_local
from storage.store import Store

AT_ONCE = 8  # our choice: shards copied, parts listed, groups of ranges read at a time; `CONNECTIONS` bounds them all
AHEAD_ROWS = 4096  # our choice where a caller names no number; the loader does where its batches are larger
MOST_MAPS = 30_000  # Linux allows 65530 maps a process (vm.max_map_count): latents and pixels have as many each
ADDRESSES_CHANGED = "the trainset's file of rows is not what was frozen, 'nextvid verify' names it"

Range = tuple[str, int, int]  # path, start and size in bytes
KEY = struct.Struct("<IIHI")  # a shard: frames, then as an address has them its batch, part and number
PART_BYTES = 10  # of a key: without the shard's number
Key = bytes
M = TypeVar("M")

_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap, _madvise = _libc.mmap, _libc.munmap, _libc.madvise
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_mmap.restype = ctypes.c_void_p
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mincore = ctypes.PyDLL(None).mincore  # keeps the interpreter: it never waits, and releasing it costs as much
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


@dataclass(frozen=True)
class MappedShard:
    """A shard's file in memory."""

    memory: UInt8[np.ndarray, " bytes"]
    start: int  # address of the first byte, which begins a page
    pages_known: bool  # whether the kernel says which pages are in memory: it does to a user who may write the file
    inode: int  # of the file that is mapped

    def will_need(self, start: int, stop: int) -> bool:
        """Hint that these bytes are read soon, unless all are in memory: asking takes half of a hint's time.

        Returns whether a hint was given. Not mmap's own madvise: that holds the interpreter while it waits.
        """
        first = self.start + start - start % mmap.PAGESIZE
        if self.pages_known and _in_memory(first, self.start + stop - first):
            return False
        _madvise(first, self.start + stop - first, mmap.MADV_WILLNEED)  # a hint: failing changes nothing
        return True


class _Pages:
    """Pages of a mapped file, which numpy takes as bytes; unmapped with this."""

    def __init__(self, start: int, size_bytes: int) -> None:
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "data": (start, False), "shape": (size_bytes,)}
        weakref.finalize(self, _munmap, start, size_bytes).atexit = False  # a thread may still read then


def mapped(file: int, size_bytes: int) -> UInt8[np.ndarray, " bytes"]:
    """An open file in memory, until nobody has the array; the file may be closed. ValueError where it is empty.

    Python's own mmap keeps a descriptor for each map, of which a process has 1,024 unless somebody asked for more.
    """
    if size_bytes == 0:
        raise ValueError("it is empty")
    # private: torch wants writable memory to read from, and what is written here never reaches the file
    start = _mmap(None, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, file, 0)
    if start == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return np.asarray(_Pages(start, size_bytes))


def _in_memory(start: int, size_bytes: int) -> bool:
    """Whether all pages of a map from this one on are in the page cache."""
    pages = -(-size_bytes // mmap.PAGESIZE)
    found = ctypes.create_string_buffer(pages)
    return _mincore(start, size_bytes, found) == 0 and found.raw.count(1) == pages


class Maps(Generic[M]):
    """Maps of shards, the least recently used are dropped first. Threads may share it.

    As many are kept as rows are announced and not read at a time, since each may be in another shard. Opening one costs
    20 us (measured).
    """

    def __init__(self, ahead_rows: int) -> None:
        self._most = min(ahead_rows, MOST_MAPS)
        self._held: OrderedDict[Key, M] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, key: Key) -> M | None:
        """The map of a shard, if it is held."""
        try:  # without the guard: each of the two is one step of the interpreter, and it is done for every row
            self._held.move_to_end(key)
            return self._held[key]
        except KeyError:
            return None

    def add(self, key: Key, fresh: M) -> M:
        """Keep the map of a shard; the one that is held, since another thread may have been faster."""
        with self._guard:
            mapped = self._held.setdefault(key, fresh)
            while len(self._held) > self._most:
                self._held.popitem(last=False)  # unmapped once nobody reads from it
            return mapped

    def add_all(self, keys: Sequence[Key], addresses: np.ndarray, opened: Callable[[Key, np.void], M]) -> None:
        """Open all of these shards that are not held, several at a time; `addresses` are of a row in each."""
        new = {key: address for key, address in zip(keys, addresses, strict=True) if key not in self._held}
        if len(new) > 1:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda key: self.add(key, opened(key, new[key])), new))

    def forget(self, key: Key, mapped: M) -> None:
        """Drop this map of a shard, unless another has taken its place."""
        with self._guard:
            if self._held.get(key) is mapped:
                del self._held[key]

    def clear(self) -> None:
        """Drop all maps."""
        with self._guard:
            self._held.clear()


class Ranges:
    """Reads ranges of objects; `announce` only saves time. Threads may share it.

    Of more than `ahead_rows` that are announced and not read the oldest are dropped: nobody reads them any more.
    """

    def __init__(self, ahead_rows: int) -> None:
        self._most = ahead_rows
        self._ahead: OrderedDict[Range, tuple[Future[list[bytes | None]], int]] = OrderedDict()  # group, place in it
        self._guard = threading.Lock()
        self._closing = threading.Event()
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(AT_ONCE, "ranges")

    def announce(self, ranges: Iterable[Range]) -> None:
        """Ask for these now; waits for nothing."""
        self._refuse_fork()
        with self._guard:
            new = [place for place in dict.fromkeys(ranges) if place not in self._ahead]
            if not new:
                return
            asked = self._pool.submit(remote.read_ranges, new, self._closing)
            self._ahead |= {place: (asked, number) for number, place in enumerate(new)}
            while len(self._ahead) > max(self._most, len(new)):
                self._ahead.popitem(last=False)

    def read(self, wanted: Range, crc: int, damaged: Callable[[str], DamagedError]) -> bytes:
        """Bytes of a range with this crc32c.

        Raises what `damaged` makes of the fault: there is no object, or every answer is short or holds other bytes.
        """

        def fault(data: bytes) -> str | None:
            return None if crc32c(data) == crc else OTHER_BYTES

        path, start, size_bytes = wanted
        self._refuse_fork()
        with self._guard:
            asked = self._ahead.pop(wanted, None)
        if asked is not None:
            group, number = asked
            with suppress(Exception):  # asked again alone, which explains what fails
                found = group.result()
                data, found[number] = found[number], None
                if data is not None and len(data) == size_bytes and fault(data) is None:
                    return data
        try:
            return remote.read_exactly(path, size_bytes, start=start, fault=fault)
        except FileNotFoundError as error:
            raise damaged("there is no such file") from error
        except DamagedError as error:
            raise damaged(str(error).removeprefix(f"{path}: ")) from error

    def close(self) -> None:
        """Drop what was announced, wait for what is under way."""
        if self._process != os.getpid():
            return
        self._closing.set()
        with self._guard:
            self._ahead.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _refuse_fork(self) -> None:
        """StoreError in a fork, which has none of the threads that read: it would wait for them for ever."""
        if self._process != os.getpid():
            raise StoreError(
                f"this reader of an object store was opened by process {self._process}, of which this one is a fork: "
                "open a reader in each process, as LatentDataset does"
            )


class ShardFiles(Generic[S]):
    """The shards of a store, by the numbers in addresses; `batches` are the keys that an address' `batch` counts.

    `row_of` names the row of an address in messages. `copied` are shards to be copied here if all of them fit the
    cache beside what other processes hold there; of others on an object store, `ahead_rows` are announced and not read
    at a time.
    """

    def __init__(
        self,
        store: Store[S],
        batches: Sequence[str],
        row_of: Callable[[Part[S], np.void], str],
        copied: "Cited[S] | None" = None,
        ahead_rows: int = AHEAD_ROWS,
    ) -> None:
        self._store, self._batches, self._row_of = store, tuple(batches), row_of
        # one lookup a row, and their paths are remembered
        self._parts: dict[bytes, Part[S]] = {} if copied is None else copied.parts  # by the key without the shard
        self._sealed: dict[bytes, bool] = {}  # by the same
        self.cache: Cache | None = None
        self.ranges: Ranges | None = None
        if copied is not None:
            cache = Cache(store.root, copied.sizes)
            self.cache = cache if cache.hold() else None
        if self.cache is None and not is_local(store.root.url):
            self.ranges = Ranges(ahead_rows)

    def part(self, key: Key) -> Part[S]:
        """The part of a shard; DamagedError where its batch is none of this reader's."""
        if (known := self._parts.get(key[:PART_BYTES])) is not None:
            return known
        frames, batch, part, _ = KEY.unpack(key)
        if batch >= len(self._batches):
            raise DamagedError(f"an address names batch {batch} of {len(self._batches)}: {ADDRESSES_CHANGED}")
        return self._parts.setdefault(key[:PART_BYTES], self._store.part(self._batches[batch], frames, part))

    def _committed(self, key: Key, part: Part[S]) -> bool:
        """Whether a shard is committed: that a part is sealed is asked once, with its first shard that is mapped.

        Less than `read_seal` asks: a row is compared with its own checksum, and a listing grows with the shards. Of a
        copy nothing is asked: it was compared with the shard's commit before it took its name.
        """
        if self.cache is not None:
            return True
        if (sealed := self._sealed.get(key[:PART_BYTES])) is None:
            sealed = self._sealed.setdefault(key[:PART_BYTES], atomic.exists(part.seal_path))
        return sealed or part.committed(_number(key))

    def map(self, key: Key, address: np.void) -> MappedShard:
        """The map of a committed shard; DamagedError where there is none or it cannot be read."""
        part, number = self.part(key), _number(key)
        if not self._committed(key, part):
            raise self.damaged(key, address, "is not committed")
        path = part.shard_path(number)
        try:
            with (
                self.cache.open(path, lambda data: shard_fault(part, number, data)) if self.cache else io.FileIO(path)
            ) as file:
                found = os.fstat(file.fileno())
                memory = mapped(file.fileno(), found.st_size)
        except (OSError, ValueError) as error:  # a plain ValueError: the file is empty
            if not is_damage(error):
                raise
            raise self.damaged(key, address, f"cannot be read ({error})") from error
        # its owner may write it, whatever its mode
        pages_known = found.st_uid == os.geteuid() or os.access(
            self._store.root.cache_folder if self.cache else path, os.W_OK
        )
        return MappedShard(memory, memory.ctypes.data, pages_known, found.st_ino)

    def read(self, key: Key, address: np.void, offset: int, size_bytes: int) -> bytes:
        """A row by a ranged request, checked; DamagedError where every answer is wrong."""
        assert self.ranges is not None, "these files are mapped"
        wanted = self.part(key).shard_path(_number(key)), offset, size_bytes
        return self.ranges.read(wanted, int(address["crc"]), lambda what: self.damaged(key, address, what))

    def announce(self, rows: Sequence[tuple[Key, int, int]]) -> None:
        """Request rows (key, offset, size in bytes) now that are read soon; waits for nothing."""
        assert self.ranges is not None, "these files are mapped"
        self.ranges.announce((self.part(key).shard_path(_number(key)), offset, size) for key, offset, size in rows)

    def is_stale(self, key: Key, inode: int) -> bool:
        """Whether a mapped file with wrong bytes was a copy: it is given up now, so that reading again may help."""
        return self.cache is not None and self.cache.distrust(self.part(key).shard_path(_number(key)), inode)

    def damaged(self, key: Key, address: np.void, what: str) -> DamagedError:
        """The error that names file, row and remedy."""
        part, number = self.part(key), _number(key)
        row = self._row_of(part, address)
        return DamagedError(f"{part.shard_path(number)}, row {row}: {what}. Remedy: {part.remedy(number)}")

    def close(self) -> None:
        """Drop what was announced, wait for what is under way; others may have the room of the copies."""
        if self.cache is not None:
            self.cache.release()
        if self.ranges is not None:
            self.ranges.close()


def _number(key: Key) -> int:
    """Of the shard in its part."""
    return int.from_bytes(key[PART_BYTES:], "little")


def shards_of(rows: np.ndarray) -> dict[tuple[int, int], list[int]]:
    """Numbers of the shards that rows (ADDRESS or PIXEL_ADDRESS [n]) are in, by (batch, part), all ascending."""
    # as numbers: numpy sorts rows of several fields 30 times slower
    places = rows["batch"].astype(np.uint64) << np.uint64(16) | rows["part"]
    parts, which = np.unique(places, return_inverse=True)
    found: dict[tuple[int, int], list[int]] = {}
    for one in np.unique(which.astype(np.uint64) << np.uint64(32) | rows["shard"]).tolist():
        batch, part = divmod(int(parts[one >> 32]), 1 << 16)
        found.setdefault((batch, part), []).append(one & 0xFFFFFFFF)
    return found


def cited_parts(
    store: Store[S], batches: Sequence[str], stored: Mapping[int, np.ndarray]
) -> Iterator[tuple[Part[S], list[int], dict[str, int]]]:
    """Each part that rows (addresses [n] by frames) are in: the numbers of their shards, and size in bytes by path.

    Sizes are of every file of the part, by one listing.
    """
    places = [(frames, place, shards) for frames, rows in stored.items() for place, shards in shards_of(rows).items()]
    if (last := max((batch for _, (batch, _), _ in places), default=-1)) >= len(batches):
        raise DamagedError(f"an address names batch {last} of {len(batches)}: {ADDRESSES_CHANGED}")
    cited = [(store.part(batches[batch], frames, number), shards) for frames, (batch, number), shards in places]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(lambda one: (*one, one[0].files()), cited)


@dataclass(frozen=True)
class Cited(Generic[S]):
    """Shards that rows are in: size in bytes by path, and their parts by the keys of their shards."""

    sizes: dict[str, int]
    parts: dict[bytes, Part[S]]


def cited_shards(store: Store[S], batches: Sequence[str], stored: Mapping[int, np.ndarray]) -> Cited[S]:
    """Every shard that rows (addresses [n] by frames) are in, if it is listed."""
    found: Cited[S] = Cited({}, {})
    numbers_of = {batch: number for number, batch in enumerate(batches)}
    for part, numbers, files in cited_parts(store, batches, stored):
        found.parts[KEY.pack(part.frames, numbers_of[part.batch], part.number, 0)[:PART_BYTES]] = part
        found.sizes.update((path, files[path]) for path in map(part.shard_path, numbers) if path in files)
    return found


def shard_fault(part: Part[S], number: int, data: bytes | memoryview) -> str | None:
    """What is wrong with the bytes of a committed shard; withdrawn rows are zeros, which nobody reads."""
    rows = part.rows(number)
    end = max(row.offset + row.size_bytes for row in rows)
    if data[end:] != shard.index_of([(row.offset, row.size_bytes) for row in rows]):
        return f"it is short or its index was changed ({len(data)} bytes)"
    for row in rows:
        found = np.frombuffer(data, np.uint8, row.size_bytes, row.offset)
        if row.status == "ok" and crc32c(found) != row.crc32c and found.any():
            return f"row {row.row_id.hex()} differs from its checksum"
    return None
