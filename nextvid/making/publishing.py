"""How makers publish: a table or its checks are written only where they differ from what stands there.

So that making a thing twice writes nothing the second time, and file times say when something changed. Holds no
knowledge of any table. A table that stands there damaged counts as different: it is made again.

`latest.json`: which of the things with a digest is the newest complete one.

Written last, atomically, after success (design 4), so it never names half a thing. Holds no knowledge of what it
points to.
"""

from collections.abc import Mapping, Sequence

import dataframely as dy
import polars as pl

from nextvid.making.outcome import Check
from storage import atomic, tables
from storage.digest import digest_bytes
from storage.errors import TableError
from storage.root import DataRoot, Pointed, Table


def existing(root: DataRoot, noun: Table, batch: str, schema: type[dy.Schema]) -> pl.DataFrame:
    """The batch's table, or an empty one where there is none or a damaged one."""
    path = root.table(noun, batch)
    if not atomic.exists(path):
        return schema.create_empty()
    try:
        return tables.read_table(path, schema)
    except TableError:
        return schema.create_empty()  # nothing is lost: all of it can be made again, and is


def publish_table(root: DataRoot, noun: Table, batch: str, frame: pl.DataFrame, schema: type[dy.Schema]) -> bool:
    """Write the batch's table if it differs from the one there; whether it was written."""
    path = root.table(noun, batch)
    if atomic.exists(path) and existing(root, noun, batch, schema).equals(frame):
        return False
    tables.write_table(path, frame, schema)
    return True


def table_digest(root: DataRoot, noun: Table, batch: str) -> str:
    """Id of the batch's table as it stands: its data version."""
    return digest_bytes(atomic.read_bytes(root.table(noun, batch)))


def publish_verdict(path: str, asset: str, checks: Sequence[Check], made_from: Mapping[str, str] | None = None) -> bool:
    """Write checks, and what their asset was made from, if they differ from the file's; whether they were written."""
    found = tables.read_checks(path)
    wanted = [as_mapping(check) for check in checks]
    if found is not None and (found["asset"], found["checks"], found["made_from"]) == (asset, wanted, made_from or {}):
        return False
    tables.publish_checks(path, asset, wanted, made_from)
    return True


def as_mapping(check: Check) -> dict[str, object]:
    """A check as JSON keeps it."""
    return {
        "name": check.name,
        "passed": check.passed,
        "numbers": dict(check.numbers),
        "blocking": check.blocking,
        "description": check.description,
    }


def counts(frame: pl.DataFrame) -> Mapping[str, int]:
    """Rows by status, and by reason where they are not ok."""
    by_status = frame.group_by(pl.col("status").cast(pl.String)).len()
    by_reason = frame.filter(pl.col("reason").is_not_null()).group_by("reason").len()
    found = {str(name): int(number) for name, number in by_status.iter_rows()}
    return found | {f"reason_{name}": int(number) for name, number in sorted(by_reason.iter_rows())}


def read_latest(root: DataRoot, noun: Pointed) -> str | None:
    """The digest that `latest.json` names; None where nothing was made yet. Raises TableError for a damaged pointer."""
    path = root.latest(noun)
    if not atomic.exists(path):
        return None
    value = atomic.read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("digest"), str):
        raise TableError(f"{path} names no digest: remove it and make {noun} again")
    return str(value["digest"])


def publish_latest(root: DataRoot, noun: Pointed, digest: str) -> None:
    """Point to `digest`; writes nothing where it is pointed to already."""
    if read_latest(root, noun) != digest:
        atomic.publish_json(root.latest(noun), {"digest": digest})
