"""storage/store.py, part.py, spec.py: planned parts, write-once shards, and what readers may see."""

import json
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from storage import atomic
from storage.errors import ConfigError, ConflictError, DamagedError, StoreError, UpstreamError
from storage.reader import RowReader, addresses
from storage.root import DataRoot
from storage.shard import ROWS_PER_SHARD
from storage.spec import EncodingSpec
from storage.store import LatentStore
from tests.storage.stores import (
    BATCH,
    FRAMES,
    as_of_0_1,
    commit_of,
    full_store,
    ids,
    new_store,
    read_each,
    spec,
    values,
    write,
)


def test_spec_round_trip_and_digest() -> None:
    assert EncodingSpec.from_json(spec().to_json()) == spec()
    assert spec().digest() == spec().digest()
    assert len({spec().digest(), spec(storage="int8").digest(), spec(resolution=64).digest()}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": "zip"}, "storage: 'zip' is none of float16, int8, keepbits7"),
        ({"posterior": "median"}, "posterior"),
        ({"time_map": "latent"}, "time_map"),
        ({"channels": 0}, "at least 1"),
        ({"channels": "4"}, "not of type int"),
        ({"colour": "red"}, "has the keys"),
    ],
)
def test_spec_refuses(changes: dict[str, str | int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec(**changes)


def test_create_and_open(data_root: DataRoot) -> None:
    with pytest.raises(UpstreamError):
        LatentStore.open(data_root, spec().digest())
    store = new_store(data_root)
    store.create()
    assert LatentStore.open(data_root, store.digest).spec == store.spec
    path = Path(data_root.spec_folder(store.digest), "spec.json")
    path.write_text(path.read_text().replace("bicubic", "nearest"))
    with pytest.raises(DamagedError, match="was changed"):
        store.create()
    path.write_text("[]")
    with pytest.raises(DamagedError, match="no spec of latents"):
        LatentStore.open(data_root, store.digest)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*spec().to_json(), "x"]), inner),
    max_leaves=12,
)


@given(said=JSON, change=st.dictionaries(st.sampled_from(sorted(spec().to_json())), JSON, min_size=1, max_size=3))
def test_whatever_json_stands_for_a_spec_is_told(
    tmp_path_factory: pytest.TempPathFactory, said: object, change: dict[str, object]
) -> None:
    store = new_store(DataRoot.open(str(tmp_path_factory.mktemp("spec"))))
    path = Path(store.root.spec_folder(store.digest), "spec.json")
    changed = spec().to_json() | change
    for wrong in (said, *([changed] if repr(changed) != repr(spec().to_json()) else [])):
        path.write_text(json.dumps(wrong))
        with pytest.raises(DamagedError, match=r"spec\.json"):
            LatentStore.open(store.root, store.digest)
        (problem,) = store.verify()
        assert problem.file == str(path)


def test_an_empty_store(data_root: DataRoot) -> None:
    store = new_store(data_root)
    assert store.batches() == []
    assert store.frames_of(BATCH) == store.parts(BATCH, FRAMES) == []
    assert store.unfinished(BATCH, FRAMES) is None
    assert store.commits(BATCH).height == 0
    assert store.verify() == []


def test_zarr_reads_what_was_written(data_root: DataRoot) -> None:
    """Across a full and a partial shard, a failed row, and rows that nobody committed."""
    store = new_store(data_root)
    row_ids = ids(2 * ROWS_PER_SHARD + 44)
    part = store.plan_part(BATCH, FRAMES, row_ids)
    write(part, 0, failed=[row_ids[7]])
    write(part, 2)
    group = zarr.open_group(part.path, mode="r")
    array = group["latent"]
    assert isinstance(array, zarr.Array)
    found = np.asarray(array[:])
    wanted = values(row_ids).astype("f2")
    wanted[7] = np.nan
    wanted[ROWS_PER_SHARD : 2 * ROWS_PER_SHARD] = np.nan
    np.testing.assert_array_equal(found, wanted)
    assert array.dtype == np.float16
    assert array.compressors == ()
    assert group.attrs["encoding"] == store.digest


