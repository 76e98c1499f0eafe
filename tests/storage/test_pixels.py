"""PixelStore, PixelReader, PixelFormat: the same rules as for latents, rows that differ in size, damage by name."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import ConflictError, DamagedError, StoreError
from storage.jpeg import decode_clip
from storage.part import PixelPart
from storage.reader import PixelReader, pixel_addresses, read_row
from storage.root import DataRoot
from storage.shard import INDEX_BYTES, ROWS_PER_SHARD
from storage.store import LatentStore, PixelStore
from storage.withdrawn import record_withdrawal
from tests.storage.pixel_stores import (
    SIDE,
    chunks,
    clip,
    pixel_commit,
    pixel_spec,
    pixel_store,
    write_pixels,
)
from tests.storage.stores import BATCH, FRAMES, full_store, ids, in_threads, mapped_files

FAILED = 2


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def addresses(store: PixelStore) -> np.ndarray:
    return pixel_addresses(store.commits(BATCH).filter(pl.col("status") == "ok"), [BATCH])


def test_what_was_written_is_read_by_zarr_and_by_us(data_root: DataRoot) -> None:
    """Across a full and a partial shard and a failed row; the reader agrees with the oracle."""
    store, part = pixel_store(data_root, ROWS_PER_SHARD + 9, failed=[ids(ROWS_PER_SHARD)[FAILED]])
    assert store.verify() == []
    array = zarr.open_array(f"{part.path}/pixels", mode="r")
    assert (array.shape, array.dtype) == ((ROWS_PER_SHARD + 9, FRAMES, SIDE, SIDE, 3), np.uint8)
    reader, out = PixelReader(data_root, store.spec, [BATCH]), np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    slots = [slot for slot in range(ROWS_PER_SHARD + 9) if slot != FAILED]
    for slot, address in list(zip(slots, addresses(store), strict=True))[:: ROWS_PER_SHARD // 16]:
        reader.will_need(FRAMES, address[None])
        reader.read_into(FRAMES, address, out)
        np.testing.assert_array_equal(out, read_row(store, BATCH, FRAMES, 0, slot))
        assert np.abs(out.astype(int) - clip(ids(slot + 1)[-1])).mean() < 3  # its own frames, not a neighbour's
    assert not read_row(store, BATCH, FRAMES, 0, FAILED).any()


def test_commits_say_where_rows_stand(data_root: DataRoot) -> None:
    store, part = pixel_store(data_root, 5, failed=[ids(5)[FAILED]])
    commits = store.commits(BATCH)
    assert commits["row_id"].to_list() == ids(5)
    sizes = [0 if chunk is None else len(chunk) for chunk in chunks(ids(5), failed=[ids(5)[FAILED]])]
    assert len(set(sizes)) > 2
    wanted = [int(sum(sizes[:n])) if n != FAILED else None for n in range(5)]
    assert commits["offset"].to_list() == wanted
    assert Path(part.shard_path(0)).stat().st_size == sum(sizes) + INDEX_BYTES


def test_pixels_and_latents_stand_beside_each_other(data_root: DataRoot) -> None:
    latents, _ = full_store(data_root, 3)
    pixels, part = pixel_store(data_root, 3)
    assert part.path.startswith(f"{data_root.url}/pixels/{pixels.digest}/{BATCH}/f{FRAMES}/")
    assert latents.commits(BATCH)["row_id"].to_list() == pixels.commits(BATCH)["row_id"].to_list()
    assert [found.spec for found in PixelStore.every(data_root)] == [pixels.spec]
    assert [found.spec for found in LatentStore.every(data_root)] == [latents.spec]
    assert PixelStore.open(data_root, pixels.digest).spec == pixels.spec
    assert latents.verify() == pixels.verify() == []


def test_write_refuses_rows_that_do_not_fit(data_root: DataRoot) -> None:
    store = PixelStore(data_root, pixel_spec())
    part = store.plan_part(BATCH, FRAMES, ids(3))
    commit, good = pixel_commit(part, 0), chunks(ids(3))
    with pytest.raises(StoreError, match="not the planned ones"):
        part.write_shard(0, good[:2], commit.head(2))
    with pytest.raises(StoreError, match="status ok have chunks"):
        part.write_shard(0, [*good[:2], None], commit)
    with pytest.raises(StoreError, match="status ok have chunks"):
        part.write_shard(0, good[:2], commit)
    with pytest.raises(StoreError, match="status ok have chunks"):
        part.write_shard(0, good, pixel_commit(part, 0, [ids(3)[0]]))
    with pytest.raises(DamagedError, match="lengths of"):
        part.write_shard(0, [*good[:2], b"\1" * 900], commit)
    assert not part.committed(0)
    assert not Path(part.shard_path(0)).exists()


def test_one_of_two_writers_wins(data_root: DataRoot) -> None:
    """Released together: the loser is told, and the winner's bytes stand."""
    store = PixelStore(data_root, pixel_spec())
    store.create()
    store.plan_part(BATCH, FRAMES, ids(20))
    together, lost = threading.Barrier(2), []

    def write() -> None:
        part = store.part(BATCH, FRAMES, 0)
        together.wait()
        try:
            write_pixels(part, 0)
        except ConflictError as error:
            lost.append(str(error))

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(lost) == 1
    assert "another writer was first" in lost[0]
    assert store.verify() == []


