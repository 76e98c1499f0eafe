"""PixelReader: clips of a pixel store by address. The read path of recipes that feed pixels.

An address says where in its shard the chunk of a row is: a read is that chunk, its checksum (10 us of a decode of
milliseconds, so each time) and the decoding of its JPEGs into the caller's buffer. Threads may share a reader.
`read_clip` is the slow reference through zarr-python.

Axes: F frames, H W pixels.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from jaxtyping import UInt8

from storage.cache import fits_beside
from storage.digest import crc32c
from storage.errors import DamagedError
from storage.jpeg import decode_clip
from storage.part import OTHER_BYTES, PixelPart
from storage.remote import is_local
from storage.root import DataRoot
from storage.shard_files import OPEN_MAPS, Key, MappedShard, Maps, ShardFiles, cited_shards
from storage.spec import PixelSpec
from storage.store import PixelStore

# Where one row's chunk is; which row it is, the trainset says, whose rows these addresses follow. Little-endian.
PIXEL_ADDRESS = np.dtype(
    [("batch", "<u4"), ("part", "<u2"), ("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")]
)
_SUMMED = 1 << 20  # addresses whose sizes are added at a time, 28 MB of them


class PixelReader:
    """Reads rows of one spec; `batches` are the keys that the addresses' `batch` counts.

    `stored`, PIXEL_ADDRESS [n] by frames, are all rows that are read again and again: of an object store their shards
    are copied here if all of them fit the cache.
    """

    def __init__(
        self,
        root: DataRoot,
        spec: PixelSpec,
        batches: Sequence[str],
        stored: Mapping[int, np.ndarray] | None = None,
        open_maps: int = OPEN_MAPS,
    ) -> None:
        self._spec = spec
        store, copied = PixelStore(root, spec), None
        if stored is not None and not is_local(root.url) and not _exceed(stored, root.cache_bytes):
            cited = cited_shards(store, batches, stored)
            # not `fits`: a bound that holds shards of latents and none of pixels is no mistake
            copied = cited if fits_beside(root, cited) else None
        self._files = ShardFiles(store, batches, _row_of, copied)
        self._maps: Maps[MappedShard] = Maps(open_maps)

    def read_into(self, frames: int, address: np.void, out: UInt8[np.ndarray, "F H W 3"]) -> None:
        """Decode one row into `out`; DamagedError where its file or its bytes are not as committed."""
        assert out.shape == self._spec.row_shape(frames), f"out has shape {out.shape}"
        chunk = self._chunk(frames, address)
        try:
            decode_clip(chunk, out)
        except DamagedError as error:
            raise self._files.damaged(_key(frames, address), address, str(error)) from error

    def will_need(self, frames: int, addresses: np.ndarray) -> None:
        """Announce that these rows (PIXEL_ADDRESS [n]) are read soon, to the kernel or the object store.

        Changes nothing but time. Waits at most for shards not mapped or copied yet.
        """
        keys = [_key(frames, address) for address in addresses]
        offsets, sizes = addresses["offset"].tolist(), addresses["size"].tolist()
        if self._files.ranges is not None:
            self._files.announce(list(zip(keys, offsets, sizes, strict=True)))
            return
        if self._files.cache is not None:
            self._maps.add_all(keys, addresses, self._files.map)
        for key, address, offset, size_bytes in zip(keys, addresses, offsets, sizes, strict=True):
            file = self._maps.get(key) or self._maps.add(key, self._files.map(key, address))
            if offset + size_bytes <= len(file.memory):  # else the read reports it
                file.will_need(offset, offset + size_bytes)

    def close(self) -> None:
        """Drop all maps, copies and requests. A reader of maps stays usable and maps again."""
        self._files.close()
        self._maps.clear()

    def _chunk(self, frames: int, address: np.void) -> bytes | memoryview:
        """The bytes of one row, checked; those of a map are valid as long as they are held."""
        *_, offset, size_bytes, crc = address.item()
        key = _key(frames, address)
        if self._files.ranges is not None:
            return self._files.read(key, address, offset, size_bytes)
        file = self._maps.get(key) or self._maps.add(key, self._files.map(key, address))
        found = memoryview(file.memory)[offset : offset + size_bytes]
        if len(found) == size_bytes and crc32c(found) == crc:
            return found
        if self._files.is_stale(key, file.inode):
            self._maps.forget(key, file)
            return self._chunk(frames, address)
        what = OTHER_BYTES if len(found) == size_bytes else f"is short ({len(file.memory)} bytes)"
        raise self._files.damaged(key, address, what)


def _exceed(stored: Mapping[int, np.ndarray], bound_bytes: int) -> bool:
    """Whether these rows take so many bytes or more; looks at no more addresses than it takes to know."""
    total = 0
    for rows in stored.values():
        for first in range(0, len(rows), _SUMMED):
            total += int(rows["size"][first : first + _SUMMED].sum(dtype=np.int64))
            if total > bound_bytes:
                return True
    return bound_bytes == 0


def _key(frames: int, address: np.void) -> Key:
    return frames, int(address["batch"]), int(address["part"]), int(address["shard"])


def _row_of(part: PixelPart, address: np.void) -> str:
    """The row whose chunk is at an address, by the commit; for messages, so it never fails."""
    try:
        rows = part.rows(int(address["shard"]))
    except (ValueError, pl.exceptions.PolarsError):
        rows = []
    offset = int(address["offset"])
    return next((row.row_id.hex() for row in rows if row.size_bytes and row.offset == offset), f"at byte {offset}")


def pixel_addresses(commits: pl.DataFrame, batches: Sequence[str]) -> np.ndarray:
    """PIXEL_ADDRESS of each row of `PixelStore.commits`, in its order, all ok; `batches` are the keys to count."""
    found = np.zeros(commits.height, dtype=PIXEL_ADDRESS)
    found["batch"] = commits["batch"].replace_strict({key: n for n, key in enumerate(batches)}, return_dtype=pl.UInt32)
    for name, column in (("part", "part"), ("shard", "shard"), ("offset", "offset"), ("size", "size_bytes")):
        found[name] = commits[column]
    found["crc"] = commits["crc32c"]
    return found


def read_clip(store: PixelStore, batch: str, frames: int, part: int, slot: int) -> UInt8[np.ndarray, "F H W 3"]:
    """One row through zarr-python; `slot` counts within the part. Unchecked and slow: the reference of the tests."""
    import zarr

    return np.asarray(zarr.open_array(store.part(batch, frames, part).array_path, mode="r")[slot])
