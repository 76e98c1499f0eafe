"""RowReader, PixelReader: rows of a store by address. The read path of training.

A row of latents is a view of a mapped file, at slot * row_bytes (int8: unpacked from one), and the caller copies it
once. A file is checked when it is mapped (its commit exists, its size and index are right) and each row's crc32c the
first time it is asked for through that map, before anybody sees it.

A row of pixels is the chunk that its address names: a read is that chunk, its checksum (10 us of a decode of
milliseconds, so each time) and the decoding of its JPEGs into the caller's buffer.

Of an object store rows come from local copies or by ranged requests (shard_files.py). Threads may share a reader.
`read_row` is the slow reference through zarr-python.

Axes: F frames or latent frames, C channels, h w cells, H W pixels.
"""

import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from jaxtyping import Float16, UInt8

from storage import shard
from storage.cache import refuse_too_small
from storage.digest import crc32c
from storage.errors import DamagedError
from storage.jpeg import decode_clip
from storage.part import OTHER_BYTES, PixelPart
from storage.remote import is_local
from storage.root import DataRoot
from storage.shard_files import ADDRESSES_CHANGED, AHEAD_ROWS, Key, MappedShard, Maps, ShardFiles, cited_shards
from storage.spec import EncodingSpec, PixelSpec
from storage.store import LatentStore, PixelStore

# One row of a store; `slot` counts within the shard. Little-endian on disk.
ADDRESS = np.dtype(
    [("row_id", "<u8", 2), ("batch", "<u4"), ("part", "<u2"), ("shard", "<u4"), ("slot", "<u2"), ("crc", "<u4")]
)
# Where one row's chunk is; which row it is, the trainset says, whose rows these addresses follow. Little-endian.
PIXEL_ADDRESS = np.dtype(
    [("batch", "<u4"), ("part", "<u2"), ("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")]
)
_SUMMED = 1 << 20  # pixel addresses whose sizes are added at a time, 28 MB of them
# Of an ADDRESS: batch, part and shard as a `Key` ends with them; slot; crc. A sixth of the time of numpy's conversion.
_PLACE = struct.Struct("<16x10sHI")
_SLOTS = struct.Struct("<16x12s4x")  # the same and the slot: those of a shard sort by slot, of which it has 256
_PIXEL_PLACE = struct.Struct("<10sQII")  # of a PIXEL_ADDRESS: the same; offset; size; crc


# Of rows that are announced the kernel is asked about one in so many while it has all in memory: of 2.9 us a row in a
# batch of 32 asking took 2.4. If one row in a hundred is on the disk, one batch of 25 finds it, and then all are asked.
SAMPLED = 8


@dataclass(frozen=True)
class _Rows:
    """The rows of one mapped shard; `checked` has the crc32c that a row had in this map, by slot."""

    file: MappedShard
    stored: UInt8[np.ndarray, "n bytes"]
    values: np.ndarray  # the same bytes as float16 [n, F, C, h, w]; as they are where each row must be unpacked
    checked: dict[int, int] = field(default_factory=dict)


