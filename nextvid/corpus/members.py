"""Archives in a listing: their members are rows like other files, from the tables while an archive stays as it was."""

from collections import Counter
from collections.abc import Mapping

import polars as pl

from nextvid.config.datasets import DatasetConfig
from nextvid.corpus.assignment import latest
from nextvid.video.archives import INSIDE, PARQUET, TAR, index, local_archive, split_uri
from nextvid.video.probe import kind_of
from storage.errors import CorpusError

Row = tuple[str, str, str, int, str]  # URI, path, kind, size in bytes, fingerprint

ARCHIVE = "archive"  # in the place of a kind, until its members are listed
# How fingerprints begin of what media.py refuses: an archive that is read in part, and a name that two members have.
DAMAGED, DOUBLED = "damaged archive: ", "two members have this name; "


def archives_of(config: DatasetConfig) -> tuple[str, ...]:
    """Extensions of the archives whose members are files of this dataset."""
    return (*((TAR,) if config.tar else ()), *((PARQUET,) if config.parquet_column else ()))


def known_members(sources: pl.DataFrame, column: str | None) -> dict[str, list[Row]]:
    """The present files inside each archive, as the tables have them; an archive's own row, where it is damaged."""
    found: dict[str, list[Row]] = {}
    rows = latest(sources).filter(pl.col("gone_at").is_null())
    for row in rows.select("uri", "path", "kind", "size_bytes", "fingerprint").iter_rows():
        archive, member = split_uri(row[0]) or (row[0], "")
        if not member or archive.endswith(TAR) or member.startswith(f"{column}/"):
            found.setdefault(archive, []).append(row)
    return found


def opened(row: Row, column: str | None, known: Mapping[str, list[Row]], ignored: Counter[str]) -> list[Row]:
    """A file as it is; of an archive its members, and itself where it is damaged.

    The fingerprint of a member is that of its archive: where that changes, each member is read again.
    """
    uri, path, kind, size_bytes, fingerprint = row
    if kind != ARCHIVE:
        return [row]
    state = f"{fingerprint} of {size_bytes} bytes"
    if (before := known.get(uri)) and all(one[4].endswith(state) for one in before):
        return before
    with local_archive(uri) as local:
        try:
            found = index(local, column)
        except CorpusError as error:
            raise CorpusError(str(error).replace(str(local), uri)) from error
    ignored.update(found.ignored)
    rows = []
    for name, member_bytes in found.sizes_bytes.items():
        mark = f"{DOUBLED}{state}" if name in found.doubled else state
        rows.append((f"{uri}{INSIDE}{name}", f"{path}{INSIDE}{name}", str(kind_of(name)), member_bytes, mark))
    if found.damage:
        kind = rows[0][2] if rows else "video"  # in a batch with its members
        rows.append((uri, path, kind, size_bytes, f"{DAMAGED}{found.damage}; {state}"))
    return rows
