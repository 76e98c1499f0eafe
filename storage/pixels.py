"""PixelStore: clips as JPEG frames under the row ids of the latents, for recipes that feed pixels to the encoder.

A shard is the chunks (jpeg.py) of its rows in slot order, then the index that any Zarr reader expects; a failed row has
no chunk. Rows differ in size, so each commit says where its rows are, and so does a trainset.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import dataframely as dy
import numpy as np
import polars as pl
from jaxtyping import UInt8

from storage import shard
from storage.digest import crc32c
from storage.errors import StoreError
from storage.jpeg import frame_places
from storage.latents import LatentStore
from storage.part import Part
from storage.pixel_spec import PixelSpec
from storage.root import DataRoot
from storage.schemas import PixelCommits
from storage.store import Store

__all__ = ["PixelFormat", "PixelPart", "PixelSpec", "PixelStore", "every_store"]

PixelPart = Part[PixelSpec]


@dataclass(frozen=True)
class PixelFormat:
    """Clips of JPEG frames of one spec and clip length as the bytes of a shard."""

    array: ClassVar[str] = "pixels"
    schema: ClassVar[type[dy.Schema]] = PixelCommits
    freed: ClassVar[Mapping[str, Any]] = {"offset": None, "size_bytes": None, "crc32c": None}

    spec: PixelSpec
    frames: int

    @property
    def axes(self) -> int:
        """Frame, y, x, channel."""
        return 4

    def encode(
        self, rows: Sequence[bytes | None], commits: pl.DataFrame
    ) -> tuple[Sequence[bytes | memoryview], pl.DataFrame]:
        """The chunks (None for a failed row) and their index, and the commits with each row's place and checksum.

        StoreError where not exactly the rows with status ok have chunks, DamagedError where one is no chunk of a clip.
        """
        if [chunk is not None for chunk in rows] != (commits["status"] == "ok").to_list():
            raise StoreError("exactly the rows with status ok have chunks")
        extents, end = [], 0
        for chunk in rows:
            if chunk is not None:
                frame_places(chunk, self.frames)
            extents.append((end, len(chunk or b"")))
            end += len(chunk or b"")
        measured = commits.with_columns(
            pl.Series("offset", [at if size else None for at, size in extents], pl.UInt64),
            pl.Series("size_bytes", [size or None for _, size in extents], pl.UInt32),
            pl.Series("crc32c", [None if chunk is None else crc32c(chunk) for chunk in rows], pl.UInt32),
        )
        return (*(chunk for chunk in rows if chunk is not None), shard.index_of(extents)), measured

    def extents(self, commits: pl.DataFrame) -> list[tuple[int, int]]:
        """(offset, size) in bytes of every row; (0, 0) for a failed one."""
        return commits.select(pl.col("offset", "size_bytes").fill_null(0)).rows()

    def is_blank(self, row: UInt8[np.ndarray, " bytes"]) -> bool:
        """Whether a failed row has no bytes."""
        return row.size == 0

    def create_array(self, group: Any, rows: int) -> None:  # noqa: ANN401 - a zarr.Group, which is not imported here
        """RGB frames under the codec of zarr_jpeg.py."""
        from storage.zarr_jpeg import JpegFrames  # here, since readers do without zarr

        shape = self.spec.row_shape(self.frames)
        group.create_array(
            self.array,
            shape=(rows, *shape),
            chunks=(1, *shape),
            shards={"shape": (shard.ROWS_PER_SHARD, *shape), "index_location": "end"},
            dtype="uint8",
            serializer=JpegFrames(self.spec.quality, self.spec.subsampling),
            compressors=None,
            filters=None,
            fill_value=0,
            dimension_names=("row", "frame", "y", "x", "channel"),
        )


class PixelStore(Store[PixelSpec]):
    """The clips of one pixel spec."""

    noun = "pixels"
    spec_type = PixelSpec
    format = PixelFormat


def every_store(root: DataRoot) -> list[LatentStore | PixelStore]:
    """All stores that the root holds."""
    return [*LatentStore.every(root), *PixelStore.every(root)]
