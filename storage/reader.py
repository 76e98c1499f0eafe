"""RowReader: rows of a latent store by address, through memory maps and arithmetic. The read path of training.

The offset of a row is slot * row_bytes, so a row is a view of a mapped file (int8: unpacked from one), and who wants it
copies it once (research: store, B and F). A file is checked when it is mapped (its commit exists, its size and index
are right) and each row's crc32c the first time it is asked for through that map, before anybody sees it. Threads may
share a reader. `read_row` is the slow oracle through zarr-python. Must not know draws, batches of clips or torch.
"""

import ctypes
import itertools
import mmap
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl
from jaxtyping import Float16, UInt8

from storage import shard
from storage.digest import crc32c
from storage.errors import DamagedError, is_damage
from storage.latents import LatentStore
from storage.part import Part
from storage.root import DataRoot
from storage.shard import ROWS_PER_SHARD
from storage.spec import EncodingSpec
from storage.verify import OTHER_BYTES, encode_again

# One row of a store; `slot` counts within the shard. Little-endian on disk.
ADDRESS = np.dtype(
    [("row_id", "<u8", 2), ("batch", "<u4"), ("part", "<u2"), ("shard", "<u4"), ("slot", "<u2"), ("crc", "<u4")]
)
ADDRESSES_CHANGED = "the trainset's file of rows is not what was frozen, 'nextvid verify' names it"
_FIELDS = struct.Struct("<16xIHIHI")  # an ADDRESS but for its row id: a sixth of the time of numpy's own conversion
Fields = tuple[Any, ...]  # batch, part, shard, slot, crc as Python numbers
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mincore = ctypes.PyDLL(None).mincore  # keeps the interpreter: it never waits, and giving it away costs as much
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_OPEN_MAPS = 512  # Linux allows 65530 maps a process (vm.max_map_count); opening one costs 20 us (research: store, F)


@dataclass(frozen=True)
class _Mapped:
    """One shard's file: its bytes, and which rows passed their checksum in this map."""

    memory: mmap.mmap
    rows: UInt8[np.ndarray, "n bytes"]
    values: Float16[np.ndarray, "n F C h w"] | None  # the same bytes; None where each row must be unpacked
    checked: np.ndarray  # bool [n]
    told: bool  # whether the kernel says which pages lie in memory: to a file's owner and who may write it
    start: int  # address of the first byte, which begins a page
    inode: int  # of the file that is mapped

    def will_need(self, start: int, stop: int) -> None:
        """Hint that these bytes are read soon, unless all are in memory: asking takes a tenth of a hint's time.

        Not mmap's own madvise: that holds the interpreter while it waits.
        """
        first = self.start + start - start % mmap.PAGESIZE
        if not (self.told and _in_memory(first, self.start + stop - first)):
            _madvise(first, self.start + stop - first, mmap.MADV_WILLNEED)  # a hint: failing changes nothing