def test_a_shard_in_which_every_row_failed(data_root: DataRoot) -> None:
    store, part = pixel_store(data_root, 3, failed=ids(3))
    assert store.verify() == []
    assert store.unfinished(BATCH, FRAMES) is None
    assert Path(part.shard_path(0)).stat().st_size == INDEX_BYTES
    assert not read_row(store, BATCH, FRAMES, 0, 1).any()


DAMAGE: list[tuple[str, Callable[[PixelPart], object], str, str, int | None]] = [
    ("table", lambda part: flip(Path(part.shard_path(0)), 1), "c.0.0.0.0.0", "differ from their checksum", 0),
    ("jpeg", lambda part: flip(Path(part.shard_path(0)), 300), "c.0.0.0.0.0", "differ from their checksum", 0),
    ("last row", lambda part: flip(Path(part.shard_path(0)), -INDEX_BYTES - 1), "c.0.0.0.0.0", "their checksum", 4),
    ("index", lambda part: flip(Path(part.shard_path(0)), -INDEX_BYTES), "c.0.0.0.0.0", "index at its end", None),
    ("crc of index", lambda part: flip(Path(part.shard_path(0)), -1), "c.0.0.0.0.0", "index at its end", None),
    ("commit", lambda part: flip(Path(part.commit_path(0)), 90), "000000.parquet", "checksum", None),
    ("plan", lambda part: flip(Path(part.path, "plan.parquet"), 90), "plan.parquet", "damaged", None),
    ("no shard", lambda part: Path(part.shard_path(0)).unlink(), "c.0.0.0.0.0", "cannot be read", None),
    ("short", lambda part: Path(part.shard_path(0)).write_bytes(b"x"), "c.0.0.0.0.0", "1 bytes where", None),
    ("no commit", lambda part: Path(part.commit_path(0)).unlink(), "c.0.0.0.0.0", "without its commit", None),
    ("beyond", lambda part: Path(part.path, "pixels/c.2").write_bytes(b""), "c.2", "belongs to", None),
    (
        "quality",
        lambda part: Path(part.path, "pixels/zarr.json").write_text(
            Path(part.path, "pixels/zarr.json").read_text().replace('"quality": 90', '"quality": 91')
        ),
        "pixels/zarr.json",
        "describes",
        None,
    ),
    ("torn zarr.json", lambda part: flip(Path(part.path, "pixels/zarr.json"), 0), "zarr.json", "cannot open", None),
]


@pytest.mark.parametrize(("name", "damage", "file", "what", "row"), DAMAGE, ids=[case[0] for case in DAMAGE])
def test_damage_is_named(
    data_root: DataRoot, name: str, damage: Callable[[PixelPart], object], file: str, what: str, row: int | None
) -> None:
    store, part = pixel_store(data_root, 5, failed=[ids(5)[FAILED]])
    assert store.verify() == store.verify(BATCH) == []
    damage(store.part(BATCH, FRAMES, part.number))
    (problem,) = store.verify()
    assert problem.file.endswith(file), name
    assert what in problem.what
    assert problem.row == (None if row is None else ids(5)[row].hex())
    assert problem.remedy


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda part: flip(Path(part.shard_path(0)), 1), "other bytes than were committed"),
        (lambda part: flip(Path(part.shard_path(0)), 300), "other bytes than were committed"),
        (lambda part: Path(part.shard_path(0)).write_bytes(Path(part.shard_path(0)).read_bytes()[:50]), "is short"),
        (lambda part: Path(part.shard_path(0)).write_bytes(b""), "cannot be read"),
        (lambda part: Path(part.shard_path(0)).unlink(), "cannot be read"),
        (lambda part: Path(part.commit_path(0)).unlink(), "is not committed"),
        (lambda part: part.erase([0]), "withdrawn"),
        (lambda part: part.discard(0), "cannot be read"),
    ],
)
def test_the_reader_hands_out_nothing_damaged(
    data_root: DataRoot, damage: Callable[[PixelPart], object], what: str
) -> None:
    """Before a frame is seen, with file, row and remedy."""
    store, part = pixel_store(data_root, 5)
    first = addresses(store)[0]
    damage(part)
    out = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    with pytest.raises(DamagedError, match=what) as caught:
        PixelReader(data_root, store.spec, [BATCH]).read_into(FRAMES, first, out)
    assert part.shard_path(0) in str(caught.value)
    remedy = f"remove {part.commit_path(0)} and make the latents" if part.committed(0) else "make the latents of batch"
    assert f"Remedy: {remedy}" in str(caught.value)
    if part.committed(0) and Path(part.shard_path(0)).exists():
        assert ids(1)[0].hex() in str(caught.value)


