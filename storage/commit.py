"""The commit rule: a shard's file, then its commit, each under a name that must be new. With locks and without.

On a file system the caller holds the part's lock, so that a file without a commit is a dead writer's and is removed. On
object stores, which have no locks, such an object may also be of a writer who is about to commit. Equal bytes are taken
as they are, since a shard encoded again has the same ones; others are replaced, and put back by the one who replaced
them if the commit then goes to somebody else. Whatever slips through this (two that replace at once, one of them
killed) is found by the commit's checksums, and the shard is encoded again.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress

from storage import atomic
from storage.errors import ConflictError
from storage.remote import is_local


def publish_shard(
    shard_path: str,
    commit_path: str,
    pieces: Iterable[bytes | memoryview],
    sealed: bytes,
    is_committed: Callable[[], bool],
) -> None:
    """Write a shard's file from its pieces, then the bytes of its commit; ConflictError where another was first.

    `is_committed` says whether the existing commit names the bytes of `pieces`.
    """
    if is_local(shard_path):
        atomic.remove_tree(shard_path)  # left by a writer that died before its commit
        with atomic.staged_file(shard_path, exclusive=True) as temporary, temporary.open("xb") as file:
            for piece in pieces:
                file.write(piece)
        atomic.create_exclusively(commit_path, sealed)
        return
    replaced = _put(shard_path, b"".join(pieces))
    try:
        atomic.create_exclusively(commit_path, sealed)
    except ConflictError:
        if replaced is not None and not is_committed():
            atomic.publish_bytes(shard_path, replaced)
        raise


def _put(shard_path: str, data: bytes) -> bytes | None:
    """Put a shard's bytes; those that they replaced, if any did."""
    with suppress(ConflictError):
        atomic.create_exclusively(shard_path, data)
        return None
    found = atomic.read_bytes(shard_path)
    if found == data:
        return None
    atomic.publish_bytes(shard_path, data)
    return found
