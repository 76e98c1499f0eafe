"""The bytes of one shard: dense rows, then the index that any Zarr reader expects. Pure functions, no files.

Zarr v3 `sharding_indexed`, inner chunk = one row, no compressor, index at the end: per inner chunk offset and size as
little-endian u64, absent ones 2^64-1, then the crc32c of the index. Rows stand in slot order without gaps, so that the
offset of slot s is s * row_bytes and a reader needs no index (research: store, F). What an option does to values: here.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import polars as pl
from jaxtyping import Float, Float16
from numcodecs.bitround import BitRound

from storage.digest import crc32c
from storage.errors import StoreError

ROWS_PER_SHARD = 256  # 67 MB at 16 frames of 32x16x16; size does not change read speed (research: store, B)
INDEX_BYTES = 16 * ROWS_PER_SHARD + 4  # offset and size a row, crc32c of both
_ABSENT = np.uint64(2**64 - 1)  # Zarr v3 specification, sharding codec
_KEEP_BITS = 7  # design, section 5
_EXPONENT = np.uint16(0x7C00)  # all ones: infinity or NaN in IEEE 754 binary16; 10 times faster than isfinite here


@lru_cache(maxsize=64)  # nearly all shards are full ones
def index(rows: int, row_bytes: int) -> bytes:
    """Index of a dense shard with `rows` rows."""
    return index_of([(row * row_bytes, row_bytes) for row in range(rows)])


def index_of(places: Sequence[tuple[int, int] | None]) -> bytes:
    """Index of a shard whose first rows stand at these (offset, size); None and what follows are absent."""
    table = np.full((ROWS_PER_SHARD, 2), _ABSENT, dtype="<u8")
    for row, place in enumerate(places):
        if place is not None:
            table[row] = place
    data = table.tobytes()
    return data + crc32c(data).to_bytes(4, "little")


def shard_bytes(rows: int, row_bytes: int) -> int:
    """Size of a shard's file."""
    return rows * row_bytes + INDEX_BYTES


def rows_in(size_bytes: int, row_bytes: int) -> int | None:
    """Rows of a dense shard file of this size; None where no shard has this size."""
    rows, rest = divmod(size_bytes - INDEX_BYTES, row_bytes)
    return rows if rest == 0 and 1 <= rows <= ROWS_PER_SHARD else None


def stored_values(
    latents: Float[np.ndarray, "n F C h w"], ok: np.ndarray, storage: str
) -> Float16[np.ndarray, "n F C h w"]:
    """What the store will hold: float16 after the storage option, NaN in the slots of failed rows.

    StoreError where a row that is said to be ok is not finite or leaves the range of float16.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # told below, with the row
        stored = np.array(latents, dtype="<f2", order="C")
    stored[~ok] = 0
    if storage == "keepbits7":
        stored = np.asarray(BitRound(keepbits=_KEEP_BITS).encode(stored)).view("<f2")  # it returns integers
    broken = [n for n, row in enumerate(stored) if (row.view("<u2") & _EXPONENT).max() == _EXPONENT]
    if broken:
        raise StoreError(f"rows {broken} of this shard are not finite as {storage}: give them a status other than ok")
    stored[~ok] = np.nan
    return stored


def measured(stored: Float16[np.ndarray, "n F C h w"], commits: pl.DataFrame) -> pl.DataFrame:
    """The commits with crc32c, sums and sums of squares per channel of the stored values; none for failed rows."""
    crcs: list[int | None] = []
    sums: list[list[float]] = []
    squares: list[list[float]] = []
    for row, status in zip(stored, commits["status"], strict=True):
        if status != "ok":
            crcs.append(None)
            sums.append([])
            squares.append([])
            continue
        exact = row.astype(np.float64)
        crcs.append(crc32c(row))
        sums.append(np.einsum("fchw->c", exact).tolist())
        squares.append(np.einsum("fchw,fchw->c", exact, exact).tolist())
    return commits.with_columns(
        pl.Series("crc32c", crcs, dtype=pl.UInt32),
        pl.Series("sums", sums, dtype=pl.List(pl.Float64)),
        pl.Series("sums_squared", squares, dtype=pl.List(pl.Float64)),
    )
