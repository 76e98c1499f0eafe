"""PixelReader: clips of a pixel store by address. The read path of recipes that feed pixels.

An address says where the chunk of a row stands: a read is that chunk, its checksum (10 us of a decode of milliseconds,
so each time) and the decoding of its JPEGs into the caller's buffer. Threads may share a reader. Where the chunk comes
from: pixel_chunks.py. `read_clip` is the slow oracle through zarr-python. Must not know draws, batches of clips or
torch.

Axes: F frames, H W pixels.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from jaxtyping import UInt8

from storage.errors import DamagedError
from storage.jpeg import decode_clip
from storage.pixel_chunks import OPEN_MAPS, PIXEL_ADDRESS, MappedChunks, open_chunks
from storage.pixels import PixelSpec, PixelStore
from storage.remote import is_local
from storage.root import DataRoot

__all__ = ["PIXEL_ADDRESS", "PixelReader", "pixel_addresses", "read_clip"]


class PixelReader:
    """Reads rows of one spec; `batches` are the keys that the addresses' `batch` counts."""

    def __init__(self, root: DataRoot, spec: PixelSpec, batches: Sequence[str], open_maps: int = OPEN_MAPS) -> None:
        self._store, self._batches = PixelStore(root, spec), batches
        local = is_local(root.url)
        self._chunks = MappedChunks(self._store, batches, open_maps) if local else open_chunks(self._store, batches)

    def read_again(self, stored: Mapping[int, np.ndarray]) -> None:
        """Say which rows (PIXEL_ADDRESS [n] by frames) are read again and again, before reading any.

        Those on an object store are copied to this machine if all of them fit the cache.
        """
        if not is_local(self._store.root.url):
            self._chunks.close()
            self._chunks = open_chunks(self._store, self._batches, stored)

    def read_into(self, frames: int, address: np.void, out: UInt8[np.ndarray, "F H W 3"]) -> None:
        """Decode one row into `out`; DamagedError where its file or its bytes are not as committed."""
        assert out.shape == self._store.spec.row_shape(frames), f"out has shape {out.shape}"
        chunk = self._chunks.chunk(frames, address)
        try:
            decode_clip(chunk, out)
        except DamagedError as error:
            raise self._chunks.damaged(frames, address, str(error)) from error

    def will_need(self, frames: int, addresses: np.ndarray) -> None:
        """These rows are read soon: the kernel is told, or the object store asked. Changes nothing but time."""
        self._chunks.will_need(frames, addresses)

    def close(self) -> None:
        """Give back what is held."""
        self._chunks.close()


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
