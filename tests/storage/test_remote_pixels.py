"""Pixels on an object store: the clips of the store, the cache shared with latents, damage by name.

fsspec's memory file system stands for the bucket; S3 itself: tests/services/s3.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import atomic, remote
from storage.cache import Cache, open_rows
from storage.digest import crc32c
from storage.errors import DamagedError
from storage.jpeg import decode_clip
from storage.reader import PixelReader, addresses, open_reader, pixel_addresses
from storage.root import DataRoot
from storage.store import PixelStore
from tests.storage.pixel_stores import SIDE, chunks, pixel_spec, write_pixels
from tests.storage.stores import BATCH, FRAMES, Way, copies, full_store, ids
from tests.storage.test_remote_reader import lying

BATCHES = ["images.000000", BATCH]
ROWS = 40
FAILED = 2
Filled = tuple[PixelStore, dict[int, np.ndarray]]


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS_S", (0.0,) * len(remote.WAITS_S))


@pytest.fixture(params=["copies", "ranges"])
def way(request: pytest.FixtureRequest) -> Way:
    found: Way = request.param
    return found


def root_in_memory(folder: Path, cache_bytes: int = 10**9) -> DataRoot:
    return DataRoot.open(f"memory://{folder.name}", str(folder / "runs"), str(folder / "cache"), cache_bytes)


def filled(folder: Path) -> Filled:
    """Two parts of clips, of which one row failed, and one of images; addresses by frames."""
    store = PixelStore(root_in_memory(folder), pixel_spec())
    store.create()
    for batch, frames, row_ids in (
        (BATCH, FRAMES, ids(ROWS)),
        (BATCH, FRAMES, ids(3, first=1000)),
        (BATCHES[0], 1, ids(5, first=2000)),
    ):
        write_pixels(store.plan_part(batch, frames, row_ids), 0, failed=[ids(ROWS)[FAILED]])
    return store, {FRAMES: found(store, BATCH), 1: found(store, BATCHES[0])}


def found(store: PixelStore, batch: str) -> np.ndarray:
    return pixel_addresses(store.commits(batch).filter(pl.col("status") == "ok"), BATCHES)


def opened(filled: Filled, way: Way) -> PixelReader:
    store, stored = filled
    return PixelReader(store.root, store.spec, BATCHES, stored if way == "copies" else None)


def wanted(row_id: bytes, frames: int = FRAMES) -> np.ndarray:
    out = np.empty((frames, SIDE, SIDE, 3), np.uint8)
    (chunk,) = chunks([row_id], frames)
    assert chunk is not None
    decode_clip(chunk, out)
    return out


GOOD = [row for row in ids(ROWS) if row != ids(ROWS)[FAILED]] + ids(3, first=1000)  # by place in stored[FRAMES]


@pytest.fixture(scope="module")
def store_and_rows(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    return filled(tmp_path_factory.mktemp("pixels"))


@given(picked=st.lists(st.integers(0, len(GOOD) - 1), max_size=12), announced=st.booleans())
def test_clips_are_those_of_the_store(store_and_rows: Filled, way: Way, picked: list[int], announced: bool) -> None:
    _, stored = store_and_rows
    reader = opened(store_and_rows, way)
    if announced:
        reader.will_need(FRAMES, stored[FRAMES][picked])
        reader.will_need(1, stored[1])
    out, image = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8), np.empty((1, SIDE, SIDE, 3), np.uint8)
    for place in picked:
        reader.read_into(FRAMES, stored[FRAMES][place], out)
        np.testing.assert_array_equal(out, wanted(GOOD[place]))
    reader.read_into(1, stored[1][3], image)
    np.testing.assert_array_equal(image, wanted(ids(5, first=2000)[3], 1))
    reader.close()


def test_the_same_bytes_as_on_a_file_system(tmp_path: Path) -> None:
    """Written there by the same code: a bucket is verified, listed and mapped as a folder is."""
    store, stored = filled(tmp_path)
    assert store.verify() == []
    assert [one.digest for one in PixelStore.every(store.root)] == [store.digest]
    local = PixelStore(DataRoot.open(str(tmp_path / "root")), store.spec)
    local.create()
    part = local.plan_part(BATCH, FRAMES, ids(ROWS))
    write_pixels(part, 0, failed=[ids(ROWS)[FAILED]])
    there = store.part(BATCH, FRAMES, 0)
    for name in ("plan.parquet", "commits/000000.parquet", "pixels/c.0.0.0.0.0", "pixels/zarr.json", "zarr.json"):
        assert atomic.read_bytes(f"{there.path}/{name}") == atomic.read_bytes(f"{part.path}/{name}")
    reader = PixelReader(local.root, local.spec, BATCHES, stored)  # on a file system nothing is copied
    out = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    reader.read_into(FRAMES, stored[FRAMES][0], out)
    np.testing.assert_array_equal(out, wanted(GOOD[0]))
    assert not Path(local.root.cache_folder, "nextvid").exists()


def test_which_way_a_set_is_read(tmp_path: Path) -> None:
    """Whole shards if all of them fit beside what is held already, else rows; nothing in between, never a refusal."""
    store, stored = filled(tmp_path)
    sizes = [len(atomic.read_bytes(store.part(batch, frames, number).shard_path(0))) for batch, frames, number in (
        (BATCH, FRAMES, 0), (BATCH, FRAMES, 1), (BATCHES[0], 1, 0))]  # fmt: skip

    def way(cache_bytes: int) -> Way:
        root = root_in_memory(tmp_path, cache_bytes)
        for copy in copies(Path(root.cache_folder)):
            copy.unlink()
        reader = PixelReader(root, store.spec, BATCHES, stored)
        reader.will_need(FRAMES, stored[FRAMES][:1])
        reader.close()
        return "copies" if copies(Path(root.cache_folder)) else "ranges"

    assert way(sum(sizes)) == "copies"
    assert way(sum(sizes) - 1) == "ranges"
    assert way(min(sizes)) == "ranges"  # where shards of latents may fit
    assert way(0) == "ranges"
    root = root_in_memory(tmp_path, sum(sizes) + 999)
    other = Cache(root, {f"{root.url}/other": 1000})
    assert other.hold()
    assert way(sum(sizes) + 999) == "ranges"
    assert way(sum(sizes) + 1000) == "copies"
    other.release()
    assert way(sum(sizes) + 999) == "copies"


def test_latents_and_pixels_of_a_run_share_the_bound(tmp_path: Path) -> None:
    """Neither takes the other's copies, however often they are read, and both together keep the bound."""
    store, stored = filled(tmp_path)
    latents, _ = full_store(store.root, 300)
    rows = addresses(latents.commits(BATCH), BATCHES)
    size_bytes = 300 * 96 + 2 * 4100
    pixels_bytes = sum(
        len(atomic.read_bytes(store.part(batch, frames, number).shard_path(0)))
        for batch, frames, number in ((BATCH, FRAMES, 0), (BATCH, FRAMES, 1), (BATCHES[0], 1, 0))
    )
    for beside, copied in ((pixels_bytes, 2), (pixels_bytes - 1, 0)):
        root = DataRoot.open(store.root.url, "/nowhere", str(tmp_path / f"cache{beside}"), size_bytes + beside)
        reader = open_reader(root, latents.spec, BATCHES, {FRAMES: rows})
        pixels = PixelReader(root, store.spec, BATCHES, stored)
        out = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
        for _ in range(2):
            reader.will_need(FRAMES, rows)
            pixels.will_need(FRAMES, stored[FRAMES])
            pixels.read_into(FRAMES, stored[FRAMES][5], out)
            np.testing.assert_array_equal(out, wanted(GOOD[5]))
            held = copies(tmp_path / f"cache{beside}")
            assert sum(path.stat().st_size for path in held) <= root.cache_bytes
        assert sum("/latents/" in str(path) for path in held) == 2
        assert sum("/pixels/" in str(path) for path in held) == copied
        assert not Cache(root, {f"{root.url}/more": pixels_bytes}).hold()
        reader.close()
        pixels.close()


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-7],
    "empty": lambda data: b"",
    "too long": lambda data: data + b"x",
    "altered": lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_answer_that_lies_is_asked_for_again(
    tmp_path: Path, way: Way, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]
) -> None:
    made = filled(tmp_path)
    reader, out = opened(made, way), np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    left = lying(monkeypatch, change, 3)
    reader.read_into(FRAMES, made[1][FRAMES][0], out)
    np.testing.assert_array_equal(out, wanted(GOOD[0]))
    assert left == [0]
    reader.close()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_and_told_in_the_end(
    tmp_path: Path, way: Way, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]
) -> None:
    store, stored = made = filled(tmp_path)
    reader, part = opened(made, way), store.part(BATCH, FRAMES, 0)
    lying(monkeypatch, change, 1000)
    out = np.full((FRAMES, SIDE, SIDE, 3), 7, np.uint8)
    with pytest.raises(DamagedError, match=f"in {len(remote.WAITS_S) + 1} tries") as caught:
        reader.read_into(FRAMES, stored[FRAMES][0], out)
    assert (out == 7).all()
    assert f"{part.shard_path(0)}, row {GOOD[0].hex()}: " in str(caught.value)
    assert f"Remedy: remove {part.commit_path(0)} and make the latents" in str(caught.value)
    assert copies(tmp_path / "cache") == []  # what failed its check has no name in the cache
    reader.close()


