"""How rows become the bytes of one shard: LatentFormat, PixelFormat, and the index that any Zarr reader expects.

Zarr v3 `sharding_indexed`, inner chunk = one row, no compressor, index at the end: per inner chunk offset and size as
little-endian u64, absent ones 2^64-1, then the crc32c of the index. Rows are in slot order without gaps.

Rows of latents have one size, so that row n begins at n * row_bytes and a reader needs no index; failed ones hold NaN.
Rows of pixels are chunks of JPEGs (jpeg.py); they differ in size, so each commit says where they are, and so does a
trainset; failed ones have no chunk.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import dataframely as dy
import numpy as np
import polars as pl
from jaxtyping import Float, Float16, UInt8

from storage.digest import crc32c
from storage.errors import StoreError
from storage.jpeg import frame_places
from storage.schemas import Commits, PixelCommits
from storage.spec import STORED, EncodingSpec, PixelSpec

ROWS_PER_SHARD = 256  # 67 MB at 16 frames of 32x16x16; size does not change read speed (measured)
INDEX_BYTES = 16 * ROWS_PER_SHARD + 4  # offset and size a row, crc32c of both
_ABSENT = np.uint64(2**64 - 1)  # Zarr v3 specification, sharding codec
_STEPS = 127  # of int8, symmetric
_NOTHING = 2.0**-25  # a magnitude that float16 rounds to zero
_EXPONENT = np.uint16(0x7C00)  # all ones: infinity or NaN in IEEE 754 binary16; 10 times faster than isfinite here


@lru_cache(maxsize=64)  # nearly all shards are full ones
def index(rows: int, row_bytes: int) -> bytes:
    """Index of a dense shard with `rows` rows."""
    return index_of([(row * row_bytes, row_bytes) for row in range(rows)])


def index_of(extents: Sequence[tuple[int, int]]) -> bytes:
    """Index of a shard whose rows have these (offset, size) in bytes; rows of size 0 and all after these are absent."""
    table = np.full((ROWS_PER_SHARD, 2), _ABSENT, dtype="<u8")
    for row, extent in enumerate(extents):
        if extent[1]:
            table[row] = extent
    data = table.tobytes()
    return data + crc32c(data).to_bytes(4, "little")


def shard_bytes(rows: int, row_bytes: int) -> int:
    """Size of a shard's file."""
    return rows * row_bytes + INDEX_BYTES


def rows_in(size_bytes: int, row_bytes: int) -> int | None:
    """Rows of a dense shard file of this size; None where no shard has this size."""
    rows, rest = divmod(size_bytes - INDEX_BYTES, row_bytes)
    return rows if rest == 0 and 1 <= rows <= ROWS_PER_SHARD else None