def test_a_chunk_that_never_was_a_clip_is_named(data_root: DataRoot) -> None:
    """Its checksum holds, its JPEGs do not: a writer's fault, told like damage."""
    store = PixelStore(data_root, pixel_spec())
    store.create()
    part = store.plan_part(BATCH, FRAMES, ids(1))
    lengths = np.full(FRAMES, 5, "<u4").tobytes()
    part.write_shard(0, [lengths + b"12345" * FRAMES], pixel_commit(part, 0))
    with pytest.raises(DamagedError, match=f"row {ids(1)[0].hex()}: a JPEG of the chunk cannot be decoded"):
        PixelReader(data_root, store.spec, [BATCH]).read_into(
            FRAMES, addresses(store)[0], np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
        )


def test_withdrawn_rows_are_zeros_and_the_rest_stands(data_root: DataRoot) -> None:
    store, part = pixel_store(data_root, 5)
    record_withdrawal(data_root, "ab" * 16, [ids(5)[1]])
    (problem,) = store.verify()
    assert (problem.row, "withdraw the file again" in problem.what) == (ids(5)[1].hex(), True)
    before = read_row(store, BATCH, FRAMES, 0, 2)
    part.erase([1])
    assert store.verify() == []
    assert not read_row(store, BATCH, FRAMES, 0, 1).any()
    np.testing.assert_array_equal(read_row(store, BATCH, FRAMES, 0, 2), before)


def test_a_discarded_shard_is_free_and_sound(data_root: DataRoot) -> None:
    store, part = pixel_store(data_root, 5)
    size_bytes = Path(part.shard_path(0)).stat().st_size
    assert part.discard(0) == size_bytes
    assert (part.is_stored(0), part.committed(0)) == (False, True)
    assert store.verify() == []
    assert store.commits(BATCH)["reason"].to_list() == ["swept"] * 5
    assert part.discard(0) == 0
    part.erase([0])


def test_few_maps_stay_open_and_threads_share_them(data_root: DataRoot) -> None:
    store = PixelStore(data_root, pixel_spec())
    store.create()
    for number in range(4):
        write_pixels(store.plan_part(BATCH, FRAMES, ids(6, first=6 * number)), 0)
    reader, found = PixelReader(data_root, store.spec, [BATCH], ahead_rows=2), addresses(store)

    def read(seed: int) -> None:
        out = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
        for n in np.random.default_rng(seed).permutation(24):
            reader.read_into(FRAMES, found[n], out)
            assert np.abs(out.astype(int) - clip(ids(24)[n])).mean() < 3, n

    in_threads(read)
    assert mapped_files(data_root.url) <= 2
    reader.close()
    assert mapped_files(data_root.url) == 0


@given(
    parts=st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1, 3, 4])), min_size=1, max_size=4),
    failing=st.sets(st.integers(0, 23)),
    dying=st.sets(st.integers(0, 3)),
)
def test_the_store_is_a_dictionary_of_clips(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, int]], failing: set[int], dying: set[int]
) -> None:
    """Parts of any size and length, rows that fail, writers that die before their commit: what is read is what stood.

    The oracle is a dictionary of chunks, decoded by itself; zarr and the reader both agree with it.
    """
    root = DataRoot.open(str(tmp_path_factory.mktemp("store")))
    store, made = PixelStore(root, pixel_spec()), 0
    known: dict[bytes, bytes] = {}
    lost: set[bytes] = set()
    store.create()
    for number, (rows, frames) in enumerate(parts):
        row_ids = ids(rows, first=made)
        part = store.plan_part(BATCH, frames, row_ids)
        failed = [row for place, row in enumerate(row_ids, start=made) if place in failing]
        made += rows
        if number in dying:
            Path(part.shard_path(0)).write_bytes(b"".join(chunk or b"" for chunk in chunks(row_ids, frames, failed)))
            continue
        write_pixels(part, 0, failed)
        lost |= set(failed)
        known |= {row: chunk for row, chunk in zip(row_ids, chunks(row_ids, frames, failed), strict=True) if chunk}
    commits = store.commits(BATCH)
    good = commits.filter(pl.col("status") == "ok")
    assert set(good["row_id"]) == set(known)
    assert set(commits["row_id"]) - set(known) == lost
    assert len(store.verify()) == len([number for number in dying if number < len(parts)])
    reader = PixelReader(root, store.spec, [BATCH], ahead_rows=2)
    for row, address in zip(good.iter_rows(named=True), pixel_addresses(good, [BATCH]), strict=True):
        out, wanted = (np.empty(store.spec.row_shape(row["frames"]), np.uint8) for _ in range(2))
        decode_clip(known[row["row_id"]], wanted)
        reader.read_into(row["frames"], address, out)
        np.testing.assert_array_equal(out, wanted)
        np.testing.assert_array_equal(read_row(store, BATCH, row["frames"], row["part"], row["slot"]), wanted)