class RowReader:
    """Reads rows of one spec; `batches` are the keys that the addresses' `batch` counts.

    `stored`, ADDRESS [n] by frames, are all rows that are read again and again: of an object store their shards are
    copied here if all of them fit the cache. `ahead_rows`: how many are announced and not read at a time. Raises
    ConfigError for a cache that is too small for one shard.
    """

    def __init__(
        self,
        root: DataRoot,
        spec: EncodingSpec,
        batches: Sequence[str],
        stored: Mapping[int, np.ndarray] | None = None,
        ahead_rows: int = AHEAD_ROWS,
    ) -> None:
        self._spec, self._are_packed = spec, spec.storage == "int8"
        store, copied = LatentStore(root, spec), None
        if stored is not None and root.cache_bytes > 0 and not is_local(root.url):
            rows_bytes = sum(len(rows) * spec.row_bytes(frames) for frames, rows in stored.items())
            largest = max((spec.row_bytes(frames) for frames in stored), default=0)
            if rows_bytes <= root.cache_bytes or root.cache_bytes < shard.shard_bytes(shard.ROWS_PER_SHARD, largest):
                copied = cited_shards(store, batches, stored)
                refuse_too_small(root, copied.sizes)
        self._files = ShardFiles(store, batches, lambda _, address: row_id(address).hex(), copied, ahead_rows)
        self._maps: Maps[_Rows] = Maps(ahead_rows)
        self._are_in_memory = False  # all rows that were announced last

    def rows(self, frames: int, addresses: np.ndarray) -> list[Float16[np.ndarray, "F C h w"]]:
        """Rows, ADDRESS [n] -> n arrays: views of their maps, valid as long as they are held and not to be written.

        Raises DamagedError where a file or a row's bytes are not as committed.
        """
        if self._files.ranges is not None or self._are_packed:
            packed = self.packed(frames, addresses)
            return [shard.unpacked(row, self._spec.storage, self._spec.row_shape(frames)) for row in packed]
        return [rows.values[slot] for rows, slot in self._checked(frames, addresses)]

    def packed(self, frames: int, addresses: np.ndarray) -> list[UInt8[np.ndarray, " bytes"]]:
        """The stored bytes of rows (`packed` of shard.py); the rest as `rows`."""
        if self._files.ranges is None:
            return [rows.stored[slot] for rows, slot in self._checked(frames, addresses)]
        self.will_need(frames, addresses)
        length, row_bytes = frames.to_bytes(4, "little"), self._spec.row_bytes(frames)
        found: list[np.ndarray] = []
        for address, (place, slot, _) in zip(addresses, _PLACE.iter_unpack(addresses.tobytes()), strict=True):
            data = bytearray(self._files.read(length + place, address, slot * row_bytes, row_bytes))
            # a bytearray, since torch takes writable memory only
            found.append(np.frombuffer(data, np.uint8))
        return found

    def read_into(self, frames: int, address: np.void, out: Float16[np.ndarray, "F C h w"]) -> None:
        """Copy one row into `out` (float16, C order), which keeps its values where DamagedError is raised."""
        place, slot, crc = _PLACE.unpack_from(address.data)
        rows = self._maps.get(frames.to_bytes(4, "little") + place)
        if rows is None or rows.checked.get(slot) != crc or self._are_packed:
            row = self.rows(frames, address.reshape(1))[0]
        else:
            row = rows.values[slot]
        assert out.dtype == np.float16, f"out is {out.dtype}"
        assert out.flags.c_contiguous, "out is not in C order"
        assert out.shape == row.shape, f"out has shape {out.shape}, not {row.shape}"
        np.copyto(out, row)

    def will_need(self, frames: int, addresses: np.ndarray) -> None:
        """Announce that these rows (ADDRESS [n]) are read soon: to the kernel, neighbours in one call, or the object
        store.

        Waits at most for shards not mapped or copied yet, and where the disk's queue is full.
        """
        row_bytes, length, data = self._spec.row_bytes(frames), frames.to_bytes(4, "little"), addresses.tobytes()
        if self._files.ranges is not None:
            asked = [(length + place, slot * row_bytes, row_bytes) for place, slot, _ in _PLACE.iter_unpack(data)]
            self._files.announce(asked)
            return
        if self._files.cache is not None:
            self._maps.add_all([length + place for place, _, _ in _PLACE.iter_unpack(data)], addresses, self._map)
        if self._are_in_memory and self._some_are(length, row_bytes, data):
            return
        hints = list[tuple[MappedShard, int, int]]()  # file, first slot and the one after the last of neighbours
        at = {place: n for n, (place,) in enumerate(_SLOTS.iter_unpack(data))}
        for place in sorted(at):
            key, slot = length + place[:10], int.from_bytes(place[10:], "little")
            rows = self._maps.get(key) or self._maps.add(key, self._map(key, addresses[at[place]]))
            if hints and hints[-1][0] is rows.file and hints[-1][2] == slot:
                hints[-1] = rows.file, hints[-1][1], slot + 1
            else:
                hints.append((rows.file, slot, slot + 1))
        given = [file.will_need(first * row_bytes, stop * row_bytes) for file, first, stop in hints]
        self._are_in_memory = not any(given)

    def close(self) -> None:
        """Drop all maps, copies and requests. A reader of maps stays usable and maps again."""
        self._files.close()
        self._maps.clear()

    def _some_are(self, length: bytes, row_bytes: int, data: bytes) -> bool:
        """Whether of announced rows (ADDRESS) one in SAMPLED is mapped and in memory, each of them."""
        for place, slot, _ in itertools.islice(_PLACE.iter_unpack(data), 0, None, SAMPLED):
            rows = self._maps.get(length + place)
            if rows is None or rows.file.will_need(slot * row_bytes, (slot + 1) * row_bytes):
                return False
        return True

    def _checked(self, frames: int, addresses: np.ndarray) -> list[tuple[_Rows, int]]:
        """The shard of each row, checked, and its slot."""
        length, found = frames.to_bytes(4, "little"), list[tuple[_Rows, int]]()
        for n, (place, slot, crc) in enumerate(_PLACE.iter_unpack(addresses.tobytes())):
            rows = self._maps.get(length + place)
            if rows is None or rows.checked.get(slot) != crc:
                rows = self._check(length + place, slot, crc, addresses[n])
            found.append((rows, slot))
        return found

    def _check(self, key: Key, slot: int, crc: int, address: np.void) -> _Rows:
        """The shard of a row, both compared with what was committed."""
        # not under a lock: it waits for the disk
        rows = self._maps.get(key) or self._maps.add(key, self._map(key, address))
        if slot >= len(rows.stored):
            what = f"has {len(rows.stored)} rows, none in slot {slot}: {ADDRESSES_CHANGED}"
            raise self._files.damaged(key, address, what)
        if crc32c(rows.stored[slot]) != crc:
            if self._files.is_stale(key, rows.file.inode):
                self._maps.forget(key, rows)
                return self._check(key, slot, crc, address)
            raise self._files.damaged(key, address, OTHER_BYTES)
        rows.checked[slot] = crc
        return rows

    def _map(self, key: Key, address: np.void) -> _Rows:
        """The rows of a shard; DamagedError where its size or its index is not that of a dense shard."""
        file, frames = self._files.map(key, address), int.from_bytes(key[:4], "little")
        row_bytes = self._spec.row_bytes(frames)
        rows = shard.rows_in(len(file.memory), row_bytes)
        if rows is None or file.memory[rows * row_bytes :].tobytes() != shard.index(rows, row_bytes):
            if self._files.is_stale(key, file.inode):
                return self._map(key, address)
            raise self._files.damaged(key, address, f"is short or its index was changed ({len(file.memory)} bytes)")
        stored = file.memory[: rows * row_bytes].reshape(rows, row_bytes)
        if self._are_packed:
            return _Rows(file, stored, stored)
        return _Rows(file, stored, shard.unpacked(stored, self._spec.storage, self._spec.row_shape(frames)))


