"""How `sources/` is written: whole changes, numbered and created exclusively, then applied to the tables.

A change holds the new tables of the batches that one listing touched. Its number is one above the version that was
read; the name exists once, so of two writers one wins and the other reads and lists again (design 4), on folders as
on object stores, which know no locks. The newest change is applied again before each read: a writer that died in
between is finished by the next. Older changes are emptied, their names stay: a number is never given twice. Holds no
rule of assignment (batches.py).
"""

import polars as pl

from storage import atomic, listing, tables
from storage.root import DataRoot
from storage.schemas import Sources

_APPLIED: dict[str, int] = {}  # by root, the change that this process has seen applied: tables only go on from there


def version(root: DataRoot) -> int:
    """Number of the newest change; 0 before the first."""
    names = listing.files(_folder(root))
    numbers = [name.removesuffix(".parquet") for name in names if name.endswith(".parquet")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def catch_up(root: DataRoot) -> int:
    """Apply the newest change, wherever its writer stopped, and return its number."""
    number = version(root)
    if number and _APPLIED.get(root.url) != number:
        _apply(root, _read(root, number))
        _APPLIED[root.url] = number
    return number


def publish(root: DataRoot, read: int, changed: pl.DataFrame) -> None:
    """Write whole tables of the batches in `changed` (rows of Sources) against version `read`.

    Raises ConflictError where another writer has published since; nothing is written then.
    """
    path = _path(root, read + 1)
    atomic.create_exclusively(path, tables.encode_table(changed, Sources, path))
    _apply(root, changed)
    if read:
        atomic.publish_bytes(_path(root, read), b"")


def _apply(root: DataRoot, changed: pl.DataFrame) -> None:
    for (batch,), rows in changed.group_by("batch", maintain_order=True):
        path, wanted = root.table("sources", str(batch)), rows.sort("uri", "revision")
        if not (atomic.exists(path) and tables.read_table(path, Sources).equals(wanted)):
            tables.write_table(path, wanted, Sources)


def _read(root: DataRoot, number: int) -> pl.DataFrame:
    path = _path(root, number)
    data = atomic.read_bytes(path)
    return tables.decode_table(data, Sources, path) if data else Sources.create_empty()


def _folder(root: DataRoot) -> str:
    return f"{root.folder('sources')}/changes"


def _path(root: DataRoot, number: int) -> str:
    return f"{_folder(root)}/{number:09d}.parquet"