def test_a_shard_that_is_gone_or_swept_is_told(tmp_path: Path, way: Way) -> None:
    store, stored = made = filled(tmp_path)
    reader, out = opened(made, way), np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    atomic.remove_tree(store.part(BATCH, FRAMES, 0).shard_path(0))
    store.part(BATCH, FRAMES, 1).discard(0)
    for place in (0, ROWS):
        with pytest.raises(DamagedError, match="Remedy: remove"):
            reader.read_into(FRAMES, stored[FRAMES][place], out)
    reader.close()


def test_withdrawn_rows_do_not_hinder_a_copy(tmp_path: Path, way: Way) -> None:
    store, stored = made = filled(tmp_path)
    store.part(BATCH, FRAMES, 0).erase([1])
    reader, out = opened(made, way), np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    reader.read_into(FRAMES, stored[FRAMES][0], out)
    np.testing.assert_array_equal(out, wanted(GOOD[0]))
    with pytest.raises(DamagedError, match="withdrawn"):
        reader.read_into(FRAMES, stored[FRAMES][1], out)
    reader.close()


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
def test_row_files_are_compared_with_their_checksum(tmp_path: Path, cache_bytes: int) -> None:
    """Of a file that was made again, in the same size, no old copy is read."""
    root, path = root_in_memory(tmp_path, cache_bytes), f"memory://{tmp_path.name}/rows.npy"
    for number in (1, 2):
        array = np.full(9, number)
        np.save(tmp_path / "rows.npy", array)
        data = (tmp_path / "rows.npy").read_bytes()
        atomic.publish_bytes(path, data)
        np.testing.assert_array_equal(open_rows(root, path, crc32c(data)), array)
    with pytest.raises(DamagedError, match="differ from their checksum, in"):
        open_rows(root, path, crc32c(data) ^ 1)
