"""LatentStore: the latents of one encoding spec, and LatentFormat: dense rows of one size.

Row n of a shard begins at n * row_bytes, failed rows hold NaN; the bytes themselves are those of shard.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import dataframely as dy
import numpy as np
import polars as pl
from jaxtyping import Float, UInt8

from storage import shard
from storage.errors import StoreError
from storage.part import Part
from storage.schemas import Commits
from storage.shard import ROWS_PER_SHARD
from storage.spec import EncodingSpec
from storage.store import Store
from storage.verify import Problem

__all__ = ["ROWS_PER_SHARD", "EncodingSpec", "LatentFormat", "LatentPart", "LatentStore", "Problem"]

LatentPart = Part[EncodingSpec]


@dataclass(frozen=True)
class LatentFormat:
    """Latents of one spec and clip length as the bytes of a shard."""

    array: ClassVar[str] = "latent"
    schema: ClassVar[type[dy.Schema]] = Commits
    freed: ClassVar[Mapping[str, Any]] = {
        "crc32c": None,
        "sums": pl.lit([], pl.List(pl.Float64)),
        "sums_squared": pl.lit([], pl.List(pl.Float64)),
    }

    spec: EncodingSpec
    frames: int

    @property
    def axes(self) -> int:
        """Frame, channel, y, x; or bytes, where a row is more than an array of values."""
        return 1 if self._in_bytes else 4

    @property
    def row_bytes(self) -> int:
        """Bytes of every row."""
        return self.spec.row_bytes(self.frames)

    def encode(
        self, rows: Float[np.ndarray, "n F C h w"], commits: pl.DataFrame
    ) -> tuple[Sequence[bytes | memoryview], pl.DataFrame]:
        """The bytes of a shard in pieces, and its commits with crc32c, sums and sums_squared of the stored values.

        What is in the slot of a failed row is replaced by NaN. StoreError where the shape is another or a row is not
        finite.
        """
        wanted = (commits.height, *self.spec.row_shape(self.frames))
        if rows.shape != wanted:
            raise StoreError(f"latents have shape {rows.shape}, not {wanted}")
        raw = shard.packed(rows, (commits["status"] == "ok").to_numpy(), self.spec.storage)
        stored = shard.unpacked(raw, self.spec.storage, self.spec.row_shape(self.frames))
        return (raw.data, shard.index(commits.height, self.row_bytes)), shard.measured(raw, stored, commits)

    def extents(self, commits: pl.DataFrame) -> list[tuple[int, int]]:
        """(offset, size) in bytes of every row, failed ones too."""
        return [(row * self.row_bytes, self.row_bytes) for row in range(commits.height)]

    def is_blank(self, row: UInt8[np.ndarray, " bytes"]) -> bool:
        """Whether all values are NaN."""
        return bool(np.isnan(shard.unpacked(row, self.spec.storage, self.spec.row_shape(self.frames))).all())

    def create_array(self, group: Any, rows: int) -> None:  # noqa: ANN401 - a zarr.Group, which is not imported here
        """Values where the storage option keeps values; else the rows' bytes, and as an attribute what they are."""
        values = self.spec.row_shape(self.frames)
        shape = (self.row_bytes,) if self._in_bytes else values
        about = f"int8 {list(values)}, then float32 [{values[1]}], little-endian; value = int8 * float32 of its channel"
        group.create_array(
            self.array,
            shape=(rows, *shape),
            chunks=(1, *shape),
            shards={"shape": (shard.ROWS_PER_SHARD, *shape), "index_location": "end"},
            dtype="int8" if self._in_bytes else "float16",
            compressors=None,
            filters=None,
            fill_value=0 if self._in_bytes else float("nan"),
            dimension_names=("row", "byte") if self._in_bytes else ("row", "frame", "channel", "y", "x"),
            attributes={"row": about} if self._in_bytes else None,
        )

    @property
    def _in_bytes(self) -> bool:
        return self.spec.storage == "int8"


class LatentStore(Store[EncodingSpec]):
    """The latents of one encoding spec."""

    noun = "latents"
    spec_type = EncodingSpec
    format = LatentFormat