class RowReader:
    """Reads rows of one spec; `batches` are the keys that the addresses' `batch` counts."""

    def __init__(self, root: DataRoot, spec: EncodingSpec, batches: Sequence[str], open_maps: int = _OPEN_MAPS) -> None:
        self._store = LatentStore(root, spec)
        self._batches = tuple(batches)
        self._open_maps = open_maps
        self._maps: OrderedDict[tuple[int, int, int, int], _Mapped] = OrderedDict()
        self._guard = threading.Lock()

    def rows(self, frames: int, addresses: np.ndarray) -> list[Float16[np.ndarray, "F C h w"]]:
        """Rows, ADDRESS [n] -> n arrays: views of their maps, valid as long as they are held and not to be written.

        Raises DamagedError where a file or a row's bytes are not as committed.
        """
        return [self._row(frames, fields, addresses[n]) for n, fields in enumerate(_fields(addresses))]

    def read_into(self, frames: int, address: np.void, out: Float16[np.ndarray, "F C h w"]) -> None:
        """Copy one row into `out` (float16, C order), which keeps its values where DamagedError is raised."""
        row = self._row(frames, _FIELDS.unpack(address.tobytes()), address)
        assert out.dtype == np.float16, f"out is {out.dtype}"
        assert out.flags.c_contiguous, "out is not in C order"
        assert out.shape == row.shape, f"out has shape {out.shape}, not {row.shape}"
        np.copyto(out, row)

    def will_need(self, frames: int, addresses: np.ndarray) -> None:
        """Tell the kernel that these rows are read soon, neighbours in one call.

        Waits at most for indexes of shards not mapped yet, and where the disk's queue is full.
        """
        row_bytes = self._store.spec.row_bytes(frames)
        waiting: tuple[_Mapped, int, int] | None = None  # map, first and last slot + 1 of neighbours found so far
        for (batch, part, number, slot, _), n in sorted(zip(_fields(addresses), itertools.count(), strict=False)):
            mapped = self._mapped((frames, batch, part, number), addresses[n])
            if waiting is not None and waiting[0] is mapped and slot <= waiting[2]:
                waiting = mapped, waiting[1], slot + 1
                continue
            if waiting is not None:
                waiting[0].will_need(waiting[1] * row_bytes, waiting[2] * row_bytes)
            waiting = mapped, slot, slot + 1
        if waiting is not None:
            waiting[0].will_need(waiting[1] * row_bytes, waiting[2] * row_bytes)

    def close(self) -> None:
        """Forget all maps; the reader stays usable and maps again."""
        with self._guard:
            self._maps.clear()

    def _row(self, frames: int, fields: Fields, address: np.void) -> Float16[np.ndarray, "F C h w"]:
        """View of one row, checked; `fields` are those of the address, which serves messages."""
        batch, part, number, slot, crc = fields
        mapped = self._mapped((frames, batch, part, number), address)
        if slot >= len(mapped.rows):
            what = f"has {len(mapped.rows)} rows, none in slot {slot}: {ADDRESSES_CHANGED}"
            raise self._damaged(frames, address, what)
        if not mapped.checked[slot]:
            if crc32c(mapped.rows[slot]) != crc:
                if self._is_stale(frames, address, mapped.inode):
                    self._forget((frames, batch, part, number), mapped)
                    return self._row(frames, fields, address)
                raise self._damaged(frames, address, OTHER_BYTES)
            mapped.checked[slot] = True
        if mapped.values is not None:
            row: np.ndarray = mapped.values[slot]
            return row
        return shard.unpacked(mapped.rows[slot], self._store.spec.storage, self._store.spec.row_shape(frames))

    def _mapped(self, key: tuple[int, int, int, int], address: np.void) -> _Mapped:
        """Map of a shard, by frames, batch, part and shard; `address` is one of its rows, for messages."""
        try:  # without the guard: each of the two is one step of the interpreter, and it is done for every row
            self._maps.move_to_end(key)
            return self._maps[key]
        except KeyError:
            pass
        fresh = self._map(key[0], address)  # outside the guard: it waits for the disk
        with self._guard:
            mapped = self._maps.setdefault(key, fresh)  # another thread may have been faster
            while len(self._maps) > self._open_maps:
                self._maps.popitem(last=False)  # unmapped once no thread copies from it
            return mapped

    def _map(self, frames: int, address: np.void) -> _Mapped:
        part, row_bytes = self._part(frames, address), self._store.spec.row_bytes(frames)
        number = int(address["shard"])
        if not part.committed(number):
            raise self._damaged(frames, address, "is not committed")
        try:
            with self._open(part, number) as file:
                inode, told = os.fstat(file.fileno()).st_ino, os.access(file.name, os.W_OK)
                # private: torch wants writable memory to read from, and what is written here never reaches the file
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # a plain ValueError: the file is empty
            if not is_damage(error):
                raise
            raise self._damaged(frames, address, f"cannot be read ({error})") from error
        rows = shard.rows_in(len(memory), row_bytes)
        if rows is None or memory[rows * row_bytes :] != shard.index(rows, row_bytes):
            if self._is_stale(frames, address, inode):
                return self._map(frames, address)
            raise self._damaged(frames, address, f"is short or its index was changed ({len(memory)} bytes)")
        data = np.frombuffer(memory, np.uint8, rows * row_bytes).reshape(rows, row_bytes)
        spec, values = self._store.spec, None
        if spec.storage != "int8":
            values = shard.unpacked(data, spec.storage, spec.row_shape(frames))
        return _Mapped(memory, data, values, np.zeros(rows, dtype=bool), told, data.ctypes.data, inode)

    def _open(self, part: Part, number: int) -> BinaryIO:
        """The file of a committed shard, on this machine."""
        return Path(part.shard_path(number)).open("rb")

    def _is_stale(self, frames: int, address: np.void, inode: int) -> bool:
        """Whether the file with wrong bytes is no truth but a copy, given up now, so that reading again may help."""
        return False

    def _forget(self, key: tuple[int, int, int, int], mapped: _Mapped) -> None:
        with self._guard:
            if self._maps.get(key) is mapped:
                del self._maps[key]

    def _part(self, frames: int, address: np.void) -> Part:
        return self._store.part(batch_of(address, self._batches), frames, int(address["part"]))

    def _damaged(self, frames: int, address: np.void, what: str) -> DamagedError:
        part, number = self._part(frames, address), int(address["shard"])
        row = row_id(address).hex()
        return DamagedError(f"{part.shard_path(number)}, row {row}: {what}. Remedy: {encode_again(part, number)}")


