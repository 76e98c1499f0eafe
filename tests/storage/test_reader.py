"""storage/reader.py: the fast read equals zarr's, and nothing damaged comes out of it."""

import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from storage import shard_files
from storage.digest import crc32c
from storage.errors import DamagedError
from storage.part import LatentPart
from storage.reader import _PIXEL_PLACE, _PLACE, ADDRESS, PIXEL_ADDRESS, RowReader, addresses, read_row, row_id
from storage.root import DataRoot
from storage.shard import INDEX_BYTES, ROWS_PER_SHARD
from storage.shard_files import KEY, MappedShard, _in_memory, mapped
from storage.store import LatentStore
from tests.storage.stores import BATCH, FRAMES, full_store, ids, in_threads, mapped_files, new_store, values, write

ROW_BYTES = FRAMES * 2 * 2 * 3 * 2
BATCHES = ["other.000000", BATCH]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[LatentStore, np.ndarray]:
    root = DataRoot.open(str(tmp_path_factory.mktemp("store")))
    store = new_store(root)
    for count, first in ((300, 0), (7, 1000)):
        part = store.plan_part(BATCH, FRAMES, ids(count, first))
        for shard in range(part.shards):
            write(part, shard, failed=ids(2, first))
    image = store.plan_part(BATCHES[0], 1, ids(3, 5000))
    write(image, 0)
    return store, addresses(store.commits(BATCH), BATCHES)


def empty() -> np.ndarray:
    return np.empty((FRAMES, 2, 2, 3), dtype=np.float16)


def test_addresses_say_where(filled: tuple[LatentStore, np.ndarray]) -> None:
    store, found = filled
    commits = store.commits(BATCH).filter(status="ok")
    assert found.dtype == ADDRESS
    assert len(found) == commits.height == 303
    assert [row_id(address) for address in found] == commits["row_id"].to_list()
    assert set(found["batch"]) == {1}
    assert found["slot"].max() == ROWS_PER_SHARD - 1
    assert found["shard"].tolist() == commits["shard"].to_list()
    keys = [tuple(row) for row in found["row_id"].tolist()]
    by_id = sorted(range(len(found)), key=lambda n: commits["row_id"][n])
    assert sorted(keys) == [keys[n] for n in by_id]


@given(st.lists(st.integers(0, 302), max_size=30), st.integers(1, 3))
def test_read_equals_the_oracle(filled: tuple[LatentStore, np.ndarray], wanted: list[int], open_maps: int) -> None:
    store, found = filled
    reader = RowReader(store.root, store.spec, BATCHES, ahead_rows=open_maps)
    reader.will_need(FRAMES, found[wanted])
    out = empty()
    for n in wanted:
        address = found[n]
        reader.read_into(FRAMES, address, out)
        np.testing.assert_array_equal(out, values([row_id(address)])[0].astype(np.float16))
        slot = int(address["shard"]) * ROWS_PER_SHARD + int(address["slot"])
        oracle = read_row(store, BATCH, FRAMES, int(address["part"]), slot)
        np.testing.assert_array_equal(out, oracle)
    assert mapped_files(store.root.url) <= open_maps
    reader.close()


@given(st.lists(st.integers(0, 302), max_size=30), st.integers(1, 3))
def test_views_are_the_rows_and_outlive_their_maps(
    filled: tuple[LatentStore, np.ndarray], wanted: list[int], open_maps: int
) -> None:
    store, found = filled
    reader = RowReader(store.root, store.spec, BATCHES, ahead_rows=open_maps)
    views = reader.rows(FRAMES, found[wanted])
    reader.close()
    assert len(views) == len(wanted)
    for n, view in zip(wanted, views, strict=True):
        np.testing.assert_array_equal(view, values([row_id(found[n])])[0].astype(np.float16))


def inode_of(store: LatentStore, address: np.void) -> int:
    part = store.part(BATCH, FRAMES, int(address["part"]))
    return Path(part.shard_path(int(address["shard"]))).stat().st_ino


