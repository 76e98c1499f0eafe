"""The latent store on an object store: the same rows and the same rule, without locks and renames.

fsspec's memory file system stands for the bucket here; S3 itself: tests/services/s3/test_s3_store.py.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage import atomic, listing
from storage.errors import ConflictError
from storage.part import SWEPT
from storage.remote import is_local
from storage.root import DataRoot
from storage.shard import ROWS_PER_SHARD
from storage.store import LatentStore
from storage.withdrawn import record_withdrawal, withdrawn_rows
from tests.storage.stores import BATCH, FRAMES, commit_of, full_store, ids, new_store, spec, values, write


@pytest.fixture
def bucket(tmp_path: Path) -> DataRoot:
    return DataRoot.open(f"memory://{tmp_path.name}", str(tmp_path / "runs"))


def below(root: DataRoot) -> dict[str, bytes]:
    """Every file of a store by its path under the root."""
    found = listing.files_below(root.folder("latents"))
    return {path.removeprefix(root.url): atomic.read_bytes(path) for path in found if not path.endswith("/lock")}


def test_the_same_bytes_as_on_a_file_system(bucket: DataRoot, data_root: DataRoot) -> None:
    remote, part = full_store(bucket, 300, failed=[ids(300)[2]])
    local, _ = full_store(data_root, 300, failed=[ids(300)[2]])
    ours, theirs = below(bucket), below(data_root)
    assert set(ours) == set(theirs)
    assert {path for path in ours if ours[path] != theirs[path]} == set()
    assert remote.commits(BATCH).equals(local.commits(BATCH))
    assert remote.batches() == [BATCH]
    assert remote.frames_of(BATCH) == [FRAMES]
    assert remote.parts(BATCH, FRAMES) == part.committed_shards()[:1] == [0]
    assert remote.unfinished(BATCH, FRAMES) is None
    assert remote.verify() == []
    assert [store.spec for store in LatentStore.every(bucket)] == [spec()]


def test_a_part_belongs_to_one_planner(bucket: DataRoot) -> None:
    store = new_store(bucket)
    store.plan_part(BATCH, FRAMES, ids(3))
    late = store.part(BATCH, FRAMES, 0)
    with pytest.raises(ConflictError):
        late.create(ids(9, first=50))
    assert store.part(BATCH, FRAMES, 0).plan["row_id"].to_list() == ids(3)
    assert store.plan_part(BATCH, FRAMES, ids(9, first=50)).number == 1


@pytest.mark.parametrize("missing", ["zarr.json", "latent/zarr.json"])
def test_metadata_of_a_planner_that_died_is_added(bucket: DataRoot, missing: str) -> None:
    store = new_store(bucket)
    part = store.plan_part(BATCH, FRAMES, ids(3))
    sound = atomic.read_bytes(f"{part.path}/{missing}")
    atomic.remove_tree(f"{part.path}/{missing}")
    (problem,) = store.verify()
    assert problem.file == f"{part.path}/{missing}"
    write(part, 0)
    assert atomic.read_bytes(f"{part.path}/{missing}") == sound
    assert store.verify() == []


@pytest.mark.parametrize("litter", ["same", "half", "other values"])
def test_what_a_dead_writer_left_is_replaced(bucket: DataRoot, data_root: DataRoot, litter: str) -> None:
    _, sound = full_store(data_root, 3)
    data = Path(sound.shard_path(0)).read_bytes()
    left = {"same": data, "half": data[:50], "other values": b"\1" + data[1:]}[litter]
    store = new_store(bucket)
    part = store.plan_part(BATCH, FRAMES, ids(3))
    atomic.publish_bytes(part.shard_path(0), left)
    (problem,) = store.verify()
    assert "without its commit" in problem.what
    write(part, 0)
    assert atomic.read_bytes(part.shard_path(0)) == data
    assert store.verify() == []


class Meanwhile:
    """Calls `act` once, just before or after the `nth` file that the commit rule creates exclusively."""

    def __init__(self, nth: int, act: Callable[[], object]) -> None:
        self.left, self.act, self.real = nth, act, atomic.create_exclusively

    def __call__(self, path: str, data: bytes) -> None:
        self.left -= 1
        if self.left == 0:
            act, self.act = self.act, lambda: None
            act()
        self.real(path, data)


@pytest.mark.parametrize("nth", [1, 2])
def test_the_loser_says_so_and_the_winner_stands(bucket: DataRoot, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Another writer commits the same rows before our shard (1) or between our shard and our commit (2)."""
    store = new_store(bucket)
    ours, theirs = store.plan_part(BATCH, FRAMES, ids(3)), store.part(BATCH, FRAMES, 0)
    monkeypatch.setattr(atomic, "create_exclusively", Meanwhile(nth, lambda: write(theirs, 0)))
    with pytest.raises(ConflictError):
        write(ours, 0)
    assert store.verify() == []
    assert store.commits(BATCH).height == 3


