"""Small stores for tests: 2 channels, 2x3 cells, so that a row of 4 frames has 96 bytes."""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from storage.part import LatentPart
from storage.reader import RowReader
from storage.root import DataRoot
from storage.schemas import Commits
from storage.spec import EncodingSpec
from storage.store import LatentStore

BATCH = "demo.000000"
FRAMES = 4
Way = Literal["copies", "ranges"]  # how the rows of a store on an object store are read


def spec(**changes: str | int) -> EncodingSpec:
    value: dict[str, str | int] = {
        "autoencoder": "ab" * 16,
        "resolution": 48,
        "resize": "bicubic",
        "precision": "float32",
        "posterior": "mean",
        "storage": "float16",
        "channels": 2,
        "height": 2,
        "width": 3,
        "time_map": "frame",
    }
    return EncodingSpec.from_json(value | changes)


def new_store(root: DataRoot, **changes: str | int) -> LatentStore:
    store = LatentStore(root, spec(**changes))
    store.create()
    return store


def ids(count: int, first: int = 0) -> list[bytes]:
    """Row ids whose order is not that of their numbers."""
    return [((number * 0x9E3779B97F4A7C15) % 2**64).to_bytes(8, "little") * 2 for number in range(first, first + count)]


def values(row_ids: Sequence[bytes], frames: int = FRAMES) -> np.ndarray:
    """Latents that depend on the row id alone."""
    seeds = [int.from_bytes(row_id[:8], "little") for row_id in row_ids]
    rows = [np.random.default_rng(seed).standard_normal((frames, 2, 2, 3), dtype=np.float32) for seed in seeds]
    return np.stack(rows)


def commit_of(part: LatentPart, shard: int, failed: Sequence[bytes] = ()) -> pl.DataFrame:
    rows = part.rows_of(shard)
    bad = pl.col("row_id").is_in(list(failed))
    return rows.select(
        "row_id",
        "slot",
        pl.when(bad).then(pl.lit("quarantined")).otherwise(pl.lit("ok")).alias("status"),
        pl.when(bad).then(pl.lit("undecodable")).otherwise(None).alias("reason"),
        pl.lit(None, pl.UInt32).alias("crc32c"),
        pl.lit([], pl.List(pl.Float64)).alias("sums"),
        pl.lit([], pl.List(pl.Float64)).alias("sums_squared"),
        pl.lit(None, pl.Float32).alias("posterior_std"),
        pl.lit(None, pl.Float32).alias("psnr_db"),
        pl.lit(0.5, pl.Float32).alias("decode_s"),
        pl.lit(0.25, pl.Float32).alias("encode_s"),
    ).select(Commits.column_names())


def write(part: LatentPart, shard: int, failed: Sequence[bytes] = ()) -> None:
    latents = values(part.rows_of(shard)["row_id"].to_list(), part.frames)
    part.write_shard(shard, latents, commit_of(part, shard, failed))


def full_store(
    root: DataRoot, rows: int = 300, failed: Sequence[bytes] = (), **changes: str | int
) -> tuple[LatentStore, LatentPart]:
    store = new_store(root, **changes)
    part = store.plan_part(BATCH, FRAMES, ids(rows))
    for shard in range(part.shards):
        write(part, shard, failed)
    return store, part


def read_each(reader: RowReader, rows: np.ndarray, frames: int = FRAMES) -> np.ndarray:
    """Rows by their addresses, one after the other into the same buffer, as one array."""
    out, found = np.empty((frames, 2, 2, 3), np.float16), []
    for address in rows:
        reader.read_into(frames, address, out)
        found.append(out.copy())
    return np.stack(found) if found else np.empty((0, *out.shape), np.float16)


def copies(cache: Path) -> list[Path]:
    """The copies that a cache's folder holds."""
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.suffix not in (".lock", ".sqlite"))


def mapped_files(folder: str) -> int:
    """How many files below a folder this process has mapped (Linux)."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.rpartition(" ")[2] for line in lines if f"{folder}/" in line})


def in_threads(work: Callable[[int], object], count: int = 4) -> None:
    """Call `work` with 0, 1, ... in threads of their own, all at once; the first error is raised here."""
    with ThreadPoolExecutor(count) as pool:
        together = threading.Barrier(count)

        def begin(number: int) -> object:
            together.wait()
            return work(number)

        for _ in pool.map(begin, range(count)):
            pass


def as_of_0_1(part: LatentPart) -> LatentPart:
    """The part as release 0.1 wrote it: chunk keys with slashes, a shard in four folders; opened anew."""
    assert part.separator == "."
    path = Path(part.metadata_paths[1])
    metadata = json.loads(path.read_text())
    metadata["chunk_key_encoding"] = {"name": "default", "configuration": {"separator": "/"}}
    path.write_text(json.dumps(metadata))
    old = LatentPart(part.path, part.spec, part.batch, part.frames, part.number)
    for number in range(part.shards):
        if Path(part.shard_path(number)).exists():
            Path(old.shard_path(number)).parent.mkdir(parents=True)
            Path(part.shard_path(number)).rename(old.shard_path(number))
    return old