class PixelReader:
    """Reads rows of one spec; `batches` are the keys that the addresses' `batch` counts.

    `stored`, PIXEL_ADDRESS [n] by frames, are all rows that are read again and again: of an object store their shards
    are copied here if all of them fit the cache. `ahead_rows`: how many are announced and not read at a time.
    """

    def __init__(
        self,
        root: DataRoot,
        spec: PixelSpec,
        batches: Sequence[str],
        stored: Mapping[int, np.ndarray] | None = None,
        ahead_rows: int = AHEAD_ROWS,
    ) -> None:
        self._spec = spec
        store, copied = PixelStore(root, spec), None
        if stored is not None and not is_local(root.url) and not _exceed(stored, root.cache_bytes):
            copied = cited_shards(store, batches, stored)  # a bound that holds shards of latents alone is no mistake
        self._files = ShardFiles(store, batches, _row_at, copied, ahead_rows)
        self._maps: Maps[MappedShard] = Maps(ahead_rows)

    def read_into(self, frames: int, address: np.void, out: UInt8[np.ndarray, "F H W 3"]) -> None:
        """Decode one row into `out`; DamagedError where its file or its bytes are not as committed."""
        assert out.shape == self._spec.row_shape(frames), f"out has shape {out.shape}"
        place, *where = _PIXEL_PLACE.unpack_from(address.data)
        key = frames.to_bytes(4, "little") + place
        chunk = self._chunk(key, address, *where)
        try:
            decode_clip(chunk, out)
        except DamagedError as error:
            raise self._files.damaged(key, address, str(error)) from error

    def will_need(self, frames: int, addresses: np.ndarray) -> None:
        """Announce that these rows (PIXEL_ADDRESS [n]) are read soon, to the kernel or the object store.

        Changes nothing but time. Waits at most for shards not mapped or copied yet.
        """
        length, places = frames.to_bytes(4, "little"), _PIXEL_PLACE.iter_unpack(addresses.tobytes())
        rows = [(length + place, offset, size_bytes) for place, offset, size_bytes, _ in places]
        if self._files.ranges is not None:
            self._files.announce(rows)
            return
        if self._files.cache is not None:
            self._maps.add_all([key for key, _, _ in rows], addresses, self._files.map)
        for (key, offset, size_bytes), address in zip(rows, addresses, strict=True):
            file = self._maps.get(key) or self._maps.add(key, self._files.map(key, address))
            if offset + size_bytes <= len(file.memory):  # else the read reports it
                file.will_need(offset, offset + size_bytes)

    def close(self) -> None:
        """Drop all maps, copies and requests. A reader of maps stays usable and maps again."""
        self._files.close()
        self._maps.clear()

    def _chunk(self, key: Key, address: np.void, offset: int, size_bytes: int, crc: int) -> bytes | memoryview:
        """The bytes of one row, checked; those of a map are valid as long as they are held."""
        if self._files.ranges is not None:
            return self._files.read(key, address, offset, size_bytes)
        file = self._maps.get(key) or self._maps.add(key, self._files.map(key, address))
        found = file.memory.data[offset : offset + size_bytes]
        if len(found) == size_bytes and crc32c(found) == crc:
            return found
        if self._files.is_stale(key, file.inode):
            self._maps.forget(key, file)
            return self._chunk(key, address, offset, size_bytes, crc)
        what = OTHER_BYTES if len(found) == size_bytes else f"is short ({len(file.memory)} bytes)"
        raise self._files.damaged(key, address, what)