def test_our_bytes_equal_zarrs(data_root: DataRoot, tmp_path: Path) -> None:
    """zarr-python writes a shard's rows in another order, but its index and ours describe the same chunks."""
    _, part = full_store(data_root, ROWS_PER_SHARD + 3)
    array = zarr.open_array(f"{part.path}/latent", mode="r")
    copy = zarr.create_array(
        str(tmp_path / "copy"),
        shape=array.shape,
        chunks=array.chunks,
        shards=array.shards,
        dtype="float16",
        compressors=None,
        fill_value=float("nan"),
    )
    copy[:] = array[:]
    for shard in range(2):
        ours, theirs = Path(part.shard_path(shard)), tmp_path / "copy" / "c" / str(shard) / "0" / "0" / "0" / "0"
        assert ours.stat().st_size == theirs.stat().st_size
    theirs.write_bytes(ours.read_bytes())  # and zarr's own array reads our file
    np.testing.assert_array_equal(np.asarray(copy[ROWS_PER_SHARD:]), np.asarray(array[ROWS_PER_SHARD:]))


def test_a_shard_is_one_file_beside_the_metadata(data_root: DataRoot) -> None:
    _, part = full_store(data_root, ROWS_PER_SHARD + 3)
    names = sorted(path.name for path in Path(part.array_path).iterdir())
    assert names == ["c.0.0.0.0.0", "c.1.0.0.0.0", "zarr.json"]


def test_parts_of_0_1_are_read_and_finished_as_they_are(data_root: DataRoot) -> None:
    """Their chunk keys have slashes. Nothing is converted; whoever reads or writes such a part keeps to its names."""
    store, part = full_store(data_root, ROWS_PER_SHARD + 3)
    before = store.commits(BATCH)
    Path(part.commit_path(1)).unlink()
    old = as_of_0_1(part)
    assert old.shard_path(1).endswith("latent/c/1/0/0/0/0")
    write(old, 1)
    assert not list(Path(old.array_path).glob("c.*"))
    write(store.plan_part(BATCH, FRAMES, ids(3, first=900)), 0)
    assert store.verify() == []
    assert store.commits(BATCH).filter(part=0).equals(before)
    rows = addresses(store.commits(BATCH), [BATCH])
    reader = RowReader(data_root, store.spec, [BATCH])
    wanted = values([*ids(ROWS_PER_SHARD + 3), *ids(3, first=900)]).astype("f2")
    np.testing.assert_array_equal(read_each(reader, rows), wanted)
    found = zarr.open_array(old.array_path, mode="r")[:]
    np.testing.assert_array_equal(np.asarray(found), wanted[:-3])
    assert old.discard(0) > 0
    store.seal(BATCH)
    assert store.verify() == []


def test_an_old_part_without_a_shard_yet_keeps_its_names(data_root: DataRoot) -> None:
    store = new_store(data_root)
    old = as_of_0_1(store.plan_part(BATCH, FRAMES, ids(3)))
    write(store.part(BATCH, FRAMES, 0), 0)
    assert Path(old.array_path, "c", "0").is_dir()
    Path(old.metadata_paths[1]).unlink()
    assert store.part(BATCH, FRAMES, 0).shard_path(0) == old.shard_path(0)


def test_plan_is_write_once(data_root: DataRoot) -> None:
    store = new_store(data_root)
    first = store.plan_part(BATCH, FRAMES, ids(3))
    second = store.plan_part(BATCH, FRAMES, ids(2, first=3))
    assert (first.number, second.number) == (0, 1)
    assert store.parts(BATCH, FRAMES) == [0, 1]
    assert store.part(BATCH, FRAMES, 0).plan["row_id"].to_list() == ids(3)
    taken = store.part(BATCH, FRAMES, 1)
    with pytest.raises(ConflictError):
        taken.create(ids(9))
    assert store.part(BATCH, FRAMES, 1).plan["row_id"].to_list() == ids(2, first=3)


