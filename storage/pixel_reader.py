"""PixelReader: clips of a pixel store by address, through memory maps. The read path of recipes that feed pixels.

An address says where the chunk of a row stands, so a read is a view of a mapped file, its checksum (10 us of a decode
of milliseconds, so each time) and the decoding of its JPEGs into the caller's buffer. Threads may share a reader.
`read_clip` is the slow oracle through zarr-python. Must not know draws, batches of clips or torch.

Axes: F frames, H W pixels.
"""

import mmap
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import UInt8

from storage.digest import crc32c
from storage.errors import ConfigError, DamagedError
from storage.jpeg import decode_clip
from storage.pixels import PixelPart, PixelSpec, PixelStore
from storage.remote import is_local
from storage.root import DataRoot
from storage.verify import encode_again

# Where one row's chunk stands; which row it is, the trainset says, whose rows these addresses follow. Little-endian.
PIXEL_ADDRESS = np.dtype(
    [("batch", "<u4"), ("part", "<u2"), ("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")]
)
_OPEN_MAPS = 512  # as storage/reader.py


class PixelReader:
    """Reads rows of one spec; `batches` are the keys that the addresses' `batch` counts."""

    def __init__(self, root: DataRoot, spec: PixelSpec, batches: Sequence[str], open_maps: int = _OPEN_MAPS) -> None:
        if not is_local(root.url):
            raise ConfigError(f"root {root.url}: pixels are read from file systems only; choose a recipe for latents")
        self._store = PixelStore(root, spec)
        self._batches = tuple(batches)
        self._open_maps = open_maps
        self._maps: OrderedDict[tuple[int, int, int, int], mmap.mmap] = OrderedDict()
        self._guard = threading.Lock()

    def read_into(self, frames: int, address: np.void, out: UInt8[np.ndarray, "F H W 3"]) -> None:
        """Decode one row into `out`; DamagedError where its file or its bytes are not as committed."""
        *_, offset, size_bytes, crc = address.item()
        assert out.shape == self._store.spec.row_shape(frames), f"out has shape {out.shape}"
        data = memoryview(self._mapped(frames, address))
        chunk = data[offset : offset + size_bytes]
        if len(chunk) != size_bytes:
            raise self._damaged(frames, address, f"is short ({len(data)} bytes)")
        if crc32c(chunk) != crc:
            raise self._damaged(frames, address, "holds other bytes than were committed (or a withdrawn row)")
        try:
            decode_clip(chunk, out)
        except DamagedError as error:
            raise self._damaged(frames, address, str(error)) from error

    def will_need(self, frames: int, addresses: np.ndarray) -> None:
        """Tell the kernel that these rows are read soon."""
        for address in addresses:
            start, size_bytes = int(address["offset"]), int(address["size"])
            page = start - start % mmap.PAGESIZE
            memory = self._mapped(frames, address)
            if start + size_bytes <= len(memory):  # else the read says so
                memory.madvise(mmap.MADV_WILLNEED, page, start + size_bytes - page)

    def close(self) -> None:
        """Forget all maps; the reader stays usable and maps again."""
        with self._guard:
            self._maps.clear()

    def _mapped(self, frames: int, address: np.void) -> mmap.mmap:
        key = (frames, int(address["batch"]), int(address["part"]), int(address["shard"]))
        with self._guard:
            memory = self._maps.get(key)
            if memory is not None:
                self._maps.move_to_end(key)
                return memory
        fresh = self._map(frames, address)  # outside the guard: it waits for the disk
        with self._guard:
            memory = self._maps.setdefault(key, fresh)  # another thread may have been faster
            while len(self._maps) > self._open_maps:
                self._maps.popitem(last=False)  # unmapped once no thread decodes from it
            return memory

    def _map(self, frames: int, address: np.void) -> mmap.mmap:
        part, number = self._part(frames, address), int(address["shard"])
        if not part.committed(number):
            raise self._damaged(frames, address, "is not committed")
        try:
            with Path(part.shard_path(number)).open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: the file is empty
            raise self._damaged(frames, address, f"cannot be read ({error})") from error

    def _part(self, frames: int, address: np.void) -> PixelPart:
        return self._store.part(self._batches[int(address["batch"])], frames, int(address["part"]))

    def _damaged(self, frames: int, address: np.void, what: str) -> DamagedError:
        part, number, offset = self._part(frames, address), int(address["shard"]), int(address["offset"])
        row = _row_at(part, number, offset)
        return DamagedError(f"{part.shard_path(number)}, row {row}: {what}. Remedy: {encode_again(part, number)}")


def _row_at(part: PixelPart, number: int, offset: int) -> str:
    """The row whose chunk stands at an offset, by the commit; for messages, so it never fails."""
    try:
        return bytes(part.commit(number).row(by_predicate=pl.col("offset") == offset, named=True)["row_id"]).hex()
    except (ValueError, pl.exceptions.PolarsError):
        return f"at byte {offset}"


def pixel_addresses(commits: pl.DataFrame, batches: Sequence[str]) -> np.ndarray:
    """PIXEL_ADDRESS of each row of `PixelStore.commits`, in its order, all ok; `batches` are the keys to count."""
    found = np.zeros(commits.height, dtype=PIXEL_ADDRESS)
    found["batch"] = commits["batch"].replace_strict({key: n for n, key in enumerate(batches)}, return_dtype=pl.UInt32)
    for name, column in (("part", "part"), ("shard", "shard"), ("offset", "offset"), ("size", "size_bytes")):
        found[name] = commits[column]
    found["crc"] = commits["crc32c"]
    return found


def read_clip(store: PixelStore, batch: str, frames: int, part: int, slot: int) -> UInt8[np.ndarray, "F H W 3"]:
    """One row through zarr-python; `slot` counts within the part. Unchecked and slow: the oracle of the tests."""
    import zarr

    opened = store.part(batch, frames, part)
    array = zarr.open_array(f"{opened.path}/{opened.array}", mode="r")
    return np.asarray(array[slot])
