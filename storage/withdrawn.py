"""Withdrawn media: the row ids that nobody may train on any more, one JSON file a media.

The file is written before any byte is zeroed, so that loaders refuse such rows from then on; `Part.erase` then zeroes
in place, the one exception to write-once (design, section 4). Must not find rows or affected runs: lineage does.
"""

import re
from collections.abc import Iterable

from storage import atomic, listing
from storage.errors import DamagedError
from storage.root import DataRoot

_MEDIA = re.compile(r"[0-9a-f]{32}")


def record_withdrawal(root: DataRoot, media_id: str, row_ids: Iterable[bytes]) -> None:
    """Name the rows of a withdrawn media (32 hex digits); rows named before stay named."""
    assert _MEDIA.fullmatch(media_id), media_id
    path = f"{root.withdrawn()}/{media_id}.json"
    known = _rows(path) if atomic.exists(path) else set()
    names = sorted(row_id.hex() for row_id in known | set(row_ids))
    atomic.publish_json(path, {"media_id": media_id, "row_ids": names})


def withdrawn_rows(root: DataRoot) -> frozenset[bytes]:
    """Row ids (16 bytes) of every withdrawn media; DamagedError where a record cannot be read."""
    names = listing.files(root.withdrawn())
    records = [name for name in names if _MEDIA.fullmatch(name.removesuffix(".json")) and name.endswith(".json")]
    return frozenset().union(*(_rows(f"{root.withdrawn()}/{name}") for name in records))


def _rows(path: str) -> set[bytes]:
    try:
        return {bytes.fromhex(name) for name in atomic.read_json(path)["row_ids"]}
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{path} is no record of a withdrawal: restore it, or withdraw the file again") from error