def test_lists(data_root: DataRoot) -> None:
    store = new_store(data_root)
    store.plan_part(BATCH, 1, ids(1))
    store.plan_part(BATCH, 16, ids(1, first=1))
    store.plan_part("images.000003", 1, ids(1, first=2))
    assert store.batches() == [BATCH, "images.000003"]
    assert store.frames_of(BATCH) == [1, 16]
    assert store.part(BATCH, 1, 0).shards == 1


def test_unfinished_moves_on(data_root: DataRoot) -> None:
    store = new_store(data_root)
    part = store.plan_part(BATCH, FRAMES, ids(ROWS_PER_SHARD + 1))
    store.plan_part(BATCH, FRAMES, ids(1, first=1000))
    for shard in range(part.shards):
        found = store.unfinished(BATCH, FRAMES)
        assert found is not None
        assert found.number == 0
        write(part, shard)
    found = store.unfinished(BATCH, FRAMES)
    assert found is not None
    assert found.number == 1
    write(found, 0)
    assert store.unfinished(BATCH, FRAMES) is None


def test_commits_measure_what_is_stored(data_root: DataRoot) -> None:
    failed = ids(300)[5]
    store, _ = full_store(data_root, 300, [failed])
    commits = store.commits(BATCH)
    assert commits["row_id"].to_list() == ids(300)
    assert commits["shard"].to_list() == [0] * 256 + [1] * 44
    assert commits["slot"].to_list() == list(range(300))
    row = commits.row(5, named=True)
    assert (row["status"], row["reason"], row["crc32c"], row["sums"]) == ("quarantined", "undecodable", None, [])
    stored = values(ids(300)).astype("f2").astype("f8")
    good = [n for n in range(300) if n != 5]
    np.testing.assert_allclose(np.array(commits["sums"][good].to_list()), stored[good].sum((1, 3, 4)), rtol=1e-12)
    squares = np.array(commits["sums_squared"][good].to_list())
    np.testing.assert_allclose(squares, (stored[good] ** 2).sum((1, 3, 4)), rtol=1e-12)


def test_a_row_found_twice_counts_once(data_root: DataRoot) -> None:
    """In the lowest part; but where that one failed, in the one that succeeded."""
    store = new_store(data_root)
    a, b, c = ids(3)
    for row_ids, failed in (([a, b], [a]), ([b, a, c], [c]), ([c, a], [c])):
        write(store.plan_part(BATCH, FRAMES, row_ids), 0, failed)
    found = {row["row_id"]: (row["part"], row["status"]) for row in store.commits(BATCH, FRAMES).iter_rows(named=True)}
    assert found == {a: (1, "ok"), b: (0, "ok"), c: (1, "quarantined")}


def test_second_writer_gets_a_conflict(data_root: DataRoot) -> None:
    store, part = full_store(data_root, 5)
    before = Path(part.shard_path(0)).read_bytes()
    with pytest.raises(ConflictError, match="another writer was first"):
        store.part(BATCH, FRAMES, 0).write_shard(0, values(ids(5)) + 1, commit_of(part, 0))
    assert Path(part.shard_path(0)).read_bytes() == before
    assert store.verify() == []


def test_litter_of_a_dead_writer_is_replaced(data_root: DataRoot) -> None:
    store = new_store(data_root)
    part = store.plan_part(BATCH, FRAMES, ids(5))
    Path(part.shard_path(0)).write_bytes(b"half a shard")
    assert store.commits(BATCH).height == 0
    assert [problem.what for problem in store.verify()] == ["a shard without its commit, left by a writer that died"]
    write(part, 0)
    assert store.verify() == []


