"""Sealed parts: one table of all commits of a finished part, so that reading them costs the same at any size.

A commit is a file a shard, 300 in a common part. Once all are there, `sealed.parquet` gets them by slot, and then
`sealed.json` says what was sealed: how many shards, the bytes of all commits, checksum and size of the table. Planning
reads that file alone, makers the table too.

Commits stay the truth. A seal counts only while a listing shows every commit that it sealed and the table is the one
that it names; else commits are read, as in a part without a seal. Whoever changes a commit removes the seal first
(`Part.unseal`), under the part's lock. Where there are no locks, a seal written meanwhile is found by the commits'
sizes, which a listing of a bucket has. A process that dies anywhere leaves a seal that holds, or none.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from storage import atomic, listing, tables
from storage.digest import digest_config
from storage.errors import DamagedError, StoreError, UnwritableError, UpstreamError
from storage.part import COMMIT, Part
from storage.records import refuse_newer

VERSION = 1  # of sealed.json


@dataclass(frozen=True)
class Seal:
    """What `sealed.json` says."""

    shards: int
    rows: int
    commits_bytes: int  # of the files of all commits
    crc32c: int  # of sealed.parquet, as `tables.seal` gives it
    size_bytes: int  # of sealed.parquet


def read_seal(part: Part[Any]) -> Seal | None:
    """The seal of a part; None where it has none, or where its commits are not those that were sealed.

    Two requests. StoreError for a seal of a newer version or a listing without a commit that is there, DamagedError
    where the file was changed.
    """
    path = part.seal_path
    try:
        record = atomic.read_json(path)
    except UpstreamError:
        return None
    try:
        version, digest = int(record.pop("version")), record.pop("digest")
        refuse_newer(path, version, VERSION)
        seal = Seal(**record)
        if digest != digest_config(asdict(seal)):
            raise ValueError("its digest is another")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise DamagedError(f"{path} was changed ({error}): remove it, the commits beside it are complete") from error
    found = listing.sizes(f"{part.path}/commits", COMMIT)
    names = [f"{number:06d}.parquet" for number in range(seal.shards)]
    absent = [f"{part.path}/commits/{name}" for name in names if name not in found]
    if hidden := next((path for path in absent if listing.size_bytes(path) is not None), None):
        raise listing.untrue(f"{hidden} is there, and its folder was listed without it")
    if absent:
        return None
    sizes = [size for size in (found[name] for name in names) if size is not None]
    return None if sizes and sum(sizes) != seal.commits_bytes else seal


def is_finished(part: Part[Any]) -> bool:
    """Whether every shard of a part is committed."""
    return read_seal(part) is not None or len(part.committed_shards()) == part.shards


def seal_part(part: Part[Any]) -> bool:
    """Seal a part whose shards are all committed; whether it is sealed now.

    Nothing is written where it is sealed already, nor where nothing may be written: commits say the same.
    """
    if _holds(part):
        return True
    with suppress(UnwritableError), part.lock():
        files = listing.files_below(f"{part.path}/commits")  # first, so that what changes after it is found by its size
        paths = [part.commit_path(number) for number in range(part.shards)]
        if not files.keys() >= set(paths):
            return False
        if not _holds(part):  # sealed by another maker, meanwhile
            part.unseal()
            commits = part.commits()
            data = tables.encode_table(commits, part.format.schema, part.sealed_path)
            atomic.publish_bytes(part.sealed_path, data)
            crc, size_bytes = tables.seal_of(data, part.sealed_path)
            seal = Seal(part.shards, commits.height, sum(files[path] for path in paths), crc, size_bytes)
            digest = digest_config(asdict(seal))
            atomic.publish_json(part.seal_path, {"version": VERSION, "digest": digest, **asdict(seal)})
        return True
    return False


def _holds(part: Part[Any]) -> bool:
    seal = read_seal(part)
    return seal is not None and listing.size_bytes(part.sealed_path) == seal.size_bytes


def commits_of(part: Part[Any], columns: Sequence[str]) -> pl.DataFrame:
    """These columns of every committed row of a part, by slot: of a sealed part from its table."""
    sealed = sealed_commits(part, columns)
    return part.commits().select(columns) if sealed is None else sealed


def sealed_commits(part: Part[Any], columns: Sequence[str]) -> pl.DataFrame | None:
    """These columns of a part's sealed table; None where the part is not sealed, or the table is not the one sealed.

    TableError where the table is damaged.
    """
    seal = read_seal(part)
    if seal is None:
        return None
    try:
        data = atomic.read_bytes(part.sealed_path)
    except UpstreamError:
        return None
    if tables.seal_of(data, part.sealed_path) != (seal.crc32c, seal.size_bytes):
        return None
    return tables.decode_columns(data, part.format.schema, columns, part.sealed_path)


def seals_of(part: Part[Any]) -> list[tuple[str, tuple[int, int]]]:
    """Path and seal (crc32c, size in bytes) of each table that the rows of a part are read from, for comparison."""
    seal = read_seal(part)
    if seal is not None:
        return [(part.sealed_path, (seal.crc32c, seal.size_bytes))]
    return [(path, tables.seal(path)) for path in part.table_paths()]
