"""Which batch a file belongs to: append-only assignment of URIs to batches of one kind.

Holds the rule alone, as a pure function of tables: a URI keeps its batch for ever; new ones, sorted, fill the last open
batch of their kind, then open the next (design 2). Holds no listing (sources.py) and no disk (journal.py). Sizes come
from corpus.yaml.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import polars as pl

from nextvid.config.datasets import DatasetConfig
from nextvid.making.batches import batch_key, batch_number

Kind = Literal["video", "image"]
KINDS: tuple[Kind, ...] = ("image", "video")


@dataclass(frozen=True)
class BatchChange:
    """What one listing changed in one batch: numbers of files."""

    batch: str
    added: int
    changed: int
    gone: int
    returned: int = 0


def latest(sources: pl.DataFrame) -> pl.DataFrame:
    """The newest revision of each URI."""
    return sources.filter(pl.col("revision") == pl.col("revision").max().over("uri"))


def assign(uris: list[str], kind: Kind, dataset: str, known: pl.DataFrame, capacity: int) -> dict[str, str]:
    """Batches of URIs of one kind that `known` (rows of Sources of this dataset) does not hold yet.

    Fills the last batch of the kind up to `capacity` files, then opens batches after the highest number there is.
    """
    slots = _open_slots(kind, dataset, known, capacity)
    return {uri: next(slots) for uri in sorted(uris)}


def _open_slots(kind: Kind, dataset: str, known: pl.DataFrame, capacity: int) -> Iterator[str]:
    counts = known.group_by("batch", "kind").agg(pl.col("uri").n_unique())
    numbers = [batch_number(batch) for batch in counts["batch"]]
    last = counts.filter(pl.col("kind").cast(pl.String) == kind).sort("batch").tail(1)
    for batch, files in zip(last["batch"], last["uri"], strict=True):
        for _ in range(capacity - files):
            yield batch
    number = max(numbers, default=-1)
    while True:
        number += 1
        for _ in range(capacity):
            yield batch_key(dataset, number)


def merge(
    known: pl.DataFrame, listed: pl.DataFrame, waiting: list[str], dataset: str, config: DatasetConfig, now: datetime
) -> tuple[pl.DataFrame, list[BatchChange]]:
    """The dataset's rows of Sources after a listing, and what changed by batch, sorted.

    `listed` has columns uri, path, kind, size_bytes, fingerprint; `waiting` are URIs that were seen but have not held
    still yet: they are neither new nor gone.
    """
    joined = latest(known).select("uri", "revision", "batch", "kind", "gone_at", "size_bytes", "fingerprint")
    both = listed.join(joined, on="uri", how="left", suffix="_known")
    same = (pl.col("size_bytes") == pl.col("size_bytes_known")) & (pl.col("fingerprint") == pl.col("fingerprint_known"))
    new = both.filter(pl.col("revision").is_null())
    changed = both.filter(pl.col("revision").is_not_null() & ~same)
    returned = both.filter(pl.col("revision").is_not_null() & same & pl.col("gone_at").is_not_null())
    seen = pl.Series("uri", [*listed["uri"], *waiting], pl.String)
    gone = joined.filter(~pl.col("uri").is_in(seen.implode()) & pl.col("gone_at").is_null())
    batches: dict[str, str] = {}
    # One kind after the other, each seeing the batches that the one before has opened: no batch holds two kinds.
    rows = known
    for kind in KINDS:
        uris = new.filter(pl.col("kind").cast(pl.String) == kind)["uri"].to_list()
        capacity = config.max_batch_videos if kind == "video" else config.max_batch_images
        assigned = assign(uris, kind, dataset, rows, capacity)
        batches |= assigned
        rows = pl.concat([rows, _rows(new.filter(pl.col("uri").is_in(uris)), assigned, dataset, now, known)])
    again = changed.with_columns(pl.col("revision") + 1)
    rows = pl.concat(
        [rows, _rows(again, dict(zip(changed["uri"], changed["batch"], strict=True)), dataset, now, known)]
    )
    rows = _mark(rows, gone["uri"], returned["uri"], now)
    added = pl.Series("batch", list(batches.values()), pl.String)
    return rows, _changes(added, changed["batch"], gone["batch"], returned["batch"])


def _rows(
    files: pl.DataFrame, batches: dict[str, str], dataset: str, now: datetime, like: pl.DataFrame
) -> pl.DataFrame:
    return files.select(
        "uri",
        pl.col("revision").fill_null(0).cast(pl.Int32),
        pl.lit(dataset).alias("dataset"),
        pl.Series("batch", [batches[uri] for uri in files["uri"]], pl.String),
        "path",
        pl.col("kind").cast(like.schema["kind"]),
        "size_bytes",
        "fingerprint",
        pl.lit(now).cast(like.schema["found_at"]).alias("found_at"),
        pl.lit(None).cast(like.schema["gone_at"]).alias("gone_at"),
    )


def _mark(rows: pl.DataFrame, gone: pl.Series, returned: pl.Series, now: datetime) -> pl.DataFrame:
    newest = pl.col("revision") == pl.col("revision").max().over("uri")
    is_gone, is_back = pl.col("uri").is_in(gone.implode()) & newest, pl.col("uri").is_in(returned.implode()) & newest
    back = pl.lit(None).cast(rows.schema["gone_at"])
    return rows.with_columns(
        pl.when(is_gone)
        .then(pl.lit(now).cast(rows.schema["gone_at"]))
        .when(is_back)
        .then(back)
        .otherwise(pl.col("gone_at"))
        .alias("gone_at")
    ).sort("uri", "revision")


def _changes(added: pl.Series, changed: pl.Series, gone: pl.Series, returned: pl.Series) -> list[BatchChange]:
    counts = [Counter(series) for series in (added, changed, gone, returned)]
    touched = sorted(set().union(*counts))
    return [BatchChange(batch, *(count[batch] for count in counts)) for batch in touched]
