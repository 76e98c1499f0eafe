"""The bytes of one shard: dense rows, then the index that any Zarr reader expects. Pure functions, no files.

Zarr v3 `sharding_indexed`, inner chunk = one row, no compressor, index at the end: per inner chunk offset and size as
little-endian u64, absent ones 2^64-1, then the crc32c of the index. Rows are in slot order without gaps, so that the
offset of slot s is s * row_bytes and a reader needs no index. The storage options (float16, keepbits7, int8) are here.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import polars as pl
from jaxtyping import Float, Float16, Float32, UInt8
from numcodecs.bitround import BitRound

from storage.digest import crc32c
from storage.errors import StoreError

ROWS_PER_SHARD = 256  # 67 MB at 16 frames of 32x16x16; size does not change read speed (measured)
INDEX_BYTES = 16 * ROWS_PER_SHARD + 4  # offset and size a row, crc32c of both
_ABSENT = np.uint64(2**64 - 1)  # Zarr v3 specification, sharding codec
_KEEP_BITS = 7  # of float16's 10: our choice, the option `keepbits7`
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
    status ok is not finite or leaves the range of float16.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # reported below, with the row
        stored = np.array(latents, dtype="<f2", order="C")
    stored[~ok] = 0
    if storage == "keepbits7":
        stored = np.asarray(BitRound(keepbits=_KEEP_BITS).encode(stored)).view("<f2")  # it returns integers
    broken = [n for n, row in enumerate(stored) if (row.view("<u2") & _EXPONENT).max() == _EXPONENT]
    if broken:
        raise StoreError(f"rows {broken} of this shard are not finite as {storage}: give them a status other than ok")
    if storage == "int8":
        return _quantised(np.where(ok[:, None, None, None, None], latents, 0).astype(np.float32), ok)
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


def _quantised(exact: Float32[np.ndarray, "n F C h w"], ok: np.ndarray) -> UInt8[np.ndarray, "n bytes"]:
    """Symmetric steps of 1/127 of each row's and channel's largest magnitude: no calibration, nothing is clipped."""
    largest = np.abs(exact).max(axis=(1, 3, 4))
    scales = np.where(largest > _NOTHING, largest / _STEPS, 0).astype("<f4")
    steps = scales[:, None, :, None, None]
    values = np.rint(np.divide(exact, steps, out=np.zeros_like(exact), where=steps > 0)).astype(np.int8)
    scales[~ok] = np.nan
    return np.concatenate([values.reshape(len(exact), -1).view(np.uint8), scales.view(np.uint8)], axis=1)


def measured(
    raw: UInt8[np.ndarray, "n bytes"], stored: Float16[np.ndarray, "n F C h w"], commits: pl.DataFrame
) -> pl.DataFrame:
    """The commits with crc32c of the stored bytes, sums and sums of squares per channel of their values.

    None of them for failed rows.
    """
    crcs: list[int | None] = []
    sums: list[list[float]] = []
    squares: list[list[float]] = []
    for data, row, status in zip(raw, stored, commits["status"], strict=True):
        if status != "ok":
            crcs.append(None)
            sums.append([])
            squares.append([])
            continue
        exact = row.astype(np.float64)
        crcs.append(crc32c(data))
        sums.append(np.einsum("fchw->c", exact).tolist())
        squares.append(np.einsum("fchw,fchw->c", exact, exact).tolist())
    return commits.with_columns(
        pl.Series("crc32c", crcs, dtype=pl.UInt32),
        pl.Series("sums", sums, dtype=pl.List(pl.Float64)),
        pl.Series("sums_squared", squares, dtype=pl.List(pl.Float64)),
    )
