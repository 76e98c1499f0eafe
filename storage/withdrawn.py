"""Withdrawn media files: the ids of rows that nobody may train on any more, one JSON record a media file.

The file is written before any byte is zeroed, so that loaders refuse such rows from then on; `Part.erase` then zeroes
in place, the one exception to write-once.
"""

import re
from collections.abc import Iterable

import polars as pl

from storage import atomic, listing
from storage.errors import DamagedError
from storage.records import publish_record, read_record
from storage.root import DataRoot

_ID = re.compile(r"[0-9a-f]{32}")  # of a media file or a row


def record_withdrawal(root: DataRoot, media_id: str, row_ids: Iterable[bytes]) -> None:
    """Record the rows of a withdrawn media file (its id: 32 hex digits); rows named before stay named."""
    assert _ID.fullmatch(media_id), media_id
    path = f"{root.withdrawn()}/{media_id}.json"
    known = _rows(path) if atomic.exists(path) else set()
    names = sorted(row_id.hex() for row_id in known | set(row_ids))
    publish_record(path, {"media_id": media_id, "row_ids": names})


def withdrawn_media(root: DataRoot) -> frozenset[bytes]:
    """Ids (16 bytes) of withdrawn media files: the names of their records; other files there are ignored."""
    names = (name.removesuffix(".json") for name in listing.files(root.withdrawn()) if name.endswith(".json"))
    return frozenset(bytes.fromhex(name) for name in names if _ID.fullmatch(name))


def is_withdrawn(root: DataRoot) -> pl.Expr:
    """Of a table with the column media_id, the rows of files that are withdrawn now, named in a record or not."""
    return pl.col("media_id").is_in(pl.Series(sorted(withdrawn_media(root)), dtype=pl.Binary).implode())


def withdrawn_rows(root: DataRoot) -> frozenset[bytes]:
    """Row ids (16 bytes) of every withdrawn media file; DamagedError where a record cannot be read."""
    records = sorted(f"{root.withdrawn()}/{media.hex()}.json" for media in withdrawn_media(root))
    return frozenset().union(*(_rows(path) for path in records))


def _rows(path: str) -> set[bytes]:
    record = read_record(path)
    try:
        strange = [name for name in record["row_ids"] if not _ID.fullmatch(name)]
        if strange:
            raise ValueError(f"'{strange[0]:.50}' is no row id")
        return {bytes.fromhex(name) for name in record["row_ids"]}
    except (KeyError, TypeError, ValueError) as error:
        what = f"{path} is no record of a withdrawal ({type(error).__name__}: {error})"
        raise DamagedError(f"{what}: restore it, or withdraw the file again") from error
