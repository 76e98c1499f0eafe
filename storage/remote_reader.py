"""Rows of a latent store on an object store: from local copies of whole shards, or by ranged reads of single rows.

Nothing in between: the shards that a trainset cites are copied if all of them fit the cache, each when its first row is
announced; else each row is one ranged request, sent when the row is announced. A row is compared with its checksum
before anybody sees it, and asked for again a bounded number of times. Both readers do what RowReader does (reader.py).
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float16

from storage import listing, shard
from storage.cache import Cache, fits
from storage.digest import crc32c
from storage.latents import LatentStore, RowStore
from storage.part import Part
from storage.ranges import Range, Ranges
from storage.reader import Fields, RowReader, shards_of
from storage.remote import is_local
from storage.root import DataRoot
from storage.shard import ROWS_PER_SHARD
from storage.spec import EncodingSpec

AT_ONCE = 8  # our choice: shards copied or parts listed at a time; s3fs sends 10 requests each


def open_reader(
    root: DataRoot, spec: EncodingSpec, batches: Sequence[str], stored: Mapping[int, np.ndarray] | None = None
) -> RowReader:
    """The reader of a store, wherever it is. `stored`, ADDRESS [n] by frames, are all rows that will be read again and
    again; without it rows are read once, so that copies of shards do not pay.

    Raises UpstreamError where the store is gone, DamagedError where its spec was changed, ConfigError for a cache that
    is too small for one shard.
    """
    LatentStore(root, spec).refuse_gone()
    if is_local(root.url):
        return RowReader(root, spec, batches)
    wanted = sum(len(rows) * spec.row_bytes(frames) for frames, rows in (stored or {}).items())
    if stored is None or root.cache_bytes == 0:
        return RangedReader(root, spec, batches)
    largest = max((spec.row_bytes(frames) for frames in stored), default=0)
    if wanted > root.cache_bytes >= shard.shard_bytes(ROWS_PER_SHARD, largest):
        return RangedReader(root, spec, batches)
    needed = cited(LatentStore(root, spec), batches, stored)
    return CachedReader(root, spec, batches, needed) if fits(root, needed) else RangedReader(root, spec, batches)


class CachedReader(RowReader):
    """Maps local copies of shards. `needed`: path and size of the shards that it may meet."""

    def __init__(self, root: DataRoot, spec: EncodingSpec, batches: Sequence[str], needed: Mapping[str, int]) -> None:
        super().__init__(root, spec, batches)
        self._cache = Cache(root, needed)
        self._cache.hold()

    def will_need(self, frames: int, addresses: np.ndarray) -> None:
        """Copy the shards of these rows that are not here yet, several at a time, then as RowReader."""
        first = np.unique(addresses[["batch", "part", "shard"]], return_index=True)[1]
        new = [address for address in addresses[first] if (frames, *_shard_of(address)) not in self._maps]
        if len(new) > 1:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda address: self._mapped((frames, *_shard_of(address)), address), new))
        super().will_need(frames, addresses)

    def close(self) -> None:
        """As RowReader; others may have the room of these copies."""
        self._cache.release()
        super().close()

    def _open(self, part: Part, number: int) -> BinaryIO:
        return self._cache.open(part.shard_path(number), partial(_fault, part, number))

    def _is_stale(self, frames: int, address: np.void, inode: int) -> bool:
        return self._cache.distrust(self._part(frames, address).shard_path(int(address["shard"])), inode)


class RangedReader(RowReader):
    """Maps nothing: reads rows by ranges, ahead of their use where they were announced."""

    def __init__(self, root: DataRoot, spec: EncodingSpec, batches: Sequence[str]) -> None:
        super().__init__(root, spec, batches)
        self._ranges = Ranges()

    def rows(self, frames: int, addresses: np.ndarray) -> list[Float16[np.ndarray, "F C h w"]]:
        """As RowReader, the rows being the caller's own; asks for all of them at once."""
        self.will_need(frames, addresses)
        return super().rows(frames, addresses)

    def will_need(self, frames: int, addresses: np.ndarray) -> None:
        """Ask for these rows now; waits for nothing. What is announced and never read is dropped in the end."""
        self._ranges.announce(self._range(frames, address) for address in addresses)

    def close(self) -> None:
        """Drop what was announced, wait for what is under way."""
        self._ranges.close()

    def _row(self, frames: int, fields: Fields, address: np.void) -> Float16[np.ndarray, "F C h w"]:
        data = bytearray(self._bytes(frames, address))  # torch takes writable memory only
        spec = self._store.spec
        return shard.unpacked(np.frombuffer(data, np.uint8), spec.storage, spec.row_shape(frames))

    def _bytes(self, frames: int, address: np.void) -> bytes:
        wanted, crc = self._range(frames, address), int(address["crc"])
        return self._ranges.read(wanted, crc, partial(self._damaged, frames, address))

    def _range(self, frames: int, address: np.void) -> Range:
        row_bytes = self._store.spec.row_bytes(frames)
        path = self._part(frames, address).shard_path(int(address["shard"]))
        return path, int(address["slot"]) * row_bytes, row_bytes


def _shard_of(address: np.void) -> tuple[int, int, int]:
    return int(address["batch"]), int(address["part"]), int(address["shard"])


def cited(store: RowStore[Any, Any], batches: Sequence[str], stored: Mapping[int, np.ndarray]) -> dict[str, int]:
    """Path and size in bytes of every shard that these rows stand in, by one listing a part."""
    parts = {(frames, *place): shards for frames, rows in stored.items() for place, shards in shards_of(rows).items()}
    opened = [store.part(batches[batch], frames, number) for frames, batch, number in parts]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        listings = pool.map(lambda part: listing.files_below(f"{part.path}/{part.array}/c"), opened)
    found: dict[str, int] = {}
    for part, numbers, files in zip(opened, parts.values(), listings, strict=True):
        paths = [part.shard_path(number) for number in numbers]
        found |= {path: files[path] for path in paths if path in files}
    return found


def _fault(part: Part, number: int, data: bytes) -> str | None:
    """What is wrong with the bytes of a committed shard; withdrawn rows are zeros and nobody's to read."""
    commits, row_bytes = part.commit(number), part.spec.row_bytes(part.frames)
    held = commits.height * row_bytes
    if data[held:] != shard.index(commits.height, row_bytes):
        return f"it is short or its index was changed ({len(data)} bytes)"
    rows = np.frombuffer(data, np.uint8, held).reshape(commits.height, row_bytes)
    for row, (name, status, crc) in zip(rows, commits.select("row_id", "status", "crc32c").iter_rows(), strict=True):
        if status == "ok" and crc32c(row) != crc and row.any():
            return f"row {name.hex()} differs from its checksum"
    return None