@given(st.lists(st.integers(0, 302), max_size=30))
def test_hints_cover_the_rows_and_only_once(filled: tuple[LatentStore, np.ndarray], wanted: list[int]) -> None:
    store, found = filled
    reader = RowReader(store.root, store.spec, BATCHES)
    hinted: list[tuple[int, int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MappedShard,
            "will_need",
            lambda file, start, stop: hinted.append((file.inode, start // ROW_BYTES, stop // ROW_BYTES)),
        )
        reader.will_need(FRAMES, found[wanted])
    covered = [(file, slot) for file, start, stop in hinted for slot in range(start, stop)]
    rows = {(inode_of(store, address), int(address["slot"])) for address in found[wanted]}
    assert len(covered) == len(set(covered))
    assert set(covered) == rows
    assert not rows & {(file, stop) for file, _, stop in hinted}  # neighbours in one call


@given(arrays.arrays(ADDRESS, st.integers(0, 5)), arrays.arrays(PIXEL_ADDRESS, st.integers(0, 5)))
def test_places_are_those_of_the_addresses(found: np.ndarray, pixels: np.ndarray) -> None:
    for taken, place, names in ((found, _PLACE, ("slot", "crc")), (pixels, _PIXEL_PLACE, ("offset", "size", "crc"))):
        for row, (shard, *others) in zip(taken, place.iter_unpack(taken.tobytes()), strict=True):
            assert KEY.unpack(FRAMES.to_bytes(4, "little") + shard)[1:] == tuple(row.tolist())[-len(names) - 3 :][:3]
            assert others == [row[name].item() for name in names]
            assert place.unpack_from(row) == (shard, *others)


def test_a_hint_reads_what_is_not_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(1 << 23))
    with path.open("rb") as file:
        os.fdatasync(file.fileno())  # what is not on the disk is not dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        memory = mapped(file.fileno(), 1 << 23)
    start = memory.ctypes.data
    page = start + (4 << 20)
    if _in_memory(page, 1 << 20):
        pytest.skip("this file system keeps its pages")
    memory[5 * (1 << 20) - 1]  # its last page alone is not enough
    MappedShard(memory, start, True, 0).will_need(4 << 20, 5 << 20)
    until = time.monotonic() + 60
    while not _in_memory(page, 1 << 20):
        assert time.monotonic() < until, "nothing was read"
        time.sleep(0.01)


@pytest.mark.parametrize(("pages_known", "hints"), [(True, 0), (False, 1)])
def test_a_hint_is_spared_where_the_kernel_says_so(
    pages_known: bool, hints: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = np.frombuffer(mmap.mmap(-1, 1 << 16), np.uint8)
    memory[:] = 1
    made: list[int] = []
    monkeypatch.setattr(shard_files, "_madvise", lambda _, size_bytes, __: made.append(size_bytes))
    MappedShard(memory, memory.ctypes.data, pages_known, 0).will_need(0, 1 << 15)
    assert len(made) == hints


def test_what_is_written_into_a_view_never_reaches_the_file(data_root: DataRoot) -> None:
    store, part, found = damaged(data_root)
    before = Path(part.shard_path(0)).read_bytes()
    RowReader(store.root, store.spec, [BATCH]).rows(FRAMES, found[:1])[0][:] = 0
    assert Path(part.shard_path(0)).read_bytes() == before


def test_maps_keep_no_descriptor(filled: tuple[LatentStore, np.ndarray]) -> None:
    """A process has 1,024 where nobody asked for more, and a trainset has more shards."""
    store, found = filled
    before, reader = len(list(Path("/proc/self/fd").iterdir())), RowReader(store.root, store.spec, BATCHES)
    views = reader.rows(FRAMES, found)
    assert mapped_files(store.root.url) == 3
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    reader.close()
    del reader
    assert mapped_files(store.root.url) == 3, "views are still held"
    views.clear()
    assert mapped_files(store.root.url) == 0


def test_other_lengths_and_batches(filled: tuple[LatentStore, np.ndarray]) -> None:
    store, _ = filled
    images = addresses(store.commits(BATCHES[0], 1), BATCHES)
    out = np.empty((1, 2, 2, 3), dtype=np.float16)
    RowReader(store.root, store.spec, BATCHES).read_into(1, images[2], out)
    np.testing.assert_array_equal(out, values([row_id(images[2])], frames=1)[0].astype(np.float16))


def test_reads_into_a_slice_of_a_ring(filled: tuple[LatentStore, np.ndarray]) -> None:
    store, found = filled
    ring = np.zeros((3, FRAMES, 2, 2, 3), dtype=np.float16)
    RowReader(store.root, store.spec, BATCHES).read_into(FRAMES, found[9], ring[1])
    assert not ring[0].any()
    assert not ring[2].any()
    np.testing.assert_array_equal(ring[1], values([row_id(found[9])])[0].astype(np.float16))


def test_wrong_buffers_are_programmers_errors(filled: tuple[LatentStore, np.ndarray]) -> None:
    store, found = filled
    reader = RowReader(store.root, store.spec, BATCHES)
    for out in (empty().astype(np.float32), empty()[..., ::-1], np.empty((1, 2, 2, 3), np.float16)):
        with pytest.raises(AssertionError):
            reader.read_into(FRAMES, found[0], out)


def test_threads_share_a_reader(filled: tuple[LatentStore, np.ndarray]) -> None:
    store, found = filled
    reader = RowReader(store.root, store.spec, BATCHES, ahead_rows=1)

    def read(seed: int) -> None:
        out = empty()
        for n in np.random.default_rng(seed).integers(0, len(found), 400):
            reader.read_into(FRAMES, found[n], out)
            assert crc32c(out) == found[n]["crc"]

    in_threads(read)
    reader.close()
    assert mapped_files(store.root.url) == 0
    read(0)


def damaged(root: DataRoot, rows: int = 5) -> tuple[LatentStore, LatentPart, np.ndarray]:
    store, part = full_store(root, rows)
    return store, part, addresses(store.commits(BATCH), [BATCH])


@given(st.integers(0, 5 * ROW_BYTES + INDEX_BYTES - 1), st.integers(0, 7))
def test_a_flipped_bit_is_found_by_reader_and_verify(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    store, part, found = damaged(DataRoot.open(str(tmp_path_factory.mktemp("bit"))))
    data = bytearray(Path(part.shard_path(0)).read_bytes())
    data[place] ^= 1 << bit
    Path(part.shard_path(0)).write_bytes(data)
    problems = store.verify()
    assert len(problems) == 1
    reader, out = RowReader(store.root, store.spec, [BATCH]), empty()
    for address in found:
        hit = place >= 5 * ROW_BYTES or place // ROW_BYTES == address["slot"]
        if not hit:
            reader.read_into(FRAMES, address, out)
            continue
        out[:] = 0
        with pytest.raises(DamagedError) as caught:
            reader.read_into(FRAMES, address, out)
        assert row_id(address).hex() in str(caught.value)
        assert part.shard_path(0) in str(caught.value)
        assert f"remove {part.commit_path(0)}" in str(caught.value)
        assert not out.any()  # nothing of a damaged row comes out
    if place < 5 * ROW_BYTES:
        assert problems[0].row == ids(5)[place // ROW_BYTES].hex()


@pytest.mark.parametrize("size", [0, 1, INDEX_BYTES, 4 * ROW_BYTES + INDEX_BYTES, 5 * ROW_BYTES + INDEX_BYTES - 1])
def test_short_shards_are_errors(data_root: DataRoot, size: int) -> None:
    store, part, found = damaged(data_root)
    Path(part.shard_path(0)).write_bytes(Path(part.shard_path(0)).read_bytes()[:size])
    with pytest.raises(DamagedError, match=r"short|cannot be read"):
        RowReader(store.root, store.spec, [BATCH]).read_into(FRAMES, found[0], empty())
    assert len(store.verify()) == 1


def test_missing_shards_are_errors(data_root: DataRoot) -> None:
    store, part, found = damaged(data_root)
    Path(part.shard_path(0)).unlink()
    reader = RowReader(store.root, store.spec, [BATCH])
    with pytest.raises(DamagedError, match="cannot be read"):
        reader.read_into(FRAMES, found[0], empty())
    with pytest.raises(DamagedError, match="cannot be read"):
        reader.will_need(FRAMES, found)
    assert "cannot be read" in store.verify()[0].what


def test_rows_without_a_commit_are_not_seen(data_root: DataRoot) -> None:
    store, part, found = damaged(data_root)
    Path(part.commit_path(0)).unlink()
    with pytest.raises(DamagedError, match="not committed"):
        RowReader(store.root, store.spec, [BATCH]).read_into(FRAMES, found[0], empty())


def test_a_slot_beyond_the_shard(data_root: DataRoot) -> None:
    store, _, found = damaged(data_root)
    found["slot"][0] = 5
    with pytest.raises(DamagedError, match="has 5 rows, none in slot 5"):
        RowReader(store.root, store.spec, [BATCH]).read_into(FRAMES, found[0], empty())


def test_an_address_of_another_row(data_root: DataRoot) -> None:
    """The crc travels with the address, so that a swapped address gives no wrong latents."""
    store, _, found = damaged(data_root)
    found["slot"][:2] = found["slot"][1::-1]
    with pytest.raises(DamagedError, match="other bytes"):
        RowReader(store.root, store.spec, [BATCH]).read_into(FRAMES, found[0], empty())


def test_a_page_is_reread_after_the_map_was_dropped(data_root: DataRoot) -> None:
    store, part, found = damaged(data_root)
    reader = RowReader(store.root, store.spec, [BATCH])
    reader.read_into(FRAMES, found[0], empty())
    part.erase([0])
    reader.close()
    with pytest.raises(DamagedError, match="withdrawn"):
        reader.read_into(FRAMES, found[0], empty())
    reader.read_into(FRAMES, found[1], empty())
    assert Path(part.path).is_dir()
