"""PixelStore: clips as JPEG frames under the row ids of the latents, for recipes that feed pixels to the encoder.

Parts, plans, locks and commits are those of the latents (storage/part.py); its own are rows that differ in size. A
shard is the chunks of its rows in slot order, then the index that any Zarr reader expects; a row that failed has none.
Where a row stands is in its commit and, for training, in the trainset. Chunks: jpeg.py. Reading fast: pixel_reader.py.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl

from storage import atomic, shard
from storage.digest import crc32c
from storage.errors import StoreError, is_damage
from storage.jpeg import frame_places
from storage.latents import LatentStore, RowStore
from storage.part import PlannedPart, new_group
from storage.pixel_spec import PixelSpec
from storage.root import DataRoot
from storage.schemas import PixelCommits
from storage.shard import INDEX_BYTES, ROWS_PER_SHARD
from storage.verify import Problem, encode_again, fill, verify_part

__all__ = ["PixelPart", "PixelSpec", "PixelStore", "every_store"]

AXES = ("row", "frame", "y", "x", "channel")


class PixelPart(PlannedPart):
    """A part of pixels."""

    array = "pixels"
    schema = PixelCommits
    freed: ClassVar[Mapping[str, Any]] = {"offset": None, "size_bytes": None, "crc32c": None}
    spec: PixelSpec

    def write_shard(self, number: int, chunks: Sequence[bytes | None], commits: pl.DataFrame) -> None:
        """Write one shard, then its commit; ConflictError if another writer committed it first.

        `chunks` stand in slot order, one for each planned row, None for a failed one. `commits` has the columns of
        PixelCommits; its places and checksums are measured here and may come in null. StoreError where rows do not fit.
        """
        commits = self.planned(number, commits)
        held = [chunk is not None for chunk in chunks]
        if held != (commits["status"] == "ok").to_list():
            raise StoreError(f"shard {number} of {self.path}: exactly the rows with status ok have chunks")
        for chunk in chunks:
            if chunk is not None:
                frame_places(chunk, self.frames)
        sizes = [len(chunk or b"") for chunk in chunks]
        offsets = [0, *np.cumsum(sizes).tolist()]
        places = zip(offsets[:-1], chunks, strict=True)
        index = shard.index_of([(at, len(chunk)) if chunk is not None else None for at, chunk in places])
        measured = commits.with_columns(
            pl.Series("offset", [at if ok else None for at, ok in zip(offsets, held, strict=False)], pl.UInt64),
            pl.Series("size_bytes", [size if ok else None for size, ok in zip(sizes, held, strict=True)], pl.UInt32),
            pl.Series("crc32c", [None if chunk is None else crc32c(chunk) for chunk in chunks], pl.UInt32),
        )
        self.publish(number, (*(chunk for chunk in chunks if chunk is not None), index), measured)

    def extent(self, slot: int) -> tuple[int, int]:
        number, within = divmod(slot, ROWS_PER_SHARD)
        offset, size_bytes = self.commit(number).select("offset", "size_bytes").row(within)
        return (0, 0) if offset is None else (offset, size_bytes)

    def describe(self, folder: Path, rows: int) -> None:
        from storage.zarr_jpeg import JpegFrames  # here, since readers do without zarr

        shape = self.spec.row_shape(self.frames)
        new_group(folder, self).create_array(
            self.array,
            shape=(rows, *shape),
            chunks=(1, *shape),
            shards={"shape": (ROWS_PER_SHARD, *shape), "index_location": "end"},
            dtype="uint8",
            serializer=JpegFrames(self.spec.quality, self.spec.subsampling),
            compressors=None,
            filters=None,
            fill_value=0,
            dimension_names=AXES,
        )


class PixelStore(RowStore[PixelSpec, PixelPart]):
    """The clips of one pixel spec."""

    noun = "pixels"
    schema = PixelCommits

    @staticmethod
    def spec_of(value: Mapping[str, Any]) -> PixelSpec:
        return PixelSpec.from_json(value)

    def part(self, batch: str, frames: int, number: int) -> PixelPart:
        path = self.root.part(self.digest, batch, frames, number, self.noun)
        return PixelPart(path, self.spec, batch, frames, number)

    def check(self, part: PixelPart, withdrawn: frozenset[bytes]) -> list[Problem]:
        return verify_part(part, lambda number, commits: _rows(part, number, commits, withdrawn))


def every_store(root: DataRoot) -> list[LatentStore | PixelStore]:
    """All stores that the root holds."""
    return [*LatentStore.every(root), *PixelStore.every(root)]


def _rows(part: PixelPart, number: int, commits: pl.DataFrame, withdrawn: frozenset[bytes]) -> list[Problem]:
    path, remedy = part.shard_path(number), encode_again(part, number)
    places = commits.select("row_id", "offset", "size_bytes", "crc32c").rows()
    wanted_bytes = max((offset + size for _, offset, size, _ in places if offset is not None), default=0) + INDEX_BYTES
    memory = np.empty(max((size for _, _, size, _ in places if size is not None), default=0), np.uint8)
    problems = []
    try:
        with atomic.reading(path) as (file, size_bytes):
            if size_bytes != wanted_bytes:
                return [Problem(path, None, f"{size_bytes} bytes where {wanted_bytes} were committed", remedy)]
            for row_id, offset, size, crc in places:
                if offset is None:
                    continue
                file.seek(offset)  # where it stands already
                row = memory[:size]
                fill(row, file)
                if row_id in withdrawn:
                    if row.any():
                        what = "withdrawn, but its bytes still stand here: withdraw the file again"
                        problems.append(Problem(path, row_id.hex(), what, remedy))
                elif crc32c(row) != crc:
                    problems.append(Problem(path, row_id.hex(), "its bytes differ from their checksum", remedy))
            if file.read() != shard.index_of([None if at is None else (at, size) for _, at, size, _ in places]):
                problems.append(Problem(path, None, "the index at its end was changed", remedy))
    except (OSError, ValueError) as error:
        if not is_damage(error):
            raise
        return [Problem(path, None, f"committed, but cannot be read: {error}", remedy)]
    return problems