def test_write_refuses_rows_that_do_not_fit(data_root: DataRoot) -> None:
    part = new_store(data_root).plan_part(BATCH, FRAMES, ids(5))
    good, commit = values(ids(5)), commit_of(part, 0)
    with pytest.raises(StoreError, match="shape"):
        part.write_shard(0, good[:4], commit)
    with pytest.raises(StoreError, match="shape"):
        part.write_shard(0, good[:, :, :, :1], commit)
    with pytest.raises(StoreError, match="not the planned ones"):
        part.write_shard(0, good, commit.head(4))
    with pytest.raises(StoreError, match="not the planned ones"):
        part.write_shard(0, good, commit.with_columns(pl.col("row_id").reverse()))
    for broken in (np.nan, np.inf, 70000.0):
        bad = good.copy()
        bad[3, 0, 0, 0, 0] = broken
        with pytest.raises(StoreError, match=r"rows \[3\] .* not finite"):
            part.write_shard(0, bad, commit)
    assert not part.committed(0)
    assert not Path(part.shard_path(0)).exists()


def test_failed_rows_may_hold_anything(data_root: DataRoot) -> None:
    store = new_store(data_root)
    part = store.plan_part(BATCH, FRAMES, ids(2))
    latents = values(ids(2))
    latents[1] = 1e9
    part.write_shard(0, latents, commit_of(part, 0, [ids(2)[1]]))
    assert np.isnan(np.asarray(zarr.open_array(f"{part.path}/latent", mode="r")[1])).all()
    assert store.verify() == []


def test_float16_input_is_kept_bit_for_bit_and_not_changed(data_root: DataRoot) -> None:
    part = new_store(data_root).plan_part(BATCH, FRAMES, ids(3))
    latents = values(ids(3)).astype("f2")
    given = latents.copy()
    part.write_shard(0, latents, commit_of(part, 0, [ids(3)[2]]))
    np.testing.assert_array_equal(latents, given)
    np.testing.assert_array_equal(np.asarray(zarr.open_array(f"{part.path}/latent", mode="r")[:2]), given[:2])


def test_a_plan_that_was_damaged(data_root: DataRoot) -> None:
    store, part = full_store(data_root, 5)
    path = Path(part.path, "plan.parquet")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=r"plan\.parquet is missing or damaged"):
        store.commits(BATCH)


def test_a_commit_of_other_rows(data_root: DataRoot) -> None:
    store, part = full_store(data_root, 5)
    other = store.plan_part("demo.000001", FRAMES, ids(5, first=50))
    write(other, 0)
    Path(part.commit_path(0)).write_bytes(Path(other.commit_path(0)).read_bytes())
    with pytest.raises(DamagedError, match="other rows than the plan"):
        store.commits(BATCH)


def test_lock_excludes_threads_and_nests(data_root: DataRoot) -> None:
    store = new_store(data_root)
    part = store.plan_part(BATCH, FRAMES, ids(5))
    twin = store.part(BATCH, FRAMES, 0)
    happened: list[str] = []

    def wait() -> None:
        with twin.lock():
            happened.append("second")

    with part.lock(), part.lock():
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        happened.append("first")
        write(part, 0)  # takes the lock it holds already
    thread.join(60)
    assert happened == ["first", "second"]


def test_a_full_disk_leaves_no_commit(data_root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(data_root)
    part = store.plan_part(BATCH, FRAMES, ids(5))
    real = atomic._sync

    def full(path: Path) -> None:
        if ".partial" in path.name:
            raise OSError(28, "No space left on device", str(path))
        real(path)

    monkeypatch.setattr(atomic, "_sync", full)
    with pytest.raises(OSError, match="cannot be written: its disk is full"):
        write(part, 0)
    monkeypatch.undo()
    assert not part.committed(0)
    assert store.verify() == []
    write(part, 0)
    assert_frame_equal(store.commits(BATCH).select("row_id"), part.plan.select("row_id"))
