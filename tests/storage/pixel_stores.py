"""Small pixel stores for tests: 32 pixels a side, clips that depend on the row id alone."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from einops import repeat

from storage.jpeg import encode_clip
from storage.part import PixelPart
from storage.root import DataRoot
from storage.schemas import PixelCommits
from storage.spec import PixelSpec
from storage.store import PixelStore
from tests.storage.stores import BATCH, FRAMES, ids

SIDE = 32


def pixel_spec(**changes: str | int) -> PixelSpec:
    value: dict[str, str | int] = {
        "resolution": SIDE,
        "resize": "bicubic",
        "quality": 90,
        "subsampling": "4:2:0",
        "codec": "jpeg",
    }
    return PixelSpec.from_json(value | changes)


def clip(row_id: bytes, frames: int = FRAMES, side: int = SIDE) -> np.ndarray:
    """Frames of a colour gradient that moves: smooth, so that JPEG is close, and different in every row and frame."""
    random = np.random.default_rng(int.from_bytes(row_id[:8], "little"))
    corners = random.uniform(0, 255, (2, 2, 3))
    y, x = np.linspace(0, 1, side)[:, None, None], np.linspace(0, 1, side)[None, :, None]
    still = (corners[0, 0] * (1 - x) + corners[0, 1] * x) * (1 - y) + (corners[1, 0] * (1 - x) + corners[1, 1] * x) * y
    moving = repeat(still, "h w c -> f h w c", f=frames) * np.linspace(0.6, 1, frames)[:, None, None, None]
    return moving.round().astype(np.uint8)


def chunks(row_ids: Sequence[bytes], frames: int = FRAMES, failed: Sequence[bytes] = ()) -> list[bytes | None]:
    return [None if row in failed else encode_clip(clip(row, frames), 90, "4:2:0") for row in row_ids]


def pixel_commit(part: PixelPart, shard: int, failed: Sequence[bytes] = ()) -> pl.DataFrame:
    rows = part.rows_of(shard)
    bad = [row in failed for row in rows["row_id"].to_list()]
    return rows.with_columns(
        status=pl.Series(["quarantined" if lost else "ok" for lost in bad]),
        reason=pl.Series(["undecodable" if lost else None for lost in bad], dtype=pl.String),
        offset=pl.lit(None, pl.UInt64),
        size_bytes=pl.lit(None, pl.UInt32),
        crc32c=pl.lit(None, pl.UInt32),
        psnr_db=pl.lit(None, pl.Float32),
        encode_s=pl.lit(0.25, pl.Float32),
    ).select(PixelCommits.column_names())


def write_pixels(part: PixelPart, shard: int, failed: Sequence[bytes] = ()) -> None:
    rows = part.rows_of(shard)["row_id"].to_list()
    part.write_shard(shard, chunks(rows, part.frames, failed), pixel_commit(part, shard, failed))


def pixel_store(root: DataRoot, rows: int = 300, failed: Sequence[bytes] = ()) -> tuple[PixelStore, PixelPart]:
    store = PixelStore(root, pixel_spec())
    store.create()
    part = store.plan_part(BATCH, FRAMES, ids(rows))
    for shard in range(part.shards):
        write_pixels(part, shard, failed)
    return store, part