@pytest.mark.parametrize("nth", [1, 2])
def test_the_loser_puts_back_what_it_replaced(bucket: DataRoot, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Two machines whose bits differ: whoever commits, the shard ends as committed."""
    store = new_store(bucket)
    ours, theirs = store.plan_part(BATCH, FRAMES, ids(3)), store.part(BATCH, FRAMES, 0)
    latents = values(ids(3)) + 1

    def other() -> None:
        theirs.write_shard(0, latents, commit_of(theirs, 0))

    monkeypatch.setattr(atomic, "create_exclusively", Meanwhile(nth, other))
    with pytest.raises(ConflictError):
        write(ours, 0)
    assert store.verify() == []
    stored = np.frombuffer(atomic.read_bytes(theirs.shard_path(0)), "<f2", latents.size).reshape(latents.shape)
    np.testing.assert_array_equal(stored, latents.astype(np.float16))


def test_what_slips_through_is_found(bucket: DataRoot) -> None:
    """A loser killed before it puts the winner's bytes back: verify names every row, and the remedy heals."""
    store, part = full_store(bucket, 3)
    foreign = values(ids(3)) + 1
    atomic.publish_bytes(
        part.shard_path(0), foreign.astype("<f2").tobytes() + atomic.read_bytes(part.shard_path(0))[288:]
    )
    problems = store.verify()
    assert [problem.row for problem in problems] == [row.hex() for row in ids(3)]
    assert all(problem.remedy.startswith(f"remove {part.commit_path(0)} ") for problem in problems)
    atomic.remove_tree(part.commit_path(0))
    unfinished = store.unfinished(BATCH, FRAMES)
    assert unfinished is not None
    write(unfinished, 0)
    assert store.verify() == []


def test_sweeping_and_withdrawing(bucket: DataRoot) -> None:
    store, part = full_store(bucket, ROWS_PER_SHARD + 4)
    record_withdrawal(bucket, "ab" * 16, [ids(300)[ROWS_PER_SHARD + 1]])
    assert withdrawn_rows(bucket) == {ids(300)[ROWS_PER_SHARD + 1]}
    (problem,) = store.verify()
    assert "withdraw the file again" in problem.what
    part.erase([ROWS_PER_SHARD + 1])
    assert store.verify() == []
    assert part.discard(0) == listing.size_bytes(part.shard_path(1)) + 252 * 96  # type: ignore[operator]
    assert (part.is_stored(0), part.committed(0), part.is_stored(1)) == (False, True, True)
    assert part.discard(0) == 0
    assert store.verify() == []
    assert store.commits(BATCH).filter(reason=SWEPT).height == ROWS_PER_SHARD


def test_no_lock_file_is_left_in_a_bucket(bucket: DataRoot) -> None:
    _, part = full_store(bucket, 3)
    assert not is_local(part.path)
    assert not any(path.endswith("lock") for path in listing.files_below(bucket.url))
