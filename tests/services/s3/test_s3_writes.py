"""What a bucket may do to writes: refuse them, be gone or full, fail in the body of a success. One line each."""

import pytest

from storage import atomic
from storage.errors import NExTVidError
from storage.root import DataRoot
from tests.services.s3.proxy import Asked, Fault, Proxy
from tests.services.s3.test_s3_store import puts, short_waits  # noqa: F401 - an autouse fixture
from tests.storage.stores import BATCH, FRAMES, ids, new_store, write

pytestmark = pytest.mark.services


def shards(asked: Asked) -> bool:
    return puts(asked) and "/c." in asked.path


@pytest.mark.parametrize(
    ("hits", "status", "code", "said"),
    [
        (puts, 403, "AccessDenied", r"access was denied .*Check the credentials and the bucket's policy"),
        (puts, 404, "NoSuchUpload", "cannot be written .*Check the bucket"),
        (puts, 507, "InsufficientStorage", "6 tries failed, .*InsufficientStorage.*run again"),
        (shards, 200, "", "6 tries failed"),  # an error in the body of a success, as S3 may send one
    ],
)
def test_writes_that_fail(root: DataRoot, proxy: Proxy, hits: object, status: int, code: str, said: str) -> None:
    """By a policy that lets this user read alone, a bucket that is gone or full; afterwards the same write succeeds."""
    store = new_store(root)
    part = store.plan_part(BATCH, FRAMES, ids(5))
    assert callable(hits)
    proxy.faults.append(Fault(hits, status=status, code=code))
    with pytest.raises(NExTVidError, match=said) as caught:
        write(part, 0)
    assert part.shard_path(0) in str(caught.value)
    proxy.clear()
    assert not atomic.exists(part.shard_path(0))
    assert (store.verify(), store.commits(BATCH).height) == ([], 0)
    write(part, 0)
    assert (store.verify(), store.commits(BATCH).height) == ([], 5)
