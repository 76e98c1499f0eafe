"""Storage options of the encoding spec: what int8 costs, by value, and that every reader agrees.

Bounds are those of arithmetic, not of luck: half a step of the option, and half a step of float16 where it is computed.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from storage.errors import StoreError
from storage.part import LatentPart
from storage.reader import RowReader, addresses, read_row
from storage.root import DataRoot
from storage.shard import ROWS_PER_SHARD, packed, stored_values, unpacked
from storage.store import LatentStore
from tests.storage.stores import BATCH, FRAMES, commit_of, ids, new_store, spec, values, write

FINITE = st.floats(-65504, 65504, width=32)
LATENTS = arrays.arrays(np.float32, st.tuples(st.integers(1, 3), *[st.integers(1, 3)] * 4), elements=FINITE)
HALF_STEP = 2.0**-11  # of float16, relative
TINY = 2.0**-25  # half of float16's smallest step


def all_ok(latents: np.ndarray) -> np.ndarray:
    return np.ones(len(latents), dtype=bool)


def test_an_option_of_the_past_is_read_and_not_written() -> None:
    latents = values(ids(2))
    shape = (latents.shape[1], latents.shape[2], latents.shape[3], latents.shape[4])
    raw = packed(latents, all_ok(latents), "float16")
    np.testing.assert_array_equal(unpacked(raw, "keepbits7", shape), latents.astype(np.float16))
    with pytest.raises(StoreError, match=r"not stored as keepbits7 any more: set encoding\.storage to float16 or int8"):
        packed(latents, all_ok(latents), "keepbits7")


@given(LATENTS)
@example(np.zeros((1, 2, 2, 1, 1), np.float32))
@example(np.full((1, 1, 1, 1, 2), 1e-45, np.float32))
@example(np.array([65504, -65504, 256, -256], np.float32).reshape(1, 1, 1, 1, 4))
def test_int8_is_within_half_a_step_of_its_channel(latents: np.ndarray) -> None:
    """A step is 1/127 of the largest magnitude of the row's channel; no value is clipped, whatever the others hold."""
    stored = stored_values(latents, all_ok(latents), "int8").astype(np.float64)
    largest = np.abs(latents.astype(np.float64)).max(axis=(1, 3, 4), keepdims=True)
    bound = largest / 127 / 2 * (1 + 1e-5) + largest * HALF_STEP + TINY
    assert (np.abs(stored - latents) <= bound).all()


@given(LATENTS, st.sampled_from(["float16", "int8"]))
def test_what_is_packed_is_unpacked(latents: np.ndarray, storage: str) -> None:
    """Bytes alone give the values back; a row's do not depend on its neighbours."""
    latents = np.clip(latents, -60000, 60000)
    shape = (latents.shape[1], latents.shape[2], latents.shape[3], latents.shape[4])
    raw = packed(latents, all_ok(latents), storage)
    sized = spec(storage=storage, channels=shape[1], height=shape[2], width=shape[3])
    assert raw.shape == (len(latents), sized.row_bytes(shape[0]))
    stored = stored_values(latents, all_ok(latents), storage)
    np.testing.assert_array_equal(unpacked(raw, storage, shape), stored)
    for row, alone in enumerate(latents):
        np.testing.assert_array_equal(packed(alone[None], np.ones(1, bool), storage)[0], raw[row])
        np.testing.assert_array_equal(unpacked(raw[row], storage, shape), stored[row])


@pytest.mark.parametrize(("storage", "bound"), [("float16", 3e-4), ("int8", 1e-2)])
def test_noise_costs_what_was_measured(storage: str, bound: float) -> None:
    """RMS error of standard normal latents in the shape of VA-VAE: 2.1e-4 and 9.0e-3 in a study."""
    latents = np.random.default_rng(0).standard_normal((4, 16, 32, 16, 16), np.float32)
    stored = stored_values(latents, all_ok(latents), storage).astype(np.float32)
    error = float(np.sqrt(np.mean((stored - latents) ** 2)))
    assert bound / 2 < error < bound


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf, 7e4])
def test_rows_that_are_not_finite_are_refused(storage: str, broken: float) -> None:
    latents = values(ids(3))
    latents[1, 0, 0, 0, 0] = broken
    with pytest.raises(StoreError, match=r"rows \[1\] of this shard are not finite"):
        packed(latents, all_ok(latents), storage)
    failed = np.array([True, False, True])
    stored = stored_values(latents, failed, storage)
    assert np.isnan(stored[1]).all()
    assert np.isfinite(stored[failed]).all()


