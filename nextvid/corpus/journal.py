"""Transactions on the tables of `sources`: numbered change files, created exclusively, then applied to the tables.

A change holds the new tables of the batches that one listing touched. Its number is one above the version that the
writer read; a name can be created once, so of two writers one wins and the other lists again. That works on object
stores too, which have no locks. The newest change is applied again before each read, which completes the work of a
killed writer. Older changes are emptied but keep their names, so that no number is used twice.
"""

import polars as pl

from storage import atomic, listing, tables
from storage.root import DataRoot
from storage.schemas import Sources

_APPLIED: dict[str, int] = {}  # by root, the newest change that this process has applied


def version(root: DataRoot) -> int:
    """Number of the newest change; 0 before the first."""
    names = listing.files(f"{root.folder('sources')}/changes")
    numbers = [name.removesuffix(".parquet") for name in names if name.endswith(".parquet")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def catch_up(root: DataRoot) -> int:
    """Apply the newest change, in case its writer was killed, and return its number."""
    number = version(root)
    if number and _APPLIED.get(root.url) != number:
        path = _path(root, number)
        if data := atomic.read_bytes(path):
            _apply(root, tables.decode_table(data, Sources, path))
        _APPLIED[root.url] = number
    return number


def publish(root: DataRoot, read: int, changed: pl.DataFrame) -> None:
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
    for key, table in after.items():
        if key not in before or not before[key].equals(table):
            tables.write_table(root.table("sources", str(key[0])), table, Sources)


def _path(root: DataRoot, number: int) -> str:
    return f"{root.folder('sources')}/changes/{number:09d}.parquet"
