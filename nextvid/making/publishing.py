"""How makers publish: tables and checks only where they differ from the file, and folders under a digest once.

Making an asset twice writes nothing the second time, so file times say when something changed. A damaged table counts
as different and is made again.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import dataframely as dy
import polars as pl

from nextvid.graph import Asset
from nextvid.making.outcome import Check
from storage import atomic, tables
from storage.digest import digest_bytes
from storage.errors import ConflictError, TableError
from storage.records import publish_record, read_record
from storage.root import DataRoot, Pointed, Table

CHECKS = "checks.json"
HELD_OUT = "held_out"  # reason of a clip that its split keeps from training, where no benchmark reads it


def existing(root: DataRoot, noun: Table, batch: str, schema: type[dy.Schema]) -> pl.DataFrame:
    """The batch's table; an empty one where there is none or it is damaged."""
    path = root.table(noun, batch)
    if not atomic.exists(path):
        return schema.create_empty()
    try:
        return tables.read_table(path, schema)
    except TableError:
        return schema.create_empty()  # the maker makes all of its rows again


def publish_table(root: DataRoot, noun: Table, batch: str, frame: pl.DataFrame, schema: type[dy.Schema]) -> bool:
    """Write the batch's table if it differs from the file; whether it was written."""
    path = root.table(noun, batch)
    if atomic.exists(path) and existing(root, noun, batch, schema).equals(frame):
        return False
    tables.write_table(path, frame, schema)
    return True


def table_digest(root: DataRoot, noun: Table, batch: str) -> str:
    """Id of the bytes of the batch's table: its data version."""
    return digest_bytes(atomic.read_bytes(root.table(noun, batch)))


def publish_verdict(path: str, asset: str, checks: Sequence[Check], made_from: Mapping[str, str] | None = None) -> bool:
    """Write checks, and what their asset was made from, if they differ from the file's; whether they were written."""
    found = tables.read_checks(path)
    plain = [asdict(check) for check in checks]
    if found is not None and (found["asset"], found["checks"], found["made_from"]) == (asset, plain, made_from or {}):
        return False
    tables.publish_checks(path, asset, plain, made_from)
    return True


def counts(frame: pl.DataFrame) -> Mapping[str, int]:
    """Rows by status, and by reason where they are not ok. Rows of another split than train are no rejected ones."""
    held_out = (pl.col("reason") == HELD_OUT).fill_null(False)
    status = pl.when(held_out).then(pl.lit(HELD_OUT)).otherwise(pl.col("status").cast(pl.String)).alias("status")
    by_status = frame.group_by(status).len()
    by_reason = frame.filter(pl.col("reason").is_not_null() & ~held_out).group_by("reason").len()
    found = {str(name): int(number) for name, number in by_status.iter_rows()}
    return found | {f"reason_{name}": int(number) for name, number in sorted(by_reason.iter_rows())}


@dataclass
class Addressed:
    """A folder under a digest. Where it is `new`, `path` is a temporary folder to fill, and `checks` are to be set."""

    path: str
    new: bool
    checks: tuple[Check, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no blocking check failed."""
        return all(check.passed for check in self.checks if check.blocking)


@contextmanager
def addressed(root: DataRoot, noun: Pointed, digest: str) -> Iterator[Addressed]:
    """Fill the folder of a digest, or get it with its checks where it was filled before.

    Its checks are written last and make it complete: readers ask for them first (`require_checks`), so no reader
    takes what a killed maker left for data. On file systems the whole folder gets its name at once.
    """
    folder = root.pointed(noun, digest)
    found = tables.read_checks(f"{folder}/{CHECKS}")
    if found is not None:
        known = [{name: value for name, value in check.items() if name != "blocking"} for check in found["checks"]]
        yield Addressed(folder, False, tuple(Check(**check) for check in known))
        return
    try:
        with atomic.staged_folder(folder, last=CHECKS, over=True) as temporary:
            making = Addressed(str(temporary), True)
            yield making
            tables.publish_checks(f"{temporary}/{CHECKS}", noun, [asdict(check) for check in making.checks])
    except ConflictError:
        if not atomic.exists(f"{folder}/{CHECKS}"):
            raise  # else another maker was faster: the same digest is the same content


def publish_notice(root: DataRoot, what: str, rows: Mapping[Asset, int]) -> None:
    """Leave a notice of what a person did, and how many rows of which assets it affects; a sensor reports it."""
    affected = {asset: count for asset, count in rows.items() if count}
    publish_record(f"{root.notices()}/{time.time_ns()}.json", {"what": what, "rows": affected})


def read_latest(root: DataRoot, noun: Pointed) -> str | None:
    """The digest that `latest.json` names; None where nothing was made yet. Raises TableError for a damaged pointer."""
    path = root.latest(noun)
    if not atomic.exists(path):
        return None
    value = read_record(path, f"remove it and make {noun} again")
    if not isinstance(value.get("digest"), str):
        raise TableError(f"{path} names no digest: remove it and make {noun} again")
    return str(value["digest"])


def publish_latest(root: DataRoot, noun: Pointed, digest: str) -> None:
    """Point to `digest`; writes nothing where it is pointed to already."""
    if read_latest(root, noun) != digest:
        publish_record(root.latest(noun), {"digest": digest})
