"""JSON records: a mapping with its own digest as `seal` and the version of its format, both checked when it is read.

A seal finds a changed byte; it proves no origin. Records of release 0.1.0 have neither and are read as they are.
"""

import json
from collections.abc import Mapping
from typing import Any

from storage import atomic
from storage.digest import digest_config
from storage.errors import DamagedError, StoreError

FORMAT = 1  # of records and tables; raise it where a reader of this version would misread what is written
_REMEDY = "restore it, or remove it and make it again"


def publish_record(path: str, record: Mapping[str, Any]) -> None:
    """Publish a mapping, whose keys are not `seal`, as JSON that `read_record` takes."""
    described = json.loads(json.dumps({**record, "format": FORMAT}, allow_nan=False))  # as it will be read back
    atomic.publish_json(path, {**described, "seal": digest_config(described)})


def read_record(path: str, remedy: str = _REMEDY, *, sealed: bool = False) -> dict[str, Any]:
    """What `publish_record` wrote, or with `sealed` False an older record that has no seal.

    Raises UpstreamError where it is missing, DamagedError with the remedy where it was changed, StoreError where a
    newer version of nextvid wrote it.
    """
    record: Any = atomic.read_json(path)
    if not isinstance(record, dict):
        raise DamagedError(f"{path} is no record: {remedy}")
    seal = record.pop("seal", None)
    if seal is None and (sealed or "format" in record):
        raise DamagedError(f"{path} has no seal, so it cannot be checked; {remedy}")
    version = record.get("format", FORMAT)
    try:
        same = isinstance(version, int) and (seal is None or seal == digest_config(record))
    except ValueError:  # text that is no Unicode, such as half a surrogate pair
        same = False
    if not same:
        raise DamagedError(f"{path} was changed after it was written; {remedy}")
    refuse_newer(path, version)
    record.pop("format", None)
    return record


def refuse_newer(path: str, version: int, known: int = FORMAT) -> None:
    """Raise StoreError where what a file says of its format is beyond what this version reads."""
    if version > known:
        which = f"format {version}, this one reads {known}"
        raise StoreError(f"{path} was written by a newer version of nextvid ({which}): update nextvid")