def _fields(addresses: np.ndarray) -> list[Fields]:
    """Those of each address."""
    return list(_FIELDS.iter_unpack(np.ascontiguousarray(addresses).data))


def _in_memory(start: int, size_bytes: int) -> bool:
    """Whether all pages of a map from this one on lie in the page cache."""
    pages = -(-size_bytes // mmap.PAGESIZE)
    found = ctypes.create_string_buffer(pages)
    return _mincore(start, size_bytes, found) == 0 and found.raw.count(1) == pages


def addresses(commits: pl.DataFrame, batches: Sequence[str]) -> np.ndarray:
    """ADDRESS of each ok row of `LatentStore.commits`, in its order; `batches` are the keys to count."""
    ok = commits.filter(pl.col("status") == "ok")
    found = np.zeros(ok.height, dtype=ADDRESS)
    found["row_id"] = np.frombuffer(b"".join(ok["row_id"].to_list()), dtype=">u8").reshape(-1, 2)
    found["batch"] = ok["batch"].replace_strict({key: n for n, key in enumerate(batches)}, return_dtype=pl.UInt32)
    found["part"] = ok["part"]
    found["shard"] = ok["shard"]
    found["slot"] = ok["slot"] % ROWS_PER_SHARD
    found["crc"] = ok["crc32c"]
    return found


def shards_of(rows: np.ndarray) -> dict[tuple[int, int], list[int]]:
    """Numbers of the shards that rows (ADDRESS or PIXEL_ADDRESS [n]) stand in, by (batch, part), all ascending."""
    # as numbers: numpy sorts rows of several fields 30 times slower
    places = rows["batch"].astype(np.uint64) << np.uint64(16) | rows["part"]
    parts, which = np.unique(places, return_inverse=True)
    found: dict[tuple[int, int], list[int]] = {}
    for one in np.unique(which.astype(np.uint64) << np.uint64(32) | rows["shard"]).tolist():
        batch, part = divmod(int(parts[one >> 32]), 1 << 16)
        found.setdefault((batch, part), []).append(one & 0xFFFFFFFF)
    return found


def batch_of(address: np.void, batches: Sequence[str]) -> str:
    """The key that an address' `batch` counts; DamagedError where it counts beyond them."""
    number = int(address["batch"])
    if number >= len(batches):
        raise DamagedError(f"an address names batch {number} of {len(batches)}: {ADDRESSES_CHANGED}")
    return batches[number]


def row_id(address: np.void) -> bytes:
    """The 16 bytes of a row's id: two big-endian halves, so that addresses sort as ids do."""
    return bytes(address["row_id"].astype(">u8"))


def read_row(store: LatentStore, batch: str, frames: int, part: int, slot: int) -> Float16[np.ndarray, "F C h w"]:
    """One row through zarr-python; `slot` counts within the part. Unchecked and slow: the oracle of the tests."""
    import zarr

    array = zarr.open_array(f"{store.part(batch, frames, part).path}/latent", mode="r")
    row = np.asarray(array[slot])
    return row if row.ndim > 1 else shard.unpacked(row.view(np.uint8), store.spec.storage, store.spec.row_shape(frames))