def int8_store(root: DataRoot, rows: int, failed: list[bytes]) -> tuple[LatentStore, LatentPart]:
    store = new_store(root, storage="int8")
    part = store.plan_part(BATCH, FRAMES, ids(rows))
    for shard in range(part.shards):
        write(part, shard, [row for row in failed if row in part.rows_of(shard)["row_id"].to_list()])
    return store, part


def by_hand(raw: np.ndarray) -> np.ndarray:
    """What the words in the array's metadata say, row by row."""
    count = FRAMES * 2 * 2 * 3
    integers = raw[:, :count].copy().view("i1").reshape(-1, FRAMES, 2, 2, 3)
    scales = raw[:, count:].copy().view("<f4")
    return np.asarray(integers.astype("f4") * scales[:, None, :, None, None])


def _zarr_python(path: str) -> np.ndarray:
    return np.asarray(zarr.open_array(path, mode="r")[:])


def _zarrs(path: str) -> np.ndarray:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        array = zarr.open_array(path, mode="r")
        assert type(array.async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
        return np.asarray(array[:])


def _tensorstore(path: str) -> np.ndarray:
    opened = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}, read=True)
    return np.asarray(opened.result().read().result())


@pytest.mark.parametrize("read", [_zarr_python, _zarrs, _tensorstore])
def test_other_readers_get_the_documented_bytes(data_root: DataRoot, read: Callable[[str], np.ndarray]) -> None:
    """Across a full and a partial shard and a failed row; the words in the metadata are all they need."""
    rows = ROWS_PER_SHARD + 7
    store, part = int8_store(data_root, rows, [ids(3)[2]])
    words = zarr.open_array(f"{part.path}/latent", mode="r").attrs["row"]
    assert words == "int8 [4, 2, 2, 3], then float32 [2], little-endian; value = int8 * float32 of its channel"
    found = by_hand(read(f"{part.path}/latent"))
    assert np.isnan(found[2]).all()
    reader, out = RowReader(data_root, store.spec, [BATCH]), np.empty((FRAMES, 2, 2, 3), np.float16)
    slots = [slot for slot in range(rows) if slot != 2]
    for slot, address in zip(slots, addresses(store.commits(BATCH), [BATCH]), strict=True):
        reader.read_into(FRAMES, address, out)
        np.testing.assert_array_equal(found[slot].astype(np.float16), out)
        np.testing.assert_array_equal(read_row(store, BATCH, FRAMES, 0, slot), out)


def test_the_store_measures_the_values_that_readers_see(data_root: DataRoot) -> None:
    store, _ = int8_store(data_root, 9, [ids(3)[2]])
    good = [slot for slot in range(9) if slot != 2]
    seen = stored_values(values(ids(9)), all_ok(values(ids(9))), "int8")[good].astype(np.float64)
    commits = store.commits(BATCH)
    np.testing.assert_allclose(np.array(commits["sums"][good].to_list()), seen.sum((1, 3, 4)), rtol=1e-12)
    np.testing.assert_allclose(np.array(commits["sums_squared"][good].to_list()), (seen**2).sum((1, 3, 4)), rtol=1e-12)
    assert store.verify() == []


@pytest.mark.parametrize("place", [0, 47, 48, 55], ids=["first value", "last value", "first scale", "last scale"])
def test_damage_anywhere_in_a_row_is_found(data_root: DataRoot, place: int) -> None:
    """Values and scales stand under one checksum."""
    store, part = int8_store(data_root, 3, [])
    path = Path(part.shard_path(0))
    data = bytearray(path.read_bytes())
    data[store.spec.row_bytes(FRAMES) + place] ^= 1
    path.write_bytes(data)
    (problem,) = store.verify()
    assert (problem.row, problem.what) == (ids(3)[1].hex(), "its bytes differ from their checksum")
    address = addresses(store.commits(BATCH), [BATCH])[1]
    with pytest.raises(StoreError, match="other bytes than were committed"):
        RowReader(data_root, store.spec, [BATCH]).read_into(FRAMES, address, np.empty((FRAMES, 2, 2, 3), np.float16))


def test_withdrawn_and_swept_rows(data_root: DataRoot) -> None:
    store, part = int8_store(data_root, 3, [])
    part.erase([1])
    (problem,) = store.verify()
    assert problem.row == ids(3)[1].hex()
    assert not _zarr_python(f"{part.path}/latent")[1].any()
    assert part.discard(0) > 0
    assert store.verify() == []


def test_a_second_writer_of_int8_gets_a_conflict(data_root: DataRoot) -> None:
    _, part = int8_store(data_root, 3, [])
    with pytest.raises(StoreError, match="committed already"):
        part.write_shard(0, values(ids(3)), commit_of(part, 0))
