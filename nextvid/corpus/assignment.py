"""Assignment of files to batches, and how it is published: a URI keeps its batch for ever.

New URIs, sorted, fill the last open batch of their kind (video or image), then open the next; how many bytes and files
a batch has at most comes from corpus.yaml. So what was made of a batch stays valid.

The tables change by transactions: numbered change files, created exclusively, then applied to the tables. A change
holds the new tables of the batches that one listing touched. Its number is one above that which the writer read; a name
can be created once, so of two writers one wins and the other lists again. That works on object stores too, which have
no locks. The newest change is applied again before each read, which completes the work of a killed writer. Older
changes are emptied but keep their names, so that no number is used twice.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import polars as pl

from nextvid.config.datasets import DatasetConfig
from nextvid.making.batches import batch_key, batch_number
from storage import atomic, listing, tables
from storage.root import DataRoot
from storage.schemas import Sources

MediaKind = Literal["video", "image"]
# Files of a batch by default until batches were bounded by bytes: one of so many is full, and stays as it is.
ONCE_FULL: Mapping[MediaKind, int] = {"video": 1000, "image": 10000}
_APPLIED: dict[str, int] = {}  # by root, the newest change that this process has applied


@dataclass(frozen=True)
class BatchChange:
    """How many files of a batch a listing added, changed or found gone."""

    batch: str
    added: int
    changed: int
    gone: int
    returned: int = 0


def latest(sources: pl.DataFrame) -> pl.DataFrame:
    """The newest revision of each URI."""
    return sources.filter(pl.col("revision") == pl.col("revision").max().over("uri"))


def assign(
    sizes_bytes: Mapping[str, int], kind: MediaKind, dataset: str, known: pl.DataFrame, config: DatasetConfig
) -> dict[str, str]:
    """The batch of each URI of one kind; none of them is in `known`, the dataset's rows of Sources.

    Fills the last batch of the kind up to its most bytes or files, then opens batches after the highest number.
    """
    most_files = config.max_batch_videos if kind == "video" else config.max_batch_images
    most_bytes = round(config.max_batch_gb * 1e9)
    counts = latest(known).group_by("batch", "kind").agg(pl.len(), pl.col("size_bytes").sum())
    number = max((batch_number(batch) for batch in counts["batch"]), default=-1)
    last = counts.filter(pl.col("kind").cast(pl.String) == kind).sort("batch").tail(1)
    batch, _, files, size_bytes = last.row(0) if last.height else ("", kind, most_files, 0)
    if files == ONCE_FULL[kind] and f"max_batch_{kind}s" not in config.model_fields_set:
        files = most_files
    found = {}
    for uri in sorted(sizes_bytes):
        if files >= most_files or (files and size_bytes + sizes_bytes[uri] > most_bytes):
            number += 1
            batch, files, size_bytes = batch_key(dataset, number), 0, 0
        found[uri] = batch
        files, size_bytes = files + 1, size_bytes + sizes_bytes[uri]
    return found


def placed(known: pl.DataFrame, listed: pl.DataFrame, uri: str) -> pl.DataFrame:
    """Rows of a dataset under the URIs of the folder `uri`, where that is a copy of the one that they were listed in.

    It is one if no file that is there was listed there, and most have their paths: a project that is copied with its
    files keeps batches and rows (docs/decisions/0064). `listed` has columns uri and path.
    """
    place = f"{uri.rstrip('/')}/"
    present = latest(known).filter(pl.col("gone_at").is_null())
    if (
        present.is_empty()
        or known["uri"].str.starts_with(place).any()
        or not known.select("path", "revision").is_unique().all()
    ):
        return known
    if 2 * present["path"].is_in(listed["path"].implode()).sum() <= present.height:
        return known
    return known.with_columns(pl.concat_str(pl.lit(place), "path").alias("uri")).sort("uri", "revision")


def merge(
    known: pl.DataFrame, listed: pl.DataFrame, waiting: list[str], dataset: str, config: DatasetConfig, now: datetime
) -> tuple[pl.DataFrame, list[BatchChange]]:
    """The dataset's rows of Sources after a listing, and what changed by batch, sorted.

    `listed` has columns uri, path, kind, size_bytes, fingerprint; `waiting` are URIs whose files may still be
    written: they are neither new nor gone.
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
    # images first, then videos, which see the batches that images opened: no batch holds both
    rows = known
    kinds: tuple[MediaKind, ...] = ("image", "video")
    for kind in kinds:
        files = new.filter(pl.col("kind").cast(pl.String) == kind)
        assigned = assign(dict(files.select("uri", "size_bytes").iter_rows()), kind, dataset, rows, config)
        batches |= assigned
        rows = pl.concat([rows, _rows(files, assigned, dataset, now, known)])
    again = changed.with_columns(pl.col("revision") + 1)
    rows = pl.concat(
        [rows, _rows(again, dict(zip(changed["uri"], changed["batch"], strict=True)), dataset, now, known)]
    )
    rows = _mark(rows, gone["uri"], returned["uri"], now)
    counts = [Counter(some) for some in (batches.values(), changed["batch"], gone["batch"], returned["batch"])]
    touched = sorted(set().union(*counts))
    return rows, [BatchChange(batch, *(count[batch] for count in counts)) for batch in touched]


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


def newest_change(root: DataRoot) -> int:
    """Number of the newest change; 0 before the first."""
    names = listing.files(f"{root.folder('sources')}/changes")
    numbers = [name.removesuffix(".parquet") for name in names if name.endswith(".parquet")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def catch_up(root: DataRoot) -> int:
    """Apply the newest change, in case its writer was killed, and return its number."""
    number = newest_change(root)
    if number and _APPLIED.get(root.url) != number:
        path = _path(root, number)
        if data := atomic.read_bytes(path):
            _apply(root, tables.decode_table(data, Sources, path))
        _APPLIED[root.url] = number
    return number


def publish_change(root: DataRoot, read: int, changed: pl.DataFrame) -> None:
    """Write whole tables of the batches in `changed` (rows of Sources) against version `read`.

    Raises ConflictError, and writes nothing, where another writer has published since.
    """
    path = _path(root, read + 1)
    atomic.create_exclusively(path, tables.encode_table(changed, Sources, path))
    _apply(root, changed)
    if read:
        atomic.publish_bytes(_path(root, read), b"")


def _apply(root: DataRoot, changed: pl.DataFrame) -> None:
    after = changed.sort("uri", "revision").partition_by("batch", as_dict=True)
    known = set(root.batches("sources")) & {str(batch) for (batch,) in after}
    before = tables.read_tables(root, "sources", sorted(known), Sources).partition_by("batch", as_dict=True)
    new = {
        root.table("sources", str(key[0])): table
        for key, table in after.items()
        if key not in before or not before[key].equals(table)
    }
    tables.write_many(new, Sources)


def _path(root: DataRoot, number: int) -> str:
    return f"{root.folder('sources')}/changes/{number:09d}.parquet"