def packed(latents: Float[np.ndarray, "n F C h w"], ok: np.ndarray, storage: str) -> UInt8[np.ndarray, "n bytes"]:
    """The bytes of each row as the storage option has them; NaN in the slots of failed rows.

    `int8` rows are their values, then a float32 scale a channel (docs/decisions/0009). StoreError where a row with
    status ok is not finite or leaves the range of float16, or the option is only read.
    """
    if storage not in STORED:
        raise StoreError(
            f"latents are not stored as {storage} any more: set encoding.storage to {' or '.join(STORED)}, and accept "
            "it with 'nextvid plan --accept'"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # reported below, with the row
        stored = np.array(latents, dtype="<f2", order="C")
    stored[~ok] = 0
    broken = [n for n, row in enumerate(stored) if (row.view("<u2") & _EXPONENT).max() == _EXPONENT]
    if broken:
        raise StoreError(f"rows {broken} of this shard are not finite as {storage}: give them a status other than ok")
    if storage == "int8":  # 1/127 of each row's and channel's largest magnitude: no calibration, nothing is clipped
        exact = np.where(ok[:, None, None, None, None], latents, 0).astype(np.float32)
        largest = np.abs(exact).max(axis=(1, 3, 4))
        scales = np.where(largest > _NOTHING, largest / _STEPS, 0).astype("<f4")
        steps = scales[:, None, :, None, None]
        values = np.rint(np.divide(exact, steps, out=np.zeros_like(exact), where=steps > 0)).astype(np.int8)
        scales[~ok] = np.nan
        return np.concatenate([values.reshape(len(exact), -1).view(np.uint8), scales.view(np.uint8)], axis=1)
    stored[~ok] = np.nan
    return stored.reshape(len(stored), -1).view(np.uint8)


def unpacked(
    rows: UInt8[np.ndarray, "*n bytes"], storage: str, shape: tuple[int, int, int, int]
) -> Float16[np.ndarray, "*n F C h w"]:
    """Values of stored rows of this shape (F, C, h, w): a view where they are float16, else computed."""
    if storage != "int8":
        return rows.view("<f2").reshape(*rows.shape[:-1], *shape)
    count = math.prod(shape)
    values = rows[..., :count].view(np.int8).reshape(*rows.shape[:-1], *shape)
    scales = rows[..., count:].view("<f4")
    return (values * scales[..., None, :, None, None]).astype(np.float16)


def stored_values(
    latents: Float[np.ndarray, "n F C h w"], ok: np.ndarray, storage: str
) -> Float16[np.ndarray, "n F C h w"]:
    """What readers of the store will see: float16 after the storage option, NaN in the slots of failed rows.

    Raises as `packed` does.
    """
    _, *shape = latents.shape
    return unpacked(packed(latents, ok, storage), storage, (shape[0], shape[1], shape[2], shape[3]))


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
    def row_bytes(self) -> int:
        """Bytes of every row."""
        return self.spec.row_bytes(self.frames)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row in the Zarr array: that of its values; its bytes where a row holds more than values."""
        return (self.row_bytes,) if self.spec.storage == "int8" else self.spec.row_shape(self.frames)

    def encode(
        self, rows: Float[np.ndarray, "n F C h w"], commits: pl.DataFrame
    ) -> tuple[Sequence[bytes | memoryview], pl.DataFrame]:
        """The bytes of a shard in pieces, and its commits with crc32c, sums and sums_squared of the stored values.

        A failed row has none of these, and NaN in its slot. StoreError where the shape is another or a row is not
        finite.
        """
        wanted = (commits.height, *self.spec.row_shape(self.frames))
        if rows.shape != wanted:
            raise StoreError(f"latents have shape {rows.shape}, not {wanted}")
        raw = packed(rows, (commits["status"] == "ok").to_numpy(), self.spec.storage)
        stored = unpacked(raw, self.spec.storage, self.spec.row_shape(self.frames))
        measured: list[tuple[int | None, list[float], list[float]]] = []
        for data, row, status in zip(raw, stored, commits["status"], strict=True):
            exact = row.astype(np.float64)
            sums = np.einsum("fchw->c", exact).tolist(), np.einsum("fchw,fchw->c", exact, exact).tolist()
            measured.append((crc32c(data), *sums) if status == "ok" else (None, [], []))
        columns = {"crc32c": pl.UInt32(), "sums": pl.List(pl.Float64), "sums_squared": pl.List(pl.Float64)}
        complete = commits.with_columns(pl.DataFrame(measured, columns, orient="row").get_columns())
        return (raw.data, index(commits.height, self.row_bytes)), complete

    def extents(self, commits: pl.DataFrame) -> list[tuple[int, int]]:
        """(offset, size) in bytes of every row, failed ones too."""
        return [(row * self.row_bytes, self.row_bytes) for row in range(commits.height)]

    def is_blank(self, row: UInt8[np.ndarray, " bytes"]) -> bool:
        """Whether all values are NaN."""
        return bool(np.isnan(unpacked(row, self.spec.storage, self.spec.row_shape(self.frames))).all())

    def array_options(self) -> dict[str, Any]:
        """What describes the Zarr array; where it holds bytes, an attribute says what they are."""
        if self.spec.storage != "int8":
            axes = ("row", "frame", "channel", "y", "x")
            return {"dtype": "float16", "fill_value": float("nan"), "dimension_names": axes}
        values = self.spec.row_shape(self.frames)
        about = f"int8 {list(values)}, then float32 [{values[1]}], little-endian; value = int8 * float32 of its channel"
        options = {"dtype": "int8", "fill_value": 0, "dimension_names": ("row", "byte")}
        return options | {"attributes": {"row": about}}


@dataclass(frozen=True)
class PixelFormat:
    """Clips of JPEG frames of one spec and clip length as the bytes of a shard."""

    array: ClassVar[str] = "pixels"
    schema: ClassVar[type[dy.Schema]] = PixelCommits
    freed: ClassVar[Mapping[str, Any]] = {"offset": None, "size_bytes": None, "crc32c": None}

    spec: PixelSpec
    frames: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(F, H, W, 3) of a row in the Zarr array."""
        return self.spec.row_shape(self.frames)

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
        return (*(chunk for chunk in rows if chunk is not None), index_of(extents)), measured

    def extents(self, commits: pl.DataFrame) -> list[tuple[int, int]]:
        """(offset, size) in bytes of every row; (0, 0) for a failed one."""
        return commits.select(pl.col("offset", "size_bytes").fill_null(0)).rows()

    def is_blank(self, row: UInt8[np.ndarray, " bytes"]) -> bool:
        """Whether a failed row has no bytes."""
        return row.size == 0

    def array_options(self) -> dict[str, Any]:
        """What describes the Zarr array: RGB frames under the codec of zarr_jpeg.py."""
        from storage.zarr_jpeg import JpegFrames  # here, since readers do without zarr

        codec, axes = JpegFrames(self.spec.quality, self.spec.subsampling), ("row", "frame", "y", "x", "channel")
        return {"dtype": "uint8", "serializer": codec, "fill_value": 0, "dimension_names": axes}


def row_format(spec: EncodingSpec | PixelSpec, frames: int) -> LatentFormat | PixelFormat:
    """The format of rows of a spec and clip length."""
    return LatentFormat(spec, frames) if isinstance(spec, EncodingSpec) else PixelFormat(spec, frames)
