"""`latest.json`: which of the things with a digest is the newest complete one.

Written last, atomically, after success (design 4), so it never names half a thing. Holds no knowledge of what it
points to.
"""

from storage import atomic
from storage.errors import TableError
from storage.root import DataRoot, Pointed


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