def open_reader(
    root: DataRoot,
    spec: EncodingSpec,
    batches: Sequence[str],
    stored: Mapping[int, np.ndarray] | None = None,
    ahead_rows: int = AHEAD_ROWS,
) -> RowReader:
    """RowReader of a store that is there; UpstreamError where it is gone, DamagedError where its spec was changed."""
    LatentStore(root, spec).refuse_gone()
    return RowReader(root, spec, batches, stored, ahead_rows)


def _exceed(stored: Mapping[int, np.ndarray], bound_bytes: int) -> bool:
    """Whether these rows take so many bytes or more; looks at no more addresses than it takes to know."""
    total = 0
    for rows in stored.values():
        for first in range(0, len(rows), _SUMMED):
            total += int(rows["size"][first : first + _SUMMED].sum(dtype=np.int64))
            if total > bound_bytes:
                return True
    return bound_bytes == 0


def _row_at(part: PixelPart, address: np.void) -> str:
    """The row whose chunk is at an address, by the commit; for messages, so it never fails."""
    try:
        rows = part.rows(int(address["shard"]))
    except (ValueError, pl.exceptions.PolarsError):
        rows = []
    offset = int(address["offset"])
    return next((row.row_id.hex() for row in rows if row.size_bytes and row.offset == offset), f"at byte {offset}")


def addresses(commits: pl.DataFrame, batches: Sequence[str]) -> np.ndarray:
    """ADDRESS of each ok row of `LatentStore.commits`, in its order; `batches` are the keys to count."""
    ok = commits.filter(pl.col("status") == "ok")
    found = np.zeros(ok.height, dtype=ADDRESS)
    found["row_id"] = np.frombuffer(b"".join(ok["row_id"].to_list()), dtype=">u8").reshape(-1, 2)
    found["batch"] = ok["batch"].replace_strict({key: n for n, key in enumerate(batches)}, return_dtype=pl.UInt32)
    found["slot"] = ok["slot"] % shard.ROWS_PER_SHARD
    found["part"], found["shard"], found["crc"] = ok["part"], ok["shard"], ok["crc32c"]
    return found


def pixel_addresses(commits: pl.DataFrame, batches: Sequence[str]) -> np.ndarray:
    """PIXEL_ADDRESS of each row of `PixelStore.commits`, in its order, all ok; `batches` are the keys to count."""
    found = np.zeros(commits.height, dtype=PIXEL_ADDRESS)
    found["batch"] = commits["batch"].replace_strict({key: n for n, key in enumerate(batches)}, return_dtype=pl.UInt32)
    found["part"], found["shard"], found["crc"] = commits["part"], commits["shard"], commits["crc32c"]
    found["offset"], found["size"] = commits["offset"], commits["size_bytes"]
    return found


def row_id(address: np.void) -> bytes:
    """The 16 bytes of a row's id: two big-endian halves, so that addresses sort as ids do."""
    return bytes(address["row_id"].astype(">u8"))


def read_row(store: LatentStore | PixelStore, batch: str, frames: int, part: int, slot: int) -> np.ndarray:
    """One row through zarr-python; `slot` counts within the part. Unchecked and slow: the reference of the tests."""
    import zarr

    row = np.asarray(zarr.open_array(store.part(batch, frames, part).array_path, mode="r")[slot])
    if row.ndim > 1:
        return row
    assert isinstance(store, LatentStore), "rows of bytes hold latents"
    return shard.unpacked(row.view(np.uint8), store.spec.storage, store.spec.row_shape(frames))
